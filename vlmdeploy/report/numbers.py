"""How numbers of a report are written, and where in `report.json` each one stands.

Text that shows numbers is a list of pieces: words, and `Shown`, which names a place of the document instead of holding
a number. So every number that a reader sees can be traced to the document, and a test does so.
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
"""Letters that HTML cannot hold, and what is shown in their place."""


@dataclass(frozen=True)
class Shown:
    """A value of the document, written in a form of FORMS; `over`: what it is divided by first."""

    form: str
    key: Key
    over: Key | None = None


Phrase = str | Shown


def share(value: float) -> str:
    """0..1 in percent: 0.97311 is "97.31 %"."""
    return f"{100 * value:.2f} %"


def percent(value: float) -> str:
    """The same without its sign, where the sign stands nearby."""
    return f"{100 * value:.2f}"


def points(value: float) -> str:
    """A difference of shares in points, with its sign: -0.0004 is "-0.04", with a true minus sign."""
    return _signed(f"{100 * value:+.2f}")


def change(value: float) -> str:
    """A part that something grew by, in percent, from the quotient: 1.02 is "+2.0 %"."""
    return f"{_signed(f'{100 * (value - 1):+.1f}')} %"


def _signed(text: str) -> str:
    return text[1:] if not text.strip("+-0.") else text.replace("-", MINUS)


def count(value: int) -> str:
    """A whole number with commas between thousands."""
    return f"{value:,}"


def size(value: int) -> str:
    """Bytes in the largest power of ten that leaves a whole number: "4.3 MB", "12.40 GB"."""
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


def times(value: float) -> str:
    """A quotient of two sizes or times: "3.1", "0.45", "210"."""
    return f"{value:,.{2 if value < 1 else 1 if value < 100 else 0}f}"


def decimal(value: float) -> str:
    """A number of order 1, such as an IoU or a perplexity, to three places."""
    return f"{value:,.3f}".replace("-", MINUS) if abs(value) < LARGEST_FIXED else amount(value)


def short(value: float) -> str:
    """A metric of one answer: 0, 1, or something between to three digits."""
    return f"{value:.3g}"


def p_value(value: float) -> str:
    """A p value; very small ones are only said to be small."""
    return f"< {SMALLEST_P}" if value < SMALLEST_P else f"{value:.3f}"


def plain(value: object) -> str:
    """A string as it is, a whole number without commas (a seed, a hash)."""
    return str(value)


FORMS: dict[str, Callable[[Any], str]] = {
    "share": share,
    "percent": percent,
    "points": points,
    "change": change,
    "count": count,
    "size": size,
    "amount": amount,
    "times": times,
    "decimal": decimal,
    "short": short,
    "p": p_value,
    "plain": plain,
}


def printable(text: str) -> str:
    """Text that HTML can hold: control characters become symbols, halves of surrogate pairs a question mark."""
    return text.translate(CONTROLS)


def short_label(name: str, length: int = LABEL_LENGTH) -> str:
    """A name on one line of letters that print, cut in its middle if it is long: both ends tell names apart."""
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split()) or "?"
    if len(clean) <= length:
        return clean
    head = (length - 1) * 2 // 3
    return f"{clean[:head]}\N{HORIZONTAL ELLIPSIS}{clean[head + 1 - length :]}"


class Document:
    """A report and its JSON form, in which values are looked up. Raises DataError for a number that JSON lacks."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.json: dict[str, Any] = asdict(report)
        for key, value in _numbers(self.json, ()):
            if not math.isfinite(value):
                raise DataError(f"report: {key_text(key)} is {value}, expected a finite number")

    def value(self, key: Key) -> Any:
        """What stands at that place."""
        found: Any = self.json
        for part in key:
            found = found[part]
        return found

    def text(self, piece: Phrase) -> str:
        """A piece as a reader sees it."""
        if isinstance(piece, str):
            return piece
        value = self.value(piece.key)
        return FORMS[piece.form](value if piece.over is None else value / self.value(piece.over))

    def sentence(self, pieces: Iterable[Phrase]) -> str:
        """All pieces, one after the other."""
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
    """A place as text, parts separated by dots; a dot or backslash in a part has a backslash before it.

    ("models", 2, "tasks", "rec", "acc@0.5", "value") is models.2.tasks.rec.acc@0\\.5.value; letters that do not print
    are written as in JSON.
    """
    return ".".join("".join(map(_key_letter, str(part))) for part in key)


def _key_letter(letter: str) -> str:
    if letter in ".\\":
        return f"\\{letter}"
    return letter if letter.isprintable() else f"\\u{ord(letter):04x}"
