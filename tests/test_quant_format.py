"""GPTQ files. Golden: folders that GPTQModel 7.7.0 wrote (tests/golden/gptqmodel-tiny) and what it reads from them.
Reference: tests/reference/gptq_format.py. Agreement: what we write is what we read. Contract: variants and refusals."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from tests.gptq_checkpoint import quantized_matrix
from tests.reference import gptq_format as reference
from vlmdeploy.errors import ConfigError, QuantizationError, WeightsError
from vlmdeploy.model.shards import Shards
from vlmdeploy.model.stored_codes import StoredCodes
from vlmdeploy.quant.gptq_config import (
    CheckpointFormat,
    GptqConfig,
    ModuleGrid,
    Override,
    config_json,
    dynamic_overrides,
    grid_of,
    read_config,
)
from vlmdeploy.quant.gptq_format import StoredLinear, decode_linear, encode_linear
from vlmdeploy.quant.grid import Grid, Quantized, dequantize
from vlmdeploy.spec.weight_rules import Source

GOLDEN = Path(__file__).parent / "golden" / "gptqmodel-tiny"
CASES = ["symmetric", "asymmetric", "asymmetric-v2", "act-order"]
FORMATS: list[CheckpointFormat] = ["gptq", "gptq_v2"]

Tensors = dict[str, NDArray[Any]]

every_case = pytest.mark.parametrize("case", CASES)
both_formats = pytest.mark.parametrize("checkpoint_format", FORMATS)


def half_weights(linear: StoredLinear) -> NDArray[np.float16]:
    """The weight as GPTQModel's kernel computes it: every step in fp16."""
    steps = linear.codes.astype(np.float16) - linear.zeros.astype(np.float16)[:, linear.g_idx]
    half: NDArray[np.float16] = linear.scales.astype(np.float16)[:, linear.g_idx] * steps
    return half


def assert_same(linear: StoredLinear, quantized: Quantized) -> None:
    assert (linear.codes == quantized.codes).all()
    assert (linear.scales == quantized.scales).all()
    assert (linear.zeros == (quantized.grid.zero_point if quantized.zeros is None else quantized.zeros)).all()
    assert (linear.dequantize() == dequantize(quantized)).all()


# Golden: GPTQModel's own files.


def linears_of(case: str) -> dict[str, StoredLinear]:
    """Every quantized linear of a golden folder by its name, such as "model.layers.0.mlp.down_proj"."""
    expected, codes = np.load(GOLDEN / case / "expected.npz"), stored_codes(case)
    assert codes.modules == {key.removesuffix(".codes") for key in expected if key.endswith(".codes")}
    shapes = {name: expected[f"{name}.codes"].shape for name in codes.modules}
    return {name: codes.linear(Source(f"{name}.weight", shape), 0, shape[0]) for name, shape in shapes.items()}


def stored_codes(case: str) -> StoredCodes:
    return StoredCodes(Shards(GOLDEN / case))


@every_case
def test_gptqmodel_folder_is_read_as_gptqmodel_reads_it(case: str) -> None:
    expected = np.load(GOLDEN / case / "expected.npz")
    for name, linear in linears_of(case).items():
        assert (linear.codes == expected[f"{name}.codes"]).all(), name
        assert (linear.zeros == expected[f"{name}.zeros"]).all(), name
        if f"{name}.weight" in expected:
            assert (half_weights(linear) == expected[f"{name}.weight"]).all(), name


@every_case
def test_bit_loop_agrees_with_gptqmodel_and_with_us(case: str) -> None:
    config, tensors = stored_codes(case).config, load_bf16_free(GOLDEN / case)
    assert config is not None
    name = "model.layers.0.mlp.gate_proj"
    linear = linears_of(case)[name]
    parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    codes, zeros, weights = reference.decode(parts, linear.bits, config.checkpoint_format == "gptq")
    assert (linear.codes == codes).all()
    assert (linear.zeros == zeros).all()
    assert (half_weights(linear) == weights).all()


def load_bf16_free(folder: Path) -> Tensors:
    """The tensors numpy knows; embeddings and norms of the fixture are bf16."""

    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        names = [name for name in file.keys() if file.get_slice(name).get_dtype() != "BF16"]  # noqa: SIM118  # no dict
        return {name: file.get_tensor(name) for name in names}


