"""Device profiles: memory, bandwidth and compute of the GPUs that bundles target, with the source of each figure.

All figures are NVIDIA's, or follow from them by arithmetic; none was measured here. Tensor-core rates are dense:
NVIDIA's "with sparsity" figures are halved. A figure without a source is None.
"""

from dataclasses import dataclass
from typing import Literal

from vlmdeploy.errors import ConfigError

Kind = Literal["jetson", "rtx", "datacenter"]
Engine = Literal["tensorrt", "tensorrt_rtx"]

MIB = 1024**2
GIB = 1024**3

# Our estimates. A Jetson runs Linux from the same memory: without a desktop 0.6 to 1.3 GiB at rest in public tegrastats
# logs, so 1 GiB, and 0.5 GiB for CUDA's context, the engine library and Python. A card loses CUDA's context alone.
RESERVED_UNIFIED_BYTES = 3 * GIB // 2
RESERVED_CARD_BYTES = GIB // 2


@dataclass(frozen=True)
class Citation:
    """A source: a document, what it says, and the fields of Device that it supports.

    is_checked: the text, or a quotation of it, was read for this table. False: document and figure are from memory and
    agree with the rest of the row; look them up before you depend on them.
    """

    document: str
    says: str
    figures: tuple[str, ...]
    is_checked: bool


@dataclass(frozen=True)
class PowerMode:
    """A mode of a Jetson's `nvpmodel`, by the name it prints; watts None: no budget, bandwidth None: undocumented.

    Both rates are as in Device, from the mode's memory clock, active SMs and GPU clock. They are ceilings: the budget
    may force lower clocks. is_super: requires a -super flash and a carrier that cools it.
    """

    name: str
    watts: int | None
    bandwidth_bytes_per_s: float | None
    fp16_flop_per_s: float
    is_super: bool = False


@dataclass(frozen=True)
class Software:
    """The minimum JetPack and TensorRT of the TensorRT target on a Jetson.

    is_named: NVIDIA's TensorRT pages name this module; else JetPack supports it and TensorRT 11 may not.
    """

    jetpack: str
    tensorrt: str
    is_named: bool


@dataclass(frozen=True)
class Device:
    """A graphics card, or a Jetson module in the fastest power mode of its standard (not -super) flash.

    memory_bytes: as sold, "1 GB" being 2**30 bytes. visible_bytes: what Linux (Jetson) or the driver (card) counts.
    bandwidth_bytes_per_s: peak; bus_bits and pin_bits_per_s are the width and the data rate that give it.
    fp16_flop_per_s: dense tensor-core float16 with float32 accumulation, a multiply-add being two.
    int8_op_per_s: dense int8 of the GPU, without the DLAs that a Jetson's headline TOPS include and we do not use.
    num_sms, clock_hz: streaming multiprocessors, and the clock at which those two rates hold.
    """

    name: str
    title: str
    kind: Kind
    compute_capability: str
    memory_bytes: int
    visible_bytes: int
    bandwidth_bytes_per_s: float
    bus_bits: int | None
    pin_bits_per_s: float | None
    fp16_flop_per_s: float
    int8_op_per_s: float | None
    num_sms: int
    clock_hz: float | None
    sources: tuple[Citation, ...]
    software: Software | None = None
    power_modes: tuple[PowerMode, ...] = ()

    @property
    def is_unified(self) -> bool:
        """Whether the GPU shares its memory with the CPU."""
        return self.kind == "jetson"

    @property
    def usable_bytes(self) -> int:
        """Realistic memory for weights, cache and scratch: visible_bytes minus the reserve above."""
        return self.visible_bytes - (RESERVED_UNIFIED_BYTES if self.is_unified else RESERVED_CARD_BYTES)

    @property
    def engine(self) -> Engine:
        """The library that builds and runs engines: TensorRT-RTX on RTX cards, TensorRT elsewhere."""
        return "tensorrt_rtx" if self.kind == "rtx" else "tensorrt"


def names() -> list[str]:
    """The names of all devices, in table order."""
    return [device.name for device in DEVICES]


