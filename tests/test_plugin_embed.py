"""Contract: compiled kernels become C++ that gives back the same images and numbers; what cannot be, is named."""

import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from plugins.embed_kernels import PACKING, KernelsError, main, read_kernels, source_text
from tests.compiled_example import write_compiled, write_index
from tests.test_plugin_cpp import PLUGINS, compile_program
from tests.tiny_bundle import run_process
from vlmdeploy.kernels.compiled_kernels import COMPILED, read_index
from vlmdeploy.kernels.packing import PACKING_VERSION
from vlmdeploy.runtime.backends import plugin_library

KINDS = ("partition", "gemv", "gemm")  # as the enumeration of kernel_table.h counts them


def printed(kernel: dict[str, Any], image: bytes) -> str:
    """How the program prints a kernel of the index."""
    numbers = [kernel[key] for key in ("group_size", "block_rows", "block_columns", "num_warps", "shared_bytes")]
    head = [kernel["name"], kernel["architecture"], KINDS.index(kernel["kind"]), kernel["activation"] or "no"]
    return " ".join(map(str, ["kernel", *head, *numbers, kernel["symbol"], image.hex()]))


def image_of(folder: Path, kernel: dict[str, Any]) -> bytes:
    with ZipFile(folder / f"sm_{kernel['architecture']}.zip") as archive:
        return archive.read(f"{kernel['name']}.cubin")


def test_embedded_kernels_are_those_of_the_folder(tmp_path: Path) -> None:
    index = write_compiled(tmp_path, (80, 87))
    assert main(["--kernels", str(tmp_path), "--out", str(tmp_path / "embedded.cpp")]) == 0
    program = compile_program(tmp_path, "embedded_test", ("src/kernel_table.cpp", str(tmp_path / "embedded.cpp")))
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = [printed(kernel, image_of(tmp_path, kernel)) for kernel in index["kernels"]]
    head = [*kernels, "choice 80 2 80", "choice 87 2 87", "packing 1"]
    assert lines[: len(head)] == head
    assert lines[len(head) :] == list(served(tmp_path))


def served(folder: Path) -> Iterator[str]:
    """Which kernel serves how many tokens, as Python chooses."""
    index = read_index(folder)
    for case in product((80, 87), ("fp16", "bf16"), (32, 64, 128), (1, 2, 3, 80, 81, 512)):
        yield " ".join(map(str, ("serves", *case, index.linear(*case).name)))


def test_shipped_kernels_can_be_embedded() -> None:
    kernels, choices = read_kernels(COMPILED)
    index = read_index()
    assert [kernel.name for kernel in kernels] == [kernel.name for kernel in index.kernels]
    assert tuple(choices) == index.architectures()


def test_all_parts_speak_of_one_packing() -> None:
    assert PACKING == plugin_library.PACKING == PACKING_VERSION == read_index().packing


def test_only_the_architectures_asked_for_are_embedded(tmp_path: Path) -> None:
    write_compiled(tmp_path, (80, 87, 110))
    kernels, choices = read_kernels(tmp_path, [110, 87, 87])
    assert [kernel.architecture for kernel in kernels] == [87] * 19 + [110] * 19
    assert sorted(choices) == [87, 110]


def test_equal_images_are_embedded_once(tmp_path: Path) -> None:
    index = write_compiled(tmp_path, (87,))
    kernels, choices = read_kernels(tmp_path)
    assert source_text(kernels, choices).count("alignas") == len(index["kernels"])
    same = [type(kernel)(**{**vars(kernel), "cubin_sha256": "0", "image": b"x"}) for kernel in kernels]
    assert source_text(same, choices).count("alignas") == 1


def test_image_of_another_hash_is_refused(tmp_path: Path) -> None:
    index = write_compiled(tmp_path)
    index["kernels"][3]["cubin_sha256"] = "0" * 64
    write_index(tmp_path, index)
    with pytest.raises(KernelsError, match=r"sm_80.zip: routed_gemm.fp16.g32.16x64.cubin does not have the hash"):
        read_kernels(tmp_path)


