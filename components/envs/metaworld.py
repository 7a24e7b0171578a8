"""Meta-World, 50 manipulation tasks with a simulated Sawyer arm."""

import os
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import UserError
from .workers import spread


def draw_off_screen() -> None:
    """Set up MuJoCo to render without a display, which its default on Linux requires."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")


@dataclass(frozen=True)
class MetaWorldEnv:
    """Meta-World v3: success ends an episode, and a seed determines the goal."""

    task: str = "push-v3"
    """One of the 50 tasks, such as push-v3, pick-place-v3, drawer-open-v3."""
    max_episode_steps: int = 200
    """Steps until an episode is cut; Meta-World's own limit is 500, its experts need 50 to 105."""
    render_mode: Literal["rgb_array"] | None = None
    """Render frames off screen."""
    cameras: tuple[str, ...] = ()
    """Cameras that are observed, such as behindGripper or corner2; the state is then hand and gripper alone."""
    image_size: int = 64
    """Height and width of their pictures."""
    workers: int = 0
    """Processes that share the environments; 0 steps them in this process."""

    def build(self, num_envs: int, seed: int) -> Any:
        """Make a vector environment.

        Raises:
            UserError: an unknown task, steps outside 1 to 500, or the package is missing.
        """
        if self.workers:
            return spread(replace(self, workers=0).build, num_envs, seed, self.workers)
        if not 1 <= self.max_episode_steps <= 500:
            raise UserError(
                f"--env.max-episode-steps {self.max_episode_steps} must be 1 to 500, Meta-World's own limit"
            )
        if self.image_size < 8:
            raise UserError(f"--env.image-size {self.image_size} must be 8 or more")
        if self.render_mode is not None or self.cameras:
            draw_off_screen()
        from gymnasium.vector import SyncVectorEnv

        from .metaworld_simulator import MetaWorld

        view: Any = {"render_mode": self.render_mode, "cameras": self.cameras, "image_size": self.image_size}
        envs = SyncVectorEnv([lambda: MetaWorld(self.task, self.max_episode_steps, **view)] * num_envs)
        envs.reset(seed=seed)
        return envs
