"""Wrappers of OGBench's environments: the goal in the observation, and episodes that depend on their seed alone."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np

# Some environments create their spaces at every access, with this warning.
warnings.filterwarnings("ignore", message=".*precision lowered by casting", category=UserWarning)


class GoalInObservation(gym.Wrapper):
    """Observations {"observation": `[Ds]`, "goal": `[Ds]`}; seed s plays task 1 + s % 5 unless `task` is set."""

    def __init__(self, env: gym.Env, task: int) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        self.observation_space = gym.spaces.Dict({"observation": space, "goal": space})
        self.task, self.next, self.goal = task, 0, np.zeros(space.shape)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; without a seed, one of the next task."""
        self.next = (self.next if seed is None else seed) + 1
        task = self.task or 1 + (self.next - 1) % self.env.unwrapped.num_tasks  # type: ignore[attr-defined]
        observation, info = self.env.reset(seed=seed, options={"task_id": task} | (options or {}))
        self.goal = np.asarray(info["goal"])
        return {"observation": observation, "goal": self.goal}, {"task": task}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = {"success": info["success"]}
        return {"observation": observation, "goal": self.goal}, float(reward), terminated, truncated, info


class SeededEverywhere(gym.Wrapper):
    """Keeps a separate state of numpy's global generator for an environment that draws from it."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.own = np.random.RandomState(0).get_state()
        self.metadata = env.metadata | {"render_modes": ["rgb_array"], "render_fps": 20}  # which some do not declare

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.own = np.random.RandomState(seed % 2**32).get_state()
        return self._with_own(lambda: self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._with_own(lambda: self.env.step(action))
        return observation, reward, terminated, truncated, {"success": info["success"]}

    def _with_own(self, call: Any) -> Any:
        """Call with the environment's state of the generator; afterwards the global state is restored."""
        others = np.random.get_state()
        np.random.set_state(self.own)
        try:
            return call()
        finally:
            self.own = np.random.get_state()
            np.random.set_state(others)
