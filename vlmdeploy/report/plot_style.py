"""How plots look and become files: colours, sizes, labels that do not overlap, SVG for the page and PNG.

Colours are Okabe and Ito's, distinct with every kind of colour vision. In the page's SVG each is a variable of the
style sheet, so plots follow a dark page; PNG files use the light ones.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlmdeploy.report.numbers import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

INK, MUTED, LINE, SURFACE, GREY = "#1c2128", "#59626e", "#d4d9e0", "#fdfdfe", "#949ca7"
BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"
VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", SURFACE: "surface", GREY: "grey", BLUE: "blue", ORANGE: "orange",
    GREEN: "green", VERMILLION: "vermillion", SKY: "sky", PURPLE: "purple",
}  # fmt: skip
HALF_IN, FULL_IN = 5.4, 8.8  # widths: two plots side by side in the page, or one
ROW_IN = 0.23  # height of a line of text beside a bar
PNG_DPI = 160
STYLE: Any = {  # matplotlib types it by a list of all its settings
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.facecolor": "none",
    "figure.facecolor": SURFACE,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "svg.fonttype": "none",  # text stays text
    "hatch.linewidth": 0.5,
}
STYLE_VALUE = re.compile(r"#[0-9a-fA-F]{6}\b")
FONT_FAMILY = re.compile(r"'DejaVu Sans'(, [^;]*)?")
REFERENCE_TO_ID = re.compile(r"(url\(#|^#)")
SVG_TAG = re.compile(r"\{[^}]*\}")


@contextmanager
def styled() -> Iterator[None]:
    """Apply our style to everything drawn inside; do not warn about characters that the font lacks."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width_in: float, height_in: float, rows: int = 1, columns: int = 1, **options: Any) -> "Figure":
    """An empty figure with a grid of axes, without a display. options: see `Figure.subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(rows, columns, squeeze=False, **options)
    return figure


def place_labels(
    axes: "Axes", points: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Write a label near each point without covering other labels or points; a line connects distant ones."""
    from matplotlib.transforms import Bbox

    figure = axes.figure.get_figure(root=True)
    assert figure is not None, "axes of a figure"
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # placing labels must not move the axes
    pixels = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    bounds = axes.get_window_extent().padded(2)
    for place in sorted(range(len(points)), key=lambda place: -pixels[place][1]):
        text = axes.annotate(
            labels[place], points[place], xytext=(0, 0), textcoords="offset pixels", color=colours[place], va="center",
            annotation_clip=False, fontsize=8,
        )  # fmt: skip
        box = text.get_window_extent()
        others = taken[:place] + taken[place + 1 :]
        dx, dy = _free_offset(box.width, box.height, pixels[place], others, bounds)
        text.set_position((dx * 72 / figure.dpi, dy * 72 / figure.dpi))
        text.set_anncoords("offset points")
        x, y = pixels[place]
        taken.append(Bbox.from_bounds(x + dx - 2, y + dy - box.height / 2, box.width + 4, box.height))
        _lead(axes, points[place], pixels[place], taken[-1])


def _free_offset(
    width: float, height: float, pixel: Sequence[float], taken: Sequence["Bbox"], bounds: "Bbox"
) -> tuple[float, float]:
    """Offset in pixels from a point to the left middle of its label: the nearest free place, right first."""
    from matplotlib.transforms import Bbox

    best, least = (0.0, 0.0), float("inf")
    for dx, dy in _offsets(width, height):
        box = Bbox.from_bounds(pixel[0] + dx - 2, pixel[1] + dy - height / 2 - 1, width + 4, height + 2)
        outside = not (bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0 and box.y1 <= bounds.y1)
        covered = sum(other.overlaps(box) for other in taken) + 100 * outside
        if covered < least:
            best, least = (dx, dy), covered
        if least == 0:
            break
    return best


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    right, left, middle = 9.0, -width - 9.0, -width / 2
    yield from [(right, 0), (left, 0), (middle, height), (middle, -height)]
    for ring in range(1, 24):
        for dy in (ring * height * 0.6, -ring * height * 0.6):
            for dx in (right, left, right + 12 * ring, left - 12 * ring, middle):
                yield dx, dy


def _lead(axes: "Axes", point: tuple[float, float], pixel: Sequence[float], box: "Bbox") -> None:
    """Draw a thin line from a point to its label, if they do not touch."""
    x, y = min(max(pixel[0], box.x0), box.x1), min(max(pixel[1], box.y0), box.y1)
    if (x - pixel[0]) ** 2 + (y - pixel[1]) ** 2 > 14**2:
        end = axes.transData.inverted().transform((x, y))
        line = ([point[0], end[0]], [point[1], end[1]])
        axes.plot(*line, color=GREY, linewidth=0.6, zorder=1, scalex=False, scaley=False)


def png_of(figure: "Figure") -> bytes:
    """The figure as PNG, the same bytes every time."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor=SURFACE, metadata={"Software": None})
    return buffer.getvalue()


def svg_of(figure: "Figure", name: str, message: str) -> str:
    """The figure as an SVG element for HTML, the same text every time.

    name: prefix of all ids, unique in the page. message: text for screen readers.
    """
    import matplotlib

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ET.fromstring(buffer.getvalue())
    _strip(root)
    for element in root.iter():
        _rewrite(element, f"{name}-")
    width_pt = root.attrib.pop("width").removesuffix("pt")
    del root.attrib["height"]
    root.attrib.update({"role": "img", "aria-label": printable(message), "style": f"--width: {float(width_pt):.0f}"})
    return ET.tostring(root, encoding="unicode")


def _strip(parent: ET.Element) -> None:
    """Drop metadata, and style sheets, which would apply to the whole page."""
    for child in list(parent):
        if SVG_TAG.sub("", child.tag) in ("metadata", "style"):
            parent.remove(child)
        else:
            _strip(child)


def _rewrite(element: ET.Element, prefix: str) -> None:
    """Strip namespaces, prefix ids, use the page's colours and font."""
    element.tag = SVG_TAG.sub("", element.tag)
    attributes = {SVG_TAG.sub("", name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            value = prefix + value
        elif name in ("href", "clip-path", "fill", "style"):
            value = REFERENCE_TO_ID.sub(lambda match: match[0] + prefix, value)
        if name in ("style", "fill", "stroke"):
            value = STYLE_VALUE.sub(_variable, FONT_FAMILY.sub("var(--font)", value))
        element.set(name, value)


def _variable(match: re.Match[str]) -> str:
    name = VARIABLES.get(match[0].lower())
    return f"var(--{name})" if name else match[0]
