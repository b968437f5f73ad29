"""Checks that users can run on their own models; the same ones that our tests run over ours.

Shape names: B examples in a batch, T tokens.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import fisher
from ._typing import Bool
from .data.corruption import IGNORED
from .finetune.contract import check_regularizer as check_regularizer
from .landscape.contract import REDRAWN, aligned, first_examples, num_redrawn, size_of
from .landscape.contract import check_landscape as check_landscape
from .models import infer_objective, measuring, state_of
from .objectives import Batch, ExampleLosses, LossFunction, example_losses

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-1, torch.bfloat16: 1e-1}
TOLERANCE_OF_FLOAT64_WITH_LESS_INSIDE = 1e-6

ROUNDINGS = 2
"""A gradient of so many roundings of the largest one may be nothing else, as that of a key bias is."""


@dataclass(frozen=True)
class Largest:
    """The largest of one difference per example.

    Attributes:
        value: The difference.
        example: Which example has it, counted from 0 in the order of the batches; None where all are 0.
    """

    value: float = 0.0
    example: int | None = None

    def or_larger(self, value: float, example: int) -> "Largest":
        """This one, or that of another example where it is larger."""
        return self if value <= self.value else Largest(value, example)


@dataclass(frozen=True)
class EngineReport:
    """What :func:`check_engine` found; ``str()`` gives a table and a verdict.

    Attributes:
        model: Class of the model.
        objective: Name of the objective.
        precision: The model's dtype, and the lowest one that it computes in.
        tolerance: What a relative difference may be.
        num_examples: How many examples were compared.
        num_batched: How many of them share their batch with others.
        num_padded: How many of them are padded in their batch; None where no ``attention_mask`` tells.
        errors: By parameter, ‖fast − loop‖ / ‖loop‖ of the scores of the fast engine and of the loop. Entries that
            differ by no more than the square of a rounding error do not count.
        largest_errors: By parameter, max |fast − loop| / max(loop), in the same way.
        repeat: Σ|second − first| / Σ first of the scores of two runs of the fast engine; 0 if bit-identical.
        in_batch: Largest |loss in the batch − loss alone with the same padding| / max(1, loss).
        padded_loss: Largest |loss with padding − loss without| / max(1, loss).
        padded_scores: Largest Σ|score with padding − score without| / Σ score without, of single examples.
        scored_padding: Examples that have labels on padding.
        by_loop: Parameters that the fast engine does one example at a time: exact, but slow.
        zero: Parameters that no example has a gradient for.
        changed: Parameters, buffers and flags that are not what they were before.
        redrawn: Batches that are others when the data is gone through once more: no fault of the engine, but scores
            differ from run to run.
    """

    model: str
    objective: str
    precision: str
    tolerance: float
    num_examples: int
    num_batched: int
    num_padded: int | None
    errors: Mapping[str, float]
    largest_errors: Mapping[str, float]
    repeat: float
    in_batch: Largest
    padded_loss: Largest
    padded_scores: Largest
    scored_padding: tuple[int, ...] = ()
    by_loop: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    redrawn: int = 0

    @property
    def ok(self) -> bool:
        """Whether the fast engine can be trusted with this model and data."""
        return not self.failures

    @property
    def wrong(self) -> tuple[str, ...]:
        """Parameters for which the fast engine differs from the loop, the worst first."""
        beyond = [name for name, error in self.errors.items() if not error <= self.tolerance]
        return tuple(sorted(beyond, key=lambda name: -self.errors[name]))

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for everything that is wrong: what it means, and what to do."""
        return tuple(_failures(self))

    def __str__(self) -> str:
        """A table of what was compared, and the verdict."""
        examples = "1 example" if self.num_examples == 1 else f"{self.num_examples} examples"
        kind = f"{self.objective}, {examples}, {self.precision}, tolerance {self.tolerance:g}"
        return "\n".join([f"{self.model}: {kind}", *aligned(list(_rows(self))), *_notes(self), *_verdict(self)])


