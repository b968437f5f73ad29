"""How far a Fisher run has come: sums of squares, kept in halves and quarters, and the checkpoint that holds them."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor, nn

from .. import distributed, storage
from ..objectives import Batch
from ..scores import FORMAT, each_tensor, means, write
from ..stability import PARTS, Quarters, sampled_positions
from .engines import Engine
from .sharding import Shards, own_part

logger = logging.getLogger(__name__)

FRACTIONS = (0.01, 0.1, 0.5)
"""Masks whose stability every run follows."""

FIRST_MOMENT = 8
"""Batches after which the stability is noted for the first time; the next moment is a quarter later each time."""


@dataclass
class State:
    """How far a run has come.

    With several ranks, each does one batch of every round, and ``sums``, ``quarters.sums``,
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
    def start(scored: Mapping[str, nn.Parameter], halves: bool, fraction: float, *, offload: bool = False) -> "State":
        """Nothing done yet."""

        def wide(p: Tensor) -> torch.dtype:
            return torch.float64 if p.dtype == torch.float64 else torch.float32

        def zeros(p: Tensor) -> Tensor:
            return torch.zeros_like(p, dtype=wide(p), device="cpu" if offload else p.device)

        sums = tuple({name: zeros(p) for name, p in scored.items()} for _ in range(1 + halves))
        return State(sums, *_empty_quarters(scored, fraction))

    def add(self, engine: Engine, batches: Sequence[Batch], digest: str, skipped: int) -> None:
        """Add one batch per rank, or fewer, and note the stability when it is time to."""
        has_one = distributed.rank() < len(batches)
        batch, number = batches[distributed.rank()] if has_one else {}, self.batches + distributed.rank()
        if self.is_sharded:
            self._add_to_shards(engine, batch, number)
        elif has_one:
            self._add_own(engine, batch, number)
        self.digest, self.batches = digest, self.batches + len(batches)
        self.seen += sum(len(next(iter(batch.values()))) for batch in batches)
        self.skipped += skipped
        if _is_moment(self.batches) and (quarters := self._quarters_of_all()).are_filled:
            self.quarters = replace(self.quarters, history=distributed.first_says(quarters.noted().history))

    def ends_round(self, number: int) -> bool:
        """Whether the batches since the last :meth:`add`, up to this number of them in all, are to be added now."""
        return number - self.batches == distributed.world_size() or _is_moment(number)

    def _add_own(self, engine: Engine, batch: Batch, number: int) -> None:
        part, quarter = self.sums[number % len(self.sums)], number % PARTS
        used = engine(batch, part)
        sampled = self._sampled(part)
        if not bool(torch.isfinite(sampled).all()):  # before hours more are spent on it
            raise ValueError(
                f"Every example needs a finite gradient, but batch {number + 1} has others, although its losses are "
                "finite; check the model's weights and how it treats padding."
            )
        same_sums = [k for k in range(quarter % len(self.sums), PARTS, len(self.sums)) if k != quarter]
        # Rounded twice, but never below 0: the sum of the others is not above the sum of all.
        row = (sampled - self.quarters.sums[same_sums].sum(dim=0)).clamp_(min=0)
        self.quarters = self.quarters.updated(quarter, row, used)
        self.used += used

    def _add_to_shards(self, engine: Engine, batch: Batch, number: int) -> None:
        shards = Shards(self.sums, number % len(self.sums), self.positions)
        used, quarter = engine(batch, shards), number % PARTS
        row = torch.cat(list(shards.row.values()))
        self.quarters = self.quarters.updated(quarter, self.quarters.sums[quarter] + row, used)
        self.used += used

    @property
    def is_sharded(self) -> bool:
        """Whether the sums are sharded as the model is; then they are of all ranks."""
        return any(map(distributed.is_sharded, self.sums[0].values()))

    def _quarters_of_all(self) -> Quarters:
        counts = distributed.add_up(torch.tensor(self.quarters.num_examples)).tolist()
        return replace(self.quarters, sums=distributed.add_up(self.quarters.sums.clone()), num_examples=tuple(counts))

    def join(self) -> None:
        """Let all ranks know how far rank 0 is; the sums so far stay its share."""
        progress = (self.digest, self.batches, self.seen, self.skipped, self.quarters.history)
        self.digest, self.batches, self.seen, self.skipped, history = distributed.first_says(progress)
        if not distributed.is_first():
            nothing = torch.zeros_like(self.quarters.sums)
            self.used, self.quarters = 0, Quarters(nothing, fractions=self.quarters.fractions)
        self.quarters = replace(self.quarters, history=history)

    def unite(self) -> None:
        """Make the share of every rank that of all."""
        self.quarters = self._quarters_of_all()
        self.used = sum(self.quarters.num_examples)
        if not self.is_sharded:
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
        shares = dict(zip(("scores", "second_half"), self.sums, strict=False))
        groups = {key: distributed.Gathered(sums, distributed.sum_at_first) for key, sums in shares.items()}
        if not distributed.is_first():
            for sums in groups.values():
                sums.send()
            return
        with storage.atomic(path) as temporary:
            write(temporary, groups, quarters, attributes, storage.provenance(**facts["provenance"]))

    @staticmethod
    def resume(
        path: Path,
        scored: Mapping[str, nn.Parameter],
        halves: bool,
        fraction: float,
        facts: Mapping[str, Any],
        *,
        offload: bool = False,
    ) -> "State":
        """What a checkpoint holds, or nothing done yet where there is none.

        Raises:
            ValueError: If the checkpoint belongs to another run.
            WrongFile: If it is none.
        """
        state = State.start(scored, halves, fraction, offload=offload)
        if not path.exists():
            return state
        with storage.open_hdf5(path, FORMAT) as file:
            before = storage.attributes(file)
            _check_same_run(path, before, facts)
            quarters = Quarters.read(file)
            sums = tuple(
                _read_sums(file, key, empty) for key, empty in zip(("scores", "second_half"), state.sums, strict=False)
            )
            if quarters is None or quarters.fractions != state.quarters.fractions:
                raise ValueError(f"{path} was begun with another fraction; delete it to start afresh.")
            batches, seen, used, skipped = (int(v) for v in before["progress"])
        logger.info("Going on after %d examples.", seen)
        return State(sums, state.positions, quarters, str(before["digest"]), batches, seen, used, skipped)

    def _sampled(self, sums: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([sums[n].flatten()[at.to(sums[n].device)].cpu().float() for n, at in self.positions.items()])


def _empty_quarters(scored: Mapping[str, nn.Parameter], fraction: float) -> tuple[dict[str, Tensor], Quarters]:
    positions = sampled_positions({name: p.numel() for name, p in scored.items()})
    size = sum(map(len, positions.values()))
    fractions = sorted(f for f in {*FRACTIONS, fraction} if 0 < round(f * size) < size)
    return positions, Quarters(torch.zeros(PARTS, size), fractions=tuple(fractions))


def _read_sums(file: h5py.File, key: str, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of a checkpoint, where the empty ones are; of sharded ones only this rank's part."""
    sums = {}
    for name, tensor in each_tensor(file, key):
        if name not in empty or tensor.shape != empty[name].shape:
            break
        sums[name] = own_part(tensor, empty[name])
    if sums.keys() != empty.keys():
        raise ValueError(f"{file.filename} was begun with another set of parameters; delete it to start afresh.")
    return sums


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
