"""What every landscape promises, as a check on a user's own model and data; our own tests run it over ours."""

import dataclasses
import itertools
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.corruption import IGNORED
from ..masks import random_fraction
from ..models import device_of, infer_objective, measuring, state_of
from ..objectives import Batch, LossFunction, check_batch
from .directions import Direction, inner, random_directions, restrict
from .evaluate import Evaluator
from .scan import scan_landscape
from .surface import Landscape

logger = logging.getLogger(__name__)

POINTS = (5, 3)
"""Not square, so that mixed-up axes show."""

SPAN = 0.2
"""Far enough for the loss to change, and near enough for rounding errors to stay what they are."""

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
TOLERANCE_OF_HALF_PRECISION = 5e-2

REDRAWN = (
    "A second pass over the data gives other batches: the loader draws masked tokens anew, or shuffles; {effect}. Draw "
    "them once, as in batches = list(loader), or make them with load_batches."
)

ROUNDINGS = 4
"""So many roundings of the largest weight may lie between where a weight is and where it should be."""


@dataclass(frozen=True)
class Displacement:
    """How far the weights at a grid point are from where they should be.

    Attributes:
        value: max |found − wanted| / max |wanted| of the worst parameter.
        parameter: Its name; None where all are exact.
    """

    value: float = 0.0
    parameter: str | None = None


