#!/usr/bin/env python3
"""What a point of a landscape costs, in units of a forward pass of the same tokens, and where other code goes wrong.

The candidates of a part take turns within one process, so that their ratios hold when the machine's speed drifts: what
is reported is the median of the ratios of each round. Weights are random and nothing is padded.

    python benchmarks/landscape.py --out benchmarks/results
    PYTHONPATH=folder/with/loss-landscapes python benchmarks/landscape.py --out benchmarks/results --parts peer

The package loss-landscapes (3.0.6 from PyPI) is compared where it can be imported.
"""

import argparse
import json
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from fisher import facts_of, slug
from fisher_candidates import Batch, Case
from torch import Tensor, nn
from torch.func import functional_call, vmap

import fisherscope as fs
from fisherscope.landscape import random_directions
from fisherscope.landscape.evaluate import Evaluator
from fisherscope.landscape.scan import MARGIN
from fisherscope.models import measuring
from fisherscope.objectives import predict

BASE = Case("bert", 8, 128)
MEASURED = "fisherscope"
"""The candidate that the others of a part are compared with."""

Runs = Mapping[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder, or the .json file to go on with")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of every candidate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models and batches, to see that everything runs")
    args = parser.parse_args()
    args.precision = "float32"
    warnings.simplefilter("ignore")  # of vmap, about kernels it has to call in a loop
    transformers.logging.set_verbosity_error()
    facts = facts_of(args)
    out = args.out if args.out.suffix == ".json" else args.out / f"landscape-{slug(facts, args.quick)}.json"
    report = json.loads(out.read_text()) if out.exists() else {**facts, "rounds": {}, "parts": {}}
    for name in args.parts:
        print(name, flush=True)
        report["parts"][name] = PARTS[name](args)
        report["rounds"][name] = 1 if args.quick else args.rounds
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(report))
    print(out)


def in_turn(runs: Runs, unit: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Median seconds of every run, and the median over the rounds of its ratio to one of them."""

    def clock(run: Callable[[], object]) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in runs.values():
        run()
    rounds = [{name: clock(run) for name, run in runs.items()} for _ in range(1 if args.quick else args.rounds)]
    return {
        name: {
            "seconds": statistics.median(taken[name] for taken in rounds),
            "ratio": statistics.median(taken[name] / taken[unit] for taken in rounds),
            "all_seconds": [taken[name] for taken in rounds],
        }
        for name in runs
    }


def evaluator_for(model: nn.Module, batch: Batch, case: Case, part: str = "") -> Evaluator:
    """Two axes, along which only the parameters move whose name has a part."""
    directions = random_directions(model, 2, seed=0)
    moves = [{n: t if part in n else torch.zeros_like(t) for n, t in d.items()} for d in directions]
    return Evaluator(model, [batch], case.objective, moves)


def point_of(evaluator: Evaluator) -> Callable[[], object]:
    """The next of many points of one row."""
    columns = iter(range(1, 10**6))
    return lambda: list(evaluator([(0.01, 1e-4 * next(columns))]))


def cost_of_a_point(args: argparse.Namespace) -> dict[str, Any]:
    """A point in the middle of a row, and one that begins a row, against forward passes and a published loop."""
    model, batch = BASE.model(args.device, args.quick), BASE.batch(args.device, args.quick)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    directions = random_directions(model, 2, seed=0)
    within, begins = (Evaluator(model, [batch], BASE.objective, directions) for _ in range(2))
    rows = iter(range(1, 10**6))
    with measuring(model), torch.no_grad():
        runs = {
            "forward pass, all logits": lambda: model(**inputs),
            "forward pass, head at labels only": lambda: predict(model, batch, BASE.objective).losses(),
            MEASURED: point_of(within),
            f"{MEASURED}, first of a row": lambda: list(begins([(1e-4 * next(rows), 0.01)])),
            "published loop": published_loop(model, batch, directions),
        }
        rows_of = in_turn(runs, "forward pass, all logits", args)
        within.restore()
    own, same_pass = (rows_of[name]["all_seconds"] for name in (MEASURED, "forward pass, head at labels only"))
    return {"rows": rows_of, "over_the_pass_it_runs": statistics.median(map(operator.truediv, own, same_pass))}


def published_loop(model: nn.Module, batch: Batch, directions: list[dict[str, Tensor]]) -> Callable[[], object]:
    """In the style of Li et al. 2018: new weights from copies on the CPU at every point, the loss of the head."""
    weights = [p.data for p in model.parameters()]
    first, second = ([tensor.cpu() for tensor in direction.values()] for direction in directions)

    def run() -> float:
        changes = [x * 0.01 + y * 0.02 for x, y in zip(first, second, strict=True)]
        for parameter, weight, change in zip(model.parameters(), weights, changes, strict=True):
            parameter.data = weight + change.to(weight)
        loss = float(model(**batch).loss)
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data = weight
        return loss

    return run


def gain_of_the_prefix(args: argparse.Namespace) -> dict[str, Any]:
    """Points along which only the last layers move, with what comes before them kept, and without."""
    model, batch = BASE.model(args.device, args.quick), BASE.batch(args.device, args.quick)
    layers = int(model.config.num_hidden_layers)  # pyright: ignore
    found = {}
    for name, part in {"last layer": f"layer.{layers - 1}.", "middle layer": f"layer.{layers // 2}."}.items():
        kept, full = (evaluator_for(model, batch, BASE, part) for _ in range(2))
        full.prefix = None
        with measuring(model):
            rows = in_turn({"in full": point_of(full), MEASURED: point_of(kept)}, "in full", args)
            same_bits = next(full([(0.3, 0.2)])).loss == next(kept([(0.3, 0.2)])).loss
            kept.restore()
        held = 0 if kept.prefix is None else kept.prefix.used
        found[name] = {"rows": rows, "gain": 1 / rows[MEASURED]["ratio"], "held_bytes": held, "same_bits": same_bits}
    return found


class Outputs(nn.Module):
    """What :func:`predict` finds, as the output of a module whose parameters can be replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, objective: str) -> Tensor:
        return predict(self.model, batch, objective).outputs


