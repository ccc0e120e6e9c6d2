"""A question about a picture with its reference answer, whatever data set it comes from, and drawing some of many."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Conversation, Turn

PixelBox = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright picture; right and bottom are exclusive."""


@dataclass(frozen=True)
class Sample:
    """One conversation up to the question to be answered, and what the answer should be.

    turns: the last one is open. `answer` is None where the data set has none. `kind` divides a task; an `extra` row is
    reported under its kind, but does not enter the task's own value. `template` None: the model's default.
    """

    image: Path | None
    turns: tuple[Turn, ...]
    task: str
    kind: str
    answer: str | None
    boxes: tuple[PixelBox, ...] = ()
    template: str | None = None
    extra: bool = False

    def conversation(self) -> Conversation:
        """What the prompt is rendered from; the picture is not opened."""
        return Conversation(self.turns, () if self.image is None else (self.image,))


def checked_text(text: str, what: str) -> str:
    """The text itself. Raises DataError, calling it `what`, if half of an escaped surrogate pair stands in it.

    Tokenizers refuse such text; a command line hands on bytes that are not UTF-8 in this way.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid UTF-8 at character {error.start}") from error
    return text


def choose(samples: Iterable[Sample], per_task: int, seed: int) -> list[Sample]:
    """At most `per_task` samples of every task, drawn without replacement, in the order of the data set.

    The same seed gives the same samples; which ones of a task does not depend on the other tasks.
    """
    everything = list(samples)
    places: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(everything):
        places[sample.task].append(place)
    kept: list[int] = []
    for task, of_task in places.items():
        rng = np.random.default_rng([seed, *task.encode()])
        kept.extend(rng.permutation(of_task)[:per_task].tolist())
    return [everything[place] for place in sorted(kept)]
