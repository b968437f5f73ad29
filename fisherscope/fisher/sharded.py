"""The fast engine for models that are sharded over ranks: what :mod:`.engines` does, in step with all other ranks."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import distributed
from ..objectives import Batch, LossFunction, num_scored, predict
from .contributions import Contribution, accumulate
from .engines import Engine, size
from .estimand import Estimand, check_finite
from .hooks import MOST_PLANS, Hooks
from .operations import Operation, Slot, Source
from .plan import Plan, PlanOutdated
from .recorder import Recorder, Sink, frozen
from .sharding import Shards, without_warnings_of_views, zeros_of_whole

logger = logging.getLogger(__name__)


def sharded_engine(model: nn.Module, objective: str | LossFunction, estimand: Estimand = Estimand()) -> Engine:  # noqa: B008
    """An engine that all ranks call together, with sums that are :class:`Shards`; a rank without a batch gives {}."""
    return _Sharded(model, objective, estimand)


class _Sharded(Hooks):
    def __call__(self, batch: Batch, sums: Mapping[str, Tensor]) -> int:
        assert isinstance(sums, Shards)
        counts = bool(batch) and bool(num_scored(batch, self.objective).any())
        all_counts = distributed.all_say(counts)
        if True not in all_counts:
            return 0
        if False in all_counts:  # those with nothing to do run along with a batch of another
            lent = distributed.said_by(all_counts.index(True), batch)
            batch = batch if counts else lent
        sink = _InOrder(sums, counts)
        with without_warnings_of_views():
            units = self._in_step(batch, sums, sink)
        return units if counts else 0

    def _in_step(self, batch: Batch, sums: Shards, sink: "_InOrder") -> int:
        chosen = 0
        while True:
            self._plan_for_all(batch, sums, chosen == len(self.plans))
            recorder = self.recorder(self.plans[chosen], sums, size(batch), sink)
            with frozen(self.model):
                units, terms = self._forward(batch, recorder)
                if not any(distributed.all_say(recorder.is_outdated)):
                    self._backward(recorder, terms, sink)
                    return units
            chosen += recorder.is_outdated

    def _plan_for_all(self, batch: Batch, sums: Shards, is_needed: bool) -> None:
        """Make a plan by the batch of the first rank that needs one."""
        all_needs = distributed.all_say(is_needed)
        if True not in all_needs:
            return
        if len(self.plans) == MOST_PLANS:
            raise ValueError(
                f"A sharded model must not do more than {MOST_PLANS} different things, depending on the batch; run it "
                "without sharding."
            )
        example = distributed.said_by(all_needs.index(True), batch)
        plan = self._planned(example, num_scored(example, self.objective), sums)
        if plan.by_loop:
            raise ValueError(
                f"Parameters of a sharded model need a batched rule, but {len(plan.by_loop)} have none, for example "
                f"'{min(plan.by_loop)}'; run the model without sharding, or freeze them."
            )
        self.plans.append(plan)

    def _forward(self, batch: Batch, recorder: "_InStep") -> tuple[int, list[Tensor]]:
        with recorder:
            predictions = predict(self.model, batch, self.objective)
            check_finite(predictions)
            terms = list(self.estimand.terms(predictions, batch))
        recorder.note_end()
        return self.estimand.num_units(predictions), terms

    def _backward(self, recorder: "_InStep", terms: list[Tensor], sink: "_InOrder") -> None:
        count = max(distributed.all_say(len(terms)))
        terms += [0 * terms[-1]] * (count - len(terms))
        for number, loss in enumerate(terms, 1):
            recorder.backward(loss.sum(), last=number == count)
            sink.finish()
        if any(distributed.all_say(bool(recorder.late))):
            raise ValueError(
                "The loss of a sharded model must depend on the same parameters in every batch; run it unsharded."
            )

    def recorder(self, plan: Plan, sums: Mapping[str, Tensor], examples: int, sink: Sink) -> "_InStep":
        """As before."""
        return _InStep(self.model, plan, sums, examples, sink, self.rules)


class _InStep(Recorder):
    """Goes on to the end of the model's pass when the plan turns out not to fit, since the other ranks do."""

    is_outdated = False

    def note(self, operation: Operation, sources: Mapping[Slot, Source], result: Any) -> Any:
        """As before."""
        return (
            result
            if self.is_outdated
            else self._unless_outdated(lambda: super(_InStep, self).note(operation, sources, result), result)
        )

    def note_end(self) -> None:
        """The model has come to its end."""
        self._unless_outdated(super().check_complete, None)

    def check_complete(self) -> None:
        """As before."""
        if self.is_outdated:
            raise PlanOutdated
        super().check_complete()

    def _unless_outdated(self, act: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return act()
        except PlanOutdated:
            self.is_outdated = True
            return otherwise


class _InOrder:
    """Passes squares on in one order on all ranks, from the last parameter to the first, as they roughly come."""

    def __init__(self, sums: Shards, counts: bool) -> None:
        self.sums, self.counts = sums, counts
        self.left = list(sums)
        self.arrived: dict[str, Tensor] = {}

    def __call__(self, name: str, contributions: list[Contribution]) -> None:
        self.arrived[name] = squares = zeros_of_whole(self.sums[name])
        if self.counts:
            accumulate(squares, contributions)
        while self.left and self.left[-1] in self.arrived:
            self._pass_on()

    def finish(self) -> None:
        """Pass on the rest, also of parameters that the loss of this rank's batch does not depend on."""
        while self.left:
            self._pass_on()
        self.left = list(self.sums)

    def _pass_on(self) -> None:
        name = self.left.pop()
        squares = self.arrived.pop(name, None)
        self.sums.add(name, zeros_of_whole(self.sums[name]) if squares is None else squares)
