"""The safetensors files of a checkpoint folder: which tensor lies in which, by the index and the files' own headers.

Reads regular files in the folder itself, of plain names. Links out of it are followed only if asked for.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlmdeploy.byte_sizes import shown_size
from vlmdeploy.errors import WeightsError
from vlmdeploy.input_files import find_inside, inside, is_plain_name, open_input
from vlmdeploy.records import read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MOST_HEADER_BYTES = 16 << 20  # of an index or a file's header, 100 bytes per tensor: published ones have below 1 MiB


class Shards:
    """file_of: tensor name -> file name."""

    def __init__(self, folder: Path, follow_links: bool = False) -> None:
        """Read index and headers. Raises WeightsError if a file is missing, damaged or no file, or if they differ."""
        self.folder = folder
        self.follow_links = follow_links
        self.file_of: dict[str, str] = {}
        listed = self._listed()
        for file in [SINGLE_NAME] if listed is None else sorted(set(listed.values())):
            for name in self._names_in(file):
                if name in self.file_of:
                    raise WeightsError(f'{folder}: tensor "{name}" is stored in more than one file')
                self.file_of[name] = file
        if listed is not None and listed != self.file_of:
            name, file = sorted(set(listed.items()) ^ set(self.file_of.items()))[0]
            found = f'tensor "{name}" and file "{file}" do not match'
            raise WeightsError(f"{folder / INDEX_NAME}: {found}: index and shards differ")

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self.file_of[name]

    def opened(self, name: str) -> Any:
        """The file that holds a tensor, to use in a `with` statement. Closing it frees its mapped pages."""
        return safe_open(self.path_of(name), framework="pt")

    def _listed(self) -> dict[str, str] | None:
        """The index, tensor name -> file name; None if there is a single file instead."""
        path = find_inside(self.folder, INDEX_NAME, WeightsError, self.follow_links)
        if path is None:
            if find_inside(self.folder, SINGLE_NAME, WeightsError, self.follow_links) is None:
                raise _no_safetensors(self.folder)
            return None
        listed = read_object(path, most_bytes=MOST_HEADER_BYTES).get("weight_map")
        if not isinstance(listed, dict):
            raise WeightsError(f'{path}: has no "weight_map" object')
        for name, file in listed.items():
            if not isinstance(file, str) or not is_plain_name(file):
                expected = "expected the name of a file beside it"
                raise WeightsError(f'{path}: tensor "{name:.200}" is in file {file!r:.80}, {expected}')
        return listed

    def _names_in(self, file: str) -> list[str]:
        path = inside(self.folder, file, WeightsError, self.follow_links)
        with open_input(path, WeightsError, f"a file of tensors, as {INDEX_NAME} says") as stream:
            header_bytes, size = int.from_bytes(stream.read(8), "little"), stream.seek(0, 2)
        found = f"{path}: not a whole safetensors file, {size} bytes"
        if header_bytes > MOST_HEADER_BYTES:
            raise WeightsError(f"{found} (it begins with a header of {shown_size(header_bytes)})")
        try:
            with safe_open(path, framework="pt") as shard:
                return list(shard.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{found} ({error})") from error


def _no_safetensors(folder: Path) -> WeightsError:
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
    if not pickles:
        return WeightsError(f"{folder}: holds no {SINGLE_NAME} and no {INDEX_NAME}")
    name = pickles[0].name
    return WeightsError(
        f"{folder}: {name} is a pickle, which can run code and is not read. If you trust it, convert each file: "
        f'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in '
        f"torch.load('{name}', weights_only=True).items()}}, '{Path(name).stem}.safetensors')\""
    )
