"""Contract: boxes in text are written, found and drawn as the grounding models' authors do."""

import re

import numpy as np
import pytest
from PIL import Image

from vlmdeploy.runtime.boxes import Box, Corners, draw_boxes, format_box, normalize_box, parse_boxes


def test_a_box_is_written_with_three_digits_each() -> None:
    assert format_box((86, 540, 400, 0)) == "[[086,540,400,000]]"


def test_parsed_boxes_are_in_pixels_of_the_original_picture() -> None:
    (box,) = parse_boxes("a cat [[086,540,400,760]] sleeps", width_px=500, height_px=200)
    assert box.norm == (86, 540, 400, 760)
    assert box.pixels == pytest.approx((43.0, 108.0, 200.0, 152.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", []),
        ("", []),
        ("[[001,002,003,004;005,006,007,008]] and [[9,10,11,12]]", [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]),
        ("[[ 001 , 002,003,004 ]]", [(1, 2, 3, 4)]),
        ("[[001,002,003]] [[x0,y0,x1,y1]] [[1,2,3,4,5]] [[1.5,2,3,4]] [[-1,2,3,4]] [[1,2,3,1000]]", []),
        ("[[a,b,c,d;001,002,003,004;]]", [(1, 2, 3, 4)]),
        ("[[001,002,003,004]", []),
        ("[[]] [[001,002,003,004]]", []),  # upstream's pattern starts at the first brackets
        ("[001,002,003,004]", []),
    ],
)
def test_only_parts_of_four_numbers_are_boxes(text: str, expected: list[Corners]) -> None:
    assert [box.norm for box in parse_boxes(text, 1000, 1000)] == expected


def test_boxes_stand_where_the_authors_pattern_finds_them() -> None:
    pieces = ["[[", "]]", "[", "]", "001,002,003,004", ";", "\n", " "]
    generator = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(generator.choice(pieces, generator.integers(1, 12)))
        parts = [part for inside in re.findall(r"\[\[(.+?)\]\]", text) for part in inside.split(";")]
        assert len(parse_boxes(text, 10, 10)) == sum(part.strip(" ") == "001,002,003,004" for part in parts), text


def test_an_answer_full_of_brackets_is_read_at_once() -> None:
    """A pattern took 20 minutes for a megabyte."""
    assert parse_boxes("[[" * 500_000, 10, 10) == ()


def test_writing_and_reading_a_box_give_it_back() -> None:
    for norm in [(0, 0, 999, 999), (29, 57, 58, 113), (1, 2, 3, 4)]:
        (box,) = parse_boxes(format_box(norm), width_px=333, height_px=77)
        assert normalize_box(box.pixels, 333, 77) == box.norm == norm


def test_a_box_at_or_beyond_the_border_stays_in_range() -> None:
    assert normalize_box((-5, 0, 640, 481), width_px=640, height_px=480) == (0, 0, 999, 999)


@pytest.mark.parametrize("background", ["black", "white", "yellow", "gray"])
def test_an_outline_shows_on_any_background(background: str) -> None:
    image = Image.new("RGB", (300, 200), background)
    (box,) = parse_boxes("[[100,100,500,500]]", *image.size)
    drawn = np.asarray(draw_boxes(image, [box])).astype(int)
    difference = np.abs(drawn - np.asarray(image)).sum(-1)
    column_of_the_left_side = difference[60, 30:40]
    assert column_of_the_left_side.max() > 200
    assert difference[60, 100] == 0 and difference[5, 5] == 0, "only the outline is painted"


def test_drawing_leaves_the_picture_itself_alone() -> None:
    image = Image.new("RGB", (20, 20))
    draw_boxes(image, parse_boxes("[[000,000,999,999]]", 20, 20))
    assert image.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (4000, 3)])
def test_turned_empty_and_outside_boxes_can_be_drawn_on_any_picture(size: tuple[int, int]) -> None:
    turned = Box((900, 900, 100, 100), (0.9 * size[0], 0.9 * size[1], 0.1 * size[0], 0.1 * size[1]))
    outside = Box((0, 0, 0, 0), (1e6, 1e6, 2e6, 2e6))
    empty = Box((0, 0, 0, 0), (0.0, 0.0, 0.0, 0.0))
    assert draw_boxes(Image.new("L", size), [turned, outside, empty]).size == size