def test_gptqmodel_precisions_come_from_its_patterns() -> None:
    sizes = {name: (linear.bits, linear.group_size) for name, linear in linears_of("symmetric").items()}
    assert "model.layers.0.self_attn.o_proj" not in sizes
    assert sizes["model.layers.1.self_attn.o_proj"] == (4, 32)
    assert sizes["model.layers.0.mlp.gate_proj"] == (3, 32)
    assert sizes["model.layers.0.mlp.down_proj"] == (4, 16)
    assert sizes["model.layers.1.mlp.down_proj"] == (8, 16)
    assert sizes["model.layers.0.self_attn.k_proj"] == (4, 64)


def test_gptqmodel_codes_are_written_back_byte_for_byte() -> None:
    tensors = load_bf16_free(GOLDEN / "symmetric")
    for name, linear in linears_of("symmetric").items():
        for part, values in encode_linear(linear.quantized(), name).items():
            stored = tensors[f"{name}.{part}"]
            assert stored.dtype == values.dtype
            assert (stored == values).all(), f"{name}.{part}"


def test_zero_point_0_of_a_v1_file_is_read_with_its_borrow() -> None:
    zeros = linears_of("asymmetric")["model.layers.0.self_attn.q_proj"].zeros
    assert (zeros[::2] == 0).all()  # the fixture's rows of positive weights
    assert (zeros[1::2] > 0).all()


def test_act_order_groups_dequantize_but_cannot_be_exported() -> None:
    linear = linears_of("act-order")["model.layers.0.mlp.up_proj"]
    assert (np.diff(linear.g_idx) < 0).any()
    values = linear.scales[:, linear.g_idx] * (linear.codes.astype(np.float32) - linear.zeros[:, linear.g_idx])
    assert (linear.dequantize() == values).all()
    with pytest.raises(QuantizationError, match="dynamic groups"):
        linear.quantized()


# Agreement: written and read again.


