"""CogVLM-SFT-311K, the authors' fine-tuning set: pictures with a caption or a conversation, one JSON file each.

Layout: the data set's page shows labels/, the released files have labels_en/ and labels_zh/. Users bring their own copy
(CC BY-NC 4.0). Captions have no question; the file name chooses one of a fixed list.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vlmdeploy.data.samples import Sample, checked_text
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import MOST_JSON_BYTES, NOTHING_THERE, read_input, why_unreadable
from vlmdeploy.records import parse_object
from vlmdeploy.runtime.chat import Turn

Language: TypeAlias = Literal["en", "zh"]

FOLDER_NAMES = (  # "formate" is the real spelling, and some documents spell the second "muti"
    "llava_details-minigpt4_3500_formate",
    "llava_instruction_multi_conversations_formate",
    "llava_instruction_muti_conversations_formate",
    "llava_instruction_single_conversation_formate",
)
LABELS_NAMES = ("labels_en", "labels", "labels_zh")  # the first that exists is read
LANGUAGE_OF: dict[str, Language] = {"labels_en": "en", "labels_zh": "zh"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
QUESTIONS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Describe this picture in detail.",
        "What is to be seen in this picture?",
        "Please give a thorough description of the image.",
        "Tell me everything that the image shows.",
    ),
    "zh": ("请详细描述这张图片。", "这张图片里有什么", "请说明图中的全部内容。"),
}
TRAILING_COMMA = re.compile(rb",\s*+[\]}]")
EXPECTED = 'expected {"captions": [...]} or {"conversations": [...]}'


def is_root(path: Path) -> bool:
    """Whether this is the unpacked set, a part of it, or one of its folders, by name or by images/ and labels."""
    return bool(_folders(path))


def label_folders(path: Path) -> list[Path]:
    """Each folder's labels, sorted; English if there are several languages.

    Raises DataError if `path` is not such a set, or a folder has no labels.
    """
    folders = _folders(path)
    if not folders:
        names = ", ".join(FOLDER_NAMES)
        raise DataError(f"{path}: is not a CogVLM-SFT-311K root, expected some of {names}, or images/ and labels_en/")
    return [_labels(folder) for folder in folders]


def read_items(path: Path) -> Iterator[Callable[[], Sample]]:
    """One function per label file, sorted, that returns its sample, or raises DataError if the file is broken.

    Samples have the task "caption", or "chat" with all turns. Ignores hidden files. Raises DataError at once if folders
    or all label files are missing.
    """
    label_files = [file for labels in label_folders(path) for file in _label_files(labels)]
    return (partial(_read_sample, file) for file in label_files)


def _folders(path: Path) -> list[Path]:
    known = [path / name for name in FOLDER_NAMES if (path / name).is_dir()]
    if known:
        return known
    return [path] if path.is_dir() and (path.resolve().name in FOLDER_NAMES or _looks_like_one(path)) else []


def _looks_like_one(folder: Path) -> bool:
    """Other data sets have images/ and labels/ too, but no JSON in them."""
    labels = (folder / name for name in LABELS_NAMES)
    return (folder / "images").is_dir() and any(any(path.glob("*.json")) for path in labels)


def _labels(folder: Path) -> Path:
    for name in LABELS_NAMES:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"{folder}: holds no labels, expected {', '.join(LABELS_NAMES)}: unpack it again")


def _label_files(labels: Path) -> list[Path]:
    files = sorted(path for path in labels.glob("*.json") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{labels}: holds no label files, expected 00000001.json and so on: unpack it again")
    return files


def _read_sample(file: Path) -> Sample:
    document = _read_json(file)
    keys = [key for key in ("captions", "conversations") if key in document]
    if len(keys) != 1:
        raise DataError(f"{file}: has the keys {', '.join(document)[:80] or '(none)'}; {EXPECTED}")
    entries = document[keys[0]]
    if not isinstance(entries, list):
        raise DataError(f'{file}: "{keys[0]}" is a {type(entries).__name__}, expected a list')
    image = _image(file)
    if keys[0] == "captions":
        questions = QUESTIONS[LANGUAGE_OF.get(file.parent.name, "en")]
        question = questions[zlib.crc32(os.fsencode(file.stem)) % len(questions)]
        return Sample(image, (Turn(question),), "caption", "caption", _caption(entries, file), key=_key(file))
    turns, answer = _conversation(entries, file)
    return Sample(image, turns, "chat", "chat", answer, key=_key(file))


def _key(file: Path) -> str:
    """A label file's folder and number."""
    return f"{file.parent.parent.name}/{file.stem}"


def _read_json(file: Path) -> dict[str, Any]:
    content = read_input(file, DataError, MOST_JSON_BYTES)
    try:
        return parse_object(content, str(file), DataError)
    except DataError as error:
        raise DataError(f"{error}{_comma_hint(content)}; {EXPECTED}") from error


def _comma_hint(content: bytes) -> str:
    comma = TRAILING_COMMA.search(content)
    if comma is None:
        return ""
    line = 1 + content.count(b"\n", 0, comma.start())
    return f", maybe because of the trailing comma in line {line}"


def _caption(entries: list[Any], file: Path) -> str:
    if len(entries) != 1:
        raise DataError(f"{file}: has {len(entries)} captions, expected one")
    return _text(entries[0], "caption", f"{file}: caption 0")


def _conversation(entries: list[Any], file: Path) -> tuple[tuple[Turn, ...], str]:
    """The turns, the last one open, and its answer."""
    if not entries or len(entries) % 2:
        raise DataError(f"{file}: the conversation has {len(entries)} entries, expected user and assistant in pairs")
    roles = ("user", "assistant")
    texts = [_text(entry, roles[place % 2], f"{file}: entry {place}") for place, entry in enumerate(entries)]
    *past, last = (Turn(user, assistant) for user, assistant in zip(texts[::2], texts[1::2], strict=True))
    return (*past, Turn(last.user)), texts[-1]


def _text(entry: Any, role: str, where: str) -> str:
    found_role, text = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
    if found_role != role or not isinstance(text, str):
        found = json.dumps(entry, ensure_ascii=False)[:80]
        raise DataError(f'{where} is {found}, expected {{"role": "{role}", "content": a string}}')
    if not text.strip():
        raise DataError(f"{where}: the {role}'s text is empty")
    return checked_text(text, f"{where}: the {role}'s text")


def _image(file: Path) -> Path:
    base = file.parent.parent / "images" / file.stem
    for suffix in SUFFIXES:
        path = base.with_name(base.name + suffix)
        problem = why_unreadable(path)
        if not problem:
            return path
        if problem != NOTHING_THERE:
            raise DataError(f"{file}: its picture {path}: {problem}")
    raise DataError(f"{file}: its picture {base}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:])}): {NOTHING_THERE}")
