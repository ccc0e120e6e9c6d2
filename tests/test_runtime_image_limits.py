"""Contract: which pictures are too large, and how much smaller a JPEG or JPEG 2000 picture is then decoded. Reference:
what decoding is said to cost against the memory of a process that does it."""

import io
import logging
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmdeploy.errors import ConfigError, DataError
from vlmdeploy.runtime.boxes import Box, draw_boxes
from vlmdeploy.runtime.image import full_size, load_image
from vlmdeploy.runtime.image_file import open_picture
from vlmdeploy.runtime.image_limits import ImageLimits, decoding_cost

ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of every mode that is quick to compress and where neighbours look alike."""
    x, y = np.arange(width, dtype=np.uint32), np.arange(height, dtype=np.uint32)[:, None]
    if mode == "I;16":
        return Image.fromarray(((x + y) % 65536).astype(np.uint16))
    planes = [Image.fromarray(((x * 255 // width + y * step) // 2 % 256).astype(np.uint8)) for step in (0, 1, 2, 3)]
    if mode in ("RGBA", "CMYK"):
        return Image.merge(mode, planes)
    return planes[0].convert(mode) if mode != "RGB" else Image.merge(mode, planes[:3])


def claiming(width: int, height: int, colour_type: int = 2) -> bytes:
    """A PNG header of that size without pixels: only a reader that looks at the header first can refuse it quickly."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, colour_type, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (claiming(20_000, 10_000), r"20000 x 10000 pixels \(200 megapixels\), at most 100 are read; .*megapixels 200;"),
        (claiming(10_000, 10_001), r"10000 x 10001 pixels \(100 megapixels\), at most 100 are read; .*megapixels 101;"),
        (claiming(10_000, 9_000, 6), r"10000 x 9000 pixels take 737\.4 MB to decode, at most 512 MB .*megapixels 145;"),
        (claiming(100_000_000, 1), r"100000000 x 1 pixels take 6\.8 GB to decode"),  # rows, and the weights of a resize
    ],
)  # fmt: skip
def test_too_large_a_picture_is_refused_from_the_header_with_the_option_that_reads_it(
    content: bytes, told: str
) -> None:
    """A PNG of 23 KB and 200 megapixels took 3.3 GB."""
    with pytest.raises(DataError, match=told):
        load_image(content)


def test_the_limits_can_be_raised() -> None:
    for content in (claiming(20_000, 10_000), claiming(10_000, 9_000, 6)):
        with pytest.raises(DataError, match="truncated"):  # the size passed; the pixels are not there
            load_image(content, ImageLimits.for_megapixels(200))


def test_memory_and_file_grow_with_the_megapixels_but_do_not_shrink() -> None:
    assert ImageLimits.for_megapixels(100) == ImageLimits()
    assert ImageLimits.for_megapixels(25) == ImageLimits(25, 512, 320)
    assert ImageLimits.for_megapixels(250) == ImageLimits(250, 1280, 800)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "100", True])
def test_a_limit_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"decoded_mb is .*, expected a number above zero"):
        ImageLimits(decoded_mb=value)


