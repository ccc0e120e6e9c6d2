"""Contract of the report's files: they read back as what was written, and the same report is the same bytes."""

import csv
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tests.report_example import EVIL, REPORTS, bare_report, evil_report, example_report, write_pictures
from vlmdeploy.errors import DataError
from vlmdeploy.report.document import Report, read_report_json
from vlmdeploy.report.files import write_report
from vlmdeploy.report.numbers import Document
from vlmdeploy.report.page import render_page
from vlmdeploy.report.plot_list import all_plots
from vlmdeploy.report.plot_style import styled, svg_of
from vlmdeploy.report.summary import render_summary
from vlmdeploy.score.metrics import Score

TABLES = ["scores.csv", "agreement.csv", "latency.csv", "memory.csv", "layer_errors.csv", "regressions.csv"]
Table = list[dict[str, str]]


@pytest.fixture
def whole(written_report: Callable[[str], Path]) -> Path:
    return written_report("whole")


@pytest.fixture
def evil(written_report: Callable[[str], Path]) -> Path:
    return written_report("evil")


def read_table(path: Path) -> Table:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def test_the_same_report_is_the_same_files_byte_by_byte(whole: Path, tmp_path: Path) -> None:
    written = write_report(example_report(5), write_pictures(tmp_path))
    assert set(written) == {path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "pictures"}
    assert [path for path in written if path.read_bytes() != (whole / path.relative_to(tmp_path)).read_bytes()] == []
    assert {"report.json", "report.html", "summary.md", *TABLES} <= {path.name for path in written}
    plots = {path.stem for path in written if path.parent.name == "plots"}
    assert plots == {
        "accuracy_latency", "accuracy_memory", "differences", "divergence", "drift", "memory", "first_token",
        "layer_errors_4",
    }  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_json_reads_back_as_the_report(name: str, written_report: Callable[[str], Path]) -> None:
    assert read_report_json(written_report(name) / "report.json") == REPORTS[name]()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_json_lacks_is_refused_before_anything_is_written(value: float, tmp_path: Path) -> None:
    report = example_report(2)
    agreement = report.models[1].agreement
    assert agreement is not None
    model = replace(report.models[1], agreement=replace(agreement, kl_max=value))
    with pytest.raises(DataError, match=rf"report: models\.1\.agreement\.kl_max is {value}, expected a finite number"):
        write_report(replace(report, models=(report.models[0], model)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scores_table_has_every_score_unrounded(whole: Path) -> None:
    report, rows = example_report(5), read_table(whole / "scores.csv")
    columns = "model,task,metric,value,low,high,count,difference,difference_low,difference_high,lost,gained,p_value"
    assert ",".join(rows[0]) == columns
    assert len(rows) == sum(len(metrics) for model in report.models for metrics in model.tasks.values())
    row = next(row for row in rows if (row["model"], row["task"], row["metric"]) == ("ort-fp16", "rec", "acc@0.5"))
    model = report.models[2]
    assert model.differences is not None
    assert float(row["value"]) == model.tasks["rec"]["acc@0.5"].value
    assert float(row["difference_low"]) == model.differences["rec"]["acc@0.5"].low
    assert (row["lost"], row["gained"], float(row["p_value"])) == ("3", "0", 0.00025)


def test_cells_of_the_reference_that_compare_are_empty(whole: Path) -> None:
    rows = [row for row in read_table(whole / "scores.csv") if row["model"] == "PyTorch fp32"]
    compared = ("difference", "difference_low", "difference_high", "lost", "gained", "p_value")
    assert rows
    assert {row[name] for row in rows for name in compared} == {""}


def test_other_tables_hold_what_was_measured(whole: Path) -> None:
    report = example_report(5)
    measurement, errors = report.models[1].measurement, report.models[4].layer_errors
    assert measurement is not None
    assert errors is not None
    latency = {(row["model"], row["phase"]): row for row in read_table(whole / "latency.csv")}
    memory = {(row["model"], row["phase"]): row for row in read_table(whole / "memory.csv")}
    layers = read_table(whole / "layer_errors.csv")
    assert float(latency["ort-fp32", "first_token"]["p95_ms"]) == measurement.first_token.p95
    assert float(latency["ort-fp32", "decode_per_token"]["tokens_per_s"]) == measurement.decode_tok_s
    assert int(memory["ort-fp32", "vision"]["peak_bytes"]) == measurement.memory.phases["vision"].peak_bytes
    assert len(layers) == sum(error is not None for row in errors.errors for error in row)
    assert {row["part"] for row in read_table(whole / "agreement.csv")} == {"pictures", "text_only"}


def test_evil_text_reads_back_from_tables(evil: Path) -> None:
    rows = read_table(evil / "regressions.csv")
    answers = {row["answer"] for row in rows}
    expected = {text.encode("utf-8", "backslashreplace").decode() for text in EVIL[1:]}
    assert answers == expected
    assert len(rows) == 3 * (len(EVIL) - 1)


def test_bare_report_has_headings_and_no_plots(tmp_path: Path) -> None:
    written = write_report(bare_report(), write_pictures(tmp_path))
    assert [path for path in written if path.suffix == ".png"] == []
    assert all(read_table(tmp_path / name) == [] for name in TABLES)
    assert (tmp_path / "scores.csv").read_text().startswith("model,task,metric,value,")


def test_plots_are_pictures_with_something_on_them(whole: Path) -> None:
    plots = sorted((whole / "plots").glob("*.png"))
    assert len(plots) == 8
    for path in plots:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
            assert image.info["dpi"] == pytest.approx((160, 160), abs=0.1)
        assert min(pixels.shape) > 200
        assert 0.005 < (pixels < 200).mean() < 0.8, path.name


@pytest.mark.parametrize("num_models", [1, 2, 7, pytest.param(15, marks=pytest.mark.slow)])
def test_text_in_plots_does_not_overlap(num_models: int) -> None:
    for plot in all_plots(example_report(num_models))[:8]:
        with styled():
            figure = plot.draw()
            figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in drawn_texts(figure)]
        inside = figure.bbox.padded(2)
        for place, (words, box) in enumerate(boxes):
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, words
            covered = [other for other, its in boxes[place + 1 :] if its.overlaps(box)]
            assert covered == [], f"{plot.name}: {words!r} and {covered}"


def drawn_texts(figure: Figure) -> list[Text]:
    """All text that is seen; matplotlib also holds labels of ticks outside of the axes, which it does not draw."""
    hidden: set[Artist] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if not low - 1e-9 <= tick.get_loc() <= high + 1e-9]
            hidden |= {label for tick in ticks for label in (tick.label1, tick.label2)}
        if not axes.get_visible():
            hidden |= set(axes.findobj(Text))
    texts = [artist for artist in figure.findobj(Text) if isinstance(artist, Text) and artist not in hidden]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


