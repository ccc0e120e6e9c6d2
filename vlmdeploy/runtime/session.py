"""A bundle opened on a backend: messages in, text out; or ids in, ids and logits out.

session = vlmdeploy.open("bundle")
for piece in session.generate([{"role": "user", "content": "..."}]): ...
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.errors import BackendError, BundleError, PromptError, shown
from vlmdeploy.input_files import given_path
from vlmdeploy.layout import Ints
from vlmdeploy.manifest import TOKENIZER_NAME
from vlmdeploy.runtime.answer import Answer, Running
from vlmdeploy.runtime.backends.choose import open_backend
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.backends.lanes import Floats
from vlmdeploy.runtime.chat import Conversation, Message, Tokenizer, prompt_ids, read_messages
from vlmdeploy.runtime.embedding import EmbeddingTable
from vlmdeploy.runtime.generate import (
    GenerateLoop,
    Prompt,
    Read,
    Request,
    Timings,
    make_prompt,
    prompt_rows,
    read_prompts,
)
from vlmdeploy.runtime.image import ImageSource, full_size, load_image, preprocess
from vlmdeploy.runtime.image_limits import DEFAULT_LIMITS, ImageLimits
from vlmdeploy.runtime.integrity import BundleFiles, check_bundle
from vlmdeploy.runtime.sampling import Sampler, SamplingOptions

KEPT_IMAGES, MOST_THREADS = 4, 1024
BYTES_PER_TOKEN = 128  # the longest tokens of real vocabularies are runs of as many spaces


@dataclass(frozen=True)
class PreparedPrompt:
    """Ids int64 [seq] and images float32 [n, 3, S, S], None without any, as `generate_ids` takes them."""

    ids: Ints
    images: Floats | None


class Session:
    """An opened bundle. Not thread-safe."""

    def __init__(
        self,
        files: BundleFiles,
        backend: Backend,
        allow_local: bool = False,
        image_limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.files = files
        self.folder = files.folder
        self.manifest = files.manifest
        self.backend = backend
        self._allow_local = allow_local
        self._image_limits = image_limits
        self.embedding = EmbeddingTable(files)
        self._image_rows: dict[bytes, Floats] = {}  # the least recently used first
        self._tokenizer = bundle_tokenizer(files) if self.manifest.has_tokenizer else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; raises BundleError on an ids-only bundle."""
        if self._tokenizer is None:
            raise BundleError(
                f"{self.folder}: an ids-only bundle, exported without a tokenizer: `generate_ids` and `logits` work; "
                "for text export again with --tokenizer FILE"
            )
        return self._tokenizer

    def close(self) -> None:
        """Release the backend; the session is unusable afterwards. A `with` block closes it too."""
        self.backend.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        template: str | None = None,
    ) -> Iterator[str]:
        """Answer OpenAI-style messages, piece by piece as text becomes certain; greedy unless a temperature is given.

        Checks messages and options before returning the iterator. Raises PromptError and DataError.
        """
        options = SamplingOptions(temperature, top_k, top_p, repetition_penalty, seed, max_new_tokens, _stops(stop))
        return self.start(messages, options, template).pieces()

    def answer(self, messages: Sequence[Message], options: SamplingOptions, template: str | None = None) -> Answer:
        """The whole answer, with its boxes and timings."""
        running = self.start(messages, options, template)
        return running.finish("".join(running.pieces()))

    def start(self, messages: Sequence[Message], options: SamplingOptions, template: str | None = None) -> Running:
        """Check and prepare an answer; the model first runs when a piece is taken."""
        tokenizer, timings = self.tokenizer, Timings()
        conversation, ids = self._read(messages, template)
        start = time.perf_counter()
        pixels, size = self._pictures(conversation)
        timings.preprocess_ms = 1000 * (time.perf_counter() - start)
        prompt = self._prompt(ids, pixels)
        tokens = self._tokens(prompt, options, timings)
        return Running(prompt, options, size, timings, tokenizer, self.manifest.tokens.stop_ids, tokens)

    def prepare(self, messages: Sequence[Message], template: str | None = None) -> PreparedPrompt:
        """What `generate` would run for these messages. Raises PromptError and DataError."""
        conversation, ids = self._read(messages, template)
        pixels, _ = self._pictures(conversation)
        self._prompt(ids, pixels)  # checks it
        return PreparedPrompt(ids, pixels)

    def pixels(self, picture: ImageSource) -> Floats:
        """A picture as the vision encoder takes it, float32 [1, 3, S, S]. Raises DataError."""
        return preprocess(load_image(picture, self._image_limits), self.manifest.image)[None]

    def _read(self, messages: Sequence[Message], template: str | None) -> tuple[Conversation, Ints]:
        """The conversation in these messages, its pictures unopened, and its prompt's ids."""
        tokenizer = self.tokenizer
        if not (template is None or isinstance(template, str)):
            raise PromptError(f"template is {shown(template)}, expected the name of one")
        conversation = read_messages(messages, self.manifest.tokens.max_images, self._allow_local)
        self._check_size(conversation)
        return conversation, prompt_ids(conversation, self.manifest.template(template), self.manifest.tokens, tokenizer)

    def generate_ids(
        self, input_ids: NDArray[Any], images: NDArray[Any] | None = None, max_new_tokens: int = 16
    ) -> Ints:
        """Greedy continuation of one prompt. input_ids int64 [seq], images float32 [images, 3, S, S] preprocessed.

        Returns int64 [new], including the stop id. Raises PromptError.
        """
        options = SamplingOptions(max_new_tokens=max_new_tokens)
        prompt = self._prompt(input_ids, images)
        return np.fromiter(self._tokens(prompt, options, Timings()), np.int64)

    def generate_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  # frozen
        template: str | None = None,
    ) -> list[str]:
        """Answer each conversation with text; see `generate_ids_batch`. Raises PromptError and DataError."""
        running = []
        for place, messages in enumerate(_sequence("conversations", conversations)):
            with _naming(f"conversations[{place}]"):
                running.append(self.start(messages, options, template))
        answers = self._batched([one.prompt for one in running], options)
        return [one.text_of(ids) for one, ids in zip(running, answers, strict=True)]

    @property
    def prompts_at_once(self) -> int:
        """Prompts that `generate_ids_batch` runs side by side: one, unless the bundle has the routed plugin."""
        return self.backend.most_lanes

    def generate_ids_batch(
        self, prompts: Sequence[tuple[NDArray[Any], NDArray[Any] | None]], max_new_tokens: int = 16
    ) -> list[Ints]:
        """Greedy continuation int64 [new] of several prompts, each a pair of ids and images as in `generate_ids`.

        A bundle with the routed plugin runs up to `prompts_at_once` of them side by side, with and without images;
        others run one after the other. Raises PromptError, naming the prompt, before anything runs.
        """
        made = []
        for place, pair in enumerate(_sequence("prompts", prompts)):
            with _naming(f"prompts[{place}]" if len(prompts) > 1 else ""):
                if not isinstance(pair, tuple | list) or len(pair) != 2:
                    raise PromptError(f"found {type(pair).__name__}, expected a pair: ids, and images or None")
                made.append(self._prompt(*pair))
        options = SamplingOptions(max_new_tokens=max_new_tokens)
        return [np.array(answer, np.int64) for answer in self._batched(made, options)]

    def _batched(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[list[int]]:
        """Token ids of each answer, including a stop id; runs as many prompts at once as the backend takes."""
        answers: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(prompts), self.backend.most_lanes):
            for tokens in self._steps(prompts[first : first + self.backend.most_lanes], options, Timings()):
                for lane, token in tokens.items():
                    answers[first + lane].append(token)
        return answers

    def _tokens(self, prompt: Prompt, options: SamplingOptions, timings: Timings) -> Iterator[int]:
        """Token ids of one answer, one by one."""
        return (tokens[0] for tokens in self._steps([prompt], options, timings))

    def _steps(self, prompts: Sequence[Prompt], options: SamplingOptions, timings: Timings) -> Iterator[dict[int, int]]:
        """The next token of every unfinished answer, by the prompt's place."""
        requests = {}
        for lane, prompt in enumerate(prompts):
            room = self.manifest.context_tokens - len(prompt.ids)
            requests[lane] = Request(prompt, Sampler(options), min(options.max_new_tokens, room))
        lanes = self.backend.new_lanes(len(prompts), max(request.capacity for request in requests.values()))
        stop_ids = self.manifest.tokens.stop_ids
        loop = GenerateLoop(self.backend, self.embedding, self._encode_images, stop_ids, lanes, timings)
        loop.begin(requests)
        yield from loop

    def logits(self, input_ids: NDArray[Any], images: NDArray[Any] | None = None, last: int | None = None) -> Floats:
        """Logits of every prompt position (or of the last few), float32 [seq or last, vocab].

        Rows of the vision expert are NaN: it has no head. input_ids int64 [seq], images float32 [images, 3, S, S]
        preprocessed. Raises PromptError.
        """
        prompt = self._prompt(input_ids, images)
        if not (last is None or _is_count(last, sys.maxsize)):
            raise PromptError(f"last is {shown(last)}, expected a whole number of at least 1, or None")
        first = 0 if last is None else max(0, len(prompt.ids) - last)
        wanted = first + np.flatnonzero(~prompt.vision_mask[first:])
        result = np.full((len(prompt.ids) - first, self.manifest.embedding.vocab_size), np.nan, np.float32)
        rows = prompt_rows(prompt, self._encode_images, self.embedding)
        lanes = self.backend.new_lanes(1, len(prompt.ids))
        lanes.begin(0, prompt.positions)
        result[wanted - first] = read_prompts({0: Read(prompt, rows, wanted)}, lanes, self.backend)[0]
        self.backend.end_prefill()
        return result

    def _encode_images(self, pixels: Floats) -> Floats:
        """Decoder rows of the images. Caches those of the last few prompts: a second question costs no encoding."""
        key = hashlib.sha256(pixels.tobytes()).digest()
        rows = self._image_rows.pop(key, None)
        if rows is None:
            rows = self.backend.encode_images(pixels)
        self._image_rows[key] = rows
        if len(self._image_rows) > KEPT_IMAGES:
            del self._image_rows[next(iter(self._image_rows))]
        return rows

    def _pictures(self, conversation: Conversation) -> tuple[Floats | None, tuple[int, int]]:
        """Preprocessed pixels of the images and the upright size of the first one, in pixels."""
        pixels, sizes = [], []
        for source in conversation.images:
            picture = load_image(source, self._image_limits)
            pixels.append(preprocess(picture, self.manifest.image))
            sizes.append(full_size(picture))
        return (np.stack(pixels), sizes[0]) if pixels else (None, (0, 0))

    def _check_size(self, conversation: Conversation) -> None:
        """Refuse texts and pictures that no context holds before the ones are tokenized and the others opened."""
        rows = len(conversation.images) * self.manifest.tokens.rows_per_image
        if rows >= self.manifest.context_tokens:
            raise PromptError(
                f"{len(conversation.images)} images take {rows} tokens and the context holds "
                f"{self.manifest.context_tokens}: show fewer, or export with a larger --context"
            )
        texts = [text or "" for turn in conversation.turns for text in (turn.user, turn.assistant)]
        size = sum(len(text.encode()) for text in (*texts, conversation.system or ""))
        most = BYTES_PER_TOKEN * self.manifest.context_tokens
        if size > most:
            raise PromptError(
                f"the text has {shown_size(size)}, at most {shown_size(most)} fit into a context of "
                f"{self.manifest.context_tokens} tokens: shorten it"
            )

    def _prompt(self, input_ids: NDArray[Any], images: NDArray[Any] | None) -> Prompt:
        manifest = self.manifest
        ids = _array("input_ids", input_ids)
        pixels = None if images is None else _array("images", images, np.float32)
        prompt = make_prompt(ids, pixels, manifest.tokens, manifest.embedding.vocab_size, manifest.image.size_px)
        if len(ids) >= manifest.context_tokens:
            raise PromptError(
                f"the prompt has {len(ids)} tokens (an image takes {manifest.tokens.rows_per_image}) and the context "
                f"holds {manifest.context_tokens}: shorten the text, or export with a larger --context"
            )
        return prompt


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Prefix a PromptError with the prompt's place in the batch; "" for a single prompt."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{place}: {error}" if place else str(error)) from error


