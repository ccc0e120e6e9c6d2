"""Opening and decoding a picture with Pillow, free of its process-wide settings: any number of threads at once.

Pillow checks sizes against a global, `Image.MAX_IMAGE_PIXELS`, and warns by Python's warnings; libtiff prints errors.
Here Pillow's plugins are called directly, and where they look at the global themselves, they get no cause to: sizes
are the business of `image_limits`.
"""

import ctypes
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, TiffImagePlugin, _imaging

from vlmdeploy.runtime.image_limits import divided, has_python_decoder
from vlmdeploy.runtime.tiff import check_tags

# Pillow knows more formats, but some start other programs (EPS) or are drawings without a fixed size.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
START_BYTES = 16  # enough to tell the formats apart
EXIF_START, MOST_EXIF_BLOCKS = b"Exif\0\0", 64  # Pillow joins those of a JPEG, each of up to 64 KB
IGNORED = ("ignore", None, UserWarning, re.compile(r"PIL\."), 0)  # an entry of warnings.filters
MOST_READS = 2_000_000  # of a header, and of compressed pixels


def open_picture(content: bytes) -> ImageFile.ImageFile | None:
    """The picture with its header read, not decoded yet; None if the content is of none of the formats.

    Raises anything on damaged content, as Pillow does.
    """
    Image.preinit()
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN[name]
        accepted = accepts is None or accepts(content[:START_BYTES])
        if isinstance(accepted, str):
            raise ValueError(accepted)
        if accepted:
            return _opened(name, factory, content)
    return None


def _opened(
    name: str, factory: Callable[[io.BytesIO, str], ImageFile.ImageFile], content: bytes
) -> ImageFile.ImageFile:
    if name == "JPEG" and content.count(EXIF_START) > MOST_EXIF_BLOCKS:  # Pillow copies what it has for each of them
        raise ValueError(f"it has more than {MOST_EXIF_BLOCKS} EXIF blocks")
    if name == "TIFF":
        check_tags(content)
    if name == "GIF":
        return _FirstGifFrame(_Stream(content))
    return factory(_WebpStream(content) if name == "WEBP" else _Stream(content), "")


def decode(image: Image.Image) -> None:
    """Decode an opened picture in place. Raises anything on damaged content, as Pillow does."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image._im is None:
        image.im = Image.new(image.mode, image._tile_size, None).im  # as Pillow does, after checking the size
    stream = getattr(image, "fp", None)
    if isinstance(stream, _Stream):
        stream.reads_left = math.inf if has_python_decoder(image) else MOST_READS
    image.load()


def is_decoded(image: Image.Image) -> bool:
    """Whether a picture's pixels are in memory already."""
    return not getattr(image, "tile", ()) and image._im is not None


def decode_smaller(image: ImageFile.ImageFile, factor: int) -> None:
    """Make an opened JPEG or JPEG 2000 picture decode at a size divided by a power of two, rounded up."""
    width, height = divided(image.size, factor)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
        return
    codec, _, layers, *source = cast(tuple[Any, ...], image.tile[0][3])
    arguments = (codec, factor.bit_length() - 1, layers, *source)
    image.tile = [ImageFile._Tile("jpeg2k", (0, 0, width, height), 0, arguments)]
    image._size = width, height  # `reduce`, the official way, rounds to the nearest and then fails


def file_of(image: Image.Image, most_bytes: int) -> bytes:
    """The file behind an image object that is not decoded yet; b"" where it cannot be read again or is larger."""
    stream: Any = getattr(image, "fp", None)
    try:
        place = stream.tell()
        stream.seek(0)
        content = stream.read(most_bytes + 1)
        stream.seek(place)
    except (AttributeError, OSError, ValueError):  # no stream, one that cannot seek, a closed one
        return b""
    return content if len(content) <= most_bytes else b""


class _FirstGifFrame(GifImagePlugin.GifImageFile):
    """A GIF of whose frames only the first is wanted.

    Opening allocates what frames are replaced by (`disposal_method`), and checks the size of a frame that is larger
    than the picture: neither happens here.
    """

    disposal_method = property(lambda self: 0, lambda self, value: None)
    _is_open = False

    def _open(self) -> None:
        super()._open()
        right, bottom = cast(tuple[int, int, int, int], self.tile[0][1])[2:]
        self._size = max(self._size[0], right), max(self._size[1], bottom)
        self._is_open = True

    @property
    def size(self) -> tuple[int, int]:
        """Width and height; while opening larger than any frame."""
        return self._size if self._is_open else (2**17, 2**17)


class _Stream(io.BytesIO):
    """A file that refuses to be read in too many small pieces, as Pillow reads junk: a second for each megabyte."""

    reads_left: float = MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as any stream does. Raises ValueError after too many calls."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError("it consists of too many small pieces")
        return super().read(size)


class _WebpStream(_Stream):
    """A file whose start is read in two pieces: Pillow's WebP plugin checks the size if the first has 25 bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most the 16 bytes that tell the format, or all that is left."""
        return super().read(size if size is None or size < 0 else min(size, START_BYTES))


class _Quiet:
    """Counts the threads that read pictures; while there are any, Pillow's notes on damage are ignored.

    They are UserWarnings of its modules, an error logged about TIFF, and lines that libtiff prints. Its warning about
    large pictures, which is of another class, stays as it is for other users of Pillow in the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._libtiff_handler: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._begin()
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                if self._readers == 0:
                    self._end()

    def _begin(self) -> None:
        # Not by warnings.filterwarnings, which makes Python forget what it has warned about, and warn again.
        cast(list[object], warnings.filters).insert(0, IGNORED)
        _pillow_log.addFilter(_is_no_error)
        if _set_libtiff_handler is not None:
            self._libtiff_handler = _set_libtiff_handler(_print_nothing)

    def _end(self) -> None:
        with suppress(ValueError):  # someone else has replaced the filters meanwhile
            cast(list[object], warnings.filters).remove(IGNORED)
        _pillow_log.removeFilter(_is_no_error)
        if _set_libtiff_handler is not None:
            _set_libtiff_handler(self._libtiff_handler)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


quiet = _Quiet()
_pillow_log = logging.getLogger(TiffImagePlugin.__name__)
_print_nothing = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(lambda *found: None)


def _libtiff_function() -> Any:
    """TIFFSetErrorHandler of the libtiff below Pillow: takes a function to call, returns the one before. None without
    libtiff."""
    try:
        function = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    return function


_set_libtiff_handler = _libtiff_function()
