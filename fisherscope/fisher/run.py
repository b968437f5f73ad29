"""A Fisher run: progress, checkpoints, resume, and stopping when a mask has settled."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from .. import distributed, storage
from .._progress import progress_bar
from ..data import BatchDigest, Batches, describe_batches
from ..models import check_head, describe, device_of, infer_objective, measuring
from ..objectives import Batch, LossFunction, check_batch, num_scored
from ..scores import Estimator, FisherScores, Reduction, Unit
from .engines import Engine, batch_mean_engine, loop_engine
from .estimand import PUBLISHED, Estimand
from .halving import within_memory
from .hooks import hooks_engine
from .sharded import sharded_engine
from .state import State

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
    draws: int = 1,
    tokens: int | None = None,
    seed: int = 0,
    engine: EngineName = "auto",
    halves: bool = False,
    offload: bool = False,
    until_stable: float | None = None,
    fraction: float = 0.1,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> FisherScores:
    r"""Diagonal Fisher information of every entry of a model.

    .. math::  F_i = \frac{1}{N} \sum_{n=1}^{N} \Big(\frac{\partial \ell_n}{\partial \theta_i}\Big)^2

    with :math:`\ell_n` the loss of example :math:`n`, model in eval mode: exactly what a loop of backward passes
    with one example each gives (Kunstner et al., arXiv 1905.12558, call it the empirical Fisher). All uses of a tied
    parameter are added before squaring. The model is left as it was.

    In a process group of ``torch.distributed`` every rank must call it with the same model and batches: each computes
    its share of the batches, rank 0 alone keeps the checkpoint, and all get the same scores. Those of a model that
    is sharded by ``torch.distributed.fsdp.fully_shard`` are sharded alike (``DTensor``); save them on all ranks.

    Args:
        model: Any ``nn.Module``; the parameters that require a gradient are scored.
        batches: A re-iterable of dicts as a Hugging Face collator makes them (``input_ids``, ``attention_mask``,
            ``labels``: -100 ignored, causal labels unshifted), the example axis first. Of a loader that draws anew in
            every pass, give ``list(loader)``.
        objective: ``"mlm"``, ``"causal-lm"``, ``"seq2seq-lm"``, ``"classification"``, ``"regression"``, or a function
            ``(model, batch) -> losses of shape [B]``; None infers it from the model's head.
        estimator: ``"empirical"``: the labels are those of the data. ``"sampled"``: they are drawn from the model;
            unbiased for the Fisher information. ``"exact"``: the expectation over all labels, one backward pass per
            class. ``"squared-batch-mean"`` and ``"absolute-gradient"`` are what published code computes; formulas
            in :class:`Estimand`.
        unit: ``"sequence"``: every example is one term of the sum. ``"token"``: every scored token is, at the price of
            a backward pass per token.
        reduction: Whether :math:`\ell_n` is the ``"mean"`` or the ``"sum"`` over the example's scored tokens.
        draws: Label draws per example for ``"sampled"``; they share one forward pass.
        tokens: For the unit ``"token"``: so many random tokens of every example stand for all of them, without bias.
        seed: Of the drawn labels and tokens.
        engine: ``"loop"`` is one backward pass per example, ``"hooks"`` the batched engine; ``"auto"`` means hooks.
        halves: Whether to keep the scores from either half of the examples apart (``FisherScores.halves``), which takes
            the memory of the scores once more; ``stability`` does not need them.
        offload: Whether to keep the sums on the host, to save memory of the device.
        until_stable: Stop as soon as the mask of the top ``fraction`` is so stable: the expected overlap with that of
            a fresh draw of as many examples (:meth:`FisherScores.stability`), such as 0.95. It is looked at after 8
            batches and a quarter later each time. Batches of :func:`load_batches` are then taken in random order, so
            that those seen are a fair selection; mind the order of others. None takes all batches.
        fraction: Share of the entries that mask selects; its stability is followed beside those of 0.01, 0.1 and 0.5.
        progress: Show a bar with the expected time to the end.
        checkpoint: A file for the sums so far; when it exists the run goes on where it stopped. It stays at the end, so
            that nothing is lost before the scores are saved; delete it then.

    Returns:
        Scores in the parameters' shapes, on the CPU, float32 (float64 for a float64 model), squared nats per squared
        unit.
        Examples with no scored token are skipped; ``provenance["skipped"]`` counts them.

    Raises:
        ValueError: If no parameter requires a gradient, a loss is not finite, no example has anything to score,
            the estimator does not apply, ``until_stable`` or ``fraction`` is no share, or the checkpoint belongs to
            another run.
    """
    objective = objective or infer_objective(model)
    check_head(model, objective)
    scored = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not scored:
        raise ValueError("A Fisher run scores the parameters that require a gradient, but this model has none.")
    estimand = Estimand(estimator, unit, reduction, draws, tokens, seed)
    is_sharded = any(map(distributed.is_sharded, scored.values()))
    make_engine = _engine(engine, estimand, is_sharded)
    if offload and is_sharded:
        raise ValueError("The sums of a sharded model stay on its devices; leave out offload.")
    for name, share in (("until_stable", until_stable), ("fraction", fraction)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {share:g}.")
    if until_stable is not None:
        batches = in_random_order(batches)
    stopping = None if until_stable is None else {"until_stable": until_stable, "fraction": fraction}
    facts = _facts(model, batches, objective, estimand, make_engine.__name__, halves, stopping)
    _check_same_on_all_ranks(facts)
    path = Path(checkpoint) if checkpoint else None
    if path and (distributed.is_first() or is_sharded):
        state = State.resume(path, scored, halves, fraction, facts, offload=offload)
    else:
        state = State.start(scored, halves, fraction, offload=offload)
    state.join()
    if until_stable is not None and fraction not in state.quarters.fractions:
        raise ValueError(f"fraction must select some and not all of the entries, but {fraction:g} does not.")
    add = make_engine(model, objective, estimand)
    if not is_sharded and estimator != "squared-batch-mean":  # whose result depends on the size of the batches
        add = within_memory(add, rehearse=device_of(model).type == "cuda")
    with measuring(model):
        _run(add, batches, objective, state, facts, path, progress)
    if not state.seen:
        raise ValueError("A Fisher run needs at least one batch, but there is none; check the data.")
    if not state.used:
        raise ValueError(
            "None of the examples has a scored token (a label that is not -100); check labels and objective."
        )
    if state.skipped:
        logger.warning("%d of %d examples have no scored token and were skipped.", state.skipped, state.seen)
    facts["provenance"]["data"]["fingerprint"] = facts["provenance"]["data"]["fingerprint"] or state.digest
    provenance = storage.provenance(**facts["provenance"], skipped=state.skipped)
    tensors, first_half, quarters = state.finished()
    if not is_sharded and not any(bool(t.any()) for t in tensors.values()):
        logger.warning(
            "All scores are 0: the loss of these examples has no gradient at any parameter that is scored; look for a "
            "detach() or no_grad() in the model or the loss."
        )
    scores = FisherScores(tensors, state.used, estimator, unit, reduction, provenance, first_half, quarters)
    if until_stable is not None:
        _report_stopping(scores, until_stable, fraction)
    return scores


def _engine(
    name: EngineName, estimand: Estimand, sharded: bool
) -> Callable[[nn.Module, str | LossFunction, Estimand], Engine]:
    if name not in get_args(EngineName):
        raise ValueError(f"engine must be {' or '.join(map(repr, get_args(EngineName)))}, got {name!r}.")
    if name == "hooks" and estimand.estimator in PUBLISHED:
        raise ValueError(f"The estimator {estimand.estimator} has no fast engine; leave out the engine.")
    if sharded and (name == "loop" or estimand.estimator in PUBLISHED):
        raise ValueError("Sharded parameters have only the fast engine, and not the estimators of published code.")
    if sharded:
        return sharded_engine
    if estimand.estimator == "squared-batch-mean":
        return batch_mean_engine
    return loop_engine if name == "loop" or estimand.estimator in PUBLISHED else hooks_engine


def _facts(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: str | LossFunction,
    estimand: Estimand,
    engine: str,
    halves: bool,
    stopping: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What identifies a run: a resumed run must agree on all of it."""
    settings = asdict(estimand)
    kind = {key: settings.pop(key) for key in ("estimator", "unit", "reduction")}
    provenance = {
        "model": describe(model),
        "data": describe_batches(batches),
        "objective": objective if isinstance(objective, str) else getattr(objective, "__qualname__", "a function"),
        "engine": "hooks" if engine == "sharded_engine" else engine.removesuffix("_engine"),
        "draws": settings,
        "stopping": stopping,
    }
    return {**kind, "halves": halves, "provenance": provenance}