def check_engine(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    objective: str | LossFunction | None = None,
    num_examples: int = 8,
    tolerance: float | None = None,
) -> EngineReport:
    """Whether the fast engine is exact on this model and data, and whether padding or batching changes anything.

    The fast engine runs twice, and every example has a backward pass of its own: as it stands in its batch and, where
    an ``attention_mask`` says what is padding, without it. That takes about five times the memory of the weights.

    Args:
        model: Any model that :func:`fisherscope.estimate_fisher` takes; it runs in its own dtype.
        batches: As for :func:`fisherscope.estimate_fisher`.
        objective: As for :func:`fisherscope.estimate_fisher`.
        num_examples: How many examples to take from the beginning of the batches.
        tolerance: What a relative difference may be; None takes 1e-9 for float64 (1e-6 where the model itself computes
            in less), 1e-4 for float32, 1e-1 for float16 and bfloat16.

    Raises:
        ValueError: If ``num_examples`` is below 1, or as :func:`fisherscope.estimate_fisher` does.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}.")
    objective = objective or infer_objective(model)
    taken = list(first_examples(batches, num_examples))
    redrawn = num_redrawn(taken, batches, num_examples)
    logger.info("The fast engine runs twice, then every example has a backward pass of its own.")
    before = state_of(model)
    fast = fisher.estimate_fisher(model, taken, objective=objective, halves=False, progress=False)
    repeat = _distance(fisher.estimate_fisher(model, taken, objective=objective, halves=False, progress=False), fast)
    with measuring(model):
        rules = fisher.rules_used(model, taken[0], objective)
        lowest = _lowest_precision(model, taken[0], objective)
        alone = _Alone()
        for batch in taken:
            alone.add(model, batch, objective)
    noise = alone.noise(torch.finfo(lowest).eps)
    loop = {name: total / alone.used for name, total in alone.sums.items()}
    errors = {name: _errors(fast.get(name), score, noise) for name, score in loop.items()}
    after = state_of(model)
    own = next(p.dtype for p in model.parameters() if p.requires_grad)
    return EngineReport(
        model=type(model).__name__,
        objective=objective if isinstance(objective, str) else getattr(objective, "__qualname__", "a function"),
        precision=_name(own) if own == lowest else f"{_name(own)} with {_name(lowest)} inside",
        tolerance=_tolerance(own, lowest) if tolerance is None else tolerance,
        num_examples=alone.used,
        num_batched=sum(size_of(batch) for batch in taken if size_of(batch) > 1),
        num_padded=alone.padded if "attention_mask" in taken[0] else None,
        errors={name: norm for name, (norm, _) in errors.items()},
        largest_errors={name: largest for name, (_, largest) in errors.items()},
        repeat=repeat,
        in_batch=alone.in_batch,
        padded_loss=alone.padded_loss,
        padded_scores=alone.padded_scores,
        scored_padding=tuple(alone.scored_padding),
        by_loop=tuple(name for name, rule in rules.items() if rule == "loop"),
        zero=tuple(name for name, score in loop.items() if not score.any()),
        changed=tuple(name for name in before | after if before.get(name) != after.get(name)),
        redrawn=redrawn,
    )


class _Precisions(TorchDispatchMode):
    """Notes the dtypes that a model computes in."""

    def __init__(self, seen: set[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.update(t.dtype for t in (result if isinstance(result, (tuple, list)) else [result]) if _is_real(t))
        return result


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in TOLERANCES


def _lowest_precision(model: nn.Module, batch: Batch, objective: str | LossFunction) -> torch.dtype:
    seen = {p.dtype for p in model.parameters() if p.requires_grad}
    with torch.no_grad(), _Precisions(seen):
        example_losses(model, batch, objective)
    return max(seen, key=lambda dtype: torch.finfo(dtype).eps)


def _tolerance(own: torch.dtype, lowest: torch.dtype) -> float:
    if own == torch.float64 and lowest == torch.float32:
        return TOLERANCE_OF_FLOAT64_WITH_LESS_INSIDE
    return TOLERANCES.get(lowest, max(TOLERANCES.values()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class _Alone:
    """One backward pass per example, written here once more: the reference must not share code with the engine.

    Attributes:
        sums: Parameter name to sum of squared gradients.
        used: Number of examples that had something to score.
        seen: Number of examples.
        padded: Number of examples with padding.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    used: int = 0
    seen: int = 0
    padded: int = 0
    in_batch: Largest = Largest()
    padded_loss: Largest = Largest()
    padded_scores: Largest = Largest()
    scored_padding: list[int] = field(default_factory=list)

    def add(self, model: nn.Module, batch: Batch, objective: str | LossFunction) -> None:
        """Run every example of a batch."""
        two_parts = _has_decoder(model, objective)
        with torch.no_grad():
            together = example_losses(model, batch, objective).mean.tolist()
        for n, in_batch in enumerate(together):
            example = {name: value[n : n + 1] for name, value in batch.items()}
            losses, squares = _squared_gradients(model, example, objective)
            self.in_batch = self.in_batch.or_larger(_loss_difference(in_batch, losses), self.seen)
            bare = _without_padding(example, two_parts=two_parts)
            if any(bare[name].shape != value.shape for name, value in example.items()):
                self.scored_padding += [self.seen] * (not two_parts and _scores_padding(example))
                self._compare(losses, squares, *_squared_gradients(model, bare, objective))
            for name, square in squares.items():
                self.sums[name] = self.sums[name].add_(square) if name in self.sums else square
            self.used += int(losses.count > 0)
            self.seen += 1

    def _compare(
        self, losses: ExampleLosses, squares: dict[str, Tensor], bare: ExampleLosses, bare_squares: dict[str, Tensor]
    ) -> None:
        self.padded += 1
        self.padded_loss = self.padded_loss.or_larger(_loss_difference(losses.mean.item(), bare), self.seen)
        self.padded_scores = self.padded_scores.or_larger(_distance(squares, bare_squares), self.seen)

    def noise(self, eps: float) -> float:
        """The square of a rounding error."""
        return (ROUNDINGS * eps) ** 2 * max(float(total.max()) for total in self.sums.values()) / self.used


