"""A Fisher run: progress, checkpoints, resume."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import storage
from .._progress import progress_bar
from ..data import BatchDigest, describe_batches
from ..models import describe, infer_objective, measuring
from ..objectives import Batch, LossFunction
from ..scores import FORMAT, Estimator, FisherScores, Reduction, Unit, read_tensors, write
from .engines import Engine, hooks_engine, loop_engine

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "hooks", "loop"]

SECONDS_BETWEEN_CHECKPOINTS = 5.0


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    objective: str | LossFunction | None = None,
    estimator: Estimator = "empirical",
    unit: Unit = "sequence",
    reduction: Reduction = "mean",
    engine: EngineName = "auto",
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> FisherScores:
    r"""Empirical Fisher information of every entry of a model.

    .. math::  F_i = \frac{1}{N} \sum_{n=1}^{N} \Big(\frac{\partial \ell_n}{\partial \theta_i}\Big)^2

    with :math:`\ell_n` the loss of example :math:`n`, model in eval mode: exactly what a loop of backward passes
    with one example each gives (Kunstner et al., arXiv 1905.12558, call it the empirical Fisher). All uses of a tied
    parameter are added before squaring. The model is left as it was.

    Args:
        model: Any ``nn.Module``; the parameters that require a gradient are scored.
        batches: A re-iterable of dicts as a Hugging Face collator makes them (``input_ids``, ``attention_mask``,
            ``labels``: -100 ignored, causal labels unshifted), the example axis first.
        objective: ``"mlm"``, ``"causal-lm"``, ``"seq2seq-lm"``, ``"classification"``, ``"regression"``, or a function
            ``(model, batch) -> losses of shape [B]``; None infers it from the model's head.
        estimator: ``"empirical"``: the labels are those of the data.
        unit: ``"sequence"``: every example is one term of the sum.
        reduction: Whether :math:`\ell_n` is the ``"mean"`` or the ``"sum"`` over the example's scored tokens.
        engine: ``"loop"`` is one backward pass per example, ``"hooks"`` the batched engine; ``"auto"`` means hooks.
        progress: Show a bar with the expected time to the end.
        checkpoint: A file for the sums so far; when it exists the run goes on where it stopped. It stays at the end, so
            that nothing is lost before the scores are saved; delete it then.

    Returns:
        Scores in the parameters' shapes, on the CPU, float32 (float64 for a float64 model), squared nats per squared
        unit.
        Examples with no scored token are skipped; ``provenance["skipped"]`` counts them.

    Raises:
        ValueError: If no parameter requires a gradient, a loss is not finite, no example has anything to score,
            or the checkpoint belongs to another run.
    """
    objective = objective or infer_objective(model)
    scored = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not scored:
        raise ValueError("A Fisher run scores the parameters that require a gradient, but this model has none.")
    for name, value, known in (
        ("estimator", estimator, get_args(Estimator)),
        ("unit", unit, get_args(Unit)),
        ("reduction", reduction, get_args(Reduction)),
        ("engine", engine, get_args(EngineName)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}.")
    engine = "loop" if engine == "loop" else "hooks"
    facts = _facts(model, batches, objective, reduction, engine)
    state = _State.start(scored) if checkpoint is None else _State.resume(Path(checkpoint), scored, facts)
    add = (loop_engine if engine == "loop" else hooks_engine)(model, objective, reduction)
    with measuring(model):
        _run(add, batches, state, facts, Path(checkpoint) if checkpoint else None, progress)
    if not state.used:
        raise ValueError(
            "None of the examples has a scored token (a label that is not -100); check labels and objective."
        )
    if state.seen > state.used:
        logger.warning("%d of %d examples have no scored token and were skipped.", state.seen - state.used, state.seen)
    facts["provenance"]["data"]["fingerprint"] = facts["provenance"]["data"]["fingerprint"] or state.digest
    provenance = storage.provenance(**facts["provenance"], skipped=state.seen - state.used)
    scores = {name: (total / state.used).cpu() for name, total in state.sums.items()}
    return FisherScores(scores, state.used, facts["estimator"], facts["unit"], reduction, provenance)


@dataclass
class _State:
    """How far a run has come.

    Attributes:
        sums: Parameter name to sum of squared gradients.
        digest: Fingerprint of the batches done.
        batches: Number of batches done.
        seen: Number of examples in them.
        used: Number of those that had something to score.
    """

    sums: dict[str, Tensor]
    digest: str = ""
    batches: int = 0
    seen: int = 0
    used: int = 0

    @staticmethod
    def start(scored: Mapping[str, nn.Parameter]) -> "_State":
        def wide(p: Tensor) -> torch.dtype:
            return torch.float64 if p.dtype == torch.float64 else torch.float32

        return _State({name: torch.zeros_like(p, dtype=wide(p)) for name, p in scored.items()})

    @staticmethod
    def resume(path: Path, scored: Mapping[str, nn.Parameter], facts: Mapping[str, Any]) -> "_State":
        if not path.exists():
            return _State.start(scored)
        with storage.open_hdf5(path, FORMAT) as file:
            before = storage.attributes(file)
            if "progress" not in before:
                raise ValueError(
                    f"{path} is a finished scores file, not the checkpoint of a run; name another checkpoint."
                )
            now = {**facts["provenance"], "reduction": facts["reduction"]}
            origin = {**json.loads(before["provenance"]), "reduction": before["reduction"]}
            origin = {key: origin.get(key) for key in now}
            if found := storage.difference(origin, json.loads(json.dumps(now))):
                raise ValueError(
                    f"{path} was begun with another {found}; repeat that command to go on, or delete the file to start "
                    "afresh."
                )
            saved = read_tensors(file)
            if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in scored.items()}:
                raise ValueError(f"{path} was begun with another set of parameters; delete it to start afresh.")
            sums = {name: tensor.to(scored[name].device) for name, tensor in saved.items()}
            batches, seen, used = (int(v) for v in before["progress"])
        logger.info("Going on after %d examples.", seen)
        return _State(sums, str(before["digest"]), batches, seen, used)

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        counts = {"num_examples": self.used, "progress": [self.batches, self.seen, self.used], "digest": self.digest}
        with storage.atomic(path) as temporary:
            attributes = {key: facts[key] for key in ("estimator", "unit", "reduction")} | counts
            write(temporary, self.sums, attributes, storage.provenance(**facts["provenance"]))


def _facts(
    model: nn.Module, batches: Iterable[Batch], objective: str | LossFunction, reduction: str, engine: str
) -> dict[str, Any]:
    """What identifies a run: a resumed run must agree on all of it."""
    name = objective if isinstance(objective, str) else getattr(objective, "__qualname__", "a function")
    provenance = {"model": describe(model), "data": describe_batches(batches), "objective": name, "engine": engine}
    return {"estimator": "empirical", "unit": "sequence", "reduction": reduction, "provenance": provenance}


def _run(
    add: Engine, batches: Iterable[Batch], state: _State, facts: Mapping[str, Any], checkpoint: Path | None, shown: bool
) -> None:
    total, done, number = getattr(batches, "num_examples", None), state.batches, 0
    digest, next_save = BatchDigest(), time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
    with progress_bar(total, "Fisher", "example", done=state.seen, shown=shown) as bar:
        for number, batch in enumerate(batches, 1):
            digest.update(batch)
            if number == done and str(digest) != state.digest:
                raise _other_data(checkpoint)
            if number <= done:
                continue
            size = len(next(iter(batch.values())))
            state.used += add(batch, state.sums)
            state.digest, state.batches, state.seen = str(digest), number, state.seen + size
            bar.update(size)
            if checkpoint and time.monotonic() >= next_save:
                next_save = _save(state, checkpoint, facts)
    if number < done:
        raise _other_data(checkpoint)
    if checkpoint:
        _save(state, checkpoint, facts)


def _save(state: _State, checkpoint: Path, facts: Mapping[str, Any]) -> float:
    """Write the sums so far, and tell when to do so again: saving takes at most a twentieth of the run."""
    began = time.monotonic()
    if state.used:
        state.save(checkpoint, facts)
    return time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS * (1 + 4 * (time.monotonic() - began))


def _other_data(checkpoint: Path | None) -> ValueError:
    return ValueError(f"{checkpoint} was begun with other data; delete it to start afresh.")
