"""Reference and contract tests of routed statistics: every Hessian is X^T X of exactly the rows that reach the linear,
held-out rows enter none, two streams give the cross term, and too few tokens are an error, or rounding that is told.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.calibration_data import (
    messages,
    overflow_for_pictures,
    random_samples,
    refusal,
    run_quantize,
    write_calibration_checkpoint,
    write_calibration_data,
    write_changed_checkpoint,
    write_rows,
)
from tests.tiny_bundle import only_json_document, run_cli
from tests.tiny_checkpoint import TinyCheckpoint, write_checkpoint
from vlmdeploy.calib.activations import Ints
from vlmdeploy.calib.calibration_set import CalibrationSample, Tokens, hold_out, pictures_of, prompt_tokens
from vlmdeploy.calib.processes import Processes
from vlmdeploy.calib.sensitivity import ErrorMeter
from vlmdeploy.calib.solver import Problem
from vlmdeploy.calib.statistics import HELD_OUT_TOKENS, HessianKind, Inputs, Statistics
from vlmdeploy.errors import CalibrationError
from vlmdeploy.model.checkpoint import Checkpoint
from vlmdeploy.quant.grid import Grid

SUM_RELATIVE = 1e-5  # float32 sums of up to 3000 products, relative to the largest entry
WIDTH, OUT = 24, 300  # more outputs than are judged on held-out tokens
LENGTHS = (40, 1200, 7, 900, 30)  # more rows than one chunk holds
HELD_OUT = (1, 4)
NAME = "decoder.layers.3.vision.down.weight"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def some_tokens(held_out: tuple[int, ...] = HELD_OUT) -> Tokens:
    """Five samples; about half of the rows go to the vision expert."""
    offsets = np.concatenate(([0], np.cumsum(LENGTHS))).astype(np.int64)
    mask = np.random.default_rng(1).random(offsets[-1]) < 0.5
    names = tuple(f"sample {index}" for index in range(len(LENGTHS)))
    return Tokens(names, offsets, mask, np.array([index in held_out for index in range(len(LENGTHS))]))


@pytest.fixture
def rows() -> Tensor:
    """The linear's input for every token; the columns are correlated."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(sum(LENGTHS), WIDTH, generator=generator) @ mixing + 0.3


@pytest.fixture
def undisturbed(rows: Tensor) -> Tensor:
    """The same tokens in the float model."""
    return rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def weights() -> Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(4))


def reading(*streams: Tensor) -> Inputs:
    return lambda chosen: tuple(stream[torch.from_numpy(chosen)] for stream in streams)


def collect(weights: Tensor, inputs: Inputs, kind: HessianKind = "routed", expert: str | None = "vision") -> Problem:
    return Statistics(Processes(), kind).problem(NAME, weights, Grid(4, 8), some_tokens(), expert, inputs)


def chosen(expert: str | None, held_out: bool) -> list[int]:
    """Row numbers, found one row at a time."""
    tokens, found, row = some_tokens(), [], 0
    for sample, length in enumerate(LENGTHS):
        for _ in range(length):
            is_expert = expert is None or bool(tokens.vision_mask[row]) == (expert == "vision")
            if is_expert and (sample in HELD_OUT) == held_out:
                found.append(row)
            row += 1
    return found


def mean_product(first: Tensor, second: Tensor, places: list[int]) -> Tensor:
    """first^T second / rows over these rows, in float64."""
    return first[places].double().T @ second[places].double() / len(places)


def assert_same_sums(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None and actual.shape == expected.shape
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    assert error <= SUM_RELATIVE, f"largest relative error {error:.3g}"


# Hessians


@pytest.mark.parametrize(("kind", "expert", "source"), [
    ("routed", "vision", "vision"), ("routed", "language", "language"), ("routed", None, None),
    ("pooled", "vision", None), ("pooled", "language", None),
    ("text-only", "vision", "language"), ("text-only", "language", "language"), ("text-only", None, None),
])  # fmt: skip
def test_hessian_is_the_product_of_exactly_the_rows_of_its_kind(
    rows: Tensor, weights: Tensor, kind: HessianKind, expert: str | None, source: str | None
) -> None:
    problem = collect(weights, reading(rows), kind, expert)
    places = chosen(source, held_out=False)
    assert_same_sums(problem.hessian, mean_product(rows, rows, places))
    assert (problem.tokens, problem.samples) == (len(places), 3)
    assert torch.equal(problem.hessian, problem.hessian.T)


def test_tokens_count_what_is_asked_for(rows: Tensor, undisturbed: Tensor, weights: Tensor) -> None:
    """In the Hessian, in the cross term, and among the held-out rows."""
    counts = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(5)) * 10
    inputs = reading(rows, undisturbed)
    problem = Statistics(Processes()).problem(NAME, weights, Grid(4, 8), some_tokens(), "vision", inputs, counts)
    places = chosen("vision", held_out=False)
    counted = counts[places, None].double() * rows[places].double()
    assert_same_sums(problem.hessian, counted.T @ rows[places].double() / len(places))
    assert_same_sums(problem.cross, (undisturbed - rows)[places].double().T @ counted / len(places))
    places, held_out = chosen("vision", held_out=True), problem.held_out
    assert held_out is not None and len(held_out.inputs) == len(places)
    expected = (counts[places, None].double() * rows[places].double()).T @ rows[places].double()
    assert_same_sums(held_out.inputs.T @ held_out.inputs, expected)


