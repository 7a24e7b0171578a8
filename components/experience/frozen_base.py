"""A frozen policy with a small one on top: what both do is their sum, within what the environment takes.

To whatever learns the small policy the frozen one is a part of the environment: it observes what that one would do, in
[-1, 1] (`observation.base_action`), and its own actions, in [-1, 1] too, are corrections of at most `scale` times half
the range of the actions (Johannink et al., 2019; Silver et al., 2018). So the frozen policy may plan in chunks, look
back and draw noise.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..acting.evaluation import observation_batch
from ..acting.policy import Policy
from ..acting.saved import describe, load_policy
from ..datasets.episodes import EpisodeDataset, take
from ..envs.vector import autoreset_mode
from ..errors import UserError
from .collection import last_observations

BASE_ACTION = "observation.base_action"


class Base:
    """A frozen policy from a run folder, and how far another one may correct it.

    Args:
        folder: Run folder, or its policy folder.
        scale: Largest correction, as a fraction of half the range of an action.

    Raises:
        UserError: no policy there, or it gives discrete actions.
    """

    def __init__(self, folder: Path, scale: float) -> None:
        self.folder, self.scale = describe(folder)[0].parent, scale
        if "classes" in self.new().spec["action"]:
            raise UserError(f"--trainer.base {folder}: its actions are discrete, and cannot be corrected")
        if not 0 < scale <= 2:
            raise UserError(f"--trainer.scale {scale} must be above 0 and at most 2, the whole range")
        self.sha256 = fingerprint(self.folder)

    def new(self) -> Policy:
        """The policy, with an episode of its own."""
        return load_policy(self.folder)

    def under(self, make: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
        """(num_envs, seed) -> vector environment, with this policy in it."""

        def made(num_envs: int, seed: int) -> OnTop:
            envs = OnTop(make(num_envs, seed), self.new(), self.scale)
            self.sum = envs.sum
            return envs

        return made

    def corrected(self, correction: Policy) -> "CorrectedPolicy":
        """This policy with one that corrects it."""
        return CorrectedPolicy(self.new(), correction, self.sum)

    def save(self, folder: Path) -> None:
        """Put the policy beside the one that corrects it, and say in `residual.json` how both go together.

        Raises:
            RuntimeError: its weights are not what they were when the run began.
        """
        if fingerprint(self.folder) != self.sha256:
            raise RuntimeError(f"{self.folder}: the frozen policy has changed while the run learnt")
        shutil.copytree(self.folder, folder / "base")
        how = {"scale": self.scale, "low": self.sum.low.tolist(), "high": self.sum.high.tolist(), "sha256": self.sha256}
        (folder / "residual.json").write_text(json.dumps(how, indent=1) + "\n")


def fingerprint(folder: Path) -> str:
    """Of a policy's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def base_of(trainer: Any, config: Any, run: Path, first: bool) -> Base | None:
    """The frozen policy that a trainer corrects, by its static `base(config) -> (run folder, scale)`; None without.

    It is kept in the folder of the run, so that this can go on wherever it is.

    Raises:
        UserError: no such policy.
    """
    if not hasattr(trainer, "base"):
        return None
    folder, scale = trainer.base(config)
    kept = run / "base"
    if first and not kept.exists():
        if not folder:
            raise UserError("--trainer.base is needed: the run folder of the policy to correct")
        shutil.copytree(describe(folder)[0].parent, kept)
    return Base(kept, scale)


