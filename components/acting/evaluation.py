"""Evaluation in an environment: a fixed list of episodes, each known by its seed, whatever slot or process runs it."""

import contextlib
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import parallel
from ..data.batches import to_device
from ..data.features import read
from ..data.random_state import preserved, seed_all
from ..envs.vector import Environments, FaultyEnvError, check_finite, executed
from ..errors import StoppedError, UserError
from ..run.command_line import options_of
from .policy import Policy

logger = logging.getLogger(__name__)
MAX_STEPS = 100_000  # an episode that is longer has no end: the environment lacks a time limit


def observation_batch(observation: Any) -> dict[str, np.ndarray]:
    """Name an environment's observations as the data does.

    A vector `[N, D]` is `observation.state`, pictures are `observation.images.camera` `[N, C, H, W]`, stacked ones side
    by side in C. In a dict, `agent_pos` and `observation` are the state, `environment_state` keeps its name, `pixels`
    holds pictures; keys that begin with `observation.` stay.
    """
    if not isinstance(observation, dict):
        array = np.asarray(observation)
        if array.dtype == np.uint8 and array.ndim > 2:
            return {"observation.images.camera": channels_first(array)}
        return {"observation.state": _vectors(array)}
    named: dict[str, np.ndarray] = {}
    for key, value in observation.items():
        if key == "pixels":
            cameras = value if isinstance(value, dict) else {"camera": value}
            named |= {f"observation.images.{name}": channels_first(np.asarray(x)) for name, x in cameras.items()}
        elif key in ("agent_pos", "observation"):
            named["observation.state"] = _vectors(value)
        elif key.startswith("observation.images."):
            named[key] = np.asarray(value)
        elif np.asarray(value).dtype == np.uint8 and np.ndim(value) > 2:
            named[f"observation.images.{key}"] = channels_first(np.asarray(value))
        else:
            named[key if key.startswith("observation.") else f"observation.{key}"] = _vectors(value)
    return named


def channels_first(pictures: np.ndarray) -> np.ndarray:
    """`[N, C, H, W]` of grey pictures `[N, H, W]`, coloured ones, channels last, stacks `[N, S, H, W]`, or both."""
    if pictures.ndim == 3:
        return pictures[:, None]
    if pictures.ndim == 5:  # [N, S, H, W, C]
        pictures = np.moveaxis(pictures, -1, 2)
        return pictures.reshape(len(pictures), -1, *pictures.shape[3:])
    return pictures if pictures.shape[1] < pictures.shape[3] else np.moveaxis(pictures, -1, 1)


def _vectors(value: Any) -> np.ndarray:
    """`[N, D]` float32 of an observation of any shape and type that is no picture."""
    array = np.asarray(value)
    return array.reshape(len(array), -1).astype(np.float32)


def choose_env(
    asked: str, options: Any, given: Callable[[str], bool], offered: dict[str, Any] | None
) -> tuple[str, Any]:
    """The environment and its options: what the command line sets, then what the dataset offers, then the defaults.

    Args:
        asked: Name and `options` as parsed.
        given: Whether the command line itself sets an option ("env", "env.task").
        offered: {"name", options} of the dataset, or None.

    Returns:
        (name, options); the name is "none" where no environment is known.
    """
    from .. import ENV_BUILDER_REGISTRY

    offered = dict(offered or {})
    values = offered.pop("options", {}) | {key: value for key, value in offered.items() if key != "name"}
    explicit = {f.name: getattr(options, f.name) for f in fields(options) if given(f"env.{f.name.replace('_', '-')}")}
    name = asked if given("env") else offered.get("name", asked if explicit else "none")
    if name not in ENV_BUILDER_REGISTRY:
        return "none", None
    base = values if name == offered.get("name") else {}
    return name, options_of(ENV_BUILDER_REGISTRY[name], base | explicit)


