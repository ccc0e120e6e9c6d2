"""The record of a verified bundle, and its replay: `vlmdeploy verify` without the checkpoint.

`reference.npz` holds the bundle's answer on the machine that compared it with PyTorch; every other machine must answer
the same, up to the rounding of its own kernels.
"""

import zipfile
import zlib
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmdeploy.errors import BundleError, ParityError
from vlmdeploy.layout import Ints
from vlmdeploy.manifest import REFERENCE_NAME, Manifest, StageVerdict
from vlmdeploy.runtime import parity
from vlmdeploy.runtime.backends.choose import open_backend
from vlmdeploy.runtime.backends.lanes import Floats
from vlmdeploy.runtime.generate import Prompt, make_prompt
from vlmdeploy.runtime.image import preprocess
from vlmdeploy.runtime.integrity import BundleFiles, check_bundle
from vlmdeploy.runtime.session import Session

KEPT_ROWS = 64  # image rows kept in the record
MOST_BYTES = 1 << 28  # of one array: a picture of MOST_IMAGE_PX fits


@dataclass(frozen=True)
class Record:
    """The answer of a verified bundle: some image rows, the last logits, the greedy continuation."""

    picture: NDArray[np.uint8]
    ids: Ints
    image_rows: Floats  # every k-th row of the image, [kept, hidden]
    logits: Floats  # of the prompt's last position, [vocab]
    greedy_ids: Ints

    def write(self, folder: Path) -> None:
        """Save as reference.npz."""
        np.savez_compressed(
            folder / REFERENCE_NAME, picture=self.picture, ids=self.ids, image_rows=self.image_rows,
            logits=self.logits, greedy_ids=self.greedy_ids,
        )  # fmt: skip


def read_record(files: BundleFiles) -> Record:
    """The record of a bundle; raises BundleError if it cannot be read or does not fit the manifest."""
    path, manifest = files.folder / REFERENCE_NAME, files.manifest
    try:
        with files.open(REFERENCE_NAME) as stream, zipfile.ZipFile(stream) as archive:
            record = Record(**{field.name: _stored(archive, field.name) for field in fields(Record)})
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy the bundle again") from error
    hidden, vocab_size = manifest.embedding.hidden, manifest.embedding.vocab_size
    is_right = (
        (record.picture.dtype == np.uint8 and record.picture.ndim == 3 and record.picture.shape[2] == 3)
        and all(ids.dtype == np.int64 and ids.ndim == 1 and ids.size > 0 for ids in (record.ids, record.greedy_ids))
        and (record.image_rows.dtype == np.float32 and record.image_rows.shape[1:] == (hidden,))
        and (record.logits.dtype == np.float32 and record.logits.shape == (vocab_size,))
        and len(record.ids) + len(record.greedy_ids) <= manifest.context_tokens
        and 0 <= record.greedy_ids.min() <= record.greedy_ids.max() < vocab_size
    )
    if not is_right:
        raise BundleError(f"{path}: does not fit the manifest; copy the bundle again")
    return record


def _stored(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of the archive. Reads no more than MOST_BYTES, whatever its header says."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, is_transposed, dtype = read_header(member)
        size = prod(shape) * dtype.itemsize
        if dtype.hasobject or is_transposed or not 0 <= size <= MOST_BYTES:
            raise ValueError(f"{name} is {list(shape)} of {dtype}")
        content = member.read(size)
    return np.frombuffer(content, dtype, prod(shape)).reshape(shape)


def kept_rows(rows: Floats) -> Floats:
    """About KEPT_ROWS evenly spaced rows: [rows, hidden] -> [kept, hidden]."""
    return rows[:: max(1, len(rows) // KEPT_ROWS)]


def sample_prompt(manifest: Manifest, ids: Ints, picture: NDArray[np.uint8]) -> Prompt:
    """The prompt of these ids and this picture, prepared by the manifest's recipe."""
    pixels = preprocess(Image.fromarray(picture), manifest.image)[None]
    return make_prompt(ids, pixels, manifest.tokens, manifest.embedding.vocab_size, manifest.image.size_px)


def replay(folder: Path, threads: int | None = None, provider: str | None = None) -> tuple[StageVerdict, ...]:
    """Hash every file, then repeat the recorded run on this machine. Raises BundleError, BackendError, and ParityError
    naming the first difference."""
    files = check_bundle(folder, "full")
    manifest = files.manifest
    gate, record = parity.Gate(str(folder)), read_record(files)
    prompt = sample_prompt(manifest, record.ids, record.picture)
    backend = open_backend(files, provider, threads, residency="phase")
    assert prompt.pixels is not None, "the recorded prompt has a picture"
    rows = kept_rows(backend.encode_images(prompt.pixels)[0])
    bound = _bound(manifest)
    gate.compare("image rows", "shipped", rows, record.image_rows, bound)
    session = Session(files, backend)
    logits = session.logits(prompt.ids, prompt.pixels, last=1)
    gate.compare("logits", "shipped", logits, record.logits[None], bound)
    _check_greedy(gate, session, prompt, record)
    return tuple(gate.verdicts)


def _check_greedy(gate: parity.Gate, session: Session, prompt: Prompt, record: Record) -> None:
    """Repeat the recorded continuation; where it differs, the two tokens must be nearly as good here."""
    found = session.generate_ids(prompt.ids, prompt.pixels, len(record.greedy_ids))
    if not np.array_equal(found, record.greedy_ids):
        check_decode_loop(gate, session, prompt, record.greedy_ids)
    check_decode_loop(gate, session, prompt, found)


def check_decode_loop(gate: parity.Gate, session: Session, prompt: Prompt, greedy_ids: Ints) -> None:
    """Require each greedy token to be the best (or nearly) in one pass over prompt and tokens."""
    continued = np.concatenate((prompt.ids, greedy_ids[:-1]))
    logits = session.logits(continued, prompt.pixels, last=len(greedy_ids))
    lead = logits.max(1) - logits[np.arange(len(greedy_ids)), greedy_ids]
    for step in np.flatnonzero(lead > parity.REPLAY.bound * np.abs(logits).max(1)):
        raise ParityError(
            f"{gate.where}: greedy token {step} is {greedy_ids[step]}, but in one pass over prompt and answer "
            f"{int(logits[step].argmax())} leads it by {lead[step]:.3g}"
        )


def _bound(manifest: Manifest) -> parity.Tolerance:
    """Float bundles differ only by the order of sums."""
    has_codes = any(precision.startswith("int") for precision in manifest.precision.values())
    quantized = has_codes or manifest.cache.dtype != "fp32"
    return parity.REPLAY if quantized else parity.STRUCTURE_END_TO_END
