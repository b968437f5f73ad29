"""Several tasks at once: one backbone, a head for each, and steps on one task at a time.

A pair of texts is one input (a cross-encoder), as when its task is trained alone.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from .. import distributed, storage
from ..data import Batches
from ..models import share_backbone, without_other_tasks
from .evaluation import Rows, evaluated
from .plan import MEAN, Plan
from .regularizer import check_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK = "task"
"""In an example: the number of its task."""


def checked_tasks(
    task: str | None, tasks: Sequence[str] | None, exponent: float | None, data: object
) -> Sequence[str | None]:
    """The tasks that the arguments of :func:`fisherscope.finetune` ask for; None where it is data.

    Raises:
        ValueError: If they do not fit each other.
    """
    if tasks is None:
        if exponent is not None:
            raise ValueError("sampling_exponent goes with tasks only; leave it out.")
        return [task]
    if task is not None or data is not None:
        raise ValueError("Fine-tuning needs a task, tasks or data, and one of them only.")
    if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks must be a list of different tasks, got {tasks!r}.")
    if exponent is not None and len(tasks) == 1:
        raise ValueError("sampling_exponent goes with several tasks, but there is one; leave it out.")
    if exponent is not None and not 0 <= exponent < float("inf"):
        raise ValueError(f"sampling_exponent must be 0 or more, and finite; got {exponent:g}.")
    return tasks


def with_tasks(plan: Plan, others: Sequence[Mapping[str, Any]], exponent: float | None) -> Plan:
    """The plan, with further tasks beside its own; each is given as the fields that say what it is trained on.

    Raises:
        ValueError: If the method cannot be trained on these tasks.
    """
    more = tuple(replace(plan, **other) for other in others)
    check_fit(plan.methods, [part.objective for part in (plan, *more)])
    if not more:
        return plan
    return replace(plan, others=more, sampling_exponent=1.0 if exponent is None else exponent)


def shares(sizes: Sequence[int], exponent: float) -> np.ndarray:
    r"""How often each task is drawn, :math:`p_i = n_i^\alpha / \sum_j n_j^\alpha`.

    With 1 every example is as likely as any other, with 0 every task.
    """
    weights = np.asarray(sizes, dtype=float) ** exponent
    return weights / weights.sum()


def step_order(sizes: Sequence[int], exponent: float, steps: int, group: int, seed: int) -> np.ndarray:
    """The examples of every optimizer step: positions in the examples of all tasks in a row, ``[steps, group]``.

    The task of a step is drawn by its share; a task serves its examples in passes, each in an order of its own.

    Args:
        sizes: Examples of every task.
        exponent: As for :func:`shares`.
        steps: How many.
        group: Examples of a step.
        seed: Draws tasks and orders, the same ones on all ranks.
    """
    draw = np.random.default_rng(_seed("tasks", seed))
    tasks = draw.choice(len(sizes), size=steps, p=shares(sizes, exponent))
    rows = np.empty((steps, group), dtype=np.int64)
    for number, (size, start) in enumerate(zip(sizes, itertools.accumulate([0, *sizes]), strict=False)):
        mine, shuffle = tasks == number, np.random.default_rng(_seed(f"examples of task {number}", seed))
        needed = int(mine.sum()) * group
        passes = [shuffle.permutation(size) for _ in range(-(-needed // size))]
        rows[mine] = start + np.concatenate([np.empty(0, np.int64), *passes])[:needed].reshape(-1, group)
    return rows


def _seed(what: str, seed: int) -> int:
    return int(storage.digest(f"order of the {what}, seed {seed}"), 16)


def together(plans: Sequence[Plan], found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of every task as ``task.metric``, and the means of the losses (if known) and main metrics."""
    losses = [found[plan.name]["loss"] for plan in plans if "loss" in found[plan.name]]
    means = {"loss": float(np.mean(losses))} if len(losses) == len(plans) else {}
    means[MEAN] = float(np.mean([found[plan.name][plan.metric] for plan in plans]))
    return means | {f"{task}.{name}": value for task, by in found.items() for name, value in by.items()}


