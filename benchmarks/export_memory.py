"""Peak memory and time of an export at a released model's layer widths.

Writes a synthetic bf16 checkpoint with the model's real shapes but few layers, exports it to ort-int4 with the
whole verification gate, and prints the exporting process's peak resident memory beside the sizes that should bound it:
the largest tensor, one decoder layer in float32, and the whole checkpoint.

    python benchmarks/export_memory.py [--family cogvlm|cogvlm2|llava] [--layers 2] [--work FOLDER]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlmdeploy.families import cogvlm, cogvlm2, llava
from vlmdeploy.records import Config
from vlmdeploy.spec.weight_rules import Source

FAMILIES = {"cogvlm": cogvlm, "cogvlm2": cogvlm2, "llava": llava}
SHARD_BYTES = 1 << 30


def config_of(family: str, layers: int) -> Config:
    """config.json with the released widths and `layers` layers on both sides, those of LLaVA's encoder used but for one
    more."""
    released, own = dict(FAMILIES[family].RELEASED), {"num_hidden_layers": layers}
    if "text_config" in released:
        vision = released["vision_config"] | {"num_hidden_layers": layers + 1}
        return released | {"vision_config": vision, "text_config": released["text_config"] | own}
    return released | own | {"vision_config": released["vision_config"] | own}


def write_checkpoint(folder: Path, family: str, layers: int) -> Config:
    """A random bf16 checkpoint with the released widths; see `write_random`."""
    config = config_of(family, layers)
    write_random(folder, family, config)
    return config


def write_random(folder: Path, family: str, config: Config) -> None:
    """A random bf16 checkpoint in shards of about 1 GiB, written tensor by tensor."""
    module = FAMILIES[family]
    sources = [source for rule in module.weights(module.spec(config, {})) for source in rule.sources]
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for source in sources:
        shard[source.name] = random_tensor(source, generator)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES or source is sources[-1]:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / name)
            weight_map |= dict.fromkeys(shard, name)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def random_tensor(source: Source, generator: torch.Generator) -> torch.Tensor:
    """Norms near one, real rotary frequencies, everything else small and normal."""
    if source.name.endswith("inv_freq"):
        width = 2 * source.shape[0]
        exponents = torch.arange(0, width, 2) / width
        return torch.pow(10000.0, -exponents).to(torch.bfloat16)
    values: torch.Tensor = torch.randn(source.shape, generator=generator) / max(1, source.shape[-1]) ** 0.5
    if "norm" in source.name and source.name.endswith("weight"):
        values += 1
    return values.to(torch.bfloat16)


def timed(command: list[str]) -> tuple[str, float, float]:
    """Run a command: its stdout, seconds and peak resident bytes (of all commands so far)."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return done.stdout, time.perf_counter() - start, peak


def largest_sizes(family: str, config: Config) -> tuple[int, int, int]:
    """Bytes in float32 of the largest tensor and of one decoder layer, and in bf16 of the whole checkpoint."""
    rules = FAMILIES[family].weights(FAMILIES[family].spec(config, {}))
    sizes = {rule.target: prod(rule.shape) for rule in rules}
    layer = sum(size for target, size in sizes.items() if target.startswith("decoder.layers.0."))
    return 4 * max(sizes.values()), 4 * layer, 2 * sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="cogvlm")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--target", default="ort-int4")
    parser.add_argument("--work", type=Path, help="folder for checkpoint and bundle  [default: a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        checkpoint, bundle = Path(temporary) / "checkpoint", Path(temporary) / "bundle"
        checkpoint.mkdir()
        config = write_checkpoint(checkpoint, options.family, options.layers)
        command = [sys.executable, "-m", "vlmdeploy", "export", "--ckpt", str(checkpoint), "--target", options.target]
        _, seconds, peak = timed([*command, "--out", str(bundle), "--quant", "rtn"])
        size = sum(path.stat().st_size for path in bundle.iterdir())
        tensor, layer, whole = largest_sizes(options.family, config)
    print(f"{options.family} widths, {options.layers} + {options.layers} layers, {options.target}, gate included")
    print(f"peak resident memory {peak / 1e9:.2f} GB, {seconds:.0f} s, bundle {size / 1e9:.2f} GB")
    print(f"largest tensor {tensor / 1e9:.2f} GB float32, one decoder layer {layer / 1e9:.2f} GB, both experts")
    print(f"whole checkpoint {whole / 1e9:.2f} GB bf16; peak / checkpoint = {peak / whole:.2f}")


if __name__ == "__main__":
    main()
