"""What one model did: its answers, its agreement with the reference, its measurements. Kept in a file, so that a
restarted run or a growing sweep asks no model twice."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmdeploy.artifact import unwritable_reported, write_file
from vlmdeploy.bench.measurement import Measurement
from vlmdeploy.bundle import hash_file
from vlmdeploy.data.samples import Picture, Sample
from vlmdeploy.errors import DataError
from vlmdeploy.records import read_object, record_of
from vlmdeploy.report.document import Agreement
from vlmdeploy.score.metrics import Prediction

FORMAT = 1


@dataclass(frozen=True)
class KeptAnswer:
    """One answer: a `Prediction` without its sample."""

    text: str
    ids: tuple[int, ...]
    size_px: tuple[int, int] | None

    @classmethod
    def of(cls, prediction: Prediction) -> "KeptAnswer":
        """Drop the sample."""
        return cls(prediction.text, prediction.ids, prediction.size_px)


@dataclass(frozen=True)
class Evaluation:
    """Answers in question order; agreement, text_only: None for the reference; unmeasured: why measurement is None."""

    answers: tuple[KeptAnswer, ...]
    agreement: Agreement | None
    text_only: Agreement | None
    measurement: Measurement | None
    unmeasured: str | None
    format: int = FORMAT

    def predictions(self, samples: Sequence[Sample]) -> list[Prediction]:
        """The answers with their questions."""
        return [
            Prediction(sample, answer.text, answer.ids, answer.size_px)
            for sample, answer in zip(samples, self.answers, strict=True)
        ]


@dataclass(frozen=True)
class Store:
    """Evaluations by key, one JSON file each."""

    folder: Path

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.json"

    def get(self, key: str, count: int) -> Evaluation | None:
        """The evaluation of `count` questions under a key; None if it is missing or damaged."""
        path = self.path(key)
        try:
            found = record_of(Evaluation, read_object(path, DataError), str(path), DataError)
        except DataError:
            return None  # the caller evaluates again and overwrites it
        return found if found.format == FORMAT and len(found.answers) == count else None

    def put(self, key: str, evaluation: Evaluation) -> Evaluation:
        """Write an evaluation under a key and return it."""
        content = json.dumps(asdict(evaluation), allow_nan=False).encode()
        with unwritable_reported(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.path(key), lambda file: file.write(content))
        return evaluation


def key_of(**decided_by: object) -> str:
    """Hash everything that decides an evaluation: contents, never paths."""
    text = json.dumps(decided_by, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content_hash(picture: Picture) -> str:
    return hash_file(picture).sha256 if isinstance(picture, Path) else picture.sha256


def samples_hash(samples: Sequence[Sample]) -> str:
    """A hash of questions, reference answers and picture bytes, independent of paths. Raises DataError if empty."""
    if not samples:
        raise DataError("there are no questions to ask")
    digest = hashlib.sha256()
    pictures = {picture: _content_hash(picture) for picture in {sample.image for sample in samples} if picture}
    for sample in samples:
        shown = (
            sample.image and pictures[sample.image], [(turn.user, turn.assistant) for turn in sample.turns],
            sample.task, sample.kind, sample.references, sample.boxes, sample.template, sample.extra, sample.options,
            sample.group,
        )  # fmt: skip
        digest.update(repr(shown).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
