"""Run a layer of the reference over the rows of all calibration tokens at once.

The layer's own forward pass takes `Rows` instead of a tensor. Rows are lazy: row-wise modules and products are recorded
and run when the next step reads the rows. A product first has its matrix quantized from all rows that reach it. So
every product runs once per token, and one matrix is in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmdeploy.calib.activations import Activations, Ints, Pool
from vlmdeploy.calib.calibration_set import Tokens
from vlmdeploy.calib.statistics import Inputs, chunks
from vlmdeploy.model.products import PRODUCTS, BlockConv, RowMixer

Streams = tuple[Tensor, ...]  # the same rows in each stream
Weights = tuple[Tensor, ...]  # of one linear, [out, in]: quantized and, under asymmetric calibration, float


class Quantizer(Protocol):
    """Gives a layer the weights of its linears."""

    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        """Quantize a linear, or leave it in float, and return its weights for each stream."""

    def unused(self, target: str) -> None:
        """Handle a linear whose output nothing reads."""


@dataclass
class Flow:
    """The stored rows of every token, for each stream. Freed when the last reference goes.

    version: how often finished rows were changed.
    """

    tokens: Tokens
    states: tuple[Activations, ...]
    version: int = 0

    @classmethod
    def zeros(cls, pool: Pool, tokens: Tokens, width: int, streams: int) -> "Flow":
        """Allocate rows of zeros."""
        return cls(tokens, tuple(pool.make(tokens.count, width) for _ in range(streams)))

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.states[0].width

    def chunks(self) -> Iterator[Ints]:
        """The numbers of all rows, in pieces of bounded size."""
        return chunks(np.arange(self.tokens.count))

    def read(self, rows: Ints) -> Streams:
        """Read some rows of each stream."""
        return tuple(state.read(rows) for state in self.states)

    def write(self, rows: Ints, values: Streams) -> None:
        """Replace some rows of each stream."""
        for state, x in zip(self.states, values, strict=True):
            state.write(rows, x)

    def add(self, rows: Ints, values: Streams) -> None:
        """Add to some rows of each stream."""
        for state, x in zip(self.states, values, strict=True):
            state.add(rows, x)

    def close(self) -> None:
        """Free memory and files. Closing twice is harmless."""
        for state in self.states:
            state.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class Product:
    """A matrix product. targets, biases: one per expert, or one for all rows (None)."""

    quantizer: Quantizer
    targets: dict[str | None, str]
    biases: dict[str | None, Tensor | None]
    out_width: int

    @classmethod
    def of_experts(cls, modules: Mapping[str | None, nn.Module]) -> "Product":
        """Combine the products of several experts. modules: one Multiplying each."""
        own = {expert: module.product for expert, module in modules.items() if isinstance(module, Multiplying)}
        targets = {expert: product.targets[None] for expert, product in own.items()}
        biases = {expert: product.biases[None] for expert, product in own.items()}
        first = next(iter(own.values()))
        return cls(first.quantizer, targets, biases, first.out_width)


@dataclass(frozen=True)
class Rows:
    """Stored rows with pending work: row-wise modules (`before`), at most one product, row-wise modules `after` it."""

    pool: Pool
    flow: Flow
    before: tuple[nn.Module, ...] = ()
    product: Product | None = None
    after: tuple[nn.Module, ...] = ()
    version: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.flow.version)

    def then(self, module: nn.Module) -> "Rows":
        """Append a row-wise module."""
        if self.product is None:
            return Rows(self.pool, self.flow, (*self.before, module))
        return Rows(self.pool, self.flow, self.before, self.product, (*self.after, module))

    def times(self, product: Product) -> "Rows":
        """Append a product."""
        rows = self if self.product is None else self.stored()
        return Rows(rows.pool, rows.flow, rows.before, product)

    def mixed(self, mixer: RowMixer, arguments: Callable[[int], tuple[Any, ...]] = lambda sample: ()) -> "Rows":
        """Run a mixer sample by sample. arguments: makes its further arguments for a sample, once per stream."""
        tokens, width = self.flow.tokens, self.width
        counts = [mixer.shape(count, width)[0] for count in np.diff(tokens.offsets).tolist()]
        mixed = self._zeros(tokens.with_rows(counts), mixer.shape(0, width)[1])
        for sample, values in self._samples():
            outputs = tuple(mixer(x[None], *arguments(sample))[0] for x in values)
            mixed.write(mixed.tokens.rows(sample), outputs)
        return Rows(self.pool, mixed)

    def stored(self) -> "Rows":
        """Do all pending work and store the result."""
        if not (self.before or self.product):
            return self
        flow = self._zeros(self.flow.tokens, self.width)
        for rows, values in self._pieces():
            flow.write(rows, values)
        return Rows(self.pool, flow)

    def __add__(self, other: "Rows") -> "Rows":
        """Add `other` in place: these rows may not be read again. Rows of experts that `other`'s product omits stay
        unchanged."""
        total = self.stored()
        for rows, values in other._pieces():
            total.flow.add(rows, values)
        total.flow.version += 1
        return Rows(self.pool, total.flow)

    @property
    def width(self) -> int:
        """Width of a row after all pending work."""
        first = _through(self.before, torch.empty(0, self.flow.width))
        return _through(self.after, first if self.product is None else torch.empty(0, self.product.out_width)).shape[1]

    def _zeros(self, tokens: Tokens, width: int) -> Flow:
        return Flow.zeros(self.pool, tokens, width, len(self.flow.states))

    def _inputs(self, rows: Ints) -> Streams:
        """Some rows of each stream, as they enter the product (if any)."""
        assert self.version == self.flow.version, "rows were changed after this view of them was made"
        return tuple(_through(self.before, x) for x in self.flow.read(rows))

    def _pieces(self) -> Iterator[tuple[Ints, Streams]]:
        """All finished rows in pieces, expert by expert."""
        if self.product is None:
            yield from ((rows, self._inputs(rows)) for rows in self.flow.chunks())
            return
        for expert in self.product.targets:
            weights = self._weights(expert)
            for rows in chunks(_rows_of(self.flow.tokens, expert)):
                yield rows, self._multiplied(self._inputs(rows), weights, expert)

    def _samples(self) -> Iterator[tuple[int, Streams]]:
        """The finished rows sample by sample. This needs the matrices of all experts at once."""
        tokens = self.flow.tokens
        weights = {} if self.product is None else {expert: self._weights(expert) for expert in self.product.targets}
        for sample in range(len(tokens.names)):
            rows = tokens.rows(sample)
            values = self._inputs(rows)
            if self.product is not None:
                values = self._by_expert(rows, values, weights)
            yield sample, values

    def _by_expert(self, rows: Ints, inputs: Streams, weights: dict[str | None, Weights]) -> Streams:
        """Multiply each row of one sample by its expert's matrix."""
        if list(weights) == [None]:
            return self._multiplied(inputs, weights[None], None)
        is_vision = torch.from_numpy(self.flow.tokens.vision_mask[rows])
        outputs = tuple(x.new_empty(len(x), self.width) for x in inputs)
        for expert, matrices in weights.items():
            own = is_vision if expert == "vision" else ~is_vision
            for output, values in zip(
                outputs, self._multiplied(tuple(x[own] for x in inputs), matrices, expert), strict=True
            ):
                output[own] = values
        return outputs

    def _weights(self, expert: str | None) -> Weights:
        assert self.product is not None, "the callers check"
        return self.product.quantizer.linear(self.product.targets[expert], self.flow.tokens, expert, self._inputs)

    def _multiplied(self, inputs: Streams, weights: Weights, expert: str | None) -> Streams:
        assert self.product is not None, "the callers check"
        bias = self.product.biases[expert]
        pairs = zip(inputs, weights, strict=True)
        return tuple(_through(self.after, F.linear(x, weight, bias)) for x, weight in pairs)


