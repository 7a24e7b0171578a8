"""A policy on a robot: the next chunk is planned in a thread while the last one is executed.

    player = Player(load_policy("runs/x"), robot, rate=30)
    print(player.run(steps=300))

**Time.** Step k is due k / rate seconds after the first, by a clock that is never set back, so that lateness does not
add up. A plan that begins with the observation of step t is a chunk whose action for step k is `chunk[k - t]`; it is
never executed at another step. A plan begins `policy.action_steps` steps after the last one did, or earlier where the
chunk would otherwise run out: the delay of a plan, in steps, is taken to be the longest of the last ten (as in Black et
al., 2025, algorithm 1). A chunk is executed from the moment that it is there.

**Lateness.** At a step without an action, the robot waits for the plan up to half a period, and then holds: it gets
`hold`, or its last action again. Such steps are late actions. A plan that takes more steps than it was made for is a
late plan. A step that begins more than a period late moves those that follow by whole periods: a robot never gets a
burst of actions. The first of each is logged, all are in the summary.

**Threads.** `observe`, `act` and `stop` of the robot are called by the thread that calls `run`, and the policy plans in
the planner's thread alone. What is handed over are copies: a robot may reuse the arrays of its cameras.

**Stopping.** `robot.stop()` is called once, whatever ends the run: the last step, an exception of robot or policy, an
action that is not finite or out of range, a plan that does not come, Ctrl-C, SIGTERM or SIGHUP. The reason is the
message of the exception, and in the summary. A method of the robot that never returns cannot be helped here; a second
Ctrl-C leaves it.
"""

import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from ..data.actions import robot_stats, robot_width
from ..errors import SignalledExit, UserError, crashes_pass, plain, where
from .planner import FIRST, Clock, InThread, Timeline, undisturbed

logger = logging.getLogger(__name__)

DELAYS = 10  # plans, the longest of whose delays is expected of the next
WAIT = 0.5  # of a period, for a plan without which there is no action
ROUNDING = 1e-4  # of the actions' size, by which a constant one may differ from the data's
KEPT = 100_000  # steps and plans that the summary's times are of


class RobotStoppedError(RuntimeError):
    """A run ended early, and the robot has been stopped; one line that names the step and the reason."""


