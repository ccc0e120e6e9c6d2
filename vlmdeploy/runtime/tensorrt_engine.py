"""One compiled engine on the device: loaded from its file, its tensors bound to addresses, run on the stream."""

import logging
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdeploy.bundle import EngineInfo, FileEntry
from vlmdeploy.errors import BackendError
from vlmdeploy.runtime.cuda_device import Buffer, CudaDevice
from vlmdeploy.runtime.integrity import cache_folder
from vlmdeploy.runtime.tensorrt_library import HOW_TO_INSTALL, TensorrtLibrary

logger = logging.getLogger("vlmdeploy")

PROMPT, ONE_TOKEN = 0, 1  # optimization profiles of a decoder


def check_engine(where: str, info: EngineInfo, library: TensorrtLibrary, capability: str) -> None:
    """Raise BackendError where an engine is not for this library, version or GPU; says what to do."""
    rebuild = "compile it on this machine with `vlmdeploy build`"
    if info.library != library.name:
        raise BackendError(f"{where}: built by {info.library}, not {library.name}: {HOW_TO_INSTALL[info.library]}")
    if info.version != library.version:
        raise BackendError(
            f"{where}: built by {info.library} {info.version}, this machine has {library.version}: install "
            f"{info.version}, or {rebuild}"
        )
    if info.compute_capabilities and capability not in info.compute_capabilities:
        built_for = ", ".join(info.compute_capabilities)
        raise BackendError(f"{where}: built for SM {built_for}, this GPU is SM {capability}: {rebuild}")


@dataclass(frozen=True)
class RuntimeCache:
    """Kernels that TensorRT-RTX finished for this GPU, kept between runs in the user's cache, never in the bundle."""

    path: Path

    @classmethod
    def of(cls, entry: FileEntry, capability: str) -> "RuntimeCache":
        """The cache of an engine, by its hash and the GPU."""
        return cls(cache_folder() / "rtx" / f"{entry.sha256}-sm{capability}.cache")

    def read(self) -> bytes:
        """What was kept; nothing where there is none."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def write(self, content: bytes) -> None:
        """Keep for the next run; a folder that cannot be written costs time only, and a warning."""
        aside = self.path.with_suffix(".new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(content)
            aside.replace(self.path)
        except OSError as error:
            logger.warning("%s: cannot be written (%s), kernels are compiled at every start", self.path, error.strerror)


class Engine:
    """A loaded engine. Its contexts share `scratch` with those of every other engine: one runs at a time."""

    def __init__(
        self, path: Path, info: EngineInfo, runtime: Any, library: TensorrtLibrary, cache: RuntimeCache
    ) -> None:
        self.info = info
        self.library = library
        self._where = str(path)
        self._cache = cache
        self._known: bytes = b""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise BackendError(f"{path}: cannot be loaded, see the log above; compile it again with `vlmdeploy build`")
        self._config = self._engine.create_runtime_config()
        strategy = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config.set_execution_context_allocation_strategy(strategy)
        self._kernels = self._with_kernels() if library.is_rtx else None
        self._contexts: dict[int, Any] = {}
        self.names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _with_kernels(self) -> Any:
        """Give the engine the kernels of earlier runs."""
        kernels = self._config.create_runtime_cache()
        self._known = self._cache.read()
        if self._known and not kernels.deserialize(self._known):
            logger.warning("%s: not usable, kernels are compiled again", self._cache.path)
        self._config.set_runtime_cache(kernels)
        return kernels

    @property
    def scratch_bytes(self) -> int:
        """Working memory of the largest profile, in bytes."""
        profiles = range(self._engine.num_optimization_profiles)
        return max(int(self._engine.get_device_memory_size_for_profile_v2(profile)) for profile in profiles)

    def context(self, profile: int, scratch: Buffer, device: CudaDevice) -> Any:
        """The execution context of a profile, made on first use."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise BackendError(f"{self._where}: no execution context could be made, most likely for lack of memory")
            context.set_device_memory(scratch.address, scratch.size)
            if not context.set_optimization_profile_async(profile, device.stream):
                raise BackendError(f"{self._where}: has no profile {profile}; compile it again with `vlmdeploy build`")
            device.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def bind(self, context: Any, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the shape of every varying input and the address of every tensor."""
        for name, shape in shapes.items():
            if name in self.names and not context.set_input_shape(name, shape):
                raise BackendError(f"{self._where}: does not take {name} of shape {list(shape)}")
        for name in self.names:
            context.set_tensor_address(name, addresses[name])

    def enqueue(self, context: Any, device: CudaDevice) -> None:
        """Put one run on the stream."""
        if not context.execute_async_v3(device.stream):
            raise BackendError(f"{self._where}: TensorRT could not run it, see the log above")

    def forget_contexts(self) -> None:
        """Give up the contexts, which are made anew when needed."""
        self._contexts.clear()

    def keep_kernels(self) -> None:
        """Write what TensorRT-RTX compiled since it was loaded to the user's cache."""
        if self._kernels is not None:
            content = bytes(memoryview(self._kernels.serialize()))
            if content != self._known:
                self._cache.write(content)
                self._known = content
