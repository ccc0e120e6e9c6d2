"""A question about a picture with its reference answer, from any data set; and drawing some of many."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from vlmdeploy.data.stored_picture import StoredPicture
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import NOTHING_THERE, why_unreadable
from vlmdeploy.runtime.chat import Conversation, Turn

EDGE_PX = 2.0  # how far a box may extend outside its picture
LONGEST_PATH_SHOWN = 400  # characters

Picture: TypeAlias = Path | StoredPicture
"""A file, or a place in a table; equal if it is the same picture. `load_image` takes both."""

PixelBox = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the upright picture; right and bottom are exclusive."""


@dataclass(frozen=True)
class Sample:
    """One conversation up to the open question, and its reference answer.

    turns: the last one is open. answer: None if the data set has none. kind: divides a task; an `extra` row counts for
    its kind, but not for the task. template None: the model's default. answers: all references, if several are right;
    `answer` is then the most common. options: (letter, text) of a multiple choice. group: shared by a question's
    rotations. key: the data set's name for the question, such as index or line. size_px: width and height of the
    upright picture according to the data set.
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
        """All right answers; empty if the data set has none."""
        return self.answers or (() if self.answer is None else (self.answer,))

    def conversation(self) -> Conversation:
        """The conversation to render as a prompt; does not open the picture."""
        if self.image is None:
            return Conversation(self.turns)
        turns = (replace(turn, images=() if place else (0,)) for place, turn in enumerate(self.turns))
        return Conversation(tuple(turns), (self.image,))


def is_inside(box: PixelBox, size_px: tuple[int, int]) -> bool:
    """Whether the box lies in the picture, with the tolerance that some annotations need."""
    x0, y0, x1, y1 = box
    return min(x0, y0) >= -EDGE_PX and x1 <= size_px[0] + EDGE_PX and y1 <= size_px[1] + EDGE_PX


def check_boxes(sample: Sample, size_px: tuple[int, int]) -> None:
    """Raise DataError, naming the picture, if it does not have the stated size or a reference box lies outside."""
    found = f"{sample.image}: is {size_px[0]} x {size_px[1]} pixels"
    stated = sample.size_px
    if stated is not None and stated != size_px:
        said = f'question "{sample.key}" has its box in a picture of {stated[0]} x {stated[1]}'
        raise DataError(f"{found}, but {said}: was it resized or turned?")
    if sample.task == "rec" and not all(is_inside(box, size_px) for box in sample.boxes):
        raise DataError(f'{found}, but question "{sample.key}" has the box {list(sample.boxes[0])}')


def checked_text(text: str, what: str) -> str:
    """Return the text. Raises DataError, naming it `what`, if it contains a lone surrogate.

    Tokenizers refuse such text; Python decodes command-line bytes that are not UTF-8 to it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid UTF-8 at character {error.start}") from error
    return text


def first_picture(places: Sequence[Path], where: str, hint: str = "") -> Path:
    """The first of the places that is a file; pictures are not opened here.

    Raises DataError, which begins with `where` and, where there is nothing, ends with `hint`.
    """
    for place in places:
        problem = why_unreadable(place)
        if not problem:
            return place
    shown = str(place) if len(str(place)) <= LONGEST_PATH_SHOWN else f"{str(place)[:LONGEST_PATH_SHOWN]}..."
    raise DataError(f"{where}: picture {shown}: {problem}{hint if problem == NOTHING_THERE else ''}")


def choose(samples: Iterable[Sample], per_task: int | None, seed: int) -> list[Sample]:
    """Draw at most `per_task` questions of every task (None: all) without replacement, in data set order.

    The rotations of one question come together and count as one. The same seed gives the same samples of a task,
    whatever other tasks there are.
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
