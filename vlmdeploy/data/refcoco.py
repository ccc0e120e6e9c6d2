"""Referring expressions of RefCOCO, RefCOCO+ and RefCOCOg: a phrase and its box, in two formats.

JSON lines as Qwen-VL's evaluation reads them: {"image", "sent", "bbox": [x0, y0, x1, y1], "width", "height"}, pixels.
COCO's JSON: "images" with id, file_name, width, height, and "annotations" with image_id, bbox [x, y, width, height] and
"caption" or "sentences". The original pickles are refused: reading one runs its code.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from vlmdeploy.data.jsonl import LONGEST_LINE_BYTES, numbered_lines
from vlmdeploy.data.questions import EXPRESSION, QuestionOptions, find_picture
from vlmdeploy.data.samples import PixelBox, Sample, checked_text, is_inside
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import input_lines, read_input
from vlmdeploy.records import parse_object
from vlmdeploy.runtime.boxes import format_box, normalize_box
from vlmdeploy.runtime.chat import Turn

Row: TypeAlias = dict[str, Any]

PICKLE_SUFFIXES = (".p", ".pkl", ".pickle")
PICKLE_START = b"\x80"  # of every pickle since protocol 2
MOST_COCO_BYTES = 1 << 30  # COCO's own largest file has 450 MB
LONGEST_SHOWN = 80
EXPECTED_JSON = 'expected RefCOCO in COCO\'s form, {"images": [...], "annotations": [...]}'


def refuse_pickle(path: Path, start: bytes) -> None:
    """Raise DataError if the file, which begins with `start`, is a Python pickle, such as refs(unc).p."""
    if path.suffix.lower() in PICKLE_SUFFIXES or start.startswith(PICKLE_START):
        raise DataError(
            f"{path}: is a Python pickle, and reading one runs its code; if you trust it, convert it to JSON with "
            "the lines under RefCOCO in docs/evaluation.md"
        )


def is_lines(path: Path) -> bool:
    """Whether the first row has Qwen-VL's keys."""
    return {"sent", "bbox"} <= _first_row(path).keys()


def _first_row(path: Path) -> Row:
    """The first line that is not blank, if it is an object of JSON alone, else {}."""
    try:
        first = next((line for line in input_lines(path, DataError, LONGEST_LINE_BYTES) if line.strip()), b"")
        return parse_object(first, str(path), DataError)
    except DataError:
        return {}


def read_lines(path: Path, options: QuestionOptions) -> Iterator[Callable[[], Sample]]:
    """One function per line that returns its sample, or raises DataError; the next line can still be read.

    Raises DataError at the end if there are no lines.
    """
    return (partial(_read_line, line, number, path, options) for number, line in numbered_lines(path))


def _read_line(line: bytes, number: int, path: Path, options: QuestionOptions) -> Sample:
    where = f"{path}:{number}"
    row = parse_object(line, where, DataError)
    corners, phrase, name = _numbers(row, "bbox", where), _text(row, "sent", where), _text(row, "image", where)
    return _sample(phrase, name, corners, row, str(number), where, path, options)


def is_coco(path: Path) -> bool:
    """Whether a .json file holds one object with "images" and "annotations"; it may also hold JSON lines.

    Raises DataError if it has only one of the two.
    """
    first = _first_row(path)
    if path.suffix.lower() != ".json" or (first and "images" not in first and "annotations" not in first):
        return False
    content = read_input(path, DataError, MOST_COCO_BYTES)
    try:
        document = parse_object(content, str(path), DataError)
    except DataError:
        return False
    found = [key for key in ("images", "annotations") if key in document]
    if len(found) == 1:
        raise DataError(f'{path}: has "{found[0]}" alone; {EXPECTED_JSON}')
    return bool(found)


def read_coco(path: Path, options: QuestionOptions) -> Iterator[Callable[[], Sample]]:
    """One function per phrase that returns its sample, or raises DataError.

    Raises DataError at once if the document is not in COCO's form or has no phrases.
    """
    document = parse_object(read_input(path, DataError, MOST_COCO_BYTES), str(path), DataError)
    images, annotations = (_objects(document, key, path) for key in ("images", "annotations"))
    by_id = _by_id(images, path)
    chosen = annotations if options.split is None else _of_split(annotations, options.split, path)
    asked = [(number, each, phrase) for number, each in enumerate(chosen) for phrase in _phrases(each)]
    if not asked:
        of_split = "" if options.split is None else f' of split "{options.split}"'
        raise DataError(f'{path}: no annotation{of_split} has a "caption" or "sentences"; {EXPECTED_JSON}')
    keys = _keys([f"{_id(each, number, path)}: {phrase}" for number, each, phrase in asked])
    named = zip(asked, keys, strict=True)
    return (
        partial(_read_annotation, each, phrase, number, key, by_id, path, options)
        for (number, each, phrase), key in named
    )


