"""Agreement tests of the streamed units: run layer by layer over all samples at once, with weights left as they are,
they compute what the PyTorch reference computes, and ask for every linear once with exactly the rows that reach it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.calibration_data import random_samples
from tests.comparison import SAME_ROW_FP32, assert_close
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint
from vlmdeploy.calib.activations import Pool
from vlmdeploy.calib.calibration_set import CalibrationSample, Tokens, prompt_tokens, read_pixels
from vlmdeploy.calib.flow import Weights
from vlmdeploy.calib.perplexity import hidden_states
from vlmdeploy.calib.statistics import Inputs
from vlmdeploy.calib.units import UnitRunner
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.model.decoder import rotate
from vlmdeploy.model.load import fill_parameter, load_model
from vlmdeploy.model.vlm import VisionLanguageModel
from vlmdeploy.quant.grid import Grid, dequantize, quantize_rtn
from vlmdeploy.spec.matrices import matrices

Samples = tuple[CalibrationSample, ...]
MODELS = {
    "cogvlm": TinyCheckpoint("cogvlm", seed=1),
    "cogvlm2": TinyCheckpoint("cogvlm2", seed=2),  # grouped KV heads, a bias on the vision qkv, downsampling
    "cogvlm2, odd grid": TinyCheckpoint("cogvlm2", image_px=10, kv_heads=1, seed=3),
}
HELD_OUT = {"both": (1, 3)}  # their rows flow through the layers like all others
MIXES = {"pictures": [True, True], "texts": [False, False, False], "both": [False, True, True, False, True]}
VISION_BRANCH = ("dense", "gate_up", "down")
MEMORY = 1 << 30


@pytest.fixture(autouse=True)
def one_thread_and_no_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@dataclass
class Recorder:
    """A quantizer that notes what it is asked for. `quantized` maps float weights to those of the first stream."""

    checkpoint: Checkpoint
    quantized: Callable[[Tensor], Tensor] | None = None
    targets: list[str] = field(default_factory=list)
    unused_targets: list[str] = field(default_factory=list)
    experts: dict[str, str | None] = field(default_factory=dict)
    inputs: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    spill: Path | None = None
    spilled: set[str] = field(default_factory=set)  # files seen there

    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        self.targets.append(target)
        if self.spill is not None:
            self.spilled |= {path.name for path in self.spill.iterdir()}
        self.experts[target] = expert
        calibration, held_out = (tokens.select(expert, held_out=held) for held in (False, True))
        self.inputs[target] = inputs(np.sort(np.concatenate((calibration, held_out))))
        weights = self.checkpoint.parameter(target).flatten(1)
        return (weights,) if self.quantized is None else (self.quantized(weights), weights)

    def unused(self, target: str) -> None:
        self.unused_targets.append(target)


@dataclass(frozen=True)
class Case:
    """A tiny model on disk and samples for it."""

    checkpoint: Checkpoint
    samples: Samples
    folder: Path

    @property
    def model(self) -> VisionLanguageModel:
        return load_model(self.checkpoint.folder)

    def stream(self, recorder: Recorder, memory_bytes: int = MEMORY, streams: int = 1) -> Tensor:
        """The rows that leave the last layer."""
        runner = UnitRunner(self.checkpoint, recorder, Pool(self.folder / "spill", memory_bytes), streams)
        flow = hidden_states(runner, self.samples, lambda *shown: None)
        runner.head(flow)
        return flow.states[0].read(np.arange(flow.tokens.count))

    def vision_mask(self) -> Tensor:
        return torch.from_numpy(np.concatenate([sample.vision_mask for sample in self.samples]))


def make_case(folder: Path, tiny: TinyCheckpoint, with_picture: list[bool], held_out: tuple[int, ...] = ()) -> Case:
    checkpoint = Checkpoint(write_checkpoint(folder / "ckpt", tiny.config(), tiny.tensors()))
    return Case(checkpoint, random_samples(checkpoint.spec, tiny, folder / "data", with_picture, held_out), folder)


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest) -> TinyCheckpoint:
    return MODELS[request.param]


@pytest.fixture(params=MIXES)
def case(request: pytest.FixtureRequest, tiny: TinyCheckpoint, tmp_path: Path) -> Case:
    return make_case(tmp_path, tiny, MIXES[request.param], HELD_OUT.get(request.param, ()))


@pytest.fixture
def mixed(tiny: TinyCheckpoint, tmp_path: Path) -> Case:
    return make_case(tmp_path, tiny, MIXES["both"])


def reference(model: VisionLanguageModel, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of all rows, and what enters every linear, as forward hooks see it; one sample after the other."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if isinstance(module, nn.Conv2d):  # [images, patches, in] -> blocks of four neighbours, channel slowest
                side = round(x.shape[1] ** 0.5)
                x = F.unfold(x.transpose(1, 2).reshape(len(x), -1, side, side), 2, stride=2).transpose(1, 2)
            seen.setdefault(f"{name}.weight", []).append(x.flatten(0, -2))

        return hook

    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    handles = [
        module.register_forward_pre_hook(note(name)) for name, module in modules.items() if name != "vision.patch"
    ]
    logits = [model(torch.from_numpy(sample.ids)[None], images_of(model, sample))[0] for sample in samples]
    for handle in handles:
        handle.remove()
    return torch.cat(logits), {name: torch.cat(parts) for name, parts in seen.items()}


def images_of(model: VisionLanguageModel, sample: CalibrationSample) -> Tensor | None:
    return None if sample.image is None else torch.from_numpy(read_pixels(sample.image, model.spec))[None]


def assert_inputs_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], case: Case) -> None:
    """Every linear that we are asked for gets what the hooks saw; the head is only given the language rows."""
    theirs = {**theirs, "lm_head.weight": theirs["lm_head.weight"][~case.vision_mask()]}
    for target, x in ours.items():
        if target in theirs:
            assert_close(target, x, theirs[target], SAME_ROW_FP32)
        else:
            assert len(x) == 0, f"{target}: no row enters it in the whole model"


def test_streamed_units_give_the_logits_of_the_whole_model(case: Case) -> None:
    model = case.model
    hidden = case.stream(Recorder(case.checkpoint))
    expected, _ = reference(model, case.samples)
    text = ~case.vision_mask()  # nothing ever asks for the logits of the other rows
    logits = model.logits(model.decoder.norm(hidden[text]))
    assert_close("logits", logits, expected[text], SAME_ROW_FP32)


def test_every_linear_is_given_what_enters_it_in_the_whole_model(case: Case) -> None:
    recorder = Recorder(case.checkpoint)
    case.stream(recorder)
    inputs = {target: streams[0] for target, streams in recorder.inputs.items()}
    assert_inputs_equal(inputs, reference(case.model, case.samples)[1], case)


def test_every_linear_is_asked_for_once(mixed: Case) -> None:
    recorder = Recorder(mixed.checkpoint)
    mixed.stream(recorder)
    expected = [linear.target for linear in matrices(mixed.checkpoint.spec)]
    assert sorted(recorder.targets + recorder.unused_targets) == sorted(expected)


def test_vision_branch_of_the_last_layer_is_unused(mixed: Case) -> None:
    recorder = Recorder(mixed.checkpoint)
    mixed.stream(recorder)
    last = mixed.checkpoint.spec.decoder.num_layers - 1
    expected = {f"decoder.layers.{last}.vision.{linear}.weight" for linear in VISION_BRANCH}
    assert set(recorder.unused_targets) == expected
    assert len(recorder.unused_targets) == len(expected)


def test_vision_rows_of_the_last_layer_change_no_text_row(mixed: Case) -> None:
    """What makes the last layer's vision branch unused."""
    model = mixed.model
    expected, _ = reference(model, mixed.samples)
    last = len(model.decoder.layers) - 1
    for linear in VISION_BRANCH:
        fill_parameter(model, f"decoder.layers.{last}.vision.{linear}.weight", torch.tensor(0.0))
    changed, _ = reference(model, mixed.samples)
    assert torch.equal(changed[~mixed.vision_mask()], expected[~mixed.vision_mask()])
    assert not torch.equal(changed, expected)


