"""Splits a bundle's graphs into engines: one each, or several runs of decoder layers if one build would not fit into
memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.errors import ExportError
from vlmdeploy.manifest import GraphInfo

# Peak memory of a build over the bytes of the graph's weights: benchmarks/engine_build.py.
BASE_BYTES = 450 << 20
BYTES_PER_WEIGHT_BYTE = 3.1


@dataclass(frozen=True)
class EnginePart:
    """The content of one engine: a whole graph, or its decoder layers first <= i < last (both 0: no decoder)."""

    graph: str
    part: int
    layers: tuple[int, int]
    weight_bytes: int
    is_whole: bool

    @property
    def name(self) -> str:
        """The engine's name in the bundle: engines/NAME.engine."""
        return self.graph if self.is_whole else f"{self.graph}.{self.part}"

    @property
    def build_bytes(self) -> int:
        """Expected peak memory of building it."""
        return build_bytes(self.weight_bytes)


def build_bytes(weight_bytes: int) -> int:
    """Expected peak memory of building an engine with this many bytes of weights."""
    return BASE_BYTES + int(BYTES_PER_WEIGHT_BYTE * weight_bytes)


def plan_parts(folder: Path, graphs: dict[str, GraphInfo], num_layers: int, memory_bytes: int) -> list[EnginePart]:
    """Engines of a bundle's graphs, each buildable within `memory_bytes`. Raises ExportError if there are none."""
    parts: list[EnginePart] = []
    for name, graph in graphs.items():
        layers = num_layers if name.startswith("decoder") else 0
        parts += _parts_of(name, folder / graph.file, layers, memory_bytes)
    return parts


def _parts_of(name: str, path: Path, num_layers: int, memory_bytes: int) -> list[EnginePart]:
    """The fewest parts that fit, with nearly equal numbers of layers."""
    model = onnx.load(str(path), load_external_data=False)
    sizes = initializer_bytes(model)
    for count in range(1, max(num_layers, 1) + 1):
        edges = [num_layers * index // count for index in range(count + 1)]
        parts = []
        for index in range(count):
            layers = (edges[index], edges[index + 1])
            graph = model if count == 1 else cut(model, layers, num_layers)
            weight_bytes = sum(sizes[tensor.name] for tensor in graph.graph.initializer)
            parts.append(EnginePart(name, index, layers, weight_bytes, is_whole=count == 1))
        if all(part.build_bytes <= memory_bytes for part in parts):
            return parts
    largest = max(parts, key=lambda part: part.build_bytes)
    raise ExportError(
        f"{path.name}: building its engine takes about {gigabytes(largest.build_bytes)} of memory"
        f"{', cut into single layers,' if num_layers else ''} and {gigabytes(memory_bytes)} are available: close other "
        "programs, allow more with --max-memory where there is swap, or build on a larger machine"
        + ("" if num_layers else "; an int4 encoder (`quantize --vision int4`) takes a quarter")
    )


def initializer_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every tensor that a graph stores, by name."""
    sizes = {}
    for tensor in model.graph.initializer:
        lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        sizes[tensor.name] = lengths[0] if lengths else tensor.ByteSize()
    return sizes


def cut(model: onnx.ModelProto, layers: tuple[int, int], num_layers: int) -> onnx.ModelProto:
    """The graph of decoder layers first <= i < last: takes rows and, except for the last part, returns rows."""
    first, last = layers
    start = "hidden" if first == 0 else f"layer.{first - 1}.out"
    kept = {f"present_{kind}.{index}" for index in range(first, last) for kind in ("key", "value")}
    names = [value.name for value in model.graph.output]
    wanted = [name for name in names if name in kept or (last == num_layers and not name.startswith("present_"))]
    if last < num_layers:
        wanted.append(f"layer.{last - 1}.out")
    nodes, needed = reachable(model.graph.node, wanted, start)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    _replace(graph.node, nodes)
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
    values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    rows = renamed(values["hidden"], start)
    others = [value for value in model.graph.input if value.name in needed and value.name != "hidden"]
    _replace(graph.input, [rows, *others])
    _replace(graph.output, [values[name] if name in values else renamed(values["hidden"], name) for name in wanted])
    return part


def reachable(
    nodes: Iterable[onnx.NodeProto], outputs: Iterable[str], start: str
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that compute the outputs from the value `start`, in order; and the names of all values involved."""
    needed, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if any(name in needed for name in node.output if name and name != start):
            kept.append(node)
            needed.update(name for name in node.input if name)
    return kept[::-1], needed


def renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """A value of the same type under another name."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _replace(field: Any, values: list[Any]) -> None:
    """Replace the content of a repeated field of a protobuf message."""
    copies = [type(value)() for value in values]
    for copy, value in zip(copies, values, strict=True):
        copy.CopyFrom(value)
    del field[:]
    field.extend(copies)
