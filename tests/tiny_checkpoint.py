"""Random checkpoints of any small size, in the published layout: config.json and safetensors with the real names.

    folder = write_tiny_checkpoint(tmp_path, "cogvlm2", hidden=40, heads=2, kv_heads=1)

or, to change something first, `tiny = TinyCheckpoint("cogvlm2", hidden=40)`, then `tiny.config()`, `tiny.tensors()` and
`write_checkpoint`. Names and shapes are written out here a second time on purpose: the families' tables are under test.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

Array = NDArray[np.float32]
Tensors = dict[str, Array]
StoredDtype = Literal["float32", "float16", "bfloat16"]
ROPE_BASE = {"cogvlm": 10000.0, "cogvlm2": 500000.0}
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TinyCheckpoint:
    """Family, sizes and seed of a random checkpoint. Equal values give equal tensors."""

    family: str = "cogvlm"
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2  # cogvlm has as many as heads, whatever stands here
    mlp: int = 48
    layers: int = 2
    vocab: int = 48
    context_tokens: int = 128
    image_px: int = 8
    patch_px: int = 2
    vision_width: int = 16
    vision_heads: int = 2
    vision_mlp: int = 24
    vision_layers: int = 2
    stores_inv_freq: bool = True
    seed: int = 0

    @property
    def downsamples(self) -> bool:
        return self.family == "cogvlm2"

    @property
    def rows_per_image(self) -> int:
        """Decoder rows of one image, the two markers included."""
        grid = self.image_px // self.patch_px
        return (grid // 2 if self.downsamples else grid) ** 2 + 2

    @property
    def bos_id(self) -> int:
        return self.vocab - 4 if self.downsamples else 1

    @property
    def pad_id(self) -> int:
        """The pad id, which also holds the places of an image."""
        return self.vocab - 2 if self.downsamples else 0

    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        own: dict[str, Any] = {"num_multi_query_heads": self.kv_heads} if self.downsamples else {}
        return own | {
            "architectures": ["CogVLMForCausalLM"],
            "bos_token_id": self.bos_id,
            "eos_token_id": [self.vocab - 3, self.vocab - 1] if self.downsamples else 2,
            "pad_token_id": self.pad_id,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "max_position_embeddings": self.context_tokens,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "rms_norm_eps": 1e-05,
            "template_version": "chat",
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
            "vision_config": {
                "hidden_act": "gelu",
                "hidden_size": self.vision_width,
                "image_size": self.image_px,
                "in_channels": 3,
                "intermediate_size": self.vision_mlp,
                "layer_norm_eps": 1e-06,
                "num_heads": self.vision_heads,
                "num_hidden_layers": self.vision_layers,
                "num_positions": (self.image_px // self.patch_px) ** 2 + 1,
                "patch_size": self.patch_px,
            },
        }

    def tensors(self) -> Tensors:
        """Every tensor of the checkpoint, float32, in a fixed order."""
        random = np.random.default_rng(self.seed)
        drawn = {name: _draw(random, name, shape) for name, shape in self.shapes().items()}
        if self.stores_inv_freq:
            head_dim = self.hidden // self.heads
            inv_freq = ROPE_BASE[self.family] ** -(np.arange(0, head_dim, 2) / head_dim)
            drawn |= {INV_FREQ.format(index): inv_freq.astype(np.float32) for index in range(self.layers)}
        return drawn

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the random tensors: all but the rotary frequencies."""
        return {**self._vision_shapes(), **self._connector_shapes(), **self._decoder_shapes()}

    def _vision_shapes(self) -> dict[str, tuple[int, ...]]:
        width, mlp, root = self.vision_width, self.vision_mlp, "model.vision"
        shapes: dict[str, tuple[int, ...]] = {
            f"{root}.patch_embedding.cls_embedding": (1, width),
            f"{root}.patch_embedding.proj.weight": (width, 3, self.patch_px, self.patch_px),
            f"{root}.patch_embedding.proj.bias": (width,),
            f"{root}.patch_embedding.position_embedding.weight": ((self.image_px // self.patch_px) ** 2 + 1, width),
        }
        for index in range(self.vision_layers):
            layer = f"{root}.transformer.layers.{index}"
            shapes |= _linear(f"{layer}.attention.query_key_value", 3 * width, width, bias=True)
            shapes |= _linear(f"{layer}.attention.dense", width, width, bias=True)
            shapes |= _linear(f"{layer}.mlp.fc1", mlp, width, bias=True)
            shapes |= _linear(f"{layer}.mlp.fc2", width, mlp, bias=True)
            shapes |= _norm(f"{layer}.input_layernorm", width) | _norm(f"{layer}.post_attention_layernorm", width)
        return shapes

    def _connector_shapes(self) -> dict[str, tuple[int, ...]]:
        width, hidden, root = self.vision_width, self.hidden, "model.vision"
        conv = {f"{root}.conv.weight": (width, width, 2, 2), f"{root}.conv.bias": (width,)}
        return {
            **(conv if self.downsamples else {}),
            f"{root}.boi": (1, 1, hidden),
            f"{root}.eoi": (1, 1, hidden),
            **_linear(f"{root}.linear_proj.linear_proj", hidden, width),
            **_norm(f"{root}.linear_proj.norm1", hidden),
            **_linear(f"{root}.linear_proj.gate_proj", self.mlp, hidden),
            **_linear(f"{root}.linear_proj.dense_h_to_4h", self.mlp, hidden),
            **_linear(f"{root}.linear_proj.dense_4h_to_h", hidden, self.mlp),
        }

    def _decoder_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, kv_heads = self.hidden, self.kv_heads if self.downsamples else self.heads
        qkv = hidden + 2 * kv_heads * (hidden // self.heads)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab, hidden),
        }
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            for expert in ("language", "vision"):
                bias = self.downsamples and expert == "vision"
                shapes |= _linear(f"{layer}.self_attn.{expert}_expert_query_key_value", qkv, hidden, bias=bias)
                shapes |= _linear(f"{layer}.self_attn.{expert}_expert_dense", hidden, hidden)
                shapes |= _linear(f"{layer}.mlp.{expert}_mlp.gate_proj", self.mlp, hidden)
                shapes |= _linear(f"{layer}.mlp.{expert}_mlp.up_proj", self.mlp, hidden)
                shapes |= _linear(f"{layer}.mlp.{expert}_mlp.down_proj", hidden, self.mlp)
        return shapes

    def prompt(self, text_ids: list[int], with_image: bool) -> list[int]:
        """BOS, the places of the image, the text."""
        places = [self.pad_id] * self.rows_per_image if with_image else []
        return [self.bos_id, *places, *text_ids]

    def pixels(self, num_images: int = 1) -> Array:
        """Random prepared pictures, [images, 3, S, S]."""
        random = np.random.default_rng(self.seed + 1)
        return random.standard_normal((num_images, 3, self.image_px, self.image_px)).astype(np.float32)


def write_tiny_checkpoint(
    folder: Path, family: str = "cogvlm", *, dtype: StoredDtype = "float32", num_shards: int = 1, **overrides: Any
) -> Path:
    """Write a random checkpoint and return its folder. `overrides` are fields of TinyCheckpoint."""
    tiny = TinyCheckpoint(family, **overrides)
    return write_checkpoint(folder, tiny.config(), tiny.tensors(), dtype=dtype, num_shards=num_shards)


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: Tensors, *, dtype: StoredDtype = "float32", num_shards: int = 1
) -> Path:
    """Write config.json and the tensors: one model.safetensors, or several shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    stored = {name: torch.tensor(values, dtype=getattr(torch, dtype)) for name, values in tensors.items()}
    if num_shards == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    files = [f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(1, num_shards + 1)]
    file_of = {name: files[index % num_shards] for index, name in enumerate(stored)}
    for file in files:
        save_file({name: values for name, values in stored.items() if file_of[name] == file}, folder / file)
    total = sum(values.nbytes for values in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1))
    return folder


def _linear(name: str, num_out: int, num_in: int, *, bias: bool = False) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (num_out, num_in), **({f"{name}.bias": (num_out,)} if bias else {})}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _draw(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Values that keep activations near 1, and far enough from 0 and 1 that forgetting a tensor shows."""
    values = random.standard_normal(shape)
    if len(shape) == 1:
        values = 0.3 * values + (1.0 if name.endswith("norm.weight") or name.endswith("norm1.weight") else 0.0)
    elif not name.endswith(("embed_tokens.weight", "boi", "eoi")):
        values *= np.prod(shape[1:]) ** -0.5
    return values.astype(np.float32)
