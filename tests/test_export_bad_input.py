"""Contract tests: what an export cannot use is one clear line and exit status 1, and whatever stops it, a full disk,
Ctrl-C or a kill, leaves the old bundle whole and nothing half-written in its place.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

import vlmdeploy
from tests.tiny_bundle import (
    ROOT,
    byte_tokenizer,
    content_of,
    export,
    only_error_line,
    only_json_document,
    run_cli,
    write_text_checkpoint,
)
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint, write_tiny_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import BundleError, ExportError

DOWN = "model.layers.1.mlp.language_mlp.down_proj.weight"
STOPPED = {
    signal.SIGINT: (1, "Error: interrupted\n"), signal.SIGTERM: (143, "Error: stopped by SIGTERM\n"),
    signal.SIGKILL: (-9, ""),
}  # fmt: skip
QUESTION = [{"role": "user", "content": "What?"}]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("bad_input") / "ckpt")


def export_by_cli(ckpt: Path, out: Path, *options: object) -> Any:
    return run_cli("export", "--ckpt", ckpt, "--out", out, "--target", "ort-int4", "--quant", "rtn", *options)


def altered_checkpoint(folder: Path, name: str, value: float, **stored: Any) -> Path:
    """A tiny checkpoint with one value of one tensor replaced."""
    tiny = TinyCheckpoint(hidden=64, mlp=96)
    tensors = tiny.tensors()
    tensors[name].reshape(-1)[5] = value
    return write_checkpoint(folder, tiny.config(), tensors, **stored)


# A checkpoint that cannot be used


def truncate_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    for shard in folder.glob("model*"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def nonsense_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": "two"', 1))


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), ["model-00002", "no such file"]),
    (truncate_shard, ["model-00002", "not a whole safetensors file"]),
    (pickle_instead, ["pytorch_model.bin", "pickle", "convert"]),
    (nonsense_config, ["num_hidden_layers", "'two'", "expected a whole number"]),
    (lambda folder: (folder / "config.json").unlink(), ["config.json", "no such file"]),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer.json", "not JSON"]),
    (shutil.rmtree, ["no such folder"]),
], ids=["missing_shard", "truncated_shard", "pickle", "config", "no_config", "tokenizer", "no_folder"])  # fmt: skip
def test_unusable_checkpoint_is_one_line(damage: Callable[[Path], Any], words: list[str], tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "ckpt", num_shards=3)
    damage(folder)
    error = only_error_line(export_by_cli(folder, tmp_path / "bundle"))
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("*bundle*"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight", "model.norm.weight", "model.vision.boi"])
def test_weight_that_is_not_finite_is_named(name: str, value: float, tmp_path: Path) -> None:
    folder = altered_checkpoint(tmp_path / "ckpt", name, value)
    error = only_error_line(export_by_cli(folder, tmp_path / "bundle"))
    assert f'model.safetensors: tensor "{name}" holds NaN or Inf' in error
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize(("name", "target", "ours", "advice"), [
    (DOWN, "ort-fp16", "decoder.layers.1.language.down.weight", "--target ort-fp32"),
    (DOWN, "ort-int4", "decoder.layers.1.language.down.weight", "--target ort-fp32"),
    ("lm_head.weight", "ort-fp16", "lm_head.weight", "--lm-head fp32"),
    ("model.embed_tokens.weight", "ort-fp16", "embedding.weight", "--embedding fp32"),
    ("model.vision.transformer.layers.0.mlp.fc1.weight", "ort-fp16", "vision.layers.0.fc1.weight", "--vision fp32"),
    ("model.vision.linear_proj.linear_proj.weight", "ort-fp16", "connector.linear.weight", "--connector fp32"),
])  # fmt: skip
def test_value_beyond_fp16_is_named_with_a_way_out(
    name: str, target: str, ours: str, advice: str, tmp_path: Path
) -> None:
    folder = altered_checkpoint(tmp_path / "ckpt", name, 3e6, dtype="bfloat16")
    options = ["--ckpt", folder, "--out", tmp_path / "bundle", "--quant", "rtn", "--threads", 1]
    error = only_error_line(run_cli("export", "--target", target, *options))
    assert f'"{ours}"' in error and "fp16" in error and error.endswith(f"keep that part in fp32 with {advice}")
    assert run_cli("export", "--help").stdout.count(advice.split()[0]) > 0


# Options that do not fit


@pytest.mark.parametrize(("options", "message"), [
    (["--context", 20], "--context is 20, expected 21 (an image and a word) to 128 (the checkpoint's own context)"),
    (["--context", 129], "--context is 129, expected 21 (an image and a word) to 128"),
    (["--template", "poem"], '--template is "poem", expected one of'),
    (["--group", 48], "group size 48 is not supported; known: 128, 64, 32, 16"),
    (["--tokenizer", "nowhere"], "tokenizer nowhere: no such file"),
    (["--tokenizer", ROOT / "vlmdeploy"], "vlmdeploy: holds no tokenizer.json and no tokenizer.model"),
    (["--tokenizer", ROOT / "pyproject.toml"], "pyproject.toml: starts with"),
])  # fmt: skip
def test_option_that_does_not_fit_is_one_line(ckpt: Path, options: list[object], message: str, tmp_path: Path) -> None:
    assert message in only_error_line(export_by_cli(ckpt, tmp_path / "bundle", *options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    ["--context", 0], ["--threads", 0], ["--seed", -1], ["--target", "trt-int5"], ["--quant", "gptq"],
    ["--vision", "int3"],
])  # fmt: skip
def test_senseless_value_is_wrong_usage(ckpt: Path, options: list[object], tmp_path: Path) -> None:
    result = export_by_cli(ckpt, tmp_path / "bundle", *options)
    assert result.exit_code == 2 and "Usage:" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_context_at_all_is_an_error(ckpt: Path, tmp_path: Path) -> None:
    """Zero was once taken for "not given"."""
    with pytest.raises(ExportError, match="--context is 0"):
        export(ckpt, tmp_path / "bundle", context_tokens=0)


@pytest.mark.parametrize("words", [{"<s>": 259}, {"<s>": 1, "far": 300}])
def test_tokenizer_with_ids_beyond_the_vocabulary_is_refused(ckpt: Path, words: dict[str, int], tmp_path: Path) -> None:
    """The number of tokens says nothing: ids may have gaps."""
    Tokenizer(models.WordLevel(words, unk_token="<s>")).save(str(tmp_path / "tokenizer.json"))
    error = only_error_line(export_by_cli(ckpt, tmp_path / "bundle", "--tokenizer", tmp_path / "tokenizer.json"))
    assert f"has ids up to {max(words.values())}, the model's vocabulary only 0..258" in error


def test_smaller_tokenizer_is_taken(tmp_path: Path) -> None:
    """Published vocabularies are padded to round numbers."""
    ckpt = write_text_checkpoint(tmp_path / "ckpt", vocab=320)
    manifest = read_manifest(export(ckpt, tmp_path / "bundle"))
    assert manifest.has_tokenizer and manifest.embedding.vocab_size == 320


# Without a tokenizer


def test_export_without_a_tokenizer_warns_and_text_says_what_is_missing(tmp_path: Path) -> None:
    tiny = TinyCheckpoint()
    bundle = tmp_path / "bundle"
    ckpt = write_tiny_checkpoint(tmp_path / "ckpt")
    result = run_cli("export", "--ckpt", ckpt, "--out", bundle, "--target", "ort-fp32", "--json", "--threads", 1)
    assert "--tokenizer FILE" in only_json_document(result)["warnings"][0]
    assert result.stderr.startswith("Warning: ") and "takes ids only" in result.stderr
    session = vlmdeploy.open(bundle, threads=1)
    assert len(session.generate_ids(np.array(tiny.prompt([5, 6], True)), tiny.pixels(), 4)) == 4
    for call in (session.generate, lambda messages: session.tokenizer):
        with pytest.raises(BundleError, match=r"an ids-only bundle.* export again with --tokenizer FILE"):
            call(QUESTION)
    assert "export again with --tokenizer FILE" in only_error_line(run_cli("run", bundle, "--prompt", "What?"))


def test_tokenizer_may_come_from_elsewhere(tmp_path: Path) -> None:
    ckpt = write_text_checkpoint(tmp_path / "ckpt")
    (ckpt / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    for name, source in (("from_file", tmp_path / "tokenizer.json"), ("from_folder", tmp_path)):
        bundle = export(ckpt, tmp_path / name, tokenizer=source)
        ids = vlmdeploy.open(bundle, threads=1).tokenizer.encode("Hé")
        assert ids == byte_tokenizer().encode("Hé").ids


# An output that is there already


def test_existing_output_is_refused_and_replaced_only_by_force(ckpt: Path, tmp_path: Path) -> None:
    bundle = export(ckpt, tmp_path / "bundle")
    before = content_of(bundle)
    assert "exists already; choose another output or replace it with --force" in only_error_line(
        export_by_cli(ckpt, bundle)
    )
    assert content_of(bundle) == before
    assert export_by_cli(ckpt, bundle, "--force", "--threads", 1).exit_code == 0
    assert read_manifest(bundle).target == "ort-int4"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_force_replaces_a_damaged_bundle_of_ours(ckpt: Path, tmp_path: Path) -> None:
    bundle = export(ckpt, tmp_path / "bundle")
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:1000])
    export(ckpt, bundle, force=True)
    assert vlmdeploy.open(bundle, check="full", threads=1)


@pytest.mark.parametrize("manifest", [None, '{"name": "a web page", "icons": []}', ""])
def test_force_never_replaces_what_somebody_else_made(ckpt: Path, manifest: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("three years")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    before = content_of(out)
    assert "was not made by vlmdeploy" in only_error_line(export_by_cli(ckpt, out, "--force"))
    assert content_of(out) == before


def test_bad_option_is_found_before_the_old_bundle_is_touched(ckpt: Path, tmp_path: Path) -> None:
    bundle = export(ckpt, tmp_path / "bundle")
    before = content_of(bundle)
    only_error_line(export_by_cli(ckpt, bundle, "--force", "--context", 5))
    assert content_of(bundle) == before


# A full disk


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing beyond this size fails as on a full disk (Python ignores the signal that would come with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Which file is the first that is too large: the tokenizer, the vision data, its graph, the embedding.
@pytest.mark.parametrize("num_bytes", [1000, 10_000, 22_000, 30_000, 100_000])
def test_full_disk_is_one_line_and_the_old_bundle_stays(ckpt: Path, num_bytes: int, tmp_path: Path) -> None:
    bundle = export(ckpt, tmp_path / "bundle")
    before = content_of(bundle)
    with files_of_at_most(num_bytes):
        result = export_by_cli(ckpt, bundle, "--force", "--threads", 1)
    assert "bundle: cannot be written: File too large" in only_error_line(result)
    assert content_of(bundle) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# Ctrl-C and kill


def start_export(ckpt: Path, out: Path) -> subprocess.Popen[str]:
    """An export in a process of its own, up to the moment in which it starts to write."""
    options = ["--ckpt", ckpt, "--target", "ort-int4", "--quant", "rtn", "--out", out, "--force", "--threads", 1]
    command = [sys.executable, "-m", "vlmdeploy", "export", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(path.name.startswith(".bundle.") for path in out.parent.iterdir()):
        time.sleep(0.005)
    return process


def stop_at_a_random_moment(ckpt: Path, out: Path, sent: signal.Signals, delay_s: float) -> tuple[int, str]:
    process = start_export(ckpt, out)
    time.sleep(delay_s)
    process.send_signal(sent)
    stderr = process.communicate(timeout=60)[1]
    return process.returncode, stderr


def assert_old_or_new(bundle: Path, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    assert content_of(bundle) in (old, new), "neither the old bundle nor the new one"
    assert vlmdeploy.open(bundle, check="full", threads=1)


ROUNDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed > 0 else []) for seed in range(10)]


@pytest.fixture(scope="module")
def old_and_new(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles that differ: the one that stands there, and the one that an undisturbed export puts there."""
    folder = tmp_path_factory.mktemp("old_and_new")
    return export(ckpt, folder / "old", "ort-fp32"), export(ckpt, folder / "new", "ort-int4")


