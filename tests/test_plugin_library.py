"""Contract: a plugin library is registered when it fits this TensorRT, our graphs and the GPU; else one line says why.

The libraries are a few lines of C; TensorRT's plugin registry is a fake that remembers.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.stub_libraries import COMPILER
from vlmdeploy.errors import BackendError
from vlmdeploy.runtime.backends import plugin_library
from vlmdeploy.runtime.backends.plugin_library import OPERATIONS, PluginInfo, load_plugin_library, read_plugin_info
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary

INFO = {"plugin_version": "1", "packing": 1, "tensorrt": "11.1", "tensorrt_major": 11, "architectures": [80, 87]}


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was loaded is remembered as long as a process; here as long as a test."""
    monkeypatch.setattr(plugin_library, "_loaded", {})
    yield


def build_library(path: Path, text: str | None = None, source: str | None = None, **changes: Any) -> Path:
    """A shared library that says what it is."""
    if COMPILER is None:
        pytest.skip("no C compiler (cc or gcc) is installed")
    answer = json.dumps(json.dumps(INFO | changes) if text is None else text)
    source = f"const char *vlmdeploy_plugin_info(void) {{ return {answer}; }}" if source is None else source
    command = [COMPILER, "-shared", "-fPIC", "-o", str(path), "-xc", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    return path


class Registry:
    """Registers what is in `brought`; remembers the paths."""

    def __init__(self, brought: tuple[str, ...] = OPERATIONS) -> None:
        self.brought = brought
        self.paths: list[str] = []
        self.names: set[str] = set()

    def load_library(self, plugin_path: str) -> object | None:
        self.paths.append(plugin_path)
        self.names |= set(self.brought)
        return object() if self.brought else None

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return object() if name in self.names and (version, namespace) == ("1", "vlmdeploy") else None


def tensorrt(registry: Registry, version: str = "11.4.0", name: Any = "tensorrt") -> TensorrtLibrary:
    return TensorrtLibrary(name, SimpleNamespace(get_plugin_registry=lambda: registry), version)  # type: ignore[arg-type]


def test_library_is_registered_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, registry = build_library(tmp_path / "routed.so"), Registry()
    info = load_plugin_library(path, tensorrt(registry), 87)
    monkeypatch.chdir(tmp_path)
    assert load_plugin_library(Path("routed.so"), tensorrt(registry)) == info
    assert registry.paths == [str(path)]
    assert info == PluginInfo(path, "1", 1, "11.1", 11, (80, 87))


def test_gpu_is_checked_each_time(tmp_path: Path) -> None:
    path, registry = build_library(tmp_path / "routed.so"), Registry()
    with pytest.raises(BackendError, match=r"routed\.so has no kernels for SM 75: built for 80, 87$"):
        load_plugin_library(path, tensorrt(registry), 75)
    assert registry.paths == []
    load_plugin_library(path, tensorrt(registry), 80)
    with pytest.raises(BackendError, match="has no kernels for SM 110"):
        load_plugin_library(path, tensorrt(registry), 110)


def test_library_of_another_bundle_is_served_by_the_first(tmp_path: Path) -> None:
    """Two bundles in one process, each with its own file: TensorRT refuses to register an operation twice."""
    first, second = (build_library(tmp_path / f"{name}.so") for name in ("first", "second"))
    registry = Registry()
    assert load_plugin_library(first, tensorrt(registry)).path == first
    for _ in range(2):
        assert load_plugin_library(second, tensorrt(registry), 87).path == second
    assert registry.paths == [str(first)]


def test_second_library_for_other_gpus_is_refused(tmp_path: Path) -> None:
    first, registry = build_library(tmp_path / "first.so"), Registry()
    second = build_library(tmp_path / "second.so", architectures=[110])
    load_plugin_library(first, tensorrt(registry))
    for _ in range(2):
        with pytest.raises(
            BackendError, match=r"second\.so was built for SM 110, .*first\.so, .* for SM 80, 87, .*anot"
        ):
            load_plugin_library(second, tensorrt(registry))


def test_library_that_could_not_be_registered_is_tried_again(tmp_path: Path) -> None:
    path = build_library(tmp_path / "routed.so")
    with pytest.raises(BackendError, match="cannot register"):
        load_plugin_library(path, tensorrt(Registry(brought=())))
    registry = Registry()
    load_plugin_library(path, tensorrt(registry))
    assert registry.paths == [str(path)]


@pytest.mark.parametrize(("changes", "said"), [
    ({"tensorrt": "10.9", "tensorrt_major": 10},
     r"was built for TensorRT 10\.9, this is TensorRT 11\.4\.0: build it again with the headers of TensorRT 11"),
    ({"packing": 2}, "has version 2 of packing, expected 1: build it again"),
    ({"plugin_version": "2"}, "has version 2 of operations, expected 1"),
    ({"packing": True}, "does not say what it is, packing is of another type"),
    ({"tensorrt_major": "11"}, "tensorrt_major is of another type"),
    ({"architectures": {}}, "architectures is of another type"),
    ({"architectures": ["a"]}, "does not say what it is"),
])  # fmt: skip
def test_library_that_does_not_fit_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    registry = Registry()
    with pytest.raises(BackendError, match=rf"routed\.so .*{said}"):
        load_plugin_library(build_library(tmp_path / "routed.so", **changes), tensorrt(registry))
    assert registry.paths == []


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"packing": 1}'])
def test_library_that_says_nothing_readable_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"routed\.so does not say what it is"):
        read_plugin_info(build_library(tmp_path / "routed.so", text))


