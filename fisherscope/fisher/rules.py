r"""Per-example gradients of single modules, from what went in and the gradient of what came out.

A contribution is what one call of one module adds to the gradient :math:`G_n` of one parameter, for all examples
:math:`n` of a batch, in the most compact form it has. :func:`accumulate` adds up the contributions of all uses of
the parameter, example by example, and only then squares: :math:`\sum_n (\sum_u G_n^{(u)})^2`.

Shape names: B examples, T positions, I inputs, O outputs, D width, V rows of an embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .._typing import Float, Int


@dataclass(frozen=True)
class Stacked:
    """Every example's gradient in full; for parameters that are small, such as biases and norms."""

    gradients: Float[Tensor, "examples *parameter"]

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.gradients)

    def add_to(self, buffer: Tensor, example: int) -> None:
        """Add the gradient of one example to ``buffer``."""
        buffer.add_(self.gradients[example])


@dataclass(frozen=True)
class Outer:
    r""":math:`G_n = \sum_t g_{nt}\, x_{nt}^\top`: the weight of a matrix product, left as its two factors."""

    left: Float[Tensor, "examples positions rows"]
    right: Float[Tensor, "examples positions columns"]

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.left)

    def add_to(self, buffer: Tensor, example: int, *, scale: float = 1.0) -> None:
        """Add the gradient of one example to ``buffer``, or write it there with ``scale=0``; zero rows are skipped."""
        left, right = self.left[example], self.right[example]
        nonzero = (left != 0).any(-1)
        if not nonzero.all():  # padding and unscored positions: their gradient is exactly zero
            left, right = left[nonzero], right[nonzero]
        torch.addmm(buffer, left.T, right, beta=scale, out=buffer)


@dataclass(frozen=True)
class Lookup:
    r""":math:`G_n[v] = \sum_{t: id_{nt} = v} g_{nt}`: the rows of an embedding, never as a dense table."""

    ids: Int[Tensor, "examples positions"]
    gradients: Float[Tensor, "examples positions width"]

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.ids)

    def add_to(self, buffer: Tensor, example: int) -> None:
        """Add the gradient of one example to ``buffer``."""
        buffer.index_add_(0, self.ids[example], self.gradients[example])


Contribution = Stacked | Outer | Lookup


def accumulate(score: Tensor, contributions: Sequence[Contribution]) -> None:
    """Add the squared per-example gradients of one parameter to its score, in place.

    Args:
        score: Sum of squares so far, in the parameter's shape.
        contributions: What every use of the parameter in one batch adds to its gradient.
    """
    if all(isinstance(c, Stacked) for c in contributions):
        total = sum(c.gradients.to(score.dtype) for c in contributions if isinstance(c, Stacked))
        score.add_(torch.as_tensor(total).square().sum(0).view_as(score))
    elif all(isinstance(c, Lookup) for c in contributions):
        _accumulate_lookups(score, [c for c in contributions if isinstance(c, Lookup)])
    elif len(contributions) == 1 and isinstance(outer := contributions[0], Outer) and outer.left.shape[1] == 1:
        score.addmm_(outer.left[:, 0].square().T, outer.right[:, 0].square())  # one position: the square factorises
    else:
        _accumulate_in_buffer(score, contributions)


def _accumulate_lookups(score: Tensor, lookups: Sequence[Lookup]) -> None:
    """Segment sums over distinct (example, id) pairs: memory B x T x D, whatever the number of rows."""
    rows, width = score.shape
    pairs = torch.cat([_pair_numbers(c.ids, rows) for c in lookups])
    gradients = torch.cat([c.gradients.reshape(-1, width) for c in lookups])
    distinct, segment = pairs.unique(return_inverse=True)
    sums = gradients.new_zeros(len(distinct), width).index_add_(0, segment, gradients)
    score.index_add_(0, distinct % rows, sums.square_())


def _pair_numbers(ids: Tensor, rows: int) -> Tensor:
    return (torch.arange(len(ids), device=ids.device)[:, None] * rows + ids).flatten()


