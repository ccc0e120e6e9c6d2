"""Engines that TensorRT-RTX builds here, without a GPU: what is inside the plans, how they get into a bundle, and what
happens when a build fails or is killed. What an engine computes is not tested: that needs a GPU.
"""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.golden_cases import GOLDEN
from tests.graph_edits import graph_of
from tests.plan_reader import Profile, read_plan
from tests.tiny_bundle import (
    ROOT,
    export,
    flip_byte,
    only_error_line,
    only_json_document,
    run_cli,
    write_text_checkpoint,
)
from tests.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint
from vlmdeploy.artifact import locked
from vlmdeploy.bundle import hash_file, read_manifest
from vlmdeploy.errors import BackendError, ExportError
from vlmdeploy.export.engines.build import BuildOptions, build_bundle
from vlmdeploy.export.engines.compiler import EngineRequest, ProfileShapes, compile_engine
from vlmdeploy.export.engines.parts import EnginePart, build_bytes, cut, initializer_bytes
from vlmdeploy.progress import no_progress
from vlmdeploy.runtime.backends.trt_library import import_tensorrt
from vlmdeploy.runtime.integrity import check_bundle

trt = pytest.importorskip("tensorrt_rtx", reason="pip install vlmdeploy[rtx]")

LAYERS = 2
GRAPHS = ["vision", "decoder_text", "decoder_vision"]
SIZES: dict[str, Any] = {"hidden": 128, "mlp": 192, "vision_width": 32, "vision_mlp": 64, "layers": LAYERS}
LOOSE_DEQUANTIZE = "__myl_ReplCastMulCast"  # a kernel that only widens codes: its product reads them from memory again


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("engines") / "ckpt", **SIZES)


@pytest.fixture(scope="module")
def rtx(ckpt: Path) -> Path:
    """An rtx-int4 bundle. Shared: copy it before changing it."""
    return export(ckpt, ckpt.parent / "bundle", "rtx-int4")


@pytest.fixture
def copied(rtx: Path, tmp_path: Path) -> Path:
    return shutil.copytree(rtx, tmp_path / "bundle")


def profiles_of(bundle: Path, graph: str) -> list[Profile]:
    return read_plan(bundle / f"engines/{graph}.engine")


