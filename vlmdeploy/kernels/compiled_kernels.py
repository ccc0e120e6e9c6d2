"""The compiled kernels that ship with the package: their list, which one serves a number of rows, and their images.

compiled/index.json describes them; compiled/sm_XX.zip holds NAME.cubin and NAME.ptx of one architecture, written by
`python -m vlmdeploy.kernels.compile`. Needs only the standard library. A cubin runs only on its own architecture: even
the next one of the same generation (8.6 on 8.7) is another chip family.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vlmdeploy.errors import BackendError

COMPILED = Path(__file__).parent / "compiled"
INDEX_FORMAT = 1

Kind = Literal["partition", "gemv", "gemm"]
Form = Literal["cubin", "ptx"]


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel of one architecture, 10 * major + minor. activation "fp16" or "bf16"; "" and group size 0 for the
    partition. Launch with 32 * num_warps threads and shared_bytes of dynamic shared memory."""

    name: str
    architecture: int
    kind: Kind
    activation: str
    group_size: int
    block_rows: int
    block_columns: int
    num_warps: int
    shared_bytes: int
    registers: int
    symbol: str
    cubin_sha256: str
    ptx_sha256: str


@dataclass(frozen=True)
class Choice:
    """The most rows for an architecture's gemv, then for its small gemm; more rows use the large gemm."""

    gemv_up_to_tokens: int
    small_gemm_up_to_tokens: int


@dataclass(frozen=True)
class KernelIndex:
    """The contents of index.json."""

    triton: str
    packing: int
    kernels: tuple[CompiledKernel, ...]
    choice: dict[int, Choice]

    def architectures(self) -> tuple[int, ...]:
        """The architectures that have kernels."""
        return tuple(sorted(self.choice))

    def of(self, architecture: int) -> list[CompiledKernel]:
        """All kernels of an architecture. Raises BackendError, listing the known ones."""
        if architecture not in self.choice:
            known = ", ".join(str(number) for number in self.architectures())
            raise BackendError(f"no routed kernel for SM {architecture}; there are kernels for SM {known}")
        return [kernel for kernel in self.kernels if kernel.architecture == architecture]

    def partition(self, architecture: int) -> CompiledKernel:
        """The kernel that sorts the rows of a pass by expert. Raises BackendError for an unknown architecture."""
        return next(kernel for kernel in self.of(architecture) if kernel.kind == "partition")

    def linear(self, architecture: int, activation: str, group_size: int, tokens: int) -> CompiledKernel:
        """The kernel of a routed linear for a number of rows. Raises BackendError if there is none."""
        linears = [kernel for kernel in self.of(architecture) if kernel.kind != "partition"]
        fitting = [kernel for kernel in linears if (kernel.activation, kernel.group_size) == (activation, group_size)]
        if not fitting:
            known = sorted({(kernel.activation, kernel.group_size) for kernel in linears})
            raise BackendError(
                f"no routed kernel for {activation} activations and groups of {group_size} on SM {architecture}; there "
                f"are: {', '.join(f'{name} {size}' for name, size in known)}"
            )
        choice = self.choice[architecture]
        if tokens <= choice.gemv_up_to_tokens:
            return next(kernel for kernel in fitting if kernel.kind == "gemv")
        gemms = sorted((kernel for kernel in fitting if kernel.kind == "gemm"), key=lambda kernel: kernel.block_rows)
        return gemms[0] if tokens <= choice.small_gemm_up_to_tokens else gemms[-1]


@cache
def read_index(folder: Path = COMPILED) -> KernelIndex:
    """The kernels in a folder, by default the package's. Raises BackendError for a bad index."""
    path = folder / "index.json"
    try:
        return index_from(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BackendError(
            f"{path}: cannot be read ({error.strerror}); expected the table of compiled kernels"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BackendError(f"{path}: not a table of compiled kernels ({error!r})") from error


def index_from(table: dict[str, Any]) -> KernelIndex:
    """Parse the index. Raises ValueError for another format."""
    if table["format"] != INDEX_FORMAT:
        raise ValueError(f"format {table['format']}, expected {INDEX_FORMAT}")
    kernels = tuple(CompiledKernel(**entry) for entry in table["kernels"])
    choice = {int(architecture): Choice(**limits) for architecture, limits in table["choice"].items()}
    return KernelIndex(table["triton"], table["packing"], kernels, choice)


def archive_name(architecture: int) -> str:
    """The file with the images of an architecture."""
    return f"sm_{architecture}.zip"


def kernel_image(kernel: CompiledKernel, form: Form, folder: Path = COMPILED) -> bytes:
    """A kernel's cubin, or its PTX in UTF-8. Raises BackendError for a missing or altered image."""
    path = folder / archive_name(kernel.architecture)
    try:
        with zipfile.ZipFile(path) as archive:
            image = archive.read(f"{kernel.name}.{form}")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise BackendError(f"{path}: cannot read {kernel.name}.{form} ({error})") from error
    expected = kernel.cubin_sha256 if form == "cubin" else kernel.ptx_sha256
    if hashlib.sha256(image).hexdigest() != expected:
        raise BackendError(f"{path}: {kernel.name}.{form} is not the image that index.json describes")
    return image
