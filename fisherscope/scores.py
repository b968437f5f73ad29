"""Fisher scores: one non-negative number per entry of a model, and how they were made."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from torch import Tensor

from . import distributed, storage
from ._typing import Float, Int
from .models import layer_of
from .stability import Quarters

FORMAT = "fisherscope.scores"

Estimator = Literal["empirical", "sampled", "exact", "squared-batch-mean", "absolute-gradient"]
Unit = Literal["sequence", "token"]
Reduction = Literal["mean", "sum"]

_PIECE = 2**20
"""Entries looked at in one go."""


@dataclass(frozen=True, eq=False)
class FisherScores(Mapping[str, Tensor]):
    r"""Diagonal Fisher information, one value per entry of every parameter.

    .. math::  F_i = \frac{1}{N} \sum_{n=1}^{N} \Big(\frac{\partial \ell_n}{\partial \theta_i}\Big)^2,
               \qquad \ell_n = -\log p(y_n \mid x_n, \theta)

    Attributes:
        tensors: Parameter name to scores in the parameter's own shape, in squared nats per squared unit of the
            parameter; float32, or float64 for a float64 model. Tied parameters appear once, under their first name.
        num_examples: :math:`N`, the number of terms averaged over: examples, or scored tokens for the unit ``"token"``.
        estimator: ``"empirical"`` takes :math:`y_n` from the data; the others are described in
            :class:`fisherscope.fisher.Estimand`.
        unit: ``"sequence"``: every example is one term of the sum; ``"token"``: every scored token is.
        reduction: How the scored tokens of an example make up :math:`\ell_n`: their ``"mean"`` or their ``"sum"``.
        provenance: Where the scores came from.
        first_half: Parameter name to the share, 0 to 1 as float16, of each entry's summed squares that comes from the
            first half of the examples (every other batch); None if the run did not keep halves apart.
        quarters: Sums kept apart at sampled entries, for :meth:`stability`; None if the run kept none.

    Raises:
        ValueError: If a score is negative or not finite, nothing was averaged, or the halves do not fit the scores.
    """

    tensors: Mapping[str, Float[Tensor, "..."]]
    num_examples: int
    estimator: Estimator = "empirical"
    unit: Unit = "sequence"
    reduction: Reduction = "mean"
    provenance: storage.Provenance = field(default_factory=dict)
    first_half: Mapping[str, Float[Tensor, "..."]] | None = None
    quarters: Quarters | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be a mean of squares."""
        if self.num_examples < 1:
            raise ValueError("Fisher scores are a mean over examples, but num_examples is 0.")
        for name, score in self.tensors.items():
            if not bool((score >= 0).all() & torch.isfinite(score).all()):
                wrong = score[~((score >= 0) & torch.isfinite(score))]
                raise ValueError(
                    f"Fisher scores are finite and cannot be negative, but '{name}' has {wrong.numel()} entries "
                    f"that are not, the first {wrong[0].item():.3g}."
                )
        if self.first_half is not None:
            self._check_first_half(self.first_half)

    def _check_first_half(self, shares: Mapping[str, Tensor]) -> None:
        if {name: share.shape for name, share in shares.items()} != {name: t.shape for name, t in self.items()}:
            raise ValueError("The first half of Fisher scores has the same parameters and shapes as all of them.")
        for name, share in shares.items():
            if not bool(((share >= 0) & (share <= 1)).all()):
                raise ValueError(f"The first half of Fisher scores is shares from 0 to 1, but '{name}' has others.")

    def __getitem__(self, name: str) -> Tensor:
        """The scores of one parameter."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names, in the model's order."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.tensors)

    def __repr__(self) -> str:
        """One line for notebooks."""
        return (
            f"FisherScores({len(self)} parameters, {self.num_entries:,} entries, {self.estimator}, "
            f"{self.num_examples:,} {self.terms})"
        )

    @property
    def terms(self) -> str:
        """What the scores are a mean over, in a word."""
        one, several = {"sequence": ("example", "examples"), "token": ("token", "tokens")}[self.unit]
        if self.estimator == "squared-batch-mean":
            one, several = "batch", "batches"
        return one if self.num_examples == 1 else several

    @property
    def num_entries(self) -> int:
        """Number of scalars scored."""
        return sum(score.numel() for score in self.values())

    def share_holding(self, share: float) -> float:
        """The smallest share of the entries that together hold ``share`` of the summed scores.

        Parameters that were drawn at random are left out. NaN if all others are 0, or there are none.
        """
        kept = self._pretrained()
        count = _count_holding(kept, share)
        return count / sum(score.numel() for score in kept) if count else float("nan")

    @property
    def zero_share(self) -> float:
        """The share of the entries whose score is 0, which no mask can tell apart.

        Parameters that were drawn at random are left out. NaN if there are no others.
        """
        kept = self._pretrained()
        entries = sum(score.numel() for score in kept)
        return 1 - sum(int(score.count_nonzero()) for score in kept) / entries if entries else float("nan")

    def _pretrained(self) -> list[Tensor]:
        return [score for name, score in self.items() if name not in self.new_parameters]

    def stability(self, fraction: float) -> float:
        """The expected overlap of the mask of the top ``fraction`` with that of a fresh draw of as many examples.

        The overlap is the share of the selected entries that both select. It is measured between the masks of halves
        and quarters of the examples and projected to all of them (:mod:`fisherscope.stability`); 1 is perfectly
        stable, ``fraction`` is chance. The examples are taken to be in random order, or to be all there is of a kind.

        Raises:
            ValueError: If the run kept no quarters or had fewer than four batches, or the fraction selects nothing.
        """
        if self.quarters is None:
            raise ValueError(
                "The stability of a mask is estimated from parts of the examples, which these scores do not keep "
                "apart; estimate them again with this version."
            )
        return self.quarters.expected_overlap(fraction)

    def halves(self) -> "tuple[FisherScores, FisherScores]":
        """The scores from either half of the examples, to half precision.

        Raises:
            ValueError: If the run did not keep halves apart, or only one of them has examples.
        """
        if self.first_half is None or self.quarters is None:
            raise ValueError(
                "These scores were estimated without keeping halves of the examples apart; estimate them again with "
                "halves=True."
            )
        counts = self.quarters.examples_by_half
        if min(counts) < 1:
            raise ValueError("Two halves need two batches with scored examples; use a smaller batch size.")
        first = {name: share.to(self[name].dtype) for name, share in self.first_half.items()}
        return self._half(first, counts[0]), self._half({name: 1 - share for name, share in first.items()}, counts[1])

    def _half(self, shares: Mapping[str, Tensor], count: int) -> "FisherScores":
        tensors = {name: self[name] * share * (self.num_examples / count) for name, share in shares.items()}
        return replace(self, tensors=tensors, num_examples=count, first_half=None, quarters=None)

    @property
    def new_parameters(self) -> list[str]:
        """Parameters that the checkpoint lacked and that were drawn at random."""
        return list(self.provenance.get("model", {}).get("new_parameters", []))

    def save(self, path: str | Path) -> None:
        """Write an HDF5 file, complete or not at all.

        Sharded scores are saved by all ranks together: rank 0 writes, and is sent one parameter after the other.
        """
        attributes = {key: getattr(self, key) for key in ("estimator", "unit", "reduction", "num_examples")}
        tensors = {"scores": self.tensors} | ({} if self.first_half is None else {"first_half": self.first_half})
        groups = {key: distributed.Gathered(parts, distributed.whole) for key, parts in tensors.items()}
        if self.is_sharded and not distributed.is_first():
            for parts in groups.values():
                parts.send()
            return
        with storage.atomic(path) as temporary:
            write(temporary, groups, self.quarters, attributes, self.provenance)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of every tensor, a ``DTensor``, as those of a sharded model are."""
        return any(map(distributed.is_sharded, self.values()))

    @staticmethod
    def load(path: str | Path) -> "FisherScores":
        """Read a file of :meth:`save`, or the ``.part`` of a run in progress.

        Raises:
            FileNotFoundError: If there is no such file.
            WrongFile: If it holds something else, another version, a negative score, or is damaged.
        """
        with storage.open_hdf5(path, FORMAT) as file:
            facts = storage.attributes(file)
            try:
                num_examples = int(facts["num_examples"])
                kind: dict[str, Any] = {key: str(facts[key]) for key in ("estimator", "unit", "reduction")}
                provenance = dict(json.loads(facts["provenance"]))
            except (KeyError, TypeError, ValueError) as error:
                raise storage.WrongFile(f"{path} has damaged attributes; make it again.") from error
            tensors, first_half = read_tensors(file), read_tensors(file, "first_half", "float16")
            if "progress" in facts:
                tensors, first_half = means([tensors, read_tensors(file, "second_half")], num_examples)
            quarters = Quarters.read(file)
        try:
            return FisherScores(
                tensors, num_examples, **kind, provenance=provenance, first_half=first_half or None, quarters=quarters
            )
        except ValueError as error:
            raise storage.WrongFile(f"{path} cannot be used: {error}") from error


