"""The gate: every stage of a bundle is compared with PyTorch holding the same (dequantized) weights.

Twice over the same files: once with exact activations, which proves the structure, once as shipped. Each PyTorch stage
is fed with the bundle's own previous output and only one layer is in memory at a time. Where the whole model is small,
logits and greedy tokens are compared from end to end too. Bounds: parity.py.
"""

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.bundle import Manifest, StageVerdict, Verification
from vlmdeploy.errors import ExportError, ParityError
from vlmdeploy.export.decoder_graph import HeadLayout
from vlmdeploy.export.options import Progress, with_settings
from vlmdeploy.export.precision import PARTS, plan_precision
from vlmdeploy.export.reference import Sample, draw_sample
from vlmdeploy.export.taps import TappedRun, tapped_session
from vlmdeploy.export.weights import WeightReader
from vlmdeploy.families.spec import ConnectorStep, ModelSpec
from vlmdeploy.model.batch import derive_layout
from vlmdeploy.model.connector import build_step
from vlmdeploy.model.decoder import Decoder, DecoderLayer, LayerCache, RmsNorm, Step, causal_mask
from vlmdeploy.model.vision import VisionEncoder, VisionLayer
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.model.weights import Checkpoint
from vlmdeploy.runtime import parity
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.ort_backend import OrtBackend, import_onnxruntime
from vlmdeploy.runtime.parity import Gate, Tolerance
from vlmdeploy.runtime.replay import Record, kept_rows
from vlmdeploy.runtime.session import Session

WHOLE_MODEL_BYTES = 1 << 30  # float32 weights up to here are also compared from end to end
GREEDY_TOKENS = 8


def verify_staged(
    reader: WeightReader,
    spec: ModelSpec,
    folder: Path,
    manifest: Manifest,
    seed: int,
    threads: int | None,
    progress: Progress,
) -> tuple[Verification, Record]:
    """Compare every stage of the graphs in `folder` with PyTorch; the verdict, and the record for later replays.

    Raises ParityError at the first stage that differs.
    """
    sample, gate = draw_sample(manifest, seed), Gate(str(folder))
    checks = ("structure", "shipped") if reader.plan.is_quantized else ("structure",)
    runs: dict[str, TappedRun] = {}
    for check in checks:
        progress(f"run {check}", len(runs), len(checks))
        runs[check] = TappedRun(spec, folder, manifest, sample, check == "structure", threads)
    with torch.no_grad():
        _check_preprocess(gate, sample, manifest)
        _check_vision(gate, reader, spec, runs, progress)
        _check_decoder(gate, reader, spec, runs, progress)
        agreement = _check_logits(gate, reader, spec, runs)
        greedy = _check_whole(gate, reader, spec, folder, manifest, runs, threads)
    record = _record(folder, manifest, runs[checks[-1]], threads)
    return Verification(True, tuple(gate.verdicts), agreement, *greedy, host=_host()), record


def _tolerance(check: str) -> Tolerance:
    return parity.STRUCTURE if check == "structure" else parity.SHIPPED


def _check_preprocess(gate: Gate, sample: Sample, manifest: Manifest) -> None:
    """Our preprocessing against PyTorch's antialiased bicubic resize, an independent implementation."""
    assert sample.prompt.pixels is not None, "the sample has a picture"
    side = manifest.image.size_px
    channels = torch.from_numpy(sample.picture.copy()).permute(2, 0, 1)[None]
    resized = F.interpolate(channels, (side, side), mode="bicubic", antialias=True).permute(0, 2, 3, 1).float()
    mean, std = torch.tensor(manifest.image.mean), torch.tensor(manifest.image.std)
    expected = ((resized / 255 - mean) / std).permute(0, 3, 1, 2).numpy()
    gate.compare("preprocess", "structure", sample.prompt.pixels, expected, parity.PREPROCESS)


