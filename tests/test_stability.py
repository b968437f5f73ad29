"""How stable a mask is: the formula, what a run keeps for it, and stopping by it."""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import Case, Interrupted, Stopping, batched, case, contents
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

import fisherscope as fs
from fisherscope import stability, storage
from fisherscope.fisher import state
from fisherscope.fisher.run import estimate_fisher
from fisherscope.masks import top_fraction
from fisherscope.scores import FisherScores
from fisherscope.stability import Quarters, noise_of, overlap_of, sampled_positions, top


def fisher(made: Case, batches: Any, **settings: Any) -> FisherScores:
    return estimate_fisher(made.model, batches, progress=False, **settings)


@pytest.fixture(scope="module")
def many() -> Case:
    """Two dozen examples of unequal length."""
    return case("bert", lengths=[3 + (5 * k) % 7 for k in range(24)])


# The formula


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.8])
@pytest.mark.parametrize("noise", [0.01, 0.3, 2.0, 20.0])
def test_overlap_is_the_joint_tail_of_a_normal_pair(noise: float, fraction: float):
    rho, threshold = 1 / (1 + noise), norm.ppf(fraction)
    both = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([threshold, threshold])  # lower tails, by symmetry
    assert overlap_of(noise, fraction) == pytest.approx(both / fraction, abs=2e-4)


def test_half_of_the_entries_has_a_closed_form():
    for noise in (0.01, 0.5, 3.0):  # Sheppard 1899
        assert overlap_of(noise, 0.5) == pytest.approx(0.5 + math.asin(1 / (1 + noise)) / math.pi, abs=1e-12)


@given(st.floats(1e-6, 100), st.floats(0.001, 0.99))
def test_noise_is_found_back_from_the_overlap(noise: float, fraction: float):
    assert noise_of(overlap_of(noise, fraction), fraction) == pytest.approx(noise, rel=1e-3)


def test_overlaps_beyond_the_range_are_all_noise_or_none():
    assert noise_of(0.05, 0.1) == noise_of(0.1, 0.1) == 1e3
    assert noise_of(1.0, 0.1) == 1e-9


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=30), st.floats(0.0, 1.0))
def test_top_is_what_sorting_gives_with_earlier_ones_first(values: list[float], fraction: float):
    count = round(fraction * len(values))
    if count:
        wanted = set(sorted(range(len(values)), key=lambda k: (-values[k], k))[:count])
        assert set(np.flatnonzero(top(np.array(values), fraction)).tolist()) == wanted


def made_quarters(signal: np.ndarray, noise: float, count: int, seed: int, tail: float = 0.0) -> np.ndarray:
    """Four rows: sums of ``count`` numbers each around the signal, with log-normal tails if asked for."""
    draw = np.random.default_rng(seed)
    rows = np.zeros((4, len(signal)))
    for k in range(count):
        rows[k % 4] += (
            signal * draw.gamma(1 / noise**2, noise**2, len(signal)) * np.exp(tail * draw.normal(size=len(signal)))
        )
    return rows


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("noise", "tail"), [(1.0, 0.0), (3.0, 0.0), (1.0, 1.5)])
def test_projection_is_what_a_fresh_draw_gives(noise: float, tail: float, fraction: float):
    """The masks have 400 entries and more: the overlap of one pair is known to 0.025 (one standard deviation)."""
    signal = np.exp(np.random.default_rng(0).normal(size=40_000))
    rows, fresh = (made_quarters(signal, noise, 32, seed, tail) for seed in (1, 2))
    quarters = Quarters(torch.from_numpy(rows).float(), (8, 8, 8, 8))
    measured = (top(rows.sum(0), fraction) & top(fresh.sum(0), fraction)).sum() / round(fraction * len(signal))
    assert quarters.expected_overlap(fraction) == pytest.approx(measured, abs=0.05 if fraction == 0.01 else 0.02)


def test_quarters_of_unequal_size_are_taken_for_what_they_are():
    signal = np.exp(np.random.default_rng(0).normal(size=40_000))
    draw = np.random.default_rng(1)
    counts = (16, 8, 8, 4)
    rows = np.stack([sum(signal * draw.gamma(1, 1, len(signal)) for _ in range(n)) for n in counts])
    fresh = sum(signal * draw.gamma(1, 1, len(signal)) for _ in range(36))
    measured = (top(rows.sum(0), 0.1) & top(fresh, 0.1)).sum() / 4000
    assert Quarters(torch.from_numpy(rows).float(), counts).expected_overlap(0.1) == pytest.approx(measured, abs=0.02)


