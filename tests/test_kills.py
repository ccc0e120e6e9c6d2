"""Contract tests: a run that is killed or asked to end at any moment loses nothing that was committed and leaves no
process behind, and the next run leaves nothing stale. Quantizing and exporting have theirs beside their own tests.

Moments are seeded shares of the time that an undisturbed run takes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import vlmdeploy
from tests.calibration_data import messages, write_calibration_checkpoint, write_rows
from tests.processes import descendants, has_ended, wait_until
from tests.test_train_run import DATA, DIGITS, RECIPE, STAGE
from tests.tiny_bundle import ROOT, content_of, picture
from vlmdeploy.train.state import load_place

slow = pytest.mark.slow
KILL, TERM, HUP = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP
ORPHAN = "the command that wanted this is gone"  # told by a process that was just being started
ENDED = {KILL: (-9, ""), TERM: (143, "Error: stopped by SIGTERM")}


@contextmanager
def started(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a session of its own."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()  # a failed test waits for nobody


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal to the process alone, and wait until all that it started have ended too; status and last line."""
    children = list(descendants(process.pid))
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    wait_until(lambda: all(map(has_ended, children)))
    return process.returncode, "".join(told.splitlines()[-1:])


def completed(*command: object) -> float:
    """Run `vlmdeploy COMMAND` to its end; returns the seconds that it took."""
    start = time.monotonic()
    with started("-m", "vlmdeploy", *command) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    return time.monotonic() - start


def end_at_moments(command: tuple[object, ...], seconds: float, seed: int) -> None:
    """End runs of `vlmdeploy COMMAND`, which take that long, each signal at a moment of its own."""
    moments = random.Random(seed)
    for number, expected in ENDED.items():
        with started("-m", "vlmdeploy", *command) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, seconds))
            ended = end(process, number)
        is_early = ended == (-number, "")  # the default action, before the command begins
        assert ended[0] == 0 or is_early or ended in (expected, (-KILL, ORPHAN))


# Training


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two workers, whose state is saved after every step."""
    (tmp_path / "brightness.py").write_text(DATA)
    shutil.copy(DIGITS / "tokenizer.json", tmp_path)
    (tmp_path / "train.toml").write_text(RECIPE.replace("OTHERS", STAGE).replace("workers = 1", "workers = 2"))
    return tmp_path / "train.toml"


@pytest.mark.parametrize("number", [TERM, pytest.param(KILL, marks=slow)])
def test_training_that_is_ended_keeps_its_state_and_no_worker(recipe: Path, number: signal.Signals) -> None:
    partial = recipe.with_name("out.partial")
    with started("-m", "vlmdeploy", "train", recipe, "--out", recipe.with_name("out")) as process:
        wait_until(lambda: (partial / "state.pt").exists() or process.poll() is not None)
        assert end(process, number) == ENDED[number]
    assert load_place(partial, 2).step > 0 and not recipe.with_name("out").exists()


@slow
def test_training_ended_at_any_moment_comes_to_the_same_weights(recipe: Path) -> None:
    before = {path.name for path in recipe.parent.iterdir()}
    seconds = completed("train", recipe, "--out", recipe.with_name("whole"))
    command = ("train", recipe, "--out", recipe.with_name("out"))
    end_at_moments(command, seconds, seed=3)
    completed(*command)
    ended, whole = (recipe.with_name(name) / "model.safetensors" for name in ("out", "whole"))
    assert ended.read_bytes() == whole.read_bytes()
    assert {path.name for path in recipe.parent.iterdir()} - {"__pycache__"} == before | {"out", "whole"}


# Sweeps


FAST = ("--threads", 1, "--max-new-tokens", 2, "--new-tokens", 2, "--repeat", 1)


@slow
def test_sweep_ended_at_any_moment_leaves_nothing_stale(tmp_path: Path) -> None:
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", context_tokens=256)
    data = write_rows(tmp_path / "data", [{"messages": messages("Is a cup blue?", "yes"), "task": "yes_no"}])
    (tmp_path / "grid.toml").write_text('algorithm = "rtn"\ngroup = 16\n')
    command = ("sweep", "--ckpt", ckpt, "--grid", tmp_path / "grid.toml", "--data", data, *FAST, "--out")
    seconds = completed(*command, tmp_path / "whole")
    end_at_moments((*command, tmp_path / "out"), seconds, seed=4)
    completed(*command, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def files_of(folder: Path) -> set[str]:
    """Relative paths; evaluations are named by hashes of what decides them."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# A program that keeps a bundle open


SERVE = """
import sys
import vlmdeploy
from vlmdeploy.runtime.sampling import SamplingOptions
bundle, photo = sys.argv[1:]
content = [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]
with vlmdeploy.open(bundle, threads=1, residency="phase") as session:
    while True:
        session.answer([{"role": "user", "content": content}], SamplingOptions(max_new_tokens=2))
        print(flush=True)
"""


@pytest.mark.usefixtures("own_signals")  # whoever runs the tests may ignore SIGHUP, as `nohup` does
@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=slow)])
def test_bundle_and_cache_of_a_program_that_is_ended_are_whole(
    answering_bundle: Path, tmp_path: Path, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens, loads and frees graphs all the time, and installs no handler of its own."""
    picture().save(tmp_path / "photo.png")
    before, moments = content_of(answering_bundle), random.Random(rounds)
    for number in range(rounds):
        cache = tmp_path / str(number)
        sent = moments.choice([KILL, TERM, HUP])
        with started("-c", SERVE, answering_bundle, tmp_path / "photo.png", XDG_CACHE_HOME=str(cache)) as process:
            assert process.stdout is not None
            for _ in range(moments.randrange(4)):
                process.stdout.readline()
            with suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, 0.3))
            assert end(process, sent) == (-sent, "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        vlmdeploy.open(answering_bundle, threads=1).close()
        assert all(json.loads(path.read_text()) for path in cache.rglob("*.json"))
    assert content_of(answering_bundle) == before
