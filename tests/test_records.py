"""Contract tests of the one reader of typed records: what fits becomes a dataclass, what does not is named."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from vlmdeploy.errors import BundleError, ConfigError
from vlmdeploy.records import read_object, read_toml, record_of


@dataclass(frozen=True)
class Inner:
    name: str
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    count: int
    is_on: bool
    kind: Literal["a", "b"]
    pair: tuple[int, float]
    inners: tuple[Inner, ...]
    table: dict[str, Inner]
    values: list[float]
    anything: dict[str, Any]
    either: int | str
    nothing: Inner | None = None


OUTER = Outer(
    3, True, "a", (1, 2.0), (Inner("x"), Inner("y", 1.0)), {"z": Inner("z")}, [1.5], {"deep": [{"er": None}]}, "word"
)


def data() -> Any:
    return json.loads(json.dumps(asdict(OUTER)))


def changed(path: str, value: Any) -> Any:
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
    top = inner = data()
    for step in steps:
        inner = inner[step]
    inner[last] = value
    return top


def test_a_record_survives_json() -> None:
    assert record_of(Outer, data(), "here") == OUTER


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("count", 3.0, 'here: "count" is 3.0, expected a whole number'),
        ("count", True, 'here: "count" is true, expected a whole number'),
        ("is_on", 1, 'here: "is_on" is 1, expected true or false'),
        ("kind", "c", "here: \"kind\" is \"c\", expected 'a' or 'b'"),
        ("kind", ["a"], "here: \"kind\" is a list of 1, expected 'a' or 'b'"),
        ("pair", [1], 'here: "pair" is a list of 1, expected 2 items'),
        ("pair.1", "2", 'here: "pair.1" is "2", expected a number'),
        ("inners", {}, 'here: "inners" is an object, expected a list'),
        ("inners.1.share", None, 'here: "inners.1.share" is null, expected a number'),
        ("inners.1.share", 10**400, 'here: "inners.1.share" is 1000.*, expected a number below 1.8e308'),
        ("table.z", 7, 'here: "table.z" is 7, expected an object'),
        ("values.0", False, 'here: "values.0" is false, expected a number'),
        ("either", 1.5, 'here: "either" is 1.5, expected a whole number or a string'),
        ("either", True, 'here: "either" is true, expected a whole number or a string'),
        ("either", 10**30, 'here: "either" is 1000.*, expected a whole number below 9.2e18'),
        ("count", -(10**400), 'here: "count" is -1000.*, expected a whole number below 9.2e18'),
        ("nothing", "x" * 500, 'here: "nothing" is "x{79}, expected an object'),
    ],
)
def test_what_does_not_fit_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(BundleError, match=f"^{message}$"):
        record_of(Outer, changed(path, value), "here", BundleError)


def test_a_whole_number_is_a_float_too() -> None:
    assert record_of(Outer, changed("pair.1", 2), "here") == OUTER


def test_the_record_itself_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match=r"^here: holds a list of 0, expected an object$"):
        record_of(Outer, [], "here")


def test_a_missing_key_is_named_with_its_place() -> None:
    with pytest.raises(
        ConfigError, match=r'^here: key "inners\.0\.name" is missing; was it made by an older version\?$'
    ):
        record_of(Outer, changed("inners.0", {}), "here")


def test_unknown_keys_are_ignored_or_refused() -> None:
    newer = changed("inners.0.colour", "red")
    assert record_of(Outer, newer, "here") == OUTER
    with pytest.raises(ConfigError, match=r'^here: key "inners\.0\.colour" is unknown; known are name, share$'):
        record_of(Outer, newer, "here", unknown="refused")


def test_an_object_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text('{"ä": [1]}', encoding="utf-8")
    assert read_object(tmp_path / "it.json") == {"ä": [1]}
    assert read_object(tmp_path / "none.json", is_optional=True) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "holds a list of 0, expected an object"),
        (b"7", "holds 7, expected an object"),
    ],
)
def test_a_file_that_is_no_object_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "it.json").write_bytes(content)
    with pytest.raises(BundleError, match=rf"it\.json: {message}"):
        read_object(tmp_path / "it.json", BundleError)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: no such file; expected a recipe"):
        read_object(tmp_path / "none.json", expected="a recipe")
    with pytest.raises(ConfigError, match="is a folder, expected a file"):
        read_object(tmp_path, is_optional=True)


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "it.json") == {"a": 1}


def test_files_that_are_none_are_not_waited_for(tmp_path: Path) -> None:
    """A FIFO in the place of a config was waited for until somebody wrote to it."""
    os.mkfifo(tmp_path / "it")
    for read in (
        read_object,
        lambda path: read_object(path, is_optional=True),
        lambda path: read_toml(path, "a recipe"),
    ):
        with pytest.raises(ConfigError, match="it: is a FIFO or pipe, expected a"):
            read(tmp_path / "it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (".".join("a" * 20_000) + " = 1", ":1: holds more than 256 dots"),
        ("b = 1\n[" + ".".join("a" * 20_000) + "]", ":2: holds more than 256 dots"),
        ("a = 0x" + "f" * 5000, ":1: holds a number of more than 64 digits"),
        ("a = 1979-05-27", ": holds a date or a time, which no key takes"),
        ("[a]\nb = [{c = 07:32:00}]", ": holds a date or a time, which no key takes"),
        (".".join("a" * 100) + " = 1", ": nested more than 64 levels deep"),
        ("a = '" + "x" * (1 << 20) + "'", ": has 1.0 MB, at most 1.0 MB are read"),
    ],
)  # fmt: skip
def test_toml_that_is_more_than_settings_is_told(tmp_path: Path, content: str, message: str) -> None:
    """A dotted key of 20 kB took 1.5 GB; a long hexadecimal number could not be printed, a date not be kept as JSON."""
    (tmp_path / "it.toml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_toml(tmp_path / "it.toml", "a recipe")
    assert str(caught.value).startswith(f"{tmp_path / 'it.toml'}{message}")