def _by_id(images: list[Row], path: Path) -> dict[str, Row]:
    by_id: dict[str, Row] = {}
    for image in images:
        name = json.dumps(image.get("id"))
        if name in by_id:
            raise DataError(f"{path}: two images have the id {name[:LONGEST_SHOWN]}")
        by_id[name] = image
    return by_id


def _of_split(annotations: list[Row], split: str, path: Path) -> list[Row]:
    chosen = [each for each in annotations if each.get("split") == split]
    if not chosen:
        known = ", ".join(sorted({str(each["split"]) for each in annotations if "split" in each})) or 'no key "split"'
        raise DataError(f'{path}: has no annotation of split "{split}"; it has: {known[:LONGEST_SHOWN]}')
    return chosen


def _id(annotation: Row, number: int, path: Path) -> int | str:
    """The annotation's id, else its number."""
    found = annotation.get("id", number)
    if not isinstance(found, int | str):
        raise DataError(f'{path}: "id" of annotation {number} is {_shown(found)}, expected a number or a text')
    return checked_text(found, f'{path}: "id" of annotation {number}') if isinstance(found, str) else found


def _keys(names: list[str]) -> list[str]:
    """Make names unique by numbering repeats: RefCOCO has phrases that occur twice for one box."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        seen[name] += 1
        keys.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return keys


def _objects(document: Row, key: str, path: Path) -> list[Row]:
    items = document.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f'{path}: "{key}" is not a list of objects; {EXPECTED_JSON}')
    return items


def _phrases(annotation: Row) -> list[Any]:
    """An annotation's phrases: its caption, or its sentences, each a text or an object with "sent" or "raw"."""
    if annotation.get("caption") is not None:
        return [annotation["caption"]]
    sentences = annotation.get("sentences")
    if not isinstance(sentences, list):
        return []
    return [item.get("sent", item.get("raw")) if isinstance(item, dict) else item for item in sentences]


def _read_annotation(
    annotation: Row, phrase: Any, number: int, key: str, images: dict[str, Row], path: Path, options: QuestionOptions
) -> Sample:
    where = f"{path}: annotation {annotation.get('id', number)}"
    image = images.get(json.dumps(annotation.get("image_id")))
    if image is None:
        raise DataError(f"{where}: its image_id {_shown(annotation.get('image_id'))} is not among the images")
    x, y, width, height = _numbers(annotation, "bbox", where)
    source = "caption" if annotation.get("caption") is not None else "sentences"
    corners = (x, y, x + width, y + height)
    name = _text(image, "file_name", where)
    return _sample(_text({source: phrase}, source, where), name, corners, image, key, where, path, options)


def _sample(
    phrase: str, name: str, corners: PixelBox, sizes: Row, key: str, where: str, path: Path, options: QuestionOptions
) -> Sample:
    """sizes: the object that may have the picture's width and height."""
    size_px = _size(sizes, where)
    _check_box(corners, size_px, where)
    return Sample(
        image=find_picture(name, path.parent, options.images, where),
        turns=(Turn(options.grounding_prompt.replace(EXPRESSION, phrase)),),
        task="rec",
        kind="rec",
        answer=None if size_px is None else format_box(normalize_box(corners, *size_px)),
        boxes=(corners,),
        size_px=size_px,
        key=key,
    )


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: "{key}" is {_shown(value)}, expected a text')
    return checked_text(value, f'{where}: "{key}"').strip()


def _numbers(row: Row, key: str, where: str) -> PixelBox:
    values = row.get(key)
    if isinstance(values, list) and len(values) == 4 and all(map(_is_number, values)):
        a, b, c, d = map(float, values)
        return a, b, c, d
    raise DataError(f'{where}: "{key}" is {_shown(values)}, expected four numbers in pixels')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _size(row: Row, where: str) -> tuple[int, int] | None:
    """Width and height; None if the data has none."""
    if row.get("width") is None or row.get("height") is None:
        return None
    width, height = row["width"], row["height"]
    if not (_is_number(width) and _is_number(height) and width >= 1 and height >= 1):
        raise DataError(f"{where}: width and height are {_shown([width, height])}, expected pixels")
    return int(width), int(height)


def _check_box(corners: PixelBox, size_px: tuple[int, int] | None, where: str) -> None:
    x0, y0, x1, y1 = corners
    if not (x0 < x1 and y0 < y1):
        raise DataError(f"{where}: its box is {list(corners)} as x0, y0, x1, y1, expected x0 < x1 and y0 < y1")
    if size_px is not None and not is_inside(corners, size_px):
        raise DataError(
            f"{where}: its box {list(corners)} lies outside the picture of {' x '.join(map(str, size_px))} pixels"
        )


def _shown(value: Any) -> str:
    return json.dumps(value)[:LONGEST_SHOWN]
