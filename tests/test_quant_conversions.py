"""Agreement tests: each layout, read by the engine or library it is for, gives the values that `dequantize` gives.

ONNX Runtime runs MatMulNBits and DequantizeLinear.
"""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tests import gptq_checkpoint
from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.conversions import (
    DequantizeLinear,
    MatMulNBits,
    dequantize_linear,
    matmul_nbits,
    repeat_scales,
    widen,
)
from vlmdeploy.quant.grid import Floats, Grid, Quantized, dequantize
from vlmdeploy.runtime.backends.ort import import_onnxruntime

MATMUL_RELATIVE = 2e-6  # float32 sums of 384 products in another order, relative to the largest result
OUT, IN = 24, 384

both_symmetries = pytest.mark.parametrize("symmetric", [True, False])


def quantized_matrix(grid: Grid, num_in: int = IN) -> Quantized:
    return gptq_checkpoint.quantized_matrix(grid, OUT, num_in)


def run_node(node: onnx.NodeProto, tensors: list[onnx.TensorProto], inputs: dict[str, Floats]) -> NDArray[Any]:
    """The only output "y" of a model with one node."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one node", infos, [result], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], inputs)[0])


def run_matmul(layout: MatMulNBits, x: Floats) -> NDArray[Any]:
    tensors: dict[str, NDArray[Any]] = {"B": layout.codes, "scales": layout.scales}
    if layout.zero_points is not None:
        tensors["zero_points"] = layout.zero_points
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=x.shape[1], N=len(layout.codes),
        bits=layout.bits, block_size=layout.block_size, accuracy_level=0,
    )  # fmt: skip
    return run_node(node, [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()], {"x": x})


def run_dequantize(layout: DequantizeLinear, block_size: int) -> NDArray[Any]:
    data_type = TensorProto.DataType.Value(layout.data_type)
    tensors = [
        helper.make_tensor("codes", data_type, layout.shape, layout.codes.tobytes(), raw=True),
        onnx.numpy_helper.from_array(layout.scales, "scales"),
    ]
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["y"], axis=0, block_size=block_size)
    return run_node(node, tensors, {})


def assert_matmul_agrees(quantized: Quantized, layout: MatMulNBits) -> None:
    x = np.random.default_rng(1).standard_normal((3, quantized.codes.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ dequantize(quantized).T.astype(np.float64)
    error = np.abs(run_matmul(layout, x) - expected).max() / np.abs(expected).max()
    assert error <= MATMUL_RELATIVE


@both_symmetries
@pytest.mark.parametrize("group_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmulnbits_multiplies_by_the_dequantized_weights(bits: int, group_size: int, symmetric: bool) -> None:
    quantized = quantized_matrix(Grid(bits, group_size, symmetric))
    layout = matmul_nbits(quantized)
    assert (layout.bits, layout.block_size) == (bits, group_size)
    assert layout.codes.shape == (OUT, IN // group_size, group_size * bits // 8)
    assert (layout.zero_points is None) == symmetric
    assert_matmul_agrees(quantized, layout)


@both_symmetries
def test_three_bit_codes_move_into_four_bit_fields(symmetric: bool) -> None:
    quantized = quantized_matrix(Grid(3, 32, symmetric))
    layout = matmul_nbits(quantized)
    assert layout.bits == 4
    assert_matmul_agrees(quantized, layout)


@pytest.mark.parametrize(("group_size", "block_size"), [(384, 128), (96, 32), (192, 64), (48, 16)])
def test_groups_that_are_no_power_of_two_are_split(group_size: int, block_size: int) -> None:
    quantized = quantized_matrix(Grid(4, group_size, symmetric=False))
    layout = matmul_nbits(quantized)
    assert layout.block_size == block_size
    assert_matmul_agrees(quantized, layout)


@pytest.mark.parametrize("bits", [2, 4])
def test_zero_points_of_a_row_end_in_a_byte_of_their_own(bits: int) -> None:
    quantized = quantized_matrix(Grid(bits, 128, symmetric=False), num_in=5 * 128)
    layout = matmul_nbits(quantized)
    assert layout.zero_points is not None
    assert layout.zero_points.shape == (OUT, 2 if bits == 2 else 3)
    assert_matmul_agrees(quantized, layout)


def test_whole_width_of_a_power_of_two_is_split_too() -> None:
    quantized = quantized_matrix(Grid(4, 512), num_in=512)
    assert matmul_nbits(quantized).block_size == 128
    assert_matmul_agrees(quantized, matmul_nbits(quantized))


def test_groups_too_small_for_matmulnbits_are_an_error() -> None:
    with pytest.raises(QuantizationError, match="groups of 24 are not multiples of a MatMulNBits block"):
        matmul_nbits(quantized_matrix(Grid(4, 24)))


def test_codes_are_not_made_narrower_nor_groups_larger() -> None:
    with pytest.raises(QuantizationError, match="codes of 4 bits cannot be widened to 2 bits"):
        widen(quantized_matrix(Grid(4, 32)), 2)
    with pytest.raises(QuantizationError, match="groups of 16 cannot be split into groups of 32"):
        repeat_scales(quantized_matrix(Grid(4, 16)), 32)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dequantizelinear_gives_exactly_the_values(bits: int) -> None:
    quantized = quantized_matrix(Grid(bits, 32))
    layout = dequantize_linear(quantized)
    assert layout.data_type == ("INT8" if bits == 8 else "INT4")
    assert (run_dequantize(layout, 32) == dequantize(quantized).T).all()


@both_symmetries
@pytest.mark.parametrize(("bits", "wider"), [(2, 4), (3, 4), (3, 8), (4, 8), (4, 4)])
def test_wider_codes_and_smaller_groups_mean_the_same(bits: int, wider: int, symmetric: bool) -> None:
    quantized = quantized_matrix(Grid(bits, 96, symmetric))
    held = repeat_scales(widen(quantized, wider), 32)
    assert held.grid == Grid(wider, 32, symmetric)
    assert (dequantize(held) == dequantize(quantized)).all()
