"""Pictures: reading them from any source, and turning them into the vision encoder's input.

The project's only image resize: training, calibration and verification use it too. Unlike the models' authors, we apply
the EXIF orientation and put transparency over white.
"""

import base64
import binascii
import contextlib
import io
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from vlmdeploy.errors import DataError
from vlmdeploy.manifest import ImageRecipe


@runtime_checkable
class StoredImage(Protocol):
    """A picture's file inside a larger file; `str` of it is its name in messages."""

    def read_bytes(self) -> bytes:
        """The picture's file. Raises DataError if it is gone or altered."""


ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | StoredImage

MAX_PIXELS = 200_000_000
LONGEST_PATH = 4096  # Linux's limit
# Pillow knows more formats, but some start other programs (EPS) or are drawings without a fixed size.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
EXPECTED = "expected a picture: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000"
FILTERS = {"bicubic": Image.Resampling.BICUBIC}
UPRIGHT = {  # EXIF orientation -> the transpose that sets the picture upright; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

log = logging.getLogger("vlmdeploy")
_pillow_limit_lock = threading.Lock()


def load_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture with 8 bits per channel: from a path, a data URL, bytes, a StoredImage or a Pillow
    image.

    Puts transparency over white, scales 16-bit grey, and takes the first frame of an animation with a logged warning.
    Raises DataError naming a source that is missing, no picture, damaged or larger than 200 megapixels.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the image object")
    name = _name(source)
    with _pillow_limit_lifted(), _open(source, name) as image:
        _warn_if_animated(image, name)
        return _upright_rgb(image, name)


def resize_rgb(image: Image.Image, recipe: ImageRecipe) -> npt.NDArray[np.uint8]:
    """The RGB picture squashed to uint8 [size_px, size_px, 3], ignoring the aspect ratio."""
    size = (recipe.size_px, recipe.size_px)
    return np.asarray(image.resize(size, FILTERS[recipe.filter]), dtype=np.uint8)


def preprocess(image: Image.Image, recipe: ImageRecipe) -> npt.NDArray[np.float32]:
    """The vision encoder's input, float32 [3, size_px, size_px]: resized, in 0..1, then normalized per channel."""
    scaled = resize_rgb(image, recipe).astype(np.float32) / np.float32(255)
    mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
    normalized = (scaled - mean) / std
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))  # [3, size_px, size_px]


def _name(source: ImageSource) -> str:
    """A source's name in messages: a path as it is; the beginning of a string too long for one, such as pasted data."""
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if is_url(source, "data:"):
        return "picture in a data URL"
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return path if len(path) <= LONGEST_PATH else path[:200]
    if isinstance(source, StoredImage):
        return str(source)
    raise DataError(f"picture is a {type(source).__name__}, expected a path, bytes, a data URL or a Pillow image")


def is_url(source: ImageSource, *schemes: str) -> bool:
    """Whether a source is a URL of one of these schemes, by default of any that we know."""
    known = schemes or ("data:", "http://", "https://")
    return isinstance(source, str) and source[:8].lower().startswith(known)


@contextlib.contextmanager
def _pillow_limit_lifted() -> Iterator[None]:
    """Lift Pillow's global size limit, which would warn below ours and fail with its own error."""
    with _pillow_limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open(source: str | os.PathLike[str] | bytes | StoredImage, name: str) -> Image.Image:
    """The picture with its header read and its size checked, its pixels not decoded yet."""
    content = _content(source, name)
    try:
        image = Image.open(content, formats=FORMATS)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file; {EXPECTED}") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: is a folder; {EXPECTED}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: {_finding(content)}; {EXPECTED}") from error
    except Exception as error:  # Pillow's readers let any exception of theirs through
        raise DataError(f"{name}: cannot be opened ({error}); {EXPECTED}") from error
    _check_size(image, name)
    return image


def _content(source: str | os.PathLike[str] | bytes | StoredImage, name: str) -> Path | io.BytesIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        return io.BytesIO(source.read_bytes())
    if is_url(source, "data:"):
        return io.BytesIO(_data_url_bytes(os.fspath(source), name))
    if is_url(source, "http://", "https://"):
        raise DataError(f"{name}: pictures are not fetched from the network; download it and give the file")
    return Path(source)


def _data_url_bytes(url: str, name: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not (comma and header.lower().startswith("data:image/") and header.lower().endswith(";base64")):
        raise DataError(f'{name}: starts with "{url[:40]}", expected data:image/...;base64,...')
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: not valid base64 ({error})") from error


def _finding(content: Path | io.BytesIO) -> str:
    """What a file that is no picture holds."""
    with content.open("rb") if isinstance(content, Path) else content as stream:
        stream.seek(0)
        start = stream.read(16)
    return f"not a picture or damaged, it starts with {start!r}" if start else "empty (0 bytes)"


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        found = f"{width} x {height} pixels ({width * height / 1e6:.0f} megapixels)"
        raise DataError(f"{name}: {found}, at most {MAX_PIXELS // 10**6} megapixels are read; scale it down first")
    if width * height == 0:
        raise DataError(f"{name}: {width} x {height} pixels, expected at least 1 x 1")


def _warn_if_animated(image: Image.Image, name: str) -> None:
    # A camera's JPEG may carry a second picture for 3D screens or a gain map (MPO); that is no animation.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        log.warning("%s: holds several frames; only the first one is used", name)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image.load()
        return _rgb(_upright(image, name))
    except MemoryError as error:
        raise DataError(f"{name}: not enough memory to decode {image.width} x {image.height} pixels") from error
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DataError(f"{name}: damaged or truncated, or of a kind that cannot be used ({error})") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The picture turned as its EXIF says. Pillow's exif_transpose rewrites the block and fails on bad ones."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # the pixels are fine; cameras and editors damage EXIF blocks in many ways
        log.warning("%s: its EXIF block cannot be read (%s); an orientation in it is not applied", name, error)
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range, expected 8 or 16 bit")
    if image.mode.startswith("I"):
        return _grey_from_16_bit(image).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255, rounded; Pillow's own conversion clips at 255."""
    values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
