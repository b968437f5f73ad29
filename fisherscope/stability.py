r"""How far a mask would change with fresh examples, from sums of squares kept in four parts.

Every batch goes to one of four *quarters* in turn, and their sums are kept apart at a fixed random selection of
entries. By what share the masks of quarters, and of pairs of quarters, overlap is measured; what masks of all N
examples would have in common is projected from both. With :math:`T` the function of Owen (1956, Ann. Math. Statist.
27), two normal variables of correlation :math:`\rho` are both in their upper tails of probability :math:`f` by a share

.. math::  o(\rho) = 1 - \frac{2}{f}\, T\Big(\Phi^{-1}(1 - f), \sqrt{\tfrac{1 - \rho}{1 + \rho}}\Big)

of that probability, so an overlap becomes a correlation (a Gaussian copula: only ranks matter) and a ratio of noise to
signal :math:`t = 1/\rho - 1`. Were the noise that of a mean of n numbers with a variance, :math:`t \propto 1/n`, and
doubling n would give :math:`\rho' = 2\rho / (1 + \rho)` (Spearman 1910 and Brown 1910, both Br. J. Psychol. 3). The
tails of squared gradients are too heavy for that, so the exponent is measured as well, between N/4 and N/2 examples:

.. math::  t(N) = t(N/2)\, 2^{-(3\gamma + 1)/4}, \qquad \gamma = \log_2 \frac{t(N/4)}{t(N/2)} \ \text{within}\ [-1, 1]

The step towards 1 is because the exponent rises with N as the central limit theorem takes hold. That it is a quarter
was chosen by eye on the built-in model, with tied and with untied embeddings, against disjoint fresh draws of 32 to
1600 examples. There the formula of Spearman and Brown promises up to 0.08 too much, and this one is right on average
to about 0.02. For other models it is a rule of thumb.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import h5py
import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtri, owens_t
from torch import Tensor

from . import storage
from ._typing import Bool, Float, Int

SAMPLED_ENTRIES = 2**18
"""Entries at most at which quarters are kept; a mask of 1 % then has 2,600 of them."""

PARTS = 4

_SEED = 1910
_PAIRS = list(itertools.combinations(range(PARTS), 2))
_SPLITS = [((0, other), tuple(p for p in (1, 2, 3) if p != other)) for other in (1, 2, 3)]


@dataclass(frozen=True, eq=False)
class Quarters:
    """Sums of squares over every fourth batch at sampled entries, and what was learned from them on the way.

    Attributes:
        sums: One row per quarter, float32, in squared nats per squared unit.
        num_examples: How many examples each quarter has summed.
        fractions: The masks whose stability was followed.
        history: Per moment: how many examples were done, then the expected overlap at each fraction.
    """

    sums: Float[Tensor, "4 entries"]
    num_examples: tuple[int, ...] = (0,) * PARTS
    fractions: tuple[float, ...] = ()
    history: tuple[tuple[float, ...], ...] = ()

    def updated(self, number: int, sums: Float[Tensor, "entries"], used: int) -> "Quarters":
        """With another row ``number``, which ``used`` further examples went to."""
        rows = torch.cat([self.sums[:number], sums[None].to(self.sums), self.sums[number + 1 :]])
        counts = tuple(n + used * (k == number) for k, n in enumerate(self.num_examples))
        return replace(self, sums=rows, num_examples=counts)

    def noted(self) -> "Quarters":
        """With the present stability at the end of the history."""
        now = (float(sum(self.num_examples)), *map(self.expected_overlap, self.fractions))
        return replace(self, history=(*self.history, now))

    def curve(self, fraction: float) -> list[tuple[int, float]]:
        """How the expected overlap at one of ``fractions`` went: (examples, overlap)."""
        column = 1 + self.fractions.index(fraction)
        return [(int(point[0]), point[column]) for point in self.history]

    @property
    def examples_by_half(self) -> tuple[int, int]:
        """How many examples the batches of even and of odd position had."""
        return sum(self.num_examples[::2]), sum(self.num_examples[1::2])

    @property
    def are_filled(self) -> bool:
        """Whether every quarter has examples."""
        return min(self.num_examples) > 0

    def has_mask_of(self, fraction: float) -> bool:
        """Whether a fraction selects some of the sampled entries and not all of them."""
        size = self.sums.shape[1]
        return 0 < round(fraction * size) < size

    def is_cut_among_zeros(self, fraction: float) -> bool:
        """Whether masks of a fraction take more entries than have a score above 0 in one of the quarters."""
        return round(fraction * self.sums.shape[1]) > int((self.sums > 0).sum(dim=1).min())

    def expected_overlap(self, fraction: float) -> float:
        """The share of a mask's entries that a mask from as many fresh examples would select too (formula above).

        Args:
            fraction: Of the entries, the highest ones, that the masks select.

        Raises:
            ValueError: If there are too few batches, or the fraction selects none or all of the sampled entries.
        """
        if not self.has_mask_of(fraction):
            raise ValueError(
                "The stability of a mask needs a fraction between 0 and 1 that selects some and not all of "
                f"{self.sums.shape[1]:,} sampled entries, got {fraction:g}."
            )
        if not self.are_filled:
            raise ValueError(
                f"The stability of a mask needs at least {PARTS} batches with scored examples, but these scores come "
                "from fewer; estimate them again from more examples or with a smaller batch size."
            )
        return self._projected(fraction)

    def _projected(self, fraction: float) -> float:
        sums, counts = self.sums.numpy(), self.num_examples
        single = [((a,), (b,)) for a, b in _PAIRS]
        (size4, noise4), (size2, noise2) = (_level(sums, counts, pairs, fraction) for pairs in (single, _SPLITS))
        measured = min(max(math.log(noise4 / noise2) / math.log(size2 / size4), -1.0), 1.0)
        return overlap_of(noise2 * (size2 / sum(counts)) ** ((3 * measured + 1) / 4), fraction)

    def write(self, file: h5py.File) -> None:
        """Put it into an open scores file, as group ``stability``."""
        group = file.create_group("stability")
        group.create_dataset("quarters", data=self.sums.numpy())
        group.attrs["num_examples"], group.attrs["fractions"] = self.num_examples, self.fractions
        points = np.array(self.history, dtype=np.float64).reshape(-1, 1 + len(self.fractions))
        group.create_dataset("history", data=points)

    @staticmethod
    def read(file: h5py.File) -> "Quarters | None":
        """What :meth:`write` put into a file, or None if nothing.

        Raises:
            WrongFile: If it is damaged.
        """
        if "stability" not in file:
            return None
        try:
            group, facts = file["stability"], storage.attributes(file["stability"])
            sums = torch.from_numpy(np.asarray(group["quarters"], dtype=np.float32))  # pyright: ignore[reportIndexIssue]
            points = np.asarray(group["history"], dtype=np.float64)  # pyright: ignore[reportIndexIssue]
            counts, fractions = tuple(map(int, facts["num_examples"])), tuple(map(float, facts["fractions"]))
            if (
                sums.ndim != 2
                or len(sums) != PARTS
                or len(counts) != PARTS
                or points.shape[1:] != (1 + len(fractions),)
            ):
                raise ValueError
            if not bool(((sums >= 0) & torch.isfinite(sums)).all()) or not np.isfinite(points).all():
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise storage.WrongFile(f"{file.filename} has a damaged group 'stability'; make it again.") from error
        return Quarters(sums, counts, fractions, tuple(tuple(map(float, point)) for point in points))


def sampled_positions(sizes: Mapping[str, int], most: int = SAMPLED_ENTRIES) -> dict[str, Int[Tensor, "_"]]:
    """Some entries of every parameter: all of a small model, an even random selection of a larger one's.

    Args:
        sizes: Parameter name to number of entries.
        most: How many to select; the selection depends on nothing but this and ``sizes``.
    """
    total = sum(sizes.values())
    chosen = torch.arange(total) if total <= most else _jittered(total, most)
    ends = torch.tensor(list(sizes.values()), dtype=torch.int64).cumsum(0)
    pieces = torch.tensor_split(chosen, torch.searchsorted(chosen, ends)[:-1])
    starts = [0, *ends.tolist()[:-1]]
    return {name: piece - start for name, piece, start in zip(sizes, pieces, starts, strict=True)}


def _jittered(total: int, count: int) -> Int[Tensor, "_"]:
    """One random position in each of ``count`` equal stretches, which takes no memory for the rest."""
    shift = torch.rand(count, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    return ((torch.arange(count, dtype=torch.float64) + shift) * (total / count)).long().clamp(max=total - 1).unique()


def top(values: Float[np.ndarray, "entries"], fraction: float) -> Bool[np.ndarray, "entries"]:
    """Mark exactly ``round(fraction * n)`` values, the highest, earlier ones first among equals."""
    count = round(fraction * len(values))
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    marked = values > threshold
    equal = np.flatnonzero(values == threshold)
    marked[equal[: count - int(marked.sum())]] = True
    return marked


def overlap_of(noise: float, fraction: float) -> float:
    """The overlap of two masks of a fraction whose scores have this ratio of noise to signal, :math:`o(1/(1+t))`."""
    return 1 - 2 * float(owens_t(-ndtri(fraction), math.sqrt(noise / (2 + noise)))) / fraction


def noise_of(overlap: float, fraction: float) -> float:
    """The inverse of :func:`overlap_of`, between 1e-9 and 1e3; an overlap of ``fraction`` or less is all noise."""
    low, high = 1e-9, 1e3
    if overlap <= overlap_of(high, fraction):
        return high
    if overlap >= overlap_of(low, fraction):
        return low
    logarithm = brentq(lambda t: overlap_of(math.exp(t), fraction) - overlap, math.log(low), math.log(high))
    return math.exp(float(logarithm))  # pyright: ignore[reportArgumentType]


def _level(
    sums: Float[np.ndarray, "4 entries"],
    counts: Sequence[int],
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    fraction: float,
) -> tuple[float, float]:
    """Noise to signal of the masks from some quarters, by their mean overlap, and from how many examples each is."""
    sides = {side for pair in pairs for side in pair}
    masks = {side: top(sums[list(side)].sum(axis=0), fraction) for side in sides}
    kept = round(fraction * sums.shape[1])
    overlap = float(np.mean([np.count_nonzero(masks[a] & masks[b]) / kept for a, b in pairs]))
    size = {side: sum(counts[k] for k in side) for side in sides}
    sizes = [2 / (1 / size[a] + 1 / size[b]) for a, b in pairs]  # the noise of a pair is the mean of theirs
    return math.exp(float(np.mean(np.log(sizes)))), noise_of(overlap, fraction)
