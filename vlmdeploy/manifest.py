"""What a bundle says about itself, as dataclasses: everything that the runtime must know about a model.

`manifest.json` is their strict JSON form; see `bundle`.
"""

from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from vlmdeploy.errors import BundleError

FORMAT_VERSION = "1.3"
ROUTED_FORMAT_VERSION = "2.0"  # of a bundle with a routed decoder, which readers of version 1 must refuse
PROMPT_FORMAT_VERSION = "3.0"  # of one whose prompts or pictures earlier readers would make wrongly
SINCE_3 = {"since": PROMPT_FORMAT_VERSION}  # of fields that are written only where they differ from their defaults

# Names of files that the manifest does not name itself; ENGINES is the folder of compiled engines and the plugin.
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
REFERENCE_NAME = "reference.npz"
ENGINES = "engines"


Resize = Literal["squash", "pad", "crop"]


@dataclass(frozen=True)
class ImageRecipe:
    """How a picture becomes the vision encoder's input: RGB, resized to a square, scaled, normalized.

    resize "squash": straight to size_px x size_px, ignoring the aspect ratio; "pad": put in the middle of a square of
    the mean colour first; "crop": the shorter side becomes size_px, and the middle stays. filter "bicubic": Pillow's,
    with antialiasing, on 8-bit data. Then (value / 255 - mean) / std per channel.
    """

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "squash"
    filter: Literal["bicubic"] = "bicubic"


@dataclass(frozen=True)
class Piece:
    """A part of a prompt: fixed text, the text of a turn or of the system message, one token id, or an image's rows.

    Neighbouring texts are joined before they are tokenized; token ids and images separate them.
    """

    kind: Literal["text", "user", "assistant", "system", "token", "image"]
    text: str = ""
    token_id: int = -1


@dataclass(frozen=True)
class ChatTemplate:
    """How to render a conversation: the system text, every past turn, then the open one; without BOS.

    image: what stands for an image within its user's text; () if images follow BOS. image_place: "here": where the user
    put it; "turn_start": before the text. system: () if a prompt has no place for a system message; default_system:
    its text without one.
    """

    name: str
    past_turn: tuple[Piece, ...]
    last_turn: tuple[Piece, ...]
    image: tuple[Piece, ...] = field(default=(), metadata=SINCE_3)
    image_place: Literal["here", "turn_start"] = field(default="here", metadata=SINCE_3)
    system: tuple[Piece, ...] = field(default=(), metadata=SINCE_3)
    default_system: str = field(default="", metadata=SINCE_3)


@dataclass(frozen=True)
class TokenRules:
    """Special ids, and the place of an image's rows in the prompt: a `placeholder_id` for each of `rows_per_image`.

    max_images: of a prompt; 0: any number. image_place "after_bos": right after BOS, whichever turn an image belongs
    to; elsewhere that id is text. "anywhere": wherever the placeholder stands, which is never text.
    positions "patches_share_one": the inner rows of an image share one position id; "index": tokens count up.
    vision_rows "all_but_last": all rows of an image but the last use the vision expert; "none": no vision expert.
    """

    bos_id: int
    pad_id: int
    placeholder_id: int
    stop_ids: tuple[int, ...]
    rows_per_image: int
    max_images: int
    image_place: Literal["after_bos", "anywhere"] = "after_bos"
    positions: Literal["patches_share_one", "index"] = "patches_share_one"
    vision_rows: Literal["all_but_last", "none"] = "all_but_last"

    def takes(self, num_images: int) -> bool:
        """Whether a prompt may hold so many images."""
        return self.max_images == 0 or num_images <= self.max_images


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of the checkpoint's generation_config.json; None where it has none."""

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_length: int | None = None


CACHE_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}  # per element
CACHE_GROUP = 32  # int8 keys or values that share a scale


def cache_types(dialect: str, provider: str) -> tuple[str, ...]:
    """The types that the KV cache of such graphs can have, the default first."""
    return ("fp32", "fp16", "int8") if dialect == "ort" and provider == "cpu" else ("fp16",)


@dataclass(frozen=True)
class CacheShape:
    """The KV cache and the rotary frequencies of the graphs.

    One key and one value tensor per layer, [1, kv_heads, capacity, head_dim]; `head_dim` may be padded, and
    `inv_freq` has head_dim / 2 entries with zeros in the padding. dtype "int8": codes, with fp16 scales for every
    CACHE_GROUP of them in tensors of their own.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    inv_freq: tuple[float, ...]

    @property
    def tensors(self) -> dict[str, tuple[str, int]]:
        """The tensors of a layer by name: element type, and values per head and token."""
        held = dict.fromkeys(("key", "value"), (self.dtype, self.head_dim))
        if self.dtype == "int8":
            held |= dict.fromkeys(("key_scales", "value_scales"), ("fp16", self.head_dim // CACHE_GROUP))
        return held

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in all layers."""
        per_head = sum(CACHE_BYTES[dtype] * width for dtype, width in self.tensors.values())
        return self.num_layers * self.kv_heads * per_head


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph. Dimensions are lengths, or names where they vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphInfo:
    """One exported graph: its file, its weights' file, inputs and outputs (without the KV cache)."""

    file: str
    data_file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class EmbeddingInfo:
    """The memory-mapped embedding table: rows [vocab, hidden] of `dtype`.

    int8 and int4 rows are codes (int4: two per byte, low nibble first, zero point 8; int8: zero point 128); the fp16
    scales [vocab, hidden / group_size] begin at `scales_offset`.
    """

    file: str
    dtype: Literal["fp32", "fp16", "int8", "int4"]
    vocab_size: int
    hidden: int
    group_size: int = 0
    scales_offset: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """One compiled engine: a graph, or a run of its decoder layers if the whole would not fit the builder's memory.

    compute_capabilities: the SMs it was built for ("8.6"), none for a portable plan. layers: first and past-the-last
    decoder layer; (0, 0) for the vision graph.
    """

    file: str
    graph: str
    part: int
    layers: tuple[int, int]
    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    compute_capabilities: tuple[str, ...]
    chunk_rows: int  # most rows of one call
    logit_rows: int  # most rows of one call that ask for logits
    context_tokens: int
    batch: int = 1  # most prompts of one call (since 2.0)


