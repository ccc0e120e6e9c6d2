"""Contract: the README's commands and its Python run as they stand there, against the model that ships with the
repository."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(command: str) -> str:
    """The first block of shell commands that runs this one."""
    return next(each for each in blocks("sh") if f"vlmdeploy {command}" in each)


def commands(block: str) -> list[str]:
    """The lines of a block that run something of ours, comments left out."""
    lines = [line.split(" #")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line.startswith(("vlmdeploy ", "python "))]


def run(command: str, folder: Path) -> str:
    """What a command prints, run as in a shell of the checkout whose outputs go to another folder."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the examples, as the checkout does; what commands write stays here."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def first_screen(checkout: Path) -> dict[str, str]:
    """The printed output of each command of the first block."""
    return {command.split()[1]: run(command, checkout) for command in commands(blocks("sh")[0])}


def test_first_command_installs_in_a_checkout() -> None:
    command, _, path = blocks("sh")[0].splitlines()[0].partition(" && ")
    done = subprocess.run([command, "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (command, done.returncode) == ("make", 0), done.stderr
    assert path.startswith('export PATH="$PWD/.venv/bin:$PATH"'), "where it installs to"


def test_first_screen_goes_from_checkpoint_to_answer(first_screen: dict[str, str], checkout: Path) -> None:
    assert list(first_screen) == ["examples/digits/make_data.py", "quantize", "export", "verify", "run"]
    answer = json.loads(first_screen["run"])
    assert re.fullmatch(r"\[\[\d{3},\d{3},\d{3},\d{3}\]\]", answer["text"])
    x0, y0, x1, y1 = answer["boxes"][0]["pixels"]
    assert abs(x0 - 4) < 4 and abs(y0 - 1) < 4 and abs(x1 - 21) < 4 and abs(y1 - 29) < 4, "where the 7 was drawn"
    assert (checkout / "answer.png").is_file()


def test_python_block_runs(first_screen: dict[str, str], checkout: Path) -> None:
    (checkout / "block.py").write_text(blocks("python")[0])
    assert run("python block.py", checkout) == "8", "the largest digit of the scene"


def test_plan_needs_nothing_but_a_name(checkout: Path) -> None:
    (command,) = commands(block("plan"))
    assert "cogvlm2 as trt-int4 on Jetson Orin NX 16 GB: fits (" in run(command, checkout)


@pytest.mark.slow
def test_report_of_the_bundle_is_a_page(first_screen: dict[str, str], checkout: Path) -> None:
    make_data, report = commands(block("report"))
    assert "quantize" in first_screen, "which made the bundle"
    run(make_data.replace("--count 40", "--count 4"), checkout)
    run(report, checkout)
    made = json.loads((checkout / "report" / "report.json").read_text())
    assert [model["subject"]["name"] for model in made["models"]] == ["checkpoint", "bundle"]
    assert made["models"][1]["layer_errors"] is not None, "the quantization report came with the bundle"
    assert (checkout / "report" / "report.html").stat().st_size > 100_000


def test_tensorrt_section_runs_without_a_gpu(first_screen: dict[str, str], checkout: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install vlmdeploy[rtx]")
    assert "quantize" in first_screen, "which made the calibration data"
    for command in commands(block("export --ckpt int4")):
        run(command, checkout)
    manifest = json.loads((checkout / "rtx" / "manifest.json").read_text())
    assert (manifest["precision"]["vision"], sorted(manifest["engines"])) == (
        "int4", ["decoder_text", "decoder_vision", "vision"],
    )  # fmt: skip
    on_device = [command.split()[1] for command in commands(block("build"))]
    assert on_device == ["build", "verify", "run"], "not run: there is no GPU"


def test_commands_of_the_digits_section_run(checkout: Path) -> None:
    """At a small count; training is left to its own tests, the shipped checkpoint stands in for its output."""
    train, make_data, validate = commands(block("train"))
    assert train == "vlmdeploy train examples/digits/train.toml --out ckpt"
    (checkout / "ckpt").symlink_to(ROOT / "examples" / "digits" / "checkpoint")
    run(re.sub(r"--count \d+", "--count 3", make_data), checkout)
    tasks = json.loads(run(f"{validate} --json", checkout))["tasks"]
    assert set(tasks) == {"vqa", "rec", "reg", "caption"}