@both_formats
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_linear_comes_back(bits: int, group_size: int, symmetric: bool, checkpoint_format: CheckpointFormat) -> None:
    quantized = quantized_matrix(Grid(bits, group_size, symmetric))
    tensors = encode_linear(quantized, "linear", checkpoint_format)
    assert {name: (value.dtype.name, value.shape) for name, value in tensors.items()} == {
        "qweight": ("int32", (128 * bits // 32, 64)),
        "qzeros": ("int32", (128 // group_size, 64 * bits // 32)),
        "scales": ("float16", (128 // group_size, 64)),
        "g_idx": ("int32", (128,)),
    }
    linear = decode_linear(tensors, quantized.grid, checkpoint_format, "linear")
    assert_same(linear, quantized)
    back = linear.quantized()
    assert back.grid == quantized.grid
    assert (back.zeros is None) == symmetric


@both_formats
@pytest.mark.parametrize("bits", [3, 4])
def test_written_linear_equals_the_bit_loop(bits: int, checkpoint_format: CheckpointFormat) -> None:
    quantized = quantized_matrix(Grid(bits, 32, symmetric=False), num_out=32)
    tensors = encode_linear(quantized, "linear", checkpoint_format)
    codes, zeros, _ = reference.decode(tensors, bits, checkpoint_format == "gptq")
    assert (codes == quantized.codes).all()
    assert (zeros == quantized.zeros).all()


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [(4, 0x77777777, 0x88888888), (3, 0xDB6DB6DB, 0x24924924), (8, 0x7F7F7F7F, 0x80808080)],
)
def test_symmetric_zero_points_are_the_words_seen_in_files(bits: int, v1: int, v2: int) -> None:
    quantized = quantized_matrix(Grid(bits, 32))
    for checkpoint_format, word in zip(FORMATS, (v1, v2), strict=True):
        words = encode_linear(quantized, "linear", checkpoint_format)["qzeros"]
        assert (words.view(np.uint32)[:, 0] == word).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_some_rows_equal_those_of_the_whole(bits: int) -> None:
    quantized = quantized_matrix(Grid(bits, 32, symmetric=False))
    tensors = encode_linear(quantized)
    some = decode_linear(tensors, quantized.grid, "gptq", "linear", slice(5, 40))
    assert_same(some, Quantized(quantized.codes[5:40], quantized.scales[5:40], quantized.grid, quantized.zeros[5:40]))  # type: ignore[index]


# Contract: what other libraries wrote.


def test_g_idx_and_symmetric_zero_points_may_be_absent_or_empty() -> None:
    quantized = quantized_matrix(Grid(4, 32))
    tensors = encode_linear(quantized)
    empty = {"qzeros": np.zeros((0, 0), np.int32), "g_idx": np.zeros(0, np.int32)}
    assert_same(decode_linear(tensors | empty, quantized.grid, "gptq", "linear"), quantized)
    absent = {part: tensors[part] for part in ("qweight", "scales")}
    assert_same(decode_linear(absent, quantized.grid, "gptq", "linear"), quantized)
    with pytest.raises(WeightsError, match=r"linear\.qzeros: missing or empty, but the config says sym = false"):
        decode_linear(absent, Grid(4, 32, symmetric=False), "gptq", "linear")


@pytest.mark.parametrize("scales_dtype", [np.float32, np.float64])
def test_scales_may_be_wider_than_fp16(scales_dtype: Any) -> None:
    quantized = quantized_matrix(Grid(4, 32))
    tensors = encode_linear(quantized)
    tensors["scales"] = tensors["scales"].astype(scales_dtype)
    linear = decode_linear(tensors, quantized.grid, "gptq", "linear")
    assert_same(linear, quantized)
    assert linear.quantized().scales.dtype == np.float32


def test_scales_that_fp16_cannot_hold_dequantize_but_cannot_be_exported() -> None:
    tensors = encode_linear(quantized_matrix(Grid(4, 32)))
    tensors["scales"] = tensors["scales"].astype(np.float32) * np.float32(1 + 2**-20)
    linear = decode_linear(tensors, Grid(4, 32), "gptq", "linear")
    assert np.isfinite(linear.dequantize()).all()
    with pytest.raises(QuantizationError, match="not fp16 values"):
        linear.quantized()


@pytest.mark.parametrize(("num_in", "num_out", "group_size"), [(200, 96, 128), (252, 100, 128), (252, 100, 32)])
def test_last_word_and_last_group_may_be_partly_filled(num_in: int, num_out: int, group_size: int) -> None:
    random = np.random.default_rng(num_in)
    codes = random.integers(0, 16, (num_out, num_in)).astype(np.uint8)
    groups = -(-num_in // group_size)
    scales = random.uniform(0.01, 0.1, (groups, num_out)).astype(np.float16)
    tensors = {
        "qweight": np.stack([reference.pack(row, 4) for row in codes], 1),
        "qzeros": np.stack([reference.pack(np.full(num_out, 7), 4)] * groups),
        "scales": scales,
        "g_idx": (np.arange(num_in) // group_size).astype(np.int32),
    }
    linear = decode_linear(tensors, Grid(4, group_size), "gptq", "linear")
    expected = (codes.astype(np.float32) - 8) * scales.astype(np.float32)[tensors["g_idx"]].T
    assert (linear.dequantize() == expected).all()
    with pytest.raises(QuantizationError, match=f"group size {group_size} does not divide the input width {num_in}"):
        linear.quantized()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", np.zeros((15, 64), np.int32), r"linear\.qweight: \[15, 64\], expected \[16, 64\]"),
        ("qweight", np.zeros((16, 64), np.int64), r"linear\.qweight: int64 \[16, 64\], expected an int32 matrix"),
        ("scales", np.ones((8, 64), np.float16), r"linear\.scales: \[8, 64\], expected \[4, 64\]: do bits and group"),
        ("scales", np.ones((4, 64), np.int32), r"linear\.scales: int32 \[4, 64\], expected a matrix of floats"),
        ("scales", np.full((4, 64), np.nan, np.float16), r"linear\.scales: values that are not finite"),
        ("scales", np.full((4, 64), 1e300), r"linear\.scales: values up to 1e\+300, expected weights that float32"),
        ("scales", np.full((4, 64), -3e38, np.float32), r"linear\.scales: values up to 3e\+38"),
        ("qzeros", np.zeros((4, 9), np.int32), r"linear\.qzeros: \[4, 9\], expected \[4, 8\]"),
        ("g_idx", np.full(128, 4, np.int32), r"linear\.g_idx: .* with values 4 to 4, expected one group of 0 to 3"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_named(part: str, value: NDArray[Any], message: str) -> None:
    tensors = encode_linear(quantized_matrix(Grid(4, 32))) | {part: value}
    with pytest.raises(WeightsError, match=message):
        decode_linear(tensors, Grid(4, 32), "gptq", "linear")


@pytest.mark.parametrize("left", [{}, {"g_idx": np.zeros(0, np.int32)}], ids=["missing", "empty"])
def test_act_order_needs_the_group_of_each_input(left: Tensors) -> None:
    """Such codes were decoded as if neighbours shared a group: wrong weights, silently."""
    quantized = quantized_matrix(Grid(4, 32))
    tensors = {part: values for part, values in encode_linear(quantized).items() if part != "g_idx"} | left
    with pytest.raises(WeightsError, match=r"a\.b\.g_idx: missing or empty, but the config says desc_act = true"):
        decode_linear(tensors, Grid(4, 32), "gptq", "a.b", desc_act=True)
    whole = quantized_matrix(Grid(4, 128))
    tensors = {part: values for part, values in encode_linear(whole).items() if part != "g_idx"} | left
    assert_same(decode_linear(tensors, Grid(4, 128), "gptq", "a.b", desc_act=True), whole)


def test_missing_scales_are_named() -> None:
    tensors = encode_linear(quantized_matrix(Grid(4, 32)))
    del tensors["scales"]
    with pytest.raises(WeightsError, match=r"linear\.scales: missing"):
        decode_linear(tensors, Grid(4, 32), "gptq", "linear")


# Contract: what we refuse to write.


@pytest.mark.parametrize(
    ("bits", "num_out", "num_in", "message"),
    [
        (4, 100, 128, "100 codes of 4 bits along the output do not fill 32-bit words"),
        (3, 48, 128, "48 codes of 3 bits along the output do not fill"),
        (4, 64, 36, "36 codes of 4 bits along the input do not fill"),
        (5, 64, 128, "5 bits; GPTQ files hold 2, 3, 4, 8"),
    ],
)
def test_sizes_that_other_readers_refuse_are_not_written(bits: int, num_out: int, num_in: int, message: str) -> None:
    quantized = quantized_matrix(Grid(bits, 4), num_out, num_in)
    with pytest.raises(QuantizationError, match=rf"a\.b: {message}"):
        encode_linear(quantized, "a.b")


def test_partly_filled_groups_are_not_written() -> None:
    quantized = replace(quantized_matrix(Grid(4, 32)), grid=Grid(4, 48))
    with pytest.raises(QuantizationError, match=r"a\.b: group size 48 does not divide the input width 128"):
        encode_linear(quantized, "a.b")


def test_zero_point_0_is_written_to_v2_only() -> None:
    quantized = quantized_matrix(Grid(4, 32, symmetric=False))
    assert quantized.zeros is not None
    quantized.zeros[7, 2] = 0
    with pytest.raises(QuantizationError, match=r"a\.b: zero point 0 cannot be stored in format gptq; write gptq_v2"):
        encode_linear(quantized, "a.b")
    tensors = encode_linear(quantized, "a.b", "gptq_v2")
    assert_same(decode_linear(tensors, quantized.grid, "gptq_v2", "a.b"), quantized)


def test_scales_beyond_fp16_are_not_written() -> None:
    quantized = quantized_matrix(Grid(4, 32))
    with pytest.raises(QuantizationError, match=r"a\.b: the scales are not fp16 values"):
        encode_linear(replace(quantized, scales=quantized.scales * np.float32(1e7)), "a.b")


# Contract: configs.

CONFIG: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def write_configs(folder: Path, own: Mapping[str, Any] | None, nested: Mapping[str, Any] | None) -> Path:
    if own is not None:
        (folder / "quantize_config.json").write_text(json.dumps(own))
    if nested is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": nested}))
    return folder


def test_folder_without_quantization_has_no_config(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None
    assert read_config(write_configs(tmp_path, None, None)) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_config(tmp_path) is None


def test_config_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json: holds a list of 0, expected an object"):
        read_config(tmp_path)
    for content in ("{", "[" * 20000):
        (tmp_path / "quantize_config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"quantize_config\.json: not JSON"):
            read_config(tmp_path)


def test_written_config_is_read_back_from_either_file(tmp_path: Path) -> None:
    dynamic = ((r"^a\.b$", None), (r"^c\.\d+$", Override(bits=3, group_size=-1, symmetric=False)))
    config = GptqConfig(4, 128, True, "gptq_v2", True, dynamic, True)
    written = config_json(replace(config, provenance={"damp_percent": 0.01}))
    assert written["damp_percent"] == 0.01
    for name, (own, nested) in {"own": (written, None), "nested": (None, written), "both": (written, written)}.items():
        (tmp_path / name).mkdir()
        assert read_config(write_configs(tmp_path / name, own, nested)) == config


def test_written_keys_are_the_ones_readers_know() -> None:
    assert config_json(GptqConfig(4, 128)) == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="provenance may not set bits"):
        config_json(GptqConfig(4, 128, provenance={"bits": 3}))


@pytest.mark.parametrize(
    "raw",
    [
        {"bits": 4, "group_size": 32, "sym": True},  # AutoGPTQ
        {"w_bit": 4, "q_group_size": 32},
        {"wbits": 4, "group_size": 32, "version": "GPTQ", "dynamic": None},
        {**CONFIG, "method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "meta": {"uri": "x"}},
    ],
)
def test_names_of_old_files_are_known(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert read_config(write_configs(tmp_path, raw, None)) == GptqConfig(4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quantized with 'awq'; only GPTQ"),
        ({"quant_method": "bitsandbytes"}, "quantized with 'bitsandbytes'"),
        ({"is_marlin_format": True}, "Marlin's kernel layout"),
        ({"checkpoint_format": "marlin"}, "Marlin's kernel layout"),
        ({"format": "gptq_p"}, "planar layout gptq_p; expected gptq or gptq_v2"),
        ({"checkpoint_format": "exl2"}, "unknown checkpoint_format 'exl2'"),
        ({"version": "GEMM"}, "unknown checkpoint_format 'gemm'"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'; only int32"),
        ({"bits": 6}, "6 bits exist only in GPTQModel's planar layout"),
        ({"bits": 1}, "bits is 1; expected 2, 3, 4, 8"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 0}, "group_size is 0; expected a positive number or -1"),
        ({"group_size": 10**400}, "group_size is 10+; expected a positive number or -1"),
        ({"sym": "yes"}, "sym is 'yes'; expected true or false"),
        ({"format": "gptq", "checkpoint_format": "gptq_v2"}, "checkpoint_format and format contradict each other"),
        ({"dynamic": {"(": {}}}, r"dynamic: \(: not a regular expression"),
        (
            {"dynamic": {"a{99999999999}": {}}},
            r"dynamic: a\{9+\}: not a regular expression that is read, from '\{9+\}' on",
        ),
        ({"dynamic": {"(" * 3000 + ")" * 3000: {}}}, r"dynamic: \({80}: not a regular expression"),
        ({"dynamic": {"a": 3}}, "dynamic: a: expected a JSON object, found 3"),
        ({"dynamic": {"a": {"bits": 5}}}, "dynamic: a: 5 bits exist only"),
        ({"dynamic": []}, "dynamic: expected a JSON object, found"),
    ],
)
def test_other_methods_and_layouts_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: quantization_config.*{message}"):
        read_config(write_configs(tmp_path, None, {**CONFIG, **change}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 8), ("group_size", 128), ("sym", False), ("checkpoint_format", "gptq_v2"), ("lm_head", True),
        ("dynamic", {}), ("dynamic", {"a": {"bits": 8}}),
    ],
)  # fmt: skip
def test_two_configs_that_disagree_are_an_error(tmp_path: Path, key: str, value: Any) -> None:
    own = {**CONFIG, "checkpoint_format": "gptq", "dynamic": {"a": {"bits": 3}}, "lm_head": False}
    for first, second in ((own, {**own, key: value}), ({**own, key: value}, own)):
        found = (re.escape(repr(raw[key])) for raw in (first, second))
        message = r"quantize_config\.json has {} {}, but .*config\.json: quantization_config has {}"
        with pytest.raises(ConfigError, match=message.format(key, *found)):
            read_config(write_configs(tmp_path, first, second))


def test_key_that_only_one_config_has_counts(tmp_path: Path) -> None:
    config = read_config(write_configs(tmp_path, CONFIG, {**CONFIG, "format": "gptq_v2", "lm_head": True}))
    assert config is not None
    assert (config.checkpoint_format, config.lm_head) == ("gptq_v2", True)


def test_patterns_that_only_one_config_has_count(tmp_path: Path) -> None:
    config = read_config(write_configs(tmp_path, {**CONFIG, "dynamic": None}, {**CONFIG, "dynamic": {"-:a": {}}}))
    assert config is not None and config.dynamic == (("a", None),)


# Contract: overrides for single modules.


def test_patterns_match_from_the_start_and_the_first_one_decides() -> None:
    dynamic = (
        (r"model\.layers\.1\.", Override(bits=8)),
        (r"model\.layers", Override(bits=3)),
        ("mlp", Override(bits=2)),
    )
    config = GptqConfig(4, 32, dynamic=dynamic)
    assert grid_of(config, "model.layers.1.mlp.up_proj", 64) == Grid(8, 32)
    assert grid_of(config, "model.layers.11.mlp.up_proj", 64) == Grid(3, 32)
    assert grid_of(config, "encoder.mlp", 64) == Grid(4, 32)  # "mlp" is not at the start


def test_patterns_that_keep_modules_in_float_come_first(tmp_path: Path) -> None:
    raw = {**CONFIG, "dynamic": {"+:a": {"bits": 8, "sym": False, "group_size": -1, "mse": 2.4}, "-:a\\.b": {}}}
    config = read_config(write_configs(tmp_path, raw, None))
    assert config is not None
    assert grid_of(config, "a.b", 64) is None
    assert grid_of(config, "a.c", 64) == Grid(8, 64, symmetric=False)


def test_output_head_is_quantized_only_with_its_flag() -> None:
    assert grid_of(GptqConfig(4, 32), "lm_head", 64) is None
    assert grid_of(GptqConfig(4, 32, lm_head=True), "lm_head", 64) == Grid(4, 32)


def layer(number: int, kind: str, grid: Grid | None, in_width: int = 64) -> ModuleGrid:
    return ModuleGrid(f"model.layers.{number}.{kind}", in_width, grid)


def assert_reads_back(modules: list[ModuleGrid], config: GptqConfig) -> None:
    for module in modules:
        assert grid_of(config, module.name, module.in_width) == module.grid, module.name


def test_kinds_that_differ_become_one_pattern_each() -> None:
    modules = [layer(i, "attn.qkv", Grid(4, 32)) for i in range(12)]
    modules += [layer(i, "mlp.vision_mlp.down_proj", Grid(8, 32)) for i in range(12)]
    modules += [layer(i, "mlp.up", Grid(3, 16) if i in (0, 3, 11) else Grid(4, 32)) for i in range(12)]
    modules += [ModuleGrid("vision.linear_proj", 64, None), ModuleGrid("lm_head", 64, Grid(8, 32))]
    config = dynamic_overrides(modules, {"damp_percent": 0.01})
    assert (config.bits, config.group_size, config.symmetric, config.lm_head) == (4, 32, True, True)
    assert config.dynamic == (
        (r"^vision\.linear_proj$", None),
        (r"^model\.layers\.\d+\.mlp\.vision_mlp\.down_proj$", Override(bits=8)),
        (r"^model\.layers\.(?:0|3|11)\.mlp\.up$", Override(bits=3, group_size=16)),
        (r"^lm_head$", Override(bits=8)),
    )
    assert config_json(config)["damp_percent"] == 0.01
    assert_reads_back(modules, config)


def test_head_in_float_needs_no_pattern() -> None:
    modules = [layer(0, "up", Grid(4, 32)), ModuleGrid("lm_head", 64, None)]
    assert dynamic_overrides(modules) == GptqConfig(4, 32)


def test_whole_width_is_minus_one_where_widths_differ() -> None:
    modules = [layer(i, "up", Grid(4, 64)) for i in range(3)] + [layer(0, "down", Grid(4, 256), in_width=256)]
    config = dynamic_overrides(modules)
    assert (config.group_size, config.dynamic) == (-1, ())
    assert_reads_back(modules, config)


@pytest.mark.parametrize("seed", range(20))
def test_any_choice_of_grids_reads_back_through_json(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    choices = [Grid(4, 32), Grid(4, 32), Grid(3, 32), Grid(8, 64), Grid(4, 32, symmetric=False), None]
    kinds = ["attn.language_expert_dense", "mlp.vision_mlp.up_proj", "mlp.up"]
    drawn = [choices[number] for number in random.integers(0, len(choices), (12 * len(kinds)))]
    modules = [layer(place // 3, kinds[place % 3], grid) for place, grid in enumerate(drawn)]
    modules.append(ModuleGrid("vision.transformer.layers.3.fc1", 64, choices[seed % len(choices)]))
    config = dynamic_overrides(modules)
    back = read_config(write_configs(tmp_path, config_json(config), None))
    assert back == config
    assert_reads_back(modules, back)


def test_config_without_a_quantized_linear_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="no linear is quantized"):
        dynamic_overrides([layer(0, "up", None)])
