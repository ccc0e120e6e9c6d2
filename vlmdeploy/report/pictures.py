"""Pictures inside the page: small copies as data URLs, and boxes drawn over them as vector graphics."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from vlmdeploy.data.samples import PixelBox
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.image import load_image

MAX_SIDE_PX = 640
LOSSLESS_SIDE_PX = 256  # pictures no larger than this stay exact: every pixel of theirs is seen
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Embedded:
    """A picture to be shown: width and height are those of the original, in which boxes are given."""

    url: str
    width_px: int
    height_px: int

    @property
    def is_small(self) -> bool:
        """Whether it will be shown enlarged, so that its pixels should stay sharp."""
        return max(self.width_px, self.height_px) <= LOSSLESS_SIDE_PX


@dataclass(frozen=True)
class Rectangle:
    """A box on a picture, in its pixels; `kind` is its class in the style sheet."""

    kind: str
    x: float
    y: float
    width: float
    height: float


def embed_picture(folder: Path, name: str) -> Embedded:
    """A picture of the report's folder, at most MAX_SIDE_PX wide and high. Raises DataError if it is not there."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise DataError(f'{name!r}: expected the name of a picture inside the report, such as "pictures/0.png"')
    image = load_image(folder / name)
    width_px, height_px = image.size
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    is_small = max(image.size) <= LOSSLESS_SIDE_PX
    buffer = io.BytesIO()
    if is_small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(f"data:image/{'png' if is_small else 'jpeg'};base64,{data}", width_px, height_px)


def rectangle(kind: str, box: PixelBox) -> Rectangle:
    """A box to draw; a model may have named its corners the other way round."""
    (left, right), (top, bottom) = sorted(box[0::2]), sorted(box[1::2])
    return Rectangle(kind, left, top, right - left, bottom - top)
