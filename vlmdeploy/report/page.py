"""The report as one HTML page that needs no network, no other file and no script.

The templates hold the text; here are the functions that they call. A number reaches the page only through `number`,
which looks it up in the JSON document and tags it with its key.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdeploy.report import overview, wording
from vlmdeploy.report.document import ModelResult
from vlmdeploy.report.numbers import Document, Key, Phrase, Shown, key_text, printable
from vlmdeploy.report.pictures import Embedded, embed_picture, rectangle
from vlmdeploy.report.plot_list import Plot

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

MAX_TEXT = 1200  # characters shown of a question or an answer; JSON and CSV files hold all


def render_page(document: Document, plots: Mapping[str, tuple[Plot, str]], folder: Path) -> str:
    """Render the page. plots: by name, with SVG. folder: holds the pictures. Raises DataError if one is missing."""
    environment = _environment()
    page = _Page(document, plots, folder)
    functions = ("number", "say", "plot", "picture", "has_plot", "plot_names", "place_of")
    names = {name: getattr(page, name) for name in functions}
    return environment.get_template("report.html").render(
        report=document.report, words=wording, overview=overview, rectangle=rectangle, **names
    )


def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmdeploy.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_finalized,
    )  # fmt: skip
    environment.filters["shortened"] = _shortened
    return environment


def _finalized(value: object) -> object:
    """Make every value that the template writes valid HTML text."""
    if isinstance(value, str):
        clean = printable(value)
        return value.__class__(clean) if clean != value else value  # Markup stays Markup
    return value


def _shortened(text: str, length: int = MAX_TEXT) -> str:
    """Cut very long text; mark empty text."""
    if not text.strip():
        return "(empty)"
    return text if len(text) <= length else f"{text[:length]}\N{HORIZONTAL ELLIPSIS}"


class _Page:
    """The functions that the templates call."""

    def __init__(self, document: Document, plots: Mapping[str, tuple[Plot, str]], folder: Path) -> None:
        self._document = document
        self._plots = plots
        self._folder = folder
        self._pictures: dict[str, Embedded] = {}

    def number(self, form: str, key: Key, over: Key | None = None) -> "Markup":
        """A formatted value of the document, in an element with its key."""
        from markupsafe import Markup

        text = printable(self._document.text(Shown(form, key, over)))
        other = Markup(' data-over="{}"').format(key_text(over)) if over else ""
        return Markup('<span data-form="{}" data-path="{}"{}>{}</span>').format(form, key_text(key), other, text)

    def say(self, pieces: Iterable[Phrase]) -> "Markup":
        """A sentence of words and numbers."""
        from markupsafe import Markup

        return Markup("").join(
            piece if isinstance(piece, str) else self.number(piece.form, piece.key, piece.over) for piece in pieces
        )

    def place_of(self, model: ModelResult) -> int:
        """A model's index in the report."""
        return next(place for place, each in enumerate(self._document.report.models) if each is model)

    def plot(self, name: str) -> dict[str, Any]:
        """Title, message and SVG of a plot."""
        from markupsafe import Markup

        plot, svg = self._plots[name]
        return {"title": plot.title, "message": plot.message, "svg": Markup(svg)}

    def has_plot(self, name: str) -> bool:
        """Whether the report has numbers for this plot."""
        return name in self._plots

    def plot_names(self, beginning: str) -> list[str]:
        """Names of the plots of one kind."""
        return [name for name in self._plots if name.startswith(beginning)]

    def picture(self, name: str) -> Embedded:
        """A picture of the report, read once."""
        if name not in self._pictures:
            self._pictures[name] = embed_picture(self._folder, name)
        return self._pictures[name]
