"""Contract tests of rows that stand for tensors: what waits, what is stored, and what may not be read any more.

test_calib_units.py tests that whole layers compute over rows what they compute over tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlmdeploy.calib.activations import Ints, Pool
from vlmdeploy.calib.calibration_set import Tokens
from vlmdeploy.calib.flow import Flow, Rows, Weights, over_rows
from vlmdeploy.calib.statistics import Inputs
from vlmdeploy.model.products import Attention, Blocks, SiluGate

EVERY = np.arange(10)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Doubling:
    """A quantizer whose products double their inputs, and that notes when it is asked."""

    asked: list[str] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        self.asked.append(target)
        self.inputs.append(inputs(np.arange(tokens.count))[0])
        return (2 * torch.eye(self.inputs[-1].shape[1]),)

    def unused(self, target: str) -> None:
        raise AssertionError("everything is used")


@pytest.fixture
def quantizer() -> Doubling:
    return Doubling()


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "spill", limit_bytes=1 << 20)


@pytest.fixture
def rows(pool: Pool) -> Rows:
    """Two samples of four and six rows, three wide."""
    tokens = Tokens(("a", "b"), np.array([0, 4, 10]), np.zeros(10, np.bool_), np.zeros(2, np.bool_))
    flow = Flow.zeros(pool, tokens, 3, 1)
    flow.write(EVERY, (torch.arange(30.0).view(10, 3),))
    return Rows(pool, flow)


def read(rows: Rows, which: Ints = EVERY) -> Tensor:
    return rows.stored().flow.read(which)[0]


def product(quantizer: Doubling) -> nn.Module:
    return over_rows(nn.Linear(3, 3, bias=False), "p", quantizer)


def test_product_waits_until_its_result_is_needed(rows: Rows, quantizer: Doubling) -> None:
    waiting = over_rows(nn.Tanh(), "t", quantizer)(product(quantizer)(rows))
    assert quantizer.asked == []
    assert torch.equal(read(waiting), torch.tanh(2 * read(rows)))
    assert quantizer.asked == ["p.weight"]


def test_next_product_is_quantized_from_what_went_through_the_one_before(rows: Rows, quantizer: Doubling) -> None:
    twice = over_rows(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)), "s", quantizer)(rows)
    assert torch.equal(read(twice), 4 * read(rows))
    assert quantizer.asked == ["s.0.weight", "s.1.weight"]
    assert torch.equal(quantizer.inputs[1], 2 * read(rows))


def test_sum_stands_in_the_place_of_the_rows(rows: Rows, quantizer: Doubling, pool: Pool) -> None:
    before, used = read(rows), pool.used_bytes
    total = rows + product(quantizer)(rows)
    assert torch.equal(read(total), 3 * before)
    assert total.flow is rows.flow and pool.used_bytes == used


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Linear(3, 3)])
def test_rows_from_before_a_sum_cannot_be_read(rows: Rows, quantizer: Doubling, module: nn.Module) -> None:
    """A block that uses its input twice would compute with changed rows, and nothing would tell."""
    waiting = over_rows(module, "m", quantizer)(rows)
    _ = rows + product(quantizer)(rows)
    with pytest.raises(AssertionError, match="rows were changed after"):
        read(waiting)


def test_mixer_sees_one_sample_at_a_time(rows: Rows, quantizer: Doubling) -> None:
    mixed = over_rows(Attention(1, 1), "a", quantizer)(rows)
    qkv = read(rows)
    alone = [Attention(1, 1)(part[None])[0] for part in torch.split(qkv, [4, 6])]
    assert torch.equal(read(mixed), torch.cat(alone))


def test_mixer_may_change_the_number_of_rows(pool: Pool, quantizer: Doubling) -> None:
    tokens = Tokens(("a", "b"), np.array([0, 9, 18]), np.zeros(18, np.bool_), np.zeros(2, np.bool_))
    flow = Flow.zeros(pool, tokens, 1, 1)
    flow.write(np.arange(18), (torch.arange(18.0).view(18, 1),))
    blocks = over_rows(Blocks(2), "b", quantizer)(Rows(pool, flow)).flow
    assert blocks.tokens.offsets.tolist() == [0, 1, 2]
    assert blocks.read(np.arange(2))[0].tolist() == [[0, 1, 3, 4], [9, 10, 12, 13]]


def test_what_nothing_refers_to_is_given_back(rows: Rows, quantizer: Doubling, pool: Pool) -> None:
    used = pool.used_bytes
    gate_up: Any = over_rows(nn.Sequential(SiluGate(), nn.Linear(1, 1)), "g", quantizer)
    wide = rows.then(nn.Linear(3, 2))
    kept = gate_up(wide).stored()
    assert pool.used_bytes == used + 10 * 1 * 4
    del kept
    assert pool.used_bytes == used
