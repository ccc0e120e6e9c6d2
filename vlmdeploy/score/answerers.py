"""Scores a model on a data set: the same questions and metrics for a PyTorch model and for a bundle.

An answerer turns samples into greedy predictions; `validate` scores them, and `agreement` compares two validations
question by question. Torch-free, so a bundle can be validated where it runs; the PyTorch answerer is a separate module.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.data.samples import Picture, Sample, check_boxes
from vlmdeploy.errors import DataError, PromptError
from vlmdeploy.layout import Ints
from vlmdeploy.manifest import ChatTemplate, ImageRecipe, TokenRules
from vlmdeploy.overriding import override
from vlmdeploy.runtime.chat import Tokenizer, prompt_ids
from vlmdeploy.runtime.image import full_size, load_image, preprocess
from vlmdeploy.score.intervals import wilson_interval
from vlmdeploy.score.metrics import Prediction, Score, Scores, check_scorable, score

MAX_NEW_TOKENS = 64


class Answerer(Protocol):
    """Answers questions."""

    def answers(self, samples: Iterable[Sample]) -> Iterator[Prediction]:
        """One prediction per sample, in order. Raises DataError and PromptError."""


@dataclass(frozen=True)
class Validation:
    """The scores of one model, and the predictions behind them in sample order."""

    scores: Scores
    predictions: tuple[Prediction, ...]


def validate(
    answerer: Answerer, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
) -> Validation:
    """Answer and score all samples; `progress` gets the number answered so far.

    Raises DataError, before answering, if there are no samples or one cannot be scored.
    """
    if not samples:
        raise DataError("there are no samples to validate on")
    check_scorable(samples)
    predictions = answer_all(answerer, samples, progress)
    return Validation(score(predictions), predictions)


def answer_all(
    answerer: Answerer, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
) -> tuple[Prediction, ...]:
    """Answer all samples, scored or not; `progress` gets the number answered so far."""
    predictions: list[Prediction] = []
    for prediction in answerer.answers(samples):
        predictions.append(prediction)
        if progress is not None:
            progress(len(predictions))
    return tuple(predictions)


def agreement(a: Validation, b: Validation) -> Score:
    """Share of questions with equal ids (equal texts, if ids are unknown), with Wilson's interval.

    Raises DataError unless both answered the same questions in the same order.
    """
    asked_a, asked_b = ([prediction.sample for prediction in each.predictions] for each in (a, b))
    if asked_a != asked_b:
        raise DataError(f"the validations have other samples ({len(asked_a)} and {len(asked_b)}): nothing to compare")
    equal = sum(_is_same(one, other) for one, other in zip(a.predictions, b.predictions, strict=True))
    return Score(equal / len(asked_a), *wilson_interval(equal, len(asked_a)), len(asked_a))


def _is_same(a: Prediction, b: Prediction) -> bool:
    return a.ids == b.ids if a.ids and b.ids else a.text.strip() == b.text.strip()


class PromptRules(Protocol):
    """What a checkpoint's ModelSpec and a bundle's Manifest share about prompts and pictures."""

    @property
    def image(self) -> ImageRecipe:
        """How to prepare pictures."""

    @property
    def tokens(self) -> TokenRules:
        """Special ids."""

    @property
    def templates(self) -> tuple[ChatTemplate, ...]:
        """The chat templates."""

    @property
    def default_template(self) -> str:
        """The template to use if none is named."""


@dataclass(frozen=True)
class PreparedPicture:
    """The vision encoder's pixels, float32 [3, S, S], and the upright picture's width and height."""

    pixels: NDArray[np.float32]
    size_px: tuple[int, int]


@dataclass(frozen=True)
class PreparedQuestion:
    """A sample with its prompt, int64 [seq], and its picture."""

    sample: Sample
    ids: Ints
    picture: PreparedPicture | None


class QuestionMaker:
    """Turns samples into prompts; reads a picture once if several samples in a row ask about it.

    template: for rows that name none, instead of the model's default.
    """

    def __init__(self, rules: PromptRules, tokenizer: Tokenizer, template: str | None = None) -> None:
        self._rules = rules
        self._tokenizer = tokenizer
        self._template = template or rules.default_template
        self._last: tuple[Picture, PreparedPicture] | None = None

    def question(self, sample: Sample) -> PreparedQuestion:
        """The sample's prompt and picture. Raises DataError for a bad picture or one that does not fit its boxes,
        PromptError for an unknown template."""
        template = self._find_template(sample.template or self._template)
        ids = prompt_ids(sample.conversation(), template, self._rules.tokens, self._tokenizer)
        picture = None if sample.image is None else self._picture(sample.image)
        if picture is not None:
            check_boxes(sample, picture.size_px)
        return PreparedQuestion(sample, ids, picture)

    def prediction(self, question: PreparedQuestion, new_ids: Sequence[int]) -> Prediction:
        """Decode the new ids up to the first stop id."""
        stops = (place for place, token_id in enumerate(new_ids) if token_id in self._rules.tokens.stop_ids)
        ids = tuple(new_ids[: next(stops, len(new_ids))])
        size_px = None if question.picture is None else question.picture.size_px
        return Prediction(question.sample, self._tokenizer.decode(ids).strip(), ids, size_px)

    def answer_ids(self, text: str) -> Ints:
        """The ids of a given answer, stop id included, int64 [answer]."""
        return np.array([*self._tokenizer.encode(text), self._rules.tokens.stop_ids[0]], np.int64)

    def _find_template(self, name: str) -> ChatTemplate:
        for template in self._rules.templates:
            if template.name == name:
                return template
        known = ", ".join(template.name for template in self._rules.templates)
        raise PromptError(f'template "{name}" is not one of this model\'s; it has: {known}')

    def _picture(self, source: Picture) -> PreparedPicture:
        if self._last is None or self._last[0] != source:
            image = load_image(source)
            self._last = source, PreparedPicture(preprocess(image, self._rules.image), full_size(image))
        return self._last[1]


IdsAndImages = tuple[NDArray[Any], NDArray[Any] | None]  # int64 [seq]; float32 [images, 3, S, S]


class IdsSession(Protocol):
    """The part of a runtime session that BundleAnswerer uses."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""

    @property
    def manifest(self) -> PromptRules:
        """The bundle's manifest."""

    @property
    def prompts_at_once(self) -> int:
        """How many prompts run side by side."""

    def generate_ids_batch(self, prompts: Sequence[IdsAndImages], max_new_tokens: int = 16) -> list[Ints]:
        """Greedy continuation of each prompt, int64 [new]."""

    def close(self) -> None:
        """Release the engine."""


