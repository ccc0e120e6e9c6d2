"""Made-up reports for tests of the page, the tables and the plots: whole ones, a bare one, one with evil text."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from vlmdeploy.bench import measurement as bench
from vlmdeploy.report.document import (
    Agreement,
    BoxExample,
    DataUsed,
    Failure,
    Flips,
    Frontier,
    FrontierPoint,
    Grounding,
    LayerErrors,
    ModelResult,
    Regression,
    Report,
    ReportedModel,
)
from vlmdeploy.score.metrics import Score

MB = 10**6
Item = TypeVar("Item")
SIZE_PX = (160, 120)
PICTURES = ("pictures/scene_0.png", "pictures/scene_1.png")
NAMES = (
    "PyTorch fp32", "ort-fp32", "ort-fp16", "ort-int8", "ort-int4 RTN", "ort-int4 GPTQ", "ort-int4 GPTQ vision int4",
    "3 bits", "ort-int4 group 64", "ort-int4 group 32", "ort-int4 text-only Hessians", "ort-int4 pooled Hessians",
    "budget 4.0 MB", "budget 3.5 MB", "a-model-with-a-very-long-name-that-nobody-would-choose-but-a-sweep-writes",
)  # fmt: skip
METRICS = {
    "vqa": {"exact_match": 0.9731, "exact_match/left_right": 1.0, "exact_match/sum": 0.9293},
    "rec": {"acc@0.5": 0.9976, "mean_iou": 0.9212, "parse_rate": 1.0},
    "reg": {"exact_match": 0.985},
    "caption": {"exact_match": 0.958, "token_f1": 0.991},
}  # fmt: skip
COUNTS = {"vqa": 10006, "rec": 2048, "reg": 2048, "caption": 2150}
NOT_COMPARED: dict[str, Any] = {
    **dict.fromkeys(("equal_answers", "agreement", "text_only", "grounding")),
    "regressions": (), "num_regressions": 0, "num_improvements": 0,
}  # fmt: skip
EVIL = (
    '<script>alert("1")</script>',
    "</td></table><img src=x onerror=alert(1)>",
    "quote \" apostrophe ' ampersand & &amp; {{ 7 * 7 }} {% raw %}",
    "line one\nline two\r\n\ttab | pipe",
    "\u202eright to left override \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "x" * 5000,
    "\U0001f9ea emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 \u6f22\u5b57",
    "nul \x00 bell \x07 escape \x1b[31m half a pair \ud83d",
    "$x^2$ \\frac{1}{2} _leading # * `code` [link](javascript:alert(1))",
    "=HYPERLINK(1)",
    "",
)


def score(value: float, half: float, count: int = 1000, limits: tuple[float, float] = (0.0, 1.0)) -> Score:
    return Score(value, max(limits[0], value - half), min(limits[1], value + half), count)


def example_report(num_models: int = 5) -> Report:
    """A reference and others with every part present."""
    models = tuple(model_result(place, NAMES[place]) for place in range(num_models))
    return Report(
        title="Calibration report: cogvlm on the digits",
        created="2026-11-24T22:10:00+01:00",
        command="vlmdeploy report bundles/ort-int8 bundles/ort-int4 --data data --out report",
        versions={"vlmdeploy": "0.9.0", "python": "3.11.2", "torch": "2.13.0", "onnxruntime": "1.31.0"},
        host={"cpu": "Example CPU 9000 @ 2.10GHz", "logical cores": "8", "memory": "33.5 GB", "kernel": "6.1.0"},
        data=DataUsed(
            "data/data.jsonl", "held-out scenes of handwritten digits", "ab" * 32, dict(COUNTS), 2150, 7, None
        ),
        reference=NAMES[0],
        models=models,
        frontier=_frontier(models),
        failures=(Failure("ort-int4 group 8", "group 8: expected one of 16, 32, 64, 128"),),
    )


def model_result(place: int, name: str) -> ModelResult:
    rng = np.random.default_rng(place)
    differences = _differences(rng, place)
    compared = ModelResult(
        subject=_subject(place, name),
        tasks=_tasks(rng),
        differences=differences,
        flips={"vqa": {"exact_match": Flips(12 + place, 9, 0.664)}, "rec": {"acc@0.5": Flips(3, 0, 0.00025)}},
        equal_answers=score(0.99 - 0.002 * place, 0.002),
        agreement=_agreement("answers of the data set", 10 ** -(4 - 0.2 * place)),
        text_only=_agreement("captions without pictures", 10 ** -(3.6 - 0.2 * place)),
        grounding=_grounding(rng, place),
        measurement=_measurement(rng, place),
        unmeasured=None,
        layer_errors=None if place < 4 else layer_errors(rng, 2 + place % 3, 4),
        regressions=_regressions(),
        num_regressions=12 + place,
        num_improvements=9,
    )
    return compared if place > 0 else replace(compared, differences=None, flips=None, **NOT_COMPARED)


def _subject(place: int, name: str) -> ReportedModel:
    is_reference = place == 0
    return ReportedModel(
        name=name,
        path="examples/digits/checkpoint" if is_reference else f"bundles/{place}",
        kind="checkpoint" if is_reference else "bundle",
        family="cogvlm",
        target=None if is_reference else "ort-int4",
        provider=None if is_reference else "CPUExecutionProvider",
        precision={"all": "float32"} if is_reference else {"decoder": "int4", "vision": "int8", "lm_head": "int8"},
        group_sizes={} if is_reference else {"decoder": 64},
        quantization="none" if is_reference else "GPTQ",
        notes=() if place != 4 else ("3-bit codes travel in 4-bit containers",),
        sha256=f"{place:02x}" * 32,
        versions={} if is_reference else {"vlmdeploy": "0.9.0", "onnx": "1.18.0"},
        size_bytes=round(12.8 * MB / (1 + 0.5 * place)),
    )


def _tasks(rng: np.random.Generator) -> dict[str, dict[str, Score]]:
    return {
        task: {name: score(value - 0.003 * float(rng.random()), 0.004, COUNTS[task]) for name, value in metrics.items()}
        for task, metrics in METRICS.items()
    }


def _differences(rng: np.random.Generator, place: int) -> dict[str, dict[str, Score]]:
    limits = (-1.0, 1.0)
    return {
        task: {
            name: score(-0.0004 * place * float(rng.normal(1, 1.5)), 0.0011, COUNTS[task], limits)
            for name in metrics
            if "/" not in name
        }
        for task, metrics in METRICS.items()
    }


def _agreement(source: str, kl: float) -> Agreement:
    return Agreement(
        source, 500, 4321, Score(kl, 0.8 * kl, 1.3 * kl, 500), 0.1 * kl, 20 * kl, 90 * kl, score(0.996, 0.002, 500),
        Score(1.083, 1.071, 1.099, 500), 1.081,
    )  # fmt: skip


def _grounding(rng: np.random.Generator, place: int) -> Grounding:
    edges = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
    counts = rng.multinomial(2048, [0.55, 0.2, 0.12, 0.06, 0.03, 0.02, 0.01, 0.01]).tolist()
    examples = (
        BoxExample(PICTURES[0], "Where is the 7?", (20, 30, 60, 80), (21, 31, 61, 80), (28, 36, 74, 88), 81.2, 0.52),
        BoxExample(PICTURES[1], "Where is the 3?", (80, 20, 130, 90), (80, 20, 131, 92), None, None, 0.0),
    )  # fmt: skip
    return Grounding(2048, edges, tuple(counts), 0.4 * place, 12.5 * place, examples)


def _spread(p50: float) -> bench.Spread:
    return bench.Spread(p50, p50 * 1.08, p50 * 1.01, p50 * 0.97, 5)


def _measurement(rng: np.random.Generator, place: int) -> bench.Measurement:
    vision, prefill = 40 / (1 + 0.3 * place), 18 / (1 + 0.25 * place)
    phases = {
        name: bench.PhaseMemory(round(size * MB / (1 + 0.15 * place)), 60 * MB, 40 * MB, 20 * MB, None)
        for name, size in {"open": 92, "preprocess": 96, "vision": 131, "prefill": 124, "decode": 118}.items()
    }  # fmt: skip
    energy = None
    if place % 2:
        joules = {"preprocess": 0.2, "vision": 1.4, "prefill": 0.6, "decode": 2.1}
        energy = bench.Energy("RAPL, processor packages", 6.2, joules, 4.3, 0.033, 2.9, 0.021)
    return bench.Measurement(
        bundle=bench.BundleUsed(f"bundles/{place}", "cogvlm", "ort-int4", {"decoder": "int4"}, 256),
        machine=bench.Machine("Example CPU 9000 @ 2.10GHz", 8, 33 * 10**9, "6.1.0", None, None),
        engine=bench.EngineUsed("onnxruntime", "1.31.0", "CPUExecutionProvider", None, "all"),
        picture="random JPEG, 1024 x 768",
        prompt_tokens=31, image_rows=18, new_tokens=64, repeats=5, warmup=1, load_s=0.21,
        preprocess=_spread(1.3), vision=_spread(vision), prefill=_spread(prefill),
        first_token=_spread(1.3 + vision + prefill), decode_per_token=_spread(2.4 / (1 + 0.1 * place)),
        prefill_tok_s=31000 / prefill, decode_tok_s=1000 / (2.4 / (1 + 0.1 * place)),
        disk_bytes=bench.DiskUse(4_300_000, 90_000, 3_900_000, 200_000, 0, 110_000),
        memory=bench.MemoryUse("peak counted by the kernel", 41 * MB, phases, "no GPU", None),
        energy=energy,
        energy_unknown=None if energy else "/sys/class/powercap: only root may read the counters",
    )  # fmt: skip


def layer_errors(rng: np.random.Generator, num_vision: int, num_decoder: int) -> LayerErrors:
    rows = [f"vision {place}" for place in range(num_vision)] + [f"decoder {place}" for place in range(num_decoder)]
    columns = ["qkv", "dense", "fc1", "fc2", *(f"{expert} {kind}" for expert in ("vision", "language")
               for kind in ("qkv", "dense", "gate", "up", "down"))]  # fmt: skip
    held = [[(column < 4) == (row < num_vision) for column in range(len(columns))] for row in range(len(rows))]
    errors = [[float(10 ** rng.normal(-2.6, 0.4)) if is_held else None for is_held in line] for line in held]
    ratios = [[float(rng.uniform(0.5, 1.02)) if is_held else None for is_held in line] for line in held]
    bits = [[4 if is_held else None for is_held in line] for line in held]
    return LayerErrors(tuple(rows), tuple(columns), _tuples(errors), _tuples(ratios), _tuples(bits))


def _tuples(rows: Sequence[Sequence[Item]]) -> tuple[tuple[Item, ...], ...]:
    return tuple(map(tuple, rows))


def _regressions() -> tuple[Regression, ...]:
    sum_of = Regression("vqa", "sum", PICTURES[0], "What is the sum?", "18", "18", "19", "exact_match", 1.0, 0.0)
    box = "[[500,167,812,750]]"
    where = Regression("rec", "", PICTURES[1], "Where is the 3?", box, box, "the 3", "acc@0.5", 1.0, 0.0)
    caption = Regression("caption", "", None, "Describe it.", "a 3, a 7", "a 3, a 7", "a 3", "token_f1", 1.0, 0.4)
    return sum_of, where, caption


def _frontier(models: Sequence[ModelResult]) -> Frontier:
    costs = [_costs(model) for model in models]
    beaten = [
        any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in costs)
        for mine in costs
    ]
    points = (
        FrontierPoint(model.subject.name, -negative, latency, int(peak), is_dominated)
        for model, (negative, latency, peak), is_dominated in zip(models, costs, beaten, strict=True)
    )
    return Frontier(("VQA exact match", "Boxes IoU at 0.5"), 64, tuple(points))


def _costs(model: ModelResult) -> tuple[float, float, float]:
    """What is better when lower: minus the accuracy, milliseconds, bytes."""
    measurement = model.measurement
    assert measurement is not None, "example_report measures every model"
    latency = measurement.first_token.p50 + 64 * measurement.decode_per_token.p50
    return -model.tasks["vqa"]["exact_match"].value, latency, float(measurement.memory.peak_bytes)


def bare_report() -> Report:
    """A reference alone of which nothing but its name is known."""
    full = example_report(1)
    bare = replace(
        full.models[0], tasks={}, measurement=None, unmeasured="a checkpoint is not measured: PyTorch is the reference",
        layer_errors=None,
    )  # fmt: skip
    data = replace(full.data, questions={}, pictures=0)
    return replace(full, models=(bare,), frontier=None, failures=(), data=data, versions={}, host={})


def missing_parts_report() -> Report:
    """Three models: the reference, one whole, and one of which everything that can be missing is."""
    report = example_report(3)
    missing = replace(
        report.models[2], differences={}, flips={}, measurement=None, unmeasured="needs an NVIDIA GPU",
        layer_errors=None, **NOT_COMPARED,
    )  # fmt: skip
    reference = replace(report.models[0], measurement=None, unmeasured="a checkpoint is not measured")
    return replace(report, models=(reference, report.models[1], missing), frontier=None)


def evil_report() -> Report:
    """Every text that comes from outside is one of EVIL, in names, questions, answers and reasons."""
    report = example_report(len(EVIL))
    models = tuple(_evil_model(model, text) for model, text in zip(report.models, EVIL, strict=True))
    frontier = report.frontier
    assert frontier is not None, "example_report has one"
    points = tuple(replace(point, name=text) for point, text in zip(frontier.points, EVIL, strict=True))
    return replace(
        report, title=EVIL[0], command=EVIL[2], reference=EVIL[0], models=models,
        frontier=replace(frontier, points=points), failures=tuple(Failure(text, text) for text in EVIL),
        host={text: text for text in EVIL}, data=replace(report.data, description=EVIL[4], path=EVIL[7]),
    )  # fmt: skip


def _evil_model(model: ModelResult, text: str) -> ModelResult:
    regressions = tuple(
        replace(each, kind=text, question=text, expected=text, reference_answer=text, answer=text)
        for each in model.regressions
    )
    grounding = model.grounding
    if grounding is not None:
        examples = tuple(replace(example, question=text) for example in grounding.examples)
        grounding = replace(grounding, examples=examples)
    subject = replace(model.subject, name=text, path=text, quantization=text, notes=(text,))
    return replace(model, subject=subject, regressions=regressions, grounding=grounding, layer_errors=None)


def write_pictures(folder: Path) -> Path:
    """The pictures that the reports name, in the folder."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(("#2e4a62", "#6b5b3e")):
        picture = Image.new("RGB", SIZE_PX, colour)
        draw = ImageDraw.Draw(picture)
        draw.text((30, 40), "7", fill="white", font_size=40)
        draw.text((90, 35), "3", fill="#ffd080", font_size=48)
        picture.save(folder / "pictures" / f"scene_{number}.png")
    return folder


REPORTS: dict[str, Callable[[], Report]] = {
    "whole": lambda: example_report(5),
    "one model": lambda: example_report(1),
    "missing parts": missing_parts_report,
    "bare": bare_report,
    "evil": evil_report,
}
