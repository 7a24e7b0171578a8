"""Data as offline RL learns from it: transitions and windows of them, with the borders of episodes.

`transitions` takes what a dataset's factory returns and gives the same kind of dict. All that can be computed once lies
side by side in one resident table, so that a batch is one indexed read.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.returns import n_step_return, returns_to_go
from ..errors import UserError
from .episodes import IMAGES, Batched, EpisodeDataset, take
from .mixture import Mixture

logger = logging.getLogger(__name__)
FLAGS = ("terminated", "action_is_pad")  # what comes out of a table as bool


def prepared(data: dict[str, Any], trainer: type, name: str, config: Any) -> dict[str, Any]:
    """The data as a trainer learns from it: its own `prepare`, or the transitions of its `window`, or as it is."""
    if hasattr(trainer, "prepare"):
        return trainer.prepare(data, config)
    return transitions(data, name, **trainer.window(config)) if hasattr(trainer, "window") else data


def transitions(data: dict[str, Any], trainer: str, **options: Any) -> dict[str, Any]:
    """The steps whose reward and successor are known, each with what follows it; `options` are those of `Transitions`.

    Args:
        data: What a dataset's factory returned.
        trainer: Name of the algorithm, for messages.

    Raises:
        UserError: no rewards, pictures, a chunk longer than the shortest episode, or windows of data without episodes.
    """

    def view(dataset: EpisodeDataset) -> Dataset:
        return Transitions(dataset, trainer, **options)

    plain = options.get("n_step", 1) == 1 and not any(options.get(name) for name in ("chunk", "next_action", "to_go"))
    data = through(data, view, trainer, plain)
    parts = getattr(data["dataset"], "datasets", [data["dataset"]])  # of a mixture, or the one
    if all(isinstance(part, Transitions) for part in parts):
        if not any(part.terminates for part in parts):
            logger.warning(
                "no step of this data is 'terminated': every episode counts as cut short, and the value of what would"
                " have followed is added at its end; right for tasks without an end, wrong where success ends them"
            )
        least, most = min(part.returns[0] for part in parts), max(part.returns[1] for part in parts)
        data["norm_stats"] = data["norm_stats"] | {"reward": {"return_min": least, "return_max": most}}
        if options.get("to_go"):
            data["norm_stats"]["return_to_go"] = {"like": "reward"}
    return data


def through(
    data: dict[str, Any], view: Callable[[EpisodeDataset], Dataset], trainer: str, plain: bool = False
) -> dict[str, Any]:
    """`data` with the training and the validation set seen through `view`, a mixture's sources one by one.

    Args:
        plain: Leave datasets of single items as they are; otherwise they are refused, as a UserError.
    """

    def seen(dataset: Any) -> Any:
        if isinstance(dataset, Mixture):
            return dataset.mapped(seen)
        if isinstance(dataset, EpisodeDataset):
            if pictures := [key for key in dataset.episodes.observations if key.startswith(IMAGES)]:
                raise UserError(f"{trainer} takes vectors; the data has {pictures[0]!r}: leave out --dataset.cameras")
            return view(dataset)
        if not plain:
            raise UserError(f"{trainer} needs episodes; the data is a {type(dataset).__name__} of single items")
        return dataset

    return data | {key: seen(data[key]) for key in ("dataset", "validation") if key in data}


class Table(Batched):
    """Rows of named columns side by side in one float32 tensor `[n, W]`; those in FLAGS come out as bool."""

    deterministic = True  # no random choices: each process may ask for its own part of a batch
    checked = True  # the episodes were

    def __init__(self, columns: dict[str, Tensor], device: torch.device | None = None) -> None:
        self.shapes = {key: tuple(column.shape[1:]) for key, column in columns.items()}
        self.widths = [math.prod(shape) for shape in self.shapes.values()]
        rows = len(next(iter(columns.values())))
        self.table = torch.empty(rows, sum(self.widths), device=device)
        for part, column in zip(self.table.split(self.widths, 1), columns.values(), strict=True):
            part.copy_(column.reshape(rows, -1))

    def __len__(self) -> int:
        return len(self.table)

    def to(self, device: torch.device) -> None:
        """Move the table to a GPU, where batches are then made, unless it takes more than half of what is free."""
        if device.type == "cuda" and 2 * self.table.nbytes < torch.cuda.mem_get_info(device)[0]:
            self.table = self.table.to(device)

    def get_batch(self, indices: Tensor, seed: int = 0) -> dict[str, Any]:
        """Rows `indices` `[B]` as one batch; `seed` is not needed, since nothing here is random."""
        indices = indices.to(self.table.device, non_blocking=True)  # a GPU is not waited for
        parts = self.table.index_select(0, indices).split(self.widths, 1)
        shaped = zip(self.shapes.items(), parts, strict=True)
        batch = {key: part.reshape(len(part), *shape) for (key, shape), part in shaped}
        return batch | {key: batch[key].bool() for key in FLAGS if key in batch}


class Transitions(Table):
    """One row for each step of episodes that can be learnt from.

    Items: observation.X `[Ds]`, action `[Da]`; reward, the discounted sum over a window of steps; `discount`, the
    factor of the value that follows it; terminated and next.observation.X, those of the window's last step. The window
    is one step, or `n_step` or `chunk` steps, and never reaches beyond the end of its episode.

    Args:
        source: The episodes; its statistics, history and training part hold here, too.
        trainer: Name of the algorithm, for messages.
        discount: Factor per environment step.
        n_step: Steps whose rewards are summed.
        chunk: Make `action` the `[chunk, Da]` of the window, with `action_is_pad` and `complete`: 1.0 unless truncation
            or the end of the data cuts the window. Where termination cuts it, its return is known: no later action
            could have changed it.
        next_action: Add `next.action` `[Da]`, what the data did next; steps after which it did nothing are left out.
        to_go: Add `return_to_go`, the discounted rewards until a terminated step, or the episode's end.

    Raises:
        UserError: chunked data, no rewards, no step with a successor, a chunk longer than the shortest episode.
    """

    def __init__(
        self,
        source: EpisodeDataset,
        trainer: str,
        discount: float = 0.99,
        n_step: int = 1,
        chunk: int = 1,
        next_action: bool = False,
        to_go: bool = False,
    ) -> None:
        if source.action_steps > 1:
            raise UserError(f"{trainer} makes its own windows of the data; leave out --dataset.action-steps")
        data, rows = source.episodes, source.transitions().rows
        action, terminated = data.columns["action"], data.columns["terminated"]
        if not len(rows):
            raise UserError(f"{data.name}: no step has a successor, so there is nothing to learn from its rewards")
        # The last step of each episode that can be learnt from: without its successor, the one before.
        last = (source.last - ((data.after[source.last] < 0) & ~terminated[source.last]).long())[rows]  # [n]
        shortest = int((last - source.first[rows]).min()) + 1
        if chunk > shortest:
            raise UserError(
                f"--trainer.chunk {chunk} is longer than the shortest episode of {data.name}, which has {shortest}"
                f" steps; set it to {shortest} or less, or leave short episodes out"
            )
        if next_action:  # after a terminated step it counts for nothing
            kept = (rows < source.last[rows]) | terminated[rows]
            rows, last = rows[kept], last[kept]
        steps = rows[:, None] + torch.arange(max(n_step, chunk))  # [n, k]
        window = torch.minimum(steps, last[:, None])
        reward, length, factor = n_step_return(
            data.columns["reward"][window], (steps >= last[:, None]) | terminated[window], discount
        )
        final = rows + length  # [n]
        columns = {key: take(store, source.before(rows)) for key, store in data.observations.items()}
        columns |= {"action": action[rows], "reward": reward, "terminated": terminated[final], "discount": factor}
        columns |= {f"next.{key}": take(store, source.after(final)) for key, store in data.observations.items()}
        if chunk > 1:
            padded = torch.arange(chunk) > length[:, None]
            columns["action"] = action[torch.minimum(steps, final[:, None])]
            columns |= {"action_is_pad": padded, "complete": ~padded[:, -1] | terminated[final]}
        if next_action:
            columns["next.action"] = action[torch.minimum(rows + 1, source.last[rows])]
        if to_go:
            columns["return_to_go"] = returns_to_go(data.columns["reward"], terminated, data.ends, discount)[rows]
        super().__init__(columns)
        self.terminates = bool(terminated[rows].any())
        totals = returns_to_go(data.columns["reward"], torch.zeros_like(terminated), data.ends, 1.0)
        totals = totals[source.first[rows].unique()]  # of each episode
        self.returns = (float(totals.min()), float(totals.max()))
