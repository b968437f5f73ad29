"""Sweeps: what a file means, and that every training is done once, whatever happens to the processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import checkpoint, kill_when

import fisherscope as fs
from fisherscope.cli import main
from fisherscope.experiments import Sweep, load_sweep, run_sweep, running
from fisherscope.experiments.failure import Failure
from fisherscope.finetune import Results, finetune
from fisherscope.finetune.callback import STATE_FILE

ROOT = Path(__file__).parent.parent
TASK = "cola"
LEAST = {"model": "builtin:bert", "task": TASK}
QUICK = {"task": TASK, "train_size": 24, "batch_size": 8, "learning_rate": 1e-3, "max_length": 12}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """A tiny model with random weights and a small task in files, for ``small``."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, size in (("train", 40), ("dev", 12)):
        rows = (f"source\t{i % 2}\t\tw{i} w{i % 7} w{3 * i % 11}\n" for i in range(size))
        (folder / f"{name}.tsv").write_text("".join(rows))
    return {"model": str(checkpoint("bert", folder / "tiny")), "data_dir": str(folder)}


def written(folder: Path, contents) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(contents if isinstance(contents, str) else yaml.safe_dump(contents, sort_keys=False))
    return path


def folders(loaded: Sweep) -> list[str]:
    return [run.folder.as_posix() for run in loaded.runs]


