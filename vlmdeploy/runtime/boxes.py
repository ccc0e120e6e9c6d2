"""Boxes in the text of a grounding model: `[[x0,y0,x1,y1]]`, three digits each, in thousandths of width and height.

The origin is top left, x to the right, y down; boxes of one phrase share the brackets, separated by `;`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw

from vlmdeploy.runtime.image import full_size

Corners: TypeAlias = tuple[int, int, int, int]
PixelCorners: TypeAlias = tuple[float, float, float, float]

COORDINATE = re.compile(r"\s*[0-9]{1,3}\s*")


@dataclass(frozen=True)
class Box:
    """A box (x0, y0, x1, y1): `norm` in thousandths 0..999 as written, `pixels` in the upright original picture."""

    norm: Corners
    pixels: PixelCorners


def format_box(norm: Corners) -> str:
    """The text of a box in thousandths: (86, 540, 400, 760) is written [[086,540,400,760]]."""
    return f"[[{','.join(f'{value:03d}' for value in norm)}]]"


def normalize_box(pixels: PixelCorners, width_px: int, height_px: int) -> Corners:
    """A box in pixels as thousandths of the picture, rounded and kept within 0..999."""
    x0, y0, x1, y1 = pixels
    left, right = _thousandths(x0, width_px), _thousandths(x1, width_px)
    top, bottom = _thousandths(y0, height_px), _thousandths(y1, height_px)
    return left, top, right, bottom


def parse_boxes(text: str, width_px: int, height_px: int) -> tuple[Box, ...]:
    """All boxes of a text in order, for a picture of this size; skips parts that are not four integers 0..999."""
    parts = (part for inside in _bracketed(text) for part in inside.split(";"))
    corners = (_corners(part) for part in parts)
    return tuple(Box(norm, _to_pixels(norm, width_px, height_px)) for norm in corners if norm is not None)


def _bracketed(text: str) -> Iterator[str]:
    r"""What the authors' pattern \[\[(.+?)\]\] finds, without the square of the length where nothing closes."""
    for line in text.split("\n"):
        start = line.find("[[")
        while start >= 0 and (end := line.find("]]", start + 3)) >= 0:
            yield line[start + 2 : end]
            start = line.find("[[", end + 2)


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """A copy of the picture with the boxes outlined in yellow between two black lines, visible on any background.

    The boxes are in pixels of the picture's `full_size`.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    line_px = max(1, round(max(image.size) / 300))
    width_px, height_px = full_size(image)
    scale_x, scale_y = image.width / width_px, image.height / height_px
    for box in boxes:
        x0, y0, x1, y1 = box.pixels
        corners = _inside((x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y), image.size)
        draw.rectangle(corners, outline="black", width=3 * line_px)
        draw.rectangle(_shrunk(corners, line_px), outline="yellow", width=line_px)
    return drawn


def names_a_picture(path: Path) -> bool:
    """Whether a picture can be written under this name."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE


def _thousandths(value: float, length_px: int) -> int:
    return min(999, max(0, round(value / length_px * 1000)))


def _corners(part: str) -> Corners | None:
    numbers = part.split(",")
    if len(numbers) != 4 or not all(COORDINATE.fullmatch(number) for number in numbers):
        return None
    x0, y0, x1, y1 = map(int, numbers)
    return x0, y0, x1, y1


def _to_pixels(norm: Corners, width_px: int, height_px: int) -> PixelCorners:
    x0, y0, x1, y1 = norm
    return x0 / 1000 * width_px, y0 / 1000 * height_px, x1 / 1000 * width_px, y1 / 1000 * height_px


def _inside(pixels: PixelCorners, size: tuple[int, int]) -> Corners:
    """Whole pixels within the picture, corners in order: a model may swap them."""
    (left, right), (top, bottom) = sorted(pixels[0::2]), sorted(pixels[1::2])
    last_x, last_y = size[0] - 1, size[1] - 1
    return min(int(left), last_x), min(int(top), last_y), min(int(right), last_x), min(int(bottom), last_y)


def _shrunk(corners: Corners, by_px: int) -> Corners:
    """The rectangle inset on every side, as far as it has room."""
    x0, y0, x1, y1 = corners
    inset_x, inset_y = min(by_px, (x1 - x0) // 2), min(by_px, (y1 - y0) // 2)
    return x0 + inset_x, y0 + inset_y, x1 - inset_x, y1 - inset_y
