"""Regression tests of what is read in a checkpoint's folder: regular files in it, of bounded size, whatever links and
headers say. Contract: the layout of Hugging Face's cache works as it is."""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gptq_checkpoint import write_gptq_checkpoint
from tests.tiny_bundle import run_cli, write_text_checkpoint
from tests.tiny_checkpoint import INDEX_NAME, write_tiny_checkpoint
from vlmdeploy import load_model
from vlmdeploy.calib.checkpoint_writer import COPIED
from vlmdeploy.cli import main
from vlmdeploy.errors import ConfigError, VlmdeployError, WeightsError
from vlmdeploy.model import shards
from vlmdeploy.model.checkpoint import LICENCE_PATTERNS, Checkpoint
from vlmdeploy.model.tokenizer import find_tokenizer, import_tokenizer

SINGLE = "model.safetensors"
EMPTY_TENSOR = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized checkpoint with every file that is read, alone in its folder."""
    written = write_gptq_checkpoint(tmp_path / "ckpt")
    quantization = json.loads((written / "config.json").read_text())["quantization_config"]
    (written / "quantize_config.json").write_text(json.dumps(quantization))
    (written / "generation_config.json").write_text("{}")
    (written / "LICENSE").write_text("mine")
    return written


def read_all(folder: Path, into: Path, follow_links: bool = False) -> None:
    """Everything that a command reads of a checkpoint."""
    checkpoint = Checkpoint(folder, follow_links)
    checkpoint.report()
    source = find_tokenizer(folder, follow_links)
    assert source is not None and import_tokenizer(source)
    into.mkdir(exist_ok=True)
    checkpoint.copy_files(COPIED, into)
    load_model(folder, follow_links=follow_links)


# Links

FILES = ("config.json", "quantize_config.json", "generation_config.json", "tokenizer.json", SINGLE, "LICENSE")


@pytest.mark.parametrize("is_absolute", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_followed_only_if_asked_for(
    folder: Path, tmp_path: Path, name: str, is_absolute: bool
) -> None:
    """A "licence" that was a link to a secret of the user's went into what is given to others."""
    elsewhere = tmp_path / f"secret-{name}"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere if is_absolute else f"../{elsewhere.name}")
    with pytest.raises(VlmdeployError, match=rf"ckpt/{name}: leads out of its folder, to .*; --follow-links allows it"):
        read_all(folder, tmp_path / "copied")
    assert not (tmp_path / "copied" / name).exists()
    read_all(folder, tmp_path / "copied", follow_links=True)


def test_a_link_within_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "files").mkdir()
    for name in FILES:
        (folder / name).rename(folder / "files" / name)
        (folder / name).symlink_to(f"files/{name}")
    read_all(folder, tmp_path / "copied")


@pytest.mark.parametrize("by", ["folder", "link to the folder", "link to the cache"])
@pytest.mark.parametrize("is_absolute", [True, False])
def test_the_cache_of_hugging_face_is_read_as_it_is(folder: Path, tmp_path: Path, is_absolute: bool, by: str) -> None:
    root = tmp_path / "hub" / "models--a--b"
    snapshot = root / "snapshots" / "0123abcd"
    for path in (root / "blobs", snapshot):
        path.mkdir(parents=True)
    for name in FILES:
        blob = (folder / name).rename(root / "blobs" / f"{len(name):064x}")
        (snapshot / name).symlink_to(blob if is_absolute else f"../../blobs/{blob.name}")
    (tmp_path / "model").symlink_to(snapshot)
    (tmp_path / "cache").symlink_to(tmp_path / "hub")
    given = {
        "folder": snapshot,
        "link to the folder": tmp_path / "model",
        "link to the cache": tmp_path / "cache" / "models--a--b" / "snapshots" / "0123abcd",
    }
    read_all(given[by], tmp_path / "copied")


@pytest.mark.parametrize("name", FILES)
def test_a_broken_link_is_told(folder: Path, tmp_path: Path, name: str) -> None:
    """A quantize_config.json that was a broken link counted as absent."""
    (folder / name).unlink()
    (folder / name).symlink_to("gone")
    with pytest.raises(VlmdeployError, match=f"ckpt/{name}: no such file"):
        read_all(folder, tmp_path / "copied")


def test_a_licence_whose_name_cannot_be_printed_is_told(folder: Path, tmp_path: Path) -> None:
    """Its name went into the manifest, which could then not be written."""
    (folder / "LICENSE\udcff").write_text("x")
    with pytest.raises(WeightsError, match="its name has characters that cannot be printed"):
        Checkpoint(folder).copy_files(LICENCE_PATTERNS, tmp_path)


def test_a_folder_of_licences_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSES").mkdir()
    Checkpoint(folder).copy_files(LICENCE_PATTERNS, tmp_path)
    assert (tmp_path / "LICENSE").read_text() == "mine" and not (tmp_path / "LICENSES").exists()


WITH_CHECKPOINTS = ("diff", "export", "inspect", "plan", "quantize", "report", "sweep", "validate", "verify")


