"""The memory layout of the routed kernels: int4 codes, fp16 scales and fp32 biases of both experts of one linear.

Symmetric codes 0..15, zero point 8. A row of `codes` is a sequence of groups; byte j of a group of G inputs holds the
code of input j in its low nibble and of input G/2 + j in its high one, so each half is read without shuffling. TensorRT
plugins support neither INT4 nor UINT8; there the bytes are typed INT8.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdeploy.errors import QuantizationError

Codes = NDArray[np.uint8]
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]

PACKING_VERSION = 1
BITS = 4
ZERO_POINT = 8
GROUP_SIZES = (32, 64, 128)
EXPERTS = ("language", "vision")  # an expert id is an index into this


@dataclass(frozen=True)
class PackedExperts:
    """One linear of both experts. Raises QuantizationError if the arrays do not fit each other.

    codes uint8 [experts, out, in / 2]; scales float16 [experts, groups, out]; bias float32 [experts, out], zeros for an
    expert without one.
    """

    codes: Codes
    scales: Halves
    bias: Floats
    group_size: int

    def __post_init__(self) -> None:
        check_arrays(self.codes, self.scales, self.bias, self.group_size)

    @property
    def in_width(self) -> int:
        """Inputs of the linear."""
        return int(self.codes.shape[2]) * 2

    @property
    def out_width(self) -> int:
        """Outputs of the linear."""
        return int(self.codes.shape[1])


def check_layout(name: str, in_width: int, group_size: int, bits: int, symmetric: bool) -> None:
    """Raise QuantizationError, naming the linear, unless the kernels support this grid."""
    expected = f"the routed kernels take symmetric {BITS}-bit codes in groups of {_listed(GROUP_SIZES)}"
    if bits != BITS or not symmetric:
        kind = "symmetric" if symmetric else "asymmetric"
        raise QuantizationError(f"{name}: {kind} {bits}-bit codes; {expected}")
    if group_size not in GROUP_SIZES:
        raise QuantizationError(f"{name}: groups of {group_size}; {expected}")
    if in_width < 1 or in_width % group_size:
        raise QuantizationError(f"{name}: {in_width} inputs; expected a multiple of the group size {group_size}")


def check_arrays(codes: Codes, scales: Halves, bias: Floats, group_size: int) -> None:
    """Raise QuantizationError unless these are the arrays of one packed linear."""
    found: dict[str, NDArray[Any]] = {"codes": codes, "scales": scales, "bias": bias}
    for (name, array), dtype in zip(found.items(), (np.uint8, np.float16, np.float32), strict=True):
        if array.dtype != dtype:
            raise QuantizationError(f"packed {name} are {array.dtype}, expected {np.dtype(dtype)}")
    if codes.ndim != 3 or codes.shape[0] != len(EXPERTS) or codes.shape[1] < 1:
        raise QuantizationError(f"packed codes are {list(codes.shape)}, expected [{len(EXPERTS)}, out, in / 2]")
    check_layout("packed codes", codes.shape[2] * 2, group_size, BITS, symmetric=True)
    experts, num_out, num_bytes = codes.shape
    for name, shape in (("scales", (experts, num_bytes * 2 // group_size, num_out)), ("bias", (experts, num_out))):
        if found[name].shape != shape:
            raise QuantizationError(
                f"packed {name} are {list(found[name].shape)}, expected {list(shape)} for codes {list(codes.shape)} in "
                f"groups of {group_size}"
            )


def pack_codes(codes: Codes, group_size: int) -> Codes:
    """Codes uint8 [rows, in] -> bytes uint8 [rows, in / 2]; a weight can be packed in pieces of any number of rows.

    Raises QuantizationError unless the group size is 32, 64 or 128 and divides the width, and for a code above 15.
    """
    rows, width = _matrix(codes, "codes")
    check_layout("codes", width, group_size, BITS, symmetric=True)
    if codes.size and int(codes.max()) >> BITS:
        raise QuantizationError(f"a code {codes.max()} does not fit {BITS} bits")
    halves = codes.reshape(rows, width // group_size, 2, group_size // 2)
    packed: Codes = halves[:, :, 0] | (halves[:, :, 1] << np.uint8(BITS))
    return packed.reshape(rows, width // 2)


def unpack_codes(packed: Codes, group_size: int) -> Codes:
    """The inverse of `pack_codes`: bytes uint8 [rows, in / 2] -> codes uint8 [rows, in]."""
    rows, num_bytes = _matrix(packed, "packed codes")
    check_layout("packed codes", num_bytes * 2, group_size, BITS, symmetric=True)
    groups = packed.reshape(rows, num_bytes * 2 // group_size, group_size // 2)
    codes: Codes = np.stack((groups & np.uint8(0x0F), groups >> np.uint8(BITS)), 2)
    return codes.reshape(rows, num_bytes * 2)


def pack_scales(scales: Floats) -> Halves:
    """Scales [rows, groups] -> float16 [groups, rows], the kernels' order.

    Raises QuantizationError for a scale that float16 cannot hold exactly: the codes were chosen for exactly that scale.
    """
    _matrix(scales, "scales", np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        halves = scales.T.astype(np.float16)
    exact = np.isfinite(halves) & (halves.astype(np.float32) == scales.T)
    if not exact.all():
        odd = scales.T[~exact][0]
        raise QuantizationError(f"a scale {odd!s} is not a finite float16 value: round scales before choosing codes")
    return np.ascontiguousarray(halves)


def _matrix(values: NDArray[np.generic], name: str, dtype: type[np.generic] = np.uint8) -> tuple[int, int]:
    if values.ndim != 2 or values.dtype != dtype:
        raise QuantizationError(
            f"{name} are {values.dtype} {list(values.shape)}, expected {np.dtype(dtype)} with two axes"
        )
    return int(values.shape[0]), int(values.shape[1])


def _listed(values: tuple[int, ...]) -> str:
    *first, last = (str(value) for value in values)
    return f"{', '.join(first)} or {last}"