def check_env(envs: Any, spec: dict[str, Any]) -> None:
    """Refuse an environment whose action or observation widths are not the data's.

    Raises:
        UserError: with both widths.
    """
    space, action = envs.single_action_space, spec["action"]
    if "classes" in action:
        if getattr(space, "n", None) != action["classes"]:
            raise UserError(f"it has the action space {space}; the policy chooses among {action['classes']} actions")
    elif getattr(space, "shape", None) is None or len(space.shape) != 1:
        raise UserError(
            f"it has the action space {space}; the data's actions are vectors of width {action['shape'][-1]}"
        )
    elif space.shape[0] != action["shape"][-1]:
        widths = f"{space.shape[0]}, the dataset and the model have {action['shape'][-1]}"
        raise UserError(f"it takes actions of width {widths}")
    observation, _ = envs.reset()
    if isinstance(observation, tuple):
        raise UserError(f"it has the observation space {envs.single_observation_space}; expected Box or Dict")
    found = observation_batch(observation)
    for key in (key for key in spec if key.startswith("observation.")):
        if key not in found:
            raise UserError(f"it gives {', '.join(found)}, the policy needs {key!r}")
        stored = tuple(spec[key].get("stored_shape", spec[key]["shape"]))
        frame = found[key].shape[1:]
        if stored[-len(frame) :] != frame:
            have, want = (shape[0] if len(frame) == 1 else tuple(shape) for shape in (frame, stored[-len(frame) :]))
            raise UserError(f"it gives {key!r} of width {have}, the dataset has {want}")


def run_episodes(
    policy: Policy,
    envs: Any,
    seeds: Sequence[int],
    frames: list[Any] | None = None,
    tick: Callable[[], None] = lambda: None,
    every: int = 1,
) -> list[dict[str, Any]]:
    """Play one episode per seed, in rounds of one episode per slot; what a slot does after its episode is ignored.

    So a result depends on its seed alone, long episodes count like short ones, and any autoreset mode will do.

    Args:
        envs: A vector environment, or `Environments`.
        frames: Collects the first slot's pictures, when given, one of so many that there would be (`every`).
        tick: Called at each step; what it raises ends the episodes.

    Returns:
        [{"seed", "success" (None when the environment tells none), "success_at_end", "return", "length"}], and the last
        and the largest value of each number of `info` that the environment's `tracked` names.
    """
    space, slots, names = envs.single_action_space, envs.num_envs, getattr(envs, "tracked", ())
    episodes: list[dict[str, Any]] = []
    seen = itertools.count()  # steps that could be drawn
    for start in range(0, len(seeds), slots):
        chosen = list(seeds[start : start + slots])
        padded = chosen + [chosen[-1]] * (slots - len(chosen))  # the last round may have slots to spare
        observation, _ = envs.reset(seed=padded)
        policy.reset(seeds=padded)
        running = np.ones(slots, dtype=bool)
        running[len(chosen) :] = False
        returns, lengths = np.zeros(slots), np.zeros(slots, dtype=int)
        once: list[bool | None] = [None] * slots
        at_end: list[bool | None] = [None] * slots
        tracked: list[dict[str, float]] = [{} for _ in range(slots)]
        while running.any():
            tick()
            if frames is not None and running[0] and next(seen) % every == 0:
                frames.append(envs.render()[0])
            action = executed(policy.act(observation_batch(observation)), space)
            try:
                observation, reward, terminated, truncated, info = envs.step(action)
                check_finite(observation_batch(observation), reward, np.flatnonzero(running))
            except FaultyEnvError as fault:
                raise RuntimeError(fault.told(0, padded, lengths, action)) from fault
            returns[running] += np.asarray(reward)[running]
            lengths[running] += 1
            for slot in np.flatnonzero(running):
                success = success_of(info, int(slot))
                if success is not None:
                    once[slot], at_end[slot] = bool(once[slot]) or success, success
                for key in names:
                    if (value := told(info, key, int(slot))) is not None:
                        most = max(float(value), tracked[slot].get(f"{key}_max", -math.inf))
                        tracked[slot] |= {f"{key}_final": float(value), f"{key}_max": most}
            running &= ~(np.asarray(terminated) | np.asarray(truncated))
            if lengths.max() > MAX_STEPS:
                raise RuntimeError(f"an episode is longer than {MAX_STEPS} steps; set --env.max-episode-steps")
        for i, seed in enumerate(chosen):
            result = {"seed": seed, "success": once[i], "success_at_end": at_end[i]} | tracked[i]
            episodes.append(result | {"return": float(returns[i]), "length": int(lengths[i])})
    return episodes


SUCCESSES = ("success", "is_success")


def success_of(info: dict[str, Any], slot: int) -> bool | None:
    """`info["success"]` of one slot, under either of its names."""
    for key in SUCCESSES:
        if (value := told(info, key, slot)) is not None:
            return bool(np.all(np.asarray(value) > 0.5))
    return None


def told(info: dict[str, Any], key: str, slot: int) -> Any:
    """`info[key]` of one slot, or None; at an episode's end some autoreset modes put it into `final_info`."""
    final = info.get("final_info")
    if final is not None and np.any(info.get("_final_info", [False] * (slot + 1))[slot]):
        info = final
    return info[key][slot] if key in info and np.all(info.get(f"_{key}", [True] * (slot + 1))[slot]) else None


