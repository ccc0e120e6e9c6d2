"""One answer: its tokens become text as they arrive, and at the end text, boxes and timings."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmdeploy.runtime.boxes import Box, parse_boxes
from vlmdeploy.runtime.chat import StreamDecoder, Tokenizer
from vlmdeploy.runtime.generate import Prompt, Timings
from vlmdeploy.runtime.sampling import SamplingOptions, StopStrings


@dataclass(frozen=True)
class Answer:
    """A whole answer. `boxes` are in pixels of the upright picture; `ids` include the stop id."""

    text: str
    ids: tuple[int, ...]
    boxes: tuple[Box, ...]
    timings_ms: dict[str, float]
    prompt_tokens: int
    new_tokens: int

    def as_json(self) -> dict[str, Any]:
        """The document that `run --json` prints."""
        return asdict(self)


@dataclass
class Running:
    """An answer being generated. tokens: its ids, generated lazily; image_size: width and height of the upright picture
    in pixels."""

    prompt: Prompt
    options: SamplingOptions
    image_size: tuple[int, int]
    timings: Timings
    tokenizer: Tokenizer
    stop_ids: Sequence[int]
    tokens: Iterable[int]
    ids: list[int] = field(default_factory=list)

    def pieces(self) -> Iterator[str]:
        """Pieces of text as they become certain, up to a stop string."""
        decoder, stop = StreamDecoder(self.tokenizer), StopStrings(self.options.stop)
        for token in self.tokens:
            self.ids.append(token)
            if token in self.stop_ids:
                break
            if piece := stop.add(decoder.add(token)):
                yield piece
            if stop.stopped:
                return
        if piece := stop.add(decoder.finish()) + stop.finish():
            yield piece

    def text_of(self, ids: Sequence[int]) -> str:
        """The whole text of an answer with known ids."""
        self.tokens = ids
        return "".join(self.pieces())

    def finish(self, text: str) -> Answer:
        """The answer, once all pieces were taken."""
        timings, decoded = self.timings, self.timings.decode_ms
        phases = {
            "preprocess": timings.preprocess_ms, "vision": timings.vision_ms, "prefill": timings.prefill_ms,
            "decode_per_token": sum(decoded) / len(decoded) if decoded else 0.0,
        }  # fmt: skip
        boxes = parse_boxes(text, *self.image_size) if self.prompt.pixels is not None else ()
        return Answer(text, tuple(self.ids), boxes, phases, len(self.prompt.ids), len(self.ids))