class InOrder(Sampler[int]):
    """Serves the examples of an epoch in a given order; a resumed training asks for the epoch that it is in.

    Args:
        order: Of :func:`step_order`.
        steps: Of an epoch.
        done: Says how many optimizer steps were taken.
    """

    def __init__(self, order: np.ndarray, steps: int, done: Callable[[], int]) -> None:
        """Nothing served yet."""
        self.order, self.steps, self.done = order, steps, done

    def __len__(self) -> int:
        """Examples of an epoch."""
        return self.steps * self.order.shape[1]

    def __iter__(self) -> Iterator[int]:
        start = self.done() // self.steps * self.steps
        return iter(self.order[start : start + self.steps].ravel().tolist())


class SharedBackbone:
    """Models of several tasks that share the backbone of the first one, which is the model that trains.

    The first model holds the parameters of all heads, and its ``forward`` is that of the task at hand, so that hooks,
    ranks and checkpoints see one model. The heads of the other tasks get no gradient, so that no optimizer moves them.

    Args:
        plans: Of every task by itself.
        models: Likewise, as they were loaded.
        batches: The training examples, likewise.
        exponent: Of the sizes, for the shares of the tasks.
    """

    def __init__(
        self, plans: Sequence[Plan], models: "Sequence[PreTrainedModel]", batches: Sequence[Batches], exponent: float
    ) -> None:
        """Share the backbone."""
        self.plans, self.models, self.batches, self.exponent = plans, models, batches, exponent
        self.current = self.whole = models[0]
        for plan, model in zip(plans[1:], models[1:], strict=True):
            share_backbone(self.whole, model, plan.name)
        own = self.whole.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.current is self.whole:
                return own(*args, **kwargs)
            self.current.training = self.whole.training  # its parts are the whole model's
            return self.current(*args, **kwargs)

        self.whole.__dict__["forward"] = forward

    @property
    def examples(self) -> list[dict[str, np.ndarray]]:
        """Those of all tasks in a row; each says which task it is of."""
        numbered = enumerate(batches.examples for batches in self.batches)
        return [example | {TASK: np.array(number)} for number, examples in numbered for example in examples]

    @property
    def steps_per_epoch(self) -> int:
        """As many as passes over the examples of every task take."""
        recipe = self.plans[0].recipe
        return sum(recipe.steps_per_epoch(batches.num_examples) for batches in self.batches)

    def order(self, steps: int, seed: int) -> np.ndarray:
        """The examples of every step of so many, and of the rest of the last epoch."""
        recipe, whole = self.plans[0].recipe, -(-steps // self.steps_per_epoch) * self.steps_per_epoch
        sizes = [batches.num_examples for batches in self.batches]
        group = recipe.batch_size * recipe.accumulate * distributed.world_size()
        return step_order(sizes, self.exponent, whole, group, seed)

    @contextmanager
    def of(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Be the model of the task that a batch is of; gives its objective, and the batch as the model takes it."""
        with self.at(int(inputs[TASK][0])) as plan:
            yield plan.objective, {name: value for name, value in inputs.items() if name != TASK}

    @contextmanager
    def at(self, number: int) -> Iterator[Plan]:
        """Be the model of a task, and say so in the configuration, for the length of a block."""
        before, config = self.current, self.whole.config
        self.current = self.models[number]
        self.whole.config = self.current.config
        try:
            yield self.plans[number]
        finally:
            self.current, self.whole.config = before, config

    def evaluate(self, validation: Sequence[Batches]) -> tuple[Rows, dict[str, float]]:
        """Measure every task: ``task.metric`` for each, and the means of the losses and of the main metrics."""
        rows, found = [], {}
        for number, batches in enumerate(validation):
            with self.at(number) as plan:
                of_task, measured = evaluated(self.whole, batches, plan.objective)
            rows += [{TASK: plan.name, **row} for row in of_task]
            found[plan.name] = measured
        return rows, together(self.plans, found)

    def separate(self) -> "dict[str, PreTrainedModel]":
        """The model of every task by name, each with the trained backbone and nothing of the others."""
        self.whole.__dict__.pop("forward", None)
        without_other_tasks(self.whole)
        return {plan.name: model for plan, model in zip(self.plans, self.models, strict=True)}