def bundle_tokenizer(files: BundleFiles) -> Tokenizer:
    """The tokenizer of a bundle that has one. Raises BundleError."""
    return Tokenizer.from_bytes(files.read(TOKENIZER_NAME), str(files.folder / TOKENIZER_NAME))


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """A caller's stop strings; raises PromptError for another kind of value."""
    if isinstance(stop, str):
        return (stop,)
    if not isinstance(stop, list | tuple | None):
        raise PromptError(f"option stop is {shown(stop)}, expected a string, a list of strings or None")
    return tuple(stop or ())


def _check(option: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise BackendError(f"{option} is {shown(value)}, expected {expected}")


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _sequence(name: str, values: Any) -> Sequence[Any]:
    """A caller's list; raises PromptError for another kind of value."""
    if not isinstance(values, list | tuple):
        raise PromptError(f"{name} is {shown(values)}, expected a list")
    return values


def _array(name: str, values: Any, kind: type[np.generic] | None = None) -> NDArray[Any]:
    """A caller's value as an array; raises PromptError if it is none."""
    try:
        return np.asarray(values, kind)
    except (ValueError, TypeError, OverflowError) as error:
        raise PromptError(f"{name} cannot be read as an array of numbers: {error}") from error


def open_bundle(
    folder: str | Path,
    check: str = "auto",
    provider: str | None = None,
    threads: int | None = None,
    residency: str = "all",
    trust: bool = False,
    follow_links: bool = False,
    allow_local: bool = False,
    image_limits: ImageLimits = DEFAULT_LIMITS,
) -> Session:
    """Open a bundle for inference.

    check: "auto" hashes every file when a bundle is first seen, "full" always. provider: the bundle's own (default), or
    "cpu" to run the graphs of a TensorRT bundle in ONNX Runtime and check them. residency: "phase" drops what only
    prompts need after prefill and reloads it for the next prompt. trust: load engines and plugin libraries, which are
    native code, of a bundle that was neither built nor trusted on this machine; see SECURITY.md. follow_links: read
    files that links place outside the folder. allow_local: `image_url` may name a file of this machine.
    image_limits: how large pictures may be. Raises BundleError and BackendError.
    """
    folder = given_path(folder, BundleError, "the folder of a bundle")
    _check("check", check, isinstance(check, str) and check in ("auto", "full"), '"auto" or "full"')
    _check("provider", provider, provider is None or isinstance(provider, str), '"cpu", "cuda" or None')
    _check("threads", threads, threads is None or _is_count(threads, MOST_THREADS), f"1 to {MOST_THREADS} or None")
    _check("residency", residency, isinstance(residency, str) and residency in ("all", "phase"), '"all" or "phase"')
    for name, flag in {"trust": trust, "follow_links": follow_links, "allow_local": allow_local}.items():
        _check(name, flag, isinstance(flag, bool), "True or False")
    _check("image_limits", image_limits, isinstance(image_limits, ImageLimits), "ImageLimits")
    files = check_bundle(folder, check, follow_links=follow_links)
    return Session(files, open_backend(files, provider, threads, residency, trust), allow_local, image_limits)
