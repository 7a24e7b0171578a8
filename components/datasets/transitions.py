"""Data as a trainer asks for it; and transitions, or windows of them, with the borders of episodes.

`transitions` takes what a dataset's factory returns, and returns the same kind of dict. All that can be computed once
lies side by side in one resident table, so that a batch is one indexed read.
"""

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..contracts import Corrections, Goals, Rollouts, Window, frozen_policy_of, request_of
from ..data.features import facts_of
from ..data.items import as_kept
from ..data.returns import n_step_return, returns_to_go
from ..errors import UserError
from .episodes import Batched, EpisodeDataset, Episodes, take
from .goals import check_executed, goal_transitions
from .mixture import through
from .recorded import recordings

logger = logging.getLogger(__name__)
FLAGS = ("terminated", "action_is_pad", "intervention")  # columns that a table returns as bool


def prepared(data: dict[str, Any], trainer: type, name: str, config: Any, alone: bool = True) -> dict[str, Any]:
    """What a dataset's factory returned, in the form that a trainer asks for by `data(config)`.

    "recordings" are the held-out episodes, by which a policy can be evaluated without an environment.

    Args:
        name: Of the trainer, for messages.
        alone: Whether there is nothing to learn from but the data.

    Raises:
        UserError: pictures that are none; data that does not fit, as of `transitions` and `goal_transitions`; a trainer
            that needs an environment, for rollouts, an expert, or a policy under it.
    """
    request = request_of(trainer, config)
    if isinstance(request, Rollouts):
        raise UserError(f"{name} learns from rollouts of its own policy; run it by online_trainer.py")
    if alone and isinstance(request, Corrections):
        raise UserError(f"{name} learns from an expert while its policy acts; run it by online_trainer.py")
    if alone and (base := frozen_policy_of(trainer, config)):
        verb = "steers" if base[1] is None else "corrects"
        raise UserError(f"{name} {verb} a frozen policy while that acts; run it by online_trainer.py")
    data = as_kept(data)
    data["recordings"] = recordings(data.get("validation"))
    if not alone and facts_of(data["dataset"]).get("action", {}).get("form"):
        raise UserError(
            f"online, {name} takes actions as they are executed; leave out --dataset.action and --dataset.rotations"
        )
    match request:
        case Window() as window:
            return transitions(data, name, window)
        case Goals() as goals:
            return goal_transitions(data, name, goals)
    return data


def transitions(data: dict[str, Any], trainer: str, window: Window) -> dict[str, Any]:
    """The steps whose reward and successor are known, each with what follows it.

    Args:
        data: The result of a dataset's factory.
        trainer: Name of the algorithm, for messages.
        window: What one sample is.

    Raises:
        UserError: no rewards, pictures, chunks of which none is complete, or windows of data without episodes.
    """

    def view(dataset: EpisodeDataset) -> Dataset:
        return Transitions(dataset, trainer, window)

    plain = window.n_step == window.chunk == 1 and not (window.next_action or window.to_go)
    data = through(data, view, trainer, plain)
    parts = getattr(data["dataset"], "datasets", [data["dataset"]])  # the sources of a mixture, or the dataset
    if all(isinstance(part, Transitions) for part in parts):
        if not any(part.terminates for part in parts):
            logger.warning(
                "no step of this data is 'terminated': every episode counts as cut short, and the value of what would"
                " have followed is added at its end; right for tasks without an end, wrong where success ends them"
            )
        if any(part.sparse for part in parts):
            logger.warning(
                "the rewards of this antmaze data are 0 and 1, from which %s learns little; with"
                " --dataset.reward-shift -1 each step before the goal costs 1, as in published results",
                trainer,
            )
        if (several := len({text for part in parts for text in part.texts})) > 1:
            logger.warning(
                "%s does not observe the texts of the tasks: the %d of this data are learnt as one", trainer, several
            )
        least, most = min(part.returns[0] for part in parts), max(part.returns[1] for part in parts)
        data["norm_stats"] = data["norm_stats"] | {"reward": {"return_min": least, "return_max": most}}
        if window.to_go:
            data["norm_stats"]["return_to_go"] = {"like": "reward"}
    return data


def tell_cut(complete: Tensor, chunk: int, longest: int, name: str) -> None:
    """Log how many chunks the end of their episode cuts, so that their value is not learnt; usual are few.

    An episode that is shorter than a chunk is one of them, unless it is `terminated`; its actions are imitated anyway.

    Raises:
        UserError: all of them.
    """
    cut = int((~complete).sum())
    if cut == len(complete):
        raise UserError(
            f"--trainer.chunk {chunk}: the end of its episode cuts every chunk of {name}, whose longest episode has"
            f" {longest} steps, so that no value can be learnt; set it to {longest} or less"
        )
    if 5 * cut > len(complete):
        rest = f"{cut} of {len(complete)} chunks of {chunk} steps are cut by the end of their episode"
        logger.info("%s: %s; what they are worth is not learnt", name, rest)


