"""Rollouts: what on-policy algorithms learn from, and forget."""

from typing import Any

import torch
from torch import Tensor

from ..data.normalisation import Normaliser
from ..datasets.transitions import Table
from ..errors import UserError
from ..run.checkpoint import Parts


class Rollout:
    """The newest steps of each of this process's environments, until there are enough to learn from them.

    In the place of a replay buffer for a trainer that has `rollout` and `estimate(rollout) -> rollout`: once so many
    steps are there, it is given them, normalised, `[T, N, ...]`, the actions as they were drawn, the flags `ended` and
    `valid` `[T, N]`, and adds what it learns from. Then come `epochs` passes over them in minibatches, each shuffled
    anew.

    Args:
        trainer: Offers `estimate`.
        normaliser: Of the batches.
        device: Where the trainer learns.
        num_envs: Environments of this process.
        minibatch: Samples of each update, on this process.
        steps: Of each environment.
        epochs: Passes over the samples.

    Raises:
        UserError: a minibatch that is larger than the rollout.
    """

    def __init__(
        self,
        trainer: Any,
        normaliser: Normaliser,
        device: torch.device,
        num_envs: int,
        minibatch: int,
        steps: int,
        epochs: int,
    ) -> None:
        self.trainer, self.normaliser, self.device = trainer, normaliser, device
        self.steps, self.minibatch = steps, minibatch
        if minibatch > steps * num_envs:
            raise UserError(
                f"--batch-size: {minibatch} samples are more than the rollout of {steps} steps of {num_envs}"
                f" environments has on each process; use at most {steps * num_envs}, or a longer --trainer.rollout"
            )
        self.epochs, self.per_epoch = epochs, steps * num_envs // minibatch
        self.rows: list[dict[str, Tensor]] = []
        self.missed = 0  # steps of this rollout that a fault of the environments has taken
        self.fresh = 0.0  # updates that the rollout which has just ended makes due
        self.order: list[Tensor] = []

    def __len__(self) -> int:
        """Steps of this process's environments."""
        return len(self.rows) * len(self.rows[0]["valid"]) if self.rows else 0

    def add(self, transitions: dict[str, Tensor]) -> None:
        """Add a step of each environment."""
        kept = {key: value for key, value in transitions.items() if key not in ("action", "drawn")}
        self.rows.append(kept | {"action": transitions["drawn"]})
        if len(self.rows) + self.missed == self.steps:
            self._finish()

    def miss(self) -> None:
        """A step of the environments was lost: their episodes are cut, and this process has fewer samples this time.

        So rollouts end at the same step on all processes, which learn from them together.
        """
        self.cut()
        self.missed += 1
        if len(self.rows) + self.missed == self.steps:
            self._finish()

    def due(self, ready: bool) -> float:
        """Updates that are due since the last call: all of a rollout once it has ended."""
        fresh, self.fresh = self.fresh, 0.0
        return fresh

    def cut(self) -> None:
        """Mark each environment's newest step as the last one of its episode: truncated."""
        if self.rows:
            self.rows[-1]["ended"] = torch.ones_like(self.rows[-1]["ended"])

    def _finish(self) -> None:
        """Let the trainer estimate what it learns from, and lay out the minibatches."""
        rollout = {key: torch.stack([row[key] for row in self.rows]).to(self.device) for key in self.rows[0]}
        self.rows, self.missed = [], 0
        valid = rollout["valid"].flatten()
        estimated = self.trainer.estimate(self.normaliser(rollout))
        columns = {key: value.flatten(0, 1)[valid] for key, value in estimated.items() if key not in UNLEARNT}
        numbers = {key: value for key, value in columns.items() if value.dtype == torch.float32}
        self.table = Table(numbers, self.device)  # one read a minibatch
        self.others = {key: value for key, value in columns.items() if key not in numbers}
        for _ in range(self.epochs):
            count = self.per_epoch * self.minibatch
            order = torch.cat([torch.randperm(int(valid.sum())) for _ in range(-(-count // max(int(valid.sum()), 1)))])
            self.order += order[:count].to(self.device).split(self.minibatch)
        self.fresh = float(len(self.order))

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """The next minibatch."""
        rows = self.order.pop(0)
        return self.table.get_batch(rows) | {key: value.index_select(0, rows) for key, value in self.others.items()}

    def describe(self, steps: int, world: int, saved: bool) -> str:
        """What to say of it."""
        updates = self.epochs * self.per_epoch
        return f"rollouts of {self.steps} steps of each environment, {updates} updates after each"

    def new_parts(self, rank: int) -> Parts:
        """Nothing that stays as it is."""
        return Parts()

    def saved(self) -> None:
        """A checkpoint counts."""

    @property
    def between(self) -> bool:
        """Whether no rollout has begun, so that what acts may change."""
        return not (self.rows or self.missed)

    def state_dict(self) -> dict[str, Any]:
        """The rollout that has begun."""
        return {"rows": self.rows, "missed": self.missed}

    def restore(self, own: dict[str, Any], first: int) -> bool:
        """Go on with what this process saved; with another number of processes the rollout begins anew."""
        if "buffer" in own:
            self.rows, self.missed = own["buffer"]["rows"], own["buffer"]["missed"]
        return True


UNLEARNT = ("valid", "ended", "reward", "terminated")
