r"""What the uses of a tensor add to its gradient, for all examples of a batch, in the most compact form.

:func:`merged` and :func:`accumulate` add up the contributions of all uses :math:`u` of a parameter, example by example,
and only then square: :math:`\sum_n (\sum_u G_n^{(u)})^2`.

Shape names: B examples, T positions, D width, V rows of an embedding.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._typing import Float, Int
from .kernels import accumulate_products, compact


@dataclass(frozen=True)
class Stacked:
    """Every example's gradient in full; for tensors that are small, such as biases and norms."""

    gradients: Float[Tensor, "examples *parameter"]

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.gradients)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.gradients.device

    def add_to(self, buffer: Tensor, example: int) -> None:
        """Add the gradient of one example to ``buffer``."""
        buffer.add_(self.gradients[example].view_as(buffer))


@dataclass(frozen=True)
class Outer:
    r""":math:`G_n = \sum_t g_{nt}\, x_{nt}^\top`: the weight of a matrix product, left as its two factors."""

    left: Float[Tensor, "examples positions rows"]
    right: Float[Tensor, "examples positions columns"]

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.left)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.left.device

    def add_to(self, buffer: Tensor, example: int) -> None:
        """Add the gradient of one example to ``buffer``."""
        left, right = self.left[example], self.right[example]
        buffer.view(left.shape[1], right.shape[1]).addmm_(left.T, right)


@dataclass(frozen=True)
class Lookup:
    r""":math:`G_n[v] = \sum_{t: id_{nt} = v} g_{nt}`: the rows of an embedding, never as a dense table."""

    ids: Int[Tensor, "examples positions"]
    gradients: Float[Tensor, "examples positions width"]

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.ids.device

    def segments(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over equal ids of one example: the examples, the ids and the sums, distinct (example, id) pairs only."""
        pairs = (torch.arange(len(self.ids), device=self.ids.device)[:, None] * rows + self.ids).flatten()
        distinct, segment = pairs.unique(return_inverse=True)
        width = self.gradients.shape[-1]
        sums = self.gradients.new_zeros(len(distinct), width)
        sums.index_add_(0, segment, self.gradients.reshape(-1, width))
        return distinct // rows, distinct % rows, sums

    def add_to(self, buffer: Tensor, example: int) -> None:
        """Add the gradient of one example to ``buffer``."""
        buffer.index_add_(0, self.ids[example], self.gradients[example])


@dataclass(frozen=True)
class Deferred:
    """Every example's gradient in full, but computed only when its turn comes."""

    num_examples: int
    device: torch.device
    compute: Callable[[int], Tensor]

    def add_to(self, buffer: Tensor, example: int) -> None:
        """Add the gradient of one example to ``buffer``."""
        buffer.add_(self.compute(example).view_as(buffer))


Contribution = Stacked | Outer | Lookup | Deferred


def merged(contributions: Sequence[Contribution]) -> list[Contribution]:
    """The same sum with one contribution of each kind; products of several shapes stay apart."""
    result: list[Contribution] = []
    if deferred := [c for c in contributions if isinstance(c, Deferred)]:
        first, *others = deferred
        result.append(replace(first, compute=lambda n: sum((c.compute(n) for c in others), first.compute(n))))
    if lookups := [c for c in contributions if isinstance(c, Lookup)]:
        result.append(Lookup(torch.cat([c.ids for c in lookups], 1), torch.cat([c.gradients for c in lookups], 1)))
    outers: dict[tuple[int, int], list[Outer]] = {}
    for c in contributions:
        if isinstance(c, Outer):
            outers.setdefault((c.left.shape[-1], c.right.shape[-1]), []).append(c)
    result += [_joined(same) for same in outers.values()]
    if stacks := [c for c in contributions if isinstance(c, Stacked)]:
        result.append(Stacked(sum((c.gradients for c in stacks[1:]), stacks[0].gradients)))
    return result


def _joined(outers: Sequence[Outer]) -> Outer:
    if len(outers) == 1:
        return outers[0]
    return Outer(torch.cat([c.left for c in outers], 1), torch.cat([c.right for c in outers], 1))


def accumulate(score: Tensor, contributions: Sequence[Contribution]) -> None:
    """Add the squared per-example gradients of one parameter to its score, in place.

    Args:
        score: Sum of squares so far, in the parameter's shape; on any device.
        contributions: What every use of the parameter in one batch adds to its gradient.
    """
    parts = merged(contributions)
    device = parts[0].device if parts else score.device
    with torch.autocast(device.type, enabled=False):
        if score.device == device:
            _accumulate(score, parts)
        else:  # the sums are kept on the host
            here = torch.zeros(score.shape, dtype=score.dtype, device=device)
            _accumulate(here, parts)
            score.add_(here.to(score.device))


def _accumulate(score: Tensor, parts: Sequence[Contribution]) -> None:
    match parts:
        case [Stacked(gradients)]:
            score.add_(gradients.to(score.dtype).square().sum(0).view_as(score))
        case [Lookup() as lookup]:
            _, ids, sums = lookup.segments(len(score))
            score.index_add_(0, ids, sums.square_())
        case [Outer() as outer]:
            _accumulate_outer(score.view(outer.left.shape[-1], outer.right.shape[-1]), outer)
        case [Lookup() as lookup, Outer() as outer] if score.ndim == 2:
            _accumulate_tied(score, lookup, outer)
        case _:
            _accumulate_in_buffer(score, parts)


def _accumulate_outer(score: Tensor, outer: Outer) -> None:
    if outer.left.shape[1] == 1:  # one position: the square factorises
        score.addmm_(outer.left[:, 0].square().T, outer.right[:, 0].square())
    else:
        accumulate_products(score, *compact(outer.left, outer.right))


def _accumulate_tied(score: Tensor, lookup: Lookup, outer: Outer) -> None:
    r"""An embedding that is also the output projection, without a dense table per example.

    .. math::  \sum_n (H_n + E_n)^2 = \sum_n \Big( \sum_{v \notin n} H_n[v]^2 + \sum_{v \in n} (H_n[v] + E_n[v])^2 \Big)
    """
    left, right, offsets = compact(outer.left, outer.right)
    left = left.contiguous()  # a gradient that is the same everywhere is one number, which cannot be set to 0 in places
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    examples, ids, sums = lookup.segments(len(score))
    bounds = torch.searchsorted(examples, torch.arange(outer.num_examples + 1, device=examples.device)).tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        own, rows = slice(bounds[n], bounds[n + 1]), slice(start, stop)
        columns = ids[own]
        part = left[rows]
        values = part[:, columns]
        score.index_add_(0, columns, torch.addmm(sums[own], values.T, right[rows]).square_())
        done.append((part, columns, values))
    for part, columns, _ in done:
        part.index_fill_(1, columns, 0.0)
    accumulate_products(score, left, right, offsets)
    for part, columns, values in done:  # the gradient itself is autograd's
        part.index_copy_(1, columns, values)


def _accumulate_in_buffer(score: Tensor, parts: Sequence[Contribution]) -> None:
    """One reused buffer of the parameter's size: form an example's whole gradient, square it, add it."""
    buffer = torch.zeros_like(score)
    for example in range(parts[0].num_examples if parts else 0):
        buffer.zero_()
        for part in parts:
            part.add_to(buffer, example)
        score.addcmul_(buffer, buffer)
