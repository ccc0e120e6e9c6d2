"""Contract: the C++ of the TensorRT plugin, built and run with stand-ins for CUDA's driver and TensorRT's headers, and
with TensorRT's own headers where they are (TENSORRT_INCLUDE names their folder, else /usr/include is searched)."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.compiled_example import write_compiled
from vlmdeploy.runtime.plugin_library import read_plugin_info

PLUGINS = Path(__file__).parents[1] / "plugins"
STUB = PLUGINS / "tests" / "stub"
COMPILER = shutil.which("c++") or shutil.which("g++")
CMAKE = shutil.which("cmake")
LAUNCHER = ("src/launcher.cpp", "src/kernel_table.cpp")
ADAPTER = (*LAUNCHER, "src/shapes.cpp", "src/routed_plugin.cpp")
DRIVER_FUNCTIONS = (
    "cuCtxGetCurrent", "cuCtxGetId", "cuDeviceGetAttribute", "cuModuleLoadData", "cuModuleGetFunction",
    "cuFuncSetAttribute", "cuLaunchKernel", "cuGetErrorString",
)  # fmt: skip


def tensorrt_headers() -> Path | None:
    """The folder with TensorRT's own NvInfer.h, if this machine has one."""
    named = os.environ.get("TENSORRT_INCLUDE")
    if named:
        return Path(named)
    return next((path.parent for path in sorted(Path("/usr/include").glob("*/NvInfer.h"))), None)


def compile_program(folder: Path, name: str, sources: tuple[str, ...], *includes: Path) -> Path:
    """A program of plugins/tests; any warning is an error."""
    if COMPILER is None:
        pytest.skip("the plugin needs a C++ compiler: neither c++ nor g++ is installed")
    program = folder / name
    files = [str(PLUGINS / source) for source in (*sources, f"tests/{name}.cpp")]
    places = [f"-I{PLUGINS / 'src'}", *(word for include in includes for word in ("-isystem", str(include)))]
    command = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", *places, *files, "-ldl"]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run_tests(program: Path) -> None:
    """Every test that a program lists has to be run, and to pass."""
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    source = (PLUGINS / "tests" / f"{program.name}.cpp").read_text()
    written = re.findall(r"^void ([a-z]\w+)\(\) \{", source, re.MULTILINE)
    assert written, "no tests were found"
    assert re.findall(r"^ok (\w+)$", done.stdout, re.MULTILINE) == written


def test_launcher_keeps_its_contract(tmp_path: Path) -> None:
    run_tests(compile_program(tmp_path, "launcher_test", LAUNCHER))


def test_plugins_keep_their_contract_against_the_stand_ins(tmp_path: Path) -> None:
    run_tests(compile_program(tmp_path, "adapter_test", ADAPTER, STUB / "tensorrt", STUB / "cuda"))


def test_plugins_keep_their_contract_against_the_headers_of_tensorrt(tmp_path: Path) -> None:
    headers = tensorrt_headers()
    if headers is None:
        pytest.skip("no headers of TensorRT: set TENSORRT_INCLUDE to the folder with NvInfer.h")
    run_tests(compile_program(tmp_path, "adapter_test", ADAPTER, headers, STUB / "cuda"))


def run_driver_test(folder: Path, *functions: str, with_library: bool = True) -> str:
    """What the program says where libcuda.so.1 is one of ours with these functions, each giving 0."""
    program = compile_program(folder, "driver_test", ("src/cuda_driver.cpp",))
    source = "".join(f'extern "C" int {name}(void) {{ return 0; }}\n' for name in functions)
    source += 'extern "C" int cuCtxGetDevice(int *device) { *device = 5; return 0; }\n'
    command = [str(COMPILER), "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), "-xc++", "-"]
    if with_library:
        subprocess.run(command, input=source, text=True, check=True)
    else:
        (folder / "libcuda.so.1").write_text("not a library")
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    return subprocess.run([str(program)], env=environment, capture_output=True, text=True, check=True).stdout


def test_driver_is_found_when_the_program_runs(tmp_path: Path) -> None:
    assert run_driver_test(tmp_path, *DRIVER_FUNCTIONS) == "ready, device 5\n"


def test_driver_that_is_too_old_is_named_by_what_it_lacks(tmp_path: Path) -> None:
    functions = [name for name in DRIVER_FUNCTIONS if name != "cuCtxGetId"]
    expected = "libcuda.so.1 has no cuCtxGetId: expected the driver of CUDA 12 or later\n"
    assert run_driver_test(tmp_path, *functions) == expected


def test_machine_without_a_driver_is_told_so(tmp_path: Path) -> None:
    said = run_driver_test(tmp_path, with_library=False)
    assert said.startswith("no CUDA driver: ") and "libcuda.so.1" in said


def run_cmake(*arguments: object) -> subprocess.CompletedProcess[str]:
    if COMPILER is None or CMAKE is None:
        pytest.skip("building the plugin needs a C++ compiler and cmake: they are not installed")
    return subprocess.run([CMAKE, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_cmake_builds_a_library_that_tells_what_it_is(tmp_path: Path) -> None:
    """The stand-in headers take the place of TensorRT's: nothing but TensorRT itself could tell the difference."""
    write_compiled(tmp_path / "kernels", (80, 87, 110))
    build, headers = tmp_path / "build", tensorrt_headers() or STUB / "tensorrt"
    options = [f"-DTENSORRT_ROOT={headers}", f"-DVLMDEPLOY_KERNELS={tmp_path / 'kernels'}"]
    options += ["-DVLMDEPLOY_ARCHITECTURES=87,110", "-DCMAKE_BUILD_TYPE=Debug"]
    done = run_cmake("-S", PLUGINS, "-B", build, *options)
    assert done.returncode == 0, done.stderr
    assert run_cmake("--build", build).returncode == 0
    path = build / "libvlmdeploy_routed.so"
    info = read_plugin_info(path)
    assert (info.plugin_version, info.packing, info.architectures) == ("1", 1, (87, 110))
    assert info.tensorrt.startswith(f"{info.tensorrt_major}.")
    assert ctypes.CDLL(str(path)).getCreators and ctypes.CDLL(str(path)).setLoggerFinder


@pytest.mark.parametrize(("version", "said"), [
    (None, "NvInfer.h was not found"),
    ("#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 3\n", "is of TensorRT 10.3, expected 10.9"),
    ("#define TRT_MAJOR_ENTERPRISE 9\n#define TRT_MINOR_ENTERPRISE 12\n", "is of TensorRT 9.12, expected 10.9"),
])  # fmt: skip
def test_cmake_says_which_headers_it_needs(version: str | None, said: str, tmp_path: Path) -> None:
    if version is not None:
        (tmp_path / "NvInfer.h").touch()
        (tmp_path / "NvInferVersion.h").write_text(version)
    done = run_cmake("-S", PLUGINS, "-B", tmp_path / "build", f"-DTENSORRT_ROOT={tmp_path}")
    assert done.returncode != 0
    assert said in " ".join(done.stderr.split())


def test_cmake_says_where_it_looked_for_kernels(tmp_path: Path) -> None:
    options = (f"-DTENSORRT_ROOT={STUB / 'tensorrt'}", f"-DVLMDEPLOY_KERNELS={tmp_path}")
    done = run_cmake("-S", PLUGINS, "-B", tmp_path / "build", *options)
    assert done.returncode != 0
    assert f"{tmp_path} holds no compiled kernels" in " ".join(done.stderr.split())
