"""The generate loop: a prompt becomes segments of equal expert, the segments fill the cache, tokens follow one by one.

The loop knows the bundle's manifest and a backend; which engine runs and how a token is chosen are handed in.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from vlmdeploy.bundle import TokenRules
from vlmdeploy.errors import PromptError
from vlmdeploy.layout import Bools, Ints, position_ids, segments_of, token_types_of, vision_expert_mask
from vlmdeploy.runtime.backends.door import Backend, Floats, KvCache
from vlmdeploy.runtime.embedding import EmbeddingTable

ChooseToken = Callable[[Floats, Ints], int]


@dataclass(frozen=True)
class Prompt:
    """A prompt with its layout: ids, types, positions int64 [seq], vision_mask bool [seq]; pixels of its images."""

    ids: Ints
    types: Ints
    positions: Ints
    vision_mask: Bools
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
    if pixels is not None and len(pixels) > rules.max_images:
        raise PromptError(f"{len(pixels)} images were given, this model takes {rules.max_images}")
    has_image = pixels is not None and len(pixels) > 0
    types = token_types_of(ids, rules, has_image)
    positions = position_ids(types[None], np.ones_like(types)[None])[0]
    return Prompt(ids, types, positions, vision_expert_mask(types[None], rules)[0], pixels if has_image else None)


def prompt_rows(prompt: Prompt, encode_images: Callable[[Floats], Floats], embedding: EmbeddingTable) -> Floats:
    """What enters the first decoder layer, float32 [seq, hidden]: embeddings, and image rows where the type is 1."""
    rows = embedding[prompt.ids]
    if prompt.pixels is not None:
        rows[prompt.types == 1] = encode_images(prompt.pixels).reshape(-1, rows.shape[1])
    return rows


def prefill(prompt: Prompt, rows: Floats, backend: Backend, cache: KvCache, wanted: Ints) -> Floats:
    """Run the prompt piece by piece; logits [len(wanted), vocab] of the wanted positions (ascending, language)."""
    logits = []
    for start, stop in pieces_of(prompt.vision_mask, backend):
        asked = wanted[(wanted >= start) & (wanted < stop)] - start
        logits.append(backend.run_rows(prompt.vision_mask[start:stop], rows[start:stop], cache, asked))
    return np.concatenate(logits)


def pieces_of(vision_mask: Bools, backend: Backend) -> list[tuple[int, int]]:
    """First and past-the-last position of each call that reads a prompt, bool [seq]: segments of equal expert, or
    whatever comes next where the backend mixes experts."""
    if not backend.mixes_experts:
        return [(segment.start, segment.stop) for segment in segments_of(vision_mask, backend.chunk_rows)]
    starts = range(0, len(vision_mask), backend.chunk_rows)
    return [(start, min(start + backend.chunk_rows, len(vision_mask))) for start in starts]


def decode(
    first_logits: Floats,
    prompt: Prompt,
    backend: Backend,
    cache: KvCache,
    embedding: EmbeddingTable,
    choose: ChooseToken,
    stop_ids: tuple[int, ...],
    timings: Timings,
) -> Iterator[int]:
    """Token ids one by one until a stop id (included) or a full cache. The cache holds the prompt."""
    ids, logits = prompt.ids, first_logits
    while True:
        token = choose(logits, ids)
        yield token
        if token in stop_ids or cache.length >= cache.capacity:
            return
        ids = np.append(ids, token)
        start = time.perf_counter()
        logits = backend.decode(embedding[ids[-1:]], cache)
        timings.decode_ms.append(1000 * (time.perf_counter() - start))
