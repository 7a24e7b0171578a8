"""A policy on a robot: which action is executed when, what counts as late, and what stops the robot."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from components import UserError
from components.acting import player as module
from components.acting.planner import Timeline
from components.acting.player import Player, RobotStoppedError
from components.errors import SignalledExit
from conftest import ROOT, command
from protocols import Robot

RATE = 10.0


class Arm:
    """A robot that records what it is told; it observes the number of the observation, in an array that it reuses."""

    def __init__(self, **faults: Any) -> None:
        self.actions: list[float] = []
        self.state, self.stops, self.faults = np.zeros(1, np.float32), 0, faults

    def observe(self) -> dict[str, Any]:
        self.state += 1
        self.faults.get("observe", lambda step: None)(len(self.actions))
        return {"observation.state": self.state}

    def act(self, action: np.ndarray) -> None:
        self.faults.get("act", lambda step: None)(len(self.actions))
        self.actions.append(float(action[0]))

    def stop(self) -> None:
        self.stops += 1
        self.faults.get("stop", lambda step: None)(len(self.actions))


class Counting:
    """Plans [100 o, 100 o + 1, ...] for the observation o, and keeps what it was told."""

    def __init__(
        self, chunk: int = 8, action_steps: int = 4, seen_steps: int = 1, ensemble: float | None = None
    ) -> None:
        self.chunk, self.action_steps, self.seen_steps = chunk, action_steps, seen_steps
        self.settings, self.most_delay = SimpleNamespace(ensemble=ensemble), chunk
        self.spec: dict[str, Any] = {"action": {"shape": (chunk, 1), "names": ["wrist"]}}
        self.seen: list[float] = []
        self.told: list[tuple[Any, int]] = []
        self.threads: set[str] = set()

    def mean(self, weights: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return (weights[:, None] * actions).sum(0)

    def reset(self, seeds: Any = None) -> None:
        self.seen, self.told, self.seeds = [], [], seeds

    def observe(self, observation: dict[str, Any]) -> None:
        self.seen.append(float(observation["observation.state"][0]))

    def plan(self, observation: dict[str, Any], previous: Any = None, delay: int = 0) -> np.ndarray:
        self.observe(observation)
        self.threads.add(threading.current_thread().name)
        self.told.append((previous, delay))
        return (100 * self.seen[-1] + np.arange(self.chunk, dtype=np.float32))[:, None]


class Ticks:
    """A clock that moves only when somebody sleeps or plans."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, until: float, listen: Any) -> None:
        self.seconds = max(self.seconds, until)


class Timed:
    """Plans without a thread; the plans take so many seconds of a clock, in turn."""

    def __init__(self, policy: Any, clock: Ticks, *seconds: float) -> None:
        self.policy, self.clock, self.seconds, self.plans = policy, clock, seconds, 0
        self.begun: list[float] = []

    def prepare(self, observation: dict[str, Any], seed: int | None, check: Any) -> float:
        return self.seconds[0]

    def begin(self, observations: list[dict[str, Any]], previous: Any, delay: int) -> None:
        self.took = self.seconds[min(self.plans, len(self.seconds) - 1)]
        self.ready, self.plans = self.clock.now() + self.took, self.plans + 1
        self.begun.append(float(observations[-1]["observation.state"][0]))
        for observation in observations[:-1]:
            self.policy.observe(observation)
        self.chunk = self.policy.plan(observations[-1], previous, delay)

    def take(self, seconds: float) -> Any:
        reached = min(self.ready, self.clock.seconds + seconds)
        self.clock.seconds = max(self.clock.seconds, reached)
        return (self.chunk, self.took) if self.clock.seconds >= self.ready else None

    def close(self) -> None:
        pass


def play(policy: Any, *seconds: float, robot: Any = None, steps: int = 20, **options: Any) -> tuple[Any, Any, Timed]:
    """Run without threads, at 10 steps a second; returns (robot, summary, planner)."""
    robot, clock = robot or Arm(), Ticks()
    planner = Timed(policy, clock, *seconds)
    player = Player(policy, robot, RATE, planner=planner, clock=clock, **options)
    try:
        return robot, player.run(steps), planner
    except BaseException as error:
        error.args += (player.summary,)
        raise


