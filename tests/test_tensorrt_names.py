"""Contract: every name of TensorRT that our source uses is in the releases that we support, and is called as they say.

TensorRT for Jetson and datacenter GPUs does not install here, its Python bindings do: they are imported over stubs of
its libraries. TensorRT-RTX is imported as it is. What a name does is not tested here.
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import vlmdeploy
from tests.interface_uses import Origins, Reader, Use, misfit
from tests.library_interface import Interface, parse_interface, parse_signature
from tests.stub_libraries import COMPILER, build_stubs
from tests.tiny_bundle import run_process
from vlmdeploy.export.engines.compiler import KEPT_SEVERITIES
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary

SOURCE = Path(vlmdeploy.__file__).parent
DOOR = "trt_library"  # the module of ours that every object of TensorRT comes through
MODULES = ("self.module", "library.module", "self.library.module", "importlib.import_module(name)")
# What our source annotates `Any`: arguments, attributes and results of functions, each with its class.
ANYS = {
    "module": "",
    "logger": "ILogger",
    "severity": "ILogger.Severity",
    "monitor": "IProgressMonitor",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "_profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "context": "IExecutionContext",
    "self._contexts": "IExecutionContext",
    "self._kernels": "IRuntimeCache",
    "layer": "ILayer",
    "_config": "IRuntimeConfig",
    "runtime_config": "IRuntimeConfig",
    "self._configs": "IRuntimeConfig",
    "self._graph": None,  # a captured CUDA graph
    "_captured": None,
    "plugin_registry": "IPluginRegistry",
    "plugin": None,  # `tensorrt.plugin`: tests/test_plugin_aot.py runs what we use of it
    "_plugin_module": None,
}
ORIGINS = Origins(MODULES, ANYS)
# What TensorRT-RTX alone has, and the function of ours that may use it: none of them is entered with TensorRT.
RTX_ONLY = {
    "ComputeCapability": "_set_compute_capabilities",
    "ComputeCapability.__members__": "_set_compute_capabilities",
    "IBuilderConfig.num_compute_capabilities": "_set_compute_capabilities",
    "IBuilderConfig.set_compute_capability": "_set_compute_capabilities",
    "IRuntimeConfig.create_runtime_cache": "_finish_kernels",
    "IRuntimeConfig.set_runtime_cache": "_finish_kernels",
    "IRuntimeCache.deserialize": "_finish_kernels",
    "IRuntimeCache.serialize": "keep_kernels",
    "BuilderFlag.REQUIRE_USER_ALLOCATION": "prepare",
    "DynamicShapesKernelSpecializationStrategy": "_finish_kernels",
    "DynamicShapesKernelSpecializationStrategy.EAGER": "_finish_kernels",
    "DynamicShapesKernelSpecializationStrategy.LAZY": "_finish_kernels",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": "_finish_kernels",
}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which TensorRT's bindings can be imported."""
    if COMPILER is None:
        pytest.skip("TensorRT's bindings need stub libraries: no C compiler (cc or gcc) is installed")
    return build_stubs(tmp_path_factory.mktemp("stubs"))


def interface_of(module: str, **environment: str) -> Interface:
    """What a module offers, from a process of its own: nothing of it is loaded here."""
    done = run_process("-m", "tests.library_interface", module, **environment)
    assert done.returncode == 0, f"{module} cannot be read, is the extra `dev` installed? {done.stderr}"
    return parse_interface(done.stdout)


@pytest.fixture(scope="module")
def tensorrt(stubs: dict[str, str]) -> Interface:
    return interface_of("tensorrt_bindings", **stubs)


@pytest.fixture(scope="module")
def rtx() -> Interface:
    pytest.importorskip("tensorrt_rtx", reason="pip install vlmdeploy[rtx]")
    return interface_of("tensorrt_rtx")


@pytest.fixture(scope="module")
def either(tensorrt: Interface, rtx: Interface) -> Interface:
    """What one of the two has."""
    owners = tensorrt.classes | rtx.classes
    classes = {owner: tensorrt.classes.get(owner, {}) | rtx.classes.get(owner, {}) for owner in owners}
    return Interface(f"{tensorrt.version} or {rtx.version}", classes)


