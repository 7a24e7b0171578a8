"""Rollouts for on-policy algorithms."""

from typing import Any

import torch
from torch import Tensor

from ..contracts import Rollouts, estimate_of
from ..data.features import RECORDED
from ..data.normalisation import Normaliser
from ..datasets.transitions import Table
from ..errors import UserError
from ..run.pieces import Parts
from .collection import EXECUTED


class Rollout:
    """The current rollout of this process's environments, for a trainer that asks for `Rollouts`.

    Takes the place of a replay buffer. A complete rollout of T steps of N environments is normalised and passed to the
    trainer's `estimate(rollout)` as `[T, N, ...]`, with the actions as drawn and the flags `ended` and `valid`
    `[T, N]`. Then follow `epochs` passes over the result in minibatches, each pass in a new order.

    Args:
        trainer: With `estimate`.
        normaliser: Of the batches.
        device: Of the trainer.
        num_envs: Environments of this process.
        minibatch: Samples of each update on this process.
        request: Steps of each environment, and passes over them.

    Raises:
        UserError: a minibatch that is larger than the rollout; a trainer without `estimate`.
    """

    def __init__(
        self,
        trainer: Any,
        normaliser: Normaliser,
        device: torch.device,
        num_envs: int,
        minibatch: int,
        request: Rollouts,
    ) -> None:
        self.estimate, self.normaliser, self.device = estimate_of(trainer), normaliser, device
        self.steps = steps = request.steps
        self.minibatch = minibatch
        if minibatch > steps * num_envs:
            raise UserError(
                f"--batch-size: {minibatch} samples are more than the rollout of {steps} steps of {num_envs}"
                f" environments has on each process; use at most {steps * num_envs}, or a longer --trainer.rollout"
            )
        self.num_envs = num_envs
        self.epochs, self.per_epoch = request.epochs, steps * num_envs // minibatch
        self.rows: list[dict[str, Tensor]] = []
        self.missed = 0  # steps of this rollout that were lost to faults
        self.fresh = 0.0  # updates that are due for the rollout that has just ended
        self.order: list[Tensor] = []

    def __len__(self) -> int:
        """Number of steps of this process's environments."""
        return len(self.rows) * len(self.rows[0]["valid"]) if self.rows else 0

    def add(self, transitions: dict[str, Tensor]) -> None:
        """Add a step of each environment."""
        kept = {key: value for key, value in transitions.items() if key not in UNSTORED}
        self.rows.append(kept | {"action": transitions["drawn"]})
        if len(self.rows) + self.missed == self.steps:
            self._finish()

    def miss(self) -> None:
        """Count a step that was lost to a fault: the episodes are truncated, and this rollout has fewer samples.

        So rollouts end at the same step on all processes, whose updates are synchronous.
        """
        self.cut()
        self.missed += 1
        if len(self.rows) + self.missed == self.steps:
            self._finish()

    def due(self, ready: bool) -> float:
        """Updates that became due since the last call: all those of a rollout once it has ended."""
        fresh, self.fresh = self.fresh, 0.0
        return fresh

    def cut(self) -> None:
        """Truncate the current episodes: mark each environment's newest step as the last one."""
        if self.rows:
            self.rows[-1]["ended"] = torch.ones_like(self.rows[-1]["ended"])

    def _finish(self) -> None:
        """Pass the rollout to the trainer's `estimate`, and draw the order of the minibatches."""
        rollout = {key: torch.stack([row[key] for row in self.rows]).to(self.device) for key in self.rows[0]}
        self.rows, self.missed = [], 0
        valid = rollout["valid"].flatten()
        estimated = self.estimate(self.normaliser(rollout))
        columns = {key: value.flatten(0, 1)[valid] for key, value in estimated.items() if key not in UNLEARNT}
        numbers = {key: value for key, value in columns.items() if value.dtype == torch.float32}
        self.table = Table(numbers, self.device)  # one read per minibatch
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
        """A line about the rollouts for the screen."""
        updates = self.epochs * self.per_epoch
        return f"rollouts of {self.steps} steps of each environment, {updates} updates after each"

    def new_parts(self, rank: int) -> Parts:
        """No pieces: a rollout is saved with the state of its process."""
        return Parts()

    def saved(self) -> None:
        """Called once a checkpoint is valid."""

    def rewrite(self) -> None:
        """Nothing to write again."""

    left_out = 0  # transitions that a damaged checkpoint has lost: there are no pieces

    @property
    def between(self) -> bool:
        """Whether no rollout has begun, so that the collecting policy may change."""
        return not (self.rows or self.missed)

    def state_dict(self) -> dict[str, Any]:
        """The current, incomplete rollout."""
        return {"rows": self.rows, "missed": self.missed}

    def restore(self, state: dict[str, Any], first: int) -> bool:
        """Restore the rollout of this process; when the number of processes has changed, begin a new one."""
        if "buffer" in state:
            self.rows, self.missed = state["buffer"]["rows"], state["buffer"]["missed"]
        return True


UNSTORED = ("action", "drawn", "begins", *RECORDED, EXECUTED)
UNLEARNT = ("valid", "ended", "reward", "terminated")
