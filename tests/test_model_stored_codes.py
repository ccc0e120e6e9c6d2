"""Contract tests of checkpoints in GPTQ format that other libraries wrote: what may be missing, and one clear error
that names the tensor for what does not fit. Agreement: codes loaded as a model are the rounded weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gptq_checkpoint import DOWN, Tensors, write_gptq_checkpoint
from tests.tiny_bundle import TEXT_MODEL, only_error_line, run_cli
from tests.tiny_checkpoint import TinyCheckpoint
from vlmdeploy import load_model
from vlmdeploy.errors import WeightsError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.grid import Grid, dequantize, quantize_rtn

TARGET = "decoder.layers.0.language.down.weight"
WITHOUT_GROUPS = [lambda tensors: tensors.pop(f"{DOWN}.g_idx"), lambda tensors: set_part(tensors, "g_idx", [])]


def set_part(tensors: Tensors, part: str, values: Any) -> None:
    """Replace a part of the linear by these values, in its own type if they are a list."""
    old = tensors[f"{DOWN}.{part}"]
    tensors[f"{DOWN}.{part}"] = torch.tensor(values, dtype=old.dtype) if isinstance(values, list) else values


def filled_scales(value: float, dtype: torch.dtype) -> Callable[[Tensors], None]:
    """An edit that gives every group this scale."""
    return lambda tensors: set_part(tensors, "scales", torch.full((6, 64), value, dtype=torch.float64).to(dtype))


def rounded_down_projection(bits: int, group_size: int, **sizes: Any) -> Any:
    """The weight that the codes stand for."""
    tiny = TinyCheckpoint("cogvlm", **TEXT_MODEL | {"layers": 1, "vision_layers": 1} | sizes)
    return dequantize(quantize_rtn(tiny.tensors()[f"{DOWN}.weight"], Grid(bits, group_size)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_load_as_the_weights_they_stand_for(tmp_path: Path, bits: int) -> None:
    model = load_model(write_gptq_checkpoint(tmp_path / "ckpt", bits))
    assert np.array_equal(model.state_dict()[TARGET].numpy(), rounded_down_projection(bits, 16))


@pytest.mark.parametrize("edit", WITHOUT_GROUPS, ids=["missing", "empty"])
@pytest.mark.parametrize("width", [96, 100])
def test_g_idx_may_be_missing_where_groups_are_neighbours(
    tmp_path: Path, width: int, edit: Callable[[Tensors], Any]
) -> None:
    """100 codes of 4 bits end inside a word: the width was then taken for 104, and the model could not be loaded."""
    model = load_model(write_gptq_checkpoint(tmp_path / "ckpt", group_size=-1, edit=edit, mlp=width))
    assert np.array_equal(model.state_dict()[TARGET].numpy(), rounded_down_projection(4, width, mlp=width))


@pytest.mark.parametrize("edit", WITHOUT_GROUPS, ids=["missing", "empty"])
def test_act_order_needs_the_group_of_each_input(tmp_path: Path, edit: Callable[[Tensors], Any]) -> None:
    """Such codes were decoded as if neighbours shared a group: wrong weights, silently."""
    folder = write_gptq_checkpoint(tmp_path / "ckpt", edit=edit, config={"desc_act": True})
    with pytest.raises(WeightsError, match=rf"{DOWN}\.g_idx: missing or empty, but the config says desc_act = true"):
        load_model(folder)


def test_act_order_of_one_group_needs_no_g_idx(tmp_path: Path) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", 4, -1, WITHOUT_GROUPS[0], {"desc_act": True})
    assert np.array_equal(load_model(folder).state_dict()[TARGET].numpy(), rounded_down_projection(4, 96))


@pytest.mark.parametrize(("edit", "message"), [
    (lambda tensors: set_part(tensors, "g_idx", [0] * 100), rf"{DOWN}\.g_idx: 100 entries, expected 96, one for each"),
    (lambda tensors: set_part(tensors, "g_idx", [0] * 90), rf"{DOWN}\.g_idx: 90 entries, expected 96"),
    (lambda tensors: set_part(tensors, "g_idx", torch.zeros(96)), rf'"{DOWN}\.g_idx" is F32, expected I8 or I16 or'),
    (filled_scales(1.0, torch.float8_e4m3fn), rf'"{DOWN}\.scales" is F8_E4M3, expected F16 or BF16 or F32 or F64'),
    (filled_scales(1e300, torch.float64), rf"{DOWN}\.scales: values up to 1e\+300, expected weights that float32"),
    (filled_scales(3e38, torch.float32), rf"{DOWN}\.scales: values up to 3e\+38, expected weights that float32"),
    (lambda tensors: tensors.update({f"{DOWN}.weight": torch.zeros(64, 96)}), rf'linear "{DOWN}" is stored twice'),
])  # fmt: skip
def test_part_that_does_not_fit_is_named(tmp_path: Path, edit: Callable[[Tensors], Any], message: str) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", edit=edit)
    with pytest.raises(WeightsError, match=message):
        load_model(folder)


def test_codes_that_the_config_leaves_out_are_an_error(tmp_path: Path) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", config={"dynamic": {f"-:{DOWN}": {}}})
    with pytest.raises(WeightsError, match=f'"{DOWN}" has codes, but the config says that it is kept in float'):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(TinyCheckpoint().config()))
    with pytest.raises(WeightsError, match=r'qweight" is quantized, but no config says how'):
        load_model(folder)


def test_wrong_part_is_told_before_any_value_is_read(tmp_path: Path) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", edit=lambda tensors: set_part(tensors, "g_idx", [0] * 90))
    assert f"{DOWN}.g_idx: 90 entries" in only_error_line(run_cli("inspect", folder))


def test_wider_scales_are_read(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        folder = write_gptq_checkpoint(tmp_path / str(dtype), edit=filled_scales(0.5, dtype))
        values = set(Checkpoint(folder).parameter(TARGET).flatten().tolist())
        assert values <= {step / 2 for step in range(-8, 8)}
