"""The routed int4 operators as TensorRT plugins without a C++ library: `tensorrt.plugin` takes a kernel as PTX with
symbolic launch parameters and embeds both in the engine, which then runs without Python.

Unlike the library of plugins/ it needs no compiler on the device, but is limited to kernels of at most 48 KiB of shared
memory, to one kernel per profile, chosen by TensorRT's timing, and to at least one token. The interface exists since
TensorRT 10.9 and is experimental in 11.4. TensorRT calls plugin_callbacks.py.
"""

import importlib
from pathlib import Path
from types import ModuleType

from vlmdeploy.errors import BackendError
from vlmdeploy.export.engines.plugin_callbacks import RoutedKernels, register_linear, register_partition
from vlmdeploy.kernels.compiled_kernels import COMPILED, read_index
from vlmdeploy.runtime.backends.plugin_library import NAMESPACE, OPERATIONS, PACKING, check_not_registered
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary

_registered: dict[str, int] = {}  # library -> architecture, for the life of the process like TensorRT's registry


def register_routed_plugins(library: TensorrtLibrary, architecture: int, folder: Path = COMPILED) -> None:
    """Register both operators with the parser and builder of this process, with kernels for one GPU, such as 87.

    Call it before parsing a graph; a second call with the same architecture does nothing. Raises BackendError if the
    library lacks such plugins, there are no kernels for the GPU, or the operators are registered already.
    """
    if _registered.get(library.name) == architecture:
        return
    plugin = _plugin_module(library)
    kernels = _kernels(architecture, folder)
    if library.name in _registered:
        found = _registered[library.name]
        raise BackendError(f"{OPERATIONS[1]} is registered for SM {found}, it cannot also be for SM {architecture}")
    check_not_registered(library)
    register_partition(f"{NAMESPACE}::{OPERATIONS[0]}", plugin, library.module, kernels)
    register_linear(f"{NAMESPACE}::{OPERATIONS[1]}", plugin, library.module, kernels)
    _registered[library.name] = architecture


def _kernels(architecture: int, folder: Path) -> RoutedKernels:
    index = read_index(folder)
    if index.packing != PACKING:
        raise BackendError(f"{folder}: the kernels read weights of packing {index.packing}, expected {PACKING}")
    return RoutedKernels(architecture, index.of(architecture), folder)


def _plugin_module(library: TensorrtLibrary) -> ModuleType:
    """`tensorrt.plugin`."""
    if library.is_rtx:
        raise BackendError(f"TensorRT-RTX {library.version} has no plugins: the routed kernel needs a target trt-*")
    try:
        plugin = importlib.import_module(f"{library.name}.plugin")
    except ImportError as error:
        raise BackendError(
            f"TensorRT {library.version} has no module `plugin` ({error}), expected 10.9 or later"
        ) from error
    if not hasattr(plugin, "aot_impl"):
        raise BackendError(f"TensorRT {library.version} builds no plugins ahead of time, expected 10.9 or later")
    return plugin
