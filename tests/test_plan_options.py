"""Contract and regression tests of the planner's options: what an export or a build would refuse is refused, what has
no effect is named, and what is suggested can be had."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.calibration_data import write_calibration_checkpoint, write_calibration_data
from tests.tiny_bundle import export, run_cli
from vlmdeploy.devices import DEVICES
from vlmdeploy.errors import ConfigError, ExportError
from vlmdeploy.plan.device import PlanDevice, plan_device
from vlmdeploy.plan.draft import Plan
from vlmdeploy.plan.options import PlanOptions
from vlmdeploy.plan.planned_model import checkpoint_model, released_model
from vlmdeploy.plan.planner import make_plan


def planned(family: str, device: str | PlanDevice, **options: Any) -> Plan:
    found = plan_device(device) if isinstance(device, str) else device
    return make_plan(released_model(family), found, PlanOptions(**options))


def small(usable: int, kind: str = "jetson") -> PlanDevice:
    return replace(plan_device("agx-orin-64"), usable_bytes=usable, kind=kind)


@pytest.fixture(scope="module")
def int8_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint as `quantize` makes it by default: int4 decoder, int8 encoder, connector and head."""
    folder = tmp_path_factory.mktemp("plan")
    data, checkpoint = write_calibration_data(folder / "data"), write_calibration_checkpoint(folder / "ckpt")
    options = ("--group", "16", "--tokens", "1", "--allow-uncalibrated", "--threads", "1")
    result = run_cli("quantize", "--ckpt", checkpoint, "--calib", data, "--out", folder / "q", *options)
    assert result.exit_code == 0, result.stderr
    return folder / "q"


