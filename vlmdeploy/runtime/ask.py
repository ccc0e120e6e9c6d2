"""One question to a bundle, as `vlmdeploy run` asks it: stream the text, find the boxes, paint them if wanted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmdeploy.errors import DataError, PromptError
from vlmdeploy.runtime.answer import Answer
from vlmdeploy.runtime.boxes import draw_boxes
from vlmdeploy.runtime.image import load_image
from vlmdeploy.runtime.sampling import SamplingOptions
from vlmdeploy.runtime.session import Session


def ask(
    session: Session,
    images: Sequence[str],
    prompt: str,
    options: SamplingOptions,
    template: str | None,
    draw: Path | None,
    show: Callable[[str], None] | None,
) -> Answer:
    """The answer to one prompt about the pictures; `show` gets its text piece by piece.

    `draw` names the picture to write with the boxes painted on it. Raises PromptError, DataError and BundleError.
    """
    if draw is not None and not images:
        raise PromptError("--draw paints boxes on the picture: give --image too")
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    running = session.start(messages, options, template)
    pieces = []
    for piece in running.pieces():
        pieces.append(piece)
        if show is not None:
            show(piece)
    answer = running.finish("".join(pieces))
    if draw is not None:
        _draw(images[0], answer, draw)
    return answer


def _draw(image: str, answer: Answer, path: Path) -> None:
    try:
        draw_boxes(load_image(image), answer.boxes).save(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture cannot be written ({error})") from error
