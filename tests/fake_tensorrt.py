"""A GPU and a TensorRT-RTX made of host memory and ONNX Runtime, so that everything but the engines' numbers is tested.

The device hands out addresses of host memory and refuses those it never gave or took back. A "plan" is the JSON of
what to run; its context reads and writes at the addresses it was given, as an engine does: in place, within its
profiles, and not before a captured graph is launched.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from vlmdeploy.bundle import hash_file, read_manifest, write_manifest
from vlmdeploy.export.engines.parts import EnginePart, cut
from vlmdeploy.manifest import EngineInfo, Manifest
from vlmdeploy.runtime.backends.cuda_device import Buffer
from vlmdeploy.runtime.backends.ort import import_onnxruntime, session_options
from vlmdeploy.runtime.backends.trt import TrtBackend
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.session import Session

NUMPY_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32
}  # fmt: skip
SCRATCH = {"vision": 4096, "decoder_text": 1024, "decoder_vision": 2048, "decoder": 3072}


@dataclass
class FakeDevice:
    """Host memory by address. `log` lists what was done, `capturing` collects what a graph will run."""

    compute_capability: str = "8.6"
    name: str = "Fake RTX 4060"
    memory_bytes: int = 8 << 30
    stream: int = 7
    memory: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    capturing: list[Callable[[], None]] | None = None
    is_running: bool = False  # until somebody waits for it

    def free_bytes(self) -> int:
        return self.memory_bytes - self.used_bytes()

    def used_bytes(self) -> int:
        return sum(block.nbytes for block in self.memory.values())

    def allocate(self, size: int) -> Buffer:
        block = np.zeros(max(size, 1), np.uint8)
        self.memory[block.ctypes.data] = block
        return Buffer(block.ctypes.data, size)

    def free(self, buffer: Buffer) -> None:
        del self.memory[buffer.address]

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        assert self.capturing is None, "a copy from memory that may be gone when the graph is launched"
        self.view(buffer.address, array.nbytes)[:] = np.frombuffer(array.tobytes(), np.uint8)

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        self.is_running = False
        array[...] = self.view(buffer.address, array.nbytes).view(array.dtype).reshape(array.shape)

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """The memory at an address; it must have been given out, and hold so much."""
        assert address in self.memory, f"{address} was never allocated, or was freed"
        assert size <= self.memory[address].nbytes, f"{size} bytes at a buffer of {self.memory[address].nbytes}"
        return self.memory[address][:size]

    def synchronize(self) -> None:
        assert self.capturing is None, "a stream that is captured cannot be waited for"
        self.is_running = False

    def capture(self, enqueue: Callable[[], None]) -> list[Callable[[], None]]:
        self.log.append("capture")
        self.capturing = []
        enqueue()
        captured, self.capturing = self.capturing, None
        return captured

    def launch(self, graph: list[Callable[[], None]]) -> None:
        self.log.append("launch")
        self.is_running = True
        for run in graph:
            run()

    def discard(self, graph: list[Callable[[], None]]) -> None:
        assert not self.is_running, "a graph goes that may be running"
        self.log.append("discard")
        graph.clear()

    def close(self) -> None:
        self.log.append("close")

    def submit(self, run: Callable[[], None]) -> None:
        """Run now, or when the captured graph is launched."""
        if self.capturing is None:
            self.is_running = True
            run()
        else:
            self.capturing.append(run)


class FakeContext:
    """Runs one plan within one profile."""

    def __init__(self, engine: "FakeEngine", device: FakeDevice) -> None:
        self.engine = engine
        self.device = device
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == self.device.stream

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if name not in self.engine.inputs or not self.engine.takes(self.profile, name, tuple(shape)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def execute_async_v3(self, stream: int) -> bool:
        if stream != self.device.stream:
            return False
        self._check_that_only_the_cache_is_in_place()
        shapes, addresses, (scratch, _) = dict(self.shapes), dict(self.addresses), self.scratch
        self.device.submit(lambda: self.run(shapes, addresses, scratch))
        return True

    def _check_that_only_the_cache_is_in_place(self) -> None:
        for output in self.engine.outputs:
            shared = {name for name in self.engine.inputs if self.addresses[name] == self.addresses[output]}
            past = {output.replace("present_", "past_")} if output.startswith("present_") else set()
            assert shared == past, f"{self.engine.name} writes {output} where it reads {shared}"

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], scratch: int) -> None:
        self.device.view(scratch, SCRATCH[self.engine.graph])
        self.device.log.append(f"{self.engine.name}[{self.profile}]")
        if self.engine.kernels is not None:
            self.engine.kernels.finished.add(f"{self.engine.name}[{self.profile}]")
        feeds = {}
        for name, value in self.engine.inputs.items():
            shape = shapes.get(name) or tuple(value.shape)
            assert all(isinstance(length, int) for length in shape), f"{name} has no shape"
            kind = np.dtype(NUMPY_TYPES[value.type])
            content = self.device.view(addresses[name], int(np.prod(shape)) * kind.itemsize)
            feeds[name] = content.view(kind).reshape(shape).copy()
        for name, output in zip(self.engine.outputs, self.engine.session.run(None, feeds), strict=True):
            self.device.view(addresses[name], output.nbytes)[:] = output.reshape(-1).view(np.uint8)


class FakeRtxContext(FakeContext):
    """Says whether it can be captured, which only TensorRT-RTX does."""

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.is_capturable and stream == self.device.stream


class FakeEngine:
    """A loaded plan."""

    num_optimization_profiles = 2
    is_capturable = True
    kernels: "FakeKernels | None" = None

    def __init__(self, plan: dict[str, Any], device: FakeDevice, config: "type[FakeConfig]") -> None:
        onnxruntime = import_onnxruntime()
        self.device = device
        self.create_runtime_config = config
        self.graph, self.name, self.profiles = plan["graph"], plan["name"], plan["profiles"]
        model = onnx.load(plan["file"], load_external_data=False)
        if plan["layers"] is not None:
            model = cut(model, tuple(plan["layers"]), plan["num_layers"])
        options = session_options(onnxruntime, 1)
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(Path(plan["file"]).parent))
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        device.log.append(f"load {self.name}")

    def get_tensor_name(self, index: int) -> str:
        return str(self.names[index])

    def get_tensor_location(self, name: str) -> str:
        return "device" if name in self.names else "host"

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present_", "past_") if name.startswith("present_") else None

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH[self.graph] // (1 + profile)

    def create_execution_context(self, config: "FakeConfig") -> FakeContext:
        assert config.strategy == "user managed"
        self.kernels = getattr(config, "kernels", None)
        return (
            FakeRtxContext(self, self.device) if isinstance(config, FakeRtxConfig) else FakeContext(self, self.device)
        )

    def takes(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a profile allows a shape, as the engine was built."""
        named = dict(zip(self.inputs[name].shape, shape, strict=True))
        limits = self.profiles[profile]
        return all(
            limits[key][0] <= length <= limits[key][1] if isinstance(key, str) else key == length
            for key, length in named.items()
        )


