"""The model to plan for: the widths of a family's released checkpoint, or of a checkpoint folder.

Weights are never read and may be missing: config.json with an index, or with the family's name, is enough.
"""

from dataclasses import dataclass
from pathlib import Path

from vlmdeploy.errors import ConfigError
from vlmdeploy.export.weight_reader import stored_precisions
from vlmdeploy.families import all_families, possible_families
from vlmdeploy.input_files import find_inside
from vlmdeploy.model.checkpoint import Checkpoint, read_config_file
from vlmdeploy.model.shards import INDEX_NAME, MOST_HEADER_BYTES
from vlmdeploy.quant.precision import Stored
from vlmdeploy.records import read_object
from vlmdeploy.spec.connector import Activation, BoundaryRows, ConnectorSpec, Downsample, GatedMlp, Norm, Projection
from vlmdeploy.spec.decoder import DecoderSpec, ExpertSpec, RopeSpec
from vlmdeploy.spec.model import Family, Geometry
from vlmdeploy.spec.vision import VisionSpec

ONE_IMAGE = 1  # of every family so far


@dataclass(frozen=True)
class Widths:
    """The widths of a model."""

    vision: VisionSpec
    connector: ConnectorSpec
    decoder: DecoderSpec


# Source: the published config.json and tensor list of glm-4v-9b. 13,906,320,896 parameters follow.
GLM4V = Widths(
    vision=VisionSpec(
        image_px=1120, patch_px=14, width=1792, num_layers=63, num_heads=16, mlp_width=15360, norm_eps=1e-6
    ),
    connector=ConnectorSpec(
        (
            Downsample(1792, 4096),
            Projection(4096, 4096),
            Norm(4096, 1e-5),
            Activation(),
            GatedMlp(4096, 13696, 4096),
            BoundaryRows(4096),
        )
    ),
    decoder=DecoderSpec(
        hidden=4096, num_layers=40, num_heads=32, num_kv_heads=2, head_dim=128, mlp_width=13696, vocab_size=151552,
        norm_eps=1.5625e-7, rope=RopeSpec(10000.0, 64, "adjacent"), experts=(ExpertSpec("language", qkv_bias=True),),
        context_tokens=8192,
    ),
)  # fmt: skip
PLANNED_ONLY: dict[str, Geometry] = {"glm4v": GLM4V}


@dataclass(frozen=True)
class PlannedModel:
    """The model of a plan. stored: the precisions in a quantized checkpoint; can_export: false if only planning
    works."""

    name: str
    geometry: Geometry
    stored: Stored | None = None
    can_export: bool = True


def family_names() -> list[str]:
    """Every name that `--family` takes."""
    return [*(family.NAME for family in all_families()), *PLANNED_ONLY]


def planned_model(folder: Path | None, family: str | None, follow_links: bool = False) -> PlannedModel:
    """The model in a folder, or without a folder a family's. Raises ConfigError and WeightsError."""
    if folder is not None:
        return checkpoint_model(folder, family, follow_links)
    assert family is not None, "the command line asks for one of the two"
    return released_model(family)


def released_model(name: str) -> PlannedModel:
    """A family's best known checkpoint; spelling is lenient ("GLM-4V" is glm4v). Raises ConfigError listing the
    names."""
    plain = _plain(name)
    if plain in PLANNED_ONLY:
        return PlannedModel(plain, PLANNED_ONLY[plain], can_export=False)
    family = _family(name)
    return PlannedModel(family.NAME, family.spec(family.RELEASED, {}))


def checkpoint_model(folder: Path, family: str | None = None, follow_links: bool = False) -> PlannedModel:
    """The model in a folder. Without weights and an index, `family` must say which it is.

    Raises ConfigError and WeightsError.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; expected a checkpoint, or at least its config.json")
    if any(folder.glob("*.safetensors")):
        checkpoint = Checkpoint(folder, follow_links)
        if family not in (None, checkpoint.spec.family):
            raise ConfigError(f"{folder}: holds {checkpoint.spec.family}, but --family is {family}")
        return PlannedModel(str(folder), checkpoint.spec, stored_precisions(checkpoint))
    return _config_model(folder, family, follow_links)


def _config_model(folder: Path, family: str | None, follow_links: bool) -> PlannedModel:
    """The float model of a folder without weights."""
    config = read_config_file(folder, follow_links)
    index_path = find_inside(folder, INDEX_NAME, ConfigError, follow_links)
    index = {} if index_path is None else read_object(index_path, most_bytes=MOST_HEADER_BYTES)
    if "quantization_config" in config:
        raise ConfigError(
            f"{folder}: config.json is of a quantized checkpoint without its weights, and only they tell what is in "
            "which bits"
        )
    names = index.get("weight_map")
    listed = frozenset(names) if isinstance(names, dict) and names else None
    try:
        possible = possible_families(config, listed) if family is None else (_family(family),)
        if len(possible) == 1:
            return PlannedModel(str(folder), possible[0].spec(config, {}))
    except ConfigError as error:
        raise ConfigError(f"{folder}/{error}" if str(error).startswith("config.json") else str(error)) from error
    known = [item.NAME for item in possible]
    raise ConfigError(
        f"{folder}: holds no weights and no {INDEX_NAME} that lists any, and config.json alone does not tell "
        f"{' from '.join(known)}: say which with --family {'|'.join(known)}"
    )


def _family(name: str) -> Family:
    found = [family for family in all_families() if _plain(name) == family.NAME]
    if not found:
        only = f", and without a checkpoint {', '.join(PLANNED_ONLY)}"
        raise ConfigError(
            f'family "{name}" is not known: choose one of {", ".join(item.NAME for item in all_families())}{only}'
        )
    return found[0]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
