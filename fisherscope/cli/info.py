"""``fisherscope info``: what a file holds and how it was made; several files: how they compare."""

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import storage
from ._common import add_general_flags
from ._finished import FLAGS

if TYPE_CHECKING:
    from ..comparison import Comparison
    from ..landscape import Landscape
    from ..landscape.surface import Marker
    from ..masks import Mask
    from ..scores import FisherScores

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")

Table = list[dict[str, Any]]
"""Rows of a table: the same columns in each, the first one a name."""

_FORMATS = {"entries": ",", "selected": ",", "density": ".2%", "share": ".2%"}
_FORMATS |= dict.fromkeys(("mean", "max", "sum", "first_half_mean", "second_half_mean"), ".3e")
_FORMATS |= dict.fromkeys(("epoch", "seconds_per_step"), ".3g") | {"optimizer_state": ","}
_FORMATS |= {f"{which}{name}": ".4f" for which in ("", "best_", "select_", "selected_") for name in ("loss", *METRICS)}
_FORMATS |= dict.fromkeys(("overlap", "chance", "jaccard", "rank_correlation"), ".3f")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One file or more."""
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="scores, a mask, a landscape, the folder of a fine-tuning run, or the .part of a run in progress; two "
        "scores or two masks are compared; of several landscapes: how far each moved, and how much it rose",
    )
    parser.add_argument("--by", choices=("layer", "parameter"), default="layer", help="rows of the table")
    parser.add_argument("--fraction", type=float, default=0.1, help="of the masks that scores are compared by")
    parser.add_argument("--out", type=Path, help="write the table to this .csv file, with all digits")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing table")
    add_general_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Print what the file holds, layer by layer, and its provenance."""
    if args.out is not None and args.out.exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} exists; give --overwrite to replace it, or another --out.")
    if len(args.files) > 1 and all(storage.file_format(path) == "fisherscope.landscape" for path in args.files):
        _print_landscapes(args)
        return
    if len(args.files) > 2:
        raise ValueError(f"info takes one file, two to compare, or several landscapes; got {len(args.files)}.")
    lines, table, provenance = _one(args) if len(args.files) == 1 else _two(args)
    if args.out is not None and not table:
        raise ValueError(f"A table is made of scores and masks, but {args.files[0]} holds neither; leave out --out.")
    print("\n".join(lines))
    if table:
        print(*_aligned(table), sep="\n")
    print(*_described(provenance), sep="\n")
    if args.out is not None:
        _write(table, args.out)
        print(args.out)


def _one(args: argparse.Namespace) -> tuple[list[str], Table, Mapping[str, Any]]:
    (path,) = args.files
    found = storage.file_format(path)
    if found == "fisherscope.scores":
        from ..scores import FisherScores, summarize

        scores = FisherScores.load(path)
        table = [_renamed(asdict(row), args.by) for row in summarize(scores, args.by)]
        lines = [describe_scores(scores), *describe_stability(scores, args.fraction), *_left_out(scores.new_parameters)]
        return lines, table, scores.provenance
    if found == "fisherscope.mask":
        from ..masks import Mask

        mask = Mask.load(path)
        return [str(mask)], _selected(mask, args.by), mask.provenance
    if found == "fisherscope.results":
        from ..finetune import Results

        results = Results.load(path)
        return [str(results)], results.table(), {**results.settings, **results.fingerprints, **results.provenance}
    from ..landscape import Landscape

    landscape = Landscape.load(path)
    return [describe_landscape(landscape)], [], landscape.provenance


def _two(args: argparse.Namespace) -> tuple[list[str], Table, Mapping[str, Any]]:
    from ..comparison import compare

    first, second = (load_comparable(path) for path in args.files)
    result = compare(first, second, args.fraction, by=args.by)
    lines = [f"{path}: {noun}" for path, noun in zip(args.files, (first, second), strict=True)]
    rows = [_renamed(asdict(row), args.by) for row in (result.overall, *result.groups)]
    if result.fraction is None:
        rows = [{key: value for key, value in row.items() if key != "rank_correlation"} for row in rows]
    return [*lines, *_differences(result)], rows, {}


def _print_landscapes(args: argparse.Namespace) -> None:
    from ..landscape import Landscape
    from ..landscape.statistics import comparison_table, rows

    landscapes, names = [Landscape.load(path) for path in args.files], [path.stem for path in args.files]
    print(comparison_table(landscapes, names), end="")
    if args.out is not None:
        _write([asdict(row) for row in rows(landscapes, names)], args.out)
        print(args.out)


def load_comparable(path: Path) -> "FisherScores | Mask":
    """Scores or a mask, whichever a file holds.

    Raises:
        ValueError: If it holds something else.
    """
    found = storage.file_format(path)
    if found == "fisherscope.scores":
        from ..scores import FisherScores

        return FisherScores.load(path)
    if found == "fisherscope.mask":
        from ..masks import Mask

        return Mask.load(path)
    raise ValueError(f"Two sets of scores or two masks can be compared, but {path} is a {found.split('.')[-1]}.")


def describe_scores(scores: "FisherScores") -> str:
    """Size, examples, how concentrated the scores are, and how many of them are 0."""
    zeros = 100 * scores.zero_share
    if math.isnan(zeros):
        return f"{scores}; every scored parameter was drawn at random"
    if zeros == 100:
        return f"{scores}; every score is 0"
    unscored = f", {zeros:.3g} % have score 0" if zeros > 0 else ""
    return f"{scores}; {100 * scores.share_holding(0.5):.3g} % of the entries hold half of the summed scores{unscored}"


