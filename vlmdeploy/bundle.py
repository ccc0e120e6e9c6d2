"""A bundle: a folder with `manifest.json` and the files that it lists with size and SHA-256.

The manifest's last entry is the SHA-256 of the bytes before it, checked first. Format versions are `major.minor`: this
version refuses a higher major and ignores unknown keys.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmdeploy.errors import BundleError
from vlmdeploy.manifest import FORMAT_VERSION, ROUTED_FORMAT_VERSION, FileEntry, Manifest
from vlmdeploy.records import parse_object, record_of

MANIFEST_NAME = "manifest.json"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically, with its own hash as the last entry."""
    body = json.dumps(asdict(manifest), indent=1, ensure_ascii=False)
    assert body.endswith("\n}"), "json.dumps with indent ends an object on its own line"
    signed = body[:-2].encode() + b',\n "sha256": "'
    digest = hashlib.sha256(signed).hexdigest()
    aside = folder / f".{MANIFEST_NAME}"
    aside.write_bytes(signed + digest.encode() + b'"\n}\n')
    aside.replace(folder / MANIFEST_NAME)


def has_manifest(folder: Path) -> bool:
    """Whether to read a folder as a bundle."""
    return (folder / MANIFEST_NAME).is_file()


def is_bundle(folder: Path) -> bool:
    """Whether vlmdeploy wrote this folder as a bundle: it has our manifest, even altered, truncated or of another
    version."""
    if not has_manifest(folder):
        return False
    try:
        read_manifest(folder)
    except BundleError:
        content = (folder / MANIFEST_NAME).read_bytes()
        return all(key in content for key in (b'"family"', b'"target"', b'"context_tokens"'))  # its first entries
    return True


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises BundleError if it is missing, truncated, altered or of a newer format."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; expected a bundle made by `vlmdeploy export`")
    if not path.is_file():
        raise BundleError(f"{folder}: has no {MANIFEST_NAME}; expected a bundle made by `vlmdeploy export`")
    content = path.read_bytes()
    data = _checked_json(path, content)
    _check_version(path, data)
    return record_of(Manifest, data, str(path), BundleError)


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
    newest = ROUTED_FORMAT_VERSION if data.get("plugin") else FORMAT_VERSION
    if int(major) > int(newest.partition(".")[0]):
        raise BundleError(
            f"{path}: format {version} is newer than {newest}, the newest this version of vlmdeploy reads; "
            "update vlmdeploy on this device or export the bundle again with the version installed here"
        )


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, read in blocks of 1 MiB."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())
