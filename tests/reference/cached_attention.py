"""Causal attention of new rows over a KV cache, in float64: rotary positions, softmax, int8 keys and values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GROUP = 32


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """x [rows, heads, width] with its halves turned by cos and sin [rows, width / 2]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def rounded(x: Array) -> Array:
    """x [..., width] as int8 codes hold it, with one fp16 scale, rounded up, for each GROUP of values."""
    out = np.empty(x.shape)
    for start in range(0, x.shape[-1], GROUP):
        part = x[..., start : start + GROUP].astype(np.float32)
        most = np.abs(part).max(-1, keepdims=True)
        scale = (most / np.float32(127)).astype(np.float16)
        scale = np.where(scale.astype(np.float32) * 127 < most, np.nextafter(scale, np.float16(np.inf)), scale)
        wide = scale.astype(np.float32)
        inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
        out[..., start : start + GROUP] = np.rint(part * inverse) * wide.astype(np.float64)
    return out


def attention(queries: Array, keys: Array, values: Array, first_slot: int, scale: float) -> Array:
    """Of rotated queries [rows, heads, width]; keys, values [slots, kv_heads, width]. Row r sees slots to
    first_slot + r."""
    rows, heads, _ = queries.shape
    group = heads // keys.shape[1]
    out = np.empty(queries.shape)
    for row in range(rows):
        seen = first_slot + row + 1
        for head in range(heads):
            scores = keys[:seen, head // group].astype(np.float64) @ queries[row, head].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values[:seen, head // group]
    return out
