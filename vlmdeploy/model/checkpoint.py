"""Read checkpoints in Hugging Face layout, one tensor or a few rows at a time.

Reads safetensors only, never pickles or code. Exactly one rule of the family uses each tensor that the family does not
ignore, and every parameter is filled exactly once.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vlmdeploy.bundle import hash_file
from vlmdeploy.errors import ConfigError, WeightsError
from vlmdeploy.families import find_family
from vlmdeploy.input_files import MOST_JSON_BYTES, find_inside, given_path, inside, is_plain_name, read_input
from vlmdeploy.model.decoder import default_inv_freq
from vlmdeploy.model.shards import Shards
from vlmdeploy.model.stored_codes import StoredCodes
from vlmdeploy.quant.grid import Grid, Quantized, stacked
from vlmdeploy.quant.packing import fills_words
from vlmdeploy.quant.quantization_report import read_report
from vlmdeploy.records import Config, read_object
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.spec.weight_rules import Source, WeightRule

MOST_CONFIG_BYTES = 16 << 20
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "MODEL_LICENSE*", "COPYING*", "USE_POLICY*")
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A checkpoint folder. Opening it reads configs and headers only. ignored: names of tensors that the model does not
    compute with.

    Its links are followed within it, in Hugging Face's cache to the blobs there; elsewhere only with `follow_links`.
    """

    def __init__(self, folder: str | Path, follow_links: bool = False) -> None:
        self.folder = given_path(folder, WeightsError, "the folder of a checkpoint")
        self.follow_links = follow_links
        if not self.folder.is_dir():
            raise WeightsError(f"{self.folder}: no such folder; expected a checkpoint with config.json and safetensors")
        self.config = read_config_file(self.folder, follow_links)
        self.generation_config = self._generation_config()
        self.shards = Shards(self.folder, follow_links)
        self.shard_of = self.shards.file_of
        self.codes = StoredCodes(self.shards)
        try:
            family = find_family(self.config, self.codes.names())
            self.spec: ModelSpec = family.spec(self.config, self.generation_config)
        except ConfigError as error:
            raise ConfigError(f"{self.folder}/{error}") from error  # messages start with the config file's name
        stored = self.codes.names()
        self.rules = {rule.target: _as_stored(rule, stored) for rule in family.weights(self.spec)}
        used = {source.name for rule in self.rules.values() for source in rule.sources}
        self.ignored = sorted(
            name for name in stored - used if any(fnmatchcase(name, pattern) for pattern in family.IGNORED)
        )
        self._fingerprint: str | None = None
        _check_tensors(self)

    def _generation_config(self) -> Config:
        path = find_inside(self.folder, "generation_config.json", ConfigError, self.follow_links)
        return {} if path is None else read_object(path, most_bytes=MOST_CONFIG_BYTES)

    def copy_files(self, patterns: Iterable[str], into: Path) -> None:
        """Copy the files whose names match, but no folders. Raises WeightsError for one that cannot be read."""
        for path in [path for pattern in patterns for path in sorted(self.folder.glob(pattern)) if not path.is_dir()]:
            if not is_plain_name(path.name):
                raise WeightsError(f"{path}: cannot be copied: its name has characters that cannot be printed")
            content = read_input(
                inside(self.folder, path.name, WeightsError, self.follow_links), WeightsError, MOST_JSON_BYTES
            )
            (into / path.name).write_bytes(content)

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
        """The stored rotary frequencies of all pairs, else the exact ones, float32."""
        target = "decoder.inv_freq"
        return self.parameter(target) if target in self else default_inv_freq(self.spec.decoder)

    def report(self) -> Config:
        """The report of `vlmdeploy quantize`; {} if there is none. Raises ConfigError."""
        return read_report(self.folder, self.follow_links)

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
        with self.shards.opened(name) as shard:
            values: Tensor = shard.get_tensor(name)
        return values

    def stored_bytes(self, rule: WeightRule) -> int:
        """Stored bytes of a rule's float tensors."""
        total = 0
        for source in self.present(rule):
            with self.shards.opened(source.name) as shard:
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
        """Rows of one stored tensor."""
        if source in self.codes:
            return self.codes.values(source, start, stop)
        with self.shards.opened(source.name) as shard:
            values: Tensor = shard.get_slice(source.name)[start:stop].float()
        if not bool(torch.isfinite(values).all()):
            raise WeightsError(f'{self.shards.path_of(source.name)}: tensor "{source.name}" holds NaN or Inf')
        return values


def read_config_file(folder: Path, follow_links: bool = False) -> Config:
    """The content of a checkpoint's config.json. Raises ConfigError."""
    path = inside(folder, "config.json", ConfigError, follow_links)
    return read_object(path, expected="a checkpoint in Hugging Face layout", most_bytes=MOST_CONFIG_BYTES)


def _as_stored(rule: WeightRule, stored: frozenset[str]) -> WeightRule:
    """A rule whose sources have the names of this checkpoint."""
    found = (
        next((name for name in (source.name, *source.also) if name in stored), source.name) for source in rule.sources
    )
    return replace(
        rule, sources=tuple(replace(source, name=name) for source, name in zip(rule.sources, found, strict=True))
    )


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Check that exactly one rule names each tensor, and that every source has the right shape and a float type."""
    where, stored = f"{checkpoint.folder}: {checkpoint.spec.family}", checkpoint.codes.names()
    sources = [(source, rule) for rule in checkpoint.rules.values() for source in rule.sources]
    unknown = sorted(stored - {source.name for source, _ in sources} - set(checkpoint.ignored))
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
    for expected in by_shard.values():
        _check_shapes(checkpoint.shards, expected, checkpoint.spec.family)


def _check_shapes(shards: Shards, expected: list[Source], family: str) -> None:
    """Check tensors that lie in one file."""
    path = shards.path_of(expected[0].name)
    with shards.opened(expected[0].name) as shard:
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