def _squared_gradients(
    model: nn.Module, example: Batch, objective: str | LossFunction
) -> tuple[ExampleLosses, dict[str, Tensor]]:
    """The loss of one example, and its squared gradients; none if there is nothing to score."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = example_losses(model, example, objective)
    if not losses.count:
        return losses, {}
    gradients = torch.autograd.grad(losses.mean.sum(), list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), gradients, strict=True)
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    return losses, {
        name: torch.zeros_like(p, dtype=wide.get(p.dtype)) if g is None else g.to(wide.get(p.dtype, p.dtype)).square_()
        for (name, p), g in pairs
    }


def _loss_difference(loss: float, other: ExampleLosses) -> float:
    reference = other.mean.item()
    return abs(loss - reference) / max(1.0, abs(reference))


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Σ|a − b| / Σb over all parameters; scores are not negative."""
    if a.keys() != b.keys():
        return float("inf")
    return _ratio(_total(a[name] - b[name] for name in b), _total(b.values()))


def _total(tensors: Iterable[Tensor]) -> float:
    return sum((float(torch.linalg.vector_norm(t, 1)) for t in tensors), 0.0)


def _ratio(difference: float, size: float) -> float:
    if not difference:
        return 0.0
    return difference / size if size else float("inf")


def _errors(fast: Tensor | None, loop: Tensor, noise: float) -> tuple[float, float]:
    """Relative difference of the scores of one parameter: in the 2-norm, and of the largest entry."""
    if fast is None:
        return float("inf"), float("inf")
    loop = loop.to(fast.device)
    difference = (fast - loop).abs_()
    difference[difference <= noise] = 0
    norms = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (difference, loop))
    return _ratio(*norms), _ratio(float(difference.max()), float(loop.max()))


def _has_decoder(model: nn.Module, objective: str | LossFunction) -> bool:
    return objective == "seq2seq-lm" or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _without_padding(example: Batch, *, two_parts: bool) -> dict[str, Tensor]:
    """A batch of one example without what its masks leave out at either end; labels end with the last scored one."""
    decoder = {name for name in example if name.startswith("decoder_") or (two_parts and name == "labels")}
    read = example.get("decoder_attention_mask")
    if read is None and "labels" in decoder and example["labels"].ndim == 2:
        read = (example["labels"] != IGNORED).flip(1).cummax(1).values.flip(1)
    bare = dict(example)
    for names, mask in ((example.keys() - decoder, example.get("attention_mask")), (decoder, read)):
        if mask is not None and mask.ndim == 2:
            kept = _span(mask != 0)
            fitting = (name for name in names if example[name].ndim > 1 and example[name].shape[1] == mask.shape[1])
            bare |= {name: example[name][:, kept] for name in fitting}
    return bare


def _scores_padding(example: Batch) -> bool:
    mask, labels = example.get("attention_mask"), example.get("labels")
    return (
        mask is not None
        and labels is not None
        and mask.shape == labels.shape
        and bool(((mask == 0) & (labels != IGNORED)).any())
    )


def _span(mask: Bool[Tensor, "one tokens"]) -> slice:
    positions = mask[0].nonzero()
    return slice(int(positions[0]), int(positions[-1]) + 1) if len(positions) else slice(None)


