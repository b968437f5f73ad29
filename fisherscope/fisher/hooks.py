"""The fast engine: one forward and one backward pass per batch.

It freezes the weights, so that autograd forms no weight gradient at all, and forms the per-example ones itself from
each operation's inputs and the gradient of its output.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..distributed import whole
from ..objectives import Batch, LossFunction, num_scored, predict
from .contributions import Contribution, accumulate
from .engines import Engine, loop_engine, size
from .estimand import Estimand, check_finite
from .plan import COPIES, Plan, PlanOutdated, make_plan
from .recorder import Recorder, Sink, frozen
from .rules import wide
from .sharding import own_part, zeros_of_whole

logger = logging.getLogger(__name__)

MOST_PLANS = 4
"""A model that does still other things goes to the loop for those batches."""


def hooks_engine(model: nn.Module, objective: str | LossFunction, estimand: Estimand = Estimand()) -> Engine:  # noqa: B008
    """The fast engine: one forward and one backward pass per batch, exact for every parameter.

    A parameter that no rule can do exactly goes to :func:`loop_engine`, and one log line names it.
    """
    return Hooks(model, objective, estimand)


def rules_used(model: nn.Module, batch: Batch, objective: str | LossFunction) -> dict[str, str]:
    """By which rules the fast engine forms the gradient of every scored parameter; ``"loop"``: one example at a time.

    A parameter that the loss does not depend on has ``"none"``.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engine = Hooks(model, objective, Estimand())
    engine(batch, {name: torch.zeros_like(p, dtype=wide(p).dtype) for name, p in parameters.items()})
    slow = engine.plans[0].by_loop if engine.plans else frozenset()
    return {n: "loop" if n in slow else " + ".join(sorted(engine.rules[n])) or "none" for n in parameters}


class Hooks:
    """The fast engine and its plans: a model may do one thing with padded batches and another with full ones."""

    def __init__(self, model: nn.Module, objective: str | LossFunction, estimand: Estimand) -> None:
        self.model, self.objective, self.estimand = model, objective, estimand
        self.loop = loop_engine(model, objective, estimand)
        self.plans: list[Plan] = []  # the one used last comes first
        self.rules: defaultdict[str, set[str]] = defaultdict(set)
        self.late: frozenset[str] = frozenset()  # parameters of which a plan did not know all uses

    def __call__(self, batch: Batch, sums: Mapping[str, Tensor]) -> int:
        """As for :class:`Engine`."""
        scored = num_scored(batch, self.objective)
        if not bool(scored.any()):
            return 0
        plan, units = self._fast(batch, scored, sums)
        if plan.by_loop:
            self.loop(batch, {name: sums[name] for name in plan.by_loop})
        return units

    def _fast(self, batch: Batch, scored: Tensor, sums: Mapping[str, Tensor]) -> tuple[Plan, int]:
        for plan in self._candidates(batch, scored, sums):
            with suppress(PlanOutdated):
                units, late = self._add(batch, sums, plan)
                others = [p for p in self.plans if p is not plan]
                self.plans = others if late else [plan, *others]
                self.late |= late
                return replace(plan, by_loop=plan.by_loop | late), units
        plan = Plan((), frozenset(sums))  # what the model does depends on more than the first examples show
        return plan, self._add(batch, sums, plan)[0]

    def _candidates(self, batch: Batch, scored: Tensor, sums: Mapping[str, Tensor]) -> Iterator[Plan]:
        yield from self.plans
        if len(self.plans) < MOST_PLANS:
            self.plans.append(self._planned(batch, scored, sums))
            yield self.plans[-1]

    def _add(self, batch: Batch, sums: Mapping[str, Tensor], plan: Plan) -> tuple[int, frozenset[str]]:
        """The number of units, and the parameters that turned out to need the loop after all."""

        def sink(name: str, contributions: list[Contribution]) -> None:
            accumulate(sums[name], contributions)

        recorder = self.recorder(plan, sums, size(batch), sink)
        with frozen(self.model):
            with recorder:
                predictions = predict(self.model, batch, self.objective)
                check_finite(predictions)
                terms = list(self.estimand.terms(predictions, batch))
            recorder.check_complete()
            for number, loss in enumerate(terms, 1):
                recorder.backward(loss.sum(), last=number == len(terms))
        if recorder.late and len(terms) > 1:  # some of their terms are in the sums already
            raise RuntimeError(
                f"The loss depends on '{min(recorder.late)}' in this batch, but did not in the first; use "
                "engine='loop' for this model."
            )
        return self.estimand.num_units(predictions), frozenset(recorder.late)

    def recorder(self, plan: Plan, sums: Mapping[str, Tensor], examples: int, sink: "Sink") -> "Recorder":
        """What sees one forward pass by a plan."""
        return Recorder(self.model, plan, sums, examples, sink, self.rules)

    def _planned(self, batch: Batch, scored: Tensor, sums: Mapping[str, Tensor]) -> Plan:
        def losses(examples: Batch) -> Tensor:
            return predict(self.model, examples, self.objective).losses().mean

        known = self.late.union(*(plan.by_loop for plan in self.plans))
        chosen = _telling(batch, scored)
        copies, examples = _taken(batch, [chosen[0]] * COPIES), _taken(batch, chosen)
        try:
            if self._mixes(examples, losses):
                return Plan((), frozenset(sums))
            plan = make_plan(self.model, losses, copies, list(sums), known)
            wrong = _Trial(self, plan, sums).wrong(examples)
            if wrong is None:  # the examples differ in what the model does with them; the copies do not
                wrong = _Trial(self, plan, sums).wrong(copies)
            if wrong is None:
                return Plan((), frozenset(sums))
            if wrong:
                plan = make_plan(self.model, losses, copies, list(sums), plan.by_loop | wrong)
        except ValueError:
            with torch.no_grad():  # so that the message counts examples as the batch does
                check_finite(predict(self.model, batch, self.objective))
            raise
        if new := plan.by_loop - known:
            logger.info(
                "%d parameters have no batched rule and are done one example at a time, for example '%s'.",
                len(new),
                min(new),
            )
        return plan

    def _mixes(self, examples: Batch, losses: Callable[[Batch], Tensor]) -> bool:
        """Whether the loss of an example depends on the others of its batch; alone it is what the loop says."""
        together = losses(examples).detach()
        alone = torch.cat([losses(_taken(examples, [n])).detach() for n in range(size(examples))])
        if not bool(torch.isfinite(alone).all()):
            raise ValueError("Every example needs a finite loss, but one has none; check the model's weights.")
        tolerance = _tolerance(self.model)
        mixes = not torch.allclose(together, alone, rtol=tolerance, atol=0.01 * tolerance)
        if mixes:
            logger.warning(
                "The loss of an example changes with the other examples of its batch (%.6g, but %.6g alone), so every "
                "example is scored alone, one at a time.",
                together[0],
                alone[0],
            )
        return mixes


