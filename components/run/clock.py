"""What is due at a step, when to stop, and how the time is spent; the same on all processes."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import parallel
from ..errors import StoppedError
from .progress import EVALUATING, FILMING, SAVING, duration

FILM = 10  # episodes of an evaluation that take about as long as the film at the end
MOST_PASSES = 50  # of the loop between two votes of several processes, which bounds the delay of a stop


class Stopwatch:
    """A context that adds up the seconds inside; leaving it shows that the run makes progress."""

    def __init__(self, run: Any) -> None:
        self.run, self.seconds, self.calls, self.began = run, 0.0, 0, 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self.began
        self.calls += 1
        self.run.beat()


class Clock:
    """Decides at the top of the loop what is due at the current step.

    An event with a period of n steps is due when a multiple of n was passed since it happened last, and at the last
    step. So a step may be any number of environment steps, and a resumed run first does what its predecessor did not
    complete.

    Args:
        args: With `steps`, `eval_every`, `log_every`, `save_every` and `save_minutes`.
        run: Has the step and the stop request; `measure` records its progress.
        evaluates: Whether the run evaluates its policy.
        at_start: Whether the first evaluation is due before the first step.
    """

    def __init__(self, args: Any, run: Any, evaluates: bool, at_start: bool = False) -> None:
        self.args, self.run, self.evaluates = args, run, evaluates
        self.every = {"eval": args.eval_every, "log": args.log_every, "save": args.save_every}
        self.last = {"eval": -1 if at_start else 0, "log": 0, "save": 0}
        self.last_eval = self.last["eval"]  # step of the evaluation before, for one that is interrupted
        self.stopping = self.owed = self.renew = False
        self.alone, self.timed, self.wait, self.passes = parallel.world_size() == 1, False, 1, 0
        self.saved_at = self.voted_at = time.monotonic()
        self.logged_at: int | None = None
        self.watches = {"data_s": Stopwatch(run), "step_s": Stopwatch(run)}
        # The step and the seconds at work where the time left is measured: at first, and at the newest log lines.
        self.marks: deque[tuple[int, float]] = deque(maxlen=20)
        self.start, self.settled = self._mark(), True
        run.progress.left = self.left

    # ---- what is due ----

    @property
    def over(self) -> bool:
        """Whether the loop ends: at the last step, or because a stop was requested."""
        return self.stopping or self.run.step >= self.args.steps

    @property
    def unfinished(self) -> bool:
        """Whether the run has to be resumed: it has steps to make, or an evaluation to repeat."""
        return self.owed or self.run.step < self.args.steps

    def due(self, what: str, also: bool = False, settled: bool = True) -> bool:
        """Whether an evaluation ("eval"), a log line ("log") or a checkpoint ("save") is due; if so, counts it as done.

        A checkpoint is also due after `save_minutes` and before a stop; all processes vote on both.

        Args:
            also: Whether another reason makes it due.
            settled: Whether what was collected has been learnt from; a log line waits for it until the last step.
        """
        step, every, last = self.run.step, self.every[what], self.last[what]
        due = also or (step > last and (step >= self.args.steps or (every > 0 and step // every > last // every)))
        if what == "eval":
            due = due and self.evaluates
        elif what == "log":
            self.logged_at = step if self.logged_at is None else self.logged_at
            due = due and (settled or step >= self.args.steps)
            due = due and not self.stopping  # the resumed run writes the line, after the evaluation
            self._begin_to_measure(settled)
        else:
            due = self._vote() or due or self.renew
            self.renew = False
            self.saved_at = time.monotonic() if due else self.saved_at
        if due:
            self.last[what] = step
        if due and what == "eval":
            self.last_eval, self.wait = last, 0
            self.renew = self.last["save"] == step  # that checkpoint does not include this evaluation
        return due

    @contextmanager
    def owing_evaluation(self) -> Iterator[None]:
        """Let a stop interrupt the evaluation, which is then due again in the resumed run; show that it runs."""
        try:
            with self.run.progress.phase(EVALUATING, unit="episodes"):
                yield
        except StoppedError:  # raised on all processes together
            self.last["eval"], self.stopping, self.owed = self.last_eval, True, True

    def _vote(self) -> bool:
        """About once a second, agree on whether to stop and whether a checkpoint is late; returns whether to save."""
        self.wait, self.passes = self.wait - 1, self.passes + 1
        if self.wait > 0 or self.stopping:
            return self.stopping
        now = time.monotonic()
        late = 0 < self.args.save_minutes * 60 < now - self.saved_at
        votes = parallel.gather((self.run.stop.asked, late, (now - self.voted_at) / self.passes))
        self.stopping = any(asked for asked, _, _ in votes)
        _, late, seconds = votes[0]  # rank 0's clock decides
        each_time = self.alone or not self.timed  # before the first step there is no time to go by
        self.wait = 1 if each_time else min(max(int(1 / max(seconds, 1e-9)), 1), MOST_PASSES)
        self.timed, self.voted_at, self.passes = True, now, 0
        return self.stopping or late

    # ---- where the time goes ----

    def measure(self, what: str) -> "Stopwatch":
        """A context whose seconds count as "data_s" or "step_s", and which records progress."""
        return self.watches[what]

    def rates(self, batch_size: int, steps: str = "") -> dict[str, float]:
        """Seconds per step and samples per second since the last call.

        Args:
            batch_size: Samples of an update; each of its micro-steps is measured.
            steps: Unit of the steps, such as "env_steps", whose rate is added; "" for no such rate.
        """
        made, seconds = self.run.step - (self.logged_at or 0), sum(watch.seconds for watch in self.watches.values())
        rates = {what: watch.seconds / max(made, 1) for what, watch in self.watches.items()}
        updates = self.watches["step_s"].calls / self.args.grad_accumulation
        rates["samples_per_s"] = updates * batch_size / max(seconds, 1e-9)
        rates |= {f"{steps}_per_s": made / max(seconds, 1e-9)} if steps else {}
        self.logged_at = self.run.step
        for watch in self.watches.values():
            watch.seconds, watch.calls = 0.0, 0
        if self.marks and self._mark()[1] > self.marks[-1][1] + 1:
            self.marks.append(self._mark())
        return rates

    # ---- how long the rest takes ----

    def _mark(self) -> tuple[int, float]:
        """The step, and the time without evaluations and saves."""
        return self.run.step, time.monotonic() - self.run.progress.away

    def _begin_to_measure(self, settled: bool) -> None:
        """Set the first mark: after the first update, since random actions are faster; or where a rollout begins."""
        self.settled = settled
        if not self.marks and (not settled or self.watches["step_s"].calls):
            self.marks.append(self._mark() if settled else self.start)

    def left(self, also: float) -> str:
        """What the rest takes, for the screen: "1:56 left"; "" while it is unknown.

        Steps take as long as the newest ones, an evaluation as long as the last one, and so does a save. Until one has
        run, its time is not known: "0:07 + 6 evaluations left".

        Args:
            also: Seconds that are added.
        """
        if not self.marks or (len(self.marks) == 1 and not self.settled):  # a part of a rollout tells too little
            return ""
        (first, then), (last, now) = self.marks[0], self.marks[-1] if len(self.marks) > 1 else self._mark()
        if last <= first:
            return ""
        took, evaluations = self.run.progress.took, self._to_come("eval") if self.evaluates else 0
        steps = (self.args.steps - self.run.step) * (now - then) / (last - first)
        late = steps / (60 * self.args.save_minutes) if self.args.save_minutes else 0.0
        seconds = also + steps + max(self._to_come("save"), late) * took.get(SAVING, 0.0)
        seconds += evaluations * took.get(EVALUATING, 0.0)
        if self.evaluates and self.args.eval_episodes and not self.args.debug and FILMING not in took:
            seconds += FILM / self.args.eval_episodes * took.get(EVALUATING, 0.0)
        unknown = f" + {evaluations} evaluation{'s' * (evaluations > 1)}" if EVALUATING not in took else ""
        return f"{duration(seconds)}{unknown * (evaluations > 0)} left" if seconds >= 1 or evaluations or steps else ""

    def _to_come(self, what: str) -> int:
        """How often something is still due, besides by the clock."""
        end, every, last = self.args.steps, self.every[what], self.last[what]
        return end // every - last // every + (end % every > 0) if every and last < end else int(last < end)

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """The step at which each event happened last."""
        return dict(self.last)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.last = dict(state)
