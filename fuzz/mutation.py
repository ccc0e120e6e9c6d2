"""Change valid inputs: bytes blindly, JSON by its values."""

import json
import random
from typing import Any

NUMBERS = (b"\0", b"\xff", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\xff" * 8, b"99999999999999999999")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**18, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "../x", "/dev/zero", "a\0b", "\x1b[31m\u202e", "\ud800", "9" * 5000, "a" * 70_000,
    "ort-int4", "model.safetensors", [], {}, [[]] * 50, {"a": {"b": []}},
)  # fmt: skip
DEEP = (b'{"a":' * 3000 + b"1" + b"}" * 3000, b"[" * 100_000, b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}")


def mutate(data: bytes, others: list[bytes], chance: random.Random, is_json: bool) -> bytes:
    """A changed copy; others: further inputs to take pieces of."""
    if is_json and chance.random() < 0.7:
        changed = _changed_json(data, chance)
        if changed is not None:
            return changed
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        _change_bytes(result, others, chance)
    return bytes(result)


def _change_bytes(data: bytearray, others: list[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    length = min(len(data) - at, chance.choice((1, 2, 4, 16, 256)))
    kind = chance.randrange(7)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at : at + length]
    elif kind == 2:
        data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
    elif kind == 3:
        number = chance.choice(NUMBERS)
        data[at : at + len(number)] = number
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        other = chance.choice(others)
        start = chance.randrange(len(other) + 1)
        data[at : at + length] = other[start : start + length]
    else:
        data[at : at + length] = chance.randbytes(length)


def _changed_json(data: bytes, chance: random.Random) -> bytes | None:
    """The document with some values, keys or items changed; None for bytes that are no JSON."""
    if chance.random() < 0.02:
        return chance.choice(DEEP)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        document = _changed(document, chance)
    try:
        return json.dumps(document, indent=1).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def _changed(value: Any, chance: random.Random) -> Any:
    """The value with one place in it changed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.05:
        return _other(value, chance)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = chance.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.15 and isinstance(value, dict):
        value[chance.choice(("../x", "", "a\0", "engines/../y", *value))] = value[key]
    elif kind < 0.2 and isinstance(value, list):
        is_small = len(value) < 100 and len(repr(value[key])) < 100  # or documents grow without bound
        value.extend([value[key]] * chance.choice((1, 3, 1000 if is_small else 1)))
    else:
        value[key] = _changed(value[key], chance)
    return value


def _other(value: Any, chance: random.Random) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice((-1, 1, value, 1000))
    return chance.choice(VALUES)
