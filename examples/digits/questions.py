"""The questions one can ask about a digit scene, each with its only right answer.

Caption, VQA and grounding in CogVLM's formats: boxes are thousandths of the image side, as in [[086,540,400,760]].
Questions without one clear answer are left out. Tokens are tokenizer.json's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scenes import (  # type: ignore[import-not-found,unused-ignore]  # beside this file, not a package
    MIN_SEPARATION_PX,
    Box,
    Rng,
    Scene,
)


@dataclass(frozen=True)
class Question:
    """One question with its only right answer; boxes are those it is about, in pixels."""

    task: str
    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]


def questions(scene: Scene, rng: Rng, mix: Mapping[str, float] | None = None) -> list[Question]:
    """Questions about a scene, those without one clear answer left out.

    `mix` gives the wanted number of questions of each kind (a fraction is a chance; never the same question twice);
    the default is one of each of KINDS.
    """
    asked: dict[str, Question] = {}
    for kind, number in (mix or ONE_OF_EACH).items():
        for _ in range(int(number + rng.random())):
            question = _BUILDERS[kind](scene, rng)
            if question is not None:
                asked.setdefault(question.text, question)
    return list(asked.values())


def box_text(box: Box, size_px: int) -> str:
    """A box in CogVLM's notation: thousandths of the side, three digits each, as in [[086,540,400,760]]."""
    return "[[" + ",".join(f"{min(999, round(value * 1000 / size_px)):03d}" for value in box) + "]]"


def _unique_slots(scene: Scene) -> list[int]:
    return [slot for slot, digit in enumerate(scene.digits) if scene.digits.count(digit) == 1]


def _is_clear(scene: Scene, left: int, right: int) -> bool:
    """Whether slot `right` is far enough to the right of slot `left` to say so."""
    (a0, _, a1, _), (b0, _, b1, _) = scene.boxes[left], scene.boxes[right]
    is_far: bool = (b0 + b1) - (a0 + a1) >= 2 * MIN_SEPARATION_PX * scene.size_px / 64
    return is_far


def _is_ordered(scene: Scene) -> bool:
    return all(_is_clear(scene, slot, slot + 1) for slot in range(len(scene.digits) - 1))


def _caption(scene: Scene, rng: Rng) -> Question | None:
    if not _is_ordered(scene):
        return None
    listed = ", ".join(map(str, scene.digits))
    answer = f"The digits {listed} from left to right." if len(scene.digits) > 1 else f"The digit {listed}."
    return Question("caption", "caption", "Describe the image.", answer, scene.boxes)


def _which(scene: Scene, rng: Rng) -> Question | None:
    if not _is_ordered(scene):
        return None
    return Question("vqa", "which", "Which digits, left to right?", " ".join(map(str, scene.digits)), scene.boxes)


def _how_many(scene: Scene, rng: Rng) -> Question | None:
    return Question("vqa", "how_many", "How many digits?", str(len(scene.digits)), scene.boxes)


def _largest(scene: Scene, rng: Rng) -> Question | None:
    return Question("vqa", "largest", "What is the largest digit?", str(max(scene.digits)), scene.boxes)


def _sum(scene: Scene, rng: Rng) -> Question | None:
    return Question("vqa", "sum", "What is the sum?", str(sum(scene.digits)), scene.boxes)


def _left_right(scene: Scene, rng: Rng) -> Question | None:
    """Two digits that each occur once; yes and no are equally likely, and so are "left" and "right"."""
    unique = _unique_slots(scene)
    if len(unique) < 2:
        return None
    skipped, kept = int(rng.integers(len(unique))), int(rng.integers(len(unique) - 1))
    left, right = sorted((unique[skipped], (unique[:skipped] + unique[skipped + 1 :])[kept]))
    if not _is_clear(scene, left, right):
        return None
    side, is_true = ("left", "right")[rng.integers(2)], bool(rng.integers(2))
    first, second = (left, right) if (side == "left") == is_true else (right, left)
    text = f"Is the {scene.digits[first]} {side} of the {scene.digits[second]}?"
    return Question("vqa", "left_right", text, "yes" if is_true else "no", (scene.boxes[first], scene.boxes[second]))


def _is_there(scene: Scene, rng: Rng) -> Question | None:
    """One digit that is there or, equally likely, one that is not."""
    is_true = bool(rng.integers(2))
    values = [value for value in range(10) if (value in scene.digits) == is_true]
    digit = values[rng.integers(len(values))]
    boxes = tuple(box for box, found in zip(scene.boxes, scene.digits, strict=True) if found == digit)
    return Question("vqa", "is_there", f"Is there a {digit}?", "yes" if is_true else "no", boxes)


def _outermost(scene: Scene, rng: Rng) -> Question | None:
    if len(scene.digits) < 2:
        return None
    slot, neighbour, name = [(0, 1, "leftmost"), (-1, -2, "rightmost")][rng.integers(2)]
    if not _is_clear(scene, min(slot, neighbour), max(slot, neighbour)):
        return None
    answer = str(scene.digits[slot])
    return Question("vqa", "outermost", f"What is the {name} digit?", answer, (scene.boxes[slot],))


def _rec(scene: Scene, rng: Rng) -> Question | None:
    unique = _unique_slots(scene)
    if not unique:
        return None
    slot = unique[rng.integers(len(unique))]
    box = scene.boxes[slot]
    return Question("rec", "rec", f"Where is the {scene.digits[slot]}?", box_text(box, scene.size_px), (box,))


def _reg(scene: Scene, rng: Rng) -> Question | None:
    slot = rng.integers(len(scene.digits))
    box = scene.boxes[slot]
    text = f"What digit is in {box_text(box, scene.size_px)}?"
    return Question("reg", "reg", text, str(scene.digits[slot]), (box,))


_BUILDERS: Mapping[str, Callable[[Scene, Rng], Question | None]] = {
    "caption": _caption,
    "which": _which,
    "how_many": _how_many,
    "largest": _largest,
    "sum": _sum,
    "left_right": _left_right,
    "is_there": _is_there,
    "outermost": _outermost,
    "rec": _rec,
    "reg": _reg,
}
KINDS = tuple(_BUILDERS)
ONE_OF_EACH: Mapping[str, float] = dict.fromkeys(KINDS, 1.0)
