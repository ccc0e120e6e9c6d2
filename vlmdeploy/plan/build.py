"""Memory to compile a bundle's engines, and whether the device has it."""

from dataclasses import dataclass

from vlmdeploy.export.engines.build import KEPT_FREE
from vlmdeploy.export.engines.parts import build_bytes
from vlmdeploy.plan.device import PlanDevice
from vlmdeploy.plan.sizes import Storage, stored_matrices, weight_sizes
from vlmdeploy.quant.precision import PrecisionPlan
from vlmdeploy.spec.model import Geometry

ON_DEVICE = "on the device"


@dataclass(frozen=True)
class Build:
    """Memory to compile the engines. ram_bytes: for the largest graph in one piece; least_ram_bytes: with decoders cut
    into single layers. fits: in the device's memory and swap; always true if the builder uses the memory of a card's
    machine, whose size no device profile gives."""

    where: str
    ram_bytes: int
    least_ram_bytes: int
    fits: bool

    @property
    def is_on_device(self) -> bool:
        """Whether engines are compiled in the memory that they run in."""
        return self.where == ON_DEVICE


def plan_build(geometry: Geometry, precision: PrecisionPlan, target: str, device: PlanDevice, swap_bytes: int) -> Build:
    """The encoder is built in one piece, a decoder whole or cut down to single layers."""
    storage = Storage.of(target, "cuda")
    graphs = weight_sizes(geometry, precision, storage).graphs
    least = build_bytes(max(graphs["vision"], *_layer_bytes(geometry, precision, storage)))
    if target.startswith("rtx-"):
        where = "on any x86-64 machine"
    else:
        where = ON_DEVICE if device.is_unified else "on the machine of the card"
    fits = where != ON_DEVICE or least <= _room_bytes(device, swap_bytes)
    return Build(where, build_bytes(max(graphs.values())), least, fits)


def _room_bytes(device: PlanDevice, swap_bytes: int) -> int:
    """Memory that `build` uses: a share of what is available; with swap, all that --max-memory allows."""
    return device.usable_bytes + swap_bytes if swap_bytes else int(KEPT_FREE * device.usable_bytes)


def _layer_bytes(geometry: Geometry, precision: PrecisionPlan, storage: Storage) -> list[int]:
    """Bytes of every layer of the decoder graphs; the last one includes the head."""
    layers: dict[tuple[str, int], int] = {}
    for stored in stored_matrices(geometry, precision, storage):
        if stored.graph != "vision":
            index = geometry.decoder.num_layers - 1 if stored.matrix.layer is None else stored.matrix.layer
            size = storage.matrix_bytes(stored.rows, stored.width, stored.precision)
            layers[stored.graph, index] = layers.get((stored.graph, index), 0) + size
    return list(layers.values())
