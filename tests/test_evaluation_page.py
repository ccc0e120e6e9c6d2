"""Contract: what docs/evaluation.md tells to type exists, and its conversion of RefCOCO's pickles works."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

from tests.benchmark_files import png
from vlmdeploy.cli import main
from vlmdeploy.data.questions import RULES, QuestionOptions
from vlmdeploy.data.source import open_source

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_every_option_on_the_page_is_one_of_validate() -> None:
    known = {name for option in main.commands["validate"].params for name in option.opts}
    rows = [line for line in PAGE.splitlines() if line.startswith(("vlmdeploy validate", "| `"))]
    used = {option for line in rows for option in re.findall(r"--[a-z-]+", line)}
    assert len(used) > 8 and used <= known


def test_the_page_explains_every_rule() -> None:
    assert set(re.findall(r"^\| `([a-z_]+)` \|", PAGE, re.MULTILINE)) == set(RULES)


def test_converted_pickles_are_read(tmp_path: Path) -> None:
    sentences = [{"sent": "left one", "raw": "Left one"}, {"sent": "red"}]
    ref = {"ref_id": 5, "ann_id": 3, "image_id": 7, "split": "testA", "sentences": sentences}
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([ref]))
    images = [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}]
    coco = {"images": images, "annotations": [{"id": 3, "bbox": [10, 5, 20, 10], "segmentation": []}]}
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    (tmp_path / "a.png").write_bytes(png())
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    samples = list(open_source(tmp_path / "refcoco.json", options=QuestionOptions(split="testA")).samples())
    assert [sample.boxes for sample in samples] == [((10.0, 5.0, 30.0, 15.0),)] * 2
