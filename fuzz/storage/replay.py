"""What a disk may hold after a power cut: the states that a log of operations (see shim.py) can leave behind.

The power fails after k operations. In order, all k are on the disk, as after a kill. Otherwise these rules hold:

1. Syncing a file makes its content, length and mode durable, not its name. Syncing a folder makes the names in it
   durable: what was created, renamed, exchanged, linked or removed there.
2. Of what no sync among the k made durable, every operation may be lost, on its own and in any order.
3. A write that is not durable may also be torn: its first bytes are there, the rest is absent or zeros. A gap that a
   lost write leaves before a later one, or below the length that the file was given, is zeros.
4. A rename and an exchange are atomic: both names change, or neither. If they are in two folders, syncing either one
   makes both durable.
5. Operations on one name keep their order: a later one is on the disk only if the earlier ones are.
6. Names lie in folders, not in paths: what happened in a folder goes where the folder goes, and is out of reach if the
   folder's own name was lost.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz.storage.shim import Operation

MAKING = {"create": stat.S_IFREG, "mkdir": stat.S_IFDIR, "symlink": stat.S_IFLNK}
NAMING = {*MAKING, "rename", "exchange", "unlink", "rmdir", "link"}
FILLING = {"write", "truncate", "allocate", "chmod"}
TOKEN = re.compile(r"\.[0-9a-f]{8}\.|\.tmp\w{6}\b")  # what is random in the name of a file written aside

Tree = dict[str, tuple[int, bytes]]  # path below the root -> mode, content (of a link: what it names)


@dataclass
class Node:
    """A file, a link, or a folder with its entries: name -> number of a node."""

    mode: int
    content: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] = field(default_factory=dict)

    def copy(self) -> "Node":
        """A copy that can change without this one."""
        return Node(self.mode, bytearray(self.content), dict(self.entries))


@dataclass(frozen=True)
class Cut:
    """A power cut after `k` operations. lost: operations that did not reach the disk. torn: writes of which only so
    many bytes did; zeros: the rest of them is zeros, not absent."""

    k: int
    label: str = "in order"
    lost: frozenset[int] = frozenset()
    torn: Mapping[int, int] = field(default_factory=dict)
    zeros: bool = False


class History:
    """A folder before a command, and all that the command did below it.

    `before` is what `nodes_of` found, by inode number, the folder itself first.
    """

    def __init__(self, before: dict[int, Node], operations: Iterable[Operation]) -> None:
        self.operations = list(operations)  # those that failed changed nothing
        self._nodes, self._root = before, next(iter(before))
        self._subjects: list[int] = []  # of each operation: its node; nodes that it made have numbers below 0
        self._folders: list[tuple[int, int]] = []
        self._names: dict[int, str] = {self._root: "", **_names_in(before)}
        self._number_nodes()
        self._earlier: dict[int, set[int]] = {}  # naming operation -> those before it on the same names
        self._synced_at = self._find_syncs()

    def _number_nodes(self) -> None:
        """Tell nodes apart whose inode number was used again."""
        current = {inode: inode for inode in self._nodes}
        for number, operation in enumerate(self.operations):
            if operation.kind in MAKING and not operation.error:
                current[operation.inode] = -1 - number
            self._subjects.append(current.get(operation.inode, 0))
            self._folders.append((current.get(operation.folder, 0), current.get(operation.to_folder, 0)))
            name = operation.to_name or operation.name
            if operation.kind in NAMING and operation.kind != "exchange":
                self._names[self._subjects[-1]] = name

    def _find_syncs(self) -> list[int]:
        """The number of the sync that made each operation durable; beyond the last one if none did."""
        end = len(self.operations)
        synced_at, pending = [end] * end, list[int]()
        last_on: dict[tuple[int, str], int] = {}
        for number, operation in enumerate(self.operations):
            if operation.error:
                continue
            if operation.kind == "sync":
                for earlier in [each for each in pending if self._is_covered(each, self._subjects[number])]:
                    synced_at[earlier] = number
                    pending.remove(earlier)
                continue
            pending.append(number)
            self._earlier[number] = set()
            for name in self._names_of(number):
                if name in last_on:
                    self._earlier[number] |= {last_on[name]}
                last_on[name] = number
        for number in reversed(range(end)):
            for earlier in self._earlier.get(number, ()):  # rule 5
                synced_at[earlier] = min(synced_at[earlier], synced_at[number])
        return synced_at

    def _is_covered(self, number: int, synced: int) -> bool:
        """Whether syncing a node makes an operation durable."""
        if self.operations[number].kind in NAMING:
            return synced in self._folders[number] and synced != 0
        return synced == self._subjects[number]

    def _names_of(self, number: int) -> list[tuple[int, str]]:
        """The names that an operation changes, each with its folder."""
        operation, (folder, to_folder) = self.operations[number], self._folders[number]
        if operation.kind not in NAMING:
            return []
        names = [(folder, operation.name)]
        return [*names, (to_folder, operation.to_name)] if operation.to_name else names

    def loose(self, k: int) -> list[int]:
        """The operations among the first k that no sync among them made durable."""
        return [number for number in range(k) if number in self._earlier and self._synced_at[number] >= k]

    def describe(self, number: int) -> str:
        """An operation in words, without what is random."""
        operation = self.operations[number]
        subject = self._names.get(self._subjects[number], "?")
        if operation.kind in NAMING:
            subject = f"{self._names.get(self._folders[number][0], '?')}/{operation.name}"
            subject += f" -> {operation.to_name}" if operation.to_name else ""
        return TOKEN.sub(".*.", f"{operation.kind} {subject}")

    def tree(self, cut: Cut) -> Tree:
        """What the disk holds after a power cut."""
        nodes = {number: node.copy() for number, node in self._nodes.items()}
        for number, operation in enumerate(self.operations[: cut.k]):
            if operation.error:
                continue
            if operation.kind in MAKING:  # without a name it is merely out of reach
                nodes[self._subjects[number]] = Node(MAKING[operation.kind] | operation.size, bytearray(operation.data))
            if number not in cut.lost:
                self._apply(nodes, number, cut)
        return dict(_walk(nodes, self._root, ""))

    def _apply(self, nodes: dict[int, Node], number: int, cut: Cut) -> None:
        operation, subject = self.operations[number], self._subjects[number]
        kind, name, (folder, to_folder) = operation.kind, operation.name, self._folders[number]
        if kind in MAKING or kind == "link":
            nodes[folder].entries[name] = subject
        elif kind in ("unlink", "rmdir"):
            del nodes[folder].entries[name]
        elif kind == "rename":
            nodes[to_folder].entries[operation.to_name] = nodes[folder].entries.pop(name)
        elif kind == "exchange":
            one, other = nodes[folder].entries, nodes[to_folder].entries
            one[name], other[operation.to_name] = other[operation.to_name], one[name]
        elif kind == "chmod":
            nodes[subject].mode = stat.S_IFMT(nodes[subject].mode) | operation.size
        elif kind in FILLING:
            self._fill(nodes[subject].content, number, cut)

    def _fill(self, content: bytearray, number: int, cut: Cut) -> None:
        operation = self.operations[number]
        if operation.kind == "truncate":
            del content[operation.size :]
        size, data = operation.size, operation.data
        if operation.kind == "write":
            whole = len(data)
            data = data[: cut.torn.get(number, whole)]
            size = operation.offset + (whole if cut.zeros else len(data))
        content.extend(bytes(max(size - len(content), 0)))
        content[operation.offset : operation.offset + len(data)] = data

    def systematic(self, k: int) -> Iterator[Cut]:
        """The power cuts after k operations that are worth trying first: they lose nothing, all that is loose, one name
        or all but one, the contents of one file or of all."""
        loose = self.loose(k)
        names = {number for number in loose if self.operations[number].kind in NAMING}
        writes = [number for number in loose if self.operations[number].kind == "write"]
        yield Cut(k)
        yield Cut(k, "all that is loose lost", frozenset(loose))
        yield Cut(k, "names without contents", frozenset(loose) - names)
        yield Cut(k, "names with zeros", torn=dict.fromkeys(writes, 0), zeros=True)
        for number in names:
            yield Cut(k, f"without {self.describe(number)}", self._with_later({number}, loose))
            yield Cut(k, f"of the loose names only {self.describe(number)}", frozenset(names - self._needed(number)))
        for file in {self._subjects[number] for number in loose if number not in names}:
            lost = frozenset(each for each in loose if each not in names and self._subjects[each] == file)
            yield Cut(k, f"without the contents of {self._names.get(file, '?')}", lost)

    def random(self, k: int, random: Random) -> Cut:
        """Any power cut after k operations."""
        loose, share = self.loose(k), random.choice((0.1, 0.5, 0.9))
        lost = self._with_later({number for number in loose if random.random() < share}, loose)
        sizes = {number: len(self.operations[number].data) for number in loose if number not in lost}
        torn = {number: random.randrange(size) for number, size in sizes.items() if size and random.random() < 0.3}
        return Cut(k, "at random", lost, torn, random.random() < 0.5)

    def _with_later(self, lost: set[int], loose: Sequence[int]) -> frozenset[int]:
        """Lost operations, and those that rule 5 loses with them."""
        for number in loose:
            if self._earlier[number] & lost:
                lost = lost | {number}
        return frozenset(lost)

    def _needed(self, number: int) -> set[int]:
        """An operation, and those without which rule 5 forbids it."""
        return {number}.union(*(self._needed(earlier) for earlier in self._earlier[number]))


def nodes_of(root: Path) -> dict[int, Node]:
    """A folder and all below it, by inode number."""
    status = root.lstat()
    node = Node(status.st_mode)
    nodes = {status.st_ino: node}
    if stat.S_ISDIR(status.st_mode):
        for path in root.iterdir():
            node.entries[path.name] = path.lstat().st_ino
            nodes |= nodes_of(path)
    else:
        node.content[:] = os.fsencode(root.readlink()) if root.is_symlink() else root.read_bytes()
    return nodes


def _names_in(nodes: dict[int, Node]) -> dict[int, str]:
    return {inode: name for node in nodes.values() for name, inode in node.entries.items()}


def _walk(nodes: dict[int, Node], number: int, path: str) -> Iterator[tuple[str, tuple[int, bytes]]]:
    node = nodes[number]
    if path:
        yield path, (node.mode, bytes(node.content))
    for name, entry in sorted(node.entries.items()):
        yield from _walk(nodes, entry, f"{path}/{name}" if path else name)


def tree_of(root: Path) -> Tree:
    """Everything below a folder."""
    nodes = nodes_of(root)
    return dict(_walk(nodes, next(iter(nodes)), ""))


def write_tree(root: Path, tree: Tree) -> None:
    """Make a folder hold exactly this."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, (mode, content) in tree.items():
        path = root / name
        if stat.S_ISDIR(mode):
            path.mkdir()
        elif stat.S_ISLNK(mode):
            path.symlink_to(os.fsdecode(content))
            continue
        else:
            path.write_bytes(content)
        path.chmod(stat.S_IMODE(mode))
