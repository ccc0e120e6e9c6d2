"""The training forward pass: packed rows through the reference model's modules, at training speed.

Each row is one image followed by several question-answer pairs; a pair sees BOS, the image and itself, at the positions
it would have alone. The image is at the same place in every row, so routing needs no mask: language and vision
positions are two tensors from embedding to last layer. Results equal VisionLanguageModel.forward on each pair alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.model.decoder import DecoderLayer, LayerWiring, RmsNorm
from vlmdeploy.model.products import Attention
from vlmdeploy.model.vision import VisionEncoder
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.overriding import override
from vlmdeploy.spec.decoder import DecoderSpec
from vlmdeploy.train.packing import TextRows

TEXT_POSITION = 4  # BOS 0, begin 1, every patch 2, end 3


@dataclass(frozen=True)
class Fixed:
    """Data shared by all layers of one pass.

    prefix_turns, text_turns: complex64 [1 or batch, rows, 1, head_dim / 2] of the rows before the texts, and of the
    texts. prefix_bias [prefix, prefix] and text_bias [batch, 1, chunks, chunk, 2 chunk] are added to attention scores:
    0 where a query may look, else -inf.
    """

    prefix_turns: Tensor
    text_turns: Tensor
    prefix_bias: Tensor
    text_bias: Tensor


class PlainAttention(Attention):
    """The encoder's attention as plain matrix products, with a faster backward pass on a CPU."""

    @override
    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = self.heads(qkv)
        mixed = (q * self.head_dim**-0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        return mixed.transpose(1, 2).flatten(2)


def use_plain_attention(encoder: VisionEncoder) -> None:
    """Switch an encoder's layers to PlainAttention."""
    for layer in encoder.layers:
        layer.attention = PlainAttention(encoder.spec.num_heads, encoder.spec.head_dim)


def text_states(model: VisionLanguageModel, features: Tensor, text: TextRows) -> Tensor:
    """Normed hidden states of the texts [batch, text, hidden] from patch features [batch, patches, width]."""
    rows = model.connector(features).float()
    start = model.embedding.weight[model.spec.tokens.bos_id].expand(len(rows), 1, -1)
    vision, end = rows.split((rows.shape[1] - 1, 1), 1)  # begin of image and patches; end of image
    language = torch.cat((start, end, model.embedding(text.ids)), 1)
    fixed = _fixed(model, text, rows.shape[1] + 1)
    x, layers = ByExpert(language, vision), list(model.decoder.layers)
    for index, layer in enumerate(layers):
        assert isinstance(layer, DecoderLayer), "the model is made of them"
        x = TrainingLayer(layer, is_last=index == len(layers) - 1).forward(x, fixed, None)
    return unit_rms(x.language, model.decoder.norm)


def head_logits(model: VisionLanguageModel, hidden: Tensor) -> Tensor:
    """Float32 logits [..., vocab] of what text_states gave, [..., hidden]."""
    return F.linear(hidden, model.lm_head.weight * _gain(model.decoder.norm)).float()


def _fixed(model: VisionLanguageModel, text: TextRows, prefix: int) -> Fixed:
    positions = torch.full((1, prefix), 2, device=text.ids.device)
    positions[0, :2], positions[0, -1] = torch.arange(2), 3
    bias = torch.full((prefix, prefix), -torch.inf, device=text.ids.device).triu(1)
    inv_freq = model.decoder.inv_freq
    return Fixed(_turns(inv_freq, positions), _turns(inv_freq, text.positions), bias, _text_bias(text))


def _turns(inv_freq: Tensor, positions: Tensor) -> Tensor:
    angles = positions.unsqueeze(-1).float() * inv_freq
    return torch.complex(angles.cos(), angles.sin()).unsqueeze(2)


def _text_bias(text: TextRows) -> Tensor:
    """0 on the query's own pair up to itself, else -inf. Keys are the previous and the query's own chunk."""
    own = text.pairs.unflatten(1, (-1, text.chunk_tokens))  # [batch, chunks, chunk]
    keys = torch.cat((F.pad(own, (0, 0, 1, 0), value=-2)[:, :-1], own), 2)
    at = torch.arange(2 * text.chunk_tokens, device=own.device)
    past = at <= at[text.chunk_tokens :, None]
    seen = (own.unsqueeze(-1) == keys.unsqueeze(-2)) & past
    return torch.zeros(seen.shape, device=own.device).masked_fill(~seen, -torch.inf).unsqueeze(1)


@dataclass(frozen=True)
class ByExpert:
    """The rows of each expert. language [batch, rows, width]: BOS, end of image, texts; vision [batch, rows, width]:
    begin of image and patches, None where nothing reads them any more."""

    language: Tensor
    vision: Tensor | None

    def map(self, function: Callable[[str, Tensor], Tensor]) -> "ByExpert":
        """Apply function(expert, rows) to each expert's rows."""
        vision = None if self.vision is None else function("vision", self.vision)
        return ByExpert(function("language", self.language), vision)

    def __add__(self, other: "ByExpert") -> "ByExpert":
        """Add `other`, which has only the last rows; the result has only these."""
        language = self.language[:, -other.language.shape[1] :] + other.language
        if self.vision is None or other.vision is None:
            return ByExpert(language, None)
        return ByExpert(language, self.vision + other.vision)


@dataclass(frozen=True)
class TrainingLayer(LayerWiring):
    """A model layer over rows separated by expert. The last layer returns the texts' rows only.

    The next matrix includes the gain of a norm and the scale of the scores.
    """

    layer: DecoderLayer
    is_last: bool

    def attention_norm(self, x: ByExpert) -> ByExpert:
        """The norm without its gain."""
        return x.map(lambda _, rows: unit_rms(rows, self.layer.attention_norm))

    def mlp_norm(self, x: ByExpert) -> ByExpert:
        """The norm without its gain."""
        return x.map(lambda _, rows: unit_rms(rows, self.layer.mlp_norm))

    def gate(self, x: ByExpert) -> ByExpert:
        """Gate each expert's rows."""
        return x.map(lambda _, rows: self.layer.gate(rows))

    @override
    def routed(self, name: str, x: ByExpert, step: Fixed) -> ByExpert:
        return x.map(lambda expert, rows: F.linear(rows, *self._parameters(expert, name)))

    def _parameters(self, expert: str, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        linear = self.layer.get_submodule(f"{expert}.{name}")
        assert isinstance(linear, nn.Linear), "experts are made of them"
        if name == "qkv":
            spec, weight = self.layer.attention.spec, linear.weight * _gain(self.layer.attention_norm)
            return _for_rotation(spec, weight), None if linear.bias is None else _for_rotation(spec, linear.bias)
        return linear.weight * _gain(self.layer.mlp_norm) if name == "gate_up" else linear.weight, linear.bias

    def attention(self, qkv: ByExpert, fixed: Fixed, cache: None) -> ByExpert:
        """Attention among the rows before the texts, and of the texts to those rows and their own pair."""
        spec = self.layer.attention.spec
        start, end, text = qkv.language.split((1, 1, qkv.language.shape[1] - 2), 1)
        assert qkv.vision is not None, "every layer gets vision rows"
        q, k, v = _heads(spec, torch.cat((start, qkv.vision, end), 1), fixed.prefix_turns)
        texts = _text_attention(_heads(spec, text, fixed.text_turns), k, v, fixed.text_bias)
        if self.is_last:
            return ByExpert(texts, None)
        scores = q @ k.transpose(-1, -2)
        mixed = (scores + fixed.prefix_bias.to(scores.dtype)).softmax(-1).to(v.dtype) @ v
        start, patches, end = mixed.transpose(1, 2).flatten(2).split((1, qkv.vision.shape[1], 1), 1)
        return ByExpert(torch.cat((start, end, texts), 1), patches)


def _for_rotation(spec: DecoderSpec, values: Tensor) -> Tensor:
    """Weight or bias [out, ...] of a packed projection, with scaled queries and the two channels of each rotary pair
    next to each other."""
    rotated = (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    pairs = values[:rotated].unflatten(0, (-1, 2, spec.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    queries, keys = pairs.split((spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim))
    return torch.cat((queries * spec.head_dim**-0.5, keys, values[rotated:]))


def _heads(spec: DecoderSpec, qkv: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys, values: [batch, heads, rows, head_dim] each."""
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    turned, v = qkv.unflatten(-1, (-1, spec.head_dim)).split((heads[0] + heads[1], heads[2]), 2)
    turned = torch.view_as_real(torch.view_as_complex(turned.float().unflatten(-1, (-1, 2))) * turns).flatten(-2)
    q, k = turned.to(qkv.dtype).split(heads[:2], 2)
    if heads[0] != heads[1]:
        k, v = (rows.repeat_interleave(heads[0] // heads[1], 2) for rows in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _text_attention(heads: tuple[Tensor, Tensor, Tensor], prefix_k: Tensor, prefix_v: Tensor, bias: Tensor) -> Tensor:
    """Attention of the texts to the prefix and to their own pair, [batch, text, heads * head_dim]."""
    q, k, v = heads
    chunk = bias.shape[-2]
    own = q.unflatten(2, (-1, chunk)) @ _with_previous(k, chunk).transpose(-1, -2)
    image = q @ prefix_k.transpose(-1, -2)
    scores = torch.cat((image, (own + bias.to(own.dtype)).flatten(2, 3)), -1)
    image_shares, own_shares = scores.softmax(-1).to(v.dtype).split((image.shape[-1], 2 * chunk), -1)
    mixed = own_shares.unflatten(2, (-1, chunk)) @ _with_previous(v, chunk)
    return (image_shares @ prefix_v + mixed.flatten(2, 3)).transpose(1, 2).flatten(2)


def _with_previous(rows: Tensor, chunk: int) -> Tensor:
    """[batch, heads, text, head_dim] -> [batch, heads, chunks, 2 chunk, head_dim]: each chunk after the one before."""
    own = rows.unflatten(2, (-1, chunk))
    return torch.cat((F.pad(own[:, :, :-1], (0, 0, 0, 0, 1, 0)), own), 3)


def _gain(norm: nn.Module) -> Tensor:
    assert isinstance(norm, RmsNorm)
    return norm.weight


def unit_rms(x: Tensor, norm: nn.Module) -> Tensor:
    """x / sqrt(mean(x^2) + eps): an RmsNorm without its gain, which belongs into the next weight."""
    assert isinstance(norm, RmsNorm)
    result: Tensor = _UnitRms.apply(x, norm.eps)
    return result


class _UnitRms(torch.autograd.Function):
    """Fewer passes over memory than separate operators, which on a CPU cost more than the matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(length.square() / x.shape[-1] + eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, scale = ctx.saved_tensors
        along = (grad * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(scale), None
