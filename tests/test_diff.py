"""Agreement and contract tests of `vlmdeploy diff`: models that are the same agree, a damaged matrix is named, and one
line says why two folders cannot be compared."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import vlmdeploy
from tests.calibration_data import (
    overflow_for_pictures,
    write_calibration_checkpoint,
    write_changed_checkpoint,
)
from tests.gptq_checkpoint import write_gptq_checkpoint
from tests.tiny_bundle import export, only_error_line, only_json_document, picture, run_cli
from tests.tiny_checkpoint import Tensors, write_tiny_checkpoint
from vlmdeploy.diff.side_by_side import DiffOptions, diff_models, open_staged
from vlmdeploy.diff.stage_graphs import StageGraphs
from vlmdeploy.diff.verdict import ModelDiff, default_tolerance
from vlmdeploy.export.gate.sample import draw_sample
from vlmdeploy.export.graphs.vision import vision_taps
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.runtime import parity

SIZES: dict[str, Any] = {"layers": 3, "vision_layers": 2}
ISOLATED = DiffOptions(isolate=True, threads=1)
SMALL_HEADS: dict[str, Any] = {"hidden": 80, "heads": 4, "mlp": 96, "vision_width": 32, "vision_mlp": 64}  # of 20

pytestmark = pytest.mark.usefixtures("own_hash_cache")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration_checkpoint(tmp_path_factory.mktemp("diff") / "ckpt", **SIZES)


@pytest.fixture(scope="module")
def fp32(ckpt: Path) -> Path:
    return export(ckpt, ckpt.parent / "fp32", "ort-fp32")


@pytest.fixture(scope="module")
def int4(ckpt: Path) -> Path:
    return export(ckpt, ckpt.parent / "int4", "ort-int4")


def scaled(name: str) -> Callable[[Tensors], None]:
    """Damage: one matrix becomes 1.5 times what it was."""

    def change(tensors: Tensors) -> None:
        tensors[name] = 1.5 * tensors[name]

    return change


def damaged(folder: Path, name: str) -> Path:
    return write_changed_checkpoint(folder, scaled(name), **SIZES)


def titles(diff: ModelDiff) -> list[str]:
    return [item.title for item in diff.stages]


# Models that are the same


def test_checkpoint_against_itself_differs_by_exactly_nothing(ckpt: Path) -> None:
    diff = diff_models(ckpt, ckpt, ISOLATED)
    for item in diff.stages:
        for found in (item.own, item.isolated):
            assert found is not None
            assert (found.relative_error, found.max_abs_error, found.cosine_worst) == (0, 0, 1), item.title
    assert diff.agrees


def test_stages_are_those_of_the_forward_pass_by_expert(ckpt: Path) -> None:
    steps = ["linear", "norm", "activation", "mlp", "boundary"]
    assert titles(diff_models(ckpt, ckpt, ISOLATED)) == [
        "vision.embed", "vision.layer.0", "vision.layer.1", *(f"connector.{name}" for name in steps),
        "decoder.input, vision rows", "decoder.input, language rows",
        "decoder.layer.0, vision rows", "decoder.layer.0, language rows",
        "decoder.layer.1, vision rows", "decoder.layer.1, language rows",
        "decoder.layer.2, language rows", "decoder.norm, language rows", "logits, language rows",
    ]  # fmt: skip


@pytest.mark.parametrize(("family", "sizes"), [("cogvlm", {}), ("cogvlm2", {}), ("cogvlm", SMALL_HEADS)])
def test_checkpoint_agrees_with_its_fp32_bundle(family: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "ckpt", family, **SIZES | sizes)
    diff = diff_models(folder, export(folder, tmp_path / "bundle", "ort-fp32"), ISOLATED)
    assert (diff.tolerance.own, diff.tolerance.isolated) == (
        parity.STRUCTURE_END_TO_END.bound, parity.STRUCTURE.bound,
    )  # fmt: skip
    assert diff.agrees, diff.verdict()
    assert max(item.own.relative_error for item in diff.stages) > 0, "other kernels sum in another order"


@pytest.mark.parametrize(("target", "provider"), [
    ("ort-fp16", "cpu"), ("ort-int8", "cpu"), ("ort-int4", "cpu"), ("ort-int4", "cuda"), ("trt-int4", "cpu"),
    ("trt-fp16", "cpu"),
])  # fmt: skip
def test_bundle_of_every_target_is_run_stage_by_stage(ckpt: Path, tmp_path: Path, target: str, provider: str) -> None:
    diff = diff_models(ckpt, export(ckpt, tmp_path / "bundle", target, provider=provider), ISOLATED)
    assert diff.agrees, diff.verdict()
    assert all(item.own.not_finite is None for item in diff.stages)


def test_quantized_checkpoint_agrees_with_its_bundle(tmp_path: Path) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", layers=3)
    diff = diff_models(folder, export(folder, tmp_path / "bundle", "ort-int4"), ISOLATED)
    assert (diff.tolerance.own, diff.tolerance.isolated) == (parity.SHIPPED_END_TO_END.bound, parity.SHIPPED.bound)
    assert diff.agrees, diff.verdict()


@pytest.mark.parametrize("bundle", ["fp32", "int4"])
def test_stages_in_a_row_are_the_bundle_itself(bundle: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(bundle)
    model = open_staged(folder, threads=1)
    prompt = draw_sample(model.rules, 0).prompt
    assert prompt.pixels is not None
    x = prompt.pixels
    for stage in model.geometry.vision_stages():
        x = model.run(stage, [x], prompt)[0]
    rows = model.text_rows(prompt.ids)
    rows[prompt.types == 1] = x[0]
    for index in range(model.geometry.decoder_layers):
        rows = model.run(f"decoder.layer.{index}", [rows], prompt)[0]
    logits = model.run("logits", model.run("decoder.norm", [rows[~prompt.vision_mask]], prompt), prompt)[0]
    expected = vlmdeploy.open(folder, threads=1).logits(prompt.ids, prompt.pixels)[~prompt.vision_mask]
    np.testing.assert_allclose(logits, expected, atol=1e-5 if bundle == "fp32" else 1e-2)  # int8 activations may tip


@pytest.mark.parametrize("family", ["cogvlm", "cogvlm2"])
def test_stages_found_in_the_graphs_are_those_the_gate_reads(family: str, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "ckpt", family)
    bundle = export(folder, tmp_path / "bundle")
    graph = StageGraphs(onnx.load(str(bundle / "vision.onnx"), load_external_data=False))
    assert graph.values == vision_taps(Checkpoint(folder).spec)


# Models that are not


@pytest.mark.parametrize(("name", "stage"), [
    ("model.vision.transformer.layers.1.mlp.fc1.weight", "vision.layer.1"),
    ("model.vision.linear_proj.dense_4h_to_h.weight", "connector.mlp"),
    ("model.layers.1.mlp.vision_mlp.down_proj.weight", "decoder.layer.1, vision rows"),
    ("model.layers.1.mlp.language_mlp.up_proj.weight", "decoder.layer.1, language rows"),
    ("model.layers.2.self_attn.vision_expert_query_key_value.weight", "decoder.layer.2, language rows"),
    ("model.norm.weight", "decoder.norm, language rows"),
    ("lm_head.weight", "logits, language rows"),
])  # fmt: skip
def test_damaged_matrix_is_the_first_stage_and_isolated_the_only_one(
    name: str, stage: str, ckpt: Path, tmp_path: Path
) -> None:
    diff = diff_models(ckpt, damaged(tmp_path / "damaged", name), ISOLATED)
    first = diff.first_beyond()
    assert first is not None and first.title == stage
    assert [item.title for item in diff.beyond_alone()] == [stage]
    before = titles(diff).index(stage)
    assert all(item.own.relative_error == 0 for item in diff.stages[:before])
    assert not diff.agrees


def test_damaged_bundle_is_found_too(ckpt: Path, tmp_path: Path) -> None:
    """Isolated stages of B run in ONNX Runtime, fed with PyTorch's values."""
    other = damaged(tmp_path / "damaged", "model.layers.1.mlp.vision_mlp.down_proj.weight")
    diff = diff_models(ckpt, export(other, tmp_path / "bundle"), ISOLATED)
    assert [item.title for item in diff.beyond_alone()] == ["decoder.layer.1, vision rows"]
    own = {item.title: item.own.relative_error for item in diff.stages}
    assert own["decoder.layer.1, language rows"] < diff.tolerance.own < own["decoder.layer.2, language rows"], "later"


