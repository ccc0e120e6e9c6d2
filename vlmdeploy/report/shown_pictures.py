"""Pictures that a report shows: written once each, upright, small enough for a page."""

from dataclasses import dataclass, field
from pathlib import Path

from vlmdeploy.data.samples import Picture, PixelBox
from vlmdeploy.runtime.image import load_image

LONGEST_SIDE_PX = 640
FOLDER = "pictures"


@dataclass(frozen=True)
class ShownPicture:
    """A picture's file in the report's folder, and how much smaller it is than the picture."""

    name: str
    scale: float

    def scaled(self, box: PixelBox) -> PixelBox:
        """A box of the upright picture in pixels of the shown one."""
        x0, y0, x1, y1 = (edge * self.scale for edge in box)
        return x0, y0, x1, y1


@dataclass
class PictureFolder:
    """The report's folder of pictures; `add` writes a picture the first time it is asked for."""

    folder: Path
    shown: dict[Picture, ShownPicture] = field(default_factory=dict)

    def add(self, picture: Picture) -> ShownPicture:
        """The picture's file. Raises DataError if it cannot be read."""
        if picture not in self.shown:
            image = load_image(picture)
            scale = min(1.0, LONGEST_SIDE_PX / max(image.size))
            if scale < 1:
                image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            name = f"{FOLDER}/{len(self.shown) + 1}.png"
            (self.folder / FOLDER).mkdir(exist_ok=True)
            image.save(self.folder / name)
            self.shown[picture] = ShownPicture(name, scale)
        return self.shown[picture]
