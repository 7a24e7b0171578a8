"""Any environment that is registered with Gymnasium."""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError, nearest, require


@dataclass(frozen=True)
class GymnasiumEnv:
    """An environment by its Gymnasium id; a plugin may register its own."""

    id: str = "Pendulum-v1"
    """Registered id, such as Pendulum-v1, HalfCheetah-v5, or module:MyEnv-v0."""
    max_episode_steps: int | None = None
    """Steps until an episode is cut; None keeps the limit that is registered with the id."""
    vectorization_mode: Literal["sync", "async"] = "sync"
    """All environments in this process, or each in one of its own: for slow ones."""
    render_mode: Literal["rgb_array"] | None = None
    """Draw frames off screen."""
    kwargs: str = ""
    """Arguments of the environment as JSON, such as '{"continuing_task": false}'."""

    def build(self, num_envs: int, seed: int) -> Any:
        """Make a vector environment, which resets in the step that ends an episode.

        Raises:
            UserError: an unknown id, or a package that the environment needs is missing.
        """
        gym = require("gymnasium", "gymnasium")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise UserError(f"--env.max-episode-steps {self.max_episode_steps} must be 1 or more")
        if self.render_mode is not None and sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's default needs a display
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # and so does pygame's
        asked = {"max_episode_steps": self.max_episode_steps, "render_mode": self.render_mode}
        options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        options |= self._kwargs()
        try:
            options["vector_kwargs"] = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
            envs = gym.make_vec(self.id, num_envs, vectorization_mode=self.vectorization_mode, **options)
        except gym.error.DependencyNotInstalled as error:
            raise UserError(f"--env.id {self.id}: {error}") from error
        except ModuleNotFoundError as error:
            raise UserError(f"--env.id {self.id}: {str(error).partition('.')[0]}; install its package") from error
        except gym.error.UnregisteredEnv as error:
            raise UserError(f"--env.id {self.id}: {error}; {nearest(self.id, gym.registry)}") from error
        envs.reset(seed=seed)
        return envs

    def _kwargs(self) -> dict[str, Any]:
        try:
            kwargs = json.loads(self.kwargs or "{}")
            if not isinstance(kwargs, dict):
                raise ValueError(f"found {type(kwargs).__name__}")
        except ValueError as error:
            raise UserError(f"--env.kwargs {self.kwargs}: expected a JSON object ({error})") from error
        return kwargs
