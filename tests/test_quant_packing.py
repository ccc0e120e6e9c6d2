"""Reference tests: words of 2 to 8 bit codes against the bit loop of tests/reference/gptq_format.py."""

import numpy as np
import pytest

from tests.reference import gptq_format as reference
from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.grid import Codes
from vlmdeploy.quant.packing import fills_words, num_words, pack_rows, pack_words, unpack_rows, unpack_words

every_width = pytest.mark.parametrize("bits", range(2, 9))


def random_codes(bits: int, shape: tuple[int, int]) -> Codes:
    return np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8)


@every_width
@pytest.mark.parametrize("count", [1, 31, 32, 40, 96, 100])
def test_words_equal_the_bit_loop_and_come_back(bits: int, count: int) -> None:
    codes = random_codes(bits, (count, 3))
    words = pack_words(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (num_words(count, bits), 3)
    assert (words == np.stack([reference.pack(column, bits) for column in codes.T], 1)).all()
    assert (unpack_words(words, bits, count) == codes).all()
    assert (reference.unpack(words[:, 1], bits, count) == codes[:, 1]).all()


@every_width
@pytest.mark.parametrize("rows", [1, 64, 150])
def test_rows_become_columns_of_words(bits: int, rows: int) -> None:
    codes = random_codes(bits, (rows, 64))
    words = pack_rows(codes, bits)
    assert (words == pack_words(codes.T, bits)).all()
    assert (unpack_rows(words, bits, 64) == codes).all()


def test_three_bit_codes_10_and_21_straddle_words() -> None:
    codes = np.zeros((32, 1), np.uint8)
    codes[10], codes[21] = 0b101, 0b101
    assert pack_words(codes, 3).view(np.uint32)[:, 0].tolist() == [0b01 << 30, 0b1 | 0b1 << 31, 0b10]


@every_width
def test_codes_fill_words_where_no_bits_are_left_over(bits: int) -> None:
    filled = [count for count in range(1, 129) if fills_words(count, bits)]
    assert filled == [count for count in range(1, 129) if num_words(count, bits) * 32 == count * bits]


def test_bits_behind_the_last_code_are_ignored() -> None:
    words = np.full((1, 2), -1, np.int32)
    assert (unpack_words(words, 4, 5) == 15).all()


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_other_widths_are_errors(bits: int) -> None:
    with pytest.raises(QuantizationError, match=f"codes of {bits} bits; expected 2 to 8"):
        pack_words(np.zeros((32, 1), np.uint8), bits)
    with pytest.raises(QuantizationError, match=f"codes of {bits} bits"):
        unpack_words(np.zeros((1, 1), np.int32), bits, 1)


def test_code_that_would_spill_into_its_neighbour_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="a code 8 does not fit 3 bits"):
        pack_words(np.array([[1], [8]], np.uint8), 3)


def test_number_of_words_must_fit_the_number_of_codes() -> None:
    with pytest.raises(QuantizationError, match="3 words cannot hold 40 codes of 3 bits; expected 4 words"):
        unpack_words(np.zeros((3, 1), np.int32), 3, 40)
