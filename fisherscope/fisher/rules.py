r"""Per-example gradients of single operations, from what went in and the gradient of what came out.

A rule takes a :class:`Use` and returns what the operation adds to the gradient of each followed input. The table at
the end names the functions that have a rule of their own. All others are done by :func:`_broadcast`, if the input can
be copied once per example without changing the result, and otherwise by :func:`_one_by_one`; both are exact for any
function and need to know nothing about it.

Shape names: B examples, T positions, I inputs, O outputs, D width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .contributions import Contribution, Deferred, Lookup, Outer, Stacked, merged
from .layout import ByExample
from .operations import Operation, Slot, outputs_of

STACKED_BYTES = 1 << 26
"""Largest stack of per-example gradients that is made where computing them one by one would do as well."""


class NotCovered(Exception):
    """A rule cannot do this call of its function."""


@dataclass(frozen=True)
class Use:
    """One operation on followed tensors, and the gradient of its output.

    Attributes:
        operation: The operation.
        slots: The inputs whose gradients are wanted.
        layout: Where the examples are in the output; None if the output is shared by all examples, made of parameters
            alone: then the gradient has the examples as an additional first axis.
        gradient: Gradient of the sum of the losses with respect to the output.
        examples: B.
        output: Which output of the operation this is.
    """

    operation: Operation
    slots: tuple[Slot, ...]
    layout: ByExample | None
    gradient: Tensor
    examples: int
    output: int = 0

    def first(self, tensor: Tensor) -> Tensor:
        """An input whose axes are those of the output, with the examples as first axis."""
        if self.layout is None:
            return tensor.expand(self.examples, *tensor.shape)
        if not self.layout.fits(tensor, self.examples):
            raise NotCovered
        return self.layout.first(tensor, self.examples)

    def gradients(self) -> Tensor:
        """The gradient with the examples as first axis."""
        return self.gradient if self.layout is None else self.layout.first(self.gradient, self.examples)


Contributions = dict[Slot, Contribution]
Rule = Callable[[Use], Contributions]


def contributions_of(use: Use) -> tuple[str, Contributions]:
    """What a use adds to the gradient of its followed inputs, and the name of the rule that told."""
    for rule in (_RULES.get(use.operation.function), _broadcast, _one_by_one):
        if rule:
            try:
                return rule.__name__.strip("_").replace("_", " "), rule(use)
            except NotCovered:
                continue
    raise AssertionError("one by one covers everything")


def _positions(values: Tensor) -> Tensor:
    """All axes between the first and the last as one."""
    return wide(values).reshape(len(values), -1, values.shape[-1])


def wide(values: Tensor) -> Tensor:
    """At least float32: sums and squares of half-precision gradients overflow, underflow and stall."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _wanted(use: Use, **found: Callable[[], Contribution]) -> Contributions:
    """The contributions for the slots of a use, by ``p<position>`` or name of the argument."""
    result = {}
    for slot in use.slots:
        make = found.get(f"p{slot[0]}" if isinstance(slot[0], int) else str(slot[0]))
        if make is None or len(slot) > 1:
            raise NotCovered
        result[slot] = make()
    return result


def _product(use: Use) -> Contributions:
    """``linear(input, weight [O, I], bias)``."""
    inputs, weight = use.operation.argument(0, "input"), use.operation.argument(1, "weight")
    gradients = use.gradients()

    def of_weight() -> Contribution:
        return Outer(_positions(gradients), _positions(use.first(inputs)))

    def of_input() -> Contribution:
        if use.layout is not None:
            raise NotCovered
        return Stacked(wide(gradients) @ wide(weight))

    def of_bias() -> Contribution:
        return Stacked(_positions(gradients).sum(1))

    return _wanted(use, p0=of_input, p1=of_weight, p2=of_bias, input=of_input, weight=of_weight, bias=of_bias)


