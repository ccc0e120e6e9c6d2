"""Compiles all routed kernels for one GPU architecture, without a GPU: Triton to PTX, its ptxas to a cubin.

`compile` runs this in its own process: LLVM aborts the process for an unknown target, and Triton decides on import
whether it compiles or interprets.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmdeploy.errors import ExportError
from vlmdeploy.kernels import routed
from vlmdeploy.kernels.block_shapes import BlockShape, shapes_of
from vlmdeploy.kernels.compiled_kernels import CompiledKernel, Kind, archive_name
from vlmdeploy.kernels.packing import GROUP_SIZES

ACTIVATIONS = ("fp16", "bf16")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every archive member, so that the same kernels give the same bytes
NUM_SCRATCH_PARAMETERS = 2  # scratch pointers that Triton appends and these kernels do not use
PARTITION_WARPS = 4


@dataclass(frozen=True)
class Variant:
    """A kernel to compile: its name, its Triton function, parameter types in order, constants and warps."""

    name: str
    kind: Kind
    activation: str
    group_size: int
    shape: BlockShape
    parameters: dict[str, str]
    constants: dict[str, int]

    @property
    def function(self) -> "triton.JITFunction[object]":
        """The Triton source."""
        return getattr(routed, f"routed_{self.kind}")

    @property
    def symbol(self) -> str:
        """The entry's name in the images, unique since an engine may hold several kernels."""
        return self.name.replace(".", "_")


def recipes(architecture: int) -> list[Variant]:
    """All kernels of an architecture. Raises BackendError if it is not in the table of block shapes."""
    shapes = shapes_of(architecture)
    found = [partition_recipe()]
    for activation, group_size in product(ACTIVATIONS, GROUP_SIZES):
        found.append(linear_recipe("gemv", activation, group_size, shapes.gemv))
        found.append(linear_recipe("gemm", activation, group_size, shapes.small_gemm))
        found.append(linear_recipe("gemm", activation, group_size, shapes.large_gemm))
    return found


def partition_recipe() -> Variant:
    """The kernel that sorts rows by expert."""
    parameters = {"experts": "*i32", "tokens": "i32", "order": "*i32", "language_count": "*i32"}
    shape = BlockShape(block_rows=routed.PARTITION_BLOCK, block_columns=1, num_warps=PARTITION_WARPS, num_stages=1)
    return Variant("routed_partition", "partition", "", 0, shape, parameters, {"BLOCK": routed.PARTITION_BLOCK})


def linear_recipe(kind: Kind, activation: str, group_size: int, shape: BlockShape) -> Variant:
    """A kernel of the routed linear."""
    inputs = {"x": f"*{activation}", "experts": "*i32", "order": "*i32", "language_count": "*i32"}
    weights = {"codes": "*u8", "scales": "*fp16", "bias": "*fp32"}
    parameters = {**inputs, **weights, "tokens": "i32", "out_width": "i32", "groups": "i32", "y": f"*{activation}"}
    constants = {"GROUP_SIZE": group_size, "BLOCK_COLUMNS": shape.block_columns}
    constants |= {"STAGES": shape.num_stages} if kind == "gemv" else {"BLOCK_ROWS": shape.block_rows}
    name = f"routed_{kind}.{activation}.g{group_size}.{shape.block_rows}x{shape.block_columns}"
    return Variant(name, kind, activation, group_size, shape, parameters, constants)


def ptx_version(architecture: int) -> int:
    """The PTX version: 8.7, of CUDA 12.8, which every later driver and TensorRT 11 read; SM 110 needs 9.0."""
    return 90 if architecture == 110 else 87


def compile_to_ptx(recipe: Variant, architecture: int) -> tuple[str, int]:
    """PTX with exactly the recipe's parameters, and the kernel's bytes of dynamic shared memory."""
    names = recipe.function.arg_names
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=recipe.function,
        signature={**recipe.parameters, **dict.fromkeys(recipe.constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in recipe.constants.items()},
        attrs={(i,): aligned for i, kind in enumerate(recipe.parameters.values()) if kind.startswith("*")},
    )
    options = {**recipe.shape.options(), "ptx_version": ptx_version(architecture)}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    if compiled.metadata.num_warps != recipe.shape.num_warps:
        raise ExportError(f"{recipe.name}: Triton chose {compiled.metadata.num_warps} warps, not the table's")
    name = recipe.function.__name__
    ptx = own_parameters(compiled.asm["ptx"], name, len(recipe.parameters))
    return re.sub(rf"\b{name}\b", recipe.symbol, ptx), int(compiled.metadata.shared)