def test_library_that_says_nothing_is_refused(tmp_path: Path) -> None:
    for index, answer in enumerate(("0", r'"\xff\xfe"')):
        source = f"const char *vlmdeploy_plugin_info(void) {{ return {answer}; }}"
        with pytest.raises(BackendError, match="does not say what it is: b"):
            read_plugin_info(build_library(tmp_path / f"{index}.so", source=source))


def test_library_of_someone_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"other\.so is no plugin library of vlmdeploy: it has no vlmdeploy_plugin_i"
    ):
        read_plugin_info(build_library(tmp_path / "other.so", source="int getCreators(void) { return 0; }"))


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_file_that_is_no_library_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "routed.so").write_bytes(content)
    with pytest.raises(BackendError, match=r"routed\.so cannot be loaded .*expected a plugin library of vlmdeploy"):
        read_plugin_info(tmp_path / "routed.so")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"routed\.so: there is no such file, expected a plugin library"):
        load_plugin_library(tmp_path / "routed.so", tensorrt(Registry()))
    with pytest.raises(BackendError, match="not a file"):
        load_plugin_library(tmp_path, tensorrt(Registry()))


def test_second_form_of_the_operations_is_refused(tmp_path: Path) -> None:
    path, registry = build_library(tmp_path / "routed.so"), Registry()
    registry.names.add("RoutedLinear")
    with pytest.raises(BackendError, match="RoutedLinear is registered already"):
        load_plugin_library(path, tensorrt(registry))
    assert registry.paths == []


def test_library_that_tensorrt_refuses_is_told(tmp_path: Path) -> None:
    path = build_library(tmp_path / "routed.so")
    with pytest.raises(BackendError, match=r"TensorRT 11\.4\.0 cannot register .*routed\.so: its log says why"):
        load_plugin_library(path, tensorrt(Registry(brought=())))


def test_library_that_brings_too_little_is_told(tmp_path: Path) -> None:
    path = build_library(tmp_path / "routed.so")
    with pytest.raises(BackendError, match="was registered, but brought no RoutedLinear"):
        load_plugin_library(path, tensorrt(Registry(brought=("RoutedPartition",))))


def test_rtx_takes_no_plugin_library(tmp_path: Path) -> None:
    path = build_library(tmp_path / "routed.so")
    with pytest.raises(BackendError, match=r"TensorRT-RTX 1\.7\.1 takes no plugin library"):
        load_plugin_library(path, tensorrt(Registry(), "1.7.1", "tensorrt_rtx"))