def relabelled(data: dict[str, Any], base: Base | None) -> dict[str, Any]:
    """Demonstrations as `OnTop` would show them: what the frozen policy would have done, and how it would be corrected.

    Where the demonstrated action is out of the correction's reach, the step is left out, and the episode is cut there:
    as a step of the largest correction it would claim for that one what only the demonstrator could do.

    Args:
        data: What a dataset's factory returned.

    Raises:
        UserError: no episodes, chunks, or observations that the frozen policy lacks; nothing within reach.
    """
    if base is None or not data:
        return data
    dataset = data["dataset"]
    if not isinstance(dataset, EpisodeDataset) or dataset.action_steps > 1:
        raise UserError("a residual policy learns from single actions of episodes; name a plain dataset")
    episodes, policy = dataset.episodes, base.new()
    acted = torch.zeros(len(next(iter(episodes.observations.values()))), episodes.columns["action"].shape[1])
    known = torch.zeros(len(acted), dtype=torch.bool)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), episodes.ends[:-1]])
    for step in range(int(episodes.lengths.max()) + 1):  # all episodes together; the last one acts on what followed
        at = episodes.at[(starts + step).clamp(max=len(episodes.at) - 1)]
        at = torch.where(episodes.lengths == step, episodes.after[episodes.ends - 1], at)
        at[episodes.lengths < step] = -1
        rows = (at >= 0).nonzero().squeeze(1)
        if len(rows):
            seen = {key: take(store, at[rows]).numpy() for key, store in episodes.observations.items()}
            acted[at[rows]] = torch.from_numpy(policy.act(seen, rows if step else None))
            known[at[rows]] = True
    seen_at = torch.cat([episodes.at, episodes.after[episodes.after >= 0]])
    if not bool(known[seen_at].all()):
        raise UserError("a residual policy needs the observations of whole episodes; name a plain dataset")
    shown, planned = episodes.columns["action"].numpy(), acted[episodes.at].numpy()
    correction = base.sum.correction(planned, shown)
    missed = np.abs(base.sum.corrected(planned, correction) - shown)
    beyond = torch.from_numpy((missed > 1e-4 * base.sum.half).any(1))  # [N]
    if bool(beyond[dataset.rows].all()):
        raise UserError(
            f"no action of {episodes.name} is within --trainer.scale {base.scale} of what the frozen policy does"
        )
    cut = beyond.nonzero().squeeze(1)
    ends = torch.cat([episodes.ends, cut, cut + 1]).unique()
    columns = episodes.columns | {"action": torch.from_numpy(correction)}
    observations = episodes.observations | {BASE_ACTION: torch.from_numpy(base.sum.normalised(acted.numpy()))}
    whole = replace(episodes, columns=columns, observations=observations, ends=ends[ends > 0])
    rows = dataset.rows[~beyond[dataset.rows]]
    return data | {"dataset": EpisodeDataset(whole, rows, dataset.obs_steps), "norm_stats": {}}


class Middle:
    """Corrections in [-1, 1] as actions of an environment, and its actions as numbers in [-1, 1]."""

    def __init__(self, low: np.ndarray, high: np.ndarray, scale: float) -> None:
        self.low, self.high, self.scale = low, high, scale
        self.middle, self.half = (high + low) / 2, (high - low) / 2

    def corrected(self, base: np.ndarray, correction: np.ndarray) -> np.ndarray:
        """The sum, within bounds."""
        return np.clip(base + self.scale * self.half * correction, self.low, self.high).astype(np.float32)

    def correction(self, base: np.ndarray, action: np.ndarray) -> np.ndarray:
        """What makes an action of the frozen policy's, as far as it goes; none where the bounds alone do."""
        cut = np.clip((action - base) / (self.scale * self.half), -1, 1)
        bounded = ((action >= self.high) & (base >= self.high)) | ((action <= self.low) & (base <= self.low))
        return np.where(bounded, 0, cut).astype(np.float32)

    def normalised(self, base: np.ndarray) -> np.ndarray:
        """What the frozen policy does, as it is observed."""
        return (np.clip((base - self.middle) / self.half, -1, 1)).astype(np.float32)