def read(source: str, where: str, interface: Interface) -> Reader:
    reader = Reader(where, interface, ORIGINS)
    reader.visit(ast.parse(source))
    return reader


@pytest.fixture(scope="module")
def readers(either: Interface) -> list[Reader]:
    """One for each file of ours that could hold an object of TensorRT."""
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if DOOR in path.read_text() or path.stem == DOOR]
    return [read(path.read_text(), str(path.relative_to(SOURCE)), either) for path in paths]


@pytest.fixture(scope="module")
def uses(readers: list[Reader]) -> list[Use]:
    return [use for reader in readers for use in reader.uses]


def misfits(uses: list[Use], interface: Interface) -> list[str]:
    return sorted({problem for use in uses if (problem := misfit(use, interface))})


def test_tensorrt_has_every_name_that_is_not_of_rtx_alone(uses: list[Use], tensorrt: Interface) -> None:
    assert tensorrt.version.startswith("11.4."), "the release that JetPack 7.2.2 takes"
    assert misfits([use for use in uses if use.full_name not in RTX_ONLY], tensorrt) == []


def test_rtx_has_every_name(uses: list[Use], rtx: Interface) -> None:
    assert rtx.version.startswith("1.7.")
    assert misfits(uses, rtx) == []


def test_what_rtx_alone_has_is_used_where_only_rtx_comes(uses: list[Use], tensorrt: Interface) -> None:
    missing = {(use.full_name, use.function) for use in uses if tensorrt.member(use.owner, use.name) is None}
    assert missing == set(RTX_ONLY.items())


def test_both_call_what_we_use_by_the_same_signature(uses: list[Use], tensorrt: Interface, rtx: Interface) -> None:
    """TensorRT may have more ways to call a method; those of RTX it has too, argument for argument."""
    for use in uses:
        ours, theirs = rtx.member(use.owner, use.name), tensorrt.member(use.owner, use.name)
        if ours and theirs:
            assert set(ours.signatures) <= set(theirs.signatures), use
            assert (ours.kind, ours.is_settable) == (theirs.kind, theirs.is_settable), use


def test_everything_untyped_has_its_class_in_the_table(readers: list[Reader]) -> None:
    assert [name for reader in readers for name in reader.unknown] == []


def test_uses_are_found_through_every_step_to_an_object(uses: list[Use]) -> None:
    """The last name of every chain that our source goes along."""
    assert {
        "ILogger.log", "IProgressMonitor.step_complete", "OnnxParser.parse", "ParserError.desc",
        "LayerType.ATTENTION_INPUT", "IAttention.key_value_lengths", "CausalMaskKind.LOWER_RIGHT",
        "IOptimizationProfile.set_shape", "ITensor.get_dimension_name", "Builder.build_serialized_network",
        "IExecutionContext.execute_async_v3", "ExecutionContextAllocationStrategy.USER_MANAGED",
        "ICudaEngine.get_device_memory_size_for_profile_v2",
    } <= {use.full_name for use in uses}  # fmt: skip


# What must be reported -> the source that it is in.
MISTAKES = {
    "there is no Bulider": "library.module.Bulider(1)",
    "there is no ICudaEngine.run": "engine = library.module.Runtime(1).deserialize_cuda_engine(b'')\nengine.run()",
    "there is no INetworkDefinition.size": "if (made := library.module.Builder(1).create_network()): made.size",
    "there is no ITensor.size": "def f(network: Any): [tensor.size for tensor in [network.get_input(i) for i in 'ab']]",
    "there is no ILayer.attention": "def f(network: Any):\n for a in (network.get_layer(i) for i in 'a'): a.attention",
    "there is no IExecutionContext.run": "self._contexts: dict[int, Any] = {}\nself._contexts[0].run()",
    "there is no ILogger.write": "class Log(library.module.ILogger):\n def write(self, text): pass",
    "ILogger.log is called": "class Log(library.module.ILogger):\n def log(self, text): pass",
    "Builder.create_network is called": "def f(builder: Any): builder.create_network(flag=0)",
    "IExecutionContext.set_input_shape is called": "def f(context: Any): context.set_input_shape('rows')",
    "IExecutionContext.set_device_memory is called": "def f(context: Any): context.set_device_memory(1, 2, 3)",
    "IExecutionContext.engine cannot be set": "def f(context: Any): context.engine = 1",
}


