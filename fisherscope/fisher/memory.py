"""What a Fisher run takes in memory, planned before it starts.

A plan needs no weights, so one of a model far too large for this machine takes seconds.
"""

import logging
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import models
from ..data import Batches
from ..data.sources import check_objective
from ..models import device_of, usable_device
from .activations import measure_activations

logger = logging.getLogger(__name__)

LARGEST_BATCH_SIZE = 256
SHARE_OF_FREE = 0.8
"""How much of the free memory a chosen batch size may plan for; the rest is for libraries and fragmentation."""

HEAP_GAPS = 0.3
"""Per byte of activations on the CPU: measured as the peak resident size beyond all live tensors, 0.2 to 0.5."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes at once, in bytes.

    Attributes:
        device: Where the model runs.
        batch_size: Examples at a time.
        length: Tokens per example, padding included.
        entries: Entries that are scored.
        weights: Parameters and buffers of the model.
        accumulators: Sums of squares, one or two for every scored entry.
        activations: The most that one forward and backward pass of a batch holds beside the weights.
        gaps: What the C library's heap leaves unused between them, estimated.
        scratch: The gradient of one example for the largest parameter that needs it in full.
        check: What comparing the rules with the loop takes, before the first batch: one more set of sums, a pass of at
            most three examples, and gradients on their way to the sums.
        scores: The finished scores and halves, on the host, when all batches are done.
        offload: Whether the accumulators are on the host.
        free: What this run may take: device to bytes, weights that are there already included; a device is left out
            where the system does not tell.
    """

    device: str
    batch_size: int
    length: int
    entries: int
    weights: int
    accumulators: int
    activations: int
    gaps: int
    scratch: int
    check: int
    scores: int
    offload: bool
    free: Mapping[str, int]

    @property
    def needed(self) -> dict[str, int]:
        """The most that is taken at once on every device."""
        batch = self.activations + self.gaps + self.scratch
        if self.device == "cpu":
            return {"cpu": self.weights + self.accumulators + max(batch, self.check, self.scores)}
        here, there = (0, self.accumulators) if self.offload else (self.accumulators, 0)
        return {self.device: self.weights + here + max(batch, self.check), "cpu": there + self.scores}

    def fits(self, share: float = 1.0) -> bool:
        """Whether every device has room, leaving all but a share of what is free alone; True where that is unknown."""
        known = {device: size for device, size in self.needed.items() if device in self.free}
        return all(size <= share * self.free[device] for device, size in known.items())

    def __str__(self) -> str:
        """A table of sizes by device."""
        columns = list(self.needed)
        home = "cpu" if self.offload else self.device
        places = {
            "weights": (self.device, self.weights),
            "accumulators": (home, self.accumulators),
            "activations": (self.device, self.activations),
            "allocator gaps": (self.device, self.gaps),
            "scratch": (self.device, self.scratch),
            "check of rules": (self.device, self.check),
            "finished scores": ("cpu", self.scores),
        }
        rows = [(name, [_readable(size) if at == column else "" for column in columns])
                for name, (at, size) in places.items()]  # fmt: skip
        rows.append(("most at once", [_readable(self.needed[column]) for column in columns]))
        rows.append(("free", [_readable(self.free.get(column)) for column in columns]))
        rows.append(("fits", ["yes" if self._fits_on(column) else "NO" for column in columns]))
        lines = [f"{'':<16}{''.join(f'{column:>12}' for column in columns)}"]
        lines += [f"{name:<16}{''.join(f'{cell:>12}' for cell in cells)}" for name, cells in rows]
        return "\n".join(lines)

    def _fits_on(self, device: str) -> bool:
        return self.needed[device] <= self.free.get(device, self.needed[device])


def plan_memory(
    model: nn.Module,
    *,
    batch_size: int,
    length: int,
    objective: str,
    halves: bool = False,
    offload: bool = False,
    target_length: int | None = None,
    device: str | torch.device | None = None,
) -> MemoryPlan:
    """Plan a Fisher run: weights, accumulators, activations, scratch, and what is free.

    Args:
        model: The model, or one without values: built under ``torch.device("meta")``.
        batch_size: Examples at a time.
        length: Tokens per example.
        objective: ``"mlm"``, ``"causal-lm"``, ``"seq2seq-lm"``, ``"classification"`` or ``"regression"``.
        halves: Whether two sets of sums are kept, one for either half of the examples.
        offload: Whether the sums are kept on the host.
        target_length: Tokens of the target of ``seq2seq-lm``; by default as many as of the input.
        device: Where the run will be; by default the model's own device, or for a model without values CUDA where
            there is one, else the CPU.

    Raises:
        ValueError: If an argument is out of range, or the model's forward pass depends on values.
    """
    check_objective(objective)
    _check_sizes(model, batch_size, length)
    place = _place(model, device)
    scored = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wide = {name: p.numel() * max(p.element_size(), 4) for name, p in scored.items()}
    activations = measure_activations(
        model, batch_size=batch_size, length=length, target_length=target_length or length, objective=objective
    )
    entries = sum(p.numel() for p in scored.values())
    scratch = max((wide[name] for name in _multiplied(model, scored)), default=0)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return MemoryPlan(
        device=str(place),
        batch_size=batch_size,
        length=length,
        entries=entries,
        weights=weights,
        accumulators=(1 + halves) * sum(wide.values()),
        activations=activations,
        gaps=round(HEAP_GAPS * activations) if place.type == "cpu" else 0,
        scratch=scratch,
        check=sum(wide.values()) + activations * min(3, batch_size) // batch_size + 3 * max(wide.values(), default=0),
        scores=sum(wide.values()) + (2 * entries if halves else 0),
        offload=offload and place.type != "cpu",
        free=_free(place, 0 if device_of(model).type == "meta" else weights),
    )


