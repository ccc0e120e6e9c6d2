"""Stand-ins for the shared libraries of TensorRT, so that its Python bindings can be imported where there is no GPU.

The bindings are on PyPI; the libraries behind them do not install everywhere. Each stub holds the few functions that
the bindings link to, which return null: every class and docstring is there, no object can be made.
"""

import os
import shutil
import subprocess
from pathlib import Path

COMPILER = shutil.which("cc") or shutil.which("gcc")
STUBS = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
    ),
}  # fmt: skip


def build_stubs(folder: Path) -> dict[str, str]:
    """Compile the stubs into a folder; the environment of a process that shall find them."""
    assert COMPILER, "the caller skips without a compiler"
    for library, functions in STUBS.items():
        source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions)
        command = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library), "-xc", "-"]
        subprocess.run(command, input=source, text=True, check=True)
    places = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, places))}
