"""The `ort` dialect: standard operators plus ONNX Runtime's own, which are faster on a CPU.

On a CPU, products with codes and attention over the KV cache are our own operators; each has a function of ONNX
Runtime's, which runs where our library is missing. Attention rotates, writes the cache in place and attends; its rotary
tables are inputs, indexed by cache slot.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from onnx import FunctionProto, TensorProto, parser

from vlmdeploy.errors import QuantizationError
from vlmdeploy.export.graphs.builder import NUMPY_TYPES, DataFile, GraphBuilder
from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.export.weight_reader import Ints, WeightReader
from vlmdeploy.kernels import cpu
from vlmdeploy.manifest import CacheShape
from vlmdeploy.overriding import override
from vlmdeploy.quant.conversions import field_bits, matmul_block_size, matmul_nbits, repeat_scales
from vlmdeploy.quant.grid import Codes, Grid
from vlmdeploy.spec.vision import ActivationName

CONTRIB = "com.microsoft"
FULL_ACCURACY, INT8_ACCURACY = 0, 4  # MatMulNBits.accuracy_level: exact float activations, or int8 ones (twice as fast)


# What our operators compute, for installations without them and for exact float activations (accuracy_level 0).
_FUNCTION = """
<domain: "vlmdeploy", opset_import: ["" : 23, "com.microsoft" : 1]>
{name} <K, N, bits, block_size, accuracy_level> (x, codes, scales, zero_points, bias) => (y)
{{
    wide_scales = Cast <to: int = 1> (scales)
    {output} = com.microsoft.MatMulNBits <
        K: int = @K, N: int = @N, bits: int = @bits, block_size: int = @block_size,
        accuracy_level: int = @accuracy_level
    > (x, codes, wide_scales, zero_points, "", bias)
    {then}
}}
"""
_THEN_GATED = """gate, up = Split <axis: int = -1, num_outputs: int = 2> (both)
    silu = com.microsoft.QuickGelu <alpha: float = 1.0> (gate)
    y = Mul (silu, up)"""

_ENCODER_ATTENTION = """
<domain: "vlmdeploy", opset_import: ["" : 23, "com.microsoft" : 1]>
EncoderAttention <num_heads> (qkv) => (y)
{
    query, key, value = Split <axis: int = 2, num_outputs: int = 3> (qkv)
    y = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads> (query, key, value)
}
"""
# Attention of rows [rows, (num_heads + 2 * kv_num_heads) * head_size] over the cache, which takes their keys, values.
_ATTENTION = """
<domain: "vlmdeploy", opset_import: ["" : 23, "com.microsoft" : 1]>
CachedAttention <num_heads, kv_num_heads, head_size, scale>
    (qkv, past_key, past_value, seqlens_k, total_sequence_length, cos, sin) => (y, present_key, present_value)
{
    first_axis = Constant <value_ints: ints = [0]> ()
    packed = Unsqueeze (qkv, first_axis)
    mixed, present_key, present_value = com.microsoft.GroupQueryAttention <
        num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, do_rotary: int = 1, rotary_interleaved: int = 0,
        scale: float = @scale
    > (packed, "", "", past_key, past_value, seqlens_k, total_sequence_length, cos, sin)
    y = Squeeze (mixed, first_axis)
}
"""
# Only the cache, with an attention that takes the keys as queries; nothing reads its output.
_WRITE = """
<domain: "vlmdeploy", opset_import: ["" : 23, "com.microsoft" : 1]>
WriteCache <kv_num_heads, head_size>
    (both, past_key, past_value, seqlens_k, total_sequence_length, cos, sin) => (present_key, present_value)
{
    first_axis = Constant <value_ints: ints = [0]> ()
    packed = Unsqueeze (both, first_axis)
    key, value = Split <axis: int = 2, num_outputs: int = 2> (packed)
    unused, present_key, present_value = com.microsoft.GroupQueryAttention <
        num_heads: int = @kv_num_heads, kv_num_heads: int = @kv_num_heads, do_rotary: int = 1,
        rotary_interleaved: int = 0
    > (key, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos, sin)
}
"""


def _functions() -> tuple[FunctionProto, ...]:
    texts = (
        _FUNCTION.format(name=cpu.LINEAR, output="y", then=""),
        _FUNCTION.format(name=cpu.GATED, output="both", then=_THEN_GATED),
        _FUNCTION.format(name=cpu.GELU, output="product", then="y = Gelu (product)"),
        _ATTENTION,
        _WRITE,
        _ENCODER_ATTENTION,
    )
    return tuple(parser.parse_function(text) for text in texts)


class OrtGraph(GraphBuilder):
    """A graph for ONNX Runtime on a CPU."""

    # 23: the first with RMSNormalization
    opsets: ClassVar = {"": 23, CONTRIB: 1, cpu.DOMAIN: 1, cpu.COMPILED_DOMAIN: 1}
    functions: ClassVar = _functions()
    largest_block: ClassVar = 128  # of MatMulNBits: larger blocks read prompts faster
    kind: ClassVar = "fp32"  # of products, scales, attention and KV cache
    rope_tables: ClassVar = ("cos", "sin")

    def __init__(self, name: str, weights: WeightReader, data: DataFile, cache: CacheShape) -> None:
        super().__init__(name, weights, data)
        self.cache = cache

    @override
    def linear(self, x: str, target: str, output: str, order: Ints | None = None, has_bias: bool = False) -> str:
        weight = f"{target}.weight"
        order = self._rows_of(weight, order)
        bias = self._bias(f"{target}.bias", order) if has_bias else ""
        if self.weights.plan[weight].grid is not None:
            return self._product(x, weight, order, output, bias)
        product = self._product(x, weight, order, f"{output}.product" if bias else output)
        return self.node("Add", [product, bias], output) if bias else product

    def _product(self, x: str, weight: str, order: Ints, output: str, bias: str = "", op: str = cpu.LINEAR) -> str:
        """x @ W.T in the type of x; a bias only with codes. op: which of our operators, if it is one."""
        precision = self.weights.plan[weight]
        if precision.grid is not None:
            codes, sizes = self._codes(weight, order, precision.grid)
            accuracy = INT8_ACCURACY if self.kind == "fp32" else FULL_ACCURACY
            if self._is_ours(weight):
                return self.node(op, [x, *codes, bias], output, cpu.DOMAIN, **sizes, accuracy_level=accuracy)
            inputs = [x, *codes, "", bias] if bias else [x, *codes]
            return self.node("MatMulNBits", inputs, output, CONTRIB, **sizes, accuracy_level=accuracy)
        matrix = self._floats(weight, order, precision.type)
        if precision.type == "fp16" and self.kind == "fp32":
            matrix = self.cast(matrix, f"{matrix}.fp32", "fp32")
        return self.node("FusedMatMul", [x, matrix], output, CONTRIB, transB=1)

    def _codes(self, weight: str, order: Ints, grid: Grid) -> tuple[list[str], dict[str, int]]:
        """Codes [out, blocks, bytes], scales [out, blocks] and zero points ("": the middle) for MatMulNBits, and its
        sizes. A 3-bit code takes a 4-bit field; our operators read fp16 scales, the type that quantization gives."""
        bits, block_size = field_bits(grid.bits), self._block_size(weight, grid)
        width = self.weights.matrix_shape(weight)[1]
        blocks = width // block_size
        scales = np.empty((len(order), blocks), NUMPY_TYPES[self.scale_type(bits, block_size)])
        zeros = np.empty((len(order), -(-blocks * bits // 8)), np.uint8)

        def packed() -> Iterator[Codes]:
            done = 0
            for block in self._code_blocks(weight, order, grid):
                part = matmul_nbits(repeat_scales(block, block_size))
                stop = done + len(part.codes)
                scales[done:stop] = part.scales
                if part.zero_points is not None:
                    zeros[done:stop] = part.zero_points
                done = stop
                yield part.codes

        codes = self.external(weight, TensorProto.UINT8, (len(order), blocks, block_size * bits // 8), packed())
        names = [codes, self.tensor(f"{weight}.scales", scales)]
        names.append("" if grid.symmetric else self.tensor(f"{weight}.zero_points", zeros))
        return names, {"K": width, "N": len(order), "bits": bits, "block_size": block_size}

    def _block_size(self, weight: str, grid: Grid) -> int:
        """Weights of a row that share a scale in the graph."""
        return min(matmul_block(weight, self.weights.in_fp32(weight), grid), self.largest_block)

    def _is_ours(self, weight: str) -> bool:
        grid = self.weights.plan[weight].grid
        return grid is not None and self.has_operator(field_bits(grid.bits), self._block_size(weight, grid))

    @classmethod
    def has_operator(cls, bits: int, block_size: int) -> bool:
        """Whether our operators multiply with codes in fields of `bits`, scales for blocks of `block_size`."""
        return cls.kind == "fp32" and bits in cpu.BITS and block_size in cpu.GROUPS

    @classmethod
    def scale_type(cls, bits: int, block_size: int) -> str:
        """Type of the stored scales. MatMulNBits wants that of its activations."""
        return "fp16" if cls.has_operator(bits, block_size) else cls.kind

    @override
    def gated(self, x: str, name: str, axis: int) -> str:
        weight = f"{name}.gate_up.weight"
        if not self._is_ours(weight):
            return super().gated(x, name, axis)
        return self._product(x, weight, self._rows_of(weight, None), f"{name}.product", op=cpu.GATED)

    @override
    def activated(self, x: str, target: str, function: ActivationName, output: str) -> str:
        weight = f"{target}.weight"
        if function != "gelu" or not self._is_ours(weight):
            return super().activated(x, target, function, output)
        order = self._rows_of(weight, None)
        return self._product(x, weight, order, output, self._bias(f"{target}.bias", order), cpu.GELU)

    @override
    def swish(self, x: str, output: str, alpha: float) -> str:
        return self.node("QuickGelu", [x], output, CONTRIB, alpha=alpha)

    @override
    def rms_norm(self, x: str, norm: str, output: str, eps: float) -> str:
        return self.node("RMSNormalization", [x, self.parameter(f"{norm}.weight")], output, axis=-1, epsilon=eps)

    @override
    def add_and_norm(self, x: str, branch: str, norm: str, output: str, eps: float) -> tuple[str, str]:
        inputs, outputs = [x, branch, self.parameter(f"{norm}.weight")], [f"{output}.normed", "", "", output]
        self.nodes("SkipSimplifiedLayerNormalization", inputs, outputs, CONTRIB, epsilon=eps)
        return output, outputs[0]

    @override
    def encoder_attention(self, qkv: str, output: str, num_heads: int, width: int) -> str:
        if self.kind == "fp32" and width // num_heads % cpu.HEAD_MULTIPLE == 0:
            return self.node(cpu.ENCODER_ATTENTION, [qkv], output, cpu.DOMAIN, num_heads=num_heads)
        parts = self.nodes("Split", [qkv], [f"{output}.{part}" for part in "qkv"], axis=2, num_outputs=3)
        return self.node("MultiHeadAttention", parts, output, CONTRIB, num_heads=num_heads)

    @override
    def cache_inputs(self, heads: HeadLayout) -> None:
        self.input("seqlens_k", "int32", (1,))
        self.input("total_sequence_length", "int32", ())
        for table in ("cos", "sin"):
            self.input(table, "fp32", ("capacity", heads.padded // 2))
        self.cache_tensors(self.cache, "capacity")

    @override
    def cached_attention(self, heads: HeadLayout, index: int, qkv: str, name: str) -> str:
        decoder, outputs = heads.decoder, [f"layer.{index}.attention", *self._cache(index, "present")]
        self._attention(
            cpu.ATTENTION, index, qkv, outputs, num_heads=decoder.num_heads, kv_num_heads=decoder.num_kv_heads,
            head_size=heads.padded, scale=decoder.head_dim**-0.5,
        )  # fmt: skip
        return self.true_heads(heads, outputs[0], name) if heads.is_padded else outputs[0]

    @override
    def cached_keys_and_values(self, heads: HeadLayout, index: int, both: str, name: str) -> None:
        kv_heads, outputs = heads.decoder.num_kv_heads, self._cache(index, "present")
        self._attention(cpu.WRITE_CACHE, index, both, outputs, kv_num_heads=kv_heads, head_size=heads.padded)

    def _attention(self, op: str, index: int, rows: str, outputs: list[str], **attributes: int | float) -> None:
        """One of our operators, for the type of the cache."""
        suffix, (keys, values, *scales) = cpu.SUFFIXES[self.cache.dtype], self._cache(index, "past")
        domain = cpu.COMPILED_DOMAIN if suffix else cpu.DOMAIN
        self.nodes(f"{op}{suffix}", [rows, keys, values, *self._counters, *scales], outputs, domain, **attributes)

    @property
    def _counters(self) -> list[str]:
        """How much of the cache is filled, and the rotary tables."""
        return ["seqlens_k", "total_sequence_length", *self.rope_tables]

    def _cache(self, index: int, when: str) -> list[str]:
        return [f"{when}_{name}.{index}" for name in self.cache.tensors]


class OrtCudaGraph(OrtGraph):
    """A graph for ONNX Runtime on CUDA: products and attention in fp16, everything between them float32.

    Its fast kernels take blocks of 32; larger groups are split, each block with the scale of its group.
    """

    opsets: ClassVar = {"": 23, CONTRIB: 1}
    functions: ClassVar = ()
    largest_block: ClassVar = 32
    kind: ClassVar = "fp16"
    rope_tables: ClassVar = ("cos.fp16", "sin.fp16")

    @override
    def linear(self, x: str, target: str, output: str, order: Ints | None = None, has_bias: bool = False) -> str:
        weight = f"{target}.weight"
        if self.weights.plan[weight].type == "fp32":
            return super().linear(x, target, output, order, has_bias)
        order = self._rows_of(weight, order)
        half = self._product(self.cast(x, f"{output}.in", "fp16"), weight, order, f"{output}.fp16")
        product = self.cast(half, f"{output}.product" if has_bias else output, "fp32")
        return self.node("Add", [product, self._bias(f"{target}.bias", order)], output) if has_bias else product

    @override
    def cached_attention(self, heads: HeadLayout, index: int, qkv: str, name: str) -> str:
        mixed = self._grouped(heads, index, [self._packed(qkv, name), "", ""], heads.decoder.num_heads)
        return self.true_heads(heads, self.cast(mixed, f"{mixed}.fp32", "fp32"), name)

    @override
    def cached_keys_and_values(self, heads: HeadLayout, index: int, both: str, name: str) -> None:
        """Writes the cache with an attention that takes the keys as queries; nothing reads its output."""
        packed = self._packed(both, name)
        key, value = self.nodes("Split", [packed], [f"{name}.key", f"{name}.value"], axis=2, num_outputs=2)
        self._grouped(heads, index, [key, key, value], heads.decoder.num_kv_heads)

    def _packed(self, qkv: str, name: str) -> str:
        """Rows [rows, width] -> [1, rows, width], in the type of the attention."""
        qkv = self.cast(qkv, f"{name}.qkv.half", "fp16")
        return self.node("Unsqueeze", [qkv, self.ints(0)], f"{name}.qkv.batch")

    def _grouped(self, heads: HeadLayout, index: int, qkv: list[str], num_heads: int) -> str:
        outputs = [f"layer.{index}.attention", *self._cache(index, "present")]
        decoder = heads.decoder
        self.nodes(
            "GroupQueryAttention", [*qkv, *self._cache(index, "past"), *self._counters], outputs, CONTRIB,
            num_heads=num_heads, kv_num_heads=decoder.num_kv_heads, do_rotary=1, rotary_interleaved=0,
            scale=decoder.head_dim**-0.5,
        )  # fmt: skip
        return outputs[0]

    @override
    def encoder_attention(self, qkv: str, output: str, num_heads: int, width: int) -> str:
        narrow = self.cast(qkv, f"{output}.qkv", "fp16")
        return self.cast(super().encoder_attention(narrow, f"{output}.fp16", num_heads, width), output, "fp32")

    @override
    def cache_inputs(self, heads: HeadLayout) -> None:
        super().cache_inputs(heads)
        for table in ("cos", "sin"):
            self.cast(table, f"{table}.fp16", "fp16")


def matmul_block(weight: str, way_out: str, grid: Grid) -> int:
    """MatMulNBits's block size for a grid. Raises QuantizationError, naming the weight, if there is none."""
    try:
        return matmul_block_size(grid.group_size)
    except QuantizationError as error:
        raise QuantizationError(f'"{weight}": {error}: {way_out}') from error