# ---- which action, when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "delay"), [(0.01, 1), (0.15, 2), (0.29, 3), (0.31, 4)])
def test_a_step_gets_the_action_that_its_plan_has_for_it(seconds: float, delay: int) -> None:
    """Chunks of 12, a plan each 4 steps: one that begins at step t is executed from step t + delay on."""
    policy = Counting(chunk=12)
    robot, summary, planner = play(policy, seconds)
    starts = [0, 4, 8, 12, 16]
    for step, action in enumerate(robot.actions):
        newest = max([t for t in starts if t + delay <= step], default=0)
        assert action == 100 * (newest + 2) + step - newest, step  # the first observation was for the preparation
    assert [observation - 2 for observation in planner.begun] == starts
    assert set(summary.delays) == {delay} and summary.late_actions == summary.late_plans == 0
    rest, told = policy.told[1]
    assert told == delay and rest[:, 0].tolist() == [*range(204, 212)]  # begins with the action of this very step
    assert robot.stops == 1 and summary.steps == 20 and summary.reason == "20 steps"
    robot, summary, _ = play(policy, seconds, steps=-1)
    assert (robot.stops, robot.actions, summary.reason) == (1, [], "0 steps")
    assert Player(policy, robot, np.float32(20)).rate == 20.0


def test_a_chunk_that_would_run_out_is_renewed_in_time() -> None:
    """The policy would execute whole chunks, but its plans take three steps: they begin four steps before the end."""
    _, summary, planner = play(Counting(chunk=10, action_steps=10), 0.25, steps=40)
    assert [observation - 2 for observation in planner.begun][:4] == [0, 6, 12, 18]
    assert summary.late_actions == 0


def test_a_policy_of_single_actions_acts_on_each_observation() -> None:
    robot, summary, _ = play(Counting(chunk=1, action_steps=1), 0.04, steps=6)
    assert robot.actions == [200, 300, 400, 500, 600, 700]
    assert summary.late_actions == summary.late_plans == 0 and set(summary.delays) == {0}


def test_the_expected_delay_is_the_longest_of_the_last_ten() -> None:
    policy = Counting(chunk=12, action_steps=4)
    _, summary, _ = play(policy, 0.05, 0.05, 0.35, *[0.05] * 20, steps=80)
    assert [delay for _, delay in policy.told[1:]] == [1, 1, *[4] * 10, 1, 1, 1, 1, 1, 1, 1]
    assert list(summary.delays)[:4] == [1, 4, 1, 1]
    assert summary.late_plans == 1 and summary.late_actions == 0


def test_a_policy_that_continues_few_actions_is_asked_for_no_more() -> None:
    """As one in real time that was trained with `--trainer.prefix 2`, whose plans take longer: they are late."""
    policy = Counting(chunk=12)
    policy.most_delay = 2
    robot, summary, _ = play(policy, 0.35)
    assert {delay for _, delay in policy.told[1:]} == {2}
    assert summary.late_plans == len(summary.delays) == 3 and summary.late_actions == 0 and len(robot.actions) == 20


def test_histories_have_the_steps_at_which_nothing_was_planned() -> None:
    policy = Counting(seen_steps=3)
    play(policy, 0.05, steps=9)
    assert policy.seen == [2, 4, 5, 6, 8, 9, 10]  # 3 and 7 are too old for any plan
    policy = Counting(seen_steps=2, action_steps=1)
    play(policy, 0.05, steps=4)
    assert policy.seen == [2, 3, 4, 5]


def test_ensembling_averages_what_covers_a_step() -> None:
    timeline = Timeline(Counting(ensemble=0.5))
    timeline.enter(0, np.array([[0.0], [1.0], [2.0]], np.float32))
    timeline.enter(1, np.array([[10.0], [11.0], [12.0]], np.float32))
    old, new = np.exp(0), np.exp(-0.5)
    assert timeline.action(2) == pytest.approx((old * 2 + new * 11) / (old + new), abs=1e-6)
    assert timeline.action(3).tolist() == [12.0] and timeline.action(4) is None


# ---- late ----------------------------------------------------------------------------------------------------------


