"""CogVLM and CogVLM2 in float64 numpy, slow and plain: one picture, one prompt, token by token and head by head.

Written from the description of the model (docs/families/cogvlm.md), with the tensor and config names of the published
checkpoints and without a line of vlmdeploy. `Trace` keys are those of the golden vectors; see tests/golden/README.md.
There is no cache: every new token runs the whole sequence again.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.layout import position_ids, vision_expert_mask

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Trace = dict[str, NDArray[Any]]
ROPE_BASE = {"cogvlm": 10000.0, "cogvlm2": 500000.0}
erf = np.vectorize(math.erf)


class ReferenceModel:
    """Config and tensors as they stand in the checkpoint; `family` is "cogvlm" or "cogvlm2"."""

    def __init__(self, family: str, config: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
        self.config = config
        self.vision = config["vision_config"]
        self.tensors = {name: values.astype(np.float64) for name, values in tensors.items()}
        self.heads = config["num_attention_heads"]
        self.head_dim = config["hidden_size"] // self.heads
        self.kv_heads = config.get("num_multi_query_heads", 8) if family == "cogvlm2" else self.heads
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        self.inv_freq = self.tensors.get(
            "model.layers.0.self_attn.rotary_emb.inv_freq", ROPE_BASE[family] ** -exponents
        )

    def forward(self, ids: Ints, types: Ints, mask: Ints, pixels: Array | None) -> Trace:
        """Everything that one prompt gives: ids, types, mask [seq]; pixels [3, S, S], or None for text only."""
        trace: Trace = {
            "position_ids": np.array(position_ids(types.tolist(), mask.tolist())),
            "vision_expert_mask": np.array(vision_expert_mask(types.tolist())),
        }
        x = self.tensors["model.embed_tokens.weight"][ids]
        if pixels is not None:
            x[types == 1] = self.image_features(pixels, trace)
        trace["inputs_embeds"] = x
        for index in range(self.config["num_hidden_layers"]):
            x = self.layer(index, x, mask, trace)
            trace[f"llm.layer.{index}"] = x
        x = rms_norm(x, self.tensors["model.norm.weight"], self.config["rms_norm_eps"])
        trace["llm.final_norm"] = x
        trace["logits"] = x @ self.tensors["lm_head.weight"].T
        return trace

    def generate(self, ids: Ints, types: Ints, mask: Ints, pixels: Array | None, num_new: int) -> Trace:
        """The forward trace with the greedy continuation, `num_new` tokens long whatever they are."""
        trace = self.forward(ids, types, mask, pixels)
        step, positions, logits = trace, [], [trace["logits"][-1]]
        for _ in range(num_new - 1):
            ids = np.append(ids, logits[-1].argmax())
            types, mask = np.append(types, 0), np.append(mask, 1)
            step = self.forward(ids, types, mask, pixels)
            positions.append(step["position_ids"][-1])
            logits.append(step["logits"][-1])
        return trace | {
            "generated_ids": np.array([row.argmax() for row in logits]),
            "step_logits": np.array(logits),
            "decode_position_ids": np.array(positions),
        }

    def image_features(self, pixels: Array, trace: Trace) -> Array:
        """Rows of one picture, [patches + 2, hidden]."""
        x = self.encode(pixels, trace)
        if "model.vision.conv.weight" in self.tensors:
            x = trace["conv.out"] = self.downsample(x)
        root = "model.vision.linear_proj"
        x = self.linear(x, f"{root}.linear_proj")
        x = gelu(layer_norm(x, self.tensors[f"{root}.norm1.weight"], self.tensors[f"{root}.norm1.bias"], 1e-5))
        gated = silu(self.linear(x, f"{root}.gate_proj")) * self.linear(x, f"{root}.dense_h_to_4h")
        x = trace["connector.out"] = self.linear(gated, f"{root}.dense_4h_to_h")
        boi, eoi = self.tensors["model.vision.boi"][0], self.tensors["model.vision.eoi"][0]
        trace["image_features"] = np.concatenate((boi, x, eoi))
        return trace["image_features"]

    def encode(self, pixels: Array, trace: Trace) -> Array:
        """Patch features of one picture, [patches, width]."""
        root, size = "model.vision.patch_embedding", self.vision["patch_size"]
        grid = self.vision["image_size"] // size
        kernel = self.tensors[f"{root}.proj.weight"]  # [width, 3, size, size]
        rows = [self.tensors[f"{root}.cls_embedding"][0]]
        for y in range(grid):
            for x in range(grid):
                patch = pixels[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
                rows.append((kernel * patch).sum((1, 2, 3)) + self.tensors[f"{root}.proj.bias"])
        features = np.array(rows) + self.tensors[f"{root}.position_embedding.weight"]
        trace["vit.patch_embed"] = features
        for index in range(self.vision["num_hidden_layers"]):
            features = self.vision_layer(index, features)
            trace[f"vit.layer.{index}"] = features
        trace["vit.features"] = features[1:]
        return features[1:]

    def vision_layer(self, index: int, x: Array) -> Array:
        """x + norm(attention(x)), then x + norm(mlp(x))."""
        root, heads = f"model.vision.transformer.layers.{index}", self.vision["num_heads"]
        width, everywhere = x.shape[1] // heads, np.ones((len(x), len(x)), bool)
        q, k, v = np.split(self.linear(x, f"{root}.attention.query_key_value"), 3, axis=1)
        places = [slice(head * width, (head + 1) * width) for head in range(heads)]
        mixed = np.concatenate([attention(q[:, at], k[:, at], v[:, at], everywhere) for at in places], axis=1)
        x = x + self.vision_norm(self.linear(mixed, f"{root}.attention.dense"), f"{root}.input_layernorm")
        mlp = self.linear(gelu(self.linear(x, f"{root}.mlp.fc1")), f"{root}.mlp.fc2")
        return x + self.vision_norm(mlp, f"{root}.post_attention_layernorm")

    def downsample(self, x: Array) -> Array:
        """Convolution 2 x 2, stride 2, over the patch grid; an odd last row and column are lost."""
        side = math.isqrt(len(x))
        grid = x.reshape(side, side, -1)
        kernel, bias = self.tensors["model.vision.conv.weight"], self.tensors["model.vision.conv.bias"]
        rows = []
        for y in range(side // 2):
            for x_ in range(side // 2):
                block = grid[2 * y : 2 * y + 2, 2 * x_ : 2 * x_ + 2].transpose(2, 0, 1)  # [channels, 2, 2]
                rows.append((kernel * block).sum((1, 2, 3)) + bias)
        return np.array(rows)

    def layer(self, index: int, x: Array, mask: Ints, trace: Trace) -> Array:
        """One decoder layer: pre-norm attention and MLP, each token through its expert's matrices."""
        root, eps = f"model.layers.{index}", self.config["rms_norm_eps"]
        h = rms_norm(x, self.tensors[f"{root}.input_layernorm.weight"], eps)
        qkv = self.route(
            h, trace, lambda row, name: self.linear(row, f"{root}.self_attn.{name}_expert_query_key_value")
        )
        mixed = self.attend(index, qkv, mask, trace)
        x = x + self.route(mixed, trace, lambda row, name: self.linear(row, f"{root}.self_attn.{name}_expert_dense"))
        h = rms_norm(x, self.tensors[f"{root}.post_attention_layernorm.weight"], eps)
        return x + self.route(h, trace, lambda row, name: self.mlp(row, f"{root}.mlp.{name}_mlp"))

    def route(self, x: Array, trace: Trace, apply: Any) -> Array:
        """Each row through the weights of its expert."""
        names = ["vision" if vision else "language" for vision in trace["vision_expert_mask"]]
        return np.array([apply(row, name) for row, name in zip(x, names, strict=True)])

    def attend(self, index: int, qkv: Array, mask: Ints, trace: Trace) -> Array:
        """Causal attention; kv head j serves query heads j * heads / kv_heads and the following ones."""
        parts = qkv.reshape(len(qkv), -1, self.head_dim).transpose(1, 0, 2)  # [heads + 2 kv_heads, seq, head_dim]
        positions = trace["position_ids"]
        q = [rope(head, positions, self.inv_freq) for head in parts[: self.heads]]
        k = [rope(head, positions, self.inv_freq) for head in parts[self.heads : self.heads + self.kv_heads]]
        v = list(parts[self.heads + self.kv_heads :])
        trace[f"k_cache.{index}"], trace[f"v_cache.{index}"] = np.array(k), np.array(v)
        length, served = len(qkv), self.heads // self.kv_heads
        may_look = np.tri(length, dtype=bool) & (mask == 1)[None, :] | np.eye(length, dtype=bool)
        heads = [attention(q[head], k[head // served], v[head // served], may_look) for head in range(self.heads)]
        return np.concatenate(heads, axis=1)

    def mlp(self, x: Array, root: str) -> Array:
        """down(silu(gate(x)) * up(x))."""
        gated = silu(self.linear(x, f"{root}.gate_proj")) * self.linear(x, f"{root}.up_proj")
        return self.linear(gated, f"{root}.down_proj")

    def linear(self, x: Array, name: str) -> Array:
        """x @ W.T, and the bias where the checkpoint has one."""
        y: Array = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors.get(f"{name}.bias", 0.0)

    def vision_norm(self, x: Array, name: str) -> Array:
        """Layer norm of the encoder."""
        return layer_norm(
            x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], self.vision["layer_norm_eps"]
        )


def rope(x: Array, positions: Ints, inv_freq: Array) -> Array:
    """Rotate the pairs (t, t + half) of every row by position * inv_freq[t]. x [seq, head_dim]."""
    result, half = np.empty_like(x), x.shape[1] // 2
    for row, position in enumerate(positions):
        for t in range(half):
            angle = position * inv_freq[t]
            a, b = x[row, t], x[row, t + half]
            result[row, t] = a * math.cos(angle) - b * math.sin(angle)
            result[row, t + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def attention(q: Array, k: Array, v: Array, may_look: NDArray[np.bool_]) -> Array:
    """softmax(q k^T / sqrt(d)) v over the allowed places; all [seq, d], may_look bool [seq, seq]."""
    scores = np.where(may_look, q @ k.T / math.sqrt(q.shape[1]), -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    mixed: Array = weights / weights.sum(1, keepdims=True) @ v
    return mixed


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    scaled: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    return scaled


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias
    return scaled


def gelu(x: Array) -> Array:
    """The exact one, x * Phi(x)."""
    y: Array = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return y


def silu(x: Array) -> Array:
    y: Array = x / (1 + np.exp(-x))
    return y
