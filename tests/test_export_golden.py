"""Agreement tests: a bundle answers what the authors' code and our PyTorch reference answer, at every head size and
layout; and contract tests of how the graphs are built: no weight twice, none that its phase does not need.
"""

from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import vlmdeploy
from tests.comparison import GOLDEN_FP32, assert_close
from tests.golden_cases import CHECKPOINTS, GOLDEN, GoldenCase, golden_cases
from tests.graph_edits import graph_of, names_of
from tests.reference import int4 as reference
from tests.tiny_bundle import TEXT_MODEL, content_of, export, write_text_checkpoint
from tests.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.export.gate.taps import tapped_backend
from vlmdeploy.export.weight_reader import WeightReader
from vlmdeploy.manifest import Manifest
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.load import fill_parameter
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.quant.precision import plan_precision
from vlmdeploy.runtime.backends.lanes import Call, slot_positions
from vlmdeploy.runtime.backends.ort import CHUNK_ROWS, OrtBackend, import_onnxruntime
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.session import Session
from vlmdeploy.spec.matrices import PARTS

NUM_NEW = 16
PAGE = 64 << 10
TEXT = [5, 6, 7, 9, 11, 8, 30, 21]
SIZES: dict[str, dict[str, Any]] = {
    "cogvlm_head_8": {"family": "cogvlm", "hidden": 32, "heads": 4},
    "cogvlm_head_20": {"family": "cogvlm", "hidden": 80, "heads": 4, "mlp": 96},
    "cogvlm_head_24": {"family": "cogvlm", "hidden": 96, "heads": 4, "mlp": 96, "layers": 3},
    "cogvlm_head_2_one_layer": {"family": "cogvlm", "hidden": 32, "heads": 16, "layers": 1},
    "cogvlm_without_inv_freq": {"family": "cogvlm", "stores_inv_freq": False},
    "cogvlm_base_224": {"family": "cogvlm", "image_px": 32, "context_tokens": 300},  # 16 x 16 patches
    "cogvlm_chunked": {"family": "cogvlm", "image_px": 34, "context_tokens": 400},  # 291 rows
    "cogvlm2_one_kv_head": {"family": "cogvlm2", "hidden": 64, "heads": 4, "kv_heads": 1},
    "cogvlm2_head_24_one_kv_head": {"family": "cogvlm2", "hidden": 48, "heads": 2, "kv_heads": 1},
    "cogvlm2_odd_patch_grid": {"family": "cogvlm2", "image_px": 10},
    "cogvlm2_vision_heads_of_5": {"family": "cogvlm2", "vision_width": 20, "vision_heads": 4, "vision_mlp": 36},
}


class Exported(NamedTuple):
    """A bundle and the model with exactly its weights."""

    folder: Path
    manifest: Manifest
    model: VisionLanguageModel


@pytest.fixture(scope="module", params=CHECKPOINTS)
def golden_fp32(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Session]:
    """A golden checkpoint's name and its ort-fp32 bundle."""
    folder = export(GOLDEN / request.param, tmp_path_factory.mktemp("golden") / "bundle")
    return request.param, vlmdeploy.open(folder, threads=1)


@pytest.fixture(scope="module", params=product(CHECKPOINTS, ["ort-int4", "trt-int4"]), ids="-".join)
def golden_int4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Exported]:
    checkpoint, target = request.param
    return checkpoint, export_with_model(GOLDEN / checkpoint, tmp_path_factory.mktemp("int4"), target)


def cases_of(checkpoint: str) -> list[GoldenCase]:
    return [case for case in golden_cases() if case.checkpoint == checkpoint]


def export_with_model(ckpt: Path, folder: Path, target: str) -> Exported:
    bundle = export(ckpt, folder / "bundle", target)
    manifest = read_manifest(bundle)
    reader, model = weight_reader(ckpt, manifest), vlmdeploy.load_model(ckpt)
    for name in model.state_dict():
        if name in reader.plan.by_target:
            fill_parameter(model, name, reader.effective(name))
    return Exported(bundle, manifest, model)


def weight_reader(ckpt: Path, manifest: Manifest) -> WeightReader:
    checkpoint, parts = Checkpoint(ckpt), {part: manifest.precision[part] for part in PARTS}
    return WeightReader(checkpoint, plan_precision(checkpoint.spec, manifest.target, parts, manifest.requested_group))


def exact_session(exported: Exported) -> Session:
    """The bundle in float32, without int8 activations or fp16: only the order of sums differs from PyTorch."""
    files = check_bundle(exported.folder)
    return Session(files, tapped_backend(files, True, 1, {}))


