"""The one door for DATA: a JSONL file, a folder with data.jsonl, a CogVLM-SFT-311K root, or a folder of pictures.

The first that matches is taken, and `description` says which. Samples are read one by one, so that a broken one can be
skipped and counted; pictures are not opened on the way: `check_picture` does that for those that will be used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from vlmdeploy.data import image_folder, jsonl, sft311k
from vlmdeploy.data.samples import Sample, checked_text
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.image import load_image

Kind: TypeAlias = Literal["JSONL", "CogVLM-SFT-311K", "pictures with one prompt"]

DEFAULT_TASK = "chat"  # of a JSONL row that names none: enough to calibrate with, nothing that could be scored
MAX_REASONS = 3


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
    """What DATA turned out to be; `path` is the JSONL file or the folder, `description` one line for the user."""

    kind: Kind
    path: Path
    description: str
    picture_prompt: str | None = None

    def samples(self, skip_broken: bool = False) -> Samples:
        """All samples in their order, read as they are asked for; each call starts anew.

        Raises DataError at once where nothing can be read at all, and on the way for the first broken sample, unless
        those are to be skipped.
        """
        return Samples(self._items(), self.path, skip_broken)

    def _items(self) -> Iterator[Callable[[], Sample]]:
        if self.kind == "JSONL":
            return jsonl.read_items(self.path, DEFAULT_TASK)
        if self.kind == "CogVLM-SFT-311K":
            return sft311k.read_items(self.path)
        assert self.picture_prompt is not None, "open_source gives every folder of pictures its prompt"
        return image_folder.read_items(self.path, self.picture_prompt)


def open_source(data: Path, picture_prompt: str | None = None) -> DataSource:
    """Find out what DATA is; `picture_prompt` is the question for a folder of pictures, which needs one.

    Raises DataError if it is none of the known kinds, or the prompt is missing, empty or of no use.
    """
    if data.is_file() or (data / jsonl.ROWS_NAME).is_file():
        rows = jsonl.find_rows(data)
        source = DataSource("JSONL", rows, f"JSONL file {rows}")
    elif sft311k.is_root(data):
        source = DataSource("CogVLM-SFT-311K", data, f"CogVLM-SFT-311K root {data} ({_labels_taken(data)})")
    elif image_folder.has_pictures(data):
        return _open_pictures(data, picture_prompt)
    else:
        raise DataError(_nothing_known(data))
    if picture_prompt is not None:
        raise DataError(
            f"--calib-prompt fits only a folder of pictures, but this is a {source.description}, which brings its own "
            "questions: leave the option out"
        )
    return source


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
        f"{data}: {found}; looked for a JSONL file, a folder with {jsonl.ROWS_NAME}, a CogVLM-SFT-311K root (with "
        f"{sft311k.FOLDER_NAMES[0]} or its like, or with images/ and labels_en/), and, for --calib-prompt, a folder of "
        f"pictures ({', '.join(image_folder.SUFFIXES)})"
    )
