"""Contract: which pictures are read and which are refused. Reference: the resize and the normalization against the
golden vectors of the models' own preprocessing."""

import base64
import hashlib
import io
import json
import logging
import os
import socket
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from PIL import Image, ImagePalette, PngImagePlugin

from tests.golden_cases import GOLDEN, GoldenCase, golden_cases
from tests.reference.safetensors import read_tensors
from vlmdeploy.errors import DataError
from vlmdeploy.families.cogvlm import CLIP_MEAN, CLIP_STD
from vlmdeploy.manifest import ImageRecipe
from vlmdeploy.runtime.image import load_image, preprocess, resize_rgb
from vlmdeploy.runtime.image_limits import ImageLimits

IMAGES, LLAVA = GOLDEN / "cogvlm-images", GOLDEN / "llava_1_5-tiny"
MANIFEST: dict[str, Any] = json.loads((IMAGES / "expected" / "manifest.json").read_text())["images"]
SIZES = [(name, int(size)) for name, entry in MANIFEST.items() for size in entry["resized"]]
PRINTED_DIGITS = 6  # of the statistics in the manifest
FLOAT32_STEP = 5e-6  # of a normalized value near 2, with the rounding of mean and division
RED, WHITE = (255, 0, 0), (255, 255, 255)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


def recipe(size_px: int) -> ImageRecipe:
    return ImageRecipe(size_px, CLIP_MEAN, CLIP_STD)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("resize", ["pad", "crop"])
def test_padding_and_cropping_equal_the_golden_vectors(resize: Literal["pad", "crop"]) -> None:
    expected = read_tensors(LLAVA / "inputs.safetensors")[f"pixel_values_{resize}"]
    own = replace(recipe(expected.shape[-1]), resize=resize)
    for name, values in zip(("a.png", "b.png"), expected, strict=True):
        pixels = preprocess(load_image(LLAVA / "images" / name), own)
        np.testing.assert_allclose(pixels, values, rtol=0, atol=FLOAT32_STEP)


