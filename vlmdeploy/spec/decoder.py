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
    """Rotary positions: of each head, the first `dims` values turn in pairs, pair t by position * base^(-2t / dims).

    pairing "half": pair t is (t, t + dims / 2); "adjacent": (2t, 2t + 1). Frequencies stored in the checkpoint take
    precedence over `base`.
    """

    base: float
    dims: int
    pairing: Literal["half", "adjacent"] = "half"

    def pairs(self) -> tuple[range, range]:
        """The first values of all pairs, and the second ones."""
        if self.pairing == "adjacent":
            return range(0, self.dims, 2), range(1, self.dims, 2)
        return range(self.dims // 2), range(self.dims // 2, self.dims)


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
