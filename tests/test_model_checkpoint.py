"""Contract tests: what a checkpoint must be, and one clear error for everything else; weights survive a round trip."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_bundle import flip_byte
from tests.tiny_checkpoint import INDEX_NAME, INV_FREQ, TinyCheckpoint, write_checkpoint, write_tiny_checkpoint
from vlmdeploy import load_model
from vlmdeploy.calib.checkpoint_writer import unit_tensors
from vlmdeploy.errors import ConfigError, PromptError, VlmdeployError, WeightsError
from vlmdeploy.families import all_families
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.load import save_checkpoint
from vlmdeploy.model.tensor_file import save_tensors
from vlmdeploy.model.vlm import VisionLanguageModel

FAMILIES = ["cogvlm", "cogvlm2"]  # of which tests.tiny_checkpoint writes any size
QKV = "model.layers.1.self_attn.language_expert_query_key_value.weight"
SECOND_SHARD = "model-00002-of-00003.safetensors"


# Every tensor and every parameter, for each family


@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_one_family_reads_a_checkpoint(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path, name))
    tensor_names = frozenset(checkpoint.shard_of)
    assert [family.NAME for family in all_families() if family.detect(checkpoint.config, tensor_names)] == [name]
    assert checkpoint.spec.family == name


@pytest.mark.parametrize("stores_inv_freq", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_used_once_and_every_parameter_filled_once(
    name: str, stores_inv_freq: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, read = Counter[str](), Counter[str]()
    monkeypatch.setattr("vlmdeploy.model.load.fill_parameter", lambda model, target, values: filled.update([target]))
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path, name, stores_inv_freq=stores_inv_freq))
    model = load_model(tmp_path)
    for rule in checkpoint.rules.values():
        read.update(source.name for source in rule.sources if source.name in checkpoint.shard_of)
    kept_default = set() if stores_inv_freq else {"decoder.inv_freq"}
    assert set(filled) == set(model.state_dict()) - kept_default
    assert set(read) == set(checkpoint.shard_of)
    assert set(filled.values()) == set(read.values()) == {1}


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_give_the_shapes_of_the_model(name: str, tmp_path: Path) -> None:
    checkpoint, model = Checkpoint(write_tiny_checkpoint(tmp_path, name)), load_model(tmp_path)
    for target, parameter in model.state_dict().items():
        assert tuple(parameter.shape) == checkpoint.shape(target) == tuple(checkpoint.parameter(target).shape), target


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_parameter_are_the_rows_of_the_whole(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path, name, num_shards=3))
    for target in checkpoint.rules:
        whole = checkpoint.parameter(target)
        for start, stop in ((0, 1), (len(whole) // 2 - 1, len(whole) // 2 + 2), (len(whole) - 1, len(whole))):
            assert torch.equal(checkpoint.rows(target, max(start, 0), stop), whole[max(start, 0) : stop]), target


@pytest.mark.parametrize("name", FAMILIES)
def test_shards_and_a_single_file_give_the_same_model(name: str, tmp_path: Path) -> None:
    single = load_model(write_tiny_checkpoint(tmp_path / "single", name))
    sharded = load_model(write_tiny_checkpoint(tmp_path / "sharded", name, num_shards=4))
    assert_same_weights(single, sharded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_checkpoint_loads_as_the_same_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored: Any = str(dtype).removeprefix("torch.")
    model = load_model(write_tiny_checkpoint(tmp_path / "first", name, dtype=stored, stores_inv_freq=False))
    (tmp_path / "second").mkdir()
    save_checkpoint(model, read_config(tmp_path / "first"), tmp_path / "second", dtype)
    assert_same_weights(model, load_model(tmp_path / "second"))
    saved, first = (load_file(tmp_path / folder / "model.safetensors") for folder in ("second", "first"))
    assert {name: values.dtype for name, values in saved.items() if name in first} == dict.fromkeys(first, dtype)


def test_model_is_in_eval_mode_and_of_the_wanted_dtype(tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path), dtype="float16")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.decoder.inv_freq.dtype == torch.float32, "angles need float32 whatever the weights are"


def test_unknown_dtype_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int4': expected one of float32, float16, bfloat16"):
        load_model(write_tiny_checkpoint(tmp_path), dtype="int4")


# The fingerprint


def test_a_byte_in_the_middle_of_a_shard_changes_the_fingerprint(tmp_path: Path) -> None:
    """Only the first and last MiB of a shard were hashed once: another model was "quantized already"."""
    shard = write_tiny_checkpoint(tmp_path, vocab=30000) / "model.safetensors"
    assert shard.stat().st_size > 4 << 20
    before = Checkpoint(tmp_path).fingerprint()
    assert Checkpoint(tmp_path).fingerprint() == before
    flip_byte(shard)
    assert Checkpoint(tmp_path).fingerprint() != before


def test_the_fingerprint_is_computed_once(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path))
    first = checkpoint.fingerprint()
    (tmp_path / "model.safetensors").unlink()
    assert checkpoint.fingerprint() == first


# Rotary frequencies: stored in every layer, or absent


def test_stored_inv_freq_is_used(tmp_path: Path) -> None:
    tiny = TinyCheckpoint()
    table = np.array([0.9, 0.5, 0.25, 0.1], np.float32)
    tables = {INV_FREQ.format(layer): table for layer in range(tiny.layers)}
    model = load_model(write_checkpoint(tmp_path, tiny.config(), tiny.tensors() | tables))
    assert model.decoder.inv_freq.tolist() == table.tolist()


@pytest.mark.parametrize(("name", "base"), [("cogvlm", 1e4), ("cogvlm2", 5e5)])
def test_absent_inv_freq_is_computed(name: str, base: float, tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path, name, stores_inv_freq=False))
    np.testing.assert_allclose(model.decoder.inv_freq, base ** -(np.arange(0, 8, 2) / 8), rtol=1e-6)


def test_inv_freq_that_differs_between_layers_is_an_error(tmp_path: Path) -> None:
    tiny = TinyCheckpoint()
    odd = {INV_FREQ.format(1): tiny.tensors()[INV_FREQ.format(1)] * np.float32(1.01)}
    write_checkpoint(tmp_path, tiny.config(), tiny.tensors() | odd)
    assert_weights_error(tmp_path, INV_FREQ.format(1), "differs from", INV_FREQ.format(0))


# Bad tensors


def test_missing_tensor(tmp_path: Path) -> None:
    edit_tensors(tmp_path, lambda tensors: tensors.pop(QKV))
    assert_weights_error(tmp_path, QKV, "is missing")


def test_unknown_tensor(tmp_path: Path) -> None:
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.1.adapter": torch.zeros(2)}))
    assert_weights_error(tmp_path, "model.layers.1.adapter", "is unknown")


def test_more_layers_than_config_says(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, layers=3)
    edit_config(tmp_path, lambda config: config.update(num_hidden_layers=2))
    assert_weights_error(tmp_path, "model.layers.2.", "is unknown")


def test_wrong_shape(tmp_path: Path) -> None:
    edit_tensors(tmp_path, lambda tensors: tensors.update({QKV: torch.zeros(96, 31)}))
    assert_weights_error(tmp_path, "model.safetensors", QKV, r"\[96, 31\], expected \[96, 32\]", "config.json")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float64])
def test_wrong_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    edit_tensors(tmp_path, lambda tensors: tensors.update({QKV: tensors[QKV].to(dtype)}))
    assert_weights_error(tmp_path, "model.safetensors", QKV, "expected one of F32, F16, BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [QKV, "model.vision.boi", INV_FREQ.format(0), "model.norm.weight"])
def test_value_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    edit_tensors(tmp_path, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    assert_weights_error(tmp_path, "model.safetensors", name, "NaN or Inf")


def test_tensor_stored_twice(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, num_shards=3)
    other = tmp_path / "model-00001-of-00003.safetensors"
    file = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"][QKV]
    assert file != other.name
    save_file(load_file(other) | {QKV: load_file(tmp_path / file)[QKV]}, other)
    assert_weights_error(tmp_path, QKV, "in more than one file")


# Bad files


def test_missing_shard(tmp_path: Path) -> None:
    (write_tiny_checkpoint(tmp_path, num_shards=3) / SECOND_SHARD).unlink()
    assert_weights_error(tmp_path, SECOND_SHARD, "no such file", INDEX_NAME)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 200, 5000, -1])
def test_truncated_shard(tmp_path: Path, length: int) -> None:
    shard = write_tiny_checkpoint(tmp_path, num_shards=3) / SECOND_SHARD
    shard.write_bytes(shard.read_bytes()[:length])
    assert_weights_error(tmp_path, SECOND_SHARD, "not a whole safetensors file", f"{shard.stat().st_size} bytes")


@pytest.mark.parametrize("content", [b"\0" * 64, b"<html>404</html>", b"\xff" * 4096], ids=["zeros", "html", "ones"])
def test_file_that_is_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (write_tiny_checkpoint(tmp_path) / "model.safetensors").write_bytes(content)
    assert_weights_error(tmp_path, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_header_is_one_of_our_errors_or_harmless(tmp_path: Path, seed: int) -> None:
    file = write_tiny_checkpoint(tmp_path, layers=1, vision_layers=1) / "model.safetensors"
    content, random = bytearray(file.read_bytes()), np.random.default_rng(seed)
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    content[int(random.integers(8 if seed % 4 else 0, header_bytes if seed % 4 else 8))] ^= 1 << int(random.integers(8))
    file.write_bytes(content)
    try:
        load_model(tmp_path)
    except VlmdeployError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda weight_map: weight_map.update({QKV: "model-00001-of-00003.safetensors"}), QKV),
        (lambda weight_map: weight_map.update({"lm_tail.weight": SECOND_SHARD}), "lm_tail.weight"),
        (lambda weight_map: weight_map.pop(QKV), QKV),
        (lambda weight_map: weight_map.update({QKV: 7}), QKV),
        (lambda weight_map: weight_map.update({QKV: ["a", "b"]}), QKV),
    ],
    ids=["other_file", "not_stored", "not_listed", "number", "list"],
)
def test_index_and_shards_differ(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], named: str) -> None:
    write_tiny_checkpoint(tmp_path, num_shards=3)
    edit_json(tmp_path / INDEX_NAME, lambda index: edit(index["weight_map"]))
    assert_weights_error(tmp_path, INDEX_NAME, named)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_tensors(tmp_path: Path, index: dict[str, Any]) -> None:
    (write_tiny_checkpoint(tmp_path, num_shards=3) / INDEX_NAME).write_text(json.dumps(index))
    assert_weights_error(tmp_path, "weight_map|is missing")


def test_pickled_checkpoint_names_the_conversion(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert_weights_error(tmp_path, "pytorch_model.bin is a pickle", r"python -c", r"save_file\(", "weights_only=True")


def test_folder_without_weights(tmp_path: Path) -> None:
    (write_tiny_checkpoint(tmp_path) / "model.safetensors").unlink()
    assert_weights_error(tmp_path, "holds no model.safetensors")


def test_refused_write_of_tensors_is_a_system_error(tmp_path: Path) -> None:
    """It was an error of the tensor library, which only quantization understood; `train` ended with a traceback."""
    path = tmp_path / "nowhere" / "model.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        save_tensors({"weight": torch.zeros(3)}, path)
    assert caught.value.filename == str(path)


def test_missing_folder_and_missing_config(tmp_path: Path) -> None:
    assert_weights_error(tmp_path / "nowhere", "nowhere: no such folder")
    (write_tiny_checkpoint(tmp_path) / "config.json").unlink()
    assert_config_error(tmp_path, "config.json: no such file")


# Bad configs

REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
REQUIRED_VISION = [
    "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "num_positions",
]  # fmt: skip
SIZES = [(None, key) for key in REQUIRED] + [("vision_config", key) for key in REQUIRED_VISION]


def section_of(config: dict[str, Any], section: str | None) -> Any:
    return config if section is None else config[section]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("section", "key"), SIZES)
def test_config_without_a_size_names_the_key(tmp_path: Path, section: str | None, key: str, family: str) -> None:
    write_tiny_checkpoint(tmp_path, family)
    edit_config(tmp_path, lambda config: section_of(config, section).pop(key))
    assert_config_error(tmp_path, "config.json: " + (f"{section}: " if section else ""), f'"{key}" is missing')


@pytest.mark.parametrize("value", ["12", -4, 0, True, 1.5, [8], {}], ids=repr)
@pytest.mark.parametrize(("section", "key"), SIZES)
def test_config_with_a_senseless_size_names_the_key(tmp_path: Path, section: str | None, key: str, value: Any) -> None:
    write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, lambda config: section_of(config, section).update({key: value}))
    assert_config_error(tmp_path, f'"{key}" is ', "expected a whole number of at least 1")


@pytest.mark.parametrize(("section", "key"), SIZES)
def test_config_with_a_size_of_no_model_names_the_key(tmp_path: Path, section: str | None, key: str) -> None:
    """A million million layers were counted one by one, for ever."""
    write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, lambda config: section_of(config, section).update({key: 10**300}))
    assert_config_error(tmp_path, f'"{key}" is 1000', "expected at most 1000")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *((None, "architectures", value) for value in (["LlamaForCausalLM"], [], "CogVLMForCausalLM", None, 7)),
        *((None, "rms_norm_eps", value) for value in (0, -1e-5, "1e-5", float("nan"), float("inf"), True)),
        *((None, "max_position_embeddings", value) for value in (0, "2048", 2048.0)),
        *((None, "hidden_act", value) for value in ("relu", 1)),
        *((None, "template_version", value) for value in ("poem", ["chat"])),
        *((None, "bos_token_id", value) for value in (-1, "1", 48, [1])),
        *((None, "pad_token_id", value) for value in (-1, 48, 1.0)),
        *((None, "eos_token_id", value) for value in (-1, "2", [], [2, "3"], [2, True])),
        (None, "tie_word_embeddings", True),
        (None, "vision_config", "ViT"),
        (None, "num_attention_heads", 3),
        (None, "num_attention_heads", 32),
        ("vision_config", "num_heads", 3),
        ("vision_config", "num_positions", 16),
        ("vision_config", "image_size", 10),
        ("vision_config", "patch_size", 16),
        ("vision_config", "patch_size", 3),
        ("vision_config", "in_channels", 4),
        ("vision_config", "hidden_act", "quick_gelu"),
        ("vision_config", "layer_norm_eps", 0),
    ],
    ids=repr,
)
def test_config_with_nonsense_names_the_key(tmp_path: Path, section: str | None, key: str, value: Any) -> None:
    write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, lambda config: section_of(config, section).update({key: value}))
    named = {"architectures": "architecture", "patch_size": "patch", "image_size": "image_size"}.get(key, key)
    assert_config_error(tmp_path, "config.json: ", named)


@pytest.mark.parametrize("kv_heads", [3, 8, 0, "2"])
def test_kv_heads_that_do_not_divide_the_heads(tmp_path: Path, kv_heads: Any) -> None:
    write_tiny_checkpoint(tmp_path, "cogvlm2")
    edit_config(tmp_path, lambda config: config.update(num_multi_query_heads=kv_heads))
    assert_config_error(tmp_path, "num_multi_query_heads")


@pytest.mark.parametrize(
    ("name", "image_px", "patch_px"), [("cogvlm", 2, 4), ("cogvlm", 9, 4), ("cogvlm2", 9, 4), ("cogvlm2", 3, 3)]
)
def test_image_that_its_patches_do_not_fill(tmp_path: Path, name: str, image_px: int, patch_px: int) -> None:
    write_tiny_checkpoint(tmp_path, name, image_px=image_px, patch_px=patch_px)
    assert_config_error(tmp_path, "image_size")


@pytest.mark.parametrize("key", ["rms_norm_eps", "max_position_embeddings", "template_version", "pad_token_id"])
def test_config_may_leave_out_what_has_a_default(tmp_path: Path, key: str) -> None:
    write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, lambda config: config.pop(key))
    spec = load_model(tmp_path).spec
    assert spec.decoder.norm_eps == (1e-6 if key == "rms_norm_eps" else 1e-5)
    assert spec.decoder.context_tokens == (2048 if key == "max_position_embeddings" else 128)


def test_cogvlm2_config_as_published_has_eight_kv_heads(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, "cogvlm2", hidden=32, heads=16, kv_heads=8)
    edit_config(tmp_path, lambda config: config.pop("num_multi_query_heads"))
    assert load_model(tmp_path).spec.decoder.num_kv_heads == 8


def test_unknown_architecture_lists_the_known_families(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, lambda config: config.update(architectures=["LlavaForConditionalGeneration"]))
    assert_config_error(tmp_path, "LlavaForConditionalGeneration", "not supported", "known families: cogvlm, cogvlm2")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("CogAgentForCausalLM", "CogAgent has a second encoder"), ("CogVLMVideoForCausalLM", "reads videos")],
)
def test_the_nearest_family_says_what_a_checkpoint_is(tmp_path: Path, architecture: str, reason: str) -> None:
    write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, lambda config: config.update(architectures=[architecture]))
    assert_config_error(tmp_path, architecture, "not supported", reason)


def test_ignored_tensors_are_kept_and_unknown_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TinyCheckpoint()
    extra = {name: np.arange(3, dtype=np.float32) for name in ("model.head_b.weight", "model.head_a.weight")}
    write_checkpoint(tmp_path, tiny.config(), tiny.tensors() | extra)
    with pytest.raises(WeightsError, match=r'"model.head_a.weight" is unknown \(2 such tensors\)'):
        Checkpoint(tmp_path)
    monkeypatch.setattr("vlmdeploy.families.cogvlm.IGNORED", ("model.head_?.weight",))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.ignored == sorted(extra)
    load_model(tmp_path)
    units = ["decoder.layers.0", "head"]
    layer, last = (unit_tensors(checkpoint, unit, units, {}) for unit in units)
    assert not set(extra) & set(layer)
    for name, values in extra.items():
        np.testing.assert_array_equal(last[name].numpy(), values)


def test_text_only_glm_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    glm = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": 40, "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(glm))
    assert_config_error(tmp_path, "chatglm", "vision_config", "text-only")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX_NAME])
@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[]", b"7", b"\xff\xfe{}", b'{"a": 1}}', b"[" * 20000])
def test_broken_json_names_the_file(tmp_path: Path, file: str, content: bytes) -> None:
    (write_tiny_checkpoint(tmp_path) / file).write_bytes(content)
    assert_config_error(tmp_path, file, "not JSON|expected an object")


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "hot"), ("temperature", -1), ("top_p", [0.9]), ("top_k", 1.5), ("top_k", -1), ("max_length", "4")],
)
def test_generation_config_with_nonsense(tmp_path: Path, key: str, value: Any) -> None:
    (write_tiny_checkpoint(tmp_path) / "generation_config.json").write_text(json.dumps({key: value}))
    assert_config_error(tmp_path, "generation_config.json", key)


# Prompts that the model cannot take


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load_model(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), context_tokens=30))


TINY = TinyCheckpoint()
IMAGE = torch.from_numpy(TINY.pixels())
PROMPT = torch.tensor([TINY.prompt([5, 6, 7], with_image=True)])
TEXT = torch.tensor([[1, 5, 6, 7]])


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        (PROMPT, IMAGE[0], r"images is \[3, 8, 8\], expected \[images, 3, 8, 8\]"),
        (PROMPT, IMAGE[:, :, :, :7], r"images is \[1, 3, 8, 7\]"),
        (PROMPT, IMAGE[:, :1], r"images is \[1, 1, 8, 8\]"),
        (TEXT, IMAGE, "must be 18 times the placeholder 0, found it 0 times"),
        (PROMPT[:, :18], IMAGE, "must be 18 times the placeholder 0, found it 17 times"),
        (PROMPT, IMAGE.repeat(2, 1, 1, 1), "2 images were given, but the rows hold the placeholders of 1: 18 times 0"),
        (
            torch.cat((PROMPT, PROMPT)),
            IMAGE,
            "1 images were given, but the rows hold the placeholders of 2: 18 times 0",
        ),
        (torch.tensor([[1, 48]]), None, r"input_ids holds 1..48, expected 0..47"),
        (torch.tensor([[1, -1]]), None, r"input_ids holds -1..1, expected 0..47"),
        (torch.ones(1, 31, dtype=torch.int64), None, "the prompt has 31 tokens, the context 30"),
        (torch.tensor([1, 5]), None, r"input_ids is \[2\], expected \[batch, seq\]"),
        (torch.zeros(1, 0, dtype=torch.int64), None, r"input_ids is \[1, 0\]"),
    ],
)
def test_prompt_errors_say_what_was_found(
    tiny_model: VisionLanguageModel, ids: Tensor, images: Tensor | None, message: str
) -> None:
    for call in (tiny_model, tiny_model.generate):
        with pytest.raises(PromptError, match=message):
            call(ids, images)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids", "attention_mask"])
def test_layout_of_another_shape_is_an_error(tiny_model: VisionLanguageModel, name: str) -> None:
    with pytest.raises(PromptError, match=rf"{name} is \[1, 3\], expected the shape of input_ids \[1, 4\]"):
        tiny_model(TEXT, **{name: torch.zeros(1, 3, dtype=torch.int64)})


def test_token_types_that_do_not_fit_the_images_are_an_error(tiny_model: VisionLanguageModel) -> None:
    with pytest.raises(PromptError, match="1 images give 18 rows, but 2 places have type 1"):
        tiny_model(TEXT, IMAGE, token_type_ids=torch.tensor([[0, 1, 1, 0]]))


def test_no_new_tokens_is_an_error(tiny_model: VisionLanguageModel) -> None:
    with pytest.raises(PromptError, match="max_new_tokens is 0"):
        tiny_model.generate(TEXT, max_new_tokens=0)


# What the tests above use


def assert_weights_error(folder: Path, *patterns: str) -> None:
    """One line that holds the patterns in this order."""
    with pytest.raises(WeightsError, match=".*".join(patterns)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def assert_config_error(folder: Path, *patterns: str) -> None:
    """One line that holds the patterns in this order."""
    with pytest.raises(ConfigError, match=".*".join(f"(?:{pattern})" for pattern in patterns)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def assert_same_weights(first: VisionLanguageModel, second: VisionLanguageModel) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert different == []


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """A tiny checkpoint in one file with its tensors changed."""
    file = write_tiny_checkpoint(folder) / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(folder / "config.json", edit)


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())