def int4_bytes(model: onnx.ModelProto) -> int:
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4]
    return sum(int(np.prod(tensor.dims)) // 2 for tensor in tensors)


def test_export_compiles_and_lists_every_engine(rtx: Path) -> None:
    manifest = check_bundle(rtx, "full").manifest
    assert list(manifest.engines) == GRAPHS
    for name, engine in manifest.engines.items():
        assert engine.file == f"engines/{name}.engine"
        assert manifest.files[engine.file] == hash_file(rtx / engine.file)
        assert (engine.library, engine.compute_capabilities) == ("tensorrt_rtx", ())
        assert engine.version == import_tensorrt("tensorrt_rtx").version
        assert (engine.chunk_rows, engine.context_tokens) == (128, 128), "no longer than the context"
    assert "engines/build.log" in manifest.files
    log = (rtx / "engines/build.log").read_text()
    assert all(f"== {name}" in log for name in GRAPHS)


@pytest.mark.parametrize(("graph", "num_profiles"), [("decoder_text", 2), ("decoder_vision", 1), ("vision", 1)])
def test_every_profile_holds_the_predicted_int4_bytes(rtx: Path, graph: str, num_profiles: int) -> None:
    profiles = profiles_of(rtx, graph)
    assert len(profiles) == num_profiles
    for profile in profiles:
        assert profile.constant_bytes.get("int4", 0) == int4_bytes(graph_of(rtx, graph))


def test_no_vision_expert_is_in_the_text_engine(rtx: Path) -> None:
    text = (rtx / "engines/decoder_text.engine").read_bytes()
    vision = (rtx / "engines/decoder_vision.engine").read_bytes()
    assert b"decoder.layers.0.language" in text and b"decoder.layers.0.vision" not in text
    assert b"decoder.layers.0.vision" in vision and b"decoder.layers.0.language" not in vision
    assert b"lm_head" not in vision


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_kernel_only_widens_codes(rtx: Path, graph: str) -> None:
    for profile in profiles_of(rtx, graph):
        assert LOOSE_DEQUANTIZE not in profile.kernels


def test_attention_has_a_kernel_of_its_own_and_reads_the_cache_in_place(rtx: Path) -> None:
    prompt, one_token = profiles_of(rtx, "decoder_text")
    assert prompt.kernels.count("_gemm_mha_v2") == LAYERS
    assert one_token.kernels.count("_gemv_mha_v1") == LAYERS
    for profile in (prompt, one_token):
        names = {name.removesuffix(".1").split(" ")[0] for name in profile.inputs}
        for index in range(LAYERS):
            assert {f"present_key.{index}", f"present_value.{index}"} <= names, "the cache is input and output"
        assert not [name for name in names if name.startswith("past_")]
    assert profiles_of(rtx, "decoder_vision")[0].kernels.count("_gemm_mha_v2") == LAYERS - 1


class Parsed:
    """A graph as TensorRT reads it."""

    def __init__(self, path: Path) -> None:
        self.said: list[str] = []
        library = import_tensorrt("tensorrt_rtx")
        self._logger = library.logger(lambda severity, message: self.said.append(f"{severity}: {message}"))
        self._builder = trt.Builder(self._logger)
        self.network = self._builder.create_network(0)
        self._parser = trt.OnnxParser(self.network, self._logger)
        self.is_read = self._parser.parse_from_file(str(path))


@pytest.mark.parametrize("graph", GRAPHS)
def test_parser_reads_every_input(rtx: Path, graph: str) -> None:
    parsed = Parsed(rtx / f"{graph}.onnx")
    assert parsed.is_read
    assert not [line for line in parsed.said if "Unused Input" in line or line.startswith("ERROR")]
    model = graph_of(rtx, graph)
    names = {parsed.network.get_input(index).name for index in range(parsed.network.num_inputs)}
    assert names == {value.name for value in model.graph.input}


@pytest.mark.parametrize(("graph", "count"), [("decoder_text", LAYERS), ("decoder_vision", LAYERS - 1)])
def test_parser_makes_every_attention_lower_right_with_lengths(rtx: Path, graph: str, count: int) -> None:
    parsed = Parsed(rtx / f"{graph}.onnx")
    layers = [parsed.network.get_layer(index) for index in range(parsed.network.num_layers)]
    attentions = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert len(attentions) == count
    for layer in attentions:
        layer.__class__ = trt.IAttentionInputLayer
        assert layer.attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
        assert layer.attention.key_value_lengths is not None


def request(rtx: Path, folder: Path, graph: str, capabilities: tuple[str, ...] = ()) -> EngineRequest:
    part = EnginePart(graph, 0, (0, LAYERS), 1 << 20, is_whole=True)
    return EngineRequest(
        "tensorrt_rtx", rtx / f"{graph}.onnx", part, LAYERS, ProfileShapes(64, 4), capabilities, folder / "x.engine",
        folder / "build.log",
    )  # fmt: skip


@pytest.fixture(scope="module")
def unrouted(ckpt: Path) -> Path:
    """The graph of a routed decoder, a plain fp16 product in place of every plugin: the rest is TensorRT's own."""
    bundle = export(ckpt, ckpt.parent / "routed", "trt-int4", group=32, routed_plugin="on")
    model = graph_of(bundle, "decoder")
    widths = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type != "RoutedPartition"]
    for node in nodes:
        if node.op_type == "RoutedLinear":
            _, out_width, num_bytes = widths[node.input[4]]
            columns = np.ones((2 * num_bytes, out_width), np.float16)
            model.graph.initializer.append(onnx.numpy_helper.from_array(columns, f"{node.name}.columns"))
            node.CopyFrom(
                onnx.helper.make_node("MatMul", [node.input[0], f"{node.name}.columns"], node.output, node.name)
            )
    used = {name for node in nodes for name in node.input}
    graph = onnx.helper.make_graph(
        nodes, "decoder", [value for value in model.graph.input if value.name in used], model.graph.output,
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )  # fmt: skip
    functions = [function for function in model.functions if function.domain == "trt"]
    opsets = [opset for opset in model.opset_import if opset.domain != "vlmdeploy"]
    path = bundle / "unrouted.onnx"
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11).SerializeToString()
    )
    return path


@pytest.mark.parametrize("layers", [(0, LAYERS), (0, 1), (1, LAYERS)])
def test_routed_decoder_is_built_for_batches_but_for_its_plugins(
    layers: tuple[int, int], unrouted: Path, tmp_path: Path
) -> None:
    part = EnginePart("decoder", 0, layers, 1 << 20, is_whole=layers == (0, LAYERS))
    shapes = ProfileShapes(chunk_rows=16, logit_rows=8, batch=4)
    plan, log = tmp_path / "x.engine", tmp_path / "build.log"
    compile_engine(EngineRequest("tensorrt_rtx", unrouted, part, LAYERS, shapes, (), plan, log), no_progress)
    prompts, tokens = read_plan(plan)
    assert any("_gemm_mha" in kernel for kernel in prompts.kernels)
    assert any("_gemv_mha" in kernel for kernel in tokens.kernels), "of every prompt one row, over its own cache"


