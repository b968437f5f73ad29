#!/usr/bin/env python3
"""What a Fisher batch costs, in units of a plain forward and backward pass of the same batch.

The candidates take turns within one run, so that their ratios hold when the machine's speed drifts. Random weights:
only time is measured here.

    python benchmarks/fisher.py --out benchmarks/results
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from fisherscope.fisher import hooks_engine, loop_engine
from fisherscope.models import measuring
from fisherscope.objectives import example_losses

Batch = dict[str, torch.Tensor]


def bert_base(batch_size: int, length: int) -> tuple[nn.Module, Batch, str]:
    ids = torch.randint(1000, 30000, (batch_size, length))
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
    return (
        BertForMaskedLM(BertConfig()),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels},
        "mlm",
    )


def gpt2(batch_size: int, length: int) -> tuple[nn.Module, Batch, str]:
    ids = torch.randint(1000, 30000, (batch_size, length))
    return (
        GPT2LMHeadModel(GPT2Config()),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids},
        "causal-lm",
    )


CASES = {
    "BERT-base MLM, B=8, T=128": lambda: bert_base(8, 128),
    "BERT-base MLM, B=32, T=16": lambda: bert_base(32, 16),
    "GPT-2 LM, B=4, T=128": lambda: gpt2(4, 128),
}


def candidates(model: nn.Module, batch: Batch, objective: str) -> dict[str, Callable[[], object]]:
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    hooks, loop = hooks_engine(model, objective), loop_engine(model, objective)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        labels = {"labels": batch["labels"]}
        model(**{k: v for k, v in batch.items() if k != "labels"}, **labels).loss.backward()

    def plain_scored_rows() -> None:
        model.zero_grad(set_to_none=True)
        example_losses(model, batch, objective).mean.sum().backward()

    return {
        "plain": plain,
        "plain, scored rows only": plain_scored_rows,
        "hooks": lambda: hooks(batch, sums),
        "loop": lambda: loop(batch, sums),
    }


def measure(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for case, make in CASES.items():
        model, batch, objective = make()
        model = model.to(args.device)
        batch = {name: value.to(args.device) for name, value in batch.items()}
        seconds: dict[str, list[float]] = {}
        with measuring(model):
            runs = candidates(model, batch, objective)
            for number in range(args.rounds + 1):
                for name, run in runs.items():
                    elapsed = measure(run, args.device)
                    if number:  # the first round warms up
                        seconds.setdefault(name, []).append(elapsed)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results[case] = {name: {"seconds": s, "over plain": s / medians["plain"]} for name, s in medians.items()}
        print(case, {name: round(row["over plain"], 2) for name, row in results[case].items()}, flush=True)
    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    facts = {"device": device, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "rounds": args.rounds}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    args.out.mkdir(parents=True, exist_ok=True)
    slug = "".join(c if c.isalnum() else "-" for c in device.lower())
    out = args.out / f"fisher-{slug}-{facts['date']}.json"
    out.write_text(json.dumps({**facts, "peak_process_mib": round(peak), "results": results}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
