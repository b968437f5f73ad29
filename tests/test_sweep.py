"""Sweeps: what a file means, and that every training is done once, whatever happens to the processes."""

import errno
import json
import multiprocessing
import os
import shutil
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
from fisherscope.finetune.folder import leave

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
            (
                {"method": {"strong": {"method": "r-drop", "weight": 5}}},
                r"the arm strong must have settings of its method as 'settings: \{'weight': 5\}'; move them there\.",
            ),
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
            ({"seeds": [2**32]}, "a list of seeds from 0 to 4294967295; got .4294967296"),
            ({"seeds": [True]}, "seeds must be a number of at least 1, or a list"),
            ({"train_size": "most"}, "train_size must be a number of examples, a fraction, or all; got 'most'"),
            ({"train_size": [24, 0]}, "train_size must be a number of examples"),
            ({"train_size": True}, "train_size must be a number of examples"),
            ({"model": 3}, "model must be a name or a list of names; got 3"),
            ({"model": ["a", ""]}, "model must be a name or a list of names; got ''"),
            ({"task": "rtee"}, "task must be one of .*; got 'rtee'"),
            ({"intermediate_task": "rtee"}, "intermediate_task must be one of .*; got 'rtee'"),
            ({"method": "vanila"}, "in the arm vanila: There is no method .vanila. .did you mean .vanilla."),
            ({"settings": {"weight": 1}}, "in the arm vanilla: vanilla has no setting 'weight'"),
            ({"settings": "weight"}, "settings must be a mapping or null; got 'weight'"),
            ({"method": "top-k-layers"}, "top-k-layers needs the setting 'layers'"),
            (
                {"method": "r-drop", "settings": {"weight": "five"}},
                "in the arm r-drop: the setting weight must be a number",
            ),
            ({"method": "r-drop", "settings": {"weight": None}}, "the setting weight must be a number; got None"),
            (
                {"method": "top-k-layers", "settings": {"layers": 1.5}},
                "the setting layers must be a whole number; got 1.5",
            ),
            ({"method": "l2-sp", "settings": {"fisher": 1}}, "the setting fisher must be true or false; got 1"),
            ({"method": "l2-sp+r3f", "settings": {"noise": "x"}}, "the setting noise must be one of uniform, normal"),
            (
                {"method": ["vanilla", {"r-drop": {}}]},
                "method must be a name, .* or a mapping from names of arms; got {.r-d",
            ),
            ({"method": 3}, "method must be a name, a list of names, or a mapping from names of arms; got 3"),
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
            ({"max_length": -5}, "max_length must be at least 1; got -5, in the arm vanilla"),
            ({"pretrain_steps": 3}, "pretrain_steps goes with pretrain_text only; leave it out of the arm vanilla"),
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

    def test_a_config_that_says_that_no_model_is_local_needs_no_new_look(self, done, tmp_path, monkeypatch):
        loaded, out = done[0], copied(done, tmp_path)
        for run in loaded.runs:
            (out / run.folder / "config.yaml").write_text("a: 1\n" + "local_models: {}\n" * run.arguments["seeds"][0])
        read = []
        monkeypatch.setattr(running, "finetune", lambda model, **given: read.append((given["method"], given["seeds"])))
        run_sweep(loaded, out, progress=False)
        assert read == [("vanilla", [0]), ("bitfit", [0])]

    @pytest.mark.parametrize("file", ["results.json", "config.yaml"])
    def test_finished_runs_that_are_damaged_are_named_and_left_alone(self, done, tmp_path, file):
        """The first is the one whose settings are looked at, the last is looked at after a sibling."""
        loaded, out = done[0], copied(done, tmp_path)
        damaged = loaded.runs[0].folder, loaded.runs[-1].folder
        for run in damaged:
            (out / run / file).write_text('{"cut')
        report = run_sweep(loaded, out, progress=False)
        assert tuple(report.failed) == damaged and all(str(out / run / file) in report.failed[run] for run in damaged)
        assert report.skipped == tuple(run.folder for run in loaded.runs[1:-1])
        assert {(out / run / file).read_text() for run in damaged} == {'{"cut'}

    def test_results_of_another_seed_are_none_of_this_one(self, done, tiny, tmp_path, monkeypatch):
        out = copied(done, tmp_path)
        shutil.copytree(out / FIRST, out / FIRST.with_name("seed-2"))
        monkeypatch.setattr(running, "finetune", lambda model, **_: Results.load(out / FIRST))
        report = run_sweep(small(tiny, tmp_path, method="vanilla", seeds=3), out, progress=False)
        ((folder, why),) = report.failed.items()
        assert folder == FIRST.with_name("seed-2")
        assert why == f"{out / folder} has results of seed 0, not 2; move it elsewhere."
        assert len(report.skipped) == 2

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


