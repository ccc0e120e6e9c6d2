"""Write tensors as a safetensors file that others may read, with system errors as such."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlmdeploy.artifact import as_umask_says

NUMBER = re.compile(r"\(os error (\d+)\)")  # how the library tells a system error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file. Raises OSError, naming it, if the system refuses."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = NUMBER.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    as_umask_says(path)
