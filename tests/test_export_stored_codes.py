"""Agreement tests of bundles made from GPTQ checkpoints of other libraries: the graphs hold their codes and pass the
gate. Contract: codes that no graph can hold are refused, and what to do instead is told and works."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gptq_checkpoint import Tensors, write_gptq_checkpoint
from tests.stored_linears import onnx_linears
from tests.tiny_bundle import export
from vlmdeploy.bundle import read_manifest
from vlmdeploy.model.weights import Checkpoint


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
