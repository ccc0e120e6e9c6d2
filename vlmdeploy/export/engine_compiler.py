"""Compiling one ONNX graph to an engine, in a process of its own: TensorRT aborts on some errors and keeps memory, and
a builder that runs out of memory is killed; here that is one clear error."""

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnx

from vlmdeploy.errors import BackendError, ExportError
from vlmdeploy.export.engine_parts import EnginePart, cut
from vlmdeploy.runtime.tensorrt_library import LibraryName, import_tensorrt
from vlmdeploy.sizes import gigabytes

KEPT_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")
ERRORS = ("INTERNAL_ERROR", "ERROR")
UNREAD = "Unused Input"  # how the parser says that it ignores an input, and computes something else


@dataclass(frozen=True)
class Shapes:
    """What engines are built for: rows of one call, rows of logits of one call, images of one call."""

    chunk_rows: int = 512
    logit_rows: int = 8
    images: int = 1


@dataclass(frozen=True)
class EngineRequest:
    """One engine to build: the graph file, which of its layers, for what, and where to put it."""

    library: LibraryName
    graph: Path
    part: EnginePart
    num_layers: int
    shapes: Shapes
    compute_capabilities: tuple[str, ...]
    plan: Path
    log: Path


def compile_engine(request: EngineRequest, progress: Callable[[str, int, int], None]) -> None:
    """Write the plan of a request. Raises ExportError with what TensorRT said last."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(request, sender), daemon=True)
    process.start()
    sender.close()
    failure = None
    try:
        while True:
            kind, *content = receiver.recv()
            if kind == "progress":
                progress(f"{request.part.name}: {content[0]}", content[1], content[2])
            elif kind == "failed":
                failure = content[0]
    except EOFError:
        process.join()
    finally:
        process.kill()
    if failure is not None or process.exitcode != 0:
        raise ExportError(f"{request.graph}: {failure or _death(process.exitcode, request)}; log: {request.log}")


def _death(exit_code: int | None, request: EngineRequest) -> str:
    """What to say about a builder that ended without a word."""
    expected = gigabytes(request.part.build_bytes)
    if exit_code == -9:
        return f"the builder was killed, most likely for memory: it was expected to take {expected}"
    return f"TensorRT ended the builder with status {exit_code} while it built {request.part.name}"


def _work(request: EngineRequest, sender: Connection) -> None:
    """The builder process: what TensorRT prints goes to the log too."""
    with request.log.open("a", buffering=1, encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        log.write(f"== {request.part.name}\n")
        try:
            _compile(request, log.write, lambda *step: sender.send(("progress", *step)))
        except (BackendError, ExportError, OSError) as error:
            sender.send(("failed", str(error)))


def _compile(request: EngineRequest, write: Callable[[str], Any], progress: Callable[[str, int, int], None]) -> None:
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
    if not parser.parse(model.SerializeToString(), str(request.graph)):
        raise ExportError(f"TensorRT cannot read it ({parser.get_error(0).desc()})")
    unread = [message for _, message in said if UNREAD in message]
    if unread:
        raise ExportError(f"TensorRT would ignore a part of it ({unread[0]})")
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    library.set_compute_capabilities(config, request.compute_capabilities)
    for shapes in profiles(request):
        config.add_optimization_profile(_profile(builder, network, shapes))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        errors = [message for severity, message in said if severity in ERRORS]
        raise ExportError(f"TensorRT cannot build it ({errors[-1] if errors else 'no reason given'})")
    request.plan.write_bytes(memoryview(plan))


def _model(request: EngineRequest) -> onnx.ModelProto:
    model = onnx.load(str(request.graph), load_external_data=False)
    return model if request.part.is_whole else cut(model, request.part.layers, request.num_layers)


def profiles(request: EngineRequest) -> list[dict[str, tuple[int, int, int]]]:
    """Least, usual and most of every varying dimension: for the prompt, and for the text decoder for one token too."""
    shapes = request.shapes
    if request.part.graph == "vision":
        return [{"images": (1, 1, shapes.images)}]
    prompt = {"rows": (1, shapes.chunk_rows, shapes.chunk_rows), "asked": (1, 1, shapes.logit_rows)}
    one = {"rows": (1, 1, 1), "asked": (1, 1, 1)}
    return [prompt] if request.part.graph == "decoder_vision" else [prompt, one]


def _profile(builder: Any, network: Any, sizes: dict[str, tuple[int, int, int]]) -> Any:
    """The profile of a network whose varying dimensions are named as in the graph."""
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
