"""From decoded pixels of any kind to upright RGB, in bands of rows: only the result is in memory twice.

Unlike the models' authors, we apply the EXIF orientation and put transparency over white.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from vlmdeploy.byte_sizes import shown_size

BAND_PX = 2**18  # converted at once, or one row
MOST_EXIF_BYTES = 2**23  # Pillow makes Python numbers of it


@dataclass(frozen=True)
class Turn:
    """How to set a picture upright: Pillow's method, and where its rows go, band by band."""

    method: Image.Transpose
    from_end: bool = False
    to_columns: bool = False

    def place(self, rows: range, height: int) -> tuple[int, int]:
        """The upper left corner, in the upright picture, of these rows of a picture of this height."""
        start = height - rows.stop if self.from_end else rows.start
        return (start, 0) if self.to_columns else (0, start)

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the upright picture."""
        return size[::-1] if self.to_columns else size


TURNS: dict[object, Turn] = {  # by EXIF orientation; 1 is upright
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT),
    3: Turn(Image.Transpose.ROTATE_180, from_end=True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, from_end=True),
    5: Turn(Image.Transpose.TRANSPOSE, to_columns=True),
    6: Turn(Image.Transpose.ROTATE_270, from_end=True, to_columns=True),
    7: Turn(Image.Transpose.TRANSVERSE, from_end=True, to_columns=True),
    8: Turn(Image.Transpose.ROTATE_90, to_columns=True),
}


def find_turn(image: Image.Image) -> Turn | None:
    """How a picture's EXIF block says to set it upright. Raises anything on a damaged block, as Pillow does."""
    block = image.info.get("exif", b"")
    if len(block) > MOST_EXIF_BYTES:
        raise ValueError(f"it has {shown_size(len(block))}")
    # Pillow's exif_transpose rewrites the block and fails on bad ones.
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return TURNS.get(orientation)


def needs_copy(image: Image.Image, turn: Turn | None) -> bool:
    """Whether a decoded picture's pixels are other ones than those of the result."""
    return image.mode != "RGB" or image.has_transparency_data or turn is not None


def upright_rgb(image: Image.Image, turn: Turn | None) -> Image.Image:
    """A new RGB picture from a decoded one. Raises ValueError for pixels of unknown range."""
    convert = _conversion(image)
    size = turn.size(image.size) if turn else image.size
    result = Image.new("RGB", size)
    for rows, band in _bands(image):
        colours = convert(band)
        if turn:
            colours = colours.transpose(turn.method)
        result.paste(colours, turn.place(rows, image.height) if turn else (0, rows.start))
    return result


def _bands(image: Image.Image) -> Iterator[tuple[range, Image.Image]]:
    height = max(1, BAND_PX // image.width)
    for start in range(0, image.height, height):
        rows = range(start, min(start + height, image.height))
        # As Image.crop does, which checks the size against Pillow's global limit.
        yield rows, image._new(image.im.crop((0, rows.start, image.width, rows.stop)))


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range, expected 8 or 16 bit")
    if image.mode.startswith("I"):
        return _from_16_bit
    return _over_white if image.has_transparency_data else _without_transparency


def _without_transparency(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB")


def _over_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _from_16_bit(picture: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255, rounded; Pillow's own conversion clips at 255."""
    values = np.asarray(picture).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
