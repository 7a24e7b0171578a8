"""Stepping environments to learn from them: where episodes end, what follows a step, and what to do about a fault."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..acting.evaluation import SUCCESSES, observation_batch, success_of
from ..data.batches import derive_seed
from ..data.features import describe
from ..envs.vector import Environments, FaultyEnvError, autoreset_mode, check_finite, executed
from ..errors import UserError


def describe_env(envs: Any) -> dict[str, dict[str, Any]]:
    """`spec` of an environment's transitions; its action carries the bounds, so that it is normalised to [-1, 1].

    A discrete action is a number `()` int64, and `classes` tells of how many.

    Raises:
        UserError: actions that are neither discrete (from 0) nor a vector with finite bounds, or observations that are
            neither vectors nor pictures.
    """
    action, space = envs.single_action_space, envs.single_observation_space
    discrete = hasattr(action, "n") and getattr(action, "shape", None) == ()
    if not discrete and (
        getattr(action, "shape", None) is None or len(action.shape) != 1 or not hasattr(action, "low")
    ):
        raise UserError(f"it has the action space {action}; expected a Discrete one, or a Box of one dimension")
    if discrete and getattr(action, "start", 0) != 0:
        raise UserError(f"it has the action space {action}; expected one whose first action is 0")
    if not discrete and not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise UserError(
            f"it has actions without bounds ({action}); expected bounds that are finite, as of a Box(-1, 1)"
        )
    if not all(hasattr(part, "low") for part in _parts(space)):
        raise UserError(
            f"it has the observation space {space}; expected Box, or a Dict of Box (try the wrapper FlattenObservation)"
        )
    observation, _ = envs.reset()
    first = {key: as_tensor(value)[0] for key, value in observation_batch(observation).items()}
    acted = torch.tensor(0) if discrete else torch.zeros(action.shape)
    item = first | {"action": acted, "reward": torch.tensor(0.0), "terminated": torch.tensor(False)}
    item |= {f"next.{key}": value for key, value in first.items()}
    spec = describe(item, {} if discrete else {"action": {"min": action.low, "max": action.high}})
    if discrete:
        spec["action"]["classes"] = int(action.n)
    return spec


def random_actions(envs: Any) -> np.ndarray:
    """Actions `[N, ...]`, drawn uniformly by torch's generator, as a policy gives them."""
    space, count = envs.single_action_space, envs.num_envs
    if not hasattr(space, "low"):
        return torch.randint(int(space.n), (count,)).numpy()
    return space.low + (space.high - space.low) * torch.rand(count, len(space.low)).numpy()


def _parts(space: Any) -> list[Any]:
    """The spaces in a Dict, and in the Dict of its pictures; any other space is its own only part."""
    named = space.spaces if isinstance(getattr(space, "spaces", None), dict) else {"": space}
    return [part for key, own in named.items() for part in (_parts(own) if key == "pixels" else [own])]


def as_tensor(array: np.ndarray) -> Tensor:
    """The same numbers as a tensor; pictures stay uint8 and discrete actions int64, everything else becomes float32."""
    return torch.from_numpy(array if array.dtype in KEPT else array.astype(np.float32))


KEPT = (np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int64))


def own(observation: Any) -> dict[str, np.ndarray]:
    """Observations by the names of the data, in memory of their own: an environment may write over what it gave."""
    named = observation_batch(observation)  # whose vectors are copies
    return {key: value if value.dtype == np.float32 else np.array(value) for key, value in named.items()}


