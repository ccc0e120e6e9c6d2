"""Contract and agreement tests of `vlmdeploy quantize` on tiny models: what the output folder holds, that a bundle made
from it holds the same codes, what each option changes, and one clear line for every input that cannot be used.
"""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from tests.calibration_data import (
    FAST,
    messages,
    quantize,
    refusal,
    run_quantize,
    write_calibration_checkpoint,
    write_calibration_data,
    write_changed_checkpoint,
    write_rows,
)
from tests.stored_linears import gptq_linears, onnx_linears, stored_tensors
from tests.tiny_bundle import ROOT, content_of, only_error_line, only_json_document, picture, run_cli
from vlmdeploy.artifact import partial_folder
from vlmdeploy.bundle import read_manifest
from vlmdeploy.calib.solver import DAMPINGS
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.load import fill_parameter, load_model
from vlmdeploy.quant.grid import dequantize, quantize_rtn
from vlmdeploy.quant.quantization_table import coverage_rows
from vlmdeploy.runtime.image import load_image, preprocess

Json = dict[str, Any]
REPORT, GPTQ_CONFIG = "quantization_report.json", "quantize_config.json"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything that tests share and nobody changes."""
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def ckpt(home: Path) -> Path:
    folder = write_calibration_checkpoint(home / "ckpt", vision_layers=1, seed=5)
    (folder / "LICENSE").write_text("free")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


@pytest.fixture(scope="module")
def data(home: Path) -> Path:
    """Enough pictures and texts that some are held out."""
    return write_calibration_data(home / "data", num_pictures=18, num_texts=18)


@pytest.fixture(scope="module")
def few(home: Path) -> Path:
    """Just enough for both experts; nothing is held out."""
    return write_calibration_data(home / "few", num_pictures=5, num_texts=3)


@pytest.fixture(scope="module")
def quantized(ckpt: Path, data: Path) -> Path:
    return quantize(ckpt, data, ckpt.parent / "quantized", "--tokens", 10000)


@pytest.fixture(scope="module")
def plain(ckpt: Path, few: Path) -> Path:
    """All options at their defaults but those of FAST."""
    return quantize(ckpt, few, ckpt.parent / "plain")


@pytest.fixture(scope="module")
def grouped(home: Path) -> Path:
    """CogVLM2 with downsampling; whole 3-bit words and groups of 32 fit its decoder."""
    return write_calibration_checkpoint(home / "grouped", "cogvlm2", layers=1, vision_layers=1, seed=6)


@pytest.fixture(scope="module")
def some(home: Path) -> Path:
    """Just enough for the connector of `grouped`, to which a picture brings four rows."""
    return write_calibration_data(home / "some", num_pictures=9, num_texts=3)


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def report_of(folder: Path) -> Json:
    report: Json = json.loads((folder / REPORT).read_text())
    return report


def linears_of(folder: Path) -> dict[str, Json]:
    return {linear["name"]: linear for linear in report_of(folder)["linears"]}


def stored_parameters(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Steps and scales of every quantized parameter under our name, rows of its sources one after the other."""
    stored, found = gptq_linears(folder), {}
    for target, rule in Checkpoint(folder).rules.items():
        names = [source.name.removesuffix(".weight") for source in rule.sources]
        if all(name in stored for name in names):
            found[target] = tuple(np.concatenate([stored[name][index] for name in names]) for index in (0, 1))
    return found  # type: ignore[return-value]  # two arrays each


# What the folder holds


def test_output_folder_holds_a_checkpoint_and_nothing_lies_beside_it(quantized: Path) -> None:
    names = ["LICENSE", "config.json", "generation_config.json", "model.safetensors", REPORT, GPTQ_CONFIG]
    assert sorted(path.name for path in quantized.iterdir()) == sorted([*names, "tokenizer.json"])
    assert sorted(path.name for path in quantized.parent.glob("*quantized*")) == ["quantized"]


def test_both_config_files_say_the_same_and_the_models_own_keys_stay(ckpt: Path, quantized: Path) -> None:
    config, own = (json.loads((quantized / name).read_text()) for name in ("config.json", GPTQ_CONFIG))
    assert config.pop("quantization_config") == own
    assert config == json.loads((ckpt / "config.json").read_text())
    assert (own["bits"], own["group_size"], own["sym"], own["desc_act"]) == (4, 16, True, False)
    assert own["dynamic"][r"^lm_head$"] == {"bits": 8}