def _product_transposed(use: Use) -> Contributions:
    """``matmul(input, weight [I, O])``, where no axis of the weight counts examples."""
    return _transposed_weight(use, use.operation.argument(0, "input"), 1, "other", "mat2")


def _product_with_bias(use: Use) -> Contributions:
    """``addmm(bias, input, weight [I, O])``: Hugging Face's Conv1D."""
    if use.operation.kwargs.keys() & {"beta", "alpha"}:
        raise NotCovered
    bias = use.operation.argument(0, "input")
    inputs = use.operation.argument(1, "mat1")
    result = {}
    for slot in use.slots:
        if slot in ((0,), ("input",)):
            if bias.ndim != 1:
                raise NotCovered
            result[slot] = Stacked(_positions(use.gradients()).sum(1))
        else:
            result |= _transposed_weight(replace(use, slots=(slot,)), inputs, 2, "mat2")
    return result


def _transposed_weight(use: Use, inputs: Tensor, position: int, *names: str) -> Contributions:
    (slot, *others) = use.slots
    weight = use.operation[slot]
    if others or slot not in ((position,), *((n,) for n in names)) or weight.ndim != 2 or inputs.ndim < 2:
        raise NotCovered
    return {slot: Outer(_positions(use.first(inputs)), _positions(use.gradients()))}


def _einsum(use: Use) -> Contributions:
    """An einsum of two operands; the gradient of one of them is a product of the other with that of the output."""
    equation, *operands = use.operation.args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(operands) != 2 or len(use.slots) != 1 or "." in equation:
        raise NotCovered
    mine = next(i for i, operand in enumerate(operands) if operand is use.operation[use.slots[0]])
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    weight, other = terms[mine], terms[1 - mine]
    if use.layout is None or use.layout.merged or not output:
        raise NotCovered
    example = output[use.layout.axis]
    if example in weight or example not in other or any(len(set(t)) < len(t) for t in (*terms, output)):
        raise NotCovered
    inner = [c for c in other if c in output and c not in weight and c != example]  # summed positions
    of_gradient, of_other = [c for c in weight if c in output], [c for c in weight if c in other]
    if len(of_gradient) + len(of_other) != len(weight) or set(of_gradient) & set(of_other):
        raise NotCovered  # an axis of the weight is in both, or in neither
    if 1 + len(inner) + len(of_other) != len(other):
        raise NotCovered  # an axis of the other operand is summed on its own
    left = _ordered(use.gradient, output, example, inner, of_gradient)
    right = _ordered(operands[1 - mine], other, example, inner, of_other)
    if weight == "".join(of_gradient + of_other):
        return {use.slots[0]: Outer(left, right)}
    if weight == "".join(of_other + of_gradient):
        return {use.slots[0]: Outer(right, left)}
    raise NotCovered


def _ordered(values: Tensor, letters: str, example: str, inner: list[str], last: list[str]) -> Tensor:
    """A tensor as ``[examples, positions, the axes in last as one]``."""
    order = [letters.index(c) for c in (example, *inner, *last)]
    shape = [values.shape[i] for i in order]
    return wide(values.permute(order)).reshape(shape[0], math.prod(shape[1 : 1 + len(inner)]), -1)


def _lookup(use: Use) -> Contributions:
    """``embedding(ids, weight)``; the padding row gets no gradient, as in torch."""
    operation = use.operation
    ids, padding = operation.argument(0, "input"), operation.argument(2, "padding_idx")
    if operation.argument(3, "max_norm") is not None or operation.argument(5, "scale_grad_by_freq", False):
        raise NotCovered
    if any(slot not in ((1,), ("weight",)) for slot in use.slots):
        raise NotCovered
    gradients = _positions(use.gradients())
    ids = use.first(ids).reshape(use.examples, -1)
    if padding is not None:
        padding %= len(operation[use.slots[0]])
        gradients = gradients.masked_fill((ids == padding)[..., None], 0.0)
    return {use.slots[0]: Lookup(ids, gradients)}


