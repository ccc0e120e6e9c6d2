"""Answer files: written for others to score, and read back to score without a model.

A table has one row per question and the column `prediction`. For a VLMEvalKit TSV it keeps all columns except the
picture, so VLMEvalKit's own evaluation reads the file (MODEL_DATASET.xlsx, or .tsv with PRED_FORMAT=tsv); other data
has the columns index, image, question, answer. The suffix chooses the format: .tsv, .xlsx (needs openpyxl) or .jsonl.
"""

import csv
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from vlmdeploy.artifact import check_file, write_file
from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.data.jsonl import numbered_lines
from vlmdeploy.data.samples import Sample, check_boxes, checked_text
from vlmdeploy.data.source import DataSource
from vlmdeploy.data.tsv_table import INDEX, LONG_CELLS, read_rows
from vlmdeploy.errors import DataError, ExportError
from vlmdeploy.input_files import open_input
from vlmdeploy.overriding import override
from vlmdeploy.records import parse_object
from vlmdeploy.runtime.image import full_size, load_image
from vlmdeploy.score.answerers import Answerer
from vlmdeploy.score.metrics import Prediction

SUFFIXES = (".tsv", ".xlsx", ".jsonl")
PREDICTION = "prediction"
COLUMNS = (INDEX, "image", "question", "answer", PREDICTION)  # if the data is not a TSV
LONGEST_XLSX_CELL = 32767  # characters, Excel's limit
MOST_XLSX_BYTES = 64 << 20  # packed and unpacked; its XML takes up to a hundred times as much memory
MOST_XLSX_ROWS, MOST_XLSX_COLUMNS = 1 << 20, 200  # Excel's own limit; more columns than any table of answers has
WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,14}")  # a float holds these exactly
NOT_IN_XLSX = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # not allowed in XML 1.0

Cells: TypeAlias = Mapping[str, str]


def is_predictions(path: Path) -> bool:
    """Whether this is an answer file, by its suffix."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def output_paths(out: Path, models: Sequence[Path]) -> list[Path]:
    """Each model's answer file: `out`; for several models, beside it with the model's name in front.

    Raises ExportError if two models would write one file.
    """
    if len(models) == 1:
        return [out]
    paths = [out.with_name(f"{model.absolute().name}_{out.name}") for model in models]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise ExportError(f"{path}: two models are called {models[place].name}, so both would write this file")
    return paths


def check_output(path: Path, force: bool) -> None:
    """Raise ExportError unless the path can be written, ModuleNotFoundError if .xlsx needs openpyxl."""
    if path.suffix.lower() not in SUFFIXES:
        raise ExportError(f"{path}: ends in {path.suffix or 'nothing'!r}, expected one of {', '.join(SUFFIXES)}")
    check_file(path)
    if path.exists() and not force:
        raise ExportError(f"{path}: exists already; choose another output or replace it with --force")
    if path.suffix.lower() == ".xlsx" and importlib.util.find_spec("openpyxl") is None:
        raise ModuleNotFoundError("openpyxl is not installed", name="openpyxl")


def write_predictions(path: Path, source: DataSource, predictions: Sequence[Prediction]) -> None:
    """Write the answers atomically, replacing the file; call `check_output` first.

    Raises DataError for a text that the format cannot hold, ExportError if writing fails.
    """
    columns, rows = _table(source, predictions)
    write = {".tsv": _write_tsv, ".xlsx": _write_xlsx, ".jsonl": _write_jsonl}[path.suffix.lower()]
    content = io.BytesIO()
    write(content, columns, rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: file.write(content.getbuffer()))
    except OSError as error:
        raise ExportError(f"{path}: cannot be written ({error.strerror})") from error


def _table(source: DataSource, predictions: Sequence[Prediction]) -> tuple[list[str], list[Cells]]:
    if source.questions is None:
        return list(COLUMNS), [_plain_row(prediction) for prediction in predictions]
    cells = {row.index: row.cells for row in source.questions.rows}
    columns = [column for column in source.questions.table.columns if column != PREDICTION]
    rows: list[Cells] = [{**cells[prediction.sample.key], PREDICTION: prediction.text} for prediction in predictions]
    return [*columns, PREDICTION], rows


def _plain_row(prediction: Prediction) -> Cells:
    sample = prediction.sample
    values = (sample.key, str(sample.image or ""), sample.turns[-1].user, sample.answer or "", prediction.text)
    return dict(zip(COLUMNS, values, strict=True))


def _write_tsv(file: BinaryIO, columns: list[str], rows: list[Cells]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row[column] for column in columns] for row in rows)
    file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _write_jsonl(file: BinaryIO, columns: list[str], rows: list[Cells]) -> None:
    for row in rows:
        file.write(json.dumps({column: row[column] for column in columns}).encode() + b"\n")


def _write_xlsx(file: BinaryIO, columns: list[str], rows: list[Cells]) -> None:
    """One sheet of texts. Whole-number indexes are written as numbers: VLMEvalKit looks them up as such."""
    import openpyxl
    from openpyxl.cell import WriteOnlyCell

    _check_lengths(columns, rows)  # before starting the sheet, which cannot be left half written
    has_numbers = all(WHOLE_NUMBER.fullmatch(row[INDEX]) for row in rows)
    workbook = openpyxl.Workbook(write_only=True)
    sheet = workbook.create_sheet("Sheet1")

    def text_cell(text: str) -> Any:
        cell = WriteOnlyCell(sheet, NOT_IN_XLSX.sub("\N{REPLACEMENT CHARACTER}", text))
        cell.data_type = "s"  # text that starts with "=" is not a formula
        return cell

    sheet.append([text_cell(column) for column in columns])
    for row in rows:
        numbered = {INDEX: int(row[INDEX])} if has_numbers else {}
        sheet.append([numbered.get(column, text_cell(row[column])) for column in columns])
    workbook.save(file)


def _check_lengths(columns: list[str], rows: list[Cells]) -> None:
    for row in rows:
        for column in columns:
            if len(row[column]) > LONGEST_XLSX_CELL:
                found = f'column "{column}" of index "{row[INDEX]}" has {len(row[column])} characters'
                raise DataError(f"{found}, an .xlsx cell holds {LONGEST_XLSX_CELL}: write .tsv instead")


def read_predictions(path: Path) -> dict[str, str]:
    """Read the answers in a file, by index; ignores columns other than index and prediction.

    Raises DataError, naming the file, if it cannot be read, a column is missing or an index occurs twice.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: not an answer file; expected a file that ends in {', '.join(SUFFIXES)}")
    read = {".tsv": _read_tsv, ".xlsx": _read_xlsx, ".jsonl": _read_jsonl}[path.suffix.lower()]
    answers: dict[str, str] = {}
    for index, text in read(path):
        if index in answers:
            raise DataError(f'{path}: index "{index:.200}" occurs twice')
        answers[checked_text(index, f"{path}: an index")] = checked_text(text, f'{path}: the answer to "{index:.200}"')
    if not answers:
        raise DataError(f"{path}: holds no answers")
    return answers


