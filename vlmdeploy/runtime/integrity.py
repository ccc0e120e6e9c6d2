"""Is this bundle complete, unaltered and verified, and is what is read later what was checked?

The user's cache remembers hashes by path, size, times and inode, so that later opens only look at the files' status.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from vlmdeploy.bundle import hash_stream, read_hashed_manifest
from vlmdeploy.errors import BundleError
from vlmdeploy.input_files import MOST_JSON_BYTES, inside, open_input
from vlmdeploy.manifest import Manifest
from vlmdeploy.runtime.graph_check import check_graph
from vlmdeploy.runtime.user_folders import cache_folder, keep

MOST_GRAPH_BYTES = 256 << 20  # of a graph without its weights
SETTLED_NS = 2 * 10**9  # files changed more recently may change again within one tick of the file system's clock

Stamp = tuple[int, int, int, int, int]  # device, inode, size, modification and change time in ns


@dataclass(frozen=True)
class BundleFiles:
    """The files of a bundle. They are opened here and nowhere else: each is what the manifest lists, unchanged since it
    was hashed.

    manifest_sha256: of the file that `manifest` was read from. A bundle that export is still writing has none, and its
    files are not checked. follow_links: also read files that links place outside the folder.
    """

    folder: Path
    manifest: Manifest
    manifest_sha256: str = ""
    follow_links: bool = False
    _known: dict[str, str] = field(default_factory=dict)  # hashes that the cache remembers
    _fresh: dict[str, str] = field(default_factory=dict)  # hashes to remember
    _stamps: dict[str, Stamp] = field(default_factory=dict)  # of the files that were checked

    def open(self, name: str) -> BinaryIO:
        """Open a file to read its bytes. Raises BundleError if it is missing or altered, or leads out of the folder."""
        path = inside(self.folder, name, BundleError, self.follow_links)
        stream = open_input(path, BundleError, "what the manifest lists: copy the bundle again")
        try:
            if self.manifest_sha256:
                self._check(name, path, stream)
        except BaseException:
            stream.close()
            raise
        return stream

    def read(self, name: str, most_bytes: int = MOST_JSON_BYTES) -> bytes:
        """The content of a file, as `open`; raises BundleError for more than `most_bytes`."""
        with self.open(name) as stream:
            content = stream.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise BundleError(
                f"{self.folder / name}: has more than the {most_bytes} bytes that are read of such a file"
            )
        return content

    def graph(self, name: str) -> bytes:
        """A serialized graph: our operators, weights in its own data file. Raises BundleError for any other."""
        info = self.manifest.graphs[name]
        content = self.read(info.file, MOST_GRAPH_BYTES)
        with self.open(info.data_file) as data:
            size = _stamp(data)[2]
        check_graph(content, str(self.folder / info.file), info.data_file, size)
        return content

    def require_unchanged(self, name: str) -> None:
        """Raise BundleError if a file that a library opened by its name has changed since it was hashed."""
        self.open(name).close()

    def check_all(self, without: str | None = None) -> None:
        """Check every file, except those whose names begin with `without`."""
        for name in self.manifest.files:
            if without is None or not name.startswith(without):
                self.require_unchanged(name)
        if self._fresh:
            _remember(self._fresh)

    def _check(self, name: str, path: Path, stream: BinaryIO) -> None:
        """Compare with what was hashed; a file that was not yet, or has changed, is hashed now."""
        stamp, entry = _stamp(stream), self.manifest.files.get(name)
        if self._stamps.get(name) == stamp:
            return
        if entry is None:
            raise BundleError(f"{path}: the manifest does not list it")
        if stamp[2] != entry.bytes:
            raise BundleError(f"{path}: {stamp[2]} bytes, the manifest says {entry.bytes}; copy the bundle again")
        key = ":".join(map(str, (path.resolve(), *stamp)))
        if self._known.get(key) != entry.sha256:
            if hash_stream(stream).sha256 != entry.sha256:
                raise BundleError(f"{path}: altered, its SHA-256 is not the manifest's; copy the bundle again")
            if _stamp(stream) != stamp:
                raise BundleError(f"{path}: is being changed; open the bundle when it is complete")
            stream.seek(0)
            if time.time_ns() - stamp[4] > SETTLED_NS:
                self._fresh[key] = entry.sha256
        self._stamps[name] = stamp


def check_bundle(
    folder: Path, check: str = "auto", without: str | None = None, follow_links: bool = False
) -> BundleFiles:
    """The files of a complete bundle. check: "auto" trusts remembered hashes, "full" hashes every file; without: prefix
    of file names to skip.

    Raises BundleError naming the file that is missing, of another size, or altered.
    """
    if check not in ("auto", "full"):
        raise BundleError(f'check is {check!r}, expected "auto" or "full"')
    manifest, digest = read_hashed_manifest(folder)
    files = BundleFiles(folder, manifest, digest, follow_links, {} if check == "full" else _remembered())
    files.check_all(without)
    if manifest.verification is None or not manifest.verification.passed:
        raise BundleError(f"{folder}: was never verified against PyTorch; export it again")
    return files


def _stamp(stream: BinaryIO) -> Stamp:
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _cache() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "hashes.json"


def _remembered() -> dict[str, str]:
    path = _cache()
    if path is None:
        return {}
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}  # no cache yet, or a damaged one: hash everything again
    return known if isinstance(known, dict) else {}


def _remember(fresh: dict[str, str]) -> None:
    keep(_cache(), json.dumps(_remembered() | fresh).encode(), "so bundles are hashed at every open")
