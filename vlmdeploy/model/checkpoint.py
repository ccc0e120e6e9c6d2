"""Read checkpoints in Hugging Face layout, one tensor or a few rows at a time.

Reads safetensors only, never pickles or code. Exactly one rule of the family uses each tensor, and every parameter is
filled exactly once.
"""

import hashlib
import json
from collections import Counter
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmdeploy.bundle import hash_file
from vlmdeploy.errors import ConfigError, WeightsError
from vlmdeploy.families import find_family
from vlmdeploy.model.decoder import default_inv_freq
from vlmdeploy.model.stored_codes import StoredCodes
from vlmdeploy.quant.grid import Grid, Quantized, stacked
from vlmdeploy.quant.packing import fills_words
from vlmdeploy.records import read_object
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.weight_rules import Source, WeightRule

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "MODEL_LICENSE*", "COPYING*", "USE_POLICY*")
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A checkpoint folder. Opening it reads configs and headers only."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise WeightsError(f"{self.folder}: no such folder; expected a checkpoint with config.json and safetensors")
        self.config = read_object(self.folder / "config.json", expected="a checkpoint in Hugging Face layout")
        self.generation_config = read_object(self.folder / "generation_config.json", is_optional=True)
        self.shard_of = tensor_shards(self.folder)
        self.codes = StoredCodes(self.folder, self.shard_of)
        try:
            family = find_family(self.config, self.codes.names())
            self.spec: ModelSpec = family.spec(self.config, self.generation_config)
        except ConfigError as error:
            raise ConfigError(f"{self.folder}/{error}") from error  # messages start with the config file's name
        self.rules = {rule.target: rule for rule in family.weights(self.spec)}
        self._fingerprint: str | None = None
        _check_tensors(self)

    def shape(self, target: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return self.rules[target].shape

    def size(self, target: str) -> int:
        """The number of values of a parameter."""
        return prod(self.shape(target))

    def __contains__(self, target: object) -> bool:
        """Whether the checkpoint fills a parameter; optional ones may be absent."""
        return target in self.rules and bool(self.present(self.rules[str(target)]))

    def parameter(self, target: str) -> Tensor:
        """A whole parameter, float32. Raises WeightsError if a value is not finite."""
        return self.rows(target, 0, self.shape(target)[0])

    def inv_freq(self) -> Tensor:
        """The stored rotary frequencies, else the exact ones, float32 [head_dim / 2]."""
        target = "decoder.inv_freq"
        return self.parameter(target) if target in self else default_inv_freq(self.spec.decoder)

    @property
    def is_quantized(self) -> bool:
        """Whether any linear is stored as codes."""
        return bool(self.codes.modules)

    def stored_grid(self, target: str) -> Grid | None:
        """The grid of a parameter, if all its sources are codes of one grid, else None."""
        sources = self.rules[target].sources
        if self.rules[target].op != "stack" or not all(source in self.codes for source in sources):
            return None
        grids = {self.codes.grid(source) for source in sources}
        return grids.pop() if len(grids) == 1 else None

    def can_store(self, target: str, grid: Grid) -> bool:
        """Whether codes of this grid fill the 32-bit words of GPTQ tensors, for each source of the parameter."""
        return all(
            fills_words(source.shape[0], grid.bits) and fills_words(prod(source.shape[1:]), grid.bits)
            for source in self.rules[target].sources
        )

    def quantized_rows(self, target: str, start: int, stop: int) -> Quantized:
        """Rows of a quantized parameter. Raises QuantizationError if no backend can hold them."""
        ranges = _row_ranges(self.rules[target], start, stop)
        return stacked([self.codes.quantized(source, first, last) for source, first, last in ranges])

    def fingerprint(self) -> str:
        """SHA-256 of config.json's content and all shards, computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
            for file in sorted(set(self.shard_of.values())):
                digest.update(hash_file(self.folder / file).sha256.encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def rows(self, target: str, start: int, stop: int) -> Tensor:
        """Rows start <= i < stop of a parameter along its first axis, float32. Raises WeightsError on Inf or NaN."""
        rule = self.rules[target]
        if rule.op == "stack":
            parts = [self._read(source, first, last) for source, first, last in _row_ranges(rule, start, stop)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        source = self.present(rule)[0]
        values = self._read(source, 0, source.shape[0])
        if rule.op == "same":
            self._check_same(rule, values)
        return values.reshape(rule.shape)[start:stop]

    def raw(self, name: str) -> Tensor:
        """A tensor as stored, by its name in the checkpoint."""
        with safe_open(self.folder / self.shard_of[name], framework="pt") as shard:
            values: Tensor = shard.get_tensor(name)
        return values

    def stored_bytes(self, rule: WeightRule) -> int:
        """Stored bytes of a rule's float tensors."""
        total = 0
        for source in self.present(rule):
            with safe_open(self.folder / self.shard_of[source.name], framework="pt") as shard:
                dtype = shard.get_slice(source.name).get_dtype()
            total += prod(source.shape) * FLOAT_DTYPES[dtype].itemsize
        return total

    def present(self, rule: WeightRule) -> list[Source]:
        """The sources of a rule that are present, as floats or as codes."""
        return [source for source in rule.sources if source.name in self.shard_of or source in self.codes]

    def _check_same(self, rule: WeightRule, values: Tensor) -> None:
        for source in self.present(rule)[1:]:
            if not torch.equal(self._read(source, 0, source.shape[0]), values):
                raise WeightsError(f'{self.folder}: tensor "{source.name}" differs from "{rule.sources[0].name}"')

    def _read(self, source: Source, start: int, stop: int) -> Tensor:
        """Rows of one stored tensor. Reopening the file each time frees its mapped pages."""
        if source in self.codes:
            return self.codes.values(source, start, stop)
        path = self.folder / self.shard_of[source.name]
        with safe_open(path, framework="pt") as shard:
            values: Tensor = shard.get_slice(source.name)[start:stop].float()
        if not bool(torch.isfinite(values).all()):
            raise WeightsError(f'{path}: tensor "{source.name}" holds NaN or Inf')
        return values


def tensor_shards(folder: Path) -> dict[str, str]:
    """Map tensor names to file names, from the index or the single file, checked against the file headers."""
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = read_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise WeightsError(f'{index_path}: has no "weight_map" object')
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise WeightsError(f'{index_path}: tensor "{name}" is in file {file!r}, expected a file name')
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).is_file():
        weight_map, files = None, [SINGLE_NAME]
    else:
        raise _no_safetensors(folder)
    found = [(name, file) for file in files for name in _shard_names(folder / file)]
    counts = Counter(name for name, _ in found)
    doubled = [name for name, count in counts.items() if count > 1]
    if doubled:
        raise WeightsError(f'{folder}: tensor "{doubled[0]}" is stored in more than one file')
    if weight_map is not None and weight_map != dict(found):
        odd = sorted(set(weight_map.items()) ^ set(found))[0]
        raise WeightsError(f'{index_path}: tensor "{odd[0]}" and file "{odd[1]}" do not match: index and shards differ')
    return dict(found)


