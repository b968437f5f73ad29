"""Loss landscapes and Fisher information of language models.

Names are imported on first use, so that ``import fisherscope`` and ``fisherscope --help`` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import plots, testing
    from .comparison import compare
    from .data import TASKS, Batches, Source, Task, load_batches, read_source, read_task
    from .experiments import compare_methods, load_sweep, read_runs, run_sweep
    from .finetune import Regularizer, RegularizerCallback, Results
    from .finetune.methods.fixed_mask import SubnetworkUpdate
    from .finetune.methods.gaussian_dropout import GaussianDropout
    from .finetune.methods.guided_dropout import GuidedDropout
    from .finetune.training import finetune
    from .fisher import estimate_fisher
    from .landscape import Axis, Landscape, random_directions, scan_landscape
    from .masks import Mask, MaskMismatch, bottom_fraction, random_fraction, random_like, top_fraction
    from .models import load_model
    from .objectives import example_losses
    from .scores import FisherScores, summarize

_HOME = {
    "plots": "",
    "testing": "",
    "compare": ".comparison",
    "Batches": ".data",
    "Source": ".data",
    "load_batches": ".data",
    "read_source": ".data",
    "read_task": ".data",
    "Task": ".data",
    "TASKS": ".data",
    "estimate_fisher": ".fisher",
    "finetune": "",
    "Regularizer": ".finetune",
    "RegularizerCallback": ".finetune",
    "load_sweep": ".experiments",
    "run_sweep": ".experiments",
    "read_runs": ".experiments",
    "compare_methods": ".experiments",
    "Results": ".finetune",
    "GuidedDropout": ".finetune",
    "GaussianDropout": ".finetune",
    "SubnetworkUpdate": ".finetune",
    "Axis": ".landscape",
    "Landscape": ".landscape",
    "random_directions": ".landscape",
    "scan_landscape": ".landscape",
    "Mask": ".masks",
    "MaskMismatch": ".masks",
    "bottom_fraction": ".masks",
    "random_fraction": ".masks",
    "random_like": ".masks",
    "top_fraction": ".masks",
    "load_model": ".models",
    "example_losses": ".objectives",
    "FisherScores": ".scores",
    "summarize": ".scores",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fisherscope' has no attribute {name!r}")
    home = _HOME[name]
    return (
        getattr(importlib.import_module(home, __name__), name)
        if home
        else importlib.import_module(f".{name}", __name__)
    )


def __dir__() -> list[str]:
    return sorted(__all__)
