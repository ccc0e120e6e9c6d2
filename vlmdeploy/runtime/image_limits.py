"""How large a picture may be, and what decoding one costs by its header: both are checked before a pixel is decoded.

A picture of 23 KB may hold 200 megapixels, and Pillow's decoders differ in what they need besides the pixels. Measured
(Pillow 13.0, libjpeg-turbo 3.2, libwebp 1.6, libavif 1.4, OpenJPEG 2.5, libtiff 4.7) as the growth of resident memory
while 24 megapixels are decoded in a process of their own, in bytes per pixel, Pillow's own pixels included:
JPEG 4.0, grey 1.0; progressive 7.1 (4:2:0), 10.0 (4:4:4), 12.0 (CMYK); in one scan per component 10.0.
PNG, BMP, GIF, PPM, TIFF in small strips: as stored. TIFF as one LZW strip 7.0.
WebP 16.0, and a copy of the file.
AVIF of 8 bits 3.6 (grey), 9.3 (4:2:0), 10.9 (4:4:4), 13.3 (4:4:4 and alpha); of 10 bits 4.2, 11.0, 14.3, 17.4.
JPEG 2000 6.2 (grey), 19.4 (RGB), 24.5 (RGBA), 22.4 (RGB of 16 bits); RGB in tiles of 1024 4.8, in code blocks of 4 x 4
96.7; and 62,500 tiles of one pixel 759 MB.
`tests/test_runtime_image_limits.py` measures anew.
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, JpegImagePlugin, TiffImagePlugin

from vlmdeploy.errors import ConfigError
from vlmdeploy.runtime.jpeg2000 import read_codestream

STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # per pixel; others 4
RGB_BYTES = 4
SIDE_BYTES = 64  # for each pixel of the longer side: rows in decoders, the weights of a resize
FIXED_BYTES = 16 << 20  # a band of rows in conversion (`image_rgb.BAND_PX`), tables

FRUGAL_FORMATS = {"PNG", "BMP", "GIF", "PPM"}  # decode row by row
WEBP_BYTES = 12  # two canvases and a copy of the first
UNKNOWN_DECODER_BYTES = 22
PYTHON_DECODERS = {"ppm", "ppm_plain", "bmp_rle"}  # these build the pixels as bytes, up to three times
PYTHON_DECODER_BYTES = 32 << 20
LATER_FRAME_BYTES = 12  # the frame before, this one, and the part of it that changed
AV1_HIGH_BITDEPTH, AV1_SUBSAMPLING, AV1_WORST = 0x40, 0x0C, 0x60
AV1_COLOUR = {0x0: 2.0, 0x8: 1.0, 0x4: 1.0, 0xC: 0.5}  # samples for each of brightness
COEFFICIENT_BYTES = 128  # a JPEG block of 8 x 8
PLAIN_TIFF = {"raw", "tiff_ccitt", "group3", "group4", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits",
              "zstd", "lzma"}  # fmt: skip  # decode into one buffer of a strip or tile
SAMPLE_BYTES = 4  # of a JPEG 2000 component
CODE_BLOCK_BYTES = 800  # measured 410 to 520
IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 262, 274  # tags of TIFF
SAMPLES_PER_PIXEL, ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH, YCBCR = 277, 278, 322, 323, 6
TILE_BYTES, TILE_COMPONENT_BYTES = 9000, 1200  # measured 8,900 and 1,100


@dataclass(frozen=True)
class ImageLimits:
    """How large a picture may be: pixels when decoded, memory while it is decoded and converted, and its file.

    All in millions. JPEG and JPEG 2000 pictures above the limits are decoded smaller, if their decoder's own memory
    allows it; others are refused. Uncompressed RGB of 100 megapixels is a file of 300 MB.
    Raises ConfigError for a limit that is not a number above zero.
    """

    megapixels: float = 100
    decoded_mb: float = 512
    file_mb: float = 320

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"image limits: {name} is {value!r}, expected a number above zero")

    @classmethod
    def for_megapixels(cls, megapixels: float) -> "ImageLimits":
        """Limits for so many megapixels; above the default, memory and file grow in proportion."""
        growth = max(1, megapixels / cls.megapixels)
        return cls(megapixels, cls.decoded_mb * growth, cls.file_mb * growth)

    @property
    def file_bytes(self) -> int:
        """The largest picture file."""
        return int(self.file_mb * 1e6)


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class DecodingCost:
    """Bytes that decoding and converting a picture take: `fixed` only while it is decoded, whatever the size.

    most_divided: the largest power of two by which its sides can be divided in decoding; 1 if they cannot.
    """

    fixed: int
    decoding_per_px: float
    converting_per_px: float
    most_divided: int = 1

    def peak_bytes(self, size: tuple[int, int]) -> int:
        """The most memory in use at once if the picture is decoded at this size."""
        pixels = size[0] * size[1]
        peak = max(self.fixed + self.decoding_per_px * pixels, self.converting_per_px * pixels)
        return FIXED_BYTES + SIDE_BYTES * max(size) + math.ceil(peak)

    def factor(self, size: tuple[int, int], limits: ImageLimits) -> int | None:
        """The least power of two to divide the sides by so that decoding keeps to the limits; None if none helps."""
        factor = 1
        while factor <= self.most_divided:
            scaled = divided(size, factor)
            small = scaled[0] * scaled[1] <= limits.megapixels * 1e6
            if small and self.peak_bytes(scaled) <= limits.decoded_mb * 1e6:
                return factor
            factor *= 2
        return None

    def needed_megapixels(self, size: tuple[int, int]) -> int:
        """The least `ImageLimits.for_megapixels` that allows this size."""
        megapixels, growth = size[0] * size[1] / 1e6, self.peak_bytes(size) / 1e6 / DEFAULT_LIMITS.decoded_mb
        return math.ceil(megapixels if growth <= 1 else max(megapixels, growth * DEFAULT_LIMITS.megapixels))


def has_python_decoder(image: Image.Image) -> bool:
    """Whether Pillow decodes this picture in Python, a few bytes at a time."""
    return any(tile[0] in PYTHON_DECODERS for tile in getattr(image, "tile", ()))


def divided(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Width and height divided by a factor, rounded up."""
    return -(-size[0] // factor), -(-size[1] // factor)


def decoding_cost(image: Image.Image, content: bytes, copies: bool) -> DecodingCost:
    """What an opened picture costs that is not decoded yet.

    content: its file; b"" if it cannot be had, and the worst is assumed. copies: whether its pixels will be converted
    or turned, into a second picture. Raises ValueError, TypeError and others for headers that make no sense.
    """
    stored = stored_bytes(image)
    converting = stored + (RGB_BYTES if copies else 0)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        most_divided = min(8, 1 << min(image.size).bit_length() - 1)  # Pillow does not divide a side below one pixel
        return DecodingCost(_jpeg_coefficient_bytes(image, content), stored, converting, most_divided)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _tiff_cost(image, content, stored, converting)
    if image.format == "JPEG2000" and content:
        return _jpeg2000_cost(image, content, stored, converting)
    if image.format == "WEBP":
        return DecodingCost(2 * len(content), stored + WEBP_BYTES, converting + 2 * RGB_BYTES)  # its canvases stay
    if has_python_decoder(image):
        raw_bytes = 4 if image.mode == "I" else len(image.getbands())
        return DecodingCost(PYTHON_DECODER_BYTES, stored + 3.2 * raw_bytes, converting)
    if image.format == "AVIF":
        decoder = _avif_plane_bytes(image, content)
        return DecodingCost(0, stored + len(image.getbands()) + decoder, converting + decoder)
    decoder = 0 if image.format in FRUGAL_FORMATS else UNKNOWN_DECODER_BYTES
    later_frame = LATER_FRAME_BYTES if image.tell() > 0 else 0
    return DecodingCost(0, stored + decoder + later_frame, converting)


def stored_bytes(image: Image.Image) -> int:
    """How many bytes Pillow keeps of each pixel."""
    return STORED_BYTES.get(image.mode, 4)


def _jpeg_coefficient_bytes(image: JpegImagePlugin.JpegImageFile, content: bytes) -> int:
    """Memory for all coefficients, which decoders keep if a picture comes in several scans."""
    if not image.info.get("progressive") and content and not _has_several_scans(content):
        return 0
    factors = [(max(1, across), max(1, down)) for _, across, down, _ in image.layer]
    mcu_columns = -(-image.width // (8 * max(across for across, _ in factors)))
    mcu_rows = -(-image.height // (8 * max(down for _, down in factors)))
    return COEFFICIENT_BYTES * sum(mcu_columns * across * mcu_rows * down for across, down in factors)


def _has_several_scans(content: bytes) -> bool:
    """Whether a JPEG's first scan holds fewer components than its frame (also if that cannot be found out)."""
    place, components = 2, 0
    while (place := content.find(b"\xff", place)) >= 0:
        marker = content[place + 1 : place + 2]
        if marker in (b"\xff", b"\0", b"\x01", b"") or b"\xd0" <= marker <= b"\xd9":  # without a length
            place += 1
            continue
        if b"\xc0" <= marker <= b"\xcf" and marker not in (b"\xc4", b"\xc8", b"\xcc"):
            components = int.from_bytes(content[place + 9 : place + 10])
        if marker == b"\xda":
            return components == 0 or int.from_bytes(content[place + 4 : place + 5]) < components
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return True


def _avif_plane_bytes(image: Image.Image, content: bytes) -> float:
    """Brightness, colour and alpha by the configuration of AV1 (av1C), twice: codecs copy for film grain and grids."""
    found = [flags[0] for flags in re.findall(rb"av1C\x81.(.)", content, re.DOTALL)] or [AV1_WORST]
    sample_bytes = 2 if any(flags & AV1_HIGH_BITDEPTH for flags in found) else 1
    colour = max(AV1_COLOUR[flags & AV1_SUBSAMPLING] for flags in found) if len(image.getbands()) > 2 else 0
    return 2 * sample_bytes * (1 + colour + image.has_transparency_data) + 1


def _jpeg2000_cost(image: Image.Image, content: bytes, stored: int, converting: float) -> DecodingCost:
    header = read_codestream(content)
    if header.size != image.size:
        sizes = " and ".join(f"{width} x {height}" for width, height in (image.size, header.size))
        raise ValueError(f"its headers state {sizes} pixels")
    tile_px = header.tile_size[0] * header.tile_size[1]
    num_components = len(header.sample_bytes)
    blocks = math.ceil(tile_px * num_components * header.blocks) * CODE_BLOCK_BYTES
    tiles = header.num_tiles * (TILE_BYTES + num_components * TILE_COMPONENT_BYTES)
    samples = sum(SAMPLE_BYTES + width for width in header.sample_bytes)
    share = tile_px / (image.width * image.height)
    return DecodingCost(len(content) + blocks + tiles, stored + share * samples, converting, 2**header.levels)


def _tiff_cost(image: TiffImagePlugin.TiffImageFile, content: bytes, stored: int, converting: float) -> DecodingCost:
    """libtiff unpacks a strip or tile at once, and a tile may be larger than its picture."""
    tags, compression = image.tag_v2, image.info.get("compression")
    turned = stored * image.width * image.height if tags.get(ORIENTATION, 1) != 1 else 0  # while Pillow decodes
    if compression == "raw":
        offsets = sorted(tile[2] for tile in image.tile)
        longest = max((after - before for before, after in pairwise(offsets)), default=0)  # is read at once
        return DecodingCost(max(2 * min(longest, len(content)), turned), stored, converting)
    if TILE_WIDTH in tags:
        buffer_px = tags[TILE_WIDTH] * tags[TILE_LENGTH]
    else:
        buffer_px = tags[IMAGE_WIDTH] * min(tags[IMAGE_LENGTH], tags.get(ROWS_PER_STRIP, 2**32))
    sample_bytes = math.ceil(max(tags.get(BITS_PER_SAMPLE, (1,))) / 8)
    buffer_bytes = buffer_px * sample_bytes * tags.get(SAMPLES_PER_PIXEL, 4)
    if compression not in PLAIN_TIFF or tags.get(PHOTOMETRIC) == YCBCR:  # a codec's own copy, coefficients, RGBA
        buffer_bytes = 2 * buffer_bytes + 12 * buffer_px
    return DecodingCost(max(buffer_bytes, turned), stored, converting)