class OnTop:
    """A `gymnasium.vector.VectorEnv` with a frozen policy in it; all else is the environment's.

    Any autoreset mode will do: the frozen policy acts on what follows a step, also at the end of an episode, and begins
    anew with the next one.

    Raises:
        UserError: actions that are no vectors with bounds.
    """

    def __init__(self, envs: Any, policy: Policy, scale: float) -> None:
        import gymnasium as gym

        self.envs, self.policy = envs, policy
        space = envs.single_action_space
        if not (hasattr(space, "low") and len(space.shape) == 1 and np.isfinite(space.high).all()):
            raise UserError(f"it has the action space {space}; a correction needs a Box of one dimension with bounds")
        width = policy.spec["action"]["shape"][-1]
        if space.shape[0] != width:
            raise UserError(f"it takes actions of width {space.shape[0]}, the policy of --trainer.base gives {width}")
        self.sum = Middle(space.low, space.high, scale)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, space.shape, np.float32)
        self.same_step = autoreset_mode(envs) == "samestep"
        self.resets = np.zeros(envs.num_envs, dtype=bool)  # the rows whose next step only resets
        observation, _ = self.reset()
        parts: dict[str, Any] = {}
        for key, value in observation.items():
            low, high = (0, 255) if value.dtype == np.uint8 else (-np.inf, np.inf)
            parts[key] = gym.spaces.Box(low, high, value.shape[1:], dtype=value.dtype.type)
        self.single_observation_space = gym.spaces.Dict(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["envs"], name)

    def reset(self, **keywords: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """As the environment's own; the seeds fix the frozen policy's noise, too."""
        observation, info = self.envs.reset(**keywords)
        mask = (keywords.get("options") or {}).get("reset_mask")
        named = observation_batch(observation)
        if mask is None:
            seed = keywords.get("seed")
            self.policy.reset(seed if isinstance(seed, list) else None)
            self.action = self.policy.act(named)
            self.resets[:] = False
        else:
            self._begin(named, np.flatnonzero(mask))
        return self._with_action(named), info

    def step(self, correction: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's own, by the sum of both actions."""
        done = self.sum.corrected(self.action, np.asarray(correction))
        observation, reward, terminated, truncated, info = self.envs.step(
            done.astype(self.envs.single_action_space.dtype)
        )
        named = observation_batch(observation)
        ended = np.asarray(terminated) | np.asarray(truncated)
        begins, self.resets = self.resets, ended & (not self.same_step)
        if self.same_step and ended.any():  # the frozen policy sees the last observations first, then the new ones
            last = last_observations(named, info, ended)
            self.action = self.policy.act(last)
            info = info | {"final_obs": self._with_action(last)}
            self._begin(named, np.flatnonzero(ended))
        else:
            self.policy.restart(torch.from_numpy(np.flatnonzero(begins)))
            self.action = self.policy.act(named)
        return self._with_action(named), reward, terminated, truncated, info

    def _begin(self, named: dict[str, np.ndarray], rows: np.ndarray) -> None:
        """Let the frozen policy begin an episode in `rows`, while the others wait."""
        at = torch.from_numpy(rows)
        self.policy.restart(at)
        self.action = np.array(self.action)
        self.action[rows] = self.policy.act({key: value[rows] for key, value in named.items()}, at)
        self.resets[rows] = False

    def _with_action(self, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return named | {BASE_ACTION: self.sum.normalised(self.action)}


class CorrectedPolicy:
    """A frozen policy and one that corrects it, with the interface of `Policy`.

    Args:
        frozen: The frozen one; settings of acting are its own.
        correction: What is added.
        bounds: Of the environment's actions, and the scale of the correction.
    """

    def __init__(self, frozen: Policy, correction: Policy, bounds: Middle) -> None:
        self.frozen, self.correction, self.bounds = frozen, correction, bounds
        self.spec, self.obs_steps, self.observation_keys = frozen.spec, frozen.obs_steps, frozen.observation_keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["frozen"], name)

    def configure(self, **settings: Any) -> "CorrectedPolicy":
        """As `Policy.configure`, of the frozen one."""
        self.frozen.configure(**settings)
        self.correction.reset()
        return self

    def reset(self, seeds: Any = None) -> None:
        """As `Policy.reset`."""
        self.frozen.reset(seeds)
        self.correction.reset(seeds)

    def restart(self, rows: torch.Tensor) -> None:
        """As `Policy.restart`."""
        self.frozen.restart(rows)
        self.correction.restart(rows)

    def act(self, observation: dict[str, Any], rows: torch.Tensor | None = None) -> np.ndarray:
        """As `Policy.act`."""
        base = self.frozen.act(observation, rows)
        seen = observation | {BASE_ACTION: self.bounds.normalised(base)}
        return self.bounds.corrected(base, self.correction.act(seen, rows))


def with_base(folder: Path, correction: Policy) -> Any:
    """The policy of a folder with what it corrects, if it has that. Raises UserError: a damaged folder."""
    path = folder / "residual.json"
    if not path.exists():
        return correction
    try:
        how = json.loads(path.read_text())
        low, high = (np.array(how[name], dtype=np.float32) for name in ("low", "high"))
        bounds, sha256 = Middle(low, high, float(how["scale"])), how["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    base = load_policy(folder / "base")
    if fingerprint(folder / "base") != sha256:
        raise UserError(f"{folder / 'base'}: not the weights of the policy that was corrected")
    return CorrectedPolicy(base, correction, bounds)
