"""Triton source of the routed kernels: y = W[expert of row] x + bias, int4 weights in groups with fp16 scales.

Three kernels: `routed_partition` sorts the rows of a pass by expert, once for all layers; `routed_gemv` handles few
rows with plain arithmetic, `routed_gemm` many rows on tensor cores. Products and sums are float32, rounded once at the
end. packing.py defines the layout of the weights. Parameters are in the order inputs, scalars, outputs; pointers are
16-byte aligned; experts and order int32 [tokens], x [tokens, in] and y [tokens, out_width] of one 16-bit float type.

Triton decides on import whether it compiles kernels, or interprets them (TRITON_INTERPRET=1).
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no proper bfloat16 dot product

PARTITION_BLOCK = 1024  # rows per step of `routed_partition`
# Inputs per step of `routed_gemv`: 64 words of codes per output. Twice as many would pass through shared memory instead
# of being loaded by the threads that need them.
GEMV_INPUTS = tl.constexpr(512)


@triton.jit(do_not_specialize=["tokens"])
def routed_partition(experts, tokens, order, language_count, BLOCK: tl.constexpr):
    """order: rows of expert 0 in ascending order, then all others likewise. One program."""
    num_language = 0
    for start in range(0, tokens, BLOCK):
        row = start + tl.arange(0, BLOCK)
        expert = tl.load(experts + row, mask=row < tokens, other=1)
        num_language += tl.sum((expert == 0).to(tl.int32), 0)
    tl.store(language_count, num_language)
    language_end = 0
    other_end = num_language
    for start in range(0, tokens, BLOCK):
        row = start + tl.arange(0, BLOCK)
        exists = row < tokens
        expert = tl.load(experts + row, mask=exists, other=1)
        is_language = (expert == 0).to(tl.int32)
        is_other = exists.to(tl.int32) - is_language
        place = tl.where(is_language == 1, language_end + tl.cumsum(is_language, 0), other_end + tl.cumsum(is_other, 0))
        tl.store(order + place - 1, row, mask=exists)
        language_end += tl.sum(is_language, 0)
        other_end += tl.sum(is_other, 0)


@triton.jit
def weights_at(fractions, BIT: tl.constexpr):
    """code - 8 as float32, of the 4-bit codes at bit BIT <= 19 of unsigned words whose high bits are those of 2^23.

    There float32 counts in steps of 1, so masking the other codes is the whole conversion: exact and cheap.
    """
    step: tl.constexpr = 1.0 / (1 << BIT)
    kept = (fractions & (0xFF800000 | (15 << BIT))).to(tl.float32, bitcast=True)
    return kept * step - (8388608.0 * step + 8.0)


@triton.jit
def small_weights_at(pairs, BIT: tl.constexpr):
    """code - 8 as float16, of the 4-bit codes at bit 0 or 4 of 8-bit words. As above, with the exponent of 2^10."""
    step: tl.constexpr = 1.0 / (1 << BIT)
    kept = (pairs.to(tl.uint16) & (15 << BIT) | 0x6400).to(tl.float16, bitcast=True)
    return kept * step - (1024.0 * step + 8.0)


@triton.jit
def inputs_at(quads, PLACE: tl.constexpr, dtype: tl.constexpr):
    """Value PLACE of four neighbouring 16-bit floats that were loaded as one int64, as float32."""
    return (quads >> (16 * PLACE)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def routed_gemv(
    x, experts, order, language_count, codes, scales, bias, tokens, out_width, groups, y,
    GROUP_SIZE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK_COLUMNS outputs per program; grid (ceil(out_width / BLOCK_COLUMNS), tokens).

    Eight codes are read as one word: byte b of word w holds the codes of the inputs 4 w + b of both halves of a group,
    so four neighbouring inputs of each half belong to one word. Sums stay apart until the end, in each thread.
    STAGES - 1 blocks are on their way from memory while one is computed.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    WORDS: tl.constexpr = GROUP_SIZE // 8
    BLOCK_GROUPS: tl.constexpr = GEMV_INPUTS // GROUP_SIZE
    row = tl.program_id(1).to(tl.int64)
    expert = (tl.load(experts + row) != 0).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_exists = column < out_width
    line = expert * out_width + column  # of codes and bias
    block = tl.arange(0, BLOCK_GROUPS)
    inside = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [block of groups, words]
    inside_x = block[:, None] * (2 * WORDS) + tl.arange(0, WORDS)[None, :]

    words_of_line = (codes.to(tl.pointer_type(tl.uint32)) + line * (groups * WORDS))[:, None, None] + inside[None, :, :]
    quads_of_row = x.to(tl.pointer_type(tl.int64)) + row * (groups * (2 * WORDS)) + inside_x
    scales_of_line = (scales + expert * groups * out_width + column)[:, None] + block[None, :].to(tl.int64) * out_width
    sums = tl.full((BLOCK_COLUMNS, BLOCK_GROUPS, WORDS), 0.0, tl.float32)
    for first in tl.range(0, groups, BLOCK_GROUPS, num_stages=STAGES):
        exists = block < groups - first
        loaded = column_exists[:, None] & exists[None, :]
        words = tl.load(words_of_line, mask=loaded[:, :, None], other=0)
        low_inputs = tl.load(quads_of_row, mask=exists[:, None], other=0)[None, :, :]
        high_inputs = tl.load(quads_of_row + WORDS, mask=exists[:, None], other=0)[None, :, :]
        scale = tl.load(scales_of_line, mask=loaded, other=0.0).to(tl.float32)
        fractions = (words & 0x007FFFFF) | 0x4B000000
        part = weights_at(fractions, 0) * inputs_at(low_inputs, 0, dtype)
        part += weights_at(fractions, 4) * inputs_at(high_inputs, 0, dtype)
        part += weights_at(fractions, 8) * inputs_at(low_inputs, 1, dtype)
        part += weights_at(fractions, 12) * inputs_at(high_inputs, 1, dtype)
        part += weights_at(fractions, 16) * inputs_at(low_inputs, 2, dtype)
        fractions = (words >> 20) | 0x4B000000
        part += weights_at(fractions, 0) * inputs_at(high_inputs, 2, dtype)
        part += weights_at(fractions, 4) * inputs_at(low_inputs, 3, dtype)
        part += weights_at(fractions, 8) * inputs_at(high_inputs, 3, dtype)
        sums += part * scale[:, :, None]
        words_of_line += BLOCK_GROUPS * WORDS
        quads_of_row += BLOCK_GROUPS * (2 * WORDS)
        scales_of_line += BLOCK_GROUPS * out_width
    result = tl.sum(tl.sum(sums, 2), 1) + tl.load(bias + line, mask=column_exists, other=0.0)
    tl.store(y + row * out_width + column, result.to(dtype), mask=column_exists)


@triton.jit(do_not_specialize=["tokens"])
def routed_gemm(
    x, experts, order, language_count, codes, scales, bias, tokens, out_width, groups, y,
    GROUP_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one expert per program; grid (ceil(out_width / BLOCK_COLUMNS), ceil(tokens / BLOCK_ROWS) + 1).

    Tiles hold [columns, rows], so that the weights are the left factor: that one may come from registers. The grid has
    one tile more than the rows fill, because the rows of each expert start a new one; a tile without rows returns.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = GROUP_SIZE // 2
    tile = tl.program_id(1)
    num_language = tl.load(language_count)
    language_tiles = (num_language + BLOCK_ROWS - 1) // BLOCK_ROWS
    is_language = tile < language_tiles
    first = tl.where(is_language, tile * BLOCK_ROWS, num_language + (tile - language_tiles) * BLOCK_ROWS)
    end = tl.where(is_language, num_language, tokens)
    if first >= end:
        return
    expert = tl.where(is_language, 0, 1).to(tl.int64)
    place = first + tl.arange(0, BLOCK_ROWS)
    row_exists = place < end
    row = tl.load(order + place, mask=row_exists, other=0).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_exists = column < out_width
    line = expert * out_width + column  # of codes and bias
    half = tl.arange(0, HALF)

    bytes_of_line = (codes.to(tl.pointer_type(tl.uint8)) + line * (groups * HALF))[:, None] + half[None, :]
    inputs_of_row = (x + row * (groups * GROUP_SIZE))[None, :] + half[:, None]
    scales_of_line = scales + expert * groups * out_width + column
    sums = tl.full((BLOCK_COLUMNS, BLOCK_ROWS), 0.0, tl.float32)
    for _group in range(0, groups):
        pairs = tl.load(bytes_of_line, mask=column_exists[:, None], other=0)
        low_inputs = tl.load(inputs_of_row, mask=row_exists[None, :], other=0.0)
        high_inputs = tl.load(inputs_of_row + HALF, mask=row_exists[None, :], other=0.0)
        scale = tl.load(scales_of_line, mask=column_exists, other=0.0).to(tl.float32)
        if dtype == tl.float16:
            low = small_weights_at(pairs, 0)
            high = small_weights_at(pairs, 4)
        else:
            fractions = pairs.to(tl.uint32) | 0x4B000000
            low = weights_at(fractions, 0).to(dtype)
            high = weights_at(fractions, 4).to(dtype)
        if INTERPRETED:
            low, low_inputs = low.to(tl.float32), low_inputs.to(tl.float32)
            high, high_inputs = high.to(tl.float32), high_inputs.to(tl.float32)
        part = tl.dot(low, low_inputs)
        part = tl.dot(high, high_inputs, part)
        sums += part * scale[:, None]
        bytes_of_line += HALF
        inputs_of_row += GROUP_SIZE
        scales_of_line += out_width
    sums += tl.load(bias + line, mask=column_exists, other=0.0)[:, None]
    places = (y + row * out_width)[None, :] + column[:, None]
    tl.store(places, sums.to(dtype), mask=column_exists[:, None] & row_exists[None, :])
