"""Contract tests of the command line: what each command prints where, its exit status, and that help and answers need
no torch. Results go to stdout, everything else to stderr; an error is one line.
"""

import base64
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from PIL import Image

import vlmdeploy
from tests.tiny_bundle import (
    byte_tokenizer,
    export,
    flip_byte,
    only_error_line,
    only_json_document,
    picture,
    run_cli,
    run_process,
    sign_again,
    without,
    write_text_checkpoint,
)
from vlmdeploy.bundle import read_manifest
from vlmdeploy.calib.statistics import HessianKind
from vlmdeploy.cli import error_line, main, options
from vlmdeploy.cli.console import print_rows
from vlmdeploy.data.questions import RULES, PromptStyle
from vlmdeploy.quant.precision import PRECISIONS, TARGETS
from vlmdeploy.runtime.sampling import SamplingOptions

COMMANDS = sorted(main.commands)
RUN_KEYS = {"text", "ids", "boxes", "timings_ms", "prompt_tokens", "new_tokens"}
PHASES = {"preprocess", "vision", "prefill", "decode_per_token"}
HEAVY = ("torch", "onnx", "onnxruntime", "safetensors", "tokenizers", "numpy", "PIL")


pytestmark = pytest.mark.usefixtures("own_hash_cache")


@pytest.fixture(scope="module")
def ckpt(answering_bundle: Path) -> Path:
    return answering_bundle.with_name("ckpt")


