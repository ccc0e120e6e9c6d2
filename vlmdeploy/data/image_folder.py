"""A folder of pictures with one prompt for all: calibration data for users without conversations.

The suffix decides whether a file, in any subfolder, is a picture; pictures are not opened here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vlmdeploy.data.samples import Sample
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import NOTHING_THERE, why_unreadable
from vlmdeploy.runtime.chat import Turn

SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def has_pictures(path: Path) -> bool:
    """Whether a folder or one of its subfolders holds a picture."""
    return next(_pictures(path), None) is not None


def read_items(path: Path, prompt: str) -> Iterator[Callable[[], Sample]]:
    """One function per picture, sorted, that returns its sample: the prompt, task "caption". Skips hidden files and
    folders. A function raises DataError if its picture is a broken link or no file."""
    return (partial(_sample, picture, prompt) for picture in sorted(_pictures(path)))


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir():
            yield path


def _sample(picture: Path, prompt: str) -> Sample:
    if problem := why_unreadable(picture):
        hint = ", though the folder lists it: is it a broken link?" if problem == NOTHING_THERE else ""
        raise DataError(f"{picture}: {problem}{hint}")
    return Sample(picture, (Turn(prompt),), "caption", "caption", answer=None)