def test_missing_or_broken_archives_are_named(tmp_path: Path) -> None:
    write_compiled(tmp_path)
    (tmp_path / "sm_87.zip").write_bytes(b"not a zip")
    with pytest.raises(KernelsError, match=r"sm_87.zip: cannot be read"):
        read_kernels(tmp_path)
    (tmp_path / "sm_87.zip").unlink()
    with pytest.raises(KernelsError, match=r"sm_87.zip: cannot be read"):
        read_kernels(tmp_path)
    assert len(read_kernels(tmp_path, [80])[0]) == 19


def test_missing_member_is_named(tmp_path: Path) -> None:
    index = write_compiled(tmp_path)
    index["kernels"][0]["name"] = "other"
    write_index(tmp_path, index)
    with pytest.raises(KernelsError, match=r"sm_80.zip: cannot be read .*other.cubin"):
        read_kernels(tmp_path)


@pytest.mark.parametrize(("text", "said"), [
    ("", "cannot be read"),
    ("{", "cannot be read"),
    ("[]", "not a list of kernels"),
    ("{}", "format is None, this plugin reads 1"),
    ('{"format": 2, "packing": 1}', "format is 2, this plugin reads 1"),
    ('{"format": 1, "packing": 3}', "packing is 3, this plugin reads 1"),
    ('{"format": 1, "packing": 1}', "not a list of kernels"),
    ('{"format": 1, "packing": 1, "kernels": [], "choice": {}}', "lists no kernels"),
    ('{"format": 1, "packing": 1, "kernels": [7], "choice": {}}', "not a list of kernels"),
    ('{"format": 1, "packing": 1, "kernels": [], "choice": {"x": {}}}', "not a list of kernels"),
])  # fmt: skip
def test_index_that_cannot_be_read_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(KernelsError, match=f"index.json.*{said}"):
        read_kernels(tmp_path)


@pytest.mark.parametrize(("key", "value"), [
    ("num_warps", 0), ("num_warps", "4"), ("block_rows", -1), ("shared_bytes", 1 << 31), ("architecture", True),
    ("kind", "conv"), ("activation", "fp32"), ("group_size", 48), ("symbol", 'x"\n'), ("name", None),
])  # fmt: skip
def test_kernel_with_a_senseless_entry_is_refused(key: str, value: object, tmp_path: Path) -> None:
    index = write_compiled(tmp_path)
    index["kernels"][1][key] = value
    write_index(tmp_path, index)
    with pytest.raises(KernelsError, match=r"index.json: not a list of kernels"):
        read_kernels(tmp_path)


@pytest.mark.parametrize(("removed", "said"), [
    ("routed_partition", "SM 80 has not exactly one partition kernel"),
    ("routed_gemv.bf16.g64", "SM 80, bf16, group 64: found gemm, gemm, expected a gemv and gemms"),
])  # fmt: skip
def test_architecture_without_all_kernels_is_refused(removed: str, said: str, tmp_path: Path) -> None:
    index = write_compiled(tmp_path)
    index["kernels"] = [kernel for kernel in index["kernels"] if kernel["name"] != removed]
    write_index(tmp_path, index)
    with pytest.raises(KernelsError, match=said):
        read_kernels(tmp_path)


def test_architecture_without_a_choice_is_refused(tmp_path: Path) -> None:
    index = write_compiled(tmp_path)
    del index["choice"]["87"]
    write_index(tmp_path, index)
    with pytest.raises(KernelsError, match="SM 87 has no choice"):
        read_kernels(tmp_path)


@pytest.mark.parametrize(("architectures", "said"), [
    ("75", "no kernels for SM 75, there are 80, 87"), ("8.7", "--architectures is '8.7'"), ("87,", "'87,'"),
])  # fmt: skip
def test_command_refuses_in_one_line(architectures: str, said: str, tmp_path: Path) -> None:
    write_compiled(tmp_path)
    command = [PLUGINS / "embed_kernels.py", "--kernels", tmp_path, "--out", tmp_path / "out.cpp"]
    done = run_process(*command, "--architectures", architectures)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr
    assert not (tmp_path / "out.cpp").exists()