class BundleAnswerer(Answerer):
    """Answers with an opened bundle, in batches of as many prompts as it runs side by side."""

    def __init__(self, session: IdsSession, max_new_tokens: int = MAX_NEW_TOKENS, template: str | None = None) -> None:
        self._session = session
        self._max_new_tokens = max_new_tokens
        self._maker = QuestionMaker(session.manifest, session.tokenizer, template)

    @override
    def answers(self, samples: Iterable[Sample]) -> Iterator[Prediction]:
        stream = iter(samples)
        while block := list(islice(stream, self._session.prompts_at_once)):
            questions = [self._maker.question(sample) for sample in block]
            for question, new_ids in zip(questions, self._answer(questions), strict=True):
                yield self._maker.prediction(question, new_ids.tolist())

    def _answer(self, questions: Sequence[PreparedQuestion]) -> list[Ints]:
        prompts = [(one.ids, None if one.picture is None else one.picture.pixels[None]) for one in questions]
        try:
            return self._session.generate_ids_batch(prompts, self._max_new_tokens)
        except PromptError as error:
            if len(questions) > 1:
                return [answer for question in questions for answer in self._answer([question])]  # find the bad one
            raise PromptError(f"question {questions[0].sample.turns[-1].user[:80]!r}: {error}") from error

    def close(self) -> None:
        """Release the bundle's engine."""
        self._session.close()
