"""Several prompts in one call of a routed decoder: how they are read side by side, and the greedy or sampled loop.

Each prompt has its own lane of the KV cache. Shorter prompts begin later, so that all end in the same call; a lane's
first call may be short and is padded on the right, all later ones are full. So padding never reaches beyond a lane, and
what it leaves in the cache is overwritten by the next call or never read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.layout import Bools, Ints
from vlmdeploy.runtime.backends.door import Backend, Floats, slot_positions
from vlmdeploy.runtime.embedding import EmbeddingTable
from vlmdeploy.runtime.generate import ChooseToken, Prompt


@dataclass
class Lanes:
    """The KV cache of several prompts. positions int64 [batch, capacity]: the position id of every slot; lengths int64
    [batch]: how many slots are filled; capacities int64 [batch]: how many each prompt may fill."""

    positions: Ints
    lengths: Ints
    capacities: Ints

    @classmethod
    def of(cls, positions: Sequence[Ints]) -> Self:
        """Empty lanes, one for each prompt's slot positions, int64 [capacity] each."""
        capacities = np.array([len(lane) for lane in positions])
        padded = [np.pad(lane, (0, capacities.max() - len(lane)), mode="edge") for lane in positions]
        return cls(np.stack(padded), np.zeros(len(positions), np.int64), capacities)

    @property
    def length(self) -> int:
        """Of a single prompt."""
        return int(self.lengths[0])

    @property
    def capacity(self) -> int:
        """Of a single prompt."""
        return int(self.capacities[0])


@dataclass(frozen=True)
class Call:
    """One call of the routed decoder: the same number of rows of every lane, what a lane lacks padded at its end.

    hidden float32 [batch, rows, hidden], vision_mask bool [batch, rows], counts int64 [batch]: real rows of each lane;
    logit_rows int64 [asked]: counted over batch * rows.
    """

    hidden: Floats
    vision_mask: Bools
    counts: Ints
    logit_rows: Ints


@runtime_checkable
class BatchBackend(Backend, Protocol):
    """A backend whose calls take rows of several prompts. most_prompts: how many."""

    most_prompts: int

    def new_lanes(self, positions: Sequence[Ints]) -> Lanes:
        """Empty lanes with one slot for each position id, int64 [capacity] of each prompt."""

    def run_call(self, call: Call, lanes: Lanes) -> Floats:
        """Run the rows, append the real ones to their lanes, return logits [asked, vocab] of the rows asked for."""


def starts_of(lanes: Lanes, counts: Ints) -> Ints:
    """The slot of each lane's first row, int64 [batch]: behind what it holds; the first slot for a lane without rows,
    which has not begun or is at its end."""
    return np.where(counts > 0, lanes.lengths, 0)


def row_positions(lanes: Lanes, counts: Ints, num_rows: int) -> Ints:
    """Position ids of a call's rows, int64 [batch, rows]; 0 for padding."""
    positions = np.zeros((len(counts), num_rows), np.int64)
    for lane, (start, count) in enumerate(zip(starts_of(lanes, counts), counts, strict=True)):
        positions[lane, :count] = lanes.positions[lane, start : start + count]
    return positions


