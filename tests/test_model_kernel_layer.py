"""Agreement tests: a quantized checkpoint that keeps its codes and runs through the routed kernels, here in Triton's
interpreter, is the model with dequantized weights; and what such kernels refuse names the linear."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gptq_checkpoint import DOWN, Tensors, gptq_tensors, write_gptq_checkpoint
from tests.tiny_bundle import TEXT_MODEL
from tests.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint
from vlmdeploy import load_model
from vlmdeploy.errors import BackendError, ConfigError, QuantizationError, VlmdeployError
from vlmdeploy.kernels.launch import partition
from vlmdeploy.model import kernel_layer
from vlmdeploy.model.vlm import VisionLanguageModel

SIZES: dict[str, Any] = {"group_size": 32, "layers": 2}
# Of the largest logit: float16 activations, rounded a dozen times per layer, against float32.
TOLERANCE = {"float16": 0.005, "bfloat16": 0.04}
both_families = pytest.mark.parametrize("family", ["cogvlm", "cogvlm2"])


def both_models(folder: Path, dtype: str = "float16", **sizes: Any) -> tuple[VisionLanguageModel, VisionLanguageModel]:
    """A checkpoint's model with float32 weights, and the one that keeps codes."""
    write_gptq_checkpoint(folder, **SIZES | sizes)
    return load_model(folder), load_model(folder, dtype, quantized="kernel")


