"""Codes of 2 to 8 bits in 32-bit words, as GPTQ files hold them: one little-endian bit stream per column, code i in
bits i * bits ... i * bits + bits - 1 of the column's concatenated words, lowest bit first.

32 codes fill exactly `bits` words, so each of the 32 positions has a fixed word and shift, and a code that straddles
two words takes two shifts.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import QuantizationError
from vlmdeploy.quant.grid import Codes

Words = NDArray[np.int32]

WORD_BITS = 32
PERIOD = 32  # codes after which the bit stream is back at a word boundary
WIDTHS = range(2, 9)
BLOCK_ROWS = 64  # rows transposed at once: 64 rows of 11008 codes fit the L2 cache


def num_words(count: int, bits: int) -> int:
    """The number of 32-bit words for `count` codes; the tail of the last one is zero."""
    return -(-count * bits // WORD_BITS)


def fills_words(count: int, bits: int) -> bool:
    """Whether `count` codes end at a word boundary, as GPTQ files require; 3-bit codes do so every 32."""
    return count * bits % WORD_BITS == 0


def pack_words(codes: Codes, bits: int) -> Words:
    """Codes uint8 [n, columns] -> words int32 [num_words(n), columns], a bit stream along axis 0.

    Raises QuantizationError for a code that does not fit and for bits outside 2..8.
    """
    _check_bits(bits)
    if codes.size and int(codes.max()) >> bits:
        raise QuantizationError(f"a code {codes.max()} does not fit {bits} bits")
    words = np.zeros((num_words(len(codes), bits), codes.shape[1]), np.uint32)
    for place, word, shift in _places(bits):
        fields = codes[place::PERIOD].astype(np.uint32)
        words[word::bits][: len(fields)] |= fields << np.uint32(shift)
        if shift + bits > WORD_BITS:
            words[word + 1 :: bits][: len(fields)] |= fields >> np.uint32(WORD_BITS - shift)
    return words.view(np.int32)


def unpack_words(words: Words, bits: int, count: int) -> Codes:
    """The inverse: words int32 [num_words(count), columns] -> codes uint8 [count, columns].

    Raises QuantizationError if the number of words does not match `count`.
    """
    _check_bits(bits)
    if len(words) != num_words(count, bits):
        raise QuantizationError(
            f"{len(words)} words cannot hold {count} codes of {bits} bits; expected {num_words(count, bits)} words"
        )
    stream = words.view(np.uint32)
    codes = np.empty((count, words.shape[1]), np.uint8)
    for place, word, shift in _places(bits):
        target = codes[place::PERIOD]
        fields = stream[word::bits][: len(target)] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            fields |= stream[word + 1 :: bits][: len(target)] << np.uint32(WORD_BITS - shift)
        fields &= np.uint32((1 << bits) - 1)
        target[:] = fields
    return codes


def pack_rows(codes: Codes, bits: int) -> Words:
    """Codes [rows, n] -> words [num_words(n), rows]: each row becomes a column of words. Works in blocks of rows."""
    words = np.empty((num_words(codes.shape[1], bits), len(codes)), np.int32)
    for rows in _blocks(len(codes)):
        words[:, rows] = pack_words(np.ascontiguousarray(codes[rows].T), bits)
    return words


def unpack_rows(words: Words, bits: int, count: int) -> Codes:
    """The inverse: words [num_words(count), rows] -> codes [rows, count]. Works in blocks of rows."""
    codes = np.empty((words.shape[1], count), np.uint8)
    for rows in _blocks(len(codes)):
        codes[rows] = unpack_words(np.ascontiguousarray(words[:, rows]), bits, count).T
    return codes


def _check_bits(bits: int) -> None:
    if bits not in WIDTHS:
        raise QuantizationError(f"codes of {bits} bits; expected {WIDTHS.start} to {WIDTHS.stop - 1}")


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Each position within 32 codes, with the word and the bit where it starts."""
    return ((place, *divmod(place * bits, WORD_BITS)) for place in range(PERIOD))


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK_ROWS, rows)) for start in range(0, rows, BLOCK_ROWS))
