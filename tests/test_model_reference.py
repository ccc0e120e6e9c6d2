"""Reference tests: the PyTorch model against tests/reference/cogvlm.py at random tiny sizes that no golden vector has.

The reference itself is held against the golden vectors first.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests.comparison import GOLDEN_FP32, REFERENCE_FP32, assert_close
from tests.golden_cases import GOLDEN, GoldenCase, golden_cases
from tests.model_trace import trace_model
from tests.reference.cogvlm import ReferenceModel, rms_norm, rope
from tests.reference.safetensors import read_folder
from tests.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint
from vlmdeploy import load_model
from vlmdeploy.export.graphs.head_layout import HeadLayout
from vlmdeploy.model.decoder import RmsNorm, rotate
from vlmdeploy.runtime.backends.lanes import Floats, rope_table
from vlmdeploy.spec.decoder import DecoderSpec, RopeSpec

TEXT = [5, 6, 7, 9, 11, 8, 30, 21]
NUM_NEW = 5
SIZES: dict[str, dict[str, Any]] = {
    "cogvlm_head_8": {"family": "cogvlm", "hidden": 32, "heads": 4},
    "cogvlm_head_20": {"family": "cogvlm", "hidden": 40, "heads": 2, "mlp": 56},
    "cogvlm_head_24_one_layer": {"family": "cogvlm", "hidden": 72, "heads": 3, "layers": 1, "vision_layers": 1},
    "cogvlm_16_by_16_patches": {"family": "cogvlm", "image_px": 32, "context_tokens": 300},
    "cogvlm_without_inv_freq": {"family": "cogvlm", "stores_inv_freq": False},
    "cogvlm2_head_8_one_kv_head": {"family": "cogvlm2", "hidden": 32, "heads": 4, "kv_heads": 1},
    "cogvlm2_head_20_two_kv_heads": {"family": "cogvlm2", "hidden": 80, "heads": 4, "kv_heads": 2},
    "cogvlm2_head_24_one_kv_head": {"family": "cogvlm2", "hidden": 48, "heads": 2, "kv_heads": 1, "layers": 3},
    "cogvlm2_odd_patch_grid": {"family": "cogvlm2", "image_px": 10},
    "cogvlm2_one_patch_block": {"family": "cogvlm2", "image_px": 9, "patch_px": 3},
    "cogvlm2_without_inv_freq": {"family": "cogvlm2", "stores_inv_freq": False},
    "cogvlm2_vision_heads_of_5": {"family": "cogvlm2", "vision_width": 20, "vision_heads": 4, "vision_mlp": 36},
}


@pytest.mark.parametrize("case", golden_cases(), ids=str)
def test_reference_equals_the_authors_code(case: GoldenCase) -> None:
    folder, inputs = GOLDEN / case.checkpoint, {name: values[0] for name, values in case.inputs().items()}
    config = json.loads((folder / "config.json").read_text())
    model = ReferenceModel(case.checkpoint.removesuffix("-tiny"), config, read_folder(folder))
    trace = model.generate(
        inputs["input_ids"], inputs["token_type_ids"], inputs["attention_mask"], inputs["pixel_values"], num_new=16
    )
    for key, expected in case.expected().items():
        assert_close(f"reference {key}", trace[key][None], expected, GOLDEN_FP32)


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text_only"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_model_equals_the_reference(tmp_path: Path, sizes: dict[str, Any], with_image: bool) -> None:
    assert_equals_reference(tmp_path, TinyCheckpoint(**sizes, seed=3), with_image)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoint_is_computed_in_float32(tmp_path: Path, dtype: str) -> None:
    assert_equals_reference(tmp_path, TinyCheckpoint("cogvlm2", seed=4), True, dtype=dtype, num_shards=3)


def assert_equals_reference(folder: Path, tiny: TinyCheckpoint, with_image: bool, **stored: Any) -> None:
    """Every key of the trace, from the checkpoint as it stands on disk."""
    write_tiny_checkpoint(folder, **vars(tiny), **stored)
    ids = np.array(tiny.prompt(TEXT, with_image))
    types = np.zeros_like(ids)
    types[1 : 1 + (tiny.rows_per_image if with_image else 0)] = 1
    pixels = tiny.pixels() if with_image else None
    reference = ReferenceModel(tiny.family, tiny.config(), read_folder(folder))
    expected = reference.generate(ids, types, np.ones_like(ids), None if pixels is None else pixels[0], NUM_NEW)
    unused_id = next(token for token in range(tiny.vocab) if token not in expected["generated_ids"])
    (folder / "config.json").write_text(json.dumps(tiny.config() | {"eos_token_id": unused_id}))
    ours = trace_model(load_model(folder), ids[None], pixels, NUM_NEW)
    assert ours.keys() == expected.keys()
    for key, values in expected.items():
        assert_close(key, ours[key][0], values, REFERENCE_FP32)


@pytest.mark.parametrize("head_dim", [2, 8, 20, 24])
def test_rotation_equals_the_reference(head_dim: int) -> None:
    random = np.random.default_rng(head_dim)
    heads, positions = random.standard_normal((3, 7, head_dim)), np.array([0, 1, 2, 2, 2, 3, 2047])
    inv_freq = 10000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = torch.from_numpy(positions[:, None] * inv_freq)[None]
    ours = rotate(torch.from_numpy(heads)[None], angles.cos(), angles.sin(), RopeSpec(10000.0, head_dim))[0]
    assert_close("rotate", ours, np.array([rope(head, positions, inv_freq) for head in heads]), 1e-6)


@pytest.mark.parametrize(("head_dim", "dims"), [(8, 8), (16, 8), (20, 4), (128, 64)])
@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_pairs_turn_and_the_rest_of_a_head_stays(
    head_dim: int, dims: int, pairing: Literal["half", "adjacent"]
) -> None:
    """As complex numbers; and the order in which graphs hold a head gives the same scores by half-split pairs."""
    random, spec = np.random.default_rng(dims), RopeSpec(10000.0, dims, pairing)
    heads, positions = random.standard_normal((3, 5, head_dim)).astype(np.float32), np.array([0, 1, 2, 2, 900])
    inv_freq = (10000.0 ** -(np.arange(0, dims, 2) / dims)).astype(np.float32)
    angles = torch.from_numpy(positions.astype(np.float32)[:, None] * inv_freq)[None]
    ours = rotate(torch.from_numpy(heads)[None], angles.cos(), angles.sin(), spec)[0].numpy()
    first, second = (list(half) for half in spec.pairs())
    turned = (heads[..., first] + 1j * heads[..., second]) * np.exp(1j * angles[0].numpy())
    expected = heads.copy()
    expected[..., first], expected[..., second] = turned.real, turned.imag
    assert_close("rotate", ours, expected, 1e-6)

    decoder = DecoderSpec(0, 0, 1, 1, head_dim, 0, 0, 1e-6, spec, (), 0)
    layout = HeadLayout(decoder)
    slots = layout.rotary_slots()
    arranged = np.where(slots >= 0, heads[..., slots], np.float32(0))
    table = rope_table(layout.cache_shape(inv_freq, "fp32"), positions)
    half = layout.padded // 2
    a, b = arranged[..., :half], arranged[..., half:]
    in_graph: Floats = np.concatenate((a * table.cos - b * table.sin, b * table.cos + a * table.sin), -1)
    assert_close("in a graph", layout.true_values(in_graph, slots), expected, 1e-5)


def test_rms_norm_rounds_once_after_the_weight() -> None:
    """In half precision the order shows: the usual Llama code rounds before it multiplies by the weight."""
    random = np.random.default_rng(0)
    x, weight = (torch.from_numpy(random.standard_normal(shape)).bfloat16() for shape in ((64, 32), (32,)))
    norm = RmsNorm(32, eps=1e-5).bfloat16()
    norm.weight.data.copy_(weight)
    exact = torch.from_numpy(rms_norm(x.double().numpy(), weight.double().numpy(), 1e-5))
    error = (norm(x).detach().double() - exact).abs() / exact.abs()
    assert float(error.max()) <= 2.0**-8, "one rounding to bf16 is off by at most half of its last bit"


def test_positions_above_256_stay_apart_in_a_bfloat16_model(tmp_path: Path) -> None:
    model = load_model(write_tiny_checkpoint(tmp_path, dtype="bfloat16"), dtype="bfloat16")
    step = model.decoder.step(torch.tensor([[256, 257]]), None, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    angles = np.array([256.0, 257.0])[:, None] * model.decoder.inv_freq.numpy()
    assert_close("cos", step.cos[0], np.cos(angles), 1e-4)