@pytest.mark.parametrize("problem", MISTAKES)
def test_name_or_call_that_does_not_exist_is_reported(problem: str, tensorrt: Interface) -> None:
    found = misfits(read(MISTAKES[problem], "source.py", tensorrt).uses, tensorrt)
    assert len(found) == 1 and found[0].startswith("source.py:") and problem in found[0], found


def test_untyped_name_that_the_table_lacks_is_reported(tensorrt: Interface) -> None:
    assert read("def refit(refitter: Any): ...", "source.py", tensorrt).unknown == ["source.py: refitter"]


@pytest.mark.parametrize(("text", "positional", "keywords", "fits"), [
    ("f(self: A) -> B", 1, (), True),
    ("f(self: A) -> B", 2, (), False),
    ("f(self: A, s: S = <S.STATIC: 0>, t: tuple[int, int] = (1, 2)) -> B", 1, ("t",), True),
    ("f(self: A, s: S, t: T) -> B", 2, (), False),
    ("f(self: A, s: S, t: T) -> B", 2, ("t",), True),
    ("f(self: A, s: S) -> B", 2, ("s",), False),
])  # fmt: skip
def test_signature_tells_which_calls_fit(text: str, positional: int, keywords: tuple[str, ...], fits: bool) -> None:
    assert parse_signature(text).takes(positional, keywords) == fits


ADAPTERS = """
import importlib, json, sys
name, bindings = sys.argv[1:]
sys.modules[name] = importlib.import_module(bindings)
from vlmdeploy.runtime.backends.trt_library import import_tensorrt
library = import_tensorrt(name)
said, steps = [], []
logger = library.logger(lambda *words: said.append(words))
for severity in library.module.ILogger.Severity.__members__.values():
    logger.log(severity, "text")
monitor = library.monitor(lambda *step: steps.append(step))
monitor.phase_start("whole", None, 2)
monitor.phase_start("part", "whole", 5)
monitor.step_complete("part", 0)
monitor.phase_finish("part")
monitor.step_complete("whole", 1)
print(json.dumps([library.version, said, steps]))
"""


@pytest.mark.parametrize(("name", "bindings", "version"), [
    ("tensorrt", "tensorrt_bindings", "11.4.0"), ("tensorrt_rtx", "tensorrt_rtx", "1.7.1"),
])  # fmt: skip
def test_logger_and_monitor_are_made_of_the_librarys_classes(
    name: str, bindings: str, version: str, stubs: dict[str, str]
) -> None:
    if name == "tensorrt_rtx":
        pytest.importorskip(name, reason="pip install vlmdeploy[rtx]")
    done = run_process("-c", ADAPTERS, name, bindings, **stubs)
    assert done.returncode == 0, done.stderr
    found, said, steps = json.loads(done.stdout)
    assert found == version
    assert {severity for severity, _ in said} == {*KEPT_SEVERITIES, "VERBOSE"}
    assert steps == [["whole", 0, 2], ["whole", 2, 2]]


def test_tensorrt_gets_a_limit_of_scratch_and_nothing_of_rtx() -> None:
    """What chooses GPUs is in RTX alone: this library and this config do not have it."""
    module = SimpleNamespace(MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"))
    limits: list[tuple[str, int]] = []
    config = SimpleNamespace(set_memory_pool_limit=lambda *limit: limits.append(limit))
    TensorrtLibrary("tensorrt", module, "11.4.0").prepare(config, ())
    assert limits == [("workspace", 1 << 30)]
