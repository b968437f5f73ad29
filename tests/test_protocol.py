"""Who sees which examples, what is chosen by them, and when a training counts as failed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisherscope as fs
from fisherscope import storage
from fisherscope.finetune import Results, finetune, plan
from fisherscope.finetune.protocol import (
    DEFAULT,
    PROTOCOLS,
    Roles,
    Splits,
    balanced,
    baselines,
    checked_size,
    count_of,
    protocol_of,
    read_roles,
    save_roles,
    stratified,
)
from fisherscope.finetune.recipe import Recipe
from fisherscope.finetune.results import SeedResult
from fisherscope.finetune.trainer import evaluation_steps
from fisherscope.metrics import is_constant, pearson

TASK, OTHER = "builtin:acceptability", "builtin:topic"
QUICK = {"task": TASK, "train_size": 8, "batch_size": 4, "max_steps": 2, "max_length": 16, "progress": False}
SIZES = {"train": 60, "validation": 40}

CLASSES = np.random.default_rng(0).choice(3, size=1500, p=[0.6, 0.3, 0.1])
SPLITS = Splits(CLASSES[:1200], CLASSES[1200:])


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """The first 60 and 40 examples of the splits."""

    def read(name, split, **options):
        source = fs.read_task(name, split, **options)
        return replace(source, texts=source.texts[: SIZES[split]], labels=source.labels[: SIZES[split]])

    monkeypatch.setattr(plan, "read_task", read)


def flat(positions) -> set[tuple[str, int]]:
    return {(split, i) for split, chosen in positions.items() for i in chosen}


def roles_of(name, splits=SPLITS, size=None, subset_seed=0, run_seed=0) -> Roles:
    return PROTOCOLS[name].roles(splits, size, subset_seed, run_seed)


def all_roles(roles):
    return roles.train, roles.select, roles.report


labelled = st.lists(st.integers(0, 3), min_size=2, max_size=80).map(np.array)
sizes = st.one_of(st.none(), st.integers(1, 100), st.floats(0.001, 0.999))


class TestRoles:
    @pytest.mark.parametrize("name", PROTOCOLS)
    @given(train=labelled, validation=labelled, size=sizes, seed=st.integers(0, 100))
    def test_no_example_has_two_roles(self, name, train, validation, size, seed):
        roles = roles_of(name, Splits(train, validation), size, seed, seed)
        examples = [example for role in all_roles(roles) for example in flat(role)]
        assert len(examples) == len(set(examples))

    @pytest.mark.parametrize("name", PROTOCOLS)
    @given(train=labelled, validation=labelled, size=sizes, seed=st.integers(0, 100))
    def test_positions_are_in_the_splits_and_rise(self, name, train, validation, size, seed):
        roles = roles_of(name, Splits(train, validation), size, seed, seed)
        there = {"train": train.size, "validation": validation.size}
        for split, chosen in (item for role in all_roles(roles) for item in role.items()):
            assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < there[split]

    @pytest.mark.parametrize("name", PROTOCOLS)
    @pytest.mark.parametrize("size", [300, 0.1, None])
    def test_sizes_are_those_of_the_paper(self, name, size):
        roles = roles_of(name, size=size)
        available = {"sharma2024": 1200}.get(name, SPLITS.train.size)  # 4/5 of 1500 are 1200, too
        train = {300: 300, 0.1: 120, None: available}[size]
        left = available - train
        select = {
            DEFAULT: min(train, left), "somayajula2024": min(train // 6, left), "zhang2020": 150,
        }.get(name, 0)  # fmt: skip
        report = {"zhang2020": 150}.get(name, 300)
        assert [len(flat(role)) for role in all_roles(roles)] == [train, select, report]

    @pytest.mark.parametrize(("size", "select"), [(5, 0), (300, 50), (305, 50), (1100, 100), (None, 0)])
    def test_a_sixth_of_the_asked_for_size_selects_or_what_is_left(self, size, select):
        assert len(flat(roles_of("somayajula2024", size=size).select)) == select

    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_with_all_examples_none_is_lost(self, name):
        found = set.union(*(flat(role) for role in all_roles(roles_of(name))))
        assert found == {("train", i) for i in range(1200)} | {("validation", i) for i in range(300)}

    @pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in ("sharma2024", "zhang2020")])
    def test_the_validation_split_is_reported_whole(self, name):
        assert roles_of(name, size=300).report == {"validation": list(range(300))}

    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_what_the_seed_of_the_run_changes(self, name):
        by_run = roles_of(name, size=100, run_seed=1) != roles_of(name, size=100, run_seed=2)
        assert by_run == (PROTOCOLS[name].drawn_by == "run")

    def test_another_subset_seed_draws_another_fixed_subset(self):
        assert roles_of(DEFAULT, size=100, subset_seed=1).train != roles_of(DEFAULT, size=100).train

    def test_the_fixed_subset_is_the_one_that_load_batches_draws(self):
        _, tokenizer = fs.load_model("builtin:bert")
        source = fs.read_task(TASK)
        splits = Splits.of(source, None, "classification")
        chosen = roles_of(DEFAULT, splits, 12, subset_seed=3).train["train"]
        drawn, taken = (
            fs.load_batches(source, tokenizer, objective="classification", seed=3, **how)
            for how in ({"num_examples": 12}, {"positions": chosen})
        )
        assert drawn.fingerprint == taken.fingerprint

    def test_a_smaller_subset_is_part_of_a_larger_one(self):
        small, large = (flat(roles_of(DEFAULT, size=size).train) for size in (50, 200))
        assert small < large

    def test_nothing_selects_where_nothing_is_reported(self):
        roles = roles_of(DEFAULT, Splits(CLASSES, np.empty(0, int)), 100)
        assert (roles.select, roles.report) == ({}, {})

    def test_both_splits_are_shuffled_together(self):
        """As many of the report examples are from the validation split as its share says, roughly."""
        roles = roles_of("sharma2024")
        assert 30 < len(roles.report["validation"]) < 90
        assert flat(roles_of("sharma2024", size=100).train) < flat(roles.train)

    def test_a_split_alone_can_be_divided_in_four_to_one(self):
        roles = roles_of("sharma2024", Splits(CLASSES[:10], np.empty(0, int)))
        assert [len(flat(role)) for role in all_roles(roles)] == [8, 0, 2]

    @pytest.mark.parametrize(("size", "count"), [(0.499, 39), (0.001, 1), (33, 33), (None, 80)])
    def test_a_fraction_of_the_four_fifths_is_cut_below(self, size, count):
        assert len(flat(roles_of("sharma2024", Splits(CLASSES[:90], CLASSES[:10]), size).train)) == count

    def test_the_validation_split_of_mnli_is_not_shuffled_in(self):
        source = replace(fs.read_task(TASK), name="mnli:train")
        splits = Splits.of(source, fs.read_task(TASK, "validation"), "classification")
        roles = roles_of("sharma2024", splits, 100)
        assert roles.report == {"validation": list(range(splits.validation.size))} and not roles.select
        assert list(roles.train) == ["train"] and len(roles.train["train"]) == 100
        assert flat(roles.train) < flat(roles_of("sharma2024", splits).train)
        assert len(roles_of("sharma2024", splits).train["train"]) == splits.train.size

    def test_halves_have_the_same_classes(self):
        roles = roles_of("zhang2020", size=100)
        halves = [np.bincount(SPLITS.validation[role["validation"]]) for role in (roles.select, roles.report)]
        assert np.abs(halves[0] - halves[1]).max() <= 2

    def test_the_training_set_of_zhang_has_as_many_of_every_class(self):
        chosen = roles_of("zhang2020", size=100).train["train"]
        assert sorted(np.bincount(SPLITS.train[chosen])) == [33, 33, 34]

    def test_the_training_set_of_dps_has_the_shares_of_the_classes(self):
        chosen = roles_of("dps2022", size=100).train["train"]
        due = 100 * np.bincount(SPLITS.train) / SPLITS.train.size
        assert np.abs(np.bincount(SPLITS.train[chosen]) - due).max() < 1

    def test_a_single_example_cannot_be_divided(self):
        with pytest.raises(ValueError, match="leaves no example of 1 to train on"):
            roles_of("sharma2024", Splits(np.array([0]), np.empty(0, int)))

    @pytest.mark.parametrize("name", ["somayajula2024", "dps2022", "zhang2020"])
    def test_protocols_that_report_on_validation_need_it(self, name):
        with pytest.raises(ValueError, match=f"{name} reports on validation examples, but there are none"):
            roles_of(name, Splits(CLASSES, np.empty(0, int)))


class TestDraws:
    @given(classes=labelled, share=st.floats(0, 1), seed=st.integers(0, 50))
    def test_a_stratified_draw_has_the_share_of_every_class(self, classes, share, seed):
        count = round(share * classes.size)
        chosen = stratified(classes, count, seed)
        assert len(set(chosen.tolist())) == count
        due = count * np.bincount(classes, minlength=4) / classes.size
        assert (np.abs(np.bincount(classes[chosen], minlength=4) - due) < 1).all()

    def test_the_largest_remainders_get_one_more(self):
        """7 of 6, 3 and 1 examples: 4.2, 2.1 and 0.7 are due; the last has the largest remainder."""
        chosen = stratified(np.repeat([0, 1, 2], [6, 3, 1]), 7, seed=0)
        assert np.bincount(np.repeat([0, 1, 2], [6, 3, 1])[chosen]).tolist() == [4, 2, 1]

    def test_equal_remainders_are_drawn(self):
        found = {int(stratified(np.array([0, 1]), 1, seed)[0]) for seed in range(20)}
        assert found == {0, 1}

    def test_classes_with_one_member_can_be_drawn_from(self):
        assert len(stratified(np.arange(9), 4, seed=0)) == 4

    @given(classes=labelled, share=st.floats(0, 1), seed=st.integers(0, 50))
    def test_a_balanced_draw_is_as_even_as_the_classes_allow(self, classes, share, seed):
        count = round(share * classes.size)
        chosen = balanced(classes, count, seed)
        assert len(set(chosen.tolist())) == count
        found, there = (np.bincount(labels, minlength=4) for labels in (classes[chosen], classes))
        unfinished = found[found < there]
        assert unfinished.size == 0 or found.max() - unfinished.min() <= 1

    def test_real_labels_are_put_into_tenths(self):
        source = replace(fs.read_task("builtin:similarity"), labels=list(np.linspace(0, 5, 200)), texts=[("a",)] * 200)
        assert np.bincount(Splits.of(source, None, "regression").train).tolist() == [20] * 10

    @pytest.mark.parametrize("labels", [[1.0] * 5, [0.0, 1.0, 1.0, 1.0, 2.0]], ids=["one value", "ties"])
    def test_real_labels_with_ties_can_be_drawn_from(self, labels):
        source = replace(fs.read_task("builtin:similarity"), labels=labels, texts=[("a",)] * 5)
        assert len(stratified(Splits.of(source, None, "regression").train, 3, seed=0)) == 3

    def test_text_is_one_class(self):
        source = fs.data.read_source("builtin:docs", objective="mlm")
        assert set(Splits.of(source, None, "mlm").train) == {0}


class TestSize:
    @pytest.mark.parametrize(("size", "count"), [(None, 50), (7, 7), (0.1, 5), (0.5, 25), (0.001, 1), (0.999, 50)])
    def test_a_size_is_a_number_of_examples(self, size, count):
        assert count_of(size, 50) == count

    def test_more_than_there_are_is_all_with_a_warning(self, caplog):
        assert count_of(51, 50) == 50
        assert "There are 50 training examples, 51 were asked for; all are used." in caplog.text

    @pytest.mark.parametrize("size", [0, -3, 0.0, 1.0, 1.5, -0.1, math.nan, "300"])
    def test_other_sizes_are_refused(self, size):
        with pytest.raises(ValueError, match="a number of examples, 1 or more, or a fraction between 0 and 1; got"):
            checked_size(size)

    def test_a_number_of_numpy_is_a_number(self):
        assert checked_size(np.int64(3)) == 3


class TestSteps:
    @pytest.mark.parametrize(
        ("total", "per_epoch", "expected"), [(6, 3, {3, 6}), (7, 3, {3, 6, 7}), (2, 3, {2}), (3, 3, {3})]
    )
    def test_every_epoch_and_the_end(self, total, per_epoch, expected):
        assert evaluation_steps(total, per_epoch, None) == expected

    @pytest.mark.parametrize(
        ("total", "expected"),
        [(100, set(range(10, 101, 10))), (25, {3, 5, 8, 10, 13, 15, 18, 20, 23, 25}), (3, {1, 2, 3})],
    )
    def test_ten_times_a_training(self, total, expected):
        assert evaluation_steps(total, 7, 10) == expected


def training(evaluations=(), losses=(), baselines=(), **facts) -> SeedResult:
    defaults = {"seed": 0, "status": "finished", "constant": False, "seconds_per_step": 0.1, "peak_memory": 1}
    facts = defaults | {"optimizer_state": 1} | facts
    return SeedResult(evaluations=list(evaluations), losses=list(losses), baselines=dict(baselines), **facts)


def epochs(**columns) -> list[dict[str, float]]:
    rows = zip(*columns.values(), strict=True)
    return [{"step": 3 * i, "epoch": float(i), **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, 1)]


class TestSelected:
    chosen = training(
        epochs(
            loss=[0.9, 0.5, 0.4, 0.6],
            accuracy=[0.1, 0.2, 0.3, 0.4],
            f1=[0.5, 0.6, 0.7, 0.8],
            select_loss=[0.8, 0.7, 0.9, 0.3],
            select_accuracy=[0.2, 0.9, 0.9, 0.1],
        )
    )

    def test_the_epoch_is_the_first_where_the_metric_is_best_on_the_select_examples(self):
        assert self.chosen.value("accuracy", "selected") == 0.2

    def test_the_least_loss_selects(self):
        assert self.chosen.value("loss", "selected") == 0.6

    def test_a_metric_that_the_select_examples_lack_is_selected_by_their_loss(self):
        assert self.chosen.value("f1", "selected") == 0.8

    def test_last_and_best_do_not_look_at_them(self):
        found = [self.chosen.value(metric, which) for which in ("last", "best") for metric in ("accuracy", "loss")]
        assert found == [0.4, 0.6, 0.4, 0.4]

    def test_the_loss_of_one_of_several_tasks_is_least_at_its_best(self):
        run = training(epochs(loss=[1.0, 1.0], **{"rte.loss": [0.5, 0.7], "rte.accuracy": [0.5, 0.7]}))
        assert (run.value("rte.loss", "best"), run.value("rte.accuracy", "best")) == (0.5, 0.7)

    def test_what_is_no_number_is_never_best(self):
        run = training(
            epochs(loss=[math.nan, 2.0, math.nan], select_loss=[math.nan, 1.0, math.nan], accuracy=[0.1, 0.2, 0.3])
        )
        assert (run.value("loss", "best"), run.value("accuracy", "selected")) == (2.0, 0.2)

    def test_without_select_examples_none_is_selected(self):
        with pytest.raises(ValueError, match="The selected epoch needs select examples"):
            training(epochs(loss=[1.0], accuracy=[0.1])).value("accuracy", "selected")

    def test_a_training_that_was_not_measured_has_no_select_examples(self):
        assert not training().has_select

    def test_the_table_shows_the_selected_epoch_where_there_is_one(self):
        (row,) = Results("rte", "vanilla", "accuracy", {}, [self.chosen]).table()
        assert row["selected_accuracy"] == 0.2 and "best_accuracy" not in row

    def test_the_table_shows_the_best_epoch_where_none_is_selected(self):
        (row,) = Results("rte", "vanilla", "accuracy", {}, [training(epochs(loss=[1, 2], accuracy=[3, 1]))]).table()
        assert row["best_accuracy"] == 3 and "selected_accuracy" not in row

    def test_the_summary_says_which_epoch_it_shows(self):
        text = str(Results("rte", "vanilla", "accuracy", {}, [self.chosen]))
        assert "accuracy on the report examples: last (selected epoch)" in text and "0.4000 (0.2000)" in text


class TestBaselines:
    train, report = np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0, 1])

    def test_of_classes_the_commonest_is_said(self):
        """Class 1 of all: 3 of 5 are right, precision 3/5, recall 1."""
        found = baselines(self.train, self.report, 2)
        assert found["accuracy"] == 0.6 and found["f1"] == pytest.approx(2 * 0.6 / 1.6) and found["matthews"] == 0

    @pytest.mark.parametrize("train", [[0, 0, 1], [0, 1, 1]])
    def test_f1_does_not_hang_on_a_label(self, train):
        """That of all ones, 2 pi / (1 + pi) with the share pi of ones, whichever class is the commonest."""
        assert baselines(np.array(train), self.report, 2)["f1"] == pytest.approx(2 * 0.6 / 1.6)

    def test_predictions_that_differ_by_rounding_are_one(self):
        steps = (2.5 + np.arange(6, dtype=np.float32) * np.spacing(np.float32(2.5))).astype(np.float32)
        assert is_constant(steps) and pearson(steps, np.arange(6.0)) == 0
        assert not is_constant(np.array([1.0, np.inf])) and not is_constant(np.array([0.0, 1e-3]))

    def test_predictions_of_small_numbers_are_no_constant(self):
        labels = np.arange(1.0, 6.0) * 1e-9
        assert pearson(labels, labels) == pytest.approx(1) and not is_constant(labels)
        assert is_constant(np.zeros(3)) and is_constant(np.zeros(3, dtype=np.int64))

    def test_the_loss_is_that_of_the_shares(self):
        expected = -(2 * math.log(0.25) + 3 * math.log(0.75)) / 5
        assert baselines(self.train, self.report, 2)["loss"] == pytest.approx(expected)

    def test_the_entropy_is_that_of_the_training_labels(self):
        expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
        assert baselines(self.train, self.report, 2)["label_entropy"] == pytest.approx(expected)
        assert "label_entropy" not in baselines(self.train, self.report, 2, label_entropy=False)

    def test_a_class_that_was_not_trained_has_no_finite_loss(self):
        found = baselines(np.array([0, 0]), self.report, 2)
        assert "loss" not in found and found["label_entropy"] == 0 and found["accuracy"] == 0.4

    def test_of_numbers_the_mean_is_said(self):
        found = baselines(np.array([1.0, 3.0]), np.array([0.0, 3.0]), None)
        assert found == {"loss": pytest.approx((4 + 1) / 2), "pearson": 0.0, "spearman": 0.0}

    def test_of_several_seeds_the_mean_is_shown(self):
        runs = [training(baselines={"accuracy": value, "f1": 0.5}, seed=seed) for seed, value in enumerate((0.5, 0.7))]
        runs += [training(seed=2)]
        assert Results("rte", "vanilla", "accuracy", {}, runs).baselines == {"accuracy": pytest.approx(0.6), "f1": 0.5}

    def test_results_of_before_have_none(self):
        folder = Path(__file__).parent.parent / "figures" / "demo"
        old = [Results.load(path) for path in folder.glob("*/results.json")]
        assert old, "the demo has results"
        assert all(isinstance(results.baselines, dict) for results in old)


class TestFailure:
    def failure(self, accuracy=0.9, losses=(0.7, 0.7, 0.7, 0.3, 0.2, 0.1), metric="accuracy", which="last", **facts):
        select = {"select_loss": [0.1, 0.2], "select_accuracy": [0.9, 0.8]}
        rows = epochs(loss=[0.7, 0.3], accuracy=[facts.pop("first", 0.5), accuracy], matthews=[0.0, 0.4], **select)
        logged = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
        run = training(rows, logged, **({"baselines": {"accuracy": 0.5, "label_entropy": math.log(2)}} | facts))
        return Results("rte", "vanilla", metric, {}, [run]).failure(run, which)

    def test_a_training_that_learned_has_not_failed(self):
        assert self.failure() is None

    def test_one_that_diverged_has(self):
        assert "diverged" in self.failure(status="diverged")

    def test_one_that_says_the_same_of_all_has(self):
        assert self.failure(constant=True) == "one prediction for all"

    @pytest.mark.parametrize(("accuracy", "failed"), [(0.49, True), (0.5, True), (0.51, False), (math.nan, True)])
    def test_one_that_is_no_better_than_the_commonest_class_has(self, accuracy, failed):
        assert (self.failure(accuracy) is not None) == failed

    @pytest.mark.parametrize(("factor", "failed"), [(0.991, True), (1.009, True), (0.98, False), (1.02, False)])
    def test_one_whose_loss_stays_at_the_entropy_has(self, factor, failed):
        """In the last epoch, its last three steps; before that it does not matter."""
        loss = factor * math.log(2)
        found = self.failure(losses=(9, 9, 9, loss - 0.1, loss, loss + 0.1))
        assert (found is not None) == failed

    @pytest.mark.parametrize("which", ["selected", "best"])
    def test_the_main_metric_is_that_of_the_evaluation_that_counts(self, which):
        """Good in the first epoch, lost in the second."""
        facts = {"accuracy": 0.4, "first": 0.8, "constant": True}
        assert self.failure(**facts, which=which) is None
        assert self.failure(**facts) == "one prediction for all, accuracy no better than the 0.5000 of the labels alone"

    def test_an_epoch_that_is_no_better_has_failed_though_a_later_one_learned(self):
        assert self.failure(0.9, which="selected") == "accuracy no better than the 0.5000 of the labels alone"

    @pytest.mark.parametrize("facts", [{"status": "diverged"}, {"losses": [math.log(2)] * 6}])
    def test_whatever_evaluation_counts_it_diverged_or_stayed_at_the_entropy(self, facts):
        assert self.failure(first=0.8, which="selected", **facts) is not None

    def test_all_reasons_are_said(self):
        found = self.failure(0.5, losses=[math.log(2)] * 6, constant=True)
        assert found == (
            "one prediction for all, accuracy no better than the 0.5000 of the labels alone, training loss still "
            "0.6931, where the labels alone give 0.6931"
        )

    def test_what_was_not_compared_has_not_failed_by_it(self):
        assert self.failure(0.1, baselines={}) is None

    def test_a_correlation_counts_as_0_where_it_is_not_defined(self):
        assert "matthews" not in str(self.failure(metric="matthews", baselines={"matthews": 0.0}))
        run = training(epochs(loss=[1.0], pearson=[0.0]), baselines={"pearson": 0.0}, constant=True)
        assert Results("stsb", "vanilla", "pearson", {}, [run]).failure(run).startswith("one prediction for all, pear")

    def test_the_summary_says_that_it_failed(self):
        run = training(epochs(loss=[1.0], accuracy=[0.5]), constant=True)
        assert "(failed: one prediction for all)" in str(Results("rte", "vanilla", "accuracy", {}, [run]))


class TestFile:
    roles = Roles({"train": [1, 3]}, {}, {"validation": [0]})

    def test_what_is_written_is_read(self, tmp_path):
        path = tmp_path / "splits.json"
        save_roles(path, "dps2022", 0, {"rte": self.roles})
        save_roles(path, "dps2022", 4, {"rte": replace(self.roles, train={"train": [2]})})
        assert read_roles(tmp_path, 0) == {"rte": self.roles}
        assert read_roles(path, 4)["rte"].train == {"train": [2]}
        contents = json.loads(path.read_text())
        assert contents["protocol"] == "dps2022" and sorted(contents["by_seed"]) == ["0", "4"]

    def test_what_is_for_all_seeds_is_for_any(self, tmp_path):
        save_roles(tmp_path / "splits.json", DEFAULT, "all", {"rte": self.roles})
        assert read_roles(tmp_path, 17) == {"rte": self.roles}

    def test_a_seed_that_was_not_trained_is_refused(self, tmp_path):
        save_roles(tmp_path / "splits.json", "dps2022", 2, {"rte": self.roles})
        with pytest.raises(ValueError, match="has the seeds 2; got 1"):
            read_roles(tmp_path, 1)

    def test_a_folder_without_it_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            read_roles(tmp_path, 0)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("{", "not JSON"),
            ("[1]", "not JSON|damaged"),
            ('{"format": "x"}', "should be a fisherscope.splits"),
            ('{"format": "fisherscope.splits", "format_version": 1, "by_seed": 3}', "damaged contents"),
            ('{"format": "fisherscope.splits", "format_version": 1, "by_seed": {"0": {"a": {"b": 1}}}}', "damaged"),
        ],
    )
    def test_a_file_that_is_something_else_is_refused(self, text, match, tmp_path):
        (tmp_path / "splits.json").write_text(text)
        with pytest.raises(storage.WrongFile, match=match):
            read_roles(tmp_path, 0)


class TestTraining:
    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_the_folder_says_who_saw_what(self, name, tmp_path):
        """The lists are those of the protocol; metrics and labels are those of the report examples."""
        results = finetune("builtin:bert", **QUICK, protocol=name, seeds=[2], out=tmp_path / "run")
        found = read_roles(tmp_path / "run", 2)[TASK]
        sources = {split: plan.read_task(TASK, split) for split in SIZES}
        splits = Splits.of(*sources.values(), "classification")
        assert found == roles_of(name, splits, size=8, run_seed=2)
        labels = [sources[split].labels[i] for split in SIZES for i in found.report.get(split, [])]
        rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
        assert [row["label"] for row in rows] == labels
        (run,) = results.runs
        assert run.evaluations[-1]["accuracy"] == np.mean([row["label"] == row["predicted"] for row in rows])
        assert run.has_select == bool(found.select)
        assert results.settings["protocol"] == name
        drawn_by = PROTOCOLS[name].drawn_by
        assert results.settings["subset_seed"] == (0 if drawn_by == "subset_seed" else drawn_by)
        assert ("train" in results.fingerprints) == (drawn_by != "run")
        known = [sources[split].labels[i] for split in SIZES for i in found.train.get(split, [])]
        assert run.baselines == baselines(np.array(known), np.array(labels), 2)

    def test_select_metrics_are_those_of_the_select_examples(self, tmp_path):
        """Of the saved model, text by text."""
        results = finetune("builtin:bert", **QUICK, out=tmp_path / "run", save_model=True)
        model, tokenizer = fs.load_model(tmp_path / "run" / "model-seed-0", objective="classification")
        source = plan.read_task(TASK, "train")
        chosen = read_roles(tmp_path / "run", 0)[TASK].select["train"]
        losses, right = [], []
        for i in chosen:
            inputs = tokenizer(source.texts[i][0], truncation=True, max_length=16, return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0]
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(source.labels[i]))))
            right.append(int(logits.argmax()) == source.labels[i])
        last = results.runs[0].evaluations[-1]
        assert last["select_accuracy"] == np.mean(right)
        assert last["select_loss"] == pytest.approx(np.mean(losses), rel=1e-4)

    def test_measuring_select_examples_changes_no_training(self, monkeypatch):
        with_them = finetune("builtin:bert", **QUICK | {"max_steps": 4})
        bare = replace(PROTOCOLS[DEFAULT], divide=lambda *given: PROTOCOLS[DEFAULT].divide(*given).without_select)
        monkeypatch.setattr(plan, "PROTOCOLS", {DEFAULT: bare})
        without = finetune("builtin:bert", **QUICK | {"max_steps": 4})
        assert with_them.runs[0].losses == without.runs[0].losses
        assert without.runs[0].evaluations == [
            {name: value for name, value in row.items() if not name.startswith("select_")}
            for row in with_them.runs[0].evaluations
        ]

    def test_further_seeds_leave_the_lists_of_earlier_ones(self, tmp_path):
        settings = QUICK | {"max_steps": 1, "protocol": "dps2022", "out": tmp_path / "run"}
        finetune("builtin:bert", **settings, seeds=[0])
        before = read_roles(tmp_path / "run", 0)
        finetune("builtin:bert", **settings, seeds=[0, 1], resume=True)
        assert read_roles(tmp_path / "run", 0) == before != read_roles(tmp_path / "run", 1)

    def test_ten_evaluations(self):
        results = finetune("builtin:bert", **QUICK | {"max_steps": 20, "protocol": "zhang2020"})
        assert [row["step"] for row in results.runs[0].evaluations] == list(range(2, 21, 2))

    def test_every_task_has_its_own_lists(self, tmp_path):
        settings = QUICK | {"task": None, "tasks": [TASK, OTHER], "train_size": 0.1}
        results = finetune("builtin:bert", **settings, out=tmp_path / "run")
        found = read_roles(tmp_path / "run", 0)
        assert list(found) == [TASK, OTHER]
        assert [len(roles.train["train"]) for roles in found.values()] == [6, 6]
        last = results.runs[0].evaluations[-1]
        means = (last[f"select_{TASK}.matthews"] + last[f"select_{OTHER}.accuracy"]) / 2
        assert last["select_mean"] == pytest.approx(means)
        known = results.runs[0].baselines
        assert known["mean"] == pytest.approx((known[f"{TASK}.matthews"] + known[f"{OTHER}.accuracy"]) / 2)

    def test_the_loss_of_a_method_with_a_penalty_is_not_compared_with_the_entropy(self):
        results = finetune("builtin:bert", **QUICK | {"max_steps": 1}, method="r-drop")
        assert "label_entropy" not in results.runs[0].baselines and "accuracy" in results.runs[0].baselines

    def test_text_has_no_labels_to_compare_with(self):
        settings = QUICK | {"task": None, "data": "builtin:docs", "objective": "mlm", "protocol": "sharma2024"}
        results = finetune("builtin:bert", **settings | {"max_steps": 1})
        assert results.runs[0].evaluations and results.baselines == {}
        assert results.failure(results.runs[0]) is None


@pytest.mark.parametrize("name", PROTOCOLS)
def test_tasks_without_select_examples_leave_all_without(name):
    """The mean over tasks is one of the same tasks on select and on report examples."""
    one, other = (plan.data_of("builtin:bert", None, task=task, objective=None) for task in (TASK, OTHER))
    other["train"] = replace(other["train"], texts=other["train"].texts[:8], labels=other["train"].labels[:8])
    first = plan.Plan(
        "builtin:bert", None, None, **one, train_size=8, subset_seed=0, max_length=None, recipe=Recipe(),
        method="vanilla", protocol=name,
    )  # fmt: skip
    roles = replace(first, others=(replace(first, **other),)).roles(0)
    assert len({bool(of_task.select) for of_task in roles}) == 1
    assert bool(roles[0].select) == (name == "zhang2020")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"train_size": 0}, "train_size must be a number of examples, 1 or more, or a fraction"),
        ({"train_size": 1.0}, "train_size must be a number of examples, 1 or more, or a fraction"),
        ({"protocol": "glue"}, "protocol must be one of fixed-subset, .*; got 'glue'"),
        ({"protocol": "dps2022", "subset_seed": 3}, "dps2022 draws by the seed of the run, so that subset_seed has no"),
        ({"protocol": "zhang2020", "subset_seed": 3}, "zhang2020 draws by fixed seeds, so that subset_seed has no use"),
        ({"subset_seed": -1}, "subset_seed must be at least 0, got -1"),
        ({"intermediate_task": TASK}, "cannot come before itself"),
        (
            {"task": None, "data": "builtin:docs", "objective": "mlm", "protocol": "dps2022"},
            "dps2022 reports on validation examples, but there are none; give validation_data",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        finetune("builtin:bert", **QUICK | arguments, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_list_is_refused_before_the_training(tmp_path):
    settings = QUICK | {"max_steps": 1, "out": tmp_path / "run"}
    finetune("builtin:bert", **settings)
    (tmp_path / "run" / "splits.json").write_text("{")
    with pytest.raises(storage.WrongFile, match=r"splits\.json is not JSON"):
        finetune("builtin:bert", **settings, seeds=[0, 1], resume=True)
    assert [run.seed for run in Results.load(tmp_path / "run").runs] == [0]


def test_the_protocol_of_a_name():
    assert all(protocol_of(name, 0) is PROTOCOLS[name] for name in PROTOCOLS)


class TestPositions:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"positions": [0], "num_examples": 1}, "leave out num_examples"),
            ({"positions": []}, "positions must be some of 0 to"),
            ({"positions": [-1]}, "positions must be some of 0 to"),
            ({"positions": [10**6]}, "positions must be some of 0 to"),
        ],
    )
    def test_what_is_not_there_is_refused(self, arguments, match):
        _, tokenizer = fs.load_model("builtin:bert")
        with pytest.raises(ValueError, match=match):
            fs.load_batches(fs.read_task(TASK), tokenizer, objective="classification", **arguments)


class TestCommandLine:
    flags = ("finetune", "--model", "builtin:bert", "--task", TASK, "--max-steps", "1", "--max-length", "16")

    def test_a_fraction_and_a_protocol(self, tmp_path, capsys):
        from fisherscope.cli import main

        out = str(tmp_path / "run")
        assert main([*self.flags, "--train-size", "0.1", "--protocol", "sharma2024", "--out", out]) == 0
        assert "on the report examples: last (best epoch)" in capsys.readouterr().out
        settings = Results.load(out).settings
        assert (settings["train_size"], settings["protocol"]) == (0.1, "sharma2024")
        assert len(flat(read_roles(out, 0)[TASK].train)) == 8

    def test_a_size_that_is_none(self, tmp_path, capsys):
        from fisherscope.cli import main

        assert main([*self.flags, "--train-size", "1.5", "--out", str(tmp_path / "run")]) == 1
        assert "train_size must be a number of examples, 1 or more, or a fraction between 0 and 1; got 1.5" in (
            capsys.readouterr().err
        )
