"""Guided dropout: less dropout where the Fisher information is high."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ...models import DropoutSite, backbone, backbone_prefix, dropout_sites, is_wrapped
from ...scores import FisherScores, check_scores
from ..parts import rates_set
from ..regularizer import Applied, Regularizer

logger = logging.getLogger(__name__)

By = Literal["rank", "score"]

SAME_DROPOUT = "both take the place of the dropout of the backbone"


@dataclass(frozen=True)
class GuidedSite:
    """A dropout site and what guides it.

    Attributes:
        name: Path of the dropout module, or of the attribute that holds the rate.
        score: Mean over the parameters of the site of their mean scores.
        rate: Share of the activations that is dropped.
    """

    name: str
    score: float
    rate: float


@dataclass(frozen=True)
class GuidedDropout(Regularizer):
    r"""The dropout sites of the backbone get their rates from Fisher scores, the lowest score the highest rate.

    .. math::  p_k = p_{\max} - (p_{\max} - p_{\min}) \frac{k}{n - 1}

    for the site with the :math:`k`-th lowest score, from 0, of :math:`n` sites. The score of a site is the mean over
    its parameters, whatever their sizes, of their mean scores; the dropout of the head stays. From arXiv 2406.14005;
    the defaults are those of its code: 0.099, 0.09625, ..., 0 for the 37 sites of BERT-base. The rates are written
    once, so that a step takes as long as with any other dropout.

    Attributes:
        scores: Of a model with the same backbone, whatever its head.
        highest: Rate of the site with the lowest score.
        lowest: Rate of the site with the highest score.
        by: Whether rates fall with the rank of the scores or linearly with the scores themselves.

    Raises:
        ValueError: If not 0 <= lowest <= highest < 1.
    """

    name: ClassVar[str] = "guided-dropout"
    excludes: ClassVar[Mapping[str, str]] = {"mixout": SAME_DROPOUT}

    scores: FisherScores
    highest: float = 0.099
    lowest: float = 0.0
    by: By = "rank"

    def __post_init__(self) -> None:
        """Refuse rates and scores that are none."""
        check_scores(self.scores)
        _check(self.highest, self.lowest, self.by)

    def sites(self, model: nn.Module) -> list[GuidedSite]:
        """The rates that the sites of a model get (:func:`guided_rates`)."""
        return guided_rates(self.scores, model, highest=self.highest, lowest=self.lowest, by=self.by)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Write the rates."""
        del optimizer
        sites = self.sites(model)
        rates = [site.rate for site in sites]
        logger.info("Guided dropout: %d sites, rates from %.4g to %.4g.", len(sites), max(rates), min(rates))
        with rates_set(dropout_sites(model), rates):
            yield Applied()


def guided_rates(
    scores: FisherScores, model: nn.Module, *, highest: float = 0.099, lowest: float = 0.0, by: By = "rank"
) -> list[GuidedSite]:
    r"""The rates of guided dropout, in the order of the modules.

    By rank: :math:`p_k = p_{\max} - (p_{\max} - p_{\min}) k / (n - 1)` for the :math:`k`-th lowest of :math:`n` scores,
    earlier sites first among equals. By score: :math:`p = p_{\max} - (p_{\max} - p_{\min}) (s - \min s) / (\max s -
    \min s)`. A site alone, and sites of one score by score, get the highest rate.

    Args:
        scores: Of a model with the same backbone. A parameter that they lack is left out of its site's mean.
        model: Whose sites.
        highest: Rate of the lowest score.
        lowest: Rate of the highest score.
        by: ``"rank"``, as in the code of arXiv 2406.14005, or ``"score"``.

    Raises:
        ValueError: If the backbone has no dropout site, or the scores do not fit it or know no parameter of a site.
    """
    _check(highest, lowest, by)
    sites = dropout_sites(model)
    if not sites and is_wrapped(model):
        raise ValueError(
            f"Guided dropout takes the model itself, but this is a {type(model).__name__} around it; give the model "
            "before it is wrapped, or get_base_model(), where scores of parameters with adapters are left out."
        )
    if not sites:
        raise ValueError(f"Guided dropout needs a model with dropout, but a {type(model).__name__} has none to guide.")
    means = _site_scores(scores, model, sites)
    shares = _ranks(means) if by == "rank" else _normalised(means)
    rates = [highest * (1 - share) + lowest * share for share in shares]  # exact at both ends
    return [GuidedSite(site.name, *pair) for site, *pair in zip(sites, means, rates, strict=True)]


def _check(highest: float, lowest: float, by: str) -> None:
    if not 0 <= lowest <= highest < 1:
        raise ValueError(f"Rates must have 0 <= lowest <= highest < 1, got lowest {lowest:g} and highest {highest:g}.")
    if by not in ("rank", "score"):
        raise ValueError(f"by must be 'rank' or 'score', got {by!r}.")


def _site_scores(scores: FisherScores, model: nn.Module, sites: list[DropoutSite]) -> list[float]:
    own_prefix = backbone_prefix(model)
    known = backbone(scores, scores.provenance.get("model", {}).get("prefix", own_prefix))
    parameters = backbone(dict(model.named_parameters()), own_prefix)
    means = {}
    for name in [name for name in parameters if name in known]:
        if known[name].shape != parameters[name].shape:
            raise ValueError(
                f"The scores do not fit this model: '{name}' has shape {tuple(known[name].shape)} there but "
                f"{tuple(parameters[name].shape)} in the model."
            )
        means[own_prefix + name] = float(known[name].mean(dtype=torch.float64))
    found = []
    for site in sites:
        values = [means[name] for name in site.parameters if name in means]
        if not values:
            raise ValueError(
                f"The scores have no parameter of the dropout site '{site.name}'; take scores of a model with the same "
                "backbone."
            )
        found.append(sum(values) / len(values))
    return found


def _ranks(values: list[float]) -> list[float]:
    """Ranks from 0 to 1, earlier values first among equals."""
    shares = [0.0] * len(values)
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        shares[index] = rank / max(len(values) - 1, 1)
    return shares


def _normalised(values: list[float]) -> list[float]:
    """Values mapped to 0 to 1; all 0 if they are the same."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
