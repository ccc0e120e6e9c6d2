"""The machine's memory, which on a Jetson is also the GPU's: how much there is, and returning freed memory."""

import ctypes
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory available to programs: the system's figure, or less in a limited container. Cached files count as free."""
    free = sizes_in(Path("/proc/meminfo"), 1024)["MemAvailable:"]
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = sizes_in(CGROUP / "memory.stat", 1).get("inactive_file", 0)
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, max(0, limit - used + cached))


def total_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or the container's limit."""
    whole = sizes_in(root / "proc/meminfo", 1024)["MemTotal:"]
    try:
        return min(whole, int((root / CGROUP.relative_to("/") / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return whole


def sizes_in(path: Path, unit: int) -> dict[str, int]:
    """The number after the first word of each line, keyed by that word; skips other lines."""
    lines = map(str.split, path.read_text(errors="replace").splitlines())
    return {words[0]: int(words[1]) * unit for words in lines if len(words) > 1 and words[1].isdecimal()}


def release_freed() -> None:
    """Return freed memory to the system: glibc keeps pieces of up to 32 MB, which are most of a model. A no-op with
    other C libraries."""
    if sys.platform != "linux":  # CDLL(None) fails on Windows
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
