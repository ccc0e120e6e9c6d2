"""Contract tests: the shipped kernels are complete, within every device's limits, and what their source compiles to."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from vlmdeploy.errors import BackendError, ExportError
from vlmdeploy.kernels.block_shapes import BlockShapes, known_architectures, shapes_of
from vlmdeploy.kernels.compile import check_limits
from vlmdeploy.kernels.compiled_kernels import COMPILED, CompiledKernel, archive_name, kernel_image, read_index
from vlmdeploy.kernels.packing import GROUP_SIZES, PACKING_VERSION

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 110, 120)
# CUDA C++ Programming Guide: the most shared memory of a block, KiB.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99}
PARAMETERS = {
    "partition": "u64 u32 u64 u64",
    "gemv": "u64 u64 u64 u64 u64 u64 u64 u32 u32 u32 u64",
    "gemm": "u64 u64 u64 u64 u64 u64 u64 u32 u32 u32 u64",
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def kernels(architecture: int) -> list[CompiledKernel]:
    return read_index().of(architecture)


@cache
def ptx_of(kernel: CompiledKernel) -> str:
    return kernel_image(kernel, "ptx").decode()


def is_large(kernel: CompiledKernel) -> bool:
    return kernel.kind == "gemm" and kernel.block_rows > 16


def test_index_says_what_made_it() -> None:
    index = read_index()
    assert (index.triton, index.packing, index.architectures()) == ("3.9.0", PACKING_VERSION, ARCHITECTURES)
    assert known_architectures() == ARCHITECTURES


@every_architecture
def test_architecture_has_every_kernel(architecture: int) -> None:
    found = sorted(
        (kernel.kind, kernel.activation, kernel.group_size, is_large(kernel)) for kernel in kernels(architecture)
    )
    linears = [(activation, group) for activation in ("bf16", "fp16") for group in GROUP_SIZES]
    expected = [("gemm", *linear, large) for linear in linears for large in (False, True)]
    expected += [("gemv", *linear, False) for linear in linears] + [("partition", "", 0, False)]
    assert found == sorted(expected)


@every_architecture
def test_kernels_fit_their_device(architecture: int) -> None:
    for kernel in kernels(architecture):
        assert 0 < kernel.registers <= 255
        assert kernel.num_warps in (4, 8)
        limit = SHARED_KIB[architecture] if is_large(kernel) else 48
        assert kernel.shared_bytes <= limit * 1024, kernel.name


@every_architecture
def test_entry_has_exactly_the_parameters_that_launchers_pass(architecture: int) -> None:
    for kernel in kernels(architecture):
        entries = re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx_of(kernel))
        assert [symbol for symbol, _ in entries] == [kernel.symbol] == [kernel.name.replace(".", "_")]
        assert " ".join(re.findall(r"\.param \.(\w+)", entries[0][1])) == PARAMETERS[kernel.kind]


@every_architecture
def test_images_are_for_this_architecture_and_launch_as_the_index_says(architecture: int) -> None:
    for kernel in kernels(architecture):
        ptx = ptx_of(kernel)
        assert re.search(rf"\.target sm_{architecture}a?$", ptx, re.M)
        assert f".reqntid {32 * kernel.num_warps}" in ptx
        version = float(re.findall(r"\.version ([\d.]+)", ptx)[0])
        assert version == (9.0 if architecture == 110 else 8.7)


@every_architecture
def test_large_gemm_multiplies_on_tensor_cores_in_its_own_type(architecture: int) -> None:
    for kernel in filter(is_large, kernels(architecture)):
        multiply, other = {"fp16": ("f16", "bf16"), "bf16": ("bf16", "f16")}[kernel.activation]
        ptx = ptx_of(kernel)
        if architecture in (100, 110):  # there the type stands in a descriptor
            assert "tcgen05.mma" in ptx
        else:
            assert re.search(rf"mma\S*\.f32\.{multiply}\.{multiply}", ptx), kernel.name
            assert not re.search(rf"mma\S*\.{other}\.{other}", ptx), kernel.name


@every_architecture
def test_small_gemm_multiplies_on_tensor_cores(architecture: int) -> None:
    for kernel in kernels(architecture):
        assert (kernel.kind == "gemm") == bool(re.search(r"\bw?g?mma\.|tcgen05\.mma", ptx_of(kernel))), kernel.name


@every_architecture
def test_archive_holds_the_images_and_nothing_else(architecture: int) -> None:
    with zipfile.ZipFile(COMPILED / archive_name(architecture)) as archive:
        held, times = set(archive.namelist()), {member.date_time for member in archive.infolist()}
    assert held == {f"{kernel.name}.{form}" for kernel in kernels(architecture) for form in ("cubin", "ptx")}
    assert times == {(1980, 1, 1, 0, 0, 0)}
    for kernel in kernels(architecture):
        assert hashlib.sha256(kernel_image(kernel, "cubin")).hexdigest() == kernel.cubin_sha256
        assert str(COMPILED.parent).encode() not in kernel_image(kernel, "cubin")


def test_shipped_kernels_stay_small() -> None:
    assert sum(path.stat().st_size for path in COMPILED.iterdir()) < 3_000_000
    assert {path.name for path in COMPILED.iterdir()} == {"index.json"} | {archive_name(n) for n in ARCHITECTURES}


@pytest.mark.parametrize(
    ("tokens", "kind", "block_rows"), [(1, "gemv", 1), (2, "gemm", 16), (32, "gemm", 16), (33, "gemm", 64)]
)
def test_kernel_is_chosen_by_the_number_of_rows(tokens: int, kind: str, block_rows: int) -> None:
    kernel = read_index().linear(87, "fp16", 128, tokens)
    assert (kernel.architecture, kernel.activation, kernel.group_size) == (87, "fp16", 128)
    assert (kernel.kind, kernel.block_rows) == (kind, block_rows)


@every_architecture
def test_index_and_block_shapes_choose_alike(architecture: int) -> None:
    shapes: BlockShapes = shapes_of(architecture)
    for tokens in (1, 2, 3, 16, 32, 33, 64, 65, 5000):
        kind, shape = shapes.of(tokens)
        kernel = read_index().linear(architecture, "bf16", 32, tokens)
        assert (kernel.kind, kernel.block_columns, kernel.num_warps) == (kind, shape.block_columns, shape.num_warps)


@pytest.mark.parametrize("architecture", [75, 88, 121])
def test_unknown_architecture_names_those_there_are(architecture: int) -> None:
    expected = f"no routed kernel for SM {architecture}; there are kernels for SM 80, 86, 87, 89, 90, 100, 110, 120"
    with pytest.raises(BackendError, match=expected):
        read_index().partition(architecture)
    with pytest.raises(BackendError, match=expected):
        shapes_of(architecture)


def test_unknown_group_size_names_those_there_are() -> None:
    with pytest.raises(BackendError, match=r"fp16 activations and groups of 16 on SM 87; there are: bf16 32, bf16 64"):
        read_index().linear(87, "fp16", 16, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a table of compiled kernels"),
        ("[]", "not a table of compiled kernels"),
        ('{"format": 2}', "format 2, expected 1"),
        ('{"format": 1, "kernels": [{}]}', "not a table of compiled kernels"),
    ],
)
def test_damaged_index_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(BackendError, match=rf"index\.json: .*{message}"):
        read_index(tmp_path)


def test_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"index\.json: cannot be read \(No such file or directory\)"):
        read_index(tmp_path)


def test_altered_image_is_refused(tmp_path: Path) -> None:
    kernel = read_index().partition(87)
    with zipfile.ZipFile(tmp_path / "sm_87.zip", "w") as archive:
        archive.writestr("routed_partition.cubin", b"another")
    with pytest.raises(BackendError, match=r"routed_partition\.cubin is not the image that index\.json describes"):
        kernel_image(kernel, "cubin", tmp_path)
    with pytest.raises(BackendError, match=r"cannot read routed_partition\.ptx"):
        kernel_image(kernel, "ptx", tmp_path)


def test_truncated_archive_is_refused(tmp_path: Path) -> None:
    whole = (COMPILED / "sm_87.zip").read_bytes()
    (tmp_path / "sm_87.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackendError, match=r"sm_87\.zip: cannot read"):
        kernel_image(read_index().partition(87), "cubin", tmp_path)


@pytest.mark.parametrize("change", [{"registers": 256}, {"shared_bytes": 48 * 1024 + 1}])
def test_kernel_beyond_its_device_is_refused(change: dict[str, int]) -> None:
    kernel = CompiledKernel(**{**vars(read_index().partition(87)), **change})
    with pytest.raises(ExportError, match=r"routed_partition for SM 87 takes .*see block_shapes\.json"):
        check_limits(kernel)


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The compiling command, run as a user would, although this process interprets kernels."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    command = [sys.executable, "-m", "vlmdeploy.kernels.compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=COMPILED.parents[2], check=False)


def test_compiling_for_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    result = compiled("--architectures", "88", "--out", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "Error: no routed kernel for SM 88; there are kernels for SM 80, 86, 87, 89, 90, 100, 110, 120"
    ]
    assert not list(tmp_path.iterdir())


def test_compiling_a_few_architectures_does_not_replace_the_package() -> None:
    result = compiled("--architectures", "87")
    assert result.returncode == 2
    assert "--architectures needs --out" in result.stderr


@pytest.mark.slow
def test_source_compiles_to_the_shipped_bytes(tmp_path: Path) -> None:
    result = compiled("--architectures", "87", "110", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for name in ("sm_87.zip", "sm_110.zip"):
        assert (tmp_path / name).read_bytes() == (COMPILED / name).read_bytes()
    entries = json.loads((tmp_path / "index.json").read_text())["kernels"]
    assert [CompiledKernel(**entry) for entry in entries] == kernels(87) + kernels(110)


@pytest.mark.slow
@every_architecture
def test_kernels_keep_their_values_in_registers(architecture: int, tmp_path: Path) -> None:
    import triton

    for kernel in kernels(architecture):
        (tmp_path / "cubin").write_bytes(kernel_image(kernel, "cubin"))
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(tmp_path / "cubin")]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
        assert registers == kernel.registers
        assert stack <= 8, kernel.name
