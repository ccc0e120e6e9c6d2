"""What one model did: its answers, its agreement with the reference, its measurements; kept in a file, so that a run
that was killed, or a sweep that grows, asks no model twice."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmdeploy.artifact import told_unwritable, write_file
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
    """One answer: what `Prediction` holds beside its sample."""

    text: str
    ids: tuple[int, ...]
    size_px: tuple[int, int] | None

    @classmethod
    def of(cls, prediction: Prediction) -> "KeptAnswer":
        """The part that is kept."""
        return cls(prediction.text, prediction.ids, prediction.size_px)


@dataclass(frozen=True)
class Evaluation:
    """Answers in the order of the questions; agreement, text_only: None for the reference. A bundle is measured, or
    `unmeasured` says why not."""

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
    """Evaluations by what decided them, one JSON file each."""

    folder: Path

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.json"

    def get(self, key: str, count: int) -> Evaluation | None:
        """What was kept under a key, for `count` questions; None where there is nothing that can be used."""
        path = self.path(key)
        try:
            found = record_of(Evaluation, read_object(path, DataError), str(path), DataError)
        except DataError:
            return None  # evaluated again, and written anew
        return found if found.format == FORMAT and len(found.answers) == count else None

    def put(self, key: str, evaluation: Evaluation) -> Evaluation:
        """Keep an evaluation under a key, and return it."""
        content = json.dumps(asdict(evaluation), allow_nan=False).encode()
        with told_unwritable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.path(key), lambda file: file.write(content))
        return evaluation


def key_of(**decided_by: object) -> str:
    """A key for everything that decides an evaluation: paths do not, contents do."""
    text = json.dumps(decided_by, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content_hash(picture: Picture) -> str:
    return hash_file(picture).sha256 if isinstance(picture, Path) else picture.sha256


def samples_hash(samples: Sequence[Sample]) -> str:
    """A hash of the questions, their reference answers and the bytes of their pictures, wherever these lie. Raises
    DataError without any question."""
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
