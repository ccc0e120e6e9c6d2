"""The generate loop: prompts fill the lanes of one KV cache, then each step adds one token to every lane.

A single prompt is one lane. The loop knows a backend and how each lane chooses its tokens; lanes can begin and end
between any two tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmdeploy.errors import PromptError
from vlmdeploy.layout import Bools, Ints, PromptLayout, lay_out, segments_of
from vlmdeploy.manifest import TokenRules
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.backends.lanes import Call, Floats, Lanes, slot_positions
from vlmdeploy.runtime.embedding import EmbeddingTable

NOTHING: Ints = np.zeros(0, np.int64)
ChooseToken = Callable[[Floats, Ints], int]
Ranges = Mapping[int, tuple[int, int]]  # what a call reads: lane -> first and past-the-last position of its prompt


@dataclass(frozen=True)
class Prompt(PromptLayout):
    """A prompt's layout, and the pixels float32 [images, 3, S, S] of its images."""

    pixels: Floats | None


@dataclass
class Timings:
    """Milliseconds spent in each phase of one answer."""

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)


def make_prompt(ids: Ints, pixels: Floats | None, rules: TokenRules, vocab_size: int, image_px: int) -> Prompt:
    """Check ids int64 [seq] and pixels float32 [images, 3, S, S] and lay the prompt out. Raises PromptError."""
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"input_ids is {ids.dtype} {list(ids.shape)}, expected int64 [seq] with at least one id")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise PromptError(f"input_ids holds {ids.min()}..{ids.max()}, expected 0..{vocab_size - 1}")
    if pixels is not None and pixels.shape[1:] != (3, image_px, image_px):
        raise PromptError(f"images is {list(pixels.shape)}, expected [images, 3, {image_px}, {image_px}]")
    num_images = 0 if pixels is None else len(pixels)
    return Prompt(**vars(lay_out(ids, rules, num_images)), pixels=pixels if num_images else None)


def prompt_rows(prompt: Prompt, encode_images: Callable[[Floats], Floats], embedding: EmbeddingTable) -> Floats:
    """Input of the first decoder layer, float32 [seq, hidden]: embeddings, and image rows where the type is 1."""
    rows = embedding[prompt.ids]
    if prompt.pixels is not None:
        rows[prompt.types == 1] = encode_images(prompt.pixels).reshape(-1, rows.shape[1])
    return rows


@dataclass(frozen=True)
class Read:
    """A prompt to read into a lane. rows float32 [seq, hidden]; wanted int64 [wanted]: positions whose logits are
    needed, ascending, on the language expert."""

    prompt: Prompt
    rows: Floats
    wanted: Ints


def read_prompts(reads: Mapping[int, Read], lanes: Lanes, backend: Backend) -> dict[int, Floats]:
    """Fill open, empty lanes with prompts; returns the logits [wanted, vocab] of each.

    Several lanes need a backend that mixes experts. Other open lanes keep their contents.
    """
    found: dict[int, list[Floats]] = {lane: [] for lane in reads}
    for ranges in prompt_calls(reads, lanes, backend):
        call, asked = _call(reads, ranges, lanes.count)
        logits, first = backend.run(call, lanes), 0
        for lane, count in asked.items():
            found[lane].append(logits[first : first + count])
            first += count
    return {lane: np.concatenate(parts) for lane, parts in found.items()}


def prompt_calls(reads: Mapping[int, Read], lanes: Lanes, backend: Backend) -> list[Ranges]:
    """What each call reads of each prompt: segments of equal expert, or plain chunks if the backend mixes experts."""
    chunk_rows = min(backend.chunk_rows, lanes.most_rows(reads))
    if len(reads) > 1:
        assert backend.mixes_experts, "side by side, prompts change experts at different positions"
        return prefill_steps({lane: len(read.prompt.ids) for lane, read in reads.items()}, chunk_rows)
    ((lane, read),) = reads.items()
    return [{lane: piece} for piece in pieces_of(read.prompt.vision_mask, backend, read.wanted, chunk_rows)]


def pieces_of(
    vision_mask: Bools, backend: Backend, wanted: Ints = NOTHING, chunk_rows: int | None = None
) -> list[tuple[int, int]]:
    """First and past-the-last position of each call that reads one prompt of vision_mask bool [seq]: at most
    `chunk_rows` rows (default: the backend's) and `most_logits` wanted positions per call."""
    chunk_rows = chunk_rows or backend.chunk_rows
    if backend.mixes_experts:
        starts = range(0, len(vision_mask), chunk_rows)
        chunks = [(start, min(start + chunk_rows, len(vision_mask))) for start in starts]
    else:
        chunks = [(segment.start, segment.stop) for segment in segments_of(vision_mask, chunk_rows)]
    return [piece for start, stop in chunks for piece in _asking_few(start, stop, wanted, backend.most_logits)]


def _asking_few(start: int, stop: int, wanted: Ints, most: int) -> Iterator[tuple[int, int]]:
    """Cut a chunk so that no piece holds more than `most` wanted positions."""
    inside = wanted[(wanted >= start) & (wanted < stop)]
    for cut in inside[most::most].tolist():
        yield start, cut
        start = cut
    yield start, stop