def _no_safetensors(folder: Path) -> WeightsError:
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
    if not pickles:
        return WeightsError(f"{folder}: holds no {SINGLE_NAME} and no {INDEX_NAME}")
    name = pickles[0].name
    return WeightsError(
        f"{folder}: {name} is a pickle, which can run code and is not read. If you trust it, convert each file: "
        f'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in '
        f"torch.load('{name}', weights_only=True).items()}}, '{Path(name).stem}.safetensors')\""
    )


def _shard_names(path: Path) -> list[str]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, but {INDEX_NAME} names it")
    try:
        with safe_open(path, framework="pt") as shard:
            return list(shard.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file, {path.stat().st_size} bytes ({error})") from error


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Check that exactly one rule names each tensor, and that every source has the right shape and a float type."""
    where, stored = f"{checkpoint.folder}: {checkpoint.spec.family}", checkpoint.codes.names()
    sources = [(source, rule) for rule in checkpoint.rules.values() for source in rule.sources]
    unknown = sorted(stored - {source.name for source, _ in sources})
    if unknown:
        raise WeightsError(f'{where}: tensor "{unknown[0]}" is unknown ({len(unknown)} such tensors)')
    missing = [source.name for source, rule in sources if source.name not in stored and not rule.optional]
    if missing:
        raise WeightsError(f'{where}: tensor "{missing[0]}" is missing ({len(missing)} such tensors)')
    by_shard: dict[str, list[Source]] = {}
    for source, _ in sources:
        if source in checkpoint.codes:
            checkpoint.codes.check(source)
        elif source.name in stored:
            by_shard.setdefault(checkpoint.shard_of[source.name], []).append(source)
    for file, expected in by_shard.items():
        _check_shapes(checkpoint.folder / file, expected, checkpoint.spec.family)


def _check_shapes(path: Path, expected: list[Source], family: str) -> None:
    with safe_open(path, framework="pt") as shard:
        for source in expected:
            stored = shard.get_slice(source.name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
            if shape != source.shape:
                raise WeightsError(
                    f'{path}: {family}: tensor "{source.name}" is {list(shape)}, expected {list(source.shape)}: '
                    "does config.json belong to these weights?"
                )
            if dtype not in FLOAT_DTYPES:
                raise WeightsError(
                    f'{path}: tensor "{source.name}" is {dtype}, expected one of {", ".join(FLOAT_DTYPES)}'
                )


def _row_ranges(rule: WeightRule, start: int, stop: int) -> list[tuple[Source, int, int]]:
    """The source rows that make up rows start..stop of a stacked parameter."""
    ranges, offset = [], 0
    for source in rule.sources:
        first, last = max(start - offset, 0), min(stop - offset, source.shape[0])
        if first < last:
            ranges.append((source, first, last))
        offset += source.shape[0]
    return ranges