def own_parameters(ptx: str, symbol: str, count: int) -> str:
    """PTX without comments and without the scratch pointers that Triton appends to `count` parameters.

    Raises ExportError if the parameters differ or the scratch pointers are read.
    """
    ptx = "".join(f"{line}\n" for line in re.sub(r"//[^\n]*", "", ptx).splitlines() if line.strip())
    entry = re.search(rf"\.visible \.entry {symbol}\(([^)]*)\)", ptx)
    parameters = [] if entry is None else [line.strip() for line in entry.group(1).split(",")]
    if entry is None or len(parameters) != count + NUM_SCRATCH_PARAMETERS:
        raise ExportError(
            f"{symbol} has {len(parameters)} parameters, expected {count} and {NUM_SCRATCH_PARAMETERS} for scratch"
        )
    kept = "".join(f"\n\t{parameter}," for parameter in parameters[:count])[:-1]
    ptx = f"{ptx[: entry.start(1)]}{kept}\n{ptx[entry.end(1) :]}"
    read = [i for i in range(count, len(parameters)) if re.search(rf"\b{symbol}_param_{i}\b", ptx)]
    if read:
        raise ExportError(f"PTX of {symbol} reads parameter {read[0]}, a scratch pointer that launchers do not pass")
    return ptx


def assemble(ptx: str, architecture: int, where: Path) -> tuple[bytes, int, int]:
    """A cubin, its registers per thread and its spilled bytes.

    Uses the ptxas of CUDA 12 if it supports the architecture, so that drivers of CUDA 12 load the cubin too.
    """
    tools = triton.knobs.nvidia
    ptxas = tools.ptxas_blackwell if architecture == 110 else tools.ptxas
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None, "every PTX names its target"
    (where / "kernel.ptx").write_text(ptx, encoding="utf-8")
    command = [ptxas.path, "-v", f"--gpu-name={target.group(1)}", "kernel.ptx", "-o", "kernel.cubin"]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    used = re.search(r"Used (\d+) registers", said)
    if result.returncode or used is None:
        raise ExportError(f"ptxas fails for SM {architecture}: {said.strip()[-500:]}")
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    return (where / "kernel.cubin").read_bytes(), int(used.group(1)), spilled


def compile_kernel(recipe: Variant, architecture: int, archive: zipfile.ZipFile) -> tuple[CompiledKernel, int]:
    """Compile a kernel and add its images to an archive. Returns its entry and its spilled bytes."""
    ptx, shared_bytes = compile_to_ptx(recipe, architecture)
    with tempfile.TemporaryDirectory() as folder:
        cubin, registers, spilled = assemble(ptx, architecture, Path(folder))
    digests = {}
    for form, image in (("cubin", cubin), ("ptx", ptx.encode())):
        digests[form] = hashlib.sha256(image).hexdigest()
        member = zipfile.ZipInfo(f"{recipe.name}.{form}", EPOCH)
        archive.writestr(member, image, zipfile.ZIP_DEFLATED, compresslevel=9)
    shape = recipe.shape
    kernel = CompiledKernel(
        recipe.name, architecture, recipe.kind, recipe.activation, recipe.group_size, shape.block_rows,
        shape.block_columns, shape.num_warps, shared_bytes, registers, recipe.symbol, digests["cubin"],
        digests["ptx"],
    )  # fmt: skip
    return kernel, spilled


def compile_architecture(architecture: int, folder: Path) -> None:
    """Write sm_XX.zip, and sm_XX.json with each kernel's entry and spilled bytes, into a folder."""
    path = folder / archive_name(architecture)
    with zipfile.ZipFile(path, "w") as archive:
        found = [compile_kernel(recipe, architecture, archive) for recipe in recipes(architecture)]
    entries = [{"kernel": asdict(kernel), "spilled_bytes": spilled} for kernel, spilled in found]
    path.with_suffix(".json").write_text(json.dumps(entries), encoding="utf-8")


if __name__ == "__main__":
    compile_architecture(int(sys.argv[1]), Path(sys.argv[2]))