def device(name: str) -> Device:
    """Find a device by name, ignoring case. Raises ConfigError, listing the names, if there is none."""
    found = [device for device in DEVICES if device.name == name.lower()]
    if not found:
        raise ConfigError(f"device {name!r} is not known: choose one of {', '.join(names())}")
    return found[0]


def _read(document: str, says: str, *figures: str) -> Citation:
    return Citation(document, says, figures, is_checked=True)


def _recalled(document: str, says: str, *figures: str) -> Citation:
    return Citation(document, says, figures, is_checked=False)


def _tegrastats(total_mib: int) -> Citation:
    return _read("tegrastats in public logs", f"RAM .../{total_mib}MB; its MB is 2**20 bytes", "visible_bytes")


def _nvidia_smi(total_mib: int) -> Citation:
    return _read("nvidia-smi in public logs", f"{total_mib}MiB in all", "visible_bytes")


def _orin_mode(
    name: str, watts: int | None, memory_mhz: float, bus_bits: int, sms: int, gpu_mhz: float, is_super: bool = False
) -> PowerMode:
    """A mode of an Orin: LPDDR5 moves two bits per clock and pin; an SM does 1024 dense float16 FMAs per clock."""
    return PowerMode(name, watts, memory_mhz * 1e6 * 2 * bus_bits / 8, sms * 2048 * gpu_mhz * 1e6, is_super)


def _thor_mode(name: str, watts: int | None, sms: int, gpu_mhz: float) -> PowerMode:
    """A mode of Thor: an SM does 4096 dense float16 FMAs per clock; the memory clocks of the modes were not found."""
    return PowerMode(name, watts, None, sms * 8192 * gpu_mhz * 1e6)


MEMORY = ("memory_bytes", "bandwidth_bytes_per_s", "bus_bits", "pin_bits_per_s")
RATES = ("fp16_flop_per_s", "int8_op_per_s")
CORES = ("num_sms", "clock_hz")

ORIN_TABLE = "developer.nvidia.com/embedded/jetson-modules, comparison and performance tables (quoted by others)"
THOR_PAGE = "www.nvidia.com/en-us/autonomous-machines/embedded-systems/jetson-thor (quoted by others)"
ORIN_POWER = (
    "docs.nvidia.com/jetson/archives/r36.4.3/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonOrinNanoSeries"
    "JetsonOrinNxSeriesAndJetsonAgxOrinSeries.html (quoted by others); SM masks from nvpmodel_p3701 and _p3767 .conf"
)
THOR_POWER = "docs.nvidia.com/jetson/archives/r38.4/DeveloperGuide, Platform Power and Performance (quoted by others)"
CUDA_TABLE = "developer.nvidia.com/cuda-gpus"
ADA_PAPER = "NVIDIA Ada GPU Architecture whitepaper, appendix"
BLACKWELL_PAPER = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix"
A100_PAPER = "NVIDIA A100 Tensor Core GPU Architecture whitepaper; A100 datasheet"
H100_PAPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper; H100 datasheet"

TENSORRT_PAGE = _read(
    "docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html",
    "TensorRT 11.4.1 supports JetPack 7.2.2 or later on Jetson AGX Orin and Jetson Thor, from the SBSA package",
    "software",
)
JETPACK_PAGE = _read(
    "developer.nvidia.com/embedded/jetpack/downloads/archive-7.2 (quoted by others)",
    "JetPack 7.2 adds the Jetson Orin product family to JetPack 7; it comes with TensorRT 10.16.2",
    "software",
)
NAMED = Software("7.2.2", "11.4.1", is_named=True)
NOT_NAMED = Software("7.2.2", "11.4.1", is_named=False)
ORIN_CAPABILITY = _recalled(CUDA_TABLE, "Jetson AGX Orin, Orin NX, Orin Nano: 8.7", "compute_capability")

