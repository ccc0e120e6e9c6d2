"""Compiles the routed kernels for every architecture, without a GPU: `python -m vlmdeploy.kernels.compile`.

Writes compiled/index.json and one archive per architecture, reproducibly, and prints the resources of every kernel.
Needs the extra `kernels` (Triton); reading the results needs nothing.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmdeploy.errors import ExportError, VlmdeployError
from vlmdeploy.kernels.block_shapes import known_architectures, shapes_of
from vlmdeploy.kernels.compiled_kernels import COMPILED, INDEX_FORMAT, Choice, CompiledKernel
from vlmdeploy.kernels.packing import PACKING_VERSION

TRITON = "3.9.0"  # the PTX of this version was checked
MOST_REGISTERS = 255
# Shared memory that a block may request, KiB (CUDA C++ Programming Guide, compute capabilities), and what it gets
# without a request: TensorRT's ahead-of-time plugins cannot make one.
SHARED_LIMIT_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99}
UNASKED_KIB = 48


@dataclass(frozen=True)
class Compiled:
    """A kernel, and how many bytes of registers it spills."""

    kernel: CompiledKernel
    spilled_bytes: int


def compile_all(architectures: Sequence[int], folder: Path, say: Callable[[str], None]) -> None:
    """Compile for some architectures and replace the earlier result in a folder.

    Raises BackendError for an architecture that is not in the table, ExportError if compiling fails.
    """
    check_triton()
    for architecture in architectures:
        shapes_of(architecture)
    with tempfile.TemporaryDirectory() as name:
        staged, found = Path(name), []
        for architecture in architectures:
            kernels = compile_in_process(architecture, staged)
            say(table_of(kernels))
            found += kernels
        write_index([compiled.kernel for compiled in found], architectures, staged)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("sm_*.zip"):
            path.unlink()
        for path in [staged / "index.json", *sorted(staged.glob("*.zip"))]:
            shutil.copyfile(path, folder / path.name)


def check_triton() -> None:
    """Raise ExportError unless exactly the pinned Triton is installed."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise ExportError("compiling kernels needs Triton: pip install 'vlmdeploy[kernels]'") from error
    if found != TRITON:
        raise ExportError(f"Triton {found} is installed, but the kernels are compiled with {TRITON}")


def compile_in_process(architecture: int, folder: Path) -> list[Compiled]:
    """Compile for one architecture in its own process: LLVM aborts it for some targets."""
    command = [sys.executable, "-m", "vlmdeploy.kernels.compile_architecture", str(architecture), str(folder)]
    settings = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_DISABLE_LINE_INFO": "1",  # line tables contain the source folder
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"compiling for SM {architecture} ended with status {result.returncode}: {last}")
    entries = json.loads((folder / f"sm_{architecture}.json").read_text(encoding="utf-8"))
    found = [Compiled(CompiledKernel(**entry["kernel"]), entry["spilled_bytes"]) for entry in entries]
    for compiled in found:
        check_limits(compiled.kernel)
    return found


def check_limits(kernel: CompiledKernel) -> None:
    """Raise ExportError for a kernel that exceeds its device, or a small one that exceeds a plugin's limits."""
    is_large = kernel.kind == "gemm" and kernel.block_rows > 16
    limit = 1024 * (SHARED_LIMIT_KIB[kernel.architecture] if is_large else UNASKED_KIB)
    if kernel.shared_bytes > limit or kernel.registers > MOST_REGISTERS:
        raise ExportError(
            f"{kernel.name} for SM {kernel.architecture} takes {kernel.shared_bytes} bytes of shared memory and "
            f"{kernel.registers} registers, limits are {limit} and {MOST_REGISTERS}: see block_shapes.json"
        )


def write_index(kernels: list[CompiledKernel], architectures: Sequence[int], folder: Path) -> None:
    """Write index.json."""
    choice = {}
    for architecture in architectures:
        shapes = shapes_of(architecture)
        choice[str(architecture)] = asdict(Choice(shapes.gemv_up_to_tokens, shapes.small_gemm_up_to_tokens))
    index = {
        "format": INDEX_FORMAT, "triton": TRITON, "packing": PACKING_VERSION,
        "kernels": [asdict(kernel) for kernel in kernels], "choice": choice,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def table_of(found: list[Compiled]) -> str:
    """The resources of an architecture's kernels, one per line."""
    lines = [f"SM {found[0].kernel.architecture:<32} warps  registers  spilled  shared"]
    for compiled in found:
        kernel = compiled.kernel
        lines.append(
            f"{kernel.name:<35} {kernel.num_warps:5}  {kernel.registers:9}  {compiled.spilled_bytes:7}  "
            f"{kernel.shared_bytes:6}"
        )
    return "\n".join(lines)


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlmdeploy.kernels.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", type=int, nargs="+", help="only these, e.g. 87 110 (needs --out)")
    parser.add_argument("--out", type=Path, help=f"the folder to write to (default: {COMPILED})")
    options = parser.parse_args()
    if options.architectures and options.out is None:
        parser.error("--architectures needs --out: the package's own folder holds all of them")
    try:
        compile_all(options.architectures or known_architectures(), options.out or COMPILED, print)
    except VlmdeployError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
