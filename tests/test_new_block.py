"""Contract: a new connector step is three files of one name, a new family one file, and nothing else changes.

The files are in tests/toy_package. Here they join the package; everything from the checkpoint to the answer runs.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vlmdeploy.families
from tests.calibration_data import FAST, write_calibration_data
from tests.tiny_bundle import TEXT_MODEL, byte_tokenizer, only_json_document, picture, run_cli
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.families import all_families
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.quantization_report import read_report
from vlmdeploy.spec.matrices import matrices

TOYS = Path(__file__).parent / "toy_package"


@pytest.fixture(autouse=True)
def toy_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family's file is found where families are; the step's files find each other by their names."""
    monkeypatch.setattr(vlmdeploy.families, "__path__", [*vlmdeploy.families.__path__, str(TOYS / "families")])
    yield
    sys.modules.pop("vlmdeploy.families.toyvlm", None)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    tiny = TinyCheckpoint("cogvlm", **TEXT_MODEL | {"vocab": 264})
    random = np.random.default_rng(5)
    hidden = tiny.hidden
    own = {
        "model.vision.smooth.weight": random.standard_normal((hidden, hidden)).astype(np.float32) / hidden**0.5,
        "model.vision.smooth.bias": random.standard_normal(hidden).astype(np.float32),
        "model.vision.norm.weight": 1 + random.standard_normal(tiny.vision_width).astype(np.float32) / 4,
        "model.vision.norm.bias": random.standard_normal(tiny.vision_width).astype(np.float32),
    }
    folder = write_checkpoint(
        tmp_path / "ckpt", tiny.config() | {"architectures": ["ToyVLM"]}, tiny.tensors() | own, dtype="float32"
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_the_family_and_the_step_are_known(ckpt: Path) -> None:
    assert "toyvlm" in [family.NAME for family in all_families()]
    checkpoint = Checkpoint(ckpt)
    assert [step.name for step in checkpoint.spec.connector.steps][-3:] == ["smooth", "boundary", "scale"]
    assert "connector.smooth.linear.weight" in {matrix.target for matrix in matrices(checkpoint.spec)}


@pytest.mark.parametrize("target", ["ort-int4", "trt-int4"])
def test_from_checkpoint_to_answer(ckpt: Path, tmp_path: Path, target: str) -> None:
    data = write_calibration_data(tmp_path / "data", num_pictures=16, num_texts=24)
    quantized, bundle = tmp_path / "quantized", tmp_path / "bundle"
    parts = ("--vision", "int4", "--connector", "int4", "--positive-scales") if target.startswith("trt") else ()
    done = run_cli("quantize", "--ckpt", ckpt, "--calib", data, "--out", quantized, *parts, *FAST)
    assert done.exit_code == 0, done.stderr
    reports = {linear["name"]: linear for linear in read_report(quantized)["linears"]}
    assert reports["connector.smooth.linear.weight"]["method"] == "gptq"

    done = run_cli("export", "--ckpt", quantized, "--target", target, "--out", bundle, "--group", 16, "--threads", 1)
    assert done.exit_code == 0, done.stderr
    manifest = read_manifest(bundle)
    assert manifest.family == "toyvlm" and manifest.verification is not None and manifest.verification.passed
    assert "connector.smooth" in {stage.stage for stage in manifest.verification.stages}

    picture(3, (8, 8)).save(tmp_path / "a.png")
    answer = only_json_document(
        run_cli("run", bundle, "--image", tmp_path / "a.png", "--prompt", "What?", "--max-new-tokens", 4,
                "--provider", "cpu", "--json")
    )  # fmt: skip
    assert answer["new_tokens"] >= 1 and answer["prompt_tokens"] > Checkpoint(ckpt).spec.tokens.rows_per_image


def test_the_model_can_be_planned(ckpt: Path) -> None:
    plan = only_json_document(run_cli("plan", "--ckpt", ckpt, "--device", "orin-nx-16", "--text-tokens", 8, "--json"))
    assert plan["verdict"] == "fits"
