"""Contract: what the wheel holds, what the base install needs, and that README commands exist."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "vlmdeploy/kernels/cpu/_operators.abi3.so"


def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without network from a copy of what it is made of."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(_copy_of_sources(folder / "source"))], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("vlmdeploy-*.whl")))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as this machine builds it."""
    return built_wheel(tmp_path_factory)


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The same, on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "false")
        patch.setenv("CXX", "false")
        return built_wheel(tmp_path_factory)


def _copy_of_sources(folder: Path) -> Path:
    """Building in place would leave folders in the checkout."""
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE", *(ROOT / "vlmdeploy").rglob("*.*")]:
        if path.is_file() and path.suffix not in (".pyc", ".so"):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "vlmdeploy").rglob("*.py")} | {"vlmdeploy/py.typed"}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "vlmdeploy").rglob("templates/*")}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "vlmdeploy/kernels/compiled").glob("*")}
    kernels.add("vlmdeploy/kernels/block_shapes.json")
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert templates
    assert held == sources | templates | kernels | {LIBRARY}


def test_wheel_without_a_compiler_lacks_the_operators_alone(
    wheel: zipfile.ZipFile, wheel_without_compiler: zipfile.ZipFile
) -> None:
    held = [{name for name in one.namelist() if ".dist-info/" not in name} for one in (wheel, wheel_without_compiler)]
    assert held[0] - held[1] == {LIBRARY}
    assert held[1] <= held[0]


def test_wheel_brings_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    names = [name.split(".dist-info/")[1] for name in wheel.namelist() if ".dist-info/" in name]
    assert "licenses/LICENSE" in names
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "vlmdeploy = vlmdeploy.cli:main" in wheel.read(entry_points).decode()


def test_base_install_has_neither_torch_nor_an_engine() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[]", dependency)[0] for dependency in project["dependencies"]}
    assert needed == {"numpy", "pillow", "tokenizers", "click", "rich"}


def test_lowest_versions_are_the_floors() -> None:
    """A floor once allowed a Pillow that called junk an AVIF picture, and an onnx without the operators we write."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = [name for group in ("cpu", "toolchain", "digits", "report") for name in extras[group]]
    lines = (ROOT / "requirements-lowest.txt").read_text().splitlines()
    lowest = [line.replace("==", ">=") for line in lines if line and not line.startswith("#")]
    assert sorted(lowest) == sorted(need.partition(",")[0] for need in [*project["dependencies"], *tested])
    elsewhere = {name for group in extras.values() for name in group if name.startswith("onnx>")}
    assert elsewhere <= set(lowest), "every extra asks for the same onnx"


def test_engine_extras_bring_exactly_one_onnxruntime() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    engines = [[item for item in extras[name] if item.startswith("onnxruntime")] for name in ("cpu", "cuda")]
    assert [len(items) for items in engines] == [1, 1]
    assert not any(item.startswith("onnxruntime") for name in ("toolchain", "digits", "dev") for item in extras[name])


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests" / "golden").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"
