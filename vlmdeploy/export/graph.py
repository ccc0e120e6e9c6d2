"""A small builder of ONNX graphs whose large weights go straight into an external data file, block by block.

The `ort` dialect: standard operators plus ONNX Runtime's MatMulNBits, GroupQueryAttention and friends.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vlmdeploy.bundle import FileEntry, GraphInfo, TensorInfo
from vlmdeploy.errors import QuantizationError
from vlmdeploy.export.weights import Ints, WeightReader, in_fp32
from vlmdeploy.quant.conversions import field_bits, matmul_block_size, matmul_nbits
from vlmdeploy.quant.grid import Floats, Grid, Quantized

OPSET = 23  # the first with RMSNormalization
IR_VERSION = 11
CONTRIB = "com.microsoft"
ALIGNMENT = 64 << 10  # external offsets are multiples of this, so that each tensor can be memory-mapped alone
INLINE_BYTES = ALIGNMENT  # smaller tensors stay in the .onnx file: padding would cost more than they do
FULL_ACCURACY, INT8_ACCURACY = 0, 4  # MatMulNBits.accuracy_level: exact float activations, or int8 ones (twice as fast)
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int64": TensorProto.INT64, "int32": TensorProto.INT32}
NUMPY_TYPES = {"fp32": np.float32, "fp16": np.float16, "uint8": np.uint8}
ONNX_OF_NUMPY = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
ONNX_OF_NUMPY[np.dtype(np.uint8)] = TensorProto.UINT8


Value = TypeVar("Value", bound=np.generic)


class DataFile:
    """The external data of one graph: appended once, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._stream = path.open("wb")

    def append(self, blocks: Iterable[NDArray[np.generic]]) -> tuple[int, int]:
        """Write blocks one after the other at the next aligned offset; returns offset and length in bytes."""
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
        """Size and hash of what was written so far."""
        return FileEntry(self.size, self._digest.hexdigest())

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


