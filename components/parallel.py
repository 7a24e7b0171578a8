"""Communication between processes by torch.distributed; without a process group, the identity."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import StoppedError, UserError, crashes_pass

logger = logging.getLogger(__name__)
T = TypeVar("T")
_apart = False  # inside `apart`


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A context in which means are taken over this process only, since the others may have fewer batches or none."""
    global _apart
    _apart, before = True, _apart
    try:
        yield
    finally:
        _apart = before


def global_mean(x: Tensor) -> Tensor:
    """Mean over the batches of all processes (equal sizes), without gradient."""
    return over_processes(x.detach().mean())


def global_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the batches of all processes (equal sizes), without gradient."""
    x = x.detach()
    mean, square = over_processes(torch.stack([x.mean(), x.square().mean()]))
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def global_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest number of the batches of all processes, without gradient."""
    least, largest = x.detach().aminmax()
    ends = torch.stack([-least, largest])
    if world_size() > 1 and not _apart:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def over_processes(numbers: Tensor) -> Tensor:
    """The mean of each number over all processes, in place."""
    if world_size() > 1 and not _apart:
        dist.all_reduce(numbers)
        numbers /= world_size()
    return numbers


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks, on every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's value on every process, for values that depend on a clock, a name or a random choice."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first(rank: int, action: Callable[[], T]) -> T:
    """Rank 0's result of `action` on every process; its UserError is raised on every process."""
    result: Any = None
    problem = ""
    if rank == 0:
        try:
            result = action()
        except UserError as error:
            problem = str(error)
    result, problem = from_first((result, problem))
    if problem:
        raise UserError(problem)
    return result


def in_turns(first: bool, action: Callable[[], T]) -> T:
    """Run `action` on the `first` processes, then on the others; a UserError of any process is raised on all."""
    result: Any = None
    for turn in (True, False):
        problem = ""
        if first == turn:
            try:
                result = action()
            except UserError as error:
                problem = str(error)
        problems = [text for text in gather(problem) if text]
        if problems:
            raise UserError(problems[0])
    return result


def joined(rank: int, work: Callable[[], list[T]]) -> tuple[list[T], str]:
    """What `work` returns on all processes, as one list on each; or, on all of them, ([], why it failed on one).

    Raises:
        StoppedError: on all processes, when `work` raised it on any.
    """
    of_rank: list[T] = []
    problem, stopped = "", False
    try:
        of_rank = work()
    except StoppedError:
        stopped = True
    except Exception as error:
        if crashes_pass():
            raise
        logger.debug("process %d failed", rank, exc_info=True)
        problem = f"process {rank}: {type(error).__name__}: {error}"
    parts, problems, stops = zip(*gather((of_rank, problem, stopped)), strict=True)
    if any(stops):
        raise StoppedError("stopped by a signal")
    if any(problems):
        return [], next(filter(None, problems))
    return [one for part in parts for one in part], ""


def starter() -> tuple[int, bool]:
    """The arguments of `end_with_parent`, for a worker that the current thread starts."""
    return os.getpid(), threading.current_thread() is threading.main_thread()


def end_with_parent(parent: int, from_main_thread: bool) -> None:
    """End this worker process when its parent has ended, however that ended, and even if the worker hangs.

    Args:
        parent: Number of the process that started it.
        from_main_thread: Whether the main thread of `parent` did so: Linux sends its signal when that thread ends, also
            to a worker that hangs in C code, where the thread that watches elsewhere may not run.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if from_main_thread and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    threading.Thread(target=watch, daemon=True).start()  # also for a parent that ended before


def broadcast(modules: nn.Module, buffers_only: bool = False) -> None:
    """Copy rank 0's buffers, and parameters unless `buffers_only`, to every process."""
    if world_size() > 1:
        tensors = list(modules.buffers()) + ([] if buffers_only else list(modules.parameters()))
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)