def assert_same_answers(session: Session, model: VisionLanguageModel, ids: list[int], pixels: Any, name: str) -> None:
    """Logits of every row that the bundle computes, and the greedy continuation."""
    batch, images = torch.tensor([ids]), None if pixels is None else torch.from_numpy(pixels)
    with torch.no_grad():
        expected = model(batch, images)[0].numpy()
    logits = session.logits(np.array(ids), pixels)
    computed = ~np.isnan(logits).all(1)
    rows = 0 if pixels is None else session.manifest.tokens.rows_per_image
    assert computed.sum() == len(ids) - max(rows - 1, 0), "all rows but those of the vision expert"
    assert_close(f"{name}: logits", logits[computed], expected[computed], GOLDEN_FP32)
    new_ids = model.generate(batch, images, max_new_tokens=NUM_NEW)[0].tolist()
    assert session.generate_ids(np.array(ids), pixels, NUM_NEW).tolist() == new_ids


def test_fp32_bundle_gives_the_logits_of_the_authors_code(golden_fp32: tuple[str, Session]) -> None:
    checkpoint, session = golden_fp32
    for case in cases_of(checkpoint):
        inputs, expected = case.inputs(), case.expected()
        logits = session.logits(inputs["input_ids"][0], inputs["pixel_values"])
        vision_rows = expected["vision_expert_mask"][0].astype(bool)
        assert (np.isnan(logits).any(1) == vision_rows).all(), "rows without a head are NaN, all others are numbers"
        assert_close(f"{case}: logits", logits[~vision_rows], expected["logits"][0][~vision_rows], GOLDEN_FP32)


def test_fp32_bundle_generates_the_ids_of_the_authors_code(golden_fp32: tuple[str, Session]) -> None:
    checkpoint, session = golden_fp32
    for case in cases_of(checkpoint):
        inputs = case.inputs()
        new_ids = session.generate_ids(inputs["input_ids"][0], inputs["pixel_values"], NUM_NEW)
        assert new_ids.tolist() == case.expected()["generated_ids"][0].tolist(), case


def test_int4_bundle_equals_the_dequantized_model(golden_int4: tuple[str, Exported]) -> None:
    checkpoint, exported = golden_int4
    session = exact_session(exported)
    for case in cases_of(checkpoint):
        inputs = case.inputs()
        assert_same_answers(session, exported.model, inputs["input_ids"][0].tolist(), inputs["pixel_values"], str(case))


def test_int4_bundle_as_shipped_stays_close(golden_int4: tuple[str, Exported]) -> None:
    verification = golden_int4[1].manifest.verification
    assert verification is not None
    assert {stage.check for stage in verification.stages} == {"structure", "shipped"}
    assert verification.top1_agreement > 0.8


