"""Fine-tuning with what the scores say: regularizers, and trainings that measure what they do.

``regularizer.py`` says what a regularizer is, ``methods/`` holds one per file, made of ``parts.py``. They work in any
training loop; ``callback.py`` puts them into the Trainer of Hugging Face, and ``training.py`` is a whole run.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import methods as _methods  # registers them
from .regularizer import METHODS, Applied, Composed, Regularizer

if TYPE_CHECKING:
    from .callback import RegularizerCallback
    from .protocol import PROTOCOLS, read_roles
    from .results import Results
    from .training import finetune

__all__ = [
    "METHODS",
    "PROTOCOLS",
    "Applied",
    "Composed",
    "Regularizer",
    "RegularizerCallback",
    "Results",
    "finetune",
    "read_roles",
]

_HOME = {  # Trainer takes seconds
    "PROTOCOLS": "protocol",
    "RegularizerCallback": "callback",
    "Results": "results",
    "finetune": "training",
    "read_roles": "protocol",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    for method in METHODS.values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """The function has the name of its package, so calling the package calls the function: ``fs.finetune(...)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Results":
        return importlib.import_module(f"{__name__}.training").finetune(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
del _methods