def test_late_actions_are_held_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """Chunks of 8 end with step 11, and the plan of step 8 comes within the wait of step 14: at 12 and 13 is none."""
    seconds = (0.15, 0.15, 0.62, 0.15)
    robot, summary, _ = play(Counting(), *seconds, steps=16)
    assert robot.actions[10:] == [606, 607, 607, 607, 1006, 1007]  # never an action that was planned for another step
    assert (summary.late_actions, summary.late_plans, max(summary.delays)) == (2, 1, 6)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "step 12: late, no action is planned: the robot gets its last action again",
        "step 14: a plan was late: it took 6 steps (620 ms), and was made for 2",
    ]
    assert "16 steps at 10 Hz, 3 plans: 2 late actions, 1 late plans, 0 periods left out; ms of a plan 306.7" in str(
        summary
    )
    robot, _, _ = play(Counting(), *seconds, steps=16, hold=0)
    assert robot.actions[10:] == [606, 607, 0, 0, 1006, 1007]
    robot, _, _ = play(Counting(), *seconds, steps=16, hold=[np.nan])
    assert robot.actions[10:] == [606, 607, 607, 607, 1006, 1007]


def test_a_robot_that_is_late_for_its_clock_gets_no_burst(caplog: pytest.LogCaptureFixture) -> None:
    clock = Ticks()
    times: list[float] = []

    def act(step: int) -> None:
        times.append(round(clock.seconds, 6))
        clock.seconds += 0.37 if step == 3 else 0.0

    robot, policy = Arm(act=act), Counting()
    summary = Player(policy, robot, RATE, planner=Timed(policy, clock, 0.0), clock=clock).run(8)
    assert times == [0, 0.1, 0.2, 0.3, 0.67, 0.7, 0.8, 0.9] and summary.skipped == 2
    assert max(summary.jitter) == pytest.approx(0.07)
    assert [record.getMessage() for record in caplog.records] == [
        "step 3: observing and acting took 370 ms, a period is 100; more are only counted"
    ]
    with pytest.raises(RobotStoppedError, match=r"step 3: .* took 0.4 s, more than the 0.3 s of timeout"):
        Player(policy, Arm(act=act), RATE, planner=Timed(policy, clock, 0.0), clock=clock, timeout=0.3).run(8)


# ---- what stops the robot ------------------------------------------------------------------------------------------


class Planning(Counting):
    """Plans what it is given at the n-th time."""

    def __init__(self, what: Any, at: int = 2) -> None:
        super().__init__()
        self.what, self.at = what, at

    def plan(self, observation: dict[str, Any], previous: Any = None, delay: int = 0) -> np.ndarray:
        chunk = super().plan(observation, previous, delay)
        return self.what(chunk) if len(self.told) == self.at else chunk


def broken(step: int = 5) -> Any:
    def fail(now: int) -> None:
        if now == step:
            raise OSError("no answer from\nthe bus")

    return fail


def beyond(chunk: np.ndarray) -> np.ndarray:
    return np.where(chunk == 602, 9999, chunk)


STOPS = [
    (Planning(lambda chunk: chunk * np.nan), {}, "step 6: the policy planned nan for action 0 .wrist., 0 steps ahead"),
    (Planning(lambda chunk: np.where(chunk == 607, np.inf, chunk)), {}, "planned inf for action 0 .wrist., 7 steps"),
    (Planning(lambda chunk: chunk[None]), {}, r"of shape \(1, 8, 1\); .*returns one observation, not a batch"),
    (Planning(lambda chunk: chunk[:, :0]), {}, r"step 6: the policy planned a chunk of shape \(8, 0\)"),
    (Planning(lambda chunk: chunk[:0]), {}, r"planned a chunk of shape \(0, 1\); expected \[steps, 1\]"),
    (
        Planning(beyond),
        {},
        r"step 6: .* action 0 .wrist. is 9999, outside of -800.25 to 2800.25 .the training data's range and 10 %",
    ),
    (Planning(beyond), {"high": 600.5}, "is 9999, outside of -800.25 to 600.5 .as given by low and high"),
    (Counting(), {"observe": broken()}, r"step 5: robot.observe\(\) raised OSError: no answer from \(.*test_player"),
    (Counting(), {"act": broken()}, r"step 5: robot.act\(\) raised OSError: no answer from"),
]


