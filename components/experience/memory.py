"""The memory of the online script: transitions, the updates that are due for them, and batches mixed with a dataset."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..contracts import Rollouts, request_of, window_of
from ..data.batches import to_device
from ..data.features import check_dataset, describe, read
from ..data.normalisation import Normaliser
from ..datasets.transitions import prepared
from ..errors import UserError
from .plan import starts_learning
from .replay import ReplayBuffer
from .rollout import Rollout


def memory_of(
    args: Any, run: Any, learner: Any, normaliser: Normaliser, spec: dict[str, Any], old: Any, over: tuple[int, int]
) -> "Memory":
    """The memory that the learner's trainer asks for.

    Args:
        spec: Of a transition.
        old: Transitions of a dataset, mixed into every batch; None for none.
        over: (environments over all processes, processes).

    Raises:
        UserError: too little room or memory, or a share that is not a whole number of samples.
    """
    cls, config = type(learner.trainer), args.trainer_options
    request, (num_envs, world) = request_of(cls, config), over
    part, of_rank = args.batch_size // (world * args.grad_accumulation), num_envs // world
    ready: Callable[[Any], Any] = lambda batch: normaliser(to_device(batch, learner.device))  # noqa: E731
    if isinstance(request, Rollouts):
        store: Any = Rollout(learner.trainer, normaliser, learner.device, of_rank, part, request)
        ready = lambda batch: batch  # noqa: E731  (it was normalised as a whole)
    else:
        rate, window = num_envs * args.updates_per_step, window_of(cls, config)
        store = ReplayBuffer(spec, args.buffer_size, num_envs, of_rank, window, rate)
        store = store if old is None else Mixed(store, old, args.dataset_ratio, part)
    return Memory(store, ready, part, starts_learning(args)[0], run, args.save_buffer, not args.init_from)


class Memory:
    """Stores the transitions of this process's environments, and counts the updates that are due.

    Args:
        store: `ReplayBuffer`, `Mixed` or `Rollout`.
        ready: A batch of the store -> a batch of the learner.
        part: Samples of each batch on this process.
        learning_starts: Environment steps before the first update.
        run: Has the step and the rank.
        saved: Whether checkpoints contain the store.
        random: Whether actions are random before the first update.
    """

    def __init__(
        self,
        store: Any,
        ready: Callable[[Any], Any],
        part: int,
        learning_starts: int,
        run: Any,
        saved: bool,
        random: bool = True,
    ) -> None:
        self.store, self.ready, self.part, self.run = store, ready, part, run
        self.learning_starts, self.keeps, self.random = learning_starts, saved, random
        self.learning = False  # whether the first update has been due
        self.owed, self.filled_from = 0.0, 0  # updates that are due; the step at which the store began to fill

    @property
    def between(self) -> bool:
        """Whether no rollout has begun, so that the collecting policy may change."""
        return self.store.between

    def add(self, transitions: dict[str, Tensor] | None) -> None:
        """Add a transition `[N, ...]` of each environment; None after a fault, which truncates all episodes."""
        if transitions is None:
            self.store.miss()
        else:
            self.store.add(transitions)

    def cut(self) -> None:
        """Truncate all current episodes."""
        self.store.cut()

    @property
    def empty(self) -> bool:
        """Whether no transition is stored."""
        return not len(self.store)

    def describe(self, steps: int, world: int) -> tuple[str, str]:
        """Lines for the screen about the store, and about what is collected before anything is learnt, or "".

        Args:
            steps: Of each environment, in the whole run.
            world: Number of processes.
        """
        first = self.filled_from + self.learning_starts - self.run.step
        self.run.progress.doing = "training" if self.learning and first < 0 else "collecting"
        actions = "of random actions " if self.random and self.run.step < self.learning_starts else ""
        collects = f"learning starts after {first} steps {actions}" if first > 0 else ""
        return self.store.describe(steps, world, self.keeps), collects.rstrip()

    def due(self) -> int:
        """Number of updates that are due after this environment step; fractions are carried over."""
        self.owed += self.store.due(self.run.step - self.filled_from > self.learning_starts)
        updates = 0
        while self.owed >= 1:
            self.owed -= 1
            updates += 1
        if updates and self.run.progress.doing == "collecting":
            self.run.progress.doing = "training"
            self.run.say(f"step {self.run.step}: learning {'goes on' if self.learning else 'starts'}")
            self.learning = True
        return updates

    def next_batch(self) -> dict[str, Any]:
        """A batch for the learner, on its device and normalised."""
        return self.ready(self.store.sample(self.part))

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """The updates that are owed, the same on all processes."""
        state = {"owed": self.owed, "filled_from": self.filled_from, "learning_starts": self.learning_starts}
        return state | {"learning": self.learning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.owed, self.filled_from = state["owed"], state["filled_from"]
        self.learning = state.get("learning", True)  # which older checkpoints do not tell
        self.learning_starts = state["learning_starts"]  # whose default depends on the steps, which may have changed

    def rank_state(self) -> dict[str, Any]:
        """The state of this process's store; its large files are shared with the checkpoint before."""
        return {"parts": self.store.new_parts(self.run.rank), "buffer": self.store.state_dict()} if self.keeps else {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        self._restore(state)

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Restore this process's share of the states of all former processes."""
        self._restore({"ranks": states})

    def _restore(self, state: dict[str, Any]) -> None:
        if not self.store.restore(state, self.run.rank * self.store.num_envs):
            self.filled_from = self.run.step  # nothing was saved: the store is empty
        stored, left_out = map(sum, zip(*parallel.gather((len(self.store), self.store.left_out)), strict=True))
        if left_out:  # learning waits until as much is there as it began with
            self.filled_from = max(self.filled_from, self.run.step - stored)
            self.run.say(f"the replay buffer goes on without {left_out} transitions, whose files are damaged")

    def rewrite(self) -> None:
        """Called when a file that an earlier checkpoint shares with the next one is damaged."""
        self.store.rewrite()

    def saved(self) -> None:
        """Called once a checkpoint is valid."""
        self.store.saved()


def old_transitions(
    data: dict[str, Any], trainer: type, args: Any, spec: dict[str, Any], normaliser: Normaliser
) -> Any:
    """The dataset in the form that the trainer learns from; None for no data.

    Args:
        data: Result of a dataset's factory.
        spec: Of the batches of the environment's transitions.

    Raises:
        UserError: a key that the data lacks, or of another shape; actions beyond the environment's bounds.
    """
    if not data:
        return None
    data = prepared(data, trainer, args.trainer, args.trainer_options, alone=False)
    check_dataset(data["dataset"], "it")
    found = describe(data["dataset"][0], {})
    for key, feature in spec.items():
        if key not in found:
            raise UserError(f"it has no {key!r}, which the environment has; found: {', '.join(found)}")
        if tuple(found[key]["shape"]) != tuple(feature["shape"]):
            shapes = f"{tuple(found[key]['shape'])}, the environment's {tuple(feature['shape'])}"
            raise UserError(f"its {key!r} has shape {shapes}")
    stats = data["norm_stats"].get("action", {})
    if {"min", "max"} <= set(stats) and "range" in spec["action"]:
        bounds = torch.tensor([stats["min"], stats["max"]], dtype=torch.float32)
        if "action" in normaliser.modes:
            bounds = (bounds - normaliser.offset["action"].cpu()) / normaliser.scale["action"].cpu()
        if (
            float(bounds.abs().max()) > 1 + 1e-3
            and float(torch.tensor(spec["action"]["range"]).abs().max()) <= 1 + 1e-3
        ):
            raise UserError(f"its actions reach {float(bounds.abs().max()):.4g} times the environment's bounds")
    return data["dataset"]


class Mixed:
    """A replay buffer with a fixed share of each batch from a dataset; everything else is delegated to the buffer.

    Args:
        buffer: Transitions of the environment.
        dataset: In the form that the trainer learns from.
        ratio: Share of the dataset, 0 to 1.
        batch_size: Samples of each update on this process.

    Raises:
        UserError: a share outside [0, 1], or one that is not a whole number of samples.
    """

    def __init__(self, buffer: ReplayBuffer, dataset: Any, ratio: float, batch_size: int) -> None:
        self.buffer, self.dataset, self.old = buffer, dataset, round(ratio * batch_size)
        if not 0 <= ratio <= 1:
            raise UserError(f"--dataset.ratio {ratio} must be a share from 0 to 1")
        if abs(self.old - ratio * batch_size) > 1e-6:
            near = f"{self.old / batch_size:g} or another --batch-size"
            raise UserError(f"--dataset.ratio {ratio} of {batch_size} samples is not a whole number; use {near}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["buffer"], name)

    def __len__(self) -> int:
        return len(self.buffer)

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """A batch of both, the dataset's samples first, with the keys of the buffer's batches."""
        new = self.buffer.sample(batch_size - self.old)
        if not self.old:
            return new
        old = read(self.dataset, torch.randint(len(self.dataset), (self.old,)))
        return {key: torch.cat([old[key].to(value.dtype), value]) for key, value in new.items()}