@dataclass
class Summary:
    """What happened in a run; its text is a line for the screen."""

    rate: float
    """Steps a second that were asked for."""
    steps: int = 0
    """Actions that the robot got."""
    plans: int = 0
    """Chunks that were planned, without those before the first step."""
    late_actions: int = 0
    """Steps without an action in time, at which the robot held."""
    late_plans: int = 0
    """Plans that took more steps than they were made for."""
    skipped: int = 0
    """Periods that were left out, because observing, acting or another process took too long."""
    reason: str = "not begun"
    """Why the run ended."""
    planning: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Seconds of each plan."""
    delays: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Steps from each plan's observation to the first action that could be taken from it."""
    jitter: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Seconds by which each step began late."""

    def __str__(self) -> str:
        def words(values: Sequence[float], scale: float = 1.0) -> str:
            if not values:
                return "none"
            found = scale * np.asarray(values)
            return f"{found.mean():.1f} (95 %: {np.quantile(found, 0.95):.1f}, most: {found.max():.1f})"

        return (
            f"{self.steps} steps at {self.rate:g} Hz, {self.plans} plans: {self.late_actions} late actions,"
            f" {self.late_plans} late plans, {self.skipped} periods left out; ms of a plan {words(self.planning, 1e3)},"
            f" steps {words(self.delays)}; ms that a step began late {words(self.jitter, 1e3)}; ended: {self.reason}"
        )


class Player:
    """Executes a policy's chunks on a robot, and plans the next one meanwhile.

    Args:
        policy: What `load_policy` returns. Of its settings `delay` and `blocking` belong to evaluations; here a delay
            is measured.
        robot: With `observe() -> observation`, `act(action)` and `stop()` (`Robot` of `protocols.py`); one observation
            by the data's keys, without a batch, as of `Policy.act`.
        rate: Steps a second, those of the recordings.
        low, high: Bounds of the actions `[Da]`, or one number for all; by default those of the training data, extended
            by `margin`. An action beyond them stops the robot.
        margin: Of the training data's range, on both sides. Good policies exceed that range: of two flows that solved
            all their episodes, a tenth of it in 40 % of these, a quarter in 10 %, half in none.
        hold: Action `[Da]` at a late step, which keeps the robot where it is, such as zeros for velocities; where it is
            NaN, such as for a gripper, the last action is repeated. None repeats all of it, right for positions alone.
        timeout: Seconds after which the robot is stopped if a plan has not ended, or no action has come, also because
            `observe` or `act` took so long.
        seed: Of a stochastic policy's noise.
        planner, clock: In place of `InThread` and `Clock`, for tests.

    Raises:
        UserError: an argument, a robot or a policy that does not fit, by name.
    """

    def __init__(
        self,
        policy: Any,
        robot: Any,
        rate: float = 30.0,
        low: Any = None,
        high: Any = None,
        margin: float = 0.5,
        hold: Any = None,
        timeout: float = 2.0,
        seed: int | None = None,
        planner: Any = None,
        clock: Any = None,
    ) -> None:
        _check(robot, ("observe", "act", "stop"), "the robot")
        _check(policy, ("plan", "observe", "reset"), "the policy")
        for name, value, least in (("rate", rate, 0.0), ("timeout", timeout, 0.0), ("margin", margin, -1e-9)):
            if not (isinstance(value, Real) and math.isfinite(value) and value > least):
                raise UserError(f"{name} {value!r} must be a finite number {'above 0' if least == 0 else 'from 0 on'}")
        self.policy, self.robot, self.rate, self.timeout, self.seed = policy, robot, float(rate), float(timeout), seed
        self.planner, self.clock = planner, clock or Clock()
        action = policy.spec["action"]
        if "classes" in action:
            raise UserError(
                f"the policy chooses among {action['classes']} actions; a robot needs one that gives vectors"
            )
        self.width = robot_width(action)
        names = action.get("names", ())
        called = [f" ({name})" for name in names] if len(names) == self.width else [""] * self.width
        self.names = [f"action {place}{name}" for place, name in enumerate(called)]
        self.low, self.high, self.bounds = bounds_of(action, low, high, margin)
        self.hold = None if hold is None else _vector(hold, self.width, "hold").astype(np.float32)
        self.summary = Summary(self.rate)

    def run(self, steps: int | None = None, done: Callable[[], bool] = lambda: False) -> Summary:
        """Run until `steps` actions are executed or `done` returns True, which is asked before each step.

        Raises:
            RobotStoppedError: robot or policy has raised, an action may not be executed, or no plan came.
            UserError: the policy does not take what the robot observes; it has not moved.
            KeyboardInterrupt, SignalledExit: Ctrl-C; SIGTERM or SIGHUP.
        """
        self.summary, self.timeline = Summary(self.rate), Timeline(self.policy)
        self.step, self.doing = 0, "preparing"
        self.last: np.ndarray | None = None  # action, [Da]
        self.recent: deque[dict[str, Any]] = deque(maxlen=self.policy.seen_steps)  # that the policy has not got
        self.begun: tuple[int, float, int] | None = None  # step, time and expected delay of the plan in progress
        self.newest = 0  # step at which the newest plan began
        self.starved: float | None = None  # since when there has been no action
        planner = self.planner or InThread(self.policy)
        with Signals() as self.signals, undisturbed(), closing(planner), self._stopping():
            self._run(planner, steps, done)
        return self.summary

    def _run(self, planner: Any, steps: int | None, done: Callable[[], bool]) -> None:
        """Prepare the policy, and begin each step when it is due."""
        most = math.inf if steps is None else steps
        observation, self.doing = self._observed(), "planning"
        seconds = planner.prepare(observation, self.seed, self._checked)
        self.delays = deque([max(1, math.ceil(seconds * self.rate))], maxlen=DELAYS)
        self.due, period, interrupted = self.clock.now(), 1 / self.rate, lambda: bool(self.signals.number)
        self.doing = "done()"
        while not (interrupted() or self.step >= most or done()):
            self._one_step(planner)
            self.doing = "done()"
            self.due += period
            if (behind := int((self.clock.now() - self.due) / period)) > 0:
                self._leave_out(behind, period)
            self.step += 1
            self.clock.sleep(self.due, interrupted)
        self.summary.reason = str(self.signals) or (f"{self.step} steps" if self.step >= most else "done")

    def _leave_out(self, behind: int, period: float) -> None:
        """Move the steps that follow by whole periods. Raises RobotStoppedError: by more than `timeout`."""
        took = self.clock.now() - self.due + period
        if took > self.timeout:
            raise self._stopped(f"observing and acting took {took:.1f} s, more than the {self.timeout:g} s of timeout")
        if not self.summary.skipped:
            logger.warning(
                "step %d: observing and acting took %.0f ms, a period is %.0f; more are only counted",
                *(self.step, 1000 * took, 1000 * period),
            )
        self.due += behind * period
        self.summary.skipped += behind

    def _one_step(self, planner: Any) -> None:
        """Observe, act, and begin the next plan if it is due."""
        self.summary.jitter.append(max(0.0, self.clock.now() - self.due))
        self.recent.append(self._observed())
        self._take(planner, 0.0)
        action = self.timeline.action(self.step)
        if action is None:
            self._begin(planner)
            self._take(planner, FIRST if self.last is None else WAIT / self.rate)
            action = self.timeline.action(self.step)
        if self.last is None:
            self.due = self.clock.now()  # the robot was at rest until here
        self._act(self._held() if action is None else self._allowed(action))
        rest = self.timeline.rest(self.step)
        enough = rest is not None and len(rest) > max(self.delays) + 1
        if self.newest < self.step and not (enough and self.step - self.newest < self.policy.action_steps):
            self._begin(planner)

    def _observed(self) -> dict[str, Any]:
        """A copy of what the robot observes."""
        self.doing = "robot.observe()"
        observation = self.robot.observe()
        if not isinstance(observation, dict):
            found = type(observation).__name__
            raise UserError(
                f"robot.observe() must return a dict by the data's keys, such as 'observation.state'; found {found}"
            )
        return {key: _copy(value) for key, value in observation.items()}

    def _act(self, action: np.ndarray) -> None:
        """Let the robot execute an action `[Da]`."""
        self.doing = "robot.act()"
        self.last = action
        self.robot.act(action.copy())
        self.summary.steps += 1

    def _begin(self, planner: Any) -> None:
        """Begin a plan from the newest observation, unless one is in progress."""
        if self.begun is not None:
            return
        self.doing = "planning"
        previous = self.timeline.rest(self.step)
        delay = 0 if previous is None else min(max(self.delays), len(previous), self.policy.most_delay)
        planner.begin(list(self.recent), previous, delay)
        self.recent.clear()
        self.begun, self.newest = (self.step, self.clock.now(), delay), self.step

    def _take(self, planner: Any, seconds: float) -> None:
        """Take the plan in progress, if it is there within so many seconds.

        Raises:
            RobotStoppedError: it has taken too long, or is not finite or of another shape.
        """
        if self.begun is None:
            return
        self.doing = "planning"
        (start, since, expected), answer = self.begun, planner.take(seconds)
        if answer is None:
            if self.clock.now() - since > (self.timeout if self.last is not None else FIRST):
                raise self._stopped(f"a plan has not ended after {self.clock.now() - since:.1f} s")
            return
        self.begun, (chunk, took) = None, answer
        self.timeline.enter(start, self._checked(chunk))
        self.summary.plans += 1
        self.summary.planning.append(took)
        if self.last is None:
            return
        delay = self.step - start
        self.delays.append(delay)
        self.summary.delays.append(delay)
        if delay > expected:
            self.summary.late_plans += 1
            if self.summary.late_plans == 1:
                logger.warning(
                    "step %d: a plan was late: it took %d steps (%.0f ms), and was made for %d; more are only counted",
                    *(self.step, delay, 1000 * took, expected),
                )

    def _held(self) -> np.ndarray:
        """The action `[Da]` of a late step. Raises RobotStoppedError: there have been too many."""
        assert self.last is not None
        self.summary.late_actions += 1
        self.starved = self.starved or self.clock.now()
        if self.clock.now() - self.starved > self.timeout:
            longest, chunk = max(self.delays), self.policy.chunk
            words = f"no action for {self.timeout:g} s: a plan takes {longest} steps, and has {chunk}"
            raise self._stopped(f"{words}; a lower rate or fewer sampling steps would help")
        if self.summary.late_actions == 1:
            what = "its last action again" if self.hold is None else "the action to hold"
            logger.warning(
                "step %d: late, no action is planned: the robot gets %s; more are only counted", self.step, what
            )
        return self.last if self.hold is None else np.where(np.isnan(self.hold), self.last, self.hold)

    def _checked(self, chunk: Any) -> np.ndarray:
        """A plan as `[Ta, Da]` float32. Raises RobotStoppedError: it is not finite, or of another shape."""
        found = np.asarray(chunk, dtype=np.float32)
        if found.ndim != 2 or not len(found) or found.shape[1] != self.width:
            batch = "; robot.observe() returns one observation, not a batch" if found.ndim == 3 else ""
            problem = f"the policy planned a chunk of shape {found.shape}; expected [steps, {self.width}]{batch}"
            raise self._stopped(problem)
        if not np.isfinite(found).all():
            step, dimension = np.argwhere(~np.isfinite(found))[0]
            raise self._stopped(
                f"the policy planned {found[step, dimension]} for {self.names[dimension]}, {step} steps ahead"
            )
        return found

    def _allowed(self, action: np.ndarray) -> np.ndarray:
        """An action `[Da]`, if it is in range. Raises RobotStoppedError."""
        self.starved = None
        outside = np.flatnonzero((action < self.low) | (action > self.high))
        if len(outside):
            i = int(outside[0])
            words = (
                f"the policy's {self.names[i]} is {action[i]:.6g}, outside of {self.low[i]:.6g} to {self.high[i]:.6g}"
            )
            raise self._stopped(f"{words} ({self.bounds})")
        return action

    def _stopped(self, problem: str) -> RobotStoppedError:
        """The error that stops the robot."""
        return RobotStoppedError(plain(f"step {self.step}: {problem}; the robot was stopped"))

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Stop the robot however the body ends, and tell why in one line."""
        try:
            yield
        except BaseException as error:
            told = self._told(error)
            self.summary.reason = str(self.signals) or f"{told}"
            self._stop(self.summary.reason)
            raise told from (error if told is not error else error.__cause__)
        self._stop(self.summary.reason)

    def _told(self, error: BaseException) -> BaseException:
        """What is raised in place of an exception."""
        if isinstance(error, RobotStoppedError | KeyboardInterrupt | SignalledExit):
            return error
        if isinstance(error, UserError) and self.last is None:
            return error
        if crashes_pass():
            error.add_note(f"in {self.doing} at step {self.step}; the robot was stopped")
            return error
        if isinstance(error, UserError) and self.doing == "planning":  # says what it is itself
            return self._stopped(str(error))
        text = f"{self.doing} raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return self._stopped(f"{text} ({where(error)})")

    def _stop(self, reason: str) -> None:
        """Stop the robot; nothing interrupts it. Raises RobotStoppedError: it does not."""
        self.signals.ignored = True
        try:
            self.robot.stop()
        except BaseException as error:
            text = f"robot.stop() raised {type(error).__name__}: {error} ({where(error)})"
            raise RobotStoppedError(
                plain(f"{text}; THE ROBOT MAY STILL MOVE; it was to be stopped for: {reason}")
            ) from error


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP inside only set `number`, and are raised at the end; a second one raises at once.

    None does anything where `ignored` is set. Outside of the main thread, where Python allows no handlers, they do what
    they did before.
    """

    number, ignored = 0, False

    def __enter__(self) -> "Signals":
        self.before = dict[int, Any]()
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows lacks one
                if number and signal.getsignal(number) not in (None, signal.SIG_IGN):  # by which `nohup` ignores SIGHUP
                    self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if error is None:
            self._leave()

    def _ask(self, number: int, frame: Any) -> None:
        if not self.ignored:
            self._leave()
            self.number = number

    def _leave(self) -> None:
        """Raise what Python, or the kit's scripts, raise at the signal, if there was one."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            raise SignalledExit(128 + self.number)

    def __str__(self) -> str:
        """The signal in words; "" for none."""
        return "" if not self.number else "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


