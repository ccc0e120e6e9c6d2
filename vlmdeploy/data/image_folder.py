"""A folder of pictures, all asked the same: calibration data for those who have no conversations.

A file is a picture if its name ends like one, in any folder below; whether it can be decoded, opening it will tell.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vlmdeploy.data.samples import Sample
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.chat import Turn

SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def has_pictures(path: Path) -> bool:
    """Whether this is a folder with at least one picture in it, or in a folder below."""
    return next(_pictures(path), None) is not None


def read_items(path: Path, prompt: str) -> Iterator[Callable[[], Sample]]:
    """For each picture, in sorted order, the function that gives its sample: the prompt, with the task "caption".

    No picture is opened; hidden files and folders are left out. Raises DataError at once if the prompt is empty or
    there is no picture; a function raises it where its picture is a link to nowhere.
    """
    if not prompt.strip():
        raise DataError(f"{path}: the prompt for its pictures is empty, expected a question or a request")
    pictures = sorted(_pictures(path))
    if not pictures:
        raise DataError(f"{path}: holds no pictures, expected a folder of files that end in {', '.join(SUFFIXES)}")
    return (partial(_sample, picture, prompt) for picture in pictures)


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir():
            yield path


def _sample(picture: Path, prompt: str) -> Sample:
    if not picture.is_file():
        raise DataError(f"{picture}: no such file, though the folder lists it: is it a link to nowhere?")
    return Sample(picture, (Turn(prompt),), "caption", "caption", answer=None)
