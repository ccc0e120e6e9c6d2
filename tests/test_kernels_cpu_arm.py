"""The ARM variants of the CPU's kernels, cross-compiled and run by an emulator: the textbook, equal to the plain one.

Needs `apt install g++-aarch64-linux-gnu qemu-user`. What they compute is tested here, not how fast.
"""

import shutil
import struct
import subprocess
from math import prod
from pathlib import Path

import numpy as np
import pytest

from tests.test_kernels_cpu import STORED, THEN, Array, Case, Conversation, draw
from vlmdeploy.kernels import cpu

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = sorted(Path(cpu.__file__).parent.glob("*.cpp"))
# Emulated processors, and the variants that they run.
PROCESSORS = {
    "max": {"neon-i8mm", "neon-dotprod", "plain"},
    "cortex-a76": {"neon-dotprod", "plain"},
    "cortex-a57": {"plain"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER}, {EMULATOR}"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that runs products and attention, for ARM."""
    path = tmp_path_factory.mktemp("arm") / "driver"
    sources = map(str, [Path(__file__).with_name("cpu_kernel_driver.cpp"), *SOURCES])
    options = ["-std=c++17", "-O3", "-ffp-contract=off", "-static", "-o", str(path)]
    subprocess.run([COMPILER, *options, *sources], check=True)
    return path


def cases() -> list[tuple[Case, str]]:
    """Products of all kinds, with their operators."""
    random = np.random.default_rng(3)
    found = []
    for bits in cpu.BITS:
        for group in cpu.GROUPS:
            for operator in THEN:
                rows, outputs = int(random.choice([1, 2, 3, 7, 13])), 2 * int(random.integers(1, 40))
                found.append((draw(random, rows, outputs, bits, group, int(random.integers(1, 12))), operator))
    return found


def written(case: Case, operator: str) -> bytes:
    """A case as the driver reads it."""
    rows, width = case.x.shape
    flags = (case.scales.dtype == np.float16, list(THEN).index(operator), case.zeros is not None, case.bias is not None)
    arrays = (case.x, case.codes, case.scales, case.zeros, case.bias)
    header = struct.pack("<9q", rows, case.outputs, width, case.bits, case.group, *flags)
    return header + b"".join(array.tobytes() for array in arrays if array is not None)


def outputs_of(driver: Path, processor: str, content: bytes, shapes: list[tuple[int, ...]]) -> list[dict[str, Array]]:
    """What the driver writes for each subject, by variant."""
    command = [EMULATOR, "-cpu", processor, str(driver)]
    out = subprocess.run(command, input=content, capture_output=True, check=True).stdout
    place, found = 0, list[dict[str, Array]]()
    for shape in shapes:
        found.append({})
        for _ in PROCESSORS[processor]:
            name = out[place : place + 16].rstrip(b"\0").decode()
            found[-1][name] = np.frombuffer(out, np.float32, prod(shape), place + 16).reshape(shape)
            place += 16 + 4 * prod(shape)
        assert found[-1].keys() == PROCESSORS[processor]
    assert place == len(out)
    return found


@pytest.mark.parametrize("processor", PROCESSORS)
def test_arm_products_are_the_textbook_and_equal(driver: Path, processor: str) -> None:
    subjects = cases()
    content, expected = b"".join(written(*one) for one in subjects), [case.expected(then) for case, then in subjects]
    for wanted, found in zip(
        expected, outputs_of(driver, processor, content, [y.shape for y in expected]), strict=True
    ):
        np.testing.assert_allclose(found["plain"], wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
        for name, y in found.items():
            np.testing.assert_array_equal(y, found["plain"], err_msg=name)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_arm_attention_is_the_textbook_and_equal(driver: Path, processor: str) -> None:
    content, expected = b"", []
    for number, stored in enumerate(STORED):
        for rows, heads, kv_heads, width in ((70, 4, 2, 48 if stored != "int8" else 96), (90, 2, 2, 64)):
            case = Conversation.draw(rows, rows, heads, kv_heads, width, stored)
            sizes = (-1, rows, heads, kv_heads, width, len(case.cos), number, rows - 1, 0)  # the last row alone
            content += struct.pack("<9q", *sizes) + case.qkv.tobytes() + case.cos.tobytes() + case.sin.tobytes()
            expected.append(case.expected())
    for wanted, found in zip(
        expected, outputs_of(driver, processor, content, [y.shape for y in expected]), strict=True
    ):
        np.testing.assert_allclose(found["plain"], wanted, rtol=0, atol=2e-3)
        for name, y in found.items():
            np.testing.assert_array_equal(y, found["plain"], err_msg=name)
