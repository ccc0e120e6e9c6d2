"""Read a tokenizer.json from anywhere, with the errors of the tokenizers library as ours.

The library trusts some values: odd ones end the process, take any amount of memory, or fail at the first prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import tokenizers

from vlmdeploy.errors import VlmdeployError
from vlmdeploy.records import Config, parse_object

UNCHECKED = ("Precompiled", "FixedLength")  # types of parts whose values the library does not check
LENGTHENING = ("Replace", "Prepend")  # types of parts that put their `content` or `prepend` into a text
MOST_LENGTHENING = 64  # times, of all parts in a row
PANIC = "PanicException"  # an error in the library's Rust code, no Exception
PROBE = "a 1 é\N{GRINNING FACE}\n"


def read_tokenizer(content: bytes, where: str, error: type[VlmdeployError]) -> tokenizers.Tokenizer:
    """The tokenizer in the content of a tokenizer.json. Raises `error`, naming `where`, if it cannot be used."""
    problem = _problem(parse_object(content, where, error))
    if problem:
        raise error(f"{where}: has {problem}, which no supported family uses and is not read")
    with library_errors(f"{where}: not a valid tokenizer.json", error):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        _try(tokenizer)
    return tokenizer


@contextmanager
def library_errors(message: str, error: type[VlmdeployError]) -> Iterator[None]:
    """Raise `error` for whatever the library raises in the block, which is nothing more specific."""
    try:
        yield
    except BaseException as found:
        if not isinstance(found, Exception) and type(found).__name__ != PANIC:
            raise
        raise error(f"{message} ({found})") from found


def _problem(document: Config) -> str:
    """What the library should not be given; "" if there is nothing."""
    texts = list(_parts(document.get("normalizer")))
    for part in (*texts, *_parts(document.get("pre_tokenizer"))):
        if part.get("type") in UNCHECKED:
            return str(part["type"])
    for parts in (texts, list(_parts(document.get("decoder")))):
        if prod(1 + _length(part) for part in parts if part.get("type") in LENGTHENING) > MOST_LENGTHENING:
            return f"parts that make a text more than {MOST_LENGTHENING} times as long"
    model = document.get("model")
    if isinstance(model, dict) and model.get("type") == "BPE" and model.get("continuing_subword_prefix"):
        return "BPE with a continuing_subword_prefix"
    return ""


def _parts(part: Any) -> Iterator[Config]:
    """A part of a tokenizer and the parts that it holds."""
    if isinstance(part, dict):
        yield part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _parts(inner)


def _length(part: Config) -> int:
    return len(str(part.get("content", part.get("prepend", ""))))


def _try(tokenizer: tokenizers.Tokenizer) -> None:
    """Run every part on a short text. Raises what the library raises, and its panics."""
    text = tokenizer.normalizer.normalize_str(PROBE) if tokenizer.normalizer else PROBE
    words = tokenizer.pre_tokenizer.pre_tokenize_str(text) if tokenizer.pre_tokenizer else [(text, None)]
    tokenizer.decode([token.id for word, _ in words for token in tokenizer.model.tokenize(word)])