class Evaluator:
    """Evaluates a policy in an environment, each process its share of the episodes.

    Args:
        policy: What acts.
        environments: Of this process; replaced after an evaluation that failed.
        env: {"name", options}, for the record.
        seeds: One episode each, over all processes.
        rank, world: This process, and how many there are.
        tick: Called at each step; what it raises ends the evaluation.

    Raises:
        UserError: the environment's action or observation widths are not the data's.
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
    ) -> None:
        check_env(environments, policy.spec)
        self.policy, self.environments, self.env, self.seeds = policy, environments, env, seeds
        self.rank, self.world, self.tick, self.failed = rank, world, tick, False
        self.reference: tuple[float, float] | None = None  # returns that count as 0 and 100, where the data has them

    def evaluate(self, step: int) -> tuple[dict[str, Any] | None, str]:
        """Play the episodes; returns (the line for `eval.jsonl`, "") or, on all processes alike, (None, what failed).

        Leaves the random generators as they were, so training goes on as if it had not happened.

        Raises:
            StoppedError: on all processes, when a stop was asked for on any.
        """
        mine: list[dict[str, Any]] = []
        problem, stopped = "", False
        with preserved():
            try:
                if self.failed:
                    self.environments.rebuild(self.seeds[0])
                self.failed = True
                seeds = list(self.seeds)[self.rank :: self.world]
                mine = run_episodes(self.policy, self.environments, seeds, tick=self.tick)
                self.failed = False
            except StoppedError:
                stopped = True
            except Exception as error:
                logger.debug("evaluation failed", exc_info=True)
                problem = f"process {self.rank}: {type(error).__name__}: {error}"
        parts, problems, stops = zip(*parallel.gather((mine, problem, stopped)), strict=True)
        if any(stops):
            raise StoppedError("stopped by a signal")
        if any(problems):
            return None, next(filter(None, problems))
        episodes = sorted((e for part in parts for e in part), key=lambda episode: episode["seed"])
        result = summarise(episodes, self.env, step, self.policy)
        if self.reference is not None:  # D4RL's normalised return (Fu et al., 2020)
            low, high = self.reference
            result["return_normalised"] = 100 * (result["return_mean"] - low) / (high - low)
        return result, ""

    def film(self, path: Path, options: Any) -> str:
        """Film the first three episodes in an environment made from `options`; returns why there is no film, or ""."""
        if "rgb_array" not in (getattr(self.environments.envs, "metadata", None) or {}).get("render_modes", ()):
            return "the environment has no render mode 'rgb_array'"
        around = self.policy.base.under if self.policy.base else lambda make: make
        return record_video(self.policy, options, self.seeds[:3], path, self.environments.timeout, self.tick, around)


@torch.no_grad()
def held_out_loss(
    trainer: Any,
    dataset: Any,
    normaliser: Any,
    batch_size: int,
    device: torch.device,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean of the trainer's `losses` over the validation set; leaves the random generators as they were.

    Not of the compiled ones: without gradients, and for the last, smaller batch, they would be compiled again.

    Returns:
        {"val/loss"}; of a mixture its sources' means, weighted by their shares, and each as "val/loss.<source>".

    Raises:
        StoppedError: on all processes, when `tick`, which is called for each batch, raised it on the first.
    """
    everything = {"": (torch.arange(len(dataset)), 1.0)}
    sources = dataset.sources() if hasattr(dataset, "sources") else everything
    means: dict[str, float] | None = None
    with preserved(), parallel.apart(), contextlib.suppress(StoppedError):
        seed_all(0)  # noise that a loss draws is the same each time, so that its values can be compared
        totals = dict.fromkeys(sources, 0.0)
        for name, (rows, _) in sources.items():
            for part in rows.split(batch_size):
                tick()
                data = normaliser(to_device(read(dataset, part), device))
                totals[name] += float(total_loss(type(trainer).losses(trainer, data))) * len(part)
        means = {name: totals[name] / len(rows) for name, (rows, _) in sources.items()}
    if (means := parallel.from_first(means)) is None:
        raise StoppedError("stopped by a signal")
    found = {"val/loss": sum(share * means[name] for name, (_, share) in sources.items())}
    return found | {f"val/loss.{name}": mean for name, mean in means.items() if name}


