"""What a few numbers say: summaries over seeds, paired differences, spreads, and corrections for many tests."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy import stats

Correction = Literal["holm", "benjamini-hochberg"]

CONFIDENCE = 0.95
"""Of all intervals."""

MOST_EXACT = 20
"""Differences at most of which all sign flips are counted; of more, a random selection."""

FLIPS = 100_000
"""Random sign flips where there are too many to count all."""

ROUNDING = 1e-12
"""Relative differences below this are due to rounding."""


@dataclass(frozen=True)
class Summary:
    r"""What the trainings of one arm came to; None where there are too few numbers.

    Attributes:
        runs: Trainings, those without a number too.
        measured: Trainings with a number; all that follows is over these.
        mean: :math:`\bar x = \sum_i x_i / n`.
        std: :math:`\sqrt{\sum_i (x_i - \bar x)^2 / (n - 1)}` (ddof 1).
        median: The middle one.
        maximum: The highest one.
        failed: Trainings that failed, with or without a number.
        mean_without_failed: The mean of the others.
        std_without_failed: Their standard deviation, ddof 1.
    """

    runs: int
    measured: int
    mean: float | None
    std: float | None
    median: float | None
    maximum: float | None
    failed: int
    mean_without_failed: float | None
    std_without_failed: float | None


def summarize(values: Mapping[int, float], failed: Collection[int] = ()) -> Summary:
    """Summarize the trainings of one arm.

    Args:
        values: By seed.
        failed: The seeds that failed; those without a value are counted, and are in no mean.
    """
    numbers = [values[seed] for seed in sorted(values)]
    others = [values[seed] for seed in sorted(values) if seed not in failed]
    return Summary(
        runs=len({*values, *failed}),
        measured=len(numbers),
        mean=_mean(numbers),
        std=_std(numbers),
        median=float(np.median(numbers)) if numbers else None,
        maximum=max(numbers, default=None),
        failed=len(set(failed)),
        mean_without_failed=_mean(others),
        std_without_failed=_std(others),
    )


def _mean(numbers: Sequence[float]) -> float | None:
    return math.fsum(numbers) / len(numbers) if numbers else None


def _std(numbers: Sequence[float]) -> float | None:
    if len(numbers) < 2:
        return None
    return 0.0 if _constant(np.array(numbers)) else float(np.std(numbers, ddof=1))


def _constant(values: np.ndarray) -> bool:
    """Whether the values are the same but for rounding."""
    return float(np.ptp(values)) <= ROUNDING * float(np.abs(values).max())


@dataclass(frozen=True)
class Paired:
    r"""The differences :math:`d_s = x_s - y_s` between an arm and a reference, over the seeds that both have.

    Attributes:
        seeds: That both have; n of them.
        mean: :math:`\bar d`; None without seeds.
        low: Lower end of the 95 % interval :math:`\bar d \pm t_{0.975, n - 1} \, s_d / \sqrt n`, with
            :math:`s_d` the standard deviation (ddof 1). None for fewer than two seeds, and where all differences are
            the same but not zero, which tells nothing of how they vary.
        high: Upper end.
        p_t: Of the paired t test, two-sided; None where there is no interval.
        p_permutation: Of the sign-flip permutation test, two-sided: the share of all :math:`2^n` choices of signs with
            :math:`|\sum_s \pm d_s| \ge |\sum_s d_s|`. None for fewer than two seeds.
        smallest_p: The smallest that n seeds allow for it, :func:`smallest_p`.
        only_here: Seeds that only the arm has.
        only_reference: Seeds that only the reference has.
    """

    seeds: tuple[int, ...]
    mean: float | None
    low: float | None
    high: float | None
    p_t: float | None
    p_permutation: float | None
    smallest_p: float | None
    only_here: tuple[int, ...]
    only_reference: tuple[int, ...]

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and zero is not in it."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """Compare an arm with a reference, seed by seed.

    The t test takes the differences for normal; the permutation test takes only, as the hypothesis to reject, that
    each of them could as well have had the other sign (Fisher 1935, The Design of Experiments, section 21). All
    differences zero give p = 1 and the interval [0, 0].

    Args:
        values: Of the arm, by seed.
        reference: Of the reference, by seed.
    """
    seeds = tuple(sorted(values.keys() & reference.keys()))
    differences = np.array([values[seed] - reference[seed] for seed in seeds], dtype=np.float64)
    low, high, p_t = _t_test(differences)
    return Paired(
        seeds=seeds,
        mean=_mean(differences.tolist()),
        low=low,
        high=high,
        p_t=p_t,
        p_permutation=sign_flip_p(differences) if len(seeds) > 1 else None,
        smallest_p=smallest_p(len(seeds)) if len(seeds) > 1 else None,
        only_here=tuple(sorted(values.keys() - reference.keys())),
        only_reference=tuple(sorted(reference.keys() - values.keys())),
    )


def _t_test(differences: np.ndarray) -> tuple[float | None, float | None, float | None]:
    """The interval and p of the t test of a mean of zero."""
    if len(differences) < 2:
        return None, None, None
    if not differences.any():
        return 0.0, 0.0, 1.0
    if _constant(differences):
        return None, None, None
    test: Any = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high), float(test.pvalue)


def sign_flip_p(differences: np.ndarray) -> float:
    r"""The two-sided p of the sign-flip permutation test: the share of signs with :math:`|\sum \pm d| \ge |\sum d|`.

    Exact up to :data:`MOST_EXACT` differences. For more, :data:`FLIPS` random choices (seed 0) and the one observed
    (Phipson and Smyth 2010, arXiv 1603.05766): :math:`(1 + \#) / (1 + \text{FLIPS})`.

    Args:
        differences: One for every seed.
    """
    if len(differences) <= MOST_EXACT:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(_as_far(sums, differences).mean())
    draw = np.random.default_rng(0)
    sums = np.zeros(FLIPS)
    for difference in differences:
        sums += difference * draw.choice([-1.0, 1.0], FLIPS)
    return float((1 + _as_far(sums, differences).sum()) / (1 + FLIPS))


def smallest_p(count: int) -> float:
    r"""The smallest p of :func:`sign_flip_p`: :math:`2 / 2^n` of all signs, :math:`1 / (1 + \text{FLIPS})` of some.

    Args:
        count: How many differences there are, n.
    """
    return 2 / 2**count if count <= MOST_EXACT else 1 / (1 + FLIPS)


def _as_far(sums: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """Which sums are as far from zero as the observed one, or farther; equal ones may differ by rounding."""
    return np.abs(sums) >= abs(float(differences.sum())) - ROUNDING * float(np.abs(differences).sum())


def brown_forsythe(a: Sequence[float], b: Sequence[float]) -> float | None:
    r"""The p of the test that two groups spread alike (Brown and Forsythe 1974).

    It is the analysis of variance of :math:`z_i = |x_i - \text{median}(x)|`. None where that is
    undefined: fewer than two values in a group, or no z that differs from the others of its group.

    Args:
        a: The values of one group.
        b: Those of the other.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in (a, b)]
    if min(map(len, groups)) < 2:
        return None
    if all(_constant(group) or _constant(np.abs(group - np.median(group))) for group in groups):
        return None
    return float(stats.levene(*groups, center="median").pvalue)


