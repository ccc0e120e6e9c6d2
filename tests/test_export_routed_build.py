"""Contract tests of building a routed bundle: which engines, with which plugin, and what the bundle then holds.

TensorRT itself is not there: the compiler is replaced by one that notes what it was asked for. That TensorRT's own part
of the graph can be built is tested in test_export_engines.py, the plugin in test_plugin_*.py.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tiny_bundle import edit_manifest, export, write_text_checkpoint
from vlmdeploy.bundle import Manifest, read_manifest
from vlmdeploy.errors import BackendError, ExportError
from vlmdeploy.export.engine_build import BuildOptions, build_bundle, read_build_options
from vlmdeploy.export.engine_compiler import EngineRequest, RoutedPlugin, Shapes, profiles
from vlmdeploy.export.options import no_progress
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.plugin_library import PACKING
from vlmdeploy.runtime.tensorrt_library import TensorrtLibrary

Requests = list[EngineRequest]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("build") / "ckpt", mlp=128)


@pytest.fixture
def bundle(ckpt: Path, tmp_path: Path) -> Path:
    return export(ckpt, tmp_path / "bundle", "trt-int4", group=32, routed_plugin="on")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """What the compiler is asked for, on a machine with TensorRT 11.4 and a GPU of SM 8.7."""
    asked: Requests = []

    def compile_engine(request: EngineRequest, progress: object) -> None:
        asked.append(request)
        request.plan.write_text(f"plan of {request.part.name}")

    library = TensorrtLibrary("tensorrt", SimpleNamespace(), "11.4.0")
    monkeypatch.setattr("vlmdeploy.export.engine_build.compile_engine", compile_engine)
    monkeypatch.setattr("vlmdeploy.export.engine_build.import_tensorrt", lambda name: library)
    monkeypatch.setattr("vlmdeploy.export.engine_build.cuda_runtime", lambda: None)
    monkeypatch.setattr("vlmdeploy.export.engine_build.compute_capability", lambda runtime: "8.7")
    return asked


def library_file(folder: Path, content: str = "machine code") -> Path:
    path = folder / "libvlmdeploy_routed.so"
    path.write_text(content)
    return path


def build(bundle: Path, library: Path | None, batch: int = 4) -> tuple[Manifest, bool]:
    return build_bundle(bundle, BuildOptions(shapes=Shapes(batch=batch), plugin_library=library), no_progress)


def test_routed_bundle_gets_one_decoder_engine_and_the_plugin(bundle: Path, requests: Requests, tmp_path: Path) -> None:
    manifest, is_new = build(bundle, library_file(tmp_path))
    assert is_new
    assert [(request.part.name, request.plugin) for request in requests] == [
        ("vision", None), ("decoder", RoutedPlugin(tmp_path / "libvlmdeploy_routed.so", 87)),
    ]  # fmt: skip
    assert manifest == read_manifest(bundle) == check_bundle(bundle, "full")
    assert manifest.plugin is not None
    assert manifest.plugin.library == "engines/libvlmdeploy_routed.so"
    assert (bundle / manifest.plugin.library).read_text() == "machine code"
    assert {engine.batch for engine in manifest.engines.values()} == {4}
    assert {engine.logit_rows for engine in manifest.engines.values()} == {8}


def test_without_a_library_the_kernels_go_into_the_engine(bundle: Path, requests: Requests) -> None:
    manifest, _ = build(bundle, None, batch=16)
    assert requests[1].plugin == RoutedPlugin(None, 87)
    assert manifest.plugin is not None
    assert manifest.plugin.library == ""
    assert {engine.logit_rows for engine in manifest.engines.values()} == {16}, "logits of every prompt"


def test_build_again_does_nothing_unless_the_plugin_changed(bundle: Path, requests: Requests, tmp_path: Path) -> None:
    library = library_file(tmp_path)
    assert [build(bundle, library)[1] for _ in range(2)] == [True, False]
    assert build(bundle, library_file(tmp_path, "other code"))[1]
    assert build(bundle, None)[1]
    assert not build(bundle, None)[1]
    assert build(bundle, library)[1]
    assert build(bundle, library, batch=2)[1]
    assert sorted(path.name for path in (bundle / "engines").iterdir()) == [
        "build.log", "decoder.engine", "libvlmdeploy_routed.so", "vision.engine",
    ]  # fmt: skip


def test_profiles_are_of_batches(bundle: Path, requests: Requests) -> None:
    build(bundle, None)
    prompt, tokens = profiles(requests[1])
    assert prompt == {"rows": (1, 128, 128), "asked": (1, 1, 8), "batch": (1, 1, 4), "tokens": (1, 128, 512)}
    assert tokens == {"rows": (1, 1, 1), "asked": (1, 1, 4), "batch": (1, 1, 4), "tokens": (1, 1, 4)}


def test_codes_of_another_layout_are_refused(bundle: Path, requests: Requests) -> None:
    manifest = read_manifest(bundle)
    assert manifest.plugin is not None
    assert manifest.plugin.packing == PACKING
    edit_manifest(bundle, plugin=replace(manifest.plugin, packing=2))
    with pytest.raises(ExportError, match=r"packed in layout 2.*read layout 1.*export it again"):
        build(bundle, None)
    assert requests == []


def test_failed_build_leaves_the_bundle_as_it_was(
    bundle: Path, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in bundle.iterdir()}

    def fail(request: EngineRequest, progress: object) -> None:
        raise BackendError("no kernels for SM 75")

    monkeypatch.setattr("vlmdeploy.export.engine_build.compile_engine", fail)
    with pytest.raises(BackendError, match="no kernels for SM 75"):
        build(bundle, None)
    assert {path: path.read_bytes() for path in bundle.iterdir()} == before


def test_options_carry_batch_and_plugin() -> None:
    options = read_build_options((), 64, None, None, 4, Path("x.so"), "on")
    assert (options.shapes, options.plugin_library, options.routed_plugin) == (Shapes(64, batch=4), Path("x.so"), "on")
