"""The golden vectors under tests/golden as plain arrays: which cases there are, and what each of them holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reference.safetensors import Array, read_tensors, tensor_names

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("cogvlm-tiny", "cogvlm2-tiny")


@dataclass(frozen=True)
class GoldenCase:
    """One prompt with its picture and everything that the authors' code computed from them."""

    checkpoint: str
    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN / self.checkpoint / "cases" / self.name

    @property
    def expected_names(self) -> list[str]:
        return tensor_names(self.folder / "expected.safetensors")

    def inputs(self) -> dict[str, Array]:
        return read_tensors(self.folder / "inputs.safetensors")

    def expected(self, file: str = "expected.safetensors") -> dict[str, Array]:
        return read_tensors(self.folder / file)

    def __str__(self) -> str:
        return f"{self.checkpoint}/{self.name}"


def golden_cases() -> list[GoldenCase]:
    """Every case folder of every golden checkpoint."""
    return [
        GoldenCase(checkpoint, folder.name)
        for checkpoint in CHECKPOINTS
        for folder in sorted((GOLDEN / checkpoint / "cases").iterdir())
    ]


def position_cases() -> list[Any]:
    """The rows of both position_cases.json: (id, row)."""
    return [
        (f"{checkpoint}/{row['name']}", row)
        for checkpoint in CHECKPOINTS
        for row in json.loads((GOLDEN / checkpoint / "position_cases.json").read_text())
    ]
