"""Reference tests: the layout rules against tests/reference/layout.py, which goes token by token."""

from dataclasses import replace

import numpy as np
import pytest

from tests.reference import layout as reference
from vlmdeploy.errors import PromptError
from vlmdeploy.layout import Segment, images_in, lay_out, position_ids, prompt_of, segments_of, vision_expert_mask
from vlmdeploy.manifest import TokenRules

RULES = TokenRules(bos_id=1, pad_id=0, placeholder_id=0, stop_ids=(2,), rows_per_image=4, max_images=1)
NO_EXPERT = TokenRules(1, 0, 0, (2,), 4, 1, vision_rows="none")


def random_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Types with image runs anywhere, and masks with holes; masked tokens have type 0, as everywhere in vlmdeploy."""
    random = np.random.default_rng(seed)
    shape = (int(random.integers(1, 4)), int(random.integers(1, 16)))
    mask = (random.random(shape) < random.choice([0.5, 0.9, 1.0])).astype(np.int64)
    runs = np.repeat(random.random((shape[0], 16)) < 0.5, int(random.integers(1, 5)), axis=1)[:, : shape[1]]
    return runs.astype(np.int64) * mask, mask


@pytest.mark.parametrize("seed", range(200))
def test_positions_equal_the_reference_on_random_rows(seed: int) -> None:
    types, mask = random_batch(seed)
    expected = [reference.position_ids(*row) for row in zip(types.tolist(), mask.tolist(), strict=True)]
    assert position_ids(types, mask, RULES).tolist() == expected


@pytest.mark.parametrize("seed", range(200))
def test_expert_mask_equals_the_reference_on_random_rows(seed: int) -> None:
    types, _ = random_batch(seed)
    assert vision_expert_mask(types, RULES).tolist() == [reference.vision_expert_mask(row) for row in types.tolist()]


def test_patches_share_one_position_and_the_markers_have_their_own() -> None:
    types = np.array([[0, 1, 1, 1, 1, 1, 0, 0]])
    assert position_ids(types, np.ones_like(types), RULES).tolist() == [[0, 1, 2, 2, 2, 3, 4, 5]]


def test_last_row_of_an_image_uses_the_language_expert() -> None:
    types = np.array([[0, 1, 1, 1, 1, 0, 0]])
    assert vision_expert_mask(types, RULES).tolist() == [[False, True, True, True, False, False, False]]


def test_no_position_uses_a_vision_expert_that_the_model_lacks() -> None:
    assert not vision_expert_mask(np.ones((2, 5), np.int64), NO_EXPERT).any()


def test_image_rows_are_the_places_after_bos() -> None:
    layout = lay_out(np.array([1, 0, 0, 0, 0, 7, 0]), RULES, num_images=1)
    assert layout.types.tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert layout.positions.tolist() == [0, 1, 2, 2, 3, 4, 5]
    assert layout.vision_mask.tolist() == [False, True, True, True, False, False, False]


def test_placeholders_are_text_without_an_image() -> None:
    layout = lay_out(np.array([1, 0, 0, 0, 0, 7]), RULES, num_images=0)
    assert not layout.types.any() and layout.positions.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_prompt_holds_a_place_for_every_image_row(num_images: int) -> None:
    ids = prompt_of([7, 0, 9], RULES, num_images)
    assert ids.tolist() == [1, *[0] * 4 * num_images, 7, 0, 9]
    assert lay_out(ids, RULES, num_images).types.sum() == 4 * num_images


ANYWHERE = replace(RULES, placeholder_id=9, max_images=0, image_place="anywhere", positions="index", vision_rows="none")


@pytest.mark.parametrize(
    ("ids", "types"),
    [
        ([1, 5, 9, 9, 9, 9, 6], [0, 0, 1, 1, 1, 1, 0]),
        ([9, 9, 9, 9, 1, 9, 9, 9, 9], [1, 1, 1, 1, 0, 1, 1, 1, 1]),
        ([1, *[9] * 8], [0, *[1] * 8]),  # two images side by side
        ([1, 0, 0, 0, 0], [0] * 5),
    ],
)
def test_images_stand_anywhere_and_positions_count_every_token(ids: list[int], types: list[int]) -> None:
    array, num_images = np.array(ids), sum(types) // 4
    assert images_in(array, ANYWHERE) == num_images
    layout = lay_out(array, ANYWHERE, num_images)
    assert layout.types.tolist() == types and not layout.vision_mask.any()
    assert layout.positions.tolist() == list(range(len(ids)))
    with pytest.raises(PromptError, match=f"{num_images + 1} images were given, but the ids hold placeholders"):
        lay_out(array, ANYWHERE, num_images + 1)


def test_a_part_of_an_image_is_an_error() -> None:
    with pytest.raises(PromptError, match="placeholder 9 3 times in a row, expected 4 times for each image"):
        lay_out(np.array([1, 9, 9, 9, 9, 2, 9, 9, 9]), ANYWHERE, 2)


def test_positions_begin_behind_the_padding() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(np.zeros_like(mask), mask, ANYWHERE).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_more_images_than_a_prompt_takes() -> None:
    with pytest.raises(PromptError, match="2 images were given, this model takes 1"):
        lay_out(prompt_of([7], RULES, 2), RULES, num_images=2)


@pytest.mark.parametrize("ids", [[1, 0, 0, 0, 7, 0], [1, 0, 0, 0], [1], [0, 0, 0, 9, 0]])
def test_wrong_number_of_placeholders_is_an_error(ids: list[int]) -> None:
    with pytest.raises(PromptError, match=r"ids\[1:5\] must be 4 times the placeholder 0, found it"):
        lay_out(np.array(ids), RULES, num_images=1)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("seed", range(20))
def test_segments_cover_the_prompt_once_with_one_expert_each(seed: int, chunk_rows: int) -> None:
    mask = vision_expert_mask(random_batch(seed)[0], RULES)[0]
    segments = segments_of(mask, chunk_rows)
    assert [place for segment in segments for place in range(segment.start, segment.stop)] == list(range(len(mask)))
    assert all(0 < segment.stop - segment.start <= chunk_rows for segment in segments)
    assert all((mask[segment.start : segment.stop] == (segment.expert == "vision")).all() for segment in segments)


def test_image_prompt_has_three_segments_and_long_ones_are_cut() -> None:
    mask = np.array([False, True, True, True, False, False])
    language, vision = Segment("language", 0, 1), Segment("vision", 1, 4)
    assert segments_of(mask, 100) == (language, vision, Segment("language", 4, 6))
    assert segments_of(mask, 2)[1:3] == (Segment("vision", 1, 3), Segment("vision", 3, 4))