def _norm(use: Use) -> Contributions:
    """``layer_norm`` and ``rms_norm`` over the last axis: scale and shift."""
    operation = use.operation
    inputs, shape = operation.argument(0, "input"), operation.argument(1, "normalized_shape")
    if len(shape) > 1:
        raise NotCovered
    gradients = _positions(use.gradients())

    def of_weight() -> Contribution:
        x = wide(inputs)
        if operation.name == "layer_norm":
            normalized = F.layer_norm(x, shape, eps=operation.argument(4, "eps", 1e-5))
        else:
            normalized = F.rms_norm(x, shape, eps=operation.argument(3, "eps"))
        return Stacked((gradients * _positions(use.first(normalized))).sum(1))

    def of_bias() -> Contribution:
        return Stacked(gradients.sum(1))

    if operation.name == "layer_norm":
        return _wanted(use, p2=of_weight, p3=of_bias, weight=of_weight, bias=of_bias)
    return _wanted(use, p2=of_weight, weight=of_weight)


def _convolution(use: Use) -> Contributions:
    """``conv1d`` and ``conv2d``: a product with the patches of the input."""
    operation = use.operation
    inputs, weight = operation.argument(0, "input"), operation.argument(1, "weight")
    stride, padding, dilation, groups = (
        operation.argument(3 + i, name, default)
        for i, (name, default) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)))
    )
    if use.layout != ByExample(0) or groups != 1 or isinstance(padding, str) or inputs.ndim != weight.ndim:
        raise NotCovered
    gradients = wide(use.gradient).flatten(2).mT  # [B, patches, O]
    axes = weight.ndim - 2

    def of_weight() -> Contribution:
        def pair(value: Any, missing: int) -> tuple[int, ...]:
            values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
            return (missing,) * (2 - axes) + values

        x, kernel = inputs, tuple(weight.shape[2:])
        if axes == 1:
            x, kernel = x[:, :, None], (1, *kernel)
        patches = F.unfold(wide(x), kernel, pair(dilation, 1), pair(padding, 0), pair(stride, 1))
        return Outer(gradients, patches.mT)

    def of_bias() -> Contribution:
        return Stacked(gradients.sum(1))

    return _wanted(use, p1=of_weight, p2=of_bias, weight=of_weight, bias=of_bias)


def _sum(use: Use) -> Contributions:
    """Addition: the gradient of the output, summed over the axes along which the input was repeated."""
    if use.operation.kwargs:
        raise NotCovered
    result = {}
    for slot in use.slots:
        tensor = use.operation[slot]
        if use.layout is None:
            result[slot] = Stacked(_summed_to(wide(use.gradient), tensor, use.examples))
        else:
            result[slot] = Stacked(_spread_back(use, wide(use.gradient), tensor))
    return result


def _summed_to(gradient: Tensor, like: Tensor, examples: int) -> Tensor:
    """Sum ``[B, *output]`` over the axes that broadcasting gave to the input."""
    shape = (1,) * (gradient.ndim - 1 - like.ndim) + tuple(like.shape)
    axes = [i + 1 for i, n in enumerate(shape) if n == 1 and gradient.shape[i + 1] != 1]
    return (gradient.sum(axes) if axes else gradient).reshape(examples, *like.shape)


def _spread_back(use: Use, gradient: Tensor, like: Tensor) -> Tensor:
    """Per-example gradients ``[B, *input]`` of an input that was broadcast along the example axis of the output."""
    layout = use.layout
    assert layout is not None
    shape = (1,) * (gradient.ndim - like.ndim) + tuple(like.shape)
    if len(shape) != gradient.ndim or shape[layout.axis] != 1:
        raise NotCovered
    axes = [i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1 and i != layout.axis]
    gradient = gradient.sum(axes, keepdim=True) if axes else gradient
    gradient = layout.first(gradient, use.examples)
    gradient = gradient.sum(layout.axis + 1) if layout.merged else gradient
    return gradient.reshape(use.examples, *like.shape)