def _load(build: Callable[[], nn.Module], reader: WeightReader, prefix: str) -> nn.Module:
    """A module with the bundle's effective weights, taken over without a copy."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict({name: reader.effective(f"{prefix}.{name}") for name in module.state_dict()}, assign=True)
    return module


def _check_vision(
    gate: Gate, reader: WeightReader, spec: ModelSpec, runs: dict[str, TappedRun], progress: Progress
) -> None:
    """Patches, encoder layers by groups, then the connector step by step."""
    first = next(iter(runs.values())).stages
    pixels = torch.from_numpy(next(iter(runs.values())).sample.prompt.pixels)
    current = _check_embed(gate, reader, spec, runs, pixels)
    for index in range(spec.vision.num_layers):
        progress("verify vision", index, spec.vision.num_layers)
        layer = _load(lambda: VisionLayer(spec.vision), reader, f"vision.layers.{index}")
        current = {check: layer(x) for check, x in current.items()}
        if f"vision.layer.{index}" in first:
            current = _compare_stage(gate, runs, f"vision.layer.{index}", current)
    current = {check: x[:, 1:] for check, x in current.items()}
    for step in spec.connector.steps:
        module = _load(_step_builder(step), reader, f"connector.{step.name}")
        current = _compare_stage(
            gate, runs, f"connector.{step.name}", {check: module(x) for check, x in current.items()}
        )


def _step_builder(step: ConnectorStep) -> Callable[[], nn.Module]:
    return lambda: build_step(step)


def _check_embed(
    gate: Gate, reader: WeightReader, spec: ModelSpec, runs: dict[str, TappedRun], pixels: Tensor
) -> dict[str, Tensor]:
    encoder = _load(lambda: VisionEncoder(replace(spec.vision, num_layers=0)), reader, "vision")
    assert isinstance(encoder, VisionEncoder), "what the builder makes"
    return _compare_stage(gate, runs, "vision.embed", {check: encoder.embed(pixels) for check in runs})


def _compare_stage(
    gate: Gate, runs: dict[str, TappedRun], stage: str, expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Compare one stage of every run; the bundle's own values, to feed the next stage with."""
    for check, run in runs.items():
        gate.compare(stage, check, run.stages[stage], expected[check].numpy(), _tolerance(check))
    return {check: torch.from_numpy(run.stages[stage]) for check, run in runs.items()}


def _check_decoder(
    gate: Gate, reader: WeightReader, spec: ModelSpec, runs: dict[str, TappedRun], progress: Progress
) -> None:
    """Each layer over the whole sequence, decoded tokens included: hidden states, keys and values."""
    _check_embedding(gate, reader, next(iter(runs.values())))
    steps = {check: _step(reader, spec, run) for check, run in runs.items()}
    for index in range(spec.decoder.num_layers):
        progress("verify decoder", index, spec.decoder.num_layers)
        _check_decoder_layer(gate, reader, spec, runs, steps, index)


def _check_embedding(gate: Gate, reader: WeightReader, run: TappedRun) -> None:
    """The rows of the table that the text looked up; the image's rows were compared as the connector's last step."""
    is_text = np.ones(len(run.ids), np.bool_)
    is_text[: len(run.sample.prompt.ids)] = run.sample.prompt.types == 0
    expected = [reader.effective_rows("embedding.weight", int(token), int(token) + 1) for token in run.ids[is_text]]
    found = run.stages["decoder.input"][is_text]
    gate.compare("embedding", "structure", found, np.concatenate(expected), parity.EMBEDDING)


def _check_decoder_layer(
    gate: Gate, reader: WeightReader, spec: ModelSpec, runs: dict[str, TappedRun], steps: dict[str, Step], index: int
) -> None:
    """One layer, its attention and its MLP loaded one after the other: half a layer is the most memory needed.

    The last layer's rows of the vision expert are left out: the bundle does not compute them.
    """
    stage, stage_before = f"decoder.layer.{index}", f"decoder.layer.{index - 1}" if index else "decoder.input"
    middle = {}
    layer = _load_half(reader, spec, index, ("attention_norm", "qkv", "dense"))
    for check, run in runs.items():
        cache = LayerCache()
        middle[check] = layer.attention_half(torch.from_numpy(run.stages[stage_before])[None], steps[check], cache)
        _check_cache(gate, spec, check, index, run, cache)
    del layer
    layer = _load_half(reader, spec, index, ("mlp_norm", "gate_up", "down"))
    for check, run in runs.items():
        expected = layer.mlp_half(middle[check], steps[check])[0].numpy()
        is_last = index == spec.decoder.num_layers - 1
        rows = ~run.vision_mask if is_last else np.ones(len(expected), np.bool_)
        gate.compare(stage, check, run.stages[stage][rows], expected[rows], _tolerance(check))