class TestFile:
    def test_the_runs_are_the_product_seed_by_seed(self, tmp_path):
        contents = LEAST | {"train_size": [24, "all"], "method": ["vanilla", "r-drop"], "seeds": 2}
        base = "builtin-bert/cola"
        assert folders(load_sweep(written(tmp_path, contents))) == [
            f"{base}/{size}/{arm}/seed-{seed}"
            for seed in (0, 1)
            for size in ("24", "all")
            for arm in ("vanilla", "r-drop")
        ]

    def test_only_what_the_file_says_is_passed_on(self, tmp_path):
        (run,) = load_sweep(written(tmp_path, LEAST | {"epochs": 2, "seeds": [7]})).runs
        assert run.arguments == {**LEAST, "method": "vanilla", "epochs": 2, "seeds": [7]}

    def test_an_arm_goes_before_what_all_share(self, tmp_path):
        arms = {
            "slow": {"method": "vanilla", "learning_rate": 1e-5},
            "fast": {"method": "vanilla"},
            "strong": {"method": "r-drop", "settings": {"weight": 5}},
            "r-drop": None,
        }
        runs = load_sweep(written(tmp_path, LEAST | {"learning_rate": 1e-4, "method": arms})).runs
        found = {run.folder.parts[3]: run.arguments for run in runs}
        assert [found[arm]["learning_rate"] for arm in arms] == [1e-5, 1e-4, 1e-4, 1e-4]
        assert [found[arm]["method"] for arm in arms] == ["vanilla", "vanilla", "r-drop", "r-drop"]
        assert found["strong"]["settings"] == {"weight": 5} and "settings" not in found["r-drop"]

    def test_a_list_puts_sweeps_together_and_keeps_seeds_together(self, tmp_path):
        few = LEAST | {"train_size": 24, "method": ["vanilla", "bitfit"], "seeds": 2}
        many = LEAST | {"train_size": [24, 48], "method": "vanilla", "seeds": 2}
        found = [folder.split("/", 2)[2] for folder in folders(load_sweep(written(tmp_path, [few, many])))]
        assert found == [
            "24/vanilla/seed-0", "24/bitfit/seed-0", "48/vanilla/seed-0",
            "24/vanilla/seed-1", "24/bitfit/seed-1", "48/vanilla/seed-1",
        ]  # fmt: skip

    def test_powers_of_ten_need_no_point(self, tmp_path):
        (run,) = load_sweep(written(tmp_path, f"model: builtin:bert\ntask: {TASK}\nlearning_rate: 2e-5\n")).runs
        assert run.arguments["learning_rate"] == 2e-5

    def test_anchors_and_merges_are_yaml_as_ever(self, tmp_path):
        text = (
            f"model: builtin:bert\ntask: {TASK}\nmethod:\n  a: &a\n    method: vanilla\n    epochs: 1\n"
            "  b:\n    <<: *a\n    epochs: 2\n"
        )
        runs = load_sweep(written(tmp_path, text)).runs
        assert [run.arguments["epochs"] for run in runs] == [1, 2]
        assert [run.arguments["method"] for run in runs] == ["vanilla", "vanilla"]

    def test_a_model_of_a_folder_has_the_name_of_the_folder(self, tmp_path):
        (tmp_path / "my model").mkdir()
        (run,) = load_sweep(written(tmp_path, LEAST | {"model": str(tmp_path / "my model")})).runs
        assert run.folder.parts[0] == "my-model"
        assert run.arguments["model"] == str(tmp_path / "my model")

    @pytest.mark.parametrize("of", [1, 3, 7, 30])
    def test_shards_are_a_partition(self, tmp_path, of):
        whole = load_sweep(written(tmp_path, LEAST | {"method": ["vanilla", "r-drop", "bitfit", "mixout"], "seeds": 6}))
        parts = [whole.shard(number, of) for number in range(of)]
        assert sorted(run.folder for part in parts for run in part.runs) == sorted(run.folder for run in whole.runs)
        assert {len(part.runs) for part in parts} <= {24 // of, -(-24 // of)}
        order = [run.folder for run in whole.runs]
        assert all([run.folder for run in p.runs] == [f for f in order if f in folders_of(p)] for p in parts)

    def test_shards_share_out_a_slow_method(self, tmp_path):
        """Every fourth of the runs would be all runs of one method."""
        whole = load_sweep(written(tmp_path, LEAST | {"method": ["vanilla", "r-drop", "bitfit", "mixout"], "seeds": 8}))
        arms = [{run.folder.parts[3] for run in whole.shard(number, 4).runs} for number in range(4)]
        assert all(len(found) > 1 for found in arms)

    @pytest.mark.parametrize("number", [-1, 3])
    def test_there_is_no_other_shard(self, tmp_path, number):
        with pytest.raises(ValueError, match=f"numbers are 0 to 2; got {number}"):
            load_sweep(written(tmp_path, LEAST)).shard(number, 3)

    @pytest.mark.parametrize(
        ("contents", "match"),
        [
            ({"methods": ["vanilla"]}, r"sweep\.yaml: there is no key 'methods'; did you mean 'method'"),
            ({"epoch": 3}, "no key 'epoch'; did you mean 'epochs'"),
            ({"xyzzy": 3}, "no key 'xyzzy'; known are model, task"),
            ({"out": "x"}, "out is set by the sweep itself"),
            ({"data": "builtin:docs"}, "data has no place in a sweep"),
            ({"task": []}, "task is an empty list"),
            ({"model": []}, "model is an empty list"),
            ({"train_size": []}, "train_size is an empty list"),
            ({"method": []}, "method is an empty list"),
            ({"method": {}}, "method is empty"),
            ({"seeds": []}, "seeds must be a number of at least 1, or a list"),
            ({"seeds": 0}, "seeds must be a number of at least 1, or a list"),
            ({"seeds": [-1]}, "seeds must be a number of at least 1, or a list"),
            ({"seeds": [True]}, "seeds must be a number of at least 1, or a list"),
            ({"train_size": "most"}, "train_size must be a number of examples, a fraction, or all; got 'most'"),
            ({"train_size": [24, 0]}, "train_size must be a number of examples"),
            ({"train_size": True}, "train_size must be a number of examples"),
            ({"model": 3}, "model must be a name or a list of names; got 3"),
            ({"task": "rtee"}, "task must be one of .*; got 'rtee'"),
            ({"intermediate_task": "rtee"}, "intermediate_task must be one of .*; got 'rtee'"),
            ({"method": "vanila"}, "in the arm vanila: There is no method .vanila. .did you mean .vanilla."),
            ({"settings": {"weight": 1}}, "in the arm vanilla: vanilla has no setting 'weight'"),
            ({"settings": "weight"}, "settings must be a mapping or null; got 'weight'"),
            ({"method": "top-k-layers"}, "top-k-layers needs the setting 'layers'"),
            ({"method": {"a b": {"method": "vanilla"}}}, "an arm names a folder, .*; got 'a b'"),
            ({"method": {"..": {"method": "vanilla"}}}, r"an arm names a folder, .*; got '\.\.'"),
            ({"method": {"a": 3}}, "the arm a must be a mapping"),
            ({"method": {"vanilla": {"seeds": 3}}}, "the arm vanilla sets seeds, which is the same for all arms"),
            ({"method": {"vanilla": {"epoch": 3}}}, "no key 'epoch'"),
            ({"method": {"a": {}}}, "in the arm a: There is no method .a."),
            ({"epochs": "three"}, "epochs must be a number; got 'three', in the arm vanilla"),
            ({"epochs": True}, "epochs must be a number; got True"),
            ({"batch_size": 2.5}, "batch_size must be a whole number; got 2.5"),
            ({"batch_size": 0}, "batch_size must be a whole number and at least 1, got 0"),
            ({"precision": "fp8"}, "precision must be one of float32, bfloat16, float16; got 'fp8'"),
            ({"save_model": "yes"}, "save_model must be true or false; got 'yes'"),
            ({"scores": 3}, "scores must be a file or null; got 3"),
            ({"protocol": "best"}, "The protocol must be one of .*; got 'best'"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_runs(self, tmp_path, contents, match):
        with pytest.raises(ValueError, match=match) as refused:
            load_sweep(written(tmp_path, LEAST | contents))
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "a sweep is a mapping with at least model and task"),
            ("[]", "a sweep is a mapping with at least model and task"),
            ("model: builtin:bert", "task is missing"),
            (f"task: {TASK}", "model is missing"),
            ("a: [1", "is not YAML of a sweep: .* in line 1"),
            ("method:\n  a: {}\n  a: {}\n", "the key 'a' is there twice in line 3"),
        ],
    )
    def test_files_that_say_nothing_are_refused(self, tmp_path, text, match):
        with pytest.raises(ValueError, match=match):
            load_sweep(written(tmp_path, text))

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no file .*other\.yaml"):
            load_sweep(tmp_path / "other.yaml")

    @pytest.mark.parametrize("key", ["scores", "mask"])
    def test_scores_and_masks_have_to_be_there(self, tmp_path, key):
        with pytest.raises(FileNotFoundError, match=rf"There is no file none\.h5, the {key} of the arm vanilla"):
            load_sweep(written(tmp_path, LEAST | {key: "none.h5"}))

    def test_one_folder_has_one_setting(self, tmp_path):
        with pytest.raises(ValueError, match=r"share .*vanilla/seed-0: epochs \(3 there, 4 now\); name their arms"):
            load_sweep(written(tmp_path, [LEAST | {"epochs": 3}, LEAST | {"epochs": 4}]))


def folders_of(part: Sweep) -> set[Path]:
    return {run.folder for run in part.runs}


def small(tiny: dict[str, str], folder: Path, **more) -> Sweep:
    """Two arms and two seeds."""
    contents = {**tiny, **QUICK, "epochs": 1, "method": ["vanilla", "bitfit"], "seeds": 2}
    return load_sweep(written(folder, contents | more))


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A sweep that was run, its folder and what the call gave."""
    folder = tmp_path_factory.mktemp("done")
    loaded = small(tiny, folder)
    return loaded, folder / "out", run_sweep(loaded, folder / "out", progress=False)


def outcome(folder: Path) -> list[object]:
    """What a training came to, without the times."""
    results = Results.load(folder)
    return [replace(run, seconds_per_step=0.0, peak_memory=0) for run in results.runs]


class TestRuns:
    def test_every_run_is_a_run_folder_of_one_seed(self, done):
        loaded, out, report = done
        assert report.finished == tuple(run.folder for run in loaded.runs)
        assert not (report.failed or report.skipped or report.in_use)
        for run in loaded.runs:
            assert {"config.yaml", "run.json", "results.json"} <= {file.name for file in (out / run.folder).iterdir()}
            assert [r.seed for r in Results.load(out / run.folder).runs] == run.arguments["seeds"]

    def test_a_run_is_what_finetune_makes_of_its_arguments(self, done, tiny, tmp_path):
        _, out, _ = done
        finetune(**tiny, **QUICK, epochs=1, method="bitfit", seeds=[1], out=tmp_path / "alone", progress=False)
        assert outcome(tmp_path / "alone") == outcome(out / "tiny/cola/24/bitfit/seed-1")

    def test_what_is_finished_is_not_run_again(self, done):
        loaded, out, _ = done
        before = {file: file.stat().st_mtime_ns for file in out.rglob("results.json")}
        again = run_sweep(loaded, out, progress=False)
        assert again.skipped == tuple(run.folder for run in loaded.runs)
        assert not (again.finished or again.failed or again.in_use)
        assert before == {file: file.stat().st_mtime_ns for file in out.rglob("results.json")}

    def test_a_sweep_may_grow(self, done, tiny, tmp_path, monkeypatch):
        _, out, _ = done
        monkeypatch.setattr(running, "finetune", lambda model, **_: Results.load(out / FIRST))
        more = small(tiny, tmp_path, method=["vanilla", "bitfit", "r-drop"])
        report = run_sweep(more, out, progress=False)
        assert [folder.parts[3] for folder in report.finished] == ["r-drop", "r-drop"]
        assert [folder.parts[3] for folder in report.skipped] == ["vanilla", "bitfit"] * 2

    def test_settings_of_finished_runs_are_read_once_for_all_seeds(self, done, monkeypatch):
        loaded, out, _ = done
        read = []
        monkeypatch.setattr(running, "finetune", lambda model, **given: read.append((given["method"], given["seeds"])))
        run_sweep(loaded, out, progress=False)
        assert read == [("vanilla", [0]), ("bitfit", [0])]

    def test_a_finished_run_keeps_its_settings(self, done, tiny, tmp_path):
        _, out, _ = done
        before = (out / FIRST / "results.json").read_bytes()
        with pytest.raises(ValueError, match=r"begun with another setting: epochs \(1 there, 2 now\)"):
            run_sweep(small(tiny, tmp_path, epochs=2), out, progress=False)
        assert (out / FIRST / "results.json").read_bytes() == before
        assert not list(out.rglob("failed.json"))

    def test_the_report_counts(self, done):
        _, _, report = done
        assert str(report) == "4 finished, 0 finished before, 0 failed"
        failed = replace(report, failed={Path("a/b"): "out of luck"}, in_use=(Path("c"),))
        assert str(failed).splitlines() == [
            "4 finished, 0 finished before, 1 failed, 1 in use by other processes",
            "  failed: a/b: out of luck",
        ]


FIRST = Path("tiny/cola/24/vanilla/seed-0")


class TestFailures:
    @pytest.fixture
    def unlucky(self, tiny, tmp_path):
        """A sweep with an arm that cannot be trained: vanilla has no use for a mask."""
        mask = tmp_path / "mask.safetensors"
        fs.random_fraction(fs.load_model(tiny["model"], objective="classification", num_labels=2)[0], 0.5, seed=0).save(
            mask
        )
        arms = {"masked": {"method": "vanilla", "mask": str(mask)}, "vanilla": None}
        return small(tiny, tmp_path, method=arms, seeds=1), tmp_path / "out"

    def test_others_go_on_and_the_file_says_why(self, unlucky):
        loaded, out = unlucky
        report = run_sweep(loaded, out, progress=False)
        assert [folder.parts[3] for folder in report.finished] == ["vanilla"]
        ((folder, why),) = report.failed.items()
        assert why == "vanilla has no use for mask here; leave mask out."
        said = json.loads((out / folder / "failed.json").read_text())
        assert said["error"] == why
        assert "Traceback" in said["traceback"] and why in said["traceback"]
        assert 'File "finetune/plan.py"' in said["traceback"] and 'File "/' not in said["traceback"]
        facts = {"model": "tiny", "task": TASK, "train_size": 24, "method": "vanilla", "arm": "masked", "seed": 0}
        assert facts.items() <= said["config"].items()
        assert said["config"]["mask"] == "mask.safetensors"
        assert {"format", "format_version", "provenance"} <= said.keys()
        assert [file.name for file in (out / folder).iterdir()] == ["failed.json"]

    def test_failed_runs_are_left_until_they_are_to_be_retried(self, unlucky, monkeypatch):
        loaded, out = unlucky
        (failed,) = run_sweep(loaded, out, progress=False).failed
        monkeypatch.setattr(running, "finetune", lambda model, **_: Results.load(out / FIRST))
        again = run_sweep(loaded, out, progress=False)
        assert "vanilla has no use for mask here" in again.failed[failed]
        assert "--retry-failed" in again.failed[failed]
        retried = run_sweep(loaded, out, retry_failed=True, progress=False)
        assert retried.finished == (failed,) and not retried.failed
        assert not (out / failed / "failed.json").exists()

    def test_an_interrupted_run_is_not_a_failed_one(self, tiny, tmp_path, monkeypatch):
        def interrupt(model, **_):
            raise KeyboardInterrupt

        monkeypatch.setattr(running, "finetune", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(small(tiny, tmp_path), tmp_path / "out", progress=False)
        assert not list((tmp_path / "out").rglob("failed.json"))

    def test_an_unexpected_error_has_its_type_in_the_sentence(self, tiny, tmp_path, monkeypatch):
        def fail(model, **_):
            raise RuntimeError("CUDA out of memory.\n  Tried hard.")

        loaded = small(tiny, tmp_path, method="vanilla", seeds=1)
        monkeypatch.setattr(running, "finetune", fail)
        report = run_sweep(loaded, tmp_path / "out", progress=False)
        assert list(report.failed.values()) == ["RuntimeError: CUDA out of memory. Tried hard."]

    @pytest.mark.parametrize(("name", "value"), [("processes", 0), ("WORLD_SIZE", "2")])
    def test_what_cannot_be_shared_out_is_refused(self, done, monkeypatch, name, value):
        loaded, out, _ = done
        if name == "WORLD_SIZE":
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=r"start it without torchrun|processes must be at least 1, got 0"):
            run_sweep(loaded, out, progress=False, **({"processes": value} if name == "processes" else {}))


def test_a_claimed_run_is_left_to_the_process_that_has_it(tiny, tmp_path):
    loaded, out = small(tiny, tmp_path, method="vanilla", seeds=1), tmp_path / "out"
    (run,) = loaded.runs
    with running._claimed(out / run.folder) as first, running._claimed(out / run.folder) as second:
        assert first and not second
        report = run_sweep(loaded, out, progress=False)
    assert report.in_use == (run.folder,) and not report.finished
    assert run_sweep(loaded, out, progress=False).finished == (run.folder,)


SCRIPT = """
import sys
from pathlib import Path
from fisherscope.experiments import Sweep, load_sweep, run_sweep, running
from fisherscope.experiments.failure import Failure
from fisherscope.finetune import trainer
import test_sweep
trainer.SECONDS_BETWEEN_CHECKPOINTS = 0.0
file, out = map(Path, sys.argv[1:3])
if len(sys.argv) > 3:
    running.finetune = test_sweep.noted(*map(Path, sys.argv[3:]))
report = run_sweep(load_sweep(file), out, progress=False)
assert not report.failed, report
"""


def noted(log: Path, begun: Path, awaited: Path):
    """``finetune`` that logs every training it begins, then makes one file and waits for another."""

    def train(model, **arguments):
        if not (arguments["out"] / "results.json").exists():  # it reads finished ones
            with log.open("a") as file:
                print(arguments["out"], file=file)
            begun.touch()
            wait_for(awaited.exists)
        return finetune(model, **arguments)

    return train


def wait_for(ready) -> None:
    until = time.monotonic() + 200
    while not ready():
        assert time.monotonic() < until, "no progress"
        time.sleep(0.01)


def test_two_processes_share_the_runs_and_do_each_once(tiny, tmp_path, monkeypatch):
    """Either is in a training of its own when the other begins its first one."""
    loaded, out = small(tiny, tmp_path), tmp_path / "out"
    log, here, there = (tmp_path / name for name in ("log.txt", "here", "there"))
    monkeypatch.setattr(running, "finetune", noted(log, here, there))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT, tmp_path / "sweep.yaml", out, log, there, here]
    with subprocess.Popen(list(map(str, words)), env=environment) as other:
        wait_for(lambda: there.exists() or other.poll() is not None)
        report = run_sweep(loaded, out, progress=False)
    assert other.returncode == 0
    assert report.finished and report.in_use and not report.failed
    assert sorted(log.read_text().splitlines()) == sorted(str(out / run.folder) for run in loaded.runs)
    assert set(loaded.states(out).values()) == {"finished"}


def test_a_killed_sweep_goes_on_to_the_same_results(tiny, tmp_path):
    """SIGKILL in the middle of the second run; the next call goes on from its checkpoint."""
    loaded, out = small(tiny, tmp_path, epochs=20, seeds=1), tmp_path / "killed"
    first, second = (out / run.folder for run in loaded.runs)

    def in_the_second() -> bool:
        return any(second.glob(f"seed-0.part/checkpoint-*/{STATE_FILE}"))

    kill_when(in_the_second, SCRIPT, tmp_path / "sweep.yaml", out)
    assert list(loaded.states(out).values()) == ["finished", "begun"]
    kept = (first / "results.json").read_bytes()
    report = run_sweep(loaded, out, progress=False)
    assert report.skipped == (loaded.runs[0].folder,) and report.finished == (loaded.runs[1].folder,)
    assert (first / "results.json").read_bytes() == kept
    run_sweep(loaded, tmp_path / "whole", progress=False)
    for run in loaded.runs:
        assert outcome(out / run.folder) == outcome(tmp_path / "whole" / run.folder)
        names = [{f.name for f in (where / run.folder).iterdir()} for where in (out, tmp_path / "whole")]
        assert names[0] == names[1]


@pytest.mark.slow
def test_what_a_killed_worker_was_busy_with_is_done_by_another(tiny, tmp_path):
    loaded, out = small(tiny, tmp_path, epochs=20, seeds=1), tmp_path / "out"

    def kill_one() -> None:
        while not list(out.rglob("config.yaml")):
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = run_sweep(loaded, out, processes=2, progress=False)
    killer.join()
    assert sorted(report.finished) == sorted(run.folder for run in loaded.runs)
    assert not (report.failed or report.in_use)


@pytest.mark.slow
def test_workers_give_what_one_process_gives_and_stop_at_a_refusal(done, tiny, tmp_path):
    _, out, _ = done
    report = run_sweep(small(tiny, tmp_path, seeds=1), tmp_path / "out", processes=2, progress=False)
    assert len(report.finished) == 2
    for folder in report.finished:
        assert outcome(tmp_path / "out" / folder) == outcome(out / folder)
    with pytest.raises(ValueError, match=r"begun with another setting: epochs \(1 there, 2 now\)"):
        run_sweep(small(tiny, tmp_path, seeds=1, epochs=2), tmp_path / "out", processes=2, progress=False)
    assert multiprocessing.active_children() == []


class TestCommand:
    def test_it_runs_tells_and_leaves_with_a_status(self, tiny, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        small(tiny, tmp_path, method=["vanilla"], seeds=1)
        words = ["sweep", "sweep.yaml", "--out", "out"]
        assert main(words) == 0
        told = capsys.readouterr().out
        assert f"{FIRST}: finished, matthews " in told
        assert told.splitlines()[-1] == "out: 1 finished, 0 finished before, 0 failed"
        (tmp_path / "out" / FIRST / "results.json").unlink()
        config = {"model": "tiny", "task": TASK, "seeds": [0]}
        Failure.of(ValueError("out of luck"), config, "vanilla").save(tmp_path / "out" / FIRST / "failed.json")
        assert main(words) == 1
        assert f"failed: {FIRST}: out of luck (before; " in capsys.readouterr().out

    def test_a_dry_run_lists_and_changes_nothing(self, done, tiny, tmp_path, capsys):
        _, out, _ = done
        small(tiny, tmp_path, seeds=3)
        before = sorted((file, file.stat().st_mtime_ns) for file in out.parent.rglob("*"))
        assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(out), "--dry-run"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in told] == ["finished"] * 4 + ["missing"] * 2 + ["4"]
        assert told[0] == f"finished  {FIRST}" and told[-1] == "4 finished, 2 missing"
        assert before == sorted((file, file.stat().st_mtime_ns) for file in out.parent.rglob("*"))

    def test_a_dry_run_knows_what_failed_and_what_was_begun(self, tiny, tmp_path):
        loaded = small(tiny, tmp_path, method=["vanilla", "bitfit", "r-drop"], seeds=1)
        for run, name in zip(loaded.runs, ("failed.json", "config.yaml"), strict=False):
            (tmp_path / run.folder).mkdir(parents=True)
            (tmp_path / run.folder / name).touch()
        assert list(loaded.states(tmp_path).values()) == ["failed", "begun", "missing"]

    @pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2"])
    def test_a_shard_is_i_of_n(self, shard, capsys):
        with pytest.raises(SystemExit):
            main(["sweep", "sweep.yaml", "--out", "out", f"--shard={shard}"])
        assert "must be I/N with I from 0 to N-1" in capsys.readouterr().err

    def test_it_is_refused_in_one_line(self, tmp_path, capsys):
        assert main(["sweep", str(written(tmp_path, LEAST | {"epoch": 3})), "--out", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_an_interrupted_sweep_says_how_to_go_on(self, done, capsys, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        _, out, _ = done
        monkeypatch.setattr(running, "run_sweep", interrupt)
        assert main(["sweep", str(out.parent / "sweep.yaml"), "--out", str(out)]) == 130
        assert "interrupted; the same command goes on" in capsys.readouterr().err


class TestArray:
    SCRIPT = ROOT / "scripts" / "slurm_array.sbatch"

    def test_the_script_is_bash(self):
        subprocess.run(["bash", "-n", str(self.SCRIPT)], check=True)

    def test_the_jobs_of_an_array_share_out_the_runs(self, tmp_path, capsys):
        """Numbers that begin at 3, as after --array=3-4."""
        loaded = load_sweep(written(tmp_path, LEAST | {"seeds": 5}))
        program = tmp_path / "bin" / "fisherscope"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        program.chmod(0o755)
        array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_CPUS_PER_TASK": "1"}
        told = []
        for number in ("3", "4"):
            paths = os.pathsep.join([str(program.parent), os.environ["PATH"]])
            environment = os.environ | array | {"SLURM_ARRAY_TASK_ID": number, "PATH": paths}
            words = ["bash", self.SCRIPT, tmp_path / "sweep.yaml", tmp_path / "out of it", "--dry-run"]
            job = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=True)
            assert main(job.stdout.splitlines()) == 0
            told += [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]]
        assert sorted(told) == sorted(folders(loaded))
