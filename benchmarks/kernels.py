#!/usr/bin/env python3
"""How near the sum of squared per-example products comes to the rate of one matrix product of the same operations.

The product that training forms anyway, left^T right over all rows, against the kernel (on CUDA its fastest tile) and
the products in chunks, for layers of BERT-base and GPT-2. The candidates take turns, so that their ratios hold when the
machine's speed drifts.

    python benchmarks/kernels.py --device cuda --out benchmarks/results
"""

import argparse
import functools
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fisherscope._machine import device_name
from fisherscope.fisher import compiled
from fisherscope.fisher.kernels import TILES, accumulate_chunked, accumulate_fused

LAYERS = [(768, 768), (3072, 768), (30522, 768)]
EXAMPLES = {"cuda": [(32, 128)], "cpu": [(8, 128), (32, 16)]}  # and the rows of each
KINDS = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
}

Run = Callable[[], object]


def candidates(
    outputs: int, inputs: int, examples: int, length: int, dtype: torch.dtype, device: str
) -> dict[str, Run]:
    """What is timed, by name; tiles of the kernel that do not run on this device are left out."""
    left, right = (torch.randn(examples * length, size, device=device).to(dtype) for size in (outputs, inputs))
    offsets = torch.arange(examples + 1, device=device) * length
    score, product = (
        torch.zeros(outputs, inputs, device=device),
        torch.empty(outputs, inputs, device=device, dtype=dtype),
    )
    runs: dict[str, Run] = {
        "GEMM": lambda: torch.mm(left.T, right, out=product),
        "chunks": lambda: accumulate_chunked(score, left, right, offsets),
    }
    if compiled.can_take(score, left, right) and compiled.kernel():
        runs["kernel"] = lambda: compiled.accumulate_compiled(score, left, right, offsets)
    for tile in TILES if device == "cuda" else ():
        run = functools.partial(accumulate_fused, score, left, right, offsets, tile=tile)
        try:
            run()
        except Exception as error:
            print(f"{tile} left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            runs[f"kernel {tile.rows}x{tile.columns}, {tile.num_warps} warps, {tile.num_stages} stages"] = run
    return runs


def milliseconds(run: Run, device: str, repeats: int) -> float:
    """Mean of several calls in a row. On a GPU that of the device alone: the calls queue up behind a pause."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) * 1e3 / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measured(runs: dict[str, Run], operations: int, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median time, rate and share of the GEMM's rate of every candidate, and of the fastest tile as ``kernel``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            elapsed = milliseconds(run, device, repeats=10 if device == "cuda" else 1)
            if number:  # the first round warms up
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    tiles = {name: median for name, median in medians.items() if name.startswith("kernel")}
    if tiles:
        medians["kernel"] = min(tiles.values())
    return {
        name: {"ms": ms, "TFLOP/s": operations / ms / 1e9, "share of GEMM": medians["GEMM"] / ms}
        for name, ms in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(EXAMPLES), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    kinds = KINDS if args.device == "cuda" else {"fp32": KINDS["fp32"]}
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':32}{'':40}{'ms':>10}{'TFLOP/s':>10}{'of GEMM':>10}")
    for (kind, (dtype, precision)), (examples, length) in itertools.product(kinds.items(), EXAMPLES[args.device]):
        torch.set_float32_matmul_precision(precision)
        for outputs, inputs in LAYERS:
            case = f"{kind}, {outputs}x{inputs}, {examples} of {length}"
            runs = candidates(outputs, inputs, examples, length, dtype, args.device)
            operations = 2 * examples * length * outputs * inputs
            results[case] = measured(runs, operations, args.device, args.rounds)
            for name, row in results[case].items():
                figures = f"{row['ms']:10.3f}{row['TFLOP/s']:10.3f}{row['share of GEMM']:10.0%}"
                print(f"{case:32}{name:40}{figures}", flush=True)
    device = device_name(args.device) + (f", {torch.get_num_threads()} threads" if args.device == "cpu" else "")
    facts = {"device": device, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "rounds": args.rounds}
    args.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub("[^a-z0-9]+", "-", device.lower())
    out = args.out / f"kernels-{slug}-{facts['date']}.json"
    out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
