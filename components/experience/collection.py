"""Collection of transitions: the ends of episodes, the successor of each step, and faults of environments."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.features import SUCCESS, describe
from ..data.random_state import derive_seed
from ..envs.autoreset import Stepper
from ..envs.observations import SUCCESSES, observation_batch, success_of
from ..envs.vector import Environments, FaultyEnvError, action_bounds, check_finite, executed
from ..errors import UserError


def describe_env(envs: Any) -> dict[str, dict[str, Any]]:
    """`spec` of an environment's transitions. The action has its bounds as statistics, which normalise it to [-1, 1].

    A discrete action is a number `()` int64; `classes` is the number of actions. A Box of any shape is a vector `[Da]`.

    Raises:
        UserError: actions that are neither discrete (from 0) nor a Box with finite bounds, or observations that are
            neither vectors nor pictures.
    """
    action, space = envs.single_action_space, envs.single_observation_space
    discrete = hasattr(action, "n") and getattr(action, "shape", None) == ()
    if discrete and getattr(action, "start", 0) != 0:
        raise UserError(f"it has the action space {action}; expected one whose first action is 0 (see TransformAction)")
    low, high = (np.zeros(0), np.zeros(0)) if discrete else action_bounds(action)
    if not all(hasattr(part, "low") for part in _parts(space)):
        raise UserError(
            f"it has the observation space {space}; expected Box, or a Dict of Box (try the wrapper FlattenObservation)"
        )
    observation, _ = envs.reset()
    first = {key: as_tensor(value)[0] for key, value in observation_batch(observation, space).items()}
    acted = torch.tensor(0) if discrete else torch.zeros(low.shape)
    item = first | {"action": acted, "reward": torch.tensor(0.0), "terminated": torch.tensor(False)}
    item |= {f"next.{key}": value for key, value in first.items()}
    spec = describe(item, {} if discrete else {"action": {"min": low, "max": high}})
    if discrete:
        spec["action"]["classes"] = int(action.n)
    return spec


def _parts(space: Any) -> list[Any]:
    """The spaces in a Dict and in the nested Dict "pixels"; [space] for any other space."""
    named = space.spaces if isinstance(getattr(space, "spaces", None), dict) else {"": space}
    return [part for key, inner in named.items() for part in (_parts(inner) if key == "pixels" else [inner])]


def as_tensor(array: np.ndarray) -> Tensor:
    """Convert to a tensor; pictures stay uint8 and discrete actions int64, everything else becomes float32."""
    return torch.from_numpy(array if array.dtype in KEPT else array.astype(np.float32))


EXECUTED = "executed"  # what an environment within the environment was given in place of `action`
KEPT = (np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int64))


class Collector:
    """Steps the environments of one process, under any of Gymnasium's autoreset modes.

    The successor in a transition is the observation after its action, also at the end of an episode. The step in which
    NEXT_STEP only resets is not a transition. So no transition crosses the end of an episode.

    An environment that raises, hangs, dies or returns numbers that are not finite in float32 is reported and replaced,
    together with those that share its vector. The faulty step is dropped, and the current episodes are truncated.

    Args:
        environments: Of this process.
        seed: Of the run; environment i of all processes has seeds from (seed, i, step at the start, replacements).
        first: Index, over all processes, of this process's first environment.
        limit: Replacements before the run fails.
        say: Prints a line.
        rewards: (shift, scale) of the rewards that are learnt from: r -> (r + shift) * scale.
        guide: An expert that may act in the place of the policy; None for none.
    """

    def __init__(
        self,
        environments: Environments,
        seed: int,
        first: int,
        limit: int,
        say: Callable[[str], None],
        rewards: tuple[float, float] = (0.0, 1.0),
        guide: Any = None,
    ) -> None:
        self.environments, self.seed, self.first, self.limit, self.say = environments, seed, first, limit, say
        self.rewards, self.guide = rewards, guide
        self.started_at, self.replaced = 0, 0
        self.restored: dict[str, Any] = {}

    def start(self, step: int) -> None:
        """Begin new episodes in all environments. Raises RuntimeError beyond the limit of replacements."""
        self.started_at = step
        self.stepper = Stepper(self.environments)
        while True:
            indices = range(self.first, self.first + self.environments.num_envs)
            self.seeds = [derive_seed(self.seed, i, step, self.replaced) % 2**31 for i in indices]
            n = len(self.seeds)
            self.returns, self.lengths = np.zeros(n), np.zeros(n, dtype=int)
            self.succeeded: list[bool | None] = [None] * n
            try:
                self.observation, _ = self.stepper.reset(seed=self.seeds)
                check_finite(self.observation, self.returns)
                return
            except FaultyEnvError as fault:
                self._replace(fault, None)

    def _replace(self, fault: FaultyEnvError, action: np.ndarray | None) -> None:
        """Report a fault, and build new environments. Raises RuntimeError beyond the limit."""
        text = fault.describe(self.first, self.seeds, self.lengths, action)
        self.replaced += 1
        if self.replaced > self.limit:
            raise RuntimeError(f"{text}; replacement {self.replaced} is above --env-restarts {self.limit}") from fault
        self.say(f"{text}; replaced ({self.replaced} of {self.limit}), its episode is truncated")
        try:
            self.environments.rebuild(derive_seed(self.seed, self.first, self.started_at, self.replaced) % 2**31)
        except FaultyEnvError as another:
            self._replace(another, None)
        except UserError as error:  # a factory that cannot build now, although it could when the run began
            self._replace(FaultyEnvError(-1, f"cannot be rebuilt: {error}"), None)

    def step(self, action: np.ndarray, insist: bool = False) -> tuple[dict[str, Tensor] | None, list[dict[str, float]]]:
        """Step all environments.

        Args:
            action: `[N, Da]` in the environments' units, float32, which is clipped to their bounds, and rounded where
                they take whole numbers; or `[N]`, the numbers of discrete actions.
            insist: After a fault, step the new environments with the same action, until there is a transition.

        Returns:
            (transitions, episodes that ended). The transitions have `[N, ...]` observation, the executed `action`, the
            requested action as `drawn`, reward, terminated and `next.` keys, and three flags: `valid`, False for a step
            that only reset, `ended`, and `begins`, where the next action is the first of an episode. Where the
            environments tell, there are also `success`, and `executed`, what an environment within the environment was
            given in place of `action`. They are None when the environments had to be replaced, which truncates all
            episodes. An episode has `env`, the index of its environment over all processes, `episode_return`, ...

        Raises:
            RuntimeError: more faults than the limit.
        """
        advice, fault = {}, None
        if self.guide is not None:
            action, advice, fault = self.guide.advise(action, self.observation, self.stepper.resetting)
        transitions, episodes = self._step(action, advice) if fault is None else self._lost(fault, action)
        while insist and transitions is None:  # what an expert said was of another observation
            transitions, episodes = self._step(action, self.guide.nothing(len(action)) if self.guide else {})
        if self.guide is not None:
            self.guide.follow(transitions)
        return transitions, episodes

    def _lost(self, fault: FaultyEnvError, action: np.ndarray) -> tuple[None, list[dict[str, float]]]:
        """Begin anew after a fault."""
        self._replace(fault, action)
        self.start(self.started_at)
        return None, []

    def _step(
        self, action: np.ndarray, advice: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor] | None, list[dict[str, float]]]:
        """`step` once, whatever comes of it; `advice` is what the guide says of it, as columns."""
        before, space = self.observation, self.environments.single_action_space
        done = executed(action, space)
        shift, scale = self.rewards
        try:
            step = self.stepper.step(done)
            step.check()
            learned = step.reward
            if self.rewards != (0, 1):
                learned = (learned + shift) * scale
                check_finite({}, learned)
        except FaultyEnvError as fault:
            return self._lost(fault, done)
        self.observation = step.observation
        transitions = {key: as_tensor(value) for key, value in before.items()}
        transitions |= {f"next.{key}": as_tensor(value) for key, value in step.successor.items()}
        box = hasattr(space, "low")
        acted = done.reshape(len(done), -1).astype(np.float32) if box else done - space.start
        transitions |= {"action": as_tensor(acted), "drawn": as_tensor(action)}
        transitions["reward"] = torch.from_numpy(learned.astype(np.float32))
        flags = {"terminated": step.terminated, "ended": step.ended, "valid": step.valid, "begins": step.begins}
        transitions |= {key: torch.from_numpy(flag) for key, flag in flags.items()} | advice
        if isinstance(inner := getattr(self.environments.envs, "executed", None), np.ndarray):  # of `OnTop`
            transitions[EXECUTED] = as_tensor(inner.reshape(len(done), -1).astype(np.float32))
        told = step.info.keys() & SUCCESSES or "final_info" in step.info
        successes = [success_of(step.info, i) if told and step.valid[i] else None for i in range(len(done))]
        if any(success is not None for success in successes):
            transitions[SUCCESS] = torch.tensor([bool(success) for success in successes])
        return transitions, self._count(step.reward, step.ended, step.valid, successes)

    def _count(
        self, reward: np.ndarray, ended: np.ndarray, valid: np.ndarray, successes: list[bool | None]
    ) -> list[dict[str, float]]:
        """Update the episodes' counts; returns those that ended: return, length, and success where it is reported."""
        self.returns += reward
        self.lengths += valid
        episodes: list[dict[str, float]] = []
        if not (ended.any() or any(success is not None for success in successes)):
            return episodes
        for i, success in enumerate(successes):
            if success is not None:
                self.succeeded[i] = bool(self.succeeded[i]) or success
            if valid[i] and ended[i]:
                episode: dict[str, float] = {"env": self.first + i}
                episode |= {"episode_return": float(self.returns[i]), "episode_length": float(self.lengths[i])}
                if self.succeeded[i] is not None:
                    episode["episode_success"] = float(bool(self.succeeded[i]))
                episodes.append(episode)
                self.returns[i], self.lengths[i], self.succeeded[i] = 0.0, 0, None
        return episodes

    def random_actions(self) -> np.ndarray:
        """Actions `[N, ...]`, uniform within the bounds, from torch's generator, as a policy returns them."""
        space, count = self.environments.single_action_space, self.environments.num_envs
        if not hasattr(space, "low"):
            return torch.randint(int(space.n), (count,)).numpy()
        (low, high), whole = action_bounds(space), not np.issubdtype(space.dtype, np.floating)
        above = (high - low + whole) * torch.rand(count, len(low)).numpy()
        return (low + (np.floor(above) if whole else above)).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The guide's, the same on all processes."""
        return {"guide": self.guide.state_dict()} if self.guide else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        if self.guide:
            self.guide.load_state_dict(state["guide"])

    def rank_state(self) -> dict[str, Any]:
        """The number of replacements and, where the vector environment has `state_dict()`, the current episodes."""
        state: dict[str, Any] = {"replaced": self.replaced}
        save = getattr(self.environments.envs, "state_dict", None)
        if callable(save):
            state |= {"envs": save(), "seeds": self.seeds, "succeeded": self.succeeded}
            state["started_at"] = self.started_at
            state["steps"] = self.stepper.state_dict()
            state["counts"] = [torch.tensor(self.returns), torch.tensor(self.lengths)]
            state |= {"guide": self.guide.rank_state()} if self.guide else {}
        return state

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Keep the state of `rank_state`, from which `begin` continues."""
        self.restored = state

    def begin(self, step: int, *followers: Any) -> None:
        """Continue the episodes of the loaded state; or else start new ones, and let the followers cut theirs."""
        if not self._continue(step):
            for follower in followers:
                follower.cut()
        if self.guide:
            self.guide.begin()

    def _continue(self, step: int) -> bool:
        """Continue the episodes of the loaded state and return True; or else start new ones and return False."""
        state = self.restored
        self.replaced = state.get("replaced", 0)
        load = getattr(self.environments.envs, "load_state_dict", None)
        self.start(step)
        if "steps" not in state or not callable(load):
            return False
        load(state["envs"])
        self.started_at, self.seeds, self.succeeded = state["started_at"], state["seeds"], state["succeeded"]
        self.returns, self.lengths = (value.numpy() for value in state["counts"])
        self.stepper.load_state_dict(state["steps"])
        self.observation = self.stepper.latest
        if self.guide:
            self.guide.load_rank_state(state["guide"])
        return True