def _load_half(reader: WeightReader, spec: ModelSpec, index: int, modules: tuple[str, ...]) -> DecoderLayer:
    """A decoder layer of which only these modules hold weights."""
    with torch.device("meta"):
        layer = DecoderLayer(spec.decoder)
    names = [name for name in layer.state_dict() if name.split(".")[-2] in modules]
    state = {name: reader.effective(f"decoder.layers.{index}.{name}") for name in names}
    layer.load_state_dict(state, assign=True, strict=False)
    return layer


def _step(reader: WeightReader, spec: ModelSpec, run: TappedRun) -> Step:
    """Positions and routing as PyTorch derives them from the ids, not as the bundle's run has them."""
    decoder = Decoder(replace(spec.decoder, num_layers=0))
    if "decoder.inv_freq" in reader.checkpoint:
        decoder.inv_freq = reader.checkpoint.parameter("decoder.inv_freq")
    ids, pixels = torch.from_numpy(run.ids)[None], torch.from_numpy(run.sample.prompt.pixels)
    layout = derive_layout(spec, ids, pixels, None, None, None)
    return decoder.step(layout.position_ids, layout.vision_mask, causal_mask(layout.attention_mask))


def _check_cache(gate: Gate, spec: ModelSpec, check: str, index: int, run: TappedRun, cache: LayerCache) -> None:
    """Keys and values [kv_heads, seq, head_dim], the bundle's cut to the true head width."""
    layout = HeadLayout(spec.decoder)
    pairs = (
        ("key", run.keys[index], cache.key, layout.rotary_slots()),
        ("value", run.values[index], cache.value, layout.value_slots()),
    )
    for kind, found, expected, slots in pairs:
        assert expected is not None, "the layer has filled its cache"
        gate.compare(f"decoder.{kind}.{index}", check, found[..., slots >= 0], expected[0].numpy(), _tolerance(check))


def _check_logits(gate: Gate, reader: WeightReader, spec: ModelSpec, runs: dict[str, TappedRun]) -> float:
    """The final norm and the head, the head a block of rows at a time; the top-1 agreement of the last run."""
    norm = _load(lambda: RmsNorm(spec.decoder.hidden, spec.decoder.norm_eps), reader, "decoder.norm")
    agreement = 1.0
    for check, run in runs.items():
        rows = ~run.vision_mask
        last = torch.from_numpy(run.stages[f"decoder.layer.{spec.decoder.num_layers - 1}"][rows])
        normed = norm(last)
        gate.compare("decoder.norm", check, run.stages["decoder.norm"][rows], normed.numpy(), _tolerance(check))
        parts = [
            normed @ torch.from_numpy(reader.effective_rows("lm_head.weight", *span)).T
            for span in reader.blocks("lm_head.weight")
        ]
        logits = torch.cat(parts, 1).numpy()
        gate.compare("logits", check, run.logits, logits, _tolerance(check))
        agreement = float((run.logits.argmax(1) == logits.argmax(1)).mean())
    return agreement


def _check_whole(
    gate: Gate,
    reader: WeightReader,
    spec: ModelSpec,
    folder: Path,
    manifest: Manifest,
    runs: dict[str, TappedRun],
    threads: int | None,
) -> tuple[int, int]:
    """End to end where the model is small: logits of the whole prompt, then greedy tokens (equal, total)."""
    parameters = sum(int(np.prod(rule.shape)) for rule in reader.checkpoint.rules.values())
    if 4 * parameters > WHOLE_MODEL_BYTES:
        return 0, 0
    model = _load_whole(reader, spec)
    run = runs["structure"]
    prompt = run.sample.prompt
    ids, images = torch.from_numpy(prompt.ids)[None], torch.from_numpy(prompt.pixels)
    expected = model(ids, images)[0].numpy()
    for check, other in runs.items():
        bound = parity.STRUCTURE_END_TO_END if check == "structure" else parity.SHIPPED_END_TO_END
        rows = np.flatnonzero(~prompt.vision_mask)
        gate.compare("logits end to end", check, other.logits[: len(rows)], expected[rows], bound)
    backend = OrtBackend(folder, manifest, threads, load_graph=_exact_loader(folder, manifest, threads))
    num_new = min(GREEDY_TOKENS, manifest.context_tokens - len(prompt.ids))
    found = Session(folder, manifest, backend).generate_ids(prompt.ids, prompt.pixels, num_new)
    wanted = model.generate(ids, images, max_new_tokens=num_new)[0].numpy()
    return _check_greedy(gate, model, prompt.ids, images, found, wanted), len(wanted)


