"""Many trainings: the file that names them, doing them, reading them back, and comparing them over seeds."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arms import Arm, Group, read_runs
    from .comparison import Comparison, compare_methods
    from .running import SweepReport, run_sweep
    from .sweep import Sweep, SweepRun, load_sweep

_HOME = {  # the Trainer takes seconds
    "Arm": "arms",
    "Comparison": "comparison",
    "Group": "arms",
    "Sweep": "sweep",
    "SweepReport": "running",
    "SweepRun": "sweep",
    "compare_methods": "comparison",
    "load_sweep": "sweep",
    "read_runs": "arms",
    "run_sweep": "running",
}

__all__ = [
    "Arm",
    "Comparison",
    "Group",
    "Sweep",
    "SweepReport",
    "SweepRun",
    "compare_methods",
    "load_sweep",
    "read_runs",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
