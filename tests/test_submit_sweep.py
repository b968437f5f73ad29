"""Sweeps by submitit: the parts of a sweep as jobs, here of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fisherscope as fs

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "submit_sweep.py"
SWEEP = "{model: 'builtin:bert', task: 'builtin:acceptability', train_size: 16, epochs: 1, max_length: 8, seeds: 2}"


def submitted(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    (folder / "sweep.yaml").write_text(SWEEP)
    command = [sys.executable, str(SCRIPT), "sweep.yaml", "out", *words]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_parts_are_done_by_jobs(tmp_path: Path):
    done = submitted(tmp_path, "--parts", "2", "--cluster", "local")
    assert done.returncode == 0, done.stderr
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["1 finished, 0 finished before, 0 failed"] * 2
    assert [sorted(arm.values()) for arm in fs.read_runs(tmp_path / "out")] == [[0, 1]]


@pytest.mark.slow
def test_without_a_cluster_one_sentence_says_so(tmp_path: Path):
    refused = submitted(tmp_path)
    assert refused.returncode == 2 and "take --cluster local" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr and not list(tmp_path.rglob("results.json"))
