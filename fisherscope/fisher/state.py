"""How far a Fisher run has come: sums of squares, kept in halves and quarters, and the checkpoint that holds them."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed, storage
from ..objectives import Batch
from ..scores import FORMAT, means, read_tensors, write
from ..stability import PARTS, Quarters, sampled_positions
from .engines import Engine

logger = logging.getLogger(__name__)

FRACTIONS = (0.01, 0.1, 0.5)
"""Masks whose stability every run follows."""

FIRST_MOMENT = 8
"""Batches after which the stability is noted for the first time; the next moment is a quarter later each time."""


@dataclass
class State:
    """How far a run has come.

    With several ranks, batch number b is done by rank b modulo their number, and ``sums``, ``quarters.sums``,
    ``quarters.num_examples`` and ``used`` are this rank's share, until :meth:`unite`; everything else is of all ranks.

    Attributes:
        sums: Parameter name to sum of squared gradients: of every other batch each, or one set for all batches.
        positions: Parameter name to the entries at which quarters are kept.
        quarters: Sums of every fourth batch there, and their history.
        digest: Fingerprint of the batches done.
        batches: Number of batches done.
        seen: Number of examples in them.
        used: Number of terms of the mean that they stand for.
        skipped: Number of those examples that had nothing to score.
    """

    sums: tuple[dict[str, Tensor], ...]
    positions: dict[str, Tensor]
    quarters: Quarters
    digest: str = ""
    batches: int = 0
    seen: int = 0
    used: int = 0
    skipped: int = 0

    @staticmethod
    def start(scored: Mapping[str, nn.Parameter], halves: bool, fraction: float) -> "State":
        """Nothing done yet."""

        def wide(p: Tensor) -> torch.dtype:
            return torch.float64 if p.dtype == torch.float64 else torch.float32

        sums = tuple({n: torch.zeros_like(p, dtype=wide(p)) for n, p in scored.items()} for _ in range(1 + halves))
        return State(sums, *_empty_quarters(scored, fraction))

    def add(self, engine: Engine, batch: Batch, digest: str, skipped: int) -> None:
        """Add one batch, if it is this rank's, and note the stability when it is time to."""
        if self.batches % distributed.world_size() == distributed.rank():
            self._add_own(engine, batch)
        self.digest, self.batches = digest, self.batches + 1
        self.seen, self.skipped = self.seen + len(next(iter(batch.values()))), self.skipped + skipped
        if _is_moment(self.batches) and (quarters := self._quarters_of_all()).are_filled:
            self.quarters = replace(self.quarters, history=distributed.first_says(quarters.noted().history))

    def _add_own(self, engine: Engine, batch: Batch) -> None:
        part, quarter = self.sums[self.batches % len(self.sums)], self.batches % PARTS
        used = engine(batch, part)
        same_sums = [k for k in range(quarter % len(self.sums), PARTS, len(self.sums)) if k != quarter]
        # Rounded twice, but never below 0: the sum of the others is not above the sum of all.
        row = (self._sampled(part) - self.quarters.sums[same_sums].sum(dim=0)).clamp_(min=0)
        self.quarters = self.quarters.updated(quarter, row, used)
        self.used += used

    def _quarters_of_all(self) -> Quarters:
        counts = distributed.add_up(torch.tensor(self.quarters.num_examples)).tolist()
        return replace(self.quarters, sums=distributed.add_up(self.quarters.sums.clone()), num_examples=tuple(counts))

    def join(self) -> None:
        """Let all ranks know how far rank 0 is; the sums so far stay its share."""
        progress = (self.digest, self.batches, self.seen, self.skipped, self.quarters.history)
        self.digest, self.batches, self.seen, self.skipped, history = distributed.first_says(progress)
        self.quarters = replace(self.quarters, history=history)

    def unite(self) -> None:
        """Make the share of every rank that of all."""
        self.quarters = self._quarters_of_all()
        self.used = sum(self.quarters.num_examples)
        for part in self.sums:
            for total in part.values():
                distributed.add_up(total)

    def finished(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, Quarters]:
        """Scores, the share of the first half, and quarters with the final stability noted."""
        is_noted = self.quarters.history and self.quarters.history[-1][0] == self.used
        quarters = self.quarters if is_noted or not self.quarters.are_filled else self.quarters.noted()
        return *means(self.sums, self.used), quarters

    def is_stable(self, fraction: float, overlap: float) -> bool:
        """Whether the last noted overlap at a fraction is at least as high."""
        curve = self.quarters.curve(fraction)
        return bool(curve) and curve[-1][1] >= overlap

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint, on rank 0; what it holds does not depend on the number of ranks."""
        quarters = self._quarters_of_all()
        if not (used := sum(quarters.num_examples)):
            return
        progress = [self.batches, self.seen, used, self.skipped]
        counts = {"num_examples": used, "progress": progress, "digest": self.digest}
        attributes = {key: facts[key] for key in ("estimator", "unit", "reduction", "halves")} | counts
        groups = {key: _OfAll(sums) for key, sums in zip(("scores", "second_half"), self.sums, strict=False)}
        if not distributed.is_first():
            for sums in groups.values():
                sums.send()
            return
        with storage.atomic(path) as temporary:
            write(temporary, groups, quarters, attributes, storage.provenance(**facts["provenance"]))

    @staticmethod
    def resume(
        path: Path, scored: Mapping[str, nn.Parameter], halves: bool, fraction: float, facts: Mapping[str, Any]
    ) -> "State":
        """What a checkpoint holds, or nothing done yet where there is none.

        Raises:
            ValueError: If the checkpoint belongs to another run.
            WrongFile: If it is none.
        """
        state = State.start(scored, halves, fraction)
        if not path.exists():
            return state
        with storage.open_hdf5(path, FORMAT) as file:
            before = storage.attributes(file)
            _check_same_run(path, before, facts)
            saved = [read_tensors(file), *([read_tensors(file, "second_half")] if halves else [])]
            quarters = Quarters.read(file)
            shapes = {name: p.shape for name, p in scored.items()}
            if any({n: t.shape for n, t in part.items()} != shapes for part in saved):
                raise ValueError(f"{path} was begun with another set of parameters; delete it to start afresh.")
            if quarters is None or quarters.fractions != state.quarters.fractions:
                raise ValueError(f"{path} was begun with another fraction; delete it to start afresh.")
            sums = tuple({name: t.to(scored[name].device) for name, t in part.items()} for part in saved)
            batches, seen, used, skipped = (int(v) for v in before["progress"])
        logger.info("Going on after %d examples.", seen)
        return State(sums, state.positions, quarters, str(before["digest"]), batches, seen, used, skipped)

    def _sampled(self, sums: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([sums[n].flatten()[at.to(sums[n].device)].cpu().float() for n, at in self.positions.items()])


class _OfAll(Mapping[str, Tensor]):
    """The sums over all ranks, one parameter at a time as rank 0 asks for it; the other ranks send theirs."""

    def __init__(self, share: Mapping[str, Tensor]) -> None:
        self.share = share

    def __getitem__(self, name: str) -> Tensor:
        return distributed.sum_at_first(self.share[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)

    def send(self) -> None:
        for name in self:
            self[name]


def _empty_quarters(scored: Mapping[str, nn.Parameter], fraction: float) -> tuple[dict[str, Tensor], Quarters]:
    positions = sampled_positions({name: p.numel() for name, p in scored.items()})
    size = sum(map(len, positions.values()))
    fractions = sorted(f for f in {*FRACTIONS, fraction} if 0 < round(f * size) < size)
    return positions, Quarters(torch.zeros(PARTS, size), fractions=tuple(fractions))


def _is_moment(batches: int) -> bool:
    moment = FIRST_MOMENT
    while moment < batches:
        moment = -(-moment * 5 // 4)
    return moment == batches


def _check_same_run(path: Path, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    if "progress" not in before:
        raise ValueError(f"{path} is a finished scores file, not the checkpoint of a run; name another checkpoint.")
    kind = ("estimator", "unit", "reduction")
    now = {**facts["provenance"], **{key: facts[key] for key in kind}, "halves": facts["halves"]}
    origin = {**json.loads(before["provenance"]), **{key: before[key] for key in kind}}
    origin["halves"] = bool(before.get("halves", False))
    origin = {key: origin.get(key) for key in now}
    if found := storage.difference(origin, json.loads(json.dumps(now))):
        raise ValueError(
            f"{path} was begun with another {found}; repeat that command to go on, or delete the file to start afresh."
        )
