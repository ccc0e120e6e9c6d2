"""Pictures: reading them from any source, and turning them into the vision encoder's input.

The project's only image resize: training, calibration and verification use it too. Every file is read whole, within a
limit, before Pillow sees it; what its header says is checked against `ImageLimits` before it is decoded.
"""

import base64
import binascii
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import read_input
from vlmdeploy.manifest import ImageRecipe
from vlmdeploy.runtime.image_file import decode, decode_smaller, file_of, is_decoded, open_picture, quiet
from vlmdeploy.runtime.image_limits import (
    DEFAULT_LIMITS,
    RGB_BYTES,
    DecodingCost,
    ImageLimits,
    decoding_cost,
    stored_bytes,
)
from vlmdeploy.runtime.image_rgb import Turn, find_turn, needs_copy, upright_rgb


@runtime_checkable
class StoredImage(Protocol):
    """A picture's file inside a larger file; `str` of it is its name in messages."""

    def read_bytes(self) -> bytes:
        """The picture's file. Raises DataError if it is gone or altered."""


ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | StoredImage

A_PICTURE = "a picture: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000"
EXPECTED = f"expected {A_PICTURE}"
FILTERS = {"bicubic": Image.Resampling.BICUBIC}
MOST_SQUARE_PIXELS = 1 << 26  # of a picture that is padded or resized before it is cropped
FULL_SIZE = "full_size_px"  # in the `info` of a picture that was decoded smaller
COLOUR_PROFILE = "icc_profile"
LATE_EXIF = ("PNG", "TIFF")  # EXIF may follow a PNG's pixels; a TIFF is turned by Pillow while it decodes

log = logging.getLogger("vlmdeploy")


def load_image(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An upright RGB picture with 8 bits per channel: from a path, a data URL, bytes, a StoredImage or a Pillow
    image.

    Puts transparency over white, scales 16-bit grey, and takes the first frame of an animation with a logged warning.
    Decodes a JPEG or JPEG 2000 picture above the limits smaller, with a logged warning; `full_size` tells its own size.
    Raises DataError naming a source that is missing, no picture, damaged or above the limits.
    """
    name = _name(source)
    with quiet(), _named_damage(name):
        if isinstance(source, Image.Image):
            return _read_object(source, name, limits)
        return _read_file(picture_bytes(source, limits), name, limits)


def full_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of the upright picture that `load_image` read: its own if it was decoded smaller."""
    size: tuple[int, int] = image.info.get(FULL_SIZE, image.size)
    return size


def picture_bytes(source: str | os.PathLike[str] | bytes | StoredImage, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """A picture's file. Raises DataError naming a source that is missing, no regular file or larger than the limit."""
    name, most = _name(source), limits.file_bytes
    if isinstance(source, str | os.PathLike):
        if is_url(source, "data:"):
            return _data_url_bytes(os.fspath(source), name, most)
        if is_url(source, "http://", "https://"):
            raise DataError(f"{name}: pictures are not fetched from the network; download it and give the file")
        return read_input(Path(os.fsdecode(source)), DataError, most, A_PICTURE)
    content = source if isinstance(source, bytes) else source.read_bytes()
    _check_bytes(len(content), most, name)
    return content


def resize_rgb(image: Image.Image, recipe: ImageRecipe) -> npt.NDArray[np.uint8]:
    """The RGB picture as a square by the recipe, uint8 [size_px, size_px, 3]."""
    side, pixels = recipe.size_px, FILTERS[recipe.filter]
    if recipe.resize == "pad":
        square = _padded(image, tuple(int(255 * part) for part in recipe.mean), side, pixels)
    elif recipe.resize == "crop":
        square = _cropped(image, side, pixels)
    else:
        square = image
    return np.asarray(square.resize((side, side), pixels), dtype=np.uint8)


def _padded(image: Image.Image, colour: tuple[int, ...], size_px: int, pixels: Image.Resampling) -> Image.Image:
    """The picture in the middle of a square of this colour. One whose square would fill the memory is made small first:
    its edges then lie on whole pixels."""
    side = max(image.size)
    if side**2 > max(MOST_SQUARE_PIXELS, 2 * image.width * image.height):
        width, height = (max(1, round(size_px * length / side)) for length in image.size)
        image, side = image.resize((width, height), pixels), size_px
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cropped(image: Image.Image, size_px: int, pixels: Image.Resampling) -> Image.Image:
    """The middle of the picture whose shorter side became size_px."""
    longer = int(size_px * max(image.size) / min(image.size))
    width, height = (size_px, longer) if image.width <= image.height else (longer, size_px)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    right, bottom = left + size_px, top + size_px
    if width * height <= MOST_SQUARE_PIXELS:
        return image.resize((width, height), pixels).crop((left, top, right, bottom))
    across, down = image.width / width, image.height / height  # only what stays, within a few grey levels of that
    return image.resize((size_px, size_px), pixels, box=(left * across, top * down, right * across, bottom * down))


def preprocess(image: Image.Image, recipe: ImageRecipe) -> npt.NDArray[np.float32]:
    """The vision encoder's input, float32 [3, size_px, size_px]: resized, in 0..1, then normalized per channel."""
    scaled = resize_rgb(image, recipe).astype(np.float32) / np.float32(255)
    mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
    normalized = (scaled - mean) / std
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))  # [3, size_px, size_px]


def _name(source: ImageSource) -> str:
    """A source's name in messages."""
    if isinstance(source, Image.Image):
        return "the image object"
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if is_url(source, "data:"):
        return "picture in a data URL"
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, StoredImage):
        return str(source)
    raise DataError(f"picture is a {type(source).__name__}, expected a path, bytes, a data URL or a Pillow image")