def choose_batch_size(
    model: nn.Module,
    examples: Batches | Sequence[int],
    objective: str,
    *,
    halves: bool = False,
    offload: bool = False,
    target_length: int | None = None,
    device: str | torch.device | None = None,
) -> int:
    """The largest power of two, at most 256 and the number of examples, that plans for at most 80 % of what is free.

    Where not even one example fits, the answer is 1, and a warning says so.

    Args:
        model: As for :func:`plan_memory`.
        examples: The data, or the number of tokens of every example.
        objective: As for :func:`plan_memory`.
        halves: As for :func:`plan_memory`.
        offload: As for :func:`plan_memory`.
        target_length: As for :func:`plan_memory`; by default that of the longest target in the data.
        device: As for :func:`plan_memory`.

    Raises:
        ValueError: As for :func:`plan_memory`, and if there are no examples.
    """
    lengths, longest_target = longest(examples)
    if not lengths:
        raise ValueError("Choosing a batch size needs at least one example, but there are none.")

    def planned(exponent: int) -> MemoryPlan:
        return plan_memory(
            model,
            batch_size=2**exponent,
            length=max(lengths),
            objective=objective,
            halves=halves,
            offload=offload,
            target_length=target_length or longest_target,
            device=device,
        )

    largest = min(LARGEST_BATCH_SIZE, len(lengths)).bit_length() - 1
    fitting = bisect(range(largest + 1), False, key=lambda exponent: not planned(exponent).fits(SHARE_OF_FREE))
    if not fitting:
        logger.warning("Not even one example at a time is sure to fit in memory:\n%s", planned(0))
    return 2 ** max(fitting - 1, 0)


def longest(examples: Batches | Sequence[int]) -> tuple[list[int], int | None]:
    """The number of tokens of every example, at least 1, and of the longest target where targets have their own."""
    if not isinstance(examples, Batches):
        return list(examples), None
    lengths = [max(1, len(example["input_ids"])) for example in examples.examples]
    if examples.objective != "seq2seq-lm":
        return lengths, None
    return lengths, max((len(example["labels"]) for example in examples.examples), default=None)


def _check_sizes(model: nn.Module, batch_size: int, length: int) -> None:
    for name, value in (("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    positions = models.num_positions(model)
    if positions is not None and positions < length:
        raise ValueError(f"length must be at most {positions}, which is what the model allows; got {length}.")


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    place = usable_device(device) if device else device_of(model)
    if place.type == "meta":
        place = usable_device()
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def _multiplied(model: nn.Module, scored: Mapping[str, Tensor]) -> set[str]:
    """The scored matrices that anything but a table of embeddings owns; of the others no gradient is ever whole."""
    names = {id(p): name for name, p in scored.items()}
    owners = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    own = (p for module in owners for p in module.parameters(recurse=False))
    return {names[id(p)] for p in own if id(p) in names and p.ndim > 1}


def _free(place: torch.device, loaded: int) -> dict[str, int]:
    """Bytes that can still be had, plus those of weights that are there already."""
    host = _free_on_host()
    free = {} if host is None else {"cpu": host + (loaded if place.type == "cpu" else 0)}
    if place.type == "cuda":
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)  # cached by torch
        free[str(place)] = torch.cuda.mem_get_info(place)[0] + unused + loaded
    return free


def free_on(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where the system does not tell."""
    return _free(device, 0).get(str(device))


def _free_on_host() -> int | None:
    """What Linux says is available, within the limit of the job's control group; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}["MemAvailable"]
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no such control, or "max": no limit
        return available
    return min(available, max(limit - used + int(cached), 0))


def _readable(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"


def empty_model(
    source: str | Path,
    *,
    objective: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, str]:
    """A model without values, from its configuration alone, and its objective.

    Args:
        source: What :func:`load_model` takes, or the path of a ``config.json``.
        objective: As for :func:`load_model`.
        revision: As for :func:`load_model`.
        dtype: Of the weights it would have.

    Raises:
        ValueError: If the objective is unknown, or is needed because the configuration names no head.
        FileNotFoundError: If there is no such configuration.
    """
    from transformers import AutoConfig

    is_config = Path(source).suffix == ".json" and Path(source).is_file()
    path = str(source) if is_config else models._resolve(str(source))
    with models._one_sentence(str(source)):
        config = AutoConfig.from_pretrained(path, revision=revision)
    objective = objective or models._objective_of_config(config, str(source))
    check_objective(objective)
    if objective == "regression":
        config.num_labels = 1
    with torch.device("meta"):
        model = models._auto_class(config, objective, str(source)).from_config(config, dtype=dtype)
    return model.eval(), objective
