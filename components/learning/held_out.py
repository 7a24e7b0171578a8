"""The trainer's loss on held-out data, and on each source of a mixture."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .. import contracts, parallel
from ..data.batches import to_device
from ..data.features import read
from ..data.random_state import preserved, seed_all
from ..errors import StoppedError


class HeldOut:
    """Measures the held-out loss, and keeps the step at which it did.

    Args:
        learner: The learner; nothing is measured if its trainer has no `losses`.
        dataset: The validation set, or None.
        normaliser: Of the batches.
        batch_size: Items per forward pass.
        tick: Called for each batch; an exception from it ends the measurement.
    """

    def __init__(
        self, learner: Any, dataset: Any, normaliser: Any, batch_size: int, tick: Callable[[], None] = lambda: None
    ) -> None:
        self.trainer, self.device = learner.trainer, learner.device
        self.dataset = dataset if contracts.losses_of(learner.trainer) else None
        self.normaliser, self.batch_size, self.tick = normaliser, batch_size, tick
        self.measured_at = -1

    def __bool__(self) -> bool:
        return self.dataset is not None

    def measure(self, step: int) -> dict[str, float]:
        """Measure at this step. Returns {"val/loss", ...} as `held_out_loss`; {} without a validation set."""
        if self.dataset is None:
            return {}
        found = held_out_loss(self.trainer, self.dataset, self.normaliser, self.batch_size, self.device, self.tick)
        self.measured_at = step
        return found


@torch.no_grad()
def held_out_loss(
    trainer: Any,
    dataset: Any,
    normaliser: Any,
    batch_size: int,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean of the trainer's `losses` over the validation set; preserves the random state.

    Uses the uncompiled losses: compiled ones would be compiled again without gradients and for the smaller last batch.

    Returns:
        {"val/loss": mean}; for a mixture, the mean of the sources weighted by their shares, and "val/loss.<source>".

    Raises:
        StoppedError: on all processes, when `tick`, which is called for each batch, raised it on the first.
    """
    losses = contracts.losses_of(trainer)
    assert losses is not None, "the caller asks for it only where there are losses"
    everything = {"": (torch.arange(len(dataset)), 1.0)}
    sources = dataset.sources() if hasattr(dataset, "sources") else everything
    means: dict[str, float] | None = None
    with preserved(), parallel.apart(), contextlib.suppress(StoppedError):
        seed_all(0)  # the same noise in each measurement, so that losses are comparable
        totals = dict.fromkeys(sources, 0.0)
        for name, (rows, _) in sources.items():
            for part in rows.split(batch_size):
                tick()
                data = normaliser(to_device(read(dataset, part), device))
                totals[name] += float(total_loss(losses(data))) * len(part)
        means = {name: totals[name] / len(rows) for name, (rows, _) in sources.items()}
    if (means := parallel.from_first(means)) is None:
        raise StoppedError("stopped by a signal")
    found = {"val/loss": sum(share * means[name] for name, (_, share) in sources.items())}
    return found | {f"val/loss.{name}": mean for name, mean in means.items() if name}


@torch.no_grad()
def loss_by_source(trainer: Any, batch: dict[str, Any], prefix: str) -> dict[str, float]:
    """The trainer's loss on each source's part of a mixture's batch; {} for other data.

    One batch stands for the mean over all steps, which would need a forward pass per source at every step.
    """
    losses = contracts.losses_of(trainer)  # not the compiled ones: the parts' sizes change
    if "source" not in batch or losses is None:
        return {}
    found: dict[str, float] = {}
    with preserved(), parallel.apart():
        for name in sorted(set(batch["source"])):
            rows = [i for i, source in enumerate(batch["source"]) if source == name]
            part = {k: v[rows] if isinstance(v, torch.Tensor) else [v[i] for i in rows] for k, v in batch.items()}
            found[f"{prefix}loss.{name}"] = float(total_loss(losses(part)))
    return found


def total_loss(losses: Any) -> Any:
    """The scalar loss of the result of `losses`: (loss, metrics), the loss alone, or a dict of terms to add."""
    losses = losses[0] if isinstance(losses, tuple) else losses
    return sum(losses.values()) if isinstance(losses, dict) else losses
