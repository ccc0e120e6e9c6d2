"""OUT.partial of a quantization run, from which a killed run resumes at the unit it was in.

Each finished unit has a file with its tensors (a shard of the result), its output rows (one file per process and
stream) or token weights (one file per process), and a record with sizes and hashes. The record is written last and
atomically: files that it names are whole and on disk, files that no record names are deleted.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmdeploy.artifact import LOCK, damage_explained, read_state, sync_file, sync_folder, write_file
from vlmdeploy.bundle import hash_file
from vlmdeploy.calib.activations import FLOAT_BYTES, Pool
from vlmdeploy.calib.calibration_set import Tokens
from vlmdeploy.calib.flow import Flow
from vlmdeploy.calib.processes import Processes
from vlmdeploy.errors import CalibrationError
from vlmdeploy.manifest import FileEntry
from vlmdeploy.model.tensor_file import save_tensors
from vlmdeploy.quant.quantization_report import LinearReport
from vlmdeploy.records import Config, read_object, record_of

SETTINGS, FLOW = "settings.json", ".flow"


@dataclass(frozen=True)
class UnitRecord:
    """A finished unit: its files with sizes and hashes, and the reports of its linears."""

    files: dict[str, FileEntry]
    linears: tuple[LinearReport, ...]


Records = dict[str, UnitRecord]  # by unit


@dataclass(frozen=True)
class RunState:
    """The folder OUT.partial, open for one run."""

    folder: Path
    processes: Processes

    def finished(self, units: list[str], kept: Callable[[str], list[str]] = lambda unit: []) -> Records:
        """Records of the finished units, which come first. Raises CalibrationError if one is damaged.

        kept: the units whose output rows are needed after a unit, besides its own.
        """
        records: Records = {}
        for unit in units:
            path = self._record_path(unit)
            if not path.is_file():
                break
            with damage_explained(path, CalibrationError):
                records[unit] = record_of(UnitRecord, read_object(path, CalibrationError), str(path), CalibrationError)
        last = list(records)[-1:]
        needed = {other for unit in last for other in (unit, *kept(unit))}
        for unit, record in records.items():
            is_needed = unit in needed
            self._check_files({name: entry for name, entry in record.files.items() if is_needed or not _is_flow(name)})
        return records

    def _check_files(self, files: dict[str, FileEntry]) -> None:
        for name, entry in files.items():
            path = self.folder / name
            if not path.is_file() or hash_file(path) != entry:
                raise CalibrationError(f"{path}: damaged or missing; remove {self.folder} to start over")

    def tidy(self, records: Records) -> None:
        """Delete what an interrupted unit left."""
        if not self.processes.is_first:
            return
        named = {name for record in records.values() for name in record.files}
        named |= {self._record_path(unit).name for unit in records} | {SETTINGS, LOCK}
        for path in self.folder.iterdir():
            if path.is_dir():
                for spilled in path.iterdir():
                    spilled.unlink()
            elif path.name not in named:
                path.unlink()

    def save_unit(
        self,
        unit: str,
        tensors: Mapping[str, Tensor],
        linears: list[LinearReport],
        flow: Flow | None,
        weights: Mapping[str, Tensor] = MappingProxyType({}),
        kept: Sequence[str] = (),
    ) -> UnitRecord:
        """Commit a unit, then delete the output rows of all units but it and the `kept` ones.

        tensors: for the result. weights: of this process's tokens.
        """
        own = {} if flow is None else self._write_flow(unit, flow)
        if weights:
            own[self._weights_path(unit).name] = self._write_tensors(self._weights_path(unit), weights)
        files = {name: entry for each in self.processes.gather(own) for name, entry in each.items()}
        record = self.processes.first_does(lambda: self._commit(unit, tensors, files, tuple(linears), kept))
        self.processes.wait()
        return record

    def _commit(
        self,
        unit: str,
        tensors: Mapping[str, Tensor],
        files: dict[str, FileEntry],
        linears: tuple[LinearReport, ...],
        kept: Sequence[str],
    ) -> UnitRecord:
        shard = {shard_name(unit): self._write_tensors(self.folder / shard_name(unit), tensors)} if tensors else {}
        sync_folder(self.folder)  # what the record names is there before the record
        record = UnitRecord(files | shard, linears)
        text = json.dumps(asdict(record), indent=1).encode()
        write_file(self._record_path(unit), lambda file: file.write(text))
        for path in self.folder.glob(f"*{FLOW}"):
            if path.name not in files and path.name.rsplit(".", 3)[0] not in kept:
                path.unlink()
        return record

    def load_weights(self, unit: str) -> dict[str, Tensor]:
        """Load the weights of this process's tokens."""
        return load_file(self._weights_path(unit))

    def load_flow(self, unit: str, tokens: Tokens, width: int, streams: int, pool: Pool) -> Flow:
        """Load the output rows of a unit."""
        flow = Flow.zeros(pool, tokens, width, streams)
        for index, state in enumerate(flow.states):
            with (self.folder / self._flow_name(unit, index)).open("rb") as file:
                for rows in flow.chunks():
                    content = file.read(len(rows) * width * FLOAT_BYTES)
                    values = np.frombuffer(bytearray(content), np.float32).reshape(len(rows), width)
                    state.write(rows, torch.from_numpy(values))
        return flow

    def _write_flow(self, unit: str, flow: Flow) -> dict[str, FileEntry]:
        entries = {}
        for index, state in enumerate(flow.states):
            digest = hashlib.sha256()

            def write(file: BinaryIO, state: Any = state, digest: Any = digest) -> None:
                for rows in flow.chunks():
                    content = state.read(rows).numpy().tobytes()
                    digest.update(content)
                    file.write(content)

            path = self.folder / self._flow_name(unit, index)
            write_file(path, write)
            entries[path.name] = FileEntry(path.stat().st_size, digest.hexdigest())
        return entries

    def _write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
        save_tensors(tensors, path)
        sync_file(path)
        return hash_file(path)

    def _record_path(self, unit: str) -> Path:
        return self.folder / f"{unit}.json"

    def _flow_name(self, unit: str, stream: int) -> str:
        return f"{unit}.{self.processes.rank}.{stream}{FLOW}"

    def _weights_path(self, unit: str) -> Path:
        return self.folder / f"{unit}.{self.processes.rank}.weights"


def shard_name(unit: str) -> str:
    """File name of a unit's tensors."""
    return f"{unit}.safetensors"


def _is_flow(name: str) -> bool:
    """Whether a file of OUT.partial holds output rows, which are deleted once they have been used."""
    return name.endswith(FLOW)


def is_shard(name: str) -> bool:
    """Whether a file of OUT.partial holds tensors of the result."""
    return name.endswith(".safetensors")


def unfinished_settings(folder: Path) -> Config | None:
    """The settings of the unfinished run in OUT.partial, or None."""
    path = folder / SETTINGS
    return read_state(path, CalibrationError) if path.is_file() else None
