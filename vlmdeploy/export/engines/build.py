"""Engines of a bundle: compiled aside, hashed, and published with the manifest that lists them.

A kill at any moment leaves a bundle that is whole, with its old engines or with none.
"""

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vlmdeploy import devices
from vlmdeploy.artifact import LOCK, empty_partial, locked
from vlmdeploy.bundle import EngineInfo, FileEntry, Manifest, hash_file, write_manifest
from vlmdeploy.byte_sizes import gigabytes, parse_size
from vlmdeploy.devices import Device
from vlmdeploy.errors import BundleError, ConfigError, ExportError
from vlmdeploy.export.engines.compiler import EngineRequest, ProfileShapes, RoutedPlugin, compile_engine
from vlmdeploy.export.engines.parts import EnginePart, plan_parts
from vlmdeploy.kernels.packing import PACKING_VERSION
from vlmdeploy.progress import Progress
from vlmdeploy.runtime.backends.cuda_device import compute_capability, cuda_runtime
from vlmdeploy.runtime.backends.door import ROUTED_GRAPH
from vlmdeploy.runtime.backends.trt import needed_bytes
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary, import_tensorrt, library_of
from vlmdeploy.runtime.integrity import cache_folder, check_bundle
from vlmdeploy.runtime.memory import available_bytes

logger = logging.getLogger("vlmdeploy")

ENGINES = "engines"
ASIDE = ".engines.partial"
LOG_NAME = "build.log"
PLUGIN_NAME = "libvlmdeploy_routed.so"  # in the bundle, whatever it was called before
RoutedChoice = Literal["on", "off", "auto"]
CAPABILITY = re.compile(r"\d{1,2}\.\d")
KEPT_FREE = 0.9  # of the memory that the system calls available


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose. No compute capability: a portable plan (TensorRT-RTX), this machine's GPU (TensorRT)."""

    compute_capabilities: tuple[str, ...] = ()
    shapes: ProfileShapes = field(default_factory=ProfileShapes)
    max_memory: int | None = None  # bytes; None: what is available
    device: Device | None = None  # what the engines will run on, where that was named
    plugin_library: Path | None = None  # the routed plugin; None: its kernels go into the engine
    routed_plugin: RoutedChoice = "auto"  # what the bundle must have been exported with; "auto": either


def read_build_options(
    capabilities: tuple[str, ...],
    chunk_rows: int,
    max_memory: str | None,
    device_name: str | None,
    batch: int = 1,
    plugin_library: Path | None = None,
    routed_plugin: RoutedChoice = "auto",
) -> BuildOptions:
    """Options from what the command line takes. Raises ConfigError."""
    device = None if device_name is None else devices.device(device_name)
    if device is not None and capabilities:
        raise ConfigError("--sm and --device both choose a GPU: give one of them")
    if device is not None and device.engine == "tensorrt_rtx":
        capabilities = (device.compute_capability,)
    for capability in capabilities:
        if not CAPABILITY.fullmatch(capability):
            raise ConfigError(f'--sm is "{capability}", expected a compute capability such as 8.6')
    memory = None if max_memory is None else parse_size(max_memory, "--max-memory")
    shapes = ProfileShapes(chunk_rows=chunk_rows, batch=batch)
    return BuildOptions(capabilities, shapes, memory, device, plugin_library, routed_plugin)


def plan_engines(folder: Path, manifest: Manifest, options: BuildOptions) -> list[EnginePart]:
    """The engines that the bundle's graphs become here. Raises ExportError, and BackendError without the library."""
    import_tensorrt(library_of(manifest.target))
    memory = options.max_memory or int(KEPT_FREE * available_bytes())
    return plan_parts(folder, manifest.graphs, manifest.cache.num_layers, memory)


def check_options(target: str, options: BuildOptions) -> None:
    """Raise ExportError where options choose a GPU that the target makes no engines for, or that cannot be chosen."""
    device, is_rtx = options.device, target.startswith("rtx-")
    if device is not None and (target.startswith("ort-") or device.engine != library_of(target)):
        other = "trt-int4" if device.engine == "tensorrt" else "rtx-int4"
        raise ExportError(f"--device {device.name} runs engines of {device.engine}: export with --target {other}")
    if options.compute_capabilities and not is_rtx:
        raise ExportError(f"--sm is for targets of TensorRT-RTX; engines of {target} fit the GPU that builds them")


