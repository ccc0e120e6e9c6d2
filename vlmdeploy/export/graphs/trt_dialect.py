"""The `trt` dialect: operators that TensorRT imports as its own layers, and that ONNX Runtime runs from the same file.

Matrices are INT4 or INT8 codes behind a DequantizeLinear, or fp16; products are fp16, everything between them float32:
residual streams of models trained in bf16 do not fit fp16. The KV cache is fp16, of a fixed length, written in place by
TensorScatter. Why, and what TensorRT misreads: docs/design/0007-tensorrt.md.
"""

from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper

from vlmdeploy.errors import ExportError
from vlmdeploy.export.graphs.builder import DataFile, GraphBuilder
from vlmdeploy.export.graphs.head_layout import HEAD_MULTIPLE, HeadLayout, head_rows, tail_slots
from vlmdeploy.export.weight_reader import Ints, WeightReader
from vlmdeploy.manifest import CacheShape
from vlmdeploy.overriding import override
from vlmdeploy.quant.conversions import dequantize_linear
from vlmdeploy.quant.grid import Grid, Quantized
from vlmdeploy.runtime.backends.lanes import rope_table

CODE_TYPES = {"INT4": TensorProto.INT4, "INT8": TensorProto.INT8}  # 3-bit codes fit INT4
OPSET = 24  # the first with TensorScatter
TRT_DOMAIN = "trt"  # TensorRT's parser knows TRT_Attention natively; others read the function's body


