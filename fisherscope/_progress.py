"""The one place that draws progress bars."""

from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int | None, description: str, unit: str, *, done: int = 0, shown: bool = True) -> "tqdm[Any]":
    """A bar with rate and expected time to the end; ``done`` of ``total`` were finished by an earlier run."""
    return tqdm(total=total, initial=done, desc=description, unit=unit, disable=not shown, dynamic_ncols=True)
