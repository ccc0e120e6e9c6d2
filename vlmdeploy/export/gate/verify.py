"""The gate: compares every stage of a bundle with PyTorch on the same (dequantized) weights.

It runs the same files twice: with exact activations, which proves the structure, and as shipped. For small models it
also compares logits and greedy tokens end to end. Bounds: runtime/parity.py.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlmdeploy.errors import ExportError, ParityError
from vlmdeploy.export.gate.sample import InputRules, draw_sample
from vlmdeploy.export.gate.stage_checks import StageChecks
from vlmdeploy.export.gate.taps import TappedRun, tapped_backend
from vlmdeploy.export.gate.torch_stages import TorchStages
from vlmdeploy.export.weight_reader import WeightReader, stored_precisions
from vlmdeploy.kernels import cpu
from vlmdeploy.layout import Ints
from vlmdeploy.manifest import Manifest, StageVerdict, Verification
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.progress import Progress
from vlmdeploy.quant.precision import plan_precision
from vlmdeploy.runtime import parity
from vlmdeploy.runtime.backends.ort import OrtBackend, import_onnxruntime
from vlmdeploy.runtime.generate import Prompt
from vlmdeploy.runtime.integrity import BundleFiles, check_bundle
from vlmdeploy.runtime.parity import Gate
from vlmdeploy.runtime.replay import Record, check_decode_loop, kept_rows
from vlmdeploy.runtime.session import Session
from vlmdeploy.spec.matrices import PARTS
from vlmdeploy.spec.model import ModelSpec, with_settings

WHOLE_MODEL_BYTES = 1 << 30  # models with float32 weights up to this size are also compared end to end
GREEDY_TOKENS = 8


@dataclass(frozen=True)
class CheckedBundle:
    """The bundle to verify, written from `reader` for `spec`; `name` is for messages."""

    name: str
    reader: WeightReader
    spec: ModelSpec
    files: BundleFiles
    threads: int | None = None

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.files.manifest

    def open(self, exact: bool) -> Session:
        """A session on the graphs, with exact activations or as shipped."""
        if exact or self.manifest.dialect == "trt":  # trt graphs have a cache of the whole context
            backend = tapped_backend(self.files, exact, self.threads, {}, "phase")
        else:
            backend = OrtBackend(self.files, self.threads, residency="phase")
        return Session(self.files, backend)


def verify_staged(subject: CheckedBundle, seed: int, progress: Progress) -> tuple[Verification, Record]:
    """Compare every stage of the graphs with PyTorch; returns the verdict and the record for later replays.

    Raises ParityError at the first stage that differs.
    """
    manifest, gate = subject.manifest, Gate(subject.name, subject.manifest.is_half)
    sample = draw_sample(InputRules.of_bundle(manifest), seed)
    is_exact = manifest.cache.dtype == "fp32" and not subject.reader.plan.is_quantized
    names = ("structure",) if is_exact else ("structure", "shipped")
    runs: dict[str, TappedRun] = {}
    for check in names:
        progress(f"run {check}", len(runs), len(names))
        exact = check == "structure"
        runs[check] = TappedRun(subject.spec, subject.files, sample, exact, subject.threads)
    with torch.no_grad():
        checks = StageChecks(gate, TorchStages(subject.reader, subject.spec), runs, progress)
        checks.preprocess(manifest)
        checks.vision()
        checks.decoder()
        agreement = checks.logits()
        greedy = _check_whole(gate, subject, runs)
    record = _record(gate, subject, runs[names[-1]])
    return Verification(True, tuple(gate.verdicts), agreement, *greedy, host=_host()), record


def _check_whole(gate: Gate, subject: CheckedBundle, runs: dict[str, TappedRun]) -> tuple[int, int]:
    """Compare a small model end to end: logits of the whole prompt, then greedy tokens; returns (equal, total)."""
    parameters = sum(int(np.prod(rule.shape)) for rule in subject.reader.checkpoint.rules.values())
    if 4 * parameters > WHOLE_MODEL_BYTES:
        return 0, 0
    model, prompt = _load_whole(subject), runs["structure"].sample.prompt
    ids, images = torch.from_numpy(prompt.ids)[None], torch.from_numpy(prompt.pixels)
    rows = np.flatnonzero(~prompt.vision_mask)
    expected = model(ids, images)[0].numpy()[rows]
    for check, run in runs.items():
        bound = parity.end_to_end_bound_of(check, gate.is_half)
        gate.compare("logits end to end", check, run.logits[: len(rows)], expected, bound)
    _check_text_alone(gate, subject, model, prompt)
    num_new = min(GREEDY_TOKENS, subject.manifest.context_tokens - len(prompt.ids))
    found = subject.open(exact=True).generate_ids(prompt.ids, prompt.pixels, num_new)
    wanted = model.generate(ids, images, max_new_tokens=num_new)[0].numpy()
    return _check_greedy(gate, model, prompt, found, wanted), len(wanted)


def _check_text_alone(gate: Gate, subject: CheckedBundle, model: VisionLanguageModel, prompt: Prompt) -> None:
    """Compare a prompt without a picture: BOS and the sample's text."""
    ids = prompt.ids[prompt.types == 0]
    expected = model(torch.from_numpy(ids)[None])[0].numpy()
    found = subject.open(exact=True).logits(ids)
    gate.compare("logits of text alone", "structure", found, expected, parity.STRUCTURE_END_TO_END)


