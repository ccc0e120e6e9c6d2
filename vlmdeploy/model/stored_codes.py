"""Read the quantized linears of a checkpoint in GPTQ format, as codes or as floats, by rows.

A quantized `X.weight` is stored as `X.qweight`, `X.qzeros`, `X.scales` and `X.g_idx`. `X.g_idx` may be missing, and
`X.qzeros` too if the grid is symmetric.
"""

from math import prod

import numpy as np
import torch
from torch import Tensor

from vlmdeploy.errors import QuantizationError, WeightsError
from vlmdeploy.model.shards import Shards
from vlmdeploy.quant.gptq_config import GptqConfig, grid_of, read_config
from vlmdeploy.quant.gptq_format import PARTS, StoredLinear, check_g_idx, decode_linear
from vlmdeploy.quant.grid import Grid, Quantized
from vlmdeploy.quant.packing import num_words
from vlmdeploy.spec.weight_rules import Source

Header = tuple[str, tuple[int, ...]]  # safetensors' type name, and shape

NEEDED = ("qweight", "scales")
INTEGERS = ("I8", "I16", "I32", "I64")
DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32", "F64"), "g_idx": INTEGERS}


class StoredCodes:
    """Reads the GPTQ tensors of a checkpoint folder."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._folder = folder = shards.folder
        self._shard_of = shard_of = shards.file_of
        self.config: GptqConfig | None = read_config(folder, shards.follow_links)
        self.modules = {name.removesuffix(".qweight") for name in shard_of if name.endswith(".qweight")}
        if self.modules and self.config is None:
            module = sorted(self.modules)[0]
            raise WeightsError(f'{folder}: tensor "{module}.qweight" is quantized, but no config says how')
        doubled = sorted(module for module in self.modules if f"{module}.weight" in shard_of)
        if doubled:
            raise WeightsError(
                f'{folder}: linear "{doubled[0]}" is stored twice, as floats (weight) and as codes (qweight): expected '
                "one of them"
            )
        self._grids: dict[Source, Grid] = {}
        self._headers: dict[str, dict[str, Header]] = {}
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})

    def __contains__(self, source: object) -> bool:
        return isinstance(source, Source) and _module(source) in self.modules

    def names(self) -> frozenset[str]:
        """The tensor names of the equivalent float checkpoint."""
        of_codes = {f"{module}.{part}" for module in self.modules for part in PARTS}
        return frozenset(self._shard_of) - of_codes | {f"{module}.weight" for module in self.modules}

    def grid(self, source: Source) -> Grid:
        """The grid of a quantized linear, by the config."""
        assert self.config is not None, "checked when opened"
        if source not in self._grids:
            grid = grid_of(self.config, _module(source), prod(source.shape[1:]))
            if grid is None:
                raise WeightsError(
                    f'{self._folder}: "{_module(source)}" has codes, but the config says that it is kept in float'
                )
            self._grids[source] = grid
        return self._grids[source]

    def check(self, source: Source) -> None:
        """Raise WeightsError unless all parts are present with supported types and the right shapes."""
        assert self.config is not None, "checked when opened"
        module, grid, width = _module(source), self.grid(source), prod(source.shape[1:])
        found = {part: self._header(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in self._shard_of}
        for part in NEEDED:
            if part not in found:
                raise WeightsError(f'{self._folder}: tensor "{module}.{part}" is missing')
        for part, (dtype, _) in found.items():
            if dtype not in DTYPES[part]:
                expected_types = " or ".join(DTYPES[part])
                raise WeightsError(f'{self._folder}: tensor "{module}.{part}" is {dtype}, expected {expected_types}')
        shape, expected = found["qweight"][1], (num_words(width, grid.bits), source.shape[0])
        if shape != expected:
            raise WeightsError(
                f'{self._folder}: tensor "{module}.qweight" is {list(shape)}, expected {list(expected)} for '
                f"{grid.bits} bits: do both configs belong to these weights?"
            )
        entries = prod(found["g_idx"][1]) if "g_idx" in found else 0
        check_g_idx(entries, width, grid, self.config.desc_act, f"{self._folder}: {module}")

    def _header(self, name: str) -> Header:
        """Type and shape of a tensor. Reads the header of each file once."""
        file = self._shard_of[name]
        if file not in self._headers:
            with self._shards.opened(name) as shard:
                slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118  # not a dict
                self._headers[file] = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        return self._headers[file][name]

    def linear(self, source: Source, start: int, stop: int) -> StoredLinear:
        """Rows start <= i < stop of a quantized linear."""
        assert self.config is not None, "checked when opened"
        module = _module(source)
        if self._last[0] != module:  # callers read block by block
            self._last = module, self._read(source)
        where, rows = f"{self._folder}: {module}", slice(start, stop)
        return decode_linear(self._last[1], self.grid(source), self.config.checkpoint_format, where, rows)

    def quantized(self, source: Source, start: int, stop: int) -> Quantized:
        """Rows of a linear for the exporters. Raises QuantizationError if no backend can hold them."""
        try:
            return self.linear(source, start, stop).quantized()
        except QuantizationError as error:
            raise QuantizationError(f"{self._folder}: {_module(source)}: {error}") from error

    def values(self, source: Source, start: int, stop: int) -> Tensor:
        """Some rows as float32, in the shape of the weight."""
        values = torch.from_numpy(self.linear(source, start, stop).dequantize())
        return values.reshape(stop - start, *source.shape[1:])

    def _read(self, source: Source) -> dict[str, np.ndarray]:
        """Read the parts of a linear. Adds a missing g_idx: without it, the width is known only up to the last word."""
        module, tensors = _module(source), {}
        for part in PARTS:
            name = f"{module}.{part}"
            if name in self._shard_of:
                with self._shards.opened(name) as shard:
                    values = shard.get_tensor(name)
                tensors[part] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        if "g_idx" not in tensors or not tensors["g_idx"].size:
            tensors["g_idx"] = np.arange(prod(source.shape[1:])) // self.grid(source).group_size
        return tensors


def _module(source: Source) -> str:
    return source.name.removesuffix(".weight")
