"""Calibration samples as prompts with their answers: ids, positions and expert mask. Pictures are opened on demand.

Every 8th picture, with all its samples, and every 8th text-only sample is held out: its tokens enter no Hessian and
measure the result.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.calib.activations import Ints
from vlmdeploy.data.samples import Picture, Sample
from vlmdeploy.errors import CalibrationError
from vlmdeploy.layout import Bools, PromptLayout, lay_out
from vlmdeploy.runtime.chat import Tokenizer, prompt_ids
from vlmdeploy.runtime.image import load_image, preprocess
from vlmdeploy.spec.model import ModelSpec

HELD_OUT_EVERY = 8
LEAST_FOR_HOLDING_OUT = 16  # pictures or texts; with fewer, all of them calibrate


@dataclass(frozen=True)
class CalibrationSample(PromptLayout):
    """The layout of one prompt with its answer. answer_start: index of the answer's first token; without an answer, the
    length."""

    name: str
    image: Picture | None
    answer_start: int
    held_out: bool = False


@dataclass(frozen=True)
class Tokens:
    """The rows of several samples, concatenated as activations are stored.

    offsets int64 [samples + 1]; vision_mask bool [tokens]; held_out bool [samples].
    """

    names: tuple[str, ...]
    offsets: Ints
    vision_mask: Bools
    held_out: Bools

    @property
    def count(self) -> int:
        """Number of tokens."""
        return int(self.offsets[-1])

    def rows(self, sample: int) -> Ints:
        """Row numbers of one sample."""
        return np.arange(self.offsets[sample], self.offsets[sample + 1])

    def with_rows(self, counts: Sequence[int]) -> "Tokens":
        """The same samples with `counts` rows each. Rows keep their experts only if no count changes."""
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        if np.array_equal(offsets, self.offsets):
            return self
        return replace(self, offsets=offsets, vision_mask=np.zeros(int(offsets[-1]), np.bool_))

    def select(self, expert: str | None, held_out: bool) -> Ints:
        """Row numbers of the calibration or the held-out samples, of one expert or of all (None)."""
        chosen = np.repeat(self.held_out == held_out, np.diff(self.offsets))
        if expert is not None:
            chosen &= self.vision_mask == (expert == "vision")
        return np.flatnonzero(chosen)

    def is_first(self, rows: Ints) -> Bools:
        """Which of these rows are the first of their sample."""
        return np.isin(rows, self.offsets[:-1])

    def sample_of(self, row: int) -> str:
        """Name of the sample that owns a row."""
        return self.names[int(np.searchsorted(self.offsets, row, side="right")) - 1]

    def samples_in(self, rows: Ints) -> int:
        """Number of samples that own these rows."""
        return len(np.unique(np.searchsorted(self.offsets, rows, side="right")))


def read_calibration_sample(
    sample: Sample, spec: ModelSpec, tokenizer: Tokenizer, template: str | None
) -> CalibrationSample:
    """Tokenize a sample, answer included. Raises CalibrationError if it exceeds the context."""
    wanted = sample.template or template or spec.default_template
    found = [item for item in spec.templates if item.name == wanted]
    if not found:
        known = ", ".join(item.name for item in spec.templates)
        raise CalibrationError(f'{_name(sample)}: template "{wanted:.80}" is not one of this model\'s; it has: {known}')
    prompt = prompt_ids(sample.conversation(), found[0], spec.tokens, tokenizer)
    ids = np.concatenate((prompt, np.array(tokenizer.encode(sample.answer or ""), np.int64)))
    name = _name(sample)
    if len(ids) > spec.decoder.context_tokens:
        raise CalibrationError(
            f"{name}: has {len(ids)} tokens, the model's context {spec.decoder.context_tokens}; leave it out or use "
            "--skip-broken"
        )
    return _with_layout(name, sample.image, ids, len(prompt), spec)


def _with_layout(name: str, image: Picture | None, ids: Ints, answer_start: int, spec: ModelSpec) -> CalibrationSample:
    layout = lay_out(ids, spec.tokens, num_images=int(image is not None))
    return CalibrationSample(**vars(layout), name=name, image=image, answer_start=answer_start)


def _name(sample: Sample) -> str:
    text = sample.turns[-1].user
    question = text if len(text) <= 40 else f"{text[:37]}..."
    return f"{sample.image or 'text only'}, {question!r}"


def hold_out(samples: Sequence[CalibrationSample]) -> tuple[CalibrationSample, ...]:
    """Mark the samples of every 8th picture and every 8th text-only sample, if there are enough of that kind."""
    pictures = _every_eighth([sample.image for sample in samples if sample.image is not None])
    texts = _every_eighth([id(sample) for sample in samples if sample.image is None])
    return tuple(replace(sample, held_out=sample.image in pictures or id(sample) in texts) for sample in samples)


def _every_eighth(keys: Sequence[Hashable]) -> set[Hashable]:
    """Every 8th distinct key, or none if there are few."""
    different = list(dict.fromkeys(keys))
    return set(different[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]) if len(different) >= LEAST_FOR_HOLDING_OUT else set()


def prompt_tokens(samples: Sequence[CalibrationSample]) -> Tokens:
    """The decoder rows of these samples."""
    offsets = np.concatenate(([0], np.cumsum([len(sample.ids) for sample in samples]))).astype(np.int64)
    masks = [sample.vision_mask for sample in samples]
    return Tokens(
        tuple(sample.name for sample in samples),
        offsets,
        np.concatenate(masks) if masks else np.zeros(0, np.bool_),
        np.array([sample.held_out for sample in samples], np.bool_),
    )


@dataclass(frozen=True)
class Pictures:
    """The distinct pictures of the samples, in order of first use, and which are held out."""

    paths: tuple[Picture, ...]
    held_out: Bools

    def tokens(self, rows_each: int) -> Tokens:
        """The rows of a stage with `rows_each` rows per picture."""
        offsets = np.arange(len(self.paths) + 1, dtype=np.int64) * rows_each
        mask = np.zeros(int(offsets[-1]), np.bool_)
        return Tokens(tuple(map(str, self.paths)), offsets, mask, self.held_out)


def pictures_of(samples: Iterable[CalibrationSample]) -> Pictures:
    """Collect every picture once."""
    held: dict[Picture, bool] = {}
    for sample in samples:
        if sample.image is not None:
            held[sample.image] = sample.held_out
    return Pictures(tuple(held), np.array(list(held.values()), np.bool_))


def read_pixels(path: Picture, spec: ModelSpec) -> NDArray[np.float32]:
    """Load and preprocess a picture, float32 [3, S, S]."""
    return preprocess(load_image(path), spec.image)
