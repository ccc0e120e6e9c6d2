"""Regular expressions that name modules, matched in a time that grows only with their own length.

They come with a checkpoint, and Python's `re` needs ages for some, such as "(a+)+$". So all places that a pattern may
have reached in a name are followed at once, as the bits of a whole number: bit i stands for the first i characters.
Method: R. D. Cameron et al., "Bitwise Data Parallelism in Regular Expression Matching" (PACT 2014).
"""

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import TypeAlias

from vlmdeploy.errors import ConfigError

MOST_PATTERNS = 2000  # of one checkpoint
MOST_CHARACTERS = 50_000  # of all its patterns together
DEEPEST_GROUP = 10
MOST_COPIES = 20  # of a character that is repeated {m,n} times
ATOM = re.compile(  # matches one character
    r"\\[^A-Za-z0-9\n]|\\[dDwWsS]|\[\^?(?:\\[^A-Za-z0-9\n]|\\[dDwWsS]|(?!--)[^\]\[\\&|~])+\]|[^\\\[\](){}*+?|^$]"
)
GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
REPEAT = re.compile(r"(?:([*+?])|\{(\d{1,3})(,?)(\d{0,3})\})\??(?![*+?{])")  # greedy or not: the same names match

Step: TypeAlias = Callable[[str, int], int]
"""From a name and the places reached in it to those reached after one more part of the pattern."""


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern that `check_patterns` allows matches the beginning of a name, as `re.match` would say."""
    return _compiled(pattern)(name, 1) != 0


def check_patterns(patterns: Collection[str], where: str) -> None:
    """Raise ConfigError, which begins with `where`, unless `matches` understands the patterns: no look-around, no
    references, and no repeated groups."""
    total = sum(map(len, patterns))
    if len(patterns) > MOST_PATTERNS or total > MOST_CHARACTERS:
        expected = f"at most {MOST_PATTERNS} with {MOST_CHARACTERS} are read"
        raise ConfigError(f"{where}: has {len(patterns)} patterns with {total} characters, {expected}")
    for pattern in patterns:
        try:
            _compiled(pattern)
        except _UnknownError as error:
            raise ConfigError(
                f"{where}: {pattern:.80}: not a regular expression that is read, from {str(error)!r:.40} on: expected "
                "characters, sets of them, each with * + ? or {m,n}, and groups with |"
            ) from error


class _UnknownError(Exception):
    """What is left of a pattern where it is not understood."""


@lru_cache(MOST_PATTERNS)
def _compiled(pattern: str) -> Step:
    parser = _Parser(pattern)
    step = parser.alternatives(0)
    if parser.rest:
        raise _UnknownError(parser.rest)
    return step


class _Parser:
    """Turns a pattern into a step, from left to right."""

    def __init__(self, pattern: str) -> None:
        self.rest = pattern

    def alternatives(self, depth: int) -> Step:
        """Sequences with | between them, up to a closing bracket or the end."""
        if depth > DEEPEST_GROUP:
            raise _UnknownError(self.rest)
        steps = [self._sequence(depth)]
        while self._take("|"):
            steps.append(self._sequence(depth))
        return _either(steps)

    def _sequence(self, depth: int) -> Step:
        steps: list[Step] = []
        while self.rest and self.rest[0] not in "|)":
            steps.append(self._part(depth))
        return _in_turn(steps)

    def _part(self, depth: int) -> Step:
        if self._take("^"):
            return lambda name, places: places & 1
        if self._take("$"):
            return lambda name, places: places & 1 << len(name)
        if self._match(GROUP):
            step = self.alternatives(depth + 1)
            if not self._take(")"):
                raise _UnknownError(self.rest)
            return _optional(step) if self._take("?") else step
        rest, atom = self.rest, self._match(ATOM)
        if atom is None or not _is_valid(atom[0]):
            raise _UnknownError(rest)
        return self._repeated(atom[0])

    def _repeated(self, atom: str) -> Step:
        """An atom as often as what follows it says."""
        one, rest, repeat = _one(atom), self.rest, self._match(REPEAT)
        if repeat is None:
            return one
        sign, least, comma, most = repeat.groups()
        if sign:
            return {"*": _any_number(atom), "+": _in_turn([one, _any_number(atom)]), "?": _optional(one)}[sign]
        first, last = int(least), int(most or least)
        if not first <= last <= MOST_COPIES:
            raise _UnknownError(rest)
        more = [_any_number(atom)] if comma and not most else [_optional(one)] * (last - first)
        return _in_turn([one] * first + more)

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.rest)
        self.rest = self.rest[found.end() :] if found else self.rest
        return found

    def _take(self, sign: str) -> bool:
        found = self.rest.startswith(sign)
        self.rest = self.rest[found:]
        return found


def _is_valid(atom: str) -> bool:
    try:
        re.compile(atom)
    except re.error:  # a range that ends before it starts
        return False
    return True


def _in_turn(steps: list[Step]) -> Step:
    def in_turn(name: str, places: int) -> int:
        for step in steps:
            places = places and step(name, places)
        return places

    return in_turn


def _either(steps: list[Step]) -> Step:
    def either(name: str, places: int) -> int:
        found = 0
        for step in steps:
            found |= step(name, places)
        return found

    return either if len(steps) > 1 else steps[0]


def _optional(step: Step) -> Step:
    return lambda name, places: places | step(name, places)


def _one(atom: str) -> Step:
    return lambda name, places: (places & _fitting(atom, name)) << 1


def _any_number(atom: str) -> Step:
    """Adding fills a run of ones from each place on: the carry runs through it and flips it."""

    def any_number(name: str, places: int) -> int:
        fitting = _fitting(atom, name)
        return ((places & fitting) + fitting ^ fitting) | places

    return any_number


@lru_cache(10_000)
def _fitting(atom: str, name: str) -> int:
    """Which characters of a name an atom matches: bit i stands for character i."""
    is_one = re.compile(atom).match
    return sum(1 << place for place, character in enumerate(name) if is_one(character))
