"""Contract tests of the grid of a sweep: which points a file means, what they are called, and what is refused."""

from pathlib import Path
from typing import get_args

import pytest

from vlmdeploy.calib.statistics import HessianKind
from vlmdeploy.errors import ConfigError
from vlmdeploy.sweep.grid import ALGORITHMS, ALLOWED, Point, read_grid


def grid(tmp_path: Path, text: str) -> list[Point]:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return read_grid(path)


def names(tmp_path: Path, text: str) -> list[str]:
    return [point.name for point in grid(tmp_path, text)]


def test_lists_are_combined_in_the_order_of_the_file(tmp_path: Path) -> None:
    points = grid(tmp_path, 'algorithm = ["routed", "rtn"]\nbits = [4, 3]\nvision = ["int8"]')
    assert [(point.algorithm, point.bits, point.vision) for point in points] == [
        ("routed", 4, "int8"), ("routed", 3, "int8"), ("rtn", 4, "int8"), ("rtn", 3, "int8"),
    ]  # fmt: skip
    assert points[0].name == "routed_int4_vit-int8"


def test_a_value_counts_as_a_list_of_one(tmp_path: Path) -> None:
    assert grid(tmp_path, "bits = 3") == grid(tmp_path, "bits = [3, 3]") == [Point("routed_int3", bits=3)]


def test_a_single_point_takes_defaults_and_not_the_grid(tmp_path: Path) -> None:
    points = grid(tmp_path, 'bits = [3]\ngroup = 32\n[[point]]\nname = "mine"\nalgorithm = "rtn"')
    assert points == [Point("routed_int3_g32", bits=3, group=32), Point("mine", algorithm="rtn")]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('algorithm = "rtn"\ngroup = -1', "rtn_int4_gwhole"),
        ('quality = "high"', "routed_int4_high"),
        ('algorithm = "text-only"\ntarget = "trt-int4"\nkv = "fp16"', "text-only_int4_trt-int4_kv-fp16"),
        ('target = "ort-int8"\nbits = 4', "routed_int8_ort-int8"),
        ('target = "ort-fp16"', "ort-fp16"),
        ('target = "ort-fp32"\nvision = "int8"\ngroup = 32', "ort-fp32_g32_vit-int8"),
        ('lm_head = "fp16"\nembedding = "int8"\nconnector = "fp32"\nprovider = "cuda"\nalgorithm = "pooled"',
         "pooled_int4_connector-fp32_head-fp16_embedding-int8_cuda"),
    ],
)  # fmt: skip
def test_names_tell_what_the_file_says(tmp_path: Path, text: str, name: str) -> None:
    assert names(tmp_path, text) == [name]


def test_settings_that_mean_nothing_do_not_make_another_point(tmp_path: Path) -> None:
    """Floats have no bits, rounding no quality, int8 targets one width."""
    assert names(tmp_path, 'target = ["ort-fp32"]\nbits = [3, 4]\ngroup = [32, 128]') == ["ort-fp32"]
    assert names(tmp_path, 'algorithm = "rtn"\nquality = ["default", "high"]') == ["rtn_int4"]
    assert names(tmp_path, 'target = "ort-int8"\nbits = [3, 4]') == ["routed_int8_ort-int8"]


def test_groups_of_a_part_in_codes_are_told_apart_in_a_float_target(tmp_path: Path) -> None:
    """The group was dropped in silence."""
    points = grid(tmp_path, 'target = "ort-fp32"\nvision = "int8"\ngroup = [32, 64]')
    expected = [("ort-fp32_g32_vit-int8", 32), ("ort-fp32_g64_vit-int8", 64)]
    assert [(point.name, point.group) for point in points] == expected


def test_points_for_tensorrt_share_a_checkpoint_without_negative_scales(tmp_path: Path) -> None:
    points = grid(tmp_path, 'target = ["ort-int4", "trt-int4", "rtx-int4"]')
    assert [point.checkpoint for point in points] == ["routed_int4_g128", *["routed_int4_g128_positive"] * 2]


def test_points_share_a_checkpoint_where_only_the_export_differs(tmp_path: Path) -> None:
    points = grid(tmp_path, 'embedding = ["int8", "fp16"]\nkv = ["fp32", "fp16"]')
    assert len(points) == 4 and {point.checkpoint for point in points} == {"routed_int4_g128"}
    others = grid(tmp_path, 'bits = [3, 4]\ngroup = [32, -1]\nquality = ["default", "high"]\nvision = ["int4", "int8"]')
    assert len({point.checkpoint for point in others}) == len(others) == 16