def prefill_steps(lengths: Mapping[int, int], chunk_rows: int) -> list[Ranges]:
    """What each call reads of prompts side by side. Shorter prompts begin later, so that all end in the same call. Only
    the first call of a lane may be short, so padding never reaches past the end of its prompt."""
    steps: list[Ranges] = []
    for left in reversed(range(max(-(-length // chunk_rows) for length in lengths.values()))):
        stops = {lane: length - left * chunk_rows for lane, length in lengths.items()}
        steps.append({lane: (max(0, stop - chunk_rows), stop) for lane, stop in stops.items() if stop > 0})
    return steps


def _call(reads: Mapping[int, Read], ranges: Ranges, num_lanes: int) -> tuple[Call, dict[int, int]]:
    """The call that reads these ranges, and the number of its logits per lane, in order."""
    num_rows = max(stop - start for start, stop in ranges.values())
    width = next(iter(reads.values())).rows.shape[1]
    hidden = np.zeros((num_lanes, num_rows, width), np.float32)
    vision_mask, counts = np.zeros((num_lanes, num_rows), np.bool_), np.zeros(num_lanes, np.int64)
    logit_rows, asked = [NOTHING], {}
    for lane, (start, stop) in ranges.items():
        read, counts[lane] = reads[lane], stop - start
        hidden[lane, : stop - start] = read.rows[start:stop]
        vision_mask[lane, : stop - start] = read.prompt.vision_mask[start:stop]
        inside = read.wanted[(read.wanted >= start) & (read.wanted < stop)] - start
        logit_rows.append(lane * num_rows + inside)
        asked[lane] = len(inside)
    return Call(hidden, vision_mask, counts, np.concatenate(logit_rows)), asked


@dataclass
class Answering:
    """State of a lane's answer. ids int64: the prompt's and the chosen ones. logits [vocab]: of the next token, None
    until the last chosen token is decoded."""

    choose: ChooseToken
    ids: Ints
    logits: Floats | None


@dataclass(frozen=True)
class Request:
    """A prompt, how to choose its tokens, and the most new tokens."""

    prompt: Prompt
    choose: ChooseToken
    new_tokens: int

    @property
    def capacity(self) -> int:
        """Cache slots that it takes; the last token needs none."""
        return len(self.prompt.ids) + self.new_tokens - 1


class GenerateLoop:
    """Answers requests side by side, one token each per step. Not thread-safe."""

    def __init__(
        self,
        backend: Backend,
        embedding: EmbeddingTable,
        encode_images: Callable[[Floats], Floats],
        stop_ids: Sequence[int],
        lanes: Lanes,
        timings: Timings | None = None,
    ) -> None:
        self.backend = backend
        self.embedding = embedding
        self.encode_images = encode_images
        self.stop_ids = stop_ids
        self.lanes = lanes
        self.timings = timings or Timings()
        self._answering: dict[int, Answering] = {}  # by lane

    def begin(self, requests: Mapping[int, Request]) -> None:
        """Read prompts into closed lanes; open lanes wait and continue unchanged."""
        start = time.perf_counter()
        reads = {}
        for lane, request in requests.items():
            assert lane not in self._answering, "the lane is closed"
            rows = prompt_rows(request.prompt, self.encode_images, self.embedding)
            reads[lane] = Read(request.prompt, rows, np.array([len(request.prompt.ids) - 1]))
        encoded = time.perf_counter()
        for lane, request in requests.items():
            self.lanes.begin(lane, slot_positions(request.prompt.positions, request.capacity))
        for lane, logits in read_prompts(reads, self.lanes, self.backend).items():
            request = requests[lane]
            self._answering[lane] = Answering(request.choose, request.prompt.ids, logits[0])
        self.backend.end_prefill()
        self.timings.vision_ms += 1000 * (encoded - start)
        self.timings.prefill_ms += 1000 * (time.perf_counter() - encoded)

    def end(self, lane: int) -> None:
        """Close a lane, so that it can begin another request."""
        self.lanes.end(lane)
        del self._answering[lane]

    def step(self) -> dict[int, int]:
        """The next token of every open lane. A stop id, which is returned too, or a full lane ends the lane."""
        self._decode()
        tokens = {}
        for lane, one in list(self._answering.items()):
            assert one.logits is not None, "every lane was decoded"
            token = tokens[lane] = one.choose(one.logits, one.ids)
            one.logits = None
            if token in self.stop_ids or self.lanes.is_full(lane):
                self.end(lane)
            else:
                one.ids = np.append(one.ids, token)
        return tokens

    def _decode(self) -> None:
        """Compute the next token's logits for all lanes without them."""
        fed = {lane: one for lane, one in self._answering.items() if one.logits is None}
        if not fed:
            return
        start = time.perf_counter()
        is_fed, last = np.zeros(self.lanes.count, np.bool_), np.zeros(self.lanes.count, np.int64)
        for lane, one in fed.items():
            is_fed[lane], last[lane] = True, one.ids[-1]
        logits = self.backend.decode(self.embedding[last], is_fed, self.lanes)
        for lane, one in fed.items():
            one.logits = logits[lane]
        self.timings.decode_ms.append(1000 * (time.perf_counter() - start))

    def __iter__(self) -> Iterator[dict[int, int]]:
        """Step until no lane is open."""
        while self._answering:
            yield self.step()