def _accumulate_in_buffer(score: Tensor, contributions: Sequence[Contribution]) -> None:
    """One reused buffer of the parameter's size: form an example's whole gradient, square it, add it."""
    first = next((c for c in contributions if isinstance(c, Outer)), None)
    others = [c for c in contributions if c is not first]
    buffer = torch.zeros_like(score)
    for example in range(contributions[0].num_examples):
        if first:
            first.add_to(buffer, example, scale=0.0)  # overwrites what the previous example left
        else:
            buffer.zero_()
        for other in others:
            other.add_to(buffer, example)
        score.addcmul_(buffer, buffer)


Rule = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], dict[str, Contribution]]
"""(module, positional inputs, keyword inputs, gradient of the output) -> contribution to each own parameter."""


def _linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor) -> dict[str, Contribution]:
    inputs, outputs = _positions(args[0]), _positions(grad)
    return {"weight": Outer(outputs, inputs), "bias": Stacked(outputs.sum(1))}


def _conv1d(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor) -> dict[str, Contribution]:
    inputs, outputs = _positions(args[0]), _positions(grad)
    return {"weight": Outer(inputs, outputs), "bias": Stacked(outputs.sum(1))}


def _embedding(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor
) -> dict[str, Contribution]:
    ids = args[0].expand(grad.shape[:-1]).flatten(1)
    gradients = _positions(grad)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:  # the table's padding row gets no gradient, as in torch
        gradients = gradients.masked_fill((ids == padding)[..., None], 0.0)
    return {"weight": Lookup(ids, gradients)}


def _layer_norm(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor
) -> dict[str, Contribution]:
    normalized = F.layer_norm(_wide(args[0]), module.normalized_shape, eps=module.eps)  # pyright: ignore
    return _scale_and_shift(normalized, grad)


def _rms_norm(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor
) -> dict[str, Contribution]:
    return _scale_and_shift(F.rms_norm(_wide(args[0]), module.normalized_shape, eps=module.eps), grad)  # pyright: ignore


def _scale_and_shift(normalized: Tensor, grad: Tensor) -> dict[str, Contribution]:
    outputs = _positions(grad)
    return {"weight": Stacked((outputs * _positions(normalized)).sum(1)), "bias": Stacked(outputs.sum(1))}


def _positions(values: Tensor) -> Float[Tensor, "examples positions width"]:
    """All axes between the first and the last as one."""
    return _wide(values).reshape(len(values), -1, values.shape[-1])


def _wide(values: Tensor) -> Tensor:
    """At least float32: sums and squares of half-precision gradients overflow, underflow and stall."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def generic(batched: frozenset[int | str]) -> Rule:
    """Any module, by running it again: ``vmap`` over examples of the vector-Jacobian product with its own parameters.

    Args:
        batched: Which inputs have the examples as first axis: positions, and names of keyword inputs.
    """

    def rule(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor) -> dict[str, Contribution]:
        inputs: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        fixed = {key: value for key, value in inputs.items() if key not in batched}
        own = {name: p.detach() for name, p in module.named_parameters(recurse=False, remove_duplicate=False)}

        def example_gradient(gradient: Tensor, example: dict[int | str, Tensor]) -> dict[str, Tensor]:
            values = {**fixed, **{key: value[None] for key, value in example.items()}}
            positional = tuple(values[i] for i in range(len(args)))
            named = {key: value for key, value in values.items() if isinstance(key, str)}
            pull_back = torch.func.vjp(
                lambda p: torch.func.functional_call(module, p, positional, named, tie_weights=False), own
            )[1]
            return pull_back(gradient[None])[0]

        examples = {key: inputs[key] for key in batched if key in inputs}
        gradients = torch.func.vmap(example_gradient)(grad, examples)
        return {name: Stacked(gradient) for name, gradient in gradients.items()}

    return rule


_RULES: dict[Any, Rule] = {
    nn.Linear.forward: _linear,
    Conv1D.forward: _conv1d,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
    nn.RMSNorm.forward: _rms_norm,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The fast rule of a module, by the very function that is its forward pass: an override has none."""
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        return None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1:
        return None
    return _RULES.get(type(module).forward)
