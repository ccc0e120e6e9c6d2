"""This process's memory, phase by phase.

Linux records the highest resident size of a process (VmHWM) and resets it on request (proc(5), clear_refs), which gives
an exact peak per phase. If the reset is refused, a thread samples the resident size, and the method says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmdeploy.bench.energy import Every
from vlmdeploy.errors import BackendError
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.memory import sizes_in

OWN_PROCESS = Path("/proc/self")
FORGET_PEAK = "5"  # the value for clear_refs
SAMPLES_EVERY_S = 0.002
BY_KERNEL = "resident memory of the process, highest in each phase (VmHWM, reset by clear_refs)"
BY_SAMPLES = (
    "resident memory of the process, sampled every 2 ms because VmHWM cannot be reset here ({reason}): "
    "shorter peaks are missed"
)
BY_DEVICE = (
    "CUDA memory taken since the context was made, read after every call (from the free memory, so other programs that "
    "take or give back some at the same time count too)"
)


@dataclass(frozen=True)
class Resident:
    """Resident memory now: in total, and anonymous and file-backed pages, if known."""

    total: int
    anonymous: int | None
    file: int | None


def resident(process: Path = OWN_PROCESS) -> Resident:
    """A process's resident memory. Raises BackendError if the system does not report it."""
    sizes = sizes_in(process / "status", 1024)
    if "VmRSS:" not in sizes:
        raise BackendError(f"{process / 'status'}: has no VmRSS, so memory cannot be measured: is this Linux?")
    return Resident(sizes["VmRSS:"], sizes.get("RssAnon:"), sizes.get("RssFile:"))


class KernelPeak:
    """The kernel's peak since the last reset. Raises OSError if it cannot be reset."""

    method = BY_KERNEL

    def __init__(self, process: Path = OWN_PROCESS) -> None:
        self._process = process
        self.reset()
        if "VmHWM:" not in sizes_in(process / "status", 1024):
            raise OSError(f"{process / 'status'} has no VmHWM")

    def reset(self) -> None:
        """Start a new peak."""
        (self._process / "clear_refs").write_text(FORGET_PEAK)

    def read(self) -> int:
        """The peak in bytes."""
        return sizes_in(self._process / "status", 1024)["VmHWM:"]

    def close(self) -> None:
        """Nothing to release."""


class SampledPeak:
    """The maximum of samples that a thread takes until `close`."""

    def __init__(self, reason: str, process: Path = OWN_PROCESS) -> None:
        self.method = BY_SAMPLES.format(reason=reason)
        self._process = process
        self._highest = 0
        self._every = Every(SAMPLES_EVERY_S, self.read)

    def reset(self) -> None:
        """Start a new peak."""
        self._highest = 0

    def read(self) -> int:
        """Take a sample; the peak in bytes."""
        self._highest = max(self._highest, resident(self._process).total)
        return self._highest

    def close(self) -> None:
        """End the thread."""
        self._every.close()


def peak_meter(process: Path = OWN_PROCESS) -> KernelPeak | SampledPeak:
    """The kernel's peak if it can be reset, else samples."""
    try:
        return KernelPeak(process)
    except OSError as error:
        return SampledPeak(error.strerror or str(error), process)


@dataclass(frozen=True)
class DeviceMemory:
    """How to read GPU memory. planned_bytes: buffers and KV cache that the backend holds from the start."""

    method: str
    gpu: str | None = None
    planned_bytes: int | None = None
    in_use: Callable[[], int] | None = None


def device_memory(backend: Backend) -> DeviceMemory:
    """The GPU memory of a backend that was just opened and has loaded nothing."""
    try:
        use = backend.device_use()
    except BackendError as error:
        return DeviceMemory(f"not measured: {error}")
    if use is None:
        return DeviceMemory("none: no GPU is used")
    return DeviceMemory(BY_DEVICE, use.gpu, use.planned_bytes, use.in_use)