def test_cost_of_a_grid_is_measured_with_the_scales_that_it_may_have(rows: Tensor, weights: Tensor) -> None:
    class Source:
        def parameter(self, target: str) -> Tensor:
            return weights

    narrow, wide, errors = Grid(4, 8), Grid(8, 8), []
    for signed in (True, False):
        meter = ErrorMeter(Source(), Statistics(Processes()), lambda _: [narrow, wide], signed)  # type: ignore[arg-type]
        meter.linear(NAME, some_tokens(), None, reading(rows))
        errors.append({grid: float(found.sum()) for grid, found in meter.errors[NAME].items()})
    assert errors[0][narrow] < errors[1][narrow] and errors[0][wide] == errors[1][wide]


def test_held_out_rows_enter_no_hessian(rows: Tensor, weights: Tensor) -> None:
    problem = collect(weights, reading(rows))
    rows[chosen(None, held_out=True)] = 1000.0
    assert torch.equal(collect(weights, reading(rows)).hessian, problem.hessian)


def test_held_out_rows_judge_by_the_outputs_they_give(rows: Tensor, weights: Tensor) -> None:
    """The loss is the mean squared output of an error, over the held-out rows of the same kind."""
    held_out, places = collect(weights, reading(rows)).held_out, chosen("vision", held_out=True)
    assert held_out is not None and held_out.tokens == len(places) < HELD_OUT_TOKENS
    errors = judged(weights).float() * 0.01
    expected = (rows[places].double() @ errors.double().T).square().sum() / len(places)
    assert held_out.loss(errors) == pytest.approx(float(expected), rel=SUM_RELATIVE)


def test_two_streams_give_the_cross_term(rows: Tensor, undisturbed: Tensor, weights: Tensor) -> None:
    problem = collect(weights, reading(rows, undisturbed))
    places = chosen("vision", held_out=False)
    assert_same_sums(problem.hessian, mean_product(rows, rows, places))
    assert_same_sums(problem.cross, mean_product(undisturbed - rows, rows, places))


def test_process_without_rows_of_an_expert_has_every_sum(rows: Tensor, undisturbed: Tensor, weights: Tensor) -> None:
    """It had no cross term, and the other processes waited for it forever."""
    tokens = replace(some_tokens(), vision_mask=np.zeros(sum(LENGTHS), np.bool_))
    problem = Statistics(Processes()).problem(NAME, weights, Grid(4, 8), tokens, "vision", reading(rows, undisturbed))
    assert problem.tokens == 0 and problem.cross is not None and not problem.cross.any()


def judged(weights: Tensor) -> Tensor:
    """256 of the 300 outputs are judged on held-out tokens."""
    return weights[torch.linspace(0, OUT - 1, 256).long()].double()


def test_held_out_rows_of_two_streams_judge_the_distance_to_the_float_model(
    rows: Tensor, undisturbed: Tensor, weights: Tensor
) -> None:
    held_out, places = collect(weights, reading(rows, undisturbed)).held_out, chosen("vision", held_out=True)
    assert held_out is not None
    codes = judged(weights) * 0.99
    distance = rows[places].double() @ codes.T - undisturbed[places].double() @ judged(weights).T
    expected = float(distance.square().sum() / len(places))
    assert held_out.loss((codes - judged(weights)).float()) == pytest.approx(expected, rel=1e-4)


def test_one_stream_has_no_cross_term(rows: Tensor, weights: Tensor) -> None:
    assert collect(weights, reading(rows)).cross is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("sample", "held_out"), [(3, False), (4, True)])
