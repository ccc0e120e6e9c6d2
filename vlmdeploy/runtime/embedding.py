"""The embedding table of a bundle, memory-mapped: only a prompt's rows are read."""

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import BundleError
from vlmdeploy.layout import Ints
from vlmdeploy.runtime.integrity import BundleFiles

FLOAT_TYPES = {"fp32": np.float32, "fp16": np.float16}
CODES_PER_BYTE = {"int8": 1, "int4": 2}
ZERO_POINTS = {"int8": 128, "int4": 8}


class EmbeddingTable:
    """Looks up rows of any stored type as float32."""

    def __init__(self, files: BundleFiles) -> None:
        self.info = info = files.manifest.embedding
        shape = (info.vocab_size, info.hidden)
        with files.open(info.file) as file:
            try:
                if info.dtype in FLOAT_TYPES:
                    self._rows: NDArray[np.generic] = np.memmap(file, FLOAT_TYPES[info.dtype], "r", shape=shape)
                    return
                packed = (info.vocab_size, info.hidden // CODES_PER_BYTE[info.dtype])
                self._rows = np.memmap(file, np.uint8, "r", shape=packed)
                groups = (info.vocab_size, info.hidden // info.group_size)
                self._scales = np.memmap(file, np.float16, "r", offset=info.scales_offset, shape=groups)
            except (OSError, ValueError) as error:
                where, kind = files.folder / info.file, f"{shape} {info.dtype}"
                raise BundleError(f"{where}: cannot be mapped as an embedding of {kind} ({error})") from error

    def __getitem__(self, ids: Ints) -> NDArray[np.float32]:
        """Rows of the ids, float32 [seq, hidden]."""
        rows = np.asarray(self._rows[ids])
        if self.info.dtype in FLOAT_TYPES:
            return rows.astype(np.float32)
        if self.info.dtype == "int4":
            rows = np.stack((rows & 0x0F, rows >> 4), -1).reshape(len(ids), -1)
        steps = rows.astype(np.float32).reshape(len(ids), -1, self.info.group_size) - ZERO_POINTS[self.info.dtype]
        values = steps * self._scales[ids].astype(np.float32)[..., None]
        return np.asarray(values.reshape(len(ids), self.info.hidden), np.float32)
