"""Agreement tests of bundles made from GPTQ checkpoints of other libraries: the graphs hold their codes and pass the
gate. Contract: codes that no graph can hold are refused, and what to do instead is told and works."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gptq_checkpoint import DOWN, Tensors, write_gptq_checkpoint
from tests.stored_linears import onnx_linears
from tests.tiny_bundle import export, only_error_line, run_cli
from vlmdeploy.bundle import read_manifest
from vlmdeploy.model.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draw_zero_points(tensors: Tensors) -> None:
    """Any words at all: every code is a zero point."""
    for name in tensors:
        if name.endswith(".qzeros"):
            shape = tuple(tensors[name].shape)
            tensors[name] = torch.randint(-(2**31), 2**31, shape, generator=torch.manual_seed(0)).int()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_two_bit_codes_are_exported_as_they_are(tmp_path: Path, group_size: int, symmetric: bool) -> None:
    """They could be loaded and inspected, but export ended with KeyError: 'int2'."""
    edit = (lambda tensors: None) if symmetric else draw_zero_points
    ckpt = write_gptq_checkpoint(tmp_path / "ckpt", 2, group_size, edit, {"sym": symmetric})
    bundle = export(ckpt, tmp_path / "bundle", "ort-int4")
    assert read_manifest(bundle).precision["decoder"] == "int2"
    exported, checkpoint = onnx_linears(bundle), Checkpoint(ckpt)
    assert len(exported) == 5, "of the last layer's vision expert only keys and values are needed"
    for target, (steps, scales) in exported.items():
        weights = checkpoint.parameter(target).numpy()[-len(steps) :]
        assert np.array_equal(steps * scales, weights), target


def reverse_groups(tensors: Tensors) -> None:
    """As act-order leaves them."""
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"].flip(0)


def widen_scales(tensors: Tensors) -> None:
    """To values that fp16 cannot hold."""
    tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"].float() * (1 + 2**-20)


@pytest.mark.parametrize(("edit", "group_size", "message"), [
    (reverse_groups, 16, f"CKPT: {DOWN}: dynamic groups"), (widen_scales, 16, f"CKPT: {DOWN}: the scales are not fp16"),
    (lambda tensors: None, 8, "groups of 8 are not multiples of a MatMulNBits block"),
])  # fmt: skip
def test_codes_that_no_graph_can_hold_are_exported_as_floats(
    tmp_path: Path, edit: Callable[[Tensors], None], group_size: int, message: str
) -> None:
    """The message told neither folder nor linear, and "dequantize them instead" was no option of any command."""
    ckpt = write_gptq_checkpoint(tmp_path / "ckpt", group_size=group_size, edit=edit)
    command = ("export", "--ckpt", ckpt, "--out", tmp_path / "bundle", "--threads", 1)
    error = only_error_line(run_cli(*command, "--target", "ort-int4"))
    assert '"decoder.layers.0.' in error and message.replace("CKPT", str(ckpt)) in error
    assert "keep that part in fp32 with --target ort-fp32" in error
    assert run_cli(*command, "--target", "ort-fp32").exit_code == 0
