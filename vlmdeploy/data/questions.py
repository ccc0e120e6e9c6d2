"""User options for a data set of questions: how to score it, how to phrase the questions, where the pictures are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from vlmdeploy.data.samples import first_picture
from vlmdeploy.errors import ConfigError

PromptStyle: TypeAlias = Literal["vlmevalkit", "cogvlm", "bare"]

RULES = ("yes_no", "multiple_choice", "vqa_accuracy", "anls", "relaxed_accuracy", "ocrbench", "exact_match")
UNSCORED = "unscored"  # the task of questions that are answered but not scored
EXPRESSION = "<expr>"
GROUNDING_PROMPT = f"Can you point out {EXPRESSION} in the image and provide the bounding boxes of its location?"


@dataclass(frozen=True)
class QuestionOptions:
    """Options for VLMEvalKit tables and RefCOCO files; other data brings its own questions and tasks.

    rule: one of RULES; None: by the data set's name, else by its columns. split: only its rows. first_picture: show the
    first of several pictures instead of refusing the question. images: the folder of pictures that are named by path
    and not beside the file.
    """

    rule: str | None = None
    prompt: PromptStyle = "vlmevalkit"
    split: str | None = None
    first_picture: bool = False
    images: Path | None = None
    grounding_prompt: str = GROUNDING_PROMPT

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in RULES:
            raise ConfigError(f'--rule is "{self.rule}", expected one of {", ".join(RULES)}')
        if EXPRESSION not in self.grounding_prompt:
            raise ConfigError(f"--grounding-prompt is {self.grounding_prompt!r}, expected {EXPRESSION} in it")


def find_picture(name: str, beside: Path, images: Path | None, where: str) -> Path:
    """Find a picture beside the data, else in the folder `images` by path or bare name.

    Raises DataError, which begins with `where`.
    """
    places = [beside / name, *([] if images is None else [images / name, images / Path(name).name])]
    return first_picture(places, where, "; validate --images DIR looks for it elsewhere" if images is None else "")