By = Literal["layer", "parameter"]


def check_scores(scores: object) -> None:
    """Refuse what is given as scores and is none, such as their path.

    Raises:
        TypeError: Saying how to make them.
    """
    if not isinstance(scores, FisherScores):
        raise TypeError(
            f"Scores must be FisherScores, got a {type(scores).__name__}; take FisherScores.load(path) or "
            "estimate_fisher(model, batches)."
        )


@dataclass(frozen=True)
class Summary:
    """What a layer or a parameter scores.

    Attributes:
        name: Of the layer (:func:`fisherscope.models.layer_of`) or parameter.
        entries: How many scalars it has.
        mean: Score of an entry.
        max: Highest score of an entry.
        sum: Of all its entries.
        share: Of the sum over the model; NaN if that is 0.
        first_half_mean: Mean score of an entry by the first half of the examples alone, None if halves were not kept;
            with the next one, how far the mean can be trusted.
        second_half_mean: By the other half.
    """

    name: str
    entries: int
    mean: float
    max: float
    sum: float
    share: float
    first_half_mean: float | None
    second_half_mean: float | None


def summarize(scores: FisherScores, by: By = "layer", *, include_new: bool = False) -> list[Summary]:
    """Scores by layer or parameter, in the model's order.

    Parameters that were drawn at random are left out unless ``include_new``.

    Raises:
        ValueError: If ``by`` is unknown.
    """
    if by not in ("layer", "parameter"):
        raise ValueError(f"by must be 'layer' or 'parameter', got {by!r}.")
    groups: dict[str, list[str]] = {}
    for name in scores:
        if include_new or name not in scores.new_parameters:
            groups.setdefault(layer_of(name) if by == "layer" else name, []).append(name)
    whole = sum(_sum(scores[name]) for names in groups.values() for name in names)
    return [_summary(scores, group, names, whole) for group, names in groups.items()]


