"""Where the examples of a batch are in a tensor, and how to bring them to the front."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class ByExample:
    """An axis counts the examples, alone or merged with another axis.

    Attributes:
        axis: The axis.
        merged: None: its length is the number of examples B. ``"outer"``: index ``n * m + j`` belongs to example n, as
            in ``[B, T, D].view(-1, D)``. ``"inner"``: index ``j * B + n`` does, as in ``[T, B, D].view(-1, D)``.
    """

    axis: int
    merged: Literal["outer", "inner"] | None = None

    def fits(self, tensor: Tensor, examples: int) -> bool:
        """Whether the axis of a tensor has a possible length for so many examples."""
        if tensor.ndim <= self.axis:
            return False
        length = tensor.shape[self.axis]
        return length == examples if self.merged is None else length % examples == 0

    def first(self, tensor: Tensor, examples: int) -> Tensor:
        """The tensor with the examples as first axis; what they were merged with follows as an axis of its own."""
        if self.merged is None:
            return tensor.movedim(self.axis, 0)
        if self.merged == "outer":
            return tensor.unflatten(self.axis, (examples, -1)).movedim(self.axis, 0)
        return tensor.unflatten(self.axis, (-1, examples)).movedim(self.axis + 1, 0)

    def only(self, tensor: Tensor, example: int, examples: int) -> Tensor:
        """A copy that is zero for all other examples."""
        result = tensor.new_zeros(tensor.shape)
        self.first(result, examples)[example] = self.first(tensor, examples)[example]
        return result


def layouts_holding(gradient: Tensor, example: int, examples: int) -> set[ByExample]:
    """All layouts under which only entries of one example are non-zero; none for a gradient that is zero.

    The gradient of one example's loss with respect to a tensor tells where that example is in it.
    """
    nonzero = gradient != 0
    if not bool(nonzero.any()):
        return set()
    found = set()
    for axis, length in enumerate(gradient.shape):
        if length % examples == 0 and length:
            places = nonzero.movedim(axis, 0).reshape(length, -1).any(1).nonzero()[:, 0]
            found |= {ByExample(axis, merged) for merged in _possible(places, length, example, examples)}
    return found


def _possible(places: Tensor, length: int, example: int, examples: int) -> Iterator[Literal["outer", "inner"] | None]:
    group = length // examples
    if group == 1:
        if bool((places == example).all()):
            yield None
        return
    if bool((places // group == example).all()):
        yield "outer"
    if bool((places % examples == example).all()):
        yield "inner"
