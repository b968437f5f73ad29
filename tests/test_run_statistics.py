"""Statistics of runs against scipy, brute force, and cases worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fisherscope.experiments import statistics
from fisherscope.experiments.statistics import brown_forsythe, corrected, paired, sign_flip_p, summarize

HERE = {0: 0.52, 1: 0.61, 2: 0.58, 3: 0.66, 4: 0.6}
THERE = {0: 0.5, 1: 0.55, 2: 0.6, 3: 0.57, 4: 0.52}

NUMBERS = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=8)
PS = st.lists(st.floats(0, 1), max_size=12)


def of(numbers) -> dict[int, float]:
    return dict(enumerate(numbers))


def differences() -> np.ndarray:
    return np.array([HERE[seed] - THERE[seed] for seed in HERE])


def by_brute_force(values: np.ndarray) -> float:
    """Values are thousandths, so sums that differ do so by more than half of one."""
    flips = itertools.product((1, -1), repeat=len(values))
    sums = [abs(sum(sign * value for sign, value in zip(signs, values, strict=True))) for signs in flips]
    return sum(found > abs(sum(values)) - 5e-4 for found in sums) / len(sums)


def test_summary_of_five_numbers():
    found = summarize(of([1.0, 2.0, 3.0, 4.0, 10.0]))
    assert (found.runs, found.measured, found.failed) == (5, 5, 0)
    assert (found.mean, found.median, found.maximum) == (4.0, 3.0, 10.0)
    assert found.std == pytest.approx(math.sqrt((9 + 4 + 1 + 0 + 36) / 4))


def test_failed_ones_stay_in_the_mean_and_are_left_out_beside_it():
    found = summarize(of([1.0, 3.0, 8.0]), failed={2})
    assert (found.mean, found.mean_without_failed) == (4.0, 2.0)
    assert found.std_without_failed == pytest.approx(math.sqrt(2))
    assert found.failed == 1


def test_failed_ones_without_a_number_are_counted_and_in_no_mean():
    found = summarize(of([1.0, 3.0]), failed={7, 9})
    assert (found.runs, found.measured, found.failed, found.mean) == (4, 2, 2, 2.0)


def test_all_failed_leaves_no_mean_without_failed():
    found = summarize(of([1.0, 3.0]), failed={0, 1})
    assert found.mean == 2.0
    assert found.mean_without_failed is None and found.std_without_failed is None


def test_one_run_has_no_standard_deviation():
    found = summarize({4: 0.5})
    assert (found.mean, found.std, found.std_without_failed) == (0.5, None, None)


def test_no_numbers_at_all():
    found = summarize({}, failed={0})
    assert (found.runs, found.measured, found.mean, found.median, found.maximum) == (1, 0, None, None, None)


def test_equal_numbers_spread_by_exactly_zero():
    assert summarize(of([0.1] * 6)).std == 0.0


@given(st.lists(NUMBERS, min_size=2, max_size=9))
def test_standard_deviation_is_numpys_with_ddof_1(numbers):
    assert summarize(of(numbers)).std == pytest.approx(np.std(numbers, ddof=1), rel=1e-9, abs=1e-9)


def test_paired_t_test_is_scipys():
    expected = stats.ttest_rel(list(HERE.values()), list(THERE.values()))
    found = paired(HERE, THERE)
    assert found.p_t == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)


def test_interval_worked_out_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, and t of two degrees of freedom is 4.30265."""
    found = paired(of([1.0, 2.0, 3.0]), of([0.0, 0.0, 0.0]))
    assert (found.mean, found.low, found.high) == pytest.approx(
        (2.0, 2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5
    )
    assert not found.excludes_zero


def test_interval_that_excludes_zero():
    assert paired(of([1.0, 1.1, 0.9]), of([0.0, 0.0, 0.0])).excludes_zero


def test_permutation_test_is_scipys():
    expected = stats.permutation_test(
        (list(HERE.values()), list(THERE.values())), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples"
    )
    assert paired(HERE, THERE).p_permutation == pytest.approx(expected.pvalue, rel=1e-12)


@given(st.lists(NUMBERS, min_size=1, max_size=8))
def test_permutation_test_counts_all_flips(values):
    assert sign_flip_p(np.array(values)) == pytest.approx(by_brute_force(np.array(values)), abs=1e-12)


def test_permutation_test_worked_out_by_hand():
    """Of the sums ±1 ±2 ±3, 6 and −6 are as far from zero as 6; of ±1 ±2 −3, 0 is what was seen."""
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert sign_flip_p(np.array([1.0, 2.0, -3.0])) == 1.0


def test_sums_that_differ_by_rounding_are_equal():
    assert sign_flip_p(np.array([0.1, 0.2, -0.3, 0.3])) == by_brute_force(np.array([1.0, 2.0, -3.0, 3.0]))


def test_equal_differences_of_one_sign_give_the_smallest_p():
    found = paired(of([0.5, 0.6, 0.7, 0.8, 0.9]), of([0.4, 0.3, 0.5, 0.6, 0.1]))
    assert found.p_permutation == found.smallest_p == 0.0625


def test_many_differences_are_flipped_at_random_and_the_same_each_time():
    values = np.random.default_rng(3).normal(0.2, 1.0, 25)
    assert sign_flip_p(values) == sign_flip_p(values)
    assert sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.03)


