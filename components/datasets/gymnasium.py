"""Rollouts in any environment of Gymnasium, of random actions or of a run's policy."""

import logging
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from ..contracts import Place
from ..envs.autoreset import Stepper
from ..envs.gymnasium import GymnasiumEnv
from ..envs.observations import observation_batch
from ..envs.vector import Environments, action_bounds, executed
from ..errors import UserError, one_line
from ..run.progress import counted
from .episodes import Scales, build, flat_names, from_columns

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GymnasiumRollouts(Scales):
    """Episodes played in an environment of Gymnasium."""

    id: str = "Pendulum-v1"
    """Registered id, such as Pendulum-v1, HalfCheetah-v5, or module:MyEnv-v0."""
    episodes: int = 100
    """Episodes to play."""
    policy: Annotated[str, Place()] = ""
    """Run folder of the policy; empty for random actions."""
    noise: float = 0.0
    """Deviation of Gaussian noise on the policy's actions, as a fraction of half their range."""
    random: float = 0.0
    """Fraction of the episodes in which all actions are random, also with --dataset.policy."""
    max_episode_steps: int | None = None
    """Steps until an episode is cut; None keeps the limit that is registered with the id."""
    kwargs: str = ""
    """Arguments of the environment as JSON, such as '{"continuing_task": false}'."""
    image_size: tuple[int | str, ...] = ()
    """Height and width to which its pictures are resized, as for recordings."""
    obs_steps: int = 1
    """Observation steps per sample, the last being now."""
    action_steps: int = 1
    """Action steps per sample; more than one makes chunks."""
    validation: float = 0.1
    """Fraction of the episodes to hold out: at least one, never more than a fifth of the rows; 0 for none."""
    seed: int = 0
    """Seed of the first episode and of the noise; evaluation uses others."""

    env_name = "gymnasium"
    debug_options = {"episodes": 5}

    def reaches(self) -> list[tuple[str, str, str]]:
        """As `GymnasiumEnv.reaches`."""
        return GymnasiumEnv(id=self.id, kwargs=self.kwargs).reaches()

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return the episodes as {"dataset", "validation", "norm_stats", "env"}.

        Items: observation.X, action `[Da]`, reward, terminated, truncated, next.observation.X.

        Raises:
            UserError: an unknown id, an action space that is no box, options that make no sense, a missing package.
        """
        if self.episodes < 1 or not 0 <= self.random <= 1 or not self.noise >= 0 or self.seed < 0:
            raise UserError(
                f"--dataset.episodes {self.episodes} must be 1 or more, --dataset.random {self.random} 0 to 1,"
                f" --dataset.noise {self.noise} and --dataset.seed {self.seed} 0 or more"
            )
        factory = GymnasiumEnv(id=self.id, max_episode_steps=self.max_episode_steps, kwargs=self.kwargs)
        envs = Environments(factory.build, 1, self.seed, 0.0)
        try:
            with one_line(f"--dataset.id {self.id}"):
                if hasattr(space := envs.single_action_space, "n"):
                    raise UserError(f"it has the action space {space}; this reader plays those with a Box")
                bounds = action_bounds(space)
            rows, ends = self._play(envs, *bounds, kwargs.get("opt_params", {}).get("save_dir", ""))
            names = names_of(envs)
        finally:
            envs.close()
        columns = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
        episodes = self.scaled(from_columns(columns, torch.tensor(ends), f"gymnasium {self.id}"))
        episodes.names, episodes.generated = names, True
        episodes.resize(self.image_size)
        window = (self.obs_steps, self.action_steps)
        built = self.with_scale(build(episodes, *window, self.validation, self.seed))
        return built | {"env": self.environment()}

    def environment(self) -> dict[str, Any]:
        """{"name", options} of the environment."""
        env = {"id": self.id, "max_episode_steps": self.max_episode_steps, "kwargs": self.kwargs}
        return {"name": "gymnasium", **env}

    def _play(
        self, envs: Any, low: np.ndarray, high: np.ndarray, save_dir: str
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Play the episodes within these bounds; returns all steps, and the step after each episode's last one."""
        from ..acting.policy_folder import load_folder

        policy = load_folder(kept_policy(self.policy, save_dir)) if self.policy else None
        stepper, generator = Stepper(envs), np.random.default_rng(self.seed)
        middle, half = (high + low) / 2, (high - low) / 2
        rows: list[dict[str, Any]] = []
        ends: list[int] = []
        logger.info("playing %d episodes of %s", self.episodes, self.id)
        for episode in counted(range(self.episodes), "playing episodes"):
            now, _ = stepper.reset(seed=[self.seed + episode])
            acts = policy is not None and int((episode + 1) * self.random) == int(episode * self.random)
            if policy is not None:
                policy.reset(seeds=[self.seed + episode])
            done = False
            while not done:
                uniform, normal = generator.uniform(-1, 1, low.shape), generator.standard_normal(low.shape)
                action = middle + half * uniform
                if acts and policy is not None:
                    action = policy.act(now)[0] + self.noise * half * normal
                taken = executed(action.astype(np.float32)[None], envs.single_action_space)
                step = stepper.step(taken)
                step.check(step.valid)
                done, terminated = bool(step.ended[0]), bool(step.terminated[0])
                row = {key: value[0] for key, value in now.items()} | {"action": taken.reshape(-1).astype(np.float32)}
                row |= {"terminated": terminated, "truncated": done and not terminated}
                row |= {f"next.{key}": value[0] for key, value in step.successor.items()}
                rows.append(row | {"reward": np.float32(step.reward[0])})
                now = step.observation
            ends.append(len(rows))
        return rows, ends


def kept_policy(policy: str, save_dir: str) -> Path:
    """The folder to load a policy from: a copy in the run that plays it, which may be resumed without the other run.

    Args:
        save_dir: Folder of the run that the episodes are for; "" for none, and the policy's own folder.
    """
    from ..run.policies import choose, copy_chosen

    kept = Path(save_dir) / "inherited" / f"policy-{zlib.crc32(policy.encode()):08x}"
    if save_dir and kept.exists():
        return kept
    if not save_dir:
        return choose(policy).folder
    temporary = kept.with_name(f".{kept.name}-{os.getpid()}")
    copy_chosen(policy, temporary)
    try:
        temporary.rename(kept)
    except OSError:  # another machine was faster
        shutil.rmtree(temporary)
    return kept


def names_of(envs: Any) -> dict[str, list[str]]:
    """Names of the dimensions of vectors of several axes."""
    action, space = envs.single_action_space, envs.single_observation_space
    spaces = getattr(space, "spaces", {"": space})
    names = {"action": flat_names("action", action.shape)} if len(action.shape) != 1 else {}
    for name, part in spaces.items():
        if getattr(part, "shape", None) is not None and len(part.shape) != 1:
            one = np.zeros((1, *part.shape), part.dtype)
            for key, value in observation_batch({name: one} if name else one, space).items():
                if value.ndim == 2:
                    names[key] = flat_names(name or key.removeprefix("observation."), part.shape)
    return names
