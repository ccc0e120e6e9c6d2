"""Teacher-forced next-token distributions: what a model predicts at each token of a given answer.

The reference's log-probabilities are kept in a file. Every other model is compared with them while it runs, so memory
holds the logits of one answer only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.artifact import unwritable_reported, written_aside
from vlmdeploy.data.samples import Sample
from vlmdeploy.errors import DataError
from vlmdeploy.layout import Ints
from vlmdeploy.report.document import Agreement
from vlmdeploy.score.answerers import QuestionMaker
from vlmdeploy.score.intervals import grouped_resamples, percentile_interval
from vlmdeploy.score.metrics import Score

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class GivenAnswer:
    """A question and the tokens of its answer, stop id included. pixels: float32 [1, 3, S, S]; None: no picture."""

    sample: Sample
    prompt: Ints
    answer: Ints
    pixels: Floats | None


class DistributionModel(Protocol):
    """Gives logits."""

    def answer_logits(self, given: GivenAnswer) -> Floats:
        """Logits of every answer token, float32 [answer, vocab]. Raises BackendError if one is not finite."""


def given_answers(
    samples: Sequence[Sample], texts: Sequence[str], maker: QuestionMaker, context_tokens: int
) -> Iterator[GivenAnswer]:
    """The questions with those answers, lazily; the context limits answers. Raises DataError and PromptError."""
    for sample, text in zip(samples, texts, strict=True):
        question = maker.question(sample)
        answer = maker.answer_ids(text)[: max(0, context_tokens - len(question.ids))]
        if not len(answer):
            raise DataError(f"question {sample.turns[-1].user!r}: fills the context of {context_tokens} tokens")
        pixels = None if question.picture is None else question.picture.pixels[None]
        yield GivenAnswer(sample, question.ids, answer, pixels)


def log_softmax(logits: Floats) -> Doubles:
    """Log-probabilities, float64 [tokens, vocab]."""
    wide: Doubles = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


class ReferenceFile:
    """The reference's log-probabilities, float32 [tokens, vocab], in a file."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.vocab_size = vocab_size

    def write(self, model: DistributionModel, givens: Iterator[GivenAnswer]) -> int:
        """Replace the file; returns the number of tokens. Raises ExportError if writing fails."""
        tokens = 0
        with unwritable_reported(self.path), written_aside(self.path) as aside, aside.open("wb") as file:
            for given in givens:
                rows = log_softmax(model.answer_logits(given)).astype(np.float32)
                file.write(rows.tobytes())
                tokens += len(rows)
        return tokens

    def rows(self, start: int, stop: int) -> Doubles:
        """Log-probabilities of some tokens, float64, normalized again: rounding to float32 changes their sum by as much
        as the whole KL divergence of a nearly equal model. Raises DataError if the file is truncated."""
        size = 4 * self.vocab_size
        with self.path.open("rb") as file:
            file.seek(start * size)
            content = file.read((stop - start) * size)
        if len(content) != (stop - start) * size:
            raise DataError(f"{self.path}: holds fewer than {stop} rows: delete {self.path.parent} and start again")
        return log_softmax(np.frombuffer(content, np.float32).reshape(-1, self.vocab_size))


@dataclass
class TokenRecord:
    """Values per token, in order; `picture`: equal numbers for tokens whose questions share a picture."""

    kl: list[float]
    equal: list[float]
    surprise: list[float]
    reference_surprise: list[float]
    picture: list[int]
    questions: int = 0


def compare(model: DistributionModel, reference: ReferenceFile, givens: Iterator[GivenAnswer]) -> TokenRecord:
    """KL divergence of the model from the reference, equal top-1 tokens, and -log p of the given tokens, in nats."""
    record, start = TokenRecord([], [], [], [], []), 0
    numbers: dict[object, int] = {}
    for given in givens:
        own = log_softmax(model.answer_logits(given))
        theirs = reference.rows(start, start + len(own))
        start += len(own)
        places = np.arange(len(own))
        key: object = given.sample.image if given.sample.image is not None else ("text", record.questions)
        number = numbers.setdefault(key, len(numbers))
        record.questions += 1
        record.kl += np.maximum(0.0, (np.exp(theirs) * (theirs - own)).sum(-1)).tolist()
        record.equal += (own.argmax(-1) == theirs.argmax(-1)).astype(float).tolist()
        record.surprise += (-own[places, given.answer]).tolist()
        record.reference_surprise += (-theirs[places, given.answer]).tolist()
        record.picture += [number] * len(own)
    return record


def agreement_of(record: TokenRecord, source: str) -> Agreement:
    """Summary statistics of a record; intervals by bootstrap over pictures."""
    kl = np.array(record.kl)
    groups = np.array(record.picture, np.int64)
    columns = np.stack([kl, record.equal, record.surprise, np.ones(len(kl))], axis=1)
    resampled = grouped_resamples(columns, groups)
    means = resampled[:, :3] / resampled[:, 3:]
    intervals = [percentile_interval(means[:, column]) for column in range(3)]
    count, surprise = len(kl), float(np.mean(record.surprise))
    low, high = intervals[2]
    return Agreement(
        source=source,
        questions=record.questions,
        tokens=count,
        kl=Score(float(kl.mean()), *intervals[0], count),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=Score(float(np.mean(record.equal)), *intervals[1], count),
        perplexity=Score(float(np.exp(surprise)), float(np.exp(low)), float(np.exp(high)), count),
        reference_perplexity=float(np.exp(np.mean(record.reference_surprise))),
    )
