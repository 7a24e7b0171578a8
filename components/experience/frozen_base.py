"""A frozen policy from a run folder, and what a trainer learns on top of it: corrections, or its noise.

Corrected: for the trainer, the frozen policy is a part of the environment. The residual policy observes the frozen
policy's action in [-1, 1] (`observation.base_action`). Its actions, also in [-1, 1], are corrections of at most `scale`
times half the range of the actions (Johannink et al., 2019; Silver et al., 2018); the sum, within the bounds, is
executed. So the frozen policy may have chunks, a history and noise.

Steered: for the trainer, the frozen policy is a module, which maps normalised observations and noise to a normalised
chunk. The run normalises as the frozen policy does.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import parallel
from ..acting.correction import CorrectedPolicy, Middle, fingerprint
from ..acting.inference import methods_of
from ..acting.policy import Policy
from ..acting.policy_folder import CORRECTED, STEERED, check_sum, copy_policy, describe, load_folder
from ..contracts import frozen_policy_of, window_of
from ..data.actions import robot_width
from ..data.features import BASE_ACTION
from ..datasets.episodes import EpisodeDataset, take
from ..envs.autoreset import Stepper
from ..envs.vector import action_bounds, executed
from ..errors import UserError
from ..run.checkpoint import steps
from ..run.policies import copy_chosen

logger = logging.getLogger(__name__)


class Base:
    """A frozen policy from a run folder, on top of which a trainer learns.

    Args:
        folder: Run folder, or its policy folder.
        origin: Run folder that the policy was copied from.

    Raises:
        UserError: no policy there, or a policy of discrete actions.
    """

    done = ""  # what is done to it
    record_name = ""  # of the file that is saved with the policy on top
    at_once = False  # whether the policy on top acts at each step, so that it cannot be late
    module: Any = None  # what the trainer gets

    def __init__(self, folder: Path, origin: str = "") -> None:
        self.origin, self.folder = origin, describe(folder)[0].parent
        self.policy = self.new()
        if "classes" in self.policy.spec["action"]:
            raise self.unfit(f"its actions are discrete, and cannot be {self.done}")
        self.sha256 = fingerprint(self.folder)

    def unfit(self, problem: str) -> UserError:
        """The error of a policy that does not do."""
        return UserError(f"--trainer.base {self.origin or self.folder}: {problem}")

    def new(self) -> Any:
        """A new instance of the policy, with separate episodes, that acts without delay."""
        return load_folder(self.folder, delay=0)

    def under(self, make: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
        """(num_envs, seed) -> vector environment in which the policy on top acts."""
        return make

    def whole(self, top: Policy) -> Any:
        """The policy on top together with this one."""
        return top

    def fit(self, spec: dict[str, Any]) -> dict[str, str] | None:
        """Modes of the normalisation that it needs, whose statistics join `spec` of the transitions; None for none."""
        return None

    def record(self) -> dict[str, Any]:
        """What is saved with the policy on top: the hash, ..."""
        return {"sha256": self.sha256}

    def save(self, folder: Path) -> None:
        """Copy the policy to `folder/base`.

        Raises:
            RuntimeError: its weights have changed since the run began.
        """
        if fingerprint(self.folder) != self.sha256:
            raise RuntimeError(f"{self.folder}: the frozen policy has changed while the run learnt")
        copy_policy(self.folder, folder / "base")


class Corrected(Base):
    """A frozen policy whose actions are corrected.

    Args:
        scale: Largest correction, as a fraction of half the range of an action.

    Raises:
        UserError: as `Base`, or a scale out of range.
    """

    done, record_name, at_once = "corrected", CORRECTED, True

    def __init__(self, folder: Path, scale: float, origin: str = "") -> None:
        super().__init__(folder, origin)
        self.scale = scale
        if not 0 < scale <= 2:
            raise UserError(f"--trainer.scale {scale} must be above 0 and at most 2, the whole range")

    def under(self, make: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
        """(num_envs, seed) -> vector environment that contains this policy."""

        def made(num_envs: int, seed: int) -> OnTop:
            envs = OnTop(make(num_envs, seed), self.new(), self.scale)
            self.sum = envs.sum
            return envs

        return made

    def whole(self, top: Policy) -> CorrectedPolicy:
        """This policy together with the one that corrects it."""
        return CorrectedPolicy(self.new(), top, self.sum)

    def record(self) -> dict[str, Any]:
        """Scale, bounds and hash."""
        bounds = {"low": self.sum.low.tolist(), "high": self.sum.high.tolist(), "clips": self.sum.clips}
        return {"scale": self.scale, **bounds, **super().record()}


class Steered(Base):
    """A frozen policy whose noise is chosen.

    Args:
        chunk: Actions of each of its chunks that are executed.

    Raises:
        UserError: as `Base`; a policy without noise, or with noise in each step of its sampler; a history, a task,
            actions in another form than they are executed in, or shorter chunks.
    """

    done, record_name = "steered", STEERED

    def __init__(self, folder: Path, origin: str = "", chunk: int = 1) -> None:
        super().__init__(folder, origin)
        if not isinstance(self.policy, Policy):
            raise self.unfit("it is a residual policy, which has no noise of its own; steer the one that it corrects")
        self.module = self.policy.module
        if not hasattr(self.module, "noise_shape"):
            raise self.unfit("it draws no noise, which could be chosen; steer a policy of --trainer flow or diffusion")
        if (sampler := getattr(self.module, "sampler", "")) in getattr(self.module, "random_samplers", ()):
            others = ", ".join(name for name in self.module.samplers if name not in self.module.random_samplers)
            raise self.unfit(f"{sampler} draws noise in every step; train it with --policy.sampler {others}")
        if self.policy.seen_steps > 1:
            raise self.unfit(f"it observes {self.policy.seen_steps} steps; train it with --dataset.obs-steps 1")
        if "task" in self.policy.spec:
            raise self.unfit("it is told a task, and environments tell none; steer a policy of one task")
        if self.policy.form.changes:
            raise self.unfit("its actions are relative to the state, or 6D; train it without --dataset.action")
        if chunk > self.policy.chunk:
            more = f"is more than the {self.policy.chunk} actions that the frozen policy plans"
            raise UserError(f"--trainer.chunk {chunk} {more}")
        for name in methods_of(self.policy.settings):
            left = f"the --policy.{name.replace('_', '-')} that it was trained with is left out"
            logger.warning("--trainer.base %s: %s, a steered chunk is executed as it is", self.origin or folder, left)

    def fit(self, spec: dict[str, Any]) -> dict[str, str]:
        """The modes of its normalisation. Its statistics, the shape of its noise and the limits of actions join `spec`.

        Raises:
            UserError: observations or actions of other shapes than the environment's.
        """
        own, normaliser = self.policy.spec, self.policy.normaliser
        for key in (*self.policy.observation_keys, "action"):
            here = tuple(spec.get(key, {}).get("shape", ()))
            there = self.policy.action_shape if key == "action" else tuple(own[key]["shape"])
            if here != there:
                changed = {"resized_from", "stored_shape"} & own[key].keys()
                remedy = "; train it without --dataset.image-size and --augment.crop" if changed else ""
                raise self.unfit(f"its {key!r} has shape {there}, the environment's {here or None}{remedy}")
        action = spec["action"]
        limits = torch.tensor([action["stats"]["min"], action["stats"]["max"]], dtype=torch.float32)
        action |= {"noise": list(self.module.noise_shape), "limits": normaliser({"action": limits})["action"].tolist()}
        for key in (*self.policy.observation_keys, "action"):
            if "stats" in own[key]:
                spec[key]["stats"] = own[key]["stats"]
        return {key: normaliser.modes.get(key, "none") for key in spec if not key.startswith("next.")}


def base_of(trainer: type, config: Any, run: Any) -> Base | None:
    """The frozen policy under a trainer, by its static `base(config) -> (run folder, scale or None)`; None without.

    It is copied into the run folder, so that the run can be moved, and resumed without the other run.

    Raises:
        UserError: no such policy, or a resumed run's has changed.
    """
    if (asked := frozen_policy_of(trainer, config)) is None:
        return None
    folder, scale = asked
    verb = "steer" if scale is None else "correct"

    def copy(to: Path) -> None:
        if not folder:
            raise UserError(f"--trainer.base is needed: the run folder of the policy to {verb}")
        copy_chosen(folder, to)

    def made() -> Base:
        for saved in steps(run.path / "checkpoints") if run.inherited.resumed else ():
            check_sum(saved)
        kept = run.inherited.copied("base", copy)
        if scale is None:
            return Steered(kept, folder, window_of(trainer, config).chunk)
        return Corrected(kept, scale, folder)

    base = parallel.in_turns(run.first, made)
    if run.inherited.keep("base", lambda: base.sha256) != base.sha256:
        raise UserError(f"{base.folder}: not the weights of the policy that was {base.done} until now; put them back")
    return base


def relabelled(data: dict[str, Any], base: Any) -> dict[str, Any]:
    """Demonstrations as transitions of `OnTop`: observations with the frozen policy's action, corrections as actions.

    A correction may exceed [-1, 1] here: the trainer learns from the sum, the action that was executed.

    Args:
        data: Result of a dataset's factory.

    Raises:
        UserError: no episodes, chunks, or incomplete episodes.
    """
    if getattr(base, "scale", None) is None or not data:
        return data
    dataset = data["dataset"]
    if not isinstance(dataset, EpisodeDataset) or dataset.action_steps > 1:
        raise UserError("a residual policy learns from single actions of episodes; name a plain dataset")
    if dataset.form is not None:
        raise UserError("a residual policy learns from actions as they are executed; leave out --dataset.action")
    episodes, policy = dataset.episodes, base.new()
    acted = torch.zeros(len(next(iter(episodes.observations.values()))), episodes.columns["action"].shape[1])
    known = torch.zeros(len(acted), dtype=torch.bool)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), episodes.ends[:-1]])
    for step in range(int(episodes.lengths.max()) + 1):  # of all episodes together; the last is their final observation
        at = episodes.at[(starts + step).clamp(max=len(episodes.at) - 1)]
        at = torch.where(episodes.lengths == step, episodes.after[episodes.ends - 1], at)
        at[episodes.lengths < step] = -1
        rows = (at >= 0).nonzero().squeeze(1)
        if len(rows):
            frames = {key: take(store, at[rows]).numpy() for key, store in episodes.observations.items()}
            acted[at[rows]] = torch.from_numpy(policy.act(frames, rows if step else None))
            known[at[rows]] = True
    needed = torch.cat([episodes.at, episodes.after[episodes.after >= 0]])
    if not bool(known[needed].all()):
        raise UserError("a residual policy needs the observations of whole episodes; name a plain dataset")
    shown, planned = episodes.columns["action"].numpy(), acted[episodes.at].numpy()
    correction = base.sum.correction(planned, shown)
    columns = episodes.columns | {"action": torch.from_numpy(correction)}
    observations = episodes.observations | {BASE_ACTION: torch.from_numpy(base.sum.normalised(acted.numpy()))}
    whole = replace(episodes, columns=columns, observations=observations)
    return data | {"dataset": EpisodeDataset(whole, dataset.rows, dataset.obs_steps), "norm_stats": {}}


class OnTop:
    """A `gymnasium.vector.VectorEnv` that contains a frozen policy; everything else is delegated to the environment.

    It supports all autoreset modes: the frozen policy also acts on the last observation of an episode, and is reset for
    the next episode.

    Raises:
        UserError: actions that are no Box with finite bounds, or of another width than the policy's.
    """

    def __init__(self, envs: Any, policy: Policy, scale: float) -> None:
        import gymnasium as gym

        self.envs, self.policy = envs, policy
        space = envs.single_action_space
        if not hasattr(space, "low"):
            raise UserError(f"it has the action space {space}; a correction needs a Box with bounds")
        low, high = action_bounds(space)
        width = robot_width(policy.spec["action"])
        if len(low) != width:
            raise UserError(f"it takes actions of width {len(low)}, the policy of --trainer.base has {width}")
        self.sum = Middle(low, high, scale)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, low.shape, np.float32)
        self.steps = Stepper(envs, renews=False)  # whoever steps this one resets it
        if callable(getattr(self.envs, "state_dict", None)):  # else nothing can be saved, and episodes begin anew
            self.state_dict, self.load_state_dict = self._state, self._load_state
        observation, _ = self.reset()
        parts: dict[str, Any] = {}
        for key, value in observation.items():
            least, most = (0, 255) if value.dtype == np.uint8 else (-np.inf, np.inf)
            parts[key] = gym.spaces.Box(least, most, value.shape[1:], dtype=value.dtype.type)
        self.single_observation_space = gym.spaces.Dict(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["envs"], name)

    def _state(self) -> dict[str, Any]:
        """The environment's `state_dict`, and the frozen policy's part of the current episodes."""
        own = {"action": torch.tensor(self.action), "steps": self.steps.state_dict()}
        return own | {"envs": self.envs.state_dict(), "policy": self.policy.rank_state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `_state`."""
        self.envs.load_state_dict(state["envs"])
        self.policy.load_rank_state(state["policy"])
        self.action = state["action"].numpy()
        self.steps.load_state_dict(state["steps"])

    def reset(self, **keywords: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """As the environment's `reset`; the seeds fix the frozen policy's noise, too."""
        mask = (keywords.get("options") or {}).get("reset_mask")
        named, info = self.steps.reset(**keywords)
        if mask is None:
            seed = keywords.get("seed")
            self.policy.reset(seed if isinstance(seed, list) else None)
            self.action = self.policy.act(named)
        else:
            self._begin(named, mask)
        return self._with_action(named), info

    def step(self, correction: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's `step`, with the sum of both actions."""
        done = self.sum.corrected(self.action, np.asarray(correction))
        self.executed = executed(done, self.envs.single_action_space)  # as evaluations ask
        step = self.steps.step(self.executed)
        named, info = step.observation, step.info
        if step.successor is not named:  # the frozen policy acts on the last observations, then on the new
            self.action = self.policy.act(step.successor)
            info = info | {"final_obs": self._with_action(step.successor), "_final_obs": step.ended}
            self._begin(named, step.ended)
        else:
            self.policy.restart(torch.from_numpy(np.flatnonzero(step.begins)))
            self.action = self.policy.act(named)
        return self._with_action(named), step.reward, step.terminated, step.truncated, info

    def _begin(self, named: dict[str, np.ndarray], begins: np.ndarray) -> None:
        """Begin an episode of the frozen policy where `begins` `[N]` holds; the other rows are unchanged."""
        rows = np.flatnonzero(begins)
        at = torch.from_numpy(rows)
        self.policy.restart(at)
        self.action = np.array(self.action)
        self.action[rows] = self.policy.act({key: value[rows] for key, value in named.items()}, at)

    def _with_action(self, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return named | {BASE_ACTION: self.sum.normalised(self.action)}