def _load_whole(reader: WeightReader, spec: ModelSpec) -> VisionLanguageModel:
    with torch.device("meta"):
        model = VisionLanguageModel(spec)
    state = {name: reader.effective(name) for name in model.state_dict() if name in reader.checkpoint}
    model.load_state_dict(state, assign=True, strict=False)
    model.decoder.inv_freq = state.get("decoder.inv_freq", Decoder(replace(spec.decoder, num_layers=0)).inv_freq)
    return model.eval()


def _exact_loader(folder: Path, manifest: Manifest, threads: int | None) -> Callable[[str], object]:
    ort = import_onnxruntime()
    return lambda graph: tapped_session(ort, folder / manifest.graphs[graph].file, [], True, manifest.provider, threads)


def _check_greedy(
    gate: Gate,
    model: VisionLanguageModel,
    ids: NDArray[np.int64],
    images: Tensor,
    found: NDArray[np.int64],
    wanted: NDArray[np.int64],
) -> int:
    """How many leading tokens agree. A difference is an error unless the two best tokens are a tie within the bound."""
    shared = min(len(found), len(wanted))  # a tie may end one of them early
    equal = int((found[:shared] == wanted[:shared]).cumprod().sum())
    if equal == len(wanted):
        return equal
    continued = torch.from_numpy(np.concatenate((ids, wanted[:equal])))[None]
    best = model(continued, images)[0, -1].topk(2).values
    bound = parity.STRUCTURE_END_TO_END.bound * max(1.0, float(best.abs().max()))
    if float(best[0] - best[1]) > bound:
        raise ParityError(
            f"{gate.where}: greedy token {equal} is {found[equal : equal + 1].tolist()}, PyTorch says {wanted[equal]}, "
            f"which leads by {float(best[0] - best[1]):.3g}"
        )
    return equal


def _record(folder: Path, manifest: Manifest, run: TappedRun, threads: int | None) -> Record:
    """What the shipped graphs answer here, for replays."""
    session = Session(folder, manifest, OrtBackend(folder, manifest, threads))
    prompt = run.sample.prompt
    logits = session.logits(prompt.ids, prompt.pixels)[-1]
    greedy_ids = session.generate_ids(prompt.ids, prompt.pixels, GREEDY_TOKENS)
    return Record(run.sample.picture, prompt.ids, kept_rows(run.image_rows), logits, greedy_ids)


def verify_bundle(folder: Path, ckpt: str | Path, threads: int | None, progress: Progress) -> tuple[StageVerdict, ...]:
    """Repeat the gate of a published bundle on this machine, after hashing all its files.

    Raises BundleError, ParityError, and ExportError when the bundle was made from another checkpoint.
    """
    manifest = check_bundle(folder, "full")
    checkpoint = Checkpoint(ckpt)
    if checkpoint.fingerprint() != manifest.made_by.checkpoint_sha256:
        raise ExportError(f"{folder}: was not made from {ckpt}: its config, tensors or file sizes differ")
    parts = {part: manifest.precision[part] for part in PARTS}
    plan = plan_precision(checkpoint.spec, manifest.target, parts, manifest.requested_group)
    spec = with_settings(checkpoint.spec, manifest.context_tokens, manifest.default_template)
    verification, _ = verify_staged(WeightReader(checkpoint, plan), spec, folder, manifest, 0, threads, progress)
    return verification.stages


def _host() -> str:
    return f"{platform.machine()}, onnxruntime {import_onnxruntime().__version__}"