def check_plugin(where: str, options: BuildOptions, is_routed: bool) -> None:
    """Raise ExportError where options are for a routed decoder and the bundle has none, or the other way round, or the
    plugin is missing."""
    if is_routed:
        if options.routed_plugin == "off":
            raise ExportError(
                f"{where}: has a routed decoder: for --routed-plugin off export it again with that option"
            )
        if options.plugin_library is not None and not options.plugin_library.is_file():
            found = "not a file" if options.plugin_library.exists() else "no such file"
            raise ExportError(
                f"--plugin-library {options.plugin_library}: {found}; docs/plugin.md says how to build it"
            )
        return
    given = {
        "--routed-plugin on": options.routed_plugin == "on",
        "--plugin-library": options.plugin_library is not None,
        "--batch": options.shapes.batch != 1,
    }
    for option in (name for name, is_given in given.items() if is_given):
        raise ExportError(
            f"{where}: {option} needs a routed decoder, and there is one graph for each expert: export with "
            "--routed-plugin on"
        )


def _check_packing(folder: Path, manifest: Manifest) -> None:
    """Raise ExportError where no kernel of this version reads the codes of a routed decoder."""
    if manifest.plugin is not None and manifest.plugin.packing != PACKING_VERSION:
        raise ExportError(
            f"{folder}: its codes are packed in layout {manifest.plugin.packing}, this version's kernels read layout "
            f"{PACKING_VERSION}: export it again"
        )


def check_fit(folder: Path, manifest: Manifest, options: BuildOptions) -> None:
    """Raise ExportError where the named device has too little memory even with one phase resident at a time."""
    if options.device is None:
        return
    sizes: dict[str, int] = {}
    for part in plan_parts(folder, manifest.graphs, manifest.cache.num_layers, sys.maxsize):
        sizes[part.graph] = sizes.get(part.graph, 0) + part.weight_bytes
    shapes, usable = shapes_of(manifest, options), options.device.usable_bytes
    needed, buffers = needed_bytes(manifest, sizes, shapes.chunk_rows, shapes.logit_rows, "phase", shapes.batch)
    if needed > usable:
        held = ", ".join(f"{graph} {gigabytes(size)}" for graph, size in sizes.items())
        raise ExportError(
            f"--device {options.device.name} has {gigabytes(usable)} for us and --residency phase needs "
            f"{gigabytes(needed)} ({held}, buffers and KV cache {gigabytes(buffers)}): quantize with --vision int4, or "
            "export with a smaller --context"
        )


def compile_engines(
    folder: Path,
    manifest: Manifest,
    parts: list[EnginePart],
    options: BuildOptions,
    capabilities: tuple[str, ...],
    into: Path,
    progress: Progress,
) -> dict[str, EngineInfo]:
    """Compile every part into the folder `into`, with a log; what the manifest says about the engines, by name.

    capabilities: the GPUs that the engines fit; see `built_for`.
    """
    library = import_tensorrt(library_of(manifest.target))
    shapes, log = shapes_of(manifest, options), _new_log(into)
    engines = {}
    routed_first = sorted(parts, key=lambda part: part.graph != ROUTED_GRAPH)  # a plugin that does not fit: at once
    for part in routed_first:
        plan = into / f"{part.name}.engine"
        request = EngineRequest(
            library.name, folder / manifest.graphs[part.graph].file, part, manifest.cache.num_layers, shapes,
            options.compute_capabilities, plan, log, _plugin_of(part, options, capabilities),
        )  # fmt: skip
        compile_engine(request, progress)
        engines[part.name] = EngineInfo(
            f"{ENGINES}/{plan.name}", part.graph, part.part, part.layers, library.name, library.version,
            capabilities, shapes.chunk_rows, shapes.logit_rows, manifest.context_tokens, shapes.batch,
        )  # fmt: skip
    if options.plugin_library is not None:
        shutil.copyfile(options.plugin_library, into / PLUGIN_NAME)
    if log.parent != into:
        shutil.copyfile(log, into / LOG_NAME)
        log.unlink()
    return engines


def _plugin_of(part: EnginePart, options: BuildOptions, capabilities: tuple[str, ...]) -> RoutedPlugin | None:
    """How the routed operations get into an engine that has some, on the one GPU that TensorRT builds for."""
    if part.graph != ROUTED_GRAPH:
        return None
    return RoutedPlugin(options.plugin_library, int(capabilities[0].replace(".", "")))


def shapes_of(manifest: Manifest, options: BuildOptions) -> ProfileShapes:
    """What a bundle's engines are built for: calls no longer than its context, as many images as it takes, logits of as
    many rows as there are prompts."""
    chosen = options.shapes
    return replace(
        chosen,
        chunk_rows=min(chosen.chunk_rows, manifest.context_tokens),
        logit_rows=max(chosen.logit_rows, chosen.batch),
        images=manifest.tokens.max_images,
    )


