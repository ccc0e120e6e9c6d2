"""The config of a GPTQ checkpoint, stored both as quantize_config.json and as config.json's `quantization_config`, with
regex overrides ("dynamic") for single linears.

Follows GPTQModel 7.7.0: a pattern matches from the start of the module's name and need not reach its end; all "-:"
patterns (kept in float) come first; of the others, the first match decides. `module_patterns` says what a pattern may
hold.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from vlmdeploy.errors import ConfigError, QuantizationError
from vlmdeploy.input_files import find_inside
from vlmdeploy.quant.grid import Grid
from vlmdeploy.quant.module_patterns import check_patterns, matches
from vlmdeploy.records import read_object

CONFIG_NAME = "quantize_config.json"
MODEL_CONFIG_NAME = "config.json"
MODEL_CONFIG_KEY = "quantization_config"

CheckpointFormat = Literal["gptq", "gptq_v2"]
FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
PLANAR_BITS = (5, 6, 7)
WHOLE_WIDTH = -1
HEAD = "lm_head"

# Our key -> its names in files. If two of them are present, they must agree.
ALIASES = {
    "quant_method": ("quant_method", "method"),
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size"),
    "sym": ("sym",),
    "checkpoint_format": ("checkpoint_format", "format", "version"),
    "desc_act": ("desc_act",),
    "dynamic": ("dynamic",),
    "lm_head": ("lm_head",),
    "pack_dtype": ("pack_dtype",),
    "is_marlin_format": ("is_marlin_format",),
}
MUST_AGREE = (
    "quant_method", "bits", "group_size", "sym", "checkpoint_format", "desc_act", "dynamic", "lm_head", "pack_dtype",
)  # fmt: skip
LARGEST_GROUP = (1 << 31) - 1

Settings = dict[str, Any]


@dataclass(frozen=True)
class Override:
    """Overrides for the modules that a pattern matches; None keeps the config's value."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass(frozen=True)
class GptqConfig:
    """group_size: -1 is one group for the whole width. dynamic: pattern (without "-:") and override, None for modules
    kept in float. provenance: further keys that we write and no reader needs."""

    bits: int
    group_size: int
    symmetric: bool = True
    checkpoint_format: CheckpointFormat = "gptq"
    desc_act: bool = False
    dynamic: tuple[tuple[str, Override | None], ...] = ()
    lm_head: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleGrid:
    """A linear: its name in the checkpoint, its input width and its grid (None: kept in float)."""

    name: str
    in_width: int
    grid: Grid | None


def read_config(folder: Path, follow_links: bool = False) -> GptqConfig | None:
    """Read the config of a checkpoint folder; None if neither file mentions a quantization.

    Raises ConfigError for other methods than GPTQ, other layouts, two files that contradict each other, and a link out
    of the folder without `follow_links`.
    """
    own, model = (find_inside(folder, name, ConfigError, follow_links) for name in (CONFIG_NAME, MODEL_CONFIG_NAME))
    found: list[tuple[str, Settings]] = []
    if own is not None:  # AutoGPTQ wrote no quant_method here: the file name implied it
        found.append((str(own), {"quant_method": "gptq"} | _settings(str(own), read_object(own))))
    if model is not None and (nested := read_object(model).get(MODEL_CONFIG_KEY)) is not None:
        where = f"{model}: {MODEL_CONFIG_KEY}"
        found.append((where, _settings(where, nested)))
    if not found:
        return None
    if len(found) == 2:
        _check_agreement(*found)
    merged = {key: value for _, settings in reversed(found) for key, value in settings.items()}
    return _config_from(found[0][0], merged)


def config_json(config: GptqConfig) -> Settings:
    """The content for both files. Raises ConfigError if provenance would override a key that readers need."""
    own = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.symmetric,
        "desc_act": config.desc_act,
        "checkpoint_format": config.checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": config.lm_head,
    }
    if config.dynamic:
        own["dynamic"] = dict(_pattern_json(*entry) for entry in config.dynamic)
    taken = {name for names in ALIASES.values() for name in names} & set(config.provenance)
    if taken:
        raise ConfigError(f"provenance may not set {', '.join(sorted(taken))}: readers need it")
    return own | dict(config.provenance)


def grid_of(config: GptqConfig, module_name: str, in_width: int) -> Grid | None:
    """The grid of one linear; None if a "-:" pattern, or a missing lm_head flag, keeps it in float.

    module_name is the tensor's name without ".qweight" or ".weight".
    """
    if module_name.rpartition(".")[2] == HEAD and not config.lm_head:
        return None
    if any(override is None and matches(pattern, module_name) for pattern, override in config.dynamic):
        return None
    override = _first_match(config, module_name)
    group_size = config.group_size if override.group_size is None else override.group_size
    return Grid(
        bits=config.bits if override.bits is None else override.bits,
        group_size=in_width if group_size == WHOLE_WIDTH else group_size,
        symmetric=config.symmetric if override.symmetric is None else override.symmetric,
    )