def is_antmaze(data: Episodes) -> bool:
    """Whether a dataset is one of D4RL's antmaze tasks, by the name of its task, file or folder."""
    named = f"{data.stored.get('task', '')} {Path(data.name).name}"
    return "antmaze" in re.sub(r"[-_]", "", named.lower())


class Table(Batched):
    """Named columns, concatenated in one float32 tensor `[n, W]`; those in FLAGS are returned as bool."""

    deterministic = True  # no random choices, so each process may read its part of a batch alone
    checked = True  # as the episodes are

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
        """Move the table to a GPU, where batches are then made, unless it needs over half of the free memory."""
        if device.type == "cuda" and 2 * self.table.nbytes < torch.cuda.mem_get_info(device)[0]:
            self.table = self.table.to(device)

    def get_batch(self, indices: Tensor, seed: int = 0) -> dict[str, Any]:
        """Rows `indices` `[B]` as one batch; `seed` is not used, since nothing is random."""
        indices = indices.to(self.table.device, non_blocking=True)  # without waiting for the GPU
        parts = self.table.index_select(0, indices).split(self.widths, 1)
        shaped = zip(self.shapes.items(), parts, strict=True)
        batch = {key: part.reshape(len(part), *shape) for (key, shape), part in shaped}
        return batch | {key: batch[key].bool() for key in FLAGS if key in batch}


class Transitions(Table):
    """One row for each step of episodes that offline RL can use.

    Items: observation.X `[Ds]`, action `[Da]`; reward, the discounted sum over a window of steps; `discount`, the
    factor of the bootstrapped value; terminated and next.observation.X of the window's last step; intervention of its
    first step, where the data has it. The window is one step, or `n_step` or `chunk` steps, and never extends beyond
    the end of its episode.

    Args:
        source: The episodes, whose steps, history and training part are used.
        trainer: Name of the algorithm, for messages.
        window: What one item is.

    Raises:
        UserError: chunked data, no rewards, no step with a successor, no complete chunk.
    """

    def __init__(self, source: EpisodeDataset, trainer: str, window: Window) -> None:
        discount, chunk, next_action = window.discount, window.chunk, window.next_action
        if source.action_steps > 1:
            raise UserError(f"{trainer} makes its own windows of the data; leave out --dataset.action-steps")
        check_executed(source, trainer)
        data, rows = source.episodes, source.transitions().rows
        action, terminated = data.columns["action"], data.columns["terminated"]
        if not len(rows):
            raise UserError(f"{data.name}: no step has a successor, so there is nothing to learn from its rewards")
        # The last usable step of each episode: the one before the last where the last successor is unknown.
        last = (source.last - ((data.after[source.last] < 0) & ~terminated[source.last]).long())[rows]  # [n]
        if next_action:  # after a terminated step its value is not used
            kept = (rows < source.last[rows]) | terminated[rows]
            rows, last = rows[kept], last[kept]
        steps = rows[:, None] + torch.arange(max(window.n_step, chunk))  # [n, k]
        within = torch.minimum(steps, last[:, None])
        reward, length, factor = n_step_return(
            data.columns["reward"][within], (steps >= last[:, None]) | terminated[within], discount
        )
        final = rows + length  # [n]
        columns = {key: take(store, source.before(rows)) for key, store in data.observations.items()}
        columns |= {"action": action[rows], "reward": reward, "terminated": terminated[final], "discount": factor}
        columns |= {f"next.{key}": take(store, source.after(final)) for key, store in data.observations.items()}
        if chunk > 1:
            padded = torch.arange(chunk) > length[:, None]
            columns["action"] = action[torch.minimum(steps[:, :chunk], final[:, None])]
            columns |= {"action_is_pad": padded, "complete": ~padded[:, -1] | terminated[final]}
            if not window.to_go:  # by which values are learnt of states alone, so chunks may be cut
                tell_cut(columns["complete"], chunk, int((last - source.first[rows]).max()) + 1, data.name)
        if next_action:
            columns["next.action"] = action[torch.minimum(rows + 1, source.last[rows])]
        if "intervention" in data.columns:
            columns["intervention"] = data.columns["intervention"][rows]
        if window.to_go:
            columns["return_to_go"] = returns_to_go(data.columns["reward"], terminated, data.ends, discount)[rows]
        super().__init__(columns)
        self.terminates = bool(terminated[rows].any())
        values = data.columns["reward"].unique().tolist()
        self.sparse = is_antmaze(data) and len(values) == 2 and values[0] == 0  # unless they were shifted
        self.texts = data.tasks
        totals = returns_to_go(data.columns["reward"], torch.zeros_like(terminated), data.ends, 1.0)
        totals = totals[source.first[rows].unique()]  # of each episode
        self.returns = (float(totals.min()), float(totals.max()))
