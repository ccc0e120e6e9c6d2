"""Fixtures that several test files share. Nothing here imports torch before a test asks for it: the runtime's tests
run without."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.golden_cases import GOLDEN

if TYPE_CHECKING:
    from tests.graph_edits import Edit
    from vlmdeploy.export.gate.verify import CheckedBundle
    from vlmdeploy.model.vlm import VisionLanguageModel

GoldenModels = Callable[[str], "VisionLanguageModel"]

# What no test may depend on is odd in every run, so that a test which does falls here and not on another machine only:
# the terminal's width, the language, the time zone, how long temporary paths are. What the package caches lies there
# too, not in the home of whoever runs the tests.
DEEP = f"{'a-deep-temporary-folder-' * 6}{os.getuid()}"
temporary = Path(tempfile.gettempdir())
if temporary.name != DEEP:  # workers of pytest-xdist inherit it
    temporary /= DEEP
    temporary.mkdir(exist_ok=True)
    tempfile.tempdir = str(temporary)
os.environ |= {"TMPDIR": str(temporary)}
os.environ |= {f"XDG_{kind.upper()}_HOME": str(temporary / kind) for kind in ("cache", "state")}
os.environ |= {"COLUMNS": "40", "LC_ALL": "C", "TZ": "Asia/Kathmandu"}
time.tzset()

# Triton decides when it is imported whether kernels are compiled or interpreted; here they are interpreted, on any
# machine. What compiles them is a process of its own, which sets this itself.
os.environ["TRITON_INTERPRET"] = "1"

# A shell starts what it puts into the background with Ctrl-C ignored, and every process that a test starts and then
# interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_model() -> GoldenModels:
    """The PyTorch reference of a golden checkpoint by folder name, float32, loaded once. Do not change its weights."""
    from vlmdeploy import load_model

    return cache(lambda checkpoint: load_model(GOLDEN / checkpoint))


@pytest.fixture(scope="session")
def written_report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a made-up report by its name in tests.report_example, written once. Do not change its files."""
    from tests.report_example import REPORTS, write_pictures
    from vlmdeploy.report.files import write_report

    @cache
    def written(name: str) -> Path:
        folder = write_pictures(tmp_path_factory.mktemp("report"))
        write_report(REPORTS[name](), folder)
        return folder

    return written


@pytest.fixture(scope="session")
def answering_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 bundle with a tokenizer, beside its checkpoint "ckpt". Copy it before changing it."""
    from tests.tiny_bundle import export, write_text_checkpoint

    folder = tmp_path_factory.mktemp("answering")
    return export(write_text_checkpoint(folder / "ckpt", seed=5), folder / "bundle", "ort-int4")


@pytest.fixture
def own_hash_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of hashes of a test that neither reads nor writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vlmdeploy.runtime.integrity.SETTLED_NS", 0)
    return tmp_path / "cache" / "vlmdeploy" / "hashes.json"


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Signals that ask to end do what they do to a process by default; what a command made of them is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.fixture
def as_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No comparison from end to end, as for a model that does not fit in memory: the stages must find everything."""
    monkeypatch.setattr("vlmdeploy.export.gate.verify.WHOLE_MODEL_BYTES", 0)


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[["Edit"], None]:
    """Edit the written files of an export just before they are verified."""
    from vlmdeploy.export.gate.verify import verify_staged

    def install(edit: "Edit") -> None:
        def edit_and_verify(subject: "CheckedBundle", *rest: Any) -> Any:
            edit(subject.files.folder)
            return verify_staged(subject, *rest)

        monkeypatch.setattr("vlmdeploy.export.exporter.verify_staged", edit_and_verify)

    return install