def test_loaded_model_holds_codes_times_scales(quantized: Path) -> None:
    state, stored = load_model(quantized).state_dict(), stored_parameters(quantized)
    assert set(stored) == set(linears_of(quantized)), "the default quantizes every linear"
    for target, (steps, scales) in stored.items():
        assert np.array_equal(state[target].flatten(1).numpy(), steps * scales), target


def test_scales_are_halves_and_codes_use_their_range(quantized: Path) -> None:
    for name, values in stored_tensors(quantized).items():
        assert not name.endswith("scales") or values.dtype == np.float16, name
    for target, (steps, _) in stored_parameters(quantized).items():
        bits = 4 if target.startswith("decoder") else 8
        assert -(1 << (bits - 1)) <= steps.min() < -1 and 1 < steps.max() < 1 << (bits - 1), target


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensors_that_stay_float_are_kept_bit_by_bit(few: Path, tmp_path: Path, dtype: str) -> None:
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", dtype=dtype, layers=1, vision_layers=1)
    out = quantize(ckpt, few, tmp_path / "out", "--lm-head", "fp16")
    before, after = Checkpoint(ckpt), Checkpoint(out)
    kept = set(before.shard_of) & set(after.shard_of)
    assert {"lm_head.weight", "model.norm.weight", "model.vision.boi"} <= kept
    for name in kept:
        assert torch.equal(before.raw(name), after.raw(name)) and before.raw(name).dtype == after.raw(name).dtype


def test_logits_are_nearer_to_the_float_model_than_rounding(ckpt: Path, data: Path, quantized: Path) -> None:
    """On calibration rows; both have the same grids."""
    rounded, checkpoint = load_model(ckpt), Checkpoint(ckpt)
    for target in linears_of(quantized):
        grid = Checkpoint(quantized).stored_grid(target)
        assert grid is not None
        values = dequantize(quantize_rtn(checkpoint.parameter(target).flatten(1).numpy(), grid))
        fill_parameter(rounded, target, torch.from_numpy(values).reshape(checkpoint.shape(target)))
    expected = logits_on(ckpt, data)
    errors = [float((logits_on(model, data) - expected).square().mean()) for model in (quantized, rounded)]
    assert errors[0] < 0.7 * errors[1]


def logits_on(model: Any, data: Path) -> Tensor:
    """Logits of text positions on a picture and on a text of the data set, ids taken as bytes."""
    model = load_model(model) if isinstance(model, Path) else model
    tokens, image = model.spec.tokens, model.spec.image
    pixels = torch.from_numpy(np.stack([preprocess(load_image(data / f"{number}.png"), image) for number in range(4)]))
    text = torch.arange(60, 90).expand(4, -1)
    bos, places = torch.full((4, 1), 1), torch.full((4, tokens.rows_per_image), tokens.placeholder_id)
    with torch.no_grad():
        logits: Tensor = model(torch.cat((bos, places, text), 1), pixels)
    return logits[:, tokens.rows_per_image :]


# The report, --json and inspect


def test_report_tells_tokens_damping_and_errors_of_every_linear(quantized: Path) -> None:
    report = report_of(quantized)
    language, vision, encoder, connector = report["calibration"]["experts"]
    assert [part["samples"] for part in (language, vision, encoder, connector)] == [32, 16, 16, 16]
    assert vision["tokens"] == 16 * 17 and vision["held_out_tokens"] == 2 * 17, "every 8th of 18 pictures is held out"
    for name, linear in linears_of(quantized).items():
        if linear["method"] == "gptq":
            assert linear["damping"] in DAMPINGS and linear["held_out_error"] >= 0, name
        expert = {".language.": language, ".vision.": vision}
        tokens = next((coverage["tokens"] for part, coverage in expert.items() if part in name), None)
        assert tokens is None or linear["note"] == "nothing reads its output" or linear["tokens"] == tokens, name


def test_held_out_error_is_below_that_of_rounding(quantized: Path) -> None:
    ratios = [
        linear["held_out_error"] / linear["held_out_error_rtn"]
        for linear in linears_of(quantized).values()
        if linear["held_out_error"] is not None
    ]
    assert np.mean(ratios) < 0.8 and max(ratios) < 1.2


def test_json_is_one_document_with_the_report(ckpt: Path, few: Path, plain: Path, tmp_path: Path) -> None:
    result = run_quantize(ckpt, few, tmp_path / "out", "--json")
    document = only_json_document(result)
    assert (document["checkpoint"], document["message"]) == (str(tmp_path / "out"), "quantized")
    assert {key: document[key] for key in report_of(plain)} == report_of(plain)
    assert all(line.startswith("Warning: ") for line in result.stderr.splitlines())


