"""A measurement as a table for people."""

from vlmdeploy.bench.measurement import Measurement, Spread
from vlmdeploy.byte_sizes import gigabytes, megabytes

COLUMNS = ["", "median", "p95", "lowest", "of"]


def measurement_titles(found: Measurement) -> tuple[str, str]:
    """The bundle; its engine and the machine."""
    engine, machine = found.engine, found.machine
    parts = ", ".join(f"{part} {precision}" for part, precision in found.bundle.precision.items())
    threads = "" if engine.provider != "cpu" else f", {engine.threads or 'default'} threads"
    where = [machine.board, machine.gpu, f"{machine.cpu} ({machine.logical_cores} cores)"]
    operators = f" with our operators ({engine.operators})" if engine.operators else ""
    return (
        f"{found.bundle.folder}: {found.bundle.target} ({parts})",
        f"{engine.library} {engine.version} on {engine.provider}{operators}{threads}, residency {engine.residency}; "
        f"{', '.join(filter(None, where))}, {gigabytes(machine.memory_bytes)}, {machine.kernel}",
    )


def measurement_rows(found: Measurement) -> list[list[str]]:
    """One row per number, in the order of COLUMNS."""
    answers = f"{found.repeats} answers after {found.warmup} not timed"
    prompt = f"{found.prompt_tokens} tokens, {found.image_rows} of them the picture"
    rows = [
        ["time to first token", *_cells(found.first_token), f"{answers}; picture: {found.picture}"],
        ["  preprocessing", *_cells(found.preprocess), "prompt and picture made ready"],
        *([["  vision encoder", *_cells(found.vision), ""]] if found.vision is not None else []),
        ["  prefill", *_cells(found.prefill), prompt],
        ["decode, each token", *_cells(found.decode_per_token), f"{found.decode_per_token.count} tokens"],
        ["prefill rate", f"{found.prefill_tok_s:,.1f} tok/s", "", "", "from the median"],
        ["decode rate", f"{found.decode_tok_s:,.1f} tok/s", "", "", "from the median"],
        ["loading", f"{found.load_s:,.2f} s", "", "", "once; files that were just checked"],
        ["size on disk", megabytes(found.disk_bytes.total), "", "", f"{megabytes(found.disk_bytes.data)} of weights"],
    ]
    return [*rows, *_memory_rows(found), *_energy_rows(found)]


def _cells(spread: Spread) -> list[str]:
    return [f"{value:,.2f} ms" for value in (spread.p50, spread.p95, spread.minimum)]


def _memory_rows(found: Measurement) -> list[list[str]]:
    """Peaks of the process and of the GPU."""
    memory = found.memory
    rows = [["memory before opening", megabytes(memory.baseline_bytes), "", "", "interpreter and libraries"]]
    for name, phase in memory.phases.items():
        on_device = "" if phase.device_peak_bytes is None else f", GPU {megabytes(phase.device_peak_bytes)}"
        rows.append([f"peak memory, {name}", f"{megabytes(phase.peak_bytes)}{on_device}", "", "", ""])
    rows[1][-1] = memory.method
    if memory.device_planned_bytes is not None or found.engine.provider == "cuda":
        rows.append(["GPU memory", "", "", "", memory.device_method])
    return rows


def _energy_rows(found: Measurement) -> list[list[str]]:
    energy = found.energy
    if energy is None:
        return [["energy", "unknown", "", "", found.energy_unknown or ""]]
    return [
        ["energy, each answer", f"{energy.answer_j:,.3f} J", "", "", f"mean; {energy.method}"],
        ["energy, each decoded token", f"{energy.token_j:,.4f} J", "", "", "mean, of decoding only"],
        ["  above idle, each answer", f"{energy.answer_above_idle_j:,.3f} J", "", "", f"idle: {energy.idle_w:,.2f} W"],
        ["  above idle, each token", f"{energy.token_above_idle_j:,.4f} J", "", "", ""],
    ]
