"""Contract: the C++ of the TensorRT plugin, built and run with stand-ins for CUDA's driver and TensorRT's headers, and
with TensorRT's own headers where they are (TENSORRT_INCLUDE names their folder, else /usr/include is searched)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.compiled_example import write_compiled
from vlmdeploy.runtime.backends.plugin_library import read_plugin_info

PLUGINS = Path(__file__).parents[1] / "plugins"
STUB = PLUGINS / "tests" / "stub"
COMPILER = shutil.which("c++") or shutil.which("g++")
CMAKE = shutil.which("cmake")
LAUNCHER = ("src/launcher.cpp", "src/kernel_table.cpp")
ADAPTER = (*LAUNCHER, "src/shapes.cpp", "src/routed_plugin.cpp", "src/routed_creator.cpp", "src/plugin_log.cpp")
DRIVER_FUNCTIONS = (
    "cuCtxGetCurrent", "cuCtxGetId", "cuDeviceGetAttribute", "cuModuleLoadData", "cuModuleGetFunction",
    "cuFuncSetAttribute", "cuLaunchKernel", "cuGetErrorString",
)  # fmt: skip


# A GPU of compute capability 8.7 that says what is launched.
DRIVER = r"""
#include <stdio.h>
int cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
int cuCtxGetId(void *context, unsigned long long *id) { *id = 1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 7; return 0; }
int cuModuleLoadData(void **module, const char *image) { *module = 0; return printf("load %.31s\n", image) < 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)name; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { printf("shared %d\n", value); return 0; }
int cuLaunchKernel(const char *name, unsigned x, unsigned y, unsigned z) { printf("%s %u %u\n", name, x, y); return 0; }
int cuGetErrorString(int error, const char **text) { return 1; }
"""
LOADED = [
    "vlmdeploy RoutedPartition 1",
    "vlmdeploy RoutedLinear 1",
    "load routed_gemv.fp16.g128 87",
    "load routed_gemm.fp16.g128.16x64 87",
    "load routed_gemm.fp16.g128.64x64 87",
    "shared 65536",
    "shapes 0",
    "routed_gemm_fp16_g128_16x64 2 4",
    "enqueued 0",
]


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


def build_driver(folder: Path, source: str) -> None:
    """A libcuda.so.1 of ours."""
    command = [str(COMPILER), "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), "-xc", "-"]
    subprocess.run(command, input=source, text=True, check=True)


def run_driver_test(folder: Path, *functions: str, with_library: bool = True) -> str:
    """What the program says where libcuda.so.1 is one of ours with these functions, each giving 0."""
    program = compile_program(folder, "driver_test", ("src/cuda_driver.cpp",))
    (folder / "libcuda.so.1").write_text("not a library")
    if with_library:
        source = "".join(f"int {name}(void) {{ return 0; }}\n" for name in functions)
        build_driver(folder, source + "int cuCtxGetDevice(int *device) { *device = 5; return 0; }\n")
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
def test_cmake_builds_a_library_that_can_be_loaded_and_launches(tmp_path: Path) -> None:
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
    program = compile_program(tmp_path, "library_test", (), headers, STUB / "cuda")
    build_driver(tmp_path, DRIVER)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([str(program), str(path)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == LOADED


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