def _failures(report: EngineReport) -> Iterator[str]:
    allowed = report.tolerance
    mixed = report.in_batch.value > allowed
    if report.changed:
        yield (
            f"The run changed the model: {_listed(report.changed, 'change')}; reload it after a run, and look for a "
            "forward function that writes to the model."
        )
    if report.repeat > allowed:
        yield (
            f"Two runs of the fast engine differ by {report.repeat:.1g}: something in the model is random although it "
            "is in eval mode (dropout?); switch it off, since everything else differs for the same reason."
        )
        return
    if mixed:
        yield (
            f"The loss of example {report.in_batch.example} alone differs by {report.in_batch.value:.1g} from that in "
            "its batch: the model or the loss lets examples interact (batch statistics, a mean over the batch); use "
            "--batch-size 1."
        )
    if report.wrong:
        yield (
            f"The fast engine differs from the loop for {_listed(report.wrong)}, by up to "
            f"{report.errors[report.wrong[0]]:.1g}: do not use it for this model; use --engine loop"
            + (", or stop the examples from interacting." if mixed else ", and report this.")
        )
    yield from _padding_failures(report)


def _padding_failures(report: EngineReport) -> Iterator[str]:
    if report.scored_padding:
        yield (
            f"{len(report.scored_padding)} examples, the first of them example {report.scored_padding[0]}, have labels "
            "where attention_mask is 0: the padding is scored; set those labels to -100."
        )
    elif report.padded_loss.value > report.tolerance:
        yield (
            f"Padding changes the loss of example {report.padded_loss.example} by {report.padded_loss.value:.1g}: the "
            "model does not mask padding, or counts positions from it; pad on the right, or use --batch-size 1."
        )
    elif report.padded_scores.value > report.tolerance:
        yield (
            f"Padding changes the scores of example {report.padded_scores.example} by {report.padded_scores.value:.1g} "
            "although its loss is the same: gradients flow through padding; use --batch-size 1."
        )


def _rows(report: EngineReport) -> Iterator[tuple[str, str, str, str]]:
    def row(what: str, value: float, where: str) -> tuple[str, str, str, str]:
        return what, f"{value:.1e}", "ok" if value <= report.tolerance else "WRONG", where

    def largest(found: Largest) -> str:
        return "" if found.example is None else f"example {found.example}"

    def worst(errors: Mapping[str, float]) -> tuple[float, str]:
        error, name = max((error, name) for name, error in errors.items())
        return error, name if error else ""

    yield row("two runs of the fast engine", report.repeat, "" if report.repeat else "bit-identical")
    yield row("fast engine and loop, norm", *worst(report.errors))
    value, name = worst(report.largest_errors)
    yield "fast engine and loop, largest entry", f"{value:.1e}", "", name
    if report.num_batched:
        yield row("loss in the batch and alone", report.in_batch.value, largest(report.in_batch))
    if report.num_padded:
        yield row("loss with and without padding", report.padded_loss.value, largest(report.padded_loss))
        yield row("scores with and without padding", report.padded_scores.value, largest(report.padded_scores))
    changed = len(report.changed)
    yield "model afterwards", "changed" if changed else "unchanged", "WRONG" if changed else "ok", ""


def _notes(report: EngineReport) -> Iterator[str]:
    if not report.num_batched:
        yield "Batching was not examined: every batch holds one example."
    if report.num_padded is None:
        yield "Padding was not examined: the batches have no attention_mask."
    elif not report.num_padded:
        yield "Padding was not examined: none of the examples is padded."
    if report.redrawn:
        yield REDRAWN.format(effect="scores differ from run to run, and none can be resumed")
    if report.by_loop:
        yield f"Exact, but one example at a time: {_listed(report.by_loop)}."
    if report.zero:
        yield f"Zero for every example, since the loss does not depend on it here: {_listed(report.zero)}."


def _verdict(report: EngineReport) -> Iterator[str]:
    if report.ok:
        harmless = ("batching",) * bool(report.num_batched) + ("padding",) * bool(report.num_padded)
        change = "changes" if len(harmless) == 1 else "change"
        rest = f"; {' and '.join(harmless)} {change} nothing" if harmless else ""
        yield f"Verdict: the fast engine is exact on this model and data{rest}."
        return
    yield "Verdict: not to be trusted as it is."
    yield from starmap("{}. {}".format, enumerate(report.failures, 1))


def _listed(names: tuple[str, ...], what: str = "parameter", shown: int = 10) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({', '.join(names[:shown])}{more})"
