"""Contract: which pictures are read and which are refused. Reference: the resize and the normalization against the
golden vectors of the models' own preprocessing."""

import base64
import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.golden_cases import GOLDEN, GoldenCase, golden_cases
from vlmdeploy.errors import DataError
from vlmdeploy.families.cogvlm import CLIP_MEAN, CLIP_STD
from vlmdeploy.manifest import ImageRecipe
from vlmdeploy.runtime.image import load_image, preprocess, resize_rgb

IMAGES = GOLDEN / "cogvlm-images"
MANIFEST: dict[str, Any] = json.loads((IMAGES / "expected" / "manifest.json").read_text())["images"]
SIZES = [(name, int(size)) for name, entry in MANIFEST.items() for size in entry["resized"]]
PRINTED_DIGITS = 6  # of the statistics in the manifest
FLOAT32_STEP = 5e-6  # of a normalized value near 2, with the rounding of mean and division
RED, WHITE = (255, 0, 0), (255, 255, 255)


def recipe(size_px: int) -> ImageRecipe:
    return ImageRecipe(size_px, CLIP_MEAN, CLIP_STD)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


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


def claiming_size(width: int, height: int) -> bytes:
    """A BMP header of that size without pixels: only a reader that looks at the header first can refuse it quickly."""
    picture = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    picture[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(picture)


def test_more_than_200_megapixels_are_refused_from_the_header() -> None:
    with pytest.raises(DataError, match=r"20000 x 10001 pixels \(200 megapixels\), at most 200"):
        load_image(claiming_size(20_000, 10_001))


def test_up_to_200_megapixels_pillows_own_limit_is_lifted_and_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    with pytest.raises(DataError, match="truncated"):  # the size passed; the pixels are not there
        load_image(claiming_size(20_000, 10_000))
    assert [Image.MAX_IMAGE_PIXELS] == [12345]


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
        ("a" * 5000, "cannot be opened"),
        ("nul\0byte", "cannot be opened"),
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


@pytest.mark.parametrize("seed", range(40))
def test_damaged_pictures_raise_nothing_but_our_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    file_format = ("PNG", "JPEG", "GIF", "WEBP", "TIFF")[seed % 5]
    content = bytearray(encoded(Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)), file_format))
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    try:
        assert load_image(bytes(content)).mode == "RGB"  # a format without checksums may not notice
    except DataError as error:
        assert str(error).startswith("picture of")