@pytest.mark.parametrize(("policy", "how", "message"), STOPS)
def test_a_fault_stops_the_robot_and_is_one_line(policy: Any, how: dict[str, Any], message: str) -> None:
    policy.spec["action"]["stats"] = {"min": [-500.0], "max": [2500.0]}
    faults, options = {k: v for k, v in how.items() if callable(v)}, {k: v for k, v in how.items() if not callable(v)}
    robot = Arm(**faults)
    with pytest.raises(RobotStoppedError, match=message) as error:
        play(policy, 0.15, robot=robot, margin=0.1, **options)
    text, summary = error.value.args
    assert text.endswith("; the robot was stopped") and "\n" not in text and summary.reason == text
    assert robot.stops == 1 and len(robot.actions) in (5, 6)
    assert all(action < 2000 for action in robot.actions)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [(5.0, "a plan has not ended after 2.0 s"), (0.95, "no action for 2 s: a plan takes 10 steps, and has 8;")],
)
def test_a_plan_that_does_not_come_stops_the_robot(seconds: float, message: str) -> None:
    robot = Arm()
    with pytest.raises(RobotStoppedError, match=message):
        play(Counting(), 0.1, 0.1, seconds, robot=robot, steps=99, timeout=2.0)
    assert robot.stops == 1 and len(robot.actions) < 40


def test_a_robot_that_does_not_stop_is_named() -> None:
    robot = Arm(stop=broken(3))
    with pytest.raises(RobotStoppedError, match=r"robot.stop\(\) raised OSError.*THE ROBOT MAY STILL MOVE.*: 3 steps"):
        play(Counting(), 0.1, robot=robot, steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0}, "rate 0 must be a finite number above 0"),
        ({"rate": float("nan")}, "rate nan must be a finite number above 0"),
        ({"margin": -1}, "margin -1 must be a finite number from 0 on"),
        ({"timeout": "1"}, "timeout '1' must be a finite number"),
        ({"low": [1, 2]}, r"low has the shape \(2,\); expected one number, or 1, as many as the actions have"),
        ({"low": 3, "high": 1}, "low 3 is above high 1 of action 0"),
        ({"high": float("nan")}, "high nan must be numbers"),
        ({"hold": "still"}, "hold 'still' must be a number, or 1 of them"),
        ({"robot": object()}, r"the robot \(object\) has no method observe\(\); expected observe\(\), act\(\), stop"),
        ({"policy": Arm()}, r"the policy \(Arm\) has no method plan"),
    ],
)
def test_bad_input_of_a_player_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Player(**{"policy": Counting(), "robot": Arm()} | change)


def test_an_unknown_range_is_no_limit_and_a_constant_has_one() -> None:
    low, high, _ = module.bounds_of({"shape": (4, 2)}, None, [1.0, np.inf], 0.1)
    assert low.tolist() == [-np.inf] * 2 and high.tolist() == [1, np.inf]
    stats = {"min": [[0.0, 5.0], [-1.0, 5.0]], "max": [[1.0, 5.0], [0.0, 5.0]]}  # of each step of a chunk
    low, high, _ = module.bounds_of({"shape": (2, 2), "stats": stats}, None, None, 0.5)
    assert low == pytest.approx([-2, 5], abs=1e-3) and high == pytest.approx([2, 5], abs=1e-3)
    assert low[1] < 5 < high[1]
    form = {"width": 1, "stats": {"min": [7.0], "max": [8.0]}}  # relative actions: the robot's own are absolute
    low, high, _ = module.bounds_of({"shape": (2, 2), "stats": stats, "form": form}, None, None, 0.0)
    assert low == pytest.approx([7], abs=1e-3) and high == pytest.approx([8], abs=1e-3)


# ---- with a thread -------------------------------------------------------------------------------------------------


class Slow(Counting):
    """Each plan takes some seconds; the n-th does something else."""

    def __init__(self, seconds: float, at: int = -1, fault: Any = None) -> None:
        super().__init__()
        self.seconds, self.at, self.fault = seconds, at, fault

    def plan(self, observation: dict[str, Any], previous: Any = None, delay: int = 0) -> np.ndarray:
        chunk = super().plan(observation, previous, delay)
        before = observation["observation.state"].copy()
        time.sleep(self.seconds)
        assert (observation["observation.state"] == before).all()  # though the robot has observed more
        if len(self.told) == self.at:
            self.fault()
        return chunk


