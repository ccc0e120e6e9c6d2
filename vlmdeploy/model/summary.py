"""Summarize a checkpoint from its config and tensor headers."""

from math import prod
from pathlib import Path
from typing import Any

from vlmdeploy.model.checkpoint import Checkpoint

PARTS = ("vision", "connector", "embedding", "decoder", "lm_head")


def checkpoint_summary(folder: Path, follow_links: bool = False) -> dict[str, Any]:
    """Family, geometry and parameter counts by part. Raises ConfigError and WeightsError."""
    checkpoint = Checkpoint(folder, follow_links)
    spec = checkpoint.spec
    parameters = dict.fromkeys(PARTS, 0)
    for target, rule in checkpoint.rules.items():
        if target != "decoder.inv_freq":
            parameters[rule.part] += prod(rule.shape)
    summary = {
        "family": spec.family,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "image_px": spec.image.size_px,
        "tokens_per_image": spec.tokens.rows_per_image,
        "vision_layers": spec.vision.num_layers,
        "decoder_layers": spec.decoder.num_layers,
        "experts": [expert.name for expert in spec.decoder.experts],
        "heads": spec.decoder.num_heads,
        "kv_heads": spec.decoder.num_kv_heads,
        "head_dim": spec.decoder.head_dim,
        "vocab_size": spec.decoder.vocab_size,
        "context_tokens": spec.decoder.context_tokens,
        "stop_ids": list(spec.tokens.stop_ids),
        "shards": sorted(set(checkpoint.shard_of.values())),
    }
    return summary | _quantization(checkpoint)


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """The GPTQ config of a quantized checkpoint, and the report of `vlmdeploy quantize`."""
    config = checkpoint.codes.config
    if config is None:
        return {}
    report = checkpoint.report()
    quantization = {"bits": config.bits, "group_size": config.group_size, "sym": config.symmetric}
    found = {"quantization": quantization, "quantized_linears": len(checkpoint.codes.modules)}
    return {**found, "quantization_report": report} if report else found


def checkpoint_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Rows of label and value."""
    counts = ", ".join(f"{part} {count:,}" for part, count in summary["parameters"].items())
    shown_apart = ("family", "parameters", "quantization_report")
    rest = {key: value for key, value in summary.items() if key not in shown_apart}
    others = [[key.replace("_", " "), str(value)] for key, value in rest.items()]
    return [["family", summary["family"]], ["parameters", counts], *others]
