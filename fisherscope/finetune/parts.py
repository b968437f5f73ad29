"""What regularizers are made of: contexts that change one thing in a model or an optimizer and change it back."""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .._typing import Bool
from ..models import DropoutSite, layer_of

SAME_MATRICES = "both compute with changed matrices in place of the same ones"
"""Why methods that use :func:`reparametrized` for all matrices exclude each other."""

Masks = Mapping[nn.Parameter, Bool[Tensor, "..."]]


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside the wrappers of accelerate; hooks on a wrapper are never called."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


@contextmanager
def before_steps(optimizer: Any, action: Callable[[], None]) -> Iterator[None]:
    """Call something before every optimizer step.

    Gradients are summed over micro-batches and ranks by then, unscaled and clipped. A step that fp16 scaling skips does
    not count.
    """

    def prepare(stepping: Any, *_: Any) -> None:
        scale = getattr(stepping, "grad_scale", None)
        if scale is not None:  # a fused optimizer would divide by it only later
            for parameter in (p for group in stepping.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad /= scale.to(parameter.device)
            stepping.grad_scale = None
        if not _is_skipped(stepping):
            action()

    handle = innermost(optimizer).register_step_pre_hook(prepare)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_steps(optimizer: Any, action: Callable[[], None]) -> Iterator[None]:
    """Call something after every optimizer step. A step that fp16 scaling skips does not count."""
    handle = innermost(optimizer).register_step_post_hook(lambda it, *_: None if _is_skipped(it) else action())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def around_steps(optimizer: Any, step: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter a context before every optimizer step and leave it right after, before anything of :func:`after_steps`.

    A context that is put around steps later lies inside. A step that fp16 scaling skips does not count.

    Args:
        optimizer: The optimizer.
        step: Makes the context of one step; what it does to the optimizer's groups it has to undo in ``finally``.
    """
    with ExitStack() as entered, before_steps(optimizer, lambda: entered.enter_context(step())):
        hooks = innermost(optimizer)._optimizer_step_post_hooks
        others = dict(hooks)
        hooks.clear()
        handle = innermost(optimizer).register_step_post_hook(lambda *_: entered.close())
        hooks.update(others)  # which come after it
        try:
            yield
        finally:
            handle.remove()


Rewrite = Callable[[nn.Parameter, Tensor, dict[str, Any]], None]


@contextmanager
def steps_rewritten(optimizer: Any, parameters: Collection[nn.Parameter], rewrite: Rewrite) -> Iterator[None]:
    """Change what optimizer steps did to some parameters; the optimizer's state is what it made of the gradients.

    Args:
        optimizer: Of the parameters.
        parameters: Which ones; those without a gradient are left alone.
        rewrite: Called without gradients with a parameter after the step, its value before, and its group.
    """

    @contextmanager
    def step() -> Iterator[None]:
        groups = {p: group for group in innermost(optimizer).param_groups for p in group["params"]}
        before = {p: p.detach().clone() for p in parameters if p.grad is not None and p in groups}
        yield
        with torch.no_grad():
            for parameter, value in before.items():
                rewrite(parameter, value, groups[parameter])

    with around_steps(optimizer, step) if parameters else nullcontext():
        yield


def rates_scaled(optimizer: Any, factors: Mapping[nn.Parameter, float]) -> AbstractContextManager[None]:
    r"""Train parameters at a multiple of their learning rate: :math:`\theta + f\,(\theta' - \theta)` after a step.

    This is what a group of its own with that rate does, with its decoupled decay; a factor of 1 touches nothing.

    Args:
        optimizer: Of the parameters.
        factors: By parameter.
    """

    def scale(parameter: nn.Parameter, before: Tensor, group: dict[str, Any]) -> None:
        del group
        parameter.copy_(before + factors[parameter] * (parameter - before))

    return steps_rewritten(optimizer, [p for p, factor in factors.items() if factor != 1], scale)


def the_adamw(optimizer: Any, method: str) -> AdamW:
    """The torch optimizer, which has to be AdamW.

    Raises:
        ValueError: If it is another one.
    """
    inner = innermost(optimizer)
    if not isinstance(inner, AdamW):
        raise ValueError(
            f"{method} is a form of AdamW, but the optimizer is {type(inner).__name__}; take torch's AdamW."
        )
    return inner


def anchored(model: nn.Module, anchor: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of an anchor, placed where the parameters are; copied where they would move along with them.

    Raises:
        ValueError: If the model lacks a parameter, or has it in another shape.
    """
    parameters = dict(model.named_parameters())
    for name, value in anchor.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(
                f"The anchor does not fit this model, which has no parameter '{name}' of shape {list(value.shape)}; "
                "take values of the same model."
            )
    values = {name: v.detach().to(parameters[name].device, parameters[name].dtype) for name, v in anchor.items()}
    moving = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
    return {name: v.clone() if v.untyped_storage().data_ptr() in moving else v for name, v in values.items()}


def _is_skipped(optimizer: Any) -> bool:
    """Whether a fused optimizer was called by a scaler that found an overflow: it then does nothing, by itself."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradient for these parameters, so that optimizers skip them and hold no state for them."""
    before = [p.requires_grad for p in parameters]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, gradient in zip(parameters, before, gradients, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def gradients_masked(masks: Masks) -> Iterator[None]:
    """Set entries of gradients that are not selected to 0 as soon as gradients are added up, even infinite ones.

    This is before gradients are clipped, so that the norm is that of the gradients that are used. The block may put
    other masks in as it goes; a parameter that it takes out keeps its gradient.
    """

    def mask(parameter: Tensor) -> None:
        if parameter.grad is not None and (selected := masks.get(parameter)) is not None:  # pyright: ignore
            _bits(parameter.grad).mul_(selected)

    handles = [p.register_post_accumulate_grad_hook(mask) for p in list(masks) if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bits(tensor: Tensor) -> Tensor:
    """The values as integers: times 0 or 1 they stay exact, even infinite ones, four times faster than a selection."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@contextmanager
def entries_kept(optimizer: Any, masks: Masks) -> Iterator[None]:
    """Write the entries that are not selected back after every step: decay and momentum move those without a gradient.

    Args:
        optimizer: Of the parameters.
        masks: ``True`` where an entry may change.
    """
    kept = {parameter: _bits(parameter.detach()) * ~mask for parameter, mask in masks.items()}

    @torch.no_grad()
    def write_back() -> None:
        for parameter, mask in masks.items():
            _bits(parameter.data).mul_(mask).add_(kept[parameter])

    with after_steps(optimizer, write_back):
        yield


@contextmanager
def rates_set(sites: Sequence[DropoutSite], rates: Sequence[float]) -> Iterator[None]:
    """Give dropout sites other rates."""
    before = [site.rate for site in sites]
    _write_rates(sites, rates)
    try:
        yield
    finally:
        _write_rates(sites, before)


def _write_rates(sites: Sequence[DropoutSite], rates: Sequence[float]) -> None:
    for site, rate in zip(sites, rates, strict=True):
        site.set_rate(rate)


def weight_matrices(model: nn.Module) -> dict[str, int]:
    """The matrices that a model multiplies activations by: name to the axis of the inputs.

    They are the weights of all linear layers, and parameters that modules of numbered layers hold themselves; of those
    with more than two axes, the first one is taken for the inputs. Embeddings, biases, frozen parameters and weights
    that several modules share are left out.
    """
    from transformers.pytorch_utils import Conv1D

    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if parameter is None or parameter.ndim < 2 or not parameter.requires_grad or uses[id(parameter)] > 1:
                continue
            if isinstance(module, (nn.Linear, Conv1D)):
                found[name] = int(isinstance(module, nn.Linear))
            elif is_in_numbered_layer(name) and not _is_table(module, attribute):
                found[name] = 1 if parameter.ndim == 2 else 0
    return found


def _is_table(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter is added, looked up or convolved, as far as its module's type and its own name tell."""
    tables = (nn.Embedding, nn.modules.conv._ConvNd)
    return isinstance(module, tables) or "bias" in attribute or "embed" in attribute


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises activations, as far as its type tells."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, kinds) or "norm" in type(module).__name__.lower()


def is_in_numbered_layer(name: str) -> bool:
    """Whether a parameter belongs to one of the blocks that a model repeats."""
    return layer_of(name).rpartition(".")[2].isdigit()


@contextmanager
def reparametrized(model: nn.Module, functions: Mapping[str, Callable[[nn.Parameter], Tensor]]) -> Iterator[None]:
    """Let modules compute with a function of a parameter in place of the parameter; names and optimizer stay.

    Works for every module that reads the parameter as an attribute in its ``forward``, whatever its type.

    Args:
        model: The model.
        functions: By name of the parameter; called at every forward pass of the module that holds it.

    Raises:
        ValueError: If a parameter is reparametrized already, or two modules share it.
    """
    uses = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    by_module: dict[nn.Module, dict[str, Callable[[nn.Parameter], Tensor]]] = {}
    for name, function in functions.items():
        holder, _, attribute = name.rpartition(".")
        if uses.count(id(model.get_parameter(name))) > 1:
            raise ValueError(f"'{name}' is tied: several modules use it, and it cannot be changed in one of them.")
        by_module.setdefault(model.get_submodule(holder), {})[attribute] = function
    with ExitStack() as stack:
        for module, changed in by_module.items():
            stack.enter_context(_forward_with(module, changed))
        yield


@contextmanager
def _forward_with(module: nn.Module, changed: Mapping[str, Callable[[nn.Parameter], Tensor]]) -> Iterator[None]:
    inner = module.forward
    if twice := sorted(set(getattr(inner, "reparametrized", ())) & set(changed)):
        raise ValueError(
            f"Two methods compute with a changed '{twice[0]}' of the same {type(module).__name__}; take one of them."
        )

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        values = {name: function(module._parameters[name]) for name, function in changed.items()}  # pyright: ignore
        module.__dict__.update(values)  # found before the parameter of the same name
        try:
            return inner(*args, **kwargs)
        finally:
            for name in values:
                del module.__dict__[name]

    vars(forward)["reparametrized"] = {*getattr(inner, "reparametrized", ()), *changed}
    with forward_replaced(module, forward):
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let one module compute by another function, which may call the ``module.forward`` that it found."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
