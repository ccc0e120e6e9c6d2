"""Batched answers of the PyTorch reference to a data set's questions."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.data.samples import Picture, Sample
from vlmdeploy.errors import PromptError
from vlmdeploy.layout import lay_out
from vlmdeploy.model.batch import Layout, derive_layout
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.overriding import override
from vlmdeploy.runtime.chat import Tokenizer
from vlmdeploy.score.answerers import MAX_NEW_TOKENS, Answerer, PreparedQuestion, QuestionMaker
from vlmdeploy.score.metrics import Prediction

BATCHES_PER_BLOCK = 8

Item = TypeVar("Item")


class TorchAnswerer(Answerer):
    """Answers with the PyTorch reference, `batch_size` prompts at a time.

    Within a block of several batches, each picture is encoded once, and prompts of similar task and length share one.
    An answer ends after `max_new_tokens`, or when the context is full.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        batch_size: int = 64,
        max_new_tokens: int = MAX_NEW_TOKENS,
        template: str | None = None,
    ) -> None:
        self._model = model
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._maker = QuestionMaker(model.spec, tokenizer, template)
        self._device = model.embedding.weight.device

    @override
    def answers(self, samples: Iterable[Sample]) -> Iterator[Prediction]:
        stream = iter(samples)
        while block := list(islice(stream, BATCHES_PER_BLOCK * self._batch_size)):
            yield from self._answer_block([self._maker.question(sample) for sample in block])

    @torch.no_grad()
    def _answer_block(self, questions: Sequence[PreparedQuestion]) -> list[Prediction]:
        image_rows = self._encode_pictures(questions)
        order = sorted(range(len(questions)), key=lambda place: _likeness(questions[place]))
        new_ids: dict[int, list[int]] = {}
        for places in _batches(order, self._batch_size):
            answers = self._generate([questions[place] for place in places], image_rows)
            new_ids.update(zip(places, answers, strict=True))
        return [self._maker.prediction(question, new_ids[place]) for place, question in enumerate(questions)]

    def _encode_pictures(self, questions: Sequence[PreparedQuestion]) -> dict[Picture, Tensor]:
        """The decoder rows [rows, hidden] of every picture."""
        pictures = {question.sample.image: question.picture for question in questions}
        found = [(path, picture) for path, picture in pictures.items() if path is not None and picture is not None]
        image_rows: dict[Picture, Tensor] = {}
        for batch in _batches(found, self._batch_size):
            pixels = torch.from_numpy(np.stack([picture.pixels for _, picture in batch]))
            encoded = self._model.encode_images(pixels.to(self._device))
            image_rows.update(zip([path for path, _ in batch], encoded, strict=True))
        return image_rows

    def _generate(self, batch: Sequence[PreparedQuestion], image_rows: dict[Picture, Tensor]) -> list[list[int]]:
        """New ids of every prompt; image_rows [rows, hidden] of each picture."""
        limits = [self._limit(question) for question in batch]
        ids, layout = self._padded(batch)
        rows = [image_rows[question.sample.image] for question in batch if question.sample.image is not None]
        x = self._model.join(ids, layout.token_type_ids, torch.stack(rows) if rows else None)
        new_ids = self._model.continue_greedily(x, layout, max(limits)).tolist()
        return [row[:limit] for row, limit in zip(new_ids, limits, strict=True)]

    def _padded(self, batch: Sequence[PreparedQuestion]) -> tuple[Tensor, Layout]:
        """The right-padded prompts, int64 [batch, seq], and their layout."""
        tokens, shape = self._model.spec.tokens, (len(batch), max(len(question.ids) for question in batch))
        ids, types, mask = np.full(shape, tokens.pad_id), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, question in enumerate(batch):
            end = len(question.ids)
            ids[row, :end], mask[row, :end] = question.ids, 1
            types[row, :end] = lay_out(question.ids, tokens, num_images=int(question.picture is not None)).types
        on_device = [torch.from_numpy(values).to(self._device) for values in (ids, types, mask)]
        return on_device[0], derive_layout(self._model.spec, on_device[0], None, on_device[1], None, on_device[2])

    def _limit(self, question: PreparedQuestion) -> int:
        """How many new tokens the answer may have."""
        context = self._model.spec.decoder.context_tokens
        if len(question.ids) >= context:
            asked, found = question.sample.turns[-1].user[:80], f"{len(question.ids)} tokens, the context {context}"
            raise PromptError(f"question {asked!r}: the prompt has {found}: no room to answer")
        return min(self._max_new_tokens, context - len(question.ids))


def _likeness(question: PreparedQuestion) -> tuple[str, int]:
    """Sort key that groups prompts, and probably answers, of similar length."""
    return question.sample.task, len(question.ids)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
