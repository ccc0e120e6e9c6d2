"""Read a checkpoint's config.json with types: each key is REQUIRED or has a default, and errors name the key."""

import sys
from typing import Any, Final, TypeVar

from vlmdeploy.errors import ConfigError

MOST = 10**9
MOST_LAYERS = 1000  # the rules of every layer are held in memory before a tensor is looked for
LARGEST = sys.float_info.max
Number = TypeVar("Number", int, float)


class _Required:
    """Marks a key that has no default."""


REQUIRED: Final = _Required()


class ConfigReader:
    """Reads one (nested) object of a config file; `where` names it in messages."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def section(self, key: str) -> "ConfigReader":
        """The object under `key`."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self._error(key, value, "an object")
        return ConfigReader(value, f"{self.where}: {key}")

    def count(self, key: str, default: int | _Required = REQUIRED, most: int = MOST) -> int:
        """A whole number from 1 to `most`, which bounds time and memory."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(key, value, "a whole number of at least 1")
        if value > most:
            raise self._error(key, value, f"at most {most}")
        return value

    def token_id(self, key: str, default: int | _Required = REQUIRED) -> int:
        """A whole number of at least 0."""
        value = self._get(key, default)
        if not _is_token_id(value):
            raise self._error(key, value, "a token id")
        return int(value)

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One token id or a list of them, without duplicates."""
        value = self._get(key, list(default))
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(map(_is_token_id, ids)):
            raise self._error(key, value, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def positive(self, key: str, default: float | _Required = REQUIRED) -> float:
        """A number above 0, such as an epsilon."""
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise self._error(key, value, "a number above 0")
        return float(value)

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = REQUIRED) -> Any:
        """One of the supported values."""
        value = self._get(key, default)
        if value not in allowed:
            raise self._error(key, value, " or ".join(map(repr, allowed)))
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ConfigError(f'{self.where}: key "{key}" is missing')
        return default

    def _error(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f'{self.where}: "{key}" is {value!r:.80}, expected {expected}')


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def check_divides(whole: int, part: int, what: str) -> None:
    """Raise ConfigError unless `part` divides `whole`; `what` says which keys these are."""
    if whole % part:
        raise ConfigError(f"config.json: {what}: {part} does not divide {whole}")
