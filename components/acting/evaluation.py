"""Evaluation in an environment: a fixed list of seeds, one episode each, on any slot or process."""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts import options_of
from ..data.actions import robot_width
from ..data.features import frame_shape, same_frame
from ..data.pictures import IMAGES
from ..envs.autoreset import Stepper
from ..envs.observations import info_value, observation_batch, success_of, task_of
from ..envs.vector import Environments, FaultyEnvError, action_width, executed
from ..errors import UserError, one_line
from ..intervals import wilson
from .divided import Divided
from .film import film_episodes
from .jerk import Jerk, jerk_of
from .policy import Policy, motionless
from .recordings import Recordings

MAX_STEPS = 100_000  # a longer episode means that the environment lacks a time limit


def choose_env(args: Any, offered: dict[str, Any] | None) -> tuple[str, Any]:
    """The environment and its options, in order of precedence from the command line, the dataset, and the defaults.

    Args:
        args: With `given`, which returns whether the command line sets an option, `env` and `env_options`, which become
            what is returned: a run records these.
        offered: {"name", options} of the dataset, or None.

    Returns:
        (name, options); the name is "none" where no environment is known.
    """
    from .. import ENV_BUILDER_REGISTRY

    offered, options = dict(offered or {}), args.env_options
    given = [f.name for f in fields(options) if args.given(f"env.{f.name.replace('_', '-')}")]
    explicit = {name: getattr(options, name) for name in given}
    name = args.env if args.given("env") else offered.get("name", args.env if explicit else "none")
    if name not in ENV_BUILDER_REGISTRY:
        args.env, args.env_options = "none", options_of(object)
        return "none", None
    if name == offered.get("name"):
        args.env, args.env_options = offered_env(offered, **explicit)
    else:
        args.env, args.env_options = name, options_of(ENV_BUILDER_REGISTRY[name], explicit)
    return args.env, args.env_options


def offered_env(offered: dict[str, Any], **explicit: Any) -> tuple[str, Any]:
    """Name and options of the environment that a dataset offers, {"name", options}; `explicit` options override."""
    from .. import ENV_BUILDER_REGISTRY

    values = offered.get("options", {}) | {k: v for k, v in offered.items() if k not in ("name", "options")}
    return offered["name"], options_of(ENV_BUILDER_REGISTRY[offered["name"]], values | explicit)


def check_env(envs: Any, spec: dict[str, Any]) -> None:
    """Refuse an environment whose actions or observations do not match the data.

    Raises:
        UserError: names both widths, or the key that is missing.
    """
    space, action = envs.single_action_space, spec["action"]
    if "classes" in action:
        if getattr(space, "n", None) != action["classes"]:
            raise UserError(f"it has the action space {space}; the policy chooses among {action['classes']} actions")
    elif not hasattr(space, "low"):
        raise UserError(
            f"it has the action space {space}; the data's actions are vectors of width {robot_width(action)}"
        )
    elif action_width(space) != robot_width(action):
        widths = f"{action_width(space)}, the dataset and the model have {robot_width(action)}"
        raise UserError(f"it takes actions of width {widths}")
    observation, _ = envs.reset()
    parts = (
        {k: v for k, v in observation.items() if k != "pixels"} if isinstance(observation, dict) else {"": observation}
    )
    if any(isinstance(part, tuple | dict) for part in parts.values()):
        raise UserError(f"it has the observation space {envs.single_observation_space}; expected Box or a Dict of Box")
    found = observation_batch(observation, envs.single_observation_space)
    for key in (key for key in spec if key.startswith("observation.")):
        if key not in found:
            raise UserError(f"it returns {', '.join(found)}, the policy needs {key!r}")
        stored = frame_shape(spec[key], 1)
        frame = found[key].shape[1:]
        if not same_frame(spec[key], frame, stored[-len(frame) :]):
            have, want = (shape[0] if len(frame) == 1 else tuple(shape) for shape in (frame, stored[-len(frame) :]))
            remedy = "; see --dataset.image-size" if len(frame) == 3 else ""
            raise UserError(f"it returns {key!r} of width {have}, the dataset has {want}{remedy}")