def dynamic_overrides(modules: Sequence[ModuleGrid], provenance: Mapping[str, Any] | None = None) -> GptqConfig:
    """The config for which `grid_of` returns each module's grid: the commonest grid as the default, and one pattern per
    kind of module that differs, which lists layer numbers only if the layers differ.

    Raises QuantizationError if no module is quantized.
    """
    bits, group_size, symmetric = _commonest(modules)
    config = GptqConfig(
        bits,
        group_size,
        symmetric,
        lm_head=any(_is_head(module) and module.grid is not None for module in modules),
        provenance=dict(provenance or {}),
    )
    kinds: dict[tuple[str, str], dict[str, Override | None]] = {}
    for module in modules:
        if not _is_head(module) or module.grid is not None:
            before, number, after = _split_layer(module.name)
            kinds.setdefault((before, after), {})[number] = _difference(module, config)
    entries = [entry for kind, by_layer in kinds.items() for entry in _patterns(*kind, by_layer)]
    entries.sort(key=lambda entry: entry[1] is not None)  # kept in float first, as GPTQModel matches them
    return replace(config, dynamic=tuple(entries))


def _first_match(config: GptqConfig, name: str) -> Override:
    for pattern, override in config.dynamic:
        if override is not None and matches(pattern, name):
            return override
    return Override()


def _is_head(module: ModuleGrid) -> bool:
    return module.name.rpartition(".")[2] == HEAD


def _commonest(modules: Sequence[ModuleGrid]) -> tuple[int, int, bool]:
    """The commonest bits, group size and symmetry. A whole-width group counts as both its size and -1."""
    votes: Counter[tuple[int, int, bool]] = Counter()
    for module in modules:
        if module.grid is not None:
            sizes = {module.grid.group_size} | ({WHOLE_WIDTH} if module.grid.group_size == module.in_width else set())
            votes.update((module.grid.bits, size, module.grid.symmetric) for size in sizes)
    if not votes:
        raise QuantizationError("no linear is quantized: there is nothing to write a GPTQ config for")
    # On a tie between -1 and the size: -1 if the size is no group size of any kernel, else the size.
    return max(votes, key=lambda grid: (votes[grid], grid[1] <= 128, grid[1], grid))


def _difference(module: ModuleGrid, config: GptqConfig) -> Override | None:
    """How the module differs from the config; an empty Override if it does not."""
    grid = module.grid
    if grid is None:
        return None
    common = module.in_width if config.group_size == WHOLE_WIDTH else config.group_size
    return Override(
        bits=None if grid.bits == config.bits else grid.bits,
        group_size=None if grid.group_size == common else _stated_group_size(module, grid),
        symmetric=None if grid.symmetric == config.symmetric else grid.symmetric,
    )


def _stated_group_size(module: ModuleGrid, grid: Grid) -> int:
    return WHOLE_WIDTH if grid.group_size == module.in_width else grid.group_size


def _split_layer(name: str) -> tuple[str, str, str]:
    """Split a name at its first numeric part: before, layer number, after."""
    match = re.match(r"(.*?(?:^|\.))(\d+)((?:\..*)?)$", name)
    return (match[1], match[2], match[3]) if match else (name, "", "")


def _patterns(before: str, after: str, by_layer: Mapping[str, Override | None]) -> list[tuple[str, Override | None]]:
    """One pattern for each distinct override of this kind."""
    chosen = list(dict.fromkeys(by_layer.values()))
    entries: list[tuple[str, Override | None]] = []
    for override in chosen:
        if override == Override():
            continue
        numbers = sorted(
            (number for number in by_layer if by_layer[number] == override), key=lambda number: int(number or 0)
        )
        layers = _layers_pattern(numbers, all_alike=len(chosen) == 1)
        entries.append((f"^{re.escape(before)}{layers}{re.escape(after)}$", override))
    return entries


def _layers_pattern(numbers: list[str], all_alike: bool) -> str:
    if numbers == [""]:
        return ""
    if all_alike and len(numbers) > 1:
        return r"\d+"
    return numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"


def _pattern_json(pattern: str, override: Override | None) -> tuple[str, Settings]:
    if override is None:
        return f"-:{pattern}", {}
    values = {"bits": override.bits, "group_size": override.group_size, "sym": override.symmetric}
    return pattern, {key: value for key, value in values.items() if value is not None}