def corrected(ps: Sequence[float | None], how: Correction = "holm") -> list[float | None]:
    r"""Values of p, corrected for how many there are; None stays None and does not count.

    With :math:`p_{(1)} \le \dots \le p_{(m)}`, Holm (1979) gives :math:`\max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})`,
    which bounds the chance of any false alarm; Benjamini and Hochberg (1995) give
    :math:`\min_{j \ge i} \min(1, m\, p_{(j)} / j)`, which bounds the expected share of false alarms among all alarms.

    Args:
        ps: In any order.
        how: ``"holm"`` or ``"benjamini-hochberg"``.

    Raises:
        ValueError: If there is no such correction.
    """
    if how not in get_args(Correction):
        raise ValueError(f"The correction must be one of {', '.join(get_args(Correction))}; got {how!r}.")
    known = [i for i, p in enumerate(ps) if p is not None]
    raw = np.array([ps[i] for i in known], dtype=np.float64)
    result: list[float | None] = [None] * len(ps)
    for i, p in zip(known, _holm(raw) if how == "holm" else _benjamini_hochberg(raw), strict=True):
        result[i] = float(p)
    return result


def _holm(ps: np.ndarray) -> np.ndarray:
    order = np.argsort(ps, kind="stable")
    steps = np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1))
    result = np.empty_like(ps)
    result[order] = np.minimum(steps, 1.0)
    return result


def _benjamini_hochberg(ps: np.ndarray) -> np.ndarray:
    return stats.false_discovery_control(ps) if len(ps) else ps
