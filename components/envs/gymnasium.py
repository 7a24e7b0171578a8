"""Any environment that is registered with Gymnasium."""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from ..errors import UserError, nearest, require
from ..records import too_deep
from .workers import spread


@dataclass(frozen=True)
class GymnasiumEnv:
    """An environment by its Gymnasium id; a plugin may register further ones."""

    id: str = "Pendulum-v1"
    """Registered id, such as Pendulum-v1, HalfCheetah-v5, or module:MyEnv-v0."""
    max_episode_steps: int | None = None
    """Steps until an episode is cut; None keeps the limit that is registered with the id."""
    workers: int = 0
    """Processes that share slow environments; 0 steps them in this process."""
    wrappers: tuple[str, ...] = ()
    """Wrappers of gymnasium.wrappers around each environment, innermost first, as NAME or NAME:JSON with their
    arguments, such as RescaleAction:{"min_action": -1, "max_action": 1}."""
    render_mode: Literal["rgb_array"] | None = None
    """Render frames off screen."""
    kwargs: str = ""
    """Arguments of the environment as JSON, such as '{"continuing_task": false}'."""

    def reaches(self) -> list[tuple[str, str, str]]:
        """The options that import a module, open a file or write one: (option, module or "", what it does)."""
        found = []
        if ":" in self.id:
            module = self.id.partition(":")[0]
            found.append(("id", module, f"imports the module {module}"))
        if not all(map(is_word, texts_of(self._kwargs()))):
            found.append(("kwargs", "", "may name a file"))
        for text in self.wrappers:
            name, _, arguments = text.partition(":")
            if name.startswith("Record") or not all(map(is_word, texts_of(self._arguments(text, arguments)))):
                found.append(("wrappers", "", "may name a file"))
        return found

    def build(self, num_envs: int, seed: int) -> Any:
        """Make a vector environment, which resets in the step that ends an episode.

        Raises:
            UserError: an unknown id, or a package that the environment needs is missing.
        """
        if self.workers:
            return spread(replace(self, workers=0).build, num_envs, seed, self.workers)
        gym = require("gymnasium", "gymnasium")
        if self.id.startswith("ALE/"):  # its games are registered on request, and need no display
            gym.register_envs(require("ale_py", "ale-py"))
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
            wrappers = [self._wrapper(gym, text) for text in self.wrappers]
            envs = gym.make_vec(self.id, num_envs, vectorization_mode="sync", wrappers=wrappers, **options)
        except gym.error.DependencyNotInstalled as error:
            raise UserError(f"--env.id {self.id}: {error}") from error
        except ModuleNotFoundError as error:
            raise UserError(f"--env.id {self.id}: {str(error).partition('.')[0]}; install its package") from error
        except gym.error.UnregisteredEnv as error:
            raise UserError(f"--env.id {self.id}: {error}; {nearest(self.id, gym.registry)}") from error
        envs.reset(seed=seed)
        return envs

    def _wrapper(self, gym: Any, text: str) -> Any:
        """One of `wrappers` as a function of an environment. Raises UserError: unknown, or bad arguments."""
        name, _, arguments = text.partition(":")
        known = [word for word in gym.wrappers.__all__ if word != "vector"]
        if name not in known:
            raise UserError(f"--env.wrappers {name}: no wrapper of gymnasium.wrappers; {nearest(name, known)}")
        options = self._arguments(text, arguments)
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}

        def wrap(env: Any) -> Any:
            try:
                return getattr(gym.wrappers, name)(env, **options)
            except gym.error.DependencyNotInstalled as error:
                raise UserError(f"--env.wrappers {name}: {error}") from error
            except Exception as error:
                raise UserError(f"--env.wrappers {text}: {type(error).__name__}: {error}") from error

        return wrap

    def _arguments(self, text: str, arguments: str) -> dict[str, Any]:
        """The arguments of one of `wrappers`. Raises UserError: no JSON object."""
        return json_object(arguments, f"--env.wrappers {text}: expected NAME:JSON with an object")

    def _kwargs(self) -> dict[str, Any]:
        """The option `kwargs` as a dict. Raises UserError: no JSON object."""
        return json_object(self.kwargs, f"--env.kwargs {self.kwargs}: expected a JSON object")


def follow_robots(envs: Any) -> None:
    """Set up MuJoCo's environments for a film: their camera `track` follows the robot, and drawing is fast.

    Walkers leave the picture of the camera that Gymnasium uses. One that the environment's arguments name stays.
    """
    with contextlib.suppress(ImportError):  # without MuJoCo there is none
        viewer_class()
    for env in getattr(getattr(envs, "unwrapped", None), "envs", None) or ():
        base = getattr(env, "unwrapped", None)
        model: Any = getattr(base, "model", None)
        if not (hasattr(model, "ncam") and hasattr(model, "vis")):
            continue
        draw_fast(model)
        renderer: Any = getattr(base, "mujoco_renderer", None)
        cameras = [model.camera(i).name for i in range(model.ncam)]
        chosen = any("camera" in key for key in getattr(env.spec, "kwargs", ()))
        if "track" in cameras and hasattr(renderer, "camera_id") and not chosen:
            renderer.camera_id = cameras.index("track")


def viewer_class() -> Any:
    """Gymnasium's viewer of MuJoCo off screen, which fails once where it cannot be opened, as without EGL.

    As it comes, it raises again when it is collected, and prints that, since it frees a context that it never had.
    """
    from gymnasium.envs.mujoco.mujoco_rendering import OffScreenViewer

    OffScreenViewer.opengl_context = SimpleNamespace(free=lambda: None)  # until it has its own
    return OffScreenViewer


def draw_fast(model: Any) -> None:
    """Leave out shadows and the like: in software, MuJoCo's default quality takes 10 to 40 times longer.

    It has no effect after the first frame.
    """
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0


def json_object(text: str, problem: str) -> dict[str, Any]:
    """A JSON object; an empty text is an empty one. Raises UserError that begins with `problem`."""
    try:
        found = json.loads(text or "{}")
        if not isinstance(found, dict) or too_deep(found):
            raise ValueError(f"found {type(found).__name__}, or one that is nested too deeply")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{problem} ({error})") from error
    return found


def texts_of(value: Any) -> list[str]:
    """All texts in a JSON value, but for the keys of objects."""
    if isinstance(value, (dict, list)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in texts_of(item)]
    return [value] if isinstance(value, str) else []


def is_word(text: str) -> bool:
    """Whether a text can name neither a file nor a module: letters, digits, - and _ alone."""
    return len(text) < 100 and text.replace("-", "").replace("_", "").isalnum() or not text