@pytest.mark.filterwarnings("error")
def test_plots_take_any_name_without_a_warning() -> None:
    report = evil_report()
    for plot in all_plots(report)[:4]:
        with styled():
            figure = plot.draw()
        svg = svg_of(figure, plot.name, Document(report).sentence(plot.message))
        assert "$x^2$" in svg


def test_svg_follows_the_page_and_keeps_its_text() -> None:
    plot = all_plots(example_report(3))[0]
    with styled():
        figure = plot.draw()
    svg = svg_of(figure, "trade", "what it says")
    assert ">ort-fp32</text>" in svg
    assert 'aria-label="what it says"' in svg
    assert "var(--ink)" in svg
    assert not re.search(r"<metadata|<style|xlink|xmlns|<!DOCTYPE", svg)
    assert all(name.startswith("trade-") for name in re.findall(r' id="([^"]*)"', svg))


def test_summary_has_a_table_that_parses(whole: Path, evil: Path) -> None:
    for folder, num_models in ((whole, 5), (evil, len(EVIL))):
        lines = (folder / "summary.md").read_text(encoding="utf-8").splitlines()
        table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
        assert len(table) == 2 + num_models
        assert {len(cells) for cells in table} == {11}
        assert all(re.fullmatch(r" -+:? ", cell) for cell in table[1])
    assert not re.search(r"(?<!\\)<", "\n".join(lines))


def test_summary_says_what_the_page_says(whole: Path) -> None:
    ascii_only = str.maketrans({"\N{NO-BREAK SPACE}": " ", "\N{MINUS SIGN}": "-"})
    text = (whole / "summary.md").read_text(encoding="utf-8").translate(ascii_only)
    assert text.startswith("# Calibration report: cogvlm on the digits\n")
    assert "- **ort-fp32**: VQA -0.06 points (95 %: -0.17 to +0.05): no loss seen, nor in boxes" in text
    assert "| ort-int4 RTN | 97.26 %, 0.00 (-0.11 to +0.11) |" in text


def odd_reports() -> dict[str, Report]:
    """Valid, but at the ends of what can be: nothing counted, nothing held, all equal, zero everywhere."""
    report = example_report(5)
    model, measurement, grounding = report.models[4], report.models[4].measurement, report.models[4].grounding
    errors, agreement, frontier = model.layer_errors, model.agreement, report.frontier
    assert measurement and grounding and errors and agreement and frontier
    zero = Score(0.0, 0.0, 0.0, 0)
    zeros = tuple(tuple(0.0 if error is not None else None for error in row) for row in errors.errors)
    same = tuple(replace(frontier.points[0], name=point.name) for point in frontier.points)
    memory = replace(measurement.memory, phases={})
    no_drifts = replace(grounding, both=0, counts=(0,) * len(grounding.counts), examples=())
    changed = {
        "no phases of memory": replace(model, measurement=replace(measurement, memory=memory)),
        "no picture": replace(model, measurement=replace(measurement, vision=None)),
        "no drifts": replace(model, grounding=no_drifts),
        "no bins": replace(model, grounding=replace(grounding, edges=(0.0,), counts=())),
        "no errors": replace(model, layer_errors=replace(errors, errors=zeros, ratios=zeros)),
        "no rows": replace(model, layer_errors=replace(errors, rows=(), errors=(), ratios=(), bits=())),
        "the same model": replace(model, agreement=replace(agreement, kl=zero, kl_p99=0.0, perplexity=zero)),
        "no size": replace(model, subject=replace(model.subject, size_bytes=0)),
        "no metrics": replace(model, tasks={"vqa": {}}, differences={"vqa": {}}, flips={"vqa": {}}),
    }
    odd = {name: replace(report, models=(report.models[0], each)) for name, each in changed.items()}
    return {**odd, "points at one place": replace(report, frontier=replace(frontier, points=same))}


@pytest.mark.slow
@pytest.mark.parametrize("name", odd_reports())
def test_odd_but_valid_reports_are_written(name: str, tmp_path: Path) -> None:
    report = odd_reports()[name]
    plots = {plot.name: plot for plot in all_plots(report)}
    for plot in plots.values():
        with styled():
            plot.draw().draw_without_rendering()
    drawn = {name: (plot, "<svg/>") for name, plot in plots.items()}
    page = render_page(Document(report), drawn, write_pictures(tmp_path))
    assert ET.fromstring(page).tag == "html"
    assert report.models[-1].subject.name in render_summary(Document(report))


def test_example_has_every_part_of_the_shape() -> None:
    """The other tests are worth as much as the report they draw."""
    model = example_report(6).models[5]
    assert [field.name for field in fields(model) if getattr(model, field.name) in (None, (), {})] == ["unmeasured"]
