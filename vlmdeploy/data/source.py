"""Opens DATA: a VLMEvalKit TSV, RefCOCO as JSONL or JSON, our own JSONL or a folder with data.jsonl, a CogVLM-SFT-311K
root, or a folder of pictures.

The first format that matches is used; `description` names it. Samples are read one by one, so broken ones can be
skipped and counted. Reading does not open pictures: `check_picture` decodes those that will be used.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from vlmdeploy.data import image_folder, jsonl, refcoco, sft311k
from vlmdeploy.data.questions import QuestionOptions
from vlmdeploy.data.samples import Sample, checked_text
from vlmdeploy.data.tsv_table import read_table
from vlmdeploy.data.vlmevalkit import QuestionSet, plan_questions
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import open_input, why_unreadable
from vlmdeploy.runtime.image import load_image

Kind: TypeAlias = Literal[
    "JSONL", "CogVLM-SFT-311K", "pictures with one prompt", "VLMEvalKit TSV", "RefCOCO JSONL", "RefCOCO JSON"
]
Items: TypeAlias = Iterator[Callable[[], Sample]]  # each returns a sample, or raises DataError if it is broken

DEFAULT_TASK = "chat"  # of a JSONL row without one: enough to calibrate, but not to score
MAX_REASONS = 3
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
OPTIONS_OF: dict[Kind, frozenset[str]] = {
    "VLMEvalKit TSV": frozenset(("rule", "prompt", "split", "first_picture", "images")),
    "RefCOCO JSON": frozenset(("split", "images", "grounding_prompt")),
    "RefCOCO JSONL": frozenset(("images", "grounding_prompt")),
}


@dataclass
class Skipped:
    """How many broken items were skipped, and the first few reasons."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        """Count one more."""
        self.count += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(str(error))


class Samples(Iterator[Sample]):
    """Samples as they are read; `skipped` counts the broken ones so far.

    Unless broken samples are skipped, each raises DataError, and the next call continues after it. If all samples were
    skipped, the end raises DataError.
    """

    def __init__(self, items: Items, where: Path, skip_broken: bool) -> None:
        self.skipped = Skipped()
        self._items = items
        self._where = where
        self._skip_broken = skip_broken
        self._found = False

    def __next__(self) -> Sample:
        for read in self._items:
            try:
                sample = read()
            except DataError as error:
                if not self._skip_broken:
                    raise
                self.skipped.add(error)
            else:
                self._found = True
                return sample
        if self.skipped.count and not self._found:
            found = f"only broken samples ({self.skipped.count})"
            raise DataError(f"{self._where}: holds {found}; the first: {self.skipped.reasons[0]}")
        raise StopIteration


@dataclass(frozen=True)
class DataSource:
    """An opened DATA. path: the file or folder; description: one line for the user; read_items: starts reading;
    questions: the chosen rows of a TSV."""

    kind: Kind
    path: Path
    description: str
    read_items: Callable[[], Items]
    questions: QuestionSet | None = None

    def samples(self, skip_broken: bool = False) -> Samples:
        """All samples in order, read lazily; each call starts over.

        Raises DataError at once if nothing can be read, and later for the first broken sample unless they are skipped.
        """
        return Samples(self.read_items(), self.path, skip_broken)


def open_source(
    data: Path,
    picture_prompt: str | None = None,
    options: QuestionOptions | None = None,
    to_score: bool = False,
) -> DataSource:
    """Recognize DATA. picture_prompt: the question for a folder of pictures, which needs one. to_score: refuse JSONL
    rows without a task and folders of pictures.

    Raises DataError for an unknown format, an unreadable table, and an option that is missing, empty or does not apply.
    """
    default_task = None if to_score else DEFAULT_TASK
    if data.is_file():
        source = _open_file(data, options or QuestionOptions(), default_task)
    elif (data / jsonl.ROWS_NAME).exists():
        source = _open_jsonl(data, default_task)
    elif sft311k.is_root(data):
        taken = ", ".join(f"{labels.parent.name}/{labels.name}" for labels in sft311k.label_folders(data))
        described = f"CogVLM-SFT-311K root {data} ({taken})"
        source = DataSource("CogVLM-SFT-311K", data, described, partial(sft311k.read_items, data))
    elif image_folder.has_pictures(data):
        if to_score:
            raise DataError(f"{data}: is a folder of pictures; to score, questions with answers are expected")
        source = _open_pictures(data, picture_prompt)
    else:
        raise DataError(_nothing_known(data))
    if picture_prompt is not None and source.kind != "pictures with one prompt":
        raise DataError(
            f"--calib-prompt fits only a folder of pictures, but this is a {source.description}, which brings its own "
            "questions: leave the option out"
        )
    _check_options(source, options)
    return source


def _open_file(data: Path, options: QuestionOptions, default_task: str | None) -> DataSource:
    with open_input(data, DataError) as file:
        start = file.read(4)
    refcoco.refuse_pickle(data, start)
    _refuse_packed(data, start)
    if data.suffix.lower() == ".tsv":
        questions = plan_questions(read_table(data), options)
        return DataSource("VLMEvalKit TSV", data, questions.description(), questions.items, questions)
    if refcoco.is_coco(data):
        read_items = partial(refcoco.read_coco, data, options)
        return DataSource("RefCOCO JSON", data, f"RefCOCO annotations {data} (COCO's form)", read_items)
    if refcoco.is_lines(data):
        read_items = partial(refcoco.read_lines, data, options)
        return DataSource("RefCOCO JSONL", data, f"RefCOCO lines {data} (Qwen-VL's form)", read_items)
    return _open_jsonl(data, default_task)


def _refuse_packed(path: Path, start: bytes) -> None:
    for magic, name in PACKED.items():
        if start.startswith(magic):
            raise DataError(f"{path}: is packed with {name}, expected text in UTF-8: unpack it first")
    if start.startswith(UTF16):
        raise DataError(f"{path}: is text in UTF-16, expected UTF-8: save it as that")


def _open_jsonl(data: Path, default_task: str | None) -> DataSource:
    rows = jsonl.find_rows(data)
    return DataSource("JSONL", rows, f"JSONL file {rows}", partial(jsonl.read_items, rows, default_task))


def _check_options(source: DataSource, options: QuestionOptions | None) -> None:
    """Raise DataError for a question option that does not apply to this kind of data."""
    used = OPTIONS_OF.get(source.kind, frozenset())
    plain = QuestionOptions()
    for name, default in vars(plain).items():
        if name not in used and getattr(options or plain, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise DataError(f"{flag} does not apply to this {source.description}: leave the option out")


def check_picture(sample: Sample) -> None:
    """Decode the sample's picture, if it has one. Raises DataError, naming the picture."""
    if sample.image is not None:
        load_image(sample.image)


def _open_pictures(folder: Path, prompt: str | None) -> DataSource:
    if prompt is None:
        raise DataError(f'{folder}: is a folder of pictures, which needs a question: give --calib-prompt "..."')
    if not prompt.strip():
        raise DataError(f"{folder}: --calib-prompt is empty, expected the question to ask about every picture")
    checked_text(prompt, f"{folder}: --calib-prompt")
    described = f"folder of pictures {folder}, each with {prompt!r}"
    return DataSource("pictures with one prompt", folder, described, partial(image_folder.read_items, folder, prompt))


def _nothing_known(data: Path) -> str:
    found = "holds no known data" if data.is_dir() else why_unreadable(data)
    return (
        f"{data}: {found}; looked for a JSONL file, a VLMEvalKit TSV, RefCOCO as JSONL or JSON, "
        f"a folder with {jsonl.ROWS_NAME}, a CogVLM-SFT-311K root (with "
        f"{sft311k.FOLDER_NAMES[0]} or similar, or with images/ and labels_en/), and, for --calib-prompt, a folder of "
        f"pictures ({', '.join(image_folder.SUFFIXES)})"
    )
