"""From OpenAI-style messages to prompt ids, and from new ids back to text.

The project's only prompt renderer: training, calibration and verification use it too. The bundle defines what a prompt
looks like (ChatTemplate, TokenRules); this module follows it. It collects pictures but does not open them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tokenizers
from PIL import Image

from vlmdeploy.errors import BundleError, PromptError, shown
from vlmdeploy.layout import prompt_of
from vlmdeploy.manifest import ChatTemplate, Piece, TokenRules
from vlmdeploy.runtime.image import ImageSource, is_url
from vlmdeploy.tokenizer_file import library_errors, read_tokenizer

Message: TypeAlias = Mapping[str, Any]

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoders write it for invalid or incomplete UTF-8


@dataclass(frozen=True)
class Turn:
    """A question and its answer; the last, open turn has none yet. images: the number of characters of the question
    before each of its images."""

    user: str
    assistant: str | None = None
    images: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Checked messages: at least one turn, only the last one open; unopened images in the order given; the system
    message."""

    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    system: str | None = None


class ImageMark:
    """Stands for an image's rows in a rendered prompt."""


IMAGE_MARK = ImageMark()
Part: TypeAlias = str | int | ImageMark


def read_messages(messages: Sequence[Message], max_images: int, allow_local: bool = False) -> Conversation:
    """The conversation in OpenAI-style messages: user and assistant alternate, the user first and last; a system
    message, which is a text, may stand before them.

    `content` is a string or a list of parts {"type": "text", "text"}, {"type": "image", "image": path, bytes or Pillow
    image} and {"type": "image_url", "image_url": {"url": data URL, or with allow_local a path}}; texts are joined
    without a separator. Raises PromptError for anything else, and for more images than the model has slots.
    """
    if not isinstance(messages, list | tuple):
        raise PromptError(f"messages are a {type(messages).__name__}, expected a list of {{role, content}}")
    if not messages[_has_system(messages) :]:
        raise PromptError("the list of messages is empty, expected at least one from the user")
    has_system = _has_system(messages)
    system = _read_content(messages[0], "message 0", allow_local)[0].user if has_system else None
    read: list[Turn] = []
    images: list[ImageSource] = []
    for place, message in enumerate(messages[has_system:]):
        index = place + has_system
        _check_role(message, index, place)
        turn, message_images = _read_content(message, f"message {index}", allow_local)
        read.append(turn)
        images.extend(message_images)
    if len(read) % 2 == 0:
        raise PromptError("the last message is from the assistant, expected one from the user to answer")
    _check_image_count(len(images), max_images)
    past = [replace(asked, assistant=told.user) for asked, told in zip(read[0:-1:2], read[1::2], strict=True)]
    return Conversation((*past, read[-1]), tuple(images), system)


def render(turns: Sequence[Turn], template: ChatTemplate, system: str | None = None) -> list[Part]:
    """The prompt as texts, token ids and images in order; joins neighbouring texts and leaves out empty ones. Raises
    PromptError for a system message that the template has no place for."""
    if system is not None and not template.system:
        raise PromptError("message 0 is a system message; this model's prompt has no place for one")
    parts: list[Part] = []
    told = template.default_system if system is None else system
    for piece in template.system:
        _append(parts, told if piece.kind == "system" else piece.text)
    for turn in turns:
        pieces = template.last_turn if turn.assistant is None else template.past_turn
        for piece in pieces:
            for part in _asked(turn, template) if piece.kind == "user" else [_rendered(piece, turn)]:
                _append(parts, part)
    return parts


def _asked(turn: Turn, template: ChatTemplate) -> Iterator[Part]:
    """The question of a turn, and its images where the template wants them within it."""
    start = 0
    for place in turn.images if template.image else ():
        if template.image_place == "here":
            yield turn.user[start:place]
            start = place
        yield from (_rendered(piece, turn) for piece in template.image)
    yield turn.user[start:]


class Tokenizer:
    """A tokenizer.json whose special tokens cannot be typed: in a text, "</s>" is four characters."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizer of the tokenizers library, changing its settings in place."""
        tokenizer.encode_special_tokens = True  # the library's name for "special tokens in a text are plain text"
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        vocabulary, added = tokenizer.get_vocab(with_added_tokens=True), tokenizer.get_added_tokens_decoder()
        byte_ids = {token_id for token, token_id in vocabulary.items() if BYTE_TOKEN.fullmatch(token)}
        self._byte_and_special_ids = byte_ids | {token_id for token_id, token in added.items() if token.special}

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "Tokenizer":
        """The tokenizer in the content of a tokenizer.json. Raises BundleError, naming `where`."""
        return cls(read_tokenizer(content, where, BundleError))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or any other special token."""
        with library_errors("the tokenizer cannot read the text", PromptError):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special tokens; invalid UTF-8 becomes U+FFFD."""
        with library_errors("the tokenizer cannot write the answer", BundleError):
            return str(self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=True))

    def ends_byte_run(self, token_id: int) -> bool:
        """Whether this id ends a run of byte tokens; ids without text of their own do not."""
        return token_id not in self._byte_and_special_ids and self._tokenizer.id_to_token(token_id) is not None


