"""Attack every target, or the named ones, and keep what was found in the corpus; then the writers."""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
HANG_S = 20  # without an answer
START_S = 300  # to import and to make the models


@dataclass
class Outcome:
    """What came of one target. findings: what went wrong, by the file of the input."""

    inputs: int = 0
    findings: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Attack; the exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="In all; a third of it for the writers.")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="Only these; may be repeated.")
    parser.add_argument("--seed", type=int, default=0)
    has_atheris = importlib.util.find_spec("atheris") is not None
    engines = ["atheris", "mutation"] if has_atheris else ["mutation"]
    parser.add_argument("--engine", choices=engines, default=engines[0])
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    for_storage = 0 if options.target else options.minutes / 3
    found = 0
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            outcome = attack(
                name, 60 * (options.minutes - for_storage) / len(names), options.seed, Path(work), options.engine
            )
            found += len(outcome.findings)
            print(f"{name}: {outcome.inputs} inputs, {len(outcome.findings)} findings", flush=True)
            for file, said in outcome.findings.items():
                print(f"  {file}: {said}", flush=True)
    if for_storage:
        command = [sys.executable, "-m", "fuzz.storage", "--minutes", str(for_storage), "--seed", str(options.seed)]
        found += subprocess.run(command, cwd=CORPUS.parent.parent, check=False).returncode
    sys.exit(1 if found else 0)


def attack(name: str, seconds: float, seed: int, work: Path, engine: str) -> Outcome:
    """Run workers until the time is over; each ends with its first finding."""
    outcome, until, place = Outcome(), time.monotonic() + seconds, work / name
    place.mkdir()
    for turn in range(1000):
        left = until - time.monotonic()
        if left < 1:
            break
        command = [
            sys.executable, "-m", "fuzz.worker", "--target", name, "--seconds", f"{left:.1f}", "--seed",
            f"{seed + 1000 * turn}", "--work", str(work), "--engine", engine,
        ]  # fmt: skip
        for left_over in ("current", "finding", "inputs"):
            (place / left_over).unlink(missing_ok=True)
        finding = _run(command, place)
        outcome.inputs += int(_text(place / "inputs") or 0)
        if finding is not None and finding not in outcome.findings.values():
            outcome.findings[_keep(name, place / "current")] = finding
    return outcome


def _run(command: list[str], place: Path) -> str | None:
    """Start a worker and wait for it; what it found, in a line, or None."""
    begun = time.time()
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=CORPUS.parent.parent)
        while process.poll() is None:
            time.sleep(0.2)
            current = place / "current"
            last = current.stat().st_mtime if current.exists() else begun + START_S
            if time.time() - last > HANG_S:
                process.kill()
                process.wait()
                return f"no answer within {HANG_S} s"
    if process.returncode == 0:
        return None
    last_line = (_text(place / "log").strip().splitlines() or [""])[-1]
    return _text(place / "finding") or f"the process ended with status {process.returncode}: {last_line:.200}"


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _keep(name: str, current: Path) -> str:
    """Keep the input in the corpus; returns the file's name there."""
    content = current.read_bytes() if current.exists() else b""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / sha256(content).hexdigest()[:16]
    path.write_bytes(content)
    return str(path.relative_to(CORPUS.parent))


if __name__ == "__main__":
    main()
