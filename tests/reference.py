"""Slow, obvious and independent: what every fast path is compared with.

Nothing here uses fisherscope. Losses come from full logits by the formula, gradients from one backward pass per
example, selections from one global sort, landscapes from a deep copy of the model per point.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Example = Mapping[str, Tensor]
Objective = str | Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def example_loss(model: nn.Module, example: Example, objective: Objective, reduction: str = "mean") -> Tensor | None:
    """The loss of one example on its own, or None where it has nothing to score."""
    inputs = {name: value[None] for name, value in example.items()}
    if callable(objective):
        return objective(model, inputs)[0]
    labels = inputs.pop("labels")[0]
    if objective == "seq2seq-lm":
        start = torch.tensor([model.config.decoder_start_token_id])
        inputs["decoder_input_ids"] = torch.cat([start, labels.clamp(min=0)[:-1]])[None]
    logits = model(**inputs).logits[0]
    if objective == "regression":
        return (logits[0] - labels) ** 2
    if objective == "classification":
        return logits.exp().sum().log() - logits[labels]
    if objective == "causal-lm":
        logits, labels = logits[:-1], labels[1:]
    terms = [logits[t].exp().sum().log() - logits[t, labels[t]] for t in range(len(labels)) if labels[t] != -100]
    if not terms:
        return None
    return sum(terms) / (len(terms) if reduction == "mean" else 1)


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of one loss; 0 where the loss does not depend on a parameter."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def fisher(
    model: nn.Module, examples: Sequence[Example], objective: Objective, reduction: str = "mean"
) -> dict[str, Tensor]:
    """Mean of the squared gradients of the examples that have something to score, each run alone and unpadded."""
    losses = [example_loss(model, example, objective, reduction) for example in examples]
    squares = [{n: g**2 for n, g in gradient(model, loss).items()} for loss in losses if loss is not None]
    return {name: sum(square[name] for square in squares) / len(squares) for name in squares[0]}


def mean_loss(model: nn.Module, examples: Sequence[Example], objective: Objective) -> float:
    """Loss per scored token over all examples."""
    with torch.no_grad():
        totals = [example_loss(model, example, objective, "sum") for example in examples]
    scored = [total for total in totals if total is not None]
    tokens = sum(number_scored(example, objective) for example in examples)
    return float(sum(scored)) / tokens


def number_scored(example: Example, objective: Objective) -> int:
    """How many terms the loss of an example has."""
    if callable(objective) or example["labels"].ndim == 0:
        return 1
    labels = example["labels"][1:] if objective == "causal-lm" else example["labels"]
    return int((labels != -100).sum())


def softmax_regression_fisher(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """On paper: mean over n of (p_c - [y = c])^2 x_j^2 for W_cj; the same without x for b_c."""
    error = (x @ weight.T + bias).softmax(1) - nn.functional.one_hot(y, len(bias))
    return torch.einsum("nc,nj->cj", error**2, x**2) / len(x), (error**2).mean(0)


def squared_error_fisher(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """On paper: mean over n of 4 r^2 x_j^2 for w_j and 4 r^2 for b, with r = f - y and loss r^2."""
    residual = x @ weight[0] + bias - y
    return (4 * residual[:, None] ** 2 * x**2).mean(0, keepdim=True), (4 * residual**2).mean(0, keepdim=True)


def select_top(
    scores: Mapping[str, Tensor],
    fraction: float,
    group_of: Callable[[str], str] = lambda name: "model",
    granularity: str = "entry",
    columns: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Sort every group's units by falling mean score, then position, and take the first round(fraction * n).

    ``columns`` names the matrices whose rows, in the sense of output units, are stored as columns.
    """
    selected = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    groups: dict[str, list[tuple[float, int, str, tuple]]] = {}
    for name, score in scores.items():
        units = groups.setdefault(group_of(name), [])
        for index in _units(score, granularity, name in columns):
            units.append((-score[index].double().mean().item(), len(units), name, index))
    for units in groups.values():
        for _, _, name, index in sorted(units)[: round(fraction * len(units))]:
            selected[name][index] = True
    return selected


def _units(score: Tensor, granularity: str, column: bool) -> list[tuple]:
    """What indexes the units of a tensor, in order of position."""
    if granularity == "parameter":
        return [(...,)]
    if granularity == "row" and score.ndim > 1:
        return [(slice(None), c) for c in range(score.shape[1])] if column else [(r,) for r in range(len(score))]
    return [tuple(int(i) for i in index) for index in torch.ones_like(score).nonzero()]


def landscape(
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    directions: Sequence[Mapping[str, Tensor]],
    steps: Sequence[Sequence[float]],
) -> Tensor:
    """Move a copy of the model to every point of a grid of one or two axes and measure."""
    if len(directions) == 1:
        return torch.tensor([loss(_moved(model, [(a, directions[0])])) for a in steps[0]], dtype=torch.float64)
    rows = [
        [loss(_moved(model, [(a, directions[0]), (b, directions[1])])) for b in steps[1]] for a in steps[0]
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def _moved(model: nn.Module, moves: Sequence[tuple[float, Mapping[str, Tensor]]]) -> nn.Module:
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for step, direction in moves:
            for name, tensor in direction.items():
                parameters[name] += step * tensor
    return model