# One row per device: three lines of figures, then their sources, then a Jetson's software and power modes.
DEVICES: tuple[Device, ...] = (
    Device(
        name="orin-nano-8", title="Jetson Orin Nano 8 GB", kind="jetson", compute_capability="8.7",
        memory_bytes=8 * GIB, visible_bytes=7620 * MIB, bus_bits=128, pin_bits_per_s=4.266e9,
        bandwidth_bytes_per_s=68e9, fp16_flop_per_s=10e12, int8_op_per_s=20e12, num_sms=8, clock_hz=625e6,
        sources=(
            _recalled("Orin Nano Series datasheet", "8 GB 128-bit LPDDR5 at 2133 MHz, 68 GB/s", *MEMORY),
            _recalled("Orin Nano Series datasheet", "40 sparse int8 TOPS, so 20 dense, float16 half", *RATES),
            _read(ORIN_POWER, "8 SMs at 625 MHz in 15W; -super: memory at 3199 MHz", *CORES, "power_modes"),
            _tegrastats(7620), ORIN_CAPABILITY, JETPACK_PAGE, TENSORRT_PAGE,
        ),
        software=NOT_NAMED,
        power_modes=(
            _orin_mode("15W", 15, 2133, 128, 8, 625),
            _orin_mode("7W", 7, 2133, 128, 4, 408),
            _orin_mode("25W", 25, 3199, 128, 8, 918, is_super=True),
            _orin_mode("MAXN_SUPER", None, 3199, 128, 8, 1020, is_super=True),
        ),
    ),
    Device(
        name="orin-nx-16", title="Jetson Orin NX 16 GB", kind="jetson", compute_capability="8.7",
        memory_bytes=16 * GIB, visible_bytes=15656 * MIB, bus_bits=128, pin_bits_per_s=6.4e9,
        bandwidth_bytes_per_s=102.4e9, fp16_flop_per_s=15e12, int8_op_per_s=30e12, num_sms=8, clock_hz=918e6,
        sources=(
            _read(ORIN_TABLE, "16 GB 128-bit LPDDR5, 102.4 GB/s", *MEMORY),
            _recalled("Orin NX Series datasheet", "100 sparse int8 TOPS, 60 the GPU's: 30 dense, float16 half", *RATES),
            _read(ORIN_POWER, "8 SMs at 918 MHz in MAXN; memory at 3200 MHz, in 10W 2133", *CORES, "power_modes"),
            _tegrastats(15656), ORIN_CAPABILITY, JETPACK_PAGE, TENSORRT_PAGE,
        ),
        software=NOT_NAMED,
        power_modes=(
            _orin_mode("MAXN", None, 3200, 128, 8, 918),
            _orin_mode("10W", 10, 2133, 128, 4, 612),
            _orin_mode("15W", 15, 3200, 128, 4, 612),
            _orin_mode("25W", 25, 3200, 128, 8, 408),
            _orin_mode("40W", 40, 3200, 128, 8, 1173, is_super=True),
            _orin_mode("MAXN_SUPER", None, 3200, 128, 8, 1173, is_super=True),
        ),
    ),
    Device(
        name="agx-orin-32", title="Jetson AGX Orin 32 GB", kind="jetson", compute_capability="8.7",
        memory_bytes=32 * GIB, visible_bytes=30697 * MIB, bus_bits=256, pin_bits_per_s=6.4e9,
        bandwidth_bytes_per_s=204.8e9, fp16_flop_per_s=27e12, int8_op_per_s=54e12, num_sms=14, clock_hz=930.75e6,
        sources=(
            _read(ORIN_TABLE, "32 GB 256-bit LPDDR5, 204.8 GB/s", *MEMORY),
            _read(ORIN_TABLE, "200 sparse int8 TOPS, 108 of the GPU: 54 dense, float16 half", *RATES),
            _read(ORIN_POWER, "14 SMs at 930.75 MHz in MAXN; JetPack 7.2 adds MAXN_SUPER (241 TOPS, GPU 1.3 GHz)",
                  *CORES, "power_modes"),
            _tegrastats(30697), ORIN_CAPABILITY, TENSORRT_PAGE,
        ),
        software=NAMED,
        power_modes=(
            _orin_mode("MAXN", None, 3200, 256, 14, 930.75),
            _orin_mode("MODE_15W", 15, 2133, 256, 6, 408),
            _orin_mode("MODE_30W", 30, 3200, 256, 8, 612),
            _orin_mode("MODE_40W", 40, 3200, 256, 14, 816),
            _orin_mode("MAXN_SUPER", None, 3200, 256, 14, 1300, is_super=True),
        ),
    ),
    Device(
        name="agx-orin-64", title="Jetson AGX Orin 64 GB", kind="jetson", compute_capability="8.7",
        memory_bytes=64 * GIB, visible_bytes=62841 * MIB, bus_bits=256, pin_bits_per_s=6.4e9,
        bandwidth_bytes_per_s=204.8e9, fp16_flop_per_s=42.5e12, int8_op_per_s=85e12, num_sms=16, clock_hz=1.3e9,
        sources=(
            _read(ORIN_TABLE, "64 GB 256-bit LPDDR5, 204.8 GB/s", *MEMORY),
            _read(ORIN_TABLE, "275 sparse int8 TOPS, 170 of the GPU: 85 dense, float16 half (given as 43)", *RATES),
            _read(ORIN_TABLE, "2048 cores, so 16 SMs, at 1.3 GHz", *CORES),
            _read("nvpmodel_p3701_0000.conf of Jetson Linux", "clock limits and SM masks of the modes", "power_modes"),
            _tegrastats(62841), ORIN_CAPABILITY, TENSORRT_PAGE,
        ),
        software=NAMED,
        power_modes=(
            _orin_mode("MAXN", None, 3200, 256, 16, 1300),
            _orin_mode("MODE_15W", 15, 2133, 256, 6, 408),
            _orin_mode("MODE_30W", 30, 3200, 256, 8, 612),
            _orin_mode("MODE_50W", 50, 3200, 256, 16, 816),
        ),
    ),
    Device(
        name="thor", title="Jetson AGX Thor, T5000", kind="jetson", compute_capability="11.0",
        memory_bytes=128 * GIB, visible_bytes=125772 * MIB, bus_bits=256, pin_bits_per_s=8.533e9,
        bandwidth_bytes_per_s=273e9, fp16_flop_per_s=258.75e12, int8_op_per_s=None, num_sms=20, clock_hz=1.575e9,
        sources=(
            _read(THOR_PAGE, "128 GB 256-bit LPDDR5X, 273 GB/s; the data rate follows", *MEMORY),
            _read(THOR_PAGE, "2070 sparse FP4 TFLOPS: 1/8 is dense float16; int8 not given", "fp16_flop_per_s"),
            _read("a device's own report in public logs", "20 SMs; GPU max_freq 1575000000 (guide: 1386)", *CORES),
            _read("a device's own report in public logs", "NVIDIA Thor (SM 11.0)", "compute_capability"),
            _read(THOR_POWER, "20 SMs at 1386 MHz in MAXN and 120W, 12 at 1530 MHz in 90W and 70W", "power_modes"),
            _tegrastats(125772), TENSORRT_PAGE,
        ),
        software=NAMED,
        power_modes=(
            _thor_mode("MAXN", None, 20, 1386),
            _thor_mode("120W", 120, 20, 1386),
            _thor_mode("90W", 90, 12, 1530),
            _thor_mode("70W", 70, 12, 1530),
        ),
    ),
    Device(
        name="rtx-4060-ti-16", title="GeForce RTX 4060 Ti 16 GB", kind="rtx", compute_capability="8.9",
        memory_bytes=16 * GIB, visible_bytes=16380 * MIB, bus_bits=128, pin_bits_per_s=18e9,
        bandwidth_bytes_per_s=288e9, fp16_flop_per_s=44.1e12, int8_op_per_s=176.5e12, num_sms=34, clock_hz=2.535e9,
        sources=(
            _recalled("GeForce RTX 4060 Ti product page", "16 GB GDDR6, 128-bit at 18 Gbps, 288 GB/s", *MEMORY),
            _recalled("GeForce RTX 4060 Ti product page, ratios of " + ADA_PAPER,
                      "353 AI TOPS (sparse 8-bit): 1/2 is dense int8, 1/8 float16 with float32 sums", *RATES),
            _recalled("GeForce RTX 4060 Ti product page", "4352 cores, so 34 SMs, boost 2535 MHz", *CORES),
            _nvidia_smi(16380), _recalled(CUDA_TABLE, "8.9", "compute_capability"),
        ),
    ),
    Device(
        name="rtx-4080", title="GeForce RTX 4080", kind="rtx", compute_capability="8.9",
        memory_bytes=16 * GIB, visible_bytes=16376 * MIB, bus_bits=256, pin_bits_per_s=22.4e9,
        bandwidth_bytes_per_s=716.8e9, fp16_flop_per_s=97.5e12, int8_op_per_s=389.9e12, num_sms=76, clock_hz=2.505e9,
        sources=(
            _recalled(ADA_PAPER, "16 GB GDDR6X, 256-bit at 22.4 Gbps, 716.8 GB/s", *MEMORY),
            _recalled(ADA_PAPER, "float16 with float32 accumulation 97.5 dense, int8 389.9 dense", *RATES),
            _recalled(ADA_PAPER, "76 SMs, boost 2505 MHz", *CORES),
            _nvidia_smi(16376), _recalled(CUDA_TABLE, "8.9", "compute_capability"),
        ),
    ),
    Device(
        name="rtx-5060-ti-16", title="GeForce RTX 5060 Ti 16 GB", kind="rtx", compute_capability="12.0",
        memory_bytes=16 * GIB, visible_bytes=16311 * MIB, bus_bits=128, pin_bits_per_s=28e9,
        bandwidth_bytes_per_s=448e9, fp16_flop_per_s=47.4e12, int8_op_per_s=189.8e12, num_sms=36, clock_hz=2.572e9,
        sources=(
            _recalled("GeForce RTX 5060 Ti product page", "16 GB GDDR7, 128-bit at 28 Gbps, 448 GB/s", *MEMORY),
            _recalled("GeForce RTX 5060 Ti product page, ratios of " + BLACKWELL_PAPER,
                      "759 AI TOPS (sparse FP4): 1/4 is dense int8, 1/16 float16 with float32 sums", *RATES),
            _recalled("GeForce RTX 5060 Ti product page", "4608 cores, so 36 SMs, boost 2572 MHz", *CORES),
            _nvidia_smi(16311), _recalled(CUDA_TABLE, "12.0", "compute_capability"),
        ),
    ),
    Device(
        name="rtx-5080", title="GeForce RTX 5080", kind="rtx", compute_capability="12.0",
        memory_bytes=16 * GIB, visible_bytes=16303 * MIB, bus_bits=256, pin_bits_per_s=30e9,
        bandwidth_bytes_per_s=960e9, fp16_flop_per_s=112.6e12, int8_op_per_s=450.2e12, num_sms=84, clock_hz=2.617e9,
        sources=(
            _read(BLACKWELL_PAPER + " (quoted by others)", "16 GB GDDR7, 256-bit at 30 Gbps, 960 GB/s", *MEMORY),
            _recalled(BLACKWELL_PAPER, "float16 with float32 accumulation 112.6 dense, int8 450.2 dense", *RATES),
            _read(BLACKWELL_PAPER + " (quoted by others)", "84 SMs, boost 2.62 GHz", *CORES),
            _nvidia_smi(16303), _read("nvidia-smi in public logs", "compute capability 12.0", "compute_capability"),
        ),
    ),
    Device(
        name="l4", title="NVIDIA L4", kind="datacenter", compute_capability="8.9",
        memory_bytes=24 * GIB, visible_bytes=23034 * MIB, bus_bits=192, pin_bits_per_s=12.5e9,
        bandwidth_bytes_per_s=300e9, fp16_flop_per_s=121e12, int8_op_per_s=242.5e12, num_sms=58, clock_hz=2.04e9,
        sources=(
            _recalled("NVIDIA L4 datasheet and product brief", "24 GB GDDR6 with ECC, 192-bit, 300 GB/s", *MEMORY),
            _recalled("NVIDIA L4 datasheet", "sparse: float16 242, int8 485; the accumulation is not stated", *RATES),
            _recalled("NVIDIA L4 product brief", "7424 cores, so 58 SMs, boost 2040 MHz", *CORES),
            _nvidia_smi(23034), _recalled(CUDA_TABLE, "8.9", "compute_capability"),
        ),
    ),
    Device(
        name="a100-40", title="NVIDIA A100 SXM 40 GB", kind="datacenter", compute_capability="8.0",
        memory_bytes=40 * GIB, visible_bytes=40960 * MIB, bus_bits=5120, pin_bits_per_s=2.43e9,
        bandwidth_bytes_per_s=1555e9, fp16_flop_per_s=312e12, int8_op_per_s=624e12, num_sms=108, clock_hz=1.41e9,
        sources=(
            _recalled(A100_PAPER, "40 GB HBM2, 5120-bit at 1215 MHz DDR, 1555 GB/s", *MEMORY),
            _recalled(A100_PAPER, "float16 with float32 accumulation 312 dense, int8 624 dense", *RATES),
            _recalled(A100_PAPER, "108 SMs, boost 1410 MHz; 8.0", *CORES, "compute_capability"),
            _recalled("nvidia-smi", "40960MiB; older drivers 40536MiB", "visible_bytes"),
        ),
    ),
    Device(
        name="a100-80", title="NVIDIA A100 SXM 80 GB", kind="datacenter", compute_capability="8.0",
        memory_bytes=80 * GIB, visible_bytes=81920 * MIB, bus_bits=5120, pin_bits_per_s=3.186e9,
        bandwidth_bytes_per_s=2039e9, fp16_flop_per_s=312e12, int8_op_per_s=624e12, num_sms=108, clock_hz=1.41e9,
        sources=(
            _recalled(A100_PAPER, "80 GB HBM2e, 5120-bit at 1593 MHz DDR, 2039 GB/s", *MEMORY),
            _recalled(A100_PAPER, "float16 with float32 accumulation 312 dense, int8 624 dense", *RATES),
            _recalled(A100_PAPER, "108 SMs, boost 1410 MHz; 8.0", *CORES, "compute_capability"),
            _recalled("nvidia-smi", "81920MiB; older drivers 81251MiB", "visible_bytes"),
        ),
    ),
    Device(
        name="h100", title="NVIDIA H100 SXM 80 GB", kind="datacenter", compute_capability="9.0",
        memory_bytes=80 * GIB, visible_bytes=81559 * MIB, bus_bits=5120, pin_bits_per_s=5.238e9,
        bandwidth_bytes_per_s=3.35e12, fp16_flop_per_s=989.4e12, int8_op_per_s=1978.9e12, num_sms=132, clock_hz=1.83e9,
        sources=(
            _recalled(H100_PAPER, "80 GB HBM3, 5120-bit at 2619 MHz DDR, 3.35 TB/s", *MEMORY),
            _recalled(H100_PAPER, "float16 with float32 accumulation 989.4 dense, int8 1978.9 dense", *RATES),
            _recalled(H100_PAPER, "132 SMs, boost 1830 MHz for tensor cores; 9.0", *CORES, "compute_capability"),
            _nvidia_smi(81559),
        ),
    ),
    Device(
        name="h200", title="NVIDIA H200 SXM 141 GB", kind="datacenter", compute_capability="9.0",
        memory_bytes=141 * GIB, visible_bytes=143771 * MIB, bus_bits=None, pin_bits_per_s=None,
        bandwidth_bytes_per_s=4.8e12, fp16_flop_per_s=989.5e12, int8_op_per_s=1979e12, num_sms=132, clock_hz=None,
        sources=(
            _recalled("NVIDIA H200 datasheet", "141 GB HBM3e, 4.8 TB/s", "memory_bytes", "bandwidth_bytes_per_s"),
            _recalled("NVIDIA H200 datasheet", "sparse: float16 1979 TFLOPS, int8 3958 TOPS", *RATES),
            _recalled("NVIDIA H200 datasheet", "the H100's GPU; no clock, no bus", "num_sms", "compute_capability"),
            _nvidia_smi(143771),
        ),
    ),
)  # fmt: skip