def test_activation_that_is_not_finite_is_named_with_linear_and_sample(
    rows: Tensor, weights: Tensor, value: float, sample: int, held_out: bool
) -> None:
    start = sum(LENGTHS[:sample])
    place = next(row for row in chosen("vision", held_out) if row >= start)
    rows[place, 5] = value
    with pytest.raises(CalibrationError, match=f"{NAME}: .* Inf or NaN, first in sample sample {sample}"):
        collect(weights, reading(rows))
    assert collect(weights, reading(rows), expert="language").tokens, "the other expert never sees that row"


def test_second_stream_must_be_finite_too(rows: Tensor, undisturbed: Tensor, weights: Tensor) -> None:
    undisturbed[chosen("vision", held_out=False)[0]] = float("nan")
    with pytest.raises(CalibrationError, match="Inf or NaN"):
        collect(weights, reading(rows, undisturbed))


def test_rows_are_read_in_pieces_and_only_those_of_the_expert(rows: Tensor, weights: Tensor) -> None:
    seen: list[Ints] = []

    def inputs(places: Ints) -> tuple[Tensor, ...]:
        seen.append(places)
        return (rows[torch.from_numpy(places)],)

    collect(weights, inputs)
    assert max(map(len, seen)) <= 1024 < len(np.concatenate(seen))
    assert sorted(np.concatenate(seen)) == sorted(chosen("vision", False) + chosen("vision", True))


# What is held out


@pytest.fixture
def samples(tmp_path: Path) -> tuple[CalibrationSample, ...]:
    """Three questions about each of 16 pictures, then 17 texts."""
    tiny = TinyCheckpoint()
    spec = Checkpoint(write_checkpoint(tmp_path / "ckpt", tiny.config(), tiny.tensors())).spec
    picture, text = random_samples(spec, tiny, tmp_path, [True, False])
    pictured = [replace(picture, image=tmp_path / f"{number}.png") for number in range(16) for _ in range(3)]
    return tuple(pictured + [replace(text) for _ in range(17)])


def test_every_eighth_picture_and_text_is_held_out(samples: tuple[CalibrationSample, ...]) -> None:
    marked = hold_out(samples)
    held_out = [sample.image for sample in marked if sample.held_out]
    assert [image.stem for image in held_out if isinstance(image, Path)] == ["7"] * 3 + ["15"] * 3
    texts = [sample.held_out for sample in marked if sample.image is None]
    assert [place for place, held in enumerate(texts) if held] == [7, 15]
    assert [replace(sample, held_out=False) for sample in marked] == list(samples), "their order stays"


def test_samples_of_one_picture_are_held_out_together(samples: tuple[CalibrationSample, ...]) -> None:
    shuffled = tuple(samples[place] for place in np.random.default_rng(0).permutation(len(samples)))
    marked = hold_out(shuffled)
    of_picture = {sample.image: sample.held_out for sample in marked if sample.image}
    assert all(of_picture[sample.image] == sample.held_out for sample in marked if sample.image)
    assert sum(of_picture.values()) == 2
    pictures = pictures_of(marked)
    assert dict(zip(pictures.paths, pictures.held_out.tolist(), strict=True)) == of_picture


def test_nothing_is_held_out_where_there_is_little(samples: tuple[CalibrationSample, ...]) -> None:
    few = [each for each in samples if not isinstance(each.image, Path) or int(each.image.stem) < 15][:-2]
    assert not any(sample.held_out for sample in hold_out(few))


def test_tokens_of_held_out_samples_are_kept_apart(samples: tuple[CalibrationSample, ...]) -> None:
    marked = hold_out(samples)
    tokens = prompt_tokens(marked)
    for expert, count in (("vision", lambda sample: sample.vision_mask.sum()), ("language", text_tokens)):
        for held_out in (False, True):
            expected = sum(count(sample) for sample in marked if sample.held_out == held_out)
            assert len(tokens.select(expert, held_out)) == expected


def text_tokens(sample: CalibrationSample) -> Any:
    return (~sample.vision_mask).sum()


# Coverage


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration_checkpoint(tmp_path_factory.mktemp("routed") / "ckpt", vision_layers=1)


def test_floor_is_a_quarter_of_the_widest_input(ckpt: Path, tmp_path: Path) -> None:
    """96 inputs want 24 tokens; a picture brings 17."""
    one, two = (write_calibration_data(tmp_path / str(count), num_pictures=count, num_texts=6) for count in (1, 2))
    error = refusal(ckpt, one, tmp_path / "out")
    assert "the vision expert gets 17 calibration tokens, at least 24 are needed: give data with more pictures" in error
    assert run_quantize(ckpt, two, tmp_path / "out").exit_code == 0