def _summary(scores: FisherScores, group: str, names: Sequence[str], whole: float) -> Summary:
    entries = sum(scores[name].numel() for name in names)
    total = sum(_sum(scores[name]) for name in names)
    highest = max((float(scores[name].max()) for name in names if scores[name].numel()), default=0.0)
    halves: tuple[float | None, float | None] = (None, None)
    if scores.first_half is not None and scores.quarters is not None:
        first = sum(_sum(scores[name].double() * scores.first_half[name]) for name in names)
        halves = tuple(  # pyright: ignore[reportAssignmentType]
            part * scores.num_examples / count / entries if count and entries else None
            for part, count in zip((first, total - first), scores.quarters.examples_by_half, strict=True)
        )
    mean, share = (total / size if size else float("nan") for size in (entries, whole))
    return Summary(group, entries, mean, highest, total, share, *halves)


def _sum(score: Tensor) -> float:
    return float(score.sum(dtype=torch.float64))


def _count_holding(scores: Sequence[Tensor], share: float) -> int:
    """How many of the highest entries it takes to hold a share of the sum of all; 0 if that is 0.

    Numbers that are not negative are in the order of their bit patterns. These are narrowed down from the highest 16
    bits to the lowest, with one pass over the entries for each 16, so that nothing is sorted or copied as a whole.
    """
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores) else torch.float32
    shifts = range(8 * dtype.itemsize - 16, -1, -16)
    target, above, held, prefix, equal, together = 0.0, 0, 0.0, 0, 0, 0.0
    for shift in shifts:
        counts, sums = _by_digit(scores, dtype, shift, prefix)
        filled = sums.nonzero().squeeze(1).flip(0)
        if not len(filled):
            return 0
        reached = held + sums[filled].cumsum(0)
        target = share * float(reached[-1]) if shift == shifts[0] else target
        place = min(int(torch.searchsorted(reached, target)), len(filled) - 1)
        above += int(counts[filled[:place]].sum())
        held = float(reached[place - 1]) if place else held
        equal, together = int(counts[filled[place]]), float(sums[filled[place]])
        prefix = prefix << 16 | int(filled[place])
    return above + min(max(math.ceil((target - held) / (together / equal)), 1), equal)


