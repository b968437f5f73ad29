"""Text and task sources, and the deterministic tokenised batches made from them.

``load_batches`` imports torch, so it is imported on first use; reading a source needs no torch.
"""

from typing import TYPE_CHECKING, Any

from .sources import OBJECTIVES, Source, read_source
from .tasks import TASKS, Task, read_task

if TYPE_CHECKING:
    from .encoding import BatchDigest, Batches, describe_batches, load_batches, padding_id

__all__ = [
    "BatchDigest",
    "Batches",
    "describe_batches",
    "load_batches",
    "OBJECTIVES",
    "Source",
    "padding_id",
    "read_source",
    "read_task",
    "Task",
    "TASKS",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import encoding

    return getattr(encoding, name)
