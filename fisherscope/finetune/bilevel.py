"""Gradients through a training step, for settings that are themselves trained."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHIFT = 0.01
"""Norm of the shift of all weights in the finite difference."""


def hypergradient(
    weights: Sequence[Tensor],
    settings: Sequence[Tensor],
    train_loss: Callable[[], Tensor],
    validation_loss: Callable[[], Tensor],
    learning_rate: float,
    *,
    shift: float = SHIFT,
) -> list[Tensor]:
    r"""The gradient of the validation loss after one step of gradient descent, for what the training loss depends on.

    With :math:`w' = w - \eta \nabla_w L_T(w, \alpha)`, :math:`v = \nabla_w L_V(w', \alpha)` and
    :math:`\varepsilon = c / \lVert v \rVert`,

    .. math:: \frac{d}{d\alpha} L_V(w', \alpha) \approx \nabla_\alpha L_V(w', \alpha)
              - \eta \frac{\nabla_\alpha L_T(w + \varepsilon v, \alpha) - \nabla_\alpha L_T(w - \varepsilon v, \alpha)}
              {2 \varepsilon},

    with an error of order :math:`\varepsilon^2`. Takes four forward and backward passes. The weights are moved in place
    and moved back to the very bits they had, also if a loss raises; gradients that they hold are not touched.

    Source: Liu et al., *DARTS*, ICLR 2019, arXiv 1806.09055, equations 7 and 8.

    Args:
        weights: What a training step changes; leaves that need gradients.
        settings: What the gradient is for; leaves that need gradients.
        train_loss: Of the weights and settings as they are; the same number for the same values, so anything that
            it draws comes from a seed.
        validation_loss: The same for other data.
        learning_rate: Of the step, :math:`\eta`.
        shift: Norm of the shift of the weights in the finite difference, :math:`c`.

    Returns:
        One tensor for each of the settings.
    """
    kept = [w.detach().clone() for w in weights]
    try:
        _move(weights, kept, _gradients(train_loss(), weights), -learning_rate)
        found = _gradients(validation_loss(), [*weights, *settings])
        direction, direct = found[: len(weights)], found[len(weights) :]
        norm = torch.stack([d.norm() for d in direction]).norm().item()
        if norm == 0:
            return direct
        size = shift / norm
        ends = []
        for sign in (1, -1):
            _move(weights, kept, direction, sign * size)
            ends.append(_gradients(train_loss(), settings))
    finally:
        set_values(weights, kept)
    return [d - learning_rate * (p - m) / (2 * size) for d, p, m in zip(direct, *ends, strict=True)]


@torch.no_grad()
def set_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _move(tensors: Sequence[Tensor], start: Sequence[Tensor], direction: Sequence[Tensor], size: float) -> None:
    for tensor, value, way in zip(tensors, start, direction, strict=True):
        torch.add(value, way, alpha=size, out=tensor)


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of a loss; 0 for what it does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
