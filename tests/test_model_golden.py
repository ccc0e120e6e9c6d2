"""Reference tests: the PyTorch model against every number that the authors' code computed, see tests/golden/README.md.

Agreement tests: the rows of a padded batch against the same rows run alone.
"""

import json
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.comparison import GOLDEN_BF16_MAX, GOLDEN_BF16_MEAN, GOLDEN_FP32, SAME_ROW_FP32, assert_close
from tests.conftest import GoldenModels
from tests.golden_cases import CHECKPOINTS, GOLDEN, GoldenCase, golden_cases, position_cases
from tests.model_trace import Trace, trace_model
from tests.reference import layout as reference
from vlmdeploy import load_model
from vlmdeploy.layout import position_ids, vision_expert_mask
from vlmdeploy.model.batch import derive_layout
from vlmdeploy.model.vlm import VisionLanguageModel

CASES = golden_cases()
POSITION_CASES = position_cases()
NUM_NEW = 16


@cache
def traced(case: GoldenCase) -> Trace:
    inputs = case.inputs()
    return trace_model(load_model(GOLDEN / case.checkpoint), inputs["input_ids"], inputs["pixel_values"], NUM_NEW)


@pytest.mark.parametrize(
    ("case", "key"), [pytest.param(case, key, id=f"{case}/{key}") for case in CASES for key in case.expected_names]
)
def test_model_equals_the_authors_code(case: GoldenCase, key: str) -> None:
    ours = traced(case)
    assert key in ours, f"{case}: tests/model_trace.py does not read {key}"
    assert_close(key, ours[key], case.expected()[key], GOLDEN_FP32)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_golden_file_has_a_test(checkpoint: str) -> None:
    cases = {case.folder for case in CASES if case.checkpoint == checkpoint}
    files = {path.name for folder in cases for path in folder.iterdir()}
    assert len(cases) == 2
    assert files == {"case.json", "inputs.safetensors", "expected.safetensors", "expected_bf16.safetensors"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_derived_from_ids_is_the_one_given(case: GoldenCase, golden_model: GoldenModels) -> None:
    inputs = case.inputs()
    ids, pixels = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["pixel_values"])
    layout = derive_layout(golden_model(case.checkpoint).spec, ids, pixels, None, None, None)
    assert_close("token_type_ids", layout.token_type_ids, inputs["token_type_ids"], 0)
    assert_close("attention_mask", layout.attention_mask, inputs["attention_mask"], 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_model_stays_near_the_authors_bfloat16_run(case: GoldenCase) -> None:
    inputs = {name: torch.from_numpy(values) for name, values in case.inputs().items()}
    model = load_model(GOLDEN / case.checkpoint, dtype="bfloat16")
    with torch.no_grad():
        logits = model(inputs["input_ids"], inputs["pixel_values"])
    for file in ("expected.safetensors", "expected_bf16.safetensors"):
        error = np.abs(logits.numpy() - case.expected(file)["logits"])
        assert logits.dtype == torch.float32
        assert error.mean() <= GOLDEN_BF16_MEAN, f"{file}: mean error {error.mean():.3g}"
        assert error.max() <= GOLDEN_BF16_MAX, f"{file}: largest error {error.max():.3g}"


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in POSITION_CASES])
def test_positions_and_expert_mask_equal_the_authors_functions(row: dict[str, Any], golden_model: GoldenModels) -> None:
    types = np.array([row["token_type_ids"]])
    mask = np.ones_like(types) if row["attention_mask"] is None else np.array([row["attention_mask"]])
    rules = golden_model("cogvlm-tiny").spec.tokens
    assert position_ids(types, mask, rules)[0].tolist() == row["position_ids"]
    assert vision_expert_mask(types, rules)[0].astype(int).tolist() == row["vision_expert_mask"]
    assert reference.position_ids(types[0], mask[0]) == row["position_ids"]
    assert reference.vision_expert_mask(types[0]) == [bool(value) for value in row["vision_expert_mask"]]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_prompt_cases_are_rendered_by_the_templates(checkpoint: str, golden_model: GoldenModels) -> None:
    rows = json.loads((GOLDEN / checkpoint / "prompt_cases.json").read_text())
    templates = {template.name: template for template in golden_model(checkpoint).spec.templates}
    for row in rows:
        template, history = templates[row["template"]], row["history"] or []
        turns = [(template.past_turn, question, answer) for question, answer in history]
        turns.append((template.last_turn, row["query"], ""))
        text = "".join(
            {"text": piece.text, "user": question, "assistant": answer}[piece.kind]
            for pieces, question, answer in turns
            for piece in pieces
        )
        assert text == row["prompt"]


