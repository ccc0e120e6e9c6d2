"""Asks one question repeatedly and times every phase of the answer.

Each answer uses a fresh session, so no picture is cached, and a wrapper around the backend that times its calls.
Answers continue past stop ids, so all have the same length.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from vlmdeploy.bench.measurement import MeasureOptions
from vlmdeploy.bench.phase_watch import PhaseWatch
from vlmdeploy.errors import ConfigError, PromptError
from vlmdeploy.layout import Bools, Ints, prompt_of
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.backends.lanes import Call, Floats, Lanes
from vlmdeploy.runtime.chat import prompt_ids, read_messages
from vlmdeploy.runtime.image import ImageSource, load_image, preprocess
from vlmdeploy.runtime.session import Session

QUESTION = "Describe what there is to see, from left to right."
RANDOM_IDS = 16  # the text if a bundle has no tokenizer
RANDOM_PICTURE_PX = (1024, 768)  # width and height


@dataclass(frozen=True)
class AnswerTimes:
    """Milliseconds of one answer. decode: each token after the first; vision: 0 without a picture."""

    preprocess: float
    vision: float
    prefill: float
    decode: list[float]

    @property
    def first_token(self) -> float:
        """From the question until the first token is chosen."""
        return self.preprocess + self.vision + self.prefill


class MeasuredBackend:
    """Wraps a backend during one answer and records when phases and tokens began."""

    def __init__(self, backend: Backend, watch: PhaseWatch) -> None:
        self.begun: dict[str, float] = {}
        self.decode_begun: list[float] = []
        self._backend = backend
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on to the backend."""
        return getattr(self._backend, name)

    def _begin(self, phase: str) -> None:
        if phase not in self.begun:
            self._watch.begin(phase)
            self.begun[phase] = self._watch.now()

    def encode_images(self, pixels: Floats) -> Floats:
        """Time the vision phase."""
        self._begin("vision")
        rows = self._backend.encode_images(pixels)
        self._watch.look()
        return rows

    def run(self, call: Call, lanes: Lanes) -> Floats:
        """Time the prefill phase."""
        self._begin("prefill")
        logits = self._backend.run(call, lanes)
        self._watch.look()
        return logits

    def decode(self, hidden: Floats, is_fed: Bools, lanes: Lanes) -> Floats:
        """Time the decode phase and each token."""
        self._begin("decode")
        self.decode_begun.append(self._watch.now())
        return self._backend.decode(hidden, is_fed, lanes)


@dataclass(frozen=True)
class AskedPicture:
    """The picture to ask about (None: text only) and its name in a report."""

    source: ImageSource | None
    name: str


def chosen_picture(options: MeasureOptions) -> AskedPicture:
    """The picture of the options, or a random one. Raises DataError if it cannot be read."""
    if options.text_only:
        return AskedPicture(None, "none")
    if options.image is not None:
        load_image(options.image)
        return AskedPicture(options.image, "from a data URL" if options.image.startswith("data:") else options.image)
    width, height = RANDOM_PICTURE_PX
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(values).save(content, "JPEG")
    return AskedPicture(content.getvalue(), f"random JPEG of {width} x {height} pixels")


class TimedQuestion:
    """The prompt of the options for a session's bundle. Raises ConfigError, PromptError and BundleError if they do not
    fit together."""

    def __init__(self, session: Session, options: MeasureOptions, picture: AskedPicture) -> None:
        manifest = session.manifest
        rules = manifest.tokens
        self.picture = picture
        self.image_rows = 0 if picture.source is None else rules.rows_per_image
        self._manifest = replace(manifest, has_tokenizer=False, tokens=replace(rules, stop_ids=()))
        self._files = replace(session.files, manifest=self._manifest)
        self._new_tokens = options.new_tokens
        self._template = manifest.template(options.template)
        self._text = QUESTION if options.prompt is None else options.prompt
        self._tokenizer = session.tokenizer if manifest.has_tokenizer else None
        if self._tokenizer is None:
            _refuse_text(session.folder, options)
        random_text = np.random.default_rng(0).integers(manifest.embedding.vocab_size, size=RANDOM_IDS)
        self._random_ids = prompt_of(random_text, rules, num_images=int(picture.source is not None))
        self.prompt_tokens = len(self._ids())
        self._check_length()

    def _ids(self) -> Ints:
        """Prompt ids int64 [seq]."""
        if self._tokenizer is None:
            return self._random_ids
        content: list[dict[str, object]] = [{"type": "text", "text": self._text}]
        if self.picture.source is not None:
            content.insert(0, {"type": "image", "image": self.picture.source})
        conversation = read_messages([{"role": "user", "content": content}], self._manifest.tokens.max_images)
        return prompt_ids(conversation, self._template, self._manifest.tokens, self._tokenizer)

    def _pixels(self) -> Floats | None:
        """The encoder's input, float32 [1, 3, S, S]; None without a picture."""
        source = self.picture.source
        return None if source is None else preprocess(load_image(source), self._manifest.image)[None]

    def _check_length(self) -> None:
        room = self._manifest.context_tokens - self.prompt_tokens - 1  # one token comes with the prompt
        if self._new_tokens > room:
            advice = f"ask for at most {room}" if room > 0 else "shorten the prompt"
            raise PromptError(
                f"{self._files.folder}: the prompt has {self.prompt_tokens} tokens ({self.image_rows} of them the "
                f"picture), {self._new_tokens} new tokens are asked for, and the context holds "
                f"{self._manifest.context_tokens}: {advice}, or export with a larger --context"
            )

    def ask(self, backend: Backend, watch: PhaseWatch) -> AnswerTimes:
        """Generate one answer with exactly the requested number of decode steps."""
        measured = MeasuredBackend(backend, watch)
        watch.begin("preprocess")
        start = watch.now()
        ids, pixels = self._ids(), self._pixels()
        ready = watch.now()
        session = Session(self._files, cast(Backend, measured))
        opened = watch.now()
        session.generate_ids(ids, pixels, self._new_tokens + 1)
        edges = np.diff([*measured.decode_begun, watch.now()])
        watch.end()
        assert len(edges) == self._new_tokens, "no answer ends early"
        prefill = measured.begun["prefill"] if pixels is not None else opened
        first = measured.decode_begun[0]
        return AnswerTimes(
            1e3 * (ready - start), 1e3 * (prefill - opened), 1e3 * (first - prefill), (1e3 * edges).tolist()
        )


def _refuse_text(folder: Path, options: MeasureOptions) -> None:
    for name in ("prompt", "template"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"{folder}: an ids-only bundle takes no --{name}: leave it out to ask random ids, or export again with "
                "--tokenizer FILE"
            )
