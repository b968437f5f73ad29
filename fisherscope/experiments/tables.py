"""Tables of a comparison: Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .statistics import FLIPS, MOST_EXACT

if TYPE_CHECKING:
    from .comparison import Comparison, Row
    from .statistics import Paired, Summary

NAMES = {"holm": "Holm", "benjamini-hochberg": "Benjamini-Hochberg"}

EPOCHS = {
    "last": "after the last epoch",
    "selected": "of the epoch that is best on the select examples",
    "best": "of the epoch that is best on these very examples, which is too good by the luck of the choice",
}

MISSING = "—"


@dataclass(frozen=True)
class _Table:
    """Cells as text, and which of them are bold."""

    title: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    bold: tuple[int, int] | None


def markdown(comparison: "Comparison") -> str:
    """A table for every group; what the numbers are comes before, what else is to be said after."""
    blocks = [" ".join(_explained(comparison))]
    for table in _tables(comparison):
        rows = [[_md(cell) for cell in cells] for cells in table.cells]
        if table.bold is not None:
            rows[table.bold[0]][table.bold[1]] = f"**{rows[table.bold[0]][table.bold[1]]}**"
        lines = [[_md(head) for head in table.heads], ["---"] + ["---:"] * (len(table.heads) - 1), *rows]
        blocks += [f"### {_md(table.title)}", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    if comparison.notes:
        blocks.append("\n".join(f"- {_md(note)}" for note in comparison.notes))
    return "\n\n".join(blocks) + "\n"


def latex(comparison: "Comparison") -> str:
    """The same for LaTeX; takes the packages booktabs and graphicx."""
    blocks = ["% \\usepackage{booktabs,graphicx}"]
    for table in _tables(comparison):
        rows = [[_tex(cell) for cell in cells] for cells in table.cells]
        if table.bold is not None:
            rows[table.bold[0]][table.bold[1]] = f"\\textbf{{{rows[table.bold[0]][table.bold[1]]}}}"
        heads = [_stacked(head) for head in table.heads]
        lines = [f"{' & '.join(cells)} \\\\" for cells in [heads, *rows]]
        columns = "l" + "r" * (len(heads) - 1)
        text = _tex(" ".join([f"{table.title}.", *_explained(comparison)]))
        blocks.append(
            "\n".join(
                [
                    "\\begin{table}",
                    "\\centering",
                    f"\\caption{{{text}}}",
                    "\\resizebox{\\textwidth}{!}{%",
                    f"\\begin{{tabular}}{{{columns}}}",
                    "\\toprule",
                    lines[0],
                    "\\midrule",
                    *lines[1:],
                    "\\bottomrule",
                    "\\end{tabular}}",
                    "\\end{table}",
                ]
            )
        )
    if comparison.notes:
        items = [f"\\item {_tex(note)}" for note in comparison.notes]
        blocks.append("\n".join(["\\begin{itemize}", *items, "\\end{itemize}"]))
    return "\n\n".join(blocks) + "\n"


def csv_lines(comparison: "Comparison") -> str:
    """A line for every row, with all numbers in full precision; what there is no number for is empty."""
    text = io.StringIO()
    rows = [_plain(row, comparison) for row in comparison.rows]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(row: "Row", comparison: "Comparison") -> dict[str, Any]:
    difference, how = row.paired, comparison.correction.replace("-", "_")
    tests = {
        name if kind is None else f"{name}_{kind}": getattr(row, name if kind is None else f"{name}_corrected")
        for name in ("p_t", "p_permutation", "p_spread")
        for kind in (None, how)
    }
    return {
        "model": row.group.model,
        "train_size": "all" if row.group.train_size is None else row.group.train_size,
        "task": row.group.task,
        "protocol": comparison.protocol,
        "metric": row.metric,
        "epoch": comparison.which,
        "arm": row.arm,
        "method": row.method,
        "runs": row.summary.runs,
        "measured": row.summary.measured,
        "mean": row.summary.mean,
        "std_ddof1": row.summary.std,
        "median": row.summary.median,
        "maximum": row.summary.maximum,
        "failed": row.summary.failed,
        "mean_without_failed": row.summary.mean_without_failed,
        "std_ddof1_without_failed": row.summary.std_without_failed,
        "reference": comparison.reference,
        "paired_seeds": difference and len(difference.seeds),
        "difference": difference and difference.mean,
        "low_95": difference and difference.low,
        "high_95": difference and difference.high,
        **tests,
        "smallest_p_permutation": difference and difference.smallest_p,
        "seconds_per_step": row.time,
        "time_ratio": row.time_ratio,
        "peak_memory_bytes": row.peak_memory,
    }


def _explained(comparison: "Comparison") -> list[str]:
    """What the numbers are."""
    how, reference = NAMES[comparison.correction], comparison.reference
    tests, holm = comparison.tested, comparison.correction == "holm"
    constant = "predicts one thing for all, " if comparison.which == "last" else ""
    return [
        f"Metrics {EPOCHS[comparison.which]}, on the report examples of the protocol {comparison.protocol}.",
        "± is the standard deviation over seeds (ddof 1), with trainings that failed where they have a number.",
        f"Differences to {reference} are means over common seeds, with the 95 % interval of the paired t test.",
        f"A training failed that crashed, diverged, {constant}is in the main metric of that epoch no better than the "
        "labels alone, or has a training loss still at theirs.",
        f"p is two-sided, and in brackets corrected for the tests of its kind in these tables ({how}): "
        f"{tests['p_t']} t tests, {tests['p_permutation']} sign-flip tests and {tests['p_spread']} of equal spread.",
        f"The sign-flip test of n seeds is exact up to n = {MOST_EXACT} and cannot go below 2/2ⁿ; of more seeds it "
        f"takes random flips and cannot go below 1/{1 + FLIPS}.",
        *(["Holm's correction multiplies that by the number of these tests."] if holm else []),
        "Time is that of an optimizer step (median), memory the most of all trainings, on a CPU that of the whole "
        "process, the program itself included.",
        f"Bold is the best mean, if all of the interval of its difference to {reference} is on the better side of 0 "
        "and not all of its trainings failed.",
    ]


def _tables(comparison: "Comparison") -> list[_Table]:
    return [_table(rows, comparison) for rows in comparison.groups.values()]


def _table(rows: "Sequence[Row]", comparison: "Comparison") -> _Table:
    columns = _columns(rows, comparison)
    cells = [[show(row) for show in columns.values()] for row in rows]
    best = _best(rows)
    mean = list(columns).index(MEAN)
    return _Table(f"{rows[0].group}: {rows[0].metric}", list(columns), cells, None if best is None else (best, mean))


MEAN = "mean ± std"


def _columns(rows: "Sequence[Row]", comparison: "Comparison") -> "Mapping[str, Callable[[Row], str]]":
    """What is shown of a row, by the head of the column; columns that say nothing here are left out."""
    how, reference = NAMES[comparison.correction], comparison.reference
    smallest = [row.paired.smallest_p for row in rows if row.paired and row.paired.smallest_p]
    columns: dict[str, Callable[[Row], str]] = {"method": lambda row: row.arm}
    columns["seeds"] = lambda row: str(row.summary.runs)
    columns[MEAN] = lambda row: _spread(row.summary.mean, row.summary.std)
    columns["median"] = lambda row: _number(row.summary.median)
    columns["max"] = lambda row: _number(row.summary.maximum)
    columns["failed"] = lambda row: _failed(row.summary)
    if any(row.summary.failed for row in rows):
        without = f"{MEAN} without failed"
        columns[without] = lambda row: _spread(row.summary.mean_without_failed, row.summary.std_without_failed)
    columns[f"minus {reference} [95 % interval]"] = lambda row: _difference(row.paired)
    if smallest:
        columns[f"p, paired t test ({how})"] = lambda row: _two(row.p_t, row.p_t_corrected)
        flip = f"p, sign-flip test{_floor(smallest)} ({how})"
        columns[flip] = lambda row: _two(row.p_permutation, row.p_permutation_corrected)
        columns[f"p of equal spread, Brown-Forsythe ({how})"] = lambda row: _two(row.p_spread, row.p_spread_corrected)
    if any(row.time is not None for row in rows):
        columns[f"time by {reference}'s"] = lambda row: MISSING if row.time_ratio is None else f"{row.time_ratio:.2f}"
        columns["peak memory, MiB"] = lambda row: (
            MISSING if row.peak_memory is None else f"{row.peak_memory / 2**20:,.0f}"
        )
    return columns


def _best(rows: "Sequence[Row]") -> int | None:
    """The row with the best mean, if it is better than the reference's seed by seed, too, and not of failures only."""
    sign = -1 if rows[0].less_is_better else 1
    known = [(sign * row.summary.mean, -i) for i, row in enumerate(rows) if row.summary.mean is not None]
    if not known:
        return None
    best = -max(known)[1]
    difference = rows[best].paired
    if rows[best].summary.failed == rows[best].summary.runs:
        return None
    if difference is None or difference.mean is None or not difference.excludes_zero:
        return None
    return best if sign * difference.mean > 0 else None


