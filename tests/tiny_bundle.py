"""Bundles of tiny random models for the tests, and the command line as other people meet it.

bundle = export(write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "bundle", "ort-int4")
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.tiny_checkpoint import write_tiny_checkpoint
from vlmdeploy.bundle import hash_file, read_manifest, write_manifest

ROOT = Path(__file__).parent.parent
# Widths that groups of 16 and 32 divide; every id has text: three special tokens and one token per byte.
TEXT_MODEL: dict[str, Any] = {"hidden": 64, "heads": 4, "mlp": 96, "vision_width": 32, "vision_mlp": 64, "vocab": 259}


def write_text_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A tiny CogVLM with a tokenizer whose tokens are bytes."""
    write_tiny_checkpoint(folder, "cogvlm", **TEXT_MODEL | overrides)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def byte_tokenizer() -> Tokenizer:
    """Ids 0..2 are <unk>, <s>, </s>; byte-level characters follow."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words[:3]])
    return tokenizer


def export(ckpt: Path, out: Path, target: str = "ort-fp32", routed_plugin: Any = "auto", **options: Any) -> Path:
    """Export and return the bundle's folder. `options` are fields of ExportOptions.

    One thread: models this small take several times longer on more.
    """
    import torch

    from vlmdeploy.export.engines.build import BuildOptions
    from vlmdeploy.export.exporter import export_bundle
    from vlmdeploy.export.options import ExportOptions

    torch.set_num_threads(1)
    defaults: dict[str, Any] = {"threads": 1, "build": BuildOptions(routed_plugin=routed_plugin)}
    export_bundle(ckpt, out, ExportOptions(target, **defaults | options))
    return out


def picture(seed: int = 0, size: tuple[int, int] = (30, 20)) -> Image.Image:
    """A random picture, width and height in pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_byte(path: Path, place: int | None = None) -> None:
    """Flip the highest bit of one byte of a file; by default of the one in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 0x80
    path.write_bytes(content)


def sign_again(folder: Path) -> None:
    """Make an altered bundle's hashes fit again, as somebody who knows the format could."""
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, files={name: hash_file(folder / name) for name in manifest.files}))


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change top-level entries of the manifest and sign it again."""
    write_manifest(folder, replace(read_manifest(folder), **changes))


def run_cli(*arguments: object) -> Result:
    """The command line in this process; `stdout` and `stderr` apart."""
    from vlmdeploy.cli import main

    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in a process of its own that finds vlmdeploy."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def without(*modules: str) -> str:
    """Source code after which importing these modules, or anything inside them, fails."""
    return f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {modules!r}):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""


def only_error_line(result: Result) -> str:
    """The one line on stderr of a refused command, with exit status 1 and nothing on stdout."""
    lines = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (1, ""), f"{result.exit_code}: {result.stdout}{result.stderr}"
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def only_json_document(result: Result) -> Any:
    """What a command with --json printed: one document and nothing else on stdout."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
