"""TensorRT and TensorRT-RTX behind one interface. Their Python APIs are nearly equal; the differences are here.

TensorRT-RTX serves RTX cards: one plan for many GPUs, finished on the device. TensorRT serves Jetson and datacenter
GPUs: a plan for one GPU and one TensorRT version. Neither is imported before an engine is built or run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from vlmdeploy.errors import BackendError

if TYPE_CHECKING:
    import tensorrt as trt  # types of both libraries

LibraryName = Literal["tensorrt", "tensorrt_rtx"]

HOW_TO_INSTALL = {
    "tensorrt_rtx": 'pip install "vlmdeploy[rtx]"',
    "tensorrt": "install TensorRT 11 and its Python bindings (a Jetson needs JetPack 7.2.2 and the SBSA package, see "
    "docs/jetson.md)",
}
WORKSPACE_BYTES = 1 << 30  # limit of TensorRT's scratch, on a Jetson otherwise all memory
SUPPORTED = {"tensorrt_rtx": ((1, 7), (2, 0)), "tensorrt": ((11, 0), (12, 0))}  # least, below


@dataclass(frozen=True)
class TensorrtLibrary:
    """An imported library. version: "1.7.1"."""

    name: LibraryName
    module: ModuleType
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether plans run on several GPU models."""
        return self.name == "tensorrt_rtx"

    def logger(self, tell: Callable[[str, str], None]) -> "trt.ILogger":
        """A logger that passes (severity, message) to `tell`; a process keeps its first one."""
        module = self.module

        class Logger(module.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: "trt.ILogger.Severity", message: str) -> None:
                tell(str(severity).rpartition(".")[2], message)

        return Logger()

    def monitor(self, tell: Callable[[str, int, int], None]) -> "trt.IProgressMonitor":
        """A progress monitor that passes (phase, done, total) of the outermost phase to `tell`."""
        module = self.module

        class Monitor(module.IProgressMonitor):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                module.IProgressMonitor.__init__(self)
                self.totals: dict[str, int] = {}

            def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
                self.totals[phase] = num_steps
                if parent is None:
                    tell(phase, 0, num_steps)

            def step_complete(self, phase: str, step: int) -> bool:
                if phase == next(iter(self.totals), None):
                    tell(phase, step + 1, self.totals[phase])
                return True

            def phase_finish(self, phase: str) -> None:
                self.totals.pop(phase, None)

        return Monitor()

    def plugin_registry(self) -> "trt.IPluginRegistry":
        """Where the parser finds plugins; entries live as long as the process."""
        return self.module.get_plugin_registry()

    def prepare(self, config: "trt.IBuilderConfig", capabilities: tuple[str, ...]) -> None:
        """Set the options in which the libraries differ. capabilities: the GPUs of a TensorRT-RTX plan, such as "8.6";
        none for a portable plan. Raises BackendError."""
        if self.is_rtx:
            config.set_flag(self.module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # needed for CUDA graph capture
            self._set_compute_capabilities(config, capabilities)
        else:
            config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)

    def _set_compute_capabilities(self, config: "trt.IBuilderConfig", capabilities: tuple[str, ...]) -> None:
        known = self.module.ComputeCapability.__members__
        if capabilities:  # none set: portable
            config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            name = f"SM{capability.replace('.', '')}"
            if name not in known:
                names = ", ".join(f"{item[2:-1]}.{item[-1]}" for item in known if item.startswith("SM"))
                raise BackendError(f"--sm is {capability}, TensorRT-RTX {self.version} builds for {names}")
            config.set_compute_capability(known[name], index)


def library_of(target: str) -> LibraryName:
    """The library that builds and runs the engines of a target."""
    return "tensorrt_rtx" if target.startswith("rtx-") else "tensorrt"


def import_tensorrt(name: LibraryName) -> TensorrtLibrary:
    """The library; raises BackendError if it is missing or its version is not supported."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(f"{name} cannot be imported ({error}): {HOW_TO_INSTALL[name]}") from error
    version = ".".join(str(module.__version__).split(".")[:3])
    found = tuple(int(part) for part in version.split(".")[:2])
    least, below = SUPPORTED[name]
    if not least <= found < below:
        wanted = f"{'.'.join(map(str, least))} or later, below {'.'.join(map(str, below))}"
        raise BackendError(f"{name} is version {module.__version__}, expected {wanted}: {HOW_TO_INSTALL[name]}")
    return TensorrtLibrary(name, module, version)
