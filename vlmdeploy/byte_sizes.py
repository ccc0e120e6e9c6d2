"""Sizes in bytes, read and written like 9.0GB."""

import math
import re

from vlmdeploy.errors import ConfigError

UNIT_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) *(?P<unit>[KMGT]?B)", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Bytes from "9.0GB", "450MB" and the like, powers of ten. Raises ConfigError, naming the option."""
    match = SIZE.fullmatch(text.strip())
    size = float(match["number"]) * UNIT_BYTES[match["unit"].upper()] if match is not None else math.inf
    if size == math.inf:  # no match, or a number of hundreds of digits
        raise ConfigError(f'{option} "{text:.80}": expected a size such as 9.0GB or 450MB')
    return round(size)


def megabytes(size: int) -> str:
    """Bytes in units of 10^6."""
    return f"{size / 1e6:,.1f} MB"


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9."""
    return f"{size / 1e9:.1f} GB"


def shown_size(size: int) -> str:
    """Bytes in the unit that suits a message: 512 bytes, 1.5 MB, 3.2 GB."""
    if size < 10**5:
        return f"{size:,} bytes"
    return megabytes(size) if size < 10**9 else gigabytes(size)
