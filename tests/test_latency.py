"""A policy whose plans arrive late: when it plans, what it executes meanwhile, and how smooth that is."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from components import UserError, load_policy
from components.acting.correction import CorrectedPolicy, Middle
from components.acting.evaluation import headline, run_episodes, summarise
from components.acting.inference import Inference
from components.acting.jerk import Jerk
from components.acting.learned import acting_policy
from components.acting.policy import Policy
from components.data.normalisation import Normaliser
from components.envs import metaworld, pusht
from components.experience.frozen_base import Corrected
from components.run.curves import read_lines
from conftest import check_alone
from latency_results import points_of

H, STILL = 6, -1.0


def spec_of(chunk: int = H, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"observation.state": {"shape": (1,), "dtype": "float32"}}
    made["action"] = {"shape": (chunk, 1) if chunk > 1 else (1,), "dtype": "float32"} | more
    return made | ({"action_is_pad": {"shape": (chunk,), "dtype": "bool"}} if chunk > 1 else {})


class Tells(nn.Module):
    """Each action tells from which observation it was planned, and its place in the chunk: 100 o + i."""

    real_time = True

    def __init__(self, chunk: int = H) -> None:
        super().__init__()
        self.chunk, self.told = chunk, list[dict[str, Any]]()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.told.append({key: value for key, value in batch.items() if key != "observation.state"})
        state = 100 * batch["observation.state"]
        return (state + torch.arange(self.chunk)).unsqueeze(-1) if self.chunk > 1 else state


def told(chunk: int = H, **settings: Any) -> Policy:
    spec = spec_of(chunk)
    policy = Policy(Tells(chunk), Normaliser(spec), spec, Inference(**settings))
    policy.hold = lambda observation, last: np.full_like(last, STILL)
    policy.module.told.clear()
    return policy


def acted(policy: Policy, steps: int) -> list[float]:
    return [float(policy.act({"observation.state": [float(t)]})[0]) for t in range(steps)]


# By pen and paper; `components/acting/timing.py` says how.
TIMES: list[tuple[int, dict[str, Any], list[float]]] = [
    (H, {"action_steps": 2}, [0, 1, 200, 201, 400, 401, 600]),
    (H, {"action_steps": 2, "blocking": True}, [0, 1, 200, 201, 400, 401, 600]),
    (H, {"action_steps": 2, "delay": 1}, [STILL, 0, 1, 2, 301, 302, 501, 502, 701]),
    (H, {"action_steps": 1, "delay": 2}, [STILL, STILL, 0, 1, 2, 3, 402, 403, 602, 603, 802]),
    (H, {"action_steps": 3, "delay": 3}, [STILL] * 3 + [0, 1, 2, 3, 4, 5, 603, 604, 605, 903]),
    (H, {"delay": 1}, [STILL, 0, 1, 2, 3, 4, 5, 601, 602, 603, 604, 605, 1101]),  # all but the delay
    (H, {"action_steps": 2, "delay": 2, "blocking": True}, [STILL] * 2 + [0, 1] + [STILL] * 2 + [400, 401, STILL]),
    (H, {"action_steps": 1, "delay": 1, "ensemble": 0.0}, [STILL, 0, 1, 101.5, 506 / 3, 227.5, 283.0]),
    (1, {"delay": 3}, [STILL] * 3 + [0, 100, 200, 300]),  # single actions are under way together
    (1, {"delay": 2, "blocking": True}, [STILL, STILL, 0, STILL, STILL, 300, STILL]),
]


@pytest.mark.parametrize(("chunk", "settings", "expected"), TIMES)
def test_what_is_executed_while_a_plan_is_under_way(chunk: int, settings: Any, expected: list[float]) -> None:
    assert acted(told(chunk, **settings), len(expected)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("chunk", "settings"), [case[:2] for case in TIMES] + [(H, {"delay": 2, "real_time": True})])
def test_rows_of_different_ages_act_as_alone_and_go_on_from_a_saved_state(chunk: int, settings: Any) -> None:
    begins = {0: (5, 9), 1: (4,), 2: ()}  # the steps at which each row's episodes begin anew
    states = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    together, alone, found = told(chunk, **settings), told(chunk, **settings), []
    for t, state in enumerate(states):
        together.restart(torch.tensor([row for row, steps in begins.items() if t in steps], dtype=torch.int64))
        if t == 7:
            saved = together.rank_state()
            together = told(chunk, **settings)
            together.load_rank_state(saved)
        if t == 3:  # only some rows act, in another order of calls
            some = {row: {"observation.state": state[[row], None]} for row in (2, 0, 1)}
            parts = {row: together.act(seen, torch.tensor([row])) for row, seen in some.items()}
            found.append(np.concatenate([parts[row] for row in range(3)]))
        else:
            found.append(together.act({"observation.state": state[:, None]}))
    check_alone(alone, states, found, begins)


def test_a_sampler_is_told_of_the_chunk_that_goes_on() -> None:
    """Eq. 5 of Black et al. (2025) by hand: H = 6, s = 2, d = 1, so that 4 steps are left and 1 is frozen."""
    spec = spec_of(stats={"mean": [10.0], "std": [2.0]})
    policy = Policy(Tells(), Normaliser(spec), spec, Inference(action_steps=2, delay=1, real_time=True))
    policy.module.told.clear()
    states = [np.array([[float(t)], [0.0]]) for t in range(5)]
    actions = np.array([policy.act({"observation.state": state})[:, 0] for state in states])
    assert [sorted(one) for one in policy.module.told] == [[], ["prefix", "previous", "previous_weight"]]
    seen = policy.module.told[1]  # planned at step 3, when action 2 of the first chunk is executed
    assert seen["previous"][..., 0].tolist() == [[2, 3, 4, 5, 0, 0]] * 2  # normalised, as the module gives them
    assert seen["prefix"].tolist() == [1, 1] and seen["prefix"].dtype == torch.int64
    decaying = [c * (math.exp(c) - 1) / (math.e - 1) for c in (3 / 4, 2 / 4, 1 / 4)]
    assert seen["previous_weight"][0].tolist() == pytest.approx([1, *decaying, 0, 0])
    expected = [0, *(10 + 2 * a for a in (0, 1, 2, 301))]
    assert actions[:, 0].tolist() == expected and actions[:3, 1].tolist() == expected[:3]
    policy.restart(torch.tensor([1]))  # of a row whose episode has just begun nothing is left
    for t in range(5):
        policy.act({"observation.state": states[t]})
    mixed = policy.module.told[2]  # the first row plans again, the second for the first time
    assert mixed["prefix"].tolist() == [1, 0] and mixed["previous"][0, :, 0].tolist() == [302, 303, 304, 305, 0, 0]
    assert not mixed["previous"][1].any() and not mixed["previous_weight"][1].any()


def test_plan_keeps_to_what_is_executed_and_executes_nothing() -> None:
    policy = told(real_time=True)
    observation, previous = {"observation.state": [3.0]}, np.array([[7.0], [8.0], [9.0]])
    assert policy.plan(observation)[:, 0].tolist() == [300, 301, 302, 303, 304, 305]
    chunk = policy.plan(observation, previous, delay=2)
    assert chunk.dtype == np.float32 and chunk[:, 0].tolist() == [7, 8, 302, 303, 304, 305]
    assert policy.module.told[-1]["previous"][0, :, 0].tolist() == [7, 8, 9, 0, 0, 0]
    assert acted(policy, 2) == [0, 1], "act() begins a chunk of its own"
    policy.reset()
    batch = policy.plan({"observation.state": [[3.0], [4.0]]}, np.stack([previous] * 2), delay=1)
    assert batch[..., 0].tolist() == [[7, 301, 302, 303, 304, 305], [7, 401, 402, 403, 404, 405]]
    for given, delay, message in (
        (previous[0], 0, "previous has shape [1], expected [2, Tp, 1]"),
        (np.zeros((2, 7, 1)), 0, "previous has 7 actions, expected at most 6"),
        (np.zeros((2, 3, 1)), 4, "delay 4 must be a whole number of actions of previous, 0 to 3"),
        (np.zeros((2, 3, 1)), "1", "delay '1' must be a whole number of actions"),
        (np.zeros((2, 3, 1)), np.array([1, 2]), "delay array([1, 2]) must be a whole number"),
        (np.full((2, 3, 1), 1j), 1, "previous is no array of numbers (they are complex)"),
        (np.full((2, 3, 1), np.nan), 1, "previous has NaN or Inf"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            policy.plan({"observation.state": [[3.0], [4.0]]}, given, delay)
    policy.module.most_prefix = 2  # as with --trainer.prefix 2
    assert policy.most_delay == 2
    policy.configure(real_time=False)
    assert policy.most_delay == H
    assert policy.plan(observation, previous, 2)[0, 0] == 300, "without real time it is not looked at"
    assert told(1).plan(observation).tolist() == [[300.0]], "a single action is a chunk of one"


def test_observe_fills_the_history_and_does_nothing_else() -> None:
    class Sums(Tells):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().forward({"observation.state": batch["observation.state"].sum(1)})

    spec = spec_of() | {"observation.state": {"shape": (3, 1), "dtype": "float32"}}
    policy = Policy(Sums(), Normaliser(spec), spec, Inference(action_steps=2))
    for value in (1.0, 2.0, 3.0):
        policy.observe({"observation.state": [value]})
    assert policy.plan({"observation.state": [4.0]})[0, 0] == 100 * (2 + 3 + 4)
    assert float(policy.act({"observation.state": [5.0]})[0]) == 100 * (3 + 4 + 5), "and is planned at once"
    assert float(policy.act({"observation.state": [6.0]})[0]) == 100 * (3 + 4 + 5) + 1


@pytest.mark.parametrize(
    ("chunk", "settings", "message"),
    [
        (H, {"delay": 4}, "--policy.delay 4: a chunk of 6 steps covers a delay of at most 3; learn longer chunks"),
        (
            H,
            {"delay": 2, "action_steps": 5},
            "--policy.delay 2 and --policy.action-steps 5 need 7 steps",
        ),
        (H, {"delay": -1}, "--policy.delay -1 must be a whole number of environment steps, 0 to 1000"),
        (H, {"delay": 1.5}, "policy setting delay is 1.5; expected a whole number"),
        (H, {"delay": "4"}, "policy setting delay is '4'; expected a whole number"),
        (H, {"action_steps": 2.0}, "policy setting action_steps is 2.0; expected a whole number"),
        (H, {"ensemble": "0.1"}, "policy setting ensemble is '0.1'; expected a number"),
        (H, {"delay": 10**9, "blocking": True}, "must be a whole number of environment steps, 0 to 1000"),
        (H, {"blocking": True, "real_time": True}, "--policy.blocking and --policy.real-time are two ways"),
        (H, {"ensemble": 0.1, "real_time": True}, "--policy.real-time and --policy.ensemble are two ways"),
        (H, {"ensemble": 0.1, "blocking": True}, "--policy.blocking and --policy.ensemble are two ways"),
        (H, {"real_time": "yes"}, "policy setting real_time is 'yes'; expected true or false"),
        (1, {"real_time": True}, "--policy.real-time joins chunks; this policy returns single actions"),
    ],
)
def test_settings_of_delay_that_do_not_fit_are_refused(chunk: int, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        told(chunk, **settings)
    assert "\n" not in str(error.value)


def test_a_way_that_is_asked_for_replaces_that_of_before() -> None:
    """ACT averages by default; its runs are evaluated in every way."""
    policy = told(ensemble=0.01, delay=2)
    assert policy.method == "ensemble" and policy.configure(delay=1).method == "ensemble"
    assert policy.configure(blocking=True).method == "blocking"
    assert policy.configure(**asdict(replace(policy.settings, ensemble=0.1))).method == "ensemble"
    assert policy.configure(ensemble=None).method == "naive"
    learner = SimpleNamespace(trainer=object(), models={"policy": Tells()}, device="cpu")
    args = SimpleNamespace(policy=Inference(ensemble=0.01, real_time=True), trainer="x")
    args.given = lambda name: name == "policy.real-time"
    assert acting_policy(learner, Normaliser(spec_of()), spec_of(), args).method == "real_time"
    args.given = lambda name: name in ("policy.real-time", "policy.ensemble")
    with pytest.raises(UserError, match="are two ways"):
        acting_policy(learner, Normaliser(spec_of()), spec_of(), args)


def test_a_module_without_guidance_cannot_be_in_real_time() -> None:
    policy = told()
    policy.module.real_time = False
    with pytest.raises(UserError, match="--policy.real-time needs a policy that samples chunks in steps"):
        policy.configure(real_time=True)


def test_an_observation_that_is_none_is_one_line() -> None:
    for given, message in (
        ([1.0], "an observation is a dict by the data's keys, observation.state; found list"),
        (None, "found NoneType"),
        ({"observation.state": np.zeros((0, 1))}, "the observation has no rows"),
        ({"observation.state": [1j]}, "the observation 'observation.state' is no array of numbers (they are complex)"),
    ):
        for call in (told().act, told().plan, told().observe):
            with pytest.raises(UserError, match=re.escape(message)):
                call(given)  # type: ignore[arg-type]
    assert told(delay=np.int64(2), action_steps=np.int64(3)).inference["delay"] == 2, "also of numpy"


def test_a_device_that_is_not_there_is_one_line() -> None:
    policy = told()
    assert policy.to("cpu") is policy and acted(policy, 1) == [0]
    for device in ("toaster", "cuda:99", "meta", 99, None, torch.bfloat16):
        with pytest.raises(UserError, match=f"device {device!r} cannot be used here .*; there is: cpu") as error:
            policy.to(device)
        assert "\n" not in str(error.value)


# ---- in environments -----------------------------------------------------------------------------------------------


class Follows(gym.Env):
    """The state is the step; it records what is executed. Episodes of 7 steps and more, by their seed."""

    observation_space, action_space = gym.spaces.Box(-9e9, 9e9, (1,)), gym.spaces.Box(-9e9, 9e9, (1,), np.float64)
    executed: list[tuple[int | None, list[float]]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.t, self.length, self.log = 0, 7 + (seed or 0), list[float]()
        self.executed.append((seed, self.log))
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.log.append(float(action[0]))
        self.t += 1
        return np.full(1, self.t, np.float32), 0.0, self.t >= self.length, False, {}


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_the_environment_goes_on_while_the_policy_plans(mode: str) -> None:
    """Episodes of other lengths in one vector, more than slots; every one is what a slot of its own would give."""
    vector = gym.vector.AutoresetMode[mode]
    envs: Any = gym.vector.SyncVectorEnv([Follows] * 2, autoreset_mode=vector)
    envs.hold = lambda observation, last: np.nan_to_num(last, nan=STILL)
    policy = told(action_steps=2, delay=2)
    Follows.executed.clear()
    episodes = run_episodes(policy, envs, [0, 3, 1])
    whole = [STILL, STILL, 0, 1, 2, 3, 402, 403, 602, 603]
    recorded = {seed: actions for seed, actions in Follows.executed if seed is not None}
    assert [recorded[seed] for seed in (0, 3, 1)] == [whole[: 7 + seed] for seed in (0, 3, 1)]
    assert [one["length"] for one in episodes] == [7, 10, 8]
    steps = np.diff(whole)
    assert episodes[1]["border"] == pytest.approx((399**2 + 199**2) / 2)
    inside = [step for i, step in enumerate(steps) if i not in (5, 7)]
    assert episodes[1]["inside"] == pytest.approx(np.mean(np.square(inside)))
    assert episodes[1]["jerk"] == pytest.approx(np.mean(np.diff(whole, 3) ** 2))
    result = summarise(episodes, {"name": "x"}, 0, policy)
    assert result["jerk_mean"] == pytest.approx(np.mean([one["jerk"] for one in episodes]))
    assert result["inference"]["delay"] == 2 and result["inference"]["method"] == "naive"
    assert f"jerk {result['jerk_mean']:.3g}, border {result['border_mean']:.3g}" in headline(result)


def test_jerk_by_hand() -> None:
    jerk = Jerk(2, gym.spaces.Box(-1, 1, (2,)))
    actions = [(0, 0), (1, 0), (1, 2), (4, 2), (0, 0)]
    for t, action in enumerate(actions):
        both = np.array([action, (9 * t, 9)], np.float32)
        jerk.add(both, np.array([t == 2, False]), np.array([True, t < 3]))
    thirds = [(4 - 3 + 3 - 0, 2 - 6 + 0 - 0), (0 - 12 + 3 - 1, 0 - 6 + 6 - 0)]
    assert jerk.of(0) == {
        "jerk": np.mean(np.square(thirds)), "border": (0 + 4) / 2, "inside": np.mean([0.5, 4.5, 10]).item()
    }  # fmt: skip
    assert jerk.of(1) == {"jerk": None, "border": None, "inside": 81 / 2}, "an episode of three steps has none"
    discrete = Jerk(1, gym.spaces.Discrete(3))
    discrete.add(np.array([1]), np.array([True]), np.array([True]))
    assert discrete.of(0) == {"jerk": None, "border": None, "inside": None}


def test_a_line_of_the_picture_is_the_mean_over_seeds() -> None:
    rows = [{"task": "x", "method": "naive", "delay": d, "metric": "success_rate", "value": v, "jerk_mean": v}
            for d, v in ((4, 0.5), (0, 0.5), (0, 1.0))]  # fmt: skip
    (zero, mean, low, high), one = points_of(rows, "x", "naive", "value")
    assert (zero, mean, low, high) == (0.0, 0.75, 0.0, 1.0) and one == (4.0, 0.5, 0.5, 0.5)
    assert points_of(rows, "x", "real time", "value") == []


def test_how_a_robot_stands_still() -> None:
    last = np.array([[0.3, -0.2, 0.1, 0.7], [np.nan] * 4], np.float32)
    assert metaworld.hold({}, last) == pytest.approx(np.array([[0, 0, 0, 0.7], [0, 0, 0, -1]]))
    state = {"observation.state": np.array([[100.0, 200, 3, 4, 5], [6, 7, 8, 9, 10]])}
    assert pusht.hold(state, np.array([[50.0, 60], [np.nan] * 2])).tolist() == [[50, 60], [6, 7]]
    policy = told(delay=2)
    policy.hold = lambda observation, last: np.zeros(3)
    with pytest.raises(UserError, match=r"hold\(\) returned actions of shape \(3,\), expected \(1, 1\)"):
        acted(policy, 1)
    spec = spec_of(1) | {"action": {"shape": (), "dtype": "int64", "classes": 3}}
    module = nn.Module()
    module.forward = lambda batch: torch.full((len(batch["observation.state"]),), 2)  # type: ignore[method-assign]
    choices = Policy(module, Normaliser(spec), spec, Inference(delay=2))
    assert [int(choices.act({"observation.state": [0.0]})) for _ in range(4)] == [0, 0, 2, 2]


def test_delay_is_an_option_of_trainings_and_of_what_is_saved(
    script: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = script("--trainer", "bc", "--steps", 2, "--eval-episodes", 3, "--policy.delay", 3)
    caplog.clear()
    line = read_lines(run / "eval.jsonl")[-1]
    assert line["inference"]["delay"] == 3 and line["jerk_mean"] > 0 and line["border_mean"] > 0
    assert load_policy(run, delay=0).plain and load_policy(run, delay=2).settings.delay == 2 and not caplog.messages
    assert load_policy(run).settings.delay == 3
    assert caplog.messages == [
        f"{run}: act() simulates the delay of 3 steps with which it was evaluated; delay=0 leaves it out"
    ]
    assert "delay" not in Corrected(run, 0.1).new().inference, "what is corrected is never late"
    with pytest.raises(UserError, match="--policy.delay -3 must be a whole number"):
        script("--trainer", "bc", "--steps", 2, "--policy.delay", -3, folder="other")


def test_a_residual_policy_cannot_be_late() -> None:
    policy = CorrectedPolicy(told(), told(1), Middle(np.zeros(1), np.ones(1), 0.1))
    assert policy.to("cpu") is policy
    args = SimpleNamespace(policy=Inference(delay=2), given=lambda name: False, trainer="residual")
    learner = SimpleNamespace(trainer=object(), models={"policy": Tells(1)}, device="cpu")
    on_top = SimpleNamespace(module=None, at_once=True)
    for late in (
        lambda: policy.configure(delay=2),
        lambda: acting_policy(learner, Normaliser(spec_of(1)), spec_of(1), args, base=on_top),
    ):
        with pytest.raises(UserError, match="--policy.delay 2: a residual policy corrects the action of each step"):
            late()
    with pytest.raises(UserError, match="plans no chunk"):
        policy.plan({})