def mixed_batch(model: VisionLanguageModel) -> dict[str, Tensor]:
    """A row with a picture beside one without, padded at the end."""
    tokens = model.spec.tokens
    picture = [tokens.placeholder_id] * tokens.rows_per_image
    rows = [[tokens.bos_id, *picture, 40, 41, 42], [tokens.bos_id, 50, 51]]
    width = max(map(len, rows))
    image_px = model.spec.vision.image_px
    return {
        "input_ids": torch.tensor([row + [tokens.pad_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "images": torch.randn((1, 3, image_px, image_px), generator=torch.Generator().manual_seed(0)),
    }


def assert_close(found: Tensor, expected: Tensor, dtype: str) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"largest difference {error:.3g} of the largest logit"


@both_families
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_of_a_mixed_batch_are_those_of_dequantized_weights(tmp_path: Path, family: str, dtype: str) -> None:
    reference, routed = both_models(tmp_path / "ckpt", dtype, family=family)
    batch = mixed_batch(reference)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert_close(routed(**batch)[real], reference(**batch)[real], dtype)


@pytest.mark.parametrize("bits", [2, 3])
def test_narrower_codes_are_held_in_four_bits(tmp_path: Path, bits: int) -> None:
    reference, routed = both_models(tmp_path / "ckpt", bits=bits)
    batch = mixed_batch(reference)
    with torch.no_grad():
        assert_close(routed(**batch)[0], reference(**batch)[0], "float16")


def test_vision_weights_matter_to_the_rows_of_a_picture_only(tmp_path: Path) -> None:
    reference, routed = both_models(tmp_path / "ckpt")
    batch = mixed_batch(reference)
    before = routed(**batch)
    for layer in routed.decoder.layers:
        layer.linears["qkv"].codes[1] = 0  # type: ignore[index, union-attr]
    after = routed(**batch)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1, :3], before[1, :3])


def test_decoding_token_by_token_gives_what_a_whole_pass_does(tmp_path: Path) -> None:
    _, routed = both_models(tmp_path / "ckpt")
    prompt = torch.tensor([[routed.spec.tokens.bos_id, 50, 51, 52]])
    new_ids = routed.generate(prompt, max_new_tokens=4)
    whole = routed(torch.cat((prompt, new_ids[:, :-1]), 1))[0, 3:]
    chosen = whole.gather(1, new_ids[0, :, None])[:, 0]
    assert (whole.max(1).values - chosen < 0.01 * whole.abs().max()).all()


def test_route_is_made_once_per_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, routed = both_models(tmp_path / "ckpt")
    made: list[int] = []

    def counted(vision: Tensor, device: torch.device) -> Any:
        made.append(int(vision.sum()))
        return partition(vision, device)

    monkeypatch.setattr(kernel_layer, "partition", counted)
    routed(**mixed_batch(reference))
    routed(torch.tensor([[1, 2, 3]]))
    assert made == [reference.spec.tokens.rows_per_image - 1, 0]


def test_no_float_copy_of_the_decoder_linears_is_kept(tmp_path: Path) -> None:
    _, routed = both_models(tmp_path / "ckpt", mlp=96)
    spec = routed.spec.decoder
    widths = {"qkv": (64, spec.qkv_width), "dense": (64, 64), "gate_up": (64, 192), "down": (96, 64)}
    codes_and_scales = sum(
        2 * (rows * width // 2 + width // 32 * rows * 2 + rows * 4) for width, rows in widths.values()
    )
    norms = 2 * spec.hidden * 2
    layers = routed.decoder.layers
    held = sum(tensor.nbytes for tensor in (*layers.parameters(), *layers.buffers()))
    assert held == spec.num_layers * (codes_and_scales + norms)
    assert not any(parameter.requires_grad for parameter in routed.parameters())


def test_casting_the_model_afterwards_is_refused(tmp_path: Path) -> None:
    _, routed = both_models(tmp_path / "ckpt", layers=1)
    with pytest.raises(BackendError, match=r"codes, scales and bias are .* was the model cast\?"):
        routed.to(torch.bfloat16)(torch.tensor([[1, 2, 3]]))


def float_down(tensors: Tensors) -> None:
    """One linear is kept in float."""
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"{DOWN}.{part}")
    tiny = TinyCheckpoint("cogvlm", **TEXT_MODEL | {"layers": 1, "vision_layers": 1})
    tensors[f"{DOWN}.weight"] = torch.from_numpy(tiny.tensors()[f"{DOWN}.weight"])


def asymmetric_down(tensors: Tensors) -> None:
    tensors[f"{DOWN}.qzeros"] = torch.full_like(tensors[f"{DOWN}.qzeros"], 0x44444444)


def wider_down(tensors: Tensors) -> None:
    """One linear has codes of 8 bits, as a mixed checkpoint may."""
    tiny = TinyCheckpoint("cogvlm", **TEXT_MODEL | {"layers": 1, "vision_layers": 1})
    tensors |= gptq_tensors(DOWN, tiny.tensors()[f"{DOWN}.weight"], 8, 32)


TARGET = r"decoder\.layers\.0\.language\.down\.weight"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, r"decoder\.layers\.0\.language\.qkv\.weight: symmetric 8-bit codes; .* \(4 such linears\)"),
        ({"group_size": 16}, r"qkv\.weight: groups of 16; .* in groups of 32, 64 or 128 \(4 such linears\)"),
        ({"group_size": -1, "mlp": 192}, r"down\.weight: groups of 192; .* \(1 such linears\)"),
        (
            {"edit": float_down, "config": {"dynamic": {f"-:{DOWN}": {}}}},
            rf"{TARGET} is not stored as codes of one grid",
        ),
        ({"edit": wider_down, "config": {"dynamic": {DOWN: {"bits": 8}}}}, rf"{TARGET}: symmetric 8-bit codes"),
        ({"edit": asymmetric_down}, rf"{TARGET}: asymmetric 4-bit codes"),
    ],
)
def test_linear_that_the_kernels_do_not_take_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", **{"group_size": 32} | options)
    with pytest.raises(QuantizationError, match=message):
        load_model(folder, "float16", quantized="kernel")


@pytest.mark.parametrize(
    ("write", "dtype", "quantized", "error", "message"),
    [
        (write_gptq_checkpoint, "float32", "kernel", ConfigError, r"dtype torch\.float32: .* float16 or bfloat16"),
        (
            write_gptq_checkpoint,
            "float16",
            "kernels",
            ConfigError,
            'quantized \'kernels\': expected "dequantize" or "kernel"',
        ),
        (write_tiny_checkpoint, "float16", "kernel", QuantizationError, "no linear is stored as codes"),
    ],
)
def test_what_cannot_keep_codes_is_refused(
    tmp_path: Path, write: Callable[[Path], Any], dtype: str, quantized: Any, error: type[VlmdeployError], message: str
) -> None:
    folder = tmp_path / "ckpt"
    write(folder)
    with pytest.raises(error, match=message):
        load_model(folder, dtype, quantized=quantized)


def test_without_a_gpu_nothing_is_loaded(tmp_path: Path) -> None:
    folder = write_gptq_checkpoint(tmp_path / "ckpt", group_size=32)
    code = f"import vlmdeploy\nvlmdeploy.load_model({str(folder)!r}, 'float16', quantized='kernel')"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "BackendError: the routed kernels need a CUDA device, not cpu" in result.stderr.splitlines()[-1]
