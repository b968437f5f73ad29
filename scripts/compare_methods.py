#!/usr/bin/env python3
"""Compare methods of fine-tuning on tasks: one folder per task and method, and a table of them all.

A run that is there already is not run again, so the script goes on where it was stopped.

    python scripts/compare_methods.py --out figures/finetune --model builtin:bert --train-size 300 --seeds 6 \\
        --tasks builtin:acceptability builtin:pairs builtin:similarity --methods vanilla guided-dropout dps-dense
"""

import argparse
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path

import yaml
from scipy import stats

import fisherscope as fs
from fisherscope.data.tasks import TASKS
from fisherscope.finetune import Results

logger = logging.getLogger("compare")


def run(args: argparse.Namespace, task: str, arm: str) -> Results:
    folder = args.out / task.removeprefix("builtin:") / arm
    settings = (yaml.safe_load(args.settings.read_text()) if args.settings else {}).get(arm, {})
    method = settings.pop("method", arm)
    scores = fs.FisherScores.load(args.scores) if args.scores and "guided" in method else None
    return fs.finetune(
        args.model,
        task=task,
        data_dir=None if task.startswith("builtin:") else args.data_dir,
        method=method,
        settings=settings,
        scores=scores,
        seeds=range(args.seeds),
        train_size=args.train_size,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        max_length=args.max_length,
        out=folder,
        resume=True,
        progress=False,
    )


def row(arm: str, results: Results, vanilla: Results) -> list[str]:
    """Mean and spread, the paired difference to vanilla with its 95 % t interval, and failed runs."""
    values = results.values()
    mean, spread = statistics.mean(values.values()), statistics.stdev(values.values())
    failed = sum(run.constant or run.status != "finished" for run in results.runs)
    return [arm, f"{mean:.3f} ± {spread:.3f}", difference(values, vanilla.values()), str(failed)]


def difference(values: Mapping[int, float], reference: Mapping[int, float]) -> str:
    differences = [values[seed] - reference[seed] for seed in values]
    if not any(differences):
        return "0"
    mean, error = statistics.mean(differences), stats.sem(differences)
    half = error * stats.t.ppf(0.975, len(differences) - 1)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(results: Mapping[str, Results]) -> str:
    vanilla = results["vanilla"]
    heads = ["method", f"{vanilla.metric}, mean ± std", "minus vanilla [95 % interval]", "failed"]
    lines = [heads, ["---"] * len(heads), *(row(arm, r, vanilla) for arm, r in results.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(args: argparse.Namespace, tables: Mapping[str, str]) -> None:
    text = [
        f"# Methods of fine-tuning: {args.model.rpartition('/')[2]}, {args.train_size} training examples",
        f"After the last of {args.epochs:g} epochs, learning rate {args.learning_rate:g}, {args.seeds} seeds (head, "
        "order of the examples, dropout), one subset of the training examples. Std with ddof 1; the interval is that "
        "of the paired t test over seeds, not corrected for the number of methods. A run failed if it gives one "
        "prediction for all examples. Times of a step are in `benchmarks/results`.",
    ]
    for task, lines in tables.items():
        text += [f"## {task}", lines]
    (args.out / "README.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="builtin:bert")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, required=True)
    parser.add_argument("--data-dir", type=Path, help="with the files of tasks that are not built in")
    parser.add_argument("--methods", nargs="+", required=True, help="vanilla and others")
    parser.add_argument("--settings", type=Path, help="YAML: method, or a name for a 'method', to its settings")
    parser.add_argument("--scores", type=Path, help="for guided dropout; default: estimated on the training examples")
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-length", type=int)
    args = parser.parse_args()
    if args.methods[0] != "vanilla" or args.seeds < 2:
        parser.error("the first method must be vanilla, which the others are compared with, and seeds at least 2")
    tables = {}
    for task in args.tasks:
        results: dict[str, Results] = {}
        for arm in args.methods:
            results[arm] = run(args, task, arm)
            logger.info("%s", results[arm])
            tables[task] = table(results)
            write(args, tables)


if __name__ == "__main__":
    main()
