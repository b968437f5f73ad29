"""The Fisher engine: exact per-example squared gradients of every parameter.

``engines.py`` holds the reference, one backward pass per example. The fast engine (``hooks.py``, ``recorder.py``)
follows parameters through torch functions (``operations.py``), finds by experiment where the examples are
(``plan.py``, ``layout.py``), forms per-example gradients operation by operation (``rules.py``) and adds up their
squares (``contributions.py``, ``kernels.py``). ``estimand.py`` says what is estimated, ``run.py`` is the run itself.
"""

from .engines import loop_engine
from .estimand import Estimand
from .hooks import hooks_engine, rules_used
from .run import estimate_fisher

__all__ = ["Estimand", "estimate_fisher", "hooks_engine", "loop_engine", "rules_used"]
