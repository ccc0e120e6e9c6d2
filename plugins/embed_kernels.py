"""Writes the compiled kernels (index.json and one sm_XX.zip per architecture) as one C++ source file with their images
and the table of src/kernel_table.h. Standard library only: it runs while the plugin is built.

    python3 embed_kernels.py --kernels ../vlmdeploy/kernels/compiled --out embedded_kernels.cpp [--architectures 87,110]
"""

import argparse
import hashlib
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1  # of index.json
PACKING = 1  # layout of codes, scales and bias; src/shapes.cpp checks it
ACTIVATIONS = {"fp16", "bf16"}
GROUP_SIZES = {32, 64, 128}
BYTES_A_LINE = 48


class KernelsError(Exception):
    """Compiled kernels that cannot be embedded; the message names the file."""


@dataclass(frozen=True)
class Kernel:
    """One entry of the index with its image. The partition has group_size 0 and activation ""."""

    name: str
    architecture: int
    kind: str
    activation: str
    group_size: int
    block_rows: int
    block_columns: int
    num_warps: int
    shared_bytes: int
    symbol: str
    cubin_sha256: str
    image: bytes = b""


@dataclass(frozen=True)
class Choice:
    """The most tokens for an architecture's gemv and for its small gemm."""

    gemv_up_to_tokens: int
    small_gemm_up_to_tokens: int


