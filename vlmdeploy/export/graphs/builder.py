"""A small builder of ONNX graphs that writes large weights straight into an external data file, block by block.

Graphs come in two dialects of the same structure; ort_dialect.py and trt_dialect.py hold the operations that differ.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import ClassVar, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.export.weight_reader import Ints, WeightReader
from vlmdeploy.manifest import CacheShape, FileEntry, GraphInfo, TensorInfo
from vlmdeploy.quant.grid import Grid, Quantized
from vlmdeploy.runtime.graph_check import check_graph
from vlmdeploy.spec.vision import ActivationName

IR_VERSION = 11
ALIGNMENT = 64 << 10  # of external offsets, so that each tensor can be memory-mapped alone
INLINE_BYTES = ALIGNMENT  # smaller tensors stay in the .onnx file: padding would outweigh them
TYPES = {
    "fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int64": TensorProto.INT64, "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
}  # fmt: skip
NUMPY_TYPES = {"fp32": np.float32, "fp16": np.float16, "uint8": np.uint8}

Value = TypeVar("Value", bound=np.generic)
Attribute = int | float | str | list[int]


class DataFile:
    """The external data of one graph, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._stream = path.open("wb")

    def append(self, blocks: Iterable[NDArray[np.generic]]) -> tuple[int, int]:
        """Write blocks at the next aligned offset; returns offset and length in bytes."""
        self._write(b"\0" * (-self.size % ALIGNMENT))
        offset = self.size
        for block in blocks:
            self._write(np.ascontiguousarray(block).tobytes())
        return offset, self.size - offset

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._digest.update(content)
        self.size += len(content)

    def entry(self) -> FileEntry:
        """Size and hash of the content so far."""
        return FileEntry(self.size, self._digest.hexdigest())

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


