"""Is this bundle complete, unaltered and verified? The user's cache remembers hashes by path, size, modification
time and inode, so that later opens only look at the files' status."""

import json
import logging
import os
from pathlib import Path

from vlmdeploy.bundle import hash_file, read_manifest
from vlmdeploy.errors import BundleError
from vlmdeploy.manifest import Manifest

logger = logging.getLogger("vlmdeploy")


def cache_folder() -> Path:
    """The user's cache folder of vlmdeploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmdeploy"


def check_bundle(folder: Path, check: str = "auto", without: str | None = None) -> Manifest:
    """The manifest of a complete bundle. check: "auto" trusts remembered hashes, "full" hashes every file; without:
    prefix of file names to skip.

    Raises BundleError naming the file that is missing, of another size, or altered.
    """
    if check not in ("auto", "full"):
        raise BundleError(f'check is {check!r}, expected "auto" or "full"')
    manifest = read_manifest(folder)
    known = {} if check == "full" else _remembered()
    fresh: dict[str, str] = {}
    for name, entry in manifest.files.items():
        if without is not None and name.startswith(without):
            continue
        path = folder / name
        _check_size(path, entry.bytes)
        key = _key(path)
        if known.get(key) != entry.sha256:
            if hash_file(path).sha256 != entry.sha256:
                raise BundleError(f"{path}: altered, its SHA-256 is not the manifest's; copy the bundle again")
            fresh[key] = entry.sha256
    if manifest.verification is None or not manifest.verification.passed:
        raise BundleError(f"{folder}: was never verified against PyTorch; export it again")
    if fresh:
        _remember(fresh)
    return manifest


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing, the manifest lists it; copy the bundle again")
    if path.stat().st_size != expected:
        raise BundleError(f"{path}: {path.stat().st_size} bytes, the manifest says {expected}; copy the bundle again")


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads((cache_folder() / "hashes.json").read_text())
    except (OSError, ValueError):
        return {}  # no cache yet, or a truncated one: hash everything again
    return known if isinstance(known, dict) else {}


def _remember(fresh: dict[str, str]) -> None:
    content = json.dumps(_remembered() | fresh).encode()
    keep(cache_folder() / "hashes.json", content, "so bundles are hashed at every open")


def keep(path: Path, content: bytes, otherwise: str) -> None:
    """Write a file of the user's cache atomically; on failure warn with the consequence, `otherwise`."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        logger.warning("%s: cannot be written (%s), %s", path, error.strerror, otherwise)
