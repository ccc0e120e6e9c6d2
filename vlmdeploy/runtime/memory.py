"""How much memory is there: of the machine, which on a Jetson is the GPU's too; and giving it back."""

import ctypes
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that programs may still take: what the system calls available, or less where a container is limited.

    Files that are only cached count as free.
    """
    free = sizes_in(Path("/proc/meminfo"), 1024)["MemAvailable:"]
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = sizes_in(CGROUP / "memory.stat", 1).get("inactive_file", 0)
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, max(0, limit - used + cached))


def total_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or what a container may take of it."""
    whole = sizes_in(root / "proc/meminfo", 1024)["MemTotal:"]
    try:
        return min(whole, int((root / CGROUP.relative_to("/") / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return whole


def sizes_in(path: Path, unit: int) -> dict[str, int]:
    """The number that follows the first word of a line, by that word; other lines are left out."""
    lines = map(str.split, path.read_text(errors="replace").splitlines())
    return {words[0]: int(words[1]) * unit for words in lines if len(words) > 1 and words[1].isdecimal()}


def release_freed() -> None:
    """Give the system what was freed here: the C library keeps pieces of up to 32 MB, which are most of a model.

    Nothing is done where the C library is not glibc.
    """
    if sys.platform != "linux":  # on Windows there is no library without a name
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
