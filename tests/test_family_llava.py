"""LLaVA-1.5: golden vectors through PyTorch and bundles, prompts with images in their turns, config and tensors."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlmdeploy
from tests.calibration_data import FAST, write_calibration_data
from tests.comparison import assert_close
from tests.golden_cases import GOLDEN
from tests.test_export_golden import exact_session, export_with_model
from tests.tiny_bundle import export, only_json_document, run_cli
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import ConfigError, PromptError
from vlmdeploy.families import all_families, find_family, llava
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.load import load_model, materialize, save_checkpoint
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.records import Config
from vlmdeploy.runtime.image import load_image, preprocess
from vlmdeploy.spec.model import ModelSpec
from vlmdeploy.train.config import load_config

ROOT = Path(__file__).parents[1]
FOLDER = GOLDEN / "llava_1_5-tiny"
CKPT, INPUTS, EXPECTED = FOLDER / "checkpoint", FOLDER / "inputs.safetensors", FOLDER / "expected.safetensors"
CASES: dict[str, list[int]] = {
    name: case["images"]
    for name, case in json.loads((FOLDER / "cases.json").read_text())["cases"].items()
    if "images" in case
}
ROWS, LOGITS = 1e-5, 4e-5  # right code is within 3e-6 and 2e-5; a wrong epsilon is beyond
NUM_NEW = 10


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(INPUTS)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(EXPECTED)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return vlmdeploy.load_model(CKPT)


def pictures(inputs: dict[str, Tensor], case: str) -> Tensor | None:
    return inputs["pixel_values_pad"][CASES[case]] if CASES[case] else None


@torch.no_grad()
def test_image_rows_are_the_librarys(
    model: VisionLanguageModel, inputs: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    assert_close("rows", model.encode_images(inputs["pixel_values_pad"]), expected["projector.out"], ROWS)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_and_answers_are_the_librarys(
    case: str, model: VisionLanguageModel, inputs: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    ids, images, last = inputs[f"{case}.input_ids"], pictures(inputs, case), expected[f"{case}.logits"]
    assert_close(case, model(ids, images)[:, -last.shape[1] :], last, LOGITS)
    assert model.generate(ids, images, max_new_tokens=NUM_NEW).tolist() == expected[f"{case}.greedy_ids"].tolist()


@torch.no_grad()
def test_a_padded_batch_answers_as_its_rows_alone(
    model: VisionLanguageModel, inputs: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    ids, mask = inputs["batch_left_padded.input_ids"], inputs["batch_left_padded.attention_mask"]
    found = model.generate(ids, inputs["pixel_values_pad"], attention_mask=mask, max_new_tokens=NUM_NEW)
    assert found.tolist() == expected["batch_left_padded.greedy_ids"].tolist()


CHANGES: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "encoder epsilon": lambda spec: replace(spec, vision=replace(spec.vision, norm_eps=1e-6)),
    "first norm's epsilon": lambda spec: replace(spec, vision=replace(spec.vision, embed_norm_eps=1e-6)),
    "encoder gelu": lambda spec: replace(spec, vision=replace(spec.vision, activation="gelu")),
    "norms behind branches": lambda spec: replace(spec, vision=replace(spec.vision, norm_place="branch")),
    "decoder epsilon": lambda spec: replace(spec, decoder=replace(spec.decoder, norm_eps=1e-6)),
    "rotary base": lambda spec: _with_rope(spec, base=10001.0),
    "rotary pairs": lambda spec: _with_rope(spec, pairing="adjacent"),
    "positions": lambda spec: replace(spec, tokens=replace(spec.tokens, positions="patches_share_one")),
}


def _with_rope(spec: ModelSpec, **changed: Any) -> ModelSpec:
    return replace(spec, decoder=replace(spec.decoder, rope=replace(spec.decoder.rope, **changed)))


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_vectors_see_every_constant(
    change: str, model: VisionLanguageModel, inputs: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    spec = CHANGES[change](model.spec)
    with torch.device("meta"):
        other = VisionLanguageModel(spec)
    materialize(other, spec, "cpu").load_state_dict({**model.state_dict(), "decoder.inv_freq": _inv_freq(spec)})
    last = expected["one_image.logits"]
    logits = other(inputs["one_image.input_ids"], pictures(inputs, "one_image"))[:, -last.shape[1] :]
    rows = other.encode_images(inputs["pixel_values_pad"])
    off = float((logits - last).abs().max()) > LOGITS
    assert off or float((rows - expected["projector.out"]).abs().max()) > ROWS


def _inv_freq(spec: ModelSpec) -> Tensor:
    from vlmdeploy.model.decoder import default_inv_freq

    return default_inv_freq(spec.decoder)


@pytest.mark.parametrize("target", ["ort-fp32", "ort-int4", "trt-fp16", "trt-int4"])
@torch.no_grad()
def test_bundles_equal_the_model(target: str, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    exported = export_with_model(CKPT, tmp_path, target)
    session = exact_session(exported)
    assert exported.manifest.format_version == "3.0" and "decoder_vision" not in exported.manifest.graphs
    for case in CASES:
        ids, images = inputs[f"{case}.input_ids"], pictures(inputs, case)
        pixels = None if images is None else images.numpy()
        logits = session.logits(ids[0].numpy(), pixels)
        assert_close(case, logits, exported.model(ids, images)[0], 3e-4)
        new_ids = exported.model.generate(ids, images, max_new_tokens=NUM_NEW)[0].tolist()
        assert session.generate_ids(ids[0].numpy(), pixels, NUM_NEW).tolist() == new_ids


def test_a_fp32_bundle_gives_the_librarys_logits(
    inputs: dict[str, Tensor], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    session = vlmdeploy.open(export(CKPT, tmp_path / "bundle"), threads=1)
    for case in CASES:
        images, last = pictures(inputs, case), expected[f"{case}.logits"][0]
        ids, pixels = inputs[f"{case}.input_ids"][0].numpy(), None if images is None else images.numpy()
        assert_close(case, session.logits(ids, pixels)[-len(last) :], last, LOGITS)
        assert session.generate_ids(ids, pixels, NUM_NEW).tolist() == expected[f"{case}.greedy_ids"][0].tolist()
    with pytest.raises(PromptError, match="0 images were given, but the ids hold placeholders"):
        session.generate_ids(inputs["one_image.input_ids"][0].numpy())


def test_questions_about_pictures_from_the_command_line_and_a_session(tmp_path: Path) -> None:
    bundle = export(CKPT, tmp_path / "bundle", "ort-int4")
    picture = FOLDER / "images" / "a.png"
    ask = ("run", bundle, "--prompt", "What?", "--max-new-tokens", 2, "--json")
    one = only_json_document(run_cli(*ask, "--image", picture))
    alone = only_json_document(run_cli(*ask))
    rows = read_manifest(bundle).tokens.rows_per_image
    assert one["prompt_tokens"] > alone["prompt_tokens"] + rows - 1

    session = vlmdeploy.open(bundle, threads=1)
    content = [{"type": "image", "image": str(picture)}, {"type": "image", "image": str(FOLDER / "images" / "b.png")}]
    question: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]},
    ]
    assert session.start(question, _options()).prompt.types.sum() == 2 * rows
    prepared = session.prepare(question)
    assert prepared.images is not None and len(prepared.images) == 2
    for name, pixels in zip("ab", prepared.images, strict=True):
        np.testing.assert_array_equal(session.pixels(FOLDER / "images" / f"{name}.png")[0], pixels)
    answer = "".join(session.generate(question, max_new_tokens=3))
    assert session.tokenizer.decode(session.generate_ids(prepared.ids, prepared.images, 3)).startswith(answer.rstrip())


def test_more_pictures_than_the_context_holds_are_not_opened(tmp_path: Path) -> None:
    session = vlmdeploy.open(export(CKPT, tmp_path / "bundle"), threads=1)
    content = [{"type": "image", "image": "nowhere.png"}] * 10**5
    with pytest.raises(PromptError, match="100000 images take 1600000 tokens and the context holds 4096: show fewer"):
        session.start([{"role": "user", "content": content}], _options())


def _options() -> Any:
    from vlmdeploy.runtime.sampling import SamplingOptions

    return SamplingOptions(max_new_tokens=1)


def test_pictures_are_cropped_on_request(
    inputs: dict[str, Tensor], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    done = run_cli("export", "--ckpt", CKPT, "--target", "ort-fp32", "--image-recipe", "crop", "--out", bundle)
    assert done.exit_code == 0, done.stderr
    assert run_cli("verify", bundle, "--ckpt", CKPT).exit_code == 0
    session = vlmdeploy.open(bundle, threads=1)
    pixels = preprocess(load_image(FOLDER / "images" / "a.png"), session.manifest.image)[None]
    assert_close("pixels", pixels[0], inputs["pixel_values_crop"][0], ROWS)
    logits = session.logits(inputs["one_image.input_ids"][0].numpy(), pixels)[-1]
    assert_close("logits", logits, expected["one_image.crop_first_logits"][0, 0], LOGITS)

    other = tmp_path / "other"
    refused = run_cli("export", "--ckpt", CKPT, "--target", "ort-fp32", "--image-recipe", "squash", "--out", other)
    assert (refused.exit_code, '--image-recipe is "squash", expected pad or crop' in refused.stderr) == (1, True)
    assert not other.exists()


def test_parameters_are_those_of_the_released_model() -> None:
    spec = llava.spec(llava.RELEASED, {})
    sizes: dict[str, int] = {}
    for rule in llava.weights(spec):
        part = rule.part if rule.part in ("vision", "connector") else "llama"
        sizes[part] = sizes.get(part, 0) + prod(rule.shape)
    width, mlp = 1024, 4096
    layer = 4 * (width * width + width) + 2 * width * mlp + width + mlp + 4 * width
    assert sizes["vision"] == 303_507_456 - layer - 2 * width  # the last layer and norm feed nothing
    assert sizes["connector"] == 20_979_712
    assert sizes["llama"] == 6_738_415_616 + 2 * 64 * 4096  # with <image>, <pad> and padding to a multiple of 64
    assert spec.tokens.rows_per_image == 576


def test_exactly_one_family_reads_the_checkpoint() -> None:
    checkpoint = Checkpoint(CKPT)
    names = frozenset(checkpoint.shard_of)
    assert [family.NAME for family in all_families() if family.detect(checkpoint.config, names)] == ["llava"]


def test_parameters_have_the_shapes_of_the_model_and_come_back_from_a_file(
    model: VisionLanguageModel, tmp_path: Path
) -> None:
    checkpoint, state = Checkpoint(CKPT), model.state_dict()
    assert {name: tuple(values.shape) for name, values in state.items()} == {
        **{target: rule.shape for target, rule in checkpoint.rules.items()},
        "decoder.inv_freq": (checkpoint.spec.decoder.head_dim // 2,),
    }
    for target, rule in checkpoint.rules.items():
        middle = rule.shape[0] // 3
        assert torch.equal(checkpoint.rows(target, middle, middle + 2), state[target][middle : middle + 2])
    save_checkpoint(model, checkpoint.config, tmp_path, torch.float32)
    again = Checkpoint(tmp_path)
    for source in (source for rule in checkpoint.rules.values() for source in rule.sources):
        assert torch.equal(again.raw(source.name), checkpoint.raw(source.name))


@pytest.mark.parametrize("tower", ["model.vision_tower.vision_model.", "model.vision_tower."])
def test_the_names_of_newer_libraries_are_read_and_written_back(
    tower: str, model: VisionLanguageModel, tmp_path: Path
) -> None:
    renamed = {
        "vision_tower.vision_model.": tower, "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.", "multi_modal_projector.": "model.multi_modal_projector.",
    }  # fmt: skip
    tensors = {}
    for name, values in load_file(CKPT / "model.safetensors").items():
        old = next(prefix for prefix in renamed if name.startswith(prefix))
        tensors[name.replace(old, renamed[old], 1)] = values
    (tmp_path / "ckpt").mkdir()
    save_file(tensors, tmp_path / "ckpt" / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "ckpt" / name).write_bytes((CKPT / name).read_bytes())
    for name, values in load_model(tmp_path / "ckpt").state_dict().items():
        assert torch.equal(values, model.state_dict()[name])

    data = write_calibration_data(tmp_path / "data", num_pictures=16, num_texts=24)
    done = run_cli("quantize", "--ckpt", tmp_path / "ckpt", "--calib", data, "--out", tmp_path / "quantized", *FAST)
    assert done.exit_code == 0, done.stderr
    assert Checkpoint(tmp_path / "quantized").codes.names() == frozenset(tensors)


def test_what_the_answer_does_not_need_is_ignored() -> None:
    checkpoint = Checkpoint(CKPT)
    assert checkpoint.spec.family == "llava" and checkpoint.spec.vision.num_layers == 2
    unused = {name.split(".")[2] + "." + name.split(".")[3] for name in checkpoint.ignored}
    assert unused == {"encoder.layers", "post_layernorm.weight", "post_layernorm.bias"}
    assert {name.split(".")[4] for name in checkpoint.ignored if ".layers." in name} == {"2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, '"vision_feature_layer" is .*expected a whole number'),
        ({"vision_feature_layer": -9}, '"vision_feature_layer" is -9, expected a state behind one of 3 layers'),
        ({"vision_feature_select_strategy": "full"}, "\"vision_feature_select_strategy\" is 'full'"),
        ({"projector_hidden_act": "relu"}, "\"projector_hidden_act\" is 'relu'"),
        ({"image_token_index": 448}, '"image_token_index" is 448, expected less than vocab_size 448'),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}}, "rotary positions are scaled by 'linear'"),
        ({"text_config": {"model_type": "mistral"}}, "\"model_type\" is 'mistral'"),
        ({"text_config": {"tie_word_embeddings": True}}, '"tie_word_embeddings" is True'),
    ],
)
def test_a_config_that_we_would_compute_wrongly(change: Config, message: str) -> None:
    config = json.loads((CKPT / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        llava.spec(config, {})


def test_the_base_of_the_rotation_where_newer_libraries_write_it() -> None:
    config = json.loads((CKPT / "config.json").read_text())
    text = config["text_config"]
    del text["rope_theta"]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert llava.spec(config, {}).decoder.rope.base == 500000.0


def test_a_quantized_checkpoint_keeps_every_tensor_and_exports(tmp_path: Path) -> None:
    data = write_calibration_data(tmp_path / "data", num_pictures=16, num_texts=24)
    quantized, bundle = tmp_path / "quantized", tmp_path / "bundle"
    done = run_cli("quantize", "--ckpt", CKPT, "--calib", data, "--out", quantized, *FAST)
    assert done.exit_code == 0, done.stderr
    before, after = Checkpoint(CKPT), Checkpoint(quantized)
    assert after.is_quantized and after.ignored == before.ignored
    for name in before.ignored:
        assert torch.equal(after.raw(name), before.raw(name))
    done = run_cli("export", "--ckpt", quantized, "--target", "ort-int4", "--out", bundle, "--threads", 1)
    assert done.exit_code == 0, done.stderr
    verification = read_manifest(bundle).verification
    assert verification is not None and verification.passed


def test_a_model_of_one_expert_is_not_trained_here(tmp_path: Path) -> None:
    recipe = (ROOT / "examples" / "digits" / "train.toml").read_text()
    start = recipe.index("[model]")
    (tmp_path / "train.toml").write_text(recipe[:start] + toml_of("model", llava.RELEASED))
    with pytest.raises(ConfigError, match="llava has one expert, expected a language and a vision expert"):
        load_config(tmp_path / "train.toml")


def toml_of(name: str, values: Config) -> str:
    plain = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    inner = [toml_of(f"{name}.{key}", value) for key, value in values.items() if isinstance(value, dict)]
    return "\n".join([f"[{name}]", *plain, *inner, ""])


def test_the_authors_layout_is_named() -> None:
    config = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip"}
    with pytest.raises(ConfigError, match="the layout of the authors' code; expected that of Hugging Face"):
        find_family(config, frozenset())
