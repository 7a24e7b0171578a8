"""Rollouts in any environment of Gymnasium, of random actions or of a run's policy."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..envs.gymnasium import GymnasiumEnv
from ..envs.observations import observation_batch
from ..errors import UserError, require
from .episodes import Scales, build, from_columns

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GymnasiumRollouts(Scales):
    """Episodes played in an environment of Gymnasium."""

    id: str = "Pendulum-v1"
    """Registered id, such as Pendulum-v1, HalfCheetah-v5, or module:MyEnv-v0."""
    episodes: int = 100
    """Episodes to play."""
    policy: str = ""
    """Run folder of the policy; empty for random actions."""
    noise: float = 0.0
    """Deviation of Gaussian noise on the policy's actions, as a fraction of half their range."""
    random: float = 0.0
    """Fraction of the episodes in which all actions are random, also with --dataset.policy."""
    max_episode_steps: int | None = None
    """Steps until an episode is cut; None keeps the limit that is registered with the id."""
    kwargs: str = ""
    """Arguments of the environment as JSON, such as '{"continuing_task": false}'."""
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

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return the episodes as {"dataset", "validation", "norm_stats", "env"}.

        Items: observation.X, action `[Da]`, reward, terminated, truncated, next.observation.X.

        Raises:
            UserError: an unknown id, an action space that is no box, options that make no sense, a missing package.
        """
        gym = require("gymnasium", "gymnasium")
        if self.episodes < 1 or not 0 <= self.random <= 1 or not self.noise >= 0 or self.seed < 0:
            raise UserError(
                f"--dataset.episodes {self.episodes} must be 1 or more, --dataset.random {self.random} 0 to 1,"
                f" --dataset.noise {self.noise} and --dataset.seed {self.seed} 0 or more"
            )
        factory = GymnasiumEnv(id=self.id, max_episode_steps=self.max_episode_steps, kwargs=self.kwargs)
        envs = factory.build(1, self.seed)
        try:
            space = envs.single_action_space
            if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not np.isfinite(space.high).all():
                raise UserError(f"--dataset.id {self.id}: it has the action space {space}; expected a box of vectors")
            rows, ends = self._play(envs)
        finally:
            envs.close()
        columns = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
        episodes = self.scaled(from_columns(columns, torch.tensor(ends), f"gymnasium {self.id}"))
        window = (self.obs_steps, self.action_steps)
        built = self.with_scale(build(episodes, *window, self.validation, self.seed))
        env = {"id": self.id, "max_episode_steps": self.max_episode_steps, "kwargs": self.kwargs}
        return built | {"env": {"name": "gymnasium", **env}}

    def _play(self, envs: Any) -> tuple[list[dict[str, Any]], list[int]]:
        """Play the episodes; returns all steps, and the step after each episode's last one."""
        from tqdm import tqdm

        from ..acting.policy_folder import load_policy

        policy = load_policy(self.policy) if self.policy else None
        space, generator = envs.single_action_space, np.random.default_rng(self.seed)
        middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
        rows: list[dict[str, Any]] = []
        ends: list[int] = []
        logger.info("playing %d episodes of %s", self.episodes, self.id)
        for episode in tqdm(range(self.episodes), unit="episode", disable=None, leave=False):
            observation, _ = envs.reset(seed=[self.seed + episode])
            acts = policy is not None and int((episode + 1) * self.random) == int(episode * self.random)
            if policy is not None:
                policy.reset(seeds=[self.seed + episode])
            done = False
            while not done:
                now = observation_batch(observation)
                uniform, normal = generator.uniform(-1, 1, space.shape), generator.standard_normal(space.shape)
                action = middle + half * uniform
                if acts and policy is not None:
                    action = policy.act(now)[0] + self.noise * half * normal
                action = np.clip(action, space.low, space.high).astype(np.float32)
                observation, reward, terminated, truncated, info = envs.step(action[None].astype(space.dtype))
                done = bool(terminated[0] or truncated[0])
                then = observation_batch(final_of(observation, info) if done else observation)
                flags = {"terminated": bool(terminated[0]), "truncated": bool(truncated[0] and not terminated[0])}
                row = {key: value[0] for key, value in now.items()} | {"action": action, **flags}
                row |= {f"next.{key}": value[0] for key, value in then.items()}
                rows.append(row | {"reward": np.float32(reward[0])})
            ends.append(len(rows))
        return rows, ends


def final_of(observation: Any, info: dict[str, Any]) -> Any:
    """The last observation of an episode, as a batch of one, where the environment resets in the same step."""
    final = info["final_obs"][0] if "final_obs" in info else None
    if final is None:
        return observation
    return {key: np.asarray(value)[None] for key, value in final.items()} if isinstance(final, dict) else final[None]
