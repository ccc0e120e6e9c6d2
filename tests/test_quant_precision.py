"""Contract tests: the table of targets, the rule that finds one group size for a part, and what stays in float."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.errors import ExportError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.precision import TARGETS, Precision, common_group, encoder_warning, plan_precision
from vlmdeploy.spec.matrices import PARTS, matrices
from vlmdeploy.spec.model import ModelSpec

PRECISION_OF = {  # vision, connector, decoder, lm_head, embedding
    "ort-fp32": ("fp32", "fp32", "fp32", "fp32", "fp32"),
    "ort-fp16": ("fp16", "fp16", "fp16", "fp16", "fp16"),
    "ort-int8": ("int8", "int8", "int8", "int8", "int8"),
    "ort-int4": ("int8", "int8", "int4", "int8", "int8"),
    "rtx-int4": ("fp16", "fp16", "int4", "fp16", "int8"),
    "trt-int4": ("fp16", "fp16", "int4", "fp16", "int8"),
    "trt-fp16": ("fp16", "fp16", "fp16", "fp16", "fp16"),
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Decoder widths 64 and 104, encoder widths 32 and 24."""
    folder = tmp_path_factory.mktemp("ckpt")
    sizes: dict[str, Any] = {"hidden": 64, "mlp": 104, "vision_width": 32, "vision_mlp": 24}
    return Checkpoint(write_tiny_checkpoint(folder, "cogvlm2", **sizes)).spec


@pytest.mark.parametrize(
    ("widths", "requested", "expected"),
    [
        ({4096, 11008}, 128, 128),  # CogVLM: every width is a multiple of 128
        ({1792, 15360}, 128, 128),  # its encoder
        ({4096, 14336}, 64, 64),
        ({256, 384}, 32, 32),
        ({128, 384}, 128, 64),  # a group as wide as the input is not one
        ({64, 96}, 128, 32),
        ({96, 320}, 128, 32),
        ({48, 96}, 128, 16),
        ({64, 100}, 128, 32),  # not even 16 divides 100: it stays in float, the others keep their group
        ({128, 100}, 128, 64),
        ({256, 100}, 64, 64),
        ({64, 100}, 32, 32),
        ({64, 40}, 16, 16),
        ({256, 16}, 128, 64),  # 16 inputs cannot be one of several groups of 16
        ({32}, 128, 16),
        ({16}, 128, 0),
        ({40, 56}, 128, 0),
        ({100}, 16, 0),
        (set(), 128, 0),
    ],
)
def test_one_group_size_fits_every_width_that_16_divides(widths: set[int], requested: int, expected: int) -> None:
    assert common_group(widths, requested) == expected


@pytest.mark.parametrize("target", TARGETS)
def test_target_gives_every_part_its_precision(spec: ModelSpec, target: str) -> None:
    plan = plan_precision(spec, target, {})
    assert plan.parts == dict(zip(PARTS, PRECISION_OF[target], strict=True))
    assert plan.is_quantized == ("int" in target)


def test_every_linear_and_the_embedding_have_a_precision(spec: ModelSpec) -> None:
    plan = plan_precision(spec, "ort-int4", {})
    assert set(plan.by_target) == {linear.target for linear in matrices(spec)} | {"embedding.weight"}
    assert plan["decoder.layers.0.vision.qkv.weight"] == Precision("int4", 32)
    assert plan["vision.layers.1.fc1.weight"] == Precision("int8", 16)
    assert plan["lm_head.weight"] == Precision("int8", 32)
    assert plan["embedding.weight"] == Precision("int8", 32)


def test_linears_cover_every_matrix_of_the_checkpoint(spec: ModelSpec, tmp_path: Path) -> None:
    """All parameters with two or more axes are planned, apart from the tables and the patch convolution."""
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path, "cogvlm2"))
    stored = {target for target, rule in checkpoint.rules.items() if len(rule.shape) > 1}
    tables = {"embedding.weight", "vision.positions", "vision.patch.weight"}
    assert {linear.target for linear in matrices(checkpoint.spec)} == stored - tables
    assert {linear.target: linear.values for linear in matrices(checkpoint.spec)} == {
        target: checkpoint.parameter(target).numel() for target in stored - tables
    }


def test_linears_that_no_group_divides_stay_in_float_and_are_listed(spec: ModelSpec) -> None:
    plan = plan_precision(spec, "ort-int4", {})
    down = [f"decoder.layers.{layer}.{expert}.down.weight" for layer in (0, 1) for expert in ("language", "vision")]
    fc2 = [f"vision.layers.{layer}.fc2.weight" for layer in (0, 1)]
    assert set(plan.kept_in_float) == {*down, *fc2, "connector.mlp.down.weight"}
    assert {plan[target] for target in plan.kept_in_float} == {Precision("fp32")}
    assert plan.group_sizes == {"vision": 16, "connector": 16, "decoder": 32, "lm_head": 32, "embedding": 32}


def test_requested_group_is_taken_where_it_fits(spec: ModelSpec) -> None:
    plan = plan_precision(spec, "ort-int8", {}, group=16)
    assert {plan.group_sizes[part] for part in ("vision", "connector", "decoder", "lm_head")} == {16}


def test_overrides_change_their_part_only(spec: ModelSpec) -> None:
    plan = plan_precision(spec, "ort-int4", {"vision": "fp16", "lm_head": "int4", "embedding": "int8"})
    assert plan.parts == {
        "vision": "fp16", "connector": "int8", "decoder": "int4", "lm_head": "int4", "embedding": "int8",
    }  # fmt: skip
    assert plan["vision.layers.0.fc2.weight"] == Precision("fp16"), "floats take any width"
    assert plan["embedding.weight"] == Precision("int8", 32)


@pytest.mark.parametrize(
    ("target", "overrides", "group", "message"),
    [
        ("trt-int5", {}, 128, 'target "trt-int5" is unknown; known: ort-fp32, ort-fp16, ort-int8, ort-int4'),
        ("ort-int4", {"vision": "int5"}, 128, 'precision "int5" of part "vision" is unknown; known: fp32, fp16'),
        ("ort-int4", {"head": "int8"}, 128, 'precision "int8" of part "head" is unknown'),
        ("ort-int4", {}, 0, "group size 0 is not supported; known: 128, 64, 32, 16"),
        ("ort-int4", {}, 48, "group size 48 is not supported"),
        ("ort-int4", {}, 256, "group size 256 is not supported"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known_ones(
    spec: ModelSpec, target: str, overrides: dict[str, str], group: int, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        plan_precision(spec, target, overrides, group)


def test_large_encoder_in_fp16_is_told_with_its_size(spec: ModelSpec) -> None:
    """CogVLM's encoder: 63 layers of 1792 and 15360."""
    vision = replace(spec.vision, num_layers=63, width=1792, mlp_width=15360)
    large, int4 = replace(spec, vision=vision), {"vision": "int4", "connector": "int4"}
    (warning,) = encoder_warning(plan_precision(large, "trt-int4", {}), large)
    assert "fp16, 8.6 GB" in warning and "--vision int4" in warning
    assert not list(encoder_warning(plan_precision(large, "trt-int4", int4), large))
    assert not list(encoder_warning(plan_precision(spec, "trt-int4", {}), spec))
