"""Tiny checkpoints whose decoder linears are GPTQ codes, as another library could have written them: rounded to
nearest, format v1, packed by the bit loop of tests/reference/gptq_format.py.

folder = write_gptq_checkpoint(tmp_path / "ckpt", bits=2, edit=lambda tensors: tensors.pop(f"{DOWN}.g_idx"))
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from tests.reference import gptq_format as reference
from tests.tiny_bundle import TEXT_MODEL, byte_tokenizer
from tests.tiny_checkpoint import TinyCheckpoint
from vlmdeploy.quant.grid import Grid, Quantized, quantize_rtn

DOWN = "model.layers.0.mlp.language_mlp.down_proj"
Tensors = dict[str, Tensor]


def write_gptq_checkpoint(
    folder: Path,
    bits: int = 4,
    group_size: int = 16,
    edit: Callable[[Tensors], Any] = lambda tensors: None,
    config: dict[str, Any] | None = None,
    **sizes: Any,
) -> Path:
    """Write it and return its folder. `edit` changes the tensors in place, `config` keys of the GPTQ config, `sizes`
    fields of TinyCheckpoint."""
    tiny = TinyCheckpoint(**TEXT_MODEL | {"layers": 1, "vision_layers": 1} | sizes)
    tensors: Tensors = {}
    for name, values in tiny.tensors().items():
        if name.startswith("model.layers.") and values.ndim == 2:
            tensors |= gptq_tensors(name.removesuffix(".weight"), values, bits, group_size)
        else:
            tensors[name] = torch.from_numpy(values)
    edit(tensors)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True} | (config or {})
    (folder / "config.json").write_text(json.dumps(tiny.config() | {"quantization_config": quantization}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def quantized_matrix(grid: Grid, num_out: int = 64, num_in: int = 128) -> Quantized:
    """Random codes over the whole range, scales and zero points."""
    random = np.random.default_rng(grid.bits * 1000 + grid.group_size)
    groups = num_in // grid.group_size
    scales = random.uniform(0.01, 0.1, (num_out, groups)).astype(np.float16).astype(np.float32)
    codes = random.integers(0, grid.max_code + 1, (num_out, num_in)).astype(np.uint8)
    zeros = random.integers(1, grid.max_code + 1, (num_out, groups)).astype(np.uint8)
    return Quantized(codes, scales, grid, None if grid.symmetric else zeros)


def gptq_tensors(module: str, weight: NDArray[np.float32], bits: int, group_size: int) -> Tensors:
    """The four tensors of a symmetric linear; group size -1: one group."""
    width = weight.shape[1]
    grid = Grid(bits, width if group_size == -1 else group_size)
    rounded = quantize_rtn(weight, grid)
    zeros = np.full(len(weight), grid.zero_point - 1)
    parts = {
        "qweight": np.stack([reference.pack(row, bits) for row in rounded.codes], 1),
        "qzeros": np.stack([reference.pack(zeros, bits)] * rounded.scales.shape[1]),
        "scales": rounded.scales.T.astype(np.float16),
        "g_idx": (np.arange(width) // grid.group_size).astype(np.int32),
    }
    return {f"{module}.{part}": torch.from_numpy(np.ascontiguousarray(values)) for part, values in parts.items()}
