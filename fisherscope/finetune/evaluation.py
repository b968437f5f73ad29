"""What a model predicts for validation examples, and how good it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import Batches
from ..data.sources import LABELLED_OBJECTIVES
from ..metrics import metrics_of
from ..models import measuring
from ..objectives import predict
from .results import SELECT

Rows = list[dict[str, Any]]
Evaluation = Callable[[], tuple[Rows, dict[str, float]]]
"""Gives the rows of :func:`predicted`, and the metrics by name."""


def measured(
    measure: Callable[[Sequence[Batches]], tuple[Rows, dict[str, float]]],
    report: Sequence[Batches],
    select: Sequence[Batches],
) -> tuple[Rows, dict[str, float]]:
    """The rows and metrics of the report examples, and the metrics of the select examples, marked as such.

    Args:
        measure: Measures examples of every task.
        report: Of every task.
        select: Likewise, or nothing.
    """
    rows, found = measure(report)
    chosen = measure(select)[1] if select else {}
    return rows, found | {f"{SELECT}{name}": value for name, value in chosen.items()}


def evaluated(model: nn.Module, batches: Batches, objective: str) -> tuple[Rows, dict[str, float]]:
    """What a model says of examples, and its metrics."""
    rows = predicted(model, batches, objective)
    return rows, _measured(rows, model, objective)


def predicted(model: nn.Module, batches: Batches, objective: str) -> Rows:
    """Prediction, label, summed loss and number of scored tokens of every example, in the order of the source."""
    order = sorted(range(batches.num_examples), key=lambda i: batches.examples[i]["input_ids"].size)
    rows: Rows = [{} for _ in order]
    with measuring(model), torch.no_grad():
        for start in range(0, len(order), 4 * batches.batch_size):
            chosen = order[start : start + 4 * batches.batch_size]
            predictions = predict(model, batches.collate([batches.examples[i] for i in chosen]), objective)
            losses = predictions.losses()
            columns: dict[str, list[Any]] = {"loss": losses.total.tolist(), "count": losses.count.tolist()}
            if objective in LABELLED_OBJECTIVES:
                outputs = predictions.outputs[:, 0]
                found = outputs.argmax(-1) if objective == "classification" else outputs
                columns |= {"predicted": found.tolist(), "label": predictions.labels[:, 0].tolist()}
            for row, i in enumerate(chosen):
                rows[i] = {"example": i, **{name: values[row] for name, values in columns.items()}}
    return rows


def _measured(rows: Sequence[Mapping[str, Any]], model: nn.Module, objective: str) -> dict[str, float]:
    """Loss per scored token, and the metrics of labelled objectives."""
    measured = {"loss": sum(r["loss"] for r in rows) / max(sum(r["count"] for r in rows), 1)}
    if objective in LABELLED_OBJECTIVES:
        found, labels = (np.array([r[name] for r in rows]) for name in ("predicted", "label"))
        classes: Any = getattr(model.config, "num_labels", None) if objective == "classification" else None
        measured |= metrics_of(found, labels, classes)
    return measured
