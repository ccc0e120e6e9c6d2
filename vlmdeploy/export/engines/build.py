"""Compiles a bundle's engines in a folder aside, hashes them, and publishes them with the manifest that lists them.

A kill at any moment leaves a complete bundle, with its old engines or with none.
"""

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vlmdeploy import devices
from vlmdeploy.artifact import LOCK, empty_partial, locked, sync_folder, sync_tree
from vlmdeploy.bundle import hash_file, write_manifest
from vlmdeploy.byte_sizes import gigabytes, parse_size
from vlmdeploy.devices import Device
from vlmdeploy.errors import BundleError, ConfigError, ExportError
from vlmdeploy.export.engines.compiler import LOGIT_ROWS, EngineRequest, ProfileShapes, RoutedPlugin, compile_engine
from vlmdeploy.export.engines.parts import EnginePart, plan_parts
from vlmdeploy.kernels.packing import PACKING_VERSION
from vlmdeploy.manifest import ENGINES, MANIFEST_NAME, EngineInfo, FileEntry, Manifest
from vlmdeploy.progress import Progress
from vlmdeploy.runtime.backends.cuda_device import compute_capability, cuda_runtime
from vlmdeploy.runtime.backends.door import ROUTED_GRAPH
from vlmdeploy.runtime.backends.trt import needed_bytes
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary, import_tensorrt, library_of
from vlmdeploy.runtime.integrity import BundleFiles, check_bundle
from vlmdeploy.runtime.memory import available_bytes
from vlmdeploy.runtime.trust import is_trusted, record_trust
from vlmdeploy.runtime.user_folders import cache_folder

logger = logging.getLogger("vlmdeploy")

ASIDE = ".engines.partial"
LOG_NAME = "build.log"
PLUGIN_NAME = "libvlmdeploy_routed.so"  # in the bundle, whatever it was called before
CAPABILITY = re.compile(r"\d{1,2}\.\d")
KEPT_FREE = 0.9  # share of the available memory that a build may take


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose. Raises ConfigError for values that are invalid or contradict each other."""

    capabilities: tuple[str, ...] = ()  # such as "8.6"
    chunk_rows: int = 512
    batch: int = 1
    max_memory: str | None = None  # for building an engine, such as "12GB"; None: what is available
    device_name: str | None = None  # the device that will run the engines
    plugin_library: Path | None = None  # the routed plugin; None: the engine embeds its kernels
    routed_plugin: Literal["on", "off", "auto"] = "auto"  # for `build`: what the bundle was exported with

    def __post_init__(self) -> None:
        if self.device is not None and self.capabilities:
            raise ConfigError("--sm and --device both choose a GPU: give one of them")
        for capability in self.capabilities:
            if not CAPABILITY.fullmatch(capability):
                raise ConfigError(f'--sm is "{capability}", expected a compute capability such as 8.6')
        if self.max_memory is not None:
            parse_size(self.max_memory, "--max-memory")

    @property
    def device(self) -> Device | None:
        """The device named, if any."""
        return None if self.device_name is None else devices.device(self.device_name)

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The GPUs of a TensorRT-RTX plan; none: a portable plan."""
        is_rtx = self.device is not None and self.device.engine == "tensorrt_rtx"
        return (self.device.compute_capability,) if is_rtx and self.device else self.capabilities


def plan_engines(folder: Path, manifest: Manifest, options: BuildOptions) -> list[EnginePart]:
    """How to split the bundle's graphs into engines here. Raises ExportError, and BackendError without the library."""
    import_tensorrt(library_of(manifest.target))
    given = options.max_memory
    memory = int(KEPT_FREE * available_bytes()) if given is None else parse_size(given, "--max-memory")
    return plan_parts(folder, manifest.graphs, manifest.cache.num_layers, memory)


def check_options(target: str, options: BuildOptions) -> None:
    """Raise ExportError if the options choose a GPU that the target's engines do not run on or cannot be built for."""
    device, is_rtx = options.device, target.startswith("rtx-")
    if device is not None and (target.startswith("ort-") or device.engine != library_of(target)):
        other = "trt-int4" if device.engine == "tensorrt" else "rtx-int4"
        raise ExportError(f"--device {device.name} runs engines of {device.engine}: export with --target {other}")
    if options.compute_capabilities and not is_rtx:
        raise ExportError(f"--sm is for targets of TensorRT-RTX; engines of {target} fit the GPU that builds them")


def check_plugin(where: str, options: BuildOptions, is_routed: bool) -> None:
    """Raise ExportError if options and bundle disagree about a routed decoder, or the plugin library is missing."""
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
        "--batch": options.batch != 1,
    }
    for option in (name for name, is_given in given.items() if is_given):
        raise ExportError(
            f"{where}: {option} needs a routed decoder, and there is one graph for each expert: export with "
            "--routed-plugin on"
        )


def _check_packing(folder: Path, manifest: Manifest) -> None:
    """Raise ExportError if this version's kernels cannot read the codes of a routed decoder."""
    if manifest.plugin is not None and manifest.plugin.packing != PACKING_VERSION:
        raise ExportError(
            f"{folder}: its codes are packed in layout {manifest.plugin.packing}, this version's kernels read layout "
            f"{PACKING_VERSION}: export it again"
        )


