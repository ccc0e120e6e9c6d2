"""How a report writes its numbers, and where in `report.json` each one stands.

A sentence with numbers is a list of pieces: strings, and `Shown`, which points into the document instead of holding a
number. So every number that a reader sees can be traced to the document; a test does that.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from vlmdeploy.errors import DataError
from vlmdeploy.report.document import Report

Key = tuple[str | int, ...]
MINUS = "\N{MINUS SIGN}"
SMALLEST_P = 0.001
LARGEST_FIXED = 1e12
LABEL_LENGTH = 26
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {
    127: 0x2421,
    **dict.fromkeys((*range(0xD800, 0xE000), *range(0x80, 0xA0), 0xFFFE, 0xFFFF), 0xFFFD),
}
"""Characters that HTML cannot hold -> what to show instead."""


@dataclass(frozen=True)
class Shown:
    """A value of the document, formatted by one of FORMS; `over`: the value to divide it by first."""

    form: str
    key: Key
    over: Key | None = None


Phrase = str | Shown


def _signed(text: str) -> str:
    """A signed number with a true minus sign; zero without a sign."""
    return text[1:] if not text.strip("+-0.") else text.replace("-", MINUS)


def size(value: int) -> str:
    """Bytes in the largest decimal unit that is not larger: "4.3 MB", "12.40 GB"."""
    for unit, factor, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("KB", 1e3, 1)):
        if value >= factor:
            return f"{value / factor:,.{digits}f} {unit}"
    return f"{value:,} B"


def amount(value: float) -> str:
    """A physical quantity to about three digits: 0.0421, 1.50, 23.4, 1,234."""
    if value != 0 and not 1e-5 <= abs(value) < LARGEST_FIXED:
        return f"{value:.1e}".replace("-", MINUS)
    rounded = abs(float(f"{value:.3g}"))
    digits = 0 if rounded == 0 else max(0, 2 - math.floor(math.log10(rounded)))
    return f"{value:,.{digits}f}".replace("-", MINUS)


def decimal(value: float) -> str:
    """A number of order 1, such as an IoU or a perplexity, to three places."""
    return f"{value:,.3f}".replace("-", MINUS) if abs(value) < LARGEST_FIXED else amount(value)


FORMS: dict[str, Callable[[Any], str]] = {
    "share": lambda value: f"{100 * value:.2f} %",  # 0.97311 is "97.31 %"
    "percent": lambda value: f"{100 * value:.2f}",  # the same beside a percent sign
    "points": lambda value: _signed(f"{100 * value:+.2f}"),  # a difference of shares: -0.0004 is "-0.04"
    "change": lambda value: f"{_signed(f'{100 * (value - 1):+.1f}')} %",  # growth, from a quotient: 1.02 is "+2.0 %"
    "count": lambda value: f"{value:,}",
    "size": size,
    "amount": amount,
    "times": lambda value: f"{value:,.{2 if value < 1 else 1 if value < 100 else 0}f}",  # a quotient: "3.1", "0.45"
    "decimal": decimal,
    "short": lambda value: f"{value:.3g}",  # a metric of one answer
    "p": lambda value: f"< {SMALLEST_P}" if value < SMALLEST_P else f"{value:.3f}",
    "plain": str,  # whole numbers without commas: a seed, a hash
}


def printable(text: str) -> str:
    """Text that HTML can hold: control characters become symbols, lone surrogates a question mark."""
    return text.translate(CONTROLS)


def short_label(name: str, length: int = LABEL_LENGTH) -> str:
    """A name on one line of printable characters; a long one is cut in its middle, since both ends tell names apart."""
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split()) or "?"
    if len(clean) <= length:
        return clean
    head = (length - 1) * 2 // 3
    return f"{clean[:head]}\N{HORIZONTAL ELLIPSIS}{clean[head + 1 - length :]}"


class Document:
    """A report and its JSON form, where values are looked up. Raises DataError for NaN and infinity."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.json: dict[str, Any] = asdict(report)
        for key, value in _numbers(self.json, ()):
            if not math.isfinite(value):
                raise DataError(f"report: {key_text(key)} is {value}, expected a finite number")

    def value(self, key: Key) -> Any:
        """The value at a key."""
        found: Any = self.json
        for part in key:
            found = found[part]
        return found

    def text(self, piece: Phrase) -> str:
        """A piece as the reader sees it."""
        if isinstance(piece, str):
            return piece
        value = self.value(piece.key)
        return FORMS[piece.form](value if piece.over is None else value / self.value(piece.over))

    def sentence(self, pieces: Iterable[Phrase]) -> str:
        """All pieces joined."""
        return "".join(map(self.text, pieces))


def _numbers(value: object, key: Key) -> Iterable[tuple[Key, float]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, (*key, name))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _numbers(item, (*key, place))
    elif isinstance(value, float):
        yield key, value


def key_text(key: Key) -> str:
    """A key as text: parts joined by dots; dots and backslashes inside a part are escaped with a backslash.

    ("models", 2, "tasks", "rec", "acc@0.5", "value") is models.2.tasks.rec.acc@0\\.5.value; unprintable characters are
    escaped as in JSON.
    """
    return ".".join("".join(map(_key_letter, str(part))) for part in key)


def _key_letter(letter: str) -> str:
    if letter in ".\\":
        return f"\\{letter}"
    return letter if letter.isprintable() else f"\\u{ord(letter):04x}"