def test_stability_on_the_built_in_model_is_the_overlap_with_a_disjoint_fresh_draw():
    """Over draws of 64 to 128 examples the error has a mean of at most 0.02 and a standard deviation of 0.025, 0.014
    and 0.003 at these fractions; the formula of Spearman and Brown would be 0.035 too high at one half."""
    model, tokenizer = fs.load_model("builtin:bert", device="cpu")
    batches = fs.load_batches("builtin:docs/train", tokenizer, objective="mlm", num_examples=160, batch_size=8)
    order = np.random.default_rng(0).permutation(160)
    ours, fresh = (
        estimate_fisher(model, replace(batches, examples=[batches.examples[i] for i in part]), progress=False)
        for part in (order[:80], order[80:])
    )
    for fraction, tolerance in ((0.01, 0.06), (0.1, 0.04), (0.5, 0.02)):
        a, b = top_fraction(ours, fraction), top_fraction(fresh, fraction)
        measured = (a & b).num_selected / a.num_selected
        assert ours.stability(fraction) == pytest.approx(measured, abs=tolerance), fraction
    assert ours.stability(0.01) < ours.stability(0.1) < ours.stability(0.5)


# Which entries


def test_small_models_are_sampled_whole():
    positions = sampled_positions({"a": 3, "b": 1, "c": 0, "d": 2})
    assert {name: at.tolist() for name, at in positions.items()} == {"a": [0, 1, 2], "b": [0], "c": [], "d": [0, 1]}


def test_large_models_are_sampled_evenly():
    sizes = {"a": 700_000, "b": 10, "c": 2_000_000, "d": 300_001}
    positions = sampled_positions(sizes, 1000)
    assert abs(sum(map(len, positions.values())) - 1000) <= 2
    for name, at in positions.items():
        assert len(at) == pytest.approx(1000 * sizes[name] / sum(sizes.values()), abs=2)
        assert at.tolist() == sorted(set(at.tolist()))
        assert all(0 <= k < sizes[name] for k in at.tolist())
    again = sampled_positions(sizes, 1000)
    assert all(torch.equal(positions[name], again[name]) for name in sizes)
    assert np.ptp(np.diff(positions["c"].numpy())) > 100  # at random within each stretch


# What a run keeps


