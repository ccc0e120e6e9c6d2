"""Contract tests of the `trt` dialect: what TensorRT would silently misread is not there, nothing of one expert is in
the other's graph, codes are the ones that were chosen, and the gate finds what is specific to this dialect.

That its graphs equal PyTorch is tested beside the other dialect, in test_export_golden.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import tests.reference.int4 as reference
from tests.calibration_data import FAST, write_calibration_checkpoint, write_calibration_data
from tests.gptq_checkpoint import write_gptq_checkpoint
from tests.graph_edits import Edit, edit_nodes, flip_weight, graph_of, names_of, set_attribute
from tests.tiny_bundle import content_of, export, only_error_line, run_cli, write_text_checkpoint
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint, write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import ExportError, ParityError
from vlmdeploy.export.engines.parts import BASE_BYTES, cut, initializer_bytes, plan_parts
from vlmdeploy.export.graphs.ort_dialect import CONTRIB
from vlmdeploy.model.checkpoint import Checkpoint

GRAPHS = ["vision", "decoder_text", "decoder_vision"]
SIZES: dict[str, Any] = {
    "hidden": 128, "heads": 4, "mlp": 192, "vision_width": 64, "vision_mlp": 128, "layers": 3, "vocab": 300
}  # fmt: skip


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("trt") / "ckpt", "cogvlm2", **SIZES)


@pytest.fixture(scope="module")
def bundle(ckpt: Path) -> Path:
    """Shared: do not change it."""
    return export(ckpt, ckpt.parent / "bundle", "trt-int4")


def ops_of(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in model.graph.node}


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_has_standard_operators_of_opset_24_and_one_function(bundle: Path, graph: str) -> None:
    model = graph_of(bundle, graph)
    onnx.checker.check_model(str(bundle / f"{graph}.onnx"))
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 24, "trt": 1}
    assert {domain for domain, _ in ops_of(model)} <= {"", "trt"}
    assert CONTRIB not in {domain for domain, _ in ops_of(model)}
    assert [(function.domain, function.name) for function in model.functions] == [("trt", "TRT_Attention")]


def test_every_causal_attention_is_lower_right_with_lengths(bundle: Path) -> None:
    for graph in ("decoder_text", "decoder_vision"):
        nodes = [node for node in graph_of(bundle, graph).graph.node if "Attention" in node.op_type]
        assert len(nodes) == SIZES["layers"] - (graph == "decoder_vision")
        for node in nodes:
            assert (node.domain, node.op_type) == ("trt", "TRT_Attention")
            assert node.input[5] == "lengths"
            assert [(item.name, item.s) for item in node.attribute] == [("causal_kind", b"lower_right")]


def test_encoder_attends_without_a_mask(bundle: Path) -> None:
    nodes = [node for node in graph_of(bundle, "vision").graph.node if "Attention" in node.op_type]
    assert len(nodes) == 2
    assert all(len(node.input) == 3 for node in nodes)
    assert {tuple(item.name for item in node.attribute) for node in nodes} == {("scale",)}


def test_queries_are_scaled_before_an_attention_that_scales_nothing(bundle: Path) -> None:
    """TensorRT's layer multiplies q and k as they come; a scale left to the operator would be lost there."""
    model = graph_of(bundle, "decoder_text")
    body = model.functions[0].node
    scales = [item.f for node in body for item in node.attribute if item.name == "scale"]
    assert [node.op_type for node in body] == ["Attention"] and scales == [1.0]
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == "attention.scale")
    assert onnx.numpy_helper.to_array(stored) == np.float32((SIZES["hidden"] // SIZES["heads"]) ** -0.5)


def test_cache_is_fp16_of_the_whole_context(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    model = graph_of(bundle, "decoder_text")
    values = [
        value for value in (*model.graph.input, *model.graph.output) if value.name.startswith(("past", "present"))
    ]
    assert len(values) == 4 * SIZES["layers"]
    for value in values:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dims == [1, 2, manifest.context_tokens, manifest.cache.head_dim]
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert manifest.cache.dtype == "fp16"
    assert manifest.memory_bytes["kv_per_token"] == 2 * 2 * SIZES["layers"] * 2 * manifest.cache.head_dim


def test_no_expert_is_in_the_others_graph(bundle: Path) -> None:
    text, vision = names_of(bundle, "decoder_text"), names_of(bundle, "decoder_vision")
    assert "decoder.layers.0.language.qkv.weight" in text and "decoder.layers.0.vision.qkv.weight" in vision
    assert not [name for name in text if "vision" in name or name.startswith(("connector", "embedding"))]
    assert not [name for name in vision if "language" in name or name.startswith(("lm_head", "embedding"))]
    last = [name for name in vision if name.startswith("decoder.layers.2.vision") and "norm" not in name]
    assert {name.split(".")[4] for name in last} == {"qkv"}, "the last layer stops after keys and values"


def test_stored_codes_are_those_of_the_reference(ckpt: Path, bundle: Path) -> None:
    """Read by hand: signed nibbles, the lower one first, and fp16 scales."""
    name = "decoder.layers.1.language.down.weight"
    model = graph_of(bundle, "decoder_text")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    place = {entry.key: int(entry.value) for entry in tensors[name].external_data if entry.key != "location"}
    content = bundle.joinpath("decoder_text.data").read_bytes()[place["offset"] : place["offset"] + place["length"]]
    packed = np.frombuffer(content, np.uint8)
    signed = np.stack((packed & 15, packed >> 4), -1).astype(np.int8).reshape(*tensors[name].dims).T
    signed[signed > 7] -= 16
    group = read_manifest(bundle).group_sizes["decoder"]
    codes, scales = reference.quantize_rtn(Checkpoint(ckpt).parameter(name).numpy(), group)
    assert tensors[name].data_type == onnx.TensorProto.INT4
    assert (signed == codes.reshape(signed.shape).astype(int) - 8).all()
    stored = onnx.numpy_helper.to_array(tensors[f"{name}.scales"]).T
    assert stored.dtype == np.float16 and (stored == scales.reshape(stored.shape)).all()


def attributes_of(bundle: Path, graph: str, output: str) -> dict[str, Any]:
    node = next(node for node in graph_of(bundle, graph).graph.node if output in node.output)
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def test_int8_encoder_has_one_scale_for_each_output(ckpt: Path, tmp_path: Path) -> None:
    """TensorRT fuses int8 codes so, and not in groups; int4 it fuses in groups only."""
    bundle = export(ckpt, tmp_path / "bundle", "trt-int4", precisions={"vision": "int8"})
    assert attributes_of(bundle, "vision", "vision.layers.0.fc1.weight.fp16") == {"axis": 0, "block_size": 64}
    assert attributes_of(bundle, "decoder_text", "decoder.layers.0.language.down.weight.fp16")["block_size"] == 64
    assert read_manifest(bundle).group_sizes["vision"] == -1


@pytest.mark.parametrize("vision", ["fp32", "fp16", "int8", "int4"])
def test_encoder_of_every_precision_passes_the_gate(vision: str, ckpt: Path, tmp_path: Path) -> None:
    bundle = export(ckpt, tmp_path / "bundle", "trt-int4", precisions={"vision": vision, "connector": vision})
    verification = read_manifest(bundle).verification
    assert verification is not None and {stage.check for stage in verification.stages} == {"structure", "shipped"}


def test_group_of_the_whole_width_is_refused(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r'"decoder\.layers\.0.*one scale for all 128 inputs.*smaller --group'):
        export(ckpt, tmp_path / "bundle", "trt-int4", group=-1)
    assert list(tmp_path.iterdir()) == []


# Codes that were chosen before


def codes_of(bundle: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [out, in] and scales [out, groups] of a matrix of the text decoder."""
    tensors = {tensor.name: tensor for tensor in graph_of(bundle, "decoder_text").graph.initializer}
    stored = [onnx.numpy_helper.to_array(tensors[each], str(bundle)).T for each in (name, f"{name}.scales")]
    return stored[0].astype(np.int8), stored[1]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_of_a_gptq_checkpoint_are_shipped_as_they_are(bits: int, tmp_path: Path) -> None:
    """3-bit codes in 4-bit fields, 8-bit ones in groups: no second rounding."""
    ckpt = write_gptq_checkpoint(tmp_path / "ckpt", bits=bits, group_size=32 if bits != 3 else 16)
    bundle = export(ckpt, tmp_path / "bundle", "trt-int4")
    name = "decoder.layers.0.language.down.weight"
    stored = Checkpoint(ckpt).quantized_rows(name, 0, 64)
    codes, scales = codes_of(bundle, name)
    assert (codes == stored.codes.astype(int) - stored.grid.zero_point).all()
    assert (scales == stored.scales).all()
    assert read_manifest(bundle).precision["decoder"] == f"int{bits}"


def test_asymmetric_codes_are_refused(tmp_path: Path) -> None:
    ckpt = write_gptq_checkpoint(tmp_path / "ckpt", config={"sym": False})
    options = ("--ckpt", ckpt, "--target", "rtx-int4", "--out", tmp_path / "bundle", "--threads", 1)
    line = only_error_line(run_cli("export", *options))
    assert "has asymmetric codes and TensorRT takes symmetric ones only" in line
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize(("vision", "shipped"), [("int4", "int4"), ("int8", "fp16")])
def test_encoder_is_int4_where_the_checkpoint_was_quantized_so(vision: str, shipped: str, tmp_path: Path) -> None:
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", vision_layers=1)
    data = write_calibration_data(tmp_path / "data", num_pictures=9, num_texts=3)
    chosen = ("--vision", vision, "--connector", vision, "--positive-scales")
    result = run_cli("quantize", "--ckpt", ckpt, "--calib", data, "--out", tmp_path / "quantized", *FAST, *chosen)
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(export(tmp_path / "quantized", tmp_path / "bundle", "trt-int4"))
    assert (manifest.precision["vision"], manifest.precision["connector"]) == (shipped, shipped)
    assert (manifest.precision["decoder"], manifest.precision["lm_head"]) == ("int4", "fp16")
    assert manifest.made_by.quantization == "gptq"


def test_negative_scales_are_not_given_to_tensorrt(tmp_path: Path) -> None:
    """Its documentation says that they must be positive, and nobody knows what its kernels do."""
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", vision_layers=1)
    data = write_calibration_data(tmp_path / "data", num_pictures=9, num_texts=3)
    result = run_cli("quantize", "--ckpt", ckpt, "--calib", data, "--out", tmp_path / "quantized", *FAST)
    assert result.exit_code == 0, result.stderr
    options = ("--ckpt", tmp_path / "quantized", "--target", "rtx-int4", "--out", tmp_path / "bundle", "--threads", 1)
    line = only_error_line(run_cli("export", *options))
    assert "qkv.weight: has negative scales" in line and "--positive-scales" in line
    assert not (tmp_path / "bundle").exists()


def test_calibrated_export_quantizes_what_the_target_holds(tmp_path: Path) -> None:
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", vision_layers=1)
    data = write_calibration_data(tmp_path / "data", num_pictures=9, num_texts=3)
    options = ("--ckpt", ckpt, "--target", "trt-int4", "--calib", data, "--out", tmp_path / "bundle", "--threads", 1)
    result = run_cli("export", *options, "--tokens", 20)
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(tmp_path / "bundle")
    assert (manifest.precision["vision"], manifest.precision["decoder"]) == ("fp16", "int4")
    assert manifest.made_by.quantization == "gptq"


# The gate


def drop_scale(node: onnx.NodeProto) -> None:
    """Scale keys of the wrong head width."""
    if node.output[0].endswith(".q.scaled"):
        node.op_type, node.input[1] = "Identity", ""
        del node.input[1:]


def swap_inputs(node: onnx.NodeProto) -> None:
    node.input[1], node.input[2] = node.input[2], node.input[1]


def append_to_the_keys(node: onnx.NodeProto) -> None:
    node.input[0] = node.input[0].replace("past_value", "past_key")


def attend_to_the_filled_part_only(node: onnx.NodeProto) -> None:
    """Rows of this call would not see themselves."""
    node.input[5] = "write_index"


SABOTAGES: dict[str, tuple[Edit, str]] = {
    "queries_not_scaled": (edit_nodes("decoder_text", "Mul", drop_scale), "decoder.layer.0"),
    "keys_and_values_swapped": (edit_nodes("decoder_text", "TRT_Attention", swap_inputs), "decoder.layer.0"),
    "values_appended_to_the_keys": (
        edit_nodes("decoder_text", "TensorScatter", append_to_the_keys), "decoder.value.0",
    ),
    "lengths_before_the_call": (
        edit_nodes("decoder_vision", "TRT_Attention", attend_to_the_filled_part_only), "decoder.layer.0",
    ),
    "rotary_interleaved": (
        edit_nodes("decoder_text", "RotaryEmbedding", lambda node: node.attribute.append(
            onnx.helper.make_attribute("interleaved", 1))), "decoder.key.0",
    ),
    "norm_eps": (edit_nodes("decoder_text", "RMSNormalization", set_attribute("epsilon", 1e-2)), "decoder."),
    "silu_of_another_slope": (edit_nodes("decoder_text", "Swish", set_attribute("alpha", 1.702)), "decoder.layer.0"),
    "flipped_code": (flip_weight("decoder_text", "decoder.layers.1.language.down.weight"), "decoder.layer.1"),
    "flipped_half": (flip_weight("vision", "vision.layers.1.fc1.weight"), "vision.layer.1"),
}  # fmt: skip


@pytest.mark.usefixtures("as_large_model")
@pytest.mark.parametrize(("edit", "stage"), SABOTAGES.values(), ids=SABOTAGES.keys())
def test_gate_names_the_first_stage_that_differs(
    edit: Edit, stage: str, ckpt: Path, tmp_path: Path, sabotage: Callable[[Edit], None]
) -> None:
    sabotage(edit)
    with pytest.raises(ParityError, match=rf": {stage}"):
        export(ckpt, tmp_path / "bundle", "trt-int4")
    assert list(tmp_path.iterdir()) == []


def test_fp16_overflow_names_the_layer_and_offers_fp32(tmp_path: Path) -> None:
    """Activations that fit bf16 and not fp16, as seen in CogVLM's encoder; the same encoder in fp32 passes."""
    tiny = TinyCheckpoint("cogvlm", **SIZES)
    tensors = tiny.tensors()
    name = next(name for name in tensors if "vision" in name and name.endswith("layers.1.mlp.fc1.weight"))
    tensors[name] = tensors[name] * 1e6
    ckpt = write_checkpoint(tmp_path / "ckpt", tiny.config(), tensors)
    with pytest.raises((ParityError, ExportError), match=r"vision\.layer.*--vision fp32"):
        export(ckpt, tmp_path / "bundle", "trt-int4")
    export(ckpt, tmp_path / "bundle", "trt-int4", precisions={"vision": "fp32"})


# Engines


def test_cut_decoder_gives_what_the_whole_one_gives(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer alone, one after the other: the same nodes and weights, each once."""
    monkeypatch.chdir(bundle)  # the checker looks for the weights here
    for graph in ("decoder_text", "decoder_vision"):
        model = graph_of(bundle, graph)
        parts = [cut(model, (index, index + 1), 3) for index in range(3)]
        nodes = [node.output[-1] for part in parts for node in part.graph.node]
        assert sorted(nodes) == sorted({node.output[-1] for node in model.graph.node} | set(nodes))
        assert {name for part in parts for name in initializer_bytes(part)} == set(initializer_bytes(model))
        matrices = [name for part in parts for name in initializer_bytes(part) if name.endswith(".weight")]
        assert len(matrices) == len(set(matrices))
        for part, rows in zip(parts, ("hidden", "layer.0.out", "layer.1.out"), strict=True):
            onnx.checker.check_model(part)
            assert next(value.name for value in part.graph.input) == rows


def test_decoder_is_cut_as_little_as_memory_demands(bundle: Path) -> None:
    graphs = read_manifest(bundle).graphs
    whole = plan_parts(bundle, graphs, 3, 1 << 40)
    assert [part.name for part in whole] == ["vision", "decoder_text", "decoder_vision"]
    largest = max(part.weight_bytes for part in whole if part.graph == "decoder_text")
    short = plan_parts(bundle, {"decoder_text": graphs["decoder_text"]}, 3, BASE_BYTES + int(2.9 * largest))
    assert [(part.name, part.layers) for part in short] == [("decoder_text.0", (0, 1)), ("decoder_text.1", (1, 3))]


def test_build_that_cannot_fit_is_refused_with_advice(bundle: Path) -> None:
    graphs = read_manifest(bundle).graphs
    with pytest.raises(
        ExportError,
        match=r"vision\.onnx: building its engine takes about .* allow more with --max-memory",
    ):
        plan_parts(bundle, graphs, 3, 1 << 20)


def test_build_of_another_target_says_that_none_is_needed(tmp_path: Path) -> None:
    other = export(write_text_checkpoint(tmp_path / "ckpt"), tmp_path / "bundle")
    before = content_of(other)
    assert "needs no engines" in only_error_line(run_cli("build", other))
    assert content_of(other) == before


def test_build_without_tensorrt_says_how_to_get_it(bundle: Path) -> None:
    """TensorRT for Jetson and datacenter GPUs cannot be installed where the tests run."""
    assert "tensorrt cannot be imported" in only_error_line(run_cli("build", bundle))
    assert "JetPack 7.2.2" in only_error_line(run_cli("build", bundle))


@pytest.mark.parametrize("target", ["trt-int4", "ort-int4"])
def test_gpu_that_cannot_be_chosen_is_told(target: str, ckpt: Path, tmp_path: Path) -> None:
    options = ("--ckpt", ckpt, "--target", target, "--quant", "rtn", "--out", tmp_path / "bundle", "--sm", "8.7")
    assert "--sm is for targets of TensorRT-RTX" in only_error_line(run_cli("export", *options))
    assert list(tmp_path.iterdir()) == []


def test_cache_of_another_precision_is_refused(ckpt: Path, tmp_path: Path) -> None:
    options = ("--ckpt", ckpt, "--target", "trt-int4", "--quant", "rtn", "--out", tmp_path / "bundle", "--kv", "fp32")
    assert "--kv is fp32, but the cache of trt-int4" in only_error_line(run_cli("export", *options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("device", "target", "message"), [
    ("rtx-4080", "trt-int4", "--device rtx-4080 runs engines of tensorrt_rtx: export with --target rtx-int4"),
    ("agx-orin-64", "rtx-int4", "--device agx-orin-64 runs engines of tensorrt: export with --target trt-int4"),
    ("l4", "ort-int4", "--device l4 runs engines of tensorrt: export with --target trt-int4"),
    ("rtx-9090", "trt-int4", "rtx-4080"),
])  # fmt: skip
def test_device_of_another_target_is_refused(
    ckpt: Path, tmp_path: Path, device: str, target: str, message: str
) -> None:
    options = ("--ckpt", ckpt, "--target", target, "--quant", "rtn", "--out", tmp_path / "bundle", "--device", device)
    assert message in only_error_line(run_cli("export", *options))
    assert list(tmp_path.iterdir()) == []


def test_device_that_is_too_small_shows_the_plan(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmdeploy.runtime.backends.trt.RESERVE_BYTES", 6 << 30)
    options = ("--ckpt", ckpt, "--target", "trt-int4", "--quant", "rtn", "--out", tmp_path / "bundle")
    line = only_error_line(run_cli("export", *options, "--device", "orin-nano-8", "--threads", 1))
    assert "--device orin-nano-8 has" in line and "--residency phase needs 6." in line and "decoder_text" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    ["--sm", "sm_86"], ["--max-memory", "lots"], ["--sm", "8.6", "--device", "rtx-4080"],
])  # fmt: skip
def test_senseless_build_option_is_one_line(options: list[str], bundle: Path) -> None:
    assert options[0] in only_error_line(run_cli("build", bundle, *options))
