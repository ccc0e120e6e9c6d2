"""Runs the tasks of a sweep: one after the other on this machine, or on a Ray cluster, one at a time per machine."""

import importlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlmdeploy.errors import BackendError, ConfigError
from vlmdeploy.sweep.task import Task, run_task

ANSWER_S = 10.0  # a cluster must accept a connection within this time
RunTasks = Callable[[list[Task]], Iterator[tuple[Task, str | None]]]


@contextmanager
def task_runner(address: str | None, cpus: int | None) -> Iterator[RunTasks]:
    """A function that runs tasks; address None: one after the other, here. cpus: of each task on a cluster.

    Raises ConfigError, BackendError if there is no such cluster, and ModuleNotFoundError if Ray is not installed.
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
    """Raise OSError if nothing listens at a host and port: Ray would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal() and int(port) < 1 << 16:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


@dataclass(frozen=True)
class _RayRunner:
    """Runs tasks on a Ray cluster, whose machines must see the sweep's folders under the same paths."""

    ray: Any
    cpus: int

    @classmethod
    def connect(cls, address: str, cpus: int | None) -> "_RayRunner":
        """Connect to the cluster; raises as `task_runner` does."""
        if not address.strip():
            raise ConfigError("--ray is empty, expected an address, auto or local")
        ray = importlib.import_module("ray")
        try:
            _check_listens(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            found = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(
                f"--ray {address}: cannot connect to a cluster ({found}): start one with `ray start --head`, or use "
                "--ray local"
            ) from error
        of_machines = [int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]]
        if cpus is not None and cpus > max(of_machines):
            ray.shutdown()
            raise ConfigError(f"--cpus is {cpus}, and the largest machine of the cluster has {max(of_machines)}")
        return cls(ray, cpus or max(of_machines))

    def run(self, tasks: list[Task]) -> Iterator[tuple[Task, str | None]]:
        """Yield results as tasks finish. Losing a machine fails its task, not the sweep."""
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
