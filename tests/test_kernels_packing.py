"""Reference tests: the kernels' bytes against the loops of tests/reference/routed_linear.py, and what is refused."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.reference import routed_linear as reference
from vlmdeploy.errors import QuantizationError
from vlmdeploy.kernels.packing import PackedExperts, check_layout, pack_codes, pack_scales, unpack_codes

Codes = NDArray[np.uint8]
every_group = pytest.mark.parametrize("group_size", [32, 64, 128])


def random_codes(rows: int, width: int) -> Codes:
    return np.random.default_rng(rows).integers(0, 16, (rows, width)).astype(np.uint8)


@every_group
@pytest.mark.parametrize("groups", [1, 3])
def test_bytes_equal_the_loops_and_come_back(group_size: int, groups: int) -> None:
    codes = random_codes(5, groups * group_size)
    packed = pack_codes(codes, group_size)
    assert packed.dtype == np.uint8
    assert (packed == reference.pack(codes, group_size)).all()
    assert (unpack_codes(packed, group_size) == codes).all()


def test_first_byte_holds_the_first_code_of_each_half() -> None:
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 0], codes[0, 16] = 0x3, 0xA
    assert pack_codes(codes, 32)[0].tolist() == [0xA3] + [0] * 15


def test_rows_may_be_packed_in_pieces() -> None:
    codes = random_codes(7, 128)
    pieces = [pack_codes(codes[start : start + 3], 64) for start in (0, 3, 6)]
    assert (np.concatenate(pieces) == pack_codes(codes, 64)).all()
    assert pack_codes(codes[:0], 64).shape == (0, 64)


def test_columns_of_a_larger_matrix_are_packed() -> None:
    codes = random_codes(4, 256)
    assert (pack_codes(codes[:, :128], 128) == pack_codes(codes[:, :128].copy(), 128)).all()
    assert (unpack_codes(pack_codes(codes.T[:128].T, 128), 128) == codes[:, :128]).all()


@pytest.mark.parametrize(
    ("codes", "group_size", "message"),
    [
        (np.zeros((1, 96), np.uint8), 64, "codes: 96 inputs; expected a multiple of the group size 64"),
        (np.zeros((1, 0), np.uint8), 64, "codes: 0 inputs"),
        (np.zeros((1, 64), np.uint8), 16, "codes: groups of 16; .* in groups of 32, 64 or 128"),
        (np.full((1, 64), 16, np.uint8), 64, "a code 16 does not fit 4 bits"),
        (np.zeros(64, np.uint8), 64, r"codes are uint8 \[64\], expected uint8 with two axes"),
        (np.zeros((1, 64), np.int64), 64, r"codes are int64 \[1, 64\]"),
    ],
)
def test_codes_that_cannot_be_packed_are_refused(codes: Codes, group_size: int, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        pack_codes(codes, group_size)


def test_bytes_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(QuantizationError, match="packed codes: 96 inputs"):
        unpack_codes(np.zeros((1, 48), np.uint8), 64)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((4096, 128, 8, True), "layer.qkv: symmetric 8-bit codes; .* symmetric 4-bit codes in groups of 32, 64 or 128"),
        ((4096, 128, 4, False), "layer.qkv: asymmetric 4-bit codes"),
        ((4096, 256, 4, True), "layer.qkv: groups of 256"),
        ((4096, -1, 4, True), "layer.qkv: groups of -1"),
        ((4000, 128, 4, True), "layer.qkv: 4000 inputs; expected a multiple of the group size 128"),
    ],
)
def test_grid_that_the_kernels_do_not_take_names_the_linear(grid: tuple[int, int, int, bool], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        check_layout("layer.qkv", *grid)


@every_group
def test_grid_that_the_kernels_take_passes(group_size: int) -> None:
    check_layout("layer.qkv", 11008, group_size, 4, symmetric=True)


def test_scales_are_turned_without_rounding() -> None:
    scales = np.array([[0.5, 0.25, 6e-8], [1, 65504, 2]], np.float16).astype(np.float32)
    packed = pack_scales(scales)
    assert packed.dtype == np.float16
    assert packed.flags["C_CONTIGUOUS"]
    assert (scales == packed.T).all()


@pytest.mark.parametrize("scale", [0.1, 1e6, float("inf"), float("nan")])
def test_scale_that_fp16_does_not_hold_is_refused(scale: float) -> None:
    with pytest.raises(QuantizationError, match="is not a finite float16 value"):
        pack_scales(np.full((2, 2), scale, np.float32))


def test_scales_of_another_type_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"scales are float64 \[1, 1\], expected float32 with two axes"):
        pack_scales(np.ones((1, 1)))  # type: ignore[arg-type]


def packed_experts(codes: tuple[int, ...], scales: tuple[int, ...], bias: tuple[int, ...]) -> PackedExperts:
    return PackedExperts(np.zeros(codes, np.uint8), np.zeros(scales, np.float16), np.zeros(bias, np.float32), 64)


def test_packed_experts_know_their_widths() -> None:
    packed = packed_experts((2, 10, 96), (2, 3, 10), (2, 10))
    assert (packed.in_width, packed.out_width) == (192, 10)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 10, 96), (3, 3, 10), (3, 10)), r"packed codes are \[3, 10, 96\], expected \[2, out, in / 2\]"),
        (((2, 96), (2, 3, 10), (2, 10)), r"packed codes are \[2, 96\]"),
        (((2, 0, 96), (2, 3, 0), (2, 0)), r"packed codes are \[2, 0, 96\]"),
        (((2, 10, 97), (2, 3, 10), (2, 10)), "packed codes: 194 inputs"),
        (((2, 10, 96), (2, 10, 3), (2, 10)), r"packed scales are \[2, 10, 3\], expected \[2, 3, 10\]"),
        (((2, 10, 96), (2, 3, 10), (10,)), r"packed bias are \[10\], expected \[2, 10\]"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        packed_experts(*shapes)


def test_arrays_of_another_type_are_refused() -> None:
    codes, scales = np.zeros((2, 10, 32), np.uint8), np.zeros((2, 1, 10), np.float32)
    with pytest.raises(QuantizationError, match="packed scales are float32, expected float16"):
        PackedExperts(codes, scales, np.zeros((2, 10), np.float32), 64)  # type: ignore[arg-type]
