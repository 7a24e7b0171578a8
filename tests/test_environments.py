"""What environments do: when they reset, what arrays they return, their actions, their wrappers, and their exits."""

import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import gymnasium.wrappers as single
import gymnasium.wrappers.vector as several
import numpy as np
import pytest
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from torch import nn

from components import UserError
from components.acting.correction import BASE_ACTION
from components.acting.evaluation import check_env, run_episodes
from components.acting.policy import Policy
from components.data.normalisation import Normaliser
from components.envs.autoreset import Stepper
from components.envs.vector import Environments, FaultyEnvError, check_wrappers, executed
from components.envs.workers import spread
from components.experience.collection import Collector, describe_env
from components.experience.frozen_base import OnTop
from components.experience.recording import play

MODES = ("NextStep", "SameStep", "Disabled")
N, CHUNK = 3, 2


class Counting(gym.Env):
    """Observes (environment and episode, step, length, whether it terminates); the reward of step t is 2^t."""

    observation_space: gym.spaces.Space[Any] = gym.spaces.Box(-1e6, 1e6, (4,), np.float64)
    action_space = gym.spaces.Box(np.zeros(2, np.float32), np.full(2, 20, np.float32))

    def __init__(self, number: int, reuses: bool = False, kind: str = "array") -> None:
        self.number, self.reuses, self.kind, self.episode = number, reuses, kind, -1
        self.buffer: Any = np.zeros(4)
        self.generator = np.random.default_rng(number)
        self.executed: list[tuple[int, np.ndarray]] = []
        if kind == "tensor":
            self.buffer = torch.zeros(4, dtype=torch.float64)
        if kind == "dict":
            box = gym.spaces.Box(-1e6, 1e6, (), np.float64)
            self.observation_space = gym.spaces.Dict({"agent_pos": Counting.observation_space, "time": box})
            self.parts = {"agent_pos": self.buffer, "time": np.zeros(())}

    def observed(self) -> Any:
        """Where it `reuses` them, the same arrays each time."""
        values = (100 * self.number + self.episode, self.time, self.length, self.ends)
        if not self.reuses:
            self.buffer = self.buffer * 0
        for i, value in enumerate(values):
            self.buffer[i] = value
        if self.kind != "dict":
            return self.buffer
        self.parts = self.parts if self.reuses else dict(self.parts)
        self.parts |= {"agent_pos": self.buffer, "time": np.array(self.time)}
        return self.parts

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.episode, self.time = self.episode + 1, 0
        self.length, self.ends = int(self.generator.integers(2, 8)), int(self.generator.integers(2))
        return self.observed(), {}

    def step(self, action: Any) -> Any:
        self.executed.append((self.time, np.array(action)))
        reward, self.time = 2.0**self.time, self.time + 1
        over = self.time == self.length
        return self.observed(), reward, over and bool(self.ends), over and not self.ends, {}


def counting(mode: str, *options: Any) -> Callable[[int, int], Any]:
    """(num_envs, seed) -> environments that count."""
    return lambda n, seed: gym.vector.SyncVectorEnv(
        [lambda i=i: Counting(i + seed % 7, *options) for i in range(n)], autoreset_mode=mode
    )


def check_collected(make: Callable[[int, int], Any], steps: int = 40) -> None:
    """Every transition is what its observation says, and so are the episodes of an evaluation."""
    environments = Environments(make, N, 0, 0.0)
    collector = Collector(environments, 0, 0, 0, print)
    collector.start(0)
    seen = 0
    for _ in range(steps):
        found, _ = collector.step(np.zeros((N, 2), np.float32))
        assert found is not None
        for i in found["valid"].nonzero().flatten().tolist():
            episode, time, length, ends = found["observation.state"][i].tolist()
            assert found["next.observation.state"][i].tolist() == [episode, time + 1, length, ends]
            assert found["reward"][i] == 2**time and found["ended"][i] == (time + 1 == length)
            assert found["terminated"][i] == (time + 1 == length and ends == 1)
            assert collector.observation["observation.state"][i][1] == (0 if found["begins"][i] else time + 1)
            seen += 1
    assert seen > 20 * N
    for episode in run_episodes(Still(), environments, range(2 * N + 1)):
        assert 2 <= episode["length"] <= 7 and episode["return"] == 2 ** episode["length"] - 1
    environments.close()