def test_every_kind_of_hessian_is_an_algorithm() -> None:
    assert set(get_args(HessianKind)) | {"rtn", "none"} == set(ALGORITHMS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bit = [4]", 'key "bit" is not known: did you mean bits? known keys: algorithm, target, bits'),
        ("zzz = 1", 'key "zzz" is not known: known keys: algorithm'),
        ('[[point]]\nvison = "int8"', 'key "vison" is not known: did you mean vision?'),
        ('name = "a"', 'key "name" is not known'),
        ("bits = []", "bits is an empty list, expected values to combine"),
        ("bits = [4, 5]", "bits is 5, expected one of 3, 4, 8"),
        ("bits = 4.0", "bits is 4.0, expected one of 3, 4, 8"),
        ("bits = true", "bits is True, expected one of 3, 4, 8"),
        ('bits = "4"', "bits is '4', expected one of 3, 4, 8"),
        ("bits = [[4]]", "bits is [4], expected one of 3, 4, 8"),
        ("bits = nan", "bits is nan, expected one of 3, 4, 8"),
        ("bits = {a = 4}", "bits is {'a': 4}, expected one of"),
        ("group = 100", "group is 100, expected one of 128, 64, 32, 16, -1"),
        ("vision = 'int3'", "vision is 'int3', expected one of"),
        ('algorithm = "RTN"', "algorithm is 'RTN', expected one of routed, pooled, text-only, rtn, none"),
        ('algorithm = "none"', "algorithm none leaves floats, but ort-int4 holds codes: expected rtn"),
        ("", "holds no point; expected lists such as bits = [4, 3], or [[point]] tables"),
        ("point = []", "holds no point"),
        ('[point]\nname = "a"', "point is {'name': 'a'}, expected [[point]] tables"),
        ("point = [4]", "point is [4], expected [[point]] tables"),
        ('[[point]]\nname = "../a"', "the name of a point is '../a', expected up to 100 letters, digits and . _ -"),
        ('[[point]]\nname = ""', "the name of a point is ''"),
        ('[[point]]\nname = "a/b"', "the name of a point is 'a/b'"),
        ('[[point]]\nname = ".."', "the name of a point is '..'"),
        ("[[point]]\nname = 4", "the name of a point is 4"),
        ('[[point]]\nname = "a"\n[[point]]\nname = "a"\nbits = 3', 'two points are called "a" and differ in bits'),
        ("bits = [4", "not TOML"),
        ("bits = 4\nbits = 3", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)  # fmt: skip
def test_unfit_grids_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        grid(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'grid.toml'}: ") and expected in str(refused.value)


def test_longest_name_is_that_of_a_file(tmp_path: Path) -> None:
    assert names(tmp_path, f'[[point]]\nname = "{"a" * 100}"') == ["a" * 100]
    with pytest.raises(ConfigError, match="the name of a point is 'aaa"):
        grid(tmp_path, f'[[point]]\nname = "{"a" * 101}"')


def test_grid_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_bytes(b"bits = '\xff'")
    with pytest.raises(ConfigError, match=r"grid\.toml: not TOML"):
        read_grid(tmp_path / "grid.toml")
    with pytest.raises(ConfigError, match=r"none\.toml: no such file; expected a grid"):
        read_grid(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{key} = {list(values)}" for key, values in ALLOWED.items()).replace("'", '"'),
        '[[point]]\nalgorithm = "rtn"\n' * 10_001,
    ],
    ids=["lists", "points"],
)
def test_more_points_than_any_sweep_has_are_refused(tmp_path: Path, text: str) -> None:
    """Every one of a million combinations was made before the first was looked at."""
    with pytest.raises(ConfigError, match=r"grid\.toml: .* \d{5,} points, at most 10000 are run in one sweep"):
        grid(tmp_path, text)


def test_values_that_are_repeated_count_once(tmp_path: Path) -> None:
    """A list of a value a thousand times, in each of several keys, was combined to millions of equal points."""
    text = "\n".join(f"{key} = {[value] * 1000}" for key, value in (("bits", 4), ("group", 32), ("lm_head", "int8")))
    assert names(tmp_path, text.replace("'", '"')) == ["routed_int4_g32_head-int8"]
