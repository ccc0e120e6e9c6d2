"""The pictures of a report: each written once, upright and small enough for the page, which embeds them as data URLs
and draws boxes over them as SVG."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vlmdeploy.data.samples import Picture, PixelBox
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.image import full_size, load_image

LONGEST_SIDE_PX = 640
FOLDER = "pictures"
LOSSLESS_SIDE_PX = 256  # pictures up to this size stay exact: they are shown enlarged
JPEG_QUALITY = 85


@dataclass(frozen=True)
class ShownPicture:
    """A picture's file in the report's folder, and its scale."""

    name: str
    scale: float

    def scaled(self, box: PixelBox) -> PixelBox:
        """Convert a box from the upright picture's pixels to the shown picture's."""
        x0, y0, x1, y1 = (edge * self.scale for edge in box)
        return x0, y0, x1, y1


@dataclass
class PictureFolder:
    """The report's folder of pictures; `add` writes each picture once."""

    folder: Path
    shown: dict[Picture, ShownPicture] = field(default_factory=dict)

    def add(self, picture: Picture) -> ShownPicture:
        """Write a picture, if it is new. Raises DataError if it cannot be read."""
        if picture not in self.shown:
            image = load_image(picture)
            width_px, height_px = full_size(image)
            scale = min(1.0, LONGEST_SIDE_PX / max(width_px, height_px))
            if scale < 1:
                image = image.resize((max(1, round(width_px * scale)), max(1, round(height_px * scale))))
            name = f"{FOLDER}/{len(self.shown) + 1}.png"
            (self.folder / FOLDER).mkdir(exist_ok=True)
            image.save(self.folder / name)
            self.shown[picture] = ShownPicture(name, scale)
        return self.shown[picture]


@dataclass(frozen=True)
class Embedded:
    """A picture in the page, as a data URL."""

    url: str
    width_px: int
    height_px: int

    @property
    def is_small(self) -> bool:
        """Whether it is shown enlarged, so its pixels should stay sharp."""
        return max(self.width_px, self.height_px) <= LOSSLESS_SIDE_PX


def embed_picture(folder: Path, name: str) -> Embedded:
    """Embed a picture of the report's folder. Raises DataError if it is missing."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise DataError(f'{name!r}: expected the name of a picture inside the report, such as "pictures/0.png"')
    image = load_image(folder / name)
    is_small = max(image.size) <= LOSSLESS_SIDE_PX
    buffer = io.BytesIO()
    if is_small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(f"data:image/{'png' if is_small else 'jpeg'};base64,{data}", *image.size)


def rectangle(box: PixelBox) -> dict[str, float]:
    """A box as an SVG rectangle; a model may swap its corners."""
    (left, right), (top, bottom) = sorted(box[0::2]), sorted(box[1::2])
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}
