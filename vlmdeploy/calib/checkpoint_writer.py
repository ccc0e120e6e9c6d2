"""Write the quantized checkpoint: the source's layout and tensor names with GPTQ tensors for quantized weights, both
config files, tokenizer, licences and the report."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import vlmdeploy
from vlmdeploy.artifact import staged_folder
from vlmdeploy.calib.state import Records, shard_name
from vlmdeploy.errors import ConfigError
from vlmdeploy.model.checkpoint import LICENCE_PATTERNS, Checkpoint
from vlmdeploy.model.shards import INDEX_NAME, SINGLE_NAME
from vlmdeploy.model.tensor_file import save_tensors
from vlmdeploy.quant.gptq_config import CONFIG_NAME, GptqConfig, ModuleGrid, config_json, dynamic_overrides
from vlmdeploy.quant.gptq_format import encode_linear
from vlmdeploy.quant.grid import Quantized
from vlmdeploy.quant.precision import PrecisionPlan
from vlmdeploy.quant.quantization_report import REPORT_NAME, read_report
from vlmdeploy.spec.matrices import matrices
from vlmdeploy.spec.weight_rules import WeightRule

ONE_FILE_BYTES = 1 << 30  # up to here one file, beyond it one shard per unit
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    *LICENCE_PATTERNS,
)  # fmt: skip


def unit_tensors(
    checkpoint: Checkpoint, unit: str, units: list[str], encoded: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Every tensor of a unit under its published name: GPTQ tensors if quantized, else as stored. Ignored ones are the
    last unit's."""
    tensors = {name: checkpoint.raw(name) for name in checkpoint.ignored if unit == units[-1]}
    for rule in checkpoint.rules.values():
        if _unit_of(rule, units) != unit:
            continue
        if rule.target in encoded:
            tensors |= encoded[rule.target]
        else:
            tensors |= {source.name: checkpoint.raw(source.name) for source in checkpoint.present(rule)}
    return tensors


def _unit_of(rule: WeightRule, units: list[str]) -> str:
    """The unit whose shard stores a parameter. Parameters outside every unit go to a neighbouring one."""
    for unit in units:
        if rule.target.startswith(f"{unit}."):
            return unit
    return {"vision": "vision.embed", "embedding": "prompts"}.get(rule.part, "head")


def encoded_parameter(rule: WeightRule, codes: Quantized) -> dict[str, Tensor]:
    """GPTQ tensors of a parameter, its rows split among the checkpoint's own linears."""
    tensors, start = {}, 0
    for source in rule.sources:
        rows = slice(start, start + source.shape[0])
        zeros = None if codes.zeros is None else codes.zeros[rows]
        part = Quantized(codes.codes[rows], codes.scales[rows], codes.grid, zeros)
        module = source.name.removesuffix(".weight")
        for name, values in encode_linear(part, module).items():
            tensors[f"{module}.{name}"] = torch.from_numpy(np.ascontiguousarray(values))
        start = rows.stop
    return tensors


def is_quantized_by_us(out: Path) -> bool:
    """Whether `vlmdeploy quantize` wrote a folder, i.e. it holds a valid report."""
    try:
        return bool(read_report(out))
    except ConfigError:
        return False


def publish(
    checkpoint: Checkpoint,
    plan: PrecisionPlan,
    records: Records,
    report: dict[str, Any],
    partial: Path,
    out: Path,
    force: bool,
) -> None:
    """Assemble the finished shards from `partial` and publish them as `out`."""
    with staged_folder(out, force, is_quantized_by_us) as folder:
        _write_shards(records, partial, folder)
        quantization = config_json(quantization_config(checkpoint, plan, report))
        config = {**checkpoint.config, "quantization_config": quantization}
        _write_json(folder / "config.json", config)
        _write_json(folder / CONFIG_NAME, quantization)
        _write_json(folder / REPORT_NAME, report)
        checkpoint.copy_files(COPIED, folder)


def quantization_config(checkpoint: Checkpoint, plan: PrecisionPlan, report: dict[str, Any]) -> GptqConfig:
    """The GPTQ config: the commonest grid as the default, and regex overrides for all other linears."""
    modules = []
    for linear in matrices(checkpoint.spec):
        for source in checkpoint.rules[linear.target].sources:
            modules.append(ModuleGrid(source.name.removesuffix(".weight"), linear.in_width, plan[linear.target].grid))
    damping = [linear["damping"] for linear in report["linears"] if linear["damping"] is not None]
    provenance = {
        "meta": {
            "quantizer": [f"vlmdeploy:{vlmdeploy.__version__}"],
            "negative_scales": any(linear["negative_scales"] for linear in report["linears"]),
        },
        "damp_percent": max(set(damping), key=damping.count) if damping else 0.01,
        "static_groups": True,
        "true_sequential": True,
    }
    return dynamic_overrides(modules, provenance)


def _write_shards(records: Records, partial: Path, folder: Path) -> None:
    names = [shard_name(unit) for unit, record in records.items() if shard_name(unit) in record.files]
    total = sum((partial / name).stat().st_size for name in names)
    if total <= ONE_FILE_BYTES:
        tensors: dict[str, Tensor] = {}
        for name in names:
            with safe_open(partial / name, framework="pt") as shard:
                tensors |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118  # not a dict
        save_tensors(tensors, folder / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    size = 0
    for number, name in enumerate(names, 1):
        file = f"model-{number:05}-of-{len(names):05}.safetensors"
        with safe_open(partial / name, framework="pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), file)
        size += (partial / name).stat().st_size
        shutil.copyfile(partial / name, folder / file)
    _write_json(folder / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_json(path: Path, content: Any) -> None:
    """Write readable UTF-8. Lone surrogates, which come from file names that are not UTF-8, become JSON escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
