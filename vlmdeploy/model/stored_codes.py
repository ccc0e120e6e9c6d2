"""The quantized linears of a checkpoint in GPTQ format: which there are, and their codes or float values by rows.

A quantized `X.weight` is stored as `X.qweight`, `X.qzeros`, `X.scales` and `X.g_idx`; the last and, if the grid is
symmetric, the zero points may be missing.
"""

from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vlmdeploy.errors import WeightsError
from vlmdeploy.families.spec import Source
from vlmdeploy.quant.gptq_format import (
    PARTS,
    GptqConfig,
    Grid,
    StoredLinear,
    decode_linear,
    grid_of,
    read_config,
)
from vlmdeploy.quant.packing import num_words

NEEDED = ("qweight", "scales")


class StoredCodes:
    """Reads the GPTQ tensors of a checkpoint folder; shard_of: tensor name -> file name."""

    def __init__(self, folder: Path, shard_of: dict[str, str]) -> None:
        self._folder = folder
        self._shard_of = shard_of
        self.config: GptqConfig | None = read_config(folder)
        self.modules = {name.removesuffix(".qweight") for name in shard_of if name.endswith(".qweight")}
        if self.modules and self.config is None:
            module = sorted(self.modules)[0]
            raise WeightsError(f'{folder}: tensor "{module}.qweight" is quantized, but no config says how')
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})

    def __contains__(self, source: object) -> bool:
        return isinstance(source, Source) and _module(source) in self.modules

    def names(self) -> frozenset[str]:
        """Tensor names as a float checkpoint of the model would have them."""
        of_codes = {f"{module}.{part}" for module in self.modules for part in PARTS}
        return frozenset(self._shard_of) - of_codes | {f"{module}.weight" for module in self.modules}

    def grid(self, source: Source) -> Grid:
        """The grid that the config gives a quantized linear."""
        assert self.config is not None, "checked when opened"
        grid = grid_of(self.config, _module(source), prod(source.shape[1:]))
        if grid is None:
            raise WeightsError(
                f'{self._folder}: "{_module(source)}" has codes, but the config says that it is kept in float'
            )
        return grid

    def check(self, source: Source) -> None:
        """Raise WeightsError unless all parts are there, in the shapes that the model's weight has as codes."""
        module, grid, width = _module(source), self.grid(source), prod(source.shape[1:])
        for part in NEEDED:
            if f"{module}.{part}" not in self._shard_of:
                raise WeightsError(f'{self._folder}: tensor "{module}.{part}" is missing')
        with safe_open(self._folder / self._shard_of[f"{module}.qweight"], framework="pt") as shard:
            shape = tuple(shard.get_slice(f"{module}.qweight").get_shape())
        expected = (num_words(width, grid.bits), source.shape[0])
        if shape != expected:
            raise WeightsError(
                f'{self._folder}: tensor "{module}.qweight" is {list(shape)}, expected {list(expected)} for '
                f"{grid.bits} bits: do both configs belong to these weights?"
            )

    def linear(self, source: Source, start: int, stop: int) -> StoredLinear:
        """Rows start <= i < stop of a quantized linear."""
        assert self.config is not None, "checked when opened"
        module = _module(source)
        if self._last[0] != module:  # rows are asked for block by block
            self._last = module, self._read(module)
        where = f"{self._folder}: {module}"
        return decode_linear(self._last[1], self.grid(source), self.config.checkpoint_format, where, slice(start, stop))

    def values(self, source: Source, start: int, stop: int) -> Tensor:
        """Float values of some rows, float32 in the shape of the weight."""
        values = torch.from_numpy(self.linear(source, start, stop).dequantize())
        return values.reshape(stop - start, *source.shape[1:])

    def _read(self, module: str) -> dict[str, np.ndarray]:
        tensors = {}
        for part in PARTS:
            name = f"{module}.{part}"
            if name in self._shard_of:
                with safe_open(self._folder / self._shard_of[name], framework="pt") as shard:
                    values = shard.get_tensor(name)
                tensors[part] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        return tensors


def _module(source: Source) -> str:
    return source.name.removesuffix(".weight")