def _checked_object(where: str, content: Any) -> Settings:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {content!r:.80}")
    return content


def _settings(where: str, raw: Any) -> Settings:
    """The known keys under our names; null counts as absent."""
    given = _checked_object(where, raw)
    settings: Settings = {}
    for key, names in ALIASES.items():
        values = {name: _folded(given[name]) for name in names if given.get(name) is not None}
        if not values:
            continue
        settings[key] = next(iter(values.values()))
        if any(value != settings[key] for value in values.values()):
            raise ConfigError(f"{where}: {' and '.join(values)} contradict each other: {list(values.values())!r:.80}")
    return settings


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _check_agreement(first: tuple[str, Settings], second: tuple[str, Settings]) -> None:
    for key in MUST_AGREE:
        ours, theirs = first[1].get(key), second[1].get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise ConfigError(
                f"{first[0]} has {key} {ours!r:.80}, but {second[0]} has {theirs!r:.80}: which one is right?"
            )


def _config_from(where: str, settings: Settings) -> GptqConfig:
    _check_layout(where, settings)
    return GptqConfig(
        bits=_checked_bits(where, settings.get("bits")),
        group_size=_checked_group_size(where, settings.get("group_size")),
        symmetric=_checked_flag(where, "sym", settings.get("sym", True)),
        checkpoint_format=cast(CheckpointFormat, settings.get("checkpoint_format", "gptq")),
        desc_act=_checked_flag(where, "desc_act", settings.get("desc_act", False)),
        dynamic=_dynamic_from(f"{where}: dynamic", settings.get("dynamic", {})),
        lm_head=_checked_flag(where, "lm_head", settings.get("lm_head", False)),
    )


def _check_layout(where: str, settings: Settings) -> None:
    """Raise ConfigError unless the tensors are in the layout that `gptq_format` reads."""
    method, layout = settings.get("quant_method"), settings.get("checkpoint_format", "gptq")
    if method != "gptq":
        raise ConfigError(f"{where}: quantized with {method!r:.80}; only GPTQ checkpoints can be read")
    if settings.get("is_marlin_format") or layout == "marlin":
        raise ConfigError(
            f"{where}: the codes are in Marlin's kernel layout; expected the layout {' or '.join(FORMATS)}"
        )
    if layout == "gptq_p":
        raise ConfigError(
            f"{where}: the codes are in GPTQModel's planar layout gptq_p; expected {' or '.join(FORMATS)}"
        )
    if layout not in FORMATS:
        raise ConfigError(f"{where}: unknown checkpoint_format {layout!r:.80}; expected {' or '.join(FORMATS)}")
    if settings.get("pack_dtype", "int32") != "int32":
        raise ConfigError(f"{where}: pack_dtype is {settings['pack_dtype']!r:.80}; only int32 words can be read")


def _checked_bits(where: str, bits: Any) -> int:
    if type(bits) is int and bits in PLANAR_BITS:
        raise ConfigError(f"{where}: {bits} bits exist only in GPTQModel's planar layout, which cannot be read")
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f"{where}: bits is {bits!r:.80}; expected {', '.join(map(str, BITS))}")
    return bits


def _checked_group_size(where: str, group_size: Any) -> int:
    if type(group_size) is not int or not (1 <= group_size <= LARGEST_GROUP or group_size == WHOLE_WIDTH):
        raise ConfigError(f"{where}: group_size is {group_size!r:.80}; expected a positive number or -1 (whole width)")
    return group_size


def _checked_flag(where: str, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {value!r:.80}; expected true or false")
    return value


def _dynamic_from(where: str, raw: Any) -> tuple[tuple[str, Override | None], ...]:
    entries = tuple(_entry_from(where, *entry) for entry in _checked_object(where, raw).items())
    check_patterns([pattern for pattern, _ in entries], where)
    return entries


def _entry_from(where: str, pattern: str, raw: Any) -> tuple[str, Override | None]:
    """One pattern without its prefix. Ignores keys that do not affect reading, as GPTQModel does."""
    here = f"{where}: {pattern:.80}"
    bare = pattern[2:] if pattern.startswith(("-:", "+:")) else pattern
    if pattern.startswith("-:"):
        return bare, None
    given = _checked_object(here, raw)
    return bare, Override(
        bits=_checked_bits(here, given["bits"]) if "bits" in given else None,
        group_size=_checked_group_size(here, given["group_size"]) if "group_size" in given else None,
        symmetric=_checked_flag(here, "sym", given["sym"]) if "sym" in given else None,
    )