def describe_landscape(landscape: "Landscape") -> str:
    """Grid, centre, references, directions."""
    lines = [f"{landscape}, {int(landscape.evaluated.sum())} evaluated"]
    lines += [f"  {name}: {value:.4f} nats" for name, value in landscape.references.items()]
    lines += [f"  {a.name}: {a.kind}, {a.entries:,} entries move, ‖direction‖ {a.norm:.4g}" for a in landscape.axes]
    if found := landscape.prediction:
        known = f"  {found.measured:,} points measured"
        if not landscape.evaluated.all():
            known += (
                f"; errors of the others below the ceiling, by cross-validation: {found.median:.2%} (median), "
                f"{found.percentile95:.2%} (95 %), {found.maximum:.2%} (largest)"
            )
        lines.append(known)
    lines += [f"  {_marked(marker)}" for marker in landscape.markers]
    lines += [f"  {line}" for line in _measured(landscape.measures)]
    return "\n".join(lines)


def _marked(marker: "Marker") -> str:
    place = ", ".join(f"{step:.3g}" for step in marker.steps)
    losses = "" if marker.loss is None else f", loss {marker.loss:.4f}, in the plane {marker.nearest_loss:.4f}"
    return f"{marker.name}: at {place}, {marker.distance:.3g} off the plane{losses}"


def _measured(measures: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Measures as lines; lists of many numbers are only in the file."""
    lines = []
    for name, value in measures.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += _measured(value, f"{label}, ")
        elif isinstance(value, list):
            numbers = [x for row in value for x in (row if isinstance(row, list) else [row])]
            lines += [f"{label}: {', '.join(map(_short, numbers))}"] if len(numbers) <= 9 else []
        elif value is not None:
            bound = "at least " if name == "radius" and measures.get("steps", ()) is None else ""
            lines.append(f"{label}: {bound}{_short(value)}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _renamed(row: dict[str, Any], by: str) -> dict[str, Any]:
    return {by if key == "name" else key: value for key, value in row.items()}


def describe_stability(scores: "FisherScores", fraction: float) -> list[str]:
    """How far masks of usual sizes would change, or why the file cannot tell."""
    measure, quarters = "expected overlap of a mask of the top entries with that of a fresh draw", scores.quarters
    if quarters is None:
        return [f"no {measure}: these scores keep no parts of the examples apart"]
    if not quarters.are_filled:
        return [
            f"no {measure}: it needs at least {len(quarters.num_examples)} batches with scored examples; give more "
            "examples or a smaller --batch-size"
        ]
    fractions = sorted(f for f in {*quarters.fractions, fraction} if quarters.has_mask_of(f))
    tied = [f for f in fractions if quarters.is_cut_among_zeros(f)]
    shown = [f"{100 * f:g} %: {scores.stability(f):.3f}{' (ties)' if f in tied else ''}" for f in fractions]
    explained = (
        "; (ties): fewer entries than that have a score above 0 in a quarter of the examples, so that this is the "
        "overlap of ties broken by position"
    )
    return [f"{measure}: {', '.join(shown)}{explained if tied else ''}"] if shown else []


def _left_out(drawn: Sequence[str]) -> list[str]:
    return [f"left out, since drawn at random: {_listed(drawn)}"] if drawn else []


def _differences(result: "Comparison") -> list[str]:
    """What was compared, and what could not be."""
    lines = []
    if result.fraction is not None:
        sampled = "" if result.ranked == result.overall.entries else f", an even selection of {result.ranked:,} entries"
        lines.append(
            f"overlap of the top {100 * result.fraction:g} % (of each group); Spearman's rank correlation{sampled}"
        )
    for side, names in (("first", result.only_in_first), ("second", result.only_in_second)):
        lines += [f"only in the {side}: {_listed(names)}"] if names else []
    return [*lines, *_left_out(result.drawn)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} parameters, {names[0]} to {names[-1]}"


def _selected(mask: "Mask", by: str) -> Table:
    from ..models import layer_of

    counts: dict[str, list[int]] = {}
    for name, tensor in mask.items():
        group = layer_of(name) if by == "layer" else name
        entries, selected = counts.setdefault(group, [0, 0])
        counts[group] = [entries + tensor.numel(), selected + int(tensor.sum())]
    return [
        {by: group, "entries": entries, "selected": selected, "density": selected / entries if entries else math.nan}
        for group, (entries, selected) in counts.items()
    ]


def _aligned(table: Table) -> list[str]:
    """The table as lines, names to the left and numbers to the right; columns without a number are left out."""
    columns = [key for key in table[0] if any(row[key] is not None for row in table)]
    cells = [[key.replace("_", " ") for key in columns], *([_cell(key, row[key]) for key in columns] for row in table)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]


def _cell(column: str, value: Any) -> str:
    if value is None or value != value:
        return "\N{EN DASH}"
    return format(value, _FORMATS.get(column, ""))


def _write(table: Table, path: Path) -> None:
    if path.suffix != ".csv":
        raise ValueError(f"A table ends in .csv, got {path.name!r}; rename the output.")
    with storage.atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _described(provenance: Mapping[str, Any]) -> list[str]:
    """Provenance, one line for each key that says something; the command says the flags."""
    shown = {key: words for key, value in provenance.items() if key != FLAGS and (words := _words(value))}
    width = max(map(len, shown), default=0)
    return [f"{key:<{width}}  {words}" for key, words in shown.items()]


def _words(value: Any, most: int = 3) -> str:
    """A JSON value in a few words; nothing for what is empty."""
    if isinstance(value, Mapping):
        inner = {key: _words(v) for key, v in value.items()}
        return ", ".join(f"{key.replace('_', ' ')} {words}" for key, words in inner.items() if words)
    if isinstance(value, list):
        shown = ", ".join(map(_words, value[:most]))
        return shown if len(value) <= most else f"{shown} and {len(value) - most} more"
    return "" if value is None else str(value)
