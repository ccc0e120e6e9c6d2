"""The C++ plugin library of plugins/: reads what it is, checks it against TensorRT and the GPU, and registers it, for
building engines with it and for loading them."""

import ctypes
import json
from dataclasses import dataclass
from pathlib import Path

from vlmdeploy.errors import BackendError
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary

NAMESPACE = "vlmdeploy"
OPERATIONS = ("RoutedPartition", "RoutedLinear")
VERSION = "1"  # of both operators
PACKING = 1  # layout of codes, scales and bias in our graphs
HOW_TO_BUILD = "see docs/plugin.md"
WANTED = f"expected a plugin library of vlmdeploy: {HOW_TO_BUILD}"


@dataclass(frozen=True)
class PluginInfo:
    """What a library says about itself. tensorrt: version of the headers it was compiled with, such as "11.1";
    architectures: the GPUs it has kernels for, 87 for compute capability 8.7."""

    path: Path
    plugin_version: str
    packing: int
    tensorrt: str
    tensorrt_major: int
    architectures: tuple[int, ...]


_loaded: dict[Path, PluginInfo] = {}  # the first is in TensorRT's registry for good; the others equal it


def load_plugin_library(path: Path, library: TensorrtLibrary, architecture: int | None = None) -> PluginInfo:
    """Register a plugin library and return what it says about itself. A process registers only its first library: that
    of another bundle is accepted if it says the same about itself.

    architecture: a GPU that it must have kernels for, such as 87. Call before parsing a graph or loading an engine.
    Raises BackendError.
    """
    info = _loaded.get(path.resolve()) or read_plugin_info(path)
    _check(info, library, architecture)
    if _loaded:
        _check_like(info, next(iter(_loaded.values())))
    else:
        check_not_registered(library)
        _register(info, library)
    _loaded[path.resolve()] = info
    return info


def read_plugin_info(path: Path) -> PluginInfo:
    """What a library says about itself, without registering it; runs no TensorRT code. Raises BackendError."""
    if not path.is_file():
        raise BackendError(f"{path}: {'not a file' if path.exists() else 'there is no such file'}, {WANTED}")
    try:
        function = ctypes.CDLL(str(path.resolve())).vlmdeploy_plugin_info
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded ({error}), {WANTED}") from error
    except AttributeError as error:
        raise BackendError(f"{path} is no plugin library of vlmdeploy: it has no vlmdeploy_plugin_info") from error
    function.restype = ctypes.c_char_p
    return _parse_info(path, function() or b"")


def _parse_info(path: Path, text: bytes) -> PluginInfo:
    try:
        content = json.loads(text)
        kinds = {"plugin_version": str, "packing": int, "tensorrt": str, "tensorrt_major": int, "architectures": list}
        wrong = [name for name, kind in kinds.items() if type(content[name]) is not kind]
        architectures = tuple(int(item) for item in content["architectures"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{path} does not say what it is: {text[:200]!r}") from error
    if wrong:
        raise BackendError(f"{path} does not say what it is, {wrong[0]} is of another type: {text[:200]!r}")
    plain = {name: content[name] for name in kinds if name != "architectures"}
    return PluginInfo(path=path, architectures=architectures, **plain)


def _check(info: PluginInfo, library: TensorrtLibrary, architecture: int | None) -> None:
    """Check the library against this TensorRT, our graphs, and a GPU."""
    if library.is_rtx:
        raise BackendError(f"TensorRT-RTX {library.version} takes no plugin library: {info.path} is for targets trt-*")
    major = int(library.version.partition(".")[0])
    if info.tensorrt_major != major:
        raise BackendError(
            f"{info.path} was built for TensorRT {info.tensorrt}, this is TensorRT {library.version}: build it again "
            f"with the headers of TensorRT {major}, {HOW_TO_BUILD}"
        )
    for name, found, wanted in (("operations", info.plugin_version, VERSION), ("packing", info.packing, PACKING)):
        if found != wanted:
            raise BackendError(f"{info.path} has version {found} of {name}, expected {wanted}: build it again")
    if architecture is not None and architecture not in info.architectures:
        raise BackendError(f"{info.path} has no kernels for SM {architecture}: built for {_gpus(info)}")


def _check_like(info: PluginInfo, registered: PluginInfo) -> None:
    """Compare with the registered library. Versions, packing and TensorRT are equal: both passed `_check`."""
    if info.architectures != registered.architectures:
        raise BackendError(
            f"{info.path} was built for SM {_gpus(info)}, {registered.path}, which this process uses already, for SM "
            f"{_gpus(registered)}, and a process keeps its first plugin library: use this one in another process"
        )


def _gpus(info: PluginInfo) -> str:
    return ", ".join(map(str, info.architectures)) or "none"


def check_not_registered(library: TensorrtLibrary) -> None:
    """Raise BackendError if the parser already knows the operators."""
    registered = [name for name in OPERATIONS if _is_registered(library, name)]
    if registered:
        raise BackendError(f"{registered[0]} is registered already: a process uses one form of the plugin")


def _is_registered(library: TensorrtLibrary, name: str) -> bool:
    return library.plugin_registry().get_creator(name, VERSION, NAMESPACE) is not None


def _register(info: PluginInfo, library: TensorrtLibrary) -> None:
    if library.plugin_registry().load_library(str(info.path.resolve())) is None:
        raise BackendError(f"TensorRT {library.version} cannot register {info.path}: its log says why")
    missing = [name for name in OPERATIONS if not _is_registered(library, name)]
    if missing:
        raise BackendError(f"{info.path} was registered, but brought no {' and no '.join(missing)}")
