"""What the tests of killed and stopped processes ask of the system."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path


def wait_until(holds: Callable[[], bool]) -> None:
    """A minute at most."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def has_ended(process: int) -> bool:
    """Whether a process is gone, but perhaps for the entry that its parent has not read yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def descendants(process: int) -> Iterator[int]:
    """The processes that a process started, and those that these started."""
    for listing in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, listing.read_text().split()):
            yield child
            yield from descendants(child)
