"""Meta-World's simulator as a Gymnasium environment whose `reset(seed=s)` alone fixes the goal (MIT, Yu et al., 2019).

Meta-World's own `reset` ignores its seed: goals come from a list of 50 that the benchmark's constructor draws from
*its* seed. Here seed s is goal `s % 50` of the list of seed `s // 50`, so an episode is known by one number.
"""

import warnings
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np

from ..errors import UserError, nearest, require

require("metaworld", "metaworld")
from metaworld import MT1  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from metaworld.policies import ENV_POLICY_MAP  # noqa: E402

GOALS_PER_LIST = 50

# Its experts warn at every clipped action; the clipping is what the environment does anyway.
warnings.filterwarnings("ignore", message="Constant.s. may be too high", category=UserWarning)


def check_task(task: str) -> None:
    """Raise UserError with the nearest names for a task that Meta-World does not have."""
    if task not in ALL_V3_ENVIRONMENTS:
        raise UserError(f"Meta-World has no task {task!r}; {nearest(task, ALL_V3_ENVIRONMENTS)}")


@lru_cache(maxsize=64)
def goals(task: str, list_seed: int) -> list[Any]:
    """The 50 goals that Meta-World draws for a task from one seed."""
    return MT1(task, seed=list_seed).train_tasks


def expert(task: str) -> Any:
    """Meta-World's scripted policy of a task; it may ask for actions outside [-1, 1]."""
    return ENV_POLICY_MAP[task]()  # type: ignore[abstract]


class MetaWorld(gym.Env):
    """One task. Observation `[39]` float32 (its last three entries are the goal), action `[4]` in [-1, 1].

    `terminated` is set at the first success, `truncated` after `max_episode_steps`.

    Raises:
        UserError: an unknown task.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(
        self, task: str, max_episode_steps: int, render_mode: str | None = None, camera: str = "corner2"
    ) -> None:
        check_task(task)
        self.task, self.max_episode_steps, self.render_mode = task, max_episode_steps, render_mode
        view: dict[str, Any] = (
            {}
            if render_mode is None
            else {"render_mode": render_mode, "camera_name": camera, "width": 256, "height": 256}
        )
        self.simulator = ALL_V3_ENVIRONMENTS[task](**view)
        if render_mode is not None:
            # MuJoCo's default quality costs 10 to 40 times more in software; it can only be set before the first frame.
            model = self.simulator.model
            model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
            model.light_castshadow[:] = 0
            model.mat_reflectance[:] = 0
        self.action_space = self.simulator.action_space
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.goals, self.goal, self.steps = 0, -1, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the episode that `seed` stands for; without a seed, the next one of the same list."""
        if seed is None:
            self.goal = (self.goal + 1) % GOALS_PER_LIST
        else:
            self.goals, self.goal = divmod(seed, GOALS_PER_LIST)
        self.steps = 0
        self.simulator.set_task(goals(self.task, self.goals)[self.goal])
        observation, _ = self.simulator.reset()
        return observation.astype(np.float32), {"success": 0.0}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = self.simulator.step(np.clip(action, -1, 1))
        self.steps += 1
        success = float(info["success"])
        truncated = self.steps >= self.max_episode_steps
        return observation.astype(np.float32), float(reward), success > 0, truncated, {"success": success}

    def render(self) -> np.ndarray | None:
        """The `corner2` camera sees the scene upside down, so its picture is turned."""
        frame = self.simulator.render()
        return None if frame is None else np.ascontiguousarray(frame[::-1, ::-1])

    def close(self) -> None:
        self.simulator.close()
