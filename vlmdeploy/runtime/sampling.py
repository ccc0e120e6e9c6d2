"""Choosing the next token from logits, and ending an answer at a stop string.

Filters apply in the order of Hugging Face transformers: repetition penalty, temperature, top-k, top-p.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlmdeploy.errors import BackendError, PromptError, shown


@dataclass(frozen=True)
class SamplingOptions:
    """How to generate an answer. The defaults are greedy; a value out of range raises PromptError naming it.

    temperature 0 takes the best token and ignores top_k, top_p and seed; top_k 0 and top_p 1 keep every token. The
    repetition penalty applies to every id of prompt and answer. Without a seed, sampled answers differ each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, _is_finite(self.temperature, at_least=0), "a number, 0 or more")
        _check("top_k", self.top_k, _is_count(self.top_k, at_least=0), "a whole number, 0 (off) or more")
        _check("top_p", self.top_p, _is_finite(self.top_p, above=0, at_most=1), "a number above 0, at most 1 (off)")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _is_finite(penalty, above=0), "a number above 0; 1 is off")
        _check("seed", self.seed, self.seed is None or _is_count(self.seed, at_least=0), "a whole number, 0 or more")
        _check("max_new_tokens", self.max_new_tokens, _is_count(self.max_new_tokens, at_least=1), "1 or more")
        _check("stop", self.stop, _are_texts(self.stop), "a tuple of strings that are not empty")


def _check(option: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise PromptError(f"option {option} is {shown(value)}, expected {expected}")


def _is_finite(value: object, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    is_small = abs(value) <= sys.float_info.max  # false for NaN, and for whole numbers that no float holds
    return is_small and value >= at_least and value > above and value <= at_most


def _is_count(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


class Sampler:
    """Chooses the tokens of one answer; with a seed, equal logits give equal choices."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)

    def __call__(self, logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> int:
        """The next token from float32 logits [vocab] and the ids so far; ties go to the lowest id.

        Raises BackendError if a logit is NaN or infinite.
        """
        if not np.isfinite(logits).all():
            bad = int(np.count_nonzero(~np.isfinite(logits)))
            raise BackendError(
                f"{bad} of {logits.size} logits are NaN or infinite: did a half-precision graph overflow?"
            )
        scores = penalize_repetition(logits.astype(np.float64), ids, self._options.repetition_penalty)
        if self._options.temperature == 0:
            return int(scores.argmax())
        return self._draw(self._probabilities(scores))

    def _probabilities(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with np.errstate(over="ignore"):  # a tiny temperature may send all but the best to minus infinity
            scores = (scores - scores.max()) / self._options.temperature
        return keep_top_p(softmax(keep_top_k(scores, self._options.top_k)), self._options.top_p)

    def _draw(self, probabilities: npt.NDArray[np.float64]) -> int:
        cumulative = probabilities.cumsum()
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))


def penalize_repetition(
    scores: npt.NDArray[np.float64], ids: npt.NDArray[np.int64], penalty: float
) -> npt.NDArray[np.float64]:
    """Scores [vocab] with seen ids made less likely: positive ones divided by the penalty, others multiplied."""
    if penalty == 1:
        return scores
    seen = np.unique(ids)
    penalized = scores.copy()
    penalized[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return penalized


def keep_top_k(scores: npt.NDArray[np.float64], top_k: int) -> npt.NDArray[np.float64]:
    """Scores [vocab] with all below the k-th best set to minus infinity, keeping ties with it. 0 keeps all."""
    if top_k == 0 or top_k >= scores.size:
        return scores
    smallest_kept = np.partition(scores, -top_k)[-top_k]
    return np.where(scores < smallest_kept, -np.inf, scores)


def keep_top_p(probabilities: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.float64]:
    """Probabilities [vocab] with zeros outside the smallest set of best tokens that sums to top_p."""
    if top_p == 1:
        return probabilities
    likely, mass, floor = np.zeros(0, np.int64), np.zeros(1), probabilities.max()
    while mass[-1] < top_p and len(likely) < len(probabilities):  # sorting a whole vocabulary would take milliseconds
        floor = floor / 32
        likely = np.flatnonzero(probabilities >= floor)
        if probabilities[likely].sum() >= top_p or len(likely) == len(probabilities):
            order = likely[np.argsort(-probabilities[likely], kind="stable")]
            mass = probabilities[order].cumsum()
    better = np.concatenate(([0.0], mass[:-1]))  # the mass of all better tokens
    kept = np.zeros_like(probabilities)
    inside = order[better < top_p]
    kept[inside] = probabilities[inside]
    return kept


def softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities [vocab] of scores [vocab]; minus infinity becomes zero."""
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


class StopStrings:
    """Cuts a stream of text before the first complete stop string, wherever pieces split it.

    `stopped` is true from then on, and no more text comes out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that can be shown now; holds back what could begin a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        shown = len(text) - self._possible_start(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text held back, once no more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The length of the longest suffix of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((length for length in lengths if any(s.startswith(text[-length:]) for s in self._stop)), 0)