@pytest.fixture(scope="module")
def bundle(answering_bundle: Path) -> Path:
    return answering_bundle


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture(size=(300, 200)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def says_a_box(monkeypatch: pytest.MonkeyPatch) -> str:
    """Random weights name no boxes: the model is made to answer this text, token by token."""
    text = "a dog [[100,250,500,750]] here"
    ids = iter([*byte_tokenizer().encode(text).ids, 2])
    monkeypatch.setattr("vlmdeploy.runtime.sampling.Sampler.__call__", lambda self, logits, so_far: next(ids))
    return text


# Help


def test_help_of_every_command_loads_nothing_heavy() -> None:
    """In a process in which importing torch, and even numpy, fails."""
    script = f"""{without(*HEAVY)}
from click.testing import CliRunner
from vlmdeploy.cli import main
for command in [[], *([name] for name in main.commands)]:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0 and "--help" in result.stdout, (command, result.output)
    print(*command or ["main"])
"""
    done = run_process("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["main", *main.commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_and_every_command_has_json(command: str) -> None:
    options = [item for item in main.commands[command].params if isinstance(item, click.Option)]
    assert all(option.help for option in options)
    assert "--json" in [name for option in options for name in option.opts]
    assert main.commands[command].help


def test_choices_are_what_the_packages_know() -> None:
    """They stand in the options again, because importing the packages would make --help slow."""
    assert options.RULES == RULES
    assert set(options.TARGET.choices) == set(TARGETS)
    assert set(options.PRECISION.choices) < set(PRECISIONS)
    assert tuple(options.HESSIAN.choices) == get_args(HessianKind)
    assert tuple(options.PROMPT.choices) == get_args(PromptStyle)


def test_version_and_help_flags() -> None:
    assert run_cli("--version").stdout.split() == ["vlmdeploy,", "version", vlmdeploy.__version__]
    assert run_cli("-h").stdout == run_cli("--help").stdout


def test_module_is_the_command(bundle: Path) -> None:
    done = run_process("-m", "vlmdeploy", "inspect", bundle, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["target"] == "ort-int4"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_headline_is_one_line_and_cells_are_whole(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    """The headline was the table's title and wrapped with it, so a long path cut its verdict in two. A word wider than
    its column lost its end.
    """
    headline, cell = f"/{'folder' * 20}: agrees in all 3 comparisons", "x" * 300
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", shown := stream())
    print_rows(headline, ["stage", "where"], [["vision", cell]])
    first, *table = shown.getvalue().splitlines()
    assert first == headline and sum(line.count("x") for line in table) == len(cell)
    assert stream is Terminal or any(cell in line for line in table), "a row of a file or a pipe is one line"


# Exit status and the one line of an error


@pytest.mark.parametrize("arguments", [
    ["bake"], ["run"], ["run", "bundle"], ["export", "--ckpt", "x"], ["verify", "b", "--threads", "0"],
    ["run", "b", "--prompt", "x", "--residency", "disk"], ["inspect", "a", "b"], ["inspect", "a", "--yaml"],
])  # fmt: skip
def test_wrong_usage_is_exit_status_2(arguments: list[str]) -> None:
    result = run_cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize("command", [["verify"], ["inspect"], ["run", "--prompt", "Why?"]])
def test_long_error_is_one_unwrapped_line(command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / ("a very long name " * 10) / "and another one below it"
    error = only_error_line(run_cli(*command, folder))
    assert str(folder) in error and len(error) > 200


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_process("-m", "vlmdeploy", "--debug", "verify", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "vlmdeploy.errors.BundleError: " in done.stderr


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize(("number", "status", "line"), [
    (signal.SIGINT, 1, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM"),
    (signal.SIGHUP, 129, "stopped by SIGHUP"),
])  # fmt: skip
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_signal_is_told_as_such_whatever_a_library_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int, line: str, debug: list[str]
) -> None:
    """torch once answered Ctrl-C with "could not determine the shape", and onnxruntime seemed not to be installed."""

    def compiled_code(*arguments: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException:
            raise ValueError("could not determine the shape of object") from None

    monkeypatch.setattr("vlmdeploy.runtime.replay.replay", compiled_code)
    result = run_cli(*debug, "verify", "bundle")
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", f"Error: {line}\n")


def test_missing_toolchain_says_what_to_install(ckpt: Path, tmp_path: Path) -> None:
    arguments = ["export", "--ckpt", ckpt, "--target", "ort-fp32", "--out", tmp_path / "bundle"]
    script = without("torch").replace('ImportError("blocked: " + name)', 'ModuleNotFoundError("blocked", name=name)')
    done = run_process("-c", f"{script}\nfrom vlmdeploy.cli import main\nmain({[str(item) for item in arguments]!r})")
    assert done.returncode == 1
    assert done.stderr == 'Error: torch is not installed: pip install "vlmdeploy[cpu,toolchain]"\n'


@pytest.mark.parametrize(
    ("module", "extra"),
    [("jinja2", "report"), ("matplotlib", "report"), ("onnxruntime", "cpu"), ("onnx", "cpu,toolchain")],
)
def test_missing_module_is_told_with_the_extra_that_brings_it(module: str, extra: str) -> None:
    line = error_line(ModuleNotFoundError(f"No module named '{module}'", name=module))
    assert line == f'{module} is not installed: pip install "vlmdeploy[{extra}]"'


# export


def test_export_says_what_it_made(ckpt: Path, tmp_path: Path) -> None:
    options = ["--ckpt", ckpt, "--target", "ort-int4", "--out", tmp_path / "bundle", "--threads", 1]
    result = run_cli("export", *options, "--group", 16, "--quant", "rtn")
    assert result.exit_code == 0
    assert "verified bundle" in result.stdout and "decoder int4" in result.stdout and "group" in result.stdout
    assert result.stderr == ""


def test_export_json_is_one_document_with_warnings_apart(ckpt: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options = ["--ckpt", ckpt, "--target", "ort-int4", "--quant", "rtn", "--out", out, "--threads", 1, "--json"]
    result = run_cli("export", *options)
    document = only_json_document(result)
    assert document["bundle"] == str(out)
    assert [f"Warning: {warning}" for warning in document["warnings"]] == result.stderr.splitlines()
    assert "group size 128 does not fit every width" in document["warnings"][0]
    assert document["manifest"]["verification"]["passed"] is True
    assert document["manifest"]["target"] == read_manifest(out).target


def test_export_options_reach_the_bundle(ckpt: Path, tmp_path: Path) -> None:
    parts = {"vision": "fp16", "connector": "fp32", "lm-head": "int4", "embedding": "int8"}
    chosen = [item for part, precision in parts.items() for item in (f"--{part}", precision)]
    options = ["--out", tmp_path / "bundle", "--context", 40, "--template", "vqa", "--threads", 1, "--quant", "rtn"]
    assert run_cli("export", "--ckpt", ckpt, "--target", "ort-int4", *options, *chosen).exit_code == 0
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.precision == {
        "vision": "fp16", "connector": "fp32", "decoder": "int4", "lm_head": "int4", "embedding": "int8", "kv": "fp32",
    }  # fmt: skip
    assert (manifest.context_tokens, manifest.default_template) == (40, "vqa")


# verify


def test_verify_with_and_without_the_checkpoint(ckpt: Path, bundle: Path) -> None:
    for more, num_stages in (([], 2), (["--ckpt", ckpt], 30)):
        result = run_cli("verify", bundle, *more, "--threads", 1)
        assert result.exit_code == 0 and "logits" in result.stdout
        document = only_json_document(run_cli("verify", bundle, *more, "--threads", 1, "--json"))
        assert document["passed"] is True and len(document["stages"]) >= num_stages
        assert {"stage", "check", "max_error", "tolerance"} <= set(document["stages"][0])
        verdict = f"{bundle}: agrees in all {len(document['stages'])} comparisons"
        assert result.stdout.splitlines()[0] == verdict, "a line of its own, however long the path is"


def test_verify_refuses_an_altered_bundle(bundle: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(bundle, tmp_path / "altered"))
    flip_byte(altered / "decoder_text.data")
    assert "decoder_text.data: altered" in only_error_line(run_cli("verify", altered, "--json"))


def test_verify_finds_a_bundle_that_answers_otherwise(ckpt: Path, bundle: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(bundle, tmp_path / "altered"))
    other = export(write_text_checkpoint(tmp_path / "other", seed=6), tmp_path / "other_bundle", "ort-int4")
    shutil.copy(other / "vision.data", altered)
    sign_again(altered)
    assert "image rows (shipped) is the first stage that differs" in only_error_line(run_cli("verify", altered))
    assert "vision.layer.0 (structure) is the first" in only_error_line(run_cli("verify", altered, "--ckpt", ckpt))


# run


def test_run_prints_the_answer_and_nothing_else(bundle: Path, photo: Path) -> None:
    """The picture as a path, or as a data URL."""
    session = vlmdeploy.open(bundle, threads=1)
    content = [{"type": "image", "image": str(photo)}, {"type": "text", "text": "What?"}]
    answer = session.answer([{"role": "user", "content": content}], SamplingOptions(max_new_tokens=8))
    url = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    for image in (photo, url):
        result = run_cli("run", bundle, "--image", image, "--prompt", "What?", "--max-new-tokens", 8, "--threads", 1)
        assert (result.exit_code, result.stdout, result.stderr) == (0, answer.text + "\n", "")


def test_run_json_holds_the_whole_answer(bundle: Path, photo: Path, says_a_box: str) -> None:
    document = only_json_document(run_cli("run", bundle, "--image", photo, "--prompt", "Where?", "--json"))
    assert set(document) == RUN_KEYS and set(document["timings_ms"]) == PHASES
    assert document["text"] == says_a_box
    assert document["boxes"] == [{"norm": [100, 250, 500, 750], "pixels": [30.0, 50.0, 150.0, 150.0]}]
    assert document["ids"] == [*byte_tokenizer().encode(says_a_box).ids, 2]
    assert document["new_tokens"] == len(document["ids"]) and document["prompt_tokens"] > 18
    assert all(milliseconds > 0 for milliseconds in document["timings_ms"].values())


def test_text_only_answer_has_no_boxes(bundle: Path, says_a_box: str) -> None:
    document = only_json_document(run_cli("run", bundle, "--prompt", "Where?", "--json"))
    assert set(document) == RUN_KEYS
    assert (document["text"], document["boxes"], document["timings_ms"]["vision"] < 5) == (says_a_box, [], True)


def test_boxes_are_painted_on_the_upright_picture(bundle: Path, photo: Path, tmp_path: Path, says_a_box: str) -> None:
    drawn = tmp_path / "drawn.png"
    result = run_cli("run", bundle, "--image", photo, "--prompt", "Where?", "--draw", drawn)
    assert (result.exit_code, result.stdout) == (0, says_a_box + "\n")
    with Image.open(photo) as before, Image.open(drawn) as after:
        assert after.size == before.size == (300, 200)
        different = [x for x in range(300) if before.getpixel((x, 100)) != after.getpixel((x, 100))]
    assert {30, 150} <= set(different) <= {*range(28, 34), *range(146, 152)}


def test_a_picture_above_the_limit_is_refused_or_decoded_smaller(
    bundle: Path, photo: Path, tmp_path: Path, says_a_box: str
) -> None:
    """Boxes are in pixels of the whole picture, and painted where they belong on the smaller one."""
    question, small = ("--prompt", "Where?", "--json", "--image"), ("--max-megapixels", 0.02)
    line = only_error_line(run_cli("run", bundle, *question, photo, *small))
    assert "300 x 200 pixels (0 megapixels), at most 0.02 are read" in line and "--max-megapixels" in line
    with Image.open(photo) as image:
        image.save(tmp_path / "photo.jpg")
    drawn = tmp_path / "drawn.png"
    document = only_json_document(run_cli("run", bundle, *question, tmp_path / "photo.jpg", *small, "--draw", drawn))
    assert document["boxes"] == [{"norm": [100, 250, 500, 750], "pixels": [30.0, 50.0, 150.0, 150.0]}]
    with Image.open(drawn) as after:
        assert after.size == (150, 100)


@pytest.mark.parametrize("name", ["drawn.xyz", "nowhere/drawn.png"])
def test_picture_that_cannot_be_written_is_one_line(bundle: Path, photo: Path, tmp_path: Path, name: str) -> None:
    options = ["--image", photo, "--prompt", "Where?", "--max-new-tokens", 2, "--json", "--draw", tmp_path / name]
    assert f"{name}: the picture cannot be written" in only_error_line(run_cli("run", bundle, *options))


@pytest.mark.parametrize(("options", "message"), [
    (["--image", "nowhere.png"], "nowhere.png: no such file"),
    (["--image", __file__], "test_cli.py: not a picture or damaged"),
    (["--image", "PHOTO", "--image", "PHOTO"], "an image was given to a second image slot, and this model has one"),
    (["--draw", "out.png"], "--draw paints boxes on the picture: give --image too"),
    (["--template", "poem"], 'template "poem" is not in this bundle; it has: '),
    (["--max-new-tokens", 0], "max_new_tokens is 0, expected 1 or more"),
    (["--temperature", -1], "temperature is -1.0"),
    (["--top-p", 0], "top_p is 0.0"),
    (["--prompt", "long " * 100], "the context holds 128: shorten the text"),
])  # fmt: skip
def test_question_that_cannot_be_asked_is_one_line(bundle: Path, photo: Path, options: list[Any], message: str) -> None:
    options = [photo if option == "PHOTO" else option for option in options]
    assert message in only_error_line(run_cli("run", bundle, "--prompt", "Why?", *options))


def test_sampling_options_reach_the_answer(bundle: Path) -> None:
    drawn = ["--prompt", "Why?", "--max-new-tokens", 12, "--temperature", 2, "--top-k", 50, "--top-p", 0.9]
    first, again, other = (run_cli("run", bundle, *drawn, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other
    whole = run_cli("run", bundle, "--prompt", "Why?", "--max-new-tokens", 12).stdout[:-1]
    stopped = run_cli("run", bundle, "--prompt", "Why?", "--max-new-tokens", 12, "--stop", whole[4:6]).stdout[:-1]
    assert stopped == whole[: whole.index(whole[4:6])]


def test_run_needs_no_torch(bundle: Path) -> None:
    arguments = ["run", str(bundle), "--prompt", "Why?", "--max-new-tokens", "4", "--json"]
    script = f"{without('torch', 'onnx', 'safetensors')}\nfrom vlmdeploy.cli import main\nmain({arguments!r})"
    done = run_process("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)) == RUN_KEYS


# inspect


def test_inspect_describes_a_checkpoint(ckpt: Path) -> None:
    document = only_json_document(run_cli("inspect", ckpt, "--json"))
    assert (document["family"], document["tokens_per_image"], document["vocab_size"]) == ("cogvlm", 18, 259)
    assert document["parameters"]["total"] == sum(
        count for part, count in document["parameters"].items() if part != "total"
    )
    result = run_cli("inspect", ckpt)
    assert result.exit_code == 0 and "cogvlm" in result.stdout and "parameters" in result.stdout


def test_inspect_describes_a_bundle(bundle: Path) -> None:
    document = only_json_document(run_cli("inspect", bundle, "--json"))
    assert (document["family"], document["target"], document["precision"]["decoder"]) == ("cogvlm", "ort-int4", "int4")
    assert document["verification"]["passed"] is True
    result = run_cli("inspect", bundle)
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("ort-int4", "128 tokens", "tokenizer", "verified", "comparisons"))


def test_inspect_of_something_else_is_one_line(tmp_path: Path) -> None:
    assert "config.json: no such file" in only_error_line(run_cli("inspect", tmp_path))
    assert "no such folder" in only_error_line(run_cli("inspect", tmp_path / "nowhere"))


def test_names_with_brackets_are_shown_as_they_are(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "int4 [bold] [/x]"))
    result = run_cli("inspect", folder)
    assert result.exit_code == 0 and "int4 [bold] [/x]" in result.stdout
