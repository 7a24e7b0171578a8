"""An evaluation whose episodes are divided among the processes, whatever an episode is."""

from collections.abc import Callable
from typing import Any

from .. import parallel
from ..data.random_state import preserved


class Divided:
    """What evaluations in an environment and against recordings have in common.

    A subclass has `_part`, which returns what is found in the episodes of this process, and `_summarise`, which makes
    the line for `eval.jsonl` of what all processes have found.

    Args:
        policy: The policy.
        count: Episodes of all processes.
        rank, world: Rank of this process, and number of processes.
        tick: Called at each step; an exception from it ends the evaluation.
    """

    def __init__(self, policy: Any, count: int, rank: int, world: int, tick: Callable[[], None]) -> None:
        self.policy, self.count, self.rank, self.world, self.tick = policy, count, rank, world, tick
        self.seen: Callable[[int, int], None] = lambda done, total: None  # is told how many episodes have ended

    def evaluate(self, step: int) -> tuple[dict[str, Any] | None, str]:
        """Evaluate; returns (the line for `eval.jsonl`, "") or, on all processes, (None, why it failed on one).

        Preserves the random state, so that training continues as without the evaluation.

        Raises:
            StoppedError: on all processes, when a stop was requested on any.
        """
        with preserved():
            found, problem = parallel.joined(self.rank, self._part)
        return (None, problem) if problem else (self._summarise(found, step), "")

    def _ended(self, done: int) -> None:
        """Tell how many episodes of all processes have ended, by those of this one."""
        self.seen(min(done * self.world, self.count), self.count)

    def _part(self) -> list[Any]:
        raise NotImplementedError

    def _summarise(self, found: list[Any], step: int) -> dict[str, Any]:
        raise NotImplementedError
