"""Runs read back from folders, methods compared over their seeds, and the tables that come of it."""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fisherscope import storage
from fisherscope.cli import main
from fisherscope.experiments import load_sweep, run_sweep, running
from fisherscope.experiments.arms import Group, read_runs
from fisherscope.experiments.comparison import Comparison, Row, compare_methods
from fisherscope.experiments.failure import FAILURE
from fisherscope.experiments.statistics import brown_forsythe, corrected, paired, summarize
from fisherscope.finetune.results import Results, SeedResult
from fisherscope.storage import WrongFile

REAL = Path(__file__).parent.parent / "figures" / "finetune" / "builtin_bert"

VANILLA = [0.50, 0.55, 0.60, 0.57, 0.52]
BETTER = [0.56, 0.63, 0.62, 0.66, 0.60]
OTHER = [0.51, 0.54, 0.61, 0.55, 0.53]


def training(seed: int, *values: float, seconds: float = 0.5, **changed: Any) -> SeedResult:
    """One whose accuracy after every epoch is given."""
    rows = [
        {"step": i + 1, "epoch": i + 1.0, "loss": 1 - value, "accuracy": value, "f1": value / 2}
        for i, value in enumerate(values)
    ]
    losses = [{"step": i + 1, "loss": 0.1} for i in range(len(values))]
    return replace(SeedResult(seed, "finished", rows, losses, False, seconds, 2**20, 8), **changed)


def with_select(run: SeedResult, *values: float) -> SeedResult:
    rows = [
        {**row, "select_accuracy": value, "select_loss": 1 - value}
        for row, value in zip(run.evaluations, values, strict=True)
    ]
    return replace(run, evaluations=rows)


def save(
    folder: Path,
    method: str = "vanilla",
    values: Sequence[float] | Mapping[int, float] = VANILLA,
    runs: Sequence[SeedResult] | None = None,
    task: str = "sums",
    metric: str = "accuracy",
    fingerprints: Mapping[str, str | None] | None = None,
    own: Mapping[str, Any] | None = None,
    device: str = "abacus",
    **settings: Any,
) -> Path:
    """The folder of a run; all but the accuracies are of no matter."""
    by_seed = values if isinstance(values, Mapping) else dict(enumerate(values))
    resolved = {"model": "small", "task": task, "train_size": 300, "subset_seed": 0, "protocol": "fixed-subset"}
    resolved |= {"learning_rate": 1e-3, "method": method, "settings": {method: dict(own or {})}, **settings}
    Results(
        task,
        method,
        metric,
        resolved,
        [training(seed, value) for seed, value in by_seed.items()] if runs is None else runs,
        fingerprints or {"train": "aa", "validation": "bb", "backbone": "cc"},
        {"device": device},
    ).save(folder / "results.json")
    return folder


def save_failure(folder: Path, error: str = "It broke.", **config: Any) -> None:
    contents = {"format": FAILURE, "format_version": storage.FORMAT_VERSION, "error": error, "traceback": "…"}
    known = {"model": "small", "task": "sums", "train_size": 300, "method": "other", "seed": 3} | config
    folder.mkdir(parents=True)
    (folder / "failed.json").write_text(json.dumps({**contents, "config": known}))


