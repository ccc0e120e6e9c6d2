"""The report as one HTML page that needs no network, no other file and no script.

The template has the words and the order; here are the few functions that it calls. A number reaches the page only
through `number`, which takes it from the JSON document and writes the place it has there beside it.
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

MAX_TEXT = 1200  # letters of a question or an answer that are shown; all of them are in the JSON and CSV files


def render_page(document: Document, plots: Mapping[str, tuple[Plot, str]], folder: Path) -> str:
    """The page. plots: by name, with their SVG. folder: where the pictures lie. Raises DataError if one is missing."""
    environment = _environment()
    page = _Page(document, plots, folder)
    functions = ("number", "say", "plot", "picture", "has_plot", "plot_names", "place_of")
    names = {name: getattr(page, name) for name in functions}
    return environment.get_template("report.html").render(
        report=document.report,
        words=wording,
        overview=overview,
        rectangle=rectangle,
        **names,
    )


def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmdeploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    environment.filters["shortened"] = _shortened
    return environment


def _finalized(value: object) -> object:
    """What HTML can hold. Everything that the template writes passes here."""
    if isinstance(value, str):
        clean = printable(value)
        return value.__class__(clean) if clean != value else value  # Markup stays Markup
    return value


def _shortened(text: str, length: int = MAX_TEXT) -> str:
    """The beginning of a very long text; an empty one is said to be empty."""
    if not text.strip():
        return "(empty)"
    return text if len(text) <= length else f"{text[:length]}\N{HORIZONTAL ELLIPSIS}"


class _Page:
    """What the template calls."""

    def __init__(self, document: Document, plots: Mapping[str, tuple[Plot, str]], folder: Path) -> None:
        self._document = document
        self._plots = plots
        self._folder = folder
        self._pictures: dict[str, Embedded] = {}

    def number(self, form: str, key: Key, over: Key | None = None) -> "Markup":
        """A value of the document in a form of FORMS, in an element that says where it stands there."""
        from markupsafe import Markup

        text = printable(self._document.text(Shown(form, key, over)))
        other = Markup(' data-over="{}"').format(key_text(over)) if over else ""
        return Markup('<span data-form="{}" data-path="{}"{}>{}</span>').format(form, key_text(key), other, text)

    def say(self, pieces: Iterable[Phrase]) -> "Markup":
        """Words and numbers of a sentence."""
        from markupsafe import Markup, escape

        shown = (
            escape(piece) if isinstance(piece, str) else self.number(piece.form, piece.key, piece.over)
            for piece in pieces
        )
        return Markup("").join(shown)

    def place_of(self, model: ModelResult) -> int:
        """Which of the report's models this one is."""
        return next(place for place, each in enumerate(self._document.report.models) if each is model)

    def plot(self, name: str) -> dict[str, Any]:
        """Title, message and SVG of a plot."""
        from markupsafe import Markup

        plot, svg = self._plots[name]
        return {"title": plot.title, "message": plot.message, "svg": Markup(svg)}

    def has_plot(self, name: str) -> bool:
        """Whether there were numbers to draw it."""
        return name in self._plots

    def plot_names(self, beginning: str) -> list[str]:
        """The plots of a kind."""
        return [name for name in self._plots if name.startswith(beginning)]

    def picture(self, name: str) -> Embedded:
        """A picture of the report's folder, read once."""
        if name not in self._pictures:
            self._pictures[name] = embed_picture(self._folder, name)
        return self._pictures[name]