def check_fit(folder: Path, manifest: Manifest, options: BuildOptions) -> None:
    """Raise ExportError if the named device has too little memory even with residency "phase"."""
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
    """Compile every part into the folder `into`, with a log; returns the manifest's entries by engine name.

    capabilities: see `built_for`.
    """
    library = import_tensorrt(library_of(manifest.target))
    shapes, log = shapes_of(manifest, options), _new_log(into)
    engines = {}
    routed_first = sorted(parts, key=lambda part: part.graph != ROUTED_GRAPH)  # so that a wrong plugin fails early
    for part in routed_first:
        plan, plugin = into / f"{part.name}.engine", None
        if part.graph == ROUTED_GRAPH:  # for the one GPU that TensorRT builds for
            plugin = RoutedPlugin(options.plugin_library, int(capabilities[0].replace(".", "")))
        request = EngineRequest(
            library.name, folder / manifest.graphs[part.graph].file, part, manifest.cache.num_layers, shapes,
            options.compute_capabilities, plan, log, plugin,
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


def shapes_of(manifest: Manifest, options: BuildOptions) -> ProfileShapes:
    """The largest calls of a bundle's engines: rows within its context, its images, logits of a row per prompt or more.

    Where prompts may hold any number of images, the profile has one: the runtime encodes them one by one.
    """
    chunk_rows = min(options.chunk_rows, manifest.context_tokens)
    return ProfileShapes(chunk_rows, max(LOGIT_ROWS, options.batch), manifest.tokens.max_images or 1, options.batch)


def built_for(library: TensorrtLibrary, options: BuildOptions) -> tuple[str, ...]:
    """The GPUs that engines will fit: those chosen (none: portable) for TensorRT-RTX, this machine's for TensorRT."""
    return options.compute_capabilities if library.is_rtx else (compute_capability(cuda_runtime()),)


def _new_log(into: Path) -> Path:
    """An empty log in the user's cache, where it outlives a failed build; in `into` if the cache is not writable."""
    cache = cache_folder()
    if cache is None:
        return into / LOG_NAME
    log = cache / f"build-{os.getpid()}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    except OSError as error:
        logger.warning("%s: cannot be written (%s), the log of a failed build will be lost", log, error.strerror)
        return into / LOG_NAME
    return log


def engine_files(into: Path) -> dict[str, FileEntry]:
    """The manifest's entries of the files in a folder of engines."""
    return {f"{ENGINES}/{path.name}": hash_file(path) for path in sorted(into.iterdir())}


def build_bundle(folder: Path, options: BuildOptions, progress: Progress) -> tuple[Manifest, bool]:
    """Compile the engines of a bundle in place and trust it from now on; returns its new manifest, and whether it built
    anything.

    Rebuilds damaged engines, and those of somebody else whom the user does not trust. Raises BundleError, BackendError
    and ExportError; the bundle then is unchanged or, if the disk failed at the very end, without engines.
    """
    files = check_bundle(folder, without=f"{ENGINES}/")
    manifest = files.manifest
    if manifest.dialect != "trt":
        raise ExportError(f"{folder}: made for target {manifest.target}, which needs no engines: run it as it is")
    check_options(manifest.target, options)
    check_plugin(str(folder), options, manifest.is_routed)
    _check_packing(folder, manifest)
    check_fit(folder, manifest, options)
    built_for_here = built_for(import_tensorrt(library_of(manifest.target)), options)
    if _is_built(files, options, built_for_here):
        return manifest, False
    for graph in manifest.graphs:
        files.graph(graph)  # checks that it is one of ours, before TensorRT reads it
    parts = plan_engines(folder, manifest, options)
    aside = folder / ASIDE
    try:
        with locked(aside), removed_on_error(aside):
            empty_partial(aside, LOG_NAME)
            engines = compile_engines(folder, manifest, parts, options, built_for_here, aside, progress)
            built = _publish(manifest, options, folder, engines, aside)
            record_trust(folder, hash_file(folder / MANIFEST_NAME).sha256)
            return built, True
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


def _is_built(files: BundleFiles, options: BuildOptions, built_for_here: tuple[str, ...]) -> bool:
    """Whether the bundle has intact engines that the user trusts, for these options and the installed library."""
    manifest = files.manifest
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
    if not is_trusted(files.manifest_sha256):
        return False
    try:
        files.check_all()
    except BundleError:
        return False
    return True


def _has_plugin(manifest: Manifest, options: BuildOptions) -> bool:
    """Whether the engines were built with the plugin library of the options, or with none."""
    if manifest.plugin is None:
        return True
    held = manifest.files.get(manifest.plugin.library)
    return held == (None if options.plugin_library is None else hash_file(options.plugin_library))


def _with_plugin(manifest: Manifest, library: str) -> Manifest:
    """The manifest with this file of the bundle as the plugin library of a routed decoder; "": none."""
    return manifest if manifest.plugin is None else replace(manifest, plugin=replace(manifest.plugin, library=library))


def _publish(
    manifest: Manifest, options: BuildOptions, folder: Path, engines: dict[str, EngineInfo], aside: Path
) -> Manifest:
    """Swap the engines: write a manifest without any, then move the files, then write the manifest that lists them."""
    (aside / LOCK).unlink()
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(f"{ENGINES}/")}
    bare = _with_plugin(replace(manifest, engines={}, files=files), "")
    library = "" if options.plugin_library is None else f"{ENGINES}/{PLUGIN_NAME}"
    built = _with_plugin(replace(bare, engines=engines, files=files | engine_files(aside)), library)
    sync_tree(aside)
    write_manifest(folder, bare)
    if (folder / ENGINES).exists():
        shutil.rmtree(folder / ENGINES)
    aside.rename(folder / ENGINES)
    sync_folder(folder)
    write_manifest(folder, built)
    return built
