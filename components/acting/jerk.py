"""How smooth the executed actions are: their third differences, and their steps where another chunk takes over."""

from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = ("jerk", "border", "inside")


class Jerk:
    """Of one episode per slot, the mean squares over steps and dimensions, in the environment's units.

    `jerk` is of the third difference a[t] - 3 a[t-1] + 3 a[t-2] - a[t-3], `border` of the step a[t] - a[t-1] where
    another chunk takes over, and `inside` of the other steps.

    Args:
        slots: Number N of episodes.
        space: Of the actions; discrete ones have none of these.
    """

    def __init__(self, slots: int, space: Any) -> None:
        self.known = hasattr(space, "low")
        self.sums = {kind: np.zeros(slots) for kind in KINDS}
        self.counts = {kind: np.zeros(slots, dtype=int) for kind in KINDS}
        self.past: list[np.ndarray] = []  # the last actions `[N, Da]`, at most three, the newest last

    def add(self, action: np.ndarray, borders: np.ndarray, rows: np.ndarray) -> None:
        """Count a step.

        Args:
            action: `[N, ...]`, as it is executed.
            borders: `[N]` bool, where another chunk takes over.
            rows: `[N]` bool, the episodes that run.
        """
        if not self.known:
            return
        action = np.array(action, np.float64).reshape(len(action), -1)
        if self.past:
            step = action - self.past[-1]
            self._count("border", step, rows & borders)
            self._count("inside", step, rows & ~borders)
        if len(self.past) == 3:
            third, second, first = self.past
            self._count("jerk", action - 3 * first + 3 * second - third, rows)
        self.past = [*self.past[-2:], action]

    def _count(self, kind: str, difference: np.ndarray, rows: np.ndarray) -> None:
        self.sums[kind] += np.where(rows, (difference**2).mean(1), 0)
        self.counts[kind] += rows

    def of(self, slot: int) -> dict[str, float | None]:
        """The mean squares of a slot's episode; None where it has no such step."""
        pairs = ((kind, self.sums[kind][slot], self.counts[kind][slot]) for kind in KINDS)
        return {kind: float(total / count) if count else None for kind, total, count in pairs}


def jerk_of(episodes: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The means over the episodes that have them, as `jerk_mean`, `border_mean` and `inside_mean`; None for none."""
    found = {kind: [episode[kind] for episode in episodes if episode.get(kind) is not None] for kind in KINDS}
    return {f"{kind}_mean": float(np.mean(values)) if values else None for kind, values in found.items()}
