"""Property: a reader of what comes from outside gives a result or one of our errors, in one line, whatever the bytes.
Changes valid files and makes some up. The readers are those of `make fuzz`, which searches far longer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS, Models, Room, make_models
from vlmdeploy import load_model
from vlmdeploy.errors import VlmdeployError, escaped

OTHERS_OWN = ("bundle", "graph", "image", "manifest", "messages", "reference")
CHECKPOINT = ("config", "gptq_config", "index", "quantization_report", "safetensors")
PIECES = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\t", b'"', b"'", b"\\", b"{", b"]", b"[" * 100,
    b"9" * 400, b"1e999", b"-", b"NaN", b"0x" + b"f" * 70, b"a." * 300, b"../../etc/passwd", b"\xff" * 8, b"\0\0\0\x80",
    b"= 1979-05-27\n",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    10**400, -(10**400), 2**63, float("nan"), float("inf"), "\ud800", "\0", "../x", "/dev/zero", "a\nb", "x" * 3000,
    [[]] * 50, json.loads("[" * 70 + "]" * 70), {"": {"": None}},
)  # fmt: skip
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(ODD)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
FEW = settings(
    max_examples=100, derandomize=True, database=None, deadline=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("hostile") / "models")


def changed(seeds: list[bytes], is_json: bool) -> st.SearchStrategy[bytes]:
    """Valid inputs with some bytes or some values changed, and now and then any bytes, or any JSON."""
    made_up = st.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode())
    by_bytes = st.sampled_from(seeds).flatmap(_changed_bytes)
    by_value = st.sampled_from(seeds).flatmap(_changed_values)
    return st.one_of(by_value, by_value, by_bytes, made_up) if is_json else st.one_of(by_bytes, by_bytes, made_up)


def _changed_bytes(seed: bytes) -> st.SearchStrategy[bytes]:
    place, length = st.integers(0, len(seed)), st.sampled_from((0, 1, 4, 100, len(seed)))
    edits = st.lists(st.tuples(place, length, st.sampled_from(PIECES) | st.binary(max_size=8)), min_size=1, max_size=4)
    return edits.map(lambda chosen: _edited(seed, chosen))


def _edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, piece in edits:
        content = content[:place] + piece + content[place + length :]
    return content


def _changed_values(seed: bytes) -> st.SearchStrategy[bytes]:
    places = _places(json.loads(seed.splitlines()[0] if seed.startswith(b"{") and b"\n{" in seed else seed))
    edits = st.lists(st.tuples(st.sampled_from(places), VALUES), min_size=1, max_size=3)
    return edits.map(lambda chosen: _with_values(seed, chosen))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a document."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in keys for place in _places(inner, (*path, key)))]


def _with_values(seed: bytes, edits: list[tuple[tuple[Any, ...], Any]]) -> bytes:
    document = [json.loads(seed)]
    for path, value in edits:
        place: Any = document
        *steps, last = (0, *path)
        try:
            for step in steps:
                place = place[step]
            place[last] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit replaced what held it
    return json.dumps(document[0]).encode()


def check_one(room: Room, also: Callable[[], object] | None, content: bytes) -> None:
    try:
        room.check(content)
        if also is not None:
            also()
    except VlmdeployError as error:
        assert str(error) and str(error) == escaped(str(error)), "one line of printable characters"


@pytest.mark.parametrize("name", sorted(set(TARGETS) - set(OTHERS_OWN)))
def test_hostile_files_are_read_or_refused_in_one_line(name: str, models: Models, tmp_path: Path) -> None:
    room, target = Room(name, models, tmp_path / "room"), TARGETS[name]
    also = (lambda: load_model(tmp_path / "room")) if name in CHECKPOINT else None

    @FEW
    @given(content=changed(target.seeds(models), target.is_json))
    def hold(content: bytes) -> None:
        check_one(room, also, content)

    hold()
