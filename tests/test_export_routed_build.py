"""Contract tests of building a routed bundle: which engines, with which plugin, and what the bundle then holds.

TensorRT itself is not there: the compiler is replaced by one that notes what it was asked for. That TensorRT's own part
of the graph can be built is tested in test_export_engines.py, the plugin in test_plugin_*.py.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from tests.tiny_bundle import edit_manifest, export, write_text_checkpoint
from vlmdeploy.bundle import read_manifest
from vlmdeploy.errors import BackendError, BundleError, ExportError
from vlmdeploy.export.engines.build import BuildOptions, build_bundle
from vlmdeploy.export.engines.compiler import EngineRequest, RoutedPlugin, profiles, use_plugin
from vlmdeploy.manifest import Manifest
from vlmdeploy.progress import no_progress
from vlmdeploy.runtime.backends.plugin_library import PACKING
from vlmdeploy.runtime.backends.trt_library import TensorrtLibrary
from vlmdeploy.runtime.integrity import check_bundle
from vlmdeploy.runtime.session import open_bundle

Requests = list[EngineRequest]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified routed bundle without engines. Shared: copy it before changing it."""
    folder = tmp_path_factory.mktemp("build")
    ckpt = write_text_checkpoint(folder / "ckpt", mlp=128)
    return export(ckpt, folder / "bundle", "trt-int4", group=32, routed_plugin="on")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """What the compiler is asked for, on a machine with TensorRT 11.4 and a GPU of SM 8.7."""
    asked: Requests = []

    def compile_engine(request: EngineRequest, progress: object) -> None:
        asked.append(request)
        request.plan.write_text(f"plan of {request.part.name}")

    library = TensorrtLibrary("tensorrt", ModuleType("tensorrt"), "11.4.0")
    monkeypatch.setattr("vlmdeploy.export.engines.build.compile_engine", compile_engine)
    monkeypatch.setattr("vlmdeploy.export.engines.build.import_tensorrt", lambda name: library)
    monkeypatch.setattr("vlmdeploy.export.engines.build.cuda_runtime", lambda: None)
    monkeypatch.setattr("vlmdeploy.export.engines.build.compute_capability", lambda runtime: "8.7")
    return asked


def library_file(folder: Path, content: str = "machine code") -> Path:
    path = folder / "routed.so"
    path.write_text(content)
    return path


def build(bundle: Path, library: Path | None, batch: int = 4) -> tuple[Manifest, bool]:
    return build_bundle(bundle, BuildOptions(batch=batch, plugin_library=library), no_progress)


def test_routed_bundle_gets_one_decoder_engine_and_the_plugin(bundle: Path, requests: Requests, tmp_path: Path) -> None:
    manifest, is_new = build(bundle, library_file(tmp_path))
    assert is_new
    assert [(request.part.name, request.plugin) for request in requests] == [
        ("decoder", RoutedPlugin(tmp_path / "routed.so", 87)), ("vision", None),
    ], "the decoder first: a plugin that does not fit is told at once"  # fmt: skip
    assert manifest == read_manifest(bundle) == check_bundle(bundle, "full").manifest
    assert manifest.plugin is not None
    assert manifest.plugin.library == "engines/libvlmdeploy_routed.so"
    assert (bundle / manifest.plugin.library).read_text() == "machine code"
    assert {engine.batch for engine in manifest.engines.values()} == {4}
    assert {engine.logit_rows for engine in manifest.engines.values()} == {8}


def test_without_a_library_the_kernels_go_into_the_engine(bundle: Path, requests: Requests) -> None:
    manifest, _ = build(bundle, None, batch=16)
    assert requests[0].plugin == RoutedPlugin(None, 87)
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


@pytest.mark.parametrize("change", [
    {"version": "11.3.0"}, {"compute_capabilities": ("11.0",)}, {"chunk_rows": 64}, {"logit_rows": 16}, {"batch": 8},
    {"library": "tensorrt_rtx"},
])  # fmt: skip
def test_engines_made_otherwise_are_built_again(change: dict[str, Any], bundle: Path, requests: Requests) -> None:
    manifest, _ = build(bundle, None)
    edit_manifest(bundle, engines=manifest.engines | {"decoder": replace(manifest.engines["decoder"], **change)})
    assert build(bundle, None) == (manifest, True)


