"""The safetensors format read by hand: 8 bytes header length, a JSON header, then the values, little endian.

Source: the format section of the safetensors README.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "BOOL": "|b1"}


def read_tensors(path: Path) -> dict[str, Array]:
    """Every tensor of a file; bf16 values become float32, which holds them exactly."""
    header, content = _split(path)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        values: Array = np.frombuffer(content[start:stop], DTYPES[entry["dtype"]]).copy()
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)  # bf16 is the upper half of a float32
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def tensor_names(path: Path) -> list[str]:
    """The names in a file, sorted."""
    return sorted(_split(path)[0])


def read_folder(folder: Path) -> dict[str, Array]:
    """Every tensor of every shard in a checkpoint folder."""
    return {
        name: values for path in sorted(folder.glob("*.safetensors")) for name, values in read_tensors(path).items()
    }


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, content[8 + length :]
