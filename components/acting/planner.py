"""Plans made in a thread of their own, the actions that they have for each step, and a clock for the steps."""

import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import UserError

TRIES = 3  # plans before the robot moves; the first ones are slow, and the last tells the delay to expect
FIRST = 60.0  # seconds that one of these may take
CLOSING = 2.0  # seconds that are waited for the plan in progress after the robot has stopped
LISTEN = 0.1  # seconds, the longest sleep after which a signal is noticed
SWITCH = 5e-4  # seconds after which Python's threads take turns


class Clock:
    """Seconds that only grow, and sleeping until one of them."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def sleep(self, until: float, listen: Callable[[], bool]) -> None:
        """Sleep until a moment, or until `listen` returns True."""
        while (left := until - self.now()) > 0 and not listen():
            time.sleep(min(left, LISTEN))


class InThread:
    """Plans in a thread of its own, which alone calls the policy.

    Args:
        policy: A `Policy`, with `observe(observation)` and `plan(observation, previous, delay) -> [Ta, Da]`.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="planner", daemon=True)  # one that hangs delays no exit
        self.thread.start()

    def begin(self, observations: Sequence[dict[str, Any]], previous: np.ndarray | None, delay: int) -> None:
        """Begin a plan from the newest of `observations`; the others are those since the last plan, oldest first.

        Args:
            previous: `[Tp, Da]`, the rest of the last chunk, from the action of this step on.
            delay: How many of these will be executed before the plan is there.
        """
        self.asked.put((observations, previous, delay))

    def take(self, seconds: float) -> tuple[np.ndarray, float] | None:
        """The chunk `[Ta, Da]` and the seconds that it took; None if it is not there within so many seconds.

        Raises:
            Exception: what the policy has raised.
        """
        try:
            answer = self.answers.get(timeout=seconds) if seconds > 0 else self.answers.get_nowait()
        except queue.Empty:
            return None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def prepare(self, observation: dict[str, Any], seed: int | None, check: Callable[[Any], np.ndarray]) -> float:
        """Make some plans, of which the first ones are slow, and begin an episode; returns the seconds of the last.

        Raises:
            UserError: one of them takes longer than a minute.
            Exception: what the policy has raised, or `check`, which is called with each chunk.
        """
        chunk, seconds = None, 0.0
        for _ in range(TRIES):
            self.begin([observation], chunk, min(1, 0 if chunk is None else len(chunk)))
            if (answer := self.take(FIRST)) is None:
                raise UserError(f"the policy has not planned anything within {FIRST:g} s; the robot has not moved")
            chunk, seconds = check(answer[0]), answer[1]
        self.policy.reset() if seed is None else self.policy.reset(seeds=[seed])  # nothing is being planned
        return seconds

    def close(self) -> None:
        """End the thread after its plan, for which this waits some seconds: then nothing else uses the policy."""
        self.asked.put(None)
        self.thread.join(CLOSING)

    def _work(self) -> None:
        while (work := self.asked.get()) is not None:
            (*others, newest), previous, delay = work
            began = time.perf_counter()
            try:
                for observation in others:
                    self.policy.observe(observation)
                chunk = self.policy.plan(newest, previous, delay)
                self.answers.put((chunk, time.perf_counter() - began))
            except BaseException as error:
                self.answers.put(error)


class Timeline:
    """The actions of the chunks that have been planned, by step.

    Args:
        policy: That planned them. With `ensemble` m in its settings, a step's action is its `mean` of those of all
            chunks, by weights exp(-m i), i = 0 the oldest; else the newest chunk's.
    """

    def __init__(self, policy: Any) -> None:
        self.ensemble, self.mean = policy.settings.ensemble, policy.mean
        self.chunks: list[tuple[int, np.ndarray]] = []  # (step of its observation, chunk), the oldest first

    def enter(self, start: int, chunk: np.ndarray) -> None:
        """Add the chunk `[Ta, Da]` of a plan that began at step `start`."""
        self.chunks = [*self.chunks, (start, chunk)] if self.ensemble is not None else [(start, chunk)]

    def action(self, step: int) -> np.ndarray | None:
        """The action `[Da]` of a step, or None if no chunk has one."""
        covering = [chunk[step - start] for start, chunk in self.chunks if step - start < len(chunk)]
        self.chunks = [(start, chunk) for start, chunk in self.chunks if step - start < len(chunk)]
        if not covering or self.ensemble is None:
            return covering[-1] if covering else None
        weights = (-self.ensemble * torch.arange(len(covering))).softmax(0)
        return self.mean(weights, torch.as_tensor(np.stack(covering))).numpy()

    def rest(self, step: int) -> np.ndarray | None:
        """What the newest chunk has left from a step on, `[Tp, Da]`; None if nothing."""
        start, chunk = self.chunks[-1] if self.chunks else (step, np.empty(0))
        return chunk[step - start :] if step - start < len(chunk) else None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let nothing of Python's own delay a thread that wakes by more than about a millisecond.

    It waits for the planner's turn to end, usually 5 ms after it has asked, and again each time that it is overtaken:
    beside a planner one step in a hundred began 45 ms late, and 1 ms with shorter turns, nearly as beside a process of
    its own. A collection of all that torch has imported takes 160 ms.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)