@pytest.mark.parametrize("name", ["decoder.engine", "build.log", "caf\udce9.so"])
def test_plugin_has_one_name_in_the_bundle(name: str, bundle: Path, requests: Requests, tmp_path: Path) -> None:
    """A library called like one of our files took its place; a name that is no text could not be listed."""
    manifest, _ = build(bundle, library_file(tmp_path).rename(tmp_path / name))
    assert manifest == check_bundle(bundle, "full").manifest
    assert (bundle / "engines/libvlmdeploy_routed.so").read_text() == "machine code"
    assert (bundle / "engines/decoder.engine").read_text() == "plan of decoder"


def test_plugin_of_the_bundle_itself_can_be_used_again(bundle: Path, requests: Requests, tmp_path: Path) -> None:
    build(bundle, library_file(tmp_path))
    manifest, is_new = build(bundle, bundle / "engines/libvlmdeploy_routed.so", batch=2)
    assert is_new and manifest == check_bundle(bundle, "full").manifest
    assert (bundle / "engines/libvlmdeploy_routed.so").read_text() == "machine code"


def test_missing_plugin_is_found_when_the_bundle_is_opened(bundle: Path, requests: Requests, tmp_path: Path) -> None:
    build(bundle, library_file(tmp_path))
    (bundle / "engines/libvlmdeploy_routed.so").unlink()
    with pytest.raises(BundleError, match=r"libvlmdeploy_routed\.so: no such file; expected what the manifest lists"):
        open_bundle(bundle)
    assert build(bundle, library_file(tmp_path))[1], "and comes back"
    check_bundle(bundle, "full")


def test_build_that_is_cut_off_at_the_end_leaves_no_engines_and_no_plugin(
    bundle: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest between two sets of engines named the old plugin, whose file was gone."""
    build(bundle, library_file(tmp_path))
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == ".engines.partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ExportError, match="No space left"):
        build(bundle, library_file(tmp_path), batch=2)
    with pytest.raises(BackendError, match="has no engines yet"):
        open_bundle(bundle)
    plugin = check_bundle(bundle, "full").manifest.plugin
    assert plugin is not None and plugin.library == ""


def test_device_too_small_for_the_lanes_is_told(bundle: Path, requests: Requests) -> None:
    """The cache of one prompt fits, those of two million do not."""
    small, large = (BuildOptions(batch=batch, device_name="orin-nx-16") for batch in (4, 2_000_000))
    with pytest.raises(ExportError, match=r"--device orin-nx-16 has 14\.\d GB .* needs"):
        build_bundle(bundle, large, no_progress)
    assert requests == []
    assert build_bundle(bundle, small, no_progress)[1]


def test_profiles_are_of_batches(bundle: Path, requests: Requests) -> None:
    build(bundle, None)
    prompt, tokens = profiles(requests[0])
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

    monkeypatch.setattr("vlmdeploy.export.engines.build.compile_engine", fail)
    with pytest.raises(BackendError, match="no kernels for SM 75"):
        build(bundle, None)
    assert {path: path.read_bytes() for path in bundle.iterdir()} == before


@pytest.mark.parametrize("library", [None, Path("libvlmdeploy_routed.so")])
def test_builder_takes_the_bodies_out_and_brings_the_form_that_was_asked_for(
    library: Path | None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, object]] = []
    place = "vlmdeploy.export.engines.compiler"
    monkeypatch.setattr(f"{place}.load_plugin_library", lambda path, _, sm: used.append((str(path), sm)))
    monkeypatch.setattr(f"{place}.register_routed_plugins", lambda _, sm: used.append(("kernels", sm)))
    model = onnx.load(str(bundle / "decoder.onnx"), load_external_data=False)
    use_plugin(TensorrtLibrary("tensorrt", ModuleType("tensorrt"), "11.4.0"), RoutedPlugin(library, 87), model)
    assert used == [("kernels" if library is None else "libvlmdeploy_routed.so", 87)]
    assert [function.name for function in model.functions] == ["TRT_Attention"]
