"""Contract: every name of TensorRT that our source uses is in the releases that we support, and is used as they say.

mypy reads our modules with stubs that stubgen makes of the bindings, once of each library. TensorRT for Jetson and
datacenter GPUs does not install here, its bindings do, over stubs of its libraries; TensorRT-RTX is imported as it is.
What a name does is not tested here.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

import vlmdeploy
from tests.stub_libraries import COMPILER, build_stubs
from tests.tiny_bundle import run_process
from vlmdeploy.export.engines.compiler import KEPT_SEVERITIES
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary

SOURCE = Path(vlmdeploy.__file__).parent
LIBRARY = re.compile(r"TensorrtLibrary|import_tensorrt")  # what an object of TensorRT comes from
# A module in a variable has no type: in what mypy reads, a name of it is one of the imported `trt`.
HELD_MODULE = re.compile(r"\b(self\.)?(library\.)?module\.(?=[A-Z]|get_)")
MYPY = (
    "--strict", "--config-file=", "--cache-dir=cache", "--follow-imports=skip", "--ignore-missing-imports",
    "--explicit-package-bases", "--show-error-context", "--hide-error-codes", "--disallow-any-explicit",
    "--allow-subclassing-any", "--allow-untyped-calls", "--allow-untyped-decorators",
    "--no-warn-return-any", "--no-warn-unused-ignores",
)  # fmt: skip
# What TensorRT-RTX alone has, by the function of ours that uses it: none of them does so with TensorRT.
RTX_ONLY = {
    "_captured": ['"IExecutionContext" has no attribute "is_stream_capturable"'],
    "_finish_kernels": [
        'Module has no attribute "DynamicShapesKernelSpecializationStrategy"',
        '"IRuntimeConfig" has no attribute "dynamic_shapes_kernel_specialization_strategy"',
        '"IRuntimeConfig" has no attribute "create_runtime_cache"',
        '"IRuntimeConfig" has no attribute "set_runtime_cache"',
    ],
    "__init__": ['Name "trt.IRuntimeCache" is not defined'],
    "prepare": ['"type[BuilderFlag]" has no attribute "REQUIRE_USER_ALLOCATION"'],
    "_set_compute_capabilities": [
        'Module has no attribute "ComputeCapability"',
        '"IBuilderConfig" has no attribute "num_compute_capabilities"',
        '"IBuilderConfig" has no attribute "set_compute_capability"',
    ],
}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which TensorRT's bindings can be imported."""
    if COMPILER is None:
        pytest.skip("TensorRT's bindings need stub libraries: no C compiler (cc or gcc) is installed")
    return build_stubs(tmp_path_factory.mktemp("stubs"))


def interface_of(module: str, folder: Path, **environment: str) -> str:
    """The types of a compiled module, as mypy reads them. pybind11 takes and gives more than stubgen writes."""
    arguments = ("--inspect-mode", "-m", module, "-o", folder)
    environment |= {"TMPDIR": "/tmp"}  # a socket of stubgen lies there, and its path has 107 bytes at most
    done = run_process("-c", "from mypy.stubgen import main; main()", *arguments, **environment)
    assert done.returncode == 0, f"{module} cannot be read, is the extra `dev` installed? {done.stderr}"
    text = folder.joinpath(*module.split(".")).with_suffix(".pyi").read_text()
    text = re.sub(r"^bool: DataType\n", "", text, flags=re.MULTILINE)  # hides the type
    text = re.sub(r"(?<!class )\bDims\b", "tuple[int, ...]", text).replace("typing.SupportsInt", "int")
    text = text.replace("class IHostMemory:", "class IHostMemory(typing_extensions.Buffer):")
    ours = r"^    (?=def (log|phase_start|phase_finish|step_complete)\()"  # what the library calls
    text = re.sub(ours, "    @abc.abstractmethod\n    ", text, flags=re.MULTILINE)
    return "import abc\n" + text.replace("channel_axis: int)", "channel_axis: int = ...)")  # behind a default