@pytest.mark.parametrize("device", [device.name for device in DEVICES])
def test_every_device_has_a_target_that_it_runs(device: str) -> None:
    plan = planned("cogvlm", device)
    assert plan.target == ("rtx-int4" if plan.device.kind == "rtx" else "trt-int4")
    assert plan.verdict.startswith(("fits", "does not fit"))


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("rtx-4080", {"target": "trt-int4"}, "rtx-4080 runs engines of tensorrt_rtx: plan with --target rtx-int4"),
        ("thor", {"target": "rtx-int4"}, "thor runs engines of tensorrt: plan with --target trt-int4"),
        ("h100", {"target": "ort-int4"}, "h100 is a card, and ort-int4 would run on the CPU beside it"),
        ("thor", {"provider": "cuda"}, "--provider cuda has no effect on trt-int4"),
        ("thor", {"target": "ort-int4", "chunk_rows": 128}, "--chunk-rows 128 has no effect on ort-int4"),
        ("thor", {"target": "ort-int4", "swap": "1GB"}, "--swap has no effect on ort-int4"),
        ("h100", {"swap": "1GB"}, "--swap has no effect on trt-int4"),
        ("thor", {"target": "trt-fp16", "group": 64}, "--group 64 has no effect on trt-fp16"),
        ("thor", {"target": "trt-fp16", "bits": 4}, "--bits is 4, but the decoder of trt-fp16 is fp16"),
        ("thor", {"target": "ort-int8", "bits": 4}, "--bits is 4, but the decoder of ort-int8 is int8"),
        ("thor", {"bits": 5}, "--bits is 5, but the decoder of trt-int4 is int4"),
        ("thor", {"target": "ort-int5"}, '--target "ort-int5" is not known'),
    ],
)  # fmt: skip
def test_options_that_cannot_be_or_do_nothing_are_named(device: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned("cogvlm", device, **options)
    assert message in str(caught.value)


def test_one_scale_for_a_whole_width_is_refused_as_by_export() -> None:
    with pytest.raises(ExportError, match="has one scale for all 4096 inputs, which TensorRT does not fuse"):
        planned("cogvlm", "thor", group=-1)
    assert planned("cogvlm", "thor", target="ort-int4", group=-1).group_sizes["decoder"] == -1


def test_group_that_fits_no_width_is_told(tmp_path: Path) -> None:
    checkpoint = write_calibration_checkpoint(tmp_path / "ckpt")
    plan = make_plan(checkpoint_model(checkpoint), plan_device("thor"), PlanOptions())
    assert any(line.startswith("group size 128 does not fit every width") for line in plan.warnings)
    assert not any("group size" in line for line in planned("cogvlm", "thor", precisions={"vision": "int8"}).warnings)


def test_engines_of_a_card_are_not_built_in_its_own_memory() -> None:
    plan = planned("cogvlm2", "l4")
    assert plan.build is not None and plan.build.least_ram_bytes > plan.usable_bytes
    assert (plan.build.where, plan.verdict) == ("on the machine of the card", "fits")


def test_build_takes_no_more_than_the_builder_would_by_itself() -> None:
    least = planned("cogvlm2", "agx-orin-64").build
    assert least is not None
    edge = planned("cogvlm2", small(least.least_ram_bytes + 10**8))
    assert edge.changes[0].options == ("--swap 1GB",), "`build` keeps a tenth free unless --max-memory is given"
    assert planned("cogvlm2", small(int(1.12 * least.least_ram_bytes))).verdict == "fits"


def test_part_that_is_wider_alone_is_narrowed_alone() -> None:
    precisions = {"vision": "int8"}
    plan = planned("cogvlm2", small(int(16.5e9)), precisions=precisions)
    assert ("--connector int8",) in [change.options for change in plan.changes]
    assert planned("cogvlm2", small(int(16.5e9)), precisions={**precisions, "connector": "int8"}).verdict == "fits"


def test_text_alone_still_needs_an_encoder_that_can_be_built() -> None:
    plan = planned("cogvlm2", small(int(14.8e9)), images=0)
    assert ("--vision int4 --connector int4",) in [change.options for change in plan.changes]


def test_int8_is_tried_before_int4() -> None:
    room = int(20e9)
    plan = planned("cogvlm2", small(room, "datacenter"), target="ort-fp32", provider="cuda")
    assert plan.changes[0].options == ("--target ort-int8",)
    assert plan.changes[0].accuracy_points == (0.0, 0.5), "encoder, decoder and head in int8"
    assert planned("cogvlm2", small(room, "datacenter"), target="ort-int8", provider="cuda").verdict == "fits"


def test_eight_bits_are_narrowed_by_what_asked_for_them() -> None:
    plan = planned("cogvlm2", small(int(14e9), "datacenter"), bits=8)
    assert ("--bits 4",) in [change.options for change in plan.changes]
    assert not any("--target" in text for change in plan.changes for text in change.options)


@pytest.mark.parametrize("target", ["trt-int4", "ort-int4", "ort-int8", "ort-fp32"])
def test_quantized_checkpoint_that_does_not_fit_is_no_error(target: str, int8_encoder: Path) -> None:
    """Int4 codes that it does not hold were tried, and the error of that came out."""
    if target == "ort-int8":
        with pytest.raises(ExportError, match="the checkpoint holds int4 codes for the decoder"):
            make_plan(checkpoint_model(int8_encoder), small(10**6), PlanOptions(target))
        return
    assert make_plan(checkpoint_model(int8_encoder), small(10**6), PlanOptions(target)).verdict == "does not fit"


def test_quantized_checkpoint_stays_so_when_its_family_is_named(int8_encoder: Path) -> None:
    assert checkpoint_model(int8_encoder, "cogvlm") == checkpoint_model(int8_encoder)
    with pytest.raises(ConfigError, match=r"q: holds cogvlm, but --family is cogvlm2"):
        checkpoint_model(int8_encoder, "cogvlm2")


def test_config_of_codes_without_the_codes_is_refused(int8_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((int8_encoder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="quantized checkpoint without its weights"):
        checkpoint_model(tmp_path, "cogvlm")


def test_planned_precisions_of_stored_codes_are_those_exported(int8_encoder: Path, tmp_path: Path) -> None:
    from vlmdeploy.bundle import read_manifest

    bundle = export(int8_encoder, tmp_path / "bundle", "ort-int4")
    plan = make_plan(checkpoint_model(int8_encoder), plan_device("thor"), PlanOptions("ort-int4"))
    assert plan.precision == read_manifest(bundle).precision


def test_smaller_chunks_are_offered_where_scratch_is_what_is_too_much() -> None:
    short = {"images": 0, "context_tokens": 2400, "precisions": {"vision": "int4", "connector": "int4"}}
    whole = max(planned("cogvlm2", "thor", **short).peak_bytes.values())
    plan = planned("cogvlm2", replace(plan_device("h100"), usable_bytes=whole - 10**7), **short)
    assert ("--chunk-rows 128",) in [change.options for change in plan.changes]


def test_codes_that_are_there_already_cost_nothing(int8_encoder: Path) -> None:
    model = checkpoint_model(int8_encoder)
    wide = make_plan(model, plan_device("thor"), PlanOptions("ort-fp32"))
    narrow = max(make_plan(model, plan_device("thor"), PlanOptions("ort-int4")).peak_bytes.values())
    assert narrow < max(wide.peak_bytes.values())
    plan = make_plan(model, small(narrow), PlanOptions("ort-fp32"))
    found = {change.options: change.accuracy_points for change in plan.changes}
    assert found["--target ort-int4",] == (0.0, 0.0)
