"""The grid of a sweep: a TOML file of lists, combined with each other, and single points.

algorithm = ["routed", "pooled", "rtn"]   # whose tokens calibrate an expert; rtn: rounded; none: floats
bits = [4, 3]
vision = ["int8", "int4"]

[[point]]                                 # missing keys take the default, not the grid's values
name = "fp32"
target = "ort-fp32"
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from vlmdeploy.errors import ConfigError
from vlmdeploy.quant.precision import PRECISIONS, TARGETS, is_tensorrt
from vlmdeploy.records import read_toml

ALGORITHMS = ("routed", "pooled", "text-only", "rtn", "none")
BITS = {"ort-int8": 8}  # targets with only one decoder width
MOST_POINTS = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PART_VALUES = tuple(kind for kind in PRECISIONS if kind != "int3")
ALLOWED: dict[str, tuple[Any, ...]] = {
    "algorithm": ALGORITHMS,
    "target": tuple(TARGETS),
    "bits": (3, 4, 8),
    "group": (128, 64, 32, 16, -1),
    "quality": ("default", "high", "best"),
    "vision": PART_VALUES,
    "connector": PART_VALUES,
    "lm_head": PART_VALUES,
    "embedding": PART_VALUES,
    "kv": ("fp32", "fp16", "int8"),
    "provider": ("cpu", "cuda"),
}


@dataclass(frozen=True)
class Point:
    """One version of the model. None: the target's default. Float targets ignore bits and quality, and group unless a
    part holds codes."""

    name: str
    algorithm: str = "routed"
    target: str = "ort-int4"
    bits: int = 4
    group: int = 128
    quality: str = "default"
    vision: str | None = None
    connector: str | None = None
    lm_head: str | None = None
    embedding: str | None = None
    kv: str | None = None
    provider: str = "cpu"

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration data decides the codes."""
        return self.algorithm not in ("rtn", "none")

    @property
    def has_codes(self) -> bool:
        """Whether a part with a chosen precision holds integer codes, whatever the target."""
        return any(kind.startswith("int") for kind in self.precisions.values())

    @property
    def precisions(self) -> dict[str, str]:
        """The parts with a chosen precision."""
        chosen = {name: getattr(self, name) for name in ("vision", "connector", "lm_head", "embedding")}
        return {part: kind for part, kind in chosen.items() if kind is not None}

    @property
    def checkpoint(self) -> str:
        """The name of its quantized checkpoint, which other points may share."""
        parts = (f"{part}-{kind}" for part, kind in self.precisions.items() if part != "embedding")
        quality = () if self.quality == "default" else (self.quality,)
        scales = ("positive",) if self.positive_scales else ()
        group = "whole" if self.group == -1 else str(self.group)
        return "_".join((self.algorithm, f"int{self.bits}", f"g{group}", *quality, *scales, *parts))

    @property
    def positive_scales(self) -> bool:
        """Whether its target takes no negative scales."""
        return is_tensorrt(self.target)


def read_grid(path: Path) -> list[Point]:
    """The unique points of a grid file, in order. Raises ConfigError, naming file, key and value."""
    content = read_toml(path, "a grid")
    single = content.pop("point", [])
    if not isinstance(single, list) or not all(isinstance(item, dict) for item in single):
        raise ConfigError(f"{path}: point is {single!r:.80}, expected [[point]] tables")
    points = [*_grid_points(content, path), *(_single_point(item, path) for item in single)]
    if len(points) > MOST_POINTS:
        raise ConfigError(f"{path}: holds {len(points)} points, at most {MOST_POINTS} are run in one sweep")
    if not points:
        raise ConfigError(f"{path}: holds no point; expected lists such as bits = [4, 3], or [[point]] tables")
    return list(_each_once(points, path))


def _grid_points(content: Mapping[str, Any], path: Path) -> Iterator[Point]:
    """Every combination of the lists; a single value counts as a list of one."""
    lists = {}
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ConfigError(f"{path}: {key} is an empty list, expected values to combine")
        lists[key] = list(dict.fromkeys(_checked(key, each, path) for each in values))
    total = prod(map(len, lists.values()))
    if total > MOST_POINTS:
        raise ConfigError(f"{path}: its lists give {total} points, at most {MOST_POINTS} are run in one sweep")
    for chosen in product(*lists.values()) if lists else ():
        settings = dict(zip(lists, chosen, strict=True))
        yield _named(_resolved(Point("", **settings), path), settings)


def _single_point(item: Mapping[str, Any], path: Path) -> Point:
    settings = {key: _checked(key, value, path) for key, value in item.items() if key != "name"}
    point = _resolved(Point("", **settings), path)
    if "name" not in item:
        return _named(point, settings)
    name = item["name"]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"{path}: the name of a point is {name!r:.80}, expected up to 100 letters, digits and . _ -")
    return replace(point, name=name)


def _checked(key: str, value: Any, path: Path) -> Any:
    if key not in ALLOWED:
        close = difflib.get_close_matches(key, ALLOWED, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f'{path}: key "{key}" is not known: {meant}known keys: {", ".join(ALLOWED)}, point')
    if value not in ALLOWED[key] or type(value) is not type(ALLOWED[key][0]):  # 4.0 and true equal whole numbers
        raise ConfigError(f"{path}: {key} is {value!r:.80}, expected one of {', '.join(map(str, ALLOWED[key]))}")
    return value


def _resolved(point: Point, path: Path) -> Point:
    """Apply the target's limits: floats have no algorithm, some targets have one width of codes."""
    if point.target.endswith(("fp32", "fp16")):
        group = point.group if point.has_codes else 128
        return replace(point, algorithm="none", bits=4, group=group, quality="default")
    if point.algorithm == "none":
        raise ConfigError(
            f"{path}: algorithm none leaves floats, but {point.target} holds codes: expected rtn to round them; "
            "targets of floats need no algorithm"
        )
    bits = BITS.get(point.target, point.bits)
    quality = point.quality if point.is_calibrated else "default"
    return replace(point, bits=bits, quality=quality)


def _named(point: Point, settings: Mapping[str, Any]) -> Point:
    """Name a point by the settings in the file, in a fixed order."""
    if point.algorithm == "none":
        words = [point.target, *(_group_words(point, settings) if point.has_codes else [])]
    else:
        words = [point.algorithm, f"int{point.bits}"]
        words += _group_words(point, settings)
        words += [point.quality] if point.quality != "default" else []
        words += [point.target] if "target" in settings else []
    parts = {"vision": "vit", "connector": "connector", "lm_head": "head", "embedding": "embedding", "kv": "kv"}
    words += [f"{parts[key]}-{settings[key]}" for key in parts if key in settings]
    words += [point.provider] if "provider" in settings else []
    return replace(point, name="_".join(words))


def _group_words(point: Point, settings: Mapping[str, Any]) -> list[str]:
    return [f"g{'whole' if point.group == -1 else point.group}"] if "group" in settings else []


def _each_once(points: list[Point], path: Path) -> Iterator[Point]:
    """Drop repeated points; two different points must not share a name."""
    seen: dict[str, Point] = {}
    for point in points:
        if point.name not in seen:
            seen[point.name] = point
            yield point
        elif seen[point.name] != point:
            differs = next(
                item.name for item in fields(Point) if getattr(point, item.name) != getattr(seen[point.name], item.name)
            )
            raise ConfigError(f'{path}: two points are called "{point.name}" and differ in {differs}: name one of them')
