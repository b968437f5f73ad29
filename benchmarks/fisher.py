#!/usr/bin/env python3
"""What Fisher scores of a batch cost, in units of a plain forward and backward pass of the same batch.

The candidates of a case take turns within one process, so that their ratios hold when the machine's speed drifts; peak
memory on a CPU is that of a process of its own for each. Weights are random and nothing is padded. Every case is
written as soon as it is done, and the same command goes on with those that are missing.

    python benchmarks/fisher.py --out benchmarks/results
    python benchmarks/fisher.py --out benchmarks/results --cases GPT-2 "cost against"
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from fisher_candidates import CANDIDATES, PEER_CHUNK, Batch, Candidate, Case, Run, Sums, candidates_for, zeros
from fisher_report import markdown

from fisherscope import estimate_fisher
from fisherscope._machine import device_name
from fisherscope.fisher import kernels
from fisherscope.models import measuring

CASES = {
    "BERT-base MLM, B=8, T=128": Case("bert", 8, 128),
    "BERT-base MLM, B=32, T=16": Case("bert", 32, 16),
    "GPT-2 LM, B=4, T=128": Case("gpt2", 4, 128),
    "T5-base, B=4, T=128 to 64": Case("t5", 4, 128, 64),
}
# Of BERT-base: the axis, and for every point the shape of a batch and how many there are.
CURVES = {
    "cost against T": ("length", [(Case("bert", 8, length), 1) for length in (16, 32, 64, 128, 256)]),
    "cost against B": ("batch_size", [(Case("bert", size, 128), 1) for size in (1, 2, 4, 8, 16, 32)]),
    "cost against N": ("examples", [(Case("bert", 8, 64), number) for number in (1, 2, 4, 8)]),
}
# Relative to the largest score of a parameter; who leaves out a term is off by 0.1 and more.
TOLERANCE = {"float32": 1e-4, "tf32": 3e-2, "bf16": 0.3}
SHORTEST_CUDA_SECONDS = 0.2  # of what is timed at once, against the jitter of the clock and of launches


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")  # of the peers, about their own insides
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    if args.peak:
        print(json.dumps(measure_peak(shape(CASES[args.cases[0]], args), CANDIDATES[args.peak], args)))
        return
    facts = facts_of(args)
    out = args.out if args.out.suffix == ".json" else args.out / f"fisher-{slug(facts, args.quick)}.json"
    report = json.loads(out.read_text()) if out.exists() else {**facts, "cases": {}, "curves": {}}
    for kind, known, measure in (("cases", CASES, measure_case), ("curves", CURVES, measure_curve)):
        for name in known:
            if any(part in name for part in args.cases) and (args.redo or name not in report[kind]):
                print(name, flush=True)
                report[kind][name] = measure(name, args)
                write(report, out)
    print(out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder, or the .json file to go on with")
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of names of cases and curves; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every candidate")
    parser.add_argument("--redo", action="store_true", help="measure again what the file already has")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=TOLERANCE, default="float32", help="bf16: autocast")
    parser.add_argument("--quick", action="store_true", help="tiny models and batches, to see that everything runs")
    parser.add_argument("--peak", choices=CANDIDATES, help=argparse.SUPPRESS)  # what the processes of peak_of() do
    args = parser.parse_args()
    if args.precision == "tf32" and args.device == "cpu":
        parser.error("tf32 needs --device cuda")
    return args


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    return {
        "device": device_name(args.device) + threads,
        "precision": args.precision,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "transformers", "opacus", "triton")},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(facts: Mapping[str, Any], quick: bool) -> str:
    words = [facts["device"], facts["precision"], *(["quick"] if quick else []), facts["date"]]
    return re.sub("[^a-z0-9]+", "-", " ".join(words).lower())


def write(report: Mapping[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, out)
    out.with_suffix(".md").write_text(markdown(report))


def shape(case: Case, args: argparse.Namespace) -> Case:
    """The case, or a small one like it that still takes more than one chunk of the peers."""
    return small(case) if args.quick else case


def small(case: Case) -> Case:
    return replace(
        case, batch_size=min(case.batch_size, PEER_CHUNK + 1), length=min(case.length, 8), target=min(case.target, 5)
    )


def measure_case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    case = shape(CASES[name], args)
    rows = timed(case, args)
    gc.collect()  # the models of the peers are cycles
    for candidate, row in rows.items():
        row["note"] = CANDIDATES[candidate].note
        if "failure" in row:
            continue
        row["over_plain"] = row["seconds"] / rows["plain"]["seconds"]
        row |= errors(case, CANDIDATES[candidate], args)
        if not args.quick or candidate in ("plain", "fisherscope"):
            row |= peak_of(name, candidate, args)
            row["peak_over_plain"] = row["peak_bytes"] / max(rows["plain"]["peak_bytes"], 1)
    for candidate, row in rows.items():
        print("  ", candidate, {key: row[key] for key in ("over_plain", "peak_over_plain", "failure") if key in row})
    return {**asdict(case), "objective": case.objective, "rounds": args.rounds, "candidates": rows}


def timed(case: Case, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds per candidate, or how its first run failed."""
    model, batch = case.model(args.device, args.quick), case.batch(args.device, args.quick)
    rows: dict[str, dict[str, Any]] = {name: {} for name in candidates_for(case, args.device)}
    runs, sums = {}, zeros(model)
    for name, row in rows.items():
        try:
            own = CANDIDATES[name].model(model)
            to = sums if own is model else zeros(own)
            run = in_precision(CANDIDATES[name].start(own, batch, case.objective, to), args)
            with measuring(own):
                run()
        except Exception as error:  # whatever a peer raises
            row["failure"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            runs[name] = run
    with measuring(model):
        for name, seconds in in_turn(runs, args).items():
            rows[name] |= {"seconds": statistics.median(seconds), "all_seconds": seconds}
    return rows


def in_precision(run: Run, args: argparse.Namespace) -> Run:
    """A run under autocast; entered each time, since leaving it forgets the weights it has cast."""

    def cast() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            run()

    return cast


def in_turn(runs: Mapping[str, Run], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every run in every round; all runs must have warmed up."""
    repeats = {name: 1 for name in runs}
    if args.device == "cuda" and not args.quick:
        repeats = {name: math.ceil(SHORTEST_CUDA_SECONDS / clock(run, 1, args.device)) for name, run in runs.items()}
    rounds = range(1 if args.quick else args.rounds)
    taken = [{name: clock(run, repeats[name], args.device) for name, run in runs.items()} for _ in rounds]
    return {name: [row[name] for row in taken] for name in runs}


def clock(run: Run, repeats: int, device: str) -> float:
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


def errors(case: Case, candidate: Candidate, args: argparse.Namespace) -> dict[str, Any]:
    """How far the candidate is from the loop in float64, on a tiny model whose parameters have left their start."""
    if not candidate.scores:
        return {}
    case = small(case)
    model, batch = candidate.model(case.model(args.device, tiny=True)), case.batch(args.device, tiny=True)

    def scores(start: Callable[..., Run], wrap: Callable[[Run], Run]) -> Sums:
        sums = zeros(model)
        with measuring(model):
            wrap(start(model, batch, case.objective, sums))()
        return sums

    found = scores(candidate.start, lambda run: in_precision(run, args))
    model.double()
    wanted = scores(CANDIDATES["loop"].start, lambda run: run)
    least = 1e-6 * max(float(total.max()) for total in wanted.values())  # where nothing but rounding is left
    off = {n: float((found[n] - w).abs().max()) / max(float(w.max()), least) for n, w in wanted.items()}
    wrong = [name for name, error in off.items() if not error <= TOLERANCE[args.precision]]
    return {"error": max(off.values()), "wrong": wrong, "parameters": len(off)}


def peak_of(name: str, candidate: str, args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda":  # where torch counts, what ran before does not matter
        kernels._CHOICES.clear()  # but for the timing of kernels, which belongs to a first run
        return measure_peak(shape(CASES[name], args), CANDIDATES[candidate], args)
    command = [sys.executable, __file__, "--out", ".", "--peak", candidate, "--cases", name, "--device", args.device]
    command += ["--precision", args.precision, *(["--quick"] if args.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{candidate} ran once, but not in a process of its own: {done.stderr or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(case: Case, candidate: Candidate, args: argparse.Namespace) -> dict[str, int]:
    """Bytes on top of model, batch and accumulators; the second run must not add to the first."""
    model, batch = candidate.model(case.model(args.device, args.quick)), case.batch(args.device, args.quick)
    sums = zeros(model) if candidate.scores else {}
    run = in_precision(candidate.start(model, batch, case.objective, sums), args)
    memory = cuda_memory if args.device == "cuda" else process_memory
    before = memory(reset=True)
    with measuring(model):
        run()
        run()
    weights, accumulators = (sum(t.nbytes for t in ts) for ts in (model.parameters(), sums.values()))
    return {
        "peak_bytes": memory(reset=False) - before,
        "weight_bytes": weights,
        "accumulator_bytes": accumulators,
    }


def cuda_memory(reset: bool) -> int:
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def process_memory(reset: bool) -> int:
    """Resident bytes now, from where a new peak counts, or that peak (Linux; ru_maxrss would keep the parent's)."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what building the model has freed would hide what the run takes
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s*(\d+)" if reset else r"VmHWM:\s*(\d+)", status)
    return int(found[1]) * 1024 if found else 0


def measure_curve(name: str, args: argparse.Namespace) -> dict[str, Any]:
    axis, cases = CURVES[name]
    if args.quick:
        cases = [(small(case), number) for case, number in cases[:2]]
    model = cases[0][0].model(args.device, args.quick)
    points = []
    for case, number in cases:
        place = {**asdict(case), "examples": case.batch_size * number}[axis]
        points.append({axis: place, **timed_point(model, case, number, axis == "examples", args)})
        print("  ", points[-1], flush=True)
    return {"axis": axis, **asdict(cases[0][0]), "rounds": args.rounds, "points": points}


def timed_point(
    model: torch.nn.Module, case: Case, number: int, whole: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds for some batches: the engine alone, or the whole of a run with its fixed costs."""
    batches = [case.batch(args.device, args.quick)] * number
    plain, engine = (every(CANDIDATES[name], model, batches, case) for name in ("plain", "fisherscope"))
    if whole:
        engine = partial(estimate_fisher, model, batches, objective=case.objective, progress=False)
    runs = {"plain": in_precision(plain, args), "fisherscope": in_precision(engine, args)}
    with measuring(model):
        for run in runs.values():
            run()
        seconds = {name: statistics.median(values) for name, values in in_turn(runs, args).items()}
    return {**seconds, "over_plain": seconds["fisherscope"] / seconds["plain"]}


def every(candidate: Candidate, model: torch.nn.Module, batches: Sequence[Batch], case: Case) -> Run:
    sums = zeros(model) if candidate.scores else {}
    runs = [candidate.start(model, batch, case.objective, sums) for batch in batches]
    return lambda: [run() for run in runs]


if __name__ == "__main__":
    main()
