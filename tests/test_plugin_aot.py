"""Contract: the ahead-of-time plugins against NVIDIA's own `tensorrt.plugin` of 11.4, imported over stub libraries
(tests/aot_host.py): what is registered, inferred, offered for timing and launched. No engine is built here."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.compiled_example import write_compiled, write_index
from tests.stub_libraries import COMPILER, build_stubs
from tests.tiny_bundle import run_process
from vlmdeploy.errors import BackendError
from vlmdeploy.export.engines.plugin_ahead_of_time import register_routed_plugins
from vlmdeploy.kernels.compiled_kernels import COMPILED, read_index
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary

TOKENS = "[tensor(('t',), 'INT32')]"
SYMBOLS = {1: "routed_gemv_fp16_g128", 2: "routed_gemm_fp16_g128_16x64"}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The kernels, and the environment of a process that plays TensorRT."""
    if COMPILER is None:
        pytest.skip("TensorRT's bindings need stub libraries: no C compiler (cc or gcc) is installed")
    folder = tmp_path_factory.mktemp("host")
    write_compiled(folder / "kernels")
    return folder / "kernels", build_stubs(folder)


def value(host: tuple[Path, dict[str, str]], expression: str, architecture: int = 87) -> Any:
    """Of an expression over tests/aot_host.py, after the plugins were registered for a GPU."""
    kernels, environment = host
    done = run_process("-m", "tests.aot_host", kernels, expression, architecture, **environment)
    assert done.returncode == 0, f"is the extra `dev` installed? {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def test_both_operations_are_registered_once_for_one_gpu(host: tuple[Path, dict[str, str]]) -> None:
    found = value(host, "[known_to_registry(), registered(87), registered(80)]")
    names = [["RoutedPartition", "1", "vlmdeploy", []], ["RoutedLinear", "1", "vlmdeploy", ["group_size"]]]
    again = "BackendError: RoutedLinear is registered for SM 87, it cannot also be for SM 80"
    assert found == [names, "None", again]


def test_output_types_follow_x(host: tuple[Path, dict[str, str]]) -> None:
    linear = "types(LINEAR, '{}', *LINEAR_TYPES[1:], group_size=64)"
    calls = [linear.format(kind) for kind in ("HALF", "BF16", "FLOAT")] + ["types(PARTITION, 'INT32')"]
    refused = "BackendError: x is FLOAT, expected HALF or BF16"
    assert value(host, f"[{', '.join(calls)}]") == [["HALF"], ["BF16"], refused, ["INT32", "INT32"]]


def test_output_shapes_are_inferred(host: tuple[Path, dict[str, str]]) -> None:
    found = value(host, f"[shapes(LINEAR, linear_inputs({{}}), 128), shapes(PARTITION, {TOKENS})]")
    assert found == [[[7, 96]], [[7], [1]]]


@pytest.mark.parametrize(("changes", "group_size", "said"), [
    ("{0: (('t', 200), 'HALF')}", 128, "in of x is 200, expected a multiple of group_size 128"),
    ("{0: (('t', 1, 256), 'HALF')}", 128, "x is [?, 1, 256], expected [?, ?]"),
    ("{1: (('t',), 'INT64')}", 128, "experts is INT64, expected INT32"),
    ("{4: ((2, 96, 256), 'INT8')}", 128, "codes is [2, 96, 256], expected [2, 96, 128]"),
    ("{5: ((2, 96, 2), 'HALF')}", 128, "scales is [2, 96, 2], expected [2, 2, 96]"),
    ("{6: ((2, 1), 'FLOAT')}", 128, "bias is [2, 1], expected [2, 96]"),
    ("{}", 64, "scales is [2, 2, 96], expected [2, 4, 96]"),
    ("{}", 48, "group_size is 48, expected 32, 64, 128"),
])  # fmt: skip
def test_inputs_that_do_not_fit_are_named(
    changes: str, group_size: int, said: str, host: tuple[Path, dict[str, str]]
) -> None:
    found = value(host, f"shapes(LINEAR, linear_inputs({changes}), {group_size})")
    assert found == f"BackendError: {said}"


@pytest.mark.parametrize(("activation", "group_size"), [("HALF", 32), ("BF16", 128)])
def test_kernels_that_fit_are_offered_for_timing(
    activation: str, group_size: int, host: tuple[Path, dict[str, str]]
) -> None:
    """The large gemm of the example needs more shared memory than TensorRT asks for."""
    types = [activation, "INT32", "INT32", "INT32", "INT8", "HALF", "FLOAT", activation]
    assert value(host, f"tuned('{activation}', {group_size})") == [[types, [1, 2]]]


@pytest.mark.parametrize(("tactic", "grids", "shared_bytes"), [
    (1, [(3, 1), (3, 33)], 512), (2, [(2, 2), (2, 4)], 20480),
])  # fmt: skip
def test_launch_of_a_linear_follows_the_tokens(
    tactic: int, grids: list[tuple[int, int]], shared_bytes: int, host: tuple[Path, dict[str, str]]
) -> None:
    """Out is 96, in 256 in two groups; blocks hold 32 or 64 columns; once for 1 token, once for 33."""
    symbol, ptx, launches = value(host, f"launched(LINEAR, linear_inputs({{}}), 128, (None,), {tactic})")
    assert symbol == SYMBOLS[tactic]
    assert f".entry {symbol}()" in ptx and "// 87" in ptx
    expected = [[*grid, 1, 128, 1, shared_bytes, tokens, 96, 2] for grid, tokens in zip(grids, (1, 33), strict=True)]
    assert launches == expected


