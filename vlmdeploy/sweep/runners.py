"""Running the tasks of a sweep: one after the other on this machine, or on the machines of a Ray cluster, one at a time
on each."""

import importlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlmdeploy.errors import BackendError, ConfigError
from vlmdeploy.sweep.task import Task, run_task

ANSWER_S = 10.0  # in which a cluster must accept a connection
RunTasks = Callable[[list[Task]], Iterator[tuple[Task, str | None]]]


@contextmanager
def task_runner(address: str | None, cpus: int | None) -> Iterator[RunTasks]:
    """What runs the tasks, open while they run; address None: one after the other, here. cpus: of a task on a cluster.

    Raises ConfigError and BackendError where there is no such cluster, ModuleNotFoundError where Ray is not installed.
    """
    if address is None:
        yield _in_turn
        return
    runner = _RayRunner.connect(address, cpus)
    try:
        yield runner.run
    finally:
        runner.ray.shutdown()


def _in_turn(tasks: list[Task]) -> Iterator[tuple[Task, str | None]]:
    for task in tasks:
        yield task, run_task(task)


def _check_listens(address: str) -> None:
    """Raise OSError where an address is a host and a port and nobody listens there: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal() and int(port) < 1 << 16:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


@dataclass(frozen=True)
class _RayRunner:
    """Runs tasks on a Ray cluster. Its machines must see the sweep's folders under the same paths."""

    ray: Any
    cpus: int

    @classmethod
    def connect(cls, address: str, cpus: int | None) -> "_RayRunner":
        """See `task_runner`."""
        if not address.strip():
            raise ConfigError("--ray is empty, expected an address, auto or local")
        ray = importlib.import_module("ray")
        try:
            _check_listens(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            found = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(
                f"--ray {address}: there is no cluster to connect to ({found}): `ray start --head` starts one, or use "
                "--ray local"
            ) from error
        of_machines = [int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]]
        if cpus is not None and cpus > max(of_machines):
            ray.shutdown()
            raise ConfigError(f"--cpus is {cpus}, and the largest machine of the cluster has {max(of_machines)}")
        return cls(ray, cpus or max(of_machines))

    def run(self, tasks: list[Task]) -> Iterator[tuple[Task, str | None]]:
        """Results as they come. A machine that is lost fails its task, not the sweep."""
        remote = self.ray.remote(num_cpus=self.cpus, max_retries=1)(run_task)
        waiting = {remote.remote(task): task for task in tasks}
        while waiting:
            ready, _ = self.ray.wait(list(waiting))
            for reference in ready:
                task = waiting.pop(reference)
                try:
                    yield task, self.ray.get(reference)
                except self.ray.exceptions.RayError as error:
                    yield task, f"Ray lost it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
