"""Read typed records: turn JSON or TOML into a dataclass, or raise one clear error.

The caller chooses the error class: a bad manifest is a BundleError, a bad recipe a ConfigError.
"""

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlmdeploy.errors import ConfigError, VlmdeployError
from vlmdeploy.input_files import MOST_JSON_BYTES, read_input

Record = TypeVar("Record")
Config = dict[str, Any]  # a parsed JSON or TOML object

DEEPEST = 64  # lists and objects within each other
MOST_TOML_BYTES = 1 << 20  # of a file written by hand
LARGEST_INT = (1 << 63) - 1
MOST_DOTS = 256  # in a line: the parser's memory grows with the square of a dotted key's parts
_LONG_NUMBER = re.compile(rb"0[xob][0-9A-Fa-f_]{65}")  # only decimal digits are counted when such a number is read
NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}


def read_object(
    path: Path,
    error: type[VlmdeployError] = ConfigError,
    is_optional: bool = False,
    expected: str = "",
    most_bytes: int = MOST_JSON_BYTES,
) -> Config:
    """Read the JSON object in a file; {} if an optional file is absent. Raises `error`.

    expected: what should be there, for the message about an absent file.
    """
    if is_optional and not path.exists():
        return {}
    return parse_object(read_input(path, error, most_bytes, expected), str(path), error)


def parse_object(content: bytes, where: str, error: type[VlmdeployError] = ConfigError) -> Config:
    """Parse a JSON object in UTF-8, with or without a byte order mark. Raises `error`, naming `where`."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise error(f"{where}: holds {_shown(value)}, expected an object")
    return _checked_depth(value, where, error)


def read_toml(path: Path, expected: str) -> Config:
    """Read the tables in a TOML file. Raises ConfigError; expected: what should be there, for an absent file."""
    content = read_input(path, ConfigError, MOST_TOML_BYTES, expected)
    for number, line in enumerate(content.splitlines(), 1):
        _check_toml_line(line, f"{path}:{number}")
    try:
        value = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{path}: not TOML ({problem})") from problem
    tree = _checked_depth(value, str(path), ConfigError)
    try:
        json.dumps(tree)  # as settings are kept
    except TypeError as problem:
        raise ConfigError(f"{path}: holds a date or a time, which no key takes") from problem
    return tree


def _check_toml_line(line: bytes, where: str) -> None:
    if line.count(b".") > MOST_DOTS:
        raise ConfigError(f"{where}: holds more than {MOST_DOTS} dots")
    if _LONG_NUMBER.search(line):
        raise ConfigError(f"{where}: holds a number of more than 64 digits")


def _checked_depth(tree: Config, where: str, error: type[VlmdeployError]) -> Config:
    """The tree, unless it nests so deeply that comparing or writing it could fail."""
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        items = (item.values() if isinstance(item, dict) else item for item in level)
        level = [inner for item in items for inner in item if isinstance(inner, dict | list)]
        if not level:
            return tree
    raise error(f"{where}: nested more than {DEEPEST} levels deep")


def first_difference(ours: Any, theirs: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose values differ in two trees of plain values, and both values (None: absent)."""
    if isinstance(ours, list) and isinstance(theirs, list):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return None if ours == theirs else (key, ours, theirs)
    for name in dict.fromkeys((*ours, *theirs)):
        found = first_difference(ours.get(name), theirs.get(name), f"{key}.{name}" if key else str(name))
        if found:
            return found
    return None


def record_of(
    kind: type[Record],
    data: Any,
    where: str,
    error: type[VlmdeployError] = ConfigError,
    unknown: Literal["ignored", "refused"] = "ignored",
) -> Record:
    """Build a dataclass from parsed JSON or TOML. Raises `error`, naming `where`, key, value and what it expected.

    unknown: how to treat keys that the dataclass lacks. Versioned formats ignore them; in hand-written files they are
    mistakes.
    """
    return typing.cast(Record, _Reader(where, error, unknown == "refused").value(kind, data, ""))


