"""The TensorRT backend on a fake device: buffers, profiles, pieces, captured graphs and residency change no answer.

The plans run the bundle's graphs in ONNX Runtime over "device" memory, so answers must equal those of the same graphs
there; what a real engine computes is not tested here.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fake_tensorrt import SCRATCH, FakeDevice, open_fake, write_fake_engines
from tests.tiny_bundle import (
    edit_manifest,
    export,
    flip_byte,
    only_error_line,
    run_cli,
    sign_again,
    write_text_checkpoint,
)
from tests.tiny_checkpoint import TinyCheckpoint
from vlmdeploy.bundle import hash_file, read_manifest
from vlmdeploy.errors import BackendError
from vlmdeploy.export.engines.parts import EnginePart
from vlmdeploy.runtime.backends.lanes import Call
from vlmdeploy.runtime.backends.ort import OrtBackend
from vlmdeploy.runtime.backends.trt import TrtBackend, buffer_bytes
from vlmdeploy.runtime.generate import pieces_of
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.session import Session

CHUNK_ROWS, LOGIT_ROWS = 7, 3
LAYERS = 6


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified trt-int4 bundle without engines. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("trt")
    return export(write_text_checkpoint(folder / "ckpt", seed=5, layers=LAYERS), folder / "bundle", "trt-int4")


def whole(graph: str) -> EnginePart:
    return EnginePart(graph, 0, (0, 0) if graph == "vision" else (0, LAYERS), 0, is_whole=True)


def decoder_in_parts(graph: str) -> list[EnginePart]:
    edges = [(0, 1), (1, 3), (3, 5), (5, 6)] if graph == "decoder_text" else [(0, 2), (2, 4), (4, 6)]
    return [EnginePart(graph, index, layers, 0, is_whole=False) for index, layers in enumerate(edges)]


PARTS = {
    "whole": [whole("vision"), whole("decoder_text"), whole("decoder_vision")],
    "cut": [whole("vision"), *decoder_in_parts("decoder_text"), *decoder_in_parts("decoder_vision")],
}


@pytest.fixture
def rtx(exported: Path, tmp_path: Path) -> Path:
    """The bundle for TensorRT-RTX, with fake plans of whole graphs."""
    return with_engines(exported, tmp_path / "bundle", "whole")


def with_engines(exported: Path, folder: Path, parts: str) -> Path:
    shutil.copytree(exported, folder)
    edit_manifest(folder, target="rtx-int4")
    write_fake_engines(folder, PARTS[parts], CHUNK_ROWS, LOGIT_ROWS)
    return folder


def reference(folder: Path) -> Session:
    files = check_bundle(folder)
    return Session(files, OrtBackend(files, 1))


def questions() -> list[tuple[np.ndarray, np.ndarray | None]]:
    """With a picture and without, short and long."""
    tiny = TinyCheckpoint("cogvlm", vocab=259)
    picture = tiny.pixels()
    with_picture = [tiny.prompt(text, True) for text in ([5], list(range(30, 60)))]
    without = [[1, 5], [1, *range(70, 95)]]
    return [(np.array(ids), picture) for ids in with_picture] + [(np.array(ids), None) for ids in without]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("residency", ["all", "phase"])
def test_answers_are_those_of_the_graphs(exported: Path, tmp_path: Path, parts: str, residency: str) -> None:
    folder = with_engines(exported, tmp_path / "bundle", parts)
    session, _ = open_fake(folder, residency)
    expected = reference(exported)
    for ids, pixels in questions() + questions()[::-1]:  # pictures after texts too: engines come back
        assert np.array_equal(session.generate_ids(ids, pixels, 9), expected.generate_ids(ids, pixels, 9))
        found, wanted = session.logits(ids, pixels), expected.logits(ids, pixels)
        computed = ~np.isnan(wanted).all(1)
        assert np.array_equal(computed, ~np.isnan(found).all(1))
        assert np.allclose(found[computed], wanted[computed], rtol=0, atol=2e-3 * np.abs(wanted[computed]).max())


def test_token_is_one_launch_of_a_graph_captured_once(rtx: Path) -> None:
    session, device = open_fake(rtx)
    for _ in range(2):
        device.log.clear()
        assert len(session.generate_ids(np.array([1, 5, 6]), max_new_tokens=6)) == 6
        runs = [entry for entry in device.log if entry in ("capture", "launch")]
        captures = runs.count("capture")
        assert runs == ["capture"] * captures + ["launch"] * (5 - captures)
    assert "capture" not in device.log, "the second prompt uses the graph of the first"


def test_graph_is_captured_anew_when_working_memory_moves(rtx: Path) -> None:
    """The encoder needs more than the decoder that was captured before it was loaded."""
    session, device = open_fake(rtx)
    expected = reference(rtx)
    for ids, pixels in (questions()[2], questions()[0], questions()[2]):
        assert np.array_equal(session.generate_ids(ids, pixels, 4), expected.generate_ids(ids, pixels, 4))
    events = [entry for entry in device.log if entry in ("capture", "discard")]
    assert events == ["capture", "discard", "capture"]


def test_prompt_and_token_use_their_own_profiles(rtx: Path) -> None:
    session, device = open_fake(rtx)
    session.generate_ids(np.array([1, *range(40, 60)]), max_new_tokens=3)
    runs = [entry for entry in device.log if "[" in entry]
    assert runs == ["decoder_text[0]"] * 3 + ["decoder_text[1]"] * 2, "21 rows in calls of 7, then token by token"


def test_phase_residency_unloads_what_only_a_prompt_needs(rtx: Path) -> None:
    session, device = open_fake(rtx, "phase")
    ids, pixels = questions()[0]
    session.generate_ids(ids, pixels, 2)
    session.generate_ids(ids, pixels, 2)
    loads = [entry.removeprefix("load ") for entry in device.log if entry.startswith("load")]
    assert loads == ["vision", "decoder_text", "decoder_vision", "decoder_vision"], "the picture's rows are kept"


def test_second_picture_is_encoded_with_nothing_else_resident(rtx: Path) -> None:
    """The encoder beside the text decoder would be more than the memory check counts with."""
    session, _ = open_fake(rtx, "phase")
    backend = session.backend
    assert isinstance(backend, TrtBackend)
    ids, pixels = questions()[0]
    session.generate_ids(ids, pixels, 2)
    resident: list[set[str]] = []
    run = backend._run

    def noted(*arguments: Any) -> None:
        run(*arguments)
        resident.append(set(backend._engines))

    backend._run = noted  # type: ignore[assignment, method-assign]
    assert pixels is not None
    backend.encode_images(pixels + 1)
    assert (resident, backend._engines) == ([{"vision"}], {}), "and the encoder goes with its last picture"


def test_closed_session_leaves_nothing_on_the_device(rtx: Path) -> None:
    session, device = open_fake(rtx)
    with session:
        session.generate_ids(*questions()[0], 4)
        assert device.memory
    assert device.memory == {} and device.log[-1] == "close"


def test_engine_that_cannot_be_captured_gives_the_same_answer(
    rtx: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = open_fake(rtx)[0].generate_ids(*questions()[1], 8)
    monkeypatch.setattr("tests.fake_tensorrt.FakeEngine.is_capturable", False)
    session, device = open_fake(rtx)
    assert np.array_equal(session.generate_ids(*questions()[1], 8), expected)
    assert "launch" not in device.log and caplog.text.count("cannot be captured") == 1


@pytest.mark.parametrize(("method", "answer", "message"), [
    ("get_tensor_location", "host", "expects .* in host memory"),
    ("get_aliased_input_tensor", None, r"does not write present_key\.0 in place"),
])  # fmt: skip
def test_engine_of_another_make_is_refused(
    rtx: Path, monkeypatch: pytest.MonkeyPatch, method: str, answer: str | None, message: str
) -> None:
    monkeypatch.setattr(f"tests.fake_tensorrt.FakeEngine.{method}", lambda engine, name: answer)
    session, _ = open_fake(rtx)
    with pytest.raises(BackendError, match=message):
        session.generate_ids(np.array([1, 5]), max_new_tokens=1)


def test_buffers_are_allocated_once_and_as_planned(rtx: Path) -> None:
    session, device = open_fake(rtx)
    planned = sum(buffer_bytes(read_manifest(rtx), CHUNK_ROWS, LOGIT_ROWS).values())
    ids, pixels = questions()[1]
    session.generate_ids(ids, pixels, 4)
    used = device.used_bytes()
    assert used == planned + max(SCRATCH.values())
    session.generate_ids(ids, pixels, 20)
    assert device.used_bytes() == used


def test_cache_of_an_older_prompt_is_refused(rtx: Path) -> None:
    session, _ = open_fake(rtx)
    backend = session.backend
    old = backend.new_lanes(1, 8)
    backend.new_lanes(1, 8)
    row = session.embedding[np.array([1])]
    with pytest.raises(BackendError, match="given up when a new prompt was begun"):
        backend.run(Call.of_one(row, np.zeros(1, np.bool_), np.array([0])), old)
    with pytest.raises(BackendError, match="given up when a new prompt was begun"):
        backend.decode(row, np.ones(1, np.bool_), old)


def test_finished_kernels_are_kept_in_the_users_cache(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(path.name for path in rtx.rglob("*"))
    session, _ = open_fake(rtx)
    session.generate_ids(*questions()[0], 2)
    session.close()
    digest = hash_file(rtx / "engines/decoder_text.engine").sha256
    kept = tmp_path / "cache/vlmdeploy/rtx" / f"{digest}-Fake-RTX-4060.cache"
    assert kept.read_text() == "decoder_text[0] decoder_text[1]", "of prompts and of tokens, after one question"
    assert sorted(path.name for path in rtx.rglob("*")) == before, "a bundle never changes"


def test_tensorrt_runs_without_what_only_rtx_has(rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engines come with all their kernels, its configuration has no cache of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engines = read_manifest(rtx).engines
    edit_manifest(
        rtx, engines={name: replace(info, library="tensorrt", version="11.4.1") for name, info in engines.items()}
    )
    (session, device), (ids, pixels) = open_fake(rtx, "phase", "tensorrt", "11.4.1"), questions()[0]
    assert np.array_equal(session.generate_ids(ids, pixels, 3), reference(rtx).generate_ids(ids, pixels, 3))
    assert not (tmp_path / "cache").exists()
    assert "launch" in device.log, "a captured graph, though TensorRT cannot be asked whether it may be one"


def test_unwritable_cache_is_a_warning(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    session, _ = open_fake(rtx)
    assert len(session.generate_ids(*questions()[0], 2)) == 2
    session.close()
    assert "kernels are compiled at every start" in caplog.text


@pytest.mark.parametrize(("num_rows", "asked", "expected"), [
    (5, [], [(0, 5)]),
    (7, [6], [(0, 7)]),
    (8, [7], [(0, 7), (7, 8)]),
    (6, [0, 1, 2, 3, 4, 5], [(0, 3), (3, 6)]),
    (20, [0, 1, 2, 19], [(0, 7), (7, 14), (14, 20)]),
    (9, [1, 3, 5, 6, 8], [(0, 6), (6, 7), (7, 9)]),
    (1, [0], [(0, 1)]),
])  # fmt: skip
def test_pieces_respect_both_limits(num_rows: int, asked: list[int], expected: list[tuple[int, int]]) -> None:
    backend: Any = SimpleNamespace(chunk_rows=7, most_logits=3, mixes_experts=False)
    assert pieces_of(np.zeros(num_rows, np.bool_), backend, np.array(asked, np.int64)) == expected


def refusal(folder: Path, device: FakeDevice, name: str = "tensorrt_rtx", version: str = "1.7.1") -> str:
    with pytest.raises(BackendError) as caught:
        open_fake(folder, "all", name, version, device)
    return str(caught.value)


def test_engine_of_another_release_says_both(rtx: Path) -> None:
    message = refusal(rtx, FakeDevice(), version="1.8.0")
    assert "built by tensorrt_rtx 1.7.1, this machine has 1.8.0" in message
    assert "vlmdeploy build" in message


def test_engine_of_the_other_library_says_which_is_needed(rtx: Path) -> None:
    message = refusal(rtx, FakeDevice(), name="tensorrt", version="11.4.0")
    assert "built by tensorrt_rtx, not tensorrt" in message
    assert "vlmdeploy[rtx]" in message


def test_engine_for_another_gpu_says_both(rtx: Path) -> None:
    engines = read_manifest(rtx).engines
    only = {name: replace(info, compute_capabilities=("8.9", "12.0")) for name, info in engines.items()}
    edit_manifest(rtx, engines=only)
    assert "built for SM 8.9, 12.0, this GPU is SM 8.6" in refusal(rtx, FakeDevice())


def test_bundle_without_engines_says_how_to_build_them(exported: Path) -> None:
    assert "has no engines yet" in refusal(exported, FakeDevice())
    assert "vlmdeploy build" in refusal(exported, FakeDevice())


def test_short_memory_shows_the_plan(rtx: Path) -> None:
    message = refusal(rtx, FakeDevice(memory_bytes=200 << 20))
    assert "of GPU memory and 0.2 GB are free" in message
    assert "vision" in message and "KV cache of 128 tokens" in message and "--residency phase" in message


def test_truncated_engine_is_found_when_the_bundle_is_opened(rtx: Path) -> None:
    path = rtx / "engines/vision.engine"
    path.write_bytes(path.read_bytes()[:-1])
    assert "engines/vision.engine" in only_error_line(run_cli("run", rtx, "--prompt", "Hello"))


def test_altered_engine_is_found_when_the_bundle_is_opened(rtx: Path) -> None:
    flip_byte(rtx / "engines/decoder_text.engine")
    assert "altered" in only_error_line(run_cli("run", rtx, "--prompt", "Hello"))


def test_plan_that_tensorrt_refuses_is_named(rtx: Path) -> None:
    path = rtx / "engines/decoder_text.engine"
    path.write_text("no plan")
    sign_again(rtx)
    session, _ = open_fake(rtx)
    with pytest.raises(BackendError, match=r"decoder_text\.engine: cannot be loaded"):
        session.generate_ids(np.array([1, 5]), max_new_tokens=1)


def test_machine_without_gpu_is_one_clear_line(rtx: Path) -> None:
    assert run_cli("trust", rtx).exit_code == 0
    line = only_error_line(run_cli("run", rtx, "--prompt", "Hello"))
    assert "needs a CUDA GPU and a driver for it" in line
    assert "--provider cpu" in line


def test_graphs_of_the_bundle_run_on_the_cpu_when_asked(rtx: Path) -> None:
    result = run_cli(
        "run", rtx, "--prompt", "Hello", "--provider", "cpu", "--threads", 1, "--max-new-tokens", 3, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert read_manifest(rtx).provider == "cuda"
