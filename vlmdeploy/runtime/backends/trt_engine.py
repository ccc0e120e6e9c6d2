"""One compiled engine on the device: loads its file, binds its tensors to addresses, runs on the stream."""

import logging
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdeploy.errors import BackendError
from vlmdeploy.manifest import EngineInfo, FileEntry
from vlmdeploy.runtime.backends.cuda_device import Buffer, CudaDevice
from vlmdeploy.runtime.backends.trt_library import HOW_TO_INSTALL, TensorrtLibrary
from vlmdeploy.runtime.integrity import BundleFiles
from vlmdeploy.runtime.user_folders import cache_folder, keep

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger("vlmdeploy")

PROMPT, ONE_TOKEN = 0, 1  # optimization profiles of a decoder


def check_engine(where: str, info: EngineInfo, library: TensorrtLibrary, capability: str) -> None:
    """Raise BackendError, with the remedy, if an engine is not for this library, version or GPU."""
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
    """Kernels that TensorRT-RTX compiled for this GPU, kept between runs in the user's cache, never in the bundle."""

    path: Path | None  # None for a user without a home

    @classmethod
    def of(cls, entry: FileEntry, device: CudaDevice) -> "RuntimeCache":
        """The cache of an engine, keyed by its hash and the GPU model."""
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", device.name)
        folder = cache_folder()
        return cls(None if folder is None else folder / "rtx" / f"{entry.sha256}-{gpu}.cache")

    def read(self) -> bytes:
        """The cached kernels; empty without a cache."""
        try:
            return b"" if self.path is None else self.path.read_bytes()
        except OSError:
            return b""

    def write(self, content: bytes) -> None:
        """Keep for the next run; warn if the folder is not writable."""
        keep(self.path, content, "kernels are compiled at every start")


class Engine:
    """A loaded engine. Its contexts share `scratch` with those of every other engine: one runs at a time."""

    def __init__(
        self,
        files: BundleFiles,
        info: EngineInfo,
        runtime: "trt.Runtime",
        library: TensorrtLibrary,
        cache: RuntimeCache,
    ) -> None:
        self.info = info
        self.library = library
        self._where = str(files.folder / info.file)
        self._cache = cache
        self._known = cache.read() if library.is_rtx else b""
        with files.open(info.file) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._engine = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise BackendError(
                f"{self._where}: cannot be loaded, see the log above: for lack of memory, or compile it again with "
                "`vlmdeploy build`"
            )
        self._kernels: trt.IRuntimeCache | None = None  # of TensorRT-RTX, shared by all contexts
        self._configs: dict[int, trt.IRuntimeConfig] = {}
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self.names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Every tensor lies on the device, and the engine itself writes a layer's cache where it reads it."""
        on_device = self.library.module.TensorLocation.DEVICE
        for name in self.names:
            if self._engine.get_tensor_location(name) != on_device:
                raise BackendError(f"{self._where}: expects {name} in host memory, which this runtime does not offer")
            kind, _, layer = name.partition("_")
            if kind == "present" and self._engine.get_aliased_input_tensor(name) != f"past_{layer}":
                raise BackendError(f"{self._where}: does not write {name} in place; compile it with `vlmdeploy build`")

    def _config(self, profile: int) -> "trt.IRuntimeConfig":
        """The configuration of a profile's contexts. Kernels of decoding are compiled before they are captured."""
        if profile not in self._configs:
            runtime_config = self._engine.create_runtime_config()
            strategy = self.library.module.ExecutionContextAllocationStrategy.USER_MANAGED
            runtime_config.set_execution_context_allocation_strategy(strategy)
            if self.library.is_rtx:
                self._finish_kernels(runtime_config, profile)
            self._configs[profile] = runtime_config
        return self._configs[profile]

    def _finish_kernels(self, runtime_config: "trt.IRuntimeConfig", profile: int) -> None:
        """Give TensorRT-RTX the kernels of earlier runs."""
        strategies = self.library.module.DynamicShapesKernelSpecializationStrategy
        runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            strategies.EAGER if profile == ONE_TOKEN else strategies.LAZY
        )
        if self._kernels is None:
            self._kernels = runtime_config.create_runtime_cache()
            if self._known and not self._kernels.deserialize(self._known):
                logger.warning("%s: not usable, kernels are compiled again", self._cache.path)
        if not runtime_config.set_runtime_cache(self._kernels):
            logger.warning("%s: takes no kernels of earlier runs", self._where)

    @property
    def scratch_bytes(self) -> int:
        """Working memory of the largest profile, in bytes."""
        profiles = range(self._engine.num_optimization_profiles)
        return max(int(self._engine.get_device_memory_size_for_profile_v2(profile)) for profile in profiles)

    def context(self, profile: int, scratch: Buffer, device: CudaDevice) -> "trt.IExecutionContext":
        """The execution context of a profile, created on first use."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context(self._config(profile))
            if context is None:
                raise BackendError(f"{self._where}: no execution context could be made, most likely for lack of memory")
            context.set_device_memory(scratch.address, scratch.size)
            if not context.set_optimization_profile_async(profile, device.stream):
                raise BackendError(f"{self._where}: has no profile {profile}; compile it again with `vlmdeploy build`")
            device.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def bind(
        self, context: "trt.IExecutionContext", addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Set the shape of every varying input and the address of every tensor."""
        for name, shape in shapes.items():
            if name in self.names and not context.set_input_shape(name, shape):
                raise BackendError(f"{self._where}: does not take {name} of shape {list(shape)}")
        for name in self.names:
            if not context.set_tensor_address(name, addresses[name]):
                raise BackendError(f"{self._where}: does not take an address for {name}")

    def enqueue(self, context: "trt.IExecutionContext", device: CudaDevice) -> None:
        """Put one run on the stream."""
        if not context.execute_async_v3(device.stream):
            raise BackendError(f"{self._where}: TensorRT could not run it, see the log above")

    def forget_contexts(self) -> None:
        """Release the contexts, none of which may be running; they are recreated on next use."""
        self._contexts.clear()

    def close(self) -> None:
        """Write newly compiled kernels to the user's cache and release everything. Nothing may be running."""
        kept = None if self._kernels is None else self._kernels.serialize()
        if kept is not None and (content := bytes(memoryview(kept))) != self._known:
            self._cache.write(content)
        self.forget_contexts()  # before the engine
        self._configs.clear()
        self._kernels = None
        del self._engine
