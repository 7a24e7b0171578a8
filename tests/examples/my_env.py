"""An environment: a Gymnasium environment, and a factory that makes a vector of it. `my_data.py` is evaluated in it.

PYTHONPATH=tests/examples python online_trainer.py --plugins my_env --env my_env --trainer sac --steps 10000
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from components import ENV_BUILDER_REGISTRY, register


class Reach(gym.Env):
    """Move a point to a goal. Observation: position, goal; action: velocity."""

    observation_space = gym.spaces.Box(-2, 2, (4,), np.float32)
    action_space = gym.spaces.Box(-0.1, 0.1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 4).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[:2] += np.clip(action, -0.1, 0.1)
        distance = float(np.linalg.norm(self.state[2:] - self.state[:2]))
        return self.state.copy(), -distance, distance < 0.05, False, {"success": distance < 0.05}


@register(ENV_BUILDER_REGISTRY, "my_env")
@dataclass(frozen=True)
class MyEnv:
    """Reach a goal in the plane."""

    max_episode_steps: int = 60
    """Steps until an episode is cut."""

    def build(self, num_envs, seed):
        def make():
            return gym.wrappers.TimeLimit(Reach(), self.max_episode_steps)

        return gym.vector.SyncVectorEnv([make] * num_envs)
