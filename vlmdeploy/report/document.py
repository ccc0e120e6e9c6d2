"""The report as data: the only source of what the page, the tables and the plots show.

`report.json` is its `asdict`; `read_report_json` reads it back. Shares are 0..1, differences are model minus reference,
sizes bytes, times milliseconds, boxes pixels of the upright picture. Pictures are named by their file in the report's
folder.
"""

from dataclasses import dataclass
from pathlib import Path

from vlmdeploy.bench.measurement import Measurement
from vlmdeploy.data.samples import PixelBox
from vlmdeploy.errors import DataError
from vlmdeploy.records import read_object, record_of
from vlmdeploy.score.metrics import Score

FORMAT = "1.0"
JSON_NAME = "report.json"


@dataclass(frozen=True)
class ReportedModel:
    """One model of the report: a bundle, or a checkpoint run in PyTorch.

    precision: by part, as in the manifest; {"all": dtype} for a checkpoint. sha256: of the checkpoint; for a bundle, of
    the checkpoint it was made from. size_bytes: on disk. versions: of the software that made the bundle.
    """

    name: str
    path: str
    kind: str  # "bundle" or "checkpoint"
    family: str
    target: str | None
    provider: str | None
    precision: dict[str, str]
    group_sizes: dict[str, int]
    quantization: str
    notes: tuple[str, ...]
    sha256: str
    versions: dict[str, str]
    size_bytes: int


@dataclass(frozen=True)
class Flips:
    """Questions whose 0-or-1 metric differs from the reference's: the reference had lost ones right, gained ones wrong.

    p_value: McNemar's exact test, two-sided; it treats questions as independent, which those about one picture are not.
    """

    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True)
class Agreement:
    """How a model's next-token distributions differ from the reference's, on the tokens of given answers.

    kl: mean KL divergence of model from reference in nats per token; kl_median, kl_p99, kl_max over tokens. top1: share
    of tokens where both rank the same one first. perplexity: exp of the mean negative log-probability per token of the
    given answers; reference_perplexity: the reference's on the same tokens. 95 % intervals by bootstrap over pictures.
    source: which questions and answers, in words.
    """

    source: str
    questions: int
    tokens: int
    kl: Score
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: Score
    perplexity: Score
    reference_perplexity: float


@dataclass(frozen=True)
class BoxExample:
    """A picture with the true box, and those of the reference and the model (None: no box)."""

    picture: str
    question: str
    expected: PixelBox
    reference: PixelBox | None
    model: PixelBox | None
    drift: float | None
    iou: float


@dataclass(frozen=True)
class Grounding:
    """Box drift from the reference: how far the farthest edge moved, in thousandths of the picture's side along that
    edge's axis, over the `both` questions where both models gave a box.

    counts[i]: drifts from edges[i] (inclusive) to edges[i + 1] (exclusive; the last inclusive).
    """

    both: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    drift_median: float
    drift_p95: float
    examples: tuple[BoxExample, ...]


@dataclass(frozen=True)
class Regression:
    """A question that the model answers worse than the reference; `metric` is the one that fell most."""

    task: str
    kind: str
    picture: str | None
    question: str
    expected: str
    reference_answer: str
    answer: str
    metric: str
    before: float
    after: float


@dataclass(frozen=True)
class LayerErrors:
    """Held-out errors of quantized linears, relative to the mean square of their outputs (None: not measured).

    rows: one per layer ("vision 0", "decoder 3", ...), columns: kinds of linear with their expert ("language qkv").
    errors[row][column]; ratios: error / round-to-nearest's error. bits[row][column] of the codes.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    errors: tuple[tuple[float | None, ...], ...]
    ratios: tuple[tuple[float | None, ...], ...]
    bits: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class ModelResult:
    """The results of one model. Comparisons with the reference are None for the reference itself.

    layer_errors: None without a quantization report. unmeasured: why `measurement` is None.
    """

    subject: ReportedModel
    tasks: dict[str, dict[str, Score]]
    differences: dict[str, dict[str, Score]] | None
    flips: dict[str, dict[str, Flips]] | None
    equal_answers: Score | None
    agreement: Agreement | None
    text_only: Agreement | None
    grounding: Grounding | None
    measurement: Measurement | None
    unmeasured: str | None
    layer_errors: LayerErrors | None
    regressions: tuple[Regression, ...]
    num_regressions: int
    num_improvements: int


@dataclass(frozen=True)
class FrontierPoint:
    """A model in the plot of accuracy, latency and memory. latency_ms: the first token plus `new_tokens` decoded ones.
    peak_bytes: highest of all phases. is_dominated: another model is at least as good in all three, better in one."""

    name: str
    accuracy: float
    latency_ms: float
    peak_bytes: int
    is_dominated: bool


@dataclass(frozen=True)
class Frontier:
    """The points of the plot. accuracy: mean of the first metric of every task; `metrics` names them."""

    metrics: tuple[str, ...]
    new_tokens: int
    points: tuple[FrontierPoint, ...]


@dataclass(frozen=True)
class DataUsed:
    """The data set: which format it was read as, a hash of its rows, and how many questions of each task were asked."""

    path: str
    description: str
    sha256: str
    questions: dict[str, int]
    pictures: int
    seed: int
    template: str | None


@dataclass(frozen=True)
class Failure:
    """A model that could not be made or scored, and a one-line reason."""

    name: str
    error: str


@dataclass(frozen=True)
class Report:
    """A whole report. reference: the name of the first model, which all others are compared with."""

    title: str
    created: str  # date and time with zone, ISO 8601
    command: str
    versions: dict[str, str]
    host: dict[str, str]
    data: DataUsed
    reference: str
    models: tuple[ModelResult, ...]
    frontier: Frontier | None
    failures: tuple[Failure, ...] = ()
    format: str = FORMAT

    @property
    def measured(self) -> list[tuple[ModelResult, Measurement]]:
        """The measured models with their measurements."""
        return [(model, model.measurement) for model in self.models if model.measurement is not None]


def read_report_json(path: Path) -> Report:
    """Read a report back. Raises DataError for any other file."""
    try:
        return record_of(Report, read_object(path, DataError), str(path), DataError)
    except DataError as error:
        raise DataError(f"{path}: is not a report of this version ({error})") from error
