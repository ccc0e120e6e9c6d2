"""Every matrix of a model: the one list from which precision, sizes, coverage, costs and reports derive.

Fields identify a matrix. Its parameter name derives from them and is never parsed.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from vlmdeploy.spec.decoder import DecoderSpec, ExpertName
from vlmdeploy.spec.model import Geometry
from vlmdeploy.spec.vision import VisionSpec

Part = Literal["vision", "connector", "decoder", "lm_head", "embedding"]
PARTS: tuple[str, ...] = ("vision", "connector", "decoder", "lm_head", "embedding")
VISION_NAMES = ("qkv", "dense", "fc1", "fc2")
DECODER_NAMES = ("qkv", "dense", "gate_up", "down")  # of each expert


@dataclass(frozen=True)
class MatrixPlace:
    """The place of a matrix. layer: of the encoder or the decoder, else None. expert: in a decoder layer, else None.
    name: within its layer or the connector; "" for a part's only matrix."""

    part: Part
    layer: int | None
    expert: ExpertName | None
    name: str

    @property
    def target(self) -> str:
        """The parameter name, such as "decoder.layers.3.language.qkv.weight"."""
        return self._name(str(self.layer), "weight")

    @property
    def kind(self) -> str:
        """The name without the layer number, such as "decoder.layers.*.language.qkv"."""
        return self._name("*")

    def _name(self, layer: str, *ending: str) -> str:
        layers = () if self.layer is None else ("layers", layer)
        return ".".join(word for word in (self.part, *layers, self.expert, self.name, *ending) if word)


@dataclass(frozen=True)
class Matrix(MatrixPlace):
    """A weight matrix [out, in].

    fed_by: the module of its layer or connector step that computes its inputs; "" for the input of the layer or step,
    "middle" for the residual stream between the halves of a layer. is_read: whether anything reads its output; the last
    layer's vision expert is read for keys and values only.
    """

    out_width: int
    in_width: int
    fed_by: str = ""
    is_read: bool = True

    @property
    def values(self) -> int:
        """The number of weights."""
        return self.out_width * self.in_width


def matrices(spec: Geometry) -> Iterator[Matrix]:
    """Every matrix that multiplies inputs and may be quantized, in the order of the forward pass."""
    for index in range(spec.vision.num_layers):
        yield from vision_matrices(spec.vision, index)
    for step in spec.connector.steps:
        for inner in step.matrices():
            name = ".".join(word for word in (step.name, inner.name) if word)
            yield Matrix("connector", None, None, name, inner.out_width, inner.in_width, inner.fed_by)
    for index in range(spec.decoder.num_layers):
        yield from decoder_matrices(spec.decoder, index)
    yield Matrix("lm_head", None, None, "", spec.decoder.vocab_size, spec.decoder.hidden, "decoder.norm")


def vision_matrices(vision: VisionSpec, layer: int) -> Iterator[Matrix]:
    """The matrices of one encoder layer."""
    width, mlp_width = vision.width, vision.mlp_width
    shapes = ((3 * width, width), (width, width), (mlp_width, width), (width, mlp_width))
    is_first = vision.norm_place == "before"
    sources = ("attention_norm" if is_first else "", "attention", "mlp_norm" if is_first else "middle", "activation")
    for name, shape, source in zip(VISION_NAMES, shapes, sources, strict=True):
        yield Matrix("vision", layer, None, name, *shape, source)


def decoder_matrices(decoder: DecoderSpec, layer: int) -> Iterator[Matrix]:
    """The matrices of one decoder layer, expert by expert."""
    hidden, mlp_width = decoder.hidden, decoder.mlp_width
    shapes = (
        (decoder.qkv_width, hidden),
        (hidden, decoder.num_heads * decoder.head_dim),
        (2 * mlp_width, hidden),
        (hidden, mlp_width),
    )
    sources = ("attention_norm", "attention", "mlp_norm", "gate")
    for expert in decoder.experts:
        is_cut = expert.name == "vision" and layer == decoder.num_layers - 1
        for name, shape, source in zip(DECODER_NAMES, shapes, sources, strict=True):
            yield Matrix("decoder", layer, expert.name, name, *shape, source, name == "qkv" or not is_cut)


def embedding(spec: Geometry) -> Matrix:
    """The embedding table. Its rows are looked up, not multiplied."""
    return Matrix("embedding", None, None, "", spec.decoder.vocab_size, spec.decoder.hidden)


def places(names: Collection[str]) -> dict[str, MatrixPlace]:
    """The places of matrices by name, for a report that holds names but no geometry.

    Looks them up among the names that as many layers could have; the rest belongs to the connector.
    """
    candidates = [MatrixPlace("lm_head", None, None, ""), MatrixPlace("embedding", None, None, "")]
    for layer in range(len(names)):
        candidates += [MatrixPlace("vision", layer, None, name) for name in VISION_NAMES]
        for expert in ("language", "vision"):
            candidates += [MatrixPlace("decoder", layer, expert, name) for name in DECODER_NAMES]
    known = {place.target: place for place in candidates}
    return {name: known.get(name) or _connector_place(name) for name in names}


def _connector_place(name: str) -> MatrixPlace:
    return MatrixPlace("connector", None, None, name.removeprefix("connector.").removesuffix(".weight"))