def test_few_tokens_or_samples_are_warned_about_and_recorded(ckpt: Path, tmp_path: Path) -> None:
    data = write_calibration_data(tmp_path / "data", num_pictures=4, num_texts=4)
    result = run_quantize(ckpt, data, tmp_path / "out", "--json")
    report = only_json_document(result)
    warning = "the vision expert is calibrated with 68 tokens from 4 samples; 384 tokens from 64 samples or more give"
    assert any(line.startswith(f"Warning: {warning}") for line in result.stderr.splitlines())
    assert any(line.startswith(warning) for line in report["warnings"])
    vision = next(expert for expert in report["calibration"]["experts"] if expert["expert"] == "vision")
    assert vision == {
        "expert": "vision", "tokens": 68, "samples": 4, "held_out_tokens": 0, "wanted_tokens": 384
    }  # fmt: skip


@pytest.fixture(scope="module")
def text_only(ckpt: Path) -> Path:
    """A checkpoint calibrated with text alone, which reaches no part of the vision side."""
    data = write_calibration_data(ckpt.parent / "texts", num_pictures=0, num_texts=12)
    out = ckpt.parent / "uncalibrated"
    assert run_quantize(ckpt, data, out).exit_code == 1
    assert run_quantize(ckpt, data, out, "--allow-uncalibrated").exit_code == 0
    return out


def test_expert_without_tokens_is_rounded_when_allowed_and_the_report_says_so(text_only: Path) -> None:
    report = json.loads((text_only / "quantization_report.json").read_text())
    linears = {linear["name"]: linear for linear in report["linears"]}
    is_reached: Callable[[str], bool] = lambda name: ".language." in name or name == "lm_head.weight"  # noqa: E731
    for name, linear in linears.items():
        assert linear["method"] == ("gptq" if is_reached(name) else "rtn"), name
        assert is_reached(name) or linear["note"] in ("uncalibrated: 0 tokens", "nothing reads its output"), name
    assert any("the vision expert gets 0 calibration tokens" in warning for warning in report["warnings"])


def test_bundle_names_what_was_not_calibrated(text_only: Path, tmp_path: Path) -> None:
    options = ("--ckpt", text_only, "--target", "ort-int4", "--out", tmp_path / "bundle", "--threads", 1, "--json")
    document = only_json_document(run_cli("export", *options))
    report = json.loads((text_only / "quantization_report.json").read_text())
    count = sum(linear["note"].startswith("uncalibrated") for linear in report["linears"])
    assert any(f"{count} linears are not calibrated" in note for note in document["manifest"]["made_by"]["notes"])


def test_connector_with_too_few_rows_is_told_like_an_expert(tmp_path: Path) -> None:
    """Seven pictures give the vision expert 35 tokens, the connector 28 rows: it was once rounded in silence."""
    ckpt = write_calibration_checkpoint(tmp_path / "ckpt", "cogvlm2", vision_layers=1, layers=1, vision_mlp=32)
    data = write_calibration_data(tmp_path / "data", num_pictures=7, num_texts=4)
    result = run_quantize(ckpt, data, tmp_path / "out")
    told = result.exit_code == 1 and "connector" in result.stderr
    linears = [] if told else json.loads((tmp_path / "out" / "quantization_report.json").read_text())["linears"]
    assert told or not [linear["name"] for linear in linears if linear["note"].startswith("uncalibrated")]


def test_activation_that_overflows_is_named_on_the_command_line(tmp_path: Path) -> None:
    ckpt = write_changed_checkpoint(tmp_path / "ckpt", overflow_for_pictures, vision_layers=1)
    rows: list[Any] = [{"image": f"{number}.png", "messages": messages("What?", "It")} for number in range(4)]
    error = refusal(ckpt, write_rows(tmp_path / "data", rows), tmp_path / "out", "--connector", "fp32")
    assert "decoder.layers.0.vision.qkv.weight" in error and "0.png" in error and "Inf or NaN" in error


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_activations_are_quantized_to_finite_values(tmp_path: Path, value: float) -> None:
    """All rows of the embedding are equal: inputs that are dead, or carry nothing but one direction."""
    ckpt = write_changed_checkpoint(
        tmp_path / "ckpt", lambda tensors: tensors["model.embed_tokens.weight"].fill(value), vision_layers=1
    )
    data = write_calibration_data(tmp_path / "data", num_pictures=4, num_texts=4)
    result = run_quantize(ckpt, data, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    name = "decoder.layers.0.language.qkv.weight"
    quantized, weights = (Checkpoint(folder).parameter(name) for folder in (tmp_path / "out", ckpt))
    assert float((quantized - weights).abs().max()) < 0.2