def test_tables_show_data_coverage_and_errors(ckpt: Path, few: Path, plain: Path) -> None:
    shown = run_quantize(ckpt, few, plain).stdout
    wanted = ("data.jsonl", "held-out tokens", "decoder.layers.*.vision.gate_up", "nothing reads its output", "8 / 16")
    assert [text for text in wanted if text not in shown] == []


def test_gain_of_twice_as_many_tokens_follows_from_the_errors_with_and_without_them(quantized: Path) -> None:
    called = {"vision": "vision encoder", "connector": "connector", "lm_head": "language"}
    gains: dict[str, list[float]] = {}
    for name, linear in linears_of(quantized).items():
        part, *rest = name.split(".")
        if linear["held_out_error"]:
            excess = max(0.0, linear["held_out_error"] - linear["calibration_error"]) / 2
            gains.setdefault(rest[2] if part == "decoder" else called[part], []).append(
                excess / 2 / linear["held_out_error"]
            )
    expected = {expert: f"{-100 * np.mean(found):+.0f} %" for expert, found in gains.items()}
    assert {row[0]: row[-1] for row in coverage_rows(report_of(quantized))} == expected
    assert set(expected) == {"language", "vision", "vision encoder", "connector"}


def test_inspect_shows_coverage_and_every_linears_error(quantized: Path) -> None:
    document = only_json_document(run_cli("inspect", quantized, "--json"))
    assert document["quantization"] == {"bits": 4, "group_size": 16, "sym": True}
    assert document["quantization_report"] == report_of(quantized)
    result = run_cli("inspect", quantized)
    names = [name.removesuffix(".weight") for name in linears_of(quantized)]
    assert result.exit_code == 0 and [name for name in names if name not in result.stdout] == []
    assert "calibration tokens" in result.stdout


# Export


def assert_same_codes(checkpoint: Path, bundle: Path) -> None:
    """Every MatMulNBits holds steps and scales of the checkpoint; the last vision qkv has only keys and values."""
    stored, exported = stored_parameters(checkpoint), onnx_linears(bundle)
    assert set(exported) <= set(stored)
    unused = {name for name, linear in linears_of(checkpoint).items() if linear["note"] == "nothing reads its output"}
    assert set(stored) - set(exported) == unused
    for target, (steps, scales) in exported.items():
        rows = slice(-len(steps), None)
        assert np.array_equal(steps, stored[target][0][rows]), target
        assert np.array_equal(scales, stored[target][1][rows]), target


def export(source: Path, out: Path, *options: object) -> Json:
    document: Json = only_json_document(
        run_cli("export", "--ckpt", source, "--target", "ort-int4", "--out", out, "--threads", 1, "--json", *options)
    )
    return document


def test_bundle_of_a_quantized_checkpoint_holds_its_codes_and_verifies(quantized: Path, tmp_path: Path) -> None:
    export(quantized, tmp_path / "bundle")
    assert_same_codes(quantized, tmp_path / "bundle")
    assert read_manifest(tmp_path / "bundle").made_by.quantization == "gptq"
    for reference in ([], ["--ckpt", quantized]):
        result = run_cli("verify", tmp_path / "bundle", "--threads", 1, "--json", *reference)
        assert only_json_document(result)["passed"] is True