def _floor(smallest: Sequence[float]) -> str:
    """Where the p of the sign-flip test ends, from the arm with the most seeds to that with the fewest."""
    if max(smallest) <= 1e-3:
        return ""
    return f", at least {' to '.join(dict.fromkeys(f'{p:.4g}' for p in (min(smallest), max(smallest))))}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _spread(mean: float | None, std: float | None) -> str:
    return _number(mean) if std is None else f"{_number(mean)} ± {std:.3f}"


def _failed(summary: "Summary") -> str:
    lost = summary.runs - summary.measured
    return f"{summary.failed}, {lost} without a number" if lost else str(summary.failed)


def _difference(difference: "Paired | None") -> str:
    if difference is None:
        return "reference"
    if difference.mean is None:
        return MISSING
    mean = f"{difference.mean:+.3f}"
    return mean if difference.low is None else f"{mean} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def _two(p: float | None, corrected: float | None) -> str:
    return MISSING if p is None else f"{_p(p)} ({_p(corrected)})"


def _md(text: str) -> str:
    return re.sub(r"([|*<\\`])", r"\\\1", text)


_TEX = {
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "—": "---",
    "≥": "$\\geq$", "ⁿ": "$^n$", "<": "$<$", ">": "$>$", "|": "$|$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def _tex(text: str) -> str:
    escaped = "".join(_TEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w}-])-(?=\d)", "$-$", escaped)


def _stacked(head: str) -> str:
    """A head in lines of a few words."""
    lines: list[str] = []
    for word in head.split():
        if lines and len(lines[-1]) + len(word) < 16:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    shown = "\\\\".join(re.sub(r"^\[", "{[}", _tex(line)) for line in lines)  # else an option of the line break
    return f"\\shortstack[r]{{{shown}}}" if len(lines) > 1 else shown
