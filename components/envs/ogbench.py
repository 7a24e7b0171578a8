"""OGBench's environments (Park et al., 2025), with five goals each, and their single-task variants."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import UserError, nearest, require
from .metaworld import draw_off_screen
from .workers import spread

TASKS = 5


@dataclass(frozen=True)
class OGBenchEnv:
    """An environment of OGBench: success ends an episode, and a seed determines the episode and its task."""

    id: str = "pointmaze-medium-v0"
    """Environment, such as pointmaze-medium-v0 (the goal is observed) or cube-single-singletask-task2-v0."""
    task: int = 0
    """Task of an environment with goals, 1 to 5; 0 takes all five in turn, by the seeds."""
    max_episode_steps: int | None = None
    """Steps until an episode is cut; None keeps the limit that is registered with the id."""
    success_timing: Literal["pre", "post"] = "pre"
    """Whether the reward of a single task is computed before an action, as in ogbench since 1.2, or after it."""
    render_mode: Literal["rgb_array"] | None = None
    """Render frames off screen."""
    workers: int = 0
    """Processes that share the environments; 0 steps them in this process."""

    def build(self, num_envs: int, seed: int) -> Any:
        """Make a vector environment.

        Raises:
            UserError: an unknown id or task, or the package is missing.
        """
        if self.workers:
            return spread(replace(self, workers=0).build, num_envs, seed, self.workers)
        if not 0 <= self.task <= TASKS:
            raise UserError(f"--env.task {self.task} must be 1 to {TASKS}, or 0 for all in turn")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise UserError(f"--env.max-episode-steps {self.max_episode_steps} must be 1 or more")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about spaces, and about a display that is not used
            draw_off_screen()  # MuJoCo reads the setting when it is first imported
            require("ogbench", 'ogbench "mujoco==3.3.0"')
            import gymnasium as gym

            if self.id not in gym.registry:
                known = [name for name, spec in gym.registry.items() if "ogbench" in str(spec.entry_point)]
                raise UserError(f"--env.id {self.id}: no environment of ogbench; {nearest(self.id, known)}")
            envs = gym.vector.SyncVectorEnv([self._one] * num_envs, autoreset_mode="SameStep")
            envs.reset(seed=seed)
        return envs

    def _one(self) -> Any:
        """One environment, wrapped."""
        import gymnasium as gym

        from .ogbench_wrappers import GoalInObservation, SeededEverywhere

        single = "singletask" in self.id
        options: dict[str, Any] = {"success_timing": self.success_timing} if single else {}
        if self.max_episode_steps is not None:
            options["max_episode_steps"] = self.max_episode_steps
        env = gym.make(self.id, render_mode=self.render_mode, disable_env_checker=True, **options)
        return SeededEverywhere(env if single else GoalInObservation(env, self.task))
