"""What is inside a TensorRT-RTX plan, read from its bytes without a GPU: constants, kernels, inputs of each profile.

The text in a plan is not documented and changes with the release: this serves the tests, and only them.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PROFILE = re.compile(rb"header \{\n")
CONSTANT = re.compile(rb'const_payload_size=(\d+) [^\n]*?name="([^"]+)"[^\n]*? type=(\w+)')
KERNEL = re.compile(rb"\n *(?:function|runtime_fusion)=\{ name=(\S+)[^\n]*")
INPUTS = re.compile(rb"\n *inputs=\{([^\n]*)\}")
REGION = re.compile(rb"region = \{ name=(\S+) size=(\d+)[^\n]*place=accelerator")


@dataclass(frozen=True)
class Profile:
    """One optimization profile. constant_bytes: type -> bytes; kernels in the order they run; inputs by name."""

    constant_bytes: dict[str, int]
    kernels: tuple[str, ...]
    inputs: tuple[str, ...]
    scratch_bytes: int


def read_plan(path: Path) -> list[Profile]:
    """The profiles of a plan, in order. Parts that are finished on the device have headers of their own, and no kernels
    of their own: they are left out."""
    content = path.read_bytes()
    starts = [match.start() for match in PROFILE.finditer(content)] + [len(content)]
    found = [_profile(content[start:stop]) for start, stop in pairwise(starts)]
    return [profile for profile in found if profile.kernels]


def _profile(text: bytes) -> Profile:
    constants = {name: (kind.decode(), int(size)) for size, name, kind in CONSTANT.findall(text)}
    sizes: dict[str, int] = {}
    for kind, size in constants.values():
        sizes[kind] = sizes.get(kind, 0) + size
    named = INPUTS.search(text)
    inputs = re.findall(r'"([^"]+)"', named[1].decode()) if named else []
    scratch = sum(int(size) for name, size in REGION.findall(text) if name.startswith(b"devmem"))
    kernels = tuple(name.decode() for name in KERNEL.findall(text))
    return Profile(sizes, kernels, tuple(inputs), scratch)
