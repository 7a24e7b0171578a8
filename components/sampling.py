"""Batches as a function of (seed, step): nothing to save, exact resume, the same data for any number of processes."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import UserError
from .features import to_tensor


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of one pass over the data, `[rows]`."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


def batch_indices(rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Rows of the batch of update `step`, `[B]`, over all processes: slice `step % E` of the pass `step // E`.

    A pass holds E = rows // batch_size batches; it drops the remainder, another one each time.
    """
    epoch, slice_ = divmod(step, rows // batch_size)
    return permutation(rows, seed, epoch)[slice_ * batch_size : (slice_ + 1) * batch_size]


def fit_batch(batch_size: int, rows: int, parts: int, asked: bool) -> tuple[int, str]:
    """The batch size to use, and a note for the screen when a default had to shrink to the data.

    Args:
        parts: Processes times micro-steps.
        asked: Whether the user asked for this size; then it is refused rather than changed.

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


def fit_envs(num_envs: int, world: int, asked: bool) -> tuple[int, str]:
    """The number of environments over all processes, and a note when a default had to grow to give each its share.

    Raises:
        UserError: not divisible by the number of processes, and asked for by the user (names the two nearest).
    """
    below, above = num_envs // world * world, -(-num_envs // world) * world
    if below == above:
        return num_envs, ""
    if asked:
        choices = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"--num-envs {num_envs} is not divisible by {world} processes; use {choices}")
    return above, f" (the default of {num_envs} is not divisible by {world} processes)"


class Batches:
    """This process's part of every batch, from update `start` on.

    Args:
        dataset: Map-style; `get_batch(indices, seed)` is the fast path. It is given the indices of the global batch, so
            that random choices are the same for any number of processes, and sliced afterwards; a dataset that makes
            none says `deterministic = True` and is asked for its part only.
        batch_size: Samples per update over all processes and micro-steps, divisible by their product.
        rank, world: This process, and how many there are.
        micro_steps: Calls of `train_step` per update.
        workers: DataLoader workers for a dataset without `get_batch`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        micro_steps: int = 1,
        workers: int = 0,
    ) -> None:
        self.dataset, self.rows = dataset, len(dataset)  # type: ignore[arg-type]
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.micro_steps, self.workers = micro_steps, workers
        self.per_epoch = self.rows // batch_size

    def indices(self, start: int) -> Iterator[tuple[int, Tensor, slice]]:
        """Yield (update, global indices, this process's slice of them) of every micro-step."""
        part = self.batch_size // (self.world * self.micro_steps)
        step = start
        while True:
            rows = batch_indices(self.rows, self.batch_size, self.seed, step)
            for micro in range(self.micro_steps):
                first = (micro * self.world + self.rank) * part
                yield step, rows, slice(first, first + part)
            step += 1

    def stream(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield batches of tensors on the CPU."""
        if hasattr(self.dataset, "get_batch"):
            yield from self._resident(start)
        # A generator of its own: the loader would otherwise draw from the global one when it starts, also on a resume.
        own = torch.Generator().manual_seed(derive_seed(self.seed, start))
        rows = (indices[mine].tolist() for _, indices, mine in self.indices(start))
        yield from DataLoader(self.dataset, batch_sampler=_Stream(rows), num_workers=self.workers, generator=own)

    def _resident(self, start: int) -> Iterator[dict[str, Any]]:
        get_batch = self.dataset.get_batch  # type: ignore[attr-defined]
        deterministic = getattr(self.dataset, "deterministic", False)
        for step, indices, mine in self.indices(start):
            if deterministic:
                yield get_batch(indices[mine], 0)
            else:
                batch = get_batch(indices, derive_seed(self.seed, step))
                yield {key: value[mine] for key, value in batch.items()}


class _Stream:
    """An endless iterable of index lists in the place of a batch sampler."""

    def __init__(self, lists: Iterator[list[int]]) -> None:
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return self.lists


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch to the device; texts stay as they are."""
    tensors = {}
    for key, value in batch.items():
        is_text = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str))
        tensors[key] = value if is_text else to_tensor(value).to(device, non_blocking=True)
    return tensors
