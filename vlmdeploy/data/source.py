"""The one door for DATA: a VLMEvalKit TSV, RefCOCO as JSONL or JSON, a JSONL file of ours or a folder with data.jsonl,
a CogVLM-SFT-311K root, or a folder of pictures.

The first that matches is taken, and `description` says which. Samples are read one by one, so that a broken one can be
skipped and counted; pictures are not opened on the way: `check_picture` does that for those that will be used.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from vlmdeploy.data import image_folder, jsonl, refcoco, sft311k
from vlmdeploy.data.questions import QuestionOptions
from vlmdeploy.data.samples import Sample, checked_text
from vlmdeploy.data.tsv_table import read_table
from vlmdeploy.data.vlmevalkit import QuestionSet, plan_questions
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.image import load_image

Kind: TypeAlias = Literal[
    "JSONL", "CogVLM-SFT-311K", "pictures with one prompt", "VLMEvalKit TSV", "RefCOCO JSONL", "RefCOCO JSON"
]

DEFAULT_TASK = "chat"  # of a JSONL row that names none: enough to calibrate with, nothing that could be scored
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
    """How many broken items were left out, and what was wrong with the first few; `add` changes it in place."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        """Count one more."""
        self.count += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(str(error))


class Samples(Iterator[Sample]):
    """Samples as they are read; `skipped` tells about the broken ones so far.

    Where broken ones are not skipped, they raise DataError, and the next call goes on behind them. Where they are, and
    nothing else was found, the end raises DataError.
    """

    def __init__(self, items: Iterator[Callable[[], Sample]], where: Path, skip_broken: bool) -> None:
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
            found = f"nothing but broken samples ({self.skipped.count})"
            raise DataError(f"{self._where}: holds {found}; the first: {self.skipped.reasons[0]}")
        raise StopIteration


@dataclass(frozen=True)
class DataSource:
    """What DATA turned out to be; `path` is the file or the folder, `description` one line for the user.

    default_task: of JSONL rows that name none; None: they are refused. questions: the chosen rows of a TSV.
    """

    kind: Kind
    path: Path
    description: str
    picture_prompt: str | None = None
    default_task: str | None = DEFAULT_TASK
    options: QuestionOptions = field(default_factory=QuestionOptions)
    questions: QuestionSet | None = None

    def samples(self, skip_broken: bool = False) -> Samples:
        """All samples in their order, read as they are asked for; each call starts anew.

        Raises DataError at once where nothing can be read at all, and on the way for the first broken sample, unless
        those are to be skipped.
        """
        return Samples(self._items(), self.path, skip_broken)

    def _items(self) -> Iterator[Callable[[], Sample]]:
        if self.questions is not None:
            return self.questions.items()
        if self.kind == "RefCOCO JSONL":
            return refcoco.read_lines(self.path, self.options)
        if self.kind == "RefCOCO JSON":
            return refcoco.read_coco(self.path, self.options)
        if self.kind == "JSONL":
            return jsonl.read_items(self.path, self.default_task)
        if self.kind == "CogVLM-SFT-311K":
            return sft311k.read_items(self.path)
        assert self.picture_prompt is not None, "open_source gives every folder of pictures its prompt"
        return image_folder.read_items(self.path, self.picture_prompt)


def open_source(
    data: Path,
    picture_prompt: str | None = None,
    options: QuestionOptions | None = None,
    to_score: bool = False,
) -> DataSource:
    """Find out what DATA is; `picture_prompt` is the question for a folder of pictures, which needs one. to_score:
    the questions must bring their tasks, so JSONL rows without a task and folders of pictures are refused.

    Raises DataError if it is none of the known kinds, a table that cannot be read, or an option is missing, empty or of
    no use for this kind.
    """
    default_task = None if to_score else DEFAULT_TASK
    if data.is_file():
        source = _open_file(data, options or QuestionOptions(), default_task)
    elif (data / jsonl.ROWS_NAME).is_file():
        source = _open_jsonl(data, default_task)
    elif sft311k.is_root(data):
        source = DataSource("CogVLM-SFT-311K", data, f"CogVLM-SFT-311K root {data} ({_labels_taken(data)})")
    elif image_folder.has_pictures(data):
        if to_score:
            raise DataError(f"{data}: is a folder of pictures; to score, questions with answers are expected")
        source = _open_pictures(data, picture_prompt)
    else:
        raise DataError(_nothing_known(data))
    if picture_prompt is not None and source.picture_prompt is None:
        raise DataError(
            f"--calib-prompt fits only a folder of pictures, but this is a {source.description}, which brings its own "
            "questions: leave the option out"
        )
    _check_options(source, options)
    return source


def _open_file(data: Path, options: QuestionOptions, default_task: str | None) -> DataSource:
    refcoco.refuse_pickle(data)
    _refuse_packed(data)
    if data.suffix.lower() == ".tsv":
        questions = plan_questions(read_table(data), options)
        return DataSource("VLMEvalKit TSV", data, questions.description(), options=options, questions=questions)
    if refcoco.is_coco(data):
        return DataSource("RefCOCO JSON", data, f"RefCOCO annotations {data} (COCO's form)", options=options)
    if refcoco.is_lines(data):
        return DataSource("RefCOCO JSONL", data, f"RefCOCO lines {data} (Qwen-VL's form)", options=options)
    return _open_jsonl(data, default_task)


def _refuse_packed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    for magic, name in PACKED.items():
        if start.startswith(magic):
            raise DataError(f"{path}: is packed with {name}, expected text in UTF-8: unpack it first")
    if start.startswith(UTF16):
        raise DataError(f"{path}: is text in UTF-16, expected UTF-8: save it as that")


def _open_jsonl(data: Path, default_task: str | None) -> DataSource:
    rows = jsonl.find_rows(data)
    return DataSource("JSONL", rows, f"JSONL file {rows}", default_task=default_task)


def _check_options(source: DataSource, options: QuestionOptions | None) -> None:
    """Raise DataError for an option of questions that this kind of data makes no use of."""
    used = OPTIONS_OF.get(source.kind, frozenset())
    plain = QuestionOptions()
    for name, default in vars(plain).items():
        if name not in used and getattr(options or plain, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise DataError(f"{flag} is of no use here, this is a {source.description}: leave the option out")


def check_picture(sample: Sample) -> None:
    """Decode the sample's picture, if it has one. Raises DataError, naming the picture, if that fails."""
    if sample.image is not None:
        load_image(sample.image)


