"""Reference tests: the integer grid against tests/reference/int4.py."""

import numpy as np
import pytest

from tests.reference import int4 as reference
from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.grid import (
    SMALLEST_SCALE,
    Floats,
    Grid,
    dequantize,
    pack_nibbles,
    quantize_rtn,
    unpack_nibbles,
)

GROUPS = [16, 32, 64, 128]
# Half a step; the scale's fp16 rounding (2^-11) may push the largest weight of a group out of the range of codes.
LARGEST_ERROR_STEPS = {4: 0.5 + 8 * 2**-11, 8: 0.5 + 128 * 2**-11}


def random_weights(seed: int, rows: int = 6, width: int = 256) -> Floats:
    """Groups of very different magnitude."""
    random = np.random.default_rng(seed)
    magnitudes = 10.0 ** random.uniform(-1, 2, (rows, width // 16, 1))  # all scales are normal fp16 numbers
    return (random.standard_normal((rows, width // 16, 16)) * magnitudes).reshape(rows, width).astype(np.float32)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("seed", range(5))
def test_int4_codes_and_scales_equal_the_reference(seed: int, group_size: int) -> None:
    weights = random_weights(seed)
    ours = quantize_rtn(weights, Grid(4, group_size))
    codes, scales = reference.quantize_rtn(weights, group_size)
    assert (ours.codes == codes).all()
    assert (ours.scales == scales.astype(np.float32)).all()
    assert (dequantize(ours) == reference.dequantize(codes, scales, group_size)).all()


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_at_most_half_a_step_away(bits: int, group_size: int) -> None:
    weights = random_weights(bits)
    quantized = quantize_rtn(weights, Grid(bits, group_size))
    steps = np.abs(dequantize(quantized) - weights) / np.repeat(quantized.scales, group_size, 1)
    assert steps.max() <= LARGEST_ERROR_STEPS[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_fp16_values(bits: int) -> None:
    scales = quantize_rtn(random_weights(1), Grid(bits, 32)).scales
    assert scales.dtype == np.float32
    assert (scales.astype(np.float16).astype(np.float32) == scales).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_group_of_zeros_stays_zero(bits: int) -> None:
    weights = random_weights(2)
    weights[3, 32:64] = 0
    quantized = quantize_rtn(weights, Grid(bits, 32))
    assert (quantized.scales > 0).all()
    assert (dequantize(quantized)[3, 32:64] == 0).all()


@pytest.mark.parametrize("magnitude", [1e-3, 1e-6, 1e-7, 1e-9, 1e-38])
def test_tiny_weights_lose_no_more_than_the_coarse_scales_of_fp16(magnitude: float) -> None:
    weights = np.linspace(-magnitude, magnitude, 16, dtype=np.float32)[None]
    quantized = quantize_rtn(weights, Grid(4, 16))
    off_scale = SMALLEST_SCALE / 2 if magnitude < 1e-4 else magnitude / 7.5 * 2**-11  # subnormal, or normal fp16
    allowed = 0.5 * float(quantized.scales[0, 0]) + 7.5 * off_scale
    assert np.abs(dequantize(quantized) - weights).max() <= allowed


def test_largest_scale_of_fp16_is_reached_but_not_passed() -> None:
    weights = np.zeros((1, 16), np.float32)
    weights[0, 3] = -65504 * 7.5
    assert dequantize(quantize_rtn(weights, Grid(4, 16)))[0, 3] == pytest.approx(-65504 * 7.5, rel=0.07)
    weights[0, 3] *= 1.001
    with pytest.raises(QuantizationError, match=r"magnitude 4\.92e\+05 needs a scale beyond fp16"):
        quantize_rtn(weights, Grid(4, 16))


def test_group_that_does_not_divide_the_width_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="group size 32 does not divide the input width 40"):
        quantize_rtn(np.ones((2, 40), np.float32), Grid(4, 32))


def test_nibbles_come_back_and_the_first_one_is_low() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 7, 32)).astype(np.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, 7, 16)
    assert (packed & 15 == codes[..., 0::2]).all()
    assert (unpack_nibbles(packed) == codes).all()


@pytest.mark.parametrize("group_size", GROUPS)
def test_packed_bytes_equal_the_reference(group_size: int) -> None:
    codes = np.random.default_rng(1).integers(0, 16, (5, 256)).astype(np.uint8)
    packed = pack_nibbles(codes).reshape(5, 256 // group_size, group_size // 2)
    assert (packed == reference.pack(codes, group_size)).all()
    assert (unpack_nibbles(packed).reshape(5, 256) == reference.unpack(packed)).all()
