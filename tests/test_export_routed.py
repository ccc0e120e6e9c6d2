"""The routed decoder graph: its operations against numpy, its packed codes against the chosen ones, the gate that finds
what is specific to it, and what a user may ask for. That it takes batches is tested in test_runtime_batch.py."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import tests.reference.int4 as reference
from tests.golden_cases import GOLDEN
from tests.gptq_checkpoint import Tensors, gptq_tensors, write_gptq_checkpoint
from tests.graph_edits import Edit, edit_nodes, flip_weight, graph_of, set_attribute
from tests.tiny_bundle import TEXT_MODEL, edit_manifest, export, only_error_line, run_cli, write_text_checkpoint
from tests.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.diff.staged_bundle import StagedBundle
from vlmdeploy.errors import BundleError, ExportError, ParityError
from vlmdeploy.export.graphs.routed_dialect import check_routed
from vlmdeploy.export.graphs.routed_functions import ROUTED_DOMAIN, routed_functions, without_routed_functions
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.precision import Precision, plan_precision
from vlmdeploy.runtime.backends.ort import import_onnxruntime
from vlmdeploy.runtime.integrity import check_bundle

SIZES: dict[str, Any] = {
    "hidden": 128, "heads": 4, "mlp": 192, "vision_width": 64, "vision_mlp": 128, "layers": 3, "vocab": 300
}  # fmt: skip
EXPERTS = ("language", "vision")
VISION_EXPERT = re.compile(r"model\.layers\.\d+\.(self_attn\.vision_expert|mlp\.vision_mlp)")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CogVLM2: grouped heads, and a bias in the vision expert's qkv only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("routed") / "ckpt", "cogvlm2", **SIZES)


@pytest.fixture(scope="module")
def bundle(ckpt: Path) -> Path:
    """Shared: do not change it."""
    return export(ckpt, ckpt.parent / "bundle", "trt-int4", routed_plugin="on")


# The operations


SHAPES: dict[str, list[str | int | None]] = {"y": ["tokens", "out"], "order": ["tokens"], "language_count": [1]}


def run_function(
    op: str, feeds: dict[str, NDArray[Any]], outputs: list[str], group_size: int | None = None
) -> list[Any]:
    """One node of an operation in ONNX Runtime, by its function body."""
    node = helper.make_node(op, list(feeds), outputs, domain=ROUTED_DOMAIN)
    if group_size is not None:
        node.attribute.append(helper.make_attribute("group_size", group_size))
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in feeds.items()]
    made = {name: kinds["x"] if name == "y" else TensorProto.INT32 for name in outputs}
    values = [helper.make_tensor_value_info(name, kind, SHAPES[name]) for name, kind in made.items()]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(ROUTED_DOMAIN, 1)]
    graph = helper.make_graph([node], "one", inputs, values)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=routed_functions())
    onnx.checker.check_model(model)
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(outputs, feeds))


@pytest.mark.parametrize("experts", [[0], [1], [0, 1, 1, 0, 1], [1, 1, 1], [0, 0], []])
def test_partition_lists_language_rows_before_vision_rows(experts: list[int]) -> None:
    order, count = run_function(
        "RoutedPartition", {"experts": np.array(experts, np.int32)}, ["order", "language_count"]
    )
    rows = range(len(experts))
    assert order.tolist() == [row for row in rows if not experts[row]] + [row for row in rows if experts[row]]
    assert count.tolist() == [experts.count(0)]


def packed(codes: NDArray[np.uint8], group_size: int) -> NDArray[np.int8]:
    """Byte j of a group: code j in the low four bits, code j + half a group in the high ones."""
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // 2), np.uint8)
    half = group_size // 2
    for group in range(codes.shape[-1] // group_size):
        for byte in range(half):
            low = codes[..., group * group_size + byte]
            out[..., group * half + byte] = low | codes[..., group * group_size + half + byte] << 4
    return out.view(np.int8)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("experts", [[0, 1, 1, 0, 1, 0, 0], [1], [0], [0, 0, 0], []])
def test_linear_multiplies_each_row_with_its_expert(experts: list[int], kind: type, group_size: int) -> None:
    random = np.random.default_rng(group_size + len(experts))
    width, out_width = 3 * group_size, 21
    codes = random.integers(0, 16, (2, out_width, width)).astype(np.uint8)
    scales = random.uniform(0.01, 0.1, (2, out_width, 3)).astype(np.float16)
    x: NDArray[Any] = random.normal(size=(len(experts), width)).astype(kind)
    bias = random.normal(size=(2, out_width))
    ids = np.array(experts, np.int32)
    feeds = {
        "x": x, "experts": ids, "order": np.argsort(ids, kind="stable").astype(np.int32),
        "language_count": np.array([experts.count(0)], np.int32), "codes": packed(codes, group_size),
        "scales": scales.transpose(0, 2, 1).copy(), "bias": bias.astype(np.float32),
    }  # fmt: skip
    found = run_function("RoutedLinear", feeds, ["y"], group_size=group_size)[0]
    weights = [reference.dequantize(codes[expert], scales[expert], group_size) for expert in range(2)]
    rows = [weights[expert] @ row.astype(np.float64) + bias[expert] for row, expert in zip(x, experts, strict=True)]
    expected = np.reshape(rows, (len(experts), out_width))
    assert found.dtype == kind
    np.testing.assert_allclose(found, expected, rtol=1e-3 if kind == np.float16 else 1e-5, atol=2e-3)


# The graph


def test_one_decoder_graph_holds_both_experts(bundle: Path) -> None:
    manifest, model = read_manifest(bundle), graph_of(bundle, "decoder")
    assert list(manifest.graphs) == ["vision", "decoder"]
    assert [node.op_type for node in model.graph.node].count("RoutedPartition") == 1, "all layers share the order"
    assert [node.op_type for node in model.graph.node].count("RoutedLinear") == 4 * SIZES["layers"]
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 24, "trt": 1, "vlmdeploy": 1}
    onnx.checker.check_model(str(bundle / "decoder.onnx"))


def test_plugin_is_named_where_tensorrt_looks_for_it(bundle: Path) -> None:
    for node in graph_of(bundle, "decoder").graph.node:
        if node.domain == ROUTED_DOMAIN:
            attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
            assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"vlmdeploy", b"1")
            assert attributes.get("group_size", 64) == 64


def test_bundle_says_that_it_needs_the_plugin(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.format_version, manifest.is_routed, manifest.token_graph) == ("2.0", True, "decoder")
    assert manifest.plugin is not None
    assert (manifest.plugin.packing, manifest.plugin.library) == (1, "")
    assert manifest.memory_bytes["prefill"] == manifest.memory_bytes["decode"]


def test_packed_codes_are_those_of_the_reference(ckpt: Path, bundle: Path) -> None:
    model, checkpoint = graph_of(bundle, "decoder"), Checkpoint(ckpt)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for kind in ("dense", "gate_up", "down"):
        stored = []
        for suffix in ("", ".scales"):
            tensor = tensors[f"decoder.layers.1.routed.{kind}.weight{suffix}"]
            stored.append(onnx.numpy_helper.to_array(tensor, str(bundle)))
        for index, expert in enumerate(EXPERTS):
            weight = checkpoint.parameter(f"decoder.layers.1.{expert}.{kind}.weight").numpy()
            codes, scales = reference.quantize_rtn(weight, 64)
            np.testing.assert_array_equal(stored[0][index], packed(codes, 64))
            np.testing.assert_array_equal(stored[1][index], scales.T)


def test_bias_is_zero_for_the_expert_that_has_none(bundle: Path) -> None:
    tensors = {tensor.name: tensor for tensor in graph_of(bundle, "decoder").graph.initializer}
    qkv = onnx.numpy_helper.to_array(tensors["decoder.layers.0.routed.qkv.bias"])
    dense = onnx.numpy_helper.to_array(tensors["decoder.layers.0.routed.dense.bias"])
    assert not qkv[0].any()
    assert qkv[1].any()
    assert not dense.any()


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_of_a_gptq_checkpoint_are_shipped(bits: int, tmp_path: Path) -> None:
    quantized = write_gptq_checkpoint(tmp_path / "gptq", bits=bits, group_size=32)
    out = export(quantized, tmp_path / "bundle", "trt-int4", routed_plugin="on")
    assert read_manifest(out).precision["decoder"] == f"int{bits}"


def write_mixed_checkpoint(folder: Path, vision_bits: int, vision_group: int) -> Path:
    """GPTQ codes of 4 bits in groups of 32, the vision expert's of other bits or groups; heads of 24, padded to 32."""
    sizes = {"hidden": 96, "mlp": 128, "layers": 2}
    tensors = TinyCheckpoint("cogvlm", **TEXT_MODEL | {"vision_layers": 1} | sizes).tensors()

    def edit(stored: Tensors) -> None:
        for name, values in tensors.items():
            if VISION_EXPERT.match(name):
                stored |= gptq_tensors(name.removesuffix(".weight"), values, vision_bits, vision_group)

    config = {"dynamic": {VISION_EXPERT.pattern: {"bits": vision_bits, "group_size": vision_group}}}
    return write_gptq_checkpoint(folder, 4, 32, edit, config, **sizes)


