"""The command line of the package."""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch

from fuzz.storage.campaign import Campaign, Case
from fuzz.storage.scenarios import Scenario, scenarios
from fuzz.storage.shim import Shim

KINDS = {"cuts": "states after a power cut", "faults": "faults", "both": "states after a fault and a power cut"}
MEMORY = "/dev/shm"  # a file system in memory, ten times as fast


def main(arguments: list[str]) -> int:
    """Run a campaign; returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    in_memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
            os.environ[name] = f"{folder}/{name}"
        chosen = _chosen(scenarios(Path(folder)), options.scenario)
        shim, num_findings = Shim(), 0
        for scenario in chosen:
            campaign = Campaign(scenario, Path(folder, "run"), shim)
            seconds = None if options.minutes is None else 60 * options.minutes / len(chosen)
            kinds = tuple(KINDS) if options.kind == "all" else (options.kind,)
            count = None if options.cases is None else max(1, options.cases // scenario.cost)
            num_findings += _run(campaign, kinds, count, seconds, options.seed)
    return 1 if num_findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz.storage")
    parser.add_argument("--minutes", type=float, help="how long in all; without it, each systematic case once")
    parser.add_argument("--cases", type=int, help="about so many of each kind and scenario, fewer of slow ones")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--kind", choices=("all", *KINDS), default="all")
    parser.add_argument("--scenario", action="append", help="only this one; may be given several times")
    return parser


def _chosen(found: list[Scenario], names: list[str] | None) -> list[Scenario]:
    known = {scenario.name: scenario for scenario in found}
    unknown = set(names or ()) - set(known)
    if unknown:
        sys.exit(f"no scenario {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return [known[name] for name in names] if names else found


def _run(campaign: Campaign, kinds: tuple[str, ...], count: int | None, seconds: float | None, seed: int) -> int:
    """Try a scenario's cases, print what was found and return the number of different findings."""
    random, tried, findings = Random(seed), dict.fromkeys(kinds, 0), dict[str, str]()
    cases = [list(campaign.cases(kind, random)) for kind in kinds]
    if count is not None or seconds is not None:
        for drawn in cases:
            random.shuffle(drawn)
    in_turn = ((kinds[turn % len(kinds)], case) for turn, case in enumerate(_in_turn(cases)) if case is not None)
    endless = campaign.random_cuts(random) if seconds is not None and count is None and "cuts" in kinds else ()
    stop = time.monotonic() + (seconds or float("inf"))
    for kind, case in itertools.chain(in_turn, (("cuts", case) for case in endless)):
        if count is not None and tried[kind] >= count:
            continue
        result = case()
        tried[kind] += result.tried
        for problem in result.problems:
            findings.setdefault(problem, result.where)
        if time.monotonic() > stop:
            break
    counts = ", ".join(f"{tried[kind]} {KINDS[kind]}" for kind in kinds)
    print(
        f"{campaign.scenario.name}: {len(campaign.history.operations)} operations, {counts}: {len(findings)} findings"
    )
    for problem, where in findings.items():
        print(f"  {where}: {problem}")
    sys.stdout.flush()
    return len(findings)


def _in_turn(cases: list[list[Case]]) -> Iterator[Case | None]:
    """One of each kind, again and again."""
    return itertools.chain.from_iterable(itertools.zip_longest(*cases))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