def read_kernels(folder: Path, architectures: list[int] | None = None) -> tuple[list[Kernel], dict[int, Choice]]:
    """Read kernels with their images, and the choice per architecture; architectures None: all. Raises KernelsError."""
    index = _read_index(folder / "index.json")
    try:
        entries = [_entry(item) for item in index["kernels"]]
        choices = {int(key): Choice(**_integers(value, Choice)) for key, value in index["choice"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KernelsError(f"{folder / 'index.json'}: not a list of kernels ({error!r})") from error
    known = sorted({entry.architecture for entry in entries})
    for architecture in architectures or ():
        if architecture not in known:
            raise KernelsError(f"{folder}: no kernels for SM {architecture}, there are {', '.join(map(str, known))}")
    chosen = sorted(set(architectures or known))
    if not chosen:
        raise KernelsError(f"{folder / 'index.json'} lists no kernels")
    kernels = [entry for architecture in chosen for entry in _read_images(folder, architecture, entries)]
    for architecture in chosen:
        _check_complete(folder, architecture, kernels, choices)
    return kernels, {architecture: choices[architecture] for architecture in chosen}


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise KernelsError(f"{path}: cannot be read ({error})") from error
    if not isinstance(index, dict):
        raise KernelsError(f"{path}: not a list of kernels")
    for key, wanted in (("format", FORMAT), ("packing", PACKING)):
        if index.get(key) != wanted:
            raise KernelsError(f"{path}: {key} is {index.get(key)!r}, this plugin reads {wanted}")
    return index


def _integers(value: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The entry's values for the integer fields of a dataclass."""
    found = {name: value[name] for name, field in kind.__dataclass_fields__.items() if field.type is int}
    for name, number in found.items():
        if type(number) is not int or not 0 <= number < 1 << 31:
            raise ValueError(f"{name} is {number!r}")
    return found


def _entry(item: dict[str, Any]) -> Kernel:
    texts = {name: item[name] for name in ("name", "kind", "activation", "symbol", "cubin_sha256")}
    if not all(isinstance(text, str) and text.isascii() and text.isprintable() for text in texts.values()):
        raise ValueError(f"a kernel with texts {texts}")
    kernel = Kernel(**texts, **_integers(item, Kernel))
    is_partition = (kernel.kind, kernel.activation, kernel.group_size) == ("partition", "", 0)
    is_linear = kernel.kind in ("gemv", "gemm") and kernel.activation in ACTIVATIONS
    if not is_partition and not (is_linear and kernel.group_size in GROUP_SIZES):
        raise ValueError(
            f"{kernel.name}: kind {kernel.kind}, activation {kernel.activation}, group {kernel.group_size}"
        )
    if min(kernel.block_rows, kernel.block_columns, kernel.num_warps) < 1:
        raise ValueError(
            f"{kernel.name}: blocks of {kernel.block_rows} x {kernel.block_columns}, {kernel.num_warps} warps"
        )
    return kernel


def _read_images(folder: Path, architecture: int, entries: list[Kernel]) -> list[Kernel]:
    """The kernels of an architecture; checks each image's hash."""
    path = folder / f"sm_{architecture}.zip"
    kernels = []
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in (entry for entry in entries if entry.architecture == architecture):
                image = archive.read(f"{entry.name}.cubin")
                if hashlib.sha256(image).hexdigest() != entry.cubin_sha256:
                    raise KernelsError(f"{path}: {entry.name}.cubin does not have the hash that index.json says")
                kernels.append(Kernel(**{**vars(entry), "image": image}))
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise KernelsError(f"{path}: cannot be read ({error})") from error
    return kernels


def _check_complete(folder: Path, architecture: int, kernels: list[Kernel], choices: dict[int, Choice]) -> None:
    """Raise KernelsError unless every activation and group size can serve any number of tokens."""
    where = f"{folder / 'index.json'}: SM {architecture}"
    ours = [kernel for kernel in kernels if kernel.architecture == architecture]
    if architecture not in choices:
        raise KernelsError(f"{where} has no choice by number of tokens")
    if sum(kernel.kind == "partition" for kernel in ours) != 1:
        raise KernelsError(f"{where} has not exactly one partition kernel")
    for activation in sorted(ACTIVATIONS):
        for group_size in sorted(GROUP_SIZES):
            kinds = [k.kind for k in ours if (k.activation, k.group_size) == (activation, group_size)]
            if kinds.count("gemv") != 1 or kinds.count("gemm") < 1:
                found = ", ".join(sorted(kinds)) or "none"
                raise KernelsError(
                    f"{where}, {activation}, group {group_size}: found {found}, expected a gemv and gemms"
                )


def source_text(kernels: list[Kernel], choices: dict[int, Choice]) -> str:
    """The C++ file."""
    images = sorted({kernel.cubin_sha256: kernel.image for kernel in kernels}.items())
    names = {key: f"image_{index}" for index, (key, _) in enumerate(images)}
    parts = [
        "// Written by embed_kernels.py. Do not edit.",
        '#include "kernel_table.h"',
        "namespace vlmdeploy {\nnamespace {",
        *(_image_text(names[key], image) for key, image in images),
        "const Kernel kernels[] = {",
        *(_kernel_text(kernel, names[kernel.cubin_sha256]) for kernel in kernels),
        "};\nconst Choice choices[] = {",
        *(f"    {{{sm}, {c.gemv_up_to_tokens}, {c.small_gemm_up_to_tokens}}}," for sm, c in sorted(choices.items())),
        "};",
        f"const KernelTable table{{kernels, {len(kernels)}, choices, {len(choices)}, {PACKING}}};",
        "}  // namespace\nconst KernelTable& embedded_kernels() { return table; }\n}  // namespace vlmdeploy\n",
    ]
    return "\n".join(parts)


def _image_text(name: str, image: bytes) -> str:
    """The image as one string, which compilers read many times faster than a list of numbers."""
    pieces = [image[start : start + BYTES_A_LINE] for start in range(0, len(image), BYTES_A_LINE)]
    lines = ('    "' + "".join(f"\\{byte:03o}" for byte in piece) + '"' for piece in pieces)
    return f"alignas(16) const char {name}[] =\n" + "\n".join(lines) + ";"


def _kernel_text(kernel: Kernel, image: str) -> str:
    fields = [
        json.dumps(kernel.name), str(kernel.architecture), f"Kind::{kernel.kind}",
        f"Activation::{kernel.activation or 'none'}", str(kernel.group_size), str(kernel.block_rows),
        str(kernel.block_columns), str(kernel.num_warps), str(kernel.shared_bytes), json.dumps(kernel.symbol), image,
        str(len(kernel.image)),
    ]  # fmt: skip
    return f"    {{{', '.join(fields)}}},"


def _architectures(text: str) -> list[int] | None:
    try:
        return [int(part) for part in text.replace(";", ",").split(",")] if text else None
    except ValueError:
        raise KernelsError(f"--architectures is {text!r}, expected numbers such as 87,110") from None


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(".")[0])
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--architectures", default="", help="such as 87,110; default: all there are")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        text = source_text(*read_kernels(options.kernels, _architectures(options.architectures)))
        partial = options.out.with_suffix(".partial")
        partial.write_text(text, encoding="ascii")
        partial.replace(options.out)
    except (KernelsError, OSError) as error:
        print(f"embed_kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
