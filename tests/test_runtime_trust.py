"""Contract tests: native code of a bundle, its engines and its plugin library, is loaded only if the user trusts it."""

import ctypes
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import vlmdeploy
from tests.fake_tensorrt import write_fake_engines
from tests.tiny_bundle import edit_manifest, export, only_error_line, run_cli, sign_again, write_text_checkpoint
from vlmdeploy.bundle import hash_file, read_manifest
from vlmdeploy.errors import BackendError, BundleError
from vlmdeploy.export.engines.parts import EnginePart
from vlmdeploy.manifest import MANIFEST_NAME, PluginUse

GPU = "needs a CUDA GPU"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    return export(write_text_checkpoint(folder / "ckpt", seed=5), folder / "bundle", "trt-int4")


@pytest.fixture
def stranger(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete bundle with engines, none of whose manifests this user ever saw."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    bundle = shutil.copytree(exported, tmp_path / "bundle")
    edit_manifest(bundle, target="rtx-int4")
    layers = (0, read_manifest(bundle).cache.num_layers)
    spans = {"vision": (0, 0), "decoder_text": layers, "decoder_vision": layers}
    write_fake_engines(bundle, [EnginePart(name, 0, span, 0, True) for name, span in spans.items()], 8, 4)
    return bundle


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The libraries that were loaded from a path of ours, without loading them."""
    names: list[str] = []
    real = ctypes.CDLL

    def load(name: str | None, *rest: object, **options: object) -> object:
        if name is not None and "bundle" in str(name):
            names.append(str(name))
            raise OSError("not loaded in a test")
        return real(name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ctypes, "CDLL", load)
    return names


@pytest.mark.parametrize("command", [["run", "--prompt", "Hello"], ["verify"], ["bench"]])
def test_command_refuses_in_one_line_that_names_the_way_out(stranger: Path, command: list[str]) -> None:
    line = only_error_line(run_cli(command[0], stranger, *command[1:]))
    assert f"`vlmdeploy trust {stranger}`" in line and "native code" in line


def test_trusted_bundle_is_loaded_until_one_byte_of_its_manifest_changes(stranger: Path) -> None:
    result = run_cli("trust", stranger)
    assert result.exit_code == 0 and hash_file(stranger / MANIFEST_NAME).sha256 in result.stdout
    with pytest.raises(BackendError, match=GPU):
        vlmdeploy.open(stranger)
    edit_manifest(stranger, requested_group=64)
    with pytest.raises(BundleError, match="vlmdeploy trust"):
        vlmdeploy.open(stranger)


def test_trust_is_one_users_on_one_machine(stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cli("trust", stranger)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    with pytest.raises(BundleError, match="vlmdeploy trust"):
        vlmdeploy.open(stranger)


def test_revoked_trust_is_gone(stranger: Path) -> None:
    run_cli("trust", stranger)
    assert run_cli("trust", stranger, "--revoke").exit_code == 0
    with pytest.raises(BundleError, match="vlmdeploy trust"):
        vlmdeploy.open(stranger)
    assert "is not trusted here" in only_error_line(run_cli("trust", stranger, "--revoke"))


def test_python_can_trust_for_once(stranger: Path) -> None:
    with pytest.raises(BackendError, match=GPU):
        vlmdeploy.open(stranger, trust=True)
    with pytest.raises(BundleError, match="vlmdeploy trust"):
        vlmdeploy.open(stranger)


def test_damaged_bundle_is_not_trusted(stranger: Path) -> None:
    (stranger / "engines/vision.engine").write_text("another plan")
    assert "engines/vision.engine" in only_error_line(run_cli("trust", stranger))


def test_graphs_need_no_trust(stranger: Path) -> None:
    with vlmdeploy.open(stranger, provider="cpu", threads=1) as session:
        assert list(session.generate([{"role": "user", "content": "Hello"}], max_new_tokens=2))


def test_bundle_for_onnx_runtime_needs_no_trust(answering_bundle: Path) -> None:
    assert "needs no trust" in only_error_line(run_cli("trust", answering_bundle))


def test_user_without_a_home_is_told_what_to_set(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert "XDG_STATE_HOME" in only_error_line(run_cli("trust", stranger))


@pytest.mark.parametrize("name", ["../evil.so", "/tmp/bundle/evil.so", "evil.so", "engines/evil.so"])
@pytest.mark.parametrize("target", ["ort-int4", "trt-int4", "rtx-int4"])
@pytest.mark.parametrize("command", [["run", "--prompt", "Hello"], ["verify"], ["bench"], ["inspect"], ["build"]])
def test_no_command_loads_the_library_of_a_stranger(
    exported: Path, tmp_path: Path, loaded: list[str], name: str, target: str, command: list[str]
) -> None:
    """`run`, `verify` and `open` loaded the library that the manifest names, before they looked at the target."""
    bundle = shutil.copytree(exported, tmp_path / "bundle")
    (tmp_path / "evil.so").write_bytes(b"code")
    (bundle / "engines").mkdir()
    for path in (bundle / "evil.so", bundle / "engines/evil.so"):
        path.write_bytes(b"code")
    manifest = read_manifest(bundle)
    entry = hash_file(bundle / "evil.so")
    changed = replace(manifest, target=target, plugin=PluginUse(1, name), files={**manifest.files, name: entry})
    with pytest.MonkeyPatch.context() as patch:  # a stranger's own writer does not ask our rules
        patch.setattr("vlmdeploy.bundle.check_manifest", lambda *_: None)
        edit_manifest(bundle, **{key: getattr(changed, key) for key in ("target", "plugin", "files")})
    only_error_line(run_cli(command[0], bundle, *command[1:]))
    assert loaded == []


def test_library_that_was_changed_after_it_was_trusted_is_not_loaded(stranger: Path, loaded: list[str]) -> None:
    run_cli("trust", stranger)
    (stranger / "engines/decoder_text.engine").write_bytes(b"other")
    sign_again(stranger)
    with pytest.raises(BundleError, match="vlmdeploy trust"):
        vlmdeploy.open(stranger)
    assert loaded == []
