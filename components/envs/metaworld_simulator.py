"""Meta-World's simulator as a Gymnasium environment whose `reset(seed=s)` determines the goal (MIT, Yu et al., 2019).

Meta-World's own `reset` ignores its seed: goals come from a list of 50 that the benchmark's constructor samples by its
own seed. Here seed s is goal `s % 50` of the list of seed `s // 50`, so one number determines an episode. Resets
without a seed run through one list after another, so that training always has new goals.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np

from ..errors import UserError, nearest, require
from .gymnasium import draw_fast, viewer_class
from .metaworld import sizes_drawn

require("metaworld", "metaworld")
from metaworld import MT1  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from metaworld.policies import ENV_POLICY_MAP  # noqa: E402

OffScreenViewer = viewer_class()
GOALS_PER_LIST = 50

# Its experts warn at every clipped action; the environment clips actions anyway.
warnings.filterwarnings("ignore", message="Constant.s. may be too high", category=UserWarning)


def check_task(task: str) -> None:
    """Raise UserError with the nearest names for a task that Meta-World does not have."""
    if task not in ALL_V3_ENVIRONMENTS:
        raise UserError(f"Meta-World has no task {task!r}; {nearest(task, ALL_V3_ENVIRONMENTS)}")


@lru_cache(maxsize=64)
def goals(task: str, list_seed: int) -> list[Any]:
    """The 50 goals that Meta-World samples for a task by one seed."""
    return MT1(task, seed=list_seed).train_tasks


def expert(task: str) -> Any:
    """Meta-World's scripted policy of a task; its actions may be outside [-1, 1]."""
    return ENV_POLICY_MAP[task]()  # type: ignore[abstract]


def upright(camera: str, frame: np.ndarray) -> np.ndarray:
    """A picture `[H, W, 3]`, rotated if it is from the camera `corner2`, which is mounted upside down."""
    return np.ascontiguousarray(frame[::-1, ::-1] if camera == "corner2" else frame)


REWARD_OF_SUCCESS = 10.0  # of the sparse rewards, and the largest of the dense ones
PROPRIOCEPTION = 4  # the observation's first entries: the hand's position and how far the gripper is open


class MetaWorld(gym.Env):
    """One task. Observation `[39]` float32 (its last three entries are the goal), action `[4]` in [-1, 1].

    With `cameras` the observation is {"agent_pos": `[4]`, hand and gripper; "pixels": {camera: `[H, W, 3]` uint8}}:
    only pictures show object and goal. `terminated` is set at the first success, `truncated` after `max_episode_steps`.

    Raises:
        UserError: an unknown task or camera, or pictures cannot be rendered on this machine.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(
        self,
        task: str,
        max_episode_steps: int,
        render_mode: str | None = None,
        cameras: Sequence[str] = (),
        image_size: int | Sequence[Any] = 64,
        reward: str = "dense",
    ) -> None:
        check_task(task)
        self.dense = reward == "dense"
        self.task, self.max_episode_steps, self.render_mode = task, max_episode_steps, render_mode
        self.script = expert(task)
        self.simulator = ALL_V3_ENVIRONMENTS[task]()
        model = self.simulator.model
        if render_mode is not None or cameras:
            draw_fast(model)
        self.action_space = self.simulator.action_space
        self.observation_space: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.cameras: dict[str, int] = {}
        self.viewers: dict[tuple[int, int], Any] = {}  # size -> that of the observed cameras
        self.sizes = sizes_drawn(image_size, cameras)
        self.film: Any = None  # the viewer of `render`
        known = [model.camera(i).name for i in range(model.ncam)]
        for name in cameras:
            if name not in known:
                raise UserError(f"Meta-World has no camera {name!r}; {nearest(name, known)}")
            self.cameras[name] = known.index(name)
        if cameras:
            try:
                for height, width in self.sizes.values():
                    if (height, width) not in self.viewers:
                        viewer = OffScreenViewer(model, self.simulator.data, width, height)
                        self.viewers[height, width] = viewer
            except Exception as error:
                needs = "it needs EGL (Debian: apt-get install libegl1 libgl1-mesa-dri)"
                raise UserError(f"pictures cannot be drawn here: {' '.join(str(error).split())}; {needs}") from error
            proprioception = gym.spaces.Box(-np.inf, np.inf, (PROPRIOCEPTION,), np.float32)
            pixels = gym.spaces.Dict([(n, gym.spaces.Box(0, 255, (*self.sizes[n], 3), np.uint8)) for n in cameras])
            self.observation_space = gym.spaces.Dict({"agent_pos": proprioception, "pixels": pixels})
        self.episode = self.left = self.steps = 0  # left: remaining episodes of the list

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start the episode of `seed`; without a seed, the next one of a random list."""
        super().reset(seed=seed)
        if seed is not None:
            self.episode, self.left = seed, 0
        elif self.left:
            self.episode, self.left = self.episode + 1, self.left - 1
        else:
            self.episode, self.left = GOALS_PER_LIST * int(self.np_random.integers(2**26)), GOALS_PER_LIST - 1
        which, goal = divmod(self.episode, GOALS_PER_LIST)
        self.steps = 0
        self.simulator.set_task(goals(self.task, which)[goal])
        observation, _ = self.simulator.reset()
        return self._observed(observation), {"success": 0.0}

    def _observed(self, observation: np.ndarray) -> Any:
        """The observation; the attribute `state` keeps the whole state for the expert."""
        self.state = observation.astype(np.float32)
        if not self.viewers:
            return self.state
        pixels = {}
        for camera, number in self.cameras.items():
            viewer = self.viewers[self.sizes[camera]]
            viewer.make_context_current()  # since other environments have contexts, too
            pixels[camera] = upright(camera, viewer.render("rgb_array", camera_id=number))
        return {"agent_pos": self.state[:PROPRIOCEPTION], "pixels": pixels}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, info = self.simulator.step(np.clip(action, -1, 1))
        self.steps += 1
        success = float(info["success"])
        truncated = self.steps >= self.max_episode_steps
        reward = float(reward) if self.dense else REWARD_OF_SUCCESS * success
        return self._observed(observation), reward, success > 0, truncated, {"success": success}

    def expert(self) -> np.ndarray:
        """The action `[4]` of Meta-World's scripted policy in this state, which it reads as a whole."""
        return np.clip(self.script.get_action(self.state.astype(np.float64)), -1, 1).astype(np.float32)

    def render(self) -> np.ndarray | None:
        """A picture `[384, 384, 3]` of hand, object and goal, which are small in Meta-World's own cameras."""
        if self.render_mode is None:
            return None
        if self.film is None:
            self.film = OffScreenViewer(self.simulator.model, self.simulator.data, 384, 384)
            self.film.cam.azimuth, self.film.cam.elevation, self.film.cam.distance = 135, -35, 1.4
            self.film.cam.lookat[:] = (0, 0.65, 0.12)
        self.film.make_context_current()  # since the observed cameras have a context, too
        return self.film.render("rgb_array", camera_id=-1)

    def close(self) -> None:
        for viewer in filter(None, (*self.viewers.values(), self.film)):
            viewer.free()
        self.simulator.close()