class StreamDecoder:
    """Turns ids into text as they arrive. All pieces, including the one from `finish`, join to the decoded whole.

    Holds back text that later ids may change: incomplete UTF-8, and unfinished runs of byte tokens, because decoders
    judge a run as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # ids that affect later text
        self._given_chars = 0  # of the window's text

    def add(self, token_id: int) -> str:
        """The text that the next id makes certain, possibly none."""
        self._window.append(int(token_id))
        if not self._tokenizer.ends_byte_run(int(token_id)):
            return ""
        text = self._tokenizer.decode(self._window)
        certain = text.rstrip(REPLACEMENT)
        piece = certain[self._given_chars :]
        self._given_chars += len(piece)
        if certain == text:
            self._shorten_window()
        return piece

    def finish(self) -> str:
        """The text held back, once no more ids come."""
        rest = self._tokenizer.decode(self._window)[self._given_chars :]
        self._window, self._given_chars = [], 0
        return rest

    def _shorten_window(self) -> None:
        """Keep only the last id, so that a long answer takes linear time.

        One id with visible text must stay: decoders drop the leading space of the first text.
        """
        text = self._tokenizer.decode(self._window[-1:])
        if text:
            self._window, self._given_chars = self._window[-1:], len(text)


def prompt_ids(
    conversation: Conversation, template: ChatTemplate, tokens: TokenRules, tokenizer: Tokenizer
) -> npt.NDArray[np.int64]:
    """Prompt ids int64 [L]: BOS, then the rendered conversation, with a placeholder for every row of its images; these
    follow BOS unless the template puts them into their turns."""
    ids: list[int] = []
    for part in render(conversation.turns, template, conversation.system):
        if isinstance(part, ImageMark):
            ids.extend([tokens.placeholder_id] * tokens.rows_per_image)
        else:
            ids.extend([part] if isinstance(part, int) else tokenizer.encode(part))
    return prompt_of(ids, tokens, 0 if template.image else len(conversation.images))


def _has_system(messages: Sequence[Message]) -> bool:
    """Whether the first message is a system message."""
    return bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"


def _check_role(message: Message, index: int, place: int) -> None:
    """Require messages in even places from the user and in odd ones from the assistant."""
    if not isinstance(message, Mapping):
        raise PromptError(f"message {index} is a {type(message).__name__}, expected {{role, content}}")
    role, expected = message.get("role"), ("user", "assistant")[place % 2]
    if role == "system":
        raise PromptError(f"message {index} is a system message, expected it before all others")
    if role not in ("user", "assistant"):
        raise PromptError(f'message {index} has the role {shown(role)}, expected "user" or "assistant"')
    if role != expected:
        raise PromptError(f"message {index} is from the {role}, expected {expected}: they take turns, the user first")


def _read_content(message: Message, where: str, allow_local: bool) -> tuple[Turn, list[ImageSource]]:
    """Text and images of one message, the text as that of a user."""
    content = message.get("content")
    if isinstance(content, str):
        return Turn(_checked_text(content, where)), []
    if not isinstance(content, list | tuple):
        raise PromptError(f"{where}: content is a {type(content).__name__}, expected a string or a list of parts")
    text, images, places = "", list[ImageSource](), list[int]()
    for index, part in enumerate(content):
        part_where = f"{where}, part {index}"
        if _part_type(part, part_where) == "text":
            text += _checked_text(part.get("text"), part_where)
        elif message["role"] == "user":
            images.append(_read_image(part, part_where, allow_local))
            places.append(len(text))
        else:
            found = f"an image from the {message['role']}"
            raise PromptError(f"{part_where}: {found}, expected images from the user only")
    return Turn(text, images=tuple(places)), images


def _part_type(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "image_url"):
        found = f"type {shown(kind)}" if isinstance(part, Mapping) else f"a {type(part).__name__}"
        raise PromptError(f'{where}: {found}, expected an object of type "text", "image" or "image_url"')
    return str(kind)


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"{where}: text is a {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a command line passes invalid UTF-8 as lone surrogates
        raise PromptError(f"{where}: text is not valid UTF-8 at character {error.start}") from error
    return text


def _read_image(part: Message, where: str, allow_local: bool) -> ImageSource:
    source = part.get("image")
    if part["type"] == "image_url":
        holder = part.get("image_url")
        source = holder.get("url") if isinstance(holder, Mapping) else None
        if not isinstance(source, str):
            raise PromptError(f'{where}: expected {{"type": "image_url", "image_url": {{"url": data URL}}}}')
        if not (allow_local or is_url(source)):
            raise PromptError(
                f"{where}: image_url is no data URL; give a path as image, or open the bundle with allow_local=True"
            )
    if not isinstance(source, str | PathLike | bytes | Image.Image):
        raise PromptError(f"{where}: image is a {type(source).__name__}, expected a path, bytes or a Pillow image")
    return source


def _check_image_count(found: int, max_images: int) -> None:
    if max_images == 0:  # any number
        return
    if found > max_images == 1:
        raise PromptError(f"{found} images given: an image was given to a second image slot, and this model has one")
    if found > max_images:
        raise PromptError(f"{found} images given, but this model has {max_images} image slots")


def _rendered(piece: Piece, turn: Turn) -> Part:
    if piece.kind == "token":
        return piece.token_id
    if piece.kind == "image":
        return IMAGE_MARK
    if piece.kind == "assistant":
        assert turn.assistant is not None, "a template for the open turn has no place for an answer"
        return turn.assistant
    return piece.text


def _append(parts: list[Part], part: Part) -> None:
    if isinstance(part, str) and parts and isinstance(last := parts[-1], str):
        parts[-1] = last + part
    elif part != "":
        parts.append(part)
