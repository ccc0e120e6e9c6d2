"""How much memory this process takes, phase by phase.

Linux keeps the highest resident size of a process (VmHWM) and forgets it on request (proc(5), clear_refs), which gives
an exact peak for each phase. Where that is refused a thread samples the resident size, and the method says so.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmdeploy.errors import BackendError
from vlmdeploy.runtime.backends.cuda_device import CudaDevice
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.backends.trt import TrtBackend
from vlmdeploy.runtime.memory import sizes_in

OWN_PROCESS = Path("/proc/self")
FORGET_PEAK = "5"  # what clear_refs takes for it
SAMPLES_EVERY_S = 0.002
BY_KERNEL = "resident memory of the process, highest in each phase (VmHWM, reset by clear_refs)"
BY_SAMPLES = (
    "resident memory of the process, sampled every 2 ms because VmHWM cannot be reset here ({reason}): "
    "shorter peaks are missed"
)


@dataclass(frozen=True)
class Resident:
    """Resident memory now: all of it, and its anonymous and file-backed pages where the system tells."""

    total: int
    anonymous: int | None
    file: int | None


def resident(process: Path = OWN_PROCESS) -> Resident:
    """What a process holds in memory. Raises BackendError where the system does not tell."""
    sizes = sizes_in(process / "status", 1024)
    if "VmRSS:" not in sizes:
        raise BackendError(f"{process / 'status'}: has no VmRSS, which memory is measured by: is this Linux?")
    return Resident(sizes["VmRSS:"], sizes.get("RssAnon:"), sizes.get("RssFile:"))


class KernelPeak:
    """The peak since the last reset, as the kernel counts it. Raises OSError where it cannot be reset."""

    method = BY_KERNEL

    def __init__(self, process: Path = OWN_PROCESS) -> None:
        self._process = process
        self.reset()
        if "VmHWM:" not in sizes_in(process / "status", 1024):
            raise OSError(f"{process / 'status'} has no VmHWM")

    def reset(self) -> None:
        """Forget what was before."""
        (self._process / "clear_refs").write_text(FORGET_PEAK)

    def read(self) -> int:
        """Bytes."""
        return sizes_in(self._process / "status", 1024)["VmHWM:"]

    def close(self) -> None:
        """Nothing to give back."""


class SampledPeak:
    """The highest of samples that a thread takes; `close` ends it."""

    def __init__(self, reason: str, process: Path = OWN_PROCESS) -> None:
        self.method = BY_SAMPLES.format(reason=reason)
        self._process = process
        self._highest = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._is_over.wait(SAMPLES_EVERY_S):
            self._highest = max(self._highest, resident(self._process).total)

    def reset(self) -> None:
        """Forget what was before."""
        self._highest = 0

    def read(self) -> int:
        """Bytes; what is held now is a sample too."""
        self._highest = max(self._highest, resident(self._process).total)
        return self._highest

    def close(self) -> None:
        """End the thread."""
        self._is_over.set()
        self._thread.join()


def peak_meter(process: Path = OWN_PROCESS) -> KernelPeak | SampledPeak:
    """The kernel's count where it can be reset, else samples."""
    try:
        return KernelPeak(process)
    except OSError as error:
        return SampledPeak(error.strerror or str(error), process)


@dataclass(frozen=True)
class DeviceMemory:
    """How the memory of a GPU is read. planned_bytes: buffers and KV cache that the backend holds from the start."""

    method: str
    gpu: str | None = None
    planned_bytes: int | None = None
    in_use: Callable[[], int] | None = None


def device_memory(backend: Backend, provider: str) -> DeviceMemory:
    """The meter of a backend that was just opened and has loaded nothing; none where no GPU is used."""
    if isinstance(backend, TrtBackend):
        return _device_memory(backend.device, backend.planned_bytes, backend.planned_bytes)
    if provider != "cuda":
        return DeviceMemory("none: no GPU is used")
    try:
        return _device_memory(CudaDevice(), 0, None)
    except BackendError as error:
        return DeviceMemory(f"not measured: {error}")


def _device_memory(device: CudaDevice, held: int, planned: int | None) -> DeviceMemory:
    """held: what the backend has taken until now."""
    before = device.free_bytes()
    method = (
        "CUDA memory taken since the context was made, read after every call (from the free memory, so other programs "
        "that take or give back some at the same time count too)"
    )
    return DeviceMemory(method, device.name, planned, lambda: held + before - device.free_bytes())
