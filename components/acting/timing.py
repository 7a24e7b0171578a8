"""When a chunk is planned, when it arrives and which of its actions is executed, while the world goes on.

A plan that begins at step t is made from the observation of step t, and arrives `delay` d steps later. With chunks of H
steps, of which s (`action_steps`) are executed:

    blocking    t     t+d                  t+d+s        the robot holds still for d steps, then it executes the chunk
                |still| 0 1 .. s-1         |still|      from its first action, and plans the next one

    the others  t     t+d                  t+p          the old chunk goes on until the new one arrives, which is
                |old  | d d+1 ..           |            entered at its action d, that of step t+d; the next plan begins
                                           |new  |      at step t+p, p = max(s, d), since one is made at a time

An old chunk must last until the new one arrives: d + p <= H. An episode begins with a robot that stands still for the d
steps of the first plan, whatever the method; this plan is entered at its first action, and time counts from there.

Where the policy gives single actions, there is no old chunk. A plan then begins at every step, so that several are
under way, and the action that was planned at step t is executed at step t+d.
"""

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

LONGEST = 1000  # steps of delay


class Timing(NamedTuple):
    """The times of one policy's chunks; all ages are steps since an episode began, `[n]` int64."""

    chunk: int  # H
    steps: int  # s, or p without blocking
    delay: int
    blocking: bool

    @property
    def queued(self) -> bool:
        """Whether single actions are on their way, one for each step of the delay."""
        return self.chunk == 1 and self.delay > 0 and not self.blocking

    @property
    def slots(self) -> int:
        """Chunks that are kept: the one that is executed, and those that have not arrived."""
        return self.delay + 1 if self.queued else 2 if self.delay and not self.blocking else 1

    def due(self, age: Tensor) -> Tensor:
        """Whether a plan begins, `[n]` bool."""
        if not self.delay:
            return age % self.steps == 0
        if self.blocking:
            return age % (self.delay + self.steps) == 0
        return (age == 0) | (age > self.delay) & ((age - self.delay) % self.steps == 0) | self.queued

    def number(self, age: Tensor) -> Tensor:
        """The number, from 0 on in its episode, of the plan that begins."""
        if self.queued:
            return age
        if self.blocking:
            return age // (self.delay + self.steps)
        return ((age - self.delay) // self.steps).clamp(min=0)

    def start(self, age: Tensor) -> Tensor:
        """The step for which the first action of a plan that begins is meant; of ensembling, as `arrived`."""
        return age.clamp(min=self.delay)

    def arrived(self, start: Tensor, age: Tensor) -> Tensor:
        """Whether a chunk that is meant from step `start` on has arrived."""
        return age >= torch.where(start > self.delay, start + self.delay, start)

    def current(self, age: Tensor) -> tuple[Tensor, Tensor]:
        """The plan that is executed, by its number, and the action of it; (0, negative) before the first arrives."""
        if self.blocking:
            cycle = self.delay + self.steps
            return age // cycle, age % cycle - self.delay
        if self.queued:
            return age - self.delay, (age - self.delay).clamp(max=0)
        age = age - self.delay
        number = ((age - self.delay) // self.steps).clamp(min=0)
        return number, age - number * self.steps

    def borders(self, age: Tensor) -> Tensor:
        """Whether another chunk, or stillness, takes over from the first chunk or a later one, `[n]` bool."""
        number, action = self.current(age)
        if not self.blocking:
            return (number > 0) & ((action == self.delay) | self.queued)
        return (number > 0) & ((action == 0) | (action == -self.delay))


def timing_of(chunk: int, action_steps: int | None, delay: int, blocking: bool) -> Timing:
    """The timing of a policy's settings.

    Raises:
        UserError: a delay that is no number of steps, or that the chunk does not cover.
    """
    delay = whole_delay("--policy.delay", delay, LONGEST, "environment steps")
    if blocking or not delay or chunk == 1:
        return Timing(chunk, action_steps or chunk, delay, blocking)
    if 2 * delay > chunk:
        raise UserError(
            f"--policy.delay {delay}: a chunk of {chunk} steps covers a delay of at most {chunk // 2}; learn longer "
            "chunks (--dataset.action-steps), or wait for each (--policy.blocking)"
        )
    if action_steps is not None and delay + action_steps > chunk:
        raise UserError(
            f"--policy.delay {delay} and --policy.action-steps {action_steps} need {delay + action_steps} steps of a "
            f"chunk of {chunk}, since it goes on until the next one arrives; --policy.action-steps {chunk - delay} fits"
        )
    return Timing(chunk, max(action_steps or chunk - delay, delay), delay, blocking)


def whole_delay(name: str, delay: Any, most: int, unit: str) -> int:
    """A delay as an int. Raises UserError: it is none, or out of range."""
    try:
        if isinstance(delay, bool) or not 0 <= (steps := operator.index(delay)) <= most:
            raise TypeError
    except TypeError:
        raise UserError(f"{name} {delay!r} must be a whole number of {unit}, 0 to {most}") from None
    return steps


class Rest(NamedTuple):
    """What is left of the chunks that are executed, in the time of those that are planned."""

    actions: (
        Tensor  # [n, Ta, Da], in the robot's units; action 0 is that of this step; those beyond `left` are not used
    )
    left: Tensor  # [n] int64, how many there are; 0 for none
    delay: int  # how many of them are executed before the new chunk takes over

    @property
    def frozen(self) -> Tensor:
        """How many actions of each new chunk are known, `[n]` int64."""
        return self.left.clamp(max=self.delay)

    @property
    def weight(self) -> Tensor:
        """How much each action of a new chunk should agree, `[n, Ta]` (Black et al., 2025, eq. 5, with H - s left)."""
        step, left = torch.arange(self.actions.shape[1]), self.left[:, None]
        share = (left - step) / (left - self.delay + 1).clamp(min=1)
        decaying = share * torch.expm1(share) / (math.e - 1)
        return torch.where(step < self.delay, 1.0, decaying).masked_fill(step >= left, 0.0)