def _by_digit(
    scores: Sequence[Tensor], dtype: torch.dtype, shift: int, prefix: int
) -> tuple[Int[Tensor, "65536"], Float[Tensor, "65536"]]:
    """Number and sum of the entries by the 16 bits above ``shift``, of those whose higher bits are ``prefix``."""
    counts, sums = torch.zeros(2**16, dtype=torch.int64), torch.zeros(2**16, dtype=torch.float64)
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    for score in scores:
        for piece in score.flatten().split(_PIECE):
            values = piece.to("cpu", dtype).abs()  # a zero may have a sign
            digits = values.view(whole) >> shift
            inside = digits >> 16 == prefix
            digits, values = (digits[inside] & 0xFFFF), values[inside]
            counts += digits.bincount(minlength=2**16)
            sums += digits.bincount(values.double(), minlength=2**16)
    return counts, sums


def means(
    sums: Sequence[Mapping[str, Tensor]], num_examples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Scores from sums of squares, and the share of the first where there are two sets; on the CPU unless sharded.

    A second set may be empty.
    """
    first, *others = (part for part in sums if part)
    if not others:
        return {name: _on_host(total / num_examples) for name, total in first.items()}, None
    scores, shares = {}, {}
    for name, part in first.items():
        total = part + others[0][name]
        shares[name] = _on_host(torch.where(total > 0, part / total, 0).to(torch.float16))
        scores[name] = _on_host(total / num_examples)
    return scores, shares


def _on_host(tensor: Tensor) -> Tensor:
    return tensor if distributed.is_sharded(tensor) else tensor.cpu()


def write(
    path: Path,
    groups: Mapping[str, Mapping[str, Tensor]],
    quarters: Quarters | None,
    attributes: Mapping[str, Any],
    provenance: storage.Provenance,
) -> None:
    """Write the file of complete scores, or of sums in progress (attribute ``progress``).

    Args:
        path: Of the file.
        groups: ``scores`` and ``first_half``, or in progress the sums of each half as ``scores`` and ``second_half``.
        quarters: What :meth:`FisherScores.stability` needs.
        attributes: Of the file.
        provenance: Of the file.
    """
    with h5py.File(path, "w") as file:
        storage.write_header(file, FORMAT, provenance)
        for name, value in attributes.items():
            file.attrs[name] = value
        for key, tensors in groups.items():
            group = file.create_group(key, track_order=True)
            for name, tensor in tensors.items():
                group.create_dataset(name, data=tensor.detach().cpu().numpy())
        if quarters is not None:
            quarters.write(file)


def read_tensors(file: h5py.File, key: str = "scores", *dtypes: str) -> dict[str, Tensor]:
    """The datasets of a group of an open scores file, in the order they were written.

    Groups other than ``scores`` are optional: without one there are no datasets.

    Raises:
        WrongFile: If there are no scores, or one of the datasets is no floating-point array.
    """
    return dict(each_tensor(file, key, *dtypes))


def each_tensor(file: h5py.File, key: str = "scores", *dtypes: str) -> Iterator[tuple[str, Tensor]]:
    """The same, one after the other."""
    group, dtypes = file.get(key), dtypes or ("float32", "float64")
    if group is None and key != "scores":
        return
    if not isinstance(group, h5py.Group):
        raise storage.WrongFile(f"{file.filename} has no group '{key}'; make it again.")
    for name, dataset in group.items():
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype not in dtypes:
            found = f"{dataset.dtype} values" if isinstance(dataset, h5py.Dataset) else "no data set"
            raise storage.WrongFile(f"{file.filename} has {found} under '{name}', but {key} are {dtypes[0]}.")
        yield name, torch.from_numpy(np.asarray(dataset))
