"""How long-running work reports its progress; the caller decides how to show it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done, and how much there is in all (0: unknown)."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
