"""The layout of attention heads in the graphs: padded to a width that every attention operator takes."""

from dataclasses import dataclass

import numpy as np

from vlmdeploy.export.weight_reader import Ints
from vlmdeploy.manifest import CacheShape
from vlmdeploy.quant.grid import Floats
from vlmdeploy.spec.decoder import DecoderSpec

HEAD_MULTIPLE = 16  # GroupQueryAttention with rotary positions wants it; TensorRT knows multiples of 8 from 16 on


@dataclass(frozen=True)
class HeadLayout:
    """Attention heads, padded.

    Queries and keys are arranged so that pair t is (t, t + padded / 2), whatever the model's pairing; values that stay
    follow in both halves, with the frequency 0. They are padded in each half, values at the tail; neither order nor
    zeros change scores or sums. The output is cut back to the true width, so `dense` keeps the checkpoint's columns and
    groups.
    """

    decoder: DecoderSpec

    @property
    def padded(self) -> int:
        """Width of a head in the graph and in the KV cache."""
        return -(-self.decoder.head_dim // HEAD_MULTIPLE) * HEAD_MULTIPLE

    @property
    def is_padded(self) -> bool:
        """Whether heads are wider in the graph than in the checkpoint."""
        return self.padded != self.decoder.head_dim

    def rotary_slots(self) -> Ints:
        """Index in the true head of each element of a padded query or key head, or -1. int64 [padded]."""
        rest = np.arange(self.decoder.rope.dims, self.decoder.head_dim)
        halves = [(*turned, *still) for turned, still in zip(self.decoder.rope.pairs(), np.split(rest, 2), strict=True)]
        padding = [-1] * ((self.padded - self.decoder.head_dim) // 2)
        return np.array([slot for half in halves for slot in (*half, *padding)])

    def true_values(self, padded: Floats, slots: Ints) -> Floats:
        """The true values [..., head_dim] of heads [..., padded] that are arranged by `slots`, in their own order."""
        return padded[..., np.argsort(slots)[self.padded - self.decoder.head_dim :]]

    def value_slots(self) -> Ints:
        """The same for a value head."""
        return tail_slots(self.decoder.head_dim, self.padded)

    def query_rows(self) -> Ints:
        """Rows of the packed qkv matrix that make up the padded queries; -1 is a row of zeros."""
        return self._rows(0, self.decoder.num_heads, self.rotary_slots())

    def key_rows(self) -> Ints:
        """The same for the keys."""
        return self._rows(self.decoder.num_heads, self.decoder.num_kv_heads, self.rotary_slots())

    def value_rows(self) -> Ints:
        """The same for the values."""
        return self._rows(
            self.decoder.num_heads + self.decoder.num_kv_heads, self.decoder.num_kv_heads, self.value_slots()
        )

    def _rows(self, first_head: int, num_heads: int, slots: Ints) -> Ints:
        return head_rows(first_head, num_heads, self.decoder.head_dim, slots)

    def cache_shape(self, inv_freq: Floats, dtype: str) -> CacheShape:
        """The KV cache of the graphs; inv_freq float32 of the checkpoint's pairs."""
        padded = np.zeros(self.padded // 2, np.float32)
        padded[: len(inv_freq)] = inv_freq
        frequencies = tuple(float(value) for value in padded)
        return CacheShape(self.decoder.num_layers, self.decoder.num_kv_heads, self.padded, dtype, frequencies)


def tail_slots(head_dim: int, padded: int) -> Ints:
    """Index in the true head of each element of a head padded at its tail, or -1. int64 [padded]."""
    slots = np.full(padded, -1)
    slots[:head_dim] = np.arange(head_dim)
    return slots


def head_rows(first_head: int, num_heads: int, head_dim: int, slots: Ints) -> Ints:
    """Rows of a packed matrix that form these heads, each arranged by `slots`; -1 is a row of zeros."""
    starts = (first_head + np.arange(num_heads)) * head_dim
    return np.where(slots < 0, -1, starts[:, None] + slots).reshape(-1)
