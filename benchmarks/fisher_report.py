"""The results of `fisher.py` as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

AXES = {"length": "T", "batch_size": "B", "examples": "N"}


def markdown(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    head = [
        f"# Cost of Fisher scores: {report['device']}, {report['precision']}",
        f"{report['date']}; {versions}. Medians of candidates that took turns; random weights, no padding. Memory is "
        "the peak on top of model, batch and accumulators (one number per entry; the plain pass holds as many "
        "gradients). Errors are the largest of any parameter, relative to its largest score, on a tiny model of the "
        "same kind, against the loop in float64.",
    ]
    cases = [part for name, case in report["cases"].items() for part in (f"## {name}", *_case(case["candidates"]))]
    curves = [part for name, curve in report["curves"].items() for part in (f"## BERT-base, {name}", _curve(curve))]
    return "\n\n".join([*head, *cases, *curves]) + "\n"


def _case(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    titles = ["candidate", "seconds", "/ plain", "memory, MiB", "/ plain", "error", "note"]
    yield _table(titles, [_row(name, row) for name, row in rows.items()])
    peers = {name: row for name, row in rows.items() if "error" in row and name != "fisherscope"}
    if peers and "seconds" in rows["fisherscope"]:
        ours = rows["fisherscope"]["seconds"]
        yield "Time over that of fisherscope: " + ", ".join(f"{n} {r['seconds'] / ours:.2f}" for n, r in peers.items())


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    if "failure" in row:
        return [name, "fails", "", "", "", "", f"`{row['failure']}`"]
    error, note = "", row["note"]
    if "error" in row:
        error = f"{row['error']:.0e}"
    if row.get("wrong"):
        note = f"**wrong** for {len(row['wrong'])} of {row['parameters']} parameters; {note}"
    peak = [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['peak_over_plain']:.2f}"] if "peak_bytes" in row else ["", ""]
    return [name, f"{row['seconds']:.3g}", f"{row['over_plain']:.2f}", *peak, error, note]


def _curve(curve: Mapping[str, Any]) -> str:
    fixed = ", ".join(
        f"{symbol}={curve[axis]}" for axis, symbol in AXES.items() if axis in curve and axis != curve["axis"]
    )
    rows = [
        [str(p[curve["axis"]]), f"{p['plain']:.3g}", f"{p['fisherscope']:.3g}", f"{p['over_plain']:.2f}"]
        for p in curve["points"]
    ]
    return _table([f"{AXES[curve['axis']]} ({fixed})", "plain, seconds", "fisherscope, seconds", "/ plain"], rows)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