def gain_of_vmap(args: argparse.Namespace) -> dict[str, Any]:
    """Several points in one forward pass, over stacked parameters; the engine does not do it, and this says why."""
    small, _ = fs.load_model("builtin:bert", device=args.device)
    shapes = [("builtin:bert", small, 1, 16), ("builtin:bert", small, 4, 32), ("builtin:bert", small, 16, 128)]
    if not args.quick:
        base = BASE.model(args.device)
        shapes += [("BERT-base", base, 1, 16), ("BERT-base", base, 2, 32)]
    found = {}
    for attention in ("sdpa", "eager"):
        for name, model, size, length in shapes:
            model.set_attn_implementation(attention)  # pyright: ignore[reportCallIssue]
            batch = tokens(model, size, length, args.device)
            with measuring(model), torch.no_grad():
                rows = in_turn(several_points(model, batch, count=4), "one by one", args)
            found[f"{name}, {size} x {length} tokens, {attention}"] = 1 / rows["vmap"]["ratio"]
    return found


def tokens(model: nn.Module, size: int, length: int, device: str) -> Batch:
    ids = torch.randint(5, model.config.vocab_size, (size, length), generator=torch.Generator().manual_seed(0))  # pyright: ignore
    labels = torch.where(torch.arange(length) % 7 == 1, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def several_points(model: nn.Module, batch: Batch, count: int) -> Runs:
    direction = random_directions(model, 1, seed=0)[0]
    evaluator = Evaluator(model, [batch], "mlm", [direction])
    moved = {n: p for n, p in model.named_parameters() if bool(direction[n].any())}
    base, outputs = {name: p.detach().clone() for name, p in moved.items()}, Outputs(model)
    steps = torch.linspace(-0.1, 0.1, count, device=batch["labels"].device)

    def one_by_one() -> None:
        list(evaluator([(float(step),) for step in steps]))
        evaluator.restore()

    def together() -> Tensor:
        stacked = {
            f"model.{name}": weight + steps.view(-1, *[1] * weight.ndim) * direction[name]
            for name, weight in base.items()
        }
        return vmap(lambda weights: functional_call(outputs, weights, (batch, "mlm")))(stacked)

    return {"one by one": one_by_one, "vmap": together}


def points_saved(args: argparse.Namespace) -> dict[str, Any]:
    """A surface of the built-in model in full, and by as many points as a tolerance needs: how far off the rest is."""
    model, tokenizer = fs.load_model("builtin:bert", device=args.device)
    count, points = (4, 9) if args.quick else (24, 51)
    batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=count, batch_size=8)
    scanned = partial(fs.scan_landscape, model, batches, points=points, clip=True, progress=False)
    whole, seconds = _timed(scanned)
    ceiling, found = whole.references["uniform"] + MARGIN, {}
    for tolerance in (0.05, 0.02, 0.01):
        some, own = _timed(partial(scanned, adaptive=tolerance))
        off = np.abs(some.loss - whole.loss) / whole.loss
        off = off[~some.evaluated & (whole.loss < ceiling)]
        found[f"{100 * tolerance:g} %"] = {
            "points": int(some.evaluated.sum()),
            "share": float(some.evaluated.mean()),
            "times_faster": seconds / own,
            "estimated": some.prediction.percentile95,
            "median": float(np.median(off)) if off.size else 0.0,
            "percentile95": float(np.percentile(off, 95)) if off.size else 0.0,
            "maximum": float(off.max()) if off.size else 0.0,
        }
    return {"points": whole.loss.size, "seconds": seconds, "rows": found}