def test_damage_that_a_long_stream_hides_is_the_farthest_layer(tmp_path: Path) -> None:
    """Against a long residual stream a layer that adds something else is a small relative error."""

    def lengthen(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"] *= 50

    def lengthen_and_damage(tensors: Tensors) -> None:
        lengthen(tensors)
        tensors["model.layers.1.mlp.language_mlp.down_proj.weight"] *= -1

    first = write_changed_checkpoint(tmp_path / "first", lengthen, **SIZES)
    other = write_changed_checkpoint(tmp_path / "other", lengthen_and_damage, **SIZES)
    diff = diff_models(first, export(other, tmp_path / "bundle", "ort-int4"), ISOLATED)
    item = next(item for item in diff.stages if item.title == "decoder.layer.1, language rows")
    assert item.isolated is not None and item.isolated.update_error is not None
    assert item.isolated.relative_error < 0.1 < 0.5 < item.isolated.update_error
    assert "farthest layer: decoder.layer.1, language rows, " in diff.verdict()[1]


def test_damaged_embedding_shows_in_the_language_rows(ckpt: Path, tmp_path: Path) -> None:
    diff = diff_models(ckpt, damaged(tmp_path / "damaged", "model.embed_tokens.weight"), ISOLATED)
    assert [item.title for item in diff.beyond_alone()] == ["decoder.input, language rows"]


def test_two_bundles_are_compared_without_a_checkpoint(fp32: Path, int4: Path) -> None:
    diff = diff_models(fp32, int4, ISOLATED)
    assert (diff.tolerance.own, diff.tolerance.isolated) == (parity.ROUNDED_END_TO_END.bound, parity.ROUNDED.bound)
    assert diff.agrees, diff.verdict()
    errors = [item.own.relative_error for item in diff.stages if item.rows == "language" and "layer" in item.stage]
    assert 0.01 < errors[0] < errors[-1], "rounding errors add up"
    exact = next(item.isolated for item in diff.stages if item.stage == "decoder.norm")
    assert exact is not None and exact.relative_error < parity.STRUCTURE.bound, "norms are not quantized"


def test_tolerance_moves_the_verdict(fp32: Path, int4: Path) -> None:
    first = diff_models(fp32, int4, DiffOptions(tolerance=1e-3, threads=1)).first_beyond()
    assert first is not None and first.stage == "vision.layer.0", "its linears have int8 codes"


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_overflow_is_named_and_its_document_is_valid_json(ckpt: Path, tmp_path: Path) -> None:
    other = write_changed_checkpoint(tmp_path / "other", overflow_for_pictures, **SIZES)
    result = run_cli("diff", ckpt, other, "--threads", 1, "--json")
    document = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["first_beyond"] == "connector.mlp"
    found = next(item["own"] for item in document["stages"] if item["stage"] == "connector.mlp")
    assert "B holds" in found["not_finite"] and "the first at row 0, channel 0" in found["not_finite"]
    assert found["relative_error"] is None and found["is_beyond"] is True
    assert "B holds" in run_cli("diff", ckpt, other, "--threads", 1).stdout


def test_default_tolerance_is_that_of_the_coarser_model() -> None:
    found = {pair: default_tolerance(*pair).own for pair in (
        ("float32", "float32"), ("float32", "fp16"), ("int8", "fp16"), ("int4", "int4"), ("int4", "int8"),
    )}  # fmt: skip
    assert list(found.values()) == [1e-4, 0.05, 0.25, 0.25, 0.5]


# The input


def test_text_alone_has_no_stage_of_the_encoder_and_no_vision_rows(ckpt: Path, fp32: Path) -> None:
    diff = diff_models(ckpt, fp32, DiffOptions(text="What is this?", isolate=True, threads=1))
    assert titles(diff)[0] == "decoder.input, language rows"
    assert {item.rows for item in diff.stages} == {"language"}
    assert (diff.input["image"], diff.input["vision_rows"], diff.input["prompt"]) == (None, 0, "What is this?")
    assert diff.agrees, diff.verdict()


def test_picture_and_question_of_the_user_are_what_runs(ckpt: Path, fp32: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "photo.png")
    image = str(tmp_path / "photo.png")
    asked, longer = (
        diff_models(ckpt, fp32, DiffOptions(image=image, text=text, threads=1)).input for text in ("Why?", "Why not?")
    )
    assert (asked["image"], asked["seed"], asked["vision_rows"]) == (image, None, 17)
    assert longer["tokens"] == asked["tokens"] + 4, "a token per byte"


def test_seed_draws_another_input(ckpt: Path, fp32: Path) -> None:
    errors = [diff_models(ckpt, fp32, DiffOptions(seed=seed, threads=1)).stages[0].own for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]


def test_many_logits_are_judged_some_rows_at_a_time(ckpt: Path, int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = diff_models(ckpt, int4, ISOLATED).stages[-1].own
    monkeypatch.setattr("vlmdeploy.diff.side_by_side.LOGIT_ROWS", 5)
    parts = diff_models(ckpt, int4, ISOLATED).stages[-1].own
    assert (parts.max_at, parts.cosine_worst_row) == (whole.max_at, whole.cosine_worst_row)
    assert parts.top1_agreement == whole.top1_agreement
    assert (parts.relative_error, parts.kl_nats) == pytest.approx((whole.relative_error, whole.kl_nats), rel=1e-3)


def test_shorter_context_bounds_the_prompt(ckpt: Path, tmp_path: Path) -> None:
    bundle = export(ckpt, tmp_path / "bundle", context_tokens=21)
    assert diff_models(ckpt, bundle, DiffOptions(threads=1)).input["tokens"] <= 21
    error = only_error_line(run_cli("diff", ckpt, bundle, "--prompt", "Why is that so?"))
    assert "--prompt makes" in error and f"the context of {bundle} holds 21: shorten it" in error


# The command


def test_command_prints_a_table_and_the_verdict(ckpt: Path, fp32: Path) -> None:
    result = run_cli("diff", ckpt, fp32, "--isolate", "--threads", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert "decoder.layer.2" in result.stdout and "isolated: relative error" in result.stdout
    assert lines[-3:-1] == [
        "all stages within tolerance 0.0001 (for float32 against float32)", lines[-2],
    ]  # fmt: skip
    assert lines[-2].startswith("isolated, beyond tolerance 2e-05: none; farthest layer: ")
    assert lines[-1].startswith("best token equal in 100.0% of rows, KL ")


def test_command_names_the_first_stage_and_fails_only_if_asked(ckpt: Path, tmp_path: Path) -> None:
    other = damaged(tmp_path / "damaged", "model.layers.1.mlp.vision_mlp.down_proj.weight")
    result = run_cli("diff", ckpt, other, "--isolate", "--threads", 1)
    assert result.exit_code == 0
    assert "first stage beyond tolerance: decoder.layer.1, vision rows: relative error 0." in result.stdout
    assert "isolated, beyond tolerance 2e-05: decoder.layer.1, vision rows (0." in result.stdout
    failed = run_cli("diff", ckpt, other, "--isolate", "--threads", 1, "--fail")
    assert (failed.exit_code, failed.stdout, failed.stderr) == (1, result.stdout, "")
    assert run_cli("diff", ckpt, other, "--tolerance", 1e9, "--threads", 1, "--fail").exit_code == 0


def test_json_holds_input_tolerance_stages_and_the_verdict(ckpt: Path, int4: Path) -> None:
    document = only_json_document(run_cli("diff", ckpt, int4, "--tolerance", 0.001, "--threads", 1, "--json"))
    assert list(document) == [
        "a", "b", "input", "tolerance", "stages", "first_beyond", "first_beyond_rows", "beyond_alone",
    ]  # fmt: skip
    assert (document["a"], document["b"], document["beyond_alone"]) == (str(ckpt), str(int4), None)
    assert (document["first_beyond"], document["first_beyond_rows"]) == ("vision.layer.0", "all")
    assert document["input"]["image"] == "drawn" and document["input"]["seed"] == 0
    assert all("isolated" not in item for item in document["stages"])
    last = document["stages"][-1]
    assert (last["stage"], last["rows"]) == ("logits", "language") and 0 < last["own"]["kl_nats"] < 1


def test_plot_is_written_where_matplotlib_is(ckpt: Path, int4: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install vlmdeploy[report]")
    folder = tmp_path / "$a_$b"  # no formula
    folder.mkdir()
    for name, start in (("errors.png", b"\x89PNG"), ("errors.svg", b"<?xml")):
        options = ["--isolate", "--threads", 1, "--plot", folder / name]
        assert run_cli("diff", ckpt, int4, *options).exit_code == 0
        assert (folder / name).read_bytes().startswith(start)


def test_plot_of_equal_models_with_no_tolerance_is_written(ckpt: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install vlmdeploy[report]")
    options = ["--tolerance", 0, "--threads", 1, "--plot", tmp_path / "errors.pdf"]
    assert run_cli("diff", ckpt, ckpt, *options).exit_code == 0
    assert (tmp_path / "errors.pdf").read_bytes().startswith(b"%PDF")


def test_plot_without_matplotlib_says_what_to_install(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    error = only_error_line(run_cli("diff", ckpt, ckpt, "--plot", ckpt.parent / "errors.png"))
    assert error == 'Error: matplotlib is not installed: pip install "vlmdeploy[report]"'


@pytest.mark.parametrize(("options", "message"), [
    (["--tolerance", "nan"], "--tolerance is nan, expected a relative error of 0 or more"),
    (["--tolerance", -1], "--tolerance is -1.0, expected"),
    (["--tolerance", "inf"], "--tolerance is inf, expected"),
    (["--plot", "errors.jpeg2"], "--plot is errors.jpeg2, expected a file name that ends in .png, .svg, .pdf"),
    (["--plot", "nowhere/errors.png"], "--plot is nowhere/errors.png: its folder does not exist"),
    (["--image", "nowhere.png"], "nowhere.png: no such file"),
    (["--image", __file__], "test_diff.py: not a picture or damaged"),
    (["--prompt", "long " * 100], "--prompt makes 5"),
    (["--prompt", "\udce4"], "text is not valid UTF-8 at character 0"),
])  # fmt: skip
def test_option_that_cannot_be_used_is_one_line(ckpt: Path, options: list[Any], message: str) -> None:
    assert message in only_error_line(run_cli("diff", ckpt, ckpt, *options))


def test_folder_that_is_no_model_is_one_line(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        assert f"{name}: no such folder; expected a checkpoint or a bundle" in only_error_line(
            run_cli("diff", ckpt, tmp_path / name)
        )
    assert "holds no config.json and no manifest.json" in only_error_line(run_cli("diff", tmp_path, ckpt))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert "config.json: not JSON" in only_error_line(run_cli("diff", tmp_path, ckpt))


@pytest.mark.parametrize(("family", "sizes", "told"), [
    ("cogvlm", {"layers": 4}, "decoder_layers is 3 in the first and 4 in the second"),
    ("cogvlm", {"vision_layers": 1}, "vision_layers is 2 in the first and 1 in the second"),
    ("cogvlm", {"image_px": 12}, "image_px is 8 in the first and 12 in the second"),
    ("cogvlm", {"vision_width": 64}, "vision_width is 32 in the first and 64 in the second"),
    ("cogvlm", {"vocab": 280}, "vocab_size is 264 in the first and 280 in the second"),
    ("cogvlm", {"heads": 2}, "kv_heads is 4 in the first and 2 in the second"),
    ("cogvlm2", {}, "family is cogvlm in the first and cogvlm2 in the second"),
])  # fmt: skip
def test_other_geometry_is_named_for_checkpoints_and_bundles(
    family: str, sizes: dict[str, Any], told: str, ckpt: Path, fp32: Path, tmp_path: Path
) -> None:
    other = write_calibration_checkpoint(tmp_path / "other", family, **SIZES | sizes)
    assert told in only_error_line(run_cli("diff", ckpt, other))
    assert told in only_error_line(run_cli("diff", fp32, other))


def test_other_width_of_the_mlp_is_no_other_geometry(ckpt: Path, tmp_path: Path) -> None:
    other = write_calibration_checkpoint(tmp_path / "other", **SIZES | {"mlp": 64})
    diff = diff_models(ckpt, other, DiffOptions(threads=1))
    assert all(math.isfinite(item.own.relative_error) for item in diff.stages)


def test_question_needs_a_tokenizer_of_either_model(ckpt: Path, tmp_path: Path) -> None:
    plain = write_changed_checkpoint(tmp_path / "plain", lambda tensors: None, **SIZES)
    (plain / "tokenizer.json").unlink()
    ids_only = export(plain, tmp_path / "ids_only")
    error = only_error_line(run_cli("diff", plain, ids_only, "--prompt", "Why?"))
    assert f"--prompt needs a tokenizer, and {plain} and {ids_only} hold none" in error
    assert run_cli("diff", ids_only, ckpt, "--prompt", "Why?", "--threads", 1).exit_code == 0
    assert run_cli("diff", plain, ids_only, "--threads", 1).exit_code == 0


def test_tokenizers_that_disagree_are_told(ckpt: Path, tmp_path: Path) -> None:
    other = write_changed_checkpoint(tmp_path / "other", lambda tensors: None, **SIZES)
    text = (other / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "other ones" in only_error_line(run_cli("diff", ckpt, other, "--prompt", "a cab"))


def test_altered_bundle_is_not_compared(ckpt: Path, tmp_path: Path) -> None:
    bundle = export(ckpt, tmp_path / "bundle")
    (bundle / "vision.data").write_bytes(b"\0" * (bundle / "vision.data").stat().st_size)
    assert "vision.data: altered" in only_error_line(run_cli("diff", ckpt, bundle))
