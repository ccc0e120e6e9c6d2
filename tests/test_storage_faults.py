"""Contract tests of storage: whatever operation fails and whenever the power does, the old output or the new one is
whole, nothing is left beside it, and the same command ends in the same bytes.

First the model of a disk, operation by operation; then campaigns of `python -m fuzz.storage`, each in its own process.
"""

import stat
import sys
from random import Random
from typing import Any

import pytest

from fuzz.storage.replay import Cut, History, Node, Tree
from fuzz.storage.shim import Operation, compiler
from tests.tiny_bundle import run_process

ROOT, INNER = 1, 2  # inode numbers of folders
FILE = stat.S_IFREG | 0o644
FOLDER = stat.S_IFDIR | 0o755
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or compiler() is None, reason="needs a C compiler, to see what the process does"
)


def operation(kind: str, inode: int = 0, folder: int = 0, **fields: Any) -> Operation:
    defaults: dict[str, Any] = {
        "error": 0,
        "to_folder": 0,
        "offset": 0,
        "size": 0,
        "name": "",
        "to_name": "",
        "data": b"",
    }
    return Operation(kind, inode=inode, folder=folder, **defaults | fields)


def created(inode: int, name: str, folder: int = ROOT) -> Operation:
    return operation("create", inode, folder, name=name, size=0o644)


def written(inode: int, data: bytes, offset: int = 0) -> Operation:
    return operation("write", inode, data=data, offset=offset)


def synced(inode: int) -> Operation:
    return operation("sync", inode)


def renamed(inode: int, name: str, to_name: str, kind: str = "rename", folder: int = ROOT) -> Operation:
    return operation(kind, inode, folder, name=name, to_folder=folder, to_name=to_name)


def removed(inode: int, name: str, folder: int = ROOT) -> Operation:
    return operation("unlink", inode, folder, name=name)


def history(*operations: Operation, **before: bytes) -> History:
    """Of a folder with these files, whose inode numbers count from 11, beside an empty folder."""
    nodes = {ROOT: Node(FOLDER, entries={"inner": INNER}), INNER: Node(FOLDER)}
    for inode, (name, content) in enumerate(before.items(), 11):
        nodes[ROOT].entries[name] = inode
        nodes[inode] = Node(FILE, bytearray(content))
    return History(nodes, operations)


def contents(tree: Tree) -> dict[str, bytes]:
    return {path: content for path, (mode, content) in tree.items() if stat.S_ISREG(mode)}


def states(found: History) -> list[dict[str, bytes]]:
    """All files after a power cut at the end, however it goes."""
    end, random = len(found.operations), Random(1)
    cuts = [*found.systematic(end), *(found.random(end, random) for _ in range(300))]
    return [contents(found.tree(cut)) for cut in cuts]


def test_content_that_was_not_synced_may_be_missing_cut_or_zeros() -> None:
    found = states(history(created(3, "new"), written(3, b"content"), synced(ROOT)))
    assert {tree["new"] for tree in found} >= {b"", b"con", b"con" + bytes(4), bytes(7), b"content"}


def test_gap_before_a_write_is_zeros() -> None:
    found = states(history(created(3, "new"), written(3, b"ab"), written(3, b"cd", offset=2), synced(ROOT)))
    assert {b"\0\0cd", b"ab", b"abcd"} <= {tree["new"] for tree in found}


def test_file_that_is_written_over_may_be_any_mixture() -> None:
    cut_off = operation("truncate", 11, size=0)
    found = {tree["old"] for tree in states(history(cut_off, written(11, b"new"), old=b"before"))}
    assert {b"before", b"newore", b"", b"new"} <= found


def test_synced_content_is_there_and_its_name_may_not_be() -> None:
    found = states(history(created(3, "new"), written(3, b"content"), synced(3)))
    assert {tree.get("new") for tree in found} == {None, b"content"}


def test_names_in_a_synced_folder_are_there() -> None:
    found = states(
        history(created(3, "new"), written(3, b"content"), synced(3), removed(11, "old"), synced(ROOT), old=b"")
    )
    assert found == [{"new": b"content"}] * len(found)


def test_renames_are_lost_on_their_own() -> None:
    found = states(history(renamed(11, "a", "c"), renamed(12, "b", "d"), a=b"1", b=b"2"))
    assert {frozenset(tree) for tree in found} == {frozenset(names) for names in ("ab", "cb", "ad", "cd")}


def test_rename_puts_a_file_in_one_place() -> None:
    found = states(history(created(3, "new"), synced(3), renamed(3, "new", "old"), old=b"before"))
    assert {tuple(sorted(tree.items())) for tree in found} == {
        (("old", b"before"),), (("new", b""), ("old", b"before")), (("old", b""),)
    }  # fmt: skip


