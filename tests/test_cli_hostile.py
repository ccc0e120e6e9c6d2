"""Contract tests: whatever stands after an option, a command ends with one line and status 1 or 2, and what it reads is
never what it writes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.calibration_data import messages, write_rows
from tests.tiny_bundle import ROOT, content_of, only_error_line, picture, run_cli

HUGE = "1" + 400 * "0"
LONG = 100_000 * "x"
ESCAPE = "\x1b[31mred"
NOT_UTF_8 = "\udcff\udcfe"
TEXTS = ("", HUGE, LONG, ESCAPE, NOT_UTF_8, "a\nb", "/dev/null", "-")

pytestmark = pytest.mark.usefixtures("own_hash_cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A question about a picture, and one without."""
    rows = [
        {"image": "0.png", "messages": messages("What is it?", "a cup"), "task": "vqa"},
        {"messages": messages("Is a cup blue?", "yes"), "task": "yes_no"},
    ]
    return write_rows(tmp_path / "data", list(rows))


def refused(*arguments: object) -> str:
    """The one line, or click's last one, of a command that ends with status 1 or 2."""
    result = run_cli(*arguments)
    lines = result.stderr.splitlines()
    assert result.exit_code in (1, 2) and result.stdout == "", (result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert len(lines) == 1 or (result.exit_code == 2 and lines[0].startswith("Usage: ")), result.stderr
    assert lines[-1].startswith("Error: ") and lines[-1].isprintable() and len(lines[-1]) < 1500
    return lines[-1]


RUN = ("--prompt", "Why?", "--max-new-tokens", 2, "--threads", 1)


@pytest.mark.parametrize("value", ["", "nan", "x", "0", "-1", f"-{HUGE}", ESCAPE])
@pytest.mark.parametrize("option", ["--max-new-tokens", "--threads"])
def test_number_that_is_none_is_refused(answering_bundle: Path, option: str, value: str) -> None:
    refused("run", answering_bundle, *RUN, option, value)


@pytest.mark.parametrize(("option", "values"), [
    ("--temperature", ["nan", "inf", "1e999", "-1"]), ("--top-p", ["nan", "inf", "0", "-1", "1.5"]),
    ("--top-k", ["-1", f"-{HUGE}", "1.5"]), ("--repetition-penalty", ["nan", "inf", "0", "-1"]),
    ("--stop", [""]), ("--threads", ["1025", HUGE]), ("--template", TEXTS[1:]), ("--image", TEXTS),
    ("--draw", ["out.png"]), ("--prompt", [LONG, NOT_UTF_8]), ("--seed", ["nan", ""]),
])  # fmt: skip
def test_answer_that_cannot_be_drawn_is_refused(answering_bundle: Path, option: str, values: list[str]) -> None:
    for value in values:
        refused("run", answering_bundle, *RUN, option, value)


@pytest.mark.parametrize(("command", "option", "values"), [
    ("validate --bundle BUNDLE --data DATA", "--seed", ["-1", f"-{HUGE}"]),
    ("validate --bundle BUNDLE --data DATA", "--per-task", ["0", f"-{HUGE}"]),
    ("validate --bundle BUNDLE --data DATA", "--split", TEXTS),
    ("validate --bundle BUNDLE --data DATA", "--predictions", [*TEXTS, "nowhere/"]),
    ("diff BUNDLE BUNDLE", "--tolerance", ["nan", "inf", "-1", "1e999"]),
    ("diff BUNDLE BUNDLE", "--threads", [HUGE]),
    ("diff BUNDLE BUNDLE", "--plot", [*TEXTS, "nowhere/plot.png"]),
    ("bench BUNDLE", "--new-tokens", [HUGE, "0"]),
    ("bench BUNDLE --text-only", "--template", TEXTS),
    ("plan --family cogvlm --device orin-nx-16", "--swap", [*TEXTS, "nan", "infGB", "-1GB", f"{HUGE}GB"]),
    ("plan --family cogvlm --device orin-nx-16", "--html", ["", LONG, "/dev/null", "/dev/full"]),
    ("plan --device orin-nx-16", "--family", TEXTS),
    ("plan --family cogvlm", "--device", TEXTS),
    ("build BUNDLE", "--sm", TEXTS),
    ("trust", "", TEXTS), ("inspect", "", TEXTS), ("verify", "", TEXTS), ("", "--", TEXTS),
])  # fmt: skip
def test_hostile_value_is_refused(
    answering_bundle: Path, data: Path, tmp_path: Path, command: str, option: str, values: list[str]
) -> None:
    places = {"BUNDLE": answering_bundle, "DATA": data, "OUT": tmp_path / "out"}
    words = [places.get(word, word) for word in command.split()]
    for value in values:
        refused(*words, *([option] if option else []), value)


def test_bytes_that_are_no_text_are_refused_alike(answering_bundle: Path) -> None:
    for value in (b"\xff\xfe", b"\xc3(", b"\x1b[2J"):
        command: list[str | bytes] = [
            sys.executable,
            "-m",
            "vlmdeploy",
            "verify",
            os.fsencode(answering_bundle) + value,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith(b"Error: ") and b"\x1b" not in lines[0]


# What is read is not written


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("kind", ["same", "link", "hard link", "fifo", "device", "folder", "no picture"])
def test_boxes_are_not_painted_over_an_input(answering_bundle: Path, photo: Path, kind: str) -> None:
    """--draw replaced the picture itself, after the whole answer."""
    out = photo.with_name("out.png")
    if kind == "link":
        out.symlink_to(photo)
    elif kind == "hard link":
        out.hardlink_to(photo)
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "device":
        out.symlink_to("/dev/full")
    elif kind == "folder":
        out.mkdir()
    out = {"same": photo, "no picture": photo.with_name("out")}.get(kind, out)
    before = photo.read_bytes()
    only_error_line(run_cli("run", answering_bundle, *RUN, "--image", photo, "--draw", out))
    assert photo.read_bytes() == before and {path.name for path in photo.parent.iterdir()} <= {photo.name, "out.png"}


def test_answers_are_not_written_over_what_is_read(answering_bundle: Path, data: Path, tmp_path: Path) -> None:
    """--predictions DATA --force left no question."""
    (tmp_path / "link.jsonl").symlink_to(data / "data.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(data / "data.jsonl")
    for folder in (data, data / "data.jsonl"):
        command = ("validate", "--bundle", answering_bundle, "--data", folder, "--force", "--predictions")
        for out in (data / "data.jsonl", tmp_path / "link.jsonl", tmp_path / "hard.jsonl"):
            assert "which this command reads" in only_error_line(run_cli(*command, out))
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"index": "1", "prediction": "a cup"}\n{"index": "2", "prediction": "yes"}\n')
    command = ("validate", "--from-predictions", answers, "--data", data, "--force", "--predictions")
    assert "which this command reads" in only_error_line(run_cli(*command, answers))
    assert len((data / "data.jsonl").read_text().splitlines()) == len(answers.read_text().splitlines()) == 2
    for _ in range(2):
        result = run_cli(*command, data / "answers.tsv")
        assert result.exit_code == 0, result.stderr


def test_pages_and_plots_are_not_written_over_what_is_read(answering_bundle: Path, photo: Path) -> None:
    before = content_of(answering_bundle)
    ckpt = answering_bundle.with_name("ckpt")
    page = run_cli("plan", "--ckpt", ckpt, "--device", "orin-nx-16", "--html", ckpt / "config.json")
    assert "config.json: is or belongs to" in only_error_line(page)
    plot = run_cli("diff", answering_bundle, answering_bundle, "--image", photo, "--plot", photo)
    assert "photo.png: is or belongs to" in only_error_line(plot)
    assert content_of(answering_bundle) == before and "hidden_size" in (ckpt / "config.json").read_text()


@pytest.mark.parametrize("command", [
    "report BUNDLE --data OUT/data --out OUT", "export --ckpt CKPT --tokenizer OUT/data --target ort-fp32 --out OUT",
])  # fmt: skip
def test_output_that_holds_an_input_is_not_replaced(
    answering_bundle: Path, data: Path, tmp_path: Path, command: str
) -> None:
    """--force dropped the old output with all that lay in it."""
    out = tmp_path / "out"
    shutil.copytree(answering_bundle, out)
    for name in ("report.json", "report.html"):
        (out / name).write_text("{}")
    data.rename(out / "data")
    ckpt = answering_bundle.with_name("ckpt")
    places = {"BUNDLE": answering_bundle, "CKPT": ckpt, "OUT": out, "OUT/data": out / "data"}
    result = run_cli(*(places.get(word, word) for word in command.split()), "--force")
    assert f"{out}: holds {out / 'data'}" in only_error_line(result)
    assert (out / "data" / "data.jsonl").exists()


def test_working_folder_that_cannot_be_written_does_not_matter(answering_bundle: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    command = [sys.executable, "-m", "vlmdeploy", "run", str(answering_bundle), *map(str, RUN)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# No home


HOMELESS = """
import os, pwd, sys
def nobody(number):
    raise KeyError(number)
pwd.getpwuid = nobody
for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
    os.environ.pop(name, None)
from vlmdeploy.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", [
    "run BUNDLE --prompt Why? --max-new-tokens 2", "verify BUNDLE", "validate --bundle BUNDLE --data DATA",
    "diff BUNDLE BUNDLE --plot plot.png", "bench BUNDLE --repeat 1 --new-tokens 2",
    "plan --family cogvlm --device orin-nx-16 --html plan.html",
])  # fmt: skip
def test_user_without_a_home_gets_one_warning_at_most(
    answering_bundle: Path, data: Path, tmp_path: Path, command: str
) -> None:
    """As in a container that runs under a bare number: the cache's place was a traceback."""
    words = [{"BUNDLE": str(answering_bundle), "DATA": str(data)}.get(word, word) for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS, *words],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "no home folder" in line]
    others = set(done.stderr.splitlines()) - set(told)
    assert len(told) <= 1 and (not others or command.startswith("plan"))
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "plot.png", "plan.html"}


def test_compiled_loops_make_no_folder_for_a_user_without_a_home(tmp_path: Path) -> None:
    """Where the package cannot be written, numba put its cache into a folder "~" of the current one."""
    nobody = ("unshare", "--user", "--map-user=12345", "env", "-i")
    if subprocess.run([*nobody, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here: another user cannot be played")
    package = shutil.copytree(ROOT / "vlmdeploy", tmp_path / "package" / "vlmdeploy", ignore=lambda *_: ["__pycache__"])
    for folder in (package, *package.rglob("*")):
        folder.chmod(0o555)
    (tmp_path / "here").mkdir()
    command = [*nobody, f"PYTHONPATH={package.parent}", sys.executable, "-c", "import vlmdeploy.quant.numba_loops"]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True)
    assert (done.returncode, done.stderr, list((tmp_path / "here").iterdir())) == (0, "", [])
