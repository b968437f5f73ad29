"""Dropout sites as rows: what each is called, and which stand in one layer."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ..models import layer_of
from ._prepare import Sites, as_sequence
from ._prepare_scores import short_labels

if TYPE_CHECKING:
    from ..finetune.methods.guided_dropout import GuidedSite


def sites_shown(sites: "Sequence[GuidedSite]") -> Sites:
    """Guided sites in the order of the modules, grouped by layer.

    Raises:
        TypeError: If something else was given.
        ValueError: If there is none, or all scores are 0.
    """
    from ..finetune.methods.guided_dropout import GuidedSite  # here, as the methods take long to import

    given = as_sequence(sites, GuidedSite, "dropout_sites")
    if not any(site.score for site in given):
        raise ValueError("All scores are 0, so there is nothing to draw on a logarithmic axis.")
    names = list(dict.fromkeys(layer_of(site.name) for site in given))
    short = dict(zip(names, short_labels(names), strict=True))
    labels: list[str] = []
    layers: list[tuple[int, int]] = []
    for home, group in groupby(given, key=lambda site: layer_of(site.name)):
        places = [site.name.removeprefix(f"{home}.").removesuffix(".dropout") for site in group]
        layers.append((len(labels), len(labels) + len(places)))
        labels += [f"{short[home]}: {places[0]}", *places[1:]]
    zeros = [site.name for site in given if not site.score]
    return Sites(
        tuple(labels),
        tuple(site.name for site in given),
        tuple(layers),
        np.array([site.rate for site in given], dtype=float),
        np.array([site.score for site in given], dtype=float),
        (f"exactly 0 in {', '.join(zeros)}",) if zeros else (),
    )
