"""The script that asks a GPU everything, on the fake device: its questions have answers, and these are consistent."""

import sys
from pathlib import Path

import pytest

from tests.fake_tensorrt import FakeDevice, fake_library, write_fake_engines
from tests.tiny_bundle import ROOT, edit_manifest, export, run_process, write_text_checkpoint
from vlmdeploy.export.engines.parts import EnginePart
from vlmdeploy.runtime.backends.trt import TrtBackend
from vlmdeploy.runtime.integrity import BundleFiles

sys.path.append(str(ROOT / "benchmarks"))
import gpu_check

LAYERS = 2


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = export(write_text_checkpoint(tmp_path / "ckpt", layers=LAYERS), tmp_path / "bundle", "trt-int4")
    edit_manifest(folder, target="rtx-int4")
    layers = {"vision": (0, 0), "decoder_text": (0, LAYERS), "decoder_vision": (0, LAYERS)}
    write_fake_engines(folder, [EnginePart(name, 0, span, 0, True) for name, span in layers.items()], 16, 4)
    return folder


def open_fake(files: BundleFiles, residency: str) -> TrtBackend:
    device = FakeDevice()
    return TrtBackend(files, residency, fake_library(device), device)  # type: ignore[arg-type]


def test_every_question_is_answered(bundle: Path) -> None:
    answers = gpu_check.check(bundle, 6, 1e12, open_fake)
    assert set(answers["answers"]) == {"picture", "second_turn", "text"}
    for case in answers["answers"].values():
        assert case["logits_error"] < 2e-3 and case["equal_tokens"] == case["tokens"], "the same graphs on both sides"
    speed = answers["speed"]
    assert speed["of_bandwidth"] == pytest.approx(speed["weight_bytes_per_s"] / 1e12)
    assert set(answers["memory_bytes"]) == {"vision", "after_prefill", "decode"}
    assert all(value > 0 for value in answers["second_start"].values())


def test_without_a_gpu_it_is_one_line(bundle: Path) -> None:
    done = run_process("benchmarks/gpu_check.py", bundle)
    assert done.returncode == 1 and done.stdout == ""
    assert "needs a CUDA GPU" in done.stderr.splitlines()[-1]