def _check_same_on_all_ranks(facts: Mapping[str, Any]) -> None:
    if found := storage.difference(distributed.first_says(facts), facts):
        raise ValueError(f"All ranks share one run, but rank {distributed.rank()} was given another {found}.")


def in_random_order(batches: Iterable[Batch]) -> Iterable[Batch]:
    """The same examples, of which any first few are a fair selection, if the order is ours to choose."""
    if not isinstance(batches, Batches):
        return batches
    seed = batches.settings.get("seed", 0)
    order = np.random.default_rng(int(str(seed))).permutation(batches.num_examples)
    settings = {**batches.settings, "order": "random"}
    return replace(batches, examples=[batches.examples[i] for i in order], settings=settings)


def _report_stopping(scores: FisherScores, until_stable: float, fraction: float) -> None:
    """Say whether the mask has settled, by the last value noted."""
    curve = scores.quarters.curve(fraction) if scores.quarters else []
    number, reached = curve[-1] if curve else (scores.num_examples, float("nan"))
    text = "the top %g %% of the entries has an expected overlap of %.3f with that of a fresh draw, after %d examples"
    if reached >= until_stable:
        logger.info(f"The mask has settled: {text}.", 100 * fraction, reached, number)
    else:
        logger.warning(
            f"The data ended before the mask settled: {text}, but %g was asked for; give more examples.",
            100 * fraction,
            reached,
            number,
            until_stable,
        )