@pytest.mark.parametrize("vision_bits", [2, 3])
def test_experts_may_have_codes_of_different_bits(vision_bits: int, tmp_path: Path) -> None:
    """Rows that pad a head were filled with the middle code of the language expert, whatever the vision expert's is."""
    quantized = write_mixed_checkpoint(tmp_path / "gptq", vision_bits, 32)
    manifest = read_manifest(export(quantized, tmp_path / "bundle", "trt-int4", routed_plugin="on"))
    assert manifest.precision["decoder"] == f"int{vision_bits}+int4"
    assert manifest.cache.head_dim == 32


def test_experts_of_other_group_sizes_are_refused(tmp_path: Path) -> None:
    """CogVLM's experts of one linear share a launch, and so a group size."""
    quantized = write_mixed_checkpoint(tmp_path / "gptq", 4, 16)
    with pytest.raises(ExportError, match=r'vision\.qkv\.weight".*groups of 16'):
        export(quantized, tmp_path / "bundle", "trt-int4", routed_plugin="on")
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize("family", ["cogvlm", "cogvlm2"])
def test_heads_that_need_padding_pass_the_gate(family: str, tmp_path: Path) -> None:
    """Heads of 24; in CogVLM2 two share keys and values, and a bias of the vision expert is padded too."""
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt", family, **SIZES | {"hidden": 96, "layers": 2})
    manifest = read_manifest(export(ckpt, tmp_path / "bundle", "trt-int4", routed_plugin="on", group=32))
    assert manifest.cache.head_dim == 32
    assert manifest.cache.kv_heads == (2 if family == "cogvlm2" else 4)
    assert manifest.verification is not None and manifest.verification.passed


