"""Contract tests of bundles for CUDA through ONNX Runtime: fp16, blocks of 32, the same codes; verified on a CPU, and
never run on one in silence. No test here has seen a GPU.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.graph_edits import graph_of
from tests.tiny_bundle import export, only_error_line, run_cli
from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest

GRAPHS = ["vision", "decoder_text", "decoder_vision"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"hidden": 128, "heads": 4, "mlp": 192, "vision_width": 64, "vision_mlp": 128, "vocab": 300}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("cuda") / "ckpt", "cogvlm2", **sizes)


@pytest.fixture(scope="module")
def on_cuda(ckpt: Path) -> Path:
    """A bundle for CUDA through ONNX Runtime. Shared: do not change it."""
    return export(ckpt, ckpt.parent / "on_cuda", "ort-int4", provider="cuda")


def test_graphs_for_cuda_compute_in_fp16_with_blocks_of_32(on_cuda: Path) -> None:
    nodes = [node for graph in GRAPHS for node in graph_of(on_cuda, graph).graph.node]
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    sizes = [{item.name: item.i for item in node.attribute} for node in products]
    assert products and {size["block_size"] for size in sizes} == {32}
    assert {size["bits"] for size in sizes} == {4, 8}
    assert not [name for node in products for name in node.input[3:] if name], "symmetric: no zero points"
    assert read_manifest(on_cuda).provider == "cuda"
    assert read_manifest(on_cuda).cache.dtype == "fp16"


def test_bundle_for_cuda_holds_the_codes_of_the_one_for_a_cpu(ckpt: Path, on_cuda: Path, tmp_path: Path) -> None:
    """Groups of 64 become two blocks of 32 with the same scale: the bytes of the codes stay as they are."""
    on_cpu = export(ckpt, tmp_path / "bundle", "ort-int4")
    name = "decoder.layers.1.language.down.weight"
    stored = []
    for bundle in (on_cpu, on_cuda):
        tensor = next(tensor for tensor in graph_of(bundle, "decoder_text").graph.initializer if tensor.name == name)
        place = {entry.key: entry.value for entry in tensor.external_data}
        start = int(place.get("offset", 0))
        content = bundle.joinpath("decoder_text.data").read_bytes()[start : start + int(place.get("length", 0))]
        stored.append(content or tensor.raw_data)
    assert stored[0] == stored[1] and stored[0]


def test_bundle_for_cuda_passes_the_gate_on_a_cpu(on_cuda: Path) -> None:
    verification = read_manifest(on_cuda).verification
    assert verification is not None
    assert {stage.check for stage in verification.stages} == {"structure", "shipped"}
    assert verification.greedy_tokens_equal == verification.greedy_tokens_total > 0


def test_bundle_for_cuda_never_falls_back_to_the_cpu(on_cuda: Path) -> None:
    line = only_error_line(run_cli("verify", on_cuda))
    assert "made for CUDAExecutionProvider, which this onnxruntime does not have" in line
    assert 'pip install "vlmdeploy[cuda]"' in line
    assert "exported for provider cuda, asked for cpu" in only_error_line(
        run_cli("verify", on_cuda, "--provider", "cpu")
    )
