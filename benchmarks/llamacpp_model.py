"""A CogVLM checkpoint as llama.cpp's two files: the decoder and the encoder with its connector, both in f16.

llama.cpp's own converter drops the image experts of a CogVLM and asks for a value that its config.json lacks (commit
0c1e5709), so the files are written here, with the names and metadata that its loader reads.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from vlmdeploy.families.cogvlm import CLIP_MEAN, CLIP_STD
from vlmdeploy.records import Config

F16 = gguf.LlamaFileType.MOSTLY_F16


def write_gguf(checkpoint: Path, vocabulary: Path, decoder: Path, encoder: Path) -> None:
    """Write both files; `vocabulary` is a GGUF of llama.cpp whose tokenizer has the checkpoint's number of pieces."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(decoder, "cogvlm")
    add_decoder_metadata(writer, config)
    copy_tokenizer(writer, vocabulary)
    write_tensors(writer, checkpoint, gguf.MODEL_ARCH.COGVLM, config["num_hidden_layers"], image=False)
    writer = gguf.GGUFWriter(encoder, "clip")
    add_encoder_metadata(writer, config)
    write_tensors(writer, checkpoint, gguf.MODEL_ARCH.MMPROJ, config["vision_config"]["num_hidden_layers"], image=True)


def add_decoder_metadata(writer: gguf.GGUFWriter, config: Config) -> None:
    heads = config["num_attention_heads"]
    writer.add_file_type(F16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)


def add_encoder_metadata(writer: gguf.GGUFWriter, config: Config) -> None:
    vision = config["vision_config"]
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.COGVLM)
    writer.add_vision_projection_dim(config["hidden_size"])
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_image_mean(CLIP_MEAN)
    writer.add_vision_image_std(CLIP_STD)


def copy_tokenizer(writer: gguf.GGUFWriter, vocabulary: Path) -> None:
    for name, found in gguf.GGUFReader(vocabulary).fields.items():
        if name.startswith("tokenizer."):
            kinds: list[Any] = list(found.types)
            writer.add_key_value(name, found.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)


def write_tensors(writer: gguf.GGUFWriter, checkpoint: Path, arch: gguf.MODEL_ARCH, layers: int, image: bool) -> None:
    """Tensors of one side: matrices in f16, all else in f32, as llama.cpp's converter keeps them."""
    names = gguf.get_tensor_name_map(arch, layers)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    for source, file in index.items():
        if source.startswith("model.vision.") != image or source.endswith("inv_freq"):
            continue
        name = names.get_name(source, (".weight", ".bias"))
        if name is None:
            raise SystemExit(f"{checkpoint}: tensor {source} has no name in llama.cpp")
        with safe_open(checkpoint / file, "pt") as tensors:
            values = tensors.get_tensor(source).to(torch.float32).numpy()
        matrix = values.ndim > 1 and name.endswith(".weight") and "position_embd" not in name
        writer.add_tensor(name, values.astype(np.float16) if matrix else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
