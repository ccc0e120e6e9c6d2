"""Agreement tests of the list of matrices: what it says of a matrix is what the PyTorch reference does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.calibration_data import random_samples
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint
from vlmdeploy import load_model
from vlmdeploy.calib.calibration_set import read_pixels
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.spec.matrices import Matrix, MatrixPlace, embedding, matrices, places


@pytest.fixture(params=["cogvlm", "cogvlm2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> VisionLanguageModel:
    tiny = TinyCheckpoint(request.param)
    return load_model(write_checkpoint(tmp_path / "ckpt", tiny.config(), tiny.tensors()))


def test_every_matrix_has_the_shape_of_its_parameter(model: VisionLanguageModel) -> None:
    parameters = dict(model.named_parameters())
    for matrix in (*matrices(model.spec), embedding(model.spec)):
        assert parameters[matrix.target].flatten(1).shape == (matrix.out_width, matrix.in_width), matrix.target


def test_every_matrix_is_fed_by_what_it_says(model: VisionLanguageModel, tmp_path: Path) -> None:
    sample, *_ = random_samples(model.spec, TinyCheckpoint(model.spec.family), tmp_path / "data", [True])
    assert sample.image is not None
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # the first input and the output of every module

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, output: seen.__setitem__(name, (inputs[0], output)))

    for name, module in model.named_modules():
        note(name, module)
    with torch.no_grad():
        model(torch.from_numpy(sample.ids)[None], torch.from_numpy(read_pixels(sample.image, model.spec))[None])
    for matrix in matrices(model.spec):
        if matrix.target.removesuffix(".weight") in seen:
            entered = seen[matrix.target.removesuffix(".weight")][0]
            assert torch.equal(entered, rows_for(matrix, fed(matrix, seen), sample.vision_mask)), matrix.target


def fed(matrix: Matrix, seen: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """What the module that `fed_by` names gives out; what enters the layer or step where it names none."""
    if matrix.part == "lm_head":
        return seen[matrix.fed_by][1]
    owner = matrix.part if matrix.layer is None else f"{matrix.part}.layers.{matrix.layer}"
    if matrix.part == "connector":
        step = matrix.name.partition(".")[0]
        owner = f"{owner}.{step}"
        if matrix.fed_by == "arrange":  # inside the product itself
            return seen[owner][0]
    if matrix.fed_by == "middle":
        return seen[owner][0] + seen[f"{owner}.attention_norm"][1]
    return seen[owner][0] if not matrix.fed_by else seen[f"{owner}.{matrix.fed_by}"][1]


def rows_for(matrix: Matrix, rows: Tensor, vision_mask: np.ndarray) -> Tensor:
    """Those of its expert."""
    if matrix.expert is None:
        return rows
    own = torch.from_numpy(vision_mask if matrix.expert == "vision" else ~vision_mask)
    return rows[0, own]


def test_names_are_placed_without_a_geometry(model: VisionLanguageModel) -> None:
    every = {matrix.target: matrix for matrix in matrices(model.spec)}
    found = places(every)
    for target, matrix in every.items():
        assert found[target] == MatrixPlace(matrix.part, matrix.layer, matrix.expert, matrix.name), target
        assert found[target].target == target
    assert found["decoder.layers.1.vision.qkv.weight"].kind == "decoder.layers.*.vision.qkv"
