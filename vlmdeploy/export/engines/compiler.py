"""Compiles one ONNX graph to an engine in a child process: TensorRT aborts on some errors and keeps memory, and the
system kills a builder that runs out of it. Here each becomes one clear error."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import onnx

from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.child_process import child_process
from vlmdeploy.errors import BackendError, ExportError
from vlmdeploy.export.engines.parts import EnginePart, cut
from vlmdeploy.export.engines.plugin_ahead_of_time import register_routed_plugins
from vlmdeploy.export.graphs.routed_functions import without_routed_functions
from vlmdeploy.progress import Progress
from vlmdeploy.records import record_of
from vlmdeploy.runtime.backends.door import ROUTED_GRAPH
from vlmdeploy.runtime.backends.plugin_library import load_plugin_library
from vlmdeploy.runtime.backends.trt_library import LibraryName, TensorrtLibrary, import_tensorrt

if TYPE_CHECKING:
    import tensorrt as trt

KEPT_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")
ERRORS = ("INTERNAL_ERROR", "ERROR")
FEWEST_HEADS = 4  # TensorRT-RTX 1.7 has no causal attention kernel for fewer
UNREAD = "Unused Input"  # the parser's message when it ignores an input and computes something else
LOGIT_ROWS = 8


@dataclass(frozen=True)
class ProfileShapes:
    """The largest call that engines are built for. chunk_rows: per prompt; batch: prompts, of a routed decoder."""

    chunk_rows: int = 512
    logit_rows: int = LOGIT_ROWS
    images: int = 1
    batch: int = 1


@dataclass(frozen=True)
class RoutedPlugin:
    """The source of an engine's routed operators: a library, or None for kernels that the engine embeds.

    architecture: of the GPU, 87 for SM 8.7.
    """

    library: Path | None
    architecture: int


@dataclass(frozen=True)
class EngineRequest:
    """One engine to build: the graph file, its layers, shapes and GPUs, and the output files."""

    library: LibraryName
    graph: Path
    part: EnginePart
    num_layers: int
    shapes: ProfileShapes
    compute_capabilities: tuple[str, ...]
    plan: Path
    log: Path
    plugin: RoutedPlugin | None = None  # of a routed decoder


def compile_engine(request: EngineRequest, progress: Progress) -> None:
    """Write the plan of a request. Raises ExportError with TensorRT's last words."""
    failure = None
    with child_process("vlmdeploy.export.engines.compiler") as process:
        assert process.stdin is not None and process.stdout is not None, "pipes were asked for"
        with suppress(BrokenPipeError), process.stdin as pipe:  # its exit status tells more
            pipe.write(json.dumps(asdict(request), default=str).encode())
        for line in process.stdout:
            kind, *content = json.loads(line)
            if kind == "progress":
                progress(f"{request.part.name}: {content[0]}", content[1], content[2])
            else:
                failure = content[0]
    if failure is not None or process.returncode != 0:
        raise ExportError(f"{request.graph.name}: {failure or _death(process.returncode, request)}; log: {request.log}")


def _death(exit_code: int | None, request: EngineRequest) -> str:
    """The message for a builder that ended without one."""
    expected = gigabytes(request.part.build_bytes)
    if exit_code == -9:
        return f"the builder was killed, most likely for memory: it was expected to take {expected}"
    return f"TensorRT ended the builder with status {exit_code} while it built {request.part.name}"


def main() -> None:
    """The builder process: a request on stdin, JSON lines on stdout, and TensorRT's output in the log."""
    request = record_of(EngineRequest, json.load(sys.stdin), "the request", ExportError)
    with os.fdopen(os.dup(1), "w", buffering=1) as answers, request.log.open("a", buffering=1) as log:

        def tell(*content: str | int) -> None:
            answers.write(json.dumps(content) + "\n")

        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        log.write(f"== {request.part.name}\n")
        try:
            _compile(request, log.write, lambda *step: tell("progress", *step))
        except (BackendError, ExportError, OSError) as error:
            tell("failed", str(error))


