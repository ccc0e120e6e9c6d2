"""A training recipe (TOML) as typed dataclasses. A ConfigError names the file and the key of an unknown, mistyped or
invalid value. The table [model] becomes config.json, except its key `family`, which is needed only if the other keys
leave the family open."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmdeploy.errors import ConfigError
from vlmdeploy.families import possible_families
from vlmdeploy.input_files import why_unreadable
from vlmdeploy.records import Config, read_toml, record_of
from vlmdeploy.spec.model import Family, ModelSpec

FAMILY = "family"  # a key of [model]


@dataclass(frozen=True)
class OptimizerConfig:
    """Constants of the update: Muon for matrices, AdamW for everything else."""

    weight_decay: float
    beta1: float
    beta2: float
    momentum: float  # of Muon
    clip: float  # largest norm of the gradient


@dataclass(frozen=True)
class TextConfig:
    """How to pack dialogues into rows of tokens, and the loss weights of special answer tokens (others: 1)."""

    template: str
    row_tokens: int
    chunk_tokens: int  # longest prompt and answer
    end_weight: float
    box_units_weight: float  # the last digit of a coordinate
    box_marks_weight: float  # brackets and commas


@dataclass(frozen=True)
class StageConfig:
    """One training stage with its own learning rate schedule.

    The learning rate falls along a cosine to final_lr_share of its peak. Beside a language loss, the weight of the
    patch losses falls to 0. cpu_share: share of the CPU budget. average: decay of the moving average that replaces the
    weights at the end (0: none).
    """

    name: str
    trains: Literal["vision", "all"]
    images: int
    batch_images: int
    lr: float
    final_lr_share: float
    warmup_steps: int
    dense_weight: float
    cpu_share: float
    vision_lr_scale: float = 1.0
    average: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """The content of the TOML file. Paths are relative to it; the Python file `data` defines data_class."""

    seed: int
    workers: int
    max_cpu_minutes: float
    save_every_s: float
    dtype: Literal["auto", "bfloat16", "float32"]
    tokenizer: str
    data: str
    data_class: str
    optimizer: OptimizerConfig
    text: TextConfig
    stages: tuple[StageConfig, ...]
    model: dict[str, Any]


@dataclass(frozen=True)
class TrainConfig:
    """A checked recipe with its path, its plain values and the spec of its model."""

    path: Path
    values: dict[str, Any]
    recipe: Recipe
    spec: ModelSpec

    @property
    def tokenizer_path(self) -> Path:
        """The checkpoint's tokenizer.json."""
        return self.path.parent / self.recipe.tokenizer

    @property
    def data_path(self) -> Path:
        """The Python file with the data class."""
        return self.path.parent / self.recipe.data

    @property
    def model_config(self) -> Config:
        """config.json of the checkpoint."""
        return {key: value for key, value in self.recipe.model.items() if key != FAMILY}


def load_config(path: Path) -> TrainConfig:
    """Read and check a training recipe; raises ConfigError."""
    values = read_toml(path, "a training recipe")
    recipe = record_of(Recipe, values, str(path), unknown="refused")
    config = TrainConfig(path.absolute(), values, recipe, _read_spec(path, recipe.model))
    for key, found, expected in _problems(config):
        raise ConfigError(f'{path}: "{key}" is {found!r:.400}, expected {expected}')
    return config


def _read_spec(path: Path, model: Config) -> ModelSpec:
    try:
        possible = possible_families(model, None)
        spec = _chosen_family(possible, model.get(FAMILY)).spec(model, {})
    except ConfigError as error:
        raise ConfigError(f"{path}: [model]: {error}") from error
    if len(spec.decoder.experts) != 2:
        raise ConfigError(f"{path}: [model]: {spec.family} has one expert, expected a language and a vision expert")
    return spec


def _chosen_family(possible: tuple[Family, ...], named: Any) -> Family:
    chosen = [family for family in possible if named in (None, family.NAME)]
    if len(chosen) == 1:
        return chosen[0]
    found = "missing" if named is None else repr(named)
    expected = " or ".join(repr(family.NAME) for family in possible)
    raise ConfigError(f'"{FAMILY}" is {found}, expected {expected} (as the other keys allow; see docs/families)')


def _problems(config: TrainConfig) -> Iterator[tuple[str, Any, str]]:
    """Invalid values: key, value, what is expected."""
    recipe, text = config.recipe, config.recipe.text
    if not 1 <= recipe.workers <= 256:
        yield "workers", recipe.workers, "1 to 256"
    if not recipe.max_cpu_minutes > 0:
        yield "max_cpu_minutes", recipe.max_cpu_minutes, "more than 0"
    if config.data_path.suffix != ".py":
        yield "data", recipe.data, "a Python file"
    if config.tokenizer_path.suffix != ".json":
        yield "tokenizer", recipe.tokenizer, "a tokenizer.json"
    if recipe.seed < 0:
        yield "seed", recipe.seed, "at least 0"
    for key, file in (("tokenizer", config.tokenizer_path), ("data", config.data_path)):
        if problem := why_unreadable(file):
            yield key, str(file), f"a file beside the recipe ({problem})"
    templates = [template.name for template in config.spec.templates]
    if text.template not in templates:
        yield "text.template", text.template, " or ".join(templates)
    if text.chunk_tokens < 1 or text.row_tokens < 1 or text.row_tokens % text.chunk_tokens:
        yield "text.row_tokens", text.row_tokens, f"a multiple of chunk_tokens, {text.chunk_tokens}"
    for index, stage in enumerate(recipe.stages):
        for key, value, expected in _stage_problems(stage, recipe.workers):
            yield f"stages.{index}.{key}", value, expected
    trained = [stage.trains for stage in recipe.stages]
    if not trained or trained != sorted(trained, reverse=True) or trained[-1] != "all":
        yield "stages", trained, 'stages for "vision" first, then at least one for "all"'
    share = sum(stage.cpu_share for stage in recipe.stages)
    if not 0.99 < share < 1.01:
        yield "stages", share, "shares (cpu_share) that add up to 1"


def _stage_problems(stage: StageConfig, workers: int) -> Iterator[tuple[str, Any, str]]:
    if stage.batch_images < 1 or stage.batch_images % workers:
        yield "batch_images", stage.batch_images, f"a multiple of the {workers} workers"
    for key in ("images", "lr", "cpu_share", "warmup_steps", "vision_lr_scale"):
        if not getattr(stage, key) > 0:
            yield key, getattr(stage, key), "more than 0"
    for key in ("final_lr_share", "average"):
        if not 0 <= getattr(stage, key) < 1:
            yield key, getattr(stage, key), "at least 0 and less than 1"
    if stage.dense_weight < 0 or (stage.dense_weight == 0 and stage.trains == "vision"):
        yield "dense_weight", stage.dense_weight, "more than 0 (the only loss of a vision stage)"