def test_a_thread_plans_while_the_robot_acts() -> None:
    policy, robot = Slow(0.025), Arm()
    began = time.perf_counter()
    summary = Player(policy, robot, 100, seed=3).run(40)
    assert isinstance(robot, Robot)
    assert time.perf_counter() - began < 1.5
    assert policy.threads == {"planner"} and policy.seeds == [3] and robot.stops == 1
    for step, action in enumerate(robot.actions):  # 4 observations were for the preparation and step 0 is the fifth
        assert 0 <= action % 100 < 8 or summary.late_actions, step
    assert max(summary.delays) >= 3 and min(summary.planning) >= 0.025  # a step that begins late may count one less


def lasting() -> None:
    time.sleep(0.6)


def failing() -> None:
    raise ValueError("shapes\ndiffer")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (failing, r"step \d+: planning raised ValueError: shapes \(.*test_player.py:\d+\); the robot was stopped"),
        (sys.exit, "planning raised SystemExit"),
        (lasting, r"a plan has not ended after 0\.\d s"),
    ],
)
def test_a_thread_that_fails_or_hangs_stops_the_robot(fault: Any, message: str) -> None:
    robot, began = Arm(), time.perf_counter()
    with pytest.raises(RobotStoppedError, match=message):
        Player(Slow(0.0, at=4, fault=fault), robot, 200, timeout=0.2).run(400)
    assert robot.stops == 1 and time.perf_counter() - began < 1.5


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [(signal.SIGINT, KeyboardInterrupt, "Ctrl-C"), (signal.SIGTERM, SignalledExit, "SIGTERM")],
)
def test_a_signal_stops_the_robot_after_its_step(number: int, error: Any, reason: str) -> None:
    """Also where it comes again while the robot is being stopped."""

    def send(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), number)

    robot = Arm(act=send, stop=lambda step: os.kill(os.getpid(), number))
    outside = signal.signal(number, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C, and so does the player
    try:
        player = Player(Counting(), robot, 200)
        with pytest.raises(error):
            player.run(1000)
        assert (robot.stops, len(robot.actions), player.summary.reason) == (1, 6, reason)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outside)


def test_what_the_policy_does_not_take_is_known_before_the_robot_moves() -> None:
    class Other(Counting):
        def plan(self, *arguments: Any) -> np.ndarray:
            raise UserError("the policy needs the observation 'observation.images.front'; found: observation.state")

    robot = Arm()
    with pytest.raises(UserError, match="^the policy needs the observation"):
        Player(Other(), robot, 100).run(5)
    assert robot.stops == 1 and not robot.actions
    for at in (1, 2):  # of the plans before the first step, the second of which is given the first
        with pytest.raises(RobotStoppedError, match=r"step 0: the policy planned nan for action 0 .wrist., 0 steps"):
            Player(Planning(lambda chunk: chunk * np.nan, at), robot, 100).run(5)
    with pytest.raises(RobotStoppedError, match=r"step 0: done\(\) raised ZeroDivisionError"):
        Player(Counting(), robot, 100).run(done=lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert robot.stops == 4 and not robot.actions
    robot.observe = lambda: np.zeros(3)  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(UserError, match=r"robot.observe\(\) must return a dict .* found ndarray"):
        Player(Counting(), robot, 100).run(5)


@pytest.mark.slow
def test_the_example_keeps_30_steps_a_second(script: Callable[..., Path]) -> None:
    """The robot is simulated and the policy barely trained, but the clock is the wall's: no action is ever late."""
    data = ("--dataset", "metaworld", "--dataset.demos", 5, "--eval-episodes", 1, "--eval-every", 0, "--batch-size", 32)
    small = ("--model.channels", 16, 32, "--policy.sampling-steps", 2, "--ema-decay", 0.9, "--steps", 100)
    run, loop = script("--trainer", "flow", *data, *small), "tests/examples/robot_loop.py"
    done = command(sys.executable, loop, run, "--episodes", 1, "--margin", 9, cwd=ROOT, PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    steps, plans, late = map(int, re.search(r"(\d+) steps at 30 Hz, (\d+) plans: (\d+) late actions", line).groups())
    assert steps >= 40 and plans >= steps // 16 and late == 0, done.stdout + done.stderr
    broken = command(sys.executable, loop, run, "--margin", 0, "--action-steps", 1, cwd=ROOT, PYTHONPATH=".")
    assert broken.returncode == 1 and re.search(
        r"^error: step \d+: the policy's action .* stopped\n$", broken.stderr, re.M
    )
