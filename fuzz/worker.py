"""One target for some seconds, in a process of its own, which a finding may end.

The input at hand is always in the file `current`, where whoever started this process finds it after a crash or a hang.
"""

import argparse
import logging
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

from fuzz.mutation import mutate

MOST_BYTES = 4 << 30  # of address space: libraries map more than they use
LONGEST_INPUT = 1 << 20


def main() -> None:
    """Read the options and attack."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True, help="A folder for models, rooms and what is reported.")
    parser.add_argument("--engine", choices=["atheris", "mutation"], required=True)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if options.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["vlmdeploy"]):
            pass
        with_coverage(Attack(options.target, options.work, options.seed), options.seconds)
    else:
        Attack(options.target, options.work, options.seed).blindly(time.monotonic() + options.seconds)


class Attack:
    """Gives inputs to a target and reports what it must not do. Imports the package late, when coverage may be on."""

    def __init__(self, name: str, work: Path, seed: int) -> None:
        from fuzz.targets import Room, make_models

        models = make_models(work / "models")
        self.place = work / name
        self.place.mkdir(parents=True, exist_ok=True)
        self.room = Room(name, models, self.place / "room")
        self.chance = random.Random(seed)
        self.seeds = self.room.target.seeds(models)
        self.inputs = 0
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))

    def try_one(self, data: bytes) -> None:
        """Check one input. An exception that is not ours goes through."""
        from vlmdeploy.errors import LONGEST_MESSAGE, VlmdeployError

        self.inputs += 1
        if self.inputs % 64 == 1:
            self.report()
        (self.place / "current").write_bytes(data)
        try:
            self.room.check(data)
        except VlmdeployError as error:
            if not str(error) or "\n" in str(error) or len(str(error)) > LONGEST_MESSAGE + 20:
                self._found(f"{type(error).__name__} is not one line: {error}")
                raise AssertionError from error
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._found(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
            raise

    def _found(self, text: str) -> None:
        self.report()
        (self.place / "finding").write_text(" ".join(text[:400].split()), errors="replace")

    def blindly(self, until: float) -> None:
        """Try the seeds, then changes of them, until a moment of the monotonic clock."""
        for data in self.seeds:
            self.try_one(data)
        while time.monotonic() < until:
            self.try_one(self.changed(self.chance.choice(self.seeds)))
        self.report()

    def changed(self, data: bytes) -> bytes:
        """A changed input."""
        return mutate(data, self.seeds, self.chance, self.room.target.is_json)[:LONGEST_INPUT]

    def report(self) -> None:
        """Write down how many inputs were tried."""
        (self.place / "inputs").write_text(str(self.inputs))


def with_coverage(attack: Attack, seconds: float) -> None:
    """Let Atheris choose the inputs by the code that they reach. Ends the process."""
    import atheris

    corpus = attack.place / "seeds"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(attack.seeds):
        (corpus / f"{number}").write_bytes(data)

    def custom(data: bytes, most: int, seed: int) -> bytes:
        attack.chance.seed(seed)
        if attack.chance.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        return attack.changed(data)[:most]

    options = [f"-max_total_time={seconds:.0f}", "-timeout=20", f"-max_len={LONGEST_INPUT}"]
    arguments = [sys.argv[0], *options, f"-artifact_prefix={attack.place}/", str(corpus)]
    atheris.Setup(arguments, attack.try_one, custom_mutator=custom, internal_libfuzzer=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