def built_for(library: TensorrtLibrary, options: BuildOptions) -> tuple[str, ...]:
    """The GPUs that engines fit: those asked for, none for a portable plan; those of TensorRT this machine's only."""
    return options.compute_capabilities if library.is_rtx else (compute_capability(cuda_runtime()),)


def _new_log(into: Path) -> Path:
    """An empty log in the user's cache, where it outlives a failed build; where that cannot be written, in `into`."""
    log = cache_folder() / f"build-{os.getpid()}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    except OSError as error:
        logger.warning("%s: cannot be written (%s), the log of a failed build will be lost", log, error.strerror)
        return into / LOG_NAME
    return log


def engine_files(into: Path) -> dict[str, FileEntry]:
    """What was written into the folder of engines, as the manifest lists it."""
    return {f"{ENGINES}/{path.name}": hash_file(path) for path in sorted(into.iterdir())}


def build_bundle(folder: Path, options: BuildOptions, progress: Progress) -> tuple[Manifest, bool]:
    """Compile the engines of a bundle where it lies; its new manifest, and whether anything had to be done.

    Engines that are damaged are built again. Raises BundleError, BackendError and ExportError; then the bundle is as it
    was, or, where the disk failed at the very end, without engines.
    """
    manifest = check_bundle(folder, without=f"{ENGINES}/")
    if manifest.dialect != "trt":
        raise ExportError(f"{folder}: made for target {manifest.target}, which needs no engines: run it as it is")
    check_options(manifest.target, options)
    check_plugin(str(folder), options, manifest.is_routed)
    _check_packing(folder, manifest)
    check_fit(folder, manifest, options)
    built_for_here = built_for(import_tensorrt(library_of(manifest.target)), options)
    if _is_built(folder, manifest, options, built_for_here):
        return manifest, False
    parts = plan_engines(folder, manifest, options)
    aside = folder / ASIDE
    try:
        with locked(aside), removed_on_error(aside):
            empty_partial(aside, LOG_NAME)
            engines = compile_engines(folder, manifest, parts, options, built_for_here, aside, progress)
            return _publish(manifest, options, folder, engines, aside), True
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error.strerror or error} ({error.filename})") from error


@contextmanager
def removed_on_error(aside: Path) -> Iterator[None]:
    """Remove what a failed build wrote."""
    try:
        yield
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _is_built(folder: Path, manifest: Manifest, options: BuildOptions, built_for_here: tuple[str, ...]) -> bool:
    """Whether whole engines are there already, for these options and the library installed here."""
    library = import_tensorrt(library_of(manifest.target))
    wanted = (library.name, library.version, built_for_here)
    shapes = shapes_of(manifest, options)
    fitting = [
        (engine.library, engine.version, engine.compute_capabilities) == wanted
        and (engine.chunk_rows, engine.logit_rows, engine.batch) == (shapes.chunk_rows, shapes.logit_rows, shapes.batch)
        for engine in manifest.engines.values()
    ]
    if not fitting or not all(fitting) or not _has_plugin(manifest, options):
        return False
    try:
        check_bundle(folder)
    except BundleError:
        return False
    return True


def _has_plugin(manifest: Manifest, options: BuildOptions) -> bool:
    """Whether the engines were built with the plugin library that is asked for, or with none as asked."""
    if manifest.plugin is None:
        return True
    if options.plugin_library is None or not manifest.plugin.library:
        return options.plugin_library is None and not manifest.plugin.library
    held = manifest.files.get(manifest.plugin.library)
    return held is not None and held == hash_file(options.plugin_library)


def _with_plugin(manifest: Manifest, library: str) -> Manifest:
    """The manifest that names a file of the bundle as the plugin library of a routed decoder; "": none."""
    return manifest if manifest.plugin is None else replace(manifest, plugin=replace(manifest.plugin, library=library))


def _publish(
    manifest: Manifest, options: BuildOptions, folder: Path, engines: dict[str, EngineInfo], aside: Path
) -> Manifest:
    """Swap the engines: first a manifest without any, then the files, then the manifest that lists them."""
    (aside / LOCK).unlink()
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(f"{ENGINES}/")}
    bare = _with_plugin(replace(manifest, engines={}, files=files), "")
    library = "" if options.plugin_library is None else f"{ENGINES}/{PLUGIN_NAME}"
    built = _with_plugin(replace(bare, engines=engines, files=files | engine_files(aside)), library)
    write_manifest(folder, bare)
    if (folder / ENGINES).exists():
        shutil.rmtree(folder / ENGINES)
    aside.rename(folder / ENGINES)
    write_manifest(folder, built)
    return built
