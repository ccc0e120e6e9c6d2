"""The routed decoder in the `trt` dialect: one graph that sends each row through its expert's weights, for batches of
prompts with and without pictures.

Every linear of a layer is one RoutedLinear over the packed codes of both experts: a plugin in TensorRT, a function of
the model elsewhere. Between the linears the graph is as in `trt_dialect`, with a batch axis in the cache.
"""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from vlmdeploy.errors import ExportError, QuantizationError
from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.export.graphs.routed_functions import (
    LINEAR,
    PARTITION,
    PLUGIN_ATTRIBUTES,
    ROUTED_DOMAIN,
    routed_functions,
)
from vlmdeploy.export.graphs.trt_dialect import OPSET, TRT_DOMAIN, TrtGraph, attention_function
from vlmdeploy.export.weight_reader import Ints
from vlmdeploy.kernels.packing import BITS, EXPERTS, check_layout, pack_codes, pack_scales
from vlmdeploy.overriding import override
from vlmdeploy.quant.conversions import widen
from vlmdeploy.quant.grid import Codes, Grid
from vlmdeploy.quant.precision import Precision, PrecisionPlan
from vlmdeploy.spec.matrices import Matrix, matrices
from vlmdeploy.spec.model import ModelSpec

ROUTED = ".routed."


class RoutedTrtGraph(TrtGraph):
    """A decoder graph for TensorRT with the routed plugin."""

    opsets: ClassVar = {"": OPSET, TRT_DOMAIN: 1, ROUTED_DOMAIN: 1}
    functions: ClassVar[tuple[onnx.FunctionProto, ...]] = (attention_function(), *routed_functions())
    batch: ClassVar[int | str] = "batch"
    row_axis: ClassVar = "tokens"

    @override
    def cache_inputs(self, heads: HeadLayout) -> None:
        """Rows of all prompts, prompt after prompt: tokens = batch * rows. Sorts them by expert once, for all layers.

        experts int32 [tokens]: 0 language, 1 vision. Other inputs as in TrtGraph.
        """
        self.input("experts", "int32", ("tokens",))
        super().cache_inputs(heads)
        self.nodes(PARTITION, ["experts"], ["order", "language_count"], ROUTED_DOMAIN, **PLUGIN_ATTRIBUTES)
        self.node("Shape", ["position_ids"], "batch_and_rows")

    @override
    def _cache_heads(self, num_heads: int, width: int) -> str:
        name = f"batch_and_rows.{num_heads}x{width}"
        if name not in self._made:
            self.node("Concat", ["batch_and_rows", self.ints(num_heads, width)], name, axis=0)
        return name

    @override
    def linear(self, x: str, target: str, output: str, order: Ints | None = None, has_bias: bool = False) -> str:
        """A target "….routed.…" stands for this linear of both experts."""
        if ROUTED not in target:
            return super().linear(x, target, output, order, has_bias)
        targets = [target.replace(ROUTED, f".{expert}.") for expert in EXPERTS]
        in_width = self.weights.matrix_shape(f"{targets[0]}.weight")[1]
        order = self._rows_of(f"{targets[0]}.weight", order)
        grid = self._grid_of(targets[0])  # the other expert's groups have the same size
        scales = np.empty((len(targets), in_width // grid.group_size, len(order)), np.float16)
        shape = (len(targets), len(order), in_width // 2)
        codes = self.external(f"{target}.weight", TensorProto.INT8, shape, self._packed(targets, order, scales))
        inputs = [self.cast(x, f"{output}.in", "fp16"), "experts", "order", "language_count", codes]
        inputs.append(self.tensor(f"{target}.weight.scales", scales))
        inputs.append(self.tensor(f"{target}.bias", self._biases(targets, order, has_bias)))
        half = self.node(
            LINEAR, inputs, f"{output}.fp16", ROUTED_DOMAIN, group_size=grid.group_size, **PLUGIN_ATTRIBUTES
        )
        return self.cast(half, output, "fp32")

    def _grid_of(self, target: str) -> Grid:
        grid = self.weights.plan[f"{target}.weight"].grid
        assert grid is not None, "checked before the graphs are written"
        return grid

    def _packed(self, targets: list[str], order: Ints, scales: NDArray[np.float16]) -> Iterator[Codes]:
        """Packed codes of one expert after the other, a few rows at a time; fills in the scales."""
        for expert, target in enumerate(targets):
            done, grid = 0, self._grid_of(target)
            for block in self._code_blocks(f"{target}.weight", order, grid):
                held = widen(block, BITS)
                stop = done + len(held.codes)
                scales[expert, :, done:stop] = pack_scales(held.scales)
                done = stop
                yield pack_codes(held.codes, grid.group_size)

    def _biases(self, targets: list[str], order: Ints, has_bias: bool) -> NDArray[np.float32]:
        """Biases of both experts, float32 [experts, out]; zeros for an expert without."""
        biases = np.zeros((len(targets), len(order)), np.float32)
        for expert, target in enumerate(targets):
            if has_bias and f"{target}.bias" in self.weights.checkpoint.rules:
                stored = self.weights.vector(f"{target}.bias")
                biases[expert] = np.where(order < 0, np.float32(0), stored[order])
        return biases


def check_routed(spec: ModelSpec, plan: PrecisionPlan) -> None:
    """Raise ExportError, naming the linear, if the routed kernel cannot take a model's decoder."""
    if [expert.name for expert in spec.decoder.experts] != list(EXPERTS):
        raise ExportError(
            f"--routed-plugin on: {spec.family} has {len(spec.decoder.experts)} expert, expected language and vision "
            "experts: leave the option out"
        )
    for linear in matrices(spec):
        if linear.part == "decoder":
            _check_linear(linear, plan[linear.target])
    _check_equal_groups(spec, plan)


def _check_linear(linear: Matrix, precision: Precision) -> None:
    name = f'--routed-plugin on: "{linear.target}"'
    if precision.grid is None:
        advice = "export with --target trt-int4" if precision.type == "fp16" else "no group fits its width, see --group"
        raise ExportError(f"{name} is kept in {precision.type}; the routed kernels take int4 codes: {advice}")
    bits = max(precision.bits, BITS)  # narrower codes are widened, which changes no value
    try:
        check_layout(name, linear.in_width, precision.group_size, bits, precision.symmetric)
    except QuantizationError as error:
        raise ExportError(str(error)) from error


def _check_equal_groups(spec: ModelSpec, plan: PrecisionPlan) -> None:
    """Require groups of one size for both experts of a linear."""
    language = {(item.layer, item.name): item for item in matrices(spec) if item.expert == "language"}
    for linear in matrices(spec):
        if linear.expert == "vision":
            other = language[linear.layer, linear.name].target
            found, expected = plan[linear.target].group_size, plan[other].group_size
            if found != expected:
                raise ExportError(
                    f'--routed-plugin on: "{linear.target}" has groups of {found}, "{other}" of {expected}: expected '
                    "one size for both"
                )
