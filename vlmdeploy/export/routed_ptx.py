"""The compiled routed kernels as PTX, for the plugins that TensorRT builds ahead of time. Reads
vlmdeploy/kernels/compiled: index.json and one sm_XX.zip for each architecture."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlmdeploy
from vlmdeploy.errors import BackendError

COMPILED = Path(vlmdeploy.__file__).parent / "kernels" / "compiled"
ACTIVATIONS = ("fp16", "bf16")
GROUP_SIZES = (32, 64, 128)
FORMAT = PACKING = 1  # of index.json; of codes, scales and bias


@dataclass(frozen=True)
class PtxKernel:
    """A kernel: what it serves, how it is launched, its text. kind: partition, gemv, gemm."""

    kind: str
    activation: str
    group_size: int
    block_rows: int
    block_columns: int
    num_warps: int
    shared_bytes: int
    symbol: str
    ptx: str


def read_ptx_kernels(architecture: int, folder: Path = COMPILED) -> list[PtxKernel]:
    """Those of one GPU, such as 87. Raises BackendError naming the file, or the GPUs that there are kernels for."""
    index_file, archive_file = folder / "index.json", folder / f"sm_{architecture}.zip"
    try:
        index = json.loads(index_file.read_bytes())
        if (index["format"], index["packing"]) != (FORMAT, PACKING):
            found = f"format {index['format']}, packing {index['packing']}"
            raise BackendError(f"{index_file} is of {found}, expected format {FORMAT}, packing {PACKING}")
        entries = [entry for entry in index["kernels"] if entry["architecture"] == architecture]
        known = sorted({entry["architecture"] for entry in index["kernels"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{index_file}: cannot be read ({error!r})") from error
    if not entries:
        raise BackendError(f"no kernel for SM {architecture}: built for {', '.join(map(str, known))}")
    try:
        with zipfile.ZipFile(archive_file) as archive:
            return [_read_kernel(archive, entry) for entry in entries]
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{archive_file}: cannot be read ({error!r})") from error


def _read_kernel(archive: zipfile.ZipFile, entry: dict[str, Any]) -> PtxKernel:
    content = archive.read(f"{entry['name']}.ptx")
    if hashlib.sha256(content).hexdigest() != entry["ptx_sha256"]:
        raise ValueError(f"{entry['name']}.ptx does not have the hash that index.json says")
    names = [name for name in PtxKernel.__dataclass_fields__ if name != "ptx"]
    return PtxKernel(**{name: entry[name] for name in names}, ptx=content.decode("ascii"))