def test_random_flips_agree_with_all_of_them(monkeypatch):
    values = np.random.default_rng(1).normal(0.4, 1.0, 12)
    exact = sign_flip_p(values)
    monkeypatch.setattr(statistics, "MOST_EXACT", 11)
    drawn = sign_flip_p(values)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / statistics.FLIPS))


def test_random_flips_are_never_p_zero():
    assert sign_flip_p(np.ones(40)) == 1 / (1 + statistics.FLIPS)


def test_smallest_p_is_that_of_the_test_of_as_many_seeds():
    for count in (2, 9, 20, 21, 25):
        values = {seed: 0.6 + 0.0011 * seed for seed in range(count)}
        found = paired(values, dict.fromkeys(values, 0.5))
        assert found.p_permutation == found.smallest_p == (2 / 2**count if count <= 20 else 1 / 100_001)


def test_no_difference_at_all():
    found = paired(HERE, HERE)
    assert (found.mean, found.low, found.high, found.p_t, found.p_permutation) == (0.0, 0.0, 0.0, 1.0, 1.0)
    assert not found.excludes_zero


def test_equal_differences_other_than_zero_have_no_interval():
    """The t test would find p = 0 in two seeds; nothing is known of how differences vary."""
    found = paired(of([0.3, 0.4]), of([0.1, 0.2]))
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high, found.p_t) == (None, None, None)
    assert found.p_permutation == 0.5
    assert not found.excludes_zero


def test_one_common_seed_is_not_tested():
    found = paired({3: 1.0, 4: 2.0}, {3: 0.5})
    assert (found.seeds, found.mean) == ((3,), 0.5)
    assert (found.low, found.p_t, found.p_permutation, found.smallest_p) == (None, None, None, None)


def test_no_common_seed():
    found = paired({1: 1.0}, {2: 1.0})
    assert (found.seeds, found.mean, found.p_t, found.p_permutation) == ((), None, None, None)


def test_seeds_that_one_of_them_lacks_are_told():
    found = paired({0: 1.0, 1: 2.0, 5: 3.0}, {1: 1.0, 0: 0.0, 2: 1.0})
    assert (found.seeds, found.only_here, found.only_reference) == ((0, 1), (5,), (2,))


@given(PAIRS)
def test_interval_contains_the_mean(pairs):
    found = paired(of([x for x, _ in pairs]), of([y for _, y in pairs]))
    assert found.mean is not None
    if found.low is not None and found.high is not None:
        assert found.low <= found.mean <= found.high


