"""A CUDA device for the TensorRT backend, without torch: memory, copies on one stream, captured graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.errors import BackendError
from vlmdeploy.runtime.memory import available_bytes


@dataclass(frozen=True)
class Buffer:
    """Device memory: its address and its size in bytes."""

    address: int
    size: int


def cuda_runtime() -> Any:
    """CUDA's runtime API; raises BackendError if the bindings, a driver or a device are missing."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            f'cuda-bindings cannot be imported ({error}): pip install "vlmdeploy[rtx]" (Jetson: "vlmdeploy[trt]")'
        ) from error
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaSuccess and count:
        return runtime
    reason = "there is none" if status == runtime.cudaError_t.cudaSuccess else _explained(status.name)
    raise BackendError(
        f"a TensorRT bundle needs a CUDA GPU and a driver for it: {reason}; its graphs alone run with --provider cpu"
    )


def _explained(status: str) -> str:
    """A CUDA status in a user's words."""
    if status == "cudaErrorInsufficientDriver":
        return "no driver is installed, or one older than this CUDA (cudaErrorInsufficientDriver)"
    return f"CUDA says {status}"


def compute_capability(runtime: Any) -> str:
    """Compute capability of the first device, such as "8.6"."""
    kinds = runtime.cudaDeviceAttr
    names = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(runtime.cudaDeviceGetAttribute(name, 0)[1]) for name in names)


class CudaDevice:
    """The first visible CUDA device. Copies and engines run in order on its one stream."""

    def __init__(self) -> None:
        """Raises BackendError without a CUDA device, its driver or the bindings."""
        self._cuda: Any = cuda_runtime()
        self._uploaded: list[NDArray[Any]] = []  # pending copies may still read these
        self.compute_capability = compute_capability(self._cuda)
        self.name: str = self._call(self._cuda.cudaGetDeviceProperties(0)).name.decode()
        self.stream = int(self._call(self._cuda.cudaStreamCreate()))

    def _call(self, answer: tuple[Any, ...]) -> Any:
        """The value of a CUDA call; raises BackendError if it failed."""
        error, *values = answer
        if error != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(error)
            raise BackendError(f"CUDA: {text.decode()} ({error.name})")
        return values[0] if values else None

    def free_bytes(self) -> int:
        """Free device memory; on an integrated GPU the memory available to programs."""
        if self._call(self._cuda.cudaDeviceGetAttribute(self._cuda.cudaDeviceAttr.cudaDevAttrIntegrated, 0)):
            return available_bytes()
        error, free, _ = self._cuda.cudaMemGetInfo()
        self._call((error,))
        return int(free)

    def allocate(self, size: int) -> Buffer:
        """New device memory, filled with zeros."""
        status, address = self._cuda.cudaMalloc(max(size, 1))
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise BackendError(
                f"out of GPU memory: {gigabytes(size)} were wanted, {gigabytes(self.free_bytes())} are free: close "
                "other programs, use --residency phase, or export with a smaller --context"
            )
        buffer = Buffer(int(self._call((status, address))), size)
        self._call(self._cuda.cudaMemsetAsync(buffer.address, 0, size, self.stream))
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Free memory after the stream has finished."""
        self.synchronize()
        self._call(self._cuda.cudaFree(buffer.address))

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Copy a host array to the start of a buffer, keeping the array until the copy is done."""
        content = np.ascontiguousarray(array)
        assert content.nbytes <= buffer.size, f"{content.nbytes} bytes do not fit a buffer of {buffer.size}"
        self._uploaded.append(content)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync(buffer.address, content.ctypes.data, content.nbytes, kind, self.stream))

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Fill a contiguous host array from the start of a buffer; returns when done."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync(array.ctypes.data, buffer.address, array.nbytes, kind, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call(self._cuda.cudaStreamSynchronize(self.stream))
        self._uploaded.clear()

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue` puts on the stream as a CUDA graph, without running it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            enqueue()
        finally:
            answer = self._cuda.cudaStreamEndCapture(self.stream)
        return self._call(self._cuda.cudaGraphInstantiate(self._call(answer), 0))

    def launch(self, graph: Any) -> None:
        """Run a captured graph."""
        self._call(self._cuda.cudaGraphLaunch(graph, self.stream))

    def discard(self, graph: Any) -> None:
        """Destroy a captured graph."""
        self._call(self._cuda.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        """Destroy the stream after it has finished."""
        self.synchronize()
        self._call(self._cuda.cudaStreamDestroy(self.stream))