@pytest.mark.parametrize("capabilities", [("8.6",), ("8.9",), ("12.0",), ("8.6", "12.0")])
def test_engine_is_built_for_the_wanted_gpus(rtx: Path, tmp_path: Path, capabilities: tuple[str, ...]) -> None:
    compile_engine(request(rtx, tmp_path, "decoder_text", capabilities), no_progress)
    content = (tmp_path / "x.engine").read_bytes()
    for capability in ("8.6", "8.9", "12.0"):
        assert (f"sm{capability.replace('.', '')}".encode() in content) == (capability in capabilities)


def test_progress_of_a_build_is_told(rtx: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    compile_engine(request(rtx, tmp_path, "decoder_text"), lambda *step: steps.append(step))
    assert steps and all(name.startswith("decoder_text: ") and 0 <= done <= total for name, done, total in steps)


@pytest.mark.parametrize(("capability", "known"), [("7.0", "8.6, 8.9, 12.0"), ("8.7", "8.6, 8.9, 12.0")])
def test_gpu_that_the_library_does_not_know_lists_those_it_does(
    rtx: Path, tmp_path: Path, capability: str, known: str
) -> None:
    with pytest.raises(ExportError, match=rf"--sm is {capability}, TensorRT-RTX .* builds for .*{known}"):
        compile_engine(request(rtx, tmp_path, "decoder_text", (capability,)), no_progress)


def test_graph_that_tensorrt_misreads_is_refused(rtx: Path, tmp_path: Path) -> None:
    """A standard causal Attention with lengths: TensorRT drops them, aligns the mask with the first key and goes on."""
    folder = shutil.copytree(rtx, tmp_path / "bundle")
    model = graph_of(folder, "decoder_text")
    for node in model.graph.node:
        if node.op_type == "TRT_Attention":
            node.op_type, node.domain = "Attention", ""
            node.input[:] = [*node.input[:3], "", "", "", "lengths"]
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("is_causal", 1))
    (folder / "decoder_text.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"reads layer\.0\.attention as UPPER_LEFT without lengths"):
        compile_engine(request(folder, tmp_path, "decoder_text"), no_progress)


def test_operator_that_tensorrt_does_not_know_is_named(rtx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rtx, tmp_path / "bundle")
    model = graph_of(folder, "vision")
    model.graph.node[0].op_type = "StringNormalizer"
    (folder / "vision.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"vision\.onnx: TensorRT cannot read it .*; log: .*build\.log"):
        compile_engine(request(folder, tmp_path, "vision"), no_progress)


def test_builder_that_dies_is_one_error(rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\ncat > /dev/null\nkill -9 $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ExportError, match=r"was killed, most likely for memory: it was expected to take 0\.5 GB"):
        compile_engine(request(rtx, tmp_path, "decoder_text"), no_progress)


SHAPES: dict[str, dict[str, Any]] = {
    "decoder_heads_of_20": {"family": "cogvlm", "hidden": 80, "heads": 4, "mlp": 96},
    "one_layer": {"family": "cogvlm", "hidden": 32, "heads": 16, "layers": 1},
    "two_heads_of_24_and_one_kv_head": {"family": "cogvlm2", "hidden": 48, "heads": 2, "kv_heads": 1},
    "encoder_heads_of_5": {"family": "cogvlm2", "vision_width": 20, "vision_heads": 4, "vision_mlp": 36},
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_without_a_kernel_of_their_own_are_built(sizes: dict[str, Any], tmp_path: Path) -> None:
    """TensorRT refuses such attention as it stands: heads are padded, few heads are computed in several kernels."""
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt", **vars(TinyCheckpoint(**sizes)))
    assert len(read_manifest(export(ckpt, tmp_path / "bundle", "rtx-int4")).engines) == 3


@pytest.mark.parametrize("checkpoint", ["cogvlm-tiny", "cogvlm2-tiny"])
def test_golden_checkpoints_are_built(checkpoint: str, tmp_path: Path) -> None:
    assert len(read_manifest(export(GOLDEN / checkpoint, tmp_path / "bundle", "rtx-int4")).engines) == 3


# Building inside a bundle


def test_build_again_with_equal_options_does_nothing(copied: Path) -> None:
    before = (copied / "manifest.json").stat().st_mtime_ns
    document = only_json_document(run_cli("build", copied, "--json"))
    assert document["is_new"] is False
    assert (copied / "manifest.json").stat().st_mtime_ns == before


def test_build_with_other_options_replaces_the_engines(copied: Path) -> None:
    result = run_cli("build", copied, "--sm", "8.6", "--sm", "12.0", "--chunk-rows", 32)
    assert result.exit_code == 0, result.stderr
    assert "SM 8.6, SM 12.0" in result.stdout
    manifest = check_bundle(copied, "full").manifest
    assert {engine.chunk_rows for engine in manifest.engines.values()} == {32}
    assert sorted(path.name for path in (copied / "engines").iterdir()) == [
        "build.log", "decoder_text.engine", "decoder_vision.engine", "vision.engine",
    ]  # fmt: skip


def test_decoder_in_several_engines(copied: Path, rtx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose memory holds one layer: each engine has its layers' bytes, and only these."""
    monkeypatch.setattr("vlmdeploy.export.engines.parts.BASE_BYTES", 0)
    memory = int(0.9 * build_bytes(sum(initializer_bytes(graph_of(rtx, "decoder_text")).values())))
    manifest, is_new = build_bundle(copied, BuildOptions(chunk_rows=64, max_memory=f"{memory}B"), no_progress)
    assert is_new
    names = [name for name in manifest.engines if name.startswith("decoder_text")]
    assert len(names) > 1 and [manifest.engines[name].part for name in names] == list(range(len(names)))
    model = graph_of(rtx, "decoder_text")
    for name in names:
        expected = int4_bytes(cut(model, manifest.engines[name].layers, LAYERS))
        assert all(profile.constant_bytes["int4"] == expected for profile in profiles_of(copied, name))


@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_build_repairs_damaged_engines(copied: Path, damage: str) -> None:
    path = copied / "engines/vision.engine"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "altered":
        flip_byte(path)
    else:
        path.unlink()
    manifest, is_new = build_bundle(copied, BuildOptions(), no_progress)
    assert is_new and check_bundle(copied, "full").manifest == manifest


def test_second_build_of_a_bundle_waits_for_nobody(copied: Path) -> None:
    with locked(copied / ".engines.partial"), pytest.raises(ExportError, match="another run is writing it"):
        build_bundle(copied, BuildOptions(("8.6",)), no_progress)
    check_bundle(copied, "full")


def test_plan_can_be_captured_in_a_graph(rtx: Path) -> None:
    for graph in GRAPHS:
        content = (rtx / f"engines/{graph}.engine").read_bytes()
        assert content.count(b"stream_capturable=1") >= len(profiles_of(rtx, graph))
        assert b"stream_capturable=0" not in content


def test_killed_build_publishes_nothing(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "vlmdeploy", "build", str(copied), "--sm", "8.9"]
    process = subprocess.Popen(command, cwd=ROOT)
    aside = copied / ".engines.partial"
    for _ in range(1000):
        if aside.is_dir() or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file() and aside not in path.parents}
    assert left == before
    check_bundle(copied, "full")
    build_bundle(copied, BuildOptions(("8.9",)), no_progress)
    assert not aside.exists() and check_bundle(copied, "full").manifest.engines["vision"].compute_capabilities == (
        "8.9",
    )


def test_device_chooses_the_gpu(copied: Path) -> None:
    document = only_json_document(run_cli("build", copied, "--device", "RTX-5080", "--json"))
    assert {tuple(engine["compute_capabilities"]) for engine in document["engines"].values()} == {("12.0",)}


def test_failed_build_keeps_the_old_engines(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert "--sm is 7.0" in only_error_line(run_cli("build", copied, "--sm", "7.0"))
    assert {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_failed_engine_leaves_no_bundle(ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--sm is 7\.0"):
        export(ckpt, tmp_path / "bundle", "rtx-int4", build=BuildOptions(("7.0",)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("version", "message"), [
    ("1.6.0", "is version 1.6.0, expected 1.7 or later, below 2.0"), ("2.0.1", "is version 2.0.1"),
])  # fmt: skip
def test_other_major_version_is_refused(version: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "__version__", version)
    with pytest.raises(BackendError, match=message):
        import_tensorrt("tensorrt_rtx")


def test_missing_library_is_told_before_anything_is_written(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r'tensorrt_rtx cannot be imported .*pip install "vlmdeploy\[rtx\]"'):
        export(ckpt, tmp_path / "bundle", "rtx-int4")
    assert list(tmp_path.iterdir()) == []
