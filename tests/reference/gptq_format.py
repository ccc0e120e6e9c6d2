"""The GPTQ file format read bit by bit: no shifts by position tables, no vectors over codes, only a stream of bits.

A column of `qweight` and a row of `qzeros` are streams of 32-bit words, lowest bit first; a code is the next `bits`
bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def bits_of(words: Array) -> list[int]:
    """All bits of some 32-bit words in the order of the stream."""
    return [int(word) >> place & 1 for word in words.astype(np.int64) & 0xFFFFFFFF for place in range(32)]


def unpack(words: Array, bits: int, count: int) -> Array:
    """The first `count` codes of one stream of words."""
    stream = bits_of(words)
    codes = [sum(stream[i * bits + place] << place for place in range(bits)) for i in range(count)]
    return np.array(codes, np.uint8)


def pack(codes: Array, bits: int) -> Array:
    """One stream of words that holds the codes; the tail of the last word is zero."""
    stream = [int(code) >> place & 1 for code in codes for place in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(stream[start + place] << place for place in range(32)) for start in range(0, len(stream), 32)]
    return np.array(words, np.uint32).view(np.int32)


def decode(tensors: dict[str, Array], bits: int, stored_minus_one: bool) -> tuple[Array, Array, Array]:
    """Codes [out, in], zero points [out, groups] and fp16 weights [out, in], the product made in fp16 as kernels do.

    stored_minus_one: format v1. Its words had 1 subtracted in every field at once, so adding 1 to each field carries.
    """
    num_in, num_out = len(tensors["g_idx"]), tensors["qweight"].shape[1]
    codes = np.stack([unpack(column, bits, num_in) for column in tensors["qweight"].T])
    zeros = np.stack([zero_points(row, bits, num_out, stored_minus_one) for row in tensors["qzeros"]], 1)
    groups, scales = tensors["g_idx"], tensors["scales"].T.astype(np.float16)
    steps = codes.astype(np.int16) - zeros.astype(np.int16)[:, groups]
    return codes, zeros, scales[:, groups] * steps.astype(np.float16)


def zero_points(words: Array, bits: int, count: int, stored_minus_one: bool) -> Array:
    """The zero points of one group."""
    if stored_minus_one and bits != 3:
        one_in_each_field = sum(1 << place for place in range(0, 32, bits))
        words = np.array([(int(word) + one_in_each_field) % 2**32 for word in words], np.uint32)
    zeros = unpack(words, bits, count)
    return (zeros + 1) % 8 if stored_minus_one and bits == 3 else zeros