def _run(
    add: Engine,
    batches: Iterable[Batch],
    objective: str | LossFunction,
    state: State,
    facts: Mapping[str, Any],
    checkpoint: Path | None,
    shown: bool,
) -> None:
    total, next_save = getattr(batches, "num_examples", None), time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
    with progress_bar(total, "Fisher", "example", done=state.seen, shown=shown and distributed.is_first()) as bar:
        for batches_of_round, digest in _rounds(batches, state, facts, checkpoint):
            before = state.seen
            skipped = sum(int((num_scored(batch, objective) == 0).sum()) for batch in batches_of_round)
            state.add(add, batches_of_round, digest, skipped)
            bar.update(state.seen - before)
            if checkpoint and distributed.first_says(time.monotonic() >= next_save):
                next_save = _save(state, checkpoint, facts)
    if distributed.first_says(state.digest) != state.digest:
        raise ValueError("All ranks share one run, but they were given different batches; give every rank the same.")
    if checkpoint:
        _save(state, checkpoint, facts)
    state.unite()


def _rounds(
    batches: Iterable[Batch], state: State, facts: Mapping[str, Any], checkpoint: Path | None
) -> Iterator[tuple[list[Batch], str]]:
    """The batches still to be done, one per rank at a time, and a fingerprint of all up to there."""
    done, number, digest, waiting = state.batches, 0, BatchDigest(), list[Batch]()
    for number, batch in enumerate(batches, 1):
        if number > done and not waiting and _has_settled(state, facts):
            break
        check_batch(batch)
        digest.update(batch)
        if number == done and str(digest) != state.digest:
            raise _other_data(checkpoint)
        if number > done:
            waiting.append(batch)
        if waiting and state.ends_round(number):
            yield waiting, str(digest)
            waiting = []
    if number < done:
        raise _other_data(checkpoint)
    if waiting:
        yield waiting, str(digest)


def _has_settled(state: State, facts: Mapping[str, Any]) -> bool:
    wanted = facts["provenance"]["stopping"]
    return wanted is not None and state.is_stable(wanted["fraction"], wanted["until_stable"])


def _save(state: State, checkpoint: Path, facts: Mapping[str, Any]) -> float:
    """Write the sums so far, and tell when to do so again: saving takes at most a twentieth of the run."""
    began = time.monotonic()
    state.save(checkpoint, facts)
    return time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS * (1 + 4 * (time.monotonic() - began))


def _other_data(checkpoint: Path | None) -> ValueError:
    return ValueError(f"{checkpoint} was begun with other data; delete it to start afresh.")
