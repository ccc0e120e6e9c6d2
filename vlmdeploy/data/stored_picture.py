"""A picture in base64 inside a table file: its place, not its content, so that tables of many gigabytes can be used."""

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from vlmdeploy.errors import DataError


@dataclass(frozen=True)
class StoredPicture:
    """Its base64 text is `length` bytes at `offset` of `file`; sha256 is that text's. Two are equal if the texts are.

    name: what messages call it.
    """

    file: Path
    sha256: str
    offset: int = field(compare=False)
    length: int = field(compare=False)
    name: str = field(compare=False)

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """The picture's own file. Raises DataError if the table has changed, or the text is no base64."""
        try:
            with self.file.open("rb") as table:
                table.seek(self.offset)
                text = table.read(self.length)
        except OSError as error:
            raise DataError(f"{self.name}: {self.file} cannot be read ({error.strerror})") from error
        if hashlib.sha256(text).hexdigest() != self.sha256:
            raise DataError(f"{self.name}: {self.file} was changed while it was in use; start again")
        return decode_picture(text, self.name)


def decode_picture(text: bytes, name: str) -> bytes:
    """What base64 stands for; a data URL's beginning is left out. Raises DataError, naming the picture."""
    payload = text.partition(b",")[2] if text.startswith(b"data:") else text
    try:
        return base64.b64decode(b"".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: its picture is not valid base64 ({error}); it starts with {text[:40]!r}") from error
