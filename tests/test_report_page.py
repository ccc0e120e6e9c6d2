"""Contract of the report's page: every number is the document's, it loads nothing, and text stays text."""

import functools
import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.report_example import EVIL, REPORTS, example_report, missing_parts_report, write_pictures
from vlmdeploy.errors import DataError
from vlmdeploy.report.numbers import FORMS, Document, key_text, printable, short_label
from vlmdeploy.report.page import render_page
from vlmdeploy.report.pictures import PictureFolder, embed_picture, rectangle
from vlmdeploy.report.wording import model_sentence, verdict
from vlmdeploy.runtime.image import load_image
from vlmdeploy.runtime.image_limits import ImageLimits
from vlmdeploy.score.metrics import Score


@dataclass(frozen=True)
class Rendered:
    """A report on disk, its page parsed as strictly as XML is."""

    folder: Path
    text: str
    page: ET.Element

    def values(self) -> dict[str, Any]:
        """Every value of report.json by its path."""
        return dict(_flat(json.loads((self.folder / "report.json").read_text(encoding="utf-8")), ()))

    def section(self, name: str) -> str:
        found = self.page.find(f".//section[@id='{name}']")
        assert found is not None, name
        return _words("".join(found.itertext()))


def _flat(value: Any, key: tuple[str | int, ...]) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _flat(item, (*key, name))
    yield key_text(key), value


def _words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def rendered(written_report: Callable[[str], Path]) -> Callable[[str], Rendered]:
    """Each report's page is parsed once."""

    @functools.cache
    def read(name: str) -> Rendered:
        folder = written_report(name)
        text = (folder / "report.html").read_text(encoding="utf-8")
        return Rendered(folder, text, ET.fromstring(text))

    return read


every_report = pytest.mark.parametrize("name", REPORTS)
Render = Callable[[str], Rendered]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "evil" else ()) for name in REPORTS]
)
def test_every_shown_number_is_the_documents(name: str, rendered: Render) -> None:
    page = rendered(name)
    values = page.values()
    shown = page.page.findall(".//*[@data-path]")
    assert len(shown) > (15 if name == "bare" else 100)
    for element in shown:
        value, over = values[element.attrib["data-path"]], element.get("data-over")
        expected = FORMS[element.attrib["data-form"]](value if over is None else value / values[over])
        assert _words("".join(element.itertext())) == _words(printable(expected)), element.attrib


@every_report
def test_cells_hold_no_number_of_another_origin(name: str, rendered: Render) -> None:
    cells = rendered(name).page.findall(".//td")
    assert cells
    for cell in cells:
        assert not re.search(r"\d", "".join(_untraced(cell))), ET.tostring(cell)


def _untraced(element: ET.Element) -> Iterator[str]:
    """Text that is in no element with a path."""
    if "data-path" not in element.attrib:
        yield element.text or ""
        for child in element:
            yield from _untraced(child)
            yield child.tail or ""


def test_main_numbers_are_on_the_page(rendered: Render) -> None:
    page = rendered("whole")
    paths = {element.attrib["data-path"] for element in page.page.findall(".//td//*[@data-path]")}
    for metric in (r"vqa.exact_match", r"rec.acc@0\.5", "caption.token_f1"):
        ends = {
            f"models.2.{part}.{metric}.{end}" for part in ("tasks", "differences") for end in ("value", "low", "high")
        }
        assert ends <= paths
    assert {r"models.2.flips.rec.acc@0\.5.lost", "models.2.agreement.kl.high", "models.2.text_only.top1.low"} <= paths


@every_report
def test_page_loads_nothing(name: str, rendered: Render) -> None:
    page = rendered(name)
    links = [value for element in page.page.iter() for key, value in element.attrib.items() if key in ("src", "href")]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")) for link in links)
    assert not {element.tag for element in page.page.iter()} & {"script", "link", "iframe", "object", "base", "form"}
    assert set(re.findall(r"url\((.)", page.text)) <= {"#"}
    assert "@import" not in page.text


@every_report
def test_page_is_told_to_readers_who_cannot_see_it(name: str, rendered: Render) -> None:
    page = rendered(name).page
    assert page.get("lang") == "en"
    assert all(header.get("scope") for header in page.findall(".//th"))
    assert all(_words("".join(table.find("caption").itertext())) for table in page.findall(".//table"))  # type: ignore[union-attr]
    assert all(picture.get("alt") for picture in page.findall(".//img"))
    assert all(drawing.get("aria-label") and drawing.get("role") == "img" for drawing in page.findall(".//svg"))


