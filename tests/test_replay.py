"""Transitions and the replay buffer: where episodes end, n-step windows at both borders, what is kept."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from components.contracts import Window
from components.data.returns import n_step_return
from components.envs.observations import observation_batch
from components.envs.vector import Environments
from components.experience.collection import Collector, describe_env
from components.experience.replay import ReplayBuffer


class Counting(gym.Env):
    """Observation: (episode, step). It terminates after 3 steps in even episodes, is truncated after 4 in odd ones."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-2, 4, (1,), np.float32)
    episode = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        even = self.episode % 2 == 0
        observation = np.array([self.episode, float(self.count)])
        reward = 10.0 * self.episode + self.count
        return observation, reward, even and self.count == 3, not even and self.count == 4, {"success": even}


class Nested(Counting):
    """The same observation in a dict, in two parts."""

    observation_space = gym.spaces.Dict(
        {"agent_pos": gym.spaces.Box(-9, 99, (1,)), "environment_state": gym.spaces.Box(-9, 99, (1,))}
    )

    def _split(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"agent_pos": observation[:1], "environment_state": observation[1:]}

    def reset(self, **keywords: Any) -> Any:
        observation, info = super().reset(**keywords)
        return self._split(observation), info

    def step(self, action: np.ndarray) -> Any:
        observation, *rest = super().step(action)
        return self._split(observation), *rest


def collect(
    env: Callable[[], Any], mode: str, vector: Any, steps: int, copy: bool = True
) -> tuple[list[dict[str, Tensor]], list[Any]]:
    """Step two environments; returns the valid transitions of the second one, and the episodes of both."""
    make = lambda n, seed: vector([env] * n, autoreset_mode=mode, copy=copy)  # noqa: E731
    environments = Environments(make, 2, 0, 10.0)
    collector = Collector(environments, 0, 0, 0, print)
    collector.start(0)
    start = int(np.concatenate([v[1] for v in collector.observation.values()])[0])  # episodes that resets have used up
    found, episodes = [], []
    for _ in range(steps):
        transitions, ended = collector.step(np.zeros((2, 1), dtype=np.float32))
        assert transitions is not None
        episodes += ended
        if transitions["valid"][1]:
            found.append({key: value[1] for key, value in transitions.items()})
    environments.close()
    assert start == found[0]["next.observation.state"][0]
    return found, episodes