@dataclass(frozen=True)
class LandscapeReport:
    """What :func:`check_landscape` found; ``str()`` gives a table and a verdict.

    Attributes:
        model: Class of the model.
        objective: Name of the objective.
        precision: Of the parameters.
        tolerance: What a relative difference of losses may be.
        num_examples: How many examples the losses are of.
        loss: At step 0.
        plain_loss: By a loop that shares no code with the engine.
        repeat: Largest |second − first| / max(1, |first|) of the losses of two scans; 0 if bit-identical.
        resumed: The same of a scan that was stopped half-way; infinite if it could not be resumed.
        swapped: The same of the transposed scan along the two directions in the other order.
        displaced: Of the weights at grid points, with a mask and with its complement.
        exactness: What ``displaced`` may be: some rounding errors.
        unaccounted: Entries whose directions with a mask and with its complement do not add up to the whole one.
        changed: Parameters, buffers and flags that are not what they were before.
        redrawn: Batches that are others when the data is gone through once more.
    """

    model: str
    objective: str
    precision: str
    tolerance: float
    num_examples: int
    loss: float
    plain_loss: float
    repeat: float
    resumed: float
    swapped: float
    displaced: Displacement
    exactness: float
    unaccounted: int
    changed: tuple[str, ...] = ()
    redrawn: int = 0

    @property
    def ok(self) -> bool:
        """Whether landscapes of this model and data can be trusted."""
        return not self.failures

    @property
    def centre(self) -> float:
        """|loss − plain loss| / max(1, |plain loss|)."""
        return _difference(np.array(self.loss), np.array(self.plain_loss))

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for everything that is wrong: what it means, and what to do."""
        return tuple(_failures(self))

    def __str__(self) -> str:
        """A table of what was compared, and the verdict."""
        examples = "1 example" if self.num_examples == 1 else f"{self.num_examples} examples"
        kind = f"{self.objective}, {examples}, {self.precision}, tolerance {self.tolerance:g}"
        return "\n".join([f"Landscapes of {self.model}: {kind}", *aligned(list(_rows(self))), *_verdict(self)])


def check_landscape(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    objective: str | LossFunction | None = None,
    num_examples: int = 8,
    tolerance: float | None = None,
) -> LandscapeReport:
    """Whether landscapes of this model and data are what they should be.

    1. The loss at step 0 is that of a plain loop over the batches.
    2. Two scans are bit-identical, and so is one that is stopped half-way and resumed.
    3. Swapped directions give the transposed surface.
    4. At a grid point every weight is where the formula puts it: tied ones are moved once, unselected ones rest.
    5. The directions with a mask and with its complement add up to the whole one.
    6. The model is bit-identical afterwards.
    7. The batches are the same when they are gone through once more.

    That takes some fifty evaluations of the loss, and about six times the memory of the weights.

    Args:
        model: Any model that :func:`fisherscope.scan_landscape` takes; it runs in its own dtype.
        batches: As for :func:`fisherscope.scan_landscape`.
        objective: As for :func:`fisherscope.scan_landscape`.
        num_examples: How many examples to take from the beginning of the batches.
        tolerance: What a relative difference between losses may be that need not be bit-identical; None takes 1e-6 for
            float64, 1e-4 for float32, 5e-2 for others.

    Raises:
        ValueError: If ``num_examples`` is below 1, or as :func:`fisherscope.scan_landscape` does.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}.")
    objective = objective or infer_objective(model)
    taken = list(first_examples(batches, num_examples))
    redrawn = num_redrawn(taken, batches, num_examples)
    logger.info("The landscape is scanned four times, on %d x %d points.", *POINTS)
    before = state_of(model)

    def scanned(points: Sequence[int], **options: Any) -> Landscape:
        return scan_landscape(model, taken, objective=objective, span=SPAN, points=points, progress=False, **options)

    whole = scanned(POINTS)
    again = scanned(POINTS)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "landscape.h5.part")
        _half(whole).save(part)
        try:
            resumed = _difference(scanned(POINTS, checkpoint=part).loss, whole.loss)
        except ValueError:  # begun with other weights: the model changed
            resumed = math.inf
    first, second = random_directions(model, 2, seed=0)
    swapped = scanned(POINTS[::-1], directions=[second, first])
    with measuring(model):
        plain_loss = _plain_loss(model, taken, objective)
        displaced, unaccounted = _displacement(model, taken[:1], objective, (first, second))
    after = state_of(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return LandscapeReport(
        model=type(model).__name__,
        objective=whole.objective,
        precision=str(dtype).removeprefix("torch."),
        tolerance=TOLERANCES.get(dtype, TOLERANCE_OF_HALF_PRECISION) if tolerance is None else tolerance,
        num_examples=sum(map(size_of, taken)),
        loss=whole.centre_loss,
        plain_loss=plain_loss,
        repeat=_difference(again.loss, whole.loss),
        resumed=resumed,
        swapped=_difference(swapped.loss.T, whole.loss),
        displaced=displaced,
        exactness=ROUNDINGS * torch.finfo(dtype).eps,
        unaccounted=unaccounted,
        changed=tuple(name for name in before | after if before.get(name) != after.get(name)),
        redrawn=redrawn,
    )


def first_examples(batches: Iterable[Batch], num_examples: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the first examples, the last one cut short."""
    left = num_examples
    for batch in batches:
        check_batch(batch)
        part = {name: value[:left] for name, value in batch.items()}
        yield part
        left -= size_of(part)
        if not left:
            return


def num_redrawn(taken: Sequence[Batch], batches: Iterable[Batch], num_examples: int) -> int:
    """How many of the batches taken are others when the data is gone through once more; an iterator ends with them."""
    if isinstance(batches, Iterator):
        return 0
    pairs = itertools.zip_longest(taken, first_examples(batches, num_examples), fillvalue={})
    return sum(not _are_equal(*pair) for pair in pairs)


def _are_equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def size_of(batch: Batch) -> int:
    """Number of examples."""
    return len(next(iter(batch.values())))


def _half(landscape: Landscape) -> Landscape:
    """The landscape as if the scan had been stopped in the middle of a row."""
    done = np.arange(landscape.loss.size).reshape(landscape.loss.shape) < landscape.loss.size // 2
    return dataclasses.replace(landscape, loss=np.where(done, landscape.loss, np.nan), evaluated=done)


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Max |found − wanted| / max(1, |wanted|); values that are not finite must be the same."""
    if np.array_equal(found, wanted, equal_nan=True):
        return 0.0
    with np.errstate(invalid="ignore"):
        each = np.abs(found - wanted) / np.maximum(1, np.abs(wanted))
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    largest = float(np.where(same, 0, each).max())
    return largest if math.isfinite(largest) else math.inf


@torch.no_grad()
def _plain_loss(model: nn.Module, batches: Sequence[Batch], objective: str | LossFunction) -> float:
    """The loss per scored token from all logits, label by label: the reference must not share code with the engine."""
    terms = [term for batch in batches for term in _plain_terms(model, batch, objective)]
    return float(np.sum(terms) / len(terms)) if terms else math.nan


def _plain_terms(model: nn.Module, batch: Batch, objective: str | LossFunction) -> list[float]:
    inputs = {name: value.to(device_of(model)) for name, value in batch.items()}
    if callable(objective):
        return objective(model, inputs).tolist()
    if objective == "question-answering":
        ends = {end: inputs.pop(f"{end}_positions") for end in ("start", "end")}
        output: Any = model(**inputs)
        read = inputs.get("attention_mask", torch.ones_like(output.start_logits)) != 0
        all_logits = [getattr(output, f"{end}_logits").masked_fill(~read, -math.inf) for end in ends]
        return [t for logits, labels in zip(all_logits, ends.values(), strict=True) for t in _terms(logits, labels)]
    labels = inputs["labels"]
    if objective != "seq2seq-lm" or "decoder_input_ids" in inputs:  # else the model makes the decoder's input of them
        del inputs["labels"]
    logits = model(**inputs).logits
    if objective == "regression":
        return (logits[:, 0].double() - labels).square().tolist()
    if objective == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return _terms(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def _terms(logits: Tensor, labels: Tensor) -> list[float]:
    pairs = zip(logits.double(), labels.tolist(), strict=True)
    return [float(row.logsumexp(0) - row[label]) for row, label in pairs if label != IGNORED]


@torch.no_grad()
def _displacement(
    model: nn.Module, batches: Sequence[Batch], objective: str | LossFunction, directions: tuple[Direction, Direction]
) -> tuple[Displacement, int]:
    """How far weights are from where they should be, and what a mask and its complement leave out or have twice."""
    mask = random_fraction(model, 0.5, seed=0)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = [[restrict(d, half.for_model(model)) for d in directions] for half in (mask, ~mask)]
    unaccounted = sum(
        int((inside[name] + outside[name] != whole[name]).sum())
        for inside, outside, whole in zip(*parts, directions, strict=True)
        for name in inside
    )
    worst = Displacement()
    for moves in parts:
        if not all(inner(move, move) > 0 for move in moves):
            continue
        evaluator = Evaluator(model, batches, objective, moves)
        points = list(itertools.product((-SPAN, SPAN), repeat=2))
        try:
            for steps, _ in zip(points, evaluator(points), strict=True):
                worst = max(worst, _displaced(model, base, moves, steps), key=lambda found: found.value)
        finally:
            evaluator.restore()
    return worst, unaccounted


def _displaced(
    model: nn.Module, base: Mapping[str, Tensor], moves: Sequence[Direction], steps: tuple[float, ...]
) -> Displacement:
    """The worst parameter of the model as it stands."""
    worst = Displacement()
    for name, parameter in model.named_parameters():
        wanted = base[name].double()
        for step, move in zip(steps, moves, strict=True):
            wanted = wanted + step * move[name].double()
        off = float((parameter.double() - wanted).abs().max()) if parameter.numel() else 0.0
        relative = off / float(wanted.abs().max()) if off else 0.0
        if not relative <= worst.value:
            worst = Displacement(math.inf if math.isnan(relative) else relative, name)
    return worst


def _failures(report: LandscapeReport) -> Iterator[str]:
    if report.redrawn:
        yield REDRAWN.format(effect="each scan has a loss of its own, and none can be resumed")
    if report.changed:
        more = f" and {len(report.changed) - 10} more" if len(report.changed) > 10 else ""
        yield (
            f"The run changed the model ({', '.join(report.changed[:10])}{more}): reload it after a run, and look for "
            "a forward function that writes to the model."
        )
    if report.repeat:
        yield (
            f"Two scans differ by {report.repeat:.1g}: something in the model or the loss is random (dropout?), or "
            "depends on earlier calls, although the model is in eval mode; switch it off, since everything else "
            "differs for the same reason."
        )
        return
    if not math.isfinite(report.plain_loss):
        yield f"The loss of the model itself is {report.plain_loss}: check its weights, and the labels."
    elif not report.centre <= report.tolerance:
        yield (
            f"The loss at step 0 is {report.loss:.6g}, but that of a plain loop is {report.plain_loss:.6g}: the loss "
            "depends on earlier calls, or the logits of a position on which positions are asked for; mend the model, "
            "or report this."
        )
    if not report.displaced.value <= report.exactness:
        yield (
            f"At a grid point '{report.displaced.parameter}' is {report.displaced.value:.1g} away from where it should "
            "be: it shares its memory with another parameter, or the forward function writes to it; tie parameters by "
            "making them one object, and let forward only read."
        )
    if report.unaccounted:
        yield (
            f"The directions with a mask and with its complement do not add up for {report.unaccounted} entries: do "
            "not use masks for this model, and report this."
        )
    if report.resumed and not report.changed:
        yield f"A resumed scan differs by {report.resumed:.1g}: do not use checkpoints for this model, and report this."
    if not report.swapped <= report.tolerance:
        yield (
            f"Swapped directions change the surface by {report.swapped:.1g}: the precision of the model is too low for "
            "these losses (take --dtype float32), or the loss depends on earlier calls."
        )


def _rows(report: LandscapeReport) -> Iterator[tuple[str, str, str, str]]:
    def row(what: str, value: float, allowed: float, where: str = "") -> tuple[str, str, str, str]:
        return what, f"{value:.1e}", "ok" if value <= allowed else "WRONG", where

    def same(value: float) -> str:
        return "" if value else "bit-identical"

    finite = math.isfinite(report.plain_loss)
    yield row("loss at step 0 and by a plain loop", report.centre if finite else math.inf, report.tolerance)
    yield row("two scans", report.repeat, 0.0, same(report.repeat))
    yield row("resumed scan and whole scan", report.resumed, 0.0, same(report.resumed))
    yield row("swapped directions, transposed", report.swapped, report.tolerance)
    yield row("weights at grid points", report.displaced.value, report.exactness, report.displaced.parameter or "")
    missing = report.unaccounted
    yield "mask and its complement", "do not add up" if missing else "add up", "WRONG" if missing else "ok", ""
    yield "two passes over the data", "differ" if report.redrawn else "equal", "WRONG" if report.redrawn else "ok", ""
    changed = len(report.changed)
    yield "model afterwards", "changed" if changed else "unchanged", "WRONG" if changed else "ok", ""


def _verdict(report: LandscapeReport) -> Iterator[str]:
    if report.ok:
        yield "Verdict: landscapes of this model and data can be trusted."
        return
    yield "Verdict: landscapes of this model and data are not to be trusted as they are."
    yield from starmap("{}. {}".format, enumerate(report.failures, 1))
