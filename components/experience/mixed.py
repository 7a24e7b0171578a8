"""What the online script learns from: which windows of experience, and which share of it from a dataset."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.features import check_dataset, describe, read
from ..data.normalisation import Normaliser
from ..datasets.transitions import prepared
from ..errors import UserError
from ..run.record import read_args
from .replay import ReplayBuffer

# Options of the online script that have no meaning for a trainer that learns from rollouts.
OF_REPLAY = ("updates-per-step", "learning-starts", "buffer-size", "dataset")
PLAIN = (0.0, 1.0)  # shift and scale of rewards that stay as they are


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the online script adds to a dataset's options."""

    ratio: float = 0.5
    """Share of every batch that comes from the dataset."""


def own_options(options: Any) -> dict[str, Any]:
    """The dataset's own options, without that share."""
    return {key: value for key, value in asdict(options).items() if key != "ratio"}


def on_policy(trainer: type) -> bool:
    """Whether a trainer learns from rollouts of its own policy."""
    return hasattr(trainer, "estimate")


def window_of(trainer: type, config: Any) -> dict[str, Any]:
    """What one sample of a trainer is, as options of `Transitions`: its `window`, or its `n_step` and `discount`."""
    if hasattr(trainer, "window"):
        return trainer.window(config)
    return {name: getattr(config, name) for name in ("discount", "n_step") if hasattr(config, name)}


def check_options(trainer: type, name: str, dataset: str, given: Callable[[str], bool]) -> None:
    """Refuse options that this trainer, or a run without a dataset, could only ignore. Raises UserError."""
    for option in OF_REPLAY if on_policy(trainer) else ():
        if given(option):
            raise UserError(f"--{option}: {name} learns from rollouts of its own policy; see --trainer.rollout")
    if getattr(trainer, "imitates", False):
        raise UserError(
            f"--trainer {name} imitates, which its own experience cannot teach; run it by offline_trainer.py"
        )
    if hasattr(trainer, "prepare") and not on_policy(trainer) and not hasattr(trainer, "window"):
        raise UserError(f"--trainer {name} learns from a dataset as a whole (its goals); run it by offline_trainer.py")
    if getattr(trainer, "needs_data", False) and dataset == "none":
        raise UserError(f"--trainer {name} learns from old transitions, too; name them, as in --dataset metaworld")
    if dataset == "none" and given("dataset.ratio"):
        raise UserError("--dataset.ratio is a share of a dataset; choose one with --dataset")


def reward_scale(shift: float | None, scale: float | None, dataset: Any, before: str) -> tuple[float, float]:
    """(shift, scale) of the rewards that are learnt from: as asked, else as the data's, or those of the run before."""
    options = vars(dataset)
    if "reward_scale" not in options and before and (Path(before) / "args.json").exists():
        stored = read_args(Path(before))["args"]
        options = stored.get("dataset_options") or {}
        if stored.get("reward_scale") is not None:  # an online run's own
            options = stored
    values = [options.get("reward_shift"), options.get("reward_scale")]
    found = [PLAIN[i] if value is None else value for i, value in enumerate(values)]
    return (found[0] if shift is None else shift, found[1] if scale is None else scale)


def total_updates(trainer: type, options: Any, steps: int, rate: float, num_envs: int, batch_size: int) -> int:
    """How many updates a run makes, for the learning rate's schedule.

    Args:
        steps: Environment steps after which updates follow.
        rate: Updates per environment step, of a trainer with a replay buffer.
    """
    if on_policy(trainer):
        rollout = trainer.rollout(options)  # type: ignore[attr-defined]
        samples = rollout["steps"] * num_envs
        return (steps // samples) * rollout["epochs"] * (samples // batch_size)
    return max(int(steps * rate), 0)


def old_transitions(
    data: dict[str, Any], trainer: type, name: str, config: Any, spec: dict[str, Any], normaliser: Normaliser
) -> Any:
    """What a dataset's factory returned as the trainer learns from it; None for no data.

    Args:
        spec: Of the batches that the environment's transitions make.

    Raises:
        UserError: a key that the data lacks, or of another shape; actions beyond what the environment takes.
    """
    if not data:
        return None
    data = prepared(data, trainer, name, config)
    check_dataset(data["dataset"], "it")
    found = describe(data["dataset"][0], {})
    for key, feature in spec.items():
        if key not in found:
            raise UserError(f"it has no {key!r}, which the environment gives; found: {', '.join(found)}")
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
            raise UserError(f"its actions reach {float(bounds.abs().max()):.4g} times what the environment takes")
    return data["dataset"]


class Mixed:
    """A replay buffer of whose batches an exact share is drawn from a dataset; all else is the buffer's.

    Args:
        buffer: What the environment has given.
        dataset: As the trainer learns from it.
        ratio: Share of the dataset.
        batch_size: Samples of each update on this process.

    Raises:
        UserError: a share that is none, or does not come to a whole number of samples.
    """

    def __init__(self, buffer: ReplayBuffer, dataset: Any, ratio: float, batch_size: int) -> None:
        self.buffer, self.dataset, self.old = buffer, dataset, round(ratio * batch_size)
        if not 0 <= ratio <= 1:
            raise UserError(f"--dataset.ratio {ratio} must be a share from 0 to 1")
        if abs(self.old - ratio * batch_size) > 1e-6:
            near = f"{self.old / batch_size:g} or another --batch-size"
            raise UserError(f"--dataset.ratio {ratio} of {batch_size} samples is no whole number; use {near}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["buffer"], name)

    def __len__(self) -> int:
        return len(self.buffer)

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """A batch of both, the dataset's samples first, with the keys of the buffer's."""
        new = self.buffer.sample(batch_size - self.old)
        if not self.old:
            return new
        old = read(self.dataset, torch.randint(len(self.dataset), (self.old,)))
        return {key: torch.cat([old[key].to(value.dtype), value]) for key, value in new.items()}
