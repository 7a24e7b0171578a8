"""Metrics of training steps, averaged over steps and processes when they are logged."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import parallel


class Metrics:
    """Collects metric name -> scalar of every step; tensors stay on their device until `means`."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}

    def add(self, metrics: Any, prefix: str = "") -> None:
        """Add the metrics of one step, with `prefix` before their names.

        Raises:
            TypeError: not a dict, or a value that is not a scalar; names its key.
        """
        if not isinstance(metrics, dict):
            raise TypeError(f"train_step must return a dict of metrics, found {type(metrics).__name__}")
        for key, value in metrics.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise TypeError(f"metric {key!r} has shape {tuple(value.shape)}; expected a scalar")
                value = value.detach() if value.ndim == 0 else value.detach().reshape(())
            elif not isinstance(value, (bool, int, float, np.number, np.bool_)):
                raise TypeError(f"metric {key!r} is a {type(value).__name__}; expected a scalar")
            self.values.setdefault(prefix + key, []).append(value)

    def floats(self) -> dict[str, list[float]]:
        """All values as numbers, with a single transfer from the device."""
        flat = [value for values in self.values.values() for value in values]
        tensors = [value for value in flat if isinstance(value, Tensor)]
        numbers = iter(torch.stack([tensor.float() for tensor in tensors]).tolist() if tensors else ())
        return {
            key: [next(numbers) if isinstance(value, Tensor) else float(value) for value in values]
            for key, values in self.values.items()
        }

    def rank_state(self) -> dict[str, list[float]]:
        """The values of this process since the last log line."""
        return self.floats()

    def load_rank_state(self, state: dict[str, list[float]]) -> None:
        """Restore the state of `rank_state`."""
        self.values = state

    def means(self) -> dict[str, float]:
        """Mean of each metric over all steps since the last call and over all processes.

        The keys are the union over the processes; each mean is over the values that there are of its key.
        """
        sums = {key: (sum(values), len(values)) for key, values in self.floats().items()}
        self.values = {}
        total: dict[str, tuple[float, int]] = {}
        for part in parallel.gather(sums):
            for key, (value, count) in part.items():
                before = total.get(key, (0.0, 0))
                total[key] = (before[0] + value, before[1] + count)
        return {key: value / count for key, (value, count) in total.items()}