@pytest.mark.parametrize("checkpoint", ["cogvlm-tiny", "cogvlm2-tiny"])
def test_golden_checkpoints_pass_the_gate(checkpoint: str, tmp_path: Path) -> None:
    bundle = export(GOLDEN / checkpoint, tmp_path / "bundle", "trt-int4", routed_plugin="on")
    verification = read_manifest(bundle).verification
    assert verification is not None
    assert verification.passed
    assert verification.greedy_tokens_equal == verification.greedy_tokens_total > 0


# The gate


def route_all_to(expert: str) -> Callable[[onnx.NodeProto], None]:
    """Rows of both experts through the weights of one: what a port does that drops the routing."""

    def edit(node: onnx.NodeProto) -> None:
        if node.output[0].startswith("decoder.layers.1."):
            node.input[3] = "count.all" if expert == "language" else "count.none"

    return edit


def add_counts(folder: Path) -> None:
    """Constant counts that the sabotaged nodes read."""
    model = graph_of(folder, "decoder")
    for name, value in (("count.all", 10**6), ("count.none", 0)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), f"{name}.64"))
        narrow = onnx.helper.make_node("Cast", [f"{name}.64"], [name], to=onnx.TensorProto.INT32)
        model.graph.node.insert(0, narrow)
    (folder / "decoder.onnx").write_bytes(model.SerializeToString())