def _tolerance(model: nn.Module) -> float:
    """Largest relative difference between two ways to compute the same, by the precision they are computed in."""
    parameter = next(model.parameters())
    if parameter.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(parameter.device.type):
        return 0.2
    if parameter.dtype == torch.float64:
        return 1e-5  # some models compute parts in float32
    return 3e-2 if parameter.is_cuda else 1e-3  # CUDA may multiply in TF32


def _telling(batch: Batch, scored: Tensor) -> list[int]:
    """Two examples with something to score; first a padded one, if any, since padding changes what models do.

    Of those, the longest: in a sequence of one token, attention has no gradient.
    """
    positions = scored.nonzero()[:, 0].tolist()
    if (mask := batch.get("attention_mask")) is not None:
        lengths = mask.flatten(1).sum(1).tolist()
        full = mask[0].numel()
        positions.sort(key=lambda n: (lengths[n] == full, -lengths[n]))
    return (positions * 2)[:2]


def _taken(batch: Batch, positions: list[int]) -> dict[str, Tensor]:
    return {name: value[torch.tensor(positions, device=value.device)] for name, value in batch.items()}


class _Trial:
    """One batch by a plan, compared with the loop parameter by parameter as they arrive."""

    def __init__(self, engine: Hooks, plan: Plan, sums: Mapping[str, Tensor]) -> None:
        self.engine, self.plan = engine, plan
        self.wanted = {name: torch.zeros_like(total) for name, total in sums.items() if name not in plan.by_loop}
        self.tolerance, self.floor = _tolerance(engine.model), 0.0
        self.good: set[str] = set()

    def wrong(self, examples: Batch) -> frozenset[str] | None:
        """The parameters for which the plan does not give what the loop gives; None if the plan does not fit.

        Raises:
            ValueError: If a gradient is not finite although the loss is.
        """
        model = self.engine.model
        loop_engine(model, self.engine.objective)(examples, self.wanted)
        for name, total in self.wanted.items():
            if not math.isfinite(norm(total)):
                raise ValueError(
                    f"Every example needs a finite gradient, but that of '{name}' is not, although the loss is; check "
                    "how the model treats padding."
                )
        self.floor = 1e-9 * max((norm(t) for t in self.wanted.values()), default=0.0)
        recorder = self.engine.recorder(self.plan, self.wanted, size(examples), self._compare)
        try:
            with frozen(model):
                with recorder:
                    loss = predict(model, examples, self.engine.objective).losses().mean.sum()
                recorder.check_complete()
                recorder.backward(loss, last=True)
        except PlanOutdated:
            return None
        never = {name for name, total in self.wanted.items() if norm(total) <= self.floor}
        return (frozenset(self.wanted) - self.good - never) | recorder.late

    def _compare(self, name: str, contributions: list[Contribution]) -> None:
        found = zeros_of_whole(self.wanted[name])
        accumulate(found, contributions)
        found = own_part(found, self.wanted[name])
        size, error = norm(self.wanted[name]), norm(found - self.wanted[name])
        if error <= self.tolerance * size + self.floor:
            self.good.add(name)


def norm(tensor: Tensor) -> float:
    """Of a whole tensor, sharded or not."""
    return float(whole(tensor.norm()))