class Still:
    """A policy that does nothing."""

    spec = {"action": {"shape": (2,)}, "observation.state": {"shape": (4,)}}

    def act(self, observation: dict[str, np.ndarray], rows: Any = None) -> np.ndarray:
        return np.zeros((len(observation["observation.state"]), 2), np.float32)

    def reset(self, seeds: Any = None) -> None: ...

    def restart(self, rows: Any) -> None: ...


# ---- where episodes end and begin ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["array", "dict", "tensor"])
def test_an_environment_may_return_the_same_array_each_time(mode: str, kind: str) -> None:
    check_collected(counting(mode, True, kind))


@pytest.mark.parametrize("mode", MODES)
def test_workers_step_environments_in_any_mode(mode: str) -> None:
    check_collected(lambda n, seed: spread(counting(mode, True), n, seed, 2), 30)


class Marks(nn.Module):
    """A chunk `[B, 2, 2]`, whose actions are the step at which it was planned, and their place in it."""

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        planned = state[:, 1:2].expand(-1, CHUNK)
        return torch.stack([planned, torch.arange(float(CHUNK)).expand(len(state), -1)], 2)


def marking(obs_steps: int = 1, ensemble: float | None = None) -> Policy:
    """The policy of those chunks."""
    shape = (4,) if obs_steps == 1 else (obs_steps, 4)
    spec: dict[str, Any] = {"observation.state": {"shape": shape, "dtype": "float32"}}
    spec["action"] = {"shape": (CHUNK, 2), "dtype": "float32"}
    spec["action_is_pad"] = {"shape": (CHUNK,), "dtype": "bool"}
    module = Marks() if obs_steps == 1 else nn.Sequential(nn.Flatten(), Last())
    policy = Policy(module, Normaliser(spec), spec)
    return policy if ensemble is None else policy.configure(ensemble=ensemble, action_steps=1)


class Last(Marks):
    """Of a history of two: the chunk is of the difference of both steps, 0 where the history was filled up."""

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        difference = (state[:, 4:] - state[:, :4])[:, :2]  # of the episode, and of the step
        return difference[:, None].expand(-1, CHUNK, -1)


def episodes_of(environments: Environments) -> list[tuple[int, list[float]]]:
    """What was executed, as (step of its episode, action)."""
    return [(time, action.tolist()) for env in environments.unwrapped.envs for time, action in env.executed]


