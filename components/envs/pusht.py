"""Push-T, in gym-pusht's simulation (Chi et al., 2023; Florence et al., 2021)."""

import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..errors import UserError, require
from .workers import spread


def hold(observation: dict[str, np.ndarray], last: np.ndarray) -> np.ndarray:
    """The actions `[n, 2]`, positions, with which agents stay where they go to, at first where they are."""
    return np.where(np.isnan(last), observation["observation.state"][:, :2], last)


@dataclass(frozen=True)
class PushTEnv:
    """Push-T: an episode ends when the block covers more than 95 % of its goal."""

    max_episode_steps: int = 300
    """Steps until an episode is cut, at 10 a second."""
    render_mode: Literal["rgb_array"] | None = None
    """Render frames off screen."""
    workers: int = 0
    """Processes that share the environments; 0 steps them in this process."""

    def build(self, num_envs: int, seed: int) -> Any:
        """Make a vector environment; `coverage` of its info, the covered share of the goal, is tracked.

        Raises:
            UserError: no steps, or gym-pusht is missing.
        """
        if self.workers:
            shared = spread(replace(self, workers=0).build, num_envs, seed, self.workers)
            shared.hold = hold
            return shared
        if self.max_episode_steps < 1:
            raise UserError(f"--env.max-episode-steps {self.max_episode_steps} must be 1 or more")
        if "pygame" not in sys.modules:  # whose import prints a greeting and warnings
            import os

            os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require("gym_pusht", "gym-pusht")
        import gymnasium as gym

        def make() -> Any:
            env = gym.make(
                "gym_pusht/PushT-v0", obs_type="state", render_mode=self.render_mode, disable_env_checker=True
            )
            return gym.wrappers.TimeLimit(env.unwrapped, self.max_episode_steps)

        envs: Any = gym.vector.SyncVectorEnv([make] * num_envs)
        envs.tracked, envs.hold = ("coverage",), hold
        envs.reset(seed=seed)
        return envs
