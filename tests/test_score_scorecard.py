"""Contract: what `vlmdeploy validate` prints, for a checkpoint, a bundle, and several models side by side."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlmdeploy
from tests.benchmark_files import write_tsv
from tests.gptq_checkpoint import write_gptq_checkpoint
from tests.tiny_bundle import export, only_error_line, only_json_document, run_cli, write_text_checkpoint
from vlmdeploy.score.scorecard import load_on


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("ckpt"))


@pytest.fixture(scope="module")
def bundle(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(ckpt, tmp_path_factory.mktemp("bundle") / "fp32", "ort-fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of questions about one picture, three of each."""
    folder = tmp_path_factory.mktemp("data")
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / "grey.png")
    row = {"image": "grey.png", "task": "vqa", "answer": "grey", "boxes": []}
    questions = [("colour", f"colour {number}?") for number in range(3)] + [("shade", f"{n} shades?") for n in range(3)]
    rows = [row | {"messages": [{"role": "user", "content": text}], "kind": kind} for kind, text in questions]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_json_has_tasks_metrics_and_intervals(ckpt: Path, data: Path) -> None:
    document = only_json_document(run_cli("validate", "--ckpt", ckpt, "--data", data, "--json"))
    assert document["data"] == str(data / "data.jsonl") and list(document["tasks"]) == ["vqa"]
    assert document["tasks"]["vqa"]["exact_match"].keys() == {"value", "low", "high", "count"}
    assert document["tasks"]["vqa"]["exact_match/shade"]["count"] == 3
    assert "compared" not in document


def test_checkpoint_and_bundle_give_equal_answers(ckpt: Path, bundle: Path, data: Path) -> None:
    command = ("validate", "--ckpt", ckpt, "--compare", bundle, "--data", data)
    document = only_json_document(run_cli(*command, "--json"))
    (compared,) = document["compared"]
    assert compared["model"] == str(bundle) and compared["equal_answers"]["value"] == 1
    table = run_cli(*command).stdout
    assert "equal answers" in table and "100.00 %" in table
    assert compared["differences"]["vqa"]["exact_match"]["value"] == 0
    assert "vqa exact_match, paired difference" in table and "+0.00 points" in table


def test_per_task_takes_that_many(bundle: Path, data: Path) -> None:
    document = only_json_document(run_cli("validate", "--bundle", bundle, "--data", data, "--per-task", 2, "--json"))
    assert document["tasks"]["vqa"]["exact_match"]["count"] == 2


def test_neither_or_both_models_is_wrong_usage(ckpt: Path, bundle: Path, data: Path) -> None:
    for models in ((), ("--ckpt", ckpt, "--bundle", bundle)):
        result = run_cli("validate", *models, "--data", data)
        assert result.exit_code == 2 and "give one of --ckpt and --bundle" in result.stderr


def test_ids_only_checkpoint_says_which_option_is_missing(ckpt: Path, data: Path, tmp_path: Path) -> None:
    for path in ckpt.iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).symlink_to(path)
    line = only_error_line(run_cli("validate", "--ckpt", tmp_path, "--data", data))
    assert "holds no tokenizer.json" in line and "--tokenizer" in line


def test_data_without_rows_is_one_line(ckpt: Path, tmp_path: Path) -> None:
    assert "data.jsonl" in only_error_line(run_cli("validate", "--ckpt", ckpt, "--data", tmp_path))


def test_a_row_without_answer_is_told_with_its_file_and_name_before_a_model_is_opened(tmp_path: Path) -> None:
    rows = [{"index": 7, "question": "Q" * 500, "A": "x", "B": "y", "answer": answer} for answer in ("A", "")]
    path = write_tsv(tmp_path / "MMBench.tsv", rows[0], rows[1] | {"index": 8})
    line = only_error_line(run_cli("validate", "--bundle", tmp_path, "--data", path))
    assert 'MMBench.tsv: question "8" (' in line and "QQQ...'): has no reference answer" in line
    assert "Q" * 100 not in line


def test_a_device_that_is_not_there_is_one_line(ckpt: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = only_error_line(run_cli("validate", "--ckpt", ckpt, "--data", data, "--device", "cuda"))
    assert line == "Error: --device cuda: PyTorch finds no CUDA device"


def test_device_of_a_bundle_is_wrong_usage(bundle: Path, data: Path) -> None:
    result = run_cli("validate", "--bundle", bundle, "--data", data, "--device", "cuda")
    assert result.exit_code == 2
    assert "--device is for --ckpt" in result.stderr


def test_quantized_checkpoint_keeps_its_codes_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[tuple[object, ...]] = []

    def load(*arguments: object, follow_links: bool) -> None:
        asked.append(arguments)

    monkeypatch.setattr(vlmdeploy, "load_model", load, raising=False)
    floats, codes = write_text_checkpoint(tmp_path / "floats"), write_gptq_checkpoint(tmp_path / "codes")
    for folder, device in ((floats, "cuda"), (codes, "cuda"), (codes, "cpu")):
        load_on(folder, device)
    assert asked == [(floats, "float16", "cuda", "dequantize"), (codes, "float16", "cuda", "kernel"), (codes,)]