def _compile(request: EngineRequest, write: Callable[[str], object], progress: Progress) -> None:
    library = import_tensorrt(request.library)
    said: list[tuple[str, str]] = []

    def tell(severity: str, message: str) -> None:
        said.append((severity, message))
        if severity in KEPT_SEVERITIES:
            write(f"{severity}: {message}\n")

    logger, monitor = library.logger(tell), library.monitor(progress)
    builder = library.module.Builder(logger)
    network = builder.create_network(0)
    parser = library.module.OnnxParser(network, logger)
    model = _model(request)
    if request.plugin is not None:
        use_plugin(library, request.plugin, model)
    if not parser.parse(model.SerializeToString(), str(request.graph)):
        error: trt.ParserError = parser.get_error(0)
        raise ExportError(f"TensorRT cannot read it ({error.desc()})")
    _check_layers(library, network, model)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    library.prepare(config, request.compute_capabilities)
    for shapes in profiles(request):
        config.add_optimization_profile(_profile(builder, network, shapes))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        errors = [message for severity, message in said if severity in ERRORS]
        raise ExportError(f"TensorRT cannot build it ({errors[-1] if errors else 'no reason given'})")
    unread = [message for _, message in said if UNREAD in message]
    if unread:
        raise ExportError(f"TensorRT ignores a part of it ({unread[0]})")
    with request.plan.open("wb") as file:
        file.write(memoryview(plan))
        file.flush()
        os.fsync(file.fileno())


def use_plugin(library: TensorrtLibrary, plugin: RoutedPlugin, model: onnx.ModelProto) -> None:
    """Register the routed operators with TensorRT, and remove their function bodies from the model."""
    without_routed_functions(model)
    if plugin.library is not None:
        load_plugin_library(plugin.library, library, plugin.architecture)
    else:
        register_routed_plugins(library, plugin.architecture)


def _check_layers(library: TensorrtLibrary, network: "trt.INetworkDefinition", model: onnx.ModelProto) -> None:
    """Require that every attention over the KV cache is causal from the last valid key backwards, as in the graph, and
    that as many layers as nodes write the cache."""
    module = library.module
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for op, kind in (("TRT_Attention", "ATTENTION_INPUT"), ("TensorScatter", "KV_CACHE_UPDATE")):
        wanted = sum(node.op_type in (op, op.removeprefix("TRT_")) for node in model.graph.node)
        found = sum(layer.type == module.LayerType.__members__[kind] for layer in layers)
        if found != wanted:
            raise ExportError(f"TensorRT made {found} layers {kind} of {wanted} nodes {op}")
    has_cache = any(value.name == "lengths" for value in model.graph.input)
    for layer in layers if has_cache else ():
        if layer.type == module.LayerType.ATTENTION_INPUT:
            _check_attention(library, layer)


def _check_attention(library: TensorrtLibrary, layer: "trt.ILayer") -> None:
    module = library.module
    name = layer.name.removeprefix("node_of_").removesuffix("_AttentionInput")
    layer.__class__ = module.IAttentionInputLayer
    attention = cast("trt.IAttentionInputLayer", layer).attention
    kind, lengths = attention.causal_kind, attention.key_value_lengths
    if kind != module.CausalMaskKind.LOWER_RIGHT or lengths is None:
        found = f"{str(kind).rpartition('.')[2]} {'with' if lengths is not None else 'without'} lengths"
        raise ExportError(f"TensorRT reads {name} as {found}, expected LOWER_RIGHT with lengths")
    if layer.get_input(0).shape[1] < FEWEST_HEADS:
        attention.decomposable = True  # several kernels instead of one; no released model has so few


def _model(request: EngineRequest) -> onnx.ModelProto:
    model = onnx.load(str(request.graph), load_external_data=False)
    return model if request.part.is_whole else cut(model, request.part.layers, request.num_layers)


def profiles(request: EngineRequest) -> list[dict[str, tuple[int, int, int]]]:
    """Least, usual and most of every varying dimension: for prompts and, in graphs that decode, for one token."""
    shapes = request.shapes
    if request.part.graph == "vision":
        return [{"images": (1, 1, shapes.images)}]
    prompt = {"rows": (1, shapes.chunk_rows, shapes.chunk_rows), "asked": (1, 1, shapes.logit_rows)}
    one = {"rows": (1, 1, 1), "asked": (1, 1, 1)}
    if request.part.graph == ROUTED_GRAPH:
        batch = (1, 1, shapes.batch)
        prompt |= {"batch": batch, "tokens": (1, shapes.chunk_rows, shapes.batch * shapes.chunk_rows)}
        one |= {"batch": batch, "tokens": batch, "asked": batch}
    return [prompt] if request.part.graph == "decoder_vision" else [prompt, one]


def _profile(
    builder: "trt.Builder", network: "trt.INetworkDefinition", sizes: dict[str, tuple[int, int, int]]
) -> "trt.IOptimizationProfile":
    """An optimization profile; the network's varying dimensions have their names in the graph."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        if -1 in tuple(tensor.shape):
            choices = [
                tuple(
                    sizes[name][which] if length == -1 else length
                    for name, length in zip(names, tensor.shape, strict=True)
                )
                for which in range(3)
            ]
            profile.set_shape(tensor.name, *choices)
    return profile