@dataclass(frozen=True)
class PluginUse:
    """The plugin of a routed decoder's engine. packing: layout of its codes, see docs/plugin.md. library: its file in
    the bundle once an engine was built with it; "" if the engine embeds the kernels."""

    packing: int
    library: str = ""


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StageVerdict:
    """The largest difference from PyTorch in one stage, and its bound."""

    stage: str
    check: str  # "structure" (exact arithmetic) or "shipped" (the graphs as they are)
    max_error: float
    tolerance: float
    tensor: str  # place of the largest error
    passed: bool


@dataclass(frozen=True)
class Verification:
    """The verdict of the gate, which every bundle passes before it is published."""

    passed: bool
    stages: tuple[StageVerdict, ...]
    top1_agreement: float  # share of compared rows with the same best token, shipped graphs against PyTorch
    greedy_tokens_equal: int  # leading tokens of the greedy continuation that agree
    greedy_tokens_total: int
    host: str  # processor family and engine version of the verifying machine


@dataclass(frozen=True)
class Provenance:
    """The origin of the bundle."""

    checkpoint_sha256: str  # of the checkpoint's config and every byte of its shards
    versions: dict[str, str]
    quantization: str  # e.g. "none", "rtn"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle."""

    family: str
    target: str
    provider: Literal["cpu", "cuda"]
    context_tokens: int
    image: ImageRecipe
    templates: tuple[ChatTemplate, ...]
    default_template: str
    tokens: TokenRules
    generation: GenerationDefaults
    cache: CacheShape
    graphs: dict[str, GraphInfo]  # "vision", "decoder_text" and, with experts, "decoder_vision"; or "vision", "decoder"
    embedding: EmbeddingInfo
    has_tokenizer: bool
    precision: dict[str, str]  # part -> fp32 | fp16 | int8 | int4 | int3 | int2, or several joined by +
    group_sizes: dict[str, int]  # part -> weights per scale, 0 where not quantized
    requested_group: int  # as requested, before it was fitted to the widths
    kept_in_float: tuple[str, ...]  # linears that no group size divides
    memory_bytes: dict[str, int]  # weights that a phase needs: vision, prefill, decode; kv_per_token
    files: dict[str, FileEntry]
    made_by: Provenance
    verification: Verification | None = None
    requested_precision: dict[str, str] | None = None  # parts with a requested precision (since 1.1)
    engines: dict[str, EngineInfo] = field(default_factory=dict)  # compiled graphs (since 1.2)
    plugin: PluginUse | None = None  # of a routed decoder (since 2.0)
    format_version: str = FORMAT_VERSION

    @property
    def dialect(self) -> Literal["ort", "trt"]:
        """The operator set of the graphs."""
        return dialect_of(self.target)

    @property
    def is_routed(self) -> bool:
        """Whether one decoder graph holds both experts and routes its rows."""
        return "decoder" in self.graphs

    @property
    def token_graph(self) -> str:
        """The graph that decodes tokens."""
        return "decoder" if self.is_routed else "decoder_text"

    @property
    def is_half(self) -> bool:
        """Whether the graphs compute in fp16."""
        return self.provider == "cuda"

    def template(self, name: str | None) -> ChatTemplate:
        """The template of this name, or the default; raises BundleError listing the names."""
        wanted = name or self.default_template
        for template in self.templates:
            if template.name == wanted:
                return template
        known = ", ".join(template.name for template in self.templates)
        raise BundleError(f'template "{wanted}" is not in this bundle; it has: {known}')


def format_of(manifest: Manifest) -> str:
    """The version of the format that a bundle needs."""
    tokens = manifest.tokens
    is_new = (
        manifest.image.resize != "squash"
        or tokens.image_place != "after_bos"
        or tokens.positions != "patches_share_one"
        or any(each.metadata == SINCE_3 for template in manifest.templates for each in _written(template))
    )
    if is_new:
        return PROMPT_FORMAT_VERSION
    return ROUTED_FORMAT_VERSION if manifest.plugin is not None else FORMAT_VERSION


def _written(record: Any) -> list[Field[Any]]:
    """The fields of a record that a manifest holds: those of format 3 only where they differ from their defaults."""
    return [each for each in fields(record) if each.metadata != SINCE_3 or getattr(record, each.name) != each.default]


def json_form(record: Any) -> Any:
    """A record as plain values, without fields of format 3 that have their defaults."""
    if is_dataclass(record):
        return {each.name: json_form(getattr(record, each.name)) for each in _written(record)}
    if isinstance(record, dict):
        return {key: json_form(value) for key, value in record.items()}
    return [json_form(value) for value in record] if isinstance(record, list | tuple) else record


def dialect_of(target: str) -> Literal["ort", "trt"]:
    """The operator set of a target's graphs: ONNX Runtime's, or operators that TensorRT imports."""
    return "ort" if target.startswith("ort-") else "trt"
