"""Contract tests: who may import whom, read from the source of every module, and what a bare import loads.

Arrows point one way only, so that the runtime stays free of torch and each part can be read without the ones above it.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import vlmdeploy

ROOT = Path(vlmdeploy.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

PAGE = (ROOT.parent / "docs/architecture.md").read_text(encoding="utf-8")
FREE = {"errors", "overriding"}  # what everyone may import
LIGHT = {"vlmdeploy", "errors", "standard_streams", "stopping", "cli"}  # what --help loads


def read_floors() -> list[list[str]]:
    """The floors of the page, top down."""
    block = re.search(r"^## Floors\n.*?```\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None, "docs/architecture.md has no floors"
    return [line.split() for line in block[1].splitlines()]


def read_table() -> dict[str, tuple[set[str], str]]:
    """The import table of the page: package -> what of ours, and what of other people's it may import."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\| ?(.*) \|$", PAGE, re.MULTILINE)
    return {package: (set(ours.split()), theirs.replace("\\|", "|")) for package, ours, theirs in rows}


FLOORS = read_floors()
TABLE = read_table()
OURS: dict[str, set[str]] = {package: ours for package, (ours, _) in TABLE.items()} | {
    "errors": set(), "__init__": {"model.load", "runtime.image_limits", "runtime.session"}, "__main__": {"cli"},
}  # fmt: skip
# Single modules, narrower or wider than their package: other people's packages, at the top and (after the bar) inside
# functions.
MODULES_OF_THEIR_OWN: dict[str, str] = {
    "kernels/routed.py": "triton |",  # imported inside functions, or by a process of its own:
    "kernels/compile_architecture.py": "triton |",
}
THEIRS: dict[str, str] = {package: theirs for package, (_, theirs) in TABLE.items()} | MODULES_OF_THEIR_OWN
NAMES_TAKEN = {name for names in THEIRS.values() for name in names.split() if name != "|"} | {
    "sklearn",
    "transformers",
    "pytest",
}


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
    assert part in OURS, f"{part} is a new part of vlmdeploy: say in docs/architecture.md what it may import"
    for found in parsed_imports(path):
        if found.top == "vlmdeploy" and found.module != "vlmdeploy":
            wanted = found.module.removeprefix("vlmdeploy.")
            assert is_allowed(wanted, OURS[part] | FREE | {part}), (
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


def imported_modules(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    return {found.module for found in parsed_imports(path) if found.module in {module_name(other) for other in MODULES}}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to themselves, or none."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next((circle for other in sorted(graph[name]) if (circle := search(other, [*way, name]))), [])
        done.add(name)
        return found

    return next((circle for name in graph if (circle := search(name, []))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    own = {"vlmdeploy"}  # names what is loaded lazily
    graph = {module_name(path): imported_modules(path) - own for path in MODULES if module_name(path) not in own}
    assert circle_in(graph) == []


def test_imports_point_down_or_stay_on_their_floor() -> None:
    floor_of = {package: number for number, packages in enumerate(FLOORS) for package in packages}
    assert set(floor_of) == set(TABLE) | {"errors"}
    for package, (ours, _) in TABLE.items():
        for name in ours:
            other = name.partition(".")[0]
            assert floor_of[other] >= floor_of[package], f"{package} imports {name}, which stands above it"
    assert circle_in({package: {name.partition(".")[0] for name in ours} for package, ours in OURS.items()}) == []


def test_table_allows_nothing_that_nobody_imports() -> None:
    used: dict[str, set[str]] = {}
    for path in MODULES:
        used.setdefault(part_of(path), set()).update(imported_modules(path))
    for package, (ours, _) in TABLE.items():
        unused = [
            name
            for name in ours
            if not any(is_allowed(module.removeprefix("vlmdeploy."), {name}) for module in used[package])
        ]
        assert unused == [], f"{package} imports nothing of {unused}"


def test_no_package_outgrows_the_others() -> None:
    lines: Counter[str] = Counter()
    for path in MODULES:
        lines[part_of(path)] += path.read_text(encoding="utf-8").count("\n")
    package, most = lines.most_common(1)[0]
    assert most < 0.15 * lines.total(), f"{package} holds {most / lines.total():.0%} of all lines"


def test_nothing_is_unpickled() -> None:
    """Reading a pickle runs its code; child processes get JSON."""
    for path in MODULES:
        assert not {"pickle", "shelve", "marshal", "dill"} & {found.top for found in parsed_imports(path)}, path


def test_nobody_but_the_backends_asks_which_backend_it_has() -> None:
    for path in MODULES:
        if "backends" not in path.parts:
            assert not re.search(r"isinstance\([^)]*(Ort|Trt)Backend", path.read_text(encoding="utf-8")), path


def test_commands_import_their_needs_when_called() -> None:
    for path in (ROOT / "cli").glob("*.py"):
        for found in parsed_imports(path):
            light = found.module.removeprefix("vlmdeploy.").partition(".")[0] in LIGHT
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
