"""Contract tests of the verification gate: a bundle that computes anything else than PyTorch is not published, and the
message names the first stage that differs; a published one can be verified again, with its checkpoint or without.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import vlmdeploy
from tests.graph_edits import Edit, edit_nodes, flip_weight, set_attribute, swap_outputs
from tests.tiny_bundle import content_of, edit_manifest, export, flip_byte, sign_again
from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import BundleError, ExportError, ParityError
from vlmdeploy.export.gate.verify import verify_bundle
from vlmdeploy.layout import PromptLayout, lay_out
from vlmdeploy.progress import no_progress
from vlmdeploy.runtime.replay import replay

SIZES: dict[str, Any] = {"hidden": 80, "heads": 4, "mlp": 96, "vision_width": 32, "vision_mlp": 64}  # heads of 20


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("gate") / "ckpt", "cogvlm", **SIZES)


@pytest.fixture
def bundle(ckpt: Path, tmp_path: Path) -> Path:
    return export(ckpt, tmp_path / "bundle", "ort-int4")


def flip_embedding(folder: Path) -> None:
    """The highest bit of a code in every row of the int8 table; the scales follow the codes."""
    stored = np.fromfile(folder / "embedding.bin", np.uint8)
    rows = len(stored) // (SIZES["hidden"] + 2 * SIZES["hidden"] // 16)
    stored[: rows * SIZES["hidden"]].reshape(rows, -1)[:, 3] ^= 1 << 7
    stored.tofile(folder / "embedding.bin")


def swap_begin_and_end_rows(folder: Path) -> None:
    def swap(node: onnx.NodeProto) -> None:
        if len(node.input) == 3 and "boundary" in node.input[0]:
            node.input[0], node.input[2] = node.input[2], node.input[0]

    edit_nodes("vision", "Concat", swap)(folder)


def not_a_number(folder: Path) -> None:
    """The scales of a stored matrix become NaN: the graph runs, and every value after it is NaN."""
    path = folder / "vision.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name == "vision.layers.1.fc1.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))
    path.write_bytes(model.SerializeToString())


SABOTAGES: dict[str, tuple[Edit, str]] = {
    "rotary_interleaved": (
        edit_nodes("decoder_text", "GroupQueryAttention", set_attribute("rotary_interleaved", 1)), "decoder.key.0",
    ),
    "rotary_interleaved_for_the_image": (
        edit_nodes("decoder_vision", "GroupQueryAttention", set_attribute("rotary_interleaved", 1)), "decoder.key.0",
    ),
    "scale_of_padded_heads_missing": (
        edit_nodes("decoder_text", "CachedAttention", set_attribute("scale", 16**-0.5)), "decoder.layer.0",
    ),
    "gate_and_up_swapped_in_the_decoder": (
        edit_nodes("decoder_vision", "Split", lambda node: swap_outputs(node) if "gate" in node.output[0] else None),
        "decoder.layer.0",
    ),
    "gate_and_up_swapped_in_the_connector": (edit_nodes("vision", "Split", lambda node: swap_outputs(node)
        if "connector" in node.output[0] else None), "connector.mlp"),
    "queries_and_values_swapped": (
        edit_nodes("vision", "Split", lambda node: swap_outputs(node) if "query" in node.output[0] else None),
        "vision.layer.0",
    ),
    "norm_eps_of_the_decoder": (
        edit_nodes("decoder_text", "SkipSimplifiedLayerNormalization", set_attribute("epsilon", 1e-2)),
        "decoder.layer.0",
    ),
    "norm_eps_of_the_encoder": (
        edit_nodes("vision", "LayerNormalization", set_attribute("epsilon", 1e-2)), "vision.layer.0",
    ),
    "gelu_by_tanh": (edit_nodes("vision", "Gelu", lambda node: node.attribute.append(
        onnx.helper.make_attribute("approximate", "tanh"))), "vision.layer.0"),
    "silu_of_another_slope": (
        edit_nodes("decoder_text", "QuickGelu", set_attribute("alpha", 1.702)), "decoder.layer.0",
    ),
    "flipped_weight_in_the_decoder": (
        flip_weight("decoder_text", "decoder.layers.1.language.down.weight"), "decoder.layer.1",
    ),
    "flipped_weight_in_the_vision_expert": (
        flip_weight("decoder_vision", "decoder.layers.1.vision.qkv.weight"), "decoder.key.1",
    ),
    "flipped_weight_in_the_head": (flip_weight("decoder_text", "lm_head.weight"), "logits"),
    "flipped_weight_in_the_encoder": (flip_weight("vision", "vision.layers.0.fc2.weight"), "vision.layer.0"),
    "altered_embedding": (flip_embedding, "embedding"),
    "boundary_rows_swapped": (swap_begin_and_end_rows, "connector.boundary"),
}  # fmt: skip


@pytest.mark.usefixtures("as_large_model")
@pytest.mark.parametrize(("edit", "stage"), SABOTAGES.values(), ids=SABOTAGES.keys())
def test_gate_names_the_first_stage_that_differs(
    edit: Edit, stage: str, ckpt: Path, tmp_path: Path, sabotage: Callable[[Edit], None]
) -> None:
    sabotage(edit)
    with pytest.raises(ParityError, match=rf": {stage} \(structure\) is the first stage that differs"):
        export(ckpt, tmp_path / "bundle", "ort-int4")
    assert list(tmp_path.iterdir()) == [], "nothing is published and nothing is left"


@pytest.mark.usefixtures("as_large_model")
def test_gate_names_the_first_stage_that_is_not_finite(
    ckpt: Path, tmp_path: Path, sabotage: Callable[[Edit], None]
) -> None:
    """Rows that were NaN throughout once counted as rows that the bundle does not compute."""
    sabotage(not_a_number)
    with pytest.raises(ParityError, match=r"vision\.layer\.1 \(structure\) holds Inf or NaN at \[0, 0, 0\]"):
        export(ckpt, tmp_path / "bundle", "ort-int4")


def patch_layout(monkeypatch: pytest.MonkeyPatch, change: Callable[[PromptLayout], PromptLayout]) -> None:
    """Change what the runtime makes of a prompt, and leave PyTorch alone."""
    monkeypatch.setattr("vlmdeploy.runtime.generate.lay_out", lambda *prompt: change(lay_out(*prompt)))


@pytest.mark.usefixtures("as_large_model")
def test_last_image_row_on_the_vision_expert_is_found(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_layout(monkeypatch, lambda layout: replace(layout, vision_mask=layout.types == 1))
    with pytest.raises(ParityError, match=r": decoder.key.0 \(structure\) is the first stage that differs.*\[\d, 18, "):
        export(ckpt, tmp_path / "bundle", "ort-int4")


@pytest.mark.usefixtures("as_large_model")
def test_positions_that_count_every_patch_are_found(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_layout(monkeypatch, lambda layout: replace(layout, positions=np.arange(len(layout.ids))))
    with pytest.raises(ParityError, match=r": decoder.key.0 \(structure\) is the first stage that differs"):
        export(ckpt, tmp_path / "bundle", "ort-int4")


def test_decode_that_forgets_its_place_is_found(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the loop that generates is wrong, no graph: the greedy continuation tells."""
    from vlmdeploy.runtime.backends.ort import DecodeBinding

    run = DecodeBinding.run

    def run_one_place_early(self: DecodeBinding, *arguments: Any) -> Any:
        self.lanes.lengths -= 1
        logits = run(self, *arguments)
        self.lanes.lengths += 1
        return logits

    monkeypatch.setattr(DecodeBinding, "run", run_one_place_early)
    with pytest.raises(ParityError, match=r"greedy token \d is \[\d+\], PyTorch says \d+, which leads by"):
        export(ckpt, tmp_path / "bundle")