def test_partition_is_launched_as_one_block(host: tuple[Path, dict[str, str]]) -> None:
    symbol, _, launches = value(host, f"launched(PARTITION, {TOKENS}, (None, None), 0)")
    assert symbol == "routed_partition"
    assert launches == [[1, 1, 1, 128, 1, 64, 1], [1, 1, 1, 128, 1, 64, 33]]


def test_tactic_that_was_not_offered_is_refused(host: tuple[Path, dict[str, str]]) -> None:
    calls = [f"launched(LINEAR, linear_inputs({{}}), 128, (None,), {tactic})" for tactic in (0, 3)]
    found = value(host, f"[{', '.join(calls)}]")
    assert found == [f"BackendError: tactic is {tactic}, expected 1 to 2" for tactic in (0, 3)]


@pytest.mark.parametrize("architecture", read_index().architectures())
def test_shipped_kernels_are_launched_as_ptx_of_their_gpu(architecture: int, host: tuple[Path, dict[str, str]]) -> None:
    """11 parameters: 7 inputs, 3 integers, 1 output; TensorRT would pass no more."""
    calls = [f"launched(LINEAR, linear_inputs({{}}), 128, (None,), {tactic})" for tactic in (1, 2)]
    calls.append(f"launched(PARTITION, {TOKENS}, (None, None), 0)")
    found = value((COMPILED, host[1]), f"[{', '.join(calls)}]", architecture)
    for (symbol, ptx, launches), num_parameters in zip(found, (11, 11, 4), strict=True):
        head = ptx.split(f".entry {symbol}(")[1].split(")")[0]
        assert head.count(".param") == num_parameters
        assert f".target sm_{architecture}" in ptx
        assert all(numbers[5] <= 48 * 1024 for numbers in launches)


def test_another_signature_would_be_rejected(host: tuple[Path, dict[str, str]]) -> None:
    """What is accepted above is so because it fits: `tensorrt.plugin` compares."""
    found = value(host, "[decorated(name, lambda x, codes, outputs: None) for name in ('aot_impl', 'autotune')]")
    assert all("expected input arg schema" in said for said in found)


def plugin_module(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> TensorrtLibrary:
    """A TensorRT whose registry already has what another library registered."""
    module = ModuleType("tensorrt")
    taken = SimpleNamespace(get_creator=lambda name, version, namespace: (name, version, namespace))
    vars(module).update(__path__=[], get_plugin_registry=lambda: taken)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    if functions:
        plugin = ModuleType("tensorrt.plugin")
        vars(plugin).update(functions)
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    return TensorrtLibrary("tensorrt", module, "10.3.0")


def test_library_without_python_plugins_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_compiled(tmp_path)
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0 has no module `plugin`.*expected 10\.9 or later"):
        register_routed_plugins(plugin_module(monkeypatch), 87, tmp_path)
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0 builds no plugins ahead of time"):
        register_routed_plugins(plugin_module(monkeypatch, register=None), 87, tmp_path)


def test_rtx_has_no_plugins() -> None:
    library = TensorrtLibrary("tensorrt_rtx", ModuleType("tensorrt_rtx"), "1.7.1")
    with pytest.raises(BackendError, match=r"TensorRT-RTX 1\.7\.1 has no plugins"):
        register_routed_plugins(library, 86)


def test_operations_of_a_plugin_library_are_not_doubled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_compiled(tmp_path)
    with pytest.raises(BackendError, match="RoutedPartition is registered already"):
        register_routed_plugins(plugin_module(monkeypatch, aot_impl=None), 87, tmp_path)


def test_gpu_without_kernels_is_told_which_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_compiled(tmp_path)
    with pytest.raises(BackendError, match="no routed kernel for SM 75; there are kernels for SM 80, 87"):
        register_routed_plugins(plugin_module(monkeypatch, aot_impl=None), 75, tmp_path)


def test_kernels_of_another_packing_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_index(tmp_path, write_compiled(tmp_path) | {"packing": 2})
    with pytest.raises(BackendError, match="the kernels read weights of packing 2, expected 1"):
        register_routed_plugins(plugin_module(monkeypatch, aot_impl=None), 87, tmp_path)


def test_kernels_too_large_for_tensorrt_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index = write_compiled(tmp_path)
    for kernel in index["kernels"]:
        kernel["shared_bytes"] = 49153 if kernel["kind"] == "gemv" else kernel["shared_bytes"]
    write_index(tmp_path, index)
    with pytest.raises(
        BackendError, match=r"SM 87 has no kernel \(gemv, fp16 activations, group 32\) of at most 49152"
    ):
        register_routed_plugins(plugin_module(monkeypatch, aot_impl=None), 87, tmp_path)
