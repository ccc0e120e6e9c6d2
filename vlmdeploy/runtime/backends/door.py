"""The narrow door between the generate loop and whatever executes the graphs.

The loop encodes images, runs segments of equal expert over one KV cache and asks for logits of single rows; everything
but speed is the same behind every backend.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.bundle import CacheShape
from vlmdeploy.layout import Bools, Ints

Floats = NDArray[np.float32]

GRAPH_OF_EXPERT = {"language": "decoder_text", "vision": "decoder_vision"}
ROUTED_GRAPH = "decoder"  # both experts in one graph
PROMPT_ONLY = ("vision", "decoder_vision")  # graphs that no decoded token needs
CACHE_TYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}


class KvCache(Protocol):
    """The KV cache of one prompt, written in place."""

    @property
    def length(self) -> int:
        """How many positions are filled."""

    @property
    def capacity(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of every cache slot's position, float32 [capacity, head_dim / 2]."""

    cos: Floats
    sin: Floats


class Backend(Protocol):
    """What a backend offers. chunk_rows: how long the pieces are in which a prompt is best read. mixes_experts: whether
    one call takes rows of both experts."""

    chunk_rows: int
    mixes_experts: bool

    def encode_images(self, pixels: Floats) -> Floats:
        """Preprocessed pixels [images, 3, S, S] -> decoder rows [images, rows, hidden]."""

    def new_cache(self, positions: Ints) -> KvCache:
        """An empty cache with one slot for each position id, int64 [capacity]."""

    def run_rows(self, vision_mask: Bools, hidden: Floats, cache: KvCache, logit_rows: Ints) -> Floats:
        """Run rows [rows, hidden] and append them to the cache; logits [asked, vocab] of the rows asked for.

        vision_mask bool [rows]: which use the vision expert; all or none unless the backend mixes experts. logit_rows
        counts from the first row and names rows of the language expert only.
        """

    def decode(self, hidden: Floats, cache: KvCache) -> Floats:
        """Run one new token's row [1, hidden] on the language expert; logits [vocab], valid until the next call."""

    def close(self) -> None:
        """Give everything back."""

    def end_prefill(self) -> None:
        """The prompt is in the cache: what only a prompt needs may be released (phase residency)."""


def rope_table(shape: CacheShape, positions: Ints) -> RopeTable:
    """Angles position * inv_freq in float32 for each slot. positions int64 [capacity]."""
    angles = positions.astype(np.float32)[:, None] * np.array(shape.inv_freq, np.float32)
    return RopeTable(np.cos(angles), np.sin(angles))


def slot_positions(prompt_positions: Ints, capacity: int) -> Ints:
    """Position ids of all cache slots: the prompt's, then one more for each new token."""
    new = int(prompt_positions[-1]) + 1 + np.arange(capacity - len(prompt_positions))
    return np.concatenate((prompt_positions, new))
