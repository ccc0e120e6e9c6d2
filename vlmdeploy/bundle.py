"""A bundle: a folder with `manifest.json` and the files that it lists with size and SHA-256.

The manifest's last entry is the SHA-256 of the bytes before it, checked first. Format versions are `major.minor`: this
version refuses a higher major and ignores unknown keys.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from vlmdeploy.artifact import write_file
from vlmdeploy.bundle_rules import check_manifest
from vlmdeploy.errors import BundleError
from vlmdeploy.input_files import read_input
from vlmdeploy.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PROMPT_FORMAT_VERSION,
    ROUTED_FORMAT_VERSION,
    FileEntry,
    Manifest,
    json_form,
)
from vlmdeploy.records import parse_object, record_of

MOST_MANIFEST_BYTES = 16 << 20


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically and durably, with its own hash as the last entry."""
    body = json.dumps(json_form(manifest), indent=1, ensure_ascii=False)
    assert body.endswith("\n}"), "json.dumps with indent ends an object on its own line"
    signed = body[:-2].encode() + b',\n "sha256": "'
    digest = hashlib.sha256(signed).hexdigest()
    content = signed + digest.encode() + b'"\n}\n'
    write_file(folder / MANIFEST_NAME, lambda file: file.write(content))


def has_manifest(folder: Path) -> bool:
    """Whether to read a folder as a bundle."""
    return (folder / MANIFEST_NAME).is_file()


def is_bundle(folder: Path) -> bool:
    """Whether vlmdeploy wrote this folder as a bundle: it has our manifest, even altered, truncated or of another
    version."""
    try:
        content = read_input(folder / MANIFEST_NAME, BundleError, MOST_MANIFEST_BYTES)
    except BundleError:
        return False
    return all(key in content for key in (b'"family"', b'"target"', b'"context_tokens"'))  # its first entries


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises BundleError if it is missing, truncated, altered, of a newer format or breaks a
    rule of `bundle_rules`."""
    return read_hashed_manifest(folder)[0]


def read_hashed_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a bundle, as `read_manifest`, and the SHA-256 of its file."""
    path, expected = folder / MANIFEST_NAME, "a bundle made by `vlmdeploy export`"
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; expected {expected}")
    if not path.exists():
        raise BundleError(f"{folder}: has no {MANIFEST_NAME}; expected {expected}")
    content = read_input(path, BundleError, MOST_MANIFEST_BYTES, "a manifest")
    data = _checked_json(path, content)
    _check_version(path, data)
    manifest = record_of(Manifest, data, str(path), BundleError)
    check_manifest(manifest, str(path))
    return manifest, hashlib.sha256(content).hexdigest()


def _checked_json(path: Path, content: bytes) -> dict[str, Any]:
    """The parsed manifest, after checking its bytes against the hash at their end."""
    signed, marker, tail = content.rpartition(b'"sha256": "')
    if not marker or tail[64:] != b'"\n}\n':
        raise BundleError(f"{path}: truncated, its closing hash is missing; copy the bundle again")
    digest = hashlib.sha256(signed + marker).hexdigest()
    if digest != tail[:64].decode("ascii", "replace"):
        raise BundleError(f"{path}: altered, its bytes do not fit its own hash; copy the bundle again")
    return parse_object(content, str(path), BundleError)


def _check_version(path: Path, data: dict[str, Any]) -> None:
    version = str(data.get("format_version", "missing"))
    major, _, minor = version.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise BundleError(f"{path}: format_version is {version!r}, expected major.minor such as {FORMAT_VERSION}")
    if int(major) > int(PROMPT_FORMAT_VERSION.partition(".")[0]):
        raise BundleError(
            f"{path}: format {version} is newer than {PROMPT_FORMAT_VERSION}, the newest this version of vlmdeploy "
            "reads; update vlmdeploy on this device or export the bundle again with the version installed here"
        )
    if int(major) == int(ROUTED_FORMAT_VERSION.partition(".")[0]) and not data.get("plugin"):
        raise BundleError(f"{path}: format {version} is that of routed decoders, but the plugin is missing")


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as stream:
        return hash_stream(stream)


def hash_stream(stream: BinaryIO) -> FileEntry:
    """Size and SHA-256 of an open file from here on, read in blocks of 1 MiB."""
    digest, size = hashlib.sha256(), 0
    while block := stream.read(1 << 20):
        digest.update(block)
        size += len(block)
    return FileEntry(size, digest.hexdigest())