def test_end_of_image_counts_as_language_and_patches_as_vision(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    case, recorder = make_case(tmp_path, tiny, [True, False, True]), None
    recorder = Recorder(case.checkpoint)
    case.stream(recorder)
    texts = sum(len(sample.ids) for sample in case.samples) - 2 * tiny.rows_per_image
    counts = {"language": texts + 2, "vision": 2 * (tiny.rows_per_image - 1)}
    for target, expert in recorder.experts.items():
        if expert is not None:
            assert len(recorder.inputs[target][0]) == counts[expert], target
    assert {recorder.experts[target] for target in recorder.targets if "decoder" not in target} == {None, "language"}


def test_spilled_activations_are_the_same_bits(mixed: Case) -> None:
    in_memory, spilled = Recorder(mixed.checkpoint), Recorder(mixed.checkpoint, spill=mixed.folder / "spill")
    first, second = mixed.stream(in_memory), mixed.stream(spilled, memory_bytes=3000)
    assert torch.equal(first, second)
    assert all(torch.equal(spilled.inputs[target][0], x[0]) for target, x in in_memory.inputs.items())
    assert len(spilled.spilled) > 2


def squared_attention(query: Tensor, key: Tensor) -> tuple[float, float]:
    """To the first token and to all others, by every token but the first; [tokens, head_dim] each."""
    first = others = 0.0
    for place in range(1, len(query)):
        shares = (key[: place + 1].double() @ query[place].double() / query.shape[1] ** 0.5).softmax(0).square()
        first, others = first + float(shares[0]), others + float(shares[1:].sum())
    return first, others


def test_attention_to_first_tokens_is_that_of_the_experts_own_rows(mixed: Case) -> None:
    checkpoint, samples = mixed.checkpoint, mixed.samples
    spec = checkpoint.spec.decoder
    weights, tokens = checkpoint.parameter("decoder.layers.0.language.qkv.weight"), prompt_tokens(samples)
    x = torch.randn(tokens.count, spec.hidden, generator=torch.Generator().manual_seed(0))
    rows = [tokens.rows(index) for index in range(len(samples))]
    runner = UnitRunner(checkpoint, Recorder(checkpoint), Pool(mixed.folder / "spill", MEMORY))

    def attention(expert: str) -> list[float]:
        seen = runner.attention_to_firsts(samples, rows, expert, weights, None, lambda own: (x[torch.from_numpy(own)],))
        return [float(value) for value in seen]

    expected = np.zeros(2)
    for sample, own in zip(samples, rows, strict=True):
        is_text = torch.from_numpy(~sample.vision_mask)
        angles = torch.from_numpy(sample.positions)[is_text][:, None].double() * checkpoint.inv_freq().double()
        heads = (x[torch.from_numpy(own)][is_text] @ weights.T).reshape(int(is_text.sum()), -1, spec.head_dim)
        turned = rotate(heads.transpose(0, 1)[None], angles.cos().float()[None], angles.sin().float()[None], spec.rope)[
            0
        ]
        for head in range(spec.num_heads):
            key = turned[spec.num_heads + head // (spec.num_heads // spec.num_kv_heads)]
            expected += squared_attention(turned[head], key)
    assert attention("language") == pytest.approx(expected.tolist(), rel=1e-4)
    assert attention("vision") == [0, 0]  # pictures follow the first token, whose expert is the other one


def test_spill_files_are_deleted_when_closed(mixed: Case) -> None:
    runner = UnitRunner(mixed.checkpoint, Recorder(mixed.checkpoint), Pool(mixed.folder / "spill", 0))
    hidden_states(runner, mixed.samples, lambda *shown: None).close()
    assert list((mixed.folder / "spill").iterdir()) == []


def test_memory_is_given_back_when_closed(mixed: Case) -> None:
    pool = Pool(mixed.folder / "spill", MEMORY)
    hidden_states(
        UnitRunner(mixed.checkpoint, Recorder(mixed.checkpoint), pool), mixed.samples, lambda *shown: None
    ).close()
    assert pool.used_bytes == 0


def test_picture_with_two_questions_is_encoded_once(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    case = make_case(tmp_path, tiny, [True, True])
    first, second = case.samples
    twice = Case(case.checkpoint, (first, CalibrationSample(**vars(second) | {"image": first.image})), tmp_path)
    recorder = Recorder(case.checkpoint)
    hidden = twice.stream(recorder)
    assert len(recorder.inputs["vision.layers.0.qkv.weight"][0]) == case.checkpoint.spec.vision.num_patches + 1
    model = case.model
    logits = model.logits(model.decoder.norm(hidden[~twice.vision_mask()]))
    assert_close("logits", logits, reference(model, twice.samples)[0][~twice.vision_mask()], SAME_ROW_FP32)


def rounded(weights: Tensor) -> Tensor:
    """To nearest in 4 bits, coarse enough that every stage differs from the float model."""
    return torch.from_numpy(dequantize(quantize_rtn(weights.numpy(), Grid(4, weights.shape[1]))))


def test_later_stages_see_what_went_through_quantized_linears(mixed: Case) -> None:
    """The first stream passes through quantized weights, the second through the float ones."""
    recorder = Recorder(mixed.checkpoint, rounded)
    mixed.stream(recorder, streams=2)
    model = mixed.model
    _, of_floats = reference(model, mixed.samples)
    for linear in matrices(mixed.checkpoint.spec):
        values = rounded(mixed.checkpoint.parameter(linear.target).flatten(1))
        fill_parameter(model, linear.target, values.reshape(mixed.checkpoint.shape(linear.target)))
    _, of_codes = reference(model, mixed.samples)
    for stream, expected in enumerate((of_codes, of_floats)):
        assert_inputs_equal({target: x[stream] for target, x in recorder.inputs.items()}, expected, mixed)
    head = recorder.inputs["lm_head.weight"]
    assert float((head[0] - head[1]).abs().max()) > 100 * SAME_ROW_FP32
