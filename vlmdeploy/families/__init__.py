"""The model families. Each module in this folder, besides `config`, reads one kind of checkpoint and implements
`vlmdeploy.spec.model.Family`."""

import pkgutil
from importlib import import_module

from vlmdeploy.errors import ConfigError
from vlmdeploy.records import Config
from vlmdeploy.spec.model import Family

_NOT_FAMILIES = {"blocks", "config"}


def all_families() -> tuple[Family, ...]:
    """Every family module, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_FAMILIES)
    return tuple(import_module(f"{__name__}.{name}") for name in names)


def find_family(config: Config, tensor_names: frozenset[str]) -> Family:
    """The family of a checkpoint with this config.json and these tensors. Raises ConfigError if there is none."""
    matches = possible_families(config, tensor_names)
    assert len(matches) == 1, f"families that claim the same checkpoint: {[family.NAME for family in matches]}"
    return matches[0]


def possible_families(config: Config, tensor_names: frozenset[str] | None) -> tuple[Family, ...]:
    """The families that may read a checkpoint with this config.json; without tensor names (None) there may be several.

    Raises ConfigError if there is none, saying what the nearest family makes of it.
    """
    families = all_families()
    matches = tuple(family for family in families if family.detect(config, tensor_names))
    if matches:
        return matches
    kind = f"architecture {config.get('architectures')!r:.80} (model_type {config.get('model_type')!r:.80})"
    reasons = [reason for reason in (family.nearest(config) for family in families) if reason is not None]
    if not reasons and "vision_config" not in config:
        reasons = ['no "vision_config": a text-only model; expected a vision-language one']
    known = ", ".join(family.NAME for family in families)
    raise ConfigError(f"config.json: {kind} is not supported: {(*reasons, f'known families: {known}')[0]}")


def family_named(name: str) -> Family:
    """The family of that name; the name comes from a ModelSpec."""
    return next(family for family in all_families() if name == family.NAME)
