"""Data sets as JSON lines: one conversation per row, pictures beside the file.

A row: {"image": path relative to the file (absent: text only), "messages": [{"role", "content"}...], "task": "vqa",
"kind": "how_many", "answer": "3", "boxes": [[x0, y0, x1, y1]...] in pixels, "template": "chat", "extra": true}.
Only messages and task are required (to calibrate, only messages): kind defaults to the task, answer to the assistant's
last message. Benchmark tasks may also have "answers", a list of right ones, and "options", {"A": "cat"}.
"""

import json
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vlmdeploy.data.samples import PixelBox, Sample, checked_text, first_picture
from vlmdeploy.errors import DataError, PromptError
from vlmdeploy.input_files import input_lines, why_unreadable
from vlmdeploy.records import parse_object
from vlmdeploy.runtime.chat import read_messages

ROWS_NAME = "data.jsonl"

Row = dict[str, Any]
Value = TypeVar("Value")
LONGEST_LINE_BYTES = 16 << 20
LONGEST_SHOWN = 80  # characters of a value or a name in a message
JSON_NAMES = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}


def find_rows(data: str | Path) -> Path:
    """The file with the rows: `data`, or data.jsonl in that folder. Raises DataError if there is none."""
    path = Path(data)
    expected = f"expected a JSONL file or a folder with {ROWS_NAME}"
    if path.is_dir():
        if not (path / ROWS_NAME).exists():
            raise DataError(f"{path}: holds no {ROWS_NAME}; {expected}")
        path = path / ROWS_NAME
    if problem := why_unreadable(path):
        raise DataError(f"{path}: {problem}; {expected}")
    return path


def read_items(data: str | Path, default_task: str | None = None) -> Iterator[Callable[[], Sample]]:
    """One function per row of a JSONL file, or of a folder with data.jsonl, that returns its sample.

    Rows without a task get `default_task`; if that is None, they are an error. Raises DataError at once if there is no
    such file, and at the end if it has no rows. A function raises it, naming file and line, for a bad row or a missing
    picture; the next row can still be read.
    """
    path = find_rows(data)
    return (partial(_read, line, default_task, path, number) for number, line in numbered_lines(path))


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of every line that is not blank. Raises DataError at the end if there was none."""
    found = False
    for number, line in enumerate(input_lines(path, DataError, LONGEST_LINE_BYTES), 1):
        if line.strip():
            found = True
            yield number, line
    if not found:
        raise DataError(f"{path}: holds no rows")


def _read(line: bytes, default_task: str | None, path: Path, number: int) -> Sample:
    where = f"{path}:{number}"
    return _sample(parse_object(line, where, DataError), default_task, path.parent, where)


def _sample(row: Row, default_task: str | None, folder: Path, where: str) -> Sample:
    task = _optional_text(row, "task", where) or default_task or _required(row, "task", str, where)
    messages, last_answer = _split(_required(row, "messages", list, where), where)
    try:
        conversation = read_messages(messages, max_images=1)
    except PromptError as error:
        raise DataError(f"{where}: {error}") from error
    if conversation.system is not None:
        raise DataError(f"{where}: message 0 is a system message, expected one from the user: samples have none")
    answers = _answers(row, where)
    return Sample(
        image=_image(row, folder, where),
        turns=conversation.turns,
        task=task,
        kind=_optional_text(row, "kind", where) or task,
        answer=Counter(answers).most_common(1)[0][0] if answers else _reference(row, last_answer, where),
        boxes=_boxes(row, where),
        template=_optional_text(row, "template", where),
        extra=bool(_optional(row, "extra", bool, where)),
        answers=answers,
        options=_options(row, where),
        key=where.rpartition(":")[2],
    )


def _required(row: Row, key: str, kind: type[Value], where: str) -> Value:
    value = _optional(row, key, kind, where)
    if value is None:
        raise DataError(f'{where}: key "{key}" is missing, expected {JSON_NAMES[kind]}')
    return value


def _optional(row: Row, key: str, kind: type[Value], where: str) -> Value | None:
    """A key's value; None if it is absent or null."""
    value = row.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise DataError(f'{where}: "{key}" is {json.dumps(value)[:LONGEST_SHOWN]}, expected {JSON_NAMES[kind]}')


def _optional_text(row: Row, key: str, where: str) -> str | None:
    """A text value; unlike file names, texts must be UTF-8."""
    value = _optional(row, key, str, where)
    return value if value is None else checked_text(value, f'{where}: "{key}"')


def _split(messages: list[Any], where: str) -> tuple[list[Any], str | None]:
    """The messages up to the user's last one, and the assistant's answer to it, if any."""
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            found = json.dumps(message)[:LONGEST_SHOWN]
            raise DataError(f'{where}: message {index} is {found}, expected {{"role": ..., "content": a string}}')
    if messages and messages[-1].get("role") == "assistant":
        return messages[:-1], checked_text(messages[-1]["content"], f"{where}: the assistant's answer")
    return messages, None


def _reference(row: Row, last_answer: str | None, where: str) -> str | None:
    answer = _optional_text(row, "answer", where)
    return last_answer if answer is None else answer


def _answers(row: Row, where: str) -> tuple[str, ...]:
    answers = _optional(row, "answers", list, where)
    if answers is None:
        return ()
    if not answers or "answer" in row or not all(isinstance(answer, str) for answer in answers):
        found = json.dumps(answers)[:LONGEST_SHOWN]
        raise DataError(f'{where}: "answers" is {found}, expected a list of strings, in place of "answer"')
    return tuple(checked_text(answer, f'{where}: "answers"') for answer in answers)


def _options(row: Row, where: str) -> tuple[tuple[str, str], ...]:
    options = _optional(row, "options", dict, where) or {}
    for letter, text in options.items():
        if letter not in tuple(string.ascii_uppercase) or not isinstance(text, str):
            found = json.dumps({letter: text})[:LONGEST_SHOWN]
            raise DataError(f'{where}: "options" has {found}, expected a letter from A to Z and a string')
    return tuple((letter, checked_text(options[letter], f'{where}: "options"')) for letter in sorted(options))


def _image(row: Row, folder: Path, where: str) -> Path | None:
    name = _optional(row, "image", str, where)
    if name is None:
        return None
    if name.startswith("data:"):
        raise DataError(f"{where}: picture {name[:LONGEST_SHOWN]}... is a data URL, expected the path of a file")
    return first_picture([folder / name], where)


def _boxes(row: Row, where: str) -> tuple[PixelBox, ...]:
    return tuple(_box(box, where) for box in _optional(row, "boxes", list, where) or [])


def _box(box: Any, where: str) -> PixelBox:
    if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
        x0, y0, x1, y1 = map(float, box)
        if x0 <= x1 and y0 <= y1:
            return x0, y0, x1, y1
    raise DataError(
        f"{where}: a box is {json.dumps(box)[:LONGEST_SHOWN]}, expected [x0, y0, x1, y1] in pixels, x0 <= x1, y0 <= y1"
    )


def _is_number(value: Any) -> bool:
    """Whether a float can hold the number; JSON integers are unbounded."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
