"""The decoder: causal layers with rotary positions and grouped KV heads, each token routed to its expert's weights.

Only the four projections are routed; all tokens share norms and attention.
Source: the authors' code of CogVLM and CogVLM2; docs/families/cogvlm.md.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.model.products import RowMixer, SiluGate
from vlmdeploy.overriding import override
from vlmdeploy.spec.decoder import DecoderSpec, ExpertSpec, RopeSpec


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, all in float32, then cast back: the order of the authors' code."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


class Expert(nn.Module):
    """The matrices of one expert of a layer."""

    def __init__(self, spec: DecoderSpec, expert: ExpertSpec) -> None:
        super().__init__()
        attention_width = spec.num_heads * spec.head_dim
        self.qkv = nn.Linear(spec.hidden, spec.qkv_width, bias=expert.qkv_bias)
        self.dense = nn.Linear(attention_width, spec.hidden, bias=False)
        self.gate_up = nn.Linear(spec.hidden, 2 * spec.mlp_width, bias=False)
        self.down = nn.Linear(spec.mlp_width, spec.hidden, bias=False)


@dataclass
class LayerCache:
    """Keys (after rotation) and values of one layer, [batch, kv_heads, past, head_dim]; empty before the prefill."""

    key: Tensor | None = None
    value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append positions and return all."""
        self.key = key if self.key is None else torch.cat((self.key, key), 2)
        self.value = value if self.value is None else torch.cat((self.value, value), 2)
        return self.key, self.value


@dataclass
class Cache:
    """The KV cache of all layers."""

    layers: list[LayerCache] = field(default_factory=list)

    @classmethod
    def empty(cls, num_layers: int) -> "Cache":
        """A cache before the prefill."""
        return cls([LayerCache() for _ in range(num_layers)])


@dataclass(frozen=True)
class Step:
    """Data shared by all layers of one forward pass.

    cos, sin [batch, seq, pairs] float32. vision_mask bool [batch, seq], None if no token uses the vision expert.
    attention_mask bool [batch, 1, seq, past + seq], True where a query may look.
    """

    cos: Tensor
    sin: Tensor
    vision_mask: Tensor | None
    attention_mask: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec) -> Tensor:
    """Turn the pairs of `rope`. x [batch, heads, seq, head_dim]; computed in float32."""
    turned, rest = x[..., : rope.dims].float(), x[..., rope.dims :]
    is_adjacent = rope.pairing == "adjacent"
    first, second = (turned[..., 0::2], turned[..., 1::2]) if is_adjacent else turned.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pairs, -1).flatten(-2) if is_adjacent else torch.cat(pairs, -1)
    return torch.cat((joined.to(x.dtype), rest), -1)


class CausalAttention(RowMixer):
    """Attention of new positions to the cache and themselves, from packed queries, keys and values."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec

    @override
    def shape(self, rows: int, width: int) -> tuple[int, int]:
        return rows, self.spec.num_heads * self.spec.head_dim

    def forward(self, qkv: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """[batch, seq, qkv] -> [batch, seq, heads * head_dim]; appends to the cache."""
        spec = self.spec
        heads = qkv.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), 1)
        q, k = (rotate(part, step.cos, step.sin, spec.rope) for part in (q, k))
        key, value = cache.append(k, v)
        mixed = F.scaled_dot_product_attention(q, key, value, attn_mask=step.attention_mask, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)


class LayerWiring:
    """The wiring of a decoder layer: pre-norm attention and MLP, each row multiplied by its expert's matrices.

    Shared by the reference (tensors), calibration (rows on disk) and training (language and vision rows apart), which
    define the parts for their kind of rows.
    """

    attention_norm: Any
    attention: Any
    mlp_norm: Any
    gate: Any

    def forward(self, x: Any, step: Any, cache: Any) -> Any:
        """[batch, seq, hidden] -> the same shape; appends to the cache."""
        return self.mlp_half(self.attention_half(x, step, cache), step)

    def attention_half(self, x: Any, step: Any, cache: Any) -> Any:
        """The residual stream after attention, [batch, seq, hidden]; appends to the cache."""
        qkv = self.routed("qkv", self.attention_norm(x), step)
        return x + self.routed("dense", self.attention(qkv, step, cache), step)

    def mlp_half(self, x: Any, step: Any) -> Any:
        """The residual stream after the MLP, [batch, seq, hidden]."""
        gated = self.gate(self.routed("gate_up", self.mlp_norm(x), step))
        return x + self.routed("down", gated, step)

    def routed(self, name: str, x: Any, step: Any) -> Any:
        """Multiply each row by its expert's matrix of that name: [batch, seq, in] -> [batch, seq, out]."""
        raise NotImplementedError


class LayerParts(LayerWiring, nn.Module):
    """The modules of a layer, with parameter names as in the spec."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(spec.hidden, spec.norm_eps)
        self.attention = CausalAttention(spec)
        self.mlp_norm = RmsNorm(spec.hidden, spec.norm_eps)
        self.gate = SiluGate()
        self.expert_names = tuple(expert.name for expert in spec.experts)
        for expert in spec.experts:
            self.add_module(expert.name, Expert(spec, expert))


class DecoderLayer(LayerParts):
    """A layer of the reference: select rows by the mask, multiply, and put them back."""

    def routed(self, name: str, x: Tensor, step: Step) -> Tensor:
        """The vision expert's matrix where the mask is True, the language expert's elsewhere."""
        language = self.get_submodule(f"language.{name}")
        if step.vision_mask is None:
            return language(x)
        vision = self.get_submodule(f"vision.{name}")
        text_rows = language(x[~step.vision_mask])
        image_rows = vision(x[step.vision_mask])
        result = text_rows.new_empty(*x.shape[:2], text_rows.shape[-1])
        result[~step.vision_mask] = text_rows
        result[step.vision_mask] = image_rows
        return result


class Decoder(nn.Module):
    """All layers and the final norm. The embedding and the head belong to the whole model."""

    inv_freq: Tensor

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_layers))
        self.norm = RmsNorm(spec.hidden, spec.norm_eps)
        self.register_buffer("inv_freq", default_inv_freq(spec))

    def step(self, position_ids: Tensor, vision_mask: Tensor | None, attention_mask: Tensor) -> Step:
        """Prepare a Step. position_ids int64 [batch, seq]; angles are float32 in any model dtype."""
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq.float()
        routed = vision_mask if vision_mask is not None and bool(vision_mask.any()) else None
        return Step(angles.cos(), angles.sin(), routed, attention_mask)

    def forward(self, x: Tensor, step: Step, cache: Cache) -> Tensor:
        """Rows [batch, seq, hidden] -> normed hidden states, the same shape; appends to the cache."""
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, step, layer_cache)
        return self.norm(x)


def default_inv_freq(spec: DecoderSpec) -> Tensor:
    """Rotary frequencies of all pairs, float32, for checkpoints that do not store them."""
    dims = spec.rope.dims
    return spec.rope.base ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)


def causal_mask(attention_mask: Tensor, past: int = 0) -> Tensor:
    """The attention mask, bool [batch, 1, seq, past + seq], from a padding mask [batch, past + seq].

    Causal by index, not by position id. A padded query sees itself, so its unused output stays finite.
    """
    total = attention_mask.shape[1]
    index = torch.arange(total, device=attention_mask.device)
    causal = index[None, :] <= index[past:, None]
    itself = index[None, :] == index[past:, None]
    return (causal & (attention_mask[:, None, None, :].bool() | itself)) if past < total else causal
