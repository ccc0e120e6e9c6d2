"""Compiled kernels as vlmdeploy/kernels/compiled/ holds them, but with images that nothing can run: for tests of what
reads them."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

GROUP_SIZES = (32, 64, 128)
ACTIVATIONS = ("fp16", "bf16")
LARGE_SHARED_BYTES = 65536  # of the large gemm: more than a launch may use without asking


def write_compiled(folder: Path, architectures: tuple[int, ...] = (80, 87)) -> dict[str, Any]:
    """index.json and the archives; what index.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    kernels = [kernel for architecture in architectures for kernel in _write_archive(folder, architecture)]
    choice = {str(sm): {"gemv_up_to_tokens": 2, "small_gemm_up_to_tokens": sm} for sm in architectures}
    index = {"format": 1, "triton": "3.9.0", "packing": 1, "kernels": kernels, "choice": choice}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "index.json").write_text(json.dumps(index))


def _write_archive(folder: Path, architecture: int) -> list[dict[str, Any]]:
    kernels = []
    with zipfile.ZipFile(folder / f"sm_{architecture}.zip", "w") as archive:
        for shape in _shapes():
            name = shape["name"]
            symbol = name.replace(".", "_")
            cubin = f"{name} {architecture}".encode() + bytes(range(256))
            ptx = f".visible .entry {symbol}() {{ ret; }} // {architecture}\n".encode()
            archive.writestr(f"{name}.cubin", cubin)
            archive.writestr(f"{name}.ptx", ptx)
            hashes = {"cubin_sha256": hashlib.sha256(cubin).hexdigest(), "ptx_sha256": hashlib.sha256(ptx).hexdigest()}
            kernels.append(shape | hashes | {"architecture": architecture, "symbol": symbol, "registers": 96})
    return kernels


def _shapes() -> list[dict[str, Any]]:
    shapes = [_shape("routed_partition", "partition", "", 0, (1, 1), 64)]
    for activation in ACTIVATIONS:
        for group in GROUP_SIZES:
            end = f"{activation}.g{group}"
            shapes += [
                _shape(f"routed_gemv.{end}", "gemv", activation, group, (1, 32), 512),
                _shape(f"routed_gemm.{end}.64x64", "gemm", activation, group, (64, 64), LARGE_SHARED_BYTES),
                _shape(f"routed_gemm.{end}.16x64", "gemm", activation, group, (16, 64), 20480),
            ]
    return shapes


def _shape(
    name: str, kind: str, activation: str, group_size: int, block: tuple[int, int], shared_bytes: int
) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "activation": activation, "group_size": group_size, "block_rows": block[0],
        "block_columns": block[1], "num_warps": 4, "shared_bytes": shared_bytes,
    }  # fmt: skip