def test_failed_gate_leaves_the_old_bundle_whole(ckpt: Path, bundle: Path, sabotage: Callable[[Edit], None]) -> None:
    before = content_of(bundle)
    sabotage(SABOTAGES["rotary_interleaved"][0])
    with pytest.raises(ParityError):
        export(ckpt, bundle, "ort-int4", force=True)
    assert content_of(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_verdict_of_every_stage_is_in_the_manifest(bundle: Path) -> None:
    verification = read_manifest(bundle).verification
    assert verification is not None and verification.passed
    stages = {stage.stage for stage in verification.stages}
    assert stages >= {
        "preprocess", "vision.embed", "vision.layer.0", "vision.layer.1", "connector.linear", "connector.mlp",
        "connector.boundary", "embedding", "decoder.key.0", "decoder.value.1", "decoder.layer.1", "decoder.norm",
        "logits", "logits end to end",
    }  # fmt: skip
    assert all(stage.passed and 0 <= stage.max_error <= stage.tolerance for stage in verification.stages)
    assert verification.greedy_tokens_equal == verification.greedy_tokens_total > 0


def test_context_of_one_word_beside_the_image_is_verified(ckpt: Path, tmp_path: Path) -> None:
    """The gate once wanted eight new tokens where the context has room for one."""
    rows_per_image = 18
    bundle = export(ckpt, tmp_path / "bundle", context_tokens=rows_per_image + 3)
    verification = read_manifest(bundle).verification
    assert verification is not None and verification.greedy_tokens_equal == verification.greedy_tokens_total == 1


# Verifying a published bundle again


def test_bundle_passes_again_with_its_checkpoint(ckpt: Path, bundle: Path) -> None:
    verification = read_manifest(bundle).verification
    assert verification is not None
    again = verify_bundle(bundle, ckpt, 1, no_progress)
    assert [(stage.stage, stage.check) for stage in again] == [(s.stage, s.check) for s in verification.stages]


def test_bundle_of_chosen_settings_passes_again(ckpt: Path, tmp_path: Path) -> None:
    options = {"context_tokens": 60, "default_template": "vqa", "group": 32, "precisions": {"embedding": "int4"}}
    bundle = export(ckpt, tmp_path / "bundle", "ort-int8", **options)
    assert all(stage.passed for stage in verify_bundle(bundle, ckpt, 1, no_progress))


@pytest.mark.parametrize("change", [{"layers": 3}, {"seed": 1}])
def test_another_checkpoint_is_refused(bundle: Path, tmp_path: Path, change: dict[str, int]) -> None:
    """Of other sizes, or of the same sizes with other weights."""
    other = write_tiny_checkpoint(tmp_path / "other", "cogvlm", **SIZES | change)
    with pytest.raises(ExportError, match=r"bundle: was not made from .*other: its config or tensors differ"):
        verify_bundle(bundle, other, 1, no_progress)


def test_replay_passes_without_the_checkpoint(bundle: Path) -> None:
    verdicts = replay(bundle, threads=1)
    assert {verdict.stage for verdict in verdicts} == {"image rows", "logits"}
    assert all(verdict.passed and verdict.max_error < 1e-4 for verdict in verdicts), "the same machine"


@pytest.mark.parametrize(("name", "message"), [
    ("image_rows", "image rows .* is the first stage"), ("logits", "logits .* is the first stage"),
    ("greedy_ids", r"greedy token 2 is \d+, but in one pass"), ("picture", "image rows .* is the"),
])  # fmt: skip
def test_replay_finds_an_altered_record(bundle: Path, name: str, message: str) -> None:
    record = dict(np.load(bundle / "reference.npz"))
    altered = record[name].copy()
    altered.reshape(-1)[2:] = (altered.reshape(-1)[2:] + 3) % 40
    np.savez(bundle / "reference.npz", **record | {name: altered})
    sign_again(bundle)
    with pytest.raises(ParityError, match=message):
        replay(bundle, threads=1)


@pytest.mark.parametrize("name", ["gate_and_up_swapped_in_the_decoder", "gate_and_up_swapped_in_the_connector"])
def test_replay_finds_an_altered_graph(bundle: Path, name: str) -> None:
    SABOTAGES[name][0](bundle)
    sign_again(bundle)
    with pytest.raises(ParityError, match="is the first stage that differs"):
        replay(bundle, threads=1)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "lacks_an_array"])
def test_damaged_record_is_a_bundle_error(bundle: Path, damage: str) -> None:
    path = bundle / "reference.npz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        flip_byte(path)
    else:
        np.savez(path, **{name: values for name, values in np.load(path).items() if name != "logits"})
    sign_again(bundle)
    with pytest.raises(BundleError, match=r"reference\.npz: cannot be read"):
        replay(bundle, threads=1)


@pytest.mark.parametrize("verdict", ["none", "failed"])
def test_unverified_bundle_is_refused(bundle: Path, verdict: str) -> None:
    verification = read_manifest(bundle).verification
    assert verification is not None
    edit_manifest(bundle, verification=None if verdict == "none" else replace(verification, passed=False))
    for call in (vlmdeploy.open, replay):
        with pytest.raises(BundleError, match="was never verified against PyTorch; export it again"):
            call(bundle)