def test_the_limits_hold_for_picture_objects() -> None:
    small = ImageLimits(megapixels=0.001)
    for image in (Image.new("RGB", (40, 30)), Image.open(io.BytesIO(encoded(smooth(40, 30), "JPEG")))):
        with pytest.raises(DataError, match=r"^the image object: 40 x 30 pixels \(0 megapixels\), at most 0\.001"):
            load_image(image, small)
        assert image.size == (40, 30)  # not decoded smaller either: it is its owner's
    with pytest.raises(DataError, match=r"take 20\.8 MB to decode"):
        load_image(Image.new("L", (1000, 1000)), ImageLimits(decoded_mb=20))
    with pytest.raises(DataError, match=r"take 24\.8 MB to decode"):  # the picture and its copy
        load_image(Image.open(io.BytesIO(encoded(smooth(1000, 1000), "JPEG"))), ImageLimits(decoded_mb=22))


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (encoded(smooth(1001, 603), "JPEG"), (126, 76)),
        (encoded(smooth(1001, 603, "CMYK"), "JPEG", progressive=True), (126, 76)),
        (encoded(smooth(1001, 603), "JPEG2000"), (126, 76)),  # not what Pillow rounds to
        (encoded(smooth(1001, 603, "I;16"), "JPEG2000"), (126, 76)),
        (encoded(smooth(1001, 603), "JPEG2000", tile_size=(64, 64), no_jp2=True), (126, 76)),
        (encoded(smooth(1001, 603), "JPEG", exif=ROTATED), (76, 126)),
    ],
)
def test_a_jpeg_above_the_limits_is_decoded_smaller_and_keeps_its_size_in_mind(
    content: bytes, size: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_image(content)
    assert full_size(whole) == whole.size and caplog.text == ""
    with caplog.at_level(logging.WARNING, "vlmdeploy"):
        picture = load_image(content, ImageLimits(megapixels=0.01))
    assert (picture.size, full_size(picture)) == (size, whole.size)
    [message] = caplog.messages
    assert f"picture of {len(content)} bytes: 1001 x 603 pixels" in message and "decoded at 126 x 76" in message
    difference = np.asarray(picture, np.float32) - np.asarray(whole.resize(size, Image.Resampling.BOX))
    assert np.abs(difference).mean() < 6


def test_a_narrow_jpeg_is_divided_no_further_than_pillow_does() -> None:
    content = encoded(smooth(3, 6000), "JPEG")
    assert load_image(content, ImageLimits(megapixels=0.01)).size == (2, 3000)
    with pytest.raises(DataError, match=r"3 x 6000 pixels .*, at most 0\.004 are read; .*--max-megapixels 1;"):
        load_image(content, ImageLimits(megapixels=0.004))


def several_scans(grey: bytes) -> bytes:
    """A JPEG of three components, each in a scan of its own, from a grey one."""
    start, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    frame = grey[start + 4 : start + 9] + b"\3" + b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    tables = grey[:start] + b"\xff\xc0\0\x11" + frame + grey[start + 13 : scan]
    scans = (b"\xff\xda\0\x08\1" + bytes([number]) + grey[scan + 6 : -2] for number in (1, 2, 3))
    return tables + b"".join(scans) + b"\xff\xd9"


@pytest.mark.parametrize("in_scans", [
    lambda: encoded(smooth(1000, 1000), "JPEG", progressive=True, subsampling=0),
    lambda: several_scans(encoded(smooth(1000, 1000, "L"), "JPEG")),
])  # fmt: skip
def test_coefficients_of_a_jpeg_in_several_scans_count_in_full(in_scans: Callable[[], bytes]) -> None:
    """They take 6 bytes for each pixel, however small the picture is decoded."""
    limits = ImageLimits(decoded_mb=22)
    assert load_image(encoded(smooth(1000, 1000), "JPEG", subsampling=0), limits).size == (1000, 1000)
    assert load_image(in_scans()).size == (1000, 1000)
    with pytest.raises(DataError, match=r"take 26\.8 MB to decode, at most 22 MB"):
        load_image(in_scans(), limits)


def test_a_tiff_tile_counts_in_full_however_small_the_picture() -> None:
    """A picture of one pixel in a tile of 30,000 x 30,000 took 900 MB."""
    tags = {256: 1, 257: 1, 258: 8, 259: 5, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 8, 325: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with pytest.raises(DataError, match=r"1 x 1 pixels take 916\.8 MB to decode"):
        load_image(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_tiles_and_code_blocks_of_jpeg_2000_count() -> None:
    """62,500 tiles of one pixel took 760 MB, code blocks of 4 x 4 pixels 77 bytes for each pixel."""
    tiles = encoded(smooth(100, 80), "JPEG2000", tile_size=(1, 1), num_resolutions=1)
    blocks = encoded(smooth(400, 300), "JPEG2000", codeblock_size=(4, 4))
    for content, told in ((tiles, r"11\d\.\d MB"), (blocks, r"3\d\.\d MB")):
        with pytest.raises(DataError, match=f"take {told} to decode"):
            load_image(content, ImageLimits(decoded_mb=30))


def test_jpeg_2000_headers_that_disagree_are_refused() -> None:
    """The outer header told a small size, the codestream a large one whose code blocks were made first."""
    content = bytearray(encoded(smooth(400, 300), "JPEG2000"))
    place = content.index(b"ihdr") + 4
    content[place : place + 8] = (30).to_bytes(4) + (40).to_bytes(4)
    with pytest.raises(DataError, match=r"its headers state 40 x 30 and 400 x 300 pixels"):
        load_image(bytes(content))


def test_boxes_of_a_picture_that_was_decoded_smaller_are_painted_in_their_place() -> None:
    """Boxes are in pixels of the picture's own size."""
    picture = load_image(encoded(Image.new("L", (800, 400)), "JPEG"), ImageLimits(megapixels=0.03))
    drawn = draw_boxes(picture, [Box((250, 250, 750, 750), (200.0, 100.0, 600.0, 300.0))])
    assert drawn.size == (200, 100) and drawn.getbbox() == (51, 26, 150, 75)


MEASURING = """
import io, sys
from pathlib import Path
from vlmdeploy.runtime.image import load_image
from vlmdeploy.runtime.image_limits import ImageLimits

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

path, tiny, megapixels = sys.argv[1:]
load_image(tiny)  # loads the codec
content = Path(path).read_bytes()
before = peak_bytes()
picture = load_image(content, ImageLimits(float(megapixels), 5000))
print(peak_bytes() - before)
"""
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg turned": ("RGB", "JPEG", {"exif": ROTATED}),
    "jpeg progressive": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "jpeg cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {"compress_level": 1}),
    "png clear": ("RGBA", "PNG", {"compress_level": 1}),
    "png 16 bit": ("I;16", "PNG", {"compress_level": 1}),
    "gif": ("L", "GIF", {"transparency": 3, "disposal": 2}),
    "bmp": ("RGB", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff in one strip": ("RGB", "TIFF", {"compression": "packbits", "strip_size": 10**9}),
    "tiff turned": ("RGB", "TIFF", {"exif": ROTATED}),
    "ppm": ("RGB", "PPM", {}),
    "webp": ("RGB", "WEBP", {"method": 0}),
    "webp clear": ("RGBA", "WEBP", {"method": 0, "lossless": True, "quality": 0}),
    "avif": ("RGB", "AVIF", {"speed": 10}),
    "jpeg2000": ("L", "JPEG2000", {"quality_layers": [100], "num_resolutions": 2}),
}  # fmt: skip
SLACK_BYTES = 4_000_000  # what an allocator keeps


def measured_bytes(folder: Path, name: str, content: bytes, tiny: bytes, megapixels: float) -> int:
    """How much a process of its own grows while it reads a picture."""
    paths = folder / f"{name}.png", folder / "tiny"
    for path, data in zip(paths, (content, tiny), strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", MEASURING, *map(str, paths), str(megapixels)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_decoding_takes_no_more_memory_than_it_is_said_to(name: str, tmp_path: Path) -> None:
    mode, file_format, options = CASES[name]
    content, tiny = (encoded(smooth(*size, mode), file_format, **options) for size in ((5000, 4000), (16, 16)))
    image = open_picture(content)
    assert image is not None
    cost = decoding_cost(image, content, copies=image.mode != "RGB" or "exif" in image.info)
    for megapixels in (100, 6) if name in ("jpeg", "jpeg2000") else (100,):
        factor = cost.factor(image.size, ImageLimits(megapixels, 5000))
        assert factor is not None
        said = cost.peak_bytes((5000 // factor, 4000 // factor))
        measured = measured_bytes(tmp_path, name, content, tiny, megapixels)
        assert 0.4 * said < measured < said + SLACK_BYTES
