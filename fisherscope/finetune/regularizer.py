"""What a regularizer is: something that changes how a model trains, for the length of a ``with`` block.

One file under ``methods/`` holds one regularizer, or two that share all but a line. A class that has a ``name`` is a
method of :func:`fisherscope.finetune`; its fields are the method's settings, on the command line and in YAML too.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from ..objectives import Batch, Predictions
    from .recipe import Recipe
    from .run import Run

METHODS: "dict[str, type[Regularizer]]" = {}
"""The methods by name; :mod:`fisherscope.finetune.methods` fills it."""

Unfit = Literal["several tasks", "regression"]

SUPPLIED = ("scores", "mask", "total_steps", "seed", "factors", "anchor", "teacher")
"""Fields of a regularizer that are no settings: a run supplies them, but ``factors`` and ``teacher``, which the
``for_run`` of their methods makes."""


class Applied:
    """What a regularizer carries from step to step while it is applied; this one carries nothing.

    A checkpoint of the training holds it, so that a resumed training goes on exactly.
    """

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside the model and the optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""


class Regularizer:
    """Something that changes how a model trains.

    Subclasses are frozen dataclasses of settings. They override :meth:`applied_to`, :meth:`penalty`, or both.

    Attributes:
        name: As ``--method`` takes it; a class without one is no method.
        excludes: Names of methods that it cannot be combined with, and why: the end of a sentence.
        unfit: What it cannot be trained on, and why, likewise.
        replaced: Settings that have no effect where the user gives ``scores`` or a ``mask``, by which of the two.
        order: Methods together are prepared and applied from the lowest to the highest, and by name among equals,
            whatever the order of their names; those applied last change a step first. Below 0 are methods that draw
            values anew (-3), that choose what is trained (-2) and how fast (-1), above it those that need to see what
            the others did.
    """

    name: ClassVar[str]
    excludes: ClassVar[Mapping[str, str]] = {}
    unfit: ClassVar[Mapping[Unfit, str]] = {}
    replaced: ClassVar[Mapping[str, Sequence[str]]] = {}
    order: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        """Register a class that has a name; a class that is defined again, as in a notebook, takes its own place.

        Raises:
            ValueError: If another class has the name.
        """
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            return
        there = METHODS.get(cls.name, cls)
        if (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"The method '{cls.name}' is {there.__qualname__} of {there.__module__}; give {cls.__qualname__} "
                "another name."
            )
        METHODS[cls.name] = cls

    def extend(self, model: nn.Module) -> None:
        """Add parameters to a model before its optimizer is made, a checkpoint is loaded, or ranks share it.

        Leaving :meth:`applied_to` takes them out again. A model that has them already is left alone; one that has not
        gets them in :meth:`applied_to`, which is too late for a training that is resumed or has several ranks.

        Raises:
            ValueError: If the model cannot have them.
        """

    @property
    def extends(self) -> bool:
        """Whether it adds parameters, so that those of the model may have other names in the block."""
        return type(self).extend is not Regularizer.extend

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Change how the model trains for the length of the block.

        Leaving the block restores the model and the optimizer exactly, whether or not training raised: every flag,
        hook, attribute and parameter group; only what training did to the values stays. In eval mode the model
        computes what it will compute after the block.

        Args:
            model: The model, with the head of its task.
            optimizer: Of all its parameters; an accelerate optimizer, too.

        Raises:
            ValueError: If the regularizer cannot do its work on this model.
        """
        return _nothing()

    def penalty(self, model: nn.Module, batch: "Batch", predictions: "Predictions") -> Tensor | None:
        """What is added to the loss of every example, in its units and summed over its scored tokens: shape [B].

        None means nothing. Random draws must leave torch's global generators as they are.

        Args:
            model: The model in training, as the loss was computed by it.
            batch: The inputs.
            predictions: Of the model for the batch, with gradients.
        """
        return None

    @property
    def stays(self) -> bool:
        """Whether all that it trains is in the model after the block."""
        return True

    @property
    def has_penalty(self) -> bool:
        """Whether the loss gets a term."""
        return type(self).penalty is not Regularizer.penalty

    @classmethod
    def for_run(cls, run: "Run", **settings: Any) -> "Regularizer":
        """The regularizer for a run; fields that are no settings come from the run.

        A subclass that prepares more than that overrides this, with what it adds to the settings as keyword-only
        arguments.
        """
        supplied = {f.name: run.supply(f.name) for f in dataclasses.fields(cls) if f.name in SUPPLIED}  # pyright: ignore
        return cls(**supplied, **settings)

    @classmethod
    def recipe(cls, recipe: "Recipe", **settings: Any) -> "Recipe":
        """What the run is trained by, from what the user gave; the settings are those that were given."""
        del settings
        return recipe

    @classmethod
    def settings(cls) -> dict[str, inspect.Parameter]:
        """The settings that ``--method`` takes for this class: name to annotation and default."""
        own, extra = (inspect.signature(f).parameters for f in (cls, cls.for_run))
        found = {name: p for name, p in own.items() if name not in SUPPLIED} if dataclasses.is_dataclass(cls) else {}
        return found | {name: p for name, p in extra.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_together(methods: "Iterable[type[Regularizer]]") -> None:
    """Refuse methods that cannot be combined.

    Raises:
        ValueError: If one excludes another one.
    """
    named = {method.name: method for method in methods if hasattr(method, "name")}
    for name, method in sorted(named.items()):  # so that the order of the names changes nothing
        if other := next((other for other in method.excludes if other in named), None):
            raise ValueError(f"{name} cannot be combined with {other}: {method.excludes[other]}; take one of them.")


def check_regularizers(given: Sequence[object]) -> None:
    """Refuse what is no regularizer.

    Raises:
        TypeError: If one is something else, such as a class without its settings.
    """
    if wrong := [one for one in given if not isinstance(one, Regularizer)]:
        found = f"the class {wrong[0].__name__}" if isinstance(wrong[0], type) else f"a {type(wrong[0]).__name__}"
        raise TypeError(
            f"A method is a name or a regularizer with its settings, as RDrop(weight=0.5), but here is {found}; "
            "several are 'A+B' or Composed([a, b])."
        )


def check_penalty(regularizer: Regularizer, penalty: Tensor, count: Tensor) -> None:
    """Refuse a penalty that is not one number per example: a mean over a batch would count by batches.

    Raises:
        ValueError: If it has another shape.
    """
    if penalty.shape != count.shape:
        raise ValueError(
            f"A penalty is one number per example, shape {list(count.shape)}, but that of {type(regularizer).__name__} "
            f"has shape {list(penalty.shape)}; sum over the tokens of an example and over nothing else."
        )


def check_fit(methods: "Iterable[type[Regularizer]]", objectives: Sequence[str]) -> None:
    """Refuse methods that cannot be trained on tasks.

    Args:
        methods: Of one training.
        objectives: Of its tasks.

    Raises:
        ValueError: If one is unfit.
    """
    asked: dict[Unfit, bool] = {"several tasks": len(objectives) > 1, "regression": "regression" in objectives}
    for method in methods:
        for what, why in method.unfit.items():
            if asked[what]:
                name = getattr(method, "name", method.__name__)
                raise ValueError(f"{name} is not for {what}: {why}; take another method.")


@contextmanager
def _nothing() -> Iterator[Applied]:
    yield Applied()


@dataclass(frozen=True)
class Composed(Regularizer):
    """Several regularizers at once, applied from the lowest ``order`` to the highest.

    Attributes:
        parts: The regularizers; those of one ``order`` are applied as they stand.

    Raises:
        TypeError: If one is no regularizer.
        ValueError: If one excludes another one.
    """

    parts: Sequence[Regularizer]

    def __post_init__(self) -> None:
        """Take the parts of a part for parts, and refuse what does not go together."""
        check_regularizers(self.parts)
        inner = [part.parts if isinstance(part, Composed) else (part,) for part in self.parts]
        object.__setattr__(self, "parts", tuple(itertools.chain.from_iterable(inner)))
        check_together(type(part) for part in self.parts)

    def extend(self, model: nn.Module) -> None:
        """Add the parameters of all parts."""
        for part in self.parts:
            part.extend(model)

    @property
    def extends(self) -> bool:
        """Whether any part adds parameters."""
        return any(part.extends for part in self.parts)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Apply all parts."""
        parts = sorted(self.parts, key=lambda part: part.order)
        with ExitStack() as stack:
            yield _AllApplied([stack.enter_context(part.applied_to(model, optimizer)) for part in parts])

    def penalty(self, model: nn.Module, batch: "Batch", predictions: "Predictions") -> Tensor | None:
        """The sum of the parts' terms."""
        found = []
        for part in self.parts:
            if part.has_penalty and (term := part.penalty(model, batch, predictions)) is not None:
                check_penalty(part, term, predictions.count)
                found.append(term)
        return sum(found[1:], found[0]) if found else None

    @property
    def stays(self) -> bool:
        """Whether that holds for all parts."""
        return all(part.stays for part in self.parts)

    @property
    def has_penalty(self) -> bool:
        """Whether any part has a term."""
        return any(part.has_penalty for part in self.parts)


class _AllApplied(Applied):
    def __init__(self, parts: Sequence[Applied]) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{i}.{key}": t for i, part in enumerate(self.parts) for key, t in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            prefix = f"{i}."
            part.load_state_dict({k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})