@pytest.mark.parametrize("target", ["ort-fp32", "ort-int4", "trt-int4"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_bundle_equals_the_model(sizes: dict[str, Any], target: str, tmp_path: Path) -> None:
    tiny = TinyCheckpoint(**sizes, seed=3)
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt", **vars(tiny))
    exported = export_with_model(ckpt, tmp_path, target)
    session = exact_session(exported)
    assert_same_answers(session, exported.model, tiny.prompt(TEXT, True), tiny.pixels(), "with an image")
    assert_same_answers(session, exported.model, tiny.prompt(TEXT, False), None, "text only")
    assert_same_answers(session, exported.model, [tiny.bos_id], None, "BOS only")


@pytest.mark.parametrize("target", ["ort-fp16", "ort-int8", "trt-fp16"])
def test_other_targets_equal_the_model(target: str, tmp_path: Path) -> None:
    tiny = TinyCheckpoint("cogvlm2", hidden=96, heads=4, kv_heads=2)
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt", **vars(tiny))
    exported = export_with_model(ckpt, tmp_path, target)
    assert_same_answers(exact_session(exported), exported.model, tiny.prompt(TEXT, True), tiny.pixels(), target)


@pytest.mark.parametrize("embedding", ["fp32", "fp16", "int8", "int4"])
def test_embedding_of_every_precision_equals_the_model(embedding: str, tmp_path: Path) -> None:
    tiny = TinyCheckpoint(hidden=64, vocab=50)
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt", **vars(tiny))
    bundle = export(ckpt, tmp_path / "bundle", precisions={"embedding": embedding})
    manifest, ids = read_manifest(bundle), np.array([0, 49, 7, 7])
    expected = weight_reader(ckpt, manifest).effective("embedding.weight").numpy()[ids]
    assert manifest.embedding.dtype == embedding
    assert (vlmdeploy.open(bundle).embedding[ids] == expected).all()


@pytest.mark.parametrize("target", ["ort-fp32", "trt-int4"])
def test_long_text_crosses_chunks(target: str, tmp_path: Path) -> None:
    tiny = TinyCheckpoint("cogvlm2", context_tokens=2 * CHUNK_ROWS + 100)
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt", **vars(tiny))
    exported = export_with_model(ckpt, tmp_path, target)
    text = np.random.default_rng(0).integers(0, 40, 2 * CHUNK_ROWS + 5).tolist()
    assert_same_answers(exact_session(exported), exported.model, tiny.prompt(text, True), tiny.pixels(), "long")


# How the graphs are built


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An int4 bundle whose codes and scales are large enough for the data files."""
    folder = tmp_path_factory.mktemp("wide")
    sizes: dict[str, Any] = {
        "hidden": 256,
        "heads": 4,
        "mlp": 512,
        "vision_width": 128,
        "vision_mlp": 256,
        "vocab": 600,
    }
    return export_with_model(write_tiny_checkpoint(folder / "ckpt", "cogvlm2", **sizes), folder, "ort-int4")


def external_ranges(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Tensor name -> offset and end in the data file."""
    ranges = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            ranges[tensor.name] = int(place["offset"]), int(place["offset"]) + int(place["length"])
    return ranges


def external_content(exported: Exported, graph: str) -> list[bytes]:
    data = exported.folder.joinpath(f"{graph}.data").read_bytes()
    return [data[slice(*span)] for span in external_ranges(graph_of(exported.folder, graph)).values()]


@pytest.mark.parametrize("graph", ["vision", "decoder_text", "decoder_vision"])
def test_external_tensors_are_aligned_and_do_not_overlap(wide: Exported, graph: str) -> None:
    spans = sorted(external_ranges(graph_of(wide.folder, graph)).values())
    size = (wide.folder / f"{graph}.data").stat().st_size
    assert spans and all(start % PAGE == 0 for start, _ in spans)
    assert all(0 <= next_start - stop < PAGE for (_, stop), (next_start, _) in pairwise(spans))
    assert spans[0][0] == 0 and spans[-1][1] == size, "nothing stored that no graph names"


def test_every_matrix_is_on_disk_once(wide: Exported) -> None:
    names = [name for graph in wide.manifest.graphs for name in external_ranges(graph_of(wide.folder, graph))]
    assert len(names) == len(set(names))
    stored = [content for graph in wide.manifest.graphs for content in external_content(wide, graph)]
    assert len(stored) == len(set(stored)) == len(names)


def test_decode_graph_has_no_vision_expert(wide: Exported) -> None:
    names = names_of(wide.folder, "decoder_text")
    assert "decoder.layers.0.language.qkv.weight" in names
    assert not [name for name in names if "vision" in name or name.startswith(("connector", "embedding"))]


def test_vision_expert_graph_stops_after_the_last_keys_and_values(wide: Exported) -> None:
    names = names_of(wide.folder, "decoder_vision")
    last = [name for name in names if name.startswith("decoder.layers.1.")]
    expected = ["decoder.layers.1.attention_norm.weight", "decoder.layers.1.vision.qkv.bias"]
    expected += ["decoder.layers.1.vision.qkv.weight", "decoder.layers.1.vision.qkv.weight.scales"]
    assert sorted(last) == expected
    assert not [name for name in names if "language" in name or name.startswith(("lm_head", "embedding"))]
    kv_width = 2 * 2 * 64  # keys and values of two heads: no query rows
    shapes = {tensor.name: list(tensor.dims) for tensor in graph_of(wide.folder, "decoder_vision").graph.initializer}
    assert shapes["decoder.layers.1.vision.qkv.weight"][0] == kv_width


def test_stored_codes_are_those_of_the_reference(wide: Exported, tmp_path: Path) -> None:
    """Read back by hand from the data file: the codes of the textbook int4 of the checkpoint's own tensor."""
    name = "decoder.layers.1.language.down.weight"
    model = graph_of(wide.folder, "decoder_text")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    group = wide.manifest.group_sizes["decoder"]
    content = wide.folder.joinpath("decoder_text.data").read_bytes()[slice(*external_ranges(model)[name])]
    packed: NDArray[np.uint8] = np.frombuffer(content, np.uint8).reshape(*tensor.dims)
    weight = Checkpoint(wide.folder.parent / "ckpt").parameter(name).numpy()
    assert (reference.unpack(packed) == reference.quantize_rtn(weight, group)[0]).all()


@pytest.mark.parametrize("block_bytes", [1, 1 << 12, 1 << 30])
def test_blocks_of_any_size_write_the_same_files(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, a few, or all at once; padded heads have rows that no stored row fills. The manifest tells of
    the verification, whose own sums are cut into blocks too."""
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt", "cogvlm", hidden=80, heads=4, mlp=96)
    whole = content_of(export(ckpt, tmp_path / "whole", "ort-int4"))
    monkeypatch.setattr("vlmdeploy.export.weight_reader.BLOCK_BYTES", block_bytes)
    blocks = content_of(export(ckpt, tmp_path / "blocks", "ort-int4"))
    assert blocks | {"manifest.json": b""} == whole | {"manifest.json": b""}


@pytest.mark.parametrize("target", ["ort-fp32", "ort-int4", "trt-int4"])
def test_two_exports_are_byte_identical(target: str, tmp_path: Path) -> None:
    ckpt = write_text_checkpoint(tmp_path / "ckpt")
    first, second = (content_of(export(ckpt, tmp_path / name, target)) for name in ("first", "second"))
    assert first == second


def test_licences_of_the_checkpoint_travel_along(tmp_path: Path) -> None:
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt")
    for name in ("LICENSE", "NOTICE.txt", "MODEL_LICENSE"):
        (ckpt / name).write_text(f"{name} of the authors")
    bundle = export(ckpt, tmp_path / "bundle")
    assert {"LICENSE", "NOTICE.txt", "MODEL_LICENSE"} <= set(read_manifest(bundle).files)
    assert (bundle / "NOTICE.txt").read_text() == "NOTICE.txt of the authors"


# How the runtime calls them


class CountingSession:
    """Passes everything on to an onnxruntime session; counts calls and notes where outputs were written."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.num_calls = 0
        self.output_places: list[set[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        self.num_calls += 1
        self._session.run_with_iobinding(binding)
        self.output_places.append({value.data_ptr() for value in binding.get_outputs()})


@pytest.fixture
def counted(wide: Exported) -> tuple[Session, dict[str, CountingSession]]:
    """The bundle with its graphs' calls counted."""
    sessions: dict[str, CountingSession] = {}
    files = check_bundle(wide.folder)

    def load(graph: str) -> Any:
        path = str(wide.folder / wide.manifest.graphs[graph].file)
        real = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
        return sessions.setdefault(graph, CountingSession(real))

    return Session(files, OrtBackend(files, load_graph=load)), sessions


def test_one_session_call_for_each_token(counted: tuple[Session, dict[str, CountingSession]]) -> None:
    session, calls = counted
    tiny = TinyCheckpoint("cogvlm2", vocab=600)
    num_new = len(session.generate_ids(np.array(tiny.prompt(TEXT, True)), tiny.pixels(), 12))
    assert num_new == 12, "the seed's answer has no stop id"
    assert calls["decoder_vision"].num_calls == 1
    assert calls["decoder_text"].num_calls == 2 + num_new - 1, "BOS, the text, and every new token but the last"


def test_text_prompt_loads_no_vision_graph(counted: tuple[Session, dict[str, CountingSession]]) -> None:
    session, calls = counted
    session.generate_ids(np.array([1, 5, 6]), max_new_tokens=3)
    assert set(calls) == {"decoder_text"}


def test_cache_is_written_in_place(counted: tuple[Session, dict[str, CountingSession]]) -> None:
    """Past and present share their memory in every call, and nothing but the logits is put anywhere else."""
    session, calls = counted
    backend = session.backend
    assert isinstance(backend, OrtBackend)
    lanes = backend.new_lanes(1, 5)
    lanes.begin(0, slot_positions(np.arange(3), 5))
    places = {array.ctypes.data for array in lanes.arrays.values()}
    rows = session.embedding[np.array([1, 5, 6, 7, 8])]
    backend.run(Call.of_one(rows[:3], np.zeros(3, np.bool_), np.array([2])), lanes)
    for row in (3, 4):
        backend.decode(rows[row : row + 1], np.ones(1, np.bool_), lanes)
        filled = [np.abs(array[0, :, : row + 1]).sum(-1) > 0 for array in lanes.arrays.values()]
        assert all(part.all() for part in filled) and all(
            (a[0, :, row + 1 :] == 0).all() for a in lanes.arrays.values()
        )
    outputs = calls["decoder_text"].output_places
    assert len(outputs) == 3 and all(places < written and len(written) == len(places) + 1 for written in outputs)
    assert outputs[1] == outputs[2], "decode binds its buffers once"


def test_text_model_of_the_other_tests_is_quantized_throughout(tmp_path: Path) -> None:
    """Guards tests/tiny_bundle.py: its int4 bundle must not fall back to floats."""
    bundle = export(write_text_checkpoint(tmp_path / "ckpt"), tmp_path / "bundle", "ort-int4")
    manifest = read_manifest(bundle)
    assert manifest.kept_in_float == () and manifest.group_sizes["decoder"] == 32 == TEXT_MODEL["hidden"] // 2
