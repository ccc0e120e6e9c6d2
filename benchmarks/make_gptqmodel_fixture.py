"""Writes tests/golden/gptqmodel-tiny: tiny random Llama checkpoints that GPTQModel quantized, packed and saved, and the
values that its own kernel reads back. Runs in the environment of `make gptqmodel` and imports nothing of vlmdeploy:

    GPTQMODEL_CPU_WORKERS=2 .venv-gptqmodel/bin/python benchmarks/make_gptqmodel_fixture.py tests/golden/gptqmodel-tiny
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32
SAMPLES, SAMPLE_TOKENS = 64, 64
WEIGHTS_OF = ("q_proj", "k_proj", "gate_proj", "down_proj")  # of the others only codes, to keep the folder small
KEPT = ("config.json", "quantize_config.json", "model.safetensors")

# Folder -> how many layers, and the settings of GPTQModel.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "symmetric": (
        2,
        {
            "dynamic": {
                r".*\.mlp\.gate_proj": {"bits": 3},
                r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": 16},
                r".*\.mlp\.down_proj": {"group_size": 16},
                r".*\.self_attn\.k_proj": {"group_size": 64},
                r"-:.*\.0\.self_attn\.o_proj": {},
            }
        },
    ),
    "asymmetric": (1, {"sym": False, "dynamic": {r".*\.gate_proj": {"bits": 3}, r".*\.down_proj": {"bits": 8}}}),
    "asymmetric-v2": (1, {"sym": False, "format": "gptq_v2", "dynamic": {r".*\.gate_proj": {"bits": 3}}}),
    "act-order": (1, {"desc_act": True, "act_group_aware": False}),
}


def main() -> None:
    out = Path(sys.argv[1])
    for case, (num_layers, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            source, saved = Path(scratch, "source"), Path(scratch, "saved")
            write_source(source, num_layers)
            quantize(source, saved, QuantizeConfig(bits=4, group_size=32, offload_to_disk=False, **settings))
            (out / case).mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copyfile(saved / name, out / case / name)
            np.savez_compressed(out / case / "expected.npz", **read_back(saved))  # type: ignore[arg-type]


def write_source(folder: Path, num_layers: int) -> None:
    """A random decoder; half the rows of its first query matrix are positive, so their asymmetric zero points are 0."""
    torch.manual_seed(num_layers)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=num_layers, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=VOCABULARY, max_position_embeddings=SAMPLE_TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float16)
    model.model.layers[0].self_attn.q_proj.weight.data[::2].abs_()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1", pad_token="2").save_pretrained(folder)


def quantize(source: Path, saved: Path, config: Any) -> None:
    random = np.random.default_rng(0)
    samples = [random.integers(0, VOCABULARY, SAMPLE_TOKENS).tolist() for _ in range(SAMPLES)]
    model = GPTQModel.load(str(source), config)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], batch_size=1)
    model.save(str(saved))


def read_back(folder: Path) -> dict[str, np.ndarray]:
    """GPTQModel's fp16 weights (of some linears), codes [out, in] and zero points [out, groups]."""
    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    found: dict[str, np.ndarray] = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight"):
            if name.endswith(WEIGHTS_OF):
                found[f"{name}.weight"] = module.dequantize_weight().T.to(torch.float16).numpy()
            module.scales.fill_(1)
            qzeros = module.qzeros.clone()
            module.qzeros.zero_()
            found[f"{name}.codes"] = module.dequantize_weight().T.to(torch.uint8).numpy()
            module.qzeros.copy_(qzeros)
            module.qweight.zero_()
            zeros = -module.dequantize_weight().T  # one for each input
            first_of_group = [int((module.g_idx == group).nonzero()[0]) for group in range(len(module.scales))]
            found[f"{name}.zeros"] = zeros[:, first_of_group].to(torch.uint8).numpy()
    return found


if __name__ == "__main__":
    main()
