"""Contract: the report's page as a browser shows it, wide, narrow and printed. Slow: each look starts Chromium anew."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)), true);
addEventListener("load", () => {
  const root = document.documentElement, edge = root.clientWidth + 1;
  const inScroller = element => element.closest(".scroll") !== null;
  const wide = [...document.body.querySelectorAll("*")].filter(element =>
    element.getBoundingClientRect().right > edge && !inScroller(element));
  const pictures = [...document.images].filter(image => image.naturalWidth === 0).length;
  const plot = document.querySelector(".plot text");
  const found = {viewport: innerWidth, width: root.scrollWidth, errors, pictures, loaded: performance.getEntriesByType(
    "resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    wide: wide.map(element => element.outerHTML.slice(0, 80)), ink: plot && getComputedStyle(plot).fill,
    plots: document.querySelectorAll(".plot svg").length};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
FRAME = """<!DOCTYPE html><script>
addEventListener("message", event => document.documentElement.setAttribute("data-found", event.data));
</script><iframe src="probed.html" style="border: 0" width="{width}" height="2400"></iframe>"""
"""A window of headless Chromium has 500 pixels at least; a frame can be as narrow as a telephone."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to show the page"),
]
Browse = Callable[..., str]


@pytest.fixture
def browse() -> Iterator[Browse]:
    """Show a page with more flags; returns what the browser printed."""
    with TemporaryDirectory(dir="/tmp") as folder:  # sockets lie there, and their paths have 107 bytes at most

        def run(page: Path, *flags: str, width: int = 1280, height: int = 2400) -> str:
            profile = f"--user-data-dir={folder}/profile"
            command = [str(CHROMIUM), *FLAGS, profile, f"--window-size={width},{height}", *flags, page.as_uri()]
            environment = os.environ | {"TMPDIR": folder}
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
            return done.stdout

        yield run


@pytest.mark.parametrize(("name", "width"), [("whole", 390), ("whole", 1280), ("evil", 360)])
def test_page_is_as_wide_as_the_window(
    name: str, width: int, browse: Browse, written_report: Callable[[str], Path], tmp_path: Path
) -> None:
    found = probed(written_report(name), tmp_path, browse, width)
    assert found["viewport"] == width
    assert found["width"] <= width
    assert (found["errors"], found["pictures"], found["loaded"], found["wide"]) == ([], 0, [], [])
    assert found["plots"] >= 7


def probed(report: Path, folder: Path, browse: Browse, width: int) -> dict[str, Any]:
    """What a script finds in a copy of the page."""
    page = folder / "probed.html"
    page.write_text((report / "report.html").read_text("utf-8").replace("</head>", f"{PROBE}</head>"), "utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), "utf-8")
    dumped = browse(folder / "frame.html", "--dump-dom", "--virtual-time-budget=5000")
    match = re.search(r'data-found="([^"]*)"', dumped)
    assert match is not None, "the script did not run"
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_screenshots_show_something(
    width: int, browse: Browse, written_report: Callable[[str], Path], tmp_path: Path
) -> None:
    shot = tmp_path / "shot.png"
    browse(written_report("whole") / "report.html", f"--screenshot={shot}", width=width)
    with Image.open(shot) as image:
        assert image.size == (width, 2400)
        pixels = np.asarray(image.convert("L"), np.float64)
    inked = np.abs(pixels - np.median(pixels)) > 60
    assert 0.01 < inked.mean() < 0.5
    assert all(band.any() for band in np.array_split(inked, 6))  # from the top to the bottom


def test_page_prints(browse: Browse, written_report: Callable[[str], Path], tmp_path: Path) -> None:
    printed = tmp_path / "report.pdf"
    browse(written_report("whole") / "report.html", f"--print-to-pdf={printed}")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF-")
    assert len(content) > 100_000
