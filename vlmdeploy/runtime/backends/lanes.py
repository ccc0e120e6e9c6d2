"""Lanes of the KV cache, and one decoder call over them.

A lane is one prompt's part of the cache. Every call runs the same number of rows in each lane, padding after a lane's
real rows. Padding lands after the filled slots of an open lane, is never read, and the next call overwrites it; the
contents of a closed lane do not matter.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.layout import Bools, Ints
from vlmdeploy.manifest import CacheShape

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Call:
    """One decoder call: the same number of rows in every lane, padding at the end of a lane.

    hidden float32 [lanes, rows, hidden]; vision_mask bool [lanes, rows]; counts int64 [lanes]: real rows of each lane;
    logit_rows int64 [asked]: indices into lanes * rows, of the language expert only.
    """

    hidden: Floats
    vision_mask: Bools
    counts: Ints
    logit_rows: Ints

    @classmethod
    def of_one(cls, hidden: Floats, vision_mask: Bools, logit_rows: Ints) -> "Call":
        """Rows [rows, hidden] of a single lane."""
        return cls(hidden[None], vision_mask[None], np.array([len(hidden)]), logit_rows)

    @classmethod
    def of_tokens(cls, hidden: Floats, is_fed: Bools) -> "Call":
        """One new token's row [lanes, hidden] for the lanes that `is_fed`; asks for the logits of all lanes."""
        lanes = np.arange(len(hidden))
        return cls(hidden[:, None], np.zeros((len(hidden), 1), np.bool_), is_fed.astype(np.int64), lanes)


class Lanes:
    """Bookkeeping of a KV cache's lanes; a backend adds their memory.

    positions int64 [lanes, slots]: position id of every slot; lengths int64 [lanes]: filled slots; capacities int64
    [lanes]: slots that a lane's prompt may fill, 0 for a closed lane.
    """

    def __init__(self, count: int, slots: int) -> None:
        self.positions = np.zeros((count, slots), np.int64)
        self.lengths = np.zeros(count, np.int64)
        self.capacities = np.zeros(count, np.int64)

    @property
    def count(self) -> int:
        """Number of lanes."""
        return len(self.lengths)

    @property
    def slots(self) -> int:
        """Positions that each lane can hold."""
        return self.positions.shape[1]

    def is_full(self, lane: int) -> bool:
        """Whether an open lane has no slot left."""
        return bool(self.lengths[lane] >= self.capacities[lane])

    def begin(self, lane: int, positions: Ints) -> None:
        """Empty a lane and open it for a prompt with one slot for each position id, int64 [capacity]."""
        assert len(positions) <= self.slots, "the lane has that many slots"
        self.positions[lane, : len(positions)] = positions
        self.lengths[lane], self.capacities[lane] = 0, len(positions)

    def end(self, lane: int) -> None:
        """Close a lane."""
        self.lengths[lane] = self.capacities[lane] = 0

    def most_rows(self, lanes: Collection[int]) -> int:
        """Most rows of a call on these lanes that leaves room for the padding of the others. A full lane needs none:
        nothing reads it again."""
        waiting = self.lengths < self.capacities
        waiting[list(lanes)] = False
        return int((self.slots - self.lengths[waiting]).min(initial=self.slots))

    def starts(self, num_rows: int) -> Ints:
        """The slot of each lane's first row in a call, int64 [lanes]: after its filled slots."""
        return np.minimum(self.lengths, self.slots - num_rows)

    def row_positions(self, counts: Ints, num_rows: int) -> Ints:
        """Position ids of a call's rows, int64 [lanes, rows]; 0 for padding."""
        positions = np.zeros((self.count, num_rows), np.int64)
        for lane, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
            positions[lane, :count] = self.positions[lane, start : start + count]
        return positions

    def inputs(self, call: Call) -> dict[str, NDArray[Any]]:
        """Inputs of the decoder graphs by name, in all dialects; a graph takes those that it knows."""
        lanes, num_rows, width = call.hidden.shape
        return {
            "hidden": call.hidden.reshape(lanes * num_rows, width),
            "experts": call.vision_mask.reshape(-1).astype(np.int32),
            "logit_rows": call.logit_rows,
            **{name: counter(self, call.counts, num_rows) for name, counter in COUNTERS.items()},
        }

    def append(self, counts: Ints) -> None:
        """Count the real rows of a call as filled slots."""
        self.lengths += counts


# The inputs that say where the rows of a call go: of lanes, the real rows of each, and the rows of the call.
COUNTERS: dict[str, Callable[[Lanes, Ints, int], NDArray[Any]]] = {
    "position_ids": lambda lanes, counts, num_rows: lanes.row_positions(counts, num_rows),
    "write_index": lambda lanes, _, num_rows: lanes.starts(num_rows),
    "lengths": lambda lanes, _, num_rows: lanes.starts(num_rows) + num_rows,
    "seqlens_k": lambda lanes, _, num_rows: (lanes.starts(num_rows) + (num_rows - 1)).astype(np.int32),
    "total_sequence_length": lambda lanes, _, num_rows: np.array(lanes.starts(num_rows).max() + num_rows, np.int32),
}


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of every cache slot's position, float32 [capacity, head_dim / 2]."""

    cos: Floats
    sin: Floats


def rope_table(shape: CacheShape, positions: Ints) -> RopeTable:
    """Cosines and sines of position * inv_freq in float32. positions int64 [capacity]."""
    angles = positions.astype(np.float32)[:, None] * np.array(shape.inv_freq, np.float32)
    return RopeTable(np.cos(angles), np.sin(angles))


def slot_positions(prompt_positions: Ints, capacity: int) -> Ints:
    """Position ids of a lane's slots: the prompt's, then counting up for new tokens."""
    new = int(prompt_positions[-1]) + 1 + np.arange(capacity - len(prompt_positions))
    return np.concatenate((prompt_positions, new))
