"""Batches as a function of (seed, step): no state to save, exact resume, the same data on any number of processes."""

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import lru_cache, partial
from itertools import tee
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..parallel import end_with_parent, starter
from .features import to_tensor
from .random_state import derive_seed


@lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of one pass over the data, `[rows]`."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Rows of the batch of update `step`, `[B]`, over all processes: slice `step % E` of the pass `step // E`.

    A pass has E = rows // batch_size batches and drops the remaining rows, different ones in each pass.
    """
    epoch, slice_ = divmod(step, rows // batch_size)
    return permutation(rows, seed, epoch)[slice_ * batch_size : (slice_ + 1) * batch_size]


def fit_batch(batch_size: int, rows: int, parts: int, asked: bool) -> tuple[int, str]:
    """The batch size to use, and a note for the screen when the default was reduced to the size of the data.

    Args:
        parts: Processes times micro-steps.
        asked: Whether the user set this size; then it is refused rather than changed.

    Raises:
        UserError: not divisible by `parts` (names the two nearest), or more than the data holds.
    """
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        choices = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"--batch-size {batch_size} is not divisible by {parts} (processes times micro-steps); use {choices}"
        )
    if batch_size <= rows:
        return batch_size, ""
    fitting = rows // parts * parts
    if asked or not fitting:
        raise UserError(
            f"--batch-size {batch_size} is larger than the data, which has {rows} samples; use {fitting} or fewer"
        )
    return fitting, f" (the default of {batch_size} is more than the data)"


def fit_envs(args: Any, world: int) -> tuple[int, str]:
    """The number of environments over all processes, and a note when the default was raised to a multiple of them.

    Args:
        args: With `given` and `num_envs`, which becomes the number that is returned: a run records it.

    Raises:
        UserError: set by the user, and not divisible by the number of processes (names the two nearest).
    """
    num_envs = args.num_envs
    below, above = num_envs // world * world, -(-num_envs // world) * world
    if below == above:
        return num_envs, ""
    if args.given("num-envs"):
        choices = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"--num-envs {num_envs} is not divisible by {world} processes; use {choices}")
    args.num_envs = above
    return above, f" (the default of {num_envs} is not divisible by {world} processes)"


class Batches:
    """This process's part of every batch, from update `start` on.

    Args:
        dataset: Map-style; `get_batch(indices, seed)` is the fast path. It receives the indices of the global batch, so
            that random choices are the same on any number of processes, and its result is sliced. A dataset without
            random choices sets `deterministic = True`, and receives the indices of this process only.
        batch_size: Samples per update over all processes and micro-steps, divisible by their product.
        rank, world: Rank of this process, and number of processes.
        micro_steps: Calls of `train_step` per update.
        workers: DataLoader workers for a dataset that is not resident: it has no `get_batch`, or sets
            `resident = False`; for the latter, None chooses by the number of cores.
        device: Of the training; a dataset may move its rows there by `to(device)`.

    A dataset may define the order of its passes by `rows_per_pass` and `order(seed, epoch) -> [rows_per_pass]`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro_steps: int = 1,
        workers: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if device is not None and hasattr(dataset, "to"):  # a table that fits a GPU is read there
            dataset.to(device)
        self.dataset, self.rows = dataset, len(dataset)  # type: ignore[arg-type]
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.micro_steps = micro_steps
        self.fast = hasattr(dataset, "get_batch")
        self.resident = self.fast and getattr(dataset, "resident", True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        some = min(max(cores // world, 1), 8) if self.fast and not self.resident else 0
        self.workers = some if workers is None else workers
        self.per_epoch = getattr(dataset, "rows_per_pass", self.rows) // batch_size

    def indices(self, start: int) -> Iterator[tuple[int, Tensor, slice]]:
        """Yield (update, global indices, this process's slice of them) of every micro-step."""
        part = self.batch_size // (self.world * self.micro_steps)
        step = start
        while True:
            if hasattr(self.dataset, "order"):
                epoch, slice_ = divmod(step, self.per_epoch)
                rows = self.dataset.order(self.seed, epoch)[slice_ * self.batch_size : (slice_ + 1) * self.batch_size]
            else:
                rows = batch_indices(self.rows, self.batch_size, self.seed, step)
            for micro in range(self.micro_steps):
                first = (micro * self.world + self.rank) * part
                yield step, rows, slice(first, first + part)
            step += 1

    def epoch(self, step: int, steps: int) -> tuple[int, int]:
        """The pass over the data that a step belongs to, from 0, and the number of passes in so many steps."""
        return step // self.per_epoch, -(-steps // self.per_epoch)

    def with_rows(self, start: int) -> Generator[tuple[Tensor, dict[str, Any]], None, None]:
        """`stream`, with the indices in the dataset of each batch's rows."""
        parts, again = tee(self.indices(start))
        with closing(self.stream(start, parts)) as stream:
            for (_, rows, here), batch in zip(again, stream, strict=True):
                yield rows[here], batch

    def stream(
        self, start: int, parts: Iterator[tuple[int, Tensor, slice]] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Yield batches of tensors, on the CPU unless the dataset has moved; `parts` are its `indices`."""
        parts = self.indices(start) if parts is None else parts
        # A separate generator: otherwise a loader draws from the global one when it starts, also on a resume.
        loading: dict[str, Any] = {"num_workers": self.workers, "generator": torch.Generator()}
        loading["worker_init_fn"] = partial(_end_with_parent, starter())
        loading["generator"].manual_seed(derive_seed(self.seed, start))
        if not self.fast:
            rows = (indices[here].tolist() for _, indices, here in parts)
            try:
                yield from DataLoader(self.dataset, batch_sampler=_Stream(rows), **loading)
            except UserError as error:  # a worker's has a traceback around its line
                raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
        elif self.resident or not self.workers:
            yield from map(_Fetch(self.dataset, self.seed), parts)
        else:
            fetch: Any = _Fetch(self.dataset, self.seed)
            for batch in DataLoader(fetch, sampler=_Stream(parts), batch_size=None, **loading):
                if isinstance(batch, UserError):
                    raise batch
                yield batch


def _end_with_parent(of: tuple[int, bool], worker: int) -> None:
    """In a DataLoader's worker, which may hang when its trainer is killed."""
    end_with_parent(*of)


class _Fetch:
    """One process's part of a batch, in this process or, as an item of a DataLoader, in a worker."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __call__(self, part: tuple[int, Tensor, slice]) -> dict[str, Any]:
        step, indices, here = part
        if getattr(self.dataset, "deterministic", False):
            return self.dataset.get_batch(indices[here], 0)
        batch = self.dataset.get_batch(indices, derive_seed(self.seed, step))
        return {key: value[here] for key, value in batch.items()}

    def __getitem__(self, part: tuple[int, Tensor, slice]) -> Any:
        """The batch, or a UserError as its value: a loader would wrap one that is raised in a traceback."""
        try:
            return self(part)
        except UserError as error:
            return error

    def __len__(self) -> int:
        return len(self.dataset)


class _Stream:
    """An endless iterable that takes the place of a sampler."""

    def __init__(self, endless: Iterator[Any]) -> None:
        self.endless = endless

    def __iter__(self) -> Iterator[Any]:
        return self.endless


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch to the device; texts are unchanged."""
    tensors = {}
    for key, value in batch.items():
        is_text = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str))
        tensors[key] = value if is_text else to_tensor(value).to(device, non_blocking=True)
    return tensors
