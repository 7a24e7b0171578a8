"""Demonstrations by Meta-World's scripted experts, or noisy data by them, generated and cached on disk."""

import atexit
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data.random_state import derive_seed
from ..data.tensor_files import save_tensors
from ..envs.metaworld import INSTRUCTIONS, draw_off_screen, sizes_drawn
from ..envs.observations import observation_batch
from ..errors import UserError, require
from ..parallel import end_with_parent, starter
from ..run.files import beside
from ..run.progress import phase
from .episodes import Scales, build, from_columns

logger = logging.getLogger(__name__)
RECIPE = 1  # part of the cache's name: count up when the demonstrations of the same options change
LARGE = 200  # from this many demonstrations on, several processes are faster, though their start takes about 4 s


@dataclass(frozen=True, kw_only=True)
class MetaWorldDemonstrations(Scales):
    """Scripted-expert demonstrations of a Meta-World task; each ends at its first success."""

    task: str = "push-v3"
    """One of the 50 tasks, such as push-v3, pick-place-v3, drawer-open-v3."""
    demos: int = 50
    """Episodes to generate: successful demonstrations; with noise or random actions, successful or not."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on the expert's actions, for data of offline RL."""
    random: float = 0.0
    """Fraction of the episodes in which all actions are random."""
    reward: Literal["dense", "sparse"] = "dense"
    """Meta-World's rewards, or 10 at success and 0 otherwise, here and in the environment."""
    reward_shift: float = -10.0
    """Added to every reward. Meta-World's rewards are 0 to 10, with 10 at success, which ends an episode: without a
    negative shift, continuing without success would be worth more."""
    reward_scale: float = 0.1
    """Factor on every reward, after the shift."""
    seed: int = 0
    """Seed of the goals; evaluation uses other goals."""
    max_episode_steps: int = 200
    """Steps until an attempt counts as failed, here and in the evaluation."""
    cameras: tuple[str, ...] = ()
    """Cameras whose pictures are rendered, such as behindGripper; the state is then hand and gripper alone."""
    image_size: int | tuple[int | str, ...] = 64
    """Height and width in which they are rendered: 64 for squares, 48 64, or behindGripper=64x64 corner2=48x64."""
    obs_steps: int = 1
    """Observation steps per sample, the last being now."""
    action_steps: int = 1
    """Action steps per sample; more than one makes chunks."""
    validation: float = 0.1
    """Fraction of the episodes to hold out: at least one, never more than a fifth of the rows; 0 for none."""
    workers: int = 0
    """Processes that generate demonstrations; 0 chooses by the number of demonstrations."""
    cache_dir: str = "~/.cache/tendon"
    """Folder that keeps finished demonstrations; empty for none."""

    renders = True
    env_name = "metaworld"  # the command line shows its options; `environment` says what they are
    debug_options = {"demos": 5}
    former_names = {"cache": "cache_dir"}

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return the demonstrations as {"dataset", "validation", "norm_stats", "env"}.

        Items: observation.state `[39]`, action `[4]` in [-1, 1], reward, terminated, truncated, next.observation.state.

        Raises:
            UserError: an unknown task, options that make no sense, an expert that fails too often, a missing package.
        """
        if self.seed < 0:
            raise UserError(f"--dataset.seed {self.seed} must be 0 or more")
        if self.demos < 1 or self.workers < 0:
            raise UserError(
                f"--dataset.demos {self.demos} must be 1 or more, --dataset.workers {self.workers} 0 or more"
            )
        if not 0 <= self.noise < math.inf or not 0 <= self.random <= 1:
            raise UserError(
                f"--dataset.noise {self.noise} must be 0 or more, --dataset.random {self.random} a fraction from 0 to 1"
            )
        if not 1 <= self.max_episode_steps <= 500:
            raise UserError(
                f"--dataset.max-episode-steps {self.max_episode_steps} must be 1 to 500, Meta-World's limit"
            )
        sizes_drawn(self.image_size, self.cameras, "--dataset.image-size")
        if self.cameras:
            draw_off_screen()
        require("metaworld", "metaworld")
        from ..envs.metaworld_simulator import REWARD_OF_SUCCESS, check_task

        check_task(self.task)
        columns, ends = self._load_or_make()
        if self.reward == "sparse":
            columns["reward"] = REWARD_OF_SUCCESS * columns["terminated"].float()
        episodes = self.scaled(from_columns(columns, ends, f"metaworld {self.task}"))
        episodes.generated, episodes.instruction = True, INSTRUCTIONS.get(self.task, "")
        window = (self.obs_steps, self.action_steps)
        built = self.with_scale(build(episodes, *window, self.validation, self.seed))
        return built | {"env": self.environment()}

    def environment(self) -> dict[str, Any]:
        """{"name", options} of the environment."""
        env = {"name": "metaworld", "task": self.task, "max_episode_steps": self.max_episode_steps}
        env |= {"reward": self.reward} if self.reward != "dense" else {}
        return env | ({"cameras": self.cameras, "image_size": self.image_size} if self.cameras else {})

    def _load_or_make(self) -> tuple[dict[str, Tensor], Tensor]:
        """Read the cache, or generate the demonstrations and cache them."""
        from importlib.metadata import version

        from safetensors import SafetensorError
        from safetensors.torch import load_file

        recipe = [RECIPE, self.task, self.demos, self.seed, self.max_episode_steps, version("metaworld")]
        if self.cameras:
            sizes: list[Any] = [*sizes_drawn(self.image_size, self.cameras).values()]
            side = sizes[0][0]
            recipe += [*self.cameras, *([side] if {*sizes} == {(side, side)} else sizes)]
        recipe += [self.noise, self.random] if self.noise or self.random else []
        digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
        path = Path(self.cache_dir).expanduser() / f"metaworld-{self.task}-{self.demos}-{digest}.safetensors"
        if self.cache_dir and path.exists():
            try:
                columns = load_file(path)
                return columns, columns.pop("episode_ends")
            except (SafetensorError, OSError, KeyError) as error:
                logger.warning("%s is damaged (%s); the demonstrations are made again", path, error)
        columns, ends = self._make()
        if self.cache_dir:
            temporary = beside(path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors({**columns, "episode_ends": ends}, temporary)
                temporary.replace(path)  # atomic: a killed run leaves no incomplete cache
            except (SafetensorError, OSError) as error:
                temporary.unlink(missing_ok=True)
                logger.warning("the demonstrations could not be cached in %s (%s)", path.parent, error)
        return columns, ends

    def _make(self) -> tuple[dict[str, Tensor], Tensor]:
        """Attempt goals in order until enough attempts have succeeded; the result is the same for any `workers`."""
        # The seeds of the goals: lists of 50 with large numbers, so that evaluation, with small seeds, has other goals.
        numbers = (50 * (derive_seed(self.seed, k // 50) % 10**8 + 10**8) + k % 50 for k in range(20 + 5 * self.demos))
        simulation = (self.task, self.max_episode_steps, self.cameras, self.image_size)
        noises = (self._noise(k) for k in itertools.count())
        tasks = ((number, *simulation, noise) for number, noise in zip(numbers, noises, strict=False))
        workers = self.workers or (min(os.cpu_count() or 1, 8) if self.demos >= LARGE else 1)
        logger.info("making %d demonstrations of %s", self.demos, self.task)
        episodes: list[dict[str, np.ndarray]] = []
        attempts = 0
        context, parent = multiprocessing.get_context("spawn"), starter()
        pool = ProcessPoolExecutor(workers, context, end_with_parent, parent) if workers > 1 else None
        try:
            with phase("making demonstrations", self.demos) as made:
                for episode in _in_order(pool, tasks, 8 * workers):
                    attempts += 1
                    if episode is not None:
                        episodes.append(episode)
                        made(len(episodes))
                    if len(episodes) == self.demos:
                        break
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
        if len(episodes) < self.demos:
            raise UserError(
                f"the expert of {self.task} solved {len(episodes)} of {attempts} goals within {self.max_episode_steps}"
                f" steps, {self.demos} were wanted; raise --dataset.max-episode-steps or lower --dataset.demos"
            )
        ends = torch.tensor([len(episode["action"]) for episode in episodes]).cumsum(0)
        columns = {key: torch.from_numpy(np.concatenate([e[key] for e in episodes])) for key in episodes[0]}
        return columns, ends

    def _noise(self, k: int) -> float | None:
        """Standard deviation of the noise of attempt k; infinite for random actions, None for a demonstration."""
        if not self.noise and not self.random:
            return None
        return math.inf if math.floor((k + 1) * self.random) > math.floor(k * self.random) else self.noise


def _in_order(pool: ProcessPoolExecutor | None, tasks: Any, ahead: int) -> Any:
    """Results of `demonstrate` in the order of `tasks`, with at most `ahead` of them in progress."""
    if pool is None:
        yield from (demonstrate(*task) for task in tasks)
        return
    waiting = []
    for task in tasks:
        waiting.append(pool.submit(demonstrate, *task))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    yield from (future.result() for future in waiting)


def demonstrate(
    seed: int,
    task: str,
    max_episode_steps: int,
    cameras: tuple[str, ...] = (),
    image_size: int | tuple[int | str, ...] = 64,
    noise: float | None = None,
) -> dict[str, np.ndarray] | None:
    """One attempt of the expert: columns `[T, ...]`, or None when it did not succeed in time.

    Args:
        noise: Standard deviation of the noise on its actions, infinite for random actions; then every attempt counts.
    """
    from ..envs.metaworld_simulator import expert

    env = _simulator(task, max_episode_steps, cameras, image_size)
    policy, generator = expert(task), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    rows: list[dict[str, Any]] = []
    done = False
    while not done:
        row: dict[str, Any] = _named(observation, "")
        action = np.clip(policy.get_action(env.state.astype(np.float64)), -1, 1)
        if noise is not None:
            uniform, normal = generator.uniform(-1, 1, action.shape), generator.standard_normal(action.shape)
            action = uniform if noise == math.inf else np.clip(action + noise * normal, -1, 1)
        row["action"] = action.astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(row["action"])
        row |= {"reward": np.float32(reward), "terminated": terminated, "truncated": truncated and not terminated}
        rows.append(row | _named(observation, "next."))
        done = terminated or truncated
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]} if terminated or noise is not None else None


def _named(observation: Any, prefix: str) -> dict[str, np.ndarray]:
    """One observation of the environment by the data's names."""
    one = {key: value[0] for key, value in observation_batch(_batched(observation)).items()}
    return {prefix + key: np.ascontiguousarray(value) for key, value in one.items()}


def _batched(observation: Any) -> Any:
    """An observation with a leading dimension of one."""
    if isinstance(observation, dict):
        return {key: _batched(value) for key, value in observation.items()}
    return np.asarray(observation)[None]


@lru_cache(maxsize=4)
def _simulator(*options: Any) -> Any:
    """One simulator per process and task, since building one takes longer than an episode."""
    from ..envs.metaworld_simulator import MetaWorld

    task, max_episode_steps, cameras, image_size = options
    simulator = MetaWorld(task, max_episode_steps, cameras=cameras, image_size=image_size)
    atexit.register(simulator.close)  # while the rendering libraries are still loaded
    return simulator
