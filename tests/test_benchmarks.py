"""The benchmarks run, on tiny models; nothing is asserted of their times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from fisherscope.finetune import METHODS

ROOT = Path(__file__).parent.parent

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
"""The smallest size of the benchmark of training steps."""

TWICE = """
import sys
sys.path.insert(0, "benchmarks")
import fisher
fisher.main()
print("second run")
fisher.main()
"""


@pytest.mark.slow
def test_the_fisher_benchmark_measures_goes_on_and_knows_who_is_right(tmp_path: Path) -> None:
    options = ["--quick", "--out", str(tmp_path / "out.json"), "--cases", "GPT-2", "N"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWICE, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["cases"]) == ["GPT-2 LM, B=4, T=128"] and list(report["curves"]) == ["cost against N"]
    rows = report["cases"]["GPT-2 LM, B=4, T=128"]["candidates"]
    for name in ("fisherscope", "loop", "vmap(grad)"):
        assert rows[name]["error"] < 1e-4 and rows[name]["wrong"] == [] and rows[name]["over_plain"] > 0
    assert "over_plain" in rows["Opacus"] or "opacus" in rows["Opacus"]["failure"]  # not everybody has it
    assert rows["fisherscope"]["peak_bytes"] > 0 and rows["fisherscope"]["accumulator_bytes"] > 0
    assert [point["examples"] for point in report["curves"]["cost against N"]["points"]] == [8, 16]
    table = (tmp_path / "out.md").read_text()
    assert all(f"| {name} |" in table for name in rows)
    measured, again = done.stdout.split("second run")
    assert "over_plain" in measured and "over_plain" not in again


@pytest.mark.slow
def test_the_benchmark_of_products_has_a_rate_for_each_way(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("kernels-*.json")
    results = json.loads(written.read_text())["results"]
    assert len(results) == 6
    for rows in results.values():
        assert {"GEMM", "chunks"} <= rows.keys() and rows["GEMM"]["share of GEMM"] == 1.0
        assert all(row["ms"] > 0 for row in rows.values())


@pytest.mark.slow
def test_the_landscape_benchmark_measures_points_and_what_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/landscape.py", "--quick", "--out", str(tmp_path / "out.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert list(parts) == ["point", "prefix", "vmap", "adaptive", "peer"]
    assert parts["point"]["rows"]["fisherscope"]["ratio"] > 0 and parts["point"]["over_the_pass_it_runs"] > 0
    assert all(row["same_bits"] and row["held_bytes"] > 0 for row in parts["prefix"].values())
    assert all(gain > 0 for gain in parts["vmap"].values())
    assert all(0 < row["points"] <= 81 and row["percentile95"] >= 0 for row in parts["adaptive"]["rows"].values())
    assert "loss_landscapes" in parts["peer"].get("failure", "") or parts["peer"]["oracle"]["fisherscope"]["wrong"] == 0
    assert "| fisherscope |" in (tmp_path / "out.md").read_text()


@pytest.mark.slow
def test_the_finetune_benchmark_measures_a_step_of_every_method(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/finetune.py", "--size", "tiny", "--rounds", "1", "--batch-size", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--length", "16", "--out", str(tmp_path / "out.json")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    turns = {name: found[-1] for name, found in report["turns"].items()}
    assert report["turns"].keys() | report["failures"].keys() == METHODS.keys()
    assert report["failures"].keys() <= {"lora", "prefix-tuning", "prompt-tuning"}  # which need peft
    assert all(turn["seconds"] > 0 for turn in turns.values())
    model = BertForSequenceClassification(BertConfig(num_labels=2, **TINY))
    weights = sum(p.nbytes for p in model.parameters())
    steps = 4 * len(list(model.parameters()))  # a number for every parameter
    vanilla = turns["vanilla"]
    assert vanilla["state_bytes"] == 2 * weights + steps and vanilla["kept_bytes"] == 0
    assert vanilla["peak_bytes"] >= 4 * weights + steps  # with gradients
    assert turns["mixout"]["kept_bytes"] == turns["smart"]["kept_bytes"] == weights  # another model
    assert turns["linear-probe"]["state_bytes"] == 2 * 4 * (2 * TINY["hidden_size"] + 2) + 2 * 4  # of the head
    assert all(f"| {name} |" in (tmp_path / "out.md").read_text() for name in turns)