@given(PAIRS)
def test_permutation_p_is_at_least_the_smallest(pairs):
    found = paired(of([x for x, _ in pairs]), of([y for _, y in pairs]))
    assert found.smallest_p == 2 / 2 ** len(pairs)
    assert found.smallest_p <= found.p_permutation <= 1


@given(PAIRS)
def test_swapping_the_arms_changes_the_sign_alone(pairs):
    x, y = of([x for x, _ in pairs]), of([y for _, y in pairs])
    one, other = paired(x, y), paired(y, x)
    assert (one.p_t, one.p_permutation) == (other.p_t, other.p_permutation)
    assert one.mean == -other.mean


def test_brown_forsythe_is_scipys():
    a, b = [0.1, 0.4, 0.35, 0.8], [0.2, 0.21, 0.24, 0.19, 0.22]
    assert brown_forsythe(a, b) == pytest.approx(stats.levene(a, b, center="median").pvalue)


def test_brown_forsythe_as_an_analysis_of_variance():
    a, b = [1.0, 4.0, 3.5, 8.0], [2.0, 2.1, 2.4, 1.9, 2.2]
    z = [np.abs(np.array(group) - np.median(group)) for group in (a, b)]
    assert brown_forsythe(a, b) == pytest.approx(stats.f_oneway(*z).pvalue)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
        ([0.1, 0.3], [0.2, 0.9]),
        ([1.0, 1.0, 1.0], [0.2, 0.9]),
        ([1.0], [1.0, 2.0, 3.0]),
        ([], [1.0, 2.0]),
    ],
    ids=["all constant", "two each", "constant and two", "one", "none"],
)
def test_brown_forsythe_is_undefined(a, b):
    assert brown_forsythe(a, b) is None


def test_holm_worked_out_by_hand():
    """0.01·4, 0.03·3 = 0.09, then 0.04·2 = 0.08 may not be below that, and 0.05·1 neither."""
    assert corrected([0.03, 0.01, 0.05, 0.04]) == pytest.approx([0.09, 0.04, 0.09, 0.09])


def test_holm_is_at_most_one():
    assert corrected([0.6, 0.7]) == [1.0, 1.0]


def test_benjamini_hochberg_is_scipys():
    ps = [0.01, 0.2, 0.03, 0.04, 0.9]
    assert corrected(ps, "benjamini-hochberg") == pytest.approx(list(stats.false_discovery_control(ps)))


@pytest.mark.parametrize("how", ["holm", "benjamini-hochberg"])
def test_missing_ones_stay_missing_and_do_not_count(how):
    first, second = corrected([0.02, 0.04], how)
    assert corrected([None, 0.02, None, 0.04], how) == [None, first, None, second]


@pytest.mark.parametrize("how", ["holm", "benjamini-hochberg"])
def test_nothing_to_correct(how):
    assert corrected([], how) == []
    assert corrected([None], how) == [None]
    assert corrected([0.3], how) == [0.3]


@pytest.mark.parametrize("how", ["holm", "benjamini-hochberg"])
@given(ps=PS)
def test_corrected_is_at_least_the_raw_in_the_same_order_and_at_most_one(how, ps):
    found = corrected(ps, how)
    assert all(p <= q + 1e-15 and q <= 1 for p, q in zip(ps, found, strict=True))
    order = np.argsort(ps, kind="stable")
    assert all(found[i] <= found[j] for i, j in itertools.pairwise(order))


@given(ps=PS)
def test_holm_rejects_what_the_step_down_procedure_rejects(ps):
    """At 5 %: the smallest p against 0.05/m, the next against 0.05/(m−1), …, until one is above."""
    rejected = set()
    for step, i in enumerate(np.argsort(ps, kind="stable")):
        if ps[i] * (len(ps) - step) > 0.05:
            break
        rejected.add(int(i))
    assert {i for i, q in enumerate(corrected(ps)) if q is not None and q <= 0.05} == rejected


def test_unknown_correction():
    with pytest.raises(ValueError, match="correction must be one of holm, benjamini-hochberg; got 'bonferroni'"):
        corrected([0.1], "bonferroni")  # type: ignore[arg-type]
