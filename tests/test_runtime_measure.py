"""Measuring a bundle: the counts are right, every phase is seen, and what cannot be measured is one clear line. Tiny
random models; nothing is asserted about durations. Contract and agreement tests."""

from pathlib import Path

import pytest

from tests.tiny_bundle import export, write_text_checkpoint
from vlmdeploy.errors import DataError
from vlmdeploy.runtime.measure import measure_in_process
from vlmdeploy.runtime.measurement import MeasureOptions


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 bundle that answers."""
    folder = tmp_path_factory.mktemp("measure")
    return export(write_text_checkpoint(folder / "ckpt", seed=5), folder / "bundle", "ort-int4")


@pytest.fixture(autouse=True)
def own_hash_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_process_of_its_own_measures_every_phase(bundle: Path) -> None:
    found = measure_in_process(bundle, MeasureOptions(new_tokens=4, repeats=2, threads=1, prompt="What?"))
    assert set(found.memory.phases) == {"open", "preprocess", "vision", "prefill", "decode"}
    assert all(phase.peak_bytes >= phase.end_bytes > 1 << 20 for phase in found.memory.phases.values())
    assert found.memory.baseline_bytes < found.memory.peak_bytes
    assert (found.first_token.count, found.decode_per_token.count) == (2, 8)


def test_error_of_the_process_is_raised_here(bundle: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: no such file"):
        measure_in_process(bundle, MeasureOptions(image="nowhere.png", threads=1))