def prefill_steps(lengths: Sequence[int], chunk_rows: int) -> list[list[tuple[int, int]]]:
    """For each call the range of each prompt's positions that it reads; equal ends for a prompt that begins later."""
    num_steps = max(-(-length // chunk_rows) for length in lengths)
    return [[_range_of(length, chunk_rows, num_steps - step - 1) for length in lengths] for step in range(num_steps)]


def _range_of(length: int, chunk_rows: int, steps_left: int) -> tuple[int, int]:
    """What a prompt reads when so many full calls come after."""
    stop = max(0, length - steps_left * chunk_rows)
    return max(0, stop - chunk_rows), stop


def read_prompts(prompts: Sequence[Prompt], rows: Sequence[Floats], backend: BatchBackend, lanes: Lanes) -> Floats:
    """Fill the lanes with the prompts; logits [batch, vocab] of the last position of each. rows: float32 [seq, hidden]
    of each prompt, what enters the first layer."""
    steps = prefill_steps([len(prompt.ids) for prompt in prompts], backend.chunk_rows)
    for step in steps[:-1]:
        backend.run_call(_prompt_call(prompts, rows, step, is_last=False), lanes)
    return backend.run_call(_prompt_call(prompts, rows, steps[-1], is_last=True), lanes)


def _prompt_call(
    prompts: Sequence[Prompt], rows: Sequence[Floats], ranges: Sequence[tuple[int, int]], is_last: bool
) -> Call:
    counts = np.array([stop - start for start, stop in ranges])
    num_rows = int(counts.max())
    hidden = np.zeros((len(prompts), num_rows, rows[0].shape[1]), np.float32)
    vision_mask = np.zeros((len(prompts), num_rows), np.bool_)
    for lane, (start, stop) in enumerate(ranges):
        hidden[lane, : stop - start] = rows[lane][start:stop]
        vision_mask[lane, : stop - start] = prompts[lane].vision_mask[start:stop]
    last_rows = np.arange(len(prompts)) * num_rows + counts - 1
    return Call(hidden, vision_mask, counts, last_rows if is_last else np.zeros(0, np.int64))


def decode_lanes(
    first_logits: Floats,
    prompts: Sequence[Prompt],
    backend: BatchBackend,
    lanes: Lanes,
    embedding: EmbeddingTable,
    choose: Sequence[ChooseToken],
    stop_ids: tuple[int, ...],
) -> Iterator[list[int | None]]:
    """One token for every prompt at a time; None for those at their end: a stop id (given out) or a full lane."""
    ids, logits = [prompt.ids for prompt in prompts], first_logits
    is_open = np.ones(len(prompts), np.bool_)
    while True:
        tokens = [choose[lane](logits[lane], ids[lane]) if is_open[lane] else None for lane in range(len(prompts))]
        yield tokens
        ended = np.array([token is None or token in stop_ids for token in tokens])
        is_open &= ~ended & (lanes.lengths < lanes.capacities)
        if not is_open.any():
            return
        ids = [known if token is None else np.append(known, token) for known, token in zip(ids, tokens, strict=True)]
        logits = backend.run_call(_token_call(embedding, ids, is_open), lanes)


def _token_call(embedding: EmbeddingTable, ids: Sequence[Ints], is_open: Bools) -> Call:
    """The last token of every open prompt."""
    batch = len(ids)
    hidden = embedding[np.array([known[-1] for known in ids])][:, None]
    return Call(hidden, np.zeros((batch, 1), np.bool_), is_open.astype(np.int64), np.arange(batch))


def single_call(vision_mask: Bools, hidden: Floats, logit_rows: Ints) -> Call:
    """Rows [rows, hidden] of one prompt as a call."""
    return Call(hidden[None], vision_mask[None], np.array([len(hidden)]), logit_rows)


def answer_together(
    prompts: Sequence[Prompt],
    rows: Sequence[Floats],
    backend: BatchBackend,
    embedding: EmbeddingTable,
    choose: Sequence[ChooseToken],
    new_tokens: Sequence[int],
    stop_ids: tuple[int, ...],
) -> list[list[int]]:
    """The answers of at most `most_prompts` prompts, a stop id included. new_tokens: the most of each."""
    lanes = backend.new_lanes([lane_positions(*pair) for pair in zip(prompts, new_tokens, strict=True)])
    logits = read_prompts(prompts, rows, backend, lanes)
    backend.end_prefill()
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in decode_lanes(logits, prompts, backend, lanes, embedding, choose, stop_ids):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def lane_positions(prompt: Prompt, new_tokens: int) -> Ints:
    """Position ids of the slots of a prompt and so many new tokens, of which the last needs none."""
    return slot_positions(prompt.positions, len(prompt.ids) + new_tokens - 1)


def call_inputs(call: Call, lanes: Lanes) -> dict[str, NDArray[Any]]:
    """What the routed graph is told of a call, by name: the shapes are those of export/graphs/routed_dialect.py."""
    batch, num_rows, width = call.hidden.shape
    starts = starts_of(lanes, call.counts)
    return {
        "hidden": call.hidden.reshape(batch * num_rows, width),
        "experts": call.vision_mask.reshape(-1).astype(np.int32),
        "position_ids": row_positions(lanes, call.counts, num_rows),
        "write_index": starts,
        "lengths": starts + num_rows,
        "logit_rows": call.logit_rows,
    }