def _open_pictures(folder: Path, prompt: str | None) -> DataSource:
    if prompt is None:
        raise DataError(f'{folder}: is a folder of pictures, which needs a question: give --calib-prompt "..."')
    if not prompt.strip():
        raise DataError(f"{folder}: --calib-prompt is empty, expected the question to ask about every picture")
    checked_text(prompt, f"{folder}: --calib-prompt")
    return DataSource("pictures with one prompt", folder, f"folder of pictures {folder}, each with {prompt!r}", prompt)


def _labels_taken(root: Path) -> str:
    """Which label folders were chosen: a set may come in two languages."""
    return ", ".join(f"{labels.parent.name}/{labels.name}" for labels in sft311k.label_folders(root))


def _nothing_known(data: Path) -> str:
    found = "holds no data that is known" if data.is_dir() else "no such file or folder"
    return (
        f"{data}: {found}; looked for a JSONL file, a VLMEvalKit TSV, RefCOCO as JSONL or JSON, "
        f"a folder with {jsonl.ROWS_NAME}, a CogVLM-SFT-311K root (with "
        f"{sft311k.FOLDER_NAMES[0]} or its like, or with images/ and labels_en/), and, for --calib-prompt, a folder of "
        f"pictures ({', '.join(image_folder.SUFFIXES)})"
    )
