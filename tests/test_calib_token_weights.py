"""Contract tests of the token weights of `--quality best`: they follow the gradients of the whole model, no weight is
lost between the experts, and a machine without room for the backward pass is told beforehand."""

import re
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.calibration_data import (
    quantize,
    random_samples,
    refusal,
    run_quantize,
    write_calibration_checkpoint,
    write_calibration_data,
)
from tests.comparison import SAME_ROW_FP32, assert_close
from tests.stored_linears import gptq_linears
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint
from vlmdeploy.calib import token_weights
from vlmdeploy.calib.activations import Pool
from vlmdeploy.calib.calibration_set import CalibrationSample, pictures_of, prompt_tokens, read_pixels
from vlmdeploy.calib.flow import Flow
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.token_weights import BACKWARD, SEED, TokenWeights
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.load import load_model
from vlmdeploy.spec.matrices import decoder_matrices

Usage = namedtuple("Usage", "total used free")
MODELS = {"cogvlm": TinyCheckpoint("cogvlm", seed=1), "cogvlm2": TinyCheckpoint("cogvlm2", kv_heads=2, seed=2)}


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest) -> TinyCheckpoint:
    return MODELS[request.param]


def measured(checkpoint: Checkpoint, samples: tuple[CalibrationSample, ...], folder: Path) -> dict[str, Tensor]:
    """The weights of every decoder linear, by running all units; rows are kept as a run keeps them on disk."""
    rows: dict[str, Tensor] = {}
    tokens, pool = prompt_tokens(samples), Pool(folder, 1 << 30)

    def load(unit: str) -> Flow:
        flow = Flow.zeros(pool, tokens, checkpoint.spec.decoder.hidden, 1)
        flow.write(np.arange(tokens.count), (rows[unit],))
        return flow

    stage = TokenWeights(checkpoint, samples, pictures_of(samples), tokens, pool, Processes(), load)
    flow: Flow | None = None
    found: dict[str, Tensor] = {}
    for unit in stage.units:
        flow, weights = stage.run(unit, flow)
        assert set(weights) == targets_of(checkpoint, unit)
        found |= weights
        rows = {name: rows[name] for name in stage.kept(unit)} | {unit: flow.states[0].read(np.arange(tokens.count))}
    assert list(rows) == [unit] and unit == f"{BACKWARD}.decoder.layers.0"
    return found


def targets_of(checkpoint: Checkpoint, unit: str) -> set[str]:
    layer = unit.removeprefix(f"{BACKWARD}.decoder.layers.")
    if not layer.isdigit():
        return set()
    return {linear.target for linear in decoder_matrices(checkpoint.spec.decoder, int(layer))}


def keeping(name: str, outputs: dict[str, Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    """A hook that keeps a module's output and its gradient."""

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    return keep


def expected(checkpoint: Checkpoint, samples: tuple[CalibrationSample, ...]) -> dict[str, Tensor]:
    """Sizes of the gradients at the outputs of every decoder linear, by one backward pass through the whole model."""
    model, tokens = load_model(checkpoint.folder), prompt_tokens(samples)
    sizes: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(SEED)
    for place, sample in enumerate(samples):
        outputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(keeping(f"{name}.weight", outputs))
            for name, module in model.named_modules()
            if name.startswith("decoder.layers.") and isinstance(module, nn.Linear)
        ]
        pixels = None if sample.image is None else torch.from_numpy(read_pixels(sample.image, checkpoint.spec))[None]
        logits = model(torch.from_numpy(sample.ids)[None], pixels)[0, sample.answer_start - 1 :]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)
        (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
        for handle in handles:
            handle.remove()
        for name, output in outputs.items():
            own = torch.from_numpy(tokens.rows(place)[sample.vision_mask == (".vision." in name)])
            gradient = torch.zeros(()) if output.grad is None else output.grad.flatten(0, -2).norm(dim=1)
            sizes.setdefault(name, torch.zeros(tokens.count))[own] = gradient
    return sizes


def test_weights_are_the_sizes_of_the_models_gradients(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "ckpt", tiny.config(), tiny.tensors()))
    samples = random_samples(checkpoint.spec, tiny, tmp_path / "data", [False, True, True, False], held_out=(1,))
    with torch.no_grad():
        found = measured(checkpoint, samples, tmp_path / "spill")
    is_vision = torch.from_numpy(np.concatenate([sample.vision_mask for sample in samples]))
    for name, sizes in expected(checkpoint, samples).items():
        if not sizes.any():  # the image rows of the last layer: nothing reads them
            assert found[name].eq(1).all()
            continue
        own = is_vision == (".vision." in name)
        assert_close(name, found[name][own], (0.2 + 0.8 * sizes / sizes[sizes > 0].mean())[own], SAME_ROW_FP32)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration_checkpoint(tmp_path_factory.mktemp("weights") / "ckpt", vision_layers=1, seed=8)


@pytest.fixture(scope="module")
def data(ckpt: Path) -> Path:
    return write_calibration_data(ckpt.parent / "data", num_pictures=5, num_texts=3)


def test_time_and_disk_are_told_before_the_first_linear(ckpt: Path, data: Path, tmp_path: Path) -> None:
    best, high = (run_quantize(ckpt, data, tmp_path / name, "--quality", name) for name in ("best", "high"))
    assert best.exit_code == high.exit_code == 0
    line = r"token weights: about 0 min and 0\.8 MB of disk before the first linear\n"
    assert re.match(line, best.stderr) and "token weights" not in high.stderr


def test_weights_change_the_codes(ckpt: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = gptq_linears(quantize(ckpt, data, tmp_path / "weighed", "--quality", "best"))
    monkeypatch.setattr(TokenWeights, "_weights", lambda self, sizes: torch.ones_like(sizes))
    alike = gptq_linears(quantize(ckpt, data, tmp_path / "alike", "--quality", "best"))
    changed = {name for name in weighed if not np.array_equal(weighed[name][0], alike[name][0])}
    assert {"model.layers.0.mlp.language_mlp.down_proj", "model.layers.0.mlp.vision_mlp.down_proj"} <= changed
    assert not any(name.startswith("model.vision.") for name in changed)


def test_machine_without_room_is_refused_before_any_work(
    ckpt: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_weights, "available_bytes", lambda: 1 << 30)
    error = refusal(ckpt, data, tmp_path / "out", "--quality", "best", "--max-memory", "1.1GB")
    assert "the backward pass takes about 1.1 GB of memory, but 1.1 GB are available; use --quality high" in error
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(1, 0, 1))
    error = refusal(ckpt, data, tmp_path / "out", "--quality", "best")
    assert f"{tmp_path / 'out'}.partial: --quality best stores the rows" in error and "1 bytes are free" in error
    assert not (tmp_path / "out").exists()
