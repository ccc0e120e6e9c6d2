"""Question-answer pairs become packed rows of tokens: one row per image, as many pairs as fit behind it.

Only answers (and the end token) are predicted; the digits of a box and its marks have their own weights in the loss,
because the last digit of a coordinate is noise and its commas are free.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
BOX = re.compile(r"\[\[[0-9,;]+\]\]")


@dataclass(frozen=True)
class TokenWeights:
    """Weights in the loss: of an ordinary answer token, of the end token, and of a box's tokens."""

    end: float = 0.3
    box_units: float = 0.3
    box_marks: float = 0.1


@dataclass(frozen=True)
class Pair:
    """A tokenized prompt and answer: ids without the end token; targets and weights for each of them."""

    ids: Ints
    targets: Ints
    weights: Floats


@dataclass(frozen=True)
class PackedRows:
    """The texts of a batch of images, all [batch, text]; see TextRows for their meaning."""

    ids: Ints
    positions: Ints
    pairs: Ints
    targets: Ints
    weights: Floats


def make_pair(
    encode: Callable[[str], list[int]], prompt: str, answer: str, end_id: int, token_weights: TokenWeights
) -> Pair:
    """Tokens of one pair. prompt and answer are encoded apart: the tokenizer must not merge across the gap."""
    asked, told = encode(prompt), encode(answer)
    ids = [*asked, *told]
    targets = [*ids[1:], end_id]
    weights = [0.0] * (len(asked) - 1) + _answer_weights(answer, len(told), token_weights) + [token_weights.end]
    return Pair(np.array(ids), np.array(targets), np.array(weights, np.float32))


def _answer_weights(answer: str, num_tokens: int, token_weights: TokenWeights) -> list[float]:
    if not BOX.fullmatch(answer):
        return [1.0] * num_tokens
    marks, units = token_weights.box_marks, token_weights.box_units
    coordinate = [1.0, 1.0, units, marks]  # three digits, then a comma or the closing mark
    weights = [marks, *coordinate * ((num_tokens - 1) // 4)]
    assert len(weights) == num_tokens, "a box is not one token per digit and mark"
    return weights


def pack_rows(images: Sequence[Sequence[Pair]], text_tokens: int, first_position: int) -> PackedRows:
    """For each image its pairs in order; a pair that no longer fits into text_tokens is left out."""
    shape = (len(images), text_tokens)
    rows = PackedRows(
        ids=np.zeros(shape, np.int64),
        positions=np.zeros(shape, np.int64),
        pairs=np.full(shape, -1),
        targets=np.zeros(shape, np.int64),
        weights=np.zeros(shape, np.float32),
    )
    for row, pairs in enumerate(images):
        at = 0
        for number, pair in enumerate(pairs):
            stop = at + len(pair.ids)
            if stop > text_tokens:
                continue
            rows.ids[row, at:stop] = pair.ids
            rows.positions[row, at:stop] = np.arange(first_position, first_position + len(pair.ids))
            rows.pairs[row, at:stop] = number
            rows.targets[row, at:stop] = pair.targets
            rows.weights[row, at:stop] = pair.weights
            at = stop
    return rows
