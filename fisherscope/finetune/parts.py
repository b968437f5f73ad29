"""What regularizers are made of: contexts that change one thing in a model or an optimizer and change it back."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._typing import Bool

Masks = Mapping[nn.Parameter, Bool[Tensor, "..."]]


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside the wrappers of accelerate; hooks on a wrapper are never called."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@contextmanager
def before_steps(optimizer: Any, action: Callable[[], None]) -> Iterator[None]:
    """Call something before every optimizer step, when gradients are summed over micro-batches and ranks,
    unscaled and clipped. A step that fp16 scaling skips does not count."""
    handle = innermost(optimizer).register_step_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_steps(optimizer: Any, action: Callable[[], None]) -> Iterator[None]:
    """Call something after every optimizer step."""
    handle = innermost(optimizer).register_step_post_hook(lambda *_: action())
    try:
        yield
    finally:
        handle.remove()


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
            parameter.grad.masked_fill_(~selected, 0)

    handles = [p.register_post_accumulate_grad_hook(mask) for p in list(masks) if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def entries_kept(optimizer: Any, masks: Masks) -> Iterator[None]:
    """Write the entries that are not selected back after every step: decay and momentum move those without a gradient.

    Args:
        optimizer: Of the parameters.
        masks: ``True`` where an entry may change.
    """
    kept = {parameter: parameter.detach().clone() for parameter in masks}

    @torch.no_grad()
    def write_back() -> None:
        for parameter, mask in masks.items():
            torch.where(mask, parameter, kept[parameter], out=parameter.data)

    with after_steps(optimizer, write_back):
        yield


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
    before = module.__dict__.get("forward")
    inner = module.forward
    if twice := sorted(set(getattr(inner, "reparametrized", ())) & set(changed)):
        raise ValueError(f"'{twice[0]}' of a {type(module).__name__} is changed by two methods; take one of them.")

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
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