def _repeat(use: Use) -> Contributions:
    """``tensor.repeat(B * r, ...)``: the copies of each example are added."""
    layout, (slot, *others) = use.layout, use.slots
    tensor = use.operation[slot]
    sizes = use.operation.args[1:]
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size) else sizes
    if layout is None or others or layout.merged == "inner" or not sizes or sizes[layout.axis] % use.examples:
        raise NotCovered
    shape = (1,) * (len(sizes) - tensor.ndim) + tuple(tensor.shape)
    copies = [n for pair in zip(sizes, shape, strict=True) for n in pair]  # every axis as (copy, index)
    copies[2 * layout.axis : 2 * layout.axis + 1] = [use.examples, sizes[layout.axis] // use.examples]
    gradient = wide(use.gradient).reshape(copies).movedim(2 * layout.axis, 0)
    return {slot: Stacked(gradient.sum(list(range(1, gradient.ndim, 2))).reshape(use.examples, *tensor.shape))}


def _broadcast(use: Use) -> Contributions:
    """Any function that gives the same when an input has a copy for every example: the copies' gradients."""
    if use.layout is None or use.operation.in_place:
        raise NotCovered
    return {slot: Stacked(_copied(use, slot)) for slot in use.slots}


def _copied(use: Use, slot: Slot) -> Tensor:
    layout, tensor, gradient = use.layout, use.operation[slot], use.gradient
    assert layout is not None
    shape = [1] * (gradient.ndim - tensor.ndim) + list(tensor.shape)
    if len(shape) != gradient.ndim or shape[layout.axis] != 1:
        raise NotCovered
    shape[layout.axis] = gradient.shape[layout.axis]
    with torch.enable_grad():
        copies = tensor.detach().expand(shape).requires_grad_()
        try:
            output = outputs_of(use.operation.run({slot: copies}))[use.output]
            found = torch.autograd.grad(output, copies, gradient.to(output.dtype))[0]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # the function minds the shape
            raise NotCovered from error
    return _spread_back(use, wide(found), tensor)


def _one_by_one(use: Use) -> Contributions:
    """Any function at all: its own backward pass, with the gradient of one example after the other."""
    tensors = {slot: use.operation[slot].detach().requires_grad_() for slot in use.slots}
    with torch.enable_grad():
        copies = {slot: tensor.clone() if use.operation.in_place else tensor for slot, tensor in tensors.items()}
        output = outputs_of(use.operation.run(copies))[use.output]

    def gradient_of(example: int, slot: Slot) -> Tensor:
        layout, gradient = use.layout, use.gradient
        gradient = layout.only(gradient, example, use.examples) if layout else gradient[example]
        found = torch.autograd.grad(
            output, tensors[slot], gradient.to(output.dtype), retain_graph=True, allow_unused=True
        )[0]
        return torch.zeros_like(tensors[slot]) if found is None else wide(found)

    def deferred(slot: Slot) -> Contribution:
        compute = Deferred(use.examples, use.gradient.device, lambda example: gradient_of(example, slot))
        size = tensors[slot].numel() * tensors[slot].element_size() * use.examples
        return stacked(compute) if size <= STACKED_BYTES else compute

    return {slot: deferred(slot) for slot in use.slots}


def stacked(deferred: Deferred) -> Stacked:
    """All gradients at once."""
    return Stacked(torch.stack([deferred.compute(example) for example in range(deferred.num_examples)]))


def pull_back(
    operation: Operation,
    slots: tuple[Slot, ...],
    shapes: list[tuple[int, ...]],
    outputs: Mapping[int, list[Contribution]],
    examples: int,
) -> dict[Slot, list[Contribution]]:
    """Through an operation on parameters alone: from per-example gradients of its outputs to those of its inputs.

    Args:
        operation: The operation.
        slots: The inputs whose gradients are wanted.
        shapes: Of its outputs.
        outputs: Per output, what its uses add to its gradient.
        examples: B.
    """
    if len(outputs) == 1 and len(slots) == 1 and (same := _still_a_product(operation, next(iter(outputs.values())))):
        return {slots[0]: [same]}
    result: dict[Slot, list[Contribution]] = {slot: [] for slot in slots}
    for k, parts in outputs.items():
        gradient = _dense(merged(parts), shapes[k], examples)
        for slot in slots:
            result[slot].append(_pulled(Use(operation, (slot,), None, torch.empty(0), examples, k), gradient))
    return result


def _pulled(use: Use, gradient: Stacked | Deferred) -> Contribution:
    slot = use.slots[0]
    if isinstance(gradient, Stacked):
        return contributions_of(replace(use, gradient=gradient.gradients))[1][slot]

    def compute(example: int) -> Tensor:
        one = replace(use, gradient=gradient.compute(example)[None], examples=1)
        buffer = torch.zeros_like(use.operation[slot], dtype=one.gradient.dtype)
        contributions_of(one)[1][slot].add_to(buffer, 0)
        return buffer

    return Deferred(use.examples, gradient.device, compute)


def _still_a_product(operation: Operation, parts: list[Contribution]) -> Outer | None:
    """The contribution to a matrix that was used as its transpose, or in another dtype."""
    match merged(parts):
        case [Outer() as outer]:
            if operation.name in ("to", "float", "double", "half", "bfloat16", "contiguous", "clone"):
                return outer
            if operation.name in ("t", "transpose", "permute", "__get__") and _swaps(operation):
                return Outer(outer.right, outer.left)
    return None


def _swaps(operation: Operation) -> bool:
    source, result = operation.args[0], operation.run({})
    turned = result.ndim == 2 and result.shape == source.shape[::-1]
    return turned and result.stride() == source.stride()[::-1] and source.stride(0) != source.stride(1)


def _dense(parts: list[Contribution], shape: tuple[int, ...], examples: int) -> Stacked | Deferred:
    if len(parts) == 1 and isinstance(parts[0], Stacked | Deferred):
        return parts[0]
    like = next((p.left if isinstance(p, Outer) else p.gradients) for p in parts if not isinstance(p, Deferred))

    def compute(example: int) -> Tensor:
        buffer = like.new_zeros(shape)
        for part in parts:
            part.add_to(buffer, example)
        return buffer

    deferred = Deferred(examples, like.device, compute)
    return stacked(deferred) if math.prod(shape) * examples * like.element_size() <= STACKED_BYTES else deferred


_RULES: dict[Any, Rule] = {
    F.linear: _product,
    torch.matmul: _product_transposed,
    torch.mm: _product_transposed,
    torch.Tensor.matmul: _product_transposed,
    torch.Tensor.mm: _product_transposed,
    torch.Tensor.__matmul__: _product_transposed,
    torch.addmm: _product_with_bias,
    torch.einsum: _einsum,
    F.embedding: _lookup,
    F.layer_norm: _norm,
    F.rms_norm: _norm,
    torch.rms_norm: _norm,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    torch.add: _sum,
    torch.Tensor.add: _sum,
    torch.Tensor.add_: _sum,
    torch.Tensor.__add__: _sum,
    torch.Tensor.__radd__: _sum,
    torch.Tensor.__iadd__: _sum,
    torch.Tensor.repeat: _repeat,
}

SUMS = frozenset(function for function, rule in _RULES.items() if rule is _sum)
"""Additions: done right also in place, and whatever happens to their inputs afterwards."""

LINEAR_IN_PLACE = SUMS | {
    getattr(torch.Tensor, name) for name in ("mul_", "div_", "sub_", "__imul__", "__idiv__", "__itruediv__", "__isub__")
}
"""In-place functions whose gradient with respect to what they change does not depend on its value."""
