"""Quantized products and attention on a CPU: operators for ONNX Runtime, compiled when the package is installed.

Without a compiler there is no library, and ONNX Runtime runs the functions that stand beside the operators in a graph.
Why: docs/design/0014-cpu-kernel.md.
"""

import ctypes
from pathlib import Path

DOMAIN = "vlmdeploy"
OPERATORS = LINEAR, GATED, GELU, ATTENTION, WRITE_CACHE, ENCODER_ATTENTION = (
    "QuantizedLinear", "GatedLinear", "GeluLinear", "CachedAttention", "WriteCache", "EncoderAttention",
)  # fmt: skip
# Attention over caches of other types: the two above, with this behind their names, and without functions.
COMPILED_DOMAIN = "vlmdeploy.compiled"
SUFFIXES = {"fp32": "", "fp16": "Fp16", "int8": "Int8"}
MISSING = (
    "needs our compiled operators, and this installation has none: install a C++ compiler, then vlmdeploy again; or "
    "export with --kv fp32"
)
BITS, GROUPS, HEAD_MULTIPLE = (4, 8), (32, 64, 128), 16  # that the operators take


def library() -> Path | None:
    """The compiled operators; None where the installation has none."""
    path = Path(__file__).with_name("_operators.abi3.so")
    return path if path.is_file() else None


def variant() -> str | None:
    """The instructions that the compiled operators use on this machine, such as "avx2"; None without operators."""
    path = library()
    if path is None:
        return None
    name = ctypes.CDLL(str(path)).vlmdeploy_variant
    name.restype = ctypes.c_char_p
    return str(name(0).decode())
