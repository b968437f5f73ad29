"""``fisherscope info``: what a file holds and how it was made."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .. import storage
from ._common import add_general_flags

if TYPE_CHECKING:
    from ..landscape import Landscape
    from ..masks import Mask
    from ..scores import FisherScores


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One file."""
    parser.add_argument("file", type=Path, help="scores, a mask, a landscape, or the .part of a run in progress")
    add_general_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Print what the file holds, layer by layer, and its provenance."""
    found = storage.file_format(args.file)
    if found == "fisherscope.scores":
        from ..scores import FisherScores, by_layer

        scores = FisherScores.load(args.file)
        print(describe_scores(scores))
        _print_table("mean score", {layer: f"{mean:.3e}" for layer, mean in by_layer(scores).items()})
        provenance = scores.provenance
    elif found == "fisherscope.mask":
        from ..masks import Mask

        mask = Mask.load(args.file)
        print(mask)
        _print_table("selected", {layer: f"{share:.2%}" for layer, share in _density_by_layer(mask).items()})
        provenance = mask.provenance
    else:
        from ..landscape import Landscape

        landscape = Landscape.load(args.file)
        print(describe_landscape(landscape))
        provenance = landscape.provenance
    print(json.dumps(dict(provenance), indent=1, ensure_ascii=False))


def describe_scores(scores: "FisherScores") -> str:
    """Size, examples, and how concentrated the information is."""
    return f"{scores}; {100 * scores.share_holding(0.5):.3g} % of the entries hold half of it"


def describe_landscape(landscape: "Landscape") -> str:
    """Grid, centre, references, directions."""
    lines = [f"{landscape}, {int(landscape.evaluated.sum())} evaluated"]
    lines += [f"  {name}: {value:.4f} nats" for name, value in landscape.references.items()]
    lines += [f"  {a.name}: {a.kind}, {a.entries:,} entries move, ‖direction‖ {a.norm:.4g}" for a in landscape.axes]
    return "\n".join(lines)


def _density_by_layer(mask: "Mask") -> dict[str, float]:
    from ..models import layer_of

    counts: dict[str, list[int]] = {}
    for name, tensor in mask.items():
        selected, total = counts.setdefault(layer_of(name), [0, 0])
        counts[layer_of(name)] = [selected + int(tensor.sum()), total + tensor.numel()]
    return {layer: selected / total for layer, (selected, total) in counts.items()}


def _print_table(heading: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    print(f"{'layer':<{width}}  {heading}")
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