class GraphBuilder(ABC):
    """Collects the nodes of one graph and names their values. Values between operations are float32."""

    opsets: ClassVar[dict[str, int]]  # domain -> version
    functions: ClassVar[tuple[onnx.FunctionProto, ...]] = ()  # model-local functions that the nodes use
    row_axis: ClassVar[str] = "rows"  # name of the first axis of the decoder's rows

    def __init__(self, name: str, weights: WeightReader, data: DataFile) -> None:
        self.name = name
        self.weights = weights
        self.data = data
        self._nodes: list[onnx.NodeProto] = []
        self._made: set[str] = set()  # values that nodes have made
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._public_inputs: list[TensorInfo] = []
        self._public_outputs: list[TensorInfo] = []

    def input(self, name: str, dtype: str, shape: tuple[int | str, ...], public: bool = True) -> str:
        """Declare an input; the manifest lists public ones."""
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        if public:
            self._public_inputs.append(TensorInfo(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: tuple[int | str, ...], public: bool = True) -> str:
        """Declare an output; a node must produce it under this name."""
        self._outputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        if public:
            self._public_outputs.append(TensorInfo(name, dtype, shape))
        return name

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: Attribute) -> str:
        """Add a node with one output; returns the output's name."""
        return self.nodes(op, inputs, [output], domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Attribute
    ) -> list[str]:
        """Add a node with several outputs; "" skips one."""
        node = helper.make_node(op, inputs, outputs, name=outputs[-1], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self._nodes.append(node)
        self._made.update(outputs)
        return outputs

    def cast(self, x: str, output: str, kind: str) -> str:
        """x as "fp32" or "fp16"."""
        return self.node("Cast", [x], output, to=TYPES[kind])

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """A small tensor in the .onnx file; a repeated name is the same tensor."""
        self._initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector, for shapes and axes."""
        return self.constant("ints_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def parameter(self, target: str) -> str:
        """A whole small parameter (a norm, a bias, a table), float32."""
        return self.tensor(target, self.weights.vector(target))

    def tensor(self, name: str, value: NDArray[np.generic]) -> str:
        """A tensor held in memory: inline when small, else in the data file."""
        if value.nbytes < INLINE_BYTES:
            return self.constant(name, value)
        return self.external(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, [value])

    def external(self, name: str, dtype: int, shape: tuple[int, ...], blocks: Iterable[NDArray[np.generic]]) -> str:
        """A tensor in the data file, given in blocks along its first axis."""
        assert name not in self._initializers, f"{name} would be stored twice"
        offset, length = self.data.append(blocks)
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.data.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    @abstractmethod
    def linear(self, x: str, target: str, output: str, order: Ints | None = None, has_bias: bool = False) -> str:
        """x @ W.T (+ bias) in the planned precision. x [..., in] -> [..., out], both float32.

        `target` is the name without ".weight". `order` picks and arranges output rows; -1 is a row of zeros.
        """

    def gated(self, x: str, name: str, axis: int) -> str:
        """silu(gate(x)) * up(x), named NAME.product; gate and up are the halves of NAME.gate_up along `axis`."""
        both = self.linear(x, f"{name}.gate_up", f"{name}.gate_up")
        gate, up = self.nodes("Split", [both], [f"{name}.gate", f"{name}.up"], axis=axis, num_outputs=2)
        return self.node("Mul", [self.swish(gate, f"{name}.silu", 1.0), up], f"{name}.product")

    def activated(self, x: str, target: str, function: ActivationName, output: str) -> str:
        """function(x @ W.T + bias)."""
        return self.activation(function, self.linear(x, target, target, has_bias=True), output)

    def activation(self, function: ActivationName, x: str, output: str) -> str:
        """An elementwise function. The standard Gelu is the exact one."""
        return self.node("Gelu", [x], output) if function == "gelu" else self.swish(x, output, 1.702)

    @abstractmethod
    def swish(self, x: str, output: str, alpha: float) -> str:
        """x * sigmoid(alpha * x)."""

    @abstractmethod
    def rms_norm(self, x: str, norm: str, output: str, eps: float) -> str:
        """The RMS norm of x; `norm` is the parameter's name without ".weight"."""

    @abstractmethod
    def add_and_norm(self, x: str, branch: str, norm: str, output: str, eps: float) -> tuple[str, str]:
        """The residual sum, named `output`, and its RMS norm, named `output`.normed."""

    def encoder_rows(self, num_heads: int, width: int) -> Ints | None:
        """Order of the rows of the encoder's qkv matrices, -1 for zeros; None: as stored."""
        return None

    @abstractmethod
    def encoder_attention(self, qkv: str, output: str, num_heads: int, width: int) -> str:
        """Attention of all rows to all rows; `width`: of all heads together.

        qkv [images, rows, 3 * width], or wider by `encoder_rows` -> [images, rows, width].
        """

    @abstractmethod
    def cache_inputs(self, heads: HeadLayout) -> None:
        """Declare a decoder's inputs beside its rows: counters, positions, and the KV cache in and out."""

    @abstractmethod
    def cached_attention(self, heads: HeadLayout, index: int, qkv: str, name: str) -> str:
        """Causal attention of layer `index`: rotates queries and keys, writes the cache in place and reads it.

        qkv [rows, (heads + 2 kv_heads) * padded] -> [rows, heads * head_dim].
        """

    @abstractmethod
    def cached_keys_and_values(self, heads: HeadLayout, index: int, both: str, name: str) -> None:
        """Only write the cache. both [rows, 2 kv_heads * padded]: keys, then values."""

    def cache_tensors(self, cache: CacheShape, capacity: int | str, batch: int | str = 1) -> None:
        """Declare past and present of every layer's tensors, [batch, kv_heads, capacity, width] each."""
        for index in range(cache.num_layers):
            for name, (dtype, width) in cache.tensors.items():
                shape = (batch, cache.kv_heads, capacity, width)
                self.input(f"past_{name}.{index}", dtype, shape, public=False)
                self.output(f"present_{name}.{index}", dtype, shape, public=False)

    def true_heads(self, heads: HeadLayout, mixed: str, name: str) -> str:
        """Cut the padding off each head: [..., heads, padded] in any leading shape -> [rows, heads * head_dim]."""
        decoder = heads.decoder
        width = decoder.num_heads * decoder.head_dim
        if heads.is_padded:
            split = self.node("Reshape", [mixed, self.ints(-1, decoder.num_heads, heads.padded)], f"{name}.heads")
            ends = [self.ints(0), self.ints(decoder.head_dim), self.ints(2)]
            mixed = self.node("Slice", [split, *ends], f"{name}.heads.cut")
        return self.node("Reshape", [mixed, self.ints(-1, width)], f"{name}.mixed")

    def _rows_of(self, weight: str, order: Ints | None) -> Ints:
        """The order of a matrix's rows, by default as stored."""
        return np.arange(self.weights.matrix_shape(weight)[0]) if order is None else order

    def _bias(self, target: str, order: Ints) -> str:
        return self.tensor(target, np.where(order < 0, np.float32(0), self.weights.vector(target)[order]))

    def _floats(self, weight: str, order: Ints, type_name: str) -> str:
        """The matrix [out, in] stored as fp32 or fp16."""
        read = self.weights.half_rows if type_name == "fp16" else self.weights.rows
        shape = (len(order), self.weights.matrix_shape(weight)[1])
        kind = NUMPY_TYPES[type_name]
        blocks = (
            _arranged(read(weight, *span), rows, span[0], 0).astype(kind) for rows, span in self._spans(weight, order)
        )
        return self.external(weight, TYPES[type_name], shape, blocks)

    def _code_blocks(self, weight: str, order: Ints, grid: Grid) -> Iterable[Quantized]:
        """The codes of a matrix, a few of its arranged rows at a time."""
        for rows, span in self._spans(weight, order):
            stored = self.weights.quantized(weight, *span)
            middles = None if stored.zeros is None else _arranged(stored.zeros, rows, span[0], grid.zero_point)
            codes = _arranged(stored.codes, rows, span[0], grid.zero_point)
            yield Quantized(codes, _arranged(stored.scales, rows, span[0], 1), stored.grid, middles)

    def _spans(self, weight: str, order: Ints) -> Iterable[tuple[Ints, tuple[int, int]]]:
        """Blocks of output rows, each with the range of stored rows that it needs (row 0 if it needs none)."""
        size = self.weights.blocks(weight)[0][1]
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            stored = rows[rows >= 0] if (rows >= 0).any() else np.zeros(1, np.int64)
            yield rows, (int(stored.min()), int(stored.max()) + 1)

    def write(self, folder: Path) -> GraphInfo:
        """Write NAME.onnx beside the data file, checked as the runtime will; returns its files, inputs and outputs.

        Leaves out inputs that no node reads: the lengths of a decoder whose only layer stops after keys and values.
        """
        read = {name for node in self._nodes for name in node.input}
        inputs = [value for value in self._inputs if value.name in read]
        self._public_inputs = [info for info in self._public_inputs if info.name in read]
        graph = helper.make_graph(self._nodes, self.name, inputs, self._outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="vlmdeploy", functions=self.functions
        )
        path = folder / f"{self.name}.onnx"
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path))
        check_graph(path.read_bytes(), str(path), self.data.path.name, self.data.size)
        return GraphInfo(path.name, self.data.path.name, tuple(self._public_inputs), tuple(self._public_outputs))


def _arranged(stored: NDArray[Value], order: Ints, first: int, fill: int) -> NDArray[Value]:
    """Rows of `stored`, whose row 0 is row `first` of the matrix, in this order; -1 becomes a row of `fill`."""
    if len(order) == len(stored) and (order == np.arange(first, first + len(order))).all():
        return stored
    rows = np.full((len(order), *stored.shape[1:]), fill, stored.dtype)
    rows[order >= 0] = stored[order[order >= 0] - first]
    return rows
