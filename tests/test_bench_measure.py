"""Measuring a bundle: every answer is as long as asked for and encodes its picture, every phase is seen, the process of
its own ends when it should, and what cannot be measured is one clear line. Tiny random models; nothing is asserted
about durations. Contract and agreement tests."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.fake_tensorrt import SCRATCH, FakeDevice, fake_library, write_fake_engines
from tests.tiny_bundle import (
    ROOT,
    edit_manifest,
    export,
    only_error_line,
    only_json_document,
    picture,
    run_cli,
    run_process,
    without,
    write_text_checkpoint,
)
from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.bench.energy import Meter, Unknown
from vlmdeploy.bench.machine import board_model, cpu_model
from vlmdeploy.bench.measure import MeasuredBundle, disk_use, measure, measure_backend, measure_in_process
from vlmdeploy.bench.measurement import EngineUsed, Measurement, MeasureOptions, Spread
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import BackendError, ConfigError, DataError, PromptError, VlmdeployError
from vlmdeploy.export.engines.parts import EnginePart
from vlmdeploy.kernels import cpu
from vlmdeploy.layout import Bools
from vlmdeploy.records import record_of
from vlmdeploy.runtime.backends.lanes import Floats, Lanes
from vlmdeploy.runtime.backends.ort import OrtBackend
from vlmdeploy.runtime.backends.trt import TrtBackend, buffer_bytes
from vlmdeploy.runtime.integrity import check_bundle

ROWS = 18  # of a picture in the tiny models
PHASES = {"open", "preprocess", "vision", "prefill", "decode"}
ENGINE = EngineUsed("onnxruntime", "1", "cpu", 1, "all")
SHORT = MeasureOptions(new_tokens=3, repeats=2, warmup=1, threads=1)


pytestmark = pytest.mark.usefixtures("own_hash_cache")


@pytest.fixture(scope="module")
def bundle(answering_bundle: Path) -> Path:
    return answering_bundle


@pytest.fixture(scope="module")
def ids_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without a tokenizer."""
    folder = tmp_path_factory.mktemp("ids_only")
    return export(write_tiny_checkpoint(folder / "ckpt", "cogvlm"), folder / "bundle")


class CountingBackend(OrtBackend):
    """Counts the calls that cost something."""

    def __init__(self, folder: Path) -> None:
        super().__init__(check_bundle(folder), 1)
        self.encoded = self.decoded = 0
        self.is_closed = False

    def encode_images(self, pixels: Floats) -> Floats:
        self.encoded += len(pixels)
        return super().encode_images(pixels)

    def decode(self, hidden: Floats, is_fed: Bools, lanes: Lanes) -> Floats:
        self.decoded += 1
        return super().decode(hidden, is_fed, lanes)

    def close(self) -> None:
        self.is_closed = True
        super().close()


class OneJouleEachTime:
    """A meter that counts its readings."""

    method = "readings"

    def __init__(self) -> None:
        self.readings = 0
        self.is_closed = False

    def joules(self) -> float:
        self.readings += 1
        return float(self.readings)

    def close(self) -> None:
        self.is_closed = True


def measured(folder: Path, options: MeasureOptions, meter: Meter | None = None) -> tuple[Measurement, CountingBackend]:
    backend = CountingBackend(folder)
    subject = MeasuredBundle(check_bundle(folder), ENGINE, lambda: backend)
    return measure_backend(subject, options, meter or Unknown("told by a test")), backend


def test_every_answer_encodes_its_picture_and_decodes_as_many_tokens(bundle: Path) -> None:
    found, backend = measured(bundle, SHORT)
    assert (backend.encoded, backend.decoded, backend.is_closed) == (3, 9, True)
    assert (found.first_token.count, found.decode_per_token.count, found.new_tokens) == (2, 6, 3)


def test_answer_goes_on_past_stop_ids(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "stops"))
    edit_manifest(folder, tokens=replace(read_manifest(bundle).tokens, stop_ids=tuple(range(259))))
    assert measured(folder, SHORT)[1].decoded == 9


def test_parts_of_the_first_token_add_up(bundle: Path) -> None:
    found, _ = measured(bundle, replace(SHORT, repeats=1))
    assert found.vision is not None
    parts = (found.preprocess, found.vision, found.prefill)
    assert sum(part.mean for part in parts) == pytest.approx(found.first_token.mean)
    assert min(part.minimum for part in parts) > 0
    assert found.decode_tok_s == pytest.approx(1000 / found.decode_per_token.p50)
    assert found.prefill_tok_s == pytest.approx(1000 * found.prompt_tokens / found.prefill.p50)


