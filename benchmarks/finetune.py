#!/usr/bin/env python3
"""What a regularizer adds to a training step: steps of all methods take turns, each on a model of its own.

PYTHONPATH=. python benchmarks/finetune.py --out benchmarks/results/finetune-NAME.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fisherscope as fs
from fisherscope.finetune import METHODS, Regularizer
from fisherscope.objectives import predict

SIZES = {
    "base": {},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}


def drawn_scores(model: nn.Module) -> fs.FisherScores:
    """Any scores do: no method takes longer for their values."""
    generator = torch.Generator().manual_seed(0)
    return fs.FisherScores({name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}, 1)


def regularizers(model: nn.Module, names: list[str]) -> dict[str, Regularizer]:
    scores = drawn_scores(model)
    made: dict[str, Callable[[], Regularizer]] = {
        "vanilla": METHODS["vanilla"],
        "guided-dropout": lambda: METHODS["guided-dropout"](scores),
        "gaussian-dropout": METHODS["gaussian-dropout"],
        "fixed-mask": lambda: METHODS["fixed-mask"](fs.top_fraction(scores, 0.5)),
        "child-tuning-d": lambda: METHODS["child-tuning-d"](scores),
        "child-tuning-f": METHODS["child-tuning-f"],
        "dps-dense": lambda: METHODS["dps-dense"](1000),
        "r-drop": METHODS["r-drop"],
    }
    return {name: made[name]() for name in names}


@contextmanager
def training(regularizer: Regularizer, size: str, batch: dict, device: str) -> Iterator[Callable[[], float]]:
    """A function that takes a step and says how long it took."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=2, **SIZES[size])).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)

    def step() -> float:
        began = time.perf_counter()
        predictions = predict(model, batch, "classification")
        loss = predictions.losses().mean.mean()
        if (penalty := regularizer.penalty(model, batch, predictions)) is not None:
            loss = loss + penalty.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with regularizer.applied_to(model, optimizer):
        yield step


def measure(names: list[str], size: str, batch_size: int, length: int, rounds: int, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 30000, (batch_size, length), generator=generator).to(device),
        "attention_mask": torch.ones(batch_size, length, dtype=torch.long, device=device),
        "labels": torch.randint(2, (batch_size,), generator=generator).to(device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    example = BertForSequenceClassification(BertConfig(num_labels=2, **SIZES[size]))
    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(training(regularizer, size, batch, device))
            for name, regularizer in regularizers(example, names).items()
        }
        for number in range(rounds + 1):
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order:
                seconds[name].append(steps[name]())
    kept = {name: values[1:] for name, values in seconds.items()}  # the first makes the optimizer's state
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, kept["vanilla"], strict=True))
        for name, values in kept.items()
    }
    return {"seconds": kept, "over_vanilla": ratios}


def table(report: dict) -> str:
    rows = [
        f"| {name} | {statistics.median(report['seconds'][name]):.3g} | {ratio:.3f} |"
        for name, ratio in report["over_vanilla"].items()
    ]
    return "\n".join(
        [
            f"# Cost of a training step: {report['device']}, float32",
            "",
            f"{report['date']}; torch {torch.__version__}. BERT-{report['size']}-sized, B={report['batch_size']}, "
            f"T={report['length']}, random weights; AdamW, gradients clipped. Steps took turns, "
            f"{report['rounds']} rounds; medians, and the median of the ratios to vanilla's step of the same round.",
            "",
            "| method | seconds per step | / vanilla |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .json file; a table goes beside it")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--device-name", help="as the table says it")
    parser.add_argument("--methods", nargs="+", default=["vanilla", "guided-dropout", "fixed-mask", "child-tuning-d"])
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    name = args.device_name or (torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads")
    facts = {key: getattr(args, key) for key in ("size", "batch_size", "length", "rounds")}
    report = {"device": name, "date": str(date.today()), **facts}
    report |= measure(args.methods, args.size, args.batch_size, args.length, args.rounds, args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
