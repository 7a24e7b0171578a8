"""Episodes resident in memory: observation history, action chunks, padding, the validation split and the statistics.

Every reader ends here, so that all formats share one definition of a window and of a transition.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from ..normalisation import statistics

logger = logging.getLogger(__name__)


class EpisodeDataset(Dataset):
    """Rows of episodes, one after the other; an item is one time step with its history and its action chunk.

    Args:
        columns: key -> `[N, ...]`, one row a time step; `next.<key>` holds successors.
        episode_ends: `[E]`, the row after each episode's last one.
        obs_steps: Observation steps To. 1 gives `[Ds]`, more give `[To, Ds]`, the last being now; before the first step
            the first observation is repeated.
        action_steps: Action steps Ta. 1 gives `[Da]`, more give `[Ta, Da]` from now on, and `action_is_pad` `[Ta]`:
            after the last step the last action is repeated.
    """

    deterministic = True  # no random choices: each process may ask for its own part of a batch

    def __init__(
        self, columns: dict[str, Tensor], episode_ends: Tensor, obs_steps: int = 1, action_steps: int = 1
    ) -> None:
        self.columns, self.episode_ends = columns, episode_ends
        self.obs_steps, self.action_steps = obs_steps, action_steps
        lengths = torch.diff(episode_ends, prepend=torch.zeros(1, dtype=torch.int64))
        self.last = torch.repeat_interleave(episode_ends - 1, lengths)  # [N] last row of the episode of each row
        self.first = torch.repeat_interleave(episode_ends - lengths, lengths)  # [N] its first row

    def __len__(self) -> int:
        return len(self.last)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.get_batch(torch.tensor([index])).items()}

    def get_batch(self, indices: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Items `indices` `[B]` as one batch; `seed` is not needed, since nothing here is random."""
        batch = {}
        for key, column in self.columns.items():
            if self.obs_steps > 1 and "observation." in key:
                history = indices[:, None] + torch.arange(1 - self.obs_steps, 1)  # [B, To]
                batch[key] = column[torch.maximum(history, self.first[indices, None])]
            elif self.action_steps > 1 and key == "action":
                chunk = indices[:, None] + torch.arange(self.action_steps)  # [B, Ta]
                last = self.last[indices, None]
                batch[key] = column[torch.minimum(chunk, last)]
                batch["action_is_pad"] = chunk > last
            else:
                batch[key] = column.index_select(0, indices)
        return batch


def build_episodes(
    columns: dict[str, Tensor],
    episode_ends: Tensor,
    name: str,
    obs_steps: int = 1,
    action_steps: int = 1,
    validation: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """What a dataset factory returns: {"dataset", "norm_stats"}, and "validation" where episodes could be held out.

    Args:
        name: Of the data, for messages.
        validation: Fraction of the episodes to hold out: at least one, never more than a fifth of the rows; 0 for none.

    Raises:
        UserError: no rows, NaN or Inf (count and first place), options that make no sense.
    """
    if obs_steps < 1 or action_steps < 1:
        raise UserError(f"--dataset.obs-steps {obs_steps} and --dataset.action-steps {action_steps} must be 1 or more")
    if not 0 <= validation < 1:
        raise UserError(f"--dataset.validation {validation} must be a fraction from 0 to below 1")
    rows = int(episode_ends[-1]) if len(episode_ends) else 0
    if rows == 0:
        raise UserError(f"{name}: the dataset is empty; expected at least one episode with one step")
    check_finite(columns, episode_ends, name)
    lengths = torch.diff(episode_ends, prepend=torch.zeros(1, dtype=torch.int64))
    short = int((lengths < max(obs_steps, action_steps)).sum())
    if short:
        window = max(obs_steps, action_steps)
        logger.info("%s: %d episodes are shorter than the window of %d steps; they are padded", name, short, window)
    held_out = held_out_episodes(lengths, validation, seed)
    if validation and not held_out.any():
        logger.info("%s: no episode is small enough to hold out (a fifth of the rows); no validation set", name)
    train = _subset(columns, lengths, ~held_out)
    built: dict[str, Any] = {
        "dataset": EpisodeDataset(*train, obs_steps, action_steps),
        "norm_stats": {key: statistics(column) for key, column in train[0].items() if _has_statistics(key, column)},
    }
    if held_out.any():
        built["validation"] = EpisodeDataset(*_subset(columns, lengths, held_out), obs_steps, action_steps)
    return built


def _has_statistics(key: str, column: Tensor) -> bool:
    wanted = key == "action" or key.startswith("observation.")
    return wanted and column.is_floating_point() and column.ndim == 2


def held_out_episodes(lengths: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose validation episodes, `[E]` bool: at random, as many as fit into a fifth of the rows."""
    held_out = torch.zeros(len(lengths), dtype=torch.bool)
    wanted = max(1, round(fraction * len(lengths))) if fraction > 0 else 0
    room = int(lengths.sum()) // 5
    for episode in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist():
        if int(held_out.sum()) < wanted and int(lengths[episode]) <= room:
            held_out[episode] = True
            room -= int(lengths[episode])
    return held_out


def check_finite(columns: dict[str, Tensor], episode_ends: Tensor, name: str) -> None:
    """Raise UserError with the count and the first place of NaN or Inf values."""
    for key, column in columns.items():
        if column.is_floating_point() and not column.isfinite().all():
            bad = ~column.isfinite()
            row = int(bad.flatten(1).any(1).nonzero()[0]) if column.ndim > 1 else int(bad.nonzero()[0])
            episode = int(torch.searchsorted(episode_ends, row, right=True))
            step = row - (int(episode_ends[episode - 1]) if episode else 0)
            raise UserError(
                f"{name}: {int(bad.sum())} NaN or Inf values in {key!r}, first in episode {episode} at step {step};"
                " clean or drop them"
            )


def _subset(columns: dict[str, Tensor], lengths: Tensor, keep: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of the episodes to keep, and their ends."""
    rows = torch.repeat_interleave(keep, lengths)
    return {key: column[rows] for key, column in columns.items()}, lengths[keep].cumsum(0)