def _rows_of(tokens: Tokens, expert: str | None) -> Ints:
    """Row numbers of an expert, held-out rows included."""
    every = np.arange(tokens.count)
    return every if expert is None else every[tokens.vision_mask == (expert == "vision")]


def _through(modules: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


@dataclass(frozen=True)
class PerSample:
    """A layer argument that differs from sample to sample."""

    make: Callable[[int], Any]


class RowWise(nn.Module):
    """Replaces a row-wise module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Rows) -> Rows:
        """Defer the module."""
        return rows.then(self.module)


class Mixing(nn.Module):
    """Replaces a module that mixes rows."""

    def __init__(self, mixer: RowMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, rows: Rows, *arguments: PerSample) -> Rows:
        """Run the mixer now, sample by sample."""
        return rows.mixed(self.mixer, lambda sample: tuple(argument.make(sample) for argument in arguments))


class Multiplying(nn.Module):
    """Replaces a product."""

    def __init__(self, quantizer: Quantizer, target: str, module: nn.Linear | BlockConv) -> None:
        super().__init__()
        self.product = Product(quantizer, {None: target}, {None: module.bias}, len(module.weight))
        self.arrange = module.arrange if isinstance(module, BlockConv) else None

    def forward(self, rows: Rows) -> Rows:
        """Defer the product; arrange its inputs now."""
        return (rows if self.arrange is None else rows.mixed(self.arrange)).times(self.product)


def over_rows(module: nn.Module, name: str, quantizer: Quantizer) -> nn.Module:
    """Make a module of the reference take Rows, by replacing its parts. name: the prefix of its parameter names."""
    if isinstance(module, PRODUCTS):
        return Multiplying(quantizer, f"{name}.weight", module)
    if isinstance(module, RowMixer):
        return Mixing(module)
    if not any(isinstance(part, (*PRODUCTS, RowMixer)) for part in module.modules()):
        return RowWise(module)
    for part, child in module.named_children():
        setattr(module, part, over_rows(child, f"{name}.{part}", quantizer))
    return module