def _read_tsv(path: Path) -> Iterator[tuple[str, str]]:
    with LONG_CELLS:
        yield from _pairs(path, (row.cells for row in read_rows(path)))


def _read_xlsx(path: Path) -> Iterator[tuple[str, str]]:
    with open_input(path, DataError) as file:
        _check_unpacked_size(path, file)
        yield from _pairs(path, _xlsx_rows(path, file))


def _check_unpacked_size(path: Path, file: BinaryIO) -> None:
    """Raise DataError for a file that is larger than is read, also unpacked: no more than its directory says is."""
    size = unpacked = file.seek(0, io.SEEK_END)
    if size <= MOST_XLSX_BYTES:
        try:
            unpacked = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
        except Exception as error:  # damaged ones raise more than BadZipFile
            raise DataError(f"{path}: cannot be read as .xlsx ({error})") from error
    if max(size, unpacked) > MOST_XLSX_BYTES:
        expected = f"at most {shown_size(MOST_XLSX_BYTES)} are read"
        raise DataError(f"{path}: holds {shown_size(unpacked)} of tables, {expected}: give the answers as .tsv")


def _xlsx_rows(path: Path, file: BinaryIO) -> Iterator[Sequence[Any]]:
    """The rows of the first sheet, one by one: an empty sheet may claim any number of them."""
    import openpyxl

    try:
        sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets[0]
        width = min(sheet.max_column or MOST_XLSX_COLUMNS, MOST_XLSX_COLUMNS)
        yield from sheet.iter_rows(max_row=MOST_XLSX_ROWS, max_col=width, values_only=True)
    except Exception as error:  # the library checks little of what it reads
        raise DataError(f"{path}: cannot be read as .xlsx ({error})") from error


def _pairs(path: Path, rows: Iterator[Sequence[Any]]) -> Iterator[tuple[str, str]]:
    header = [_text(cell).strip() for cell in next(rows, ())]
    for name in (INDEX, PREDICTION):
        if header.count(name) != 1:
            found = ", ".join(header)[:200] or "nothing"
            raise DataError(f'{path}: column "{name}" must be in the header once; it holds {found}')
    places = header.index(INDEX), header.index(PREDICTION)
    for number, row in enumerate(rows, 2):
        if any(cell not in (None, "") for cell in row):
            if max(places) >= len(row):
                raise DataError(f"{path}: row {number} has {len(row)} cells, the header {len(header)}")
            yield _text(row[places[0]]).strip(), _text(row[places[1]])


def _text(cell: Any) -> str:
    """A cell as text; spreadsheets may store 3 as 3.0."""
    if cell is None:
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in numbered_lines(path):
        row = parse_object(line, f"{path}:{number}", DataError)
        if not {INDEX, PREDICTION} <= row.keys():
            raise DataError(f'{path}:{number}: expected an object with "{INDEX}" and "{PREDICTION}"')
        if not isinstance(row[PREDICTION], str):
            raise DataError(f"{path}:{number}: {PREDICTION} is {json.dumps(row[PREDICTION])[:80]}, expected a text")
        yield str(row[INDEX]), row[PREDICTION]


class PredictionsAnswerer(Answerer):
    """Answers from a file; ignores its answers to other questions. Raises DataError for a missing answer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers = read_predictions(path)

    @override
    def answers(self, samples: Iterable[Sample]) -> Iterator[Prediction]:
        for sample in samples:
            if sample.key not in self._answers:
                problem = f'has no answer to index "{sample.key}"; is it for another data set or split?'
                raise DataError(f"{self._path}: {problem}")
            size_px = None
            if sample.task == "rec" and sample.image is not None:
                size_px = full_size(load_image(sample.image))
                check_boxes(sample, size_px)
            yield Prediction(sample, self._answers[sample.key], size_px=size_px)