class Collector:
    """The environments of one process, stepped for ever: the only place that knows Gymnasium's autoreset modes.

    A transition's successor is what followed its action, also at the end of an episode: under SAME_STEP that is
    `final_obs`, under NEXT_STEP and DISABLED the observation itself. The step in which NEXT_STEP only resets is no
    transition. So none crosses an episode.

    An environment that raises, hangs, dies or gives NaN or Inf is named and replaced, together with those that share
    its vector; what it gave is dropped, and the episodes that were going on count as truncated.

    Args:
        environments: Of this process.
        seed: Of the run; environment i of all processes gets seeds from (seed, i, step at the start, replacements).
        first: Index, over all processes, of this process's first environment.
        limit: Replacements before the run fails.
        say: Tells a line to the user.
        rewards: (shift, scale), what is added to every reward that is learnt from, and then its factor.
    """

    def __init__(
        self,
        environments: Environments,
        seed: int,
        first: int,
        limit: int,
        say: Callable[[str], None],
        rewards: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.environments, self.seed, self.first, self.limit, self.say = environments, seed, first, limit, say
        self.rewards = rewards
        self.started_at, self.replaced = 0, 0

    def start(self, step: int) -> None:
        """Begin new episodes in all environments. Raises RuntimeError beyond the limit of replacements."""
        self.started_at = step
        self.mode = autoreset_mode(self.environments.envs)
        while True:
            indices = range(self.first, self.first + self.environments.num_envs)
            self.seeds = [derive_seed(self.seed, i, step, self.replaced) % 2**31 for i in indices]
            n = len(self.seeds)
            self.returns, self.lengths = np.zeros(n), np.zeros(n, dtype=int)
            self.succeeded: list[bool | None] = [None] * n
            self.resetting = np.zeros(n, dtype=bool)  # under NEXT_STEP: the next step only resets
            try:
                observation, _ = self.environments.reset(seed=self.seeds)
                self.observation = own(observation)
                check_finite(self.observation, self.returns, range(n))
                return
            except FaultyEnvError as fault:
                self._replace(fault, None)

    def _replace(self, fault: FaultyEnvError, action: np.ndarray | None) -> None:
        """Say what happened, and make new environments. Raises RuntimeError beyond the limit."""
        text = fault.told(self.first, self.seeds, self.lengths, action)
        self.replaced += 1
        if self.replaced > self.limit:
            raise RuntimeError(f"{text}; replacement {self.replaced} is above --env-restarts {self.limit}") from fault
        self.say(f"{text}; replaced ({self.replaced} of {self.limit}), its episode is cut")
        try:
            self.environments.rebuild(derive_seed(self.seed, self.first, self.started_at, self.replaced) % 2**31)
        except FaultyEnvError as another:
            self._replace(another, None)
        except UserError as error:  # what the factory says when it cannot build; it could when the run began
            self._replace(FaultyEnvError(-1, f"cannot be made anew: {error}"), None)

    def step(self, action: np.ndarray) -> tuple[dict[str, Tensor] | None, list[dict[str, float]]]:
        """Act in all environments.

        Args:
            action: `[N, Da]` in the environments' units, float32; they get what their bounds allow of it. Or `[N]`, the
                numbers of discrete ones.

        Returns:
            (transitions, episodes that ended). A transition has `[N, ...]` observation, action as it was executed,
            `drawn`, the action as it was asked for, reward, terminated and `next.` keys, and two flags: `valid`, false
            for a step that only reset, and `ended`. None instead when the environments had to be replaced: the episodes
            before are cut. An episode has `env`, the place of its environment among all, and `episode_return`, ...

        Raises:
            RuntimeError: more faults than the limit.
        """
        envs = self.environments
        before, resetting = self.observation, self.resetting
        space = envs.single_action_space
        done = executed(action, space)
        try:
            observation, reward, terminated, truncated, info = envs.step(done)
            ended = np.asarray(terminated) | np.asarray(truncated)
            after = successor = own(observation)
            if self.mode == "samestep" and ended.any():
                successor = last_observations(after, info, ended)
            elif self.mode == "disabled" and ended.any():
                check_finite(after, reward, np.flatnonzero(~resetting))
                fresh, _ = envs.reset(options={"reset_mask": np.array(ended)})
                after = own(fresh)
            check_finite(after, reward, range(len(ended)))
            if successor is not after:
                check_finite(successor, reward, np.flatnonzero(~resetting))
        except FaultyEnvError as fault:
            self._replace(fault, done)
            self.start(self.started_at)
            return None, []
        self.observation = after
        self.resetting = ended if self.mode == "nextstep" else np.zeros_like(ended)
        transitions = {key: as_tensor(value) for key, value in before.items()}
        transitions |= {f"next.{key}": as_tensor(value) for key, value in successor.items()}
        shift, scale = self.rewards
        valid = ~resetting
        transitions |= {"action": as_tensor(done - getattr(space, "start", 0)), "drawn": as_tensor(action)}
        transitions["reward"] = torch.from_numpy(((np.asarray(reward) + shift) * scale).astype(np.float32))
        flags = {"terminated": np.array(terminated, dtype=bool), "ended": ended, "valid": valid}
        return transitions | {key: torch.from_numpy(flag) for key, flag in flags.items()}, self._count(
            reward, ended, valid, info
        )

    def _count(self, reward: np.ndarray, ended: np.ndarray, valid: np.ndarray, info: Any) -> list[dict[str, float]]:
        """Add up the episodes; returns those that ended: return, length, and success where it is told."""
        self.returns += np.where(valid, reward, 0.0)
        self.lengths += valid
        episodes: list[dict[str, float]] = []
        if not (ended.any() or info.keys() & SUCCESSES or "final_info" in info):
            return episodes
        for i in range(len(ended)):
            if valid[i] and (success := success_of(info, i)) is not None:
                self.succeeded[i] = bool(self.succeeded[i]) or success
            if valid[i] and ended[i]:
                episode: dict[str, float] = {"env": self.first + i}
                episode |= {"episode_return": float(self.returns[i]), "episode_length": float(self.lengths[i])}
                if self.succeeded[i] is not None:
                    episode["episode_success"] = float(bool(self.succeeded[i]))
                episodes.append(episode)
                self.returns[i], self.lengths[i], self.succeeded[i] = 0.0, 0, None
        return episodes

    def state_dict(self) -> dict[str, Any]:
        """The replacements so far and, where the vector environment can save its state, all the rest."""
        state: dict[str, Any] = {"replaced": self.replaced}
        save = getattr(self.environments.envs, "state_dict", None)
        if callable(save):
            state |= {"envs": save(), "seeds": self.seeds, "succeeded": self.succeeded}
            state["started_at"] = self.started_at
            state["observation"] = {key: torch.tensor(value) for key, value in self.observation.items()}
            state["counts"] = [torch.tensor(x) for x in (self.returns, self.lengths, self.resetting)]
        return state

    def restore(self, state: dict[str, Any], step: int) -> bool:
        """Go on where `state_dict` was taken, or begin new episodes; returns whether the old ones go on."""
        self.replaced = state.get("replaced", 0)
        load = getattr(self.environments.envs, "load_state_dict", None)
        self.start(step)
        if "envs" not in state or not callable(load):
            return False
        load(state["envs"])
        self.started_at, self.seeds, self.succeeded = state["started_at"], state["seeds"], state["succeeded"]
        self.observation = {key: value.numpy() for key, value in state["observation"].items()}
        self.returns, self.lengths, self.resetting = (value.numpy() for value in state["counts"])
        return True


def last_observations(after: dict[str, np.ndarray], info: Any, ended: np.ndarray) -> dict[str, np.ndarray]:
    """A copy of observations `[N, ...]` after a step that also reset, with `final_obs` where episodes `ended` `[N]`."""
    last = {key: np.array(value) for key, value in after.items()}
    for i in np.flatnonzero(ended):
        for key, value in observation_batch(_row(info["final_obs"], int(i))).items():
            last[key][i] = value[0]
    return last


def _row(values: Any, i: int) -> Any:
    """Environment i's entry of `final_obs`, as a batch of one; `values` lists entries, or is a dict of batches."""
    return {key: _row(value, i) for key, value in values.items()} if isinstance(values, dict) else _batch(values[i])


def _batch(value: Any) -> Any:
    return {key: _batch(part) for key, part in value.items()} if isinstance(value, dict) else np.asarray(value)[None]