@torch.no_grad()
def loss_by_source(trainer: Any, batch: dict[str, Any], prefix: str) -> dict[str, float]:
    """The trainer's loss on the part of a batch that came from each source of a mixture; {} for other data.

    It stands in for the means over all steps, which would cost as many forwards as there are sources.
    """
    if "source" not in batch or not callable(getattr(trainer, "losses", None)):
        return {}
    losses = type(trainer).losses  # not the compiled ones: the parts' sizes change
    found: dict[str, float] = {}
    with preserved(), parallel.apart():
        for name in sorted(set(batch["source"])):
            rows = [i for i, source in enumerate(batch["source"]) if source == name]
            part = {k: v[rows] if isinstance(v, torch.Tensor) else [v[i] for i in rows] for k, v in batch.items()}
            found[f"{prefix}loss.{name}"] = float(total_loss(losses(trainer, part)))
    return found


def total_loss(losses: Any) -> Any:
    """What `losses` returns as one scalar: (loss, metrics), or the loss, or named terms."""
    losses = losses[0] if isinstance(losses, tuple) else losses
    return sum(losses.values()) if isinstance(losses, dict) else losses


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate (Wilson, 1927): right also for 0 and for all successes."""
    rate, n = successes / episodes, episodes
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def summarise(episodes: list[dict[str, Any]], env: dict[str, Any], step: int, policy: Policy) -> dict[str, Any]:
    """One line of `eval.jsonl`; a success counts when it happened once in the episode (`rule`)."""
    successes = [episode["success"] for episode in episodes if episode["success"] is not None]
    known = len(successes) == len(episodes) > 0
    returns = np.array([episode["return"] for episode in episodes])
    return {
        "step": step,
        "env": env,
        "episodes": len(episodes),
        "rule": "once",
        "success_rate": sum(successes) / len(episodes) if known else None,
        "success_ci": list(wilson_interval(sum(successes), len(episodes))) if known else None,
        "success_at_end": float(np.mean([episode["success_at_end"] for episode in episodes])) if known else None,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "length_mean": float(np.mean([episode["length"] for episode in episodes])),
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
    """The numbers of an evaluation that make curves."""
    names = ["success_rate", "success_at_end", "return_mean", "return_normalised", "length_mean", *tracked_of(result)]
    return {f"eval/{name}": result[name] for name in names if result.get(name) is not None}


def headline(result: dict[str, Any]) -> str:
    """One evaluation in a line for the screen."""
    more = "".join(f", {key.replace('_', ' ')} {result[key]:.2f}" for key in tracked_of(result))
    return outcome(result) + more


def outcome(result: dict[str, Any]) -> str:
    """Success with its interval where the environment tells it, else the return."""
    if result["success_rate"] is None:
        return f"return {result['return_mean']:.1f} +- {result['return_std']:.1f} over {result['episodes']} episodes"
    low, high = result["success_ci"]
    return f"success {result['success_rate']:.2f} [{low:.2f}, {high:.2f}] over {result['episodes']} episodes"


def record_video(
    policy: Policy,
    factory: Any,
    seeds: Sequence[int],
    path: Path,
    timeout: float,
    tick: Callable[[], None],
    around: Callable[[Any], Any] = lambda make: make,
    every: int = 3,
) -> str:
    """Film one episode per seed as H.264. Returns "" or, in one line, why there is no video.

    Args:
        factory: An environment factory with the option `render_mode`.
        timeout: Seconds that a step of the environment may take.
        tick: Called at each step; what it raises ends the film.
        around: What `factory.build` is put into.
        every: Keep one frame in so many.
    """
    if not (is_dataclass(factory) and hasattr(factory, "render_mode")):
        return f"{type(factory).__name__} has no option 'render_mode'"
    frames: list[np.ndarray] = []
    try:
        import av

        with preserved(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever a graphics library warns of, the line below says
            filming: Any = replace(factory, render_mode="rgb_array")  # type: ignore[type-var]
            envs = Environments(around(filming.build), 1, seeds[0], timeout)
            try:
                run_episodes(policy, envs, seeds, frames, tick, every)
                fps = max(1, round(envs.metadata.get("render_fps", 30) / every))
            finally:
                envs.close()
        if not frames or frames[0] is None:
            return "the environment draws no frames"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = (side - side % 2 for side in frames[0].shape[:2])  # H.264's chroma is halved
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except Exception as error:
        path.unlink(missing_ok=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, ImportError):
            return f"{reason}; pip install {error.name or 'av'}"
        needs = "; it needs EGL (Debian: apt-get install libegl1 libgl1-mesa-dri)"
        return reason + (needs if "gl" in reason.lower() else "")
    return ""