@pytest.mark.parametrize("options", [
    ("--bits", 3, "--group", 32), ("--bits", 8), ("--asymmetric",), ("--group", -1),
    ("--vision", "int4", "--connector", "int4"), ("--override", "decoder.layers.0.*.down=int8:32"),
    ("--quality", "high"), ("--lm-head", "fp32", "--vision", "fp16"),
])  # fmt: skip
def test_every_kind_of_codes_is_exported_as_it_is(
    grouped: Path, some: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    out = quantize(grouped, some, tmp_path / "out", *options)
    state = load_model(out).state_dict()
    for target, (steps, scales) in stored_parameters(out).items():
        assert np.array_equal(state[target].flatten(1).numpy(), steps * scales), target
    export(out, tmp_path / "bundle", *(("--target", "ort-int8") if 8 in options else ()))
    assert_same_codes(out, tmp_path / "bundle")


def test_checkpoint_and_bundle_say_whether_scales_are_below_zero(
    ckpt: Path, few: Path, plain: Path, tmp_path: Path
) -> None:
    positive = quantize(ckpt, few, tmp_path / "positive", "--positive-scales")
    for folder in (plain, positive):
        negative = {name: int((scales[:, ::16] < 0).sum()) for name, (_, scales) in stored_parameters(folder).items()}
        reported = {name: linear["negative_scales"] for name, linear in linears_of(folder).items()}
        assert {name: reported[name] for name in negative} == negative
        config = json.loads((folder / "quantize_config.json").read_text())
        assert config["meta"]["negative_scales"] == any(negative.values()) == (folder == plain)
        notes = export(folder, tmp_path / f"{folder.name}-bundle")["manifest"]["made_by"]["notes"]
        count = sum(map(bool, negative.values()))
        expected = f"{count} linears have scales below zero, which TensorRT does not take"
        assert (expected in notes) == any("below zero" in note for note in notes) == (folder == plain)


def test_export_calibrates_a_float_checkpoint_as_quantize_does(
    ckpt: Path, few: Path, plain: Path, tmp_path: Path
) -> None:
    document = export(ckpt, tmp_path / "bundle", "--calib", few, "--group", 16)
    assert_same_codes(plain, tmp_path / "bundle")
    assert document["manifest"]["made_by"]["quantization"] == "gptq"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["bundle"]


def test_int4_export_of_floats_without_a_choice_is_wrong_usage(ckpt: Path, few: Path, tmp_path: Path) -> None:
    options = ("export", "--ckpt", ckpt, "--target", "ort-int4", "--out", tmp_path / "bundle")
    result = run_cli(*options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--calib" in result.stderr and "--quant rtn" in result.stderr
    assert run_cli(*options, "--calib", few, "--quant", "rtn").exit_code == 2
    assert not (tmp_path / "bundle").exists()


# Options


def test_override_changes_single_linears(ckpt: Path, few: Path, tmp_path: Path) -> None:
    overrides = ("--override", "decoder.layers.0.vision.*=int8", "--override", "*.mlp.fc1=fp16")
    out = quantize(ckpt, few, tmp_path / "out", *overrides)
    found = {name: linear["bits"] for name, linear in linears_of(out).items() if name.startswith("decoder.layers.0")}
    assert found == {name: 8 if ".vision." in name else 4 for name in found}
    assert not [name for name in linears_of(out) if ".fc1." in name]
    assert "model.vision.transformer.layers.0.mlp.fc1.weight" in Checkpoint(out).shard_of


def average_bits(folder: Path) -> float:
    """Stored bits of codes, zero points and scales per weight of the quantized linears."""
    tensors = stored_tensors(folder)
    parts = [values.nbytes for name, values in tensors.items() if name.endswith((".qweight", ".qzeros", ".scales"))]
    weights = sum(steps.size for steps, _ in gptq_linears(folder).values())
    return 8 * sum(parts) / weights


@pytest.mark.parametrize("budget", [4.5, 6.0])
def test_budget_in_average_bits_is_kept_and_used(grouped: Path, some: Path, tmp_path: Path, budget: float) -> None:
    out = quantize(grouped, some, tmp_path / "out", "--budget", budget)
    assert 0.9 * budget < average_bits(out) <= budget
    chosen = {(linear["bits"], linear["group_size"]) for linear in linears_of(out).values()}
    assert len(chosen) > 1, "a uniform choice would not need a measurement"


def test_budget_in_bytes_is_the_size_of_the_checkpoint(grouped: Path, some: Path, tmp_path: Path) -> None:
    size = 130_000
    out = quantize(grouped, some, tmp_path / "out", "--budget", "130KB")
    values = [tensor.nbytes for name, tensor in stored_tensors(out).items() if not name.endswith("g_idx")]
    assert 0.9 * size < sum(values) <= size


def test_choice_under_a_budget_is_shown_and_written(grouped: Path, some: Path, tmp_path: Path) -> None:
    shown = run_quantize(grouped, some, tmp_path / "out", "--budget", 5).stdout
    chosen = linears_of(tmp_path / "out")
    for linear in chosen.values():
        assert f"{linear['bits']} / {linear['group_size']}" in shown
    checkpoint = Checkpoint(tmp_path / "out")
    for target, linear in chosen.items():
        grid = checkpoint.stored_grid(target)
        assert grid is not None and (grid.bits, grid.group_size) == (linear["bits"], linear["group_size"])


@pytest.mark.parametrize("option", ["--budget", "--max-memory"])
@pytest.mark.parametrize("value", ["much", "nan", "inf", "1e400", "-4", "0", "9" * 400, "9" * 400 + "GB"])
def test_senseless_size_is_told_before_any_work(tmp_path: Path, option: str, value: str) -> None:
    """Not a number and infinity came far: they were errors of Python when every cost had been measured."""
    error = refusal(tmp_path / "no checkpoint", tmp_path / "no data", tmp_path / "out", option, value)
    assert f'{option} "{value[:80]}": expected a size such as 9.0GB' in error and "9" * 100 not in error


def test_budget_where_no_group_fits_leaves_that_linear_as_planned(ckpt: Path, data: Path, tmp_path: Path) -> None:
    """Widths of 32 have no candidate: groups of 32 would be as wide as the input. This once was an IndexError."""
    out = quantize(ckpt, data, tmp_path / "out", "--samples", 32, "--budget", 6)
    assert average_bits(out) <= 6


def test_budget_offers_only_codes_that_fill_words(data: Path, tmp_path: Path) -> None:
    """Gate and up of 80 rows each hold no 3-bit words, though together their 160 rows would."""
    sizes: Json = {"mlp": 80, "vision_width": 64, "layers": 1, "vision_layers": 1}
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", "cogvlm2", **sizes)
    out = quantize(ckpt, data, tmp_path / "out", "--samples", 32, "--budget", 4.5)
    assert linears_of(out)["decoder.layers.0.vision.gate_up.weight"]["bits"] != 3


def test_high_quality_corrects_for_what_was_quantized_before(
    ckpt: Path, few: Path, plain: Path, tmp_path: Path
) -> None:
    high = quantize(ckpt, few, tmp_path / "high", "--quality", "high")
    assert all(linear["asymmetric"] == (linear["method"] == "gptq") for linear in linears_of(high).values())
    assert not any(linear["asymmetric"] for linear in linears_of(plain).values())
    name = "decoder.layers.1.language.down.weight"
    assert not np.array_equal(*(stored_parameters(folder)[name][0] for folder in (high, plain)))


@pytest.mark.parametrize("kind", ["pooled", "text-only"])
def test_other_hessians_choose_other_codes_for_the_vision_expert(
    ckpt: Path, few: Path, plain: Path, tmp_path: Path, kind: str
) -> None:
    other = quantize(ckpt, few, tmp_path / kind, "--hessian", kind)
    name = "decoder.layers.0.vision.qkv.weight"
    assert not np.array_equal(stored_parameters(plain)[name][0], stored_parameters(other)[name][0])
    language, vision = (expert["tokens"] for expert in report_of(plain)["calibration"]["experts"][:2])
    assert linears_of(other)[name]["tokens"] == (language if kind == "text-only" else language + vision)


def test_limited_samples_keep_pictures_and_texts(ckpt: Path, data: Path, tmp_path: Path) -> None:
    """The rows of the data set stand in order, pictures first: cutting the choice there once dropped every text."""
    out = quantize(ckpt, data, tmp_path / "out", "--samples", 8)
    language, vision, *_ = report_of(out)["calibration"]["experts"]
    assert report_of(out)["calibration"]["samples"] <= 8
    assert 0 < vision["samples"] < language["samples"]


def test_selection_across_perplexities_takes_other_samples(ckpt: Path, data: Path, tmp_path: Path) -> None:
    options = ("--samples", 8, "--override", "*=fp32", "--override", "lm_head=int8")
    drawn, spread = (
        report_of(quantize(ckpt, data, tmp_path / kind, "--select", kind, *options))["settings"]
        for kind in ("random", "perplexity")
    )
    assert drawn["calibration_sha256"] != spread["calibration_sha256"]


def test_folder_of_pictures_needs_a_prompt(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        picture(number, (8, 8)).save(tmp_path / "pictures" / f"{number}.png")
    assert "--calib-prompt" in refusal(ckpt, tmp_path / "pictures", tmp_path / "out")
    out = quantize(ckpt, tmp_path / "pictures", tmp_path / "out", "--calib-prompt", "What is in the picture?")
    assert report_of(out)["calibration"]["samples"] == 5


def test_group_that_must_shrink_is_told(ckpt: Path, few: Path, tmp_path: Path) -> None:
    result = run_cli("quantize", "--ckpt", ckpt, "--calib", few, "--out", tmp_path / "out", "--threads", 1)
    assert result.exit_code == 0
    assert "group size 128 does not fit every width: used instead: vision 16, connector 16, decoder 32" in result.stderr


def test_linear_whose_width_no_group_divides_stays_in_float_and_is_told(few: Path, tmp_path: Path) -> None:
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", mlp=100)
    result = run_quantize(ckpt, few, tmp_path / "out")
    assert result.exit_code == 0 and "decoder.layers.0.language.down.weight" in result.stderr
    assert "model.layers.0.mlp.language_mlp.down_proj.weight" in Checkpoint(tmp_path / "out").shard_of
    export(tmp_path / "out", tmp_path / "bundle")


def test_widths_that_fill_no_words_are_told_before_the_run(few: Path, tmp_path: Path) -> None:
    """A vocabulary of 259 in 8 bits: this once was an error after all layers were done."""
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", vocab=259)
    result = run_quantize(ckpt, few, tmp_path / "out")
    assert "lm_head" in result.stderr
    assert result.exit_code == 0 or not partial_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "message"), [
    (("--group", 48), "group size 48 is not supported"), (("--max-memory", "lots"), "--max-memory"),
    (("--tokenizer", "nowhere"), "nowhere"), (("--template", "poem"), "poem"),
    (("--quality", "best", "--hessian", "pooled"), "so --hessian pooled has no use"),
    (("--budget", "2"), "give a larger budget"), (("--budget", "1KB"), "give a larger budget"),
    (("--override", "decoder*"), "expected PATTERN=TYPE"), (("--override", "decoder*=int5"), "expected PATTERN=TYPE"),
    (("--override", "encoder*=int8"), "no linear matches it"),
    (("--override", "*.down.weight=int4:64"), "group size 64 does not divide the width 96"),
])  # fmt: skip
def test_senseless_option_is_one_line(
    ckpt: Path, few: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    assert message in refusal(ckpt, few, tmp_path / "out", *options)
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_output_whose_name_is_not_utf8_is_refused_before_the_run(tmp_path: Path, command: str) -> None:
    """Neither tensors nor graphs can be written there: it was an error of a library when the first one was."""
    out = tmp_path / os.fsdecode(b"out\xff")
    options = {"quantize": ("--calib", tmp_path), "export": ("--target", "ort-fp32")}[command]
    result = run_cli(command, "--ckpt", tmp_path / "no checkpoint", "--out", out, *options)
    assert "the path is not valid UTF-8; choose another output" in only_error_line(result)


def test_linear_that_cannot_be_rounded_is_named(few: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.vision_expert_dense.weight"][0, 0] = 1e8  # nothing reads its output

    ckpt = write_changed_checkpoint(tmp_path / "ckpt", enlarge, vision_layers=1)
    error, name = refusal(ckpt, few, tmp_path / "out"), "decoder.layers.1.vision.dense.weight"
    assert f"{name}: a weight of magnitude 1e+08 needs a scale beyond fp16" in error
    assert f"--override {name}=fp32 keeps it in float" in error
    quantize(ckpt, few, tmp_path / "out", "--override", f"{name}=fp32", "--force")


# An output that is there already


def test_finished_output_says_so_and_is_left_alone(ckpt: Path, data: Path, quantized: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in quantized.iterdir()}
    result = run_quantize(ckpt, data, quantized, "--tokens", 10000)
    assert result.exit_code == 0 and "quantized already with these settings" in result.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in quantized.iterdir()}
    assert not partial_folder(quantized).exists()


def test_finished_output_of_other_settings_is_refused_and_the_difference_named(
    ckpt: Path, data: Path, quantized: Path
) -> None:
    options = ("--tokens", 10000, "--hessian", "pooled")
    assert "\"hessian\" is 'routed' there and 'pooled' now" in refusal(ckpt, data, quantized, *options)


def test_force_replaces_our_output_and_nothing_else(ckpt: Path, few: Path, quantized: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(quantized, tmp_path / "out"))
    quantize(ckpt, few, out, "--force")
    assert report_of(out)["calibration"]["samples"] == 8
    (out / REPORT).unlink()
    assert "was not made by vlmdeploy" in refusal(ckpt, few, out, "--force")
    assert (out / "model.safetensors").is_file()


def without(values: Json, key: str) -> Json:
    return {name: value for name, value in values.items() if name != key}


SHAPES: list[Any] = [None, [], "text", {}]
DAMAGES: dict[str, Any] = {  # how a report, valid JSON, is changed
    **{repr(value): lambda report, value=value: value for value in SHAPES},
    **{f"no {key}": lambda report, key=key: without(report, key) for key in ("settings", "calibration", "linears")},
    "no parts": lambda report: report | {"settings": without(report["settings"], "parts")},
    "no experts": lambda report: report | {"calibration": without(report["calibration"], "experts")},
    **{
        f"null {key}": lambda report, key=key: report | {key: None}
        for key in ("settings", "calibration", "size_bytes", "linears")
    },
    "null linear": lambda report: report | {"linears": [None]},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_report_of_another_shape_is_one_line_everywhere(
    ckpt: Path, few: Path, plain: Path, tmp_path: Path, damage: str
) -> None:
    """It was an error of Python in each of these commands, or the folder was none of ours."""
    out = Path(shutil.copytree(plain, tmp_path / "out"))
    (out / REPORT).write_text(json.dumps(DAMAGES[damage](report_of(plain))))
    bundle = tmp_path / "bundle"
    refused = (
        run_quantize(ckpt, few, out),
        run_quantize(ckpt, few, out, "--force"),
        run_cli("export", "--ckpt", out, "--target", "ort-int4", "--out", bundle),
        run_cli("inspect", out),
        run_cli("inspect", out, "--json"),
    )
    for result in refused:
        error = only_error_line(result)
        assert f"{out / REPORT}: damaged (" in error and "remove the file, or the whole folder" in error
    assert not bundle.exists()


def test_keys_that_older_reports_lack_are_filled_in(plain: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(plain, tmp_path / "out"))
    report = report_of(plain)
    for linear in report["linears"]:
        del linear["note"], linear["sweeps"]
    (out / REPORT).write_text(json.dumps(report))
    assert run_cli("inspect", out).exit_code == 0


def test_quantized_checkpoint_is_not_quantized_again(quantized: Path, few: Path, tmp_path: Path) -> None:
    assert "is quantized already" in refusal(quantized, few, tmp_path / "out")


def test_foreign_layout_of_codes_is_one_line(quantized: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "foreign"))
    own = json.loads((folder / GPTQ_CONFIG).read_text())
    config = json.loads((folder / "config.json").read_text())
    for name, content in ((GPTQ_CONFIG, own), ("config.json", config)):
        content.get("quantization_config", content)["quant_method"] = "awq"
        (folder / name).write_text(json.dumps(content))
    assert "quantized with 'awq'" in only_error_line(run_cli("inspect", folder))


# Data that cannot be used

GOOD: list[Any] = [
    *({"image": f"{number}.png", "messages": messages("What is here?", "a red dog")} for number in range(5)),
    *({"messages": messages(f"Why {number}?", "over the tree, left")} for number in range(3)),
]
BROKEN: dict[str, tuple[Json | str, str]] = {
    "broken JSON": ('{"messages": [', "data.jsonl:9: not JSON"),
    "missing picture": ({"image": "gone.png", "messages": messages("What?", "It")}, "gone.png: no such file"),
    "damaged picture": ({"image": "damaged.png", "messages": messages("What?", "It")}, "damaged.png"),
    "too long": ({"messages": messages("long " * 40, "yes")}, "the model's context 128"),
    "half a character": ({"messages": messages("What?", "It \ud83d")}, "data.jsonl:9: the assistant's answer is not"),
    "data URL": ({"image": "data:image/png;base64,A", "messages": messages("What?", "It")}, "picture data:image"),
    "unknown template": ({"messages": messages("What?", "It"), "template": "poem"}, "poem"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sample_is_named_or_skipped_and_counted(ckpt: Path, tmp_path: Path, case: str) -> None:
    row, message = BROKEN[case]
    folder = write_rows(tmp_path / "data", [*GOOD, row])
    (folder / "damaged.png").write_bytes(b"\x89PNG broken")
    assert message in refusal(ckpt, folder, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []
    out = quantize(ckpt, folder, tmp_path / "out", "--skip-broken", "--override", "*=fp16", "--override", "lm*=int8")
    calibration = report_of(out)["calibration"]
    assert (calibration["samples"], calibration["skipped"]) == (8, 1)
    assert message in calibration["skipped_reasons"][0]


def test_data_without_pictures_is_an_error_that_names_the_expert(ckpt: Path, tmp_path: Path) -> None:
    folder = write_calibration_data(tmp_path / "data", num_pictures=0, num_texts=8)
    error = refusal(ckpt, folder, tmp_path / "out")
    assert "the vision expert gets 0 calibration tokens" in error and "--allow-uncalibrated" in error
    assert list(tmp_path.glob("out*")) == []


def test_data_with_hardly_any_text_is_an_error_that_names_the_expert(ckpt: Path, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"image": f"{number}.png", "messages": messages("a", ""), "template": "base"} for number in range(5)
    ]
    assert "the language expert gets " in refusal(ckpt, write_rows(tmp_path / "data", rows), tmp_path / "out")


def test_empty_data_is_one_line(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.jsonl").write_text("\n")
    assert "holds no rows" in refusal(ckpt, tmp_path / "data", tmp_path / "out")
    assert "no such file" in refusal(ckpt, tmp_path / "nowhere", tmp_path / "out")


def test_names_that_are_not_utf8_are_told_in_report_and_tables(ckpt: Path, few: Path, tmp_path: Path) -> None:
    """They were an error when everything was done: at the last step, when the report was written."""
    folder = tmp_path / os.fsdecode(b"data\xff")
    shutil.copytree(few, folder)
    out = tmp_path / "out"
    options = ("--override", "*=fp16", "--override", "lm_head=int8")
    shown = run_quantize(ckpt, folder, out, *options)
    assert shown.exit_code == 0 and "data\\udcff" in shown.stdout
    assert str(folder) in report_of(out)["calibration"]["data"]
    again = run_quantize(ckpt, folder, out, *options, "--json")
    assert str(folder) in only_json_document(again)["calibration"]["data"]


# A full disk


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_full_disk_is_one_line_and_the_same_command_continues(
    ckpt: Path, few: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The disk refuses in the middle of the run: where activations are spilled, or where a unit is committed."""
    calls, real, out = [], getattr(os, call), tmp_path / "out"

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        error = refusal(ckpt, few, out, "--max-memory", "1KB")
    assert "No space left on device" in error and str(partial_folder(out)) in error
    assert list(partial_folder(out).glob("*.safetensors")) and not out.exists(), "the units before were finished"
    quantize(ckpt, few, out, "--max-memory", "1KB")
    assert content_of(out) == content_of(plain)


@pytest.mark.parametrize("kind", ["with its name", "as the tensor library tells it", "damaged"])
def test_lost_file_of_the_source_is_not_taken_for_a_full_disk(
    ckpt: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It was reported as "OUT.partial: cannot be written ... free some space"."""
    lost, out = str(ckpt / "model.safetensors"), tmp_path / "out"
    errors = {
        "with its name": OSError(errno.EIO, os.strerror(errno.EIO), lost),
        "as the tensor library tells it": FileNotFoundError(f"No such file or directory: {lost}"),
        "damaged": SafetensorError(f"invalid header of {lost}"),
    }

    def read(*arguments: Any) -> Any:
        raise errors[kind]

    monkeypatch.setattr("vlmdeploy.calib.run.unit_tensors", read)
    error = refusal(ckpt, few, out)
    assert lost in error and f"it continues with {partial_folder(out)}" in error
    assert "free some space" not in error


@pytest.mark.parametrize(("number", "name"), [(errno.EACCES, "x.safetensors"), (errno.EDQUOT, None)])
def test_refused_write_names_the_unfinished_run(
    ckpt: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str | None
) -> None:
    partial = partial_folder(tmp_path / "out")

    def write(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number), *(() if name is None else (str(partial / name),)))

    monkeypatch.setattr("vlmdeploy.calib.run.unit_tensors", write)
    error = refusal(ckpt, few, tmp_path / "out")
    assert f"{partial}: cannot be written: {os.strerror(number)}; free some space" in error


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("kilobytes", [40, 100, 200, 300, 400, 500, 600])
def test_small_disk_is_one_line_and_more_space_helps(
    ckpt: Path, few: Path, plain: Path, tmp_path: Path, kilobytes: int
) -> None:
    """A file system of its own, seen by this shell alone; full at different moments, the last ones while publishing."""
    disk, copied = tmp_path / "disk", tmp_path / "copied"
    disk.mkdir()
    arguments = ("quantize", "--ckpt", ckpt, "--calib", few, "--out", disk / "out", *FAST, "--max-memory", "1KB")
    command = shlex.join([sys.executable, "-m", "vlmdeploy", *map(str, arguments)])
    script = f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk} || exit 77; {command} > /dev/null; echo $?; " + (
        f"mount -o remount,size=10m {disk}; {command} > /dev/null 2>&1; echo $?; cp -r {disk} {copied}"
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this machine lets nobody mount")
    errors = [line for line in done.stderr.splitlines() if not line.startswith("Warning: ")]
    assert done.stdout.split() == ["1", "0"], done.stderr
    assert len(errors) == 1 and "No space left on device" in errors[0], done.stderr
    assert content_of(copied / "out") == content_of(plain)
    assert [path.name for path in copied.iterdir()] == ["out"]
