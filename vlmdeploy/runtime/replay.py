"""The record of a verified bundle, and its replay: `vlmdeploy verify` without the checkpoint.

`reference.npz` holds what the bundle answered on the machine that compared it with PyTorch; another machine must answer
the same, up to the rounding of its own kernels.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmdeploy.bundle import Manifest, StageVerdict
from vlmdeploy.errors import BundleError, ParityError
from vlmdeploy.layout import Ints
from vlmdeploy.runtime import parity
from vlmdeploy.runtime.backend import Floats
from vlmdeploy.runtime.generate import Prompt, make_prompt
from vlmdeploy.runtime.image import preprocess
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.ort_backend import OrtBackend
from vlmdeploy.runtime.session import Session

REFERENCE_NAME = "reference.npz"
KEPT_ROWS = 64  # image rows kept in the record


@dataclass(frozen=True)
class Record:
    """What the verified bundle answered: some image rows, the last logits, the greedy continuation."""

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


def read_record(folder: Path) -> Record:
    """The record of a bundle; raises BundleError if it cannot be read."""
    path = folder / REFERENCE_NAME
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return Record(**{name: stored[name] for name in ("picture", "ids", "image_rows", "logits", "greedy_ids")})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy the bundle again") from error


def kept_rows(rows: Floats) -> Floats:
    """At most about KEPT_ROWS rows, evenly spaced: [rows, hidden] -> [kept, hidden]."""
    return rows[:: max(1, len(rows) // KEPT_ROWS)]


def sample_prompt(manifest: Manifest, ids: Ints, picture: NDArray[np.uint8]) -> Prompt:
    """The prompt of these ids and this picture, prepared as the manifest says."""
    pixels = preprocess(Image.fromarray(picture), manifest.image)[None]
    return make_prompt(ids, pixels, manifest.tokens, manifest.embedding.vocab_size, manifest.image.size_px)


def replay(folder: Path, threads: int | None = None) -> tuple[StageVerdict, ...]:
    """Hash every file, then repeat the recorded run on this machine. Raises BundleError, and ParityError naming what
    differs."""
    manifest = check_bundle(folder, "full")
    gate, record = parity.Gate(str(folder)), read_record(folder)
    prompt = sample_prompt(manifest, record.ids, record.picture)
    backend = OrtBackend(folder, manifest, threads)
    assert prompt.pixels is not None, "the recorded prompt has a picture"
    rows = kept_rows(backend.encode_images(prompt.pixels)[0])
    gate.compare("image rows", "shipped", rows, record.image_rows, parity.REPLAY)
    session = Session(folder, manifest, backend)
    logits = session.logits(prompt.ids, prompt.pixels)[-1:]
    gate.compare("logits", "shipped", logits, record.logits[None], parity.REPLAY)
    _check_greedy(gate, session, prompt, record)
    return tuple(gate.verdicts)


def _check_greedy(gate: parity.Gate, session: Session, prompt: Prompt, record: Record) -> None:
    """The recorded continuation, token by token; where it differs, the two tokens must be nearly as good here."""
    wanted = record.greedy_ids
    found = session.generate_ids(prompt.ids, prompt.pixels, len(wanted))
    shared = min(len(found), len(wanted))
    equal = int((found[:shared] == wanted[:shared]).cumprod().sum())
    if equal == len(wanted):
        return
    continued = np.concatenate((prompt.ids, wanted[:equal]))
    logits = session.logits(continued, prompt.pixels)[-1]
    lead = float(logits.max() - logits[wanted[equal]])
    if lead > parity.REPLAY.bound * float(np.abs(logits).max()):
        raise ParityError(
            f"{gate.where}: greedy token {equal} is {int(logits.argmax())}, recorded was {wanted[equal]}, which it "
            f"leads by {lead:.3g}"
        )
