"""The CUDA device as the TensorRT backend needs it: memory, copies on one stream, captured graphs. Without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import BackendError


@dataclass(frozen=True)
class Buffer:
    """Device memory: its address and its size in bytes."""

    address: int
    size: int


class CudaDevice:
    """The first visible CUDA device. Copies and engines run in order on its one stream."""

    def __init__(self) -> None:
        """Raises BackendError where there is no CUDA device, or nothing to talk to it with."""
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(
                f'cuda-bindings cannot be imported ({error}): pip install "vlmdeploy[rtx]" (Jetson: "vlmdeploy[trt]")'
            ) from error
        self._cuda: Any = runtime
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess or not count:
            reason = "no device" if status == runtime.cudaError_t.cudaSuccess else status.name
            raise BackendError(
                f"a TensorRT bundle needs a CUDA GPU and this machine has none ({reason}); its graphs alone run with "
                "--provider cpu"
            )
        self.stream = int(self._call(runtime.cudaStreamCreate()))

    def _call(self, answer: tuple[Any, ...]) -> Any:
        """The value of a CUDA call; raises BackendError where it failed."""
        error, *values = answer
        if error != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(error)
            raise BackendError(f"CUDA: {text.decode()} ({error.name})")
        return values[0] if values else None

    @property
    def compute_capability(self) -> str:
        """Such as "8.6"."""
        kinds = self._cuda.cudaDeviceAttr
        names = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self._call(self._cuda.cudaDeviceGetAttribute(name, 0))) for name in names)

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        error, free, _ = self._cuda.cudaMemGetInfo()
        self._call((error,))
        return int(free)

    def allocate(self, size: int) -> Buffer:
        """New device memory, filled with zeros."""
        buffer = Buffer(int(self._call(self._cuda.cudaMalloc(max(size, 1)))), size)
        self._call(self._cuda.cudaMemsetAsync(buffer.address, 0, size, self.stream))
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Give memory back, after everything on the stream is done."""
        self.synchronize()
        self._call(self._cuda.cudaFree(buffer.address))

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Copy a host array to the start of a buffer; the array may be reused after `synchronize` or the next copy
        from pageable memory, which CUDA stages before it returns."""
        content = np.ascontiguousarray(array)
        assert content.nbytes <= buffer.size, f"{content.nbytes} bytes do not fit a buffer of {buffer.size}"
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync(buffer.address, content.ctypes.data, content.nbytes, kind, self.stream))

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Fill a contiguous host array from the start of a buffer, and wait for it."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync(array.ctypes.data, buffer.address, array.nbytes, kind, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._call(self._cuda.cudaStreamSynchronize(self.stream))

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` puts on the stream, as a graph to launch; nothing of it runs now."""
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
        """Forget a captured graph."""
        self._call(self._cuda.cudaGraphExecDestroy(graph))
