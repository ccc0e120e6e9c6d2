"""CogVLM2 (llama3-chat-19B, English and Chinese): CogVLM with a 2 x 2 convolution before the connector, grouped KV
heads, a bias on the vision expert's QKV and Llama-3's vocabulary.

The number of KV heads and the rotary base are constants of the authors' code, not in the published config.json.
"""

from dataclasses import replace

from vlmdeploy.families.cogvlm import (
    ARCHITECTURE,
    COGVLM2_TOKENS,
    KV_HEADS_KEY,
    VISION_CONFIG,
    build_spec,
    is_cogvlm,
    is_cogvlm2,
    read_decoder,
    weights,
)
from vlmdeploy.families.config import ConfigReader
from vlmdeploy.manifest import TokenRules
from vlmdeploy.records import Config
from vlmdeploy.spec.decoder import ExpertSpec
from vlmdeploy.spec.model import ModelSpec

__all__ = ["IGNORED", "NAME", "RELEASED", "detect", "nearest", "spec", "weights"]

NAME = "cogvlm2"
IGNORED = ()
ROPE_BASE = 500000.0
NUM_KV_HEADS = 8
RELEASED: Config = {  # llama3-chat-19B, English and Chinese
    "architectures": [ARCHITECTURE], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "template_version": "chat", "bos_token_id": 128000, "pad_token_id": 128002,
    "eos_token_id": [128001, 128009], "vision_config": VISION_CONFIG | {"image_size": 1344, "num_positions": 9217},
}  # fmt: skip


def detect(config: Config, tensor_names: frozenset[str] | None) -> bool:
    """The CogVLM architecture string and the downsampling convolution."""
    return is_cogvlm(config) and is_cogvlm2(config, tensor_names) is not False


def nearest(config: Config) -> None:
    """CogVLM names what is near to both."""


def spec(config: Config, generation_config: Config) -> ModelSpec:
    """Geometry and rules of a CogVLM2 checkpoint."""
    reader = ConfigReader(config)
    experts = (ExpertSpec("language"), ExpertSpec("vision", qkv_bias=True))
    num_kv_heads = reader.count(KV_HEADS_KEY, NUM_KV_HEADS)
    decoder = read_decoder(reader, num_kv_heads, ROPE_BASE, experts)
    whole = build_spec(NAME, reader, generation_config, decoder, downsample=True, defaults=COGVLM2_TOKENS)
    return replace(whole, tokens=_with_end_of_turn(whole.tokens))


def _with_end_of_turn(tokens: TokenRules) -> TokenRules:
    """Early uploads list only end_of_text as a stop id; the model also ends with eot_id."""
    if tokens.stop_ids == COGVLM2_TOKENS.stop_ids[:1]:
        return replace(tokens, stop_ids=COGVLM2_TOKENS.stop_ids)
    return tokens
