"""Writes a report's files: JSON, the page, tables, plots and a summary."""

import json
from pathlib import Path

from vlmdeploy.report.document import JSON_NAME, Report
from vlmdeploy.report.numbers import Document
from vlmdeploy.report.page import render_page
from vlmdeploy.report.plot_list import Plot, all_plots
from vlmdeploy.report.plot_style import png_of, styled, svg_of
from vlmdeploy.report.summary import render_summary
from vlmdeploy.report.tables import all_tables, csv_text

PAGE_NAME = "report.html"
SUMMARY_NAME = "summary.md"
PLOTS = "plots"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write all files of a report into an existing folder that holds its pictures; returns their paths.

    The same report gives the same bytes. Text that UTF-8 cannot encode (lone surrogates) is backslash-escaped. Raises
    DataError, before anything is written, for a number that is not finite and a missing or damaged picture.
    """
    document = Document(report)
    drawn = _draw(document, all_plots(report))
    page = render_page(document, {name: (plot, svg) for name, (plot, svg, _) in drawn.items()}, folder)
    texts = {JSON_NAME: json_text(document), PAGE_NAME: page, SUMMARY_NAME: render_summary(document)}
    texts |= {name: csv_text(rows) for name, rows in all_tables(report).items()}
    written = [_write_text(folder / name, text) for name, text in texts.items()]
    (folder / PLOTS).mkdir(exist_ok=True)
    for plot, _, png in drawn.values():
        written.append(folder / PLOTS / f"{plot.name}.png")
        written[-1].write_bytes(png)
    return written


def _draw(document: Document, plots: list[Plot]) -> dict[str, tuple[Plot, str, bytes]]:
    """Each plot by name with its SVG and PNG."""
    drawn = {}
    for plot in plots:
        with styled():
            figure = plot.draw()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laying out again for each file would take most of the time
        drawn[plot.name] = plot, svg_of(figure, plot.name, document.sentence(plot.message)), png_of(figure)
    return drawn


def json_text(document: Document) -> str:
    """The document as `read_report_json` reads it."""
    return json.dumps(document.json, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return path