@pytest.mark.parametrize("mode", MODES)
def test_a_chunk_begins_with_its_episode(mode: str) -> None:
    """In collection, as the base of a residual policy, and in a recording."""
    environments = Environments(counting(mode), N, 0, 0.0)
    collector, policy = Collector(environments, 0, 0, 0, print), marking()
    collector.start(0)
    for _ in range(40):
        transitions, _ = collector.step(policy.act(collector.observation))
        policy.follow(transitions)
    made: list[Any] = []

    def under(n: int, seed: int) -> Any:
        made.append(OnTop(counting(mode)(n, seed), marking(), 0.5))
        return made[-1]

    above = Environments(under, N, 0, 0.0)
    collector = Collector(above, 0, 0, 0, print)
    collector.start(0)
    for _ in range(40):
        found, _ = collector.step(np.zeros((N, 2), np.float32))
        assert found is not None
        executed = torch.tensor([env.executed[-1][1].tolist() for env in above.unwrapped.envs])
        assert (found["executed"] == executed)[found["valid"]].all() and not found["action"].any()
        time = ((found[BASE_ACTION][:, 0] + 1) * 10).round()
        assert (time == found["observation.state"][:, 1] // CHUNK * CHUNK)[found["valid"]].all()
    for envs in (environments, above):
        steps = episodes_of(envs)
        assert len(steps) > 30 * N
        assert all(action == [time // CHUNK * CHUNK, time % CHUNK] for time, action in steps)
    ended: list[int] = []
    played = play(marking(), counting(mode), 8, N, 0, 0.0, lambda: None, ended.append)
    assert ended == sorted(ended) and {0, 8} < set(ended) <= set(range(9))
    time = played.observations["observation.state"][played.at][:, 1]
    assert torch.equal(played.columns["action"], torch.stack([time // CHUNK * CHUNK, time % CHUNK], 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", [marking(2), marking(ensemble=0.0)], ids=["history", "ensemble"])
def test_neither_history_nor_ensemble_reaches_into_the_episode_before(mode: str, policy: Policy) -> None:
    policy.reset()
    environments = Environments(counting(mode), N, 0, 0.0)
    collector = Collector(environments, 0, 0, 0, print)
    collector.start(0)
    for _ in range(40):
        transitions, _ = collector.step(policy.act(collector.observation))
        policy.follow(transitions)
    for time, action in episodes_of(environments):
        if policy.obs_steps == 2:  # (difference of episodes, of steps), as they were when the chunk was planned
            assert action == [0, float(time // CHUNK > 0)]
        else:  # the mean of the chunks that were planned now and a step ago
            assert action == ([0, 0] if time == 0 else [time - 0.5, 0.5])


class Whole:
    """A vector environment without environments inside, which may not say what it does."""

    single_observation_space, single_action_space = Counting.observation_space, Counting.action_space

    def __init__(self, n: int, does: str = "same", says: str = "", form: str = "", key: str = "final_obs") -> None:
        self.num_envs, self.does, self.form, self.key, self.unwrapped = n, does, form, key, self
        self.metadata = {"autoreset_mode": says} if says else {}
        self.each = [Counting(i) for i in range(n)]
        self.over, self.seen = np.zeros(n, bool), np.zeros((n, 4))

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        if options and self.form == "no options":
            raise TypeError("unexpected options")
        mask = (options or {}).get("reset_mask") if self.form != "no mask" else None
        for i in range(self.num_envs):
            if mask is None or mask[i]:
                self.seen[i], self.over[i] = self.each[i].reset()[0], False
        return self.seen, {}

    def step(self, action: np.ndarray) -> Any:
        n = self.num_envs
        last: list[Any] = [None] * n
        reward, flags = np.zeros(n), np.zeros((2, n), bool)
        for i, env in enumerate(self.each):
            if self.over[i]:
                assert self.does == "next"
                self.seen[i], self.over[i] = env.reset()[0], False
                continue
            self.seen[i], reward[i], *flags[:, i], _ = env.step(action[i])
            self.over[i] = flags[:, i].any()
            if self.over[i] and self.does == "same":
                last[i], self.over[i] = self.seen[i].copy(), False
                self.seen[i] = env.reset()[0]
        info: dict[str, Any] = {}
        if self.form != "none" and any(x is not None for x in last):
            rows = np.stack([np.zeros(4) if x is None else x for x in last])
            forms = {"batch": rows, "short": [x if x is None else x[:2] for x in last], "reused": self.seen}
            info = {self.key: forms.get(self.form, last), f"_{self.key}": np.array([x is not None for x in last])}
        match self.form:
            case "reward":
                reward = reward[:, None]
            case "terminated":
                flags = flags[..., None]
            case "floats":
                flags = flags.astype(float)
            case "rows":
                return self.seen[:1], reward, *flags, info
        return self.seen, reward, *flags, info

    def close(self) -> None: ...


class Tensors(Whole):
    """The same with tensors, whose rewards have a gradient."""

    def step(self, action: np.ndarray) -> Any:
        seen, reward, *flags, info = super().step(action)
        return torch.tensor(seen), torch.tensor(reward, requires_grad=True), *map(torch.tensor, flags), info


def test_a_vector_environment_may_return_tensors() -> None:
    check_collected(lambda n, seed: Tensors(n, "next", "NEXT_STEP"), 30)


def test_a_reset_that_would_be_followed_by_another_is_refused() -> None:
    """Gymnasium's processes without shared memory forget only in a step that an episode has ended."""

    class Async:
        metadata, shared_memory, num_envs = {"autoreset_mode": "NextStep"}, False, 2

        @property
        def unwrapped(self) -> Any:
            return self

    with pytest.raises(UserError, match="may reset again in the step after a reset"):
        Stepper(Async())


@pytest.mark.parametrize(
    "options",
    [
        {"key": "final_observation"},
        {"form": "batch"},
        {"says": "NEXT_STEP"},
        {"says": "SAME_STEP", "key": "final_observation"},
        {"does": "next"},
        {"does": "no", "says": "DISABLED"},
    ],
    ids=str,
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_vector_environment_is_taken_for_what_it_does(options: dict[str, Any], workers: int) -> None:
    make = lambda n, seed: Whole(n, **options)  # noqa: E731
    check_collected((lambda n, seed: spread(make, n, seed, workers)) if workers else make, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"says": "SAME_STEP", "form": "none"}, r"\(SAME_STEP\), but its info has no last .* 1; expected info\['fin"),
        ({"form": "none"}, "taken for NEXT_STEP, but made a step where it should only have reset"),
        ({"form": "short"}, r"info\['final_obs'\]\[1\]: 'observation.state' is \(2,\); expected the shape .* \(4,\)"),
        ({"form": "reused"}, "'final_obs' always equals the first observation of the next episode"),
        ({"form": "reward"}, r"'reward' has shape \(2, 1\) and type float64; expected \(2,\), float"),
        ({"form": "terminated"}, r"'terminated' has shape \(2, 1\) and type bool; expected \(2,\), bool"),
        ({"form": "floats"}, r"'terminated' has shape \(2,\) and type float64; expected \(2,\), bool"),
        ({"form": "rows"}, "'observation.state' has 1 rows; expected 2"),
        (
            {"does": "no", "says": "DISABLED", "form": "no options"},
            r"cannot reset some.*TypeError.*\"reset_mask\": \[N",
        ),
        ({"does": "no", "says": "DISABLED", "form": "no mask"}, "changed environments outside of 'reset_mask'"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_one_line(options: dict[str, Any], message: str) -> None:
    stepper = Stepper(Environments(lambda n, seed: Whole(n, **options), 2, 0, 0.0))
    stepper.reset()
    with pytest.raises(UserError, match=message) as error:
        for _ in range(60):
            stepper.step(np.zeros((2, 2), np.float32))
    assert "\n" not in str(error.value)


# ---- actions -------------------------------------------------------------------------------------------------------


class Acting(Counting):
    """Refuses actions outside of its space."""

    def __init__(self, space: Any) -> None:
        super().__init__(0)
        self.action_space = space

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        return super().step(action)


BOX = gym.spaces.Box
WHOLE = (BOX(-5, 5, (2,), np.int64), BOX(0, 3, (1,), np.uint8), BOX(-128, 127, (2,), np.int8))


@pytest.mark.parametrize(
    "space",
    [*WHOLE, BOX(-1, 1, (2, 3), np.float32), BOX(-2, 2, (), np.float64), BOX(-1e29, 1e29, (2,), np.float32)]
    + [BOX(np.array([0, 1], np.float32), np.array([0, 2], np.float32))],
    ids=str,
)
def test_actions_of_any_box_are_vectors(space: Any) -> None:
    """In its bounds, of its type and shape; whole numbers are rounded, and drawn equally often."""
    make = lambda n, seed: gym.vector.SyncVectorEnv([lambda: Acting(space)] * n, autoreset_mode="SameStep")  # noqa: E731
    environments, size = Environments(make, 4, 0, 0.0), int(np.prod(space.shape))
    spec = describe_env(environments)["action"]
    assert spec["shape"] == (size,) and spec["stats"]["max"] == space.high.astype(float).ravel().tolist()
    collector = Collector(environments, 0, 0, 0, print)
    collector.start(0)
    torch.manual_seed(0)
    drawn = []
    for _ in range(250):
        found, _ = collector.step(collector.random_actions())
        assert found is not None and found["action"].shape == (4, size) and found["action"].dtype == torch.float32
        assert torch.equal(found["action"], found["drawn"])
        drawn.append(found["action"])
    low, high = (torch.tensor(bound.astype(np.float64).ravel()) for bound in (space.low, space.high))
    ends = torch.cat(drawn).double().aminmax(dim=0)
    assert ((ends.min - low) <= 0.02 * (high - low)).all() and ((high - ends.max) <= 0.02 * (high - low)).all()
    if float((high - low).max()) < 12 and space in WHOLE:
        _, counts = torch.cat(drawn)[:, 0].unique(return_counts=True)
        assert len(counts) == high[0] - low[0] + 1 and counts.min() > 0.6 * counts.max()


def test_whole_numbers_are_rounded() -> None:
    assert executed(np.array([[-0.6, 2.4, 7, -9]]), BOX(-5, 5, (4,), np.int64)).tolist() == [[-1, 2, 5, -5]]
    assert executed(np.array([[300.0, -3, 99.7]]), BOX(0, 255, (3,), np.uint8)).tolist() == [[255, 0, 100]]
    assert executed(np.arange(6.0)[None], BOX(-9, 9, (2, 3), np.float32)).tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize(
    "space",
    [BOX(-3e38, 3e38, (2,), np.float32), BOX(-1e300, 1e300, (2,), np.float64), BOX(-np.inf, np.inf, (2,), np.float32)]
    + [BOX(-(2**63), 2**63 - 1, (2,), np.int64), gym.spaces.MultiDiscrete([2, 2])],
    ids=str,
)
def test_actions_without_a_range_are_refused(space: Any) -> None:
    envs: Any = gym.vector.SyncVectorEnv([lambda: Acting(space)])
    with pytest.raises(UserError, match="it has actions without bounds|expected a Discrete one, or a Box"):
        describe_env(envs)
    if not hasattr(space, "low"):
        with pytest.raises(UserError, match="it has the action space MultiDiscrete"):
            check_env(envs, Still.spec)


def test_a_base_of_a_residual_policy_acts_in_a_box_of_any_shape() -> None:
    """Also in one with an action that cannot vary, whose correction is 0."""
    low, high = np.array([[0, 1]], np.float64), np.array([[9, 1]], np.float64)
    make = lambda n, seed: gym.vector.SyncVectorEnv([lambda: Acting(BOX(low, high, dtype=np.float64))] * n)  # noqa: E731
    envs = Environments(lambda n, seed: OnTop(make(n, seed), marking(), 1.0), 2, 0, 0.0)
    observation, _ = envs.reset()
    assert observation[BASE_ACTION].tolist() == [[-1, 0]] * 2
    envs.step(np.array([[2 / 9, 1], [0, -1]], np.float32))
    assert [env.executed[0][1].tolist() for env in envs.unwrapped.envs] == [[[pytest.approx(1), 1]], [[0, 1]]]
    assert envs.sum.correction(np.array([0.0, 1.0]), np.array([9.0, 1.0])).tolist() == [2, 0]


def test_nested_observations_are_refused_in_an_evaluation() -> None:
    envs = Environments(counting("SameStep", False, "dict"), 1, 0, 0.0)
    space = gym.spaces.Discrete(2)
    envs.envs.reset = lambda **keywords: ({"inner": {"a": np.zeros((1, 2))}}, {})
    with pytest.raises(UserError, match="it has the observation space .*; expected Box or a Dict of Box"):
        check_env(envs, Still.spec)
    with pytest.raises(UserError, match="the policy chooses among 3 actions"):
        envs.envs.single_action_space = space
        check_env(envs, {"action": {"shape": (), "classes": 3}})


# ---- wrappers, exits, numbers --------------------------------------------------------------------------------------


class Standardised(gym.Wrapper):
    """A user's own, with Gymnasium's statistics under another name."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.moments = RunningMeanStd(shape=(4,))


WRAPPERS: list[tuple[Any, str]] = [
    (Standardised, "the wrapper Standardised.*--normalise-observations"),
    (single.NormalizeObservation, "--normalise-observations"),
    (lambda env: single.RecordEpisodeStatistics(single.NormalizeReward(env)), "--normalise-rewards"),
    (lambda env: single.ClipReward(env, -1, 1), "the wrapper ClipReward.*--reward-scale or --reward-shift"),
    (lambda env: type("Own", (single.TransformReward,), {})(env, abs), "the wrapper Own.*--reward-scale"),
]
VECTOR_WRAPPERS: list[tuple[Any, str]] = [
    (several.NormalizeObservation, "--normalise-observations"),
    (lambda envs: several.RecordEpisodeStatistics(several.NormalizeReward(envs)), "--normalise-rewards"),
    (lambda envs: several.ClipReward(envs, -1, 1), "--reward-scale"),
    (lambda envs: several.TransformReward(envs, abs), "--reward-scale"),
]


@pytest.mark.parametrize(("wrap", "message"), WRAPPERS)
def test_wrappers_that_change_what_returns_mean_are_refused(wrap: Any, message: str) -> None:
    make = lambda n, seed: gym.vector.SyncVectorEnv([lambda: wrap(Counting(0))] * n)  # noqa: E731
    for made in (make, lambda n, seed: OnTop(make(n, seed), marking(), 0.5)):
        with pytest.raises(UserError, match=message):
            Environments(made, 1, 0, 0.0)


@pytest.mark.parametrize(("wrap", "message"), VECTOR_WRAPPERS)
def test_and_so_are_those_of_vector_environments(wrap: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Environments(lambda n, seed: wrap(counting("NextStep")(n, seed)), 1, 0, 0.0)


@pytest.mark.parametrize("vector", ["AsyncVectorEnv", "workers"])
def test_and_those_in_other_processes(vector: str) -> None:
    envs = [lambda: single.NormalizeReward(Counting(0))] * 2
    make = lambda n, seed: gym.vector.SyncVectorEnv(envs[:n])  # noqa: E731
    made = (
        (lambda n, seed: spread(make, n, seed, 2))
        if vector == "workers"
        else lambda n, seed: getattr(gym.vector, vector)(envs[:n])
    )
    with pytest.raises(UserError, match="--normalise-rewards"):
        Environments(made, 2, 0, 10.0)


def test_wrappers_that_keep_nothing_are_welcome() -> None:
    class Task(gym.RewardWrapper):
        def reward(self, reward: Any) -> Any:
            return reward - 1

    env = Task(single.RecordEpisodeStatistics(single.RescaleAction(Counting(0), -1, 1)))
    check_wrappers(gym.vector.SyncVectorEnv([lambda: env]))


class Broken(Counting):
    """Exits, or returns a number that float32 cannot hold."""

    def __init__(self, kind: str) -> None:
        super().__init__(0)
        self.kind = kind
        if kind == "made":
            sys.exit(0)

    def reset(self, **keywords: Any) -> Any:
        if self.kind == "reset":
            sys.exit("bye")
        return super().reset(**keywords)

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        if self.kind == "step":
            sys.exit(0)
        scale = {"reward": (1, 1e308), "observation": (1e300, 1)}.get(self.kind, (1, 1))
        return observation * scale[0], reward * scale[1], *rest


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("made", "an environment raised SystemExit while it was made: 0"),
        ("reset", "environment 0 raised SystemExit in reset: bye"),
        ("step", "environment 0 raised SystemExit in step: 0"),
        ("reward", r"environment 0 returned a NaN or Inf in 'reward' \(as float32\)"),
        ("observation", r"environment 0 returned a NaN or Inf in 'observation.state' \(as float32\)"),
    ],
)
def test_an_exit_and_a_number_beyond_float32_are_faults(kind: str, message: str, workers: bool) -> None:
    make = lambda n, seed: gym.vector.SyncVectorEnv([lambda: Broken(kind)] * n)  # noqa: E731
    with pytest.raises(FaultyEnvError, match=message):
        stepper = Stepper(Environments((lambda n, seed: spread(make, n, seed, 1)) if workers else make, 2, 0, 10.0))
        stepper.reset()
        stepper.step(np.zeros((2, 2), np.float32)).check(np.ones(2, bool))


def test_a_reward_that_its_scale_makes_too_large_is_a_fault() -> None:
    collector = Collector(Environments(counting("SameStep"), 1, 0, 0.0), 0, 0, 0, print, (0.0, 1e39))
    collector.start(0)
    with pytest.raises(RuntimeError, match="NaN or Inf in 'reward'"):
        collector.step(np.zeros((1, 2), np.float32))