def _timed(work: Callable[[], fs.Landscape]) -> tuple[fs.Landscape, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """loss-landscapes 3.0.6: the cost of a plane, and whether its cells are what it says they are."""
    try:
        import loss_landscapes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return {"failure": str(error)}
    case = Case("bert", 4, 32)
    batch, size = case.batch(args.device, tiny=True), 3 if args.quick else 11
    models = {name: case.model(args.device, tiny=True) for name in (MEASURED, "loss-landscapes")}
    directions = random_directions(models[MEASURED], 2, seed=0)

    def ours() -> fs.Landscape:
        return fs.scan_landscape(models[MEASURED], [batch], points=size, directions=directions, progress=False)

    def loss(wrapper: Any) -> float:
        with torch.no_grad():
            return float(wrapper.modules[0](**batch).loss)

    plane = partial(loss_landscapes.random_plane, models["loss-landscapes"], loss, steps=size, deepcopy_model=True)
    rows = in_turn({MEASURED: ours, "loss-landscapes": plane}, MEASURED, args)
    return {"rows": rows, "points": size * size, "oracle": {MEASURED: oracle_of_ours(), **oracle(loss_landscapes)}}


class Pair(nn.Module):
    """Two numbers: a model whose place in the plane can be read off."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))


def oracle(package: Any, steps: int = 5) -> dict[str, dict[str, Any]]:
    """Where its cells really are: the metric gives the place of the model instead of a loss."""

    def place(wrapper: Any) -> list[float]:
        return next(wrapper.modules[0].parameters()).detach().tolist()

    start = Pair(0, 0)
    found = package.planar_interpolation(start, Pair(1, 0), Pair(0, 1), place, steps=steps)
    wanted = np.stack(np.meshgrid(np.arange(steps), np.arange(steps), indexing="ij"), -1) / steps
    between = judged(found, wanted, start, (0.0, 0.0))
    start = Pair(1, 2)
    torch.manual_seed(0)
    found = package.random_plane(start, place, steps=steps, normalization=None) - np.array([1.0, 2.0])
    # the axes, from two rows that it walks in the same direction; the model in the middle, as its code says
    across, along = found[0, 1] - found[0, 0], (found[2, 0] - found[0, 0]) / 2
    middle = np.arange(steps) - steps / 2
    wanted = middle[:, None, None] * along + middle[None, :, None] * across
    around = judged(found, wanted, start, (1.0, 2.0))
    return {"loss-landscapes, planar_interpolation": between, "loss-landscapes, random_plane": around}


def judged(found: np.ndarray, wanted: np.ndarray, model: nn.Module, before: tuple[float, float]) -> dict[str, Any]:
    now = next(model.parameters())
    return {
        "cells": found[..., 0].size,
        "wrong": int((np.abs(found - wanted).max(-1) > 1e-6).sum()),
        "model_in_the_grid": bool((np.abs(found).max(-1) < 1e-6).any()),
        "model_moved_by": float((now.detach() - torch.tensor(before, dtype=torch.float64)).norm()),
        "gradients_left_on": now.requires_grad,
    }


def oracle_of_ours(points: int = 5) -> dict[str, Any]:
    """The same question, one coordinate at a time."""
    model = Pair(1, 2)
    axes = [{"place": torch.tensor(d, dtype=torch.float64)} for d in ([1.0, 0.0], [0.0, 1.0])]

    def coordinate(number: int) -> np.ndarray:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return model.place[number : number + 1] - (1.0, 2.0)[number]  # pyright: ignore[reportIndexIssue]

        options = {"objective": loss, "points": points, "directions": axes, "progress": False}
        return fs.scan_landscape(model, [{"x": torch.zeros(1)}], **options).loss

    steps = np.linspace(-1, 1, points)
    wanted = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1)
    return judged(np.stack([coordinate(0), coordinate(1)], -1), wanted, model, (1.0, 2.0))


PARTS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "point": cost_of_a_point,
    "prefix": gain_of_the_prefix,
    "vmap": gain_of_vmap,
    "adaptive": points_saved,
    "peer": peer,
}


def markdown(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    text = [
        f"# Cost of a point of a landscape: {report['device']}, {report['precision']}",
        f"{report['date']}; {versions}. Candidates took turns; medians of the ratios of every round. Random "
        "weights, no padding. Rounds: " + ", ".join(f"{name} {n}" for name, n in report["rounds"].items()) + ".",
    ]
    for name, part in report["parts"].items():
        text += TEXTS[name](part)
    return "\n\n".join(text) + "\n"


def _table(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *rows])


def _rows(rows: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    cells = [[name, f"{row['seconds']:.3g}", f"{row['ratio']:.3f}"] for name, row in rows.items()]
    return _table(["candidate", "seconds", f"/ {unit}"], cells)


def _point(part: Mapping[str, Any]) -> list[str]:
    return [
        f"## A point, BERT-base-sized MLM, B={BASE.batch_size}, T={BASE.length}",
        _rows(part["rows"], "forward pass"),
        f"A point takes {part['over_the_pass_it_runs']:.3f} times the forward pass that it runs, whose head sees only "
        "positions with labels. The published loop builds new weights from copies at every point and takes the loss "
        "of the model's head.",
    ]


def _prefix(part: Mapping[str, Any]) -> list[str]:
    cells = [
        [name, f"{row['gain']:.2f}", f"{row['held_bytes'] / 2**20:.1f}", "yes" if row["same_bits"] else "NO"]
        for name, row in part.items()
    ]
    return [
        "## One layer moves: what comes before it is computed once",
        _table(["what moves", "times faster than in full", "MiB held per batch", "same bits"], cells),
    ]


def _vmap(part: Mapping[str, float]) -> list[str]:
    return [
        "## Four points in one forward pass (vmap over stacked parameters), times faster than one by one",
        _table(["model and batch", "times faster"], [[name, f"{gain:.2f}"] for name, gain in part.items()]),
        "Below 1, it is slower; the engine measures points one by one.",
    ]


def _adaptive(part: Mapping[str, Any]) -> list[str]:
    cells = [
        [name, f"{row['points']:,} ({row['share']:.1%})", f"{row['times_faster']:.1f}"]
        + [f"{row[key]:.2%}" for key in ("estimated", "percentile95", "median", "maximum")]
        for name, row in part["rows"].items()
    ]
    titles = ["tolerance", "points", "times faster", "95 % estimated", "95 % true", "median", "largest"]
    return [
        f"## Fewer points: builtin:bert, {part['points']:,} points in {part['seconds']:.0f} s in full",
        _table(titles, cells),
        "Errors are |predicted - true| / true of the points that were not measured and are below ln V + 0.5 nats, "
        "against the surface in full; the estimate is the cross-validation's.",
    ]


def _peer(part: Mapping[str, Any]) -> list[str]:
    title = "## loss-landscapes 3.0.6 from PyPI"
    if "failure" in part:
        return [title, f"Not compared: {part['failure']}."]
    cells = [
        [
            name,
            f"{row['wrong']} of {row['cells']}",
            "yes" if row["model_in_the_grid"] else "NO",
            f"{row['model_moved_by']:.2g}",
            "yes" if row["gradients_left_on"] else "NO",
        ]
        for name, row in part["oracle"].items()
    ]
    return [
        title,
        f"{part['points']} points of a tiny model, all of a call:",
        _rows(part["rows"], MEASURED),
        "Cells against where they should be, read off a model of two numbers:",
        _table(["code", "cells elsewhere", "model in the grid", "model moved by", "gradients left on"], cells),
    ]


TEXTS: Mapping[str, Callable[[Any], list[str]]] = {
    "point": _point,
    "prefix": _prefix,
    "vmap": _vmap,
    "adaptive": _adaptive,
    "peer": _peer,
}


if __name__ == "__main__":
    main()