def kernel_width(head_dim: int) -> int:
    """The smallest width, at least `head_dim`, of an encoder head that TensorRT has a fused kernel for."""
    if head_dim >= HEAD_MULTIPLE and head_dim % (HEAD_MULTIPLE // 2) == 0:
        return head_dim
    return -(-head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE


def check_grid(weight: str, width: int, grid: Grid) -> None:
    """Raise ExportError if TensorRT has no matrix product for codes of this grid; `width`: inputs of a row."""
    if not grid.symmetric:
        raise ExportError(
            f'"{weight}" has asymmetric codes and TensorRT takes symmetric ones only: quantize without --asymmetric'
        )
    if grid.bits < 8 and grid.group_size >= width:
        raise ExportError(
            f'"{weight}" has one scale for all {width} inputs, which TensorRT does not fuse into its product: '
            "quantize with a smaller --group"
        )


def attention_function() -> onnx.FunctionProto:
    """TRT_Attention as a function of standard operators: softmax(q k^T) v, causal from the last valid key backwards.

    Like TensorRT's layer it does not scale. A standard Attention would be misread: TensorRT aligns its is_causal with
    the first key and silently drops its lengths.
    """
    inputs = ["query", "key", "value", "mask", "query_lengths", "lengths"]
    node = helper.make_node(
        "Attention", ["query", "key", "value", "", "", "", "lengths"], ["output"], is_causal=1, scale=1.0
    )
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        TRT_DOMAIN, "TRT_Attention", inputs, ["output"], [node], opset, attributes=["causal_kind"]
    )


class TrtGraph(GraphBuilder):
    """A graph for TensorRT and TensorRT-RTX."""

    opsets: ClassVar = {"": OPSET, TRT_DOMAIN: 1}
    functions: ClassVar[tuple[onnx.FunctionProto, ...]] = (attention_function(),)
    batch: ClassVar[int | str] = 1  # prompts of one call

    def __init__(
        self, name: str, weights: WeightReader, data: DataFile, cache: CacheShape, context_tokens: int
    ) -> None:
        super().__init__(name, weights, data)
        self.cache = cache
        self.context_tokens = context_tokens

    @override
    def linear(self, x: str, target: str, output: str, order: Ints | None = None, has_bias: bool = False) -> str:
        weight = f"{target}.weight"
        order = self._rows_of(weight, order)
        precision = self.weights.plan[weight]
        kind = "fp32" if precision.type == "fp32" else "fp16"
        if precision.grid is not None:
            columns = self._codes(weight, order, precision.grid)
        else:
            columns = self.node("Transpose", [self._floats(weight, order, kind)], f"{weight}.columns", perm=[1, 0])
        product = f"{output}.product" if has_bias else output
        self._product(x, columns, kind, product)
        return self.node("Add", [product, self._bias(f"{target}.bias", order)], output) if has_bias else product

    def _product(self, x: str, columns: str, kind: str, output: str) -> None:
        """x @ columns in fp16 with float32 on both sides, or in fp32 throughout."""
        if kind == "fp32":
            self.node("MatMul", [x, columns], output)
        else:
            narrow = self.cast(x, f"{output}.in", "fp16")
            self.cast(self.node("MatMul", [narrow, columns], f"{output}.fp16"), output, "fp32")

    def _codes(self, weight: str, order: Ints, grid: Grid) -> str:
        """The matrix [in, out] in fp16, from codes [in, out] and fp16 scales [in / group, out].

        In this layout ONNX Runtime multiplies with the codes; transposed, it would widen them on every call.
        """
        width = self.weights.matrix_shape(weight)[1]
        check_grid(weight, width, grid)
        codes = np.empty((len(order), width), np.uint8)
        scales = np.empty((len(order), width // grid.group_size), np.float32)
        done = 0
        for block in self._code_blocks(weight, order, grid):
            stop = done + len(block.codes)
            codes[done:stop], scales[done:stop] = block.codes, block.scales
            done = stop
        if (scales < 0).any():
            raise ExportError(
                f"{weight}: has negative scales, which TensorRT's documentation does not allow: quantize with "
                "--positive-scales, or export the float checkpoint with --calib"
            )
        stored = dequantize_linear(Quantized(codes, scales, grid))
        name = self.external(weight, CODE_TYPES[stored.data_type], stored.shape, [stored.codes])
        inputs = [name, self.tensor(f"{weight}.scales", stored.scales.astype(np.float16))]
        return self.node("DequantizeLinear", inputs, f"{weight}.fp16", axis=0, block_size=grid.group_size)

    @override
    def swish(self, x: str, output: str, alpha: float) -> str:
        return self.node("Swish", [x], output, alpha=alpha)

    @override
    def rms_norm(self, x: str, norm: str, output: str, eps: float) -> str:
        return self.node("RMSNormalization", [x, self.parameter(f"{norm}.weight")], output, axis=-1, epsilon=eps)

    @override
    def add_and_norm(self, x: str, branch: str, norm: str, output: str, eps: float) -> tuple[str, str]:
        total = self.node("Add", [x, branch], output)
        return total, self.rms_norm(total, norm, f"{output}.normed", eps)

    @override
    def encoder_rows(self, num_heads: int, width: int) -> Ints | None:
        """Pads the tails of heads that TensorRT has no kernel for."""
        true, padded = width // num_heads, kernel_width(width // num_heads)
        if true == padded:
            return None
        return head_rows(0, 3 * num_heads, true, tail_slots(true, padded))

    @override
    def encoder_attention(self, qkv: str, output: str, num_heads: int, width: int) -> str:
        """Both readers agree on a standard Attention that is not causal, including its scale."""
        true, padded = width // num_heads, kernel_width(width // num_heads)
        parts = self.nodes("Split", [qkv], [f"{output}.{part}" for part in "qkv"], axis=2, num_outputs=3)
        shape = self.ints(0, -1, num_heads, padded)
        heads = [self.cast(self._heads_first(part, shape), f"{part}.fp16", "fp16") for part in parts]
        mixed = self.node("Attention", heads, f"{output}.heads", scale=true**-0.5)
        rows = self.node("Transpose", [mixed], f"{output}.rows", perm=[0, 2, 1, 3])
        if true != padded:
            ends = [self.ints(0), self.ints(true), self.ints(3)]
            rows = self.node("Slice", [rows, *ends], f"{output}.rows.cut")
        joined = self.node("Reshape", [rows, self.ints(0, -1, width)], f"{output}.joined")
        return self.cast(joined, output, "fp32")

    def _cache_heads(self, num_heads: int, width: int) -> str:
        """The shape [batch, rows, heads, width] into which decoder rows are split."""
        return self.ints(1, -1, num_heads, width)

    def _heads_first(self, x: str, shape: str) -> str:
        """[..., heads * width] -> [batch, heads, rows, width]; shape: [batch, rows, heads, width]."""
        split = self.node("Reshape", [x, shape], f"{x}.split")
        return self.node("Transpose", [split], f"{x}.heads", perm=[0, 2, 1, 3])

    @override
    def cache_inputs(self, heads: HeadLayout) -> None:
        """position_ids int64 [batch, rows]; write_index int64 [batch], the slot of the first row; lengths int64
        [batch], the slots filled after this call. TensorRT requires a cache of fixed length."""
        self.input("position_ids", "int64", (self.batch, "rows"))
        self.input("write_index", "int64", (self.batch,))
        self.input("lengths", "int64", (self.batch,))
        self.cache_tensors(self.cache, self.context_tokens, self.batch)
        table = rope_table(self.cache, np.arange(self.context_tokens))
        self.tensor("rope.cos", table.cos)
        self.tensor("rope.sin", table.sin)

    @override
    def cached_attention(self, heads: HeadLayout, index: int, qkv: str, name: str) -> str:
        decoder = heads.decoder
        counts = (decoder.num_heads, decoder.num_kv_heads, decoder.num_kv_heads)
        sizes = self.ints(*(count * heads.padded for count in counts))
        query, key, value = self.nodes("Split", [qkv, sizes], [f"{name}.{part}" for part in "qkv"], axis=1)
        scale = self.constant("attention.scale", np.array(decoder.head_dim**-0.5, np.float32))
        scaled = self.node("Mul", [query, scale], f"{query}.scaled")
        narrow = self.cast(self._rotated(heads, scaled, decoder.num_heads), f"{query}.fp16", "fp16")
        keys, values = self._write_cache(heads, index, key, value)
        mixed = self.node(
            "TRT_Attention", [narrow, keys, values, "", "", "lengths"], f"layer.{index}.attention", TRT_DOMAIN,
            causal_kind="lower_right",
        )  # fmt: skip
        rows = self.node("Transpose", [mixed], f"{name}.attention.rows", perm=[0, 2, 1, 3])
        return self.true_heads(heads, self.cast(rows, f"{name}.attention.fp32", "fp32"), name)

    @override
    def cached_keys_and_values(self, heads: HeadLayout, index: int, both: str, name: str) -> None:
        key, value = self.nodes("Split", [both], [f"{name}.k", f"{name}.v"], axis=1, num_outputs=2)
        self._write_cache(heads, index, key, value)

    def _write_cache(self, heads: HeadLayout, index: int, key: str, value: str) -> tuple[str, str]:
        """Rotate the keys and append both to the cache; returns the whole cache, keys and values."""
        num_heads = heads.decoder.num_kv_heads
        rotated = self._rotated(heads, key, num_heads)
        plain = self._heads_first(value, self._cache_heads(num_heads, heads.padded))
        written = []
        for kind, rows in (("key", rotated), ("value", plain)):
            update = self.cast(rows, f"{rows}.fp16", "fp16")
            inputs = [f"past_{kind}.{index}", update, "write_index"]
            written.append(self.node("TensorScatter", inputs, f"present_{kind}.{index}", axis=-2, mode="linear"))
        return written[0], written[1]

    def _rotated(self, heads: HeadLayout, x: str, num_heads: int) -> str:
        """Rows [rows, heads * padded] rotated by their positions: [batch, heads, rows, padded], float32."""
        first = self._heads_first(x, self._cache_heads(num_heads, heads.padded))
        return self.node("RotaryEmbedding", [first, "rope.cos", "rope.sin", "position_ids"], f"{x}.rotated")