def test_prompt_is_the_one_that_run_takes(bundle: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "photo.png")
    question = ["--prompt", "Why?", "--image", tmp_path / "photo.png", "--template", "vqa"]
    answer = only_json_document(run_cli("run", bundle, *question, "--max-new-tokens", 1, "--json"))
    found, _ = measured(bundle, replace(SHORT, prompt="Why?", image=str(tmp_path / "photo.png"), template="vqa"))
    assert (found.prompt_tokens, found.image_rows) == (answer["prompt_tokens"], ROWS)
    assert found.picture == str(tmp_path / "photo.png")


def test_without_a_picture_there_is_no_vision_phase(bundle: Path) -> None:
    found, backend = measured(bundle, replace(SHORT, text_only=True))
    assert (backend.encoded, found.vision, found.image_rows, found.picture) == (0, None, 0, "none")
    assert set(found.memory.phases) == PHASES - {"vision"}


def test_ids_only_bundle_is_asked_random_ids(ids_only: Path) -> None:
    with_picture, backend = measured(ids_only, SHORT)
    assert (with_picture.prompt_tokens, with_picture.image_rows, backend.decoded) == (1 + ROWS + 16, ROWS, 9)
    assert measured(ids_only, replace(SHORT, text_only=True))[0].prompt_tokens == 1 + 16


def test_residency_phase_loads_inside_the_phases(bundle: Path) -> None:
    found = measure(bundle, replace(SHORT, residency="phase"))
    assert found.engine.residency == "phase" and set(found.memory.phases) == PHASES


def test_energy_is_the_mean_of_the_timed_answers(bundle: Path) -> None:
    """Each phase reads the meter when it begins and when it ends, so it costs one joule."""
    meter = OneJouleEachTime()
    found, _ = measured(bundle, replace(SHORT, warmup=2, repeats=3), meter)
    assert found.energy is not None and found.energy_unknown is None and meter.is_closed
    assert found.energy.phases_j == dict.fromkeys(["preprocess", "vision", "prefill", "decode"], 1.0)
    assert found.energy.answer_j == 4 and found.energy.token_j == pytest.approx(1 / 3)
    assert found.energy.answer_above_idle_j < 4 and 0 < found.energy.idle_w < 1.1


def test_no_meter_is_told_in_words(bundle: Path) -> None:
    found, _ = measured(bundle, SHORT)
    assert (found.energy, found.energy_unknown) == (None, "told by a test")


def test_disk_use_adds_up_to_the_folder(bundle: Path) -> None:
    used = disk_use(bundle, read_manifest(bundle))
    assert used.total == sum(path.stat().st_size for path in bundle.iterdir())
    assert used.total == used.graphs + used.data + used.embedding + used.engines + used.other
    assert used.data == sum(path.stat().st_size for path in bundle.glob("*.data"))


def test_spread_of_known_values() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (spread.p50, spread.mean, spread.minimum, spread.count) == (3.0, 4.0, 1.0, 5)
    assert spread.p95 == pytest.approx(8.8), "four fifths of the way from 4 to 10"
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 1)


def test_measurement_survives_json(bundle: Path) -> None:
    found, _ = measured(bundle, SHORT, OneJouleEachTime())
    assert record_of(Measurement, json.loads(json.dumps(asdict(found), allow_nan=False)), "measurement") == found


# TensorRT, on a fake device


def test_tensorrt_tells_what_it_plans_and_what_it_takes(tmp_path: Path) -> None:
    folder = export(write_text_checkpoint(tmp_path / "ckpt", seed=5), tmp_path / "bundle", "trt-int4")
    edit_manifest(folder, target="rtx-int4")
    layers = (0, read_manifest(folder).cache.num_layers)
    graphs = {"vision": (0, 0), "decoder_text": layers, "decoder_vision": layers}
    manifest = write_fake_engines(folder, [EnginePart(name, 0, at, 0, True) for name, at in graphs.items()], 7, 3)
    device = FakeDevice()
    engine = EngineUsed("tensorrt_rtx", "1.7.1", "cuda", None, "all")

    def open_it() -> TrtBackend:
        return TrtBackend(check_bundle(folder), "all", fake_library(device), device)  # type: ignore[arg-type]

    found = measure_backend(MeasuredBundle(check_bundle(folder), engine, open_it), SHORT, Unknown(""))
    planned = sum(buffer_bytes(manifest, 7, 3).values())
    taken = {phase: memory.device_peak_bytes for phase, memory in found.memory.phases.items()}
    assert found.memory.device_planned_bytes == planned and found.machine.gpu == device.name
    assert taken == dict.fromkeys(PHASES, planned + SCRATCH["vision"] - 1), "the empty scratch was one byte"
    assert device.memory == {}, "everything was given back"