def routed_to(expert: str) -> Edit:
    edit_linears = edit_nodes("decoder", "RoutedLinear", route_all_to(expert))

    def edit(folder: Path) -> None:
        add_counts(folder)
        edit_linears(folder)

    return edit


SABOTAGES: dict[str, tuple[Edit, str]] = {
    "all_rows_to_language": (routed_to("language"), r"decoder\.(key|value|layer)\.1"),
    "all_rows_to_vision": (routed_to("vision"), r"decoder\.(key|value|layer)\.1"),
    "flipped_code_of_language": (
        flip_weight("decoder", "decoder.layers.1.routed.down.weight"), r"decoder\.layer\.1",
    ),
    "rotary_interleaved": (
        edit_nodes("decoder", "RotaryEmbedding", lambda node: node.attribute.append(
            helper.make_attribute("interleaved", 1))), r"decoder\.key\.0",
    ),
    "norm_eps": (edit_nodes("decoder", "RMSNormalization", set_attribute("epsilon", 1e-2)), r"decoder\."),
}  # fmt: skip


@pytest.mark.usefixtures("as_large_model")
@pytest.mark.parametrize(("edit", "stage"), SABOTAGES.values(), ids=SABOTAGES.keys())
def test_gate_names_the_first_stage_that_differs(
    edit: Edit, stage: str, ckpt: Path, tmp_path: Path, sabotage: Callable[[Edit], None]
) -> None:
    sabotage(edit)
    with pytest.raises(ParityError, match=rf": {stage}"):
        export(ckpt, tmp_path / "bundle", "trt-int4", routed_plugin="on")
    assert list(tmp_path.iterdir()) == []


def test_only_the_plugins_lose_their_bodies_for_tensorrt(bundle: Path) -> None:
    """What has a body is not looked for among the plugins; TRT_Attention is TensorRT's own, with a body for others."""
    model = without_routed_functions(graph_of(bundle, "decoder"))
    assert [(function.domain, function.name) for function in model.functions] == [("trt", "TRT_Attention")]


def test_stages_of_a_routed_bundle_are_of_both_experts(bundle: Path) -> None:
    assert StagedBundle(bundle, 1).geometry.experts == EXPERTS


def test_commands_take_a_routed_bundle(bundle: Path, ckpt: Path) -> None:
    for command in (["verify", bundle, "--provider", "cpu"], ["verify", bundle, "--ckpt", ckpt], ["inspect", bundle]):
        result = run_cli(*command)
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_diff_of_a_routed_bundle_and_its_checkpoint_finds_nothing(bundle: Path, ckpt: Path) -> None:
    result = run_cli("diff", bundle, ckpt, "--json")
    assert result.exit_code == 0, result.output


# What a user may ask for