def is_url(source: ImageSource, *schemes: str) -> bool:
    """Whether a source is a URL of one of these schemes, by default of any that we know."""
    known = schemes or ("data:", "http://", "https://")
    return isinstance(source, str) and source[:8].lower().startswith(known)


def _data_url_bytes(url: str, name: str, most_bytes: int) -> bytes:
    _check_bytes(len(url) // 4 * 3, most_bytes, name)
    header, comma, payload = url.partition(",")
    if not (comma and header.lower().startswith("data:image/") and header.lower().endswith(";base64")):
        raise DataError(f'{name}: starts with "{url[:40]}", expected data:image/...;base64,...')
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: not valid base64 ({error})") from error


def _check_bytes(found: int, most_bytes: int, name: str) -> None:
    if found > most_bytes:
        raise DataError(f"{name}: has {shown_size(found)}, at most {shown_size(most_bytes)} are read; {EXPECTED}")


def _open(content: bytes, name: str) -> ImageFile.ImageFile:
    """The picture with its header read, not decoded yet."""
    try:
        image = open_picture(content)
    except Exception as error:  # Pillow's readers let any exception of theirs through
        raise DataError(f"{name}: cannot be opened ({_problem(error)}); {EXPECTED}") from error
    if image is None:
        found = f"not a picture or damaged, it starts with {content[:16]!r}" if content else "empty (0 bytes)"
        raise DataError(f"{name}: {found}; {EXPECTED}")
    return image


def _read_file(content: bytes, name: str, limits: ImageLimits) -> Image.Image:
    image = _open(content, name)
    _warn_if_animated(image, name)
    size, is_late = image.size, image.format in LATE_EXIF
    turn = None if is_late else _turn(image, name)
    cost = decoding_cost(image, content, needs_copy(image, turn))
    factor = _checked_factor(size, cost, limits, name)
    if factor > 1:
        decode_smaller(image, factor)
    decode(image)
    if is_late:
        turn = _turn(image, name)
    if needs_copy(image, turn):
        _checked_factor(image.size, DecodingCost(0, 0, stored_bytes(image) + RGB_BYTES), limits, name)
        picture = upright_rgb(image, turn)
    else:
        picture = image._new(image.im)  # without the file and its decoder
    picture.info = _kept_info(image)
    if factor > 1:
        picture.info[FULL_SIZE] = size if turn is None else turn.size(size)
        decoded = f"decoded at {image.width} x {image.height}; more needs higher limits{_option(size, cost)}"
        log.warning("%s: %d x %d pixels are above the limits, %s", name, *size, decoded)
    return picture


def _read_object(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    """A copy: the object stays its owner's, and is never decoded smaller."""
    if min(image.size) < 1:
        raise DataError(f"{name}: {image.width} x {image.height} pixels, expected at least 1 x 1")
    if not is_decoded(image):
        cost = decoding_cost(image, file_of(image, limits.file_bytes), copies=True)
        _checked_factor(image.size, replace(cost, most_divided=1), limits, name)
    decode(image)  # or apply a palette that was changed
    _checked_factor(image.size, DecodingCost(0, 0, RGB_BYTES), limits, name)
    picture = upright_rgb(image, _turn(image, name))
    picture.info = _kept_info(image)
    return picture


def _checked_factor(size: tuple[int, int], cost: DecodingCost, limits: ImageLimits, name: str) -> int:
    """By what to divide the sides of a picture so that it keeps to the limits. Raises DataError if nothing helps."""
    factor = cost.factor(size, limits)
    if factor is None:
        raise DataError(
            f"{name}: {_excess(size, cost, limits)}; scale it down, or raise the limit{_option(size, cost)}"
        )
    return factor


def _excess(size: tuple[int, int], cost: DecodingCost, limits: ImageLimits) -> str:
    found, megapixels = f"{size[0]} x {size[1]} pixels", size[0] * size[1] / 1e6
    if megapixels > limits.megapixels:
        return f"{found} ({megapixels:.0f} megapixels), at most {limits.megapixels:g} are read"
    return f"{found} take {shown_size(cost.peak_bytes(size))} to decode, at most {limits.decoded_mb:g} MB are used"


def _option(size: tuple[int, int], cost: DecodingCost) -> str:
    return f" (`run`: --max-megapixels {cost.needed_megapixels(size)}; in Python: ImageLimits)"


def _turn(image: Image.Image, name: str) -> Turn | None:
    try:
        return find_turn(image)
    except Exception as error:  # the pixels are fine; cameras and editors damage EXIF blocks in many ways
        problem = _problem(error)
        log.warning("%s: its EXIF block cannot be read (%s); an orientation in it is not applied", name, problem)
        return None


def _warn_if_animated(image: Image.Image, name: str) -> None:
    try:
        # A camera's JPEG may carry a second picture for 3D screens or a gain map (MPO); that is no animation.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # the second frame is damaged, which does no harm to the first
        is_animated = True
    if is_animated:
        log.warning("%s: holds several frames; only the first one is used", name)


def _kept_info(image: Image.Image) -> dict[str | tuple[int, int], Any]:
    profile = image.info.get(COLOUR_PROFILE)
    return {COLOUR_PROFILE: profile} if profile else {}


@contextmanager
def _named_damage(name: str) -> Iterator[None]:
    """Turn whatever decoders raise on damaged bytes into a DataError."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{name}: there is not enough memory to decode it") from error
    except Exception as error:
        problem = _problem(error)
        raise DataError(f"{name}: damaged or truncated, or of a kind that cannot be used ({problem})") from error


def _problem(error: Exception) -> str:
    return str(error) or type(error).__name__
