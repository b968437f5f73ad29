"""`make test` runs the first notebook, `make test-all` every one."""

from collections.abc import Sequence

import pytest

FAST = "01_first_look.ipynb"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark the others before pytest selects by marks."""
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.name != FAST:
            item.add_marker(pytest.mark.slow)