def test_every_command_that_reads_a_checkpoint_takes_follow_links() -> None:
    found = [
        name for name in sorted(main.commands) if "follow_links" in {each.name for each in main.commands[name].params}
    ]
    assert found == list(WITH_CHECKPOINTS)


def test_the_option_reaches_the_checkpoint(tmp_path: Path) -> None:
    folder, nowhere, out = write_text_checkpoint(tmp_path / "ckpt"), tmp_path / "nowhere", tmp_path / "out"
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It"}], "task": "vqa"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    commands: list[tuple[object, ...]] = [
        ("inspect", folder),
        ("plan", "--ckpt", folder, "--device", "thor"),
        ("diff", folder, folder),
        ("validate", "--ckpt", folder, "--data", tmp_path / "data.jsonl", "--max-new-tokens", "1"),
        ("quantize", "--ckpt", folder, "--calib", nowhere, "--out", out),
        ("export", "--ckpt", folder, "--target", "ort-fp32", "--tokenizer", nowhere, "--out", out),
    ]
    for command in commands:
        refused, followed = run_cli(*command), run_cli(*command, "--follow-links")
        assert "config.json: leads out of its folder" in refused.stderr, command
        assert followed.exit_code == 0 or "nowhere: no such file" in followed.stderr, command


# Files that are none


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as here:  # a socket's path may not be long
        here.bind(path.name)


ODD: dict[str, Callable[[Path], Any]] = {"a FIFO": fifo, "a socket": listening, "a folder": Path.mkdir}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", [name for name in FILES if name != "LICENSE"])
def test_only_regular_files_are_opened(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A FIFO in the place of a file was waited for, or counted as absent; a folder was an error of the system's."""
    (folder / name).unlink()
    ODD[kind](folder / name)
    with pytest.raises(VlmdeployError, match=rf"ckpt/{name}: is {kind}"):
        read_all(folder, tmp_path / "copied")


def test_a_device_is_not_read(folder: Path, tmp_path: Path) -> None:
    """The licence was copied from /dev/zero until the disk was full."""
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match="LICENSE: is a device"):
        Checkpoint(folder, follow_links=True).copy_files(LICENCE_PATTERNS, tmp_path)


# Names in the index


@pytest.mark.parametrize(
    "name", ["../ckpt/{}", "{folder}/{}", "sub/{}", ".{}", "", ".", "..", "a\0b", "x" * 300, "{}\n"]
)
def test_the_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    """A path in the index was opened, wherever it led."""
    folder = write_tiny_checkpoint(tmp_path / "ckpt", num_shards=2)
    shard = "model-00001-of-00002.safetensors"
    (folder / "sub").mkdir()
    (folder / "sub" / shard).write_bytes((folder / shard).read_bytes())
    index = json.loads((folder / INDEX_NAME).read_text())
    named = name.replace("{}", shard).replace("{folder}", str(folder))
    index["weight_map"] = {key: named if file == shard else file for key, file in index["weight_map"].items()}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"{INDEX_NAME}: tensor .* expected the name of a file beside it"):
        Checkpoint(folder)


def test_an_index_larger_than_any_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_HEADER_BYTES", 1000)
    folder = write_tiny_checkpoint(tmp_path, num_shards=2)
    with pytest.raises(ConfigError, match=rf"{INDEX_NAME}: has .* bytes, at most 1,000 bytes are read"):
        Checkpoint(folder)


# Headers


def test_a_header_longer_than_any_is_not_parsed(tmp_path: Path) -> None:
    """The header of a million tensors took a gigabyte of memory before the first name was compared."""
    text = EMPTY_TENSOR + b" " * shards.MOST_HEADER_BYTES
    write_tiny_checkpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WeightsError, match=r"not a whole safetensors file, .* \(it begins with a header of 16\.8 MB\)"):
        Checkpoint(tmp_path)


# Configs


@pytest.mark.parametrize(
    ("file", "key", "value", "told"),
    [
        ("config.json", "num_hidden_layers", 1001, "expected at most 1000"),
        ("config.json", "rms_norm_eps", 10**400, "expected a number above 0"),
        ("config.json", "eos_token_id", [10**30], "expected a token id or a list of them"),
        ("config.json", "bos_token_id", 10**30, "expected a token id"),
        ("generation_config.json", "temperature", 10**400, "expected a number above 0"),
        ("generation_config.json", "top_k", ["x" * 10_000], r"\['x{70,80}, expected a whole number"),
    ],
)
def test_a_number_beyond_any_is_told(tmp_path: Path, file: str, key: str, value: Any, told: str) -> None:
    """10^400 ended in an OverflowError, a million layers in an hour of counting, a long value in a long message."""
    config = json.loads((write_tiny_checkpoint(tmp_path) / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps((config if file == "config.json" else {}) | {key: value}))
    with pytest.raises(ConfigError, match=f'{file}: "{key}" is .*{told}') as caught:
        Checkpoint(tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 250


def test_a_config_larger_than_any_is_not_parsed(tmp_path: Path) -> None:
    (write_tiny_checkpoint(tmp_path) / "config.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(ConfigError, match=r"config\.json: has 17\.8 MB, at most 16\.8 MB are read"):
        Checkpoint(tmp_path)
