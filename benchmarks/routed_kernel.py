"""The routed int4 kernels on a GPU: are they correct, and how fast against the memory bandwidth and fp16 cuBLAS?

    python benchmarks/routed_kernel.py            # a few minutes; writes benchmarks/results/routed_kernel_<GPU>.md
    python benchmarks/routed_kernel.py --tune     # first searches block shapes, and writes the best into the table

Times all four linears of a decoder layer at the widths of CogVLM-17B and CogVLM2-19B, against cuBLAS (one fp16 product
per expert, with rows gathered before and scattered after) and against the time for its bytes at the bandwidth of a copy
in the same run. Flushes the cache before each launch. Exits with status 1 if a kernel is wrong. Without a CUDA device
it says so. Never run on a GPU yet.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmdeploy.errors import VlmdeployError
from vlmdeploy.kernels.block_shapes import TABLE, BlockShape, BlockShapes, shapes_of
from vlmdeploy.kernels.launch import Route, RoutedWeights, launch, partition

Clock = Callable[[Callable[[], object]], float]  # median seconds of a piece of work on the device

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 128
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2306, 4096)  # 2306: a prompt of CogVLM2 with a picture
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
CHECKED_ROWS = (1, 2, 37, 300)  # at least one for each kernel
DECODE_ROWS, PREFILL_ROWS, PREFILL_SHARE = 1, 2306, 0.5
TARGETS = {"of the memory bound, decode": 0.8, "times the fp16 pair, decode": 3.0, "of its FLOP rate, prefill": 0.8}
REPEATS = 20
FLUSHED_BYTES = 256 * 2**20
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUM_ROUNDING = 2e-6  # relative to the summed magnitudes: float32 sums in another order


@dataclass(frozen=True)
class Layer:
    """The widths [in, out] of a decoder layer's linears."""

    name: str
    linears: dict[str, tuple[int, int]]


def layer(name: str, hidden: int, qkv: int, mlp: int) -> Layer:
    linears = {"qkv": (hidden, qkv), "dense": (hidden, hidden), "gate_up": (hidden, 2 * mlp), "down": (mlp, hidden)}
    return Layer(name, linears)


LAYERS = (layer("CogVLM-17B", 4096, 12288, 11008), layer("CogVLM2-19B", 4096, 6144, 14336))


@dataclass(frozen=True)
class Case:
    """One launch: a linear's weights, rows of both experts, and where the result goes."""

    weights: RoutedWeights
    x: Tensor
    route: Route
    y: Tensor

    @property
    def num_bytes(self) -> int:
        """The minimum traffic: the weights of the experts that have rows, x and y."""
        experts = len(set(self.route.experts.tolist()))
        weights = (self.weights.codes, self.weights.scales, self.weights.bias)
        return sum(tensor.nbytes for tensor in weights) * experts // 2 + self.x.nbytes + self.y.nbytes

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * len(self.x) * self.weights.in_width * self.weights.out_width


@dataclass(frozen=True)
class Bench:
    """A device with its clock, the bytes per second of a copy, and block shapes."""

    device: torch.device
    clock: Clock
    bandwidth: float
    shapes: BlockShapes


