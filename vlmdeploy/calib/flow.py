"""The rows of all calibration tokens on their way through a layer of the reference.

`Rows` stand where the layer expects a tensor: its forward pass runs as it is written, over all tokens at once. Modules
that change rows one by one wait until their results are read. A product waits too; what comes next in the layer makes
it due: then its matrix is quantized from all rows that reach it, and the rows pass through. So every product runs once
per token, and one matrix is in memory at a time.
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

Streams = tuple[Tensor, ...]  # the same rows of each stream
Weights = tuple[Tensor, ...]  # of one linear, [out, in]: quantized and, under asymmetric calibration, float


class Quantizer(Protocol):
    """What a layer asks for each of its linears."""

    def linear(self, target: str, tokens: Tokens, expert: str | None, inputs: Inputs) -> Weights:
        """Quantize (or leave) a linear and return the weights for each stream."""

    def unused(self, target: str) -> None:
        """Quantize a linear whose output nothing reads."""


@dataclass
class Flow:
    """Stored rows of every token, for each stream; given back when nothing refers to them any more.

    version: counts the changes to rows that were whole.
    """

    tokens: Tokens
    states: tuple[Activations, ...]
    version: int = 0

    @classmethod
    def zeros(cls, pool: Pool, tokens: Tokens, width: int, streams: int) -> "Flow":
        """Rows of zeros."""
        return cls(tokens, tuple(pool.make(tokens.count, width) for _ in range(streams)))

    @property
    def width(self) -> int:
        """Of a row."""
        return self.states[0].width

    def read(self, rows: Ints) -> Streams:
        """Some rows of each stream."""
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
        """Give memory or disk back; a second time does nothing."""
        for state in self.states:
            state.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class Product:
    """A multiplication. targets, biases: of each expert, or of all rows (None)."""

    quantizer: Quantizer
    targets: dict[str | None, str]
    biases: dict[str | None, Tensor | None]
    out_width: int

    @classmethod
    def of_experts(cls, modules: Mapping[str | None, nn.Module]) -> "Product":
        """The products of several experts as one; modules: a Multiplying for each."""
        own = {expert: module.product for expert, module in modules.items() if isinstance(module, Multiplying)}
        targets = {expert: product.targets[None] for expert, product in own.items()}
        biases = {expert: product.biases[None] for expert, product in own.items()}
        first = next(iter(own.values()))
        return cls(first.quantizer, targets, biases, first.out_width)


@dataclass(frozen=True)
class Rows:
    """Stored rows, and what is still to be done to them: modules that change rows one by one (`before`), at most one
    product, and modules `after` it."""

    pool: Pool
    flow: Flow
    before: tuple[nn.Module, ...] = ()
    product: Product | None = None
    after: tuple[nn.Module, ...] = ()
    version: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.flow.version)

    def then(self, module: nn.Module) -> "Rows":
        """Through a module that changes rows one by one."""
        if self.product is None:
            return Rows(self.pool, self.flow, (*self.before, module))
        return Rows(self.pool, self.flow, self.before, self.product, (*self.after, module))

    def times(self, product: Product) -> "Rows":
        """Through a product."""
        rows = self if self.product is None else self.stored()
        return Rows(rows.pool, rows.flow, rows.before, product)

    def mixed(self, mixer: RowMixer, arguments: Callable[[int], tuple[Any, ...]] = lambda sample: ()) -> "Rows":
        """Through a mixer, sample by sample; arguments: what else it takes of a sample, made anew for each stream."""
        tokens = self.flow.tokens
        counts = [mixer.shape(count, self.width)[0] for count in np.diff(tokens.offsets).tolist()]
        mixed = self._zeros(tokens.with_rows(counts), mixer.shape(0, self.width)[1])
        for sample, values in self._samples():
            outputs = tuple(mixer(x[None], *arguments(sample))[0] for x in values)
            mixed.write(mixed.tokens.rows(sample), outputs)
        return Rows(self.pool, mixed)

    def stored(self) -> "Rows":
        """The same rows with nothing left to be done."""
        if not (self.before or self.product):
            return self
        flow = self._zeros(self.flow.tokens, self.width)
        for rows, values in self._pieces():
            flow.write(rows, values)
        return Rows(self.pool, flow)

    def __add__(self, other: "Rows") -> "Rows":
        """The sum, stored in the place of these rows, which nobody may read again. Rows of experts whose product
        `other` leaves out stay as they are."""
        total = self.stored()
        for rows, values in other._pieces():
            total.flow.add(rows, values)
        total.flow.version += 1
        return Rows(self.pool, total.flow)

    @property
    def width(self) -> int:
        """Of a row, with everything done to it."""
        first = _through(self.before, torch.empty(0, self.flow.width))
        return _through(self.after, first if self.product is None else torch.empty(0, self.product.out_width)).shape[1]

    def _zeros(self, tokens: Tokens, width: int) -> Flow:
        return Flow.zeros(self.pool, tokens, width, len(self.flow.states))

    def _inputs(self, rows: Ints) -> Streams:
        """Some rows of each stream as they enter the product, if there is one."""
        assert self.version == self.flow.version, "rows that something was added to are read as they were before"
        return tuple(_through(self.before, x) for x in self.flow.read(rows))

    def _pieces(self) -> Iterator[tuple[Ints, Streams]]:
        """All rows with everything done to them, some at a time: those of one expert after those of another."""
        if self.product is None:
            yield from ((rows, self._inputs(rows)) for rows in chunks(np.arange(self.flow.tokens.count)))
            return
        for expert in self.product.targets:
            weights = self._weights(expert)
            for rows in chunks(_rows_of(self.flow.tokens, expert)):
                yield rows, self._multiplied(self._inputs(rows), weights, expert)

    def _samples(self) -> Iterator[tuple[int, Streams]]:
        """The rows of each sample with everything done to them. Of a product all matrices are needed together."""
        tokens = self.flow.tokens
        weights = {} if self.product is None else {expert: self._weights(expert) for expert in self.product.targets}
        for sample in range(len(tokens.names)):
            rows = tokens.rows(sample)
            values = self._inputs(rows)
            if self.product is not None:
                values = self._by_expert(rows, values, weights)
            yield sample, values

    def _by_expert(self, rows: Ints, inputs: Streams, weights: dict[str | None, Weights]) -> Streams:
        """The product of one sample's rows, each by its expert."""
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
    """Row numbers of an expert, held-out ones too."""
    every = np.arange(tokens.count)
    return every if expert is None else every[tokens.vision_mask == (expert == "vision")]


