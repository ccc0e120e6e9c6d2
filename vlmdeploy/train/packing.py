"""Pack question-answer pairs into rows of tokens: one row per image, with as many pairs as fit.

Only answers and the end token are learned. The digits and marks of a box have their own loss weights, because the last
digit of a coordinate is noise and its commas are certain.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmdeploy.train.config import TextConfig

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
BOX = re.compile(r"\[\[[0-9,;]+\]\]")


@dataclass(frozen=True)
class Pair:
    """A tokenized prompt and answer: ids without the end token, with the target and weight of each."""

    ids: Ints
    targets: Ints
    weights: Floats


@dataclass(frozen=True)
class TextRows:
    """The packed texts of a batch, without BOS and image; `text` is a multiple of the chunk length.

    ids, positions, pairs int64 [batch, text]: the token, its position id, and which pair of its row it belongs to
    (-1: padding). targets int64 [batch, text]: the token to predict there; weights float32: its weight in the loss.
    No pair is longer than a chunk, so a token's pair lies in its own chunk and the one before.
    """

    ids: Tensor
    positions: Tensor
    pairs: Tensor
    targets: Tensor
    weights: Tensor
    chunk_tokens: int


def make_pair(encode: Callable[[str], list[int]], prompt: str, answer: str, end_id: int, text: TextConfig) -> Pair:
    """Tokenize a pair. Encodes prompt and answer separately, so the tokenizer does not merge across the gap."""
    asked, told = encode(prompt), encode(answer)
    ids = [*asked, *told]
    targets = [*ids[1:], end_id]
    weights = [0.0] * (len(asked) - 1) + _answer_weights(answer, len(told), text) + [text.end_weight]
    return Pair(np.array(ids), np.array(targets), np.array(weights, np.float32))


def _answer_weights(answer: str, num_tokens: int, text: TextConfig) -> list[float]:
    if not BOX.fullmatch(answer):
        return [1.0] * num_tokens
    marks, units = text.box_marks_weight, text.box_units_weight
    coordinate = [1.0, 1.0, units, marks]  # three digits, then a comma or the closing mark
    weights = [marks, *coordinate * ((num_tokens - 1) // 4)]
    assert len(weights) == num_tokens, "a box is not one token per digit and mark"
    return weights


def pack_rows(images: Sequence[Sequence[Pair]], text: TextConfig, first_position: int) -> TextRows:
    """For each image its pairs in order, without those that no longer fit in row_tokens."""
    shape = (len(images), text.row_tokens)
    ids, positions, targets = torch.zeros((3, *shape), dtype=torch.int64)
    numbers, weights = torch.full(shape, -1), torch.zeros(shape)
    for row, pairs in enumerate(images):
        at = 0
        for number, pair in enumerate(pairs):
            stop = at + len(pair.ids)
            if stop > text.row_tokens:
                continue
            ids[row, at:stop] = torch.from_numpy(pair.ids)
            positions[row, at:stop] = torch.arange(first_position, first_position + len(pair.ids))
            numbers[row, at:stop] = number
            targets[row, at:stop] = torch.from_numpy(pair.targets)
            weights[row, at:stop] = torch.from_numpy(pair.weights)
            at = stop
    return TextRows(ids, positions, numbers, targets, weights, text.chunk_tokens)
