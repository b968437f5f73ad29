"""A sweep as jobs of a cluster, by submitit: every job does its part of the runs.

    python scripts/submit_sweep.py sweep.yaml OUT --parts 8 --slurm partition=gpu gpus_per_node=1

Submitting it again goes on with what is not done, as ``slurm_array.sbatch`` does; this one needs no file of directives,
and ``--cluster local`` runs the parts side by side on this machine. It takes ``pip install '.[submitit]'``.
"""

import argparse
from pathlib import Path

import submitit

import fisherscope as fs
from fisherscope.experiments import SweepReport


def do_part(file: Path, out: Path, number: int, parts: int) -> SweepReport:
    """What a job does; the report is its result."""
    return fs.run_sweep(fs.load_sweep(file).shard(number, parts), out)


def main() -> int:
    """Submit, and wait until all parts are done; 1 if a run or a job failed."""
    parser = argparse.ArgumentParser(description="A sweep as jobs of a cluster, by submitit.")
    parser.add_argument("file", type=Path, help="YAML of a sweep")
    parser.add_argument("out", type=Path, help="folder of the sweep; logs of the jobs are below, in .jobs")
    parser.add_argument("--parts", type=int, default=8, help="jobs; default: 8")
    parser.add_argument("--hours", type=int, default=8, help="time limit of a job; default: 8")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--slurm", nargs="*", default=[], metavar="KEY=VALUE", help="for sbatch")
    args = parser.parse_args()
    fs.load_sweep(args.file)  # what is wrong with it is said here, not in a job
    try:
        executor = submitit.AutoExecutor(folder=args.out / ".jobs", cluster=args.cluster)
    except RuntimeError as error:
        parser.error(f"{error} Submit from one, or take --cluster local.")
    given = dict(pair.split("=", 1) for pair in args.slurm)
    executor.update_parameters(timeout_min=60 * args.hours, **{f"slurm_{key}": value for key, value in given.items()})
    with executor.batch():
        jobs = [executor.submit(do_part, args.file, args.out, number, args.parts) for number in range(args.parts)]
    outcomes = [job.exception() or job.result() for job in jobs]
    for job, outcome in zip(jobs, outcomes, strict=True):
        print(f"{job.job_id}: {outcome}")
    return 0 if all(isinstance(outcome, SweepReport) and not outcome.failed for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
