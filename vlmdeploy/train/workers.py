"""Single-threaded worker processes that train the same weights and average gradients after every step.

On a CPU this is as fast as one process with many threads, and several times faster beside other programs. If one worker
fails or dies, all end; none outlives its parent.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children, resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in the stub's list
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from vlmdeploy.child_process import born_deaf, end_with_parent
from vlmdeploy.errors import TrainingError
from vlmdeploy.standard_streams import lines_on_stderr
from vlmdeploy.stopping import undisturbed

LOCALHOST = "127.0.0.1"
POLL_S = 0.5
# One thread each, and no module from the folder that the command was given in, which may hold anything.
OF_WORKERS = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo", "PYTHONSAFEPATH": "1"
}  # fmt: skip


class Exchange:
    """Communication between workers; trivial for a single one."""

    def __init__(self, worker: int, num_workers: int) -> None:
        self.worker, self._num_workers = worker, num_workers

    def average(self, values: Tensor) -> None:
        """Average values over the workers, in place."""
        if self._num_workers > 1:
            distributed.all_reduce(values)
            values.div_(self._num_workers)

    def cpu_s(self) -> float:
        """CPU seconds of all workers since their start, the same in each."""
        used = torch.tensor(time.process_time(), dtype=torch.float64)
        if self._num_workers > 1:
            distributed.all_reduce(used)
        return float(used)


def run_workers(
    work: Callable[..., None], arguments: tuple[Any, ...], num_workers: int, watch: Callable[[], None]
) -> None:
    """Call work(exchange, *arguments) in new processes, and `watch` twice a second until all return.

    Raises TrainingError if one fails or dies. `work` and its arguments must be picklable.
    """
    store = TCPStore(LOCALHOST, 0, None, is_master=True, wait_for_workers=False)
    started = (work, arguments, num_workers, store.port, os.getpid())
    try:
        with _none_left():
            resource_tracker.ensure_running()  # a process of Python's own, whose start would open our children's ears
            with _environment(OF_WORKERS), born_deaf(), undisturbed():
                context = start_processes(_enter, started, num_workers, join=False, start_method="spawn")
            while not context.join(timeout=POLL_S):
                watch()
    except ProcessRaisedException as error:
        raise TrainingError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from error
    except ProcessExitedException as error:
        raise TrainingError(f"a worker died ({error}); the same command continues from the last state") from error
    watch()


def _enter(
    worker: int, work: Callable[..., None], arguments: tuple[Any, ...], num_workers: int, port: int, parent: int
) -> None:
    """Run a worker. Ctrl-C or the death of its parent ends it at once, even during an exchange."""
    end_with_parent(parent)
    torch.set_num_threads(1)
    with lines_on_stderr(), _joined(worker, num_workers, port):
        work(Exchange(worker, num_workers), *arguments)


@contextmanager
def _joined(worker: int, num_workers: int, port: int) -> Iterator[None]:
    """The group of all workers; none for a single one."""
    if num_workers == 1:
        yield
        return
    store = TCPStore(LOCALHOST, port, None, is_master=False, timeout=timedelta(minutes=5))
    distributed.init_process_group("gloo", store=store, rank=worker, world_size=num_workers)
    yield
    distributed.barrier()
    distributed.destroy_process_group()


@contextmanager
def _none_left() -> Iterator[None]:
    """End what the block started, also when a signal ends it in the middle of a start."""
    before = active_children()
    try:
        yield
    finally:
        for process in active_children():
            if process not in before:
                process.kill()
                process.join()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables temporarily, for new processes to inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def uses_bfloat16(dtype: str) -> bool:
    """Whether to multiply in bfloat16; "auto": if the processor has instructions for it."""
    if dtype != "auto":
        return dtype == "bfloat16"
    flags = Path("/proc/cpuinfo")
    known = flags.read_text(encoding="utf-8").split() if flags.is_file() else []
    return "avx512_bf16" in known or "amx_bf16" in known