def bounds_of(feature: dict[str, Any], low: Any, high: Any, margin: float) -> tuple[np.ndarray, np.ndarray, str]:
    """Bounds `[Da]` of the actions of a policy, and what they are in words; infinite where nothing is known.

    Args:
        feature: `action` of the policy's `spec`.
        low, high: Bounds that are given, or None.
        margin: By which the training data's range is extended on both sides.
    """
    width, stats = robot_width(feature), robot_stats(feature)
    bounds, words = [np.full(width, -np.inf), np.full(width, np.inf)], "no range is known"
    if {"min", "max"} <= set(stats):
        least, most = (np.asarray(stats[name], dtype=np.float64) for name in ("min", "max"))
        least, most = (np.broadcast_to(x, (*x.shape[:-1], width)).reshape(-1, width) for x in (least, most))
        least, most = least.min(0), most.max(0)  # of all steps of a chunk
        more = margin * (most - least) + ROUNDING * np.maximum(1, np.maximum(abs(least), abs(most)))
        bounds, words = [least - more, most + more], f"the training data's range and {100 * margin:g} % of it"
    for place, (name, value) in enumerate((("low", low), ("high", high))):
        if value is not None:
            bounds[place], words = _vector(value, width, name), "as given by low and high"
            if np.isnan(bounds[place]).any():
                raise UserError(f"{name} {value!r} must be numbers")
    if (wrong := np.flatnonzero(bounds[0] > bounds[1])).size:
        i = int(wrong[0])
        raise UserError(f"low {bounds[0][i]:g} is above high {bounds[1][i]:g} of action {i}")
    return bounds[0], bounds[1], words


def _vector(value: Any, width: int, name: str) -> np.ndarray:
    """Numbers `[width]`, of as many or of one for all. Raises UserError: others."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} {value!r} must be a number, or {width} of them") from None
    if found.shape not in ((), (width,)):
        raise UserError(
            f"{name} has the shape {found.shape}; expected one number, or {width}, as many as the actions have"
        )
    return np.broadcast_to(found, (width,)).copy()


def _copy(value: Any) -> Any:
    """A copy of an entry of an observation; texts stay."""
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check(thing: Any, methods: Sequence[str], name: str) -> None:
    """Raise UserError for a method that something lacks."""
    for method in methods:
        if not callable(getattr(thing, method, None)):
            have = f"{name} ({type(thing).__name__})"
            raise UserError(f"{have} has no method {method}(); expected {', '.join(f'{m}()' for m in methods)}")