# Bad input


@pytest.mark.parametrize(("options", "expected"), [
    ({"new_tokens": 0}, "option new_tokens is 0, expected a whole number of at least 1"),
    ({"new_tokens": 2.5}, "option new_tokens is 2.5"), ({"repeats": True}, "option repeats is True"),
    ({"warmup": -1}, "option warmup is -1"), ({"threads": 0}, "option threads is 0"), ({"repeats": None}, "is None"),
    ({"residency": "disk"}, 'option residency is \'disk\', expected "all" or "phase"'),
    ({"image": b"GIF"}, "option image is a bytes"), ({"text_only": True, "image": "a.png"}, "a.png: text_only"),
])  # fmt: skip
def test_senseless_option_is_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MeasureOptions(**options)
    assert expected in str(caught.value)


def test_wrong_picture_is_found_before_anything_is_opened(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()

    def open_it() -> CountingBackend:
        raise AssertionError("opened")

    subject = MeasuredBundle(check_bundle(bundle), ENGINE, open_it)
    with pytest.raises(DataError, match=r"empty\.png"):
        measure_backend(subject, replace(SHORT, image=str(tmp_path / "empty.png")), Unknown(""))


@pytest.mark.parametrize(("options", "expected"), [
    ({"new_tokens": 10**30}, "new tokens are asked for, and the context holds 128: ask for at most "),
    ({"prompt": "x" * 300}, "shorten the prompt, or export with a larger --context"),
    ({"image": "nowhere.png"}, "nowhere.png: no such file"), ({"image": ""}, "expected a picture"),
    ({"provider": "cuda"}, "exported for provider cpu, asked for cuda"), ({"provider": "tpu"}, 'provider is "tpu"'),
    ({"template": "poem"}, 'template "poem" is not in this bundle'), ({"prompt": "\udcff"}, "text is not valid UTF-8"),
])  # fmt: skip
def test_what_the_bundle_cannot_do_is_said(bundle: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(VlmdeployError) as caught:
        measure(bundle, replace(SHORT, **options))
    assert expected in str(caught.value)


def test_more_tokens_than_fit_is_one_line_with_both_numbers(bundle: Path) -> None:
    error = only_error_line(run_cli("bench", bundle, "--threads", 1, "--new-tokens", 500, "--prompt", "Why?"))
    assert f"{bundle}: the prompt has " in error and "500 new tokens" in error and "the context holds 128" in error


def test_longest_answer_that_is_offered_fits(bundle: Path) -> None:
    with pytest.raises(PromptError) as caught:
        measured(bundle, replace(SHORT, new_tokens=500))
    offered = int(str(caught.value).partition("ask for at most ")[2].partition(",")[0])
    assert measured(bundle, replace(SHORT, new_tokens=offered))[1].decoded == 3 * offered


@pytest.mark.parametrize("option", ["--prompt", "--template"])
def test_ids_only_bundle_takes_no_text(ids_only: Path, option: str) -> None:
    error = only_error_line(run_cli("bench", ids_only, option, "chat"))
    assert f"{ids_only}: an ids-only bundle takes no {option}" in error and "--tokenizer FILE" in error


@pytest.mark.parametrize("options", [
    ["--repeat", "0"], ["--new-tokens", "0"], ["--warmup", "-1"], ["--residency", "disk"], ["--new-tokens", "many"],
    ["--text-only", "--image", "a.png"],
])  # fmt: skip
def test_wrong_usage_is_exit_status_2(options: list[str]) -> None:
    result = run_cli("bench", "bundle", *options)
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith("Usage: ")


def test_folder_that_is_no_bundle_is_one_line(tmp_path: Path) -> None:
    assert "has no manifest.json" in only_error_line(run_cli("bench", tmp_path, "--json"))


# The command, and the process of its own


def test_bench_prints_every_number_with_what_it_is_of(bundle: Path) -> None:
    result = run_cli("bench", bundle, "--new-tokens", 3, "--repeat", 2, "--threads", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [
        "time to first token",
        "vision encoder",
        "decode, each token",
        "decode rate",
        "peak memory, decode",
        "energy",
    ]
    assert all(word in result.stdout for word in [*lines, "median", "decoder int4"])
    operators = f" with our operators ({cpu.variant()})" if cpu.variant() else ""
    engine = result.stdout.splitlines()[1]
    assert engine.startswith("onnxruntime ") and f" on cpu{operators}, 1 threads" in engine


def test_bench_json_is_the_measurement(bundle: Path) -> None:
    document = only_json_document(run_cli("bench", bundle, "--new-tokens", 3, "--repeat", 2, "--threads", 1, "--json"))
    found = record_of(Measurement, document, "bench")
    assert (found.decode_per_token.count, found.engine.threads, found.bundle.target) == (6, 1, "ort-int4")


def test_process_of_its_own_holds_nothing_of_this_one(bundle: Path) -> None:
    found = measure_in_process(bundle, SHORT)
    assert set(found.memory.phases) == PHASES
    assert all(phase.peak_bytes >= phase.end_bytes > 1 << 20 for phase in found.memory.phases.values())
    assert found.memory.baseline_bytes < found.memory.peak_bytes < 150e6, "this process holds torch"


def test_error_of_the_process_is_raised_here(bundle: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: no such file"):
        measure_in_process(bundle, replace(SHORT, image="nowhere.png"))


def test_warning_about_the_picture_is_said_once(bundle: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "moves.gif", save_all=True, append_images=[picture(1)])
    question = ["--image", tmp_path / "moves.gif", "--new-tokens", 2, "--threads", 1, "--json"]
    done = run_process("-m", "vlmdeploy", "bench", bundle, *question)
    assert json.loads(done.stdout)["picture"] == str(tmp_path / "moves.gif")
    assert done.stderr == f"Warning: {tmp_path / 'moves.gif'}: holds several frames; only the first one is used\n"


def test_meter_is_given_back_when_measuring_fails(bundle: Path) -> None:
    meter = OneJouleEachTime()
    with pytest.raises(DataError):
        measured(bundle, replace(SHORT, image="nowhere.png"), meter)
    assert meter.is_closed


@pytest.mark.parametrize("written", ["", '{"bundle": {"fol'])
def test_process_that_is_killed_is_one_clear_error(written: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an answer was a traceback of the JSON reader."""
    monkeypatch.setattr(sys, "executable", str(bundle.parent / "python"))
    Path(sys.executable).write_text(f"#!/bin/sh\ncat > /dev/null\nprintf '%s' '{written}'\nkill -9 $$\n")
    Path(sys.executable).chmod(0o755)
    with pytest.raises(BackendError, match="the measuring process was killed by signal 9, most likely for memory"):
        measure_in_process(bundle, SHORT)


def test_measuring_needs_no_torch(bundle: Path) -> None:
    code = f"""{without("torch", "onnx", "safetensors")}
from pathlib import Path
from vlmdeploy.bench.measure import measure
from vlmdeploy.bench.measurement import MeasureOptions
print(*measure(Path({str(bundle)!r}), MeasureOptions(new_tokens=2, repeats=1, threads=1)).memory.phases)
"""
    done = run_process("-c", code)
    assert (done.returncode, set(done.stdout.split())) == (0, PHASES), done.stderr


@pytest.mark.parametrize(("sent", "status", "line"), [
    (signal.SIGINT, 1, "Error: interrupted\n"), (signal.SIGTERM, 143, "Error: stopped by SIGTERM\n"),
    (signal.SIGKILL, -9, ""),
])  # fmt: skip
def test_measuring_process_ends_with_the_command(bundle: Path, sent: signal.Signals, status: int, line: str) -> None:
    endless = ["--new-tokens", "3", "--repeat", "100000000", "--threads", "1"]
    command = [sys.executable, "-m", "vlmdeploy", "bench", str(bundle), *endless]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            next(measuring_children(process))
            os.killpg(process.pid, sent)  # a terminal's Ctrl-C goes to every process of the command
            said, told = process.communicate(timeout=60)  # returns when the other process too has let go of stderr
        finally:
            process.kill()  # a command that goes on would be waited for without end
    assert (process.returncode, said, told) == (status, "", line)


def measuring_children(process: subprocess.Popen[str]) -> Iterator[int]:
    """Processes that it started and that already measure."""
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        for child in map(int, listing.read_text().split()):
            if "onnxruntime" in Path(f"/proc/{child}/maps").read_text():
                yield child


# The machine


def test_processor_is_named_or_else_its_architecture(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Quick 9000: fast\nmodel name\t: other\n")
    assert cpu_model(cpuinfo) == "Quick 9000: fast"
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd42\n")
    assert cpu_model(cpuinfo) == cpu_model(tmp_path / "nowhere") == os.uname().machine


def test_board_is_what_the_device_tree_says(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert board_model(tmp_path / "model") == "NVIDIA Jetson AGX Orin Developer Kit"
    assert board_model(tmp_path / "nowhere") is None
