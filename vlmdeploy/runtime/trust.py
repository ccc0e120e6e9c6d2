"""Whom the user trusts to run native code: engines and plugin libraries are loaded only from bundles that were built on
this machine, or that `vlmdeploy trust` recorded here.

A record is a file named by the SHA-256 of manifest.json, which holds the hash of every other file: one changed byte
makes it another bundle.
"""

import os
from pathlib import Path

from vlmdeploy.bundle import read_hashed_manifest
from vlmdeploy.errors import BundleError
from vlmdeploy.runtime.integrity import BundleFiles, check_bundle
from vlmdeploy.runtime.user_folders import keep, put, state_folder


def is_trusted(manifest_sha256: str) -> bool:
    """Whether the user trusts the bundle with this manifest."""
    record = _record(manifest_sha256)
    return record is not None and record.is_file()


def require_trust(files: BundleFiles) -> None:
    """Raise BundleError, naming the command, for a bundle whose native code the user has not trusted."""
    if not is_trusted(files.manifest_sha256):
        raise BundleError(
            f"{files.folder}: its engines are native code, not built on this machine: if you trust whoever made them, "
            f"`vlmdeploy trust {files.folder}`; or build your own with `vlmdeploy build {files.folder}`"
        )


def record_trust(folder: Path, manifest_sha256: str) -> None:
    """Trust a bundle that was built here from now on; warns if that cannot be recorded."""
    keep(_record(manifest_sha256), _where(folder), f"so {folder} is not trusted")


def trust_bundle(folder: Path) -> str:
    """Trust a complete bundle and return the SHA-256 of its manifest. Raises BundleError if it has no native code, is
    damaged, or if that cannot be recorded."""
    files = check_bundle(folder)
    if files.manifest.dialect == "ort":
        raise BundleError(f"{folder}: made for {files.manifest.target}, which has no native code: it needs no trust")
    try:
        put(_record(files.manifest_sha256), _where(folder))
    except OSError as error:
        raise BundleError(f"{folder}: the trust cannot be recorded: {error}") from error
    return files.manifest_sha256


def revoke_bundle(folder: Path) -> str:
    """Trust a bundle no longer and return the SHA-256 of its manifest. Raises BundleError if it was not trusted."""
    digest = read_hashed_manifest(folder)[1]
    record = _record(digest)
    if record is None or not record.is_file():
        raise BundleError(f"{folder}: is not trusted here")
    record.unlink()
    return digest


def _where(folder: Path) -> bytes:
    """What a record tells people who look at it."""
    return os.fsencode(f"{folder.absolute()}\n")


def _record(manifest_sha256: str) -> Path | None:
    folder = state_folder()
    return None if folder is None else folder / "trusted" / manifest_sha256
