"""Two sets of scores, or two masks, compared: do they agree on which entries matter?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ._typing import Float
from .masks import Mask, highest_units
from .models import layer_of
from .scores import By, FisherScores
from .stability import sampled_positions

MOST_RANKED = 2**21
"""Entries at most that rank correlations are computed over; of larger models an even random selection."""


@dataclass(frozen=True)
class Agreement:
    r"""How far two masks A and B agree on some entries, and two sets of scores on their order.

    Attributes:
        name: Of the layer or parameter, or ``"all"``.
        entries: How many there are.
        overlap: :math:`|A \cap B| / \min(|A|, |B|)`; NaN where one of them selects nothing.
        chance: The overlap of masks that have nothing to do with each other, :math:`\max(|A|, |B|)` by ``entries``.
        jaccard: :math:`|A \cap B| / |A \cup B|`; NaN where both select nothing.
        rank_correlation: Spearman's, of the scores, ties by mean rank; NaN where all scores are the same, None for
            masks.
    """

    name: str
    entries: int
    overlap: float
    chance: float
    jaccard: float
    rank_correlation: float | None


@dataclass(frozen=True)
class Comparison:
    """What two sets of scores, or two masks, have in common.

    Attributes:
        overall: Over all entries that both have. Of scores, A and B are the masks of the top ``fraction`` of these.
        groups: Over those of each layer or parameter, in the first one's order. Of scores, A and B are the masks of the
            top ``fraction`` within the layer or parameter.
        fraction: Of the masks of scores; None for masks.
        ranked: Entries that the rank correlations are over, an even random selection of a large model's; 0 for masks.
        only_in_first: Parameters that the second lacks or has in another shape.
        only_in_second: The other way round.
        drawn: Parameters left out because one side drew them at random.
    """

    overall: Agreement
    groups: tuple[Agreement, ...]
    fraction: float | None
    ranked: int
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    drawn: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The parameters of two nouns that have the same place in the backbone and shape, by the first one's names."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    drawn: tuple[str, ...]


def compare(a: FisherScores | Mask, b: FisherScores | Mask, fraction: float = 0.1, *, by: By = "layer") -> Comparison:
    """Compare two sets of scores, or two masks, that have at least parts of the backbone in common.

    Parameters are matched by their names inside the backbone and their shapes, so the models may have different heads.

    Args:
        a: Scores or a mask.
        b: Another one.
        fraction: Of scores, the share of the entries that the masks select; masks are compared as they are.
        by: Compare within every ``"layer"`` or every ``"parameter"`` as well.

    Raises:
        TypeError: If one is scores and the other a mask.
        ValueError: If no parameter is in both, ``fraction`` is outside (0, 1] or ``by`` is unknown.
    """
    if by not in get_args(By):
        raise ValueError(f"by must be 'layer' or 'parameter', got {by!r}.")
    pairs = matched(a, b)
    if isinstance(a, FisherScores):
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {fraction:g}.")
        whole, inside, ranks = _masks(pairs, fraction, "model"), _masks(pairs, fraction, by), ranked_entries(pairs)
    else:
        whole, inside, ranks = (pairs.first, pairs.second), (pairs.first, pairs.second), None
    groups: dict[str, list[str]] = {}
    for name in pairs.first:
        groups.setdefault(layer_of(name) if by == "layer" else name, []).append(name)
    return Comparison(
        _agreement("all", list(pairs.first), whole, ranks),
        tuple(_agreement(group, names, inside, ranks) for group, names in groups.items()),
        fraction if ranks else None,
        sum(len(first) for first, _ in ranks.values()) if ranks else 0,
        pairs.only_in_first,
        pairs.only_in_second,
        pairs.drawn,
    )


def matched(a: FisherScores | Mask, b: FisherScores | Mask) -> Pairs:
    """What two nouns have in common.

    Raises:
        TypeError: If one is scores and the other a mask.
        ValueError: If no parameter is in both.
    """
    for noun in (a, b):
        if not isinstance(noun, FisherScores | Mask):
            raise TypeError(f"Two sets of scores or two masks can be compared, got a {type(noun).__name__}.")
    if isinstance(a, Mask) != isinstance(b, Mask):
        raise TypeError(
            "Two sets of scores or two masks can be compared, got one of each; make a mask from the scores."
        )
    drawn = [name for noun in (a, b) if isinstance(noun, FisherScores) for name in noun.new_parameters if name in noun]
    ours, theirs = ({_place(name, noun): name for name in noun if name not in drawn} for noun in (a, b))
    if drawn and not (ours and theirs):
        raise ValueError(
            f"There is nothing to compare: every parameter of the {'second' if ours else 'first'} was drawn at random "
            "in one of the two; give scores of pretrained weights."
        )
    common = {ours[p]: theirs[p] for p in ours if p in theirs and a[ours[p]].shape == b[theirs[p]].shape}
    if not common:
        raise ValueError(
            f"There is nothing to compare: no parameter has the same name and shape in both, the first being "
            f"'{next(iter(a), '')}' and '{next(iter(b), '')}'; give files of the same architecture."
        )
    return Pairs(
        {name: a[name] for name in common},
        {name: b[other] for name, other in common.items()},
        tuple(name for name in ours.values() if name not in common),
        tuple(name for name in theirs.values() if name not in set(common.values())),
        tuple(dict.fromkeys(drawn)),
    )


def ranked_entries(
    pairs: Pairs,
) -> dict[str, tuple[Float[np.ndarray, "entries"], Float[np.ndarray, "entries"]]]:
    """Per parameter the scores of both sides at the same entries, ``MOST_RANKED`` at most, fixed by the sizes."""
    positions = sampled_positions({name: t.numel() for name, t in pairs.first.items()}, MOST_RANKED)

    def chosen(tensor: Tensor, at: Tensor) -> np.ndarray:
        return tensor.flatten()[at.to(tensor.device)].cpu().numpy()

    return {name: (chosen(pairs.first[name], at), chosen(pairs.second[name], at)) for name, at in positions.items()}


def spearman(a: Float[np.ndarray, "entries"], b: Float[np.ndarray, "entries"]) -> float:
    """Spearman's rank correlation, ties by mean rank; NaN if all values of one side are the same."""
    ranks = [rankdata(values) for values in (a, b)]
    if any(len(r) < 2 or r.min() == r.max() for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _place(name: str, noun: FisherScores | Mask) -> str:
    """The name inside the backbone."""
    return name.removeprefix((noun.provenance.get("model") or {}).get("prefix", ""))


def _masks(pairs: Pairs, fraction: float, within: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    first, second = (highest_units(side, fraction, within, "entry", [])[0] for side in (pairs.first, pairs.second))
    return first, second


def _agreement(
    group: str,
    names: list[str],
    masks: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ranks: Mapping[str, tuple[np.ndarray, np.ndarray]] | None,
) -> Agreement:
    a, b = (sum(int(mask[name].sum()) for name in names) for mask in masks)
    both = sum(int(torch.logical_and(masks[0][name], masks[1][name].to(masks[0][name].device)).sum()) for name in names)
    entries = sum(masks[0][name].numel() for name in names)
    correlation = None
    if ranks is not None:
        correlation = spearman(*(np.concatenate([ranks[name][side] for name in names]) for side in (0, 1)))
    return Agreement(
        group, entries, _share(both, min(a, b)), _share(max(a, b), entries), _share(both, a + b - both), correlation
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
