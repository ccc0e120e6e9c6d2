"""Measures one bundle on this machine: time to first token and its parts, decode rate, memory and energy by phase.

`measure_in_process` uses a fresh interpreter, whose memory holds only the bundle.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmdeploy import errors
from vlmdeploy.bench.energy import Meter, Unknown, find_meter, idle_watts
from vlmdeploy.bench.machine import engine_used, machine
from vlmdeploy.bench.measurement import (
    BundleUsed,
    DiskUse,
    Energy,
    EngineUsed,
    Measurement,
    MeasureOptions,
    MemoryUse,
    Spread,
)
from vlmdeploy.bench.memory_use import DeviceMemory, device_memory, peak_meter, resident
from vlmdeploy.bench.phase_watch import PhaseWatch, Spent
from vlmdeploy.bench.timed_answer import AnswerTimes, AskedPicture, TimedQuestion, chosen_picture
from vlmdeploy.child_process import child_process
from vlmdeploy.errors import BackendError, VlmdeployError
from vlmdeploy.manifest import Manifest
from vlmdeploy.records import record_of
from vlmdeploy.runtime.backends.choose import open_backend
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.integrity import BundleFiles, check_bundle
from vlmdeploy.runtime.session import Session
from vlmdeploy.standard_streams import WARNING

logger = logging.getLogger("vlmdeploy")


def measure(folder: Path, options: MeasureOptions) -> Measurement:
    """Measure a bundle in this process, whose own memory counts too.

    Raises BundleError, BackendError, PromptError, DataError and ConfigError.
    """
    files = check_bundle(folder)
    engine = engine_used(files.manifest, options.provider, options.threads, options.residency)

    def open_it() -> Backend:
        return open_backend(files, options.provider, options.threads, options.residency)

    subject = MeasuredBundle(files, engine, open_it)
    return measure_backend(subject, options, find_meter(engine.provider == "cuda"))


@dataclass(frozen=True)
class MeasuredBundle:
    """A checked bundle to measure, and how to open its backend."""

    files: BundleFiles
    engine: EngineUsed
    open_it: Callable[[], Backend]


def measure_backend(subject: MeasuredBundle, options: MeasureOptions, meter: Meter | Unknown) -> Measurement:
    """Measure with any backend and energy meter; closes both."""
    known = None if isinstance(meter, Unknown) else meter
    try:
        picture = chosen_picture(options)
        idle_w = None if known is None else idle_watts(known)
        baseline, watch = resident().total, PhaseWatch(peak_meter(), known)
        try:
            run = _run(subject, options, picture, watch)
        finally:
            watch.close()
    finally:
        if known is not None:
            known.close()
    memory = MemoryUse(watch.method, baseline, watch.phases, run.device.method, run.device.planned_bytes)
    energy = None if known is None or idle_w is None else _energy(known.method, idle_w, watch.spent, options)
    return _measurement(subject, options, run, memory, energy, meter.reason if isinstance(meter, Unknown) else None)


@dataclass(frozen=True)
class MeasuredRun:
    """Results from while the bundle was open."""

    question: TimedQuestion
    device: DeviceMemory
    load_s: float
    answers: list[AnswerTimes]


def _run(subject: MeasuredBundle, options: MeasureOptions, picture: AskedPicture, watch: PhaseWatch) -> MeasuredRun:
    """Open the bundle and ask; drops the warm-up answers."""
    watch.begin("open")
    start = watch.now()
    backend = subject.open_it()
    try:
        device = device_memory(backend)
        watch.device_use = device.in_use
        question = TimedQuestion(Session(subject.files, backend), options, picture)
        _load_graphs(backend, subject.files.manifest, options)
        load_s = watch.now() - start
        for _ in range(options.warmup):
            question.ask(backend, watch)
        watch.end()
        watch.forget_spent()
        answers = [question.ask(backend, watch) for _ in range(options.repeats)]
    finally:
        backend.close()
    return MeasuredRun(question, device, load_s, answers)


def _measurement(
    subject: MeasuredBundle,
    options: MeasureOptions,
    run: MeasuredRun,
    memory: MemoryUse,
    energy: Energy | None,
    unknown: str | None,
) -> Measurement:
    manifest, question, answers = subject.files.manifest, run.question, run.answers
    prefill = Spread.of([answer.prefill for answer in answers])
    decode = Spread.of([ms for answer in answers for ms in answer.decode])
    target, context = manifest.target, manifest.context_tokens
    return Measurement(
        bundle=BundleUsed(str(subject.files.folder), manifest.family, target, manifest.precision, context),
        machine=machine(run.device.gpu),
        engine=subject.engine,
        picture=question.picture.name,
        prompt_tokens=question.prompt_tokens,
        image_rows=question.image_rows,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        warmup=options.warmup,
        load_s=run.load_s,
        preprocess=Spread.of([answer.preprocess for answer in answers]),
        vision=Spread.of([answer.vision for answer in answers]) if question.image_rows else None,
        prefill=prefill,
        first_token=Spread.of([answer.first_token for answer in answers]),
        decode_per_token=decode,
        prefill_tok_s=1e3 * question.prompt_tokens / prefill.p50,
        decode_tok_s=1e3 / decode.p50,
        disk_bytes=disk_use(subject.files.folder, manifest),
        memory=memory,
        energy=energy,
        energy_unknown=unknown,
    )


def _energy(method: str, idle_w: float, spent: dict[str, Spent], options: MeasureOptions) -> Energy:
    """Means over the repeats."""
    phases = {phase: total.joules / options.repeats for phase, total in spent.items()}
    answer_j, answer_s = sum(phases.values()), sum(total.seconds for total in spent.values()) / options.repeats
    num_tokens = options.repeats * options.new_tokens
    token_j, token_s = spent["decode"].joules / num_tokens, spent["decode"].seconds / num_tokens
    return Energy(method, idle_w, phases, answer_j, token_j, answer_j - idle_w * answer_s, token_j - idle_w * token_s)


def _load_graphs(backend: Backend, manifest: Manifest, options: MeasureOptions) -> None:
    """Load the graphs that stay loaded; with residency "phase" each is loaded when needed."""
    if options.residency == "phase":
        return
    backend.warm_up([manifest.token_graph] if options.text_only else list(manifest.graphs))


def disk_use(folder: Path, manifest: Manifest) -> DiskUse:
    """Bytes of the manifest and every file in it."""
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    sizes["manifest.json"] = (folder / "manifest.json").stat().st_size
    graphs = sum(sizes[graph.file] for graph in manifest.graphs.values())
    data = sum(sizes[name] for name in {graph.data_file for graph in manifest.graphs.values()})
    engines = sum(sizes[name] for name in {engine.file for engine in manifest.engines.values()})
    embedding, total = sizes[manifest.embedding.file], sum(sizes.values())
    return DiskUse(total, graphs, data, embedding, engines, total - graphs - data - embedding - engines)


def measure_in_process(folder: Path, options: MeasureOptions) -> Measurement:
    """Measure in a fresh interpreter, which ends with this one and on Ctrl-C. Raises what `measure` raises."""
    request = {"folder": str(folder), "options": asdict(options)}
    with child_process("vlmdeploy.bench.measure", errors=subprocess.PIPE) as process:
        written, told = process.communicate(json.dumps(request).encode())
    _tell(told)
    return _answer_of(written, process.returncode, folder)


def _tell(told: bytes) -> None:
    """Log the measuring process's warnings here, where a report has logged most of them already; print the rest."""
    for line in told.decode(errors="replace").splitlines():
        if line.startswith(WARNING):
            logger.warning("%s", line.removeprefix(WARNING))
        else:
            print(line, file=sys.stderr)


def _answer_of(written: bytes, exit_code: int, folder: Path) -> Measurement:
    """Parse the measuring process's output; raises its error."""
    try:
        answer: dict[str, Any] = json.loads(written)
    except ValueError:  # nothing, or half of it
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with status {exit_code}"
        reason = "most likely for memory" if exit_code == -signal.SIGKILL else "see above"
        raise BackendError(f"{folder}: the measuring process {how}, {reason}") from None
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return record_of(Measurement, answer, "measurement", BackendError)


def main() -> None:
    """The measuring process: a request on stdin, one JSON document on stdout. What libraries print goes to stderr."""
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        json.dump(_measured(request), answer)


def _measured(request: dict[str, Any]) -> dict[str, Any]:
    """The measurement, or an error that the user can solve, as JSON."""
    try:
        options = record_of(MeasureOptions, request["options"], "options")
        return asdict(measure(Path(request["folder"]), options))
    except VlmdeployError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        if error.filename is None:
            raise
        return {"error": "VlmdeployError", "message": f"{error.filename}: {error.strerror}"}