# Padded batches. The text of a prompt follows its image, so a shorter prompt is a prompt cut at its end.
Row = tuple[Tensor, Tensor | None]  # ids [seq]; the image [3, S, S], if any
BATCHES = {
    "images_of_two_lengths": ((0, 60), (1, 69)),
    "image_first": ((0, 69), (None, 23)),
    "text_first": ((None, 40), (1, 66)),
    "text_between_images": ((0, 69), (None, 31), (1, 50)),
    "text_only": ((None, 12), (None, 31)),
}


def rows_of(checkpoint: str, parts: tuple[tuple[int | None, int], ...]) -> list[Row]:
    """Rows made of the golden prompts: (index of the case or None for its text alone, length)."""
    prompts = [case.inputs() for case in CASES if case.checkpoint == checkpoint]
    rows: list[Row] = []
    for index, length in parts:
        prompt = prompts[index or 0]
        ids, is_text = torch.from_numpy(prompt["input_ids"][0]), torch.from_numpy(prompt["token_type_ids"][0] == 0)
        if index is None:
            rows.append((ids[is_text][:length], None))
        else:
            rows.append((ids[:length], torch.from_numpy(prompt["pixel_values"][0])))
    return rows


def padded(rows: list[Row], side: str, pad_id: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids and attention mask [batch, seq], images [images, 3, S, S] of the rows, padded on one side."""
    width = max(len(ids) for ids, _ in rows)
    batch, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, (ids, _) in enumerate(rows):
        places = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        batch[index, places], mask[index, places] = ids, 1
    images = [image for _, image in rows if image is not None]
    return batch, mask, torch.stack(images) if images else None


def alone(row: Row) -> tuple[Tensor, Tensor | None]:
    ids, image = row
    return ids[None], None if image is None else image[None]


@dataclass(frozen=True)
class Padded:
    """Golden rows, alone and as a batch padded on one side."""

    model: VisionLanguageModel
    rows: list[Row]
    side: str

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return padded(self.rows, self.side, self.model.spec.tokens.pad_id)


@pytest.fixture(params=product(CHECKPOINTS, BATCHES, ("left", "right")), ids="-".join)
def case(request: pytest.FixtureRequest, golden_model: GoldenModels) -> Padded:
    checkpoint, name, side = request.param
    return Padded(golden_model(checkpoint), rows_of(checkpoint, BATCHES[name]), side)


def test_logits_equal_the_rows_run_alone(case: Padded) -> None:
    ids, mask, images = case.batch
    with torch.no_grad():
        together = case.model(ids, images, attention_mask=mask)
        for index, row in enumerate(case.rows):
            real = together[index][mask[index] == 1]
            assert_close(f"row {index}", real, case.model(*alone(row))[0], SAME_ROW_FP32)
    assert bool(torch.isfinite(together).all())


def test_generated_ids_equal_the_rows_run_alone(case: Padded) -> None:
    ids, mask, images = case.batch
    together = case.model.generate(ids, images, attention_mask=mask, max_new_tokens=6)
    for index, row in enumerate(case.rows):
        single = case.model.generate(*alone(row), max_new_tokens=6)[0].tolist()
        assert together[index].tolist() == single + [case.model.spec.tokens.pad_id] * (6 - len(single))


def test_positions_follow_the_rule_for_padding(case: Padded) -> None:
    ids, mask, images = case.batch
    layout = derive_layout(case.model.spec, ids, images, None, None, mask)
    for index, row in enumerate(case.rows):
        single = derive_layout(case.model.spec, *alone(row), None, None, None).position_ids[0]
        num_pads = ids.shape[1] - len(row[0])
        first = 1 if case.side == "left" and num_pads else 0  # after left padding the first real token gets 1
        before, after = ([0] * num_pads, []) if case.side == "left" else ([], [int(single[-1])] * num_pads)
        assert layout.position_ids[index].tolist() == before + (single + first).tolist() + after


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_row_that_ended_is_filled_with_pads(checkpoint: str) -> None:
    model = load_model(GOLDEN / checkpoint)
    rows = rows_of(checkpoint, ((0, 69), (1, 60)))
    ids, mask, images = padded(rows, "left", model.spec.tokens.pad_id)
    stop = model.spec.tokens.stop_ids[0]
    hook = model.lm_head.register_forward_hook(lambda module, arguments, logits: _force_stop(logits, stop))
    new_ids = model.generate(ids, images, attention_mask=mask, max_new_tokens=5)
    hook.remove()
    assert new_ids[0].tolist() == [stop] + [model.spec.tokens.pad_id] * 4
    assert stop not in new_ids[1].tolist()


def _force_stop(logits: Tensor, stop: int) -> Tensor:
    """The stop id is the first row's best token, and never the second's."""
    logits = logits.clone()
    logits[0, stop], logits[1, stop] = logits.max() + 1, logits.min() - 1
    return logits
