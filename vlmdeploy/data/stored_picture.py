"""A base64 picture inside a table file: holds its place, not its content, so tables may have many gigabytes."""

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.errors import DataError
from vlmdeploy.input_files import open_input

LONGEST_TEXT = 2**28  # base64 characters


@dataclass(frozen=True)
class StoredPicture:
    """`length` bytes of base64 text at `offset` of `file`, and their sha256; equal if the texts are."""

    file: Path
    sha256: str
    offset: int = field(compare=False)
    length: int = field(compare=False)
    name: str = field(compare=False)

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """Decode the picture file. Raises DataError if the table has changed or the text is not base64."""
        if self.length > LONGEST_TEXT:
            found = f"{shown_size(self.length)} of base64, at most {shown_size(LONGEST_TEXT)} are read"
            raise DataError(f"{self.name}: its picture has {found}")
        with open_input(self.file, DataError, f"the table with the picture of {self.name}") as table:
            try:
                table.seek(self.offset)
                text = table.read(self.length)
            except OSError as error:
                raise DataError(f"{self.name}: {self.file} cannot be read ({error.strerror})") from error
        if hashlib.sha256(text).hexdigest() != self.sha256:
            raise DataError(f"{self.name}: {self.file} was changed while it was in use; start again")
        return decode_picture(text, self.name)


def decode_picture(text: bytes, name: str) -> bytes:
    """Decode base64, with or without a data URL's prefix. Raises DataError, naming the picture."""
    payload = text.partition(b",")[2] if text.startswith(b"data:") else text
    try:
        return base64.b64decode(b"".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name}: its picture is not valid base64 ({error}); it starts with {text[:40]!r}") from error