@pytest.fixture(scope="module")
def tensorrt(stubs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return interface_of("tensorrt_bindings.tensorrt", tmp_path_factory.mktemp("tensorrt"), **stubs)


@pytest.fixture(scope="module")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("tensorrt_rtx", reason="pip install vlmdeploy[rtx]")
    return interface_of("tensorrt_rtx_bindings.tensorrt_rtx", tmp_path_factory.mktemp("rtx"))


def problems(interface: str, sources: Mapping[str, str], folder: Path) -> list[tuple[str, str, str]]:
    """(file, function, what is wrong there) of all that mypy reports in the sources, in their order."""
    (folder / "tensorrt.pyi").write_text(interface)
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(HELD_MODULE.sub("trt.", text))
    done = subprocess.run([sys.executable, "-m", "mypy", *MYPY, *sources], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found, function = [], ""
    for line in done.stdout.splitlines():
        if place := re.search(r': note: (?:In (?:member|function) "(\w+)"|In class|At top level)', line):
            function = place[1] or ""
        elif (error := re.fullmatch(r"(\S+\.py):\d+: error: (.*)", line)) and error[1] in sources:
            found.append((error[1], function, error[2]))
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Every file of ours that could hold an object of TensorRT."""
    texts = {str(path.relative_to(SOURCE)): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}
    return {f"vlmdeploy/{name}": text for name, text in texts.items() if LIBRARY.search(text)}


def test_rtx_has_every_name(sources: dict[str, str], rtx: str, tmp_path: Path) -> None:
    assert problems(rtx, sources, tmp_path) == []


def test_tensorrt_has_every_name_that_is_not_of_rtx_alone(
    sources: dict[str, str], tensorrt: str, tmp_path: Path
) -> None:
    found = [(function, problem) for _, function, problem in problems(tensorrt, sources, tmp_path)]
    assert sorted(found) == sorted((function, each) for function, several in RTX_ONLY.items() for each in several)


# The last name of every chain that our source goes along.
LAST_NAMES = (
    "log", "step_complete", "parse", "desc", "ATTENTION_INPUT", "causal_kind", "key_value_lengths", "LOWER_RIGHT",
    "set_shape", "get_dimension_name", "build_serialized_network", "execute_async_v3", "USER_MANAGED",
    "get_device_memory_size_for_profile_v2", "get_creator",
)  # fmt: skip


def test_objects_have_types_along_every_chain(sources: dict[str, str], rtx: str, tmp_path: Path) -> None:
    """Were the last name another one, mypy would say so."""
    names = re.compile(rf"\b({'|'.join(LAST_NAMES)})\b")
    renamed = {file: names.sub(r"no_\1", text) for file, text in sources.items()}
    told = " ".join(problem for *_, problem in problems(rtx, renamed, tmp_path))
    assert [name for name in LAST_NAMES if f'{name}"' not in told] == []


def test_both_say_the_same_of_what_we_call(sources: dict[str, str], tensorrt: str, rtx: str) -> None:
    """TensorRT may have more ways to call a method; those of RTX it has too, argument for argument."""
    names = set(re.findall(r"\.(\w+)\(", "".join(sources.values())))
    ours, theirs = members(rtx), members(tensorrt)
    shared = [key for key in ours.keys() & theirs.keys() if key[1] in names]
    assert len(shared) > 30
    assert [(key, ours[key] - theirs[key]) for key in shared if not ours[key] <= theirs[key]] == []


def members(interface: str) -> dict[tuple[str, str], set[str]]:
    """(class, method) -> its signatures."""
    found: dict[tuple[str, str], set[str]] = {}
    for owner, body in re.findall(r"^class (\w+).*:\n((?:    .*\n|\n)*)", interface, re.MULTILINE):
        for name, signature in re.findall(r"^    def (\w+)(.*)", body, re.MULTILINE):
            found.setdefault((owner, name), set()).add(signature)
    return found


# What must be reported -> the statement that it is in, of a function that is given what there is.
MISTAKES = {
    'Module has no attribute "Bulider"': "library.module.Bulider(1)",
    '"ICudaEngine" has no attribute "run"': "runtime.deserialize_cuda_engine(b'').run()",
    '"ITensor" has no attribute "size"': "[tensor.size for tensor in [network.get_input(i) for i in (0, 1)]]",
    '"IExecutionContext" has no attribute "run"': "contexts[0].run()",
    'Unexpected keyword argument "flag" for "create_network" of "Builder"': "builder.create_network(flag=0)",
    'Too many arguments for "set_device_memory" of "IExecutionContext"': "contexts[0].set_device_memory(1, 2, 3)",
    'Property "engine" defined in "IExecutionContext" is read-only': "contexts[0].engine = 1",
    'No overload variant of "set_input_shape" of "IExecutionContext" matches': "contexts[0].set_input_shape('rows')",
    'Explicit "Any" is not allowed': "def refit(refitter: Any) -> None: ...",
    'Signature of "log" incompatible with supertype "tensorrt.ILogger"': (
        "class Log(library.module.ILogger):\n        def log(self, text: str) -> None: ..."
    ),
    'Cannot instantiate abstract class "Log" with abstract attribute "log"': (
        "class Log(library.module.ILogger):\n        def write(self, text: str) -> None: ...\n    Log()"
    ),
}
GIVEN = """from typing import Any
import tensorrt as trt
def f(
    builder: trt.Builder, network: trt.INetworkDefinition, runtime: trt.Runtime, contexts: list[trt.IExecutionContext]
) -> None:
    """


def test_name_or_call_that_does_not_exist_is_reported(tensorrt: str, tmp_path: Path) -> None:
    sources = {f"mistake_{place}.py": f"{GIVEN}{text}\n" for place, text in enumerate(MISTAKES.values())}
    found = {name: problem for name, _, problem in problems(tensorrt, sources, tmp_path)}
    for name, mistake in zip(sources, MISTAKES, strict=True):
        assert found[name].startswith(mistake)


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
    TensorrtLibrary("tensorrt", module, "11.4.0").prepare(config, ())  # type: ignore[arg-type]
    assert limits == [("workspace", 1 << 30)]
