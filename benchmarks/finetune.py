#!/usr/bin/env python3
"""What a step of every method costs: time over that of a step of vanilla nearby, and memory.

Every turn begins with a model, an optimizer and a regularizer of its own. What a method does before its first step is
left out: scores are given, a teacher is the model as it is, shares of mixed weights are drawn and not searched for. On
the CPU a step has one thread and its time is that thread's own, which other programs on the machine hardly change.

PYTHONPATH=. python benchmarks/finetune.py --out benchmarks/results/finetune-NAME.json
"""

import argparse
import copy
import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification

import fisherscope as fs
from fisherscope.data import Batches
from fisherscope.finetune import METHODS, Regularizer
from fisherscope.finetune.methods.weights_mixup import WeightsMixup, initial_factors, mixed_matrices
from fisherscope.finetune.run import Run
from fisherscope.fisher.activations import LiveBytes
from fisherscope.models import describe
from fisherscope.objectives import Batch, predict

SIZES = {
    "base": {},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}
TOTAL_STEPS = 1000
BETWEEN = 6
"""How many steps of other methods there are between two of vanilla."""
MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """One step.

    Attributes:
        seconds: Of the step.
        state_bytes: Held by the optimizer.
        kept_bytes: Held beside that and the weights when the step begins.
        peak_bytes: The most that all tensors have in the step, weights among them.
    """

    seconds: float
    state_bytes: int
    kept_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Setting:
    """What all turns share."""

    model: nn.Module
    batches: Batches
    scores: fs.FisherScores
    device: str

    @classmethod
    def drawn(cls, size: str, batch_size: int, length: int, device: str) -> "Setting":
        """Random weights, tokens, labels and scores: no method takes longer for their values."""
        torch.manual_seed(0)
        draw = np.random.default_rng(0)
        model = BertForSequenceClassification(BertConfig(num_labels=2, **SIZES[size])).to(device).train()
        examples = [
            {
                "input_ids": draw.integers(5, 30000, length),
                "attention_mask": np.ones(length, np.int64),
                "labels": draw.integers(2, size=()),
            }
            for _ in range(batch_size)
        ]
        scores = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
        return cls(
            model,
            Batches(examples, {}, batch_size, "classification", "drawn", "", None, {}),
            fs.FisherScores(scores, batch_size, provenance={"model": describe(model)}),
            device,
        )

    def regularizer(self, name: str, model: nn.Module) -> Regularizer:
        """With the settings that the method has by itself; those that it has not are ours."""
        if name == "weights-mixup":
            draw = np.random.default_rng(0)
            anchor = {matrix: model.get_parameter(matrix).detach().clone() for matrix in mixed_matrices(model)}
            axes = mixed_matrices(model)
            return WeightsMixup({m: initial_factors(w, axes[m], draw) for m, w in anchor.items()}, anchor)
        settings = {"layers": model.config.num_hidden_layers // 2} if name == "top-k-layers" else {}
        wants_scores = name in ("guided-dropout", "child-tuning-d", "fish-mask", "fixed-mask", "random-mask")
        run = Run(
            model, self.batches, "classification", TOTAL_STEPS,
            scores=self.scores if wants_scores else None, fine_tuned=lambda: copy.deepcopy(self.model),
            longest=self.batches.examples[0]["input_ids"].size,
        )  # fmt: skip
        return METHODS[name].for_run(run, **settings)


def take_turn(name: str, setting: Setting) -> Turn:
    """A step of a method, after one with gradients of 0 that makes the optimizer's state."""
    with LiveBytes() as live:
        model = copy.deepcopy(setting.model)
        weights = live.now
        regularizer = setting.regularizer(name, model)
        regularizer.extend(model)
        optimizer = AdamW(model.parameters(), lr=2e-5, fused=True)
    batch = {key: value.to(setting.device) for key, value in next(iter(setting.batches)).items()}
    torch.manual_seed(0)
    with ExitStack() as applied:
        with live:
            applied.enter_context(regularizer.applied_to(model, optimizer))
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            optimizer.zero_grad()
        held = live.now
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            seconds = timed_step(model, optimizer, regularizer, batch)
        tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    state = sum(t.nbytes for t in tensors)
    return Turn(seconds, state, held - weights - state, held + most_allocated(profiler))


def timed_step(model: nn.Module, optimizer: AdamW, regularizer: Regularizer, batch: Batch) -> float:
    """A step as the trainer takes it."""
    on_gpu = next(model.parameters()).is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    began = clock()
    predictions = predict(model, batch, "classification")
    losses = predictions.losses()
    total = losses.total.sum()
    if (penalty := regularizer.penalty(model, batch, predictions)) is not None:
        total = total + penalty.sum()
    (total / losses.count.sum()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began


def most_allocated(profiler: profile) -> int:
    """The most bytes that were allocated at once on top of those from before."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(np.cumsum(changes), default=0))


def measure(names: list[str], setting: Setting, rounds: int) -> dict:
    """Turns by method, and the ratios to the mean of the vanilla steps before and after."""
    turns: dict[str, list[Turn]] = {}
    ratios: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    plain = []
    take_turn("vanilla", setting)  # the first step of a process is slower
    before = take_turn("vanilla", setting)
    for number in range(rounds):
        others = [name for name in names if name != "vanilla" and name not in failures]
        np.random.default_rng(number).shuffle(others)
        for start in range(0, len(others), BETWEEN):
            taken = {}
            for name in others[start : start + BETWEEN]:
                try:
                    taken[name] = take_turn(name, setting)
                except (ValueError, ImportError) as error:
                    failures[name] = str(error)
                print(name, taken.get(name) or failures[name], flush=True)
            after = take_turn("vanilla", setting)
            plain.append(after)
            near = statistics.mean([before.seconds, after.seconds])
            for name, turn in taken.items():
                turns.setdefault(name, []).append(turn)
                ratios.setdefault(name, []).append(turn.seconds / near)
            ratios.setdefault("vanilla", []).append(after.seconds / near)
            before = after
    turns["vanilla"] = plain
    return {
        "turns": {name: [asdict(turn) for turn in turns[name]] for name in names if name in turns},
        "over_vanilla": {name: ratios[name] for name in names if name in ratios},
        "failures": failures,
    }


def table(report: dict) -> str:
    plain = report["turns"]["vanilla"]
    seconds = [turn["seconds"] for turn in plain]
    rows = []
    for name, turns in report["turns"].items():
        ratio, last = statistics.median(report["over_vanilla"][name]), turns[-1]
        mib = [f"{last[key] / MIB:.0f}" for key in ("state_bytes", "kept_bytes", "peak_bytes")]
        share = last["peak_bytes"] / plain[-1]["peak_bytes"]
        time_of = statistics.median(turn["seconds"] for turn in turns)
        rows.append(f"| {name} | {time_of:.3g} | {ratio:.2f} | {' | '.join(mib)} | {share:.2f} |")
    return "\n".join(
        [
            f"# Cost of a training step: {report['device']}, float32",
            "",
            f"{report['date']}; torch {torch.__version__}. BERT-{report['size']}-sized, B={report['batch_size']}, "
            f"T={report['length']}, random weights; AdamW, gradients clipped. Steps took turns, {report['rounds']} "
            f"rounds, with one of vanilla after every {BETWEEN} others; medians, and the median of the ratios to the "
            "mean of the vanilla steps before and after. On the CPU, time of one thread. The "
            f"{len(seconds)} steps of vanilla took {min(seconds):.3g} to {max(seconds):.3g} s. Memory is that of "
            "tensors: the optimizer's state, what the method keeps beside it and the weights, and the most of all "
            "in the step. Preparation, and scores that are given, are left out.",
            "",
            "| method | seconds | / vanilla | state, MiB | kept, MiB | peak, MiB | / vanilla |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            *(f"- {name}: {reason}" for name, reason in report["failures"].items()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .json file; a table goes beside it")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device-name", help="as the table says it")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = args.device_name or (torch.cuda.get_device_name() if args.device == "cuda" else "CPU, 1 thread")
    facts = {key: getattr(args, key) for key in ("size", "batch_size", "length", "rounds")}
    report = {"device": name, "date": str(date.today()), **facts}
    names = ["vanilla", *(method for method in args.methods if method != "vanilla")]
    setting = Setting.drawn(args.size, args.batch_size, args.length, args.device)
    report |= measure(names, setting, args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