def copied(done, folder: Path) -> Path:
    """The folder of the sweep that was run, to be changed."""
    return Path(shutil.copytree(done[1], folder / "copied"))


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

    def test_a_failure_is_forgotten_only_when_the_training_succeeds(self, done, tiny, tmp_path):
        out = copied(done, tmp_path)
        (out / FIRST / "results.json").unlink()
        config = {"model": "tiny", "task": TASK, "seeds": [0]}
        Failure.of(ValueError("out of luck"), config, "vanilla").save(out / FIRST / "failed.json")
        with pytest.raises(ValueError, match="begun with another setting: epochs"):
            run_sweep(small(tiny, tmp_path, epochs=2), out, retry_failed=True, progress=False)
        assert Failure.load(out / FIRST / "failed.json").error == "out of luck"

    @pytest.mark.parametrize("file", ["", FIRST, FIRST.parent])
    def test_a_file_in_the_place_of_a_folder_is_refused(self, tiny, tmp_path, file):
        path = tmp_path / "out" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        with pytest.raises(NotADirectoryError, match=rf"A sweep needs a folder, but {path} is a file; give another"):
            run_sweep(small(tiny, tmp_path), tmp_path / "out", progress=False)
        assert path.read_text() == "mine"

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


def test_a_call_that_is_killed_while_it_takes_its_files_away_can_be_repeated(tmp_path, monkeypatch):
    """What is left says whose it is."""
    for name in ("config.yaml", "splits.json"):
        (tmp_path / name).touch()
    unlink = Path.unlink

    def killed(path, **options):
        unlink(path, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        leave(tmp_path, made=False)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


class TestNoLocks:
    """A file system on which ``flock`` fails."""

    @pytest.fixture(autouse=True)
    def refused(self, monkeypatch):
        def flock(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(running.fcntl, "flock", flock)

    def test_shards_do_without(self, done, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(running, "finetune", lambda model, **_: Results.load(done[1] / FIRST))
        loaded = small(tiny, tmp_path)
        parts = [run_sweep(loaded.shard(n, 2), tmp_path / "out", progress=False).finished for n in (0, 1)]
        assert sorted(parts[0] + parts[1]) == sorted(run.folder for run in loaded.runs)

    def test_a_whole_sweep_is_told_to_take_shards(self, tiny, tmp_path):
        with pytest.raises(OSError, match=r"has no locks, .* give every process a part of its own, --shard I/N \(0/1"):
            run_sweep(small(tiny, tmp_path), tmp_path / "out", progress=False)

    def test_other_errors_are_told_as_they_are(self, tiny, tmp_path, monkeypatch):
        def flock(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(running.fcntl, "flock", flock)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            run_sweep(small(tiny, tmp_path).shard(0, 1), tmp_path / "out", progress=False)


def test_a_claimed_run_is_left_to_the_process_that_has_it(tiny, tmp_path):
    loaded, out = small(tiny, tmp_path, method="vanilla", seeds=1), tmp_path / "out"
    (run,) = loaded.runs
    with running._claimed(out / run.folder, False) as first, running._claimed(out / run.folder, True) as second:
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


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from fisherscope.experiments import load_sweep, run_sweep, running
from fisherscope.finetune import Results


def train(model, *, method, out, **_):
    if method == "bitfit":
        os.kill(os.getpid(), signal.SIGKILL)
    shutil.copytree(sys.argv[3], out)
    return Results.load(out)


running.finetune = train
if __name__ == "__main__":
    print(run_sweep(load_sweep(sys.argv[1]), Path(sys.argv[2]), processes=2, progress=False))
"""


@pytest.mark.slow
def test_a_training_that_kills_its_process_has_failed_and_starves_no_other(done, tiny, tmp_path):
    """Two of the arms kill; without new processes there would be none after the second kill."""
    arms = {"kills": {"method": "bitfit"}, "kills-too": {"method": "bitfit"}, "vanilla": None, "mixout": None}
    loaded, out = small(tiny, tmp_path, method=arms, seeds=1), tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED)
    words = [sys.executable, tmp_path / "killed.py", tmp_path / "sweep.yaml", out, done[1] / FIRST]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[0] == "2 finished, 0 finished before, 2 failed"
    assert list(loaded.states(out).values()) == ["failed", "failed", "finished", "finished"]
    failure = Failure.load(out / loaded.runs[0].folder / "failed.json")
    assert failure.error == "Its process was killed, twice, as when memory runs out."
    assert failure.config["arm"] == "kills" and failure.config["seed"] == 0
    again = run_sweep(Sweep(loaded.runs[:2]), out, progress=False)
    assert all(why.startswith(failure.error) for why in again.failed.values()) and len(again.failed) == 2


@pytest.mark.slow
def test_processes_that_cannot_begin_are_not_replaced_for_ever(tiny, tmp_path):
    """As with a script that does not say where it begins."""
    loaded, out = small(tiny, tmp_path, seeds=1), tmp_path / "out"
    (tmp_path / "unguarded.py").write_text(KILLED.replace('if __name__ == "__main__":', "if True:"))
    words = [sys.executable, tmp_path / "unguarded.py", tmp_path / "sweep.yaml", out, out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=True).stdout
    assert told.count("no process was left to do it; the same command goes on") == 2
    assert set(loaded.states(out).values()) == {"missing"}


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

    def test_the_file_is_no_config_of_flags(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["sweep", "--config", str(written(tmp_path, LEAST)), "--out", str(tmp_path / "out")])
        told = capsys.readouterr().err
        assert "no flag of this command; the file of a sweep is given without --config" in told

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

    @pytest.fixture
    def job(self, tmp_path):
        """A job of an array: what it would call, by the variables that SLURM sets."""
        program = tmp_path / "bin" / "fisherscope"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        program.chmod(0o755)

        def run(**variables: str) -> subprocess.CompletedProcess[str]:
            paths = os.pathsep.join([str(program.parent), os.environ["PATH"]])
            words = ["bash", self.SCRIPT, tmp_path / "sweep.yaml", tmp_path / "out of it", "--dry-run"]
            environment = os.environ | {"PATH": paths, "SLURM_CPUS_PER_TASK": "1"} | variables
            return subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True)

        return run

    @staticmethod
    def array(number: int, least: int, most: int, count: int) -> dict[str, str]:
        variables = {"ID": number, "MIN": least, "MAX": most, "COUNT": count}
        return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in variables.items()}

    def test_the_jobs_of_an_array_share_out_the_runs(self, job, tmp_path, capsys):
        """Numbers that begin at 3, as after --array=3-4."""
        loaded = load_sweep(written(tmp_path, LEAST | {"seeds": 5}))
        told = []
        for number in (3, 4):
            done = job(**self.array(number, 3, 4, 2))
            assert done.returncode == 0 and main(done.stdout.splitlines()) == 0
            told += [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]]
        assert sorted(told) == sorted(folders(loaded))

    def test_some_parts_are_done_again_if_it_is_said_how_many_there_are(self, job):
        done = job(**self.array(5, 3, 5, 2), PARTS="8")
        assert done.returncode == 0 and done.stdout.splitlines()[-3:] == ["--shard", "5/8", "--dry-run"]

    def test_arrays_with_gaps_are_refused(self, job):
        done = job(**self.array(3, 1, 3, 2))
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith("slurm_array.sbatch: the array has gaps") and done.stderr.count("\n") == 1

    def test_outside_an_array_there_is_no_part(self, job):
        done = job()
        assert done.returncode == 2 and not done.stdout
        assert "this is no job of an array; submit it with sbatch --array=0-7" in done.stderr