@dataclass(frozen=True)
class _Reader:
    where: str
    error: type[VlmdeployError]
    refuses_unknown: bool

    def value(self, kind: Any, data: Any, key: str) -> Any:
        """Check and convert `data` to a field's type; `key` is its dotted path."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return data
        if is_dataclass(kind):
            return self._record(kind, data, key)
        if origin is tuple:
            return self._tuple(arguments, data, key)
        if origin is list:
            self._require(isinstance(data, list), data, "a list", key)
            return [self.value(arguments[0], item, _inner(key, index)) for index, item in enumerate(data)]
        if origin in (dict, Mapping):
            self._require(isinstance(data, dict), data, "an object", key)
            return {name: self.value(arguments[1], item, _inner(key, name)) for name, item in data.items()}
        if origin is Literal:
            self._require(data in arguments, data, " or ".join(map(repr, arguments)), key)
            return data
        if origin in (typing.Union, types.UnionType):
            return self._union(arguments, data, key)
        return self._plain(kind, data, key)

    def _plain(self, kind: type, data: Any, key: str) -> Any:
        if kind is Path and isinstance(data, str):
            return Path(data)
        if kind is float and type(data) is int:
            try:
                return float(data)
            except OverflowError:
                self._require(False, data, "a number below 1.8e308", key)
        self._require(_is_plain(kind, data), data, NAMES[kind], key)
        self._require(kind is not int or abs(data) <= LARGEST_INT, data, "a whole number below 9.2e18", key)
        return data

    def _record(self, kind: Any, data: Any, key: str) -> Any:
        self._require(isinstance(data, dict), data, "an object", key)
        hints, known = typing.get_type_hints(kind), {item.name: item for item in fields(kind)}
        for name in data:
            if self.refuses_unknown and name not in known:
                close = difflib.get_close_matches(name, known, 1)
                meant = f'did you mean "{close[0]}"? ' if close else ""
                expected = f"{meant}known are {', '.join(known)}"
                raise self.error(f'{self.where}: key "{_inner(key, name)}" is unknown; {expected}')
        needed = [item.name for item in known.values() if item.default is MISSING and item.default_factory is MISSING]
        for name in needed:
            if name not in data:
                hint = f"needed are {', '.join(needed)}" if self.refuses_unknown else "was it made by an older version?"
                raise self.error(f'{self.where}: key "{_inner(key, name)}" is missing; {hint}')
        return kind(**{name: self.value(hints[name], data[name], _inner(key, name)) for name in data if name in known})

    def _tuple(self, arguments: tuple[Any, ...], data: Any, key: str) -> tuple[Any, ...]:
        self._require(isinstance(data, list), data, "a list", key)
        kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else list(arguments)
        self._require(len(kinds) == len(data), data, f"{len(kinds)} items", key)
        pairs = zip(kinds, data, strict=True)
        return tuple(self.value(kind, item, _inner(key, index)) for index, (kind, item) in enumerate(pairs))

    def _union(self, arguments: tuple[Any, ...], data: Any, key: str) -> Any:
        if data is None and types.NoneType in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not types.NoneType]
        if len(kinds) == 1:
            return self.value(kinds[0], data, key)
        fitting = [kind for kind in kinds if _is_plain(kind, data)]
        self._require(bool(fitting), data, " or ".join(NAMES[kind] for kind in kinds), key)
        return self._plain(fitting[0], data, key)

    def _require(self, holds: bool, data: Any, expected: str, key: str) -> None:
        if not holds:
            name = f'"{key}" is' if key else "holds"
            raise self.error(f"{self.where}: {name} {_shown(data)}, expected {expected}")


def _is_plain(kind: type, data: Any) -> bool:
    """Whether a value is of a plain type; true and false are no numbers."""
    return isinstance(data, kind) and (kind is bool or type(data) is not bool)


def _shown(data: Any) -> str:
    """A value in one short line."""
    if isinstance(data, dict):
        return "an object"
    if isinstance(data, list):
        return f"a list of {len(data)}"
    return json.dumps(data, ensure_ascii=False, default=str)[:80]


def _inner(key: str, name: str | int) -> str:
    return f"{key}.{name}" if key else str(name)
