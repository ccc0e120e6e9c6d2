"""Contract tests: who may import whom, read from the source of every module, and what a bare import loads.

Arrows point one way only, so that the runtime stays free of torch and each part can be read without the ones above it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import vlmdeploy

ROOT = Path(vlmdeploy.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Part -> what of vlmdeploy it may import besides itself; "cli" only inside its functions.
OURS: dict[str, set[str]] = {
    "__init__": {"model.load", "runtime.session"},
    "__main__": {"cli"},
    "errors": set(),
    "progress": set(),
    "overriding": set(),
    "records": {"errors"},
    "artifact": {"errors"},
    "byte_sizes": {"errors"},
    "child_process": {"errors"},
    "devices": {"errors"},
    "bundle": {"records", "errors"},
    "layout": {"bundle", "errors"},
    "spec": {"bundle", "records", "errors"},
    "families": {"spec", "bundle", "records", "errors"},
    "kernels": {"errors"},
    "quant": {"spec", "bundle", "byte_sizes", "records", "errors"},
    "runtime": {"layout", "bundle", "byte_sizes", "errors"},
    "data": {"runtime.image", "runtime.chat", "runtime.boxes", "errors"},
    "model": {"families", "quant", "kernels", "spec", "layout", "bundle", "records", "errors"},
    "bench": {"runtime", "layout", "bundle", "byte_sizes", "child_process", "records", "errors"},
    "score": {"model", "data", "runtime", "layout", "artifact", "bundle", "progress", "errors"},
    "train": {
        "model", "families", "spec", "runtime.chat", "runtime.image", "artifact", "bundle", "records", "progress",
        "errors",
    },
    "calib": {
        "model", "data", "runtime", "quant", "spec", "layout", "artifact", "bundle", "byte_sizes",
        "records", "progress", "errors",
    },
    "export": {
        "calib", "model", "runtime", "quant", "kernels", "spec", "layout", "devices", "artifact", "bundle",
        "byte_sizes", "child_process", "progress", "errors",
    },
    "report": {
        "score", "bench", "model", "data", "runtime", "quant", "spec", "layout", "artifact", "bundle", "byte_sizes",
        "records", "progress", "errors",
    },
    "plan": {
        "export", "model", "runtime", "families", "quant", "spec", "devices", "bundle", "byte_sizes", "records",
        "errors",
    },
    "diff": {"export", "model", "runtime", "quant", "spec", "layout", "bundle", "progress", "errors"},
    "sweep": {
        "report", "export", "calib", "model", "data", "quant", "artifact", "bundle", "child_process", "records",
        "progress", "errors",
    },
    "cli": {
        "sweep", "diff", "plan", "report", "export", "calib", "train", "score", "bench", "model", "data", "quant",
        "runtime", "devices", "bundle", "progress", "errors",
    },
}  # fmt: skip

# Part -> other people's packages: at the top of a module, and (after the bar) only inside functions.
THEIRS: dict[str, str] = {
    "layout": "numpy |",
    "runtime": "numpy PIL tokenizers | onnxruntime cuda tensorrt",
    "bench": "numpy PIL | onnxruntime cuda pynvml",
    "data": "numpy PIL |",
    "quant": "numpy torch safetensors numba |",
    "kernels": "numpy torch | triton",
    "kernels/routed.py": "triton |",  # imported inside functions, or by a process of its own:
    "kernels/compile_architecture.py": "triton |",
    "model": "numpy torch safetensors tokenizers | sentencepiece",
    "calib": "numpy torch safetensors PIL |",
    "score": "numpy torch PIL | openpyxl",
    "report": "numpy torch PIL | jinja2 markupsafe matplotlib openpyxl",
    "sweep": "numpy | ray",
    "train": "numpy torch safetensors tokenizers |",
    "export": "numpy torch safetensors onnx tokenizers PIL | onnxruntime tensorrt",
    "plan": "numpy | jinja2",
    "diff": "numpy torch safetensors onnx PIL | onnxruntime matplotlib",
    "cli/console.py": "rich |",
    "cli": "click |",
}
NAMES_TAKEN = {name for names in THEIRS.values() for name in names.split()} | {"sklearn", "transformers", "pytest"}


@dataclass(frozen=True)
class Import:
    """One imported module as it is written, e.g. "numpy.typing", and whether only a function call imports it.

    What stands under `if TYPE_CHECKING` is imported by no running program, and counts as inside a function.
    """

    module: str
    inside_function: bool
    line: int

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def part_of(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def parsed_imports(path: Path) -> list[Import]:
    """Every import statement of a file."""
    return list(imports_of(ast.parse(path.read_text(encoding="utf-8"))))


def imports_of(node: ast.AST, inside_function: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, inside_function, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                yield Import(
                    submodule if is_our_module(submodule) else str(child.module), inside_function, child.lineno
                )
        else:
            yield from imports_of(child, inside_function or is_run_later(child))


def is_run_later(node: ast.AST) -> bool:
    is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return is_for_types or isinstance(node, (ast.FunctionDef, ast.Lambda))


def is_our_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def module_name(path: Path) -> str:
    """A module's dotted name, from its file."""
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def is_allowed(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


@every_module
def test_module_imports_only_the_parts_below_it(path: Path) -> None:
    part = part_of(path)
    assert part in OURS, f"{part} is a new part of vlmdeploy: say in this table what it may import"
    for found in parsed_imports(path):
        if found.top == "vlmdeploy" and found.module != "vlmdeploy":
            wanted = found.module.removeprefix("vlmdeploy.")
            assert is_allowed(wanted, OURS[part] | {part, "overriding"}), (
                f"{path}:{found.line}: {part} may not import {wanted}"
            )


@every_module
def test_module_imports_only_the_dependencies_of_its_part(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    always, _, in_functions = THEIRS.get(name, THEIRS.get(part_of(path), "|")).partition("|")
    for found in parsed_imports(path):
        if found.top == "vlmdeploy" or found.top in sys.stdlib_module_names:
            continue
        allowed = always.split() + (in_functions.split() if found.inside_function else [])
        assert found.top in allowed, f"{path}:{found.line}: {found.top} is not allowed here"


@every_module
def test_module_is_not_named_like_a_dependency(path: Path) -> None:
    assert not {*path.relative_to(ROOT).parts[:-1], path.stem} & NAMES_TAKEN


def test_commands_import_their_needs_when_called() -> None:
    for path in (ROOT / "cli").glob("*.py"):
        for found in parsed_imports(path):
            light = found.module.removeprefix("vlmdeploy.").partition(".")[0] in {"vlmdeploy", "errors", "cli"}
            assert light or found.top != "vlmdeploy" or found.inside_function, (
                f"{path}:{found.line}: {found.module} makes --help slow"
            )
    assert loaded_after("import vlmdeploy.cli", "torch", "onnxruntime", "numpy", "PIL", "tokenizers") == []


def test_test_folders_are_not_named_like_a_part() -> None:
    assert not {path.name for path in Path(__file__).parent.iterdir() if path.is_dir()} & set(OURS)


def loaded_after(code: str, *names: str) -> list[str]:
    """Which of the named packages a fresh process has loaded after running the code."""
    report = f"{code}\nimport sys\nprint(*(name for name in {names!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return result.stdout.split()


def test_importing_vlmdeploy_loads_nothing_heavy() -> None:
    assert loaded_after("import vlmdeploy", "torch", "onnxruntime", "numpy", "PIL", "tokenizers", "click") == []


def test_families_and_bundle_need_the_standard_library_only() -> None:
    code = "from vlmdeploy.families import all_families\nall_families()\nimport vlmdeploy.bundle"
    assert loaded_after(code, "torch", "onnxruntime", "numpy", "PIL", "tokenizers") == []


def test_runtime_imports_where_torch_cannot_be_imported() -> None:
    folders = [ROOT / "runtime", ROOT / "runtime/backends", ROOT / "bench"]
    names = [module_name(path) for folder in folders for path in folder.glob("*.py")]
    blocked = "import sys\nfor name in ('torch', 'onnx', 'safetensors'): sys.modules[name] = None"
    ours = ("vlmdeploy.model", "vlmdeploy.families", "vlmdeploy.export", "vlmdeploy.quant", "vlmdeploy.calib")
    assert loaded_after(f"{blocked}\nimport {', '.join(names)}", *ours) == []


def test_engines_are_built_where_torch_cannot_be_imported() -> None:
    blocked = "import sys\nfor name in ('torch', 'safetensors'): sys.modules[name] = None"
    ours = ("vlmdeploy.model", "vlmdeploy.quant", "vlmdeploy.calib")
    assert loaded_after(f"{blocked}\nimport vlmdeploy.export.engines.build", *ours) == []


def test_kernels_are_packed_and_read_where_neither_torch_nor_triton_can_be_imported() -> None:
    blocked = "import sys\nfor name in ('torch', 'triton'): sys.modules[name] = None"
    imports = "import vlmdeploy.kernels.packing, vlmdeploy.kernels.compiled_kernels, vlmdeploy.kernels.compile"
    assert loaded_after(f"{blocked}\n{imports}", "numba") == []


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = vlmdeploy.load_modle