@pytest.mark.parametrize("vector", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("copy", [True, False])
def test_no_transition_crosses_an_episode(mode: str, vector: Any, copy: bool) -> None:
    """Also where the vector environment gives the same array again and again (`copy=False`)."""
    found, episodes = collect(Counting, mode, vector, 20, copy)
    first = int(found[0]["observation.state"][0])
    expected = []
    for episode in range(first, first + 10):
        last = 3 if episode % 2 == 0 else 4
        for step in range(last):
            reward, end = 10.0 * episode + step + 1, step + 1 == last
            expected.append(([episode, step], reward, [episode, step + 1], end and last == 3, end))
    names = ("observation.state", "reward", "next.observation.state", "terminated", "ended")
    assert [tuple(t[name].tolist() for name in names) for t in found] == expected[: len(found)]
    assert len(found) == (20 if mode != "NextStep" else 16)  # one step in four or five only resets
    lengths = [3 if (first + i // 2) % 2 == 0 else 4 for i in range(len(episodes))]
    assert [episode["episode_length"] for episode in episodes] == lengths
    assert episodes[0]["episode_success"] == float(first % 2 == 0)


def test_observations_in_a_dict() -> None:
    plain, _ = collect(Counting, "SameStep", gym.vector.SyncVectorEnv, 12)
    make = lambda n, seed: gym.vector.SyncVectorEnv([Nested] * n, autoreset_mode="SameStep")  # noqa: E731
    environments = Environments(make, 2, 0, 10.0)
    collector = Collector(environments, 0, 0, 0, print)
    collector.start(0)
    for expected in plain:
        transitions, _ = collector.step(np.zeros((2, 1), dtype=np.float32))
        assert transitions is not None
        parts = [transitions[f"next.observation.{name}"][1] for name in ("state", "environment_state")]
        assert torch.equal(torch.cat(parts), expected["next.observation.state"])


def test_the_spec_of_an_environment() -> None:
    spec = describe_env(gym.vector.SyncVectorEnv([Counting] * 2))
    assert spec["observation.state"] == {"shape": (2,), "dtype": "float32"} == spec["next.observation.state"]
    assert spec["action"] == {"shape": (1,), "dtype": "float32", "stats": {"min": [-2.0], "max": [4.0]}}
    assert spec["reward"]["shape"] == () and spec["terminated"]["dtype"] == "bool"


@pytest.mark.parametrize(("shape", "dtype"), [((3, 2), np.float64), ((4,), np.uint8), ((5,), bool), ((), np.float32)])
@pytest.mark.parametrize("key", ["", "observation", "observation.extra"])
def test_observations_of_any_shape_and_type_are_vectors(shape: tuple[int, ...], dtype: Any, key: str) -> None:
    array = np.ones((2, *shape), dtype)
    (found,) = observation_batch({key: array} if key else array).values()
    assert found.shape == (2, max(1, int(np.prod(shape)))) and found.dtype == np.float32


def test_seeds_are_known_by_the_environments_place_among_all() -> None:
    make = lambda n, seed: gym.vector.SyncVectorEnv([Counting] * n)  # noqa: E731
    one = Collector(Environments(make, 4, 0, 0), 7, 0, 0, print)
    two = Collector(Environments(make, 2, 0, 0), 7, 2, 0, print)
    one.start(0)
    two.start(0)
    assert one.seeds[2:] == two.seeds and len(set(one.seeds)) == 4
    two.start(100)
    assert not set(one.seeds) & set(two.seeds)


# ---- n-step returns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "value", "last", "factor"),
    [
        ([False, False, False], 1 + 0.5 * 2 + 0.25 * 4, 2, 0.125),  # in the middle of an episode
        ([False, False, True], 1 + 0.5 * 2 + 0.25 * 4, 2, 0.125),  # its last step ends the window, too
        ([False, True, False], 1 + 0.5 * 2, 1, 0.25),
        ([True, False, True], 1, 0, 0.5),
    ],
)
def test_n_step_returns_by_hand(ended: list[bool], value: float, last: int, factor: float) -> None:
    found = n_step_return(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([ended]), 0.5)
    assert [x.item() for x in found] == [value, last, factor]


def made_spec() -> dict[str, Any]:
    spec = {key: {"shape": (1,), "dtype": "float32"} for key in ("observation.state", "action")}
    spec |= {"reward": {"shape": (), "dtype": "float32"}, "terminated": {"shape": (), "dtype": "bool"}}
    return spec | {"next.observation.state": {"shape": (1,), "dtype": "float32"}}


def buffer(n_step: int, size: int = 100, num_envs: int = 1, **window: Any) -> ReplayBuffer:
    return ReplayBuffer(made_spec(), size, num_envs, num_envs, Window(n_step=n_step, discount=0.5, **window))


def row(t: int, terminated: bool = False, ended: bool = False, envs: int = 1, valid: bool = True) -> dict[str, Tensor]:
    """The transition from state t to t + 1 with reward 2^t."""
    state = torch.full((envs, 1), float(t))
    flags = {"terminated": terminated, "ended": ended, "valid": valid}
    return {
        "observation.state": state,
        "action": -state,
        "reward": torch.full((envs,), 2.0**t),
        "next.observation.state": state + 1,
        **{key: torch.full((envs,), value) for key, value in flags.items()},
    }


def drawn(made: ReplayBuffer) -> dict[int, tuple[float, float, float, bool]]:
    """State -> (reward, successor, discount, terminated) of every window."""
    batch = made.sample(2000)
    keys = ("reward", "next.observation.state", "discount", "terminated")
    rows = zip(
        batch["observation.state"].flatten().tolist(), *(batch[key].flatten().tolist() for key in keys), strict=True
    )
    found: dict[int, Any] = {}
    for state, *rest in rows:
        assert found.setdefault(int(state), tuple(rest)) == tuple(rest)
    return found


def test_n_step_targets_at_both_borders() -> None:
    made = buffer(n_step=3)
    for t in range(4):
        made.add(row(t, terminated=t == 3, ended=t == 3))  # an episode that terminates: states 0 to 3
    for t in range(5, 9):
        made.add(row(t, ended=t == 8))  # one that is truncated: states 5 to 8
    for t in range(10, 12):
        made.add(row(t))  # one that goes on
    assert drawn(made) == {
        0: (1 + 1 + 1, 3, 0.125, False),  # 2^t 0.5^k makes each term 2^t
        1: (2 + 2 + 2, 4, 0.125, True),
        2: (4 + 4, 4, 0.25, True),
        3: (8, 4, 0.5, True),
        5: (96, 8, 0.125, False),
        6: (192, 9, 0.125, False),  # bootstraps from the last observation: truncated, not terminated
        7: (256, 9, 0.25, False),
        8: (256, 9, 0.5, False),
        10: (2048, 12, 0.25, False),  # as far as it is known
        11: (2048, 12, 0.5, False),
    }


def test_the_ring_forgets_the_oldest_and_windows_do_not_cross_its_head() -> None:
    made = buffer(n_step=2, size=4)
    for t in range(7):
        made.add(row(t))
    assert len(made) == 4
    assert drawn(made) == {
        3: (16, 5, 0.25, False),
        4: (32, 6, 0.25, False),
        5: (64, 7, 0.25, False),
        6: (64, 7, 0.5, False),
    }


def test_a_cut_ends_the_episode_without_terminating_it() -> None:
    made = buffer(n_step=2)
    made.add(row(0))
    made.add(row(1))
    made.cut()
    made.add(row(5))
    found = drawn(made)
    assert found[1] == (2, 2, 0.5, False) and found[0] == (2, 2, 0.25, False)


def test_steps_that_only_reset_are_left_out() -> None:
    made = buffer(n_step=1, num_envs=2)
    made.add(row(0, envs=2))
    mixed = row(1, envs=2)
    mixed["valid"] = torch.tensor([True, False])
    made.add(mixed)
    made.add(row(2, envs=2))
    assert made.count.tolist() == [3, 2]
    (part,) = made.new_parts(0).new.values()
    assert [env["rows"][:, 0].tolist() for env in part["envs"]] == [[0, 1, 2], [0, 2]]


def test_sampling_is_uniform_over_what_is_there() -> None:
    torch.manual_seed(0)
    made = buffer(n_step=1, num_envs=2)
    made.add(row(0, envs=2))
    second = row(1, envs=2)
    second["valid"] = torch.tensor([True, False])
    made.add(second)
    states = made.sample(30_000)["observation.state"].flatten()
    assert abs(float((states == 1).float().mean()) - 1 / 3) < 0.01  # 3 transitions, one of which is in state 1


PICTURE = (1, 2, 2)


def pictured(size: int, num_envs: int = 1) -> ReplayBuffer:
    spec = {"observation.images.camera": {"shape": PICTURE, "dtype": "uint8"}}
    spec |= {"next.observation.images.camera": {"shape": PICTURE, "dtype": "uint8"}}
    spec |= {"reward": {"shape": (), "dtype": "float32"}, "terminated": {"shape": (), "dtype": "bool"}}
    spec |= {"action": {"shape": (), "dtype": "int64", "classes": 3}}
    return ReplayBuffer(spec, size, num_envs, num_envs, Window())


def frame(t: int, ended: bool = False, envs: int = 1) -> dict[str, Tensor]:
    """The transition between pictures of brightness t and t + 1, with the reward t and the action t % 3."""
    picture = torch.full((envs, *PICTURE), t, dtype=torch.uint8)
    flags = {"terminated": ended, "ended": ended, "valid": True}
    seen = {"observation.images.camera": picture, "next.observation.images.camera": picture + 1}
    other = {"reward": torch.full((envs,), float(t)), "action": torch.full((envs,), t % 3)}
    return seen | other | {key: torch.full((envs,), value) for key, value in flags.items()}


def check_frames(made: ReplayBuffer, expected: set[int]) -> None:
    batch = made.sample(500)
    now, then = (batch[f"{prefix}observation.images.camera"] for prefix in ("", "next."))
    assert now.dtype == torch.uint8 and now.shape == (500, *PICTURE) and batch["action"].dtype == torch.int64
    assert torch.equal(now[:, 0, 0, 0].float(), batch["reward"]) and torch.equal(then, now + 1)
    assert torch.equal(batch["action"], batch["reward"].long() % 3)
    assert set(batch["reward"].int().tolist()) == expected


def test_pictures_are_kept_once_and_go_with_their_transitions() -> None:
    made = pictured(6)
    assert made.pictures.store["observation.images.camera"].shape == (1, 7, *PICTURE)
    for t in range(3):
        made.add(frame(t))
        check_frames(made, set(range(t + 1)))
    assert made.pictures.written == 4  # one more than there are transitions
    made.add(frame(3, ended=True))
    made.add(frame(10))  # another episode: its first picture comes on top
    assert made.pictures.written == 7
    check_frames(made, {0, 1, 2, 3, 10})
    made.add(frame(11))
    check_frames(made, {1, 2, 3, 10, 11})  # the picture of 0 has gone, and the transition with it
    for t in range(20, 40):
        made.add(frame(t, ended=True))  # episodes of one step: two pictures each
    check_frames(made, {37, 38, 39})


def saved(made: ReplayBuffer, disk: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint would hold, whose files are in `disk`: names of parts, which are written once."""
    parts = made.new_parts(0)
    assert not set(parts.new) & set(disk) and set(parts.kept) <= set(disk)
    disk |= parts.new
    state = {"buffer": made.state_dict(), "parts": [*parts.kept, *parts.new]}
    made.saved()
    return state


def loaded(state: dict[str, Any], disk: dict[str, Any]) -> dict[str, Any]:
    return state | {"parts": (disk[name] for name in state["parts"])}


@pytest.mark.parametrize("made_of", ["vectors", "pictures"])
def test_a_save_holds_what_is_new_and_all_of_them_make_the_buffer(made_of: str) -> None:
    make = {"vectors": lambda: buffer(n_step=2, size=6), "pictures": lambda: pictured(6)}[made_of]
    step = {"vectors": row, "pictures": frame}[made_of]
    made, disk = make(), {}
    for t in range(40):
        made.add(step(t, ended=t % 5 == 4))
        if t % 3 == 2:
            state = saved(made, disk)
            newest = disk[state["parts"][-1]]["envs"][0]
            assert len(newest["ended"]) == 3
            assert len(state["parts"]) <= 3  # what has been written over in memory is kept no more
            again = make()
            assert again.restore(loaded(state, disk), 0) and again.count.tolist() == made.count.tolist()
            torch.manual_seed(t)
            one = made.sample(100)
            torch.manual_seed(t)
            other = again.sample(100)
            assert all(torch.equal(one[key], other[key]) for key in one)
    again.add(step(39, ended=True))  # a resumed run goes on with the same parts
    assert list(again.new_parts(0).new) == ["replay-rank-0-000013"]


def test_what_a_collection_gives_beside_the_spec_is_stored_from_its_first_time_on() -> None:
    """`intervention` is in the batches, that of a chunk's first step; both survive a checkpoint, and an older one."""
    made, disk = buffer(n_step=1, size=9, chunk=2), {}
    for t in range(3):  # as of a version that did not give them
        made.add(row(t))
    saved(made, disk)
    for t in range(3, 11):
        flag = {"intervention": torch.tensor([t % 2 == 0])} | ({"success": torch.tensor([t == 7])} if t > 4 else {})
        made.add(row(t, ended=t == 7) | flag)
    again = buffer(n_step=1, size=9, chunk=2)
    assert not set(again.data) & {"intervention", "success"}
    assert again.restore(loaded(saved(made, disk), disk), 0)
    for one in (made, again):
        found = one.transitions()
        state = found["observation.state"].flatten().tolist()
        assert state == [2, 3, 4, 5, 6, 7, 8, 9, 10]  # of the first it is not known
        assert found["intervention"].tolist() == [t > 2 and t % 2 == 0 for t in state]
        assert found["success"].tolist() == [t == 7 for t in state]
        batch = one.sample(200)
        state = batch["observation.state"].flatten()
        assert torch.equal(batch["intervention"], (state > 2) & (state % 2 == 0))
        assert batch["action"].shape == (200, 2, 1) and "success" not in batch


def test_a_save_without_news_writes_nothing_and_a_failed_one_is_made_up_for() -> None:
    made, disk = buffer(1), {}
    made.add(row(0))
    made.new_parts(0)  # a save that failed: `saved` was not called
    made.add(row(1))
    state = saved(made, disk)
    assert [len(disk[name]["envs"][0]["ended"]) for name in state["parts"]] == [2]
    assert saved(made, disk)["parts"] == state["parts"]


def test_an_episode_that_is_cut_after_it_was_saved_stays_cut() -> None:
    made, disk = buffer(n_step=2), {}
    made.add(row(0))
    saved(made, disk)
    made.cut()
    state = saved(made, disk)
    made.add(row(7))
    again = buffer(n_step=2)
    again.restore(loaded(state, disk), 0)
    again.add(row(7))
    assert drawn(again) == drawn(made) and drawn(again)[0] == (1, 1, 0.5, False)


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_damaged_file_is_a_gap_that_no_window_crosses(lost: int) -> None:
    """Files of three transitions each, of which one is left out, also when many or no process before had it."""
    made, disk = buffer(n_step=3, to_go=True), {}
    for t in range(12):
        made.add(row(t, ended=t == 7))
        if t % 3 == 2:
            state = saved(made, disk)
    there = [t for t in range(12) if t // 3 != lost]
    disk = {name: None if i == lost else part for i, (name, part) in enumerate(disk.items())}
    for form in (loaded(state, disk), {"ranks": [loaded(state, disk)]}):
        again = buffer(n_step=3, to_go=True)
        assert again.restore(form, 0) and again.left_out == 3 and len(again) == 9
        again.cut()
        found = drawn(again)
        assert sorted(found) == there
        for t in there:
            last = next(s for s in range(t, t + 3) if s == t + 2 or s == 7 or s + 1 not in there)
            assert found[t][1] == last + 1 and found[t][2] == 0.5 ** (last + 1 - t), t
        ends = {t: next(s for s in range(t, 12) if s == 7 or s + 1 not in there) for t in there}
        assert returns(again) == {t: 2.0**t * (ends[t] + 1 - t) for t in there}
    again.add(row(12))
    (name,) = again.new_parts(0).new
    assert name not in made.state_dict()["parts"] and not again.parts  # all is written again
    third = buffer(n_step=3, to_go=True)
    third.restore(loaded(saved(again, disk := {}), disk), 0)
    third.cut()
    assert sorted(drawn(third)) == [*there, 12] and third.left_out == 0


def test_a_gap_in_the_middle_of_an_episode_ends_with_that_episode() -> None:
    made, disk = buffer(1, to_go=True), {}
    for t in range(9):
        made.add(row(t))
        if t % 3 == 2:
            state = saved(made, disk)
    disk[next(iter(disk))] = None
    again = buffer(1, to_go=True)
    again.restore(loaded(state, disk), 0)
    again.add(row(9, ended=True))  # the episode has four transitions here, and ten in truth
    assert returns(again) == {t: 2.0**t * (10 - t) for t in range(3, 10)}


def test_a_gap_takes_the_pictures_that_it_had_along() -> None:
    made, disk = pictured(20), {}
    for t in range(12):
        made.add(frame(t, ended=t == 7))
        if t % 3 == 2:
            state = saved(made, disk)
    disk[list(disk)[1]] = None
    again = pictured(20)
    assert again.restore(loaded(state, disk), 0)
    check_frames(again, {0, 1, 2, 7, 8, 9, 10, 11})  # the first picture of 6 is the last one of 5
    assert again.left_out == 4
    again.add(frame(12))
    third = pictured(20)
    third.restore(loaded(saved(again, disk := {}), disk), 0)
    check_frames(third, {0, 1, 2, 7, 8, 9, 10, 11, 12})


STATE: dict[str, Any] = {"parts": [], "total": []}


def test_any_number_of_processes_restores_it() -> None:
    made, disk = buffer(n_step=2, size=40, num_envs=4), {}  # rings of 10
    for t in range(13):
        made.add(row(t, ended=t == 11, envs=4))
    state = loaded(saved(made, disk), disk)
    (part,) = state["parts"]
    ranks = []
    for half in (slice(0, 2), slice(2, 4)):
        own = {"envs": part["envs"][half], "cut": part["cut"][half]}
        ranks.append({"buffer": STATE | {"envs": 2}, "parts": [own]})
    whole = buffer(n_step=2, size=40, num_envs=4)
    assert whole.restore({"ranks": ranks}, 0) and whole.count.tolist() == [10] * 4
    assert drawn(whole) == drawn(made)
    assert len(next(iter(whole.new_parts(0).new.values()))["envs"][0]["ended"]) == 10  # all is new to its files
    shorter = buffer(n_step=2, size=24, num_envs=4)  # the newest are kept
    assert shorter.restore({"buffer": STATE | {"envs": 4, "total": [13] * 4}, "parts": [part]}, 0)
    assert sorted(drawn(shorter)) == list(range(7, 13))
    second = ReplayBuffer(made_spec(), 40, 4, 2, Window(n_step=2, discount=0.5))  # the second of two processes
    assert second.restore({"ranks": [{"buffer": STATE | {"envs": 4}, "parts": [part]}]}, 2)
    assert second.count.tolist() == [10, 10] and drawn(second) == drawn(made)
    assert not buffer(1).restore({}, 0)


# ---- windows of other kinds ----------------------------------------------------------------------------------------


def test_chunks_end_with_their_episodes() -> None:
    made = buffer(1, chunk=3)
    for t in range(4):
        made.add(row(t, terminated=t == 3, ended=t == 3))
    for t in range(5, 8):
        made.add(row(t, ended=t == 7))
    batch = made.sample(500)
    assert batch["action"].shape == (500, 3, 1)
    for i, state in enumerate(batch["observation.state"].flatten().int().tolist()):
        last = 3 if state < 4 else 7
        steps = [min(state + k, last) for k in range(3)]
        assert batch["action"][i].flatten().tolist() == [-float(step) for step in steps]
        assert batch["action_is_pad"][i].tolist() == [state + k > last for k in range(3)]
        assert batch["complete"][i] == (state + 2 <= last or last == 3)  # what termination cuts is known
        length = min(3, last - state + 1)
        assert batch["reward"][i] == sum(2.0 ** (state + k) * 0.5**k for k in range(length))
        assert batch["next.observation.state"][i] == state + length and batch["discount"][i] == 0.5**length


def test_next_actions_are_of_steps_that_have_one() -> None:
    made = buffer(1, next_action=True)
    for t in range(3):
        made.add(row(t, terminated=t == 2, ended=t == 2))
    for t in range(5, 8):
        made.add(row(t, ended=t == 7))
    made.add(row(9))
    batch = made.sample(500)
    states = batch["observation.state"].flatten().int().tolist()
    assert set(states) == {0, 1, 2, 5, 6}  # what was truncated has none, nor has the newest; what terminated needs none
    for i, state in enumerate(states):
        assert state == 2 or batch["next.action"][i] == -state - 1
    empty = buffer(1, next_action=True)
    empty.add(row(0))
    with pytest.raises(RuntimeError, match="no step whose next action is known"):
        empty.sample(4)


def test_returns_to_go_are_known_when_the_episode_has_ended() -> None:
    made = buffer(1, to_go=True)
    for t in range(3):
        made.add(row(t, terminated=t == 2, ended=t == 2))
    for t in range(5, 7):
        made.add(row(t))
    disk: dict[str, Any] = {}
    saved(made, disk)  # before the second episode has ended
    assert returns(made) == {0: 3.0, 1: 4.0, 2: 4.0}  # 2^t 0.5^k makes each term 2^t
    made.cut()
    assert returns(made) == {0: 3.0, 1: 4.0, 2: 4.0, 5: 64.0, 6: 64.0}
    again = buffer(1, to_go=True)
    again.restore(loaded(saved(made, disk), disk), 0)
    again.add(row(9))
    assert returns(again) == returns(made)


def returns(made: ReplayBuffer) -> dict[int, float]:
    """State -> the return that its episode reached from there."""
    batch = made.sample(300)
    return dict(zip(batch["observation.state"].flatten().int().tolist(), batch["return_to_go"].tolist(), strict=True))
