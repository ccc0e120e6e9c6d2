"""Agreement: the planner's bytes are the bytes that an export writes, tensor by tensor; and the published budget."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.tiny_bundle import export, write_text_checkpoint
from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import ConfigError
from vlmdeploy.export.engines.parts import initializer_bytes
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.plan.planned_model import checkpoint_model, family_names, released_model
from vlmdeploy.plan.sizes import Storage, kv_bytes_per_token, small_bytes, weight_sizes
from vlmdeploy.quant.precision import plan_precision
from vlmdeploy.spec.matrices import matrices

ALL_INT4 = {"vision": "int4", "connector": "int4", "lm_head": "fp16", "embedding": "fp16"}
# GB of the published budget: every linear int4 with 4.156 bits, embedding and head 16 bit.
BUDGET = {"cogvlm": 9.56, "cogvlm2": 11.74, "glm4v": 9.13}


def shipped(bundle: Path) -> dict[str, int]:
    """Bytes of the tensors in each graph of a bundle that come from the checkpoint; constants left out."""
    sizes = {}
    for name, graph in read_manifest(bundle).graphs.items():
        model = onnx.load(str(bundle / graph.file), load_external_data=False)
        found = initializer_bytes(model)
        raw = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer if not tensor.external_data}
        wanted = [tensor for tensor in found if not tensor.startswith("ints_") and tensor != "attention.scale"]
        sizes[name] = sum(raw.get(tensor, found[tensor]) for tensor in wanted)
    return sizes


@pytest.mark.parametrize("family", ["cogvlm", "cogvlm2"])
@pytest.mark.parametrize(
    ("target", "provider"),
    [
        ("ort-fp32", "cpu"), ("ort-fp16", "cpu"), ("ort-int8", "cpu"), ("ort-int4", "cpu"),
        ("ort-int4", "cuda"), ("ort-fp16", "cuda"), ("trt-int4", "cpu"), ("trt-fp16", "cpu"),
    ],
)  # fmt: skip
def test_planned_bytes_are_those_of_the_exported_graphs(
    family: str, target: str, provider: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden": 64, "mlp": 96, "vision_width": 32, "vision_mlp": 64, "vocab": 259}
    checkpoint = write_tiny_checkpoint(tmp_path / "ckpt", family, **sizes)
    bundle = export(checkpoint, tmp_path / "bundle", target, provider=provider)
    model, manifest = checkpoint_model(tmp_path / "ckpt"), read_manifest(bundle)
    plan = plan_precision(model.geometry, target, {})
    planned = weight_sizes(model.geometry, plan, Storage.of(target, provider))
    assert planned.graphs == shipped(bundle)
    assert planned.total == sum(planned.graphs.values()) + planned.parts["embedding"]
    assert planned.parts["embedding"] == pytest.approx(manifest.files["embedding.bin"].bytes, abs=64 << 10)
    assert kv_bytes_per_token(model.geometry.decoder, manifest.cache.dtype) == manifest.memory_bytes["kv_per_token"]


ODD: dict[str, tuple[str, dict[str, int]]] = {
    "one layer": ("cogvlm2", {"layers": 1, "vision_layers": 1, "kv_heads": 1}),
    "padded heads": ("cogvlm2", {"hidden": 80, "vision_width": 40}),
    "odd grid": ("cogvlm2", {"image_px": 10}),
    "no width that 16 divides": ("cogvlm", {"hidden": 20, "heads": 2, "mlp": 36, "vision_width": 12, "vision_mlp": 20}),
}


@pytest.mark.parametrize("target", ["ort-int4", "trt-int4"])
@pytest.mark.parametrize("shape", ODD)
def test_planned_bytes_of_odd_shapes(shape: str, target: str, tmp_path: Path) -> None:
    family, changed = ODD[shape]
    sizes = {"hidden": 64, "mlp": 96, "vision_width": 32, "vision_mlp": 64, "vocab": 259, **changed}
    checkpoint = write_tiny_checkpoint(tmp_path / "ckpt", family, **sizes)  # type: ignore[arg-type]
    precisions = {"vision": "int8", "connector": "int4", "lm_head": "int8"}
    bundle = export(checkpoint, tmp_path / "bundle", target, precisions=precisions)
    geometry = checkpoint_model(checkpoint).geometry
    plan = plan_precision(geometry, target, precisions)
    assert weight_sizes(geometry, plan, Storage.of(target, "cpu")).graphs == shipped(bundle)


@pytest.mark.parametrize("part", ["int8", "int4"])
def test_planned_embedding_codes_are_those_exported(part: str, tmp_path: Path) -> None:
    checkpoint = write_text_checkpoint(tmp_path / "ckpt")
    bundle = export(checkpoint, tmp_path / "bundle", precisions={"embedding": part})
    geometry = Checkpoint(checkpoint).spec
    plan = plan_precision(geometry, "ort-fp32", {"embedding": part})
    size = weight_sizes(geometry, plan, Storage.of("ort-fp32", "cpu")).parts["embedding"]
    info = read_manifest(bundle).embedding
    scales = 2 * info.vocab_size * info.hidden // info.group_size
    codes = info.vocab_size * info.hidden * int(part[3:]) // 8
    assert size == codes + scales
    assert info.scales_offset + scales == read_manifest(bundle).files["embedding.bin"].bytes


@pytest.mark.parametrize("family", BUDGET)
def test_published_budget_is_met_to_one_percent(family: str) -> None:
    geometry = released_model(family).geometry
    plan = plan_precision(geometry, "trt-int4", ALL_INT4)
    sizes = weight_sizes(geometry, plan, Storage.of("trt-int4", "cuda"))
    decoder = geometry.decoder
    cut = decoder.hidden * (2 * decoder.hidden + 3 * decoder.mlp_width)  # of the last layer: q, dense and the MLP
    whole = sizes.total + (cut * (4 + 16 / 128) / 8 if len(decoder.experts) == 2 else 0)
    assert whole / 1e9 == pytest.approx(BUDGET[family], rel=0.01)
    assert all(isinstance(size, int) for size in sizes.parts.values())


@pytest.mark.parametrize(
    ("family", "count"), [("cogvlm", 17_639_685_376), ("cogvlm2", 19_503_105_280), ("glm4v", 13_906_320_896)]
)
def test_values_of_a_released_model_are_its_published_parameters(family: str, count: int) -> None:
    """Both decoder graphs hold the norms; the last vision bias of queries is not shipped."""
    geometry = released_model(family).geometry
    decoder, layers = geometry.decoder, geometry.decoder.num_layers
    small = sum(small_bytes(geometry, Storage("ort", "cpu")).values()) // 4
    weights = sum(item.values for item in matrices(geometry))
    norms_twice = (2 * layers - 1) * decoder.hidden if len(decoder.experts) == 2 else 0
    query_bias = decoder.num_heads * decoder.head_dim if family == "cogvlm2" else 0
    embedding = decoder.vocab_size * decoder.hidden
    assert weights + small - norms_twice + query_bias + embedding == count


@pytest.mark.parametrize(("family", "size"), [("cogvlm", 524288), ("cogvlm2", 131072), ("glm4v", 40960)])
def test_cache_of_a_token(family: str, size: int) -> None:
    assert kv_bytes_per_token(released_model(family).geometry.decoder, "fp16") == size


@pytest.mark.parametrize(("family", "rows"), [("cogvlm", 1227), ("cogvlm2", 2306), ("glm4v", 1602)])
def test_rows_of_an_image(family: str, rows: int) -> None:
    geometry = released_model(family).geometry
    assert geometry.connector.rows(geometry.vision) == rows


def test_unknown_family_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r'family "cogvlm3" is not known: choose one of cogvlm, .* and .* glm4v'):
        released_model("cogvlm3")
    assert family_names() == ["cogvlm", "cogvlm2", "llava", "glm4v"]


@pytest.mark.parametrize("family", ["cogvlm", "cogvlm2"])
def test_config_without_weights_tells_the_family_or_it_is_asked_for(tmp_path: Path, family: str) -> None:
    folder = write_tiny_checkpoint(tmp_path, family, heads=8, kv_heads=8)
    expected = checkpoint_model(folder).geometry.decoder
    (folder / "model.safetensors").unlink()
    assert checkpoint_model(folder).geometry.decoder == expected
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 5, "num_multi_query_heads": None}))
    with pytest.raises(ConfigError, match=r"does not tell cogvlm from .* say which with --family cogvlm\|cogvlm2"):
        checkpoint_model(folder)
    assert checkpoint_model(folder, family).geometry.decoder == expected


@pytest.mark.parametrize("name", ["CogVLM2", "cogvlm-2", "GLM-4V", "glm_4v"])
def test_family_may_be_spelt_as_people_do(name: str) -> None:
    assert released_model(name).name == name.lower().replace("-", "").replace("_", "")