@pytest.mark.parametrize(("target", "why"), [("ort-int4", "the plugin is TensorRT's"), ("rtx-int4", "no plugins")])
def test_target_without_plugins_is_told(target: str, why: str, ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"--routed-plugin on: {target} cannot use it, .*{why}.*--target trt-int4"):
        export(ckpt, tmp_path / "bundle", target, routed_plugin="on")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "found"), [("trt-fp16", "kept in fp16.*int4"), ("trt-int4", "groups of 16.*32, 64")]
)
def test_linear_that_the_kernel_does_not_take_is_named(target: str, found: str, ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf'on: "decoder\.layers\.0\.language\.qkv\.weight".*{found}'):
        export(ckpt, tmp_path / "bundle", target, routed_plugin="on", group=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "precision", "message"), [
    ("decoder.layers.2.vision.down.weight", Precision("int8", 64), r"symmetric 8-bit codes; .*symmetric 4-bit codes"),
    ("decoder.layers.0.language.dense.weight", Precision("int4", 64, symmetric=False), "asymmetric 4-bit codes"),
    ("decoder.layers.0.vision.qkv.weight", Precision("int4", 32), "has groups of 32, .*language.* of 64: expected one"),
])  # fmt: skip
def test_single_linear_that_the_kernel_does_not_take_is_named(
    target: str, precision: Precision, message: str, ckpt: Path
) -> None:
    spec = Checkpoint(ckpt).spec
    plan = plan_precision(spec, "trt-int4", {}, 64)
    check_routed(spec, plan)
    with pytest.raises(ExportError, match=rf'on: "{re.escape(target)}".* {message}'):
        check_routed(spec, replace(plan, by_target=plan.by_target | {target: precision}))


def test_family_without_a_vision_expert_is_told(ckpt: Path) -> None:
    spec = Checkpoint(ckpt).spec
    plain = replace(spec, decoder=replace(spec.decoder, experts=spec.decoder.experts[:1]))
    with pytest.raises(ExportError, match=r"on: cogvlm2 has 1 expert, expected language and vision experts"):
        check_routed(plain, plan_precision(spec, "trt-int4", {}, 64))


def test_auto_and_off_write_segment_graphs(ckpt: Path, tmp_path: Path) -> None:
    for choice in ("auto", "off"):
        manifest = read_manifest(export(ckpt, tmp_path / choice, "trt-int4", routed_plugin=choice))
        assert list(manifest.graphs) == ["vision", "decoder_text", "decoder_vision"]
        assert (manifest.format_version, manifest.plugin) == ("1.3", None)


def test_export_command_takes_the_option(tmp_path: Path) -> None:
    ckpt = write_text_checkpoint(tmp_path / "ckpt", mlp=128)
    options = ["--target", "trt-int4", "--quant", "rtn", "--group", "32", "--routed-plugin", "on", "--threads", "1"]
    result = run_cli("export", "--ckpt", ckpt, "--out", tmp_path / "bundle", *options)
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "bundle").is_routed


@pytest.mark.parametrize(("options", "message"), [
    (["--routed-plugin", "off"], "has a routed decoder.*export"),
    (["--plugin-library", "missing.so"], r"--plugin-library missing\.so: no such file"),
])  # fmt: skip
def test_build_option_that_does_not_fit_a_routed_bundle(options: list[str], message: str, bundle: Path) -> None:
    assert_refused(run_cli("build", bundle, *options), message)


@pytest.mark.parametrize("options", [["--routed-plugin", "on"], ["--batch", "4"], ["--plugin-library", "x.so"]])
def test_build_option_that_needs_a_routed_bundle(options: list[str], ckpt: Path, tmp_path: Path) -> None:
    segments = export(ckpt, tmp_path / "bundle", "trt-int4")
    assert_refused(run_cli("build", segments, *options), f"{options[0]}.* needs a routed decoder.*--routed-plugin on")


def assert_refused(result: Any, message: str) -> None:
    line = only_error_line(result)
    assert result.exit_code == 1
    assert re.search(message, line), line


def test_bundle_of_format_2_without_a_plugin_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_manifest(copy, plugin=None)
    with pytest.raises(BundleError, match=r"format 2\.0 is that of routed decoders, but the plugin is missing"):
        check_bundle(copy)


@pytest.mark.parametrize(("version", "is_read"), [("2.7", True), ("3.1", True), ("4.0", False)])
def test_routed_bundle_of_a_later_format(version: str, is_read: bool, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_manifest(copy, format_version=version)
    if is_read:
        assert check_bundle(copy).manifest.format_version == version
    else:
        with pytest.raises(BundleError, match=r"format 4\.0 is newer than 3\.0"):
            check_bundle(copy)
