"""Planned against measured memory on this CPU: bundles of several shapes and precisions, peak by phase.

Writes random checkpoints, exports them (gate included), answers one prompt with each in its own process, and prints
planned / measured peak resident memory for the encoder, the prompt and decoding.

    python benchmarks/plan_vs_measured.py [--work FOLDER] [--shapes small,wide,...]
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export_memory import FAMILIES, write_random

from vlmdeploy.bench.measure import measure_in_process
from vlmdeploy.bench.measurement import Measurement, MeasureOptions
from vlmdeploy.bundle import read_manifest
from vlmdeploy.export.exporter import export_bundle
from vlmdeploy.export.options import ExportOptions
from vlmdeploy.plan.memory import PHASES, Setting, phase_memory
from vlmdeploy.plan.planned_model import checkpoint_model
from vlmdeploy.plan.sizes import Storage
from vlmdeploy.quant.precision import plan_precision

NEW_TOKENS = 8
LIMIT = 0.10


@dataclass(frozen=True)
class Shape:
    """Changes to a family's released widths."""

    family: str
    decoder: dict[str, int]
    vision: dict[str, int]

    def config(self) -> dict[str, Any]:
        """A config.json."""
        released = FAMILIES[self.family].RELEASED
        vision = {**released["vision_config"], **self.vision}
        vision["num_positions"] = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        ids = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
        return {**released, **self.decoder, **ids, "vision_config": vision}


def decoder(hidden: int, mlp: int, layers: int, heads: int, vocab: int, context: int, kv: int = 0) -> dict[str, int]:
    widths = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocab, "max_position_embeddings": context,
    }  # fmt: skip
    return {**widths, "num_multi_query_heads": kv} if kv else widths


def vision(side: int, width: int, layers: int, heads: int, mlp: int) -> dict[str, int]:
    return {
        "image_size": side, "hidden_size": width, "num_hidden_layers": layers, "num_heads": heads,
        "intermediate_size": mlp,
    }  # fmt: skip


SHAPES = {
    "small": Shape("cogvlm", decoder(1024, 2816, 6, 8, 16000, 1024), vision(224, 768, 8, 12, 3072)),
    "grouped": Shape("cogvlm2", decoder(2048, 5632, 4, 16, 32000, 2048, 4), vision(448, 1024, 6, 16, 4096)),
    "patches": Shape("cogvlm2", decoder(1024, 2816, 4, 16, 32000, 2048, 4), vision(896, 640, 4, 8, 2560)),
    "deep": Shape("cogvlm", decoder(768, 2048, 20, 12, 32000, 1024), vision(224, 512, 20, 8, 2048)),
    "released": Shape("cogvlm", {"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
}
CASES: list[tuple[str, str, dict[str, str], str]] = [
    ("small", "ort-fp32", {}, "phase"),
    ("small", "ort-int8", {}, "all"),
    ("grouped", "ort-int4", {}, "phase"),
    ("grouped", "ort-int8", {"embedding": "int8"}, "phase"),
    ("grouped", "ort-fp16", {}, "all"),
    ("patches", "ort-int4", {"vision": "int4", "connector": "int4", "lm_head": "int4"}, "phase"),
    ("patches", "ort-fp32", {}, "all"),
    ("deep", "ort-int4", {"vision": "fp32", "connector": "fp32", "lm_head": "fp32"}, "phase"),
    ("deep", "ort-int8", {}, "all"),
    ("released", "ort-int4", {}, "phase"),
    ("released", "ort-int8", {"vision": "int4"}, "phase"),
]  # fmt: skip


def measured(bundle: Path, residency: str) -> Measurement:
    """The first answer of a process to one prompt."""
    options = MeasureOptions(new_tokens=NEW_TOKENS, repeats=1, warmup=0, residency=residency)
    return measure_in_process(bundle, options)


def planned(checkpoint: Path, target: str, precisions: dict[str, str], residency: str, found: Measurement) -> list[int]:
    """The planner's peaks for that prompt."""
    geometry = checkpoint_model(checkpoint).geometry
    plan = plan_precision(geometry, target, precisions)
    slots, texts = found.prompt_tokens + NEW_TOKENS, found.prompt_tokens - found.image_rows
    setting = Setting(residency, cache_tokens=slots, text_tokens=texts, kv="fp32")
    memory = phase_memory(geometry, plan, Storage.of(target, "cpu"), setting)
    return [memory[phase].total for phase in PHASES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="comma-separated names  [default: all]")
    parser.add_argument("--work", type=Path, help="folder for what is made, kept  [default: a temporary one]")
    options = parser.parse_args()
    wanted = options.shapes.split(",") if options.shapes else list(SHAPES)
    with tempfile.TemporaryDirectory() as temporary:
        work, farthest, count = options.work or Path(temporary), 0.0, 0
        for name, target, precisions, residency in CASES:
            if name not in wanted:
                continue
            checkpoint = work / name
            if not (checkpoint / "config.json").is_file():
                checkpoint.mkdir(parents=True)
                write_random(checkpoint, SHAPES[name].family, SHAPES[name].config())
            bundle = work / f"{name}_{target}_{'_'.join(precisions.values())}"
            if not bundle.is_dir():
                export_bundle(checkpoint, bundle, ExportOptions(target, precisions))
            found = measured(bundle, residency)
            peaks = [found.memory.phases[phase].peak_bytes for phase in PHASES]
            ours = planned(checkpoint, target, precisions, residency, found)
            ratios = [one / other for one, other in zip(ours, peaks, strict=True)]
            farthest, count = max(farthest, *(abs(ratio - 1) for ratio in ratios)), count + 1
            size = sum(entry.bytes for entry in read_manifest(bundle).files.values())
            cells = "; ".join(
                f"{phase} {one / 1e6:.0f} / {other / 1e6:.0f} MB = {ratio:.3f}"
                for phase, one, other, ratio in zip(PHASES, ours, peaks, ratios, strict=True)
            )
            extra = json.dumps(precisions) if precisions else ""
            print(f"{name} {target} {extra} residency {residency}, {size / 1e6:.0f} MB on disk: {cells}", flush=True)
    print(f"{count} bundles, planned / measured at most {farthest:.1%} from 1 (limit {LIMIT:.0%})")
    sys.exit(farthest > LIMIT)


if __name__ == "__main__":
    main()
