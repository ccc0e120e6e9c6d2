"""What a compiled Python library offers: its classes, their members, and how the members are called.

Read from the docstrings that pybind11 writes, in a process of its own: `python -m tests.library_interface MODULE`.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Member:
    """Something of a class. signatures: of a method, one for each overload, with `self`; kind: what an attribute is."""

    signatures: tuple[str, ...] = ()
    kind: str = ""
    is_settable: bool = False


@dataclass(frozen=True)
class Interface:
    """A library: class -> name -> member. The class "" holds what stands in the module itself."""

    version: str
    classes: dict[str, dict[str, Member]]

    def member(self, owner: str, name: str) -> Member | None:
        return self.classes.get(owner, {}).get(name)


@dataclass(frozen=True)
class Signature:
    """A call: what it takes, with whether each may be left out, and the class of what it gives."""

    parameters: dict[str, bool]
    returns: str

    def takes(self, positional: int, keywords: tuple[str, ...]) -> bool:
        names = list(self.parameters)
        given = {*names[:positional], *keywords}
        needed = {name for name, is_optional in self.parameters.items() if not is_optional}
        fits = positional <= len(names) and not set(keywords) & set(names[:positional])
        return fits and needed <= given <= set(names)


def parse_signature(text: str) -> Signature:
    """Of "name(self: A, index: int = 0) -> B"."""
    head, _, returns = text.rpartition(" -> ")
    parts = _split(head[head.index("(") + 1 : -1])
    return Signature({part.partition(":")[0]: " = " in part for part in parts}, returns)


def _split(text: str) -> list[str]:
    """The parts between commas that no bracket surrounds."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def parse_interface(text: str) -> Interface:
    """What this module prints of another one."""
    content = json.loads(text)
    classes = {
        owner: {name: Member(tuple(signatures), *rest) for name, (signatures, *rest) in members.items()}
        for owner, members in content["classes"].items()
    }
    return Interface(content["version"], classes)


def _describe(module: Any) -> dict[str, Any]:
    found = {kind.__qualname__: kind for kind in _classes(module)}
    classes = {name: {key: _member(kind, key) for key in dir(kind)} for name, kind in found.items()}
    classes[""] = {name: _member(module, name) for name in dir(module)}
    return {"version": module.__version__, "classes": classes}


def _classes(owner: Any) -> Iterator[type]:
    """Classes of a module, and those inside them."""
    for name, value in vars(owner).items():
        if isinstance(value, type) and not name.startswith("_"):
            yield value
            yield from _classes(value)


def _member(owner: Any, name: str) -> tuple[list[str], str, bool]:
    value = getattr(owner, name)
    if isinstance(value, property):
        returns = (value.fget.__doc__ or "").strip().rpartition(" -> ")[2]
        return [], _plain(returns), value.fset is not None
    if callable(value) and not isinstance(value, type):
        return [_plain(text) for text in _signatures(name, value.__doc__ or "")], "", False
    return [], value.__qualname__ if isinstance(value, type) else type(value).__qualname__, False


def _signatures(name: str, text: str) -> list[str]:
    """The lines of a docstring that tell how a method is called; the head of an overloaded one tells nothing."""
    return re.findall(rf"^(?:\d+\. )?({re.escape(name)}\(.*\) -> .+)$", text, re.MULTILINE)


def _plain(text: str) -> str:
    """Types without where they stand; where pybind11 knew only the C++ name, the Python one."""
    text = re.sub(r"\btensorrt_(?:rtx_)?bindings\.tensorrt(?:_rtx)?\.", "", text)
    return re.sub(r"\b\w+::(\w+)", r"\1", text).replace("IParserError", "ParserError")


if __name__ == "__main__":
    print(json.dumps(_describe(import_module(sys.argv[1]))))
