"""The decoder as data: geometry, experts and rotary positions."""

from dataclasses import dataclass
from typing import Literal

ExpertName = Literal["language", "vision"]


@dataclass(frozen=True)
class ExpertSpec:
    """One weight set of every decoder layer."""

    name: ExpertName
    qkv_bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions over the whole head, pairs (t, t + head_dim / 2), angle position * base^(-2t / head_dim).

    Frequencies stored in the checkpoint take precedence over `base`.
    """

    base: float


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm causal decoder with RMS norms, rotary positions, grouped KV heads and a gated MLP."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    norm_eps: float
    rope: RopeSpec
    experts: tuple[ExpertSpec, ...]  # the language expert first
    context_tokens: int

    @property
    def qkv_width(self) -> int:
        """Rows of the packed projection: queries, keys, values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