@pytest.mark.parametrize("halves", [True, False])
def test_quarters_are_the_sums_over_every_fourth_batch(halves: bool, many: Case):
    batches = batched(many.examples, 3)
    scores = fisher(many, batches, halves=halves)
    assert scores.quarters is not None
    for k in range(4):
        part = fisher(many, batches[k::4], halves=False)
        wanted = torch.cat([part[name].flatten() for name in scores]) * part.num_examples
        torch.testing.assert_close(scores.quarters.sums[k].double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
        assert scores.quarters.num_examples[k] == part.num_examples
    total = torch.cat([scores[name].flatten() for name in scores]) * scores.num_examples
    torch.testing.assert_close(scores.quarters.sums.sum(0).double(), total, rtol=1e-5, atol=1e-6 * float(total.max()))


def test_quarters_of_a_larger_model_are_kept_at_sampled_entries(many: Case, monkeypatch: pytest.MonkeyPatch):
    whole = fisher(many, batched(many.examples, 3)).quarters
    monkeypatch.setattr(stability, "sampled_positions", None)
    monkeypatch.setattr(state, "sampled_positions", lambda sizes: sampled_positions(sizes, 500))
    some = fisher(many, batched(many.examples, 3)).quarters
    sizes = {name: p.numel() for name, p in many.model.named_parameters()}
    starts = itertools.accumulate(sizes.values(), initial=0)
    at = torch.cat([start + at for start, at in zip(starts, sampled_positions(sizes, 500).values(), strict=False)])
    assert whole is not None and some is not None
    assert torch.equal(some.sums, whole.sums[:, at])


def test_halves_are_the_scores_from_every_other_batch(many: Case):
    batches = batched(many.examples, 3)
    for half, part in zip(fisher(many, batches, halves=True).halves(), (batches[::2], batches[1::2]), strict=True):
        wanted = fisher(many, part)
        assert half.num_examples == wanted.num_examples
        for name in wanted:
            torch.testing.assert_close(half[name], wanted[name], rtol=0, atol=1e-3 * float(wanted[name].max()) + 1e-12)


def test_halves_add_up_and_cost_nothing_but_memory(many: Case):
    batches = batched(many.examples, 3)
    kept, not_kept = (fisher(many, batches, halves=halves) for halves in (True, False))
    for name in kept:
        torch.testing.assert_close(kept[name], not_kept[name], rtol=1e-12, atol=1e-15)
    assert kept.stability(0.1) == not_kept.stability(0.1)
    first, second = kept.halves()
    for name in kept:
        both = (first[name] * first.num_examples + second[name] * second.num_examples) / kept.num_examples
        torch.testing.assert_close(both, kept[name])


@pytest.mark.slow
def test_history_is_noted_at_geometric_moments_and_at_the_end(many: Case):
    scores = fisher(many, batched(many.examples, 1))
    assert scores.quarters is not None
    assert scores.quarters.fractions == (0.01, 0.1, 0.5)
    assert [n for n, _ in scores.quarters.curve(0.1)] == [8, 10, 13, 17, 22, 24]
    assert scores.quarters.curve(0.1)[-1][1] == scores.stability(0.1)
    for n, overlap in scores.quarters.curve(0.5):
        assert fisher(many, batched(many.examples[:n], 1)).stability(0.5) == overlap


def test_the_fraction_asked_for_is_followed_too(many: Case):
    scores = fisher(many, batched(many.examples, 3), fraction=0.2)
    assert scores.quarters is not None and scores.quarters.fractions == (0.01, 0.1, 0.2, 0.5)


def test_stability_of_too_little_is_refused_in_a_sentence(many: Case):
    one = fisher(many, batched(many.examples, 24), halves=True)
    with pytest.raises(ValueError, match="needs at least 4 batches") as error:
        one.stability(0.1)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Two halves need two batches"):
        one.halves()
    with pytest.raises(ValueError, match="halves=True"):
        fisher(many, batched(many.examples, 3)).halves()
    for fraction in (0.0, 1.0, 1e-9, -1.0, 2.0):
        with pytest.raises(ValueError, match="needs a fraction between 0 and 1"):
            fisher(many, batched(many.examples, 3)).stability(fraction)


# Files


def test_files_keep_halves_and_quarters(many: Case, tmp_path: Path):
    scores = fisher(many, batched(many.examples, 2), halves=True)
    scores.save(tmp_path / "scores.h5")
    loaded = FisherScores.load(tmp_path / "scores.h5")
    assert loaded.quarters is not None and scores.quarters is not None
    assert loaded.quarters.history == scores.quarters.history
    assert [loaded.stability(f) for f in (0.01, 0.3)] == [scores.stability(f) for f in (0.01, 0.3)]
    for ours, theirs in zip(loaded.halves(), scores.halves(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in scores)
    with h5py.File(tmp_path / "scores.h5") as file:
        assert file["first_half/cls.predictions.bias"].dtype == np.float16
    loaded.save(tmp_path / "again.h5")
    assert contents(tmp_path / "again.h5") == contents(tmp_path / "scores.h5")


def test_files_of_earlier_versions_load_without(many: Case, tmp_path: Path):
    fisher(many, batched(many.examples, 2), halves=True).save(tmp_path / "scores.h5")
    with h5py.File(tmp_path / "scores.h5", "r+") as file:
        del file["first_half"], file["stability"]
    loaded = FisherScores.load(tmp_path / "scores.h5")
    assert loaded.first_half is None
    with pytest.raises(ValueError, match="which these scores do not keep apart; estimate them again"):
        loaded.stability(0.1)
    with pytest.raises(ValueError, match="without keeping halves"):
        loaded.halves()


DAMAGES: dict[str, Callable[[Any], object]] = {
    "no quarters": lambda file: file["stability"].__delitem__("quarters"),
    "no history": lambda file: file["stability"].__delitem__("history"),
    "three quarters": lambda file: (
        file["stability"].__delitem__("quarters"),
        file["stability"].create_dataset("quarters", data=np.zeros((3, 5), np.float32)),
    ),
    "negative": lambda file: file["stability/quarters"].__setitem__((0, 0), -1.0),
    "not a number": lambda file: file["stability/history"].__setitem__((0, 0), math.nan),
    "no counts": lambda file: file["stability"].attrs.__delitem__("num_examples"),
    "other fractions": lambda file: file["stability"].attrs.__setitem__("fractions", [0.1]),
    "no group": lambda file: (file.__delitem__("stability"), file.create_dataset("stability", data=1)),
    "half of another type": lambda file: file["first_half"].create_dataset("x", data=np.zeros(2, np.float32)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_refused_in_one_sentence(damage: str, many: Case, tmp_path: Path):
    path = tmp_path / "scores.h5"
    fisher(many, batched(many.examples, 2), halves=True).save(path)
    with h5py.File(path, "r+") as file:
        DAMAGES[damage](file)
    with pytest.raises(storage.WrongFile, match=r"make it again|but first_half") as error:
        FisherScores.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_halves_that_do_not_fit_are_refused():
    tensors = {"a": torch.ones(2)}
    with pytest.raises(ValueError, match="same parameters and shapes"):
        FisherScores(tensors, 1, first_half={"a": torch.ones(3)})
    with pytest.raises(ValueError, match="same parameters and shapes"):
        FisherScores(tensors, 1, first_half={})
    with pytest.raises(ValueError, match="'a' has others"):
        FisherScores(tensors, 1, first_half={"a": torch.tensor([0.5, 1.5])})


# Stopping


def settled(made: Case, batches: Any, **settings: Any) -> FisherScores:
    """A run that stops at the second moment, after ten batches of one example."""
    curve = fisher(made, batched(made.examples, 1), fraction=0.3).quarters.curve(0.3)  # pyright: ignore[reportOptionalMemberAccess]
    values = [overlap for _, overlap in curve]
    assert values[1] > values[0]
    return fisher(made, batches, fraction=0.3, until_stable=values[1], **settings)


def test_a_run_stops_as_soon_as_the_mask_has_settled(many: Case, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="fisherscope"):
        scores = settled(many, batched(many.examples, 1))
    assert scores.num_examples == 10
    wanted = fisher(many, batched(many.examples[:10], 1), fraction=0.3)
    assert all(torch.equal(scores[name], wanted[name]) for name in wanted)
    assert scores.provenance["stopping"]["fraction"] == 0.3
    said = f"The mask has settled: the top 30 % of the entries has an expected overlap of {scores.stability(0.3):.3f}"
    assert f"{said} with that of a fresh draw, after 10 examples." in caplog.messages


def test_data_that_ends_before_is_warned_of(many: Case, caplog: pytest.LogCaptureFixture):
    scores = fisher(many, batched(many.examples, 1), until_stable=0.9999)
    assert scores.num_examples == 24
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith("The data ended before the mask settled: the top 10 % of the entries has an expected")
    assert said.endswith("after 24 examples, but 0.9999 was asked for; give more examples.")


@pytest.mark.parametrize("stop", [3, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("halves", [True, False])
def test_a_resumed_run_stops_at_the_same_place(stop: int, halves: bool, many: Case, tmp_path: Path):
    part, batches = tmp_path / "scores.h5.part", batched(many.examples, 1)
    settled(many, Stopping(batches), halves=halves).save(tmp_path / "whole.h5")
    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherscope.fisher.run.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        settled(many, Stopping(batches, stop), halves=halves, checkpoint=part)
    settled(many, Stopping(batches), halves=halves, checkpoint=part).save(tmp_path / "resumed.h5")
    assert contents(tmp_path / "resumed.h5") == contents(tmp_path / "whole.h5")
    settled(many, Stopping(batches), halves=halves, checkpoint=part).save(tmp_path / "again.h5")  # killed before saving
    assert contents(tmp_path / "again.h5") == contents(tmp_path / "whole.h5")


def test_a_finished_checkpoint_without_stopping_gives_the_same_again(many: Case, tmp_path: Path):
    part, batches = tmp_path / "scores.h5.part", batched(many.examples, 1)
    for name in ("one.h5", "two.h5"):
        fisher(many, batches, checkpoint=part).save(tmp_path / name)
    assert contents(tmp_path / "one.h5") == contents(tmp_path / "two.h5")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"halves": True}, "another halves"),
        ({"until_stable": 0.9}, "another"),
        ({"fraction": 0.2}, "another fraction"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(changed: dict[str, Any], said: str, many: Case, tmp_path: Path):
    fisher(many, batched(many.examples, 6), checkpoint=tmp_path / "part")
    with pytest.raises(ValueError, match=said):
        fisher(many, batched(many.examples, 6), checkpoint=tmp_path / "part", **changed)


@pytest.mark.parametrize(
    "settings", [{"until_stable": 1.0}, {"until_stable": -0.5}, {"fraction": 0.0}, {"fraction": 2.0}]
)
def test_what_is_no_share_is_refused(settings: dict[str, float], many: Case):
    with pytest.raises(ValueError, match=r"must be between 0 and 1, got"):
        fisher(many, batched(many.examples, 6), **settings)


def test_loaded_batches_are_taken_in_random_order_when_the_run_may_stop():
    model, tokenizer = fs.load_model("builtin:bert", device="cpu")
    batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=40, batch_size=2, max_length=32)
    scores = estimate_fisher(model, batches, until_stable=0.01, progress=False)
    data = scores.provenance["data"]
    assert 0 < scores.num_examples <= 16  # eight batches, some of whose examples may have no masked token
    assert data["settings"]["order"] == "random" and data["fingerprint"] != batches.fingerprint
    first = estimate_fisher(model, replace(batches, examples=batches.examples[:16]), progress=False)
    assert not torch.allclose(scores["cls.predictions.bias"], first["cls.predictions.bias"])
