"""Peak memory and time of a whole `vlmdeploy quantize` run at CogVLM-17B's layer widths, beside its target of 4 GB.

Writes a synthetic bf16 checkpoint with the real shapes but few layers, calibrates it with random pictures and text, and
prints the quantizing process's peak resident memory.

    python benchmarks/quantize_memory.py [--family cogvlm|cogvlm2] [--layers 1] [--pictures 18] [--quality best]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from export_memory import FAMILIES, largest_sizes, timed, write_checkpoint
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TARGET_BYTES = 4e9
TEXTS, TEXT_BYTES = 18, 900


def write_tokenizer(folder: Path) -> None:
    """One token per byte."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_data(folder: Path, pictures: int) -> None:
    """Random pictures with a short dialogue each, and random texts."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(pictures):
        noise = random.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "messages": dialogue(random, 60)})
    rows += [{"messages": dialogue(random, TEXT_BYTES)} for _ in range(TEXTS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def dialogue(random: np.random.Generator, length: int) -> list[dict[str, str]]:
    """A question and an answer of random letters."""
    text = "".join(chr(letter) for letter in random.integers(97, 123, length))
    return [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="cogvlm")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=18)
    parser.add_argument("--quality", choices=["default", "high", "best"], default="default")
    parser.add_argument("--vision", default="int8")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints  [default: a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        checkpoint, data, out = (Path(temporary) / name for name in ("checkpoint", "data", "out"))
        checkpoint.mkdir()
        data.mkdir()
        config = write_checkpoint(checkpoint, options.family, options.layers)
        write_tokenizer(checkpoint)
        write_data(data, options.pictures)
        command = [sys.executable, "-m", "vlmdeploy", "quantize", "--ckpt", str(checkpoint), "--calib", str(data)]
        command += ["--out", str(out), "--tokens", str(10**9), "--quality", options.quality, "--json"]
        printed, seconds, peak = timed([*command, "--vision", options.vision])
        report = json.loads(printed)
        tensor, layer, whole = largest_sizes(options.family, config)
    experts = report["calibration"]["experts"]
    tokens = ", ".join(f"{expert['expert']} {expert['tokens']:,}" for expert in experts)
    print(f"{options.family} widths, {options.layers} + {options.layers} layers, quality {options.quality}")
    print(f"calibration tokens: {tokens}")
    print(f"peak resident memory {peak / 1e9:.2f} GB = {peak / TARGET_BYTES:.2f} of the 4 GB target; {seconds:.0f} s")
    print(f"largest tensor {tensor / 1e9:.2f} GB float32, one decoder layer {layer / 1e9:.2f} GB, both experts")
    print(f"whole checkpoint {whole / 1e9:.2f} GB bf16; quantized {report['size_bytes'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
