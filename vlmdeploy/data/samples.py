"""A question about a picture with its reference answer, whatever data set it comes from, and drawing some of many."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from vlmdeploy.data.stored_picture import StoredPicture
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Conversation, Turn

EDGE_PX = 2.0  # a box may end that far outside its picture

Picture: TypeAlias = Path | StoredPicture
"""A picture's own file, or its place in a table; equal where it is the same picture. `load_image` takes both."""

PixelBox = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright picture; right and bottom are exclusive."""


@dataclass(frozen=True)
class Sample:
    """One conversation up to the question to be answered, and what the answer should be.

    turns: the last one is open. `answer` is None where the data set has none. `kind` divides a task; an `extra` row is
    reported under its kind, but does not enter the task's own value. `template` None: the model's default.
    answers: all references where an answer may be one of several; `answer` is then the commonest. options: letter and
    text of each, of a multiple choice. group: what the rotations of one question share. key: the data set's own name
    of the question, its index or line. size_px: width and height of the upright picture as the data set states them.
    """

    image: Picture | None
    turns: tuple[Turn, ...]
    task: str
    kind: str
    answer: str | None
    boxes: tuple[PixelBox, ...] = ()
    template: str | None = None
    extra: bool = False
    answers: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    group: str | None = None
    size_px: tuple[int, int] | None = None
    key: str = field(default="", compare=False)

    @property
    def references(self) -> tuple[str, ...]:
        """Everything that is a right answer; empty where the data set has none."""
        return self.answers or (() if self.answer is None else (self.answer,))

    def conversation(self) -> Conversation:
        """What the prompt is rendered from; the picture is not opened."""
        return Conversation(self.turns, () if self.image is None else (self.image,))


def is_inside(box: PixelBox, size_px: tuple[int, int]) -> bool:
    """Whether the box lies in the picture, or ends a little outside, as some annotations do."""
    x0, y0, x1, y1 = box
    return min(x0, y0) >= -EDGE_PX and x1 <= size_px[0] + EDGE_PX and y1 <= size_px[1] + EDGE_PX


def check_boxes(sample: Sample, size_px: tuple[int, int]) -> None:
    """Raise DataError, naming the picture, if it is not of the stated size, or a box to be found lies outside."""
    found = f"{sample.image}: is {size_px[0]} x {size_px[1]} pixels"
    stated = sample.size_px
    if stated is not None and stated != size_px:
        said = f'question "{sample.key}" has its box in a picture of {stated[0]} x {stated[1]}'
        raise DataError(f"{found}, but {said}: was it resized or turned?")
    if sample.task == "rec" and not all(is_inside(box, size_px) for box in sample.boxes):
        raise DataError(f'{found}, but question "{sample.key}" has the box {list(sample.boxes[0])}')


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
    """At most `per_task` questions of every task, drawn without replacement, in the order of the data set.

    The rotations of one question come together and count as one. The same seed gives the same samples; which ones of a
    task does not depend on the other tasks.
    """
    everything = list(samples)
    places: dict[str, dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, sample in enumerate(everything):
        places[sample.task][place if sample.group is None else sample.group].append(place)
    kept: list[int] = []
    for task, questions in places.items():
        rng = np.random.default_rng([seed, *task.encode()])
        groups = list(questions.values())
        for number in rng.permutation(len(groups))[:per_task].tolist():
            kept.extend(groups[number])
    return [everything[place] for place in sorted(kept)]