class GraphBuilder:
    """Collects the nodes of one graph; values are referred to by name."""

    def __init__(self, name: str, weights: WeightReader, data: DataFile) -> None:
        self.name = name
        self.weights = weights
        self.data = data
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._public_inputs: list[TensorInfo] = []
        self._public_outputs: list[TensorInfo] = []

    def input(self, name: str, dtype: str, shape: tuple[int | str, ...], public: bool = True) -> str:
        """Declare an input; public ones are listed in the manifest."""
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

    def node(
        self, op: str, inputs: list[str], output: str, domain: str = "", **attributes: int | float | list[int]
    ) -> str:
        """Add a node with one output and return the output's name."""
        return self.nodes(op, inputs, [output], domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: int | float | list[int]
    ) -> list[str]:
        """Add a node with several outputs; "" leaves one out."""
        node = helper.make_node(op, inputs, outputs, name=outputs[-1], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self._nodes.append(node)
        return outputs

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """A small tensor kept inside the .onnx file; the same name twice is the same tensor."""
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
        return self.external(name, ONNX_OF_NUMPY[value.dtype], value.shape, [value])

    def external(self, name: str, dtype: int, shape: tuple[int, ...], blocks: Iterable[NDArray[np.generic]]) -> str:
        """A tensor in the data file, written block by block along its first axis."""
        assert name not in self._initializers, f"{name} would be stored twice"
        offset, length = self.data.append(blocks)
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.data.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def linear(self, x: str, target: str, output: str, order: Ints | None = None, has_bias: bool = False) -> str:
        """x @ W.T (+ bias) in the planned precision. x [..., in] -> [..., out].

        `target` is the name without ".weight". `order` picks and arranges output rows, -1 being a row of zeros.
        """
        weight = f"{target}.weight"
        rows, width = self.weights.matrix_shape(weight)
        order = np.arange(rows) if order is None else order
        bias = self._bias(f"{target}.bias", order) if has_bias else ""
        precision = self.weights.plan[weight]
        if precision.grid is not None:
            codes, bits, block_size = self._codes(weight, order, precision.grid)
            inputs = [x, *codes, "", bias] if bias else [x, *codes]
            return self.node(
                "MatMulNBits", inputs, output, CONTRIB, K=width, N=len(order), bits=bits, block_size=block_size,
                accuracy_level=INT8_ACCURACY,
            )  # fmt: skip
        product = output if not bias else f"{output}.product"
        self.node("FusedMatMul", [x, self._floats(weight, order, precision.type)], product, CONTRIB, transB=1)
        return self.node("Add", [product, bias], output) if bias else product

    def _bias(self, target: str, order: Ints) -> str:
        return self.tensor(target, np.where(order < 0, np.float32(0), self.weights.vector(target)[order]))

    def _floats(self, weight: str, order: Ints, type_name: str) -> str:
        """The matrix [out, in]; fp16 ones are widened in the graph, the arithmetic stays float32."""
        read = self.weights.half_rows if type_name == "fp16" else self.weights.rows
        shape = (len(order), self.weights.matrix_shape(weight)[1])
        kind = NUMPY_TYPES[type_name]
        blocks = (
            _arranged(read(weight, *span), rows, span[0], 0).astype(kind) for rows, span in self._spans(weight, order)
        )
        name = self.external(weight, ONNX_OF_NUMPY[np.dtype(kind)], shape, blocks)
        return self.node("Cast", [name], f"{name}.fp32", to=TensorProto.FLOAT) if type_name == "fp16" else name

    def _codes(self, weight: str, order: Ints, grid: Grid) -> tuple[list[str], int, int]:
        """Codes [out, blocks, bytes], float32 scales [out, blocks] and zero points ("": the middle) as MatMulNBits
        wants them, the width of its fields and its block size. A 3-bit code takes a 4-bit field."""
        bits, block_size = field_bits(grid.bits), _block_size(weight, grid)
        blocks = self.weights.matrix_shape(weight)[1] // block_size
        scales = np.empty((len(order), blocks), np.float32)
        zeros = np.empty((len(order), -(-blocks * bits // 8)), np.uint8)
        shape = (len(order), blocks, block_size * bits // 8)
        written = self._code_blocks(weight, order, grid, scales, zeros)
        codes = self.external(weight, TensorProto.UINT8, shape, written)
        names = [codes, self.tensor(f"{weight}.scales", scales)]
        names.append("" if grid.symmetric else self.tensor(f"{weight}.zero_points", zeros))
        return names, bits, block_size

    def _code_blocks(
        self, weight: str, order: Ints, grid: Grid, scales: Floats, zeros: NDArray[np.uint8]
    ) -> Iterable[NDArray[np.uint8]]:
        """Codes of a few rows at a time; scales and zero points are filled in on the way."""
        done = 0
        for rows, span in self._spans(weight, order):
            stored = self.weights.quantized(weight, *span)
            middles = None if stored.zeros is None else _arranged(stored.zeros, rows, span[0], grid.zero_point)
            codes = _arranged(stored.codes, rows, span[0], grid.zero_point)
            part = matmul_nbits(Quantized(codes, _arranged(stored.scales, rows, span[0], 1), stored.grid, middles))
            scales[done : done + len(rows)] = part.scales
            if part.zero_points is not None:
                zeros[done : done + len(rows)] = part.zero_points
            done += len(rows)
            yield part.codes

    def _spans(self, weight: str, order: Ints) -> Iterable[tuple[Ints, tuple[int, int]]]:
        """Blocks of output rows, each with the range of stored rows that it needs (row 0 where it needs none)."""
        size = self.weights.blocks(weight)[0][1]
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            stored = rows[rows >= 0] if (rows >= 0).any() else np.zeros(1, np.int64)
            yield rows, (int(stored.min()), int(stored.max()) + 1)

    def write(self, folder: Path) -> GraphInfo:
        """Write NAME.onnx beside the data file, check it, and say what goes in and out."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="vlmdeploy")
        path = folder / f"{self.name}.onnx"
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path))
        return GraphInfo(path.name, self.data.path.name, tuple(self._public_inputs), tuple(self._public_outputs))


def _block_size(weight: str, grid: Grid) -> int:
    try:
        return matmul_block_size(grid.group_size)
    except QuantizationError as error:
        raise QuantizationError(f'"{weight}": {error}: {in_fp32(weight)}') from error


def _arranged(stored: NDArray[Value], order: Ints, first: int, fill: int) -> NDArray[Value]:
    """Rows of `stored` (whose row 0 is number `first`) in the given order; -1 becomes a row of `fill`."""
    if len(order) == len(stored) and (order == np.arange(first, first + len(order))).all():
        return stored
    rows = np.full((len(order), *stored.shape[1:]), fill, stored.dtype)
    rows[order >= 0] = stored[order[order >= 0] - first]
    return rows
