"""Chooses calibration samples: spread over pictures, enough tokens for both experts, all difficulties.

Reads no files and no model: callers pass token counts and scores. The same seed gives the same choice.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmdeploy.data.samples import Sample


def draw_samples(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Draw at most `count` samples without replacement, in data set order.

    Every picture is used once before any is used twice, and so on. Samples without a picture keep their share, but make
    up a quarter to a half of the draw, if there are enough of both kinds.
    """
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    texts = [place for place in order if samples[place].image is None]
    pictured = _pictures_in_rounds(samples, [place for place in order if samples[place].image is not None])
    num_texts = _text_share(len(texts), len(pictured), min(count, len(samples)))
    chosen = texts[:num_texts] + pictured[: count - num_texts]
    return [samples[place] for place in sorted(chosen)]


def _pictures_in_rounds(samples: Sequence[Sample], order: list[int]) -> list[int]:
    """Stable sort: every picture's first sample, then every picture's second one, and so on."""
    seen: Counter[object] = Counter()
    rounds = {}
    for place in order:
        rounds[place] = seen[samples[place].image]
        seen[samples[place].image] += 1
    return sorted(order, key=rounds.__getitem__)


def _text_share(num_texts: int, num_pictured: int, count: int) -> int:
    """How many of `count` available samples should have no picture."""
    if num_texts == 0:
        return 0
    natural = round(count * num_texts / (num_texts + num_pictured))
    wanted = min(max(natural, -(-count // 4)), count // 2)
    return min(max(wanted, count - num_pictured), num_texts)


@dataclass(frozen=True)
class Candidate:
    """A sample's tokens per expert."""

    vision_tokens: int
    language_tokens: int


@dataclass(frozen=True)
class Balance:
    """The chosen candidates, ascending, and their total tokens per expert."""

    indexes: tuple[int, ...]
    vision_tokens: int
    language_tokens: int


def balance(candidates: Sequence[Candidate], min_tokens: int, seed: int, limit: int | None = None) -> Balance:
    """Choose at most `limit` candidates until both experts have `min_tokens`, or as near as possible.

    A picture brings far more vision tokens than its text brings language tokens. So take pictures until the vision
    expert has enough, then text-only samples, then more pictures until the language expert has enough. A quarter of the
    limit is reserved for text-only samples, if there are any. The seed decides the order within each kind.
    """
    order = np.random.default_rng(seed).permutation(len(candidates)).tolist()
    pictures = [place for place in order if candidates[place].vision_tokens > 0]
    texts = [place for place in order if candidates[place].vision_tokens == 0]
    limit = len(candidates) if limit is None else limit
    kept_for_texts = min(len(texts), limit // 4)
    chosen: list[int] = []
    vision = language = 0
    for place in pictures[: limit - kept_for_texts]:
        if vision >= min_tokens:
            break
        chosen.append(place)
        vision += candidates[place].vision_tokens
        language += candidates[place].language_tokens
    for place in texts + pictures[len(chosen) :]:
        if language >= min_tokens or len(chosen) == limit:
            break
        chosen.append(place)
        vision += candidates[place].vision_tokens
        language += candidates[place].language_tokens
    return Balance(tuple(sorted(chosen)), vision, language)


def across_range(scores: Iterable[float], count: int) -> tuple[int, ...]:
    """Choose at most `count` samples across the range of a score such as perplexity, lowest first.

    Drops scores that are not finite, cuts the sorted rest into `count` equal parts and takes the middle of each part,
    so that outliers at the ends are not always taken.
    """
    values = np.array(list(scores), np.float64)
    finite = np.flatnonzero(np.isfinite(values))
    ranked = finite[np.argsort(values[finite], kind="stable")].tolist()
    parts = min(count, len(ranked))
    middles = [(2 * part + 1) * len(ranked) // (2 * parts) for part in range(parts)]
    return tuple(ranked[middle] for middle in middles)
