"""The door between the generate loop and whatever executes the graphs. It is complete: nobody on this side asks what
kind of backend stands behind it.

The loop encodes images, runs rows of one or several prompts over one KV cache and asks for logits of single rows;
everything but speed is the same behind every backend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlmdeploy.layout import Bools
from vlmdeploy.runtime.backends.lanes import Call, Floats, Lanes

GRAPH_OF_EXPERT = {"language": "decoder_text", "vision": "decoder_vision"}
ROUTED_GRAPH = "decoder"  # both experts in one graph
PROMPT_ONLY = ("vision", "decoder_vision")  # graphs that no decoded token needs
CACHE_TYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class DeviceUse:
    """Memory of the GPU that a backend uses. planned_bytes: buffers and KV cache that it holds from the start, None
    where the engine does not tell; in_use: bytes taken now."""

    gpu: str
    planned_bytes: int | None
    in_use: Callable[[], int]


class Backend(Protocol):
    """What a backend offers.

    chunk_rows: how long the pieces are in which a prompt is best read. most_logits: rows of one call that may ask for
    logits. most_lanes: prompts side by side in one call. mixes_experts: whether one call takes rows of both experts.
    """

    chunk_rows: int

    @property
    def most_logits(self) -> int:
        """See above."""

    @property
    def most_lanes(self) -> int:
        """See above."""

    @property
    def mixes_experts(self) -> bool:
        """See above."""

    def encode_images(self, pixels: Floats) -> Floats:
        """Preprocessed pixels [images, 3, S, S] -> decoder rows [images, rows, hidden]."""

    def new_lanes(self, count: int, slots: int) -> Lanes:
        """A KV cache of closed lanes, each with room for so many positions. The one made before may become invalid."""

    def run(self, call: Call, lanes: Lanes) -> Floats:
        """Run the rows, append the real ones to their lanes; logits [asked, vocab] of the rows asked for.

        Without `mixes_experts` all rows of a call use the same expert.
        """

    def decode(self, hidden: Floats, is_fed: Bools, lanes: Lanes) -> Floats:
        """Append one new token's row [lanes, hidden] to the lanes that `is_fed`, on the language expert.

        Returns logits [lanes, vocab], valid until the next call; those of other lanes mean nothing.
        """

    def end_prefill(self) -> None:
        """The prompts are in the cache: what only a prompt needs may be released (phase residency)."""

    def warm_up(self, graphs: Sequence[str]) -> None:
        """Load these graphs now; the others are loaded when they are first needed."""

    def device_use(self) -> DeviceUse | None:
        """The memory of its GPU, None where it uses none. Raises BackendError where it cannot be read."""

    def close(self) -> None:
        """Give everything back."""
