"""The headers of a JPEG 2000 file, as far as they decide what decoding it costs: sizes, tiles, code blocks.

Source: ITU-T T.800, annexes A (codestream) and I (boxes). The pixels are Pillow's business.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

SOC, SIZ, COD, COC, SOT, SOD = 0xFF4F, 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93
MOST_SEGMENTS = 100_000  # of all headers together; a picture of 65,535 tiles has no need for more


@dataclass(frozen=True)
class Codestream:
    """size, tile_size: width and height in pixels; sample_bytes: of every component; levels: how often the picture can
    be halved; blocks: code blocks per sample."""

    size: tuple[int, int]
    tile_size: tuple[int, int]
    num_tiles: int
    sample_bytes: tuple[int, ...]
    levels: int
    blocks: float


def read_codestream(content: bytes) -> Codestream:
    """Read all headers of a file or a bare codestream. Raises ValueError if they are cut or make no sense."""
    try:
        segments = list(islice(_segments(content, _start(content)), MOST_SEGMENTS))
        sizes = next(payload for marker, payload in segments if marker == SIZ)
        x1, y1, x0, y0, tile_width, tile_height, tile_x0, tile_y0, components = struct.unpack_from(">8IH", sizes, 2)
        depths = struct.unpack_from(f">{3 * components}B", sizes, 36)[::3]
        codings = [_levels_and_blocks(*segment, components) for segment in segments if segment[0] in (COD, COC)]
        if not (codings and tile_width and tile_height and x1 > x0 and y1 > y0):
            raise ValueError("its sizes are zero, or its coding is not stated")
    except (struct.error, IndexError, StopIteration) as error:
        raise ValueError("its headers are cut") from error
    if len(segments) == MOST_SEGMENTS:
        raise ValueError(f"it has {MOST_SEGMENTS:,} header segments or more")
    return Codestream(
        size=(x1 - x0, y1 - y0),
        tile_size=(min(tile_width, x1 - x0), min(tile_height, y1 - y0)),
        num_tiles=-(-(x1 - tile_x0) // tile_width) * -(-(y1 - tile_y0) // tile_height),
        sample_bytes=tuple(1 if depth & 0x7F < 8 else 2 if depth & 0x7F < 16 else 4 for depth in depths),
        levels=min(levels for levels, _ in codings),
        blocks=max(blocks for _, blocks in codings),
    )


def _start(content: bytes) -> int:
    """Where the codestream starts: at once, or in the box `jp2c`."""
    if content.startswith(struct.pack(">H", SOC)):
        return 0
    place = 0
    while True:
        length, kind = struct.unpack_from(">I4s", content, place)
        header = 8
        if length == 1:
            header, length = 16, struct.unpack_from(">Q", content, place + 8)[0]
        if kind == b"jp2c":
            return place + header
        if length < header:
            raise ValueError("it holds no codestream")
        place += length


def _segments(content: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    """Marker and payload of every segment of the main header and of the headers of tile parts."""
    place, tile_part = place + 2, 0
    while place + 4 <= len(content):  # what is cut off was not needed, or its absence is noticed
        (marker,) = struct.unpack_from(">H", content, place)
        if marker == SOD:
            (tile_part_bytes,) = struct.unpack_from(">I", content, tile_part + 6)
            if tile_part_bytes < 14:  # 0: up to the end
                return
            place = tile_part + tile_part_bytes
            continue
        if not 0xFF00 < marker < 0xFFFF or marker == 0xFFD9:  # the end, or what no decoder follows either
            return
        if marker == SOT:
            tile_part = place
        (length,) = struct.unpack_from(">H", content, place + 2)
        yield marker, content[place + 4 : place + 2 + length]
        place += 2 + max(2, length)


def _levels_and_blocks(marker: int, payload: bytes, components: int) -> tuple[int, float]:
    """COD: style, order, layers, transform; COC: component, style; in both then levels, block, transform, precincts."""
    style, rest = (payload[0], 5) if marker == COD else (payload[1], 2) if components < 257 else (payload[2], 3)
    levels, width, height = payload[rest], (payload[rest + 1] & 15) + 2, (payload[rest + 2] & 15) + 2
    if not style & 1:
        return levels, 0.5 ** (width + height)
    blocks = 0.0
    for resolution in range(levels + 1):  # of 0, the smallest, up to `levels`, the whole picture
        precinct = payload[rest + 5 + resolution]
        edges = min(width, max(0, (precinct & 15) - 1)) + min(height, max(0, (precinct >> 4) - 1))
        share = 0.25 ** (levels - resolution) * (0.75 if resolution else 1)  # of the samples
        blocks += share * 0.5**edges
    return levels, blocks
