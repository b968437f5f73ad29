"""How good predictions are, by the metrics of GLUE."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats

from ._typing import Float, Int

CLASSIFICATION = ("accuracy", "f1", "matthews")
REGRESSION = ("pearson", "spearman")


def accuracy(predicted: Int[np.ndarray, "examples"], labels: Int[np.ndarray, "examples"]) -> float:
    """Share of the examples that are predicted right."""
    return float((predicted == labels).mean())


def f1(predicted: Int[np.ndarray, "examples"], labels: Int[np.ndarray, "examples"]) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where there is nothing to find and nothing found."""
    hits = int(((predicted == 1) & (labels == 1)).sum())
    total = int((predicted == 1).sum()) + int((labels == 1).sum())
    return 2 * hits / total if total else 0.0


def matthews(predicted: Int[np.ndarray, "examples"], labels: Int[np.ndarray, "examples"]) -> float:
    """The correlation of predicted and true classes (Gorodkin 2004 for more than two); 0 if either is constant."""
    classes = np.union1d(predicted, labels)
    p, t = (values[:, None] == classes for values in (predicted, labels))
    p, t = p - p.mean(0), t - t.mean(0)
    size = float(np.sqrt((p**2).sum() * (t**2).sum()))
    return float((p * t).sum()) / size if size else 0.0


def pearson(predicted: Float[np.ndarray, "examples"], labels: Float[np.ndarray, "examples"]) -> float:
    """Linear correlation; 0 if either is constant."""
    return _correlation(stats.pearsonr, predicted, labels)


def spearman(predicted: Float[np.ndarray, "examples"], labels: Float[np.ndarray, "examples"]) -> float:
    """Correlation of the ranks; 0 if either is constant."""
    return _correlation(stats.spearmanr, predicted, labels)


def _correlation(measure: Callable, predicted: np.ndarray, labels: np.ndarray) -> float:
    if is_constant(predicted) or is_constant(labels) or not np.isfinite(predicted).all():
        return 0.0
    return float(measure(predicted, labels).statistic)


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)
}


def metrics_of(predicted: np.ndarray, labels: np.ndarray, num_classes: int | None) -> dict[str, float]:
    """All metrics that fit the labels.

    Args:
        predicted: Class ids, or values.
        labels: True ones.
        num_classes: Of a classification, where F1 is that of class 1 of two; None for a regression.
    """
    names = REGRESSION if num_classes is None else CLASSIFICATION
    return {name: METRICS[name](predicted, labels) for name in names if name != "f1" or num_classes == 2}


def is_constant(predicted: np.ndarray) -> bool:
    """Whether all predictions are the same but for rounding: their standard deviation is a millionth of the largest."""
    with np.errstate(invalid="ignore"):  # infinite ones are no constant
        return bool(np.std(predicted, dtype=np.float64) <= 1e-6 * np.abs(predicted).max())