@pytest.mark.parametrize("size", [(500, 40), (40, 500), (333, 37), (64, 8), (1, 9)])
def test_very_long_pictures_are_padded_and_cropped_in_little_memory(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", size, RED)
    image.paste(WHITE, (0, 0, size[0] // 2, size[1]))
    for resize, most in (("pad", 12), ("crop", 3)):
        own = replace(recipe(64), resize=cast(Literal["pad", "crop"], resize))
        expected = resize_rgb(image, own).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr("vlmdeploy.runtime.image.MOST_SQUARE_PIXELS", 1)
            found = resize_rgb(image, own)
        assert np.abs(found - expected).mean() < most, resize


@pytest.mark.parametrize("size", [(1 << 20, 1), (1, 1 << 20)])
@pytest.mark.parametrize("resize", ["pad", "crop"])
def test_the_longest_pictures_take_no_square_of_memory(size: tuple[int, int], resize: Literal["pad", "crop"]) -> None:
    square = resize_rgb(Image.new("RGB", size, RED), replace(recipe(16), resize=resize))
    assert square.shape == (16, 16, 3) and (square[7, 7] == RED).all()


def noise(width: int = 30, height: int = 20, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def animation(**options: Any) -> bytes:
    frames = [noise(seed=seed).quantize(16) for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], **options)


def test_golden_pictures_decode_to_the_same_bytes() -> None:
    for name, entry in MANIFEST.items():
        image = load_image(IMAGES / f"{name}.png")
        assert list(image.size) == entry["size_wh"]
        assert hashlib.sha256(image.tobytes()).hexdigest() == entry["rgb_sha256"]


@pytest.mark.parametrize(("name", "size_px"), SIZES)
def test_resize_and_normalization_equal_the_golden_vectors(name: str, size_px: int) -> None:
    expected = MANIFEST[name]["resized"][str(size_px)]
    image = load_image(IMAGES / f"{name}.png")
    square, pixels = resize_rgb(image, recipe(size_px)), preprocess(image, recipe(size_px))
    assert hashlib.sha256(square.tobytes()).hexdigest() == expected["rgb_sha256"]
    last = size_px - 1
    samples = [
        square[y, x].tolist() for y, x in ((0, 0), (0, last), (last, 0), (last, last), (size_px // 2, size_px // 3))
    ]
    assert samples == expected["corner_rgb"]
    tolerance = 10.0**-PRINTED_DIGITS
    np.testing.assert_allclose(square.mean((0, 1), dtype=np.float64), expected["rgb_mean"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(pixels.mean((1, 2), dtype=np.float64), expected["norm_mean"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(pixels.std((1, 2), dtype=np.float64), expected["norm_std"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", sorted((IMAGES / "expected").glob("*.png")), ids=lambda path: path.stem)
def test_resized_pixels_equal_the_golden_pictures(path: Path) -> None:
    name, _, size_px = path.stem.rpartition("_")
    with Image.open(path) as expected:
        np.testing.assert_array_equal(resize_rgb(load_image(IMAGES / f"{name}.png"), recipe(int(size_px))), expected)


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_pixel_values_equal_the_golden_model_inputs(case: GoldenCase) -> None:
    expected = case.inputs()["pixel_values"][0]
    source = IMAGES / json.loads((case.folder / "case.json").read_text())["image"]
    pixels = preprocess(load_image(source), recipe(expected.shape[-1]))
    assert pixels.dtype == np.float32 and pixels.shape == expected.shape
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=FLOAT32_STEP)


def test_path_bytes_data_url_and_pillow_image_give_the_same_picture() -> None:
    path = IMAGES / "scene_a.png"
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    with Image.open(path) as image:
        pictures = [load_image(source) for source in (path, str(path), path.read_bytes(), url, image)]
    assert {(picture.mode, picture.tobytes()) for picture in pictures} == {("RGB", pictures[0].tobytes())}


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA", "PA", "I;16", "I"])
@pytest.mark.parametrize("value", [0, 255])
def test_every_mode_becomes_rgb_with_black_black_and_white_white(mode: str, value: int) -> None:
    picture = Image.new("RGB", (4, 3), (value, value, value)).convert("L")
    if mode.startswith("I"):
        picture = Image.fromarray(np.full((3, 4), value * 257, np.uint16 if mode == "I;16" else np.int32))
    elif mode != "L":
        picture = (
            picture.convert("RGB").convert("P").convert(mode) if mode == "PA" else picture.convert("RGB").convert(mode)
        )
    assert picture.mode == mode
    rgb = load_image(picture)
    assert rgb.mode == "RGB" and rgb.getextrema() == ((value, value),) * 3


def test_16_bit_png_is_scaled_and_rounded() -> None:
    values = np.array([[0, 128, 129, 257 * 100, 65406, 65535]], np.uint16)
    rgb = np.asarray(load_image(encoded(Image.fromarray(values))))
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 100, 254, 255]


def test_cmyk_jpeg_keeps_its_colour() -> None:
    red = load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    np.testing.assert_allclose(np.asarray(red)[8, 8], RED, atol=3)


def test_alpha_is_put_over_white_and_not_dropped() -> None:
    clear_red = Image.new("RGBA", (2, 1), (*RED, 0))
    clear_red.putpixel((1, 0), (*RED, 51))
    picture = load_image(encoded(clear_red))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (255, 204, 204)]


def test_palette_transparency_is_put_over_white() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([*RED, 0, 0, 255])
    assert load_image(encoded(palette, transparency=0)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_sets_the_picture_upright(orientation: int) -> None:
    upright = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_image(encoded(stored, exif=exif)).tobytes() == upright.tobytes()


def test_a_broken_exif_block_does_not_refuse_the_picture() -> None:
    picture = encoded(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0no tiff header here")
    assert load_image(picture).size == (8, 8)


def test_first_frame_of_an_animation_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    with caplog.at_level(logging.WARNING, "vlmdeploy"):
        picture = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert picture.getpixel((0, 0)) == RED
    assert "only the first one" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 2)])
def test_tiny_and_very_long_pictures_are_answered(size: tuple[int, int]) -> None:
    pixels = preprocess(load_image(encoded(Image.new("RGB", size, WHITE))), recipe(56))
    white = (1 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(pixels, np.broadcast_to(white[:, None, None], (3, 56, 56)), atol=FLOAT32_STEP)


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    picture = (IMAGES / "scene_a.png").read_bytes()
    contents = {"text.png": b"hello", "empty.png": b"", "truncated.png": picture[:2000], "head.png": picture[:20]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    expectations = {
        "text.png": "not a picture or damaged, it starts with b'hello'",
        "empty.png": r"empty \(0 bytes\)",
        "truncated.png": "damaged or truncated",
        "head.png": "cannot be opened",
        "missing.png": "no such file",
        "folder": "is a folder",
    }
    for name, expected in expectations.items():
        with pytest.raises(DataError, match=f"{name}: .*{expected}") as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_long_path_is_named_to_its_end(tmp_path: Path) -> None:
    """The name was cut after 200 characters, so the file's own name was missing where folders are deep."""
    path = tmp_path / ("folder" * 20) / ("folder" * 20) / "gone.png"
    with pytest.raises(DataError, match=f"^{path}: no such file"):
        load_image(path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("http://example.com/a.png", "not fetched from the network"),
        ("HTTPS://example.com/a.png", "not fetched from the network"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png,abc", "expected data:image/"),
        ("data:text/plain;base64,aGVsbG8=", "expected data:image/"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("a" * 5000, "cannot be read"),
        ("nul\0byte", "cannot be read"),
        (b"", "empty"),
        (Image.new("F", (2, 2)), "floats"),
        (Image.new("RGB", (0, 2)), "expected at least 1 x 1"),
        (7, "picture is a int"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Image.Image) else str(value)[:40],
)
def test_bad_sources_are_refused(source: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_image(source)


def test_a_file_that_is_no_regular_one_is_refused_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIFO in place of a picture was opened, which waited for someone to write to it."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("door.png")
        kinds = {"pipe.png": "a FIFO or pipe", "door.png": "a socket", "/dev/zero": "a device"}
        for name, kind in kinds.items():
            with pytest.raises(DataError, match=f"^{name}: is {kind}, expected a picture: JPEG"):
                load_image(name)


def test_a_file_without_an_end_is_refused() -> None:
    """Files of /proc were read for as long as they gave something."""
    with pytest.raises(DataError, match=r"pagemap: has 1\.0 MB, at most 1\.0 MB are read"):
        load_image("/proc/self/pagemap", ImageLimits(file_mb=1))


def test_a_file_that_gives_nothing_for_now_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/kmsg after its last line, opened so as not to wait, gave None, which was a TypeError."""

    class Waiting(io.FileIO):
        def read(self, size: int | None = -1, /) -> Any:
            return None

    (tmp_path / "a.png").touch()
    monkeypatch.setattr("vlmdeploy.input_files.open_input", lambda *_: Waiting(tmp_path / "a.png"))
    with pytest.raises(DataError, match=r"a\.png: empty \(0 bytes\)"):
        load_image(tmp_path / "a.png")


def test_a_path_given_as_bytes_inside_an_object_is_read() -> None:
    """An object whose __fspath__ returns bytes, as os.scandir's entries of bytes do, was a TypeError."""
    with os.scandir(os.fsencode(IMAGES)) as entries:
        entry = next(entry for entry in entries if entry.name == b"scene_a.png")
    assert load_image(entry).tobytes() == load_image(IMAGES / "scene_a.png").tobytes()  # type: ignore[arg-type]


class InATable:
    """A StoredImage."""

    def __str__(self) -> str:
        return "row 7"

    def read_bytes(self) -> bytes:
        return bytes(1001)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (bytes(1001), "picture of 1001 bytes: has 1,001 bytes"),
        (InATable(), "row 7: has 1,001 bytes"),
        ("data:image/png;base64," + "@" * 4000, "picture in a data URL: has 3,015 bytes"),  # not base64: never decoded
    ],
)
def test_what_is_larger_than_a_picture_file_may_be_is_not_decoded(source: Any, found: str) -> None:
    """Files, bytes and data URLs of any size were taken whole."""
    with pytest.raises(DataError, match=f"{found}, at most 1,000 bytes are read"):
        load_image(source, ImageLimits(file_mb=0.001))


def straightforward(image: Image.Image, orientation: int) -> Image.Image:
    """The upright RGB picture by whole-image steps."""
    if image.mode == "I;16":
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image, turn = image.convert("RGB"), Image.Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
             6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_many_bands_equal_those_converted_as_a_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion in bands of rows, each put in its place in the turned picture."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image = noise(601, 907)
    image.putalpha(noise(601, 907, seed=1).getchannel(0))
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (907, 601), np.uint16))
    elif mode in ("P", "PA"):
        image = image.quantize(64).convert(mode)
    else:
        image = image.convert(mode)
    for orientation in range(1, 9):
        image.getexif()[0x0112] = orientation
        assert load_image(image).tobytes() == straightforward(image, orientation).tobytes()


def test_a_key_colour_is_clear_in_every_band() -> None:
    image = Image.fromarray(np.asarray(noise(601, 907)) // 128 * 128)
    key: Any = image.getpixel((0, 0))
    content = encoded(image, transparency=key, compress_level=1)
    with Image.open(io.BytesIO(content)) as opened:
        assert load_image(content).tobytes() == straightforward(opened, 1).tobytes() != image.tobytes()


def test_a_palette_that_was_replaced_is_used() -> None:
    """As Pillow does when an object's pixels are needed."""
    image = Image.new("P", (2, 1), 1)
    image.palette = ImagePalette.ImagePalette("RGB", [0, 0, 0, *RED])
    image.palette.dirty = 1
    assert load_image(image).getpixel((0, 0)) == RED


def test_a_picture_object_is_copied() -> None:
    image = noise()
    load_image(image).putpixel((0, 0), RED)
    assert image.tobytes() == noise().tobytes()


@pytest.mark.parametrize("file_format", FORMATS)
def test_pillows_own_limit_does_not_matter(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's limit was lifted for all threads while a picture was decoded."""
    contents = [encoded(noise(), file_format)]
    if file_format == "GIF":
        contents = [animation(disposal=2), contents[0][:6] + bytes([1, 0, 1, 0]) + contents[0][10:]]  # canvas of 1 x 1
    if file_format == "TIFF":
        contents.append(encoded(noise(), "TIFF", compression="tiff_lzw"))
    objects: list[Any] = [Image.open(io.BytesIO(content)) for content in contents]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert [load_image(source).size for source in (*contents, *objects)] == [(30, 20)] * 2 * len(contents)
    assert [Image.MAX_IMAGE_PIXELS] == [10]


def test_a_picture_is_decoded_while_another_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock was held while a picture was decoded: a second thread waited for it."""
    begun, goes_on, limits = threading.Event(), threading.Event(), []
    whole = PngImagePlugin.PngImageFile.load_prepare

    def blocked(image: PngImagePlugin.PngImageFile) -> None:
        begun.set()
        assert goes_on.wait(60)
        whole(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", blocked)
    before = Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(2) as threads:
        try:
            first = threads.submit(load_image, encoded(noise()))
            assert begun.wait(60)
            limits.append(Image.MAX_IMAGE_PIXELS)
            assert threads.submit(load_image, encoded(noise(), "JPEG")).result(60).size == (30, 20)
            assert not first.done() and limits == [before]
        finally:
            goes_on.set()
        assert first.result(60).size == (30, 20)


def picture_or_error(content: bytes) -> Image.Image | None:
    """None: refused in one line."""
    try:
        return load_image(content)
    except DataError as error:
        assert str(error).startswith("picture of") and "\n" not in str(error)
        return None


@pytest.mark.parametrize("content", [animation(), animation(disposal=2, transparency=3), encoded(noise(), "GIF")])
def test_a_gif_cut_anywhere_is_a_picture_or_one_line(content: bytes) -> None:
    """Where the second frame's header was cut, IndexError and struct.error came out."""
    whole = load_image(content)
    cut = [picture_or_error(content[:length]) for length in range(len(content))]
    first = next(length for length, picture in enumerate(cut) if picture is not None)
    assert {picture and picture.tobytes() for picture in cut[first:]} == {whole.tobytes()}


def gif(width: int, height: int, rest: bytes) -> bytes:
    """A GIF of two colours: its canvas and what follows."""
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes([0x80, 0, 0]) + bytes(6) + rest


FRAME = b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"  # one pixel
DISPOSED = b"!\xf9\4\x08\0\0\0\0"  # of what follows, the first frame is put back to the background


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gif(4, 4, b";"), r"cannot be opened"),  # no frame
        (gif(65535, 65535, DISPOSED + FRAME), r"65535 x 65535 pixels \(4295 megapixels\), at most 100"),
        (gif(9990, 9990, FRAME), "9990 x 9990 pixels take 516.4 MB to decode, at most 512 MB"),
        (gif(1, 1, DISPOSED + b",\0\0\0\0" + b"\xff" * 4 + FRAME[9:]), "65535 x 65535 pixels"),
    ],
)
def test_a_gif_of_no_frame_or_of_a_huge_canvas_is_refused(content: bytes, told: str) -> None:
    """The background of a disposed frame, 4 GB, was made while the header was read."""
    with pytest.raises(DataError, match=told):
        load_image(content)


@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_pictures_raise_nothing_but_our_error_and_print_nothing(
    file_format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """libtiff printed to stderr."""
    random = np.random.default_rng(0)
    for number in range(30):
        options = {"compression": "tiff_lzw" if number % 2 else "tiff_adobe_deflate"} if file_format == "TIFF" else {}
        content = bytearray(encoded(noise(), file_format, **options))
        for _ in range(random.integers(1, 4)):
            content[random.integers(len(content))] ^= 1 << random.integers(8)
        picture_or_error(bytes(content))  # a format without checksums may not notice
        picture_or_error(bytes(content[: random.integers(len(content))]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [1, 2, 0xFFFF])
def test_warnings_of_pillow_do_not_come_out(count: int) -> None:
    """Pillow warns about an EXIF orientation of several numbers, which raised where warnings are errors."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHHI", 0x0112, 3, count, 6, 6, 0)
    before = list(warnings.filters)
    assert load_image(encoded(noise(), "JPEG", exif=exif)).size in ((30, 20), (20, 30))
    assert list(warnings.filters) == before


def test_reading_a_picture_does_not_repeat_other_peoples_warnings() -> None:
    """Python shows a warning once for each place in the code, and forgets about it when a filter is added."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            warnings.warn("shown once", DeprecationWarning, stacklevel=1)
            load_image(encoded(noise()))
    assert len(shown) == 1


def test_a_picture_object_that_fails_when_its_pixels_are_needed_is_one_line() -> None:
    opened = Image.open(io.BytesIO(encoded(noise())[:-100]))
    with pytest.raises(DataError, match=r"^the image object: damaged or truncated"):
        load_image(opened)


def tiff_of_one_pixel(num_strips: int, samples: int = 1) -> bytes:
    """Grey, each of its strips in the same place."""
    tags = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 122), (277, samples), (278, 1), (279, 1)]
    entries = (struct.pack("<HHII", tag, 4, num_strips if tag == 273 else 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0\x09\0" + b"".join(entries) + bytes(4) + struct.pack("<I", 8) * num_strips


def test_what_pillow_logs_about_damage_does_not_come_out(caplog: pytest.LogCaptureFixture) -> None:
    """Pillow logs an error about a TIFF of too many samples, which Python prints if nobody has set up logging."""
    with pytest.raises(DataError, match="cannot be opened"):
        load_image(tiff_of_one_pixel(1, samples=1000))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (tiff_of_one_pixel(300_000), "its tag 273 holds 300,000 numbers"),
        (encoded(noise(), "JPEG")[:2] + b"\xff\xe1\0\x08Exif\0\0" * 65 + encoded(noise(), "JPEG")[2:], "EXIF blocks"),
        (b"P6 #" + b"a" * 2_000_000 + b"\n1 1 255 aaa", "too many small pieces"),
    ],
    ids=["strips", "EXIF blocks", "a comment"],
)
def test_headers_that_would_take_minutes_or_gigabytes_are_refused(content: bytes, told: str) -> None:
    """320 MB of strip offsets became 25 GB, of EXIF blocks minutes of copying, of junk minutes of reading."""
    with pytest.raises(DataError, match=f"cannot be opened .*{told}"):
        load_image(content)
    assert load_image(tiff_of_one_pixel(2)).size == (1, 1)


def test_an_exif_block_of_many_megabytes_is_passed_over_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    block = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHHI", 0x0112, 3, 1, 6, 0, 0) + bytes(2**23)
    assert load_image(encoded(noise(), "PNG", exif=block)).size == (30, 20)
    assert "its EXIF block cannot be read (it has 8.4 MB)" in caplog.text
