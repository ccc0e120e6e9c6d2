"""A plan as tables in the terminal, and as one self-contained HTML page with the same rows."""

from dataclasses import asdict, dataclass
from pathlib import Path

from vlmdeploy.artifact import write_file
from vlmdeploy.byte_sizes import gigabytes
from vlmdeploy.errors import ConfigError
from vlmdeploy.plan.draft import Plan
from vlmdeploy.plan.memory import PHASES
from vlmdeploy.plan.speed import Range

TEMPLATES = Path(__file__).parent / "templates"
PART_OF = {"language_experts": "decoder", "vision_experts": "decoder"}


@dataclass(frozen=True)
class PlanTable:
    """One table: its title, its columns, and rows of cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    @property
    def size_columns(self) -> set[int]:
        """The columns that hold only sizes."""
        return {index for index in range(len(self.columns)) if all(row[index].endswith(" GB") for row in self.rows)}


def plan_tables(plan: Plan) -> list[PlanTable]:
    """Everything in a plan except verdict, warnings and assumptions."""
    tables = [_weights(plan), _memory(plan), _rates(plan)]
    return [*tables, _changes(plan)] if plan.changes else tables


def headline(plan: Plan) -> str:
    """What was planned, and its verdict."""
    peak, usable = max(plan.peak_bytes.values()), plan.usable_bytes
    building = "" if plan.build is None or plan.build.fits else f", building {gigabytes(plan.build.least_ram_bytes)}"
    return (
        f"{plan.model} as {plan.target} on {plan.device.title}: {plan.verdict} "
        f"(peak {gigabytes(peak)}{building}, usable {gigabytes(usable)})"
    )


def _weights(plan: Plan) -> PlanTable:
    rows = [[part, _precision(plan, part), gigabytes3(size)] for part, size in plan.weights_bytes.items()]
    rows.append(["all", "", gigabytes3(sum(plan.weights_bytes.values()))])
    rows.append(["on disk, engines included" if plan.build else "on disk", "", gigabytes3(plan.disk_bytes)])
    return PlanTable("weights that a bundle ships", ["part", "precision", "size"], rows)


def _precision(plan: Plan, part: str) -> str:
    if part == "other":
        return "fp32"
    name = PART_OF.get(part, part)
    group = plan.group_sizes.get(name, 0)
    kind = plan.precision[name]
    if not kind.startswith("int"):
        return kind
    words = {-1: "one scale per output", 0: "groups of several sizes"}
    return f"{kind}, {words.get(group, f'groups of {group}')}"


def _memory(plan: Plan) -> PlanTable:
    columns = ["phase", "weights", "KV cache", "activations", "buffers", "overhead", "peak"]
    rows = []
    for phase in PHASES:
        memory = plan.memory[phase]
        rows.append([phase, *map(gigabytes3, (*asdict(memory).values(), memory.total))])
    title = (
        f"memory by phase, residency {plan.residency}, context {plan.context_tokens} "
        f"({plan.kv_bytes_per_token:,} bytes of cache per token)"
    )
    return PlanTable(title, columns, rows)


def _rates(plan: Plan) -> PlanTable:
    speed = plan.speed
    rows = [
        ["time to first token", _range(speed.ttft_s, "s")],
        ["- encoder and connector", _range(speed.vision_s, "s")],
        ["- reading the prompt", _range(speed.prefill_s, "s")],
        ["decoding", _range(speed.decode_tok_s, "tokens/s")],
    ]
    if speed.reload_s[1]:
        rows.append(["loading weights again for a new picture", _range(speed.reload_s, "s")])
    if plan.build is not None:
        least, most = gigabytes(plan.build.least_ram_bytes), gigabytes(plan.build.ram_bytes)
        size = most if least == most else f"{least} with decoders cut into layers, {most} with whole ones"
        rows.append([f"memory to build engines, {plan.build.where}", size])
    return PlanTable("speed and building: estimates, nothing was measured on this device", ["", ""], rows)


def _range(found: Range | None, unit: str) -> str:
    return "not known" if found is None else f"{_figure(found[0])} to {_figure(found[1])} {unit}"


def _figure(value: float) -> str:
    """Three significant figures, never with an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _changes(plan: Plan) -> PlanTable:
    rows = []
    for change in plan.changes:
        low, high = change.accuracy_points
        cost = "none" if high == 0 else f"{low:.1f} to {high:.1f} points"
        rows.append([" ".join(change.options), gigabytes(change.peak_bytes), cost, change.why])
    return PlanTable("what makes it fit, cheapest first", ["change", "peak", "expected loss of accuracy", "why"], rows)


def gigabytes3(size: int) -> str:
    """Bytes in units of 10^9, with three decimals."""
    return f"{size / 1e9:.3f} GB"


def plan_page(plan: Plan) -> str:
    """The plan as one self-contained HTML page. Needs Jinja2."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("plan.html")
    return template.render(plan=plan, headline=headline(plan), tables=plan_tables(plan))


def write_page(plan: Plan, path: Path) -> None:
    """Write the page atomically, replacing an existing one. Raises ConfigError if it cannot be written."""
    page = plan_page(plan).encode()
    try:
        write_file(path, lambda file: file.write(page))
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written: {error.strerror}") from error
