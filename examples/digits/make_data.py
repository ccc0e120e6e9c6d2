"""Write a folder of digit scenes with questions and answers: PNGs and data.jsonl, one row per question.

    python examples/digits/make_data.py --split train|calib|test --count N --out DIR

The same arguments give the same folder. Scenes and questions come from scenes.py and questions.py.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from questions import Question, questions  # type: ignore[import-not-found,unused-ignore]  # beside this script
from scenes import SPLITS, DigitScenes, Pixels, Scene  # type: ignore[import-not-found,unused-ignore]

EXTRA_KINDS = ("is_there", "outermost")  # easy ones: scored, but left out of the mean over VQA kinds
ROWS_FILE = "data.jsonl"
_BATCH = 64  # scenes drawn at once; fixed, so that a longer run begins with the scenes of a shorter one


def draw_scenes(split: str, count: int, seed: int) -> Iterator[tuple[Pixels, Scene, list[Question]]]:
    """`count` scenes: pixels [size, size, 3], truth, and one question of every kind that has an answer.

    Each split draws from random streams of its own, whatever the seed.
    """
    source = DigitScenes(split)
    stream = [SPLITS.index(split), seed]
    scene_rng, question_rng = np.random.default_rng([*stream, 0]), np.random.default_rng([*stream, 1])
    for start in range(0, count, _BATCH):
        batch = source.draw(_BATCH, scene_rng)
        for index in range(min(_BATCH, count - start)):
            scene = batch.scene(index)
            yield batch.pixels[index], scene, questions(scene, question_rng)


def data_row(image: str, question: Question) -> dict[str, object]:
    """One line of data.jsonl; `image` is a path relative to the folder, boxes are in pixels."""
    messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
    row: dict[str, object] = {
        "image": image,
        "messages": messages,
        "task": question.task,
        "kind": question.kind,
        "answer": question.answer,
        "boxes": [list(box) for box in question.boxes],
    }
    if question.kind in EXTRA_KINDS:
        row["extra"] = True
    return row


def write_data(folder: Path, split: str, count: int, seed: int) -> int:
    """Fill an empty folder; returns the number of rows."""
    (folder / "images").mkdir()
    num_rows = 0
    with (folder / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as rows:
        for index, (pixels, _, asked) in enumerate(draw_scenes(split, count, seed)):
            image = f"images/{index:06d}.png"
            Image.fromarray(pixels).save(folder / image)
            rows.writelines(json.dumps(data_row(image, question)) + "\n" for question in asked)
            num_rows += len(asked)
    return num_rows


def refusal(out: Path, force: bool) -> str | None:
    """Why `out` may not be written, or None."""
    if not out.exists() and not out.is_symlink():
        return None
    if not force:
        return f"{out} exists; choose another folder, or replace it with --force"
    if out.is_symlink() or not (out / ROWS_FILE).is_file():
        return f"{out} holds no {ROWS_FILE}, so this script did not make it; not replacing it"
    return None


def publish(made: Path, out: Path) -> None:
    """Publish the finished folder; remove an old one only once the new one is in place."""
    if not out.exists():
        made.rename(out)
        return
    old = made.with_suffix(".old")
    out.rename(old)
    try:
        made.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def make_data(split: str, count: int, out: Path, seed: int) -> int:
    """Write aside, then rename to `out`; on any failure nothing stays behind. Returns the number of rows."""
    aside = out.parent / f".{out.name}.{os.getpid()}.partial"
    out.parent.mkdir(parents=True, exist_ok=True)
    aside.mkdir()
    try:
        num_rows = write_data(aside, split, count, seed)
        publish(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return num_rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line options; exits with status 2 when they are wrong."""
    parser = argparse.ArgumentParser(description="Write scenes of handwritten digits with questions and answers.")
    parser.add_argument("--split", choices=SPLITS, required=True, help="test has handwriting that train never shows")
    parser.add_argument("--count", type=_natural, required=True, help="number of scenes (about 9 questions each)")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--seed", type=_natural, default=0, help="another seed, other scenes (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace a folder this script made before")
    parsed = parser.parse_args(arguments)
    if parsed.count == 0:
        parser.error("argument --count: must be at least 1")
    return parsed


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parsed = parse_arguments(arguments)
    out: Path = parsed.out.absolute()
    reason = refusal(out, parsed.force)
    if reason is None:
        try:
            num_rows = make_data(parsed.split, parsed.count, out, parsed.seed)
        except OSError as error:
            reason = f"cannot write {out}: {error}"
    if reason is not None:
        print(f"make_data: {reason}", file=sys.stderr)
        return 1
    print(f"{out}: {parsed.count} scenes, {num_rows} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