@dataclass
class FakeConfig:
    """Remembers the strategy of an engine."""

    strategy: str = ""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


@dataclass
class FakeRtxConfig(FakeConfig):
    """Remembers the kernels too, which only TensorRT-RTX has."""

    kernels: "FakeKernels | None" = None
    dynamic_shapes_kernel_specialization_strategy: str = "lazy"

    def create_runtime_cache(self) -> "FakeKernels":
        return FakeKernels()

    def set_runtime_cache(self, kernels: "FakeKernels") -> bool:
        self.kernels = kernels
        return True


@dataclass
class FakeKernels:
    """The profiles whose kernels were finished for a GPU."""

    finished: set[str] = field(default_factory=set)

    def deserialize(self, content: bytes) -> bool:
        self.finished = set(content.decode().split())
        return True

    def serialize(self) -> bytes:
        return " ".join(sorted(self.finished)).encode()


def fake_library(device: FakeDevice, name: str = "tensorrt_rtx", version: str = "1.7.1") -> TensorrtLibrary:
    """A library whose runtime loads fake plans onto the device."""
    config = FakeRtxConfig if name == "tensorrt_rtx" else FakeConfig

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
            try:
                return FakeEngine(json.loads(bytes(plan)), device, config)
            except ValueError:
                self.logger.log(SimpleNamespace(__str__=lambda: "ERROR"), "not a plan")
                return None

    class Logger:
        def __init__(self) -> None:
            pass

    module = SimpleNamespace(
        Runtime=Runtime, ILogger=Logger, TensorLocation=SimpleNamespace(DEVICE="device"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(LAZY="lazy", EAGER="eager"),
    )  # fmt: skip
    return TensorrtLibrary(name, module, version)  # type: ignore[arg-type]


def write_fake_engines(
    folder: Path, parts: list[EnginePart], chunk_rows: int, logit_rows: int, batch: int = 1
) -> Manifest:
    """Give a bundle fake plans in place of engines, as `vlmdeploy build` would real ones."""
    manifest = read_manifest(folder)
    (folder / "engines").mkdir()
    engines = {}
    for part in parts:
        path = folder / "engines" / f"{part.name}.engine"
        lanes = {"batch": (1, batch), "tokens": (1, batch * chunk_rows)}
        prompt = {"rows": (1, chunk_rows), "asked": (1, logit_rows), "images": (1, 1), **lanes}
        one_token = {"rows": (1, 1), "asked": (1, batch), "batch": (1, batch), "tokens": (1, batch)}
        plan = {
            "file": str(folder / manifest.graphs[part.graph].file), "graph": part.graph, "name": part.name,
            "layers": None if part.is_whole else part.layers, "num_layers": manifest.cache.num_layers,
            "profiles": [prompt, one_token],
        }  # fmt: skip
        path.write_text(json.dumps(plan))
        engines[part.name] = EngineInfo(
            f"engines/{path.name}", part.graph, part.part, part.layers, "tensorrt_rtx", "1.7.1", (), chunk_rows,
            logit_rows, manifest.context_tokens, batch,
        )  # fmt: skip
    files = manifest.files | {info.file: hash_file(folder / info.file) for info in engines.values()}

    built = replace(manifest, engines=engines, files=files)
    write_manifest(folder, built)
    return built


def open_fake(
    folder: Path, residency: str = "all", name: str = "tensorrt_rtx", version: str = "1.7.1",
    device: FakeDevice | None = None,
) -> tuple[Session, FakeDevice]:  # fmt: skip
    """A session on a bundle with fake plans, and its device."""
    files, device = check_bundle(folder), device or FakeDevice()
    backend = TrtBackend(files, residency, fake_library(device, name, version), device)  # type: ignore[arg-type]
    return Session(files, backend), device
