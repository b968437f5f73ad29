"""The Fisher engine: exact per-example squared gradients of every parameter.

``engines.py`` holds the reference (one backward pass per example) and the fast engine (hooks on frozen weights),
``rules.py`` the per-example products of each kind of module; ``probe.py`` watches which module uses which parameter,
and ``plan.py`` decides what follows; ``run.py`` is the run itself: progress, checkpoints, resume.
"""

from .engines import hooks_engine, loop_engine
from .run import estimate_fisher

__all__ = ["estimate_fisher", "hooks_engine", "loop_engine"]