def _load_whole(subject: CheckedBundle) -> VisionLanguageModel:
    reader = subject.reader
    with torch.device("meta"):
        model = VisionLanguageModel(subject.spec)
    state = {name: reader.effective(name) for name in model.state_dict() if name in reader.checkpoint}
    model.load_state_dict(state, assign=True, strict=False)
    model.decoder.inv_freq = reader.checkpoint.inv_freq()
    return model.eval()


def _check_greedy(gate: Gate, model: VisionLanguageModel, prompt: Prompt, found: Ints, wanted: Ints) -> int:
    """Number of leading tokens that agree. A difference is an error unless the two best tokens tie within the bound."""
    shared = min(len(found), len(wanted))  # after a tie one of them may end early
    equal = int((found[:shared] == wanted[:shared]).cumprod().sum())
    if equal == len(wanted):
        return equal
    continued = torch.from_numpy(np.concatenate((prompt.ids, wanted[:equal])))[None]
    best = model(continued, torch.from_numpy(prompt.pixels))[0, -1].topk(2).values
    bound = parity.STRUCTURE_END_TO_END.bound * max(1.0, float(best.abs().max()))
    if float(best[0] - best[1]) > bound:
        raise ParityError(
            f"{gate.where}: greedy token {equal} is {found[equal : equal + 1].tolist()}, PyTorch says {wanted[equal]}, "
            f"which leads by {float(best[0] - best[1]):.3g}"
        )
    return equal


def _record(gate: Gate, subject: CheckedBundle, run: TappedRun) -> Record:
    """The answer of the shipped graphs here, for replays; decoding must agree with one pass over all tokens."""
    session, prompt = subject.open(exact=False), run.sample.prompt
    logits = session.logits(prompt.ids, prompt.pixels, last=1)[0]
    greedy_ids = session.generate_ids(prompt.ids, prompt.pixels, GREEDY_TOKENS)
    check_decode_loop(gate, session, prompt, greedy_ids)
    return Record(run.sample.picture, prompt.ids, kept_rows(run.image_rows), logits, greedy_ids)


def verify_bundle(
    folder: Path, ckpt: str | Path, threads: int | None, progress: Progress, follow_links: bool = False
) -> tuple[StageVerdict, ...]:
    """Repeat the gate of a published bundle on this machine, after hashing all its files.

    Raises BundleError, ParityError, and ExportError when the bundle was made from another checkpoint.
    """
    files = check_bundle(folder, "full")
    manifest = files.manifest
    checkpoint = Checkpoint(ckpt, follow_links)
    if checkpoint.fingerprint() != manifest.made_by.checkpoint_sha256:
        raise ExportError(f"{folder}: was not made from {ckpt}: its config or tensors differ")
    parts = manifest.requested_precision
    if parts is None:  # bundles of format 1.0
        parts = {part: manifest.precision[part] for part in PARTS}
    stored = stored_precisions(checkpoint)
    plan = plan_precision(checkpoint.spec, manifest.target, parts, manifest.requested_group, stored=stored)
    spec = with_settings(checkpoint.spec, manifest.context_tokens, manifest.default_template, manifest.image.resize)
    subject = CheckedBundle(str(folder), WeightReader(checkpoint, plan), spec, files, threads)
    return verify_staged(subject, 0, progress)[0].stages


def _host() -> str:
    variant = cpu.variant()
    operators = f", operators {variant}" if variant else ""
    return f"{platform.machine()}, onnxruntime {import_onnxruntime().__version__}{operators}"
