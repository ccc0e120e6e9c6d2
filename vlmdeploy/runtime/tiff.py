"""The tags of a TIFF file, as far as they decide what opening it costs: Pillow makes a Python number, or a tile, of
every number in a tag, which takes up to a hundred times the file.

Source: TIFF 6.0, section 2, and the layout of BigTIFF.
"""

import struct

MOST_NUMBERS = 2**18  # in one tag; strips of one row of a picture of 65,535 rows have fewer
MOST_TAGS = 2**16  # in one directory
MOST_DIRECTORIES = 16
BYTE_TYPES = {1, 2, 7}  # bytes, text, undefined: stay as they are
DIRECTORIES = {330, 34665, 34853, 40965}  # SubIFDs, EXIF, GPS, interoperability: tags that point to more tags


def check_tags(content: bytes) -> None:
    """Raise ValueError if a tag of the first picture holds more numbers than any picture needs.

    Tags that reach beyond the end of the file are left to Pillow, which passes them over.
    """
    order = "<" if content.startswith(b"I") else ">"
    is_big = content[2:3] == b"+"
    header, num_tags, entry = ("8xQ", "Q", "HHQQ") if is_big else ("4xI", "H", "HHII")
    try:
        pending = [*struct.unpack_from(order + header, content)]
        for _ in range(MOST_DIRECTORIES):
            if not pending:
                return
            pending += _check_directory(content, pending.pop(0), order + num_tags, order + entry)
    except (struct.error, OverflowError):
        return
    raise ValueError(f"it has more than {MOST_DIRECTORIES} directories of tags")


def _check_directory(content: bytes, place: int, num_tags: str, entry: str) -> list[int]:
    """The directories that this one points to."""
    (found,) = struct.unpack_from(num_tags, content, place)
    pointers = []
    first, width = place + struct.calcsize(num_tags), struct.calcsize(entry)
    if found > MOST_TAGS and first + MOST_TAGS * width < len(content):
        raise ValueError(f"it has {found:,} tags")
    for start in range(first, first + found * width, width):
        tag, kind, count, value = struct.unpack_from(entry, content, start)
        if MOST_NUMBERS < count < len(content) and kind not in BYTE_TYPES:
            raise ValueError(f"its tag {tag} holds {count:,} numbers, at most {MOST_NUMBERS:,} are read")
        if tag in DIRECTORIES:
            pointers.append(value)
    return pointers