@pytest.mark.parametrize("seed", ROUNDS)
@pytest.mark.parametrize("sent", STOPPED)
def test_stopped_export_leaves_a_whole_bundle(
    ckpt: Path, old_and_new: tuple[Path, Path], sent: signal.Signals, seed: int, tmp_path: Path
) -> None:
    """Whenever it is stopped; and the next export removes what a killed one could not."""
    old, new = map(content_of, old_and_new)
    bundle = shutil.copytree(old_and_new[0], tmp_path / "bundle")
    status, stderr = stop_at_a_random_moment(ckpt, bundle, sent, random.Random(seed).uniform(0, 0.4))
    assert_old_or_new(bundle, old, new)
    assert (status, stderr) in (STOPPED[sent], (0, ""))
    assert sent is signal.SIGKILL or [path.name for path in tmp_path.iterdir()] == ["bundle"]
    export(ckpt, bundle, "ort-int4", force=True)
    assert content_of(bundle) == new
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_first_export_leaves_no_bundle(ckpt: Path, seed: int, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    stop_at_a_random_moment(ckpt, bundle, signal.SIGKILL, random.Random(seed).uniform(0, 0.2))
    if bundle.exists():
        assert vlmdeploy.open(bundle, check="full", threads=1)
    export(ckpt, bundle, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