def cuda_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def cuda_clock(repeats: int = REPEATS) -> Clock:
    """Times single launches with events, each after filling a buffer larger than the cache."""
    buffer = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def clock(work: Callable[[], object]) -> float:
        work()  # compiles
        marks = [[cuda_event(), cuda_event()] for _ in range(repeats)]
        for start, end in marks:
            buffer.zero_()  # also gives the host time to queue the next launches
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        times = sorted(float(start.elapsed_time(end)) for start, end in marks)
        return times[len(times) // 2] / 1e3

    return clock


def copy_bandwidth(clock: Clock, device: torch.device, num_bytes: int = 2**29) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.empty(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock(lambda: target.copy_(source))


def random_weights(in_width: int, out_width: int, device: torch.device, group_size: int = GROUP_SIZE) -> RoutedWeights:
    """Codes of any value, scales that keep outputs near 1."""
    generator = torch.Generator(device).manual_seed(in_width + out_width)
    codes = torch.randint(0, 256, (2, out_width, in_width // 2), dtype=torch.uint8, device=device, generator=generator)
    spread = torch.rand((2, in_width // group_size, out_width), device=device, generator=generator)
    scales = ((0.5 + spread) * 0.2 * in_width**-0.5).half()
    bias = torch.randn((2, out_width), device=device, generator=generator)
    return RoutedWeights(codes, scales, bias, group_size)


def make_case(weights: RoutedWeights, rows: int, share: float, dtype: torch.dtype = torch.float16) -> Case:
    """Rows in random order, a share of them of the vision expert."""
    device = weights.codes.device
    generator = torch.Generator().manual_seed(rows)
    vision = torch.arange(rows)[torch.randperm(rows, generator=generator)] < round(share * rows)
    x = torch.randn((rows, weights.in_width), generator=generator).to(device, dtype)
    y = torch.empty((rows, weights.out_width), dtype=dtype, device=device)
    return Case(weights, x, partition(vision, device), y)


def dequantized(weights: RoutedWeights) -> Tensor:
    """Float32 weights of both experts, [2, out, in]."""
    experts, out_width, num_bytes = weights.codes.shape
    halves = weights.codes.view(experts, out_width, -1, weights.group_size // 2)
    codes = torch.stack((halves & 15, halves >> 4), 3).float()  # [experts, out, groups, half, place]
    scaled = (codes - 8) * weights.scales.float().transpose(1, 2)[:, :, :, None, None]
    return scaled.view(experts, out_width, 2 * num_bytes)


def worst_error(case: Case, shapes: BlockShapes) -> float:
    """The largest error of a launch / the allowance for one rounding and the order of sums: correct is <= 1."""
    launch(case.x, case.route, case.weights, case.y, shapes)
    worst = 0.0
    for expert, matrix in enumerate(dequantized(case.weights)):
        rows = case.route.experts == expert
        x, bias = case.x[rows].double(), case.weights.bias[expert].double()
        expected = x @ matrix.double().T + bias
        magnitude = x.abs() @ matrix.double().abs().T + bias.abs()
        allowed = ROUNDING[case.x.dtype] * expected.abs() + SUM_ROUNDING * magnitude
        errors = (case.y[rows].double() - expected).abs() / allowed
        worst = max(worst, float(errors.nan_to_num(float("inf")).max()) if errors.numel() else 0.0)
    return worst


def check(layers: Sequence[Layer], bench: Bench) -> Iterator[dict[str, Any]]:
    """The errors of every linear, both types, each kernel, rows of one expert and of both."""
    for entry in layers:
        for name, widths in entry.linears.items():
            weights = random_weights(*widths, bench.device)
            for dtype, count, share in product(ROUNDING, CHECKED_ROWS, (0.0, 0.5, 1.0)):
                error = worst_error(make_case(weights, count, share, dtype), bench.shapes)
                yield {"layer": entry.name, "linear": name, "type": str(dtype), "rows": count, "share": share,
                       "error": error}  # fmt: skip


def fp16_pair(case: Case) -> Callable[[], Tensor]:
    """The same as two fp16 products: rows are gathered before and scattered after."""
    matrices = dequantized(case.weights).half()
    rows = [torch.nonzero(case.route.experts == expert).flatten() for expert in range(2)]
    biases, y = case.weights.bias.half(), torch.empty_like(case.y)

    def work() -> Tensor:
        for expert in range(2):
            if len(rows[expert]) == len(case.x):
                return torch.addmm(biases[expert], case.x, matrices[expert].T)
            if len(rows[expert]):
                found = torch.addmm(biases[expert], case.x[rows[expert]], matrices[expert].T)
                y.index_copy_(0, rows[expert], found)
        return y

    return work


def measure(entry: Layer, rows: int, share: float, bench: Bench) -> dict[str, Any]:
    """A layer's four linears: seconds of the kernel, of the fp16 pair, and of the bytes at the copy's bandwidth."""
    kernel = pair = bound = flops = 0.0
    for widths in entry.linears.values():
        case = make_case(random_weights(*widths, bench.device), rows, share)
        kernel += bench.clock(lambda case=case: launch(case.x, case.route, case.weights, case.y, bench.shapes))  # type: ignore[misc]
        pair += bench.clock(fp16_pair(case))
        bound += case.num_bytes / bench.bandwidth
        flops += case.flops
    return {"layer": entry.name, "rows": rows, "share": share, "kernel_s": kernel, "pair_s": pair, "bound_s": bound,
            "flops": flops}  # fmt: skip


def shares_of(rows: int) -> list[float]:
    """The shares that give different numbers of vision rows; none and all keep the shares 0 and 1."""
    mixed_first = sorted(SHARES, key=lambda share: share in (0.0, 1.0))
    return sorted({round(share * rows): share for share in mixed_first}.values())


def verdicts(points: Sequence[dict[str, Any]]) -> list[str]:
    """Each target for each layer, met or missed."""
    lines = []
    for name in dict.fromkeys(point["layer"] for point in points):
        at = {(point["rows"], point["share"]): point for point in points if point["layer"] == name}
        decode, prefill = at[DECODE_ROWS, 0.0], at[PREFILL_ROWS, PREFILL_SHARE]
        measured = ((decode, "bound_s"), (decode, "pair_s"), (prefill, "pair_s"))
        found = [point[time] / point["kernel_s"] for point, time in measured]
        for (what, target), value in zip(TARGETS.items(), found, strict=True):
            lines.append(f"- {name}: {value:.2f} {what}, target {target}: {'met' if value >= target else 'missed'}")
    return lines


def report(device_name: str, bench: Bench, errors: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]) -> str:
    """The page of results."""
    worst = max(error["error"] for error in errors)
    lines = [
        f"# Routed int4 kernels on {device_name}",
        "",
        f"`python benchmarks/routed_kernel.py`, torch {torch.__version__}. A copy reaches {bench.bandwidth / 1e9:.0f} "
        f"GB/s. Groups of {GROUP_SIZE}, fp16. Block shapes: `{json.dumps(asdict(bench.shapes))}`.",
        "",
        f"{len(errors)} launches compared with float64: the largest error is {worst:.2f} of the allowance for one "
        f"rounding and the order of sums ({'right' if worst <= 1 else '**wrong**'}).",
        "",
        *verdicts(points),
        "",
        "A layer's four linears together:",
        "",
        "| layer | rows | vision | kernel | fp16 pair | memory bound | of the bound | times the pair | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        kernel, pair, bound = (point[name] for name in ("kernel_s", "pair_s", "bound_s"))
        lines.append(
            f"| {point['layer']} | {point['rows']} | {100 * point['share']:.0f} % | {1e6 * kernel:.0f} µs | "
            f"{1e6 * pair:.0f} µs | {1e6 * bound:.0f} µs | {bound / kernel:.2f} | {pair / kernel:.2f} | "
            f"{point['flops'] / kernel / 1e12:.1f} |"
        )
    return "\n".join(lines) + "\n"


# Candidates of --tune. A gemv or small gemm must fit in 48 KiB, see `fits`.
GEMVS = tuple(BlockShape(1, *rest) for rest in product((8, 16, 32, 64), (2, 4, 8), (2, 3, 4, 5)))
SMALL_GEMMS = tuple(BlockShape(16, *rest) for rest in product((16, 32, 64, 128), (2, 4, 8), (2, 3, 4, 5)))
LARGE_GEMMS = tuple(BlockShape(*rest) for rest in product((32, 64, 128), (64, 128), (4, 8), (2, 3, 4)))
MOST_GEMV_ROWS, MOST_SMALL_ROWS = 8, 256


def fits(shape: BlockShape) -> bool:
    """Whether the pipelined blocks need roughly less than 48 KiB; compiling checks exactly."""
    columns = 256 if shape.block_rows == 1 else GROUP_SIZE // 2  # bytes of codes for each output
    return (shape.num_stages - 1) * (shape.block_columns * columns + shape.block_rows * GROUP_SIZE * 2) <= 47 * 1024


def layer_seconds(entry: Layer, rows: int, share: float, shapes: BlockShapes, bench: Bench) -> float:
    """Seconds of a layer's four linears with these shapes; infinite if the device cannot launch them."""
    import triton

    total = 0.0
    for widths in entry.linears.values():
        case = make_case(random_weights(*widths, bench.device), rows, share)
        try:
            total += bench.clock(lambda case=case: launch(case.x, case.route, case.weights, case.y, shapes))  # type: ignore[misc]
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            return float("inf")
    return total


def tune(entry: Layer, bench: Bench, candidates: Sequence[Sequence[BlockShape]], prefill_rows: int) -> BlockShapes:
    """The fastest shapes for a layer, and the most rows for which each kernel is the fastest."""
    gemvs, small, large = candidates
    always = 10**6  # more rows than any call has

    def only(kind: str, shape: BlockShape) -> BlockShapes:
        if kind == "gemv":
            return replace(bench.shapes, gemv=shape, gemv_up_to_tokens=always)
        if kind == "small":
            return replace(bench.shapes, small_gemm=shape, gemv_up_to_tokens=0, small_gemm_up_to_tokens=always)
        return replace(bench.shapes, large_gemm=shape, gemv_up_to_tokens=0, small_gemm_up_to_tokens=0)

    def seconds(kind: str, shape: BlockShape, rows: int, share: float = 0.0) -> float:
        return layer_seconds(entry, rows, share, only(kind, shape), bench)

    best_gemv = min(filter(fits, gemvs), key=lambda shape: seconds("gemv", shape, 1))
    best_small = min(filter(fits, small), key=lambda shape: seconds("small", shape, 16))
    best_large = min(large, key=lambda shape: seconds("large", shape, prefill_rows, PREFILL_SHARE))
    gemv_rows = [
        n for n in range(1, MOST_GEMV_ROWS + 1) if seconds("gemv", best_gemv, n) <= seconds("small", best_small, n)
    ]
    small_rows = [
        n
        for n in range(16, MOST_SMALL_ROWS + 1, 16)
        if seconds("small", best_small, n) <= seconds("large", best_large, n)
    ]
    return BlockShapes(best_gemv, best_small, best_large, max(gemv_rows, default=0), max(small_rows, default=16))


def write_shapes(architecture: int, shapes: BlockShapes, table: Path = TABLE) -> None:
    """Store an architecture's own shapes in the table."""
    content = json.loads(table.read_text(encoding="utf-8"))
    content["shapes"][f"sm_{architecture}"] = asdict(shapes)
    content["architectures"][str(architecture)] = f"sm_{architecture}"
    table.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run(bench: Bench, device_name: str, layers: Sequence[Layer], folder: Path, rows: Sequence[int] = ROWS) -> int:
    """Check, measure, write the page; returns the exit status."""
    errors = list(check(layers, bench))
    points = [measure(entry, count, share, bench) for entry in layers for count in rows for share in shares_of(count)]
    page = report(device_name, bench, errors, points)
    path = folder / f"routed_kernel_{'_'.join(device_name.lower().split())}.md"
    path.write_text(page, encoding="utf-8")
    print("\n".join(verdicts(points)), f"\n{path}")
    wrong = [error for error in errors if error["error"] > 1]
    if wrong:
        print(f"WRONG: {len(wrong)} of {len(errors)} launches, first {wrong[0]}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help=f"search block shapes first and write them to {TABLE.name}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was run, nothing was measured.")
        return 0
    device, clock = torch.device("cuda", torch.cuda.current_device()), cuda_clock()
    major, minor = torch.cuda.get_device_capability(device)
    try:
        bench = Bench(device, clock, copy_bandwidth(clock, device), shapes_of(10 * major + minor))
        if options.tune:
            candidates = (GEMVS, SMALL_GEMMS, LARGE_GEMMS)
            bench = replace(bench, shapes=tune(LAYERS[0], bench, candidates, PREFILL_ROWS))
            write_shapes(10 * major + minor, bench.shapes)
            print(f"{TABLE}: new shapes for SM {10 * major + minor}; `make kernels` compiles them")
        return run(bench, torch.cuda.get_device_name(device), LAYERS, options.out)
    except VlmdeployError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(main())