def run_episodes(
    policy: Policy,
    envs: Any,
    seeds: Sequence[int],
    look: Callable[[dict[str, Any]], None] = lambda info: None,
    tick: Callable[[], None] = lambda: None,
    seen: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Run one episode per seed, in rounds of one episode per slot; a slot's steps after its episode are ignored.

    So a result depends on its seed only, long and short episodes count alike, and all autoreset modes are supported.

    Args:
        envs: A vector environment, or `Environments`.
        look: Called with the newest `info` before each step of the first slot's episodes.
        tick: Called at each step; an exception from it ends the episodes.
        seen: Called at each step with the number of episodes that have ended.

    Returns:
        [{"seed", "success" (None if the environment reports none), "success_at_end", "return", "length"}], the last
        and the largest value of each number of `info` that the environment's `tracked` names, and how smooth the
        executed actions are, as of `Jerk`.
    """
    episodes: list[dict[str, Any]] = []
    stepper = Stepper(envs)
    hold = getattr(envs, "hold", None)
    policy.hold = hold if callable(hold) else motionless
    for start in range(0, len(seeds), envs.num_envs):
        played = _Round(list(seeds[start : start + envs.num_envs]), envs)
        observation, info = stepper.reset(seed=played.padded)
        policy.reset(seeds=played.padded)
        if isinstance(policy, Policy):
            policy.tell(task_of(envs))
        while played.running.any():
            tick()
            if played.running[0]:
                look(info)
            for array in () if played.running.all() else observation.values():
                if array.dtype == np.float32:
                    array[~played.running] = np.nan_to_num(array[~played.running])
            action = executed(policy.act(observation), envs.single_action_space)
            try:
                step = stepper.step(action)
                step.check(played.running)
            except FaultyEnvError as fault:
                raise RuntimeError(fault.describe(0, played.padded, played.lengths, action)) from fault
            done = getattr(envs, "executed", action)  # of `OnTop`, the sum
            played.jerk.add(done, getattr(policy, "borders", np.ones(len(action), bool)), played.running)
            played.add(step.reward, step.info, step.ended)
            seen(len(episodes) + len(played.seeds) - int(played.running.sum()))
            observation, info = step.observation, step.info
        episodes += played.results()
    return episodes


class _Round:
    """One episode per slot of a vector environment: which are running, and their results so far.

    Args:
        seeds: Of the episodes, at most one per slot.
        envs: The vector environment.
    """

    def __init__(self, seeds: list[int], envs: Any) -> None:
        slots = envs.num_envs
        self.seeds, self.names = seeds, getattr(envs, "tracked", ())
        self.padded = seeds + [seeds[-1]] * (slots - len(seeds))  # spare slots of the last round
        self.running = np.arange(slots) < len(seeds)
        self.returns, self.lengths = np.zeros(slots), np.zeros(slots, dtype=int)
        self.once: list[bool | None] = [None] * slots
        self.at_end: list[bool | None] = [None] * slots
        self.tracked: list[dict[str, float]] = [{} for _ in range(slots)]
        self.jerk = Jerk(slots, envs.single_action_space)

    def add(self, reward: np.ndarray, info: dict[str, Any], ended: np.ndarray) -> None:
        """Count a step of the episodes that run, and end those of `ended` `[N]`."""
        self.returns[self.running] += reward[self.running]
        self.lengths[self.running] += 1
        for slot in map(int, np.flatnonzero(self.running)):
            success = success_of(info, slot)
            if success is not None:
                self.once[slot], self.at_end[slot] = bool(self.once[slot]) or success, success
            for key in self.names:
                if (value := info_value(info, key, slot)) is not None:
                    most = max(float(value), self.tracked[slot].get(f"{key}_max", -math.inf))
                    self.tracked[slot] |= {f"{key}_final": float(value), f"{key}_max": most}
        self.running &= ~ended
        if self.lengths.max() > MAX_STEPS:
            raise RuntimeError(f"an episode is longer than {MAX_STEPS} steps; set --env.max-episode-steps")

    def results(self) -> list[dict[str, Any]]:
        """The results of each episode, as `run_episodes` returns them."""
        results = []
        for i, seed in enumerate(self.seeds):
            result = {"seed": seed, "success": self.once[i], "success_at_end": self.at_end[i]} | self.tracked[i]
            result |= {"return": float(self.returns[i]), "length": int(self.lengths[i])}
            results.append(result | self.jerk.of(i))
        return results


class Evaluator(Divided):
    """Evaluates a policy in an environment; the episodes are divided among the processes.

    Args:
        policy: The policy.
        environments: Of this process; rebuilt after a failed evaluation.
        env: {"name", options}, for the record.
        seeds: Of the episodes of all processes.
        rank, world: Rank of this process, and number of processes.
        tick: Called at each step; an exception from it ends the evaluation.
        options: Of the environment, from which `film` makes one that renders.

    Raises:
        UserError: the environment's actions or observations do not match the data.
    """

    def __init__(
        self,
        policy: Policy,
        environments: Environments,
        env: dict[str, Any],
        seeds: range,
        rank: int = 0,
        world: int = 1,
        tick: Callable[[], None] = lambda: None,
        options: Any = None,
    ) -> None:
        check_env(environments, policy.spec)
        super().__init__(policy, len(seeds), rank, world, tick)
        self.environments, self.env, self.seeds, self.options, self.failed = environments, env, seeds, options, False
        self.reference: tuple[float, float] | None = None  # returns that are normalised to 0 and 100

    @classmethod
    def of(
        cls,
        args: Any,
        run: Any,
        policy: Policy | None,
        env: tuple[str, Any],
        build: Callable[..., Any],
        world: int,
        data: dict[str, Any] | None = None,
    ) -> "Evaluator | Recordings | None":
        """The evaluator of a run, whose environments are closed with the run; None, with a reported reason, if none.

        Args:
            args: With `eval_episodes`, `eval_envs`, `eval_seed` and `env_timeout`.
            env: Name and options of the environment.
            build: (name, options, num_envs, seed) -> vector environment.
            world: Number of processes.
            data: By whose held-out "recordings" the policy is evaluated where no environment is known.

        Raises:
            UserError: the environment cannot be made, or does not match the data.
        """
        name, options = env
        if not args.eval_episodes or policy is None:
            run.say("no evaluation: the trainer has no policy for this data" if args.eval_episodes else "")
            return None
        if name == "none":
            return Recordings.of(args, run, policy, (data or {}).get("recordings", ()), world)
        seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
        with one_line(f"env {name!r}"), run.progress.phase("making environments"):
            make: Any = partial(build, name, options)
            make = policy.base.under(make) if policy.base else make
            slots = min(args.eval_envs, -(-len(seeds) // world))
            environments = run.closing(Environments(make, slots, args.eval_seed, args.env_timeout))
            record = {"name": name, **asdict(options)}
            evaluator = cls(policy, environments, record, seeds, run.rank, world, run.tick, options)
        evaluator.seen = run.progress.done
        return evaluator

    def _part(self) -> list[dict[str, Any]]:
        """The results of the episodes of this process."""
        if self.failed:
            self.environments.rebuild(self.seeds[0])
        self.failed = True
        seeds = list(self.seeds)[self.rank :: self.world]
        episodes = run_episodes(self.policy, self.environments, seeds, tick=self.tick, seen=self._ended)
        self.failed = False
        return episodes

    def _summarise(self, found: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """One line of `eval.jsonl`, in the order of the seeds."""
        episodes = sorted(found, key=lambda episode: episode["seed"])
        result = summarise(episodes, self.env, step, self.policy)
        if self.reference is not None:  # D4RL's normalised return (Fu et al., 2020)
            low, high = self.reference
            result["return_normalised"] = 100 * (result["return_mean"] - low) / (high - low)
        return result

    def film(self, path: Path) -> str:
        """Film the first episodes; returns why there is no film, or ""."""
        if "rgb_array" not in (getattr(self.environments.envs, "metadata", None) or {}).get("render_modes", ()):
            return "the environment has no render mode 'rgb_array'"
        around = self.policy.base.under if self.policy.base else lambda make: make
        sees = any(key.startswith(IMAGES) for key in self.policy.spec)
        how = (self.environments.timeout, self.tick, around, sees)
        problem = film_episodes(partial(run_episodes, self.policy), self.options, self.env, self.seeds, path, *how)
        gc.collect()  # some environments free what they draw with when they are collected, at an exit too late
        return problem


def summarise(episodes: list[dict[str, Any]], env: dict[str, Any], step: int, policy: Policy) -> dict[str, Any]:
    """One line of `eval.jsonl`; an episode is a success if it succeeded at any step (`rule`)."""
    successes = [episode["success"] for episode in episodes if episode["success"] is not None]
    known = len(successes) == len(episodes) > 0
    returns = np.array([episode["return"] for episode in episodes])
    return {
        "step": step,
        "env": env,
        "episodes": len(episodes),
        "rule": "once",
        "success_rate": sum(successes) / len(episodes) if known else None,
        "success_ci": list(wilson(sum(successes), len(episodes))) if known else None,
        "success_at_end": float(np.mean([episode["success_at_end"] for episode in episodes])) if known else None,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "length_mean": float(np.mean([episode["length"] for episode in episodes])),
        **jerk_of(episodes),
        **{key: float(np.mean([episode[key] for episode in episodes])) for key in tracked_of(episodes)},
        "seeds": [episode["seed"] for episode in episodes],
        "inference": policy.inference,
    }


def tracked_of(values: Any) -> list[str]:
    """The names of tracked numbers in an evaluation's result, or of all its episodes: `coverage_final`, ..."""
    every = values if isinstance(values, list) else [values]
    names = [key for key in every[0] if key.endswith(("_final", "_max"))] if every else []
    return [key for key in names if all(key in one for one in every)]


def scores(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation for curves, as {"eval/<name>": value}."""
    names = ["success_rate", "success_at_end", "return_mean", "return_normalised", "length_mean", *tracked_of(result)]
    names += ["action_error", "action_mse"]
    return {f"eval/{name}": result[name] for name in names if result.get(name) is not None}


SCORES = (("success_rate", 1), ("return_mean", 1), ("action_error", -1))
"""The metrics by which evaluations are compared, the first that is known, and +1 where more is better, or else -1."""


def score_of(result: dict[str, Any]) -> tuple[str, float, int] | None:
    """Metric, value and direction (see `SCORES`) by which a line of `eval.jsonl` is compared with others of its run."""
    known = ((name, result.get(name), sign) for name, sign in SCORES)
    return next(((name, float(value), sign) for name, value, sign in known if value is not None), None)


def headline(result: dict[str, Any]) -> str:
    """One evaluation in a line for the screen."""
    if result.get("action_error") is not None:
        return Recordings.headline(result)
    more = "".join(f", {key.replace('_', ' ')} {result[key]:.2f}" for key in tracked_of(result))
    late = "method" in result["inference"] and result.get("jerk_mean") is not None
    names = [key for key in ("jerk_mean", "border_mean") if late and result[key] is not None]
    more += "".join(f", {key.partition('_')[0]} {result[key]:.3g}" for key in names)
    return outcome(result) + more


def outcome(result: dict[str, Any]) -> str:
    """The success rate with its interval if the environment reports success, else the return."""
    over = f"over {result['episodes']} episode{'s' * (result['episodes'] != 1)}"
    if result["success_rate"] is None:
        return f"return {result['return_mean']:.1f} +- {result['return_std']:.1f} {over}"
    low, high = result["success_ci"]
    return f"success {result['success_rate']:.2f} [{low:.2f}, {high:.2f}] {over}"