@every_report
def test_headings_come_in_order(name: str, rendered: Render) -> None:
    levels = [int(element.tag[1]) for element in rendered(name).page.iter() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


@every_report
def test_ids_are_unique_and_links_lead_to_them(name: str, rendered: Render) -> None:
    page = rendered(name)
    ids = [element.attrib["id"] for element in page.page.iter() if "id" in element.attrib]
    assert len(set(ids)) == len(ids)
    targets = {link[1:] for element in page.page.iter() if (link := element.get("href", "")).startswith("#")}
    assert targets | set(re.findall(r"url\(#([^)]*)\)", page.text)) <= set(ids)


@every_report
def test_no_section_is_empty(name: str, rendered: Render) -> None:
    sections = rendered(name).page.findall(".//section")
    assert len(sections) == 15
    for section in sections:
        rest = [_words("".join(child.itertext())) for child in section if child.tag != "h2"]
        assert any(rest), section.get("id")


def test_missing_parts_are_told_with_their_reasons(rendered: Render) -> None:
    missing, whole = rendered("missing parts"), rendered("whole")
    assert "ort-fp16: not measured: needs an NVIDIA GPU." in missing.section("latency")
    assert "PyTorch fp32: not measured: a checkpoint is not measured." in missing.section("memory")
    assert "no model has both scores and a measurement" in missing.section("trade")
    assert "ort-fp32, ort-fp16" in missing.section("layers")
    assert "PyTorch fp32, ort-fp16, ort-int4 RTN: unknown: /sys/class/powercap: only root" in whole.section("energy")


def test_evil_text_stays_text(rendered: Render) -> None:
    page = rendered("evil").page
    attributes = {key for element in page.iter() for key in element.attrib}
    assert not {key for key in attributes if key.startswith("on")}
    assert page.find(".//img[@src='x']") is None
    text = "".join(page.itertext())
    assert all(printable(evil)[:80].splitlines()[0] in text for evil in EVIL if evil)


def test_page_has_dark_narrow_and_printed_styles(rendered: Render) -> None:
    style = rendered("whole").page.findtext(".//style") or ""
    for query in ("screen and (prefers-color-scheme: dark)", "(max-width: 40rem)", "print"):
        assert f"@media {query}" in style
    assert 'name="viewport"' in rendered("whole").text


def test_boxes_are_drawn_where_they_are(rendered: Render) -> None:
    drawing = rendered("whole").page.find(".//section[@id='grounding']//svg[@class='boxes small']")
    assert drawing is not None
    boxes = {box.attrib["class"]: box for box in drawing.findall("rect") if box.attrib["class"] != "casing"}
    assert list(boxes) == ["expected", "reference", "model"]
    assert [float(boxes["model"].attrib[key]) for key in ("x", "y", "width", "height")] == [28, 36, 46, 52]
    assert drawing.attrib["viewBox"] == "0 0 160 120"


def test_box_with_swapped_corners_is_drawn() -> None:
    assert rectangle((50.0, 80.0, 10.0, 20.0)) == {"x": 10.0, "y": 20.0, "width": 40.0, "height": 60.0}


@pytest.mark.parametrize("picture", ["/etc/passwd", "../secret.png", "pictures/../../secret.png", ""])
def test_picture_outside_of_the_report_is_refused(picture: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the name of a picture inside the report"):
        embed_picture(tmp_path, picture)


def test_missing_and_damaged_pictures_are_named(tmp_path: Path) -> None:
    document = Document(example_report(2))
    with pytest.raises(DataError, match=r"scene_0\.png: no such file"):
        render_page(document, {}, tmp_path)
    write_pictures(tmp_path)
    (tmp_path / "pictures" / "scene_0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"scene_0\.png: .*expected a picture"):
        render_page(document, {}, tmp_path)


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (3000, 1500), "#805030").save(tmp_path / "large.png")
    shown = PictureFolder(tmp_path).add(tmp_path / "large.png")
    embedded = embed_picture(tmp_path, shown.name)
    assert embedded.url.startswith("data:image/jpeg;base64,")
    assert len(embedded.url) < 20_000
    assert (embedded.width_px, embedded.height_px) == (640, 320)
    assert shown.scaled((0, 0, 3000, 1500)) == (0, 0, 640, 320)  # boxes are in these pixels


def test_boxes_fit_a_picture_that_was_decoded_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.new("L", (3000, 1500)).save(tmp_path / "large.jpg")
    monkeypatch.setattr("vlmdeploy.report.pictures.load_image", functools.partial(load_image, limits=ImageLimits(1)))
    shown = PictureFolder(tmp_path).add(tmp_path / "large.jpg")
    assert embed_picture(tmp_path, shown.name).width_px == 640
    assert shown.scaled((0, 0, 3000, 1500)) == (0, 0, 640, 320)


ASCII = str.maketrans({"\N{MINUS SIGN}": "-", "\N{NO-BREAK SPACE}": " ", "\N{MULTIPLICATION SIGN}": "x"})
FORM_ROWS = [
    ("share", 0.97311, "97.31 %"), ("share", 1.0, "100.00 %"), ("percent", 0.5, "50.00"), ("points", -0.0004, "-0.04"),
    ("points", 0.00061, "+0.06"), ("points", -0.00001, "0.00"), ("points", 0.0, "0.00"), ("change", 1.0187, "+1.9 %"),
    ("change", 1.0, "0.0 %"), ("count", 20180, "20,180"), ("size", 4_312_345, "4.3 MB"),
    ("size", 12_400_000_000, "12.40 GB"), ("size", 999, "999 B"), ("size", 0, "0 B"),
    ("amount", 0.0421, "0.0421"), ("amount", 1.5, "1.50"),
    ("amount", 1234.4, "1,234"), ("amount", 0.0, "0"), ("amount", 3.2e-7, "3.2e-07"), ("amount", 9.996, "10.0"),
    ("times", 3.14159, "3.1"), ("times", 0.456, "0.46"), ("times", 250.0, "250"), ("decimal", 1.0834, "1.083"),
    ("p", 0.03125, "0.031"), ("p", 0.0002, "< 0.001"), ("short", 1.0, "1"), ("short", 0.41237, "0.412"),
    ("plain", 7, "7"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "value", "text"), FORM_ROWS)
def test_numbers_are_written_as_in_the_table(form: str, value: float, text: str) -> None:
    assert FORMS[form](value).replace("\N{MINUS SIGN}", "-") == text


def test_paths_are_unambiguous() -> None:
    assert key_text(("models", 2, "tasks", "vqa", "exact_match", "value")) == "models.2.tasks.vqa.exact_match.value"
    assert key_text(("a.b", "c")) == r"a\.b.c" != key_text(("a", "b", "c"))
    assert key_text(("a\\", "b\n")) == r"a\\.b\u000a"


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (Score(-0.0004, -0.0014, 0.0006, 9), "no loss seen"), (Score(-0.0002, -0.0005, 0.0, 9), "no loss seen"),
        (Score(0.01, 0.0, 0.02, 9), "no loss seen"), (Score(0.0, 0.0, 0.0, 9), "no difference"),
        (Score(-0.02, -0.03, -0.01, 9), "a loss"), (Score(0.02, 0.01, 0.03, 9), "a gain"),
    ],
)  # fmt: skip
def test_difference_is_a_loss_only_if_its_interval_lies_below_0(score: Score, words: str) -> None:
    assert verdict(score) == words


def test_sentence_tells_loss_size_and_speed() -> None:
    report = example_report(2)
    differences = {
        "vqa": {"exact_match": Score(-0.0004, -0.0014, 0.0006, 100)},
        "rec": {"acc@0.5": Score(-0.012, -0.02, -0.004, 100)},
    }
    model = replace(report.models[1], differences=differences)
    report = replace(report, models=(report.models[0], model))
    assert Document(report).sentence(model_sentence(report, 1)).translate(ASCII) == (
        "VQA -0.04 points (95 %: -0.14 to +0.06): no loss seen; Boxes -1.20 points (95 %: -2.00 to -0.40): a loss; "
        "1.5 x smaller; first token 1.3 x faster"
    )


def test_sentence_without_anything_to_compare_says_so() -> None:
    report = missing_parts_report()
    assert Document(report).sentence(model_sentence(report, 2)).startswith("not compared with the reference; 2.0")


def test_long_names_keep_both_ends() -> None:
    assert short_label("ort-int4") == "ort-int4"
    assert short_label("a" * 40 + "z" * 40, 20) == "a" * 12 + "…" + "z" * 7
    assert short_label("one\ntwo\x00\u202e") == "one two"
    assert short_label("") == "?"
