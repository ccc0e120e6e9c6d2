"""The interface between the generate loop and whatever executes the graphs; callers never ask which backend it is.

The loop encodes images, runs rows of one or several prompts over one KV cache, and asks for the logits of single rows.
Backends differ only in speed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlmdeploy.layout import Bools, expert_of
from vlmdeploy.manifest import Manifest
from vlmdeploy.runtime.backends.lanes import Call, Floats, Lanes

GRAPH_OF_EXPERT = {"language": "decoder_text", "vision": "decoder_vision"}
ROUTED_GRAPH = "decoder"  # both experts in one graph
PROMPT_ONLY = ("vision", "decoder_vision")  # graphs that decoding does not need
CACHE_TYPES: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


@dataclass(frozen=True)
class DeviceUse:
    """GPU memory of a backend. planned_bytes: buffers and KV cache allocated at start, None if the engine does not say;
    in_use: bytes taken now."""

    gpu: str
    planned_bytes: int | None
    in_use: Callable[[], int]


class Backend(Protocol):
    """Executes the graphs of one bundle."""

    chunk_rows: int  # best number of prompt rows per call
    most_logits: int  # most rows of one call that may ask for logits
    most_lanes: int  # most prompts of one call
    mixes_experts: bool  # whether one call takes rows of both experts

    def encode_images(self, pixels: Floats) -> Floats:
        """Preprocessed pixels [images, 3, S, S] -> decoder rows [images, rows, hidden]."""

    def new_lanes(self, count: int, slots: int) -> Lanes:
        """A KV cache of closed lanes with `slots` positions each. May invalidate the previous one."""

    def run(self, call: Call, lanes: Lanes) -> Floats:
        """Run the rows and append the real ones to their lanes; logits [asked, vocab] of the rows asked for.

        Without `mixes_experts` all rows of a call use the same expert.
        """

    def decode(self, hidden: Floats, is_fed: Bools, lanes: Lanes) -> Floats:
        """Append one new token's row [lanes, hidden] to the lanes that `is_fed`, on the language expert.

        Returns logits [lanes, vocab], valid until the next call; those of other lanes mean nothing.
        """

    def end_prefill(self) -> None:
        """Release what only prompts need, with residency "phase"; the prompts are in the cache."""

    def warm_up(self, graphs: Sequence[str]) -> None:
        """Load these graphs now; the others load on first use."""

    def device_use(self) -> DeviceUse | None:
        """Its GPU memory, None if it uses no GPU. Raises BackendError if it cannot be read."""

    def close(self) -> None:
        """Release everything."""


def decoder_graph(manifest: Manifest, vision_mask: Bools) -> str:
    """The decoder graph that takes rows of these experts."""
    return ROUTED_GRAPH if manifest.is_routed else GRAPH_OF_EXPERT[expert_of(vision_mask.reshape(-1))]