def row_of(comparison: Comparison, arm: str, task: str = "sums") -> Row:
    return next(row for row in comparison.rows if (row.arm, row.group.task) == (arm, task))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Vanilla and a better method."""
    save(tmp_path / "vanilla")
    save(tmp_path / "better", "better", BETTER)
    return tmp_path


@pytest.fixture
def two_tasks(two: Path) -> Path:
    """The same, and a third method on one task only."""
    save(two / "words" / "vanilla", values=[0.7, 0.75, 0.8, 0.72, 0.78], task="words", metric="f1")
    save(two / "words" / "better", "better", [0.78, 0.79, 0.85, 0.8, 0.81], task="words", metric="f1")
    save(two / "other", "other", OTHER)
    return two


class TestReading:
    def test_every_run_below_a_folder_is_read(self):
        arms = read_runs(REAL)
        assert {arm.task for arm in arms} == {"builtin:acceptability", "builtin:similarity"}
        assert len(arms) == len(list(REAL.rglob("results.json")))

    def test_real_runs_are_what_their_files_say(self):
        arm = next(arm for arm in read_runs(REAL / "acceptability") if arm.method == "vanilla")
        whole = Results.load(REAL / "acceptability" / "vanilla")
        assert (arm.values(), arm.settings, arm.metric) == (whole.values(), whole.settings, whole.metric)
        assert arm.fingerprints == whole.fingerprints

    def test_runs_of_one_method_with_other_settings_are_named_by_their_folders(self):
        names = {arm.method: arm.settings["method"] for arm in read_runs(REAL / "acceptability")}
        assert names["uniform-dropout"] == names["guided-dropout"] == "guided-dropout"

    def test_folders_of_one_method_with_equal_settings_are_one_arm(self, tmp_path):
        save(tmp_path / "here", values={5: 0.5, 4: 0.4})
        save(tmp_path / "there", values={1: 0.1, 9: 0.9})
        (arm,) = read_runs(tmp_path)
        assert (arm.method, list(arm.values())) == ("vanilla", [1, 4, 5, 9])

    def test_seeds_of_a_sweep_are_joined_under_the_name_of_their_folder(self, tmp_path):
        for seed in (10, 2, 0):
            save(tmp_path / "small" / "sums" / "300" / "slow" / f"seed-{seed}", values={seed: seed / 10})
        (arm,) = read_runs(tmp_path)
        assert (arm.method, arm.settings["method"]) == ("slow", "vanilla")
        assert arm.values() == {0: 0.0, 2: 0.2, 10: 1.0}

    def test_arms_of_a_sweep_with_one_method_stay_apart(self, tmp_path):
        for arm in ("one", "same"):
            save(tmp_path / arm / "seed-0", values={0: 0.5})
        assert [arm.method for arm in read_runs(tmp_path)] == ["one", "same"]

    def test_sweeps_that_share_an_arm_are_joined(self, tmp_path):
        for sweep_folder, seed in (("first", 0), ("second", 1)):
            save(tmp_path / sweep_folder / "vanilla" / f"seed-{seed}", values={seed: 0.5})
        (arm,) = read_runs(tmp_path / "first", tmp_path / "second")
        assert list(arm.values()) == [0, 1]

    def test_one_name_for_two_settings_is_refused(self, tmp_path):
        save(tmp_path / "vanilla" / "seed-0", values={0: 0.5})
        save(tmp_path / "vanilla" / "seed-1", values={1: 0.5}, learning_rate=0.1)
        with pytest.raises(
            ValueError, match=r"both vanilla on sums, with another setting: learning_rate \(0.001 .*0.1"
        ):
            read_runs(tmp_path)

    def test_a_seed_that_is_there_twice_counts_once_whatever_its_times(self, tmp_path):
        for name, seconds in (("here", 0.1), ("there", 9.0)):
            save(tmp_path / name, runs=[training(0, 0.5, seconds=seconds)])
        (arm,) = read_runs(tmp_path)
        assert arm.values() == {0: 0.5}

    def test_a_seed_that_is_there_twice_with_other_values_is_refused(self, tmp_path):
        for name, value in (("here", 0.5), ("there", 0.6)):
            save(tmp_path / name, values={0: value})
        with pytest.raises(
            ValueError, match=r"Seed 0 of vanilla on sums is in .*here and in .*there with other values"
        ):
            read_runs(tmp_path)

    def test_a_folder_given_twice_counts_once(self, two):
        assert read_runs(two, two / "better", two / "vanilla" / "results.json") == read_runs(two)

    def test_finished_seeds_of_a_run_in_progress_are_taken_and_said(self, tmp_path, caplog):
        whole = save(tmp_path / "run", values={0: 0.5, 1: 0.6}) / "results.json"
        whole.rename(storage.part_path(whole))
        (arm,) = read_runs(tmp_path)
        assert arm.values() == {0: 0.5, 1: 0.6}
        assert "is not finished: the seeds that are done are taken, 0, 1." in caplog.text

    def test_a_crashed_training_counts_for_its_arm(self, tmp_path):
        save(tmp_path / "other" / "seed-0", "other", {0: 0.5})
        save_failure(tmp_path / "other" / "seed-3")
        (arm,) = read_runs(tmp_path)
        assert (arm.values(), arm.crashed, arm.failures()) == ({0: 0.5}, {3: "It broke"}, {3: "crashed: It broke"})

    @pytest.mark.parametrize(
        ("asked", "found"),
        [
            ({"protocol": "dps2022"}, r"protocol \(fixed-subset there, dps2022 now\)"),
            ({"subset_seed": 5}, r"subset_seed \(0 there, 5 now\)"),
            ({"learning_rate": 9.0}, r"learning_rate \(0.001 there, 9.0 now\)"),
            ({"init": "random"}, r"init \(pretrained there, random now\)"),
        ],
    )
    def test_a_crash_with_other_settings_does_not_count_for_the_arm(self, tmp_path, asked, found):
        save(tmp_path / "first" / "other" / "seed-0", "other", {0: 0.5})
        save_failure(tmp_path / "second" / "other" / "seed-3", **asked)
        with pytest.raises(ValueError, match=rf"are both other on sums, with another setting: .*{found}; give their"):
            read_runs(tmp_path)

    def test_settings_of_an_arm_of_nothing_but_crashes_are_named(self, two):
        save_failure(two / "other" / "seed-3", settings={"rate": 0.5})
        assert "other: rate 0.5." in compare_methods(read_runs(two)).notes

    def test_crashes_with_other_settings_are_no_arm_together(self, tmp_path):
        for seed, epochs in ((3, 4), (5, 6)):
            save_failure(tmp_path / "other" / f"seed-{seed}", seed=seed, epochs=epochs)
        with pytest.raises(ValueError, match=r"with another setting: epochs \(4 there, 6 now\)"):
            read_runs(tmp_path)

    def test_a_crash_is_compared_by_the_recipe_that_its_method_makes(self, tmp_path):
        """The method trains ten times as long as asked."""
        settings = {"longer": 10}
        save(tmp_path / "long" / "seed-0", "vanilla-long", {0: 0.5}, epochs=30.0, max_steps=None, own=settings)
        save_failure(tmp_path / "long" / "seed-3", method="vanilla-long", epochs=3, settings=settings)
        (arm,) = read_runs(tmp_path)
        assert (list(arm.values()), list(arm.crashed)) == ([0], [3])

    def test_seeds_that_began_with_other_weights_are_refused(self, tmp_path):
        for seed, weights in ((0, "cc"), (1, "dd")):
            known = {"train": "aa", "backbone": weights}
            save(tmp_path / "vanilla" / f"seed-{seed}", values={seed: 0.5}, fingerprints=known)
        with pytest.raises(
            ValueError, match=r"seed-0 and .*seed-1 are both vanilla on sums, but began with .* of small \(cc, dd\)"
        ):
            read_runs(tmp_path)

    @pytest.mark.parametrize("begun", [{"init": "random"}, {"before": {"task": "words"}}])
    def test_weights_that_every_seed_makes_for_itself_may_differ(self, tmp_path, begun):
        for seed, weights in ((0, "cc"), (1, "dd")):
            known = {"train": "aa", "backbone": weights}
            save(tmp_path / "vanilla" / f"seed-{seed}", values={seed: 0.5}, fingerprints=known, **begun)
        (arm,) = read_runs(tmp_path)
        assert (list(arm.values()), arm.fingerprints) == ([0, 1], {"train": "aa"})

    def test_an_arm_of_nothing_but_crashes_is_there(self, tmp_path):
        for seed in (3, 4):
            save_failure(tmp_path / "other" / f"seed-{seed}", seed=seed)
        (arm,) = read_runs(tmp_path)
        assert (arm.method, list(arm.crashed), arm.group) == ("other", [3, 4], Group("small", 300, "sums"))

    def test_a_crash_that_was_mended_since_does_not_count(self, tmp_path):
        save_failure(tmp_path / "other" / "seed-3", learning_rate=9.0)
        save(tmp_path / "other" / "seed-3", "other", {3: 0.5})
        (arm,) = read_runs(tmp_path)
        assert (arm.values(), arm.crashed) == ({3: 0.5}, {})

    def test_failure_of_a_real_sweep_is_read(self, tmp_path, monkeypatch):
        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("Out of luck.")

        file = tmp_path / "sweep.yaml"
        file.write_text(
            "{model: 'builtin:bert', task: ['builtin:pairs'], train_size: [40], method: [r-drop], seeds: 1}"
        )
        monkeypatch.setattr(running, "finetune", fail)
        report = run_sweep(load_sweep(file), tmp_path / "out", progress=False)
        (arm,) = read_runs(tmp_path / "out")
        assert len(report.failed) == 1
        assert (arm.method, arm.group) == ("r-drop", Group("builtin:bert", 40, "builtin:pairs"))
        assert arm.crashed == {0: "Out of luck"}

    @pytest.mark.parametrize("text", ['{"accuracy": 0.9}', "[1, 2]", '{"format": "fisherscope.resu'])
    def test_a_foreign_or_damaged_file_is_refused_by_name(self, two, text):
        (two / "vanilla" / "results.json").write_text(text)
        with pytest.raises(WrongFile, match=r"vanilla/results\.json .* Or leave it out: name the other folders"):
            read_runs(two)

    @pytest.mark.parametrize("text", ['{"why": "?"}', "[]", '{"format": "fisherscope.fail'])
    def test_a_foreign_or_damaged_failure_is_refused_by_name(self, two, text):
        (two / "seed-4").mkdir()
        (two / "seed-4" / "failed.json").write_text(text)
        with pytest.raises(WrongFile, match=r"seed-4/failed\.json"):
            read_runs(two)

    def test_a_failure_without_its_settings_is_refused(self, tmp_path):
        save_failure(tmp_path / "seed-4")
        path = tmp_path / "seed-4" / "failed.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "config": {}}))
        with pytest.raises(WrongFile, match=r"failed\.json was cut short, or has damaged contents; remove it"):
            read_runs(tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            {"evaluations": "abc"},
            {"evaluations": [{"step": 1, "epoch": 1.0, "loss": 0.5}]},
            {"evaluations": [{"step": 1, "epoch": 1.0, "loss": 0.5, "accuracy": "high"}]},
            {"evaluations": [{"step": 1, "epoch": 1.0, "loss": 0.5, "accuracy": None}]},
            {"evaluations": [{"epoch": 1.0, "loss": 0.5, "accuracy": 0.5}]},
            {"evaluations": [{"step": 0, "epoch": 0.0, "loss": 0.5, "accuracy": 0.5}]},
            {"losses": None},
            {"losses": [{"loss": 0.1}]},
            {"baselines": None},
            {"seed": "0"},
            {"constant": 0},
            {"status": "lost"},
            {"seconds_per_step": None},
            {"new": 1},
        ],
        ids=str,
    )
    def test_damage_in_a_training_is_refused_by_name(self, two, damage):
        path = two / "better" / "results.json"
        contents = json.loads(path.read_text())
        contents["runs"][0] |= damage
        path.write_text(json.dumps(contents))
        with pytest.raises(WrongFile, match=r"better/results\.json has damaged contents"):
            read_runs(two)

    @pytest.mark.parametrize(
        "damage",
        [
            {"runs": {"a": 1}},
            {"runs": [3]},
            {"metric": None},
            {"settings": [1]},
            {"settings": {"model": "small", "train_size": "all"}},
            {"settings": {"model": "small", "settings": [1]}},
            {"provenance": {"command": "x"}},
            {"provenance": None},
            {"fingerprints": None},
        ],
        ids=str,
    )
    def test_damage_beside_the_trainings_is_refused_by_name(self, two, damage):
        path = two / "better" / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(WrongFile, match=r"better/results\.json has damaged contents"):
            read_runs(two)

    @pytest.mark.parametrize(
        "damage",
        [
            {"task": None},
            {"task": ["a", "b"]},
            {"model": None},
            {"method": 3},
            {"seed": "3"},
            {"train_size": "x"},
            {"protocol": None},
            {"method": "vanilla", "learning_rate": -1},
            {"settings": [1]},
        ],
        ids=str,
    )
    def test_damage_in_a_failure_is_refused_by_name(self, two, damage):
        save_failure(two / "other" / "seed-3", **damage)
        with pytest.raises(WrongFile, match=r"seed-3/failed\.json has damaged contents; remove it"):
            read_runs(two)

    def test_a_file_of_another_name_is_refused(self, two):
        (two / "README.md").write_text("Runs.")
        with pytest.raises(ValueError, match=r"README\.md is not a file of a run \(results\.json, .*; give folders"):
            read_runs(two / "README.md")

    def test_a_folder_without_runs_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no results of fine-tuning in .*; give folders that"):
            read_runs(tmp_path)

    def test_a_folder_that_is_not_there_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
            read_runs(tmp_path / "nowhere")


class TestNumbers:
    def test_summary_and_paired_difference_are_those_of_the_values(self, two):
        comparison = compare_methods(read_runs(two))
        row, reference = row_of(comparison, "better"), row_of(comparison, "vanilla")
        values, usual = dict(enumerate(BETTER)), dict(enumerate(VANILLA))
        assert (row.summary, reference.summary) == (summarize(values), summarize(usual))
        assert row.paired == paired(values, usual)
        assert (row.p_t, row.p_permutation) == (row.paired.p_t, row.paired.p_permutation)
        assert row.p_spread == brown_forsythe(BETTER, VANILLA)

    def test_the_reference_is_first_and_is_not_compared_with_itself(self, two_tasks):
        for rows in compare_methods(read_runs(two_tasks)).groups.values():
            assert rows[0].arm == "vanilla"
            assert (rows[0].paired, rows[0].p_t, rows[0].p_t_corrected) == (None, None, None)
            assert all(row.paired is not None for row in rows[1:])

    def test_another_reference(self, two):
        comparison = compare_methods(read_runs(two), reference="better")
        assert row_of(comparison, "vanilla").paired == paired(dict(enumerate(VANILLA)), dict(enumerate(BETTER)))

    @pytest.mark.parametrize("how", ["holm", "benjamini-hochberg"])
    @pytest.mark.parametrize("test", ["p_t", "p_permutation", "p_spread"])
    def test_corrected_over_all_rows_of_all_tasks(self, two_tasks, how, test):
        rows = compare_methods(read_runs(two_tasks), correction=how).rows
        raw = [getattr(row, test) for row in rows]
        assert sum(p is not None for p in raw) == 4  # two on sums, one on words, one mean
        assert [getattr(row, f"{test}_corrected") for row in rows] == corrected(raw, how)

    def test_epoch_is_the_last_where_a_run_has_no_select_examples(self, two):
        save(two / "better", "better", runs=[with_select(training(seed, 0.9, 0.1), 0.9, 0.1) for seed in range(5)])
        comparison = compare_methods(read_runs(two))
        assert comparison.which == "last"
        assert row_of(comparison, "better").summary.mean == pytest.approx(0.1)

    def test_epoch_is_the_selected_one_where_all_runs_have_select_examples(self, tmp_path):
        for method, last in (("vanilla", 0.1), ("better", 0.2)):
            runs = [with_select(training(seed, 0.7, 0.9, last), 0.8, 0.3, 0.1) for seed in range(3)]
            save(tmp_path / method, method, runs=runs)
        comparison = compare_methods(read_runs(tmp_path))
        assert comparison.which == "selected"
        assert row_of(comparison, "better").summary.mean == pytest.approx(0.7)

    def test_best_epoch_on_request(self, tmp_path):
        save(tmp_path, runs=[training(0, 0.7, 0.9, 0.1), training(1, 0.5, 0.3, 0.2)])
        assert compare_methods(read_runs(tmp_path), which="best").rows[0].summary.mean == pytest.approx(0.7)

    def test_every_task_has_its_main_metric(self, two_tasks):
        comparison = compare_methods(read_runs(two_tasks))
        assert row_of(comparison, "vanilla").metric == "accuracy"
        row = row_of(comparison, "vanilla", "words")
        assert (row.metric, row.summary.maximum) == ("f1", 0.4)

    def test_one_metric_for_all_on_request(self, two_tasks):
        comparison = compare_methods(read_runs(two_tasks), metric="loss")
        assert row_of(comparison, "vanilla", "words").summary.median == pytest.approx(1 - 0.75)

    def test_sizes_and_models_are_groups_of_their_own(self, two):
        save(two / "larger", values=BETTER, train_size=1000)
        save(two / "elsewhere", values=BETTER, model="large")
        groups = list(compare_methods(read_runs(two)).groups)
        assert groups == [Group("large", 300, "sums"), Group("small", 300, "sums"), Group("small", 1000, "sums")]

    @pytest.mark.parametrize(
        ("size", "words"),
        [(300, "300 training examples"), (0.1, "10 % of the training examples"), (None, "all training examples")],
    )
    def test_sizes_in_words(self, size, words):
        assert Group("small", size, "sums").size == words

    def test_mean_over_tasks_is_formed_seed_by_seed(self, two_tasks):
        comparison = compare_methods(read_runs(two_tasks))
        values = {
            arm: {
                seed: statistics.fmean([sums, f1 / 2])
                for seed, (sums, f1) in enumerate(zip(on_sums, words, strict=True))
            }
            for arm, on_sums, words in (
                ("vanilla", VANILLA, [0.7, 0.75, 0.8, 0.72, 0.78]),
                ("better", BETTER, [0.78, 0.79, 0.85, 0.8, 0.81]),
            )
        }
        row = row_of(comparison, "better", "mean over 2 tasks")
        assert row.metric == "mean of accuracy of sums, f1 of words"
        assert row.summary == summarize(values["better"])
        assert row.paired == paired(values["better"], values["vanilla"])

    def test_mean_over_tasks_leaves_out_arms_that_lack_one_and_says_so(self, two_tasks):
        comparison = compare_methods(read_runs(two_tasks))
        assert [row.arm for row in comparison.rows if row.group.task.startswith("mean")] == ["vanilla", "better"]
        assert any(re.match("mean over 2 tasks, .*: without other, not run", note) for note in comparison.notes)

    def test_mean_over_tasks_takes_seeds_that_have_a_number_in_each(self, tmp_path):
        for method in ("vanilla", "better"):
            save(tmp_path / "sums" / method, method, {0: 0.1, 1: 0.2, 2: 0.3})
            save(tmp_path / "words" / method, method, {1: 0.4, 2: 0.6, 3: 0.9}, task="words")
        row = row_of(compare_methods(read_runs(tmp_path)), "better", "mean over 2 tasks")
        assert (row.summary.measured, row.summary.mean) == (2, pytest.approx(0.375))

    def test_one_task_has_no_mean_over_tasks(self, two):
        assert len(compare_methods(read_runs(two)).groups) == 1

    def test_losses_and_accuracies_have_no_mean(self, two):
        save(two / "words", task="words", metric="loss")
        assert [group.task for group in compare_methods(read_runs(two)).groups] == ["sums", "words"]

    def test_losses_have_a_mean_of_which_less_is_better(self, two_tasks):
        rows = compare_methods(read_runs(two_tasks), metric="loss").rows
        assert row_of(compare_methods(read_runs(two_tasks)), "better", "mean over 2 tasks").less_is_better is False
        assert all(row.less_is_better for row in rows)
        assert rows[-1].metric == "mean of loss of sums, loss of words"

    def test_losses_in_two_units_have_no_mean(self, tmp_path):
        for task, objective in (("sums", "classification"), ("words", "regression")):
            save(tmp_path / task, task=task, objective=objective)
        runs = read_runs(tmp_path)
        assert [group.task for group in compare_methods(runs, metric="loss").groups] == ["sums", "words"]
        assert len(compare_methods(runs, metric="accuracy").groups) == 3

    def test_a_failure_is_judged_at_the_epoch_that_counts(self, tmp_path):
        """Best in the first epoch, and no better than the labels in the last one."""
        lost = training(0, 0.8, 0.4, constant=True, baselines={"accuracy": 0.5})
        both = (lost, replace(lost, seed=1, status="diverged"))
        save(tmp_path, runs=[with_select(run, 0.8, 0.4) for run in both])
        runs = read_runs(tmp_path)
        selected, last = compare_methods(runs), compare_methods(runs, which="last")
        assert (selected.which, selected.rows[0].summary.failed, last.rows[0].summary.failed) == ("selected", 1, 2)
        (note,) = (note for note in selected.notes if note.startswith("Failed"))
        assert note.endswith("seed 1: diverged.")
        assert "predicts one thing for all" in last.to_markdown()
        assert "predicts one thing for all" not in selected.to_markdown()

    def test_failed_trainings_are_counted_and_named(self, two):
        runs = [training(0, 0.5), training(1, 0.1, constant=True), training(2, 0.6)]
        save(two / "other", "other", runs=runs)
        comparison = compare_methods(read_runs(two))
        assert row_of(comparison, "other").summary == summarize({0: 0.5, 1: 0.1, 2: 0.6}, {1})
        assert any(re.match("Failed: other on sums, .*, seed 1: one prediction", note) for note in comparison.notes)

    def test_seeds_that_failed_alike_are_named_together(self, two):
        runs = [training(seed, 0.1, constant=seed != 1) for seed in range(3)]
        save(two / "other", "other", runs=runs)
        (note,) = (note for note in compare_methods(read_runs(two)).notes if note.startswith("Failed: other"))
        assert re.match("Failed: other on sums, .*, seeds 0, 2: one prediction", note)

    def test_crashed_trainings_are_counted_and_named(self, two):
        save(two / "sweep" / "other" / "seed-0", "other", {0: 0.5})
        save_failure(two / "sweep" / "other" / "seed-3")
        comparison = compare_methods(read_runs(two))
        row = row_of(comparison, "other")
        assert (row.summary.runs, row.summary.measured, row.summary.failed) == (2, 1, 1)
        assert any(note.endswith("seed 3: crashed: It broke.") for note in comparison.notes)

    def test_an_arm_of_nothing_but_crashes_is_a_row_without_numbers(self, two):
        save_failure(two / "other" / "seed-3")
        comparison = compare_methods(read_runs(two))
        row = row_of(comparison, "other")
        assert (row.summary.failed, row.summary.mean, row.p_t, row.metric) == (1, None, None, "accuracy")
        assert "| other | 1 | — | — | — | 1, 1 without a number |" in comparison.to_markdown()

    def test_a_number_that_is_not_finite_counts_as_failed_and_is_in_no_mean(self, two):
        diverged = training(1, math.nan, status="diverged")
        save(two / "other", "other", runs=[training(0, 0.5), diverged, training(2, 0.7)])
        row = row_of(compare_methods(read_runs(two)), "other")
        assert (row.summary.mean, row.summary.failed, row.summary.measured) == (pytest.approx(0.6), 1, 2)
        assert row.paired.only_reference == (1, 3, 4)

    def test_seeds_that_one_arm_lacks_are_named(self, two):
        save(two / "other", "other", {0: 0.1, 1: 0.2, 7: 0.3})
        notes = compare_methods(read_runs(two)).notes
        assert "other on sums, small, 300 training examples: not compared, as only other has a number: seed 7." in notes
        assert any(note.endswith("as only vanilla has a number: seeds 2, 3, 4.") for note in notes)

    def test_one_seed_is_not_tested_and_the_table_says_so(self, tmp_path):
        save(tmp_path / "vanilla", values={0: 0.5})
        save(tmp_path / "better", "better", {0: 0.75})
        comparison = compare_methods(read_runs(tmp_path))
        assert (row_of(comparison, "better").paired.mean, row_of(comparison, "better").p_t) == (0.25, None)
        text = comparison.to_markdown()
        assert "With one seed nothing can be tested" in text
        assert "| better | 1 | 0.750 |" in text and "+0.250 |" in text

    def test_no_common_seeds_are_not_one_seed(self, two):
        save(two / "better", "better", {5: 0.6, 6: 0.7})
        notes = compare_methods(read_runs(two)).notes
        assert not any("one seed" in note for note in notes)
        assert any(note.startswith("Without two seeds for which vanilla and another have a number") for note in notes)

    def test_time_is_relative_to_the_reference(self, tmp_path):
        save(tmp_path / "vanilla", runs=[training(seed, 0.5, seconds=s) for seed, s in enumerate((1.0, 2.0, 9.0))])
        save(tmp_path / "better", "better", runs=[training(seed, 0.5, seconds=3.0) for seed in range(3)])
        comparison = compare_methods(read_runs(tmp_path))
        assert [row.time_ratio for row in comparison.rows] == [1.0, 1.5]

    def test_times_of_other_devices_are_not_compared(self, two):
        save(two / "better", "better", BETTER, device="slide rule")
        assert row_of(compare_methods(read_runs(two)), "better").time_ratio is None

    def test_memory_is_the_most_of_all_trainings(self, tmp_path):
        save(tmp_path, runs=[training(seed, 0.5, peak_memory=seed * 1000) for seed in range(4)])
        assert compare_methods(read_runs(tmp_path)).rows[0].peak_memory == 3000

    def test_settings_of_methods_and_other_differences_are_named(self, two):
        save(two / "slow", "better", OTHER, own={"rate": 0.5}, learning_rate=0.01)
        notes = compare_methods(read_runs(two)).notes
        assert "slow: method better, rate 0.5, learning_rate 0.01 (0.001 for vanilla)." in notes

    def test_whose_examples_the_spread_is_over(self, tmp_path):
        save(tmp_path / "fixed")
        save(tmp_path / "drawn", subset_seed="run")
        fixed, drawn = (compare_methods(read_runs(tmp_path / name)).notes[0] for name in ("fixed", "drawn"))
        assert fixed.startswith("All seeds have the same training examples")
        assert drawn.startswith("Every seed draws examples of its own") and "unless it takes all" in drawn

    @pytest.mark.parametrize("task", ["acceptability", "similarity"])
    def test_real_runs_by_a_shorter_way(self, task):
        """Mean and ddof 1 of the values in the files, and the interval of one sample of differences."""
        rows = compare_methods(read_runs(REAL / task)).rows
        usual = Results.load(REAL / task / "vanilla").values()
        assert len(rows) > 5
        for row in rows:
            values = Results.load(REAL / task / row.arm).values()
            assert row.summary.mean == pytest.approx(statistics.mean(values.values()))
            assert row.summary.std == pytest.approx(statistics.stdev(values.values()))
            if row.paired is not None:
                differences = [values[seed] - usual[seed] for seed in values]
                half = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
                assert row.paired.mean == pytest.approx(statistics.mean(differences))
                assert row.paired.high - row.paired.mean == pytest.approx(half)


class TestRefusals:
    def test_no_runs(self):
        with pytest.raises(ValueError, match="A comparison needs runs, but there are none"):
            compare_methods([])

    def test_a_group_without_the_reference(self, two):
        save(two / "words", "better", task="words")
        with pytest.raises(ValueError, match=r"'vanilla' has no runs on words, .*; there are better: take one"):
            compare_methods(read_runs(two))

    def test_two_protocols(self, two):
        save(two / "other", "other", protocol="zhang2020")
        with pytest.raises(ValueError, match=r"one protocol, but .* has fixed-subset and other .* has zhang2020"):
            compare_methods(read_runs(two))

    def test_crashes_under_another_protocol(self, two):
        save_failure(two / "other" / "seed-3", protocol="zhang2020")
        with pytest.raises(ValueError, match=r"one protocol, but .* has fixed-subset and other .* has zhang2020"):
            compare_methods(read_runs(two))

    def test_two_protocols_on_other_tasks(self, two):
        save(two / "other", task="words", protocol="zhang2020")
        with pytest.raises(ValueError, match="one protocol"):
            compare_methods(read_runs(two))

    def test_two_ways_to_draw_the_training_examples(self, two):
        save(two / "other", "other", subset_seed="run")
        with pytest.raises(ValueError, match=r"one subset_seed, but .* has 0 and other .* has run"):
            compare_methods(read_runs(two))

    @pytest.mark.parametrize("role", ["train", "validation"])
    def test_other_examples(self, two, role):
        save(two / "other", "other", fingerprints={"train": "aa", "validation": "bb", role: "zz"})
        with pytest.raises(ValueError, match=rf"the encoded {role} examples of .* differ \(.., zz\)"):
            compare_methods(read_runs(two))

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_other_texts(self, two, split):
        texts = {"train": "tt", "validation": "vv"}
        save(two / "one", "one", data=texts, max_length=None)
        save(two / "other", "other", data=texts | {split: "zz"}, max_length=64)
        with pytest.raises(ValueError, match=rf"the {split} examples of .* differ \(.., zz\)"):
            compare_methods(read_runs(two))

    def test_the_same_texts_cut_at_another_length_are_fine_and_noted(self, two):
        save(two / "other", "other", max_length=64, fingerprints={"train": "short", "validation": "bb"})
        compared = compare_methods(read_runs(two))
        assert len(compared.rows) == 3
        assert any("max_length" in note for note in compared.notes)

    def test_other_weights_to_begin_with_are_fine(self, two):
        save(two / "other", "other", fingerprints={"train": "aa", "validation": "bb", "backbone": "zz"})
        assert len(compare_methods(read_runs(two)).rows) == 3

    def test_a_metric_that_was_not_measured(self, two):
        with pytest.raises(ValueError, match="no metric 'bleu'; it has accuracy, f1, loss"):
            compare_methods(read_runs(two), metric="bleu")

    @pytest.mark.parametrize("name", ["epoch", "step", "select_accuracy", "select_loss"])
    def test_what_is_no_metric_on_the_report_examples(self, tmp_path, name):
        save(tmp_path, runs=[with_select(training(0, 0.5), 0.6)])
        with pytest.raises(ValueError, match=f"no metric '{name}'; it has accuracy, f1, loss"):
            compare_methods(read_runs(tmp_path), metric=name)

    def test_two_main_metrics_of_one_task(self, two):
        save(two / "other", "other", metric="f1")
        with pytest.raises(ValueError, match=r"have the main metrics accuracy, f1; say which"):
            compare_methods(read_runs(two))
        assert len(compare_methods(read_runs(two), metric="f1").rows) == 3

    def test_a_selected_epoch_without_select_examples(self, two):
        with pytest.raises(ValueError, match=r"on sums, .*: .* select examples"):
            compare_methods(read_runs(two), which="selected")

    def test_an_epoch_that_there_is_not(self, two):
        with pytest.raises(ValueError, match="which must be one of last, selected, best; got 'first'"):
            compare_methods(read_runs(two), which="first")  # type: ignore[arg-type]

    def test_runs_that_were_not_measured(self, tmp_path):
        save(tmp_path, runs=[training(0)])
        with pytest.raises(ValueError, match="no run was measured; fine-tune with validation examples"):
            compare_methods(read_runs(tmp_path))


def cells_of(markdown: str) -> list[list[str]]:
    """Of the first table."""
    lines = re.search(r"(?:^\|.*\n)+", markdown, re.MULTILINE)[0].splitlines()  # type: ignore[index]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


class TestTables:
    def test_every_row_has_a_cell_for_every_head(self, two_tasks):
        cells = cells_of(compare_methods(read_runs(two_tasks)).to_markdown())
        assert len({len(line) for line in cells}) == 1
        assert [line[0] for line in cells] == ["method", "---", "vanilla", "better", "other"]

    def test_text_says_what_the_numbers_are(self, two_tasks):
        text = compare_methods(read_runs(two_tasks)).to_markdown()
        for words in ("after the last epoch", "ddof 1", "fixed-subset", "95 % interval of the paired t test"):
            assert words in text
        assert "in these tables (Holm): 4 t tests, 4 sign-flip tests and 4 of equal spread." in text
        assert "cannot go below 2/2ⁿ; of more seeds it takes random flips and cannot go below 1/100001." in text
        assert "Holm's correction multiplies that" in text
        assert "### sums, small, 300 training examples: accuracy" in text
        assert "p, sign-flip test, at least 0.0625 (Holm)" in text

    def test_every_test_is_counted_by_itself(self, tmp_path):
        """Equal differences have no t test."""
        save(tmp_path / "vanilla", values=[0.25, 0.5, 0.75])
        save(tmp_path / "shifted", "shifted", [0.5, 0.75, 1.0])
        save(tmp_path / "short", "short", [0.3, 0.9])
        comparison = compare_methods(read_runs(tmp_path), correction="benjamini-hochberg")
        assert comparison.tested == {"p_t": 1, "p_permutation": 2, "p_spread": 2}
        text = comparison.to_markdown()
        assert "(Benjamini-Hochberg): 1 t tests, 2 sign-flip tests and 2 of equal spread" in text
        assert "multiplies" not in text

    def test_where_the_sign_flip_test_ends_for_arms_of_few_and_many_seeds(self, tmp_path):
        save(tmp_path / "vanilla", values=[0.5 + 0.01 * seed for seed in range(11)])
        save(tmp_path / "long", "long", [0.6 + 0.02 * seed for seed in range(11)])
        assert "p, sign-flip test (Holm)" in compare_methods(read_runs(tmp_path)).to_markdown()
        save(tmp_path / "short", "short", [0.6, 0.7, 0.8])
        heads = cells_of(compare_methods(read_runs(tmp_path)).to_markdown())[0]
        assert "p, sign-flip test, at least 0.0009766 to 0.25 (Holm)" in heads

    def test_numbers_of_a_row(self, two):
        comparison = compare_methods(read_runs(two))
        row, cells = row_of(comparison, "better"), cells_of(comparison.to_markdown())
        shown = dict(zip(cells[0], cells[3], strict=True))
        assert shown["mean ± std"] == f"**{row.summary.mean:.3f} ± {row.summary.std:.3f}**"
        assert shown["minus vanilla [95 % interval]"] == (
            f"{row.paired.mean:+.3f} [{row.paired.low:+.3f}, {row.paired.high:+.3f}]"
        )
        assert shown["p, paired t test (Holm)"] == f"{row.p_t:.2g} ({row.p_t_corrected:.2g})"
        assert (shown["seeds"], shown["failed"], shown["time by vanilla's"]) == ("5", "0", "1.00")

    def test_best_is_not_bold_if_the_interval_has_zero(self, tmp_path):
        save(tmp_path / "vanilla")
        save(tmp_path / "other", "other", [0.9, 0.2, 0.9, 0.4, 0.9])
        comparison = compare_methods(read_runs(tmp_path))
        assert row_of(comparison, "other").summary.mean > row_of(comparison, "vanilla").summary.mean
        assert "**" not in comparison.to_markdown()

    def test_a_worse_one_is_not_bold_whatever_its_interval(self, two):
        comparison = compare_methods(read_runs(two), reference="better")
        assert row_of(comparison, "vanilla").paired.excludes_zero
        assert "**" not in comparison.to_markdown()

    def test_a_winner_that_always_failed_is_not_bold(self, two):
        runs = [training(seed, value, constant=True) for seed, value in enumerate((0.9, 0.92, 0.94))]
        save(two / "failed", "failed", runs=runs)
        text = compare_methods(read_runs(two)).to_markdown()
        assert "| failed | 3 | 0.920 ± 0.020 |" in text and "**" not in text

    def test_of_losses_the_lowest_is_bold(self, two):
        comparison = compare_methods(read_runs(two), metric="loss")
        assert re.search(r"\| better \| 5 \| \*\*0\.386", comparison.to_markdown())
        assert "**" not in compare_methods(read_runs(two), metric="loss", reference="better").to_markdown()

    def test_of_mean_losses_the_highest_is_not_bold(self, two_tasks):
        comparison = compare_methods(read_runs(two_tasks), metric="loss", reference="better")
        row = comparison.rows[-1]
        assert (row.arm, row.paired.excludes_zero, row.paired.mean > 0) == ("vanilla", True, True)
        assert "**" not in comparison.to_markdown()
        table = compare_methods(read_runs(two_tasks), metric="loss").to_markdown().split("### mean over 2 tasks")[1]
        assert re.search(r"\| better \| 5 \| \*\*", table)

    def test_the_best_mean_is_not_bold_if_it_loses_on_the_common_seeds(self, tmp_path):
        save(tmp_path / "vanilla", values=[0.3, 0.31, 0.29, 0.8, 0.82, 0.81])
        save(tmp_path / "other", "other", {3: 0.70, 4: 0.72, 5: 0.715})
        comparison = compare_methods(read_runs(tmp_path))
        row = row_of(comparison, "other")
        assert row.summary.mean > row_of(comparison, "vanilla").summary.mean
        assert row.paired.excludes_zero and row.paired.mean < 0
        assert "**" not in comparison.to_markdown()

    def test_an_error_of_several_lines_is_one(self, two):
        save_failure(two / "other" / "seed-3", error="No memory left.\nTried | to\n- allocate")
        text = compare_methods(read_runs(two)).to_markdown()
        assert text.endswith("seed 3: crashed: No memory left. Tried \\| to - allocate.\n")

    def test_failed_ones_get_a_column_where_there_are_any(self, two):
        assert "without failed" not in compare_methods(read_runs(two)).to_markdown()
        save(two / "other", "other", runs=[training(0, 0.5), training(1, 0.1, constant=True)])
        heads = cells_of(compare_methods(read_runs(two)).to_markdown())[0]
        assert "mean ± std without failed" in heads

    def test_markdown_is_escaped(self, tmp_path):
        save(tmp_path, task="a|b*")
        assert r"### a\|b\*, small" in compare_methods(read_runs(tmp_path)).to_markdown()

    def test_latex_has_the_numbers_of_markdown(self, two_tasks):
        comparison = compare_methods(read_runs(two_tasks))
        text = comparison.to_latex().replace("$\\pm$", "±").replace("$-$", "-").replace("\\%", "%").replace("---", "—")
        for line in cells_of(comparison.to_markdown())[2:]:
            plain = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", " & ".join(line))
            assert f"{plain} \\\\" in text

    def test_latex_is_balanced_and_escaped(self, two):
        save(two / "odd", "a_b&c%", OTHER)
        text = compare_methods(read_runs(two)).to_latex()
        assert "a\\_b\\&c\\%" in text
        assert text.count("\\begin{") == text.count("\\end{")
        plain = re.sub(r"\\[{}]", "", text.replace("\\\\", ""))
        assert plain.count("{") == plain.count("}")
        assert all(rule in text for rule in ("\\toprule", "\\midrule", "\\bottomrule"))
        assert text.isascii()

    def test_latex_line_breaks_take_no_cell_for_their_option(self, two_tasks):
        text = compare_methods(read_runs(two_tasks)).to_latex()
        assert "{[}95" in text and not re.search(r"\\\\\s*\[", text)

    def test_latex_has_minus_signs(self, two):
        text = compare_methods(read_runs(two), reference="better").to_latex()
        assert "$-$0.0" in text and "Brown-Forsythe" in text and not re.search(r"[ \[]-\d", text)

    def test_latex_rows_have_as_many_cells_as_columns(self, two_tasks):
        text = compare_methods(read_runs(two_tasks)).to_latex()
        for table in text.split("\\begin{tabular}")[1:]:
            columns = re.match(r"\{(l?r*)\}", table)[1]  # type: ignore[index]
            rows = [line for line in table.splitlines() if line.endswith("\\\\")]
            assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}

    def test_csv_has_every_number_in_full(self, two_tasks):
        comparison = compare_methods(read_runs(two_tasks), correction="benjamini-hochberg")
        lines = list(csv.DictReader(io.StringIO(comparison.to_csv())))
        assert len(lines) == len(comparison.rows)
        for line, row in zip(lines, comparison.rows, strict=True):
            assert (line["arm"], line["task"], line["metric"]) == (row.arm, row.group.task, row.metric)
            expected = {
                "mean": row.summary.mean,
                "std_ddof1": row.summary.std,
                "median": row.summary.median,
                "difference": row.paired and row.paired.mean,
                "low_95": row.paired and row.paired.low,
                "p_t": row.p_t,
                "p_t_benjamini_hochberg": row.p_t_corrected,
                "p_permutation_benjamini_hochberg": row.p_permutation_corrected,
                "p_spread": row.p_spread,
                "smallest_p_permutation": row.paired and row.paired.smallest_p,
                "time_ratio": row.time_ratio,
            }
            assert {key: float(line[key]) if line[key] else None for key in expected} == expected


class TestCommand:
    def test_prints_markdown(self, two, capsys):
        assert main(["compare", str(two)]) == 0
        assert capsys.readouterr().out == compare_methods(read_runs(two)).to_markdown()

    def test_flags_reach_the_comparison(self, two, capsys):
        flags = ["--reference", "better", "--metric", "f1", "--which", "best", "--correction", "benjamini-hochberg"]
        assert main(["compare", str(two / "vanilla"), str(two / "better"), *flags]) == 0
        expected = compare_methods(
            read_runs(two), reference="better", metric="f1", which="best", correction="benjamini-hochberg"
        )
        assert capsys.readouterr().out == expected.to_markdown()

    def test_saves_by_the_ending_of_the_name_and_says_how_it_was_made(self, two):
        comparison = compare_methods(read_runs(two))
        for ending, text in ((".md", comparison.to_markdown()), (".tex", comparison.to_latex())):
            assert main(["compare", str(two), "--out", str(two / f"table{ending}")]) == 0
            written = (two / f"table{ending}").read_text()
            assert text in written and storage.provenance()["versions"]["fisherscope"] in written
        assert main(["compare", str(two), "--out", str(two / "table.csv")]) == 0
        assert (two / "table.csv").read_text() == comparison.to_csv()

    def test_an_existing_table_is_kept_unless_overwritten(self, two, capsys):
        out = two / "table.csv"
        out.write_text("mine")
        assert main(["compare", str(two), "--out", str(out)]) == 1
        assert out.read_text() == "mine" and "--overwrite" in capsys.readouterr().err
        assert main(["compare", str(two), "--out", str(out), "--overwrite"]) == 0
        assert out.read_text().startswith("model,")

    def test_another_ending_is_refused(self, two, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["compare", str(two), "--out", str(two / "table.xlsx")])
        assert stop.value.code == 2
        assert "a table is .md, .tex, .csv; got 'table.xlsx'" in capsys.readouterr().err

    def test_errors_are_one_line(self, two, capsys):
        (two / "vanilla" / "results.json").write_text("{}")
        assert main(["compare", str(two)]) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "vanilla/results.json" in message