def _through(modules: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


@dataclass(frozen=True)
class PerSample:
    """An argument of a layer that every sample has its own of."""

    make: Callable[[int], Any]


class RowWise(nn.Module):
    """Stands for a module that changes rows one by one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Rows) -> Rows:
        """The module waits."""
        return rows.then(self.module)


class Mixing(nn.Module):
    """Stands for a module that mixes rows."""

    def __init__(self, mixer: RowMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, rows: Rows, *arguments: PerSample) -> Rows:
        """Sample by sample, at once."""
        return rows.mixed(self.mixer, lambda sample: tuple(argument.make(sample) for argument in arguments))


class Multiplying(nn.Module):
    """Stands for a product that all rows pass through."""

    def __init__(self, quantizer: Quantizer, target: str, module: nn.Linear | BlockConv) -> None:
        super().__init__()
        self.product = Product(quantizer, {None: target}, {None: module.bias}, len(module.weight))
        self.arrange = module.arrange if isinstance(module, BlockConv) else None

    def forward(self, rows: Rows) -> Rows:
        """The product waits; its inputs are arranged at once."""
        return (rows if self.arrange is None else rows.mixed(self.arrange)).times(self.product)


def over_rows(module: nn.Module, name: str, quantizer: Quantizer) -> nn.Module:
    """A module of the reference whose forward pass takes Rows: its parts are replaced by what stands for them.

    name: the module's own, which the names of its parameters begin with.
    """
    if isinstance(module, PRODUCTS):
        return Multiplying(quantizer, f"{name}.weight", module)
    if isinstance(module, RowMixer):
        return Mixing(module)
    if not any(isinstance(part, (*PRODUCTS, RowMixer)) for part in module.modules()):
        return RowWise(module)
    for part, child in module.named_children():
        setattr(module, part, over_rows(child, f"{name}.{part}", quantizer))
    return module
