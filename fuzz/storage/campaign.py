"""Tries a command: cuts the power at every moment, and lets every operation fail."""

import errno
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from fuzz.storage.replay import TOKEN, Cut, History, Tree, nodes_of, tree_of, write_tree
from fuzz.storage.scenarios import OUT, PARTIAL, Scenario
from fuzz.storage.shim import SHORT_WRITE, Fault, Shim
from vlmdeploy.calib.state import SETTINGS
from vlmdeploy.errors import VlmdeployError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR)


@dataclass
class Attempt:
    """One run of a command: its error, and the units that it ran, each with the number of operations before it.

    is_ours: whether the error is a VlmdeployError.
    """

    error: str = ""
    is_ours: bool = True
    units: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A case in words, what is wrong after it, and how many states were tried; none if they had been before."""

    where: str
    problems: list[str]
    tried: int = 1


Case = Callable[[], Result]


class Campaign:
    """A scenario, recorded once; then tried, one case at a time."""

    def __init__(self, scenario: Scenario, root: Path, shim: Shim) -> None:
        self.scenario, self.root, self._shim = scenario, root, shim
        write_tree(root, {})
        with shim.watching(root, Fault()):  # which does not wait for the disk
            scenario.before(root)
        nodes, self.before = nodes_of(root), tree_of(root)
        self._no_fault = Fault(can_exchange=scenario.can_exchange)
        attempt = self._watched(self._no_fault)
        assert not attempt.error, f"{scenario.name}: {attempt.error}"
        self._begun = attempt.units
        self.history = History(nodes, shim.operations)
        after = tree_of(root)
        end = len(self.history.operations)
        assert self.history.tree(Cut(end)) == after, f"{scenario.name}: files change unseen"
        self.old, self.new = self._output(self.before), self._output(after)
        scenario.check(root / OUT)
        self._settings = self._find_settings() if scenario.units else b""
        self._seen: set[int] = set()

    def _find_settings(self) -> bytes:
        """The last settings.json that the command leaves in OUT.partial before it removes it."""
        path = f"{PARTIAL}/{SETTINGS}"
        trees = (self.history.tree(Cut(k)) for k in range(len(self.history.operations), 0, -1))
        return next(tree[path][1] for tree in trees if path in tree)

    def _output(self, tree: Tree) -> Tree | None:
        """What lies at OUT, by path below it."""
        found = {path.removeprefix(f"{OUT}/"): entry for path, entry in tree.items() if path.startswith(f"{OUT}/")}
        return self.scenario.normal(found) if OUT in tree else None

    def _watched(self, fault: Fault) -> Attempt:
        with self._shim.watching(self.root, fault):
            return self._attempt()

    def _attempt(self) -> Attempt:
        attempt = Attempt()

        def note(unit: str, done: int, total: int) -> None:
            if unit in self.scenario.units:
                attempt.units[unit] = self._shim.count()

        try:
            self.scenario.command(self.root, note)
        except VlmdeployError as error:
            attempt.error = str(error)
        except Exception as error:
            attempt.is_ours = False
            attempt.error = "".join(traceback.format_exception_only(error)).strip()
            attempt.error += f" at {traceback.extract_tb(error.__traceback__)[-1]}"
        return attempt

    def cases(self, kind: str, random: Random) -> Iterator[Case]:
        """The systematic cases of a kind."""
        if kind == "cuts":
            for k in range(len(self.history.operations) + 1):
                yield from (partial(self._after_cut, self.history, cut) for cut in self.history.systematic(k))
        elif kind == "faults":
            yield from (partial(self._after_fault, fault) for fault in self._faults())
        else:
            yield from (partial(self._after_both, fault, random) for fault in self._faults() if not fault.for_good)

    def random_cuts(self, random: Random) -> Iterator[Case]:
        """Power cuts without end."""
        while True:
            k = random.randint(0, len(self.history.operations))
            yield partial(self._after_cut, self.history, self.history.random(k, random))

    def _faults(self) -> Iterator[Fault]:
        """Every operation with every error; writes of half their bytes; a disk that is full from then on."""
        can_exchange = self.scenario.can_exchange
        for number, operation in enumerate(self.history.operations):
            yield from (Fault(number, error, False, can_exchange) for error in ERRORS)
            yield Fault(number, errno.ENOSPC, True, can_exchange)
            if operation.kind == "write" and operation.size > 1:
                yield Fault(number, SHORT_WRITE, False, can_exchange)

    def _after_cut(self, history: History, cut: Cut) -> Result:
        tree = history.tree(cut)
        is_done = self._output(tree) == self.new
        problems = [] if is_done or history is not self.history else self._forgotten(tree, cut.k)
        state = hash(tuple(sorted(tree.items())))
        is_seen = state in self._seen
        if not is_seen:
            self._seen.add(state)
            write_tree(self.root, tree)
            problems += self._output_problems(self._output(tree), may_be_new=True)
            problems += self._next_problems(tree, is_done)
        last = history.describe(cut.k - 1) if cut.k else "nothing"
        return self._result(f"power cut after {last}, {cut.label}", problems, tried=int(not is_seen))

    def _forgotten(self, tree: Tree, k: int) -> list[str]:
        """The units that were finished when another one began, and are no more."""
        units, rest = self.scenario.units, self.scenario.rest(tree, self._settings)
        finished = max((units.index(unit) for unit, count in self._begun.items() if count <= k), default=0)
        return [f"{unit} was finished, and is lost" for unit in units[:finished] if unit in rest]

    def _after_fault(self, fault: Fault) -> Result:
        write_tree(self.root, self.before)
        attempt, where = self._failed(fault)
        tree = tree_of(self.root)
        found, beside = self._output(tree), self._beside(tree)
        if attempt.error:
            problems = [] if attempt.is_ours else [f"raises {attempt.error}"]
            problems += self._output_problems(found, may_be_new=self.scenario.may_fail_late)
            problems += [f"fails and leaves {name}" for name in sorted(beside - self.scenario.keeps)]
        else:
            problems = [] if found == self.new else ["succeeds without the new output"]
            problems += [f"succeeds and leaves {name}" for name in sorted(beside)]
        return self._result(where, problems + self._next_problems(tree, found == self.new))

    def _after_both(self, fault: Fault, random: Random) -> Result:
        """A fault, and then power cuts: when the command has ended, and at a random moment before."""
        write_tree(self.root, self.before)
        nodes = nodes_of(self.root)
        attempt, where = self._failed(fault)
        if not attempt.error:
            return Result("", [], 0)
        history = History(nodes, self._shim.operations)
        end = len(history.operations)
        cuts = [*history.systematic(end), history.random(random.randint(min(fault.at, end), end), random)]
        results = [self._after_cut(history, cut) for cut in cuts]
        places = [f"{where}, {result.where}" for result in results if result.problems]
        problems = [problem for result in results for problem in result.problems]
        return Result((places or [where])[0], problems, sum(result.tried for result in results))

    def _failed(self, fault: Fault) -> tuple[Attempt, str]:
        """The command with a fault, and the fault in words."""
        attempt = self._watched(fault)
        return attempt, f"{fault.in_words()} of operation {fault.at}, {self.history.describe(fault.at)}"

    def _result(self, where: str, problems: list[str], tried: int = 1) -> Result:
        return Result(where, [TOKEN.sub(".*.", problem.replace(str(self.root), "")) for problem in problems], tried)

    def _output_problems(self, found: Tree | None, may_be_new: bool) -> list[str]:
        if found == self.old or (may_be_new and found == self.new):
            return []
        if found is None:
            return ["the old output is gone"] if self.scenario.can_exchange else []
        if found == self.new:
            return ["fails with the new output in place"]
        return [] if self.scenario.is_between(self.root / OUT) else ["the output is neither the old nor the new one"]

    def _next_problems(self, tree: Tree, is_done: bool) -> list[str]:
        """What is wrong with the same command, given again to what lies there."""
        rest = None if is_done else self.scenario.rest(tree, self._settings)
        if not is_done or self.scenario.is_repeatable:
            attempt = self._watched(self._no_fault)
            if attempt.error:
                return [f"the next run fails: {attempt.error}"]
            if rest is not None and list(attempt.units) != rest:
                return [f"the next run does {list(attempt.units)}, expected {rest}"]
        after = tree_of(self.root)
        problems = [] if self._output(after) == self.new else ["the next run writes something else"]
        return problems + [f"the next run leaves {name}" for name in sorted(self._beside(after))]

    def _beside(self, tree: Tree) -> set[str]:
        """What lies beside OUT, and in it under a hidden name."""
        return {path for path in tree if path.partition("/")[0] != OUT and "/" not in path} | {
            path for path in tree if path.startswith(f"{OUT}/.")
        }