def test_exchange_changes_both_names_or_none() -> None:
    found = states(history(renamed(11, "a", "b", "exchange"), a=b"1", b=b"2"))
    assert {(tree["a"], tree["b"]) for tree in found} == {(b"1", b"2"), (b"2", b"1")}


def test_what_happens_in_a_folder_goes_where_the_folder_goes() -> None:
    inside = (created(3, "new", INNER), written(3, b"content"), synced(3), synced(INNER))
    found = states(history(*inside, renamed(INNER, "inner", "outer")))
    assert {frozenset(tree) for tree in found} == {frozenset({"inner/new"}), frozenset({"outer/new"})}


def test_inode_number_that_is_used_again_is_another_file() -> None:
    found = history(removed(11, "old"), created(11, "new"), written(11, b"content"), synced(11), old=b"before")
    assert {tuple(sorted(tree.items())) for tree in states(found)} == {
        (("old", b"before"),), (), (("new", b"content"), ("old", b"before")), (("new", b"content"),)
    }  # fmt: skip


def test_in_order_all_operations_before_the_cut_are_there() -> None:
    found = history(created(3, "new"), written(3, b"content"), removed(3, "new"))
    assert [contents(found.tree(Cut(k))) for k in range(4)] == [{}, {"new": b""}, {"new": b"content"}, {}]


# Writers that are wrong, and what their campaigns must find

BROKEN = """
import os, tempfile
from pathlib import Path
from random import Random
from fuzz.storage.campaign import Campaign
from fuzz.storage.scenarios import OUT, Scenario
from fuzz.storage.shim import Shim

def unsynced(file, root):
    file.write(b"new" * 1000)
    file.close()
    (root / "aside").replace(root / OUT / "file")

def in_place(file, root):
    (root / "aside").unlink()
    (root / OUT / "file").write_bytes(b"new" * 1000)

def careless(file, root):
    file.write(b"new" * 1000)
    file.flush()
    os.fsync(file.fileno())
    (root / "aside").replace(root / OUT / "file")
    os.fsync(os.open(root / OUT, os.O_RDONLY))
    os.fsync(os.open(root, os.O_RDONLY))

def old(root):
    (root / OUT).mkdir()
    (root / OUT / "file").write_bytes(b"old" * 1000)

shim = Shim()
for write in (unsynced, in_place, careless):
    def command(root, progress):
        with (root / "aside").open("wb") as file:
            write(file, root)
    scenario = Scenario(write.__name__, command, os.listdir, old)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(scenario, Path(folder, "run"), shim)
        for kind in ("cuts", "faults"):
            for case in campaign.cases(kind, Random()):
                for problem in case().problems:
                    print(write.__name__, kind, problem)
"""


@needs_compiler
def test_wrong_writers_are_found() -> None:
    done = run_process("-c", BROKEN)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.splitlines())
    assert "unsynced cuts the output is neither the old nor the new one" in found
    assert "in_place cuts the output is neither the old nor the new one" in found
    assert "in_place faults the output is neither the old nor the new one" in found
    assert "careless faults fails and leaves aside" in found
    assert [line for line in found if line.startswith("careless faults raises OSError: [Errno 5]")]
    assert not [line for line in found if line.startswith("careless cuts")]


# Our writers

SMALL = (
    "folder", "folder over an old one", "folder over an old one, no exchange", "file", "units",
    "units over an unfinished run",
)  # fmt: skip


def findings(*options: object) -> str:
    """What a campaign finds: nothing, or its report."""
    done = run_process("-m", "fuzz.storage", *options, OMP_NUM_THREADS="1")
    return "" if done.returncode == 0 else done.stdout + done.stderr


def named(names: tuple[str, ...]) -> list[str]:
    return [option for name in names for option in ("--scenario", name)]


@needs_compiler
def test_small_writers_survive_every_power_cut() -> None:
    """A staging folder was not recognized and stayed; a finished unit was "damaged or missing", or what was left of a
    finished run "not an unfinished run"."""
    assert findings(*named(SMALL), "--kind", "cuts") == ""


@needs_compiler
def test_writers_survive_some_faults_and_power_cuts() -> None:
    """An error at the last sync left the new output in place, or the old one beside it."""
    assert findings(*named((*SMALL, "quantize", "export --force")), "--cases", 25, "--seed", 1) == ""


@needs_compiler
@pytest.mark.slow
def test_build_survives_every_power_cut() -> None:
    """The engines got their names before their contents were on the disk, and the manifest before that."""
    assert findings(*named(("build",)), "--kind", "cuts") == ""


@needs_compiler
@pytest.mark.slow
def test_all_commands_survive_some_faults_and_power_cuts() -> None:
    assert findings("--cases", 50, "--seed", 2) == ""
