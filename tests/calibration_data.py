"""Small calibration sets for the tests: a JSONL file with pictures and texts, and samples built without any file.

data = write_calibration_data(tmp_path / "data", num_pictures=6, num_texts=6)
ckpt = write_calibration_checkpoint(tmp_path / "ckpt")
out = quantize(ckpt, data, tmp_path / "out", "--bits", 8)
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import Result

from tests.tiny_bundle import (
    TEXT_MODEL,
    byte_tokenizer,
    only_error_line,
    picture,
    run_cli,
    write_text_checkpoint,
)
from tests.tiny_checkpoint import Tensors, TinyCheckpoint, write_checkpoint, write_tiny_checkpoint
from vlmdeploy.calib.calibration_set import CalibrationSample
from vlmdeploy.layout import lay_out
from vlmdeploy.spec.model import ModelSpec

FAST = ("--group", 16, "--threads", 1)  # options of `quantize` that suit models this small
# Widths that groups of 32 and 3-bit words divide, and grouped KV heads.
WORD_VOCAB: dict[str, Any] = {"vocab": 264}  # the 8-bit codes of a head fill 32-bit words
GROUPED_MODEL: dict[str, Any] = {**TEXT_MODEL, **WORD_VOCAB, "kv_heads": 2, "mlp": 64}
WORDS = ("red", "dog", "seven", "left", "over", "tree", "why", "blue", "cup", "two", "cat", "sun")
PICTURE_SIZE = (8, 8)  # what the tiny encoder takes: resized noise would be grey
Row = dict[str, Any]


def run_quantize(ckpt: Path, data: Path, out: Path, *options: object) -> Result:
    """`vlmdeploy quantize` in this process. `options` come last and may replace those of FAST."""
    return run_cli("quantize", "--ckpt", ckpt, "--calib", data, "--out", out, *FAST, *options)


def quantize(ckpt: Path, data: Path, out: Path, *options: object) -> Path:
    """The quantized checkpoint."""
    result = run_quantize(ckpt, data, out, *options)
    assert result.exit_code == 0, result.stderr
    return out


def refusal(ckpt: Path, data: Path, out: Path, *options: object) -> str:
    """The one line with which `vlmdeploy quantize` refuses."""
    return only_error_line(run_quantize(ckpt, data, out, *options))


def write_calibration_checkpoint(folder: Path, family: str = "cogvlm", **overrides: Any) -> Path:
    """A tiny float checkpoint of either family with a tokenizer whose tokens are bytes."""
    if family == "cogvlm":
        return write_text_checkpoint(folder, **WORD_VOCAB | overrides)
    write_tiny_checkpoint(folder, family, **GROUPED_MODEL | overrides)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_changed_checkpoint(folder: Path, change: Callable[[Tensors], None], **overrides: Any) -> Path:
    """A tiny CogVLM like those of `write_calibration_checkpoint` whose tensors `change` has altered in place."""
    sizes = TEXT_MODEL | WORD_VOCAB | overrides
    tiny = TinyCheckpoint("cogvlm", **sizes)
    tensors = tiny.tensors()
    change(tensors)
    write_text_checkpoint(folder, **sizes)
    return write_checkpoint(folder, tiny.config(), tensors)


def overflow_for_pictures(tensors: Tensors) -> None:
    """Huge weights in the connector: float32 overflows for pictures, never for text."""
    for name in ("gate_proj", "dense_h_to_4h"):
        tensors[f"model.vision.linear_proj.{name}.weight"] *= 1e30


def write_calibration_data(folder: Path, num_pictures: int = 6, num_texts: int = 6, per_picture: int = 1) -> Path:
    """A folder with data.jsonl: so many questions about every picture, then texts. All prompts differ."""
    pictured = [
        {
            "image": f"{number}.png",
            "messages": messages(f"{_words(number, 2)} {question}?", _words(number + question, 2)),
        }
        for number in range(num_pictures)
        for question in range(per_picture)
    ]
    texts = [{"messages": messages(_words(100 + number, 5), _words(200 + number, 4))} for number in range(num_texts)]
    return write_rows(folder, [*pictured, *texts])


def write_rows(folder: Path, rows: list[Row | str]) -> Path:
    """A folder with data.jsonl; a picture is drawn for every name like "3.png", a string is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        stem = str(row.get("image") or "").removesuffix(".png") if isinstance(row, dict) else ""
        if stem.isdigit():
            picture(int(stem), PICTURE_SIZE).save(folder / f"{stem}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def messages(question: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def random_samples(
    spec: ModelSpec, tiny: TinyCheckpoint, folder: Path, with_picture: list[bool], held_out: tuple[int, ...] = ()
) -> tuple[CalibrationSample, ...]:
    """Samples with random text ids; True: with a picture of its own, written to `folder`."""
    random = np.random.default_rng(tiny.seed + 7)
    samples = []
    for number, has_image in enumerate(with_picture):
        image = folder / f"sample{number}.png" if has_image else None
        if image is not None:
            folder.mkdir(parents=True, exist_ok=True)
            picture(number, PICTURE_SIZE).save(image)
        text = random.integers(3, min(tiny.vocab - 4, tiny.pad_id or tiny.vocab), 4 + 3 * number).tolist()
        sample = sample_of(f"sample {number}", image, tiny.prompt(text, has_image), spec)
        samples.append(replace(sample, held_out=number in held_out))
    return tuple(samples)


def sample_of(name: str, image: Path | None, ids: list[int], spec: ModelSpec) -> CalibrationSample:
    """A sample whose layout follows from its ids."""
    layout = lay_out(np.array(ids, np.int64), spec.tokens, num_images=int(image is not None))
    return CalibrationSample(**vars(layout), name=name, image=image, answer_start=len(ids))
