"""Experience as a dataset: episodes of the final policy, or the contents of the replay buffers."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from .. import parallel
from ..acting.correction import BASE_ACTION
from ..contracts import Request, Rollouts
from ..data.features import RECORDED
from ..datasets import convert
from ..datasets.episodes import Episodes, complete_flags, from_columns
from ..envs.vector import Environments, action_bounds
from ..errors import UserError, require
from .collection import EXECUTED, Collector, describe_env

FORMATS = {"minari": (("minari", '"minari[hdf5]"'), ("h5py", "h5py")), "lerobot": (("pyarrow", "pyarrow"),)}


def check_destination(args: Any, request: Request) -> None:
    """Before training, refuse a `--save-dataset` that could not be written afterwards.

    Args:
        args: With `save_dataset`, the folder, "" for none; `save_format`, `save_what` and `resume`.
        request: The data that the trainer asks for.

    Raises:
        UserError: the folder exists or cannot be made, packages are missing, or there will be nothing to write.
    """
    path, target = args.save_dataset, Path(args.save_dataset).expanduser()
    if not path or (args.resume and target.exists()):  # a resumed run may have written it already
        return
    if target.exists():
        raise UserError(f"--save-dataset {path}: exists already; choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        TemporaryDirectory(dir=target.parent).cleanup()
    except OSError as error:
        raise UserError(f"--save-dataset {path}: {error.strerror}; choose another folder") from error
    if args.save_what == "collected" and isinstance(request, Rollouts):
        raise UserError("--save-what collected: rollouts are not kept; this trainer's policy can be saved, the default")
    for module, package in FORMATS[args.save_format]:
        require(module, package)


def save_dataset(
    args: Any,
    run: Any,
    policy: Any,
    memory: Any,
    collector: Collector,
    spec: dict[str, Any],
    env: tuple[str, Any],
    make: Any,
) -> None:
    """Write the dataset of `--save-dataset`, if any; called by every process.

    Args:
        policy: The final policy.
        memory: Transitions of the environments.
        collector: Has the environments, and the shift and scale of the rewards in `memory`.
        spec: Of a transition.
        env, make: The environment's name and options, and (num_envs, seed) -> environments for the policy.
    """
    if not args.save_dataset:
        return
    environments = collector.environments
    parts = parallel.gather(memory.store.transitions()) if args.save_what == "collected" else []
    if not run.first:
        return
    if parts:
        within = environments.envs.envs if EXECUTED in parts[0] else environments  # whose actions were executed
        episodes = collected(parts, spec, within.single_action_space, collector.rewards)
    else:
        how = (args.save_episodes, args.eval_envs, args.eval_seed, args.env_timeout)
        with run.progress.phase("recording", args.save_episodes, "episodes") as seen:
            episodes = play(policy.base.whole(policy) if policy.base else policy, make, *how, run.tick, seen)
    origin, fps = f"{args.trainer}, {args.save_what}, step {run.step}", environments.metadata.get("render_fps", 30)
    with run.progress.phase("writing the dataset"):
        said = write(episodes, args.save_dataset, args.save_format, env, origin, fps)
    run.say(said)


def play(
    policy: Any,
    make: Callable[[int, int], Any],
    episodes: int,
    slots: int,
    seed: int,
    timeout: float,
    tick: Callable[[], None],
    seen: Callable[[int], None] = lambda done: None,
) -> Episodes:
    """Episodes of a policy. The number per environment is fixed, so that short episodes are not overrepresented.

    Args:
        policy: With `act`, `reset` and `restart`.
        make: (num_envs, seed) -> a vector environment.
        slots: Environments that are stepped together.
        tick: Called at each step; an exception from it ends the episodes.
        seen: Called at each step with the number of episodes that have ended.

    Raises:
        RuntimeError: an environment fails.
    """
    slots = min(slots, episodes)
    environments = Environments(make, slots, seed, timeout)
    try:
        spec = describe_env(environments)
        collector = Collector(environments, seed, 0, 0, lambda text: None)
        collector.start(0)
        policy.reset(collector.seeds)
        wanted = [len(part) for part in np.array_split(range(episodes), slots)]
        done: list[list[list[dict[str, Any]]]] = [[[]] for _ in range(slots)]
        while any(len(played) <= count for played, count in zip(done, wanted, strict=True)):
            tick()
            transitions, _ = collector.step(policy.act(collector.observation))
            assert transitions is not None  # a fault raises, since no environment is replaced
            for slot in transitions["valid"].nonzero().flatten().tolist():
                done[slot][-1].append({key: value[slot] for key, value in transitions.items()})
                if transitions["ended"][slot]:
                    done[slot].append([])
            policy.restart(transitions["begins"].nonzero().flatten())
            seen(sum(min(len(played) - 1, count) for played, count in zip(done, wanted, strict=True)))
        space = environments.single_action_space
    finally:
        environments.close()
    played = [episode for part, count in zip(done, wanted, strict=True) for episode in part[:count]]
    rows = [row for episode in played for row in episode]
    ends = torch.tensor([len(episode) for episode in played]).cumsum(0)
    keys = [key for key in {key: None for row in rows for key in row} if key in rows[0] or key in RECORDED]
    columns = {key: torch.stack([row.get(key, torch.tensor(False)) for row in rows]) for key in keys}
    return episodes_of(columns, ends, spec, space)


def episodes_of(columns: dict[str, torch.Tensor], ends: torch.Tensor, spec: dict[str, Any], space: Any) -> Episodes:
    """Transitions `[N, ...]`, episode by episode, in a dataset's form; `ended` without `terminated` is truncated.

    Args:
        spec: Of the transitions.
        space: Of one environment's actions.
    """
    kept = {key: columns[key] for key in (*spec, *RECORDED) if key in columns}
    if "classes" in spec["action"]:
        kept["action"] = kept["action"][:, None].float()
    kept["truncated"] = columns["ended"] & ~columns["terminated"]
    episodes = from_columns(kept, ends, "experience")
    complete_flags(episodes)
    if hasattr(space, "low"):
        low, high = action_bounds(space)
        episodes.stored["action_space"] = {"low": low.tolist(), "high": high.tolist()}
    else:
        episodes.stored["classes"] = int(space.n)
    return episodes


def collected(parts: list[dict[str, torch.Tensor]], spec: dict[str, Any], space: Any, rewards: Any) -> Episodes:
    """The contents of the replay buffers of all processes, with the environment's unscaled rewards.

    Where a trainer corrects a frozen policy, the actions are what was executed, not the corrections.

    Args:
        parts: `ReplayBuffer.transitions` of each process.
        spec: Of the transitions.
        space: Of one environment's actions.
        rewards: (shift, scale) of the rewards that were learnt from.
    """
    for part in parts:  # of an environment that has not told yet
        for key in {key for other in parts for key in other if key in RECORDED} - part.keys():
            part[key] = torch.zeros(len(part["ended"]), dtype=torch.bool)
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if EXECUTED in columns:  # the environment's own actions, and its own observations
        known = columns[EXECUTED].isfinite().all(1)  # not those that a run of an older version began with
        columns = {key: column[known] for key, column in columns.items()}
        columns["action"] = columns[EXECUTED]
        spec = {key: feature for key, feature in spec.items() if not key.endswith(BASE_ACTION)}
    columns["reward"] = columns["reward"] / rewards[1] - rewards[0]
    return episodes_of(columns, columns["ended"].nonzero().flatten() + 1, spec, space)


def write(episodes: Episodes, path: str, kind: str, env: tuple[str, Any], origin: str, fps: float) -> str:
    """Write a dataset that names its environment; returns a line about it.

    Args:
        kind: "minari" or "lerobot".
        env: Registry name and options of the environment.
        origin: Description of its source, in a few words.
        fps: Steps per second.
    """
    name, options = env
    if Path(path).expanduser().exists():
        return f"{path}: exists already, left as it is"
    task = getattr(options, "task", "") or getattr(options, "id", "") or name
    episodes.stored |= {"format": origin, "fps": fps, "environment": {"name": name, **asdict(options)}}
    wanted = convert.Options(format=kind, task=str(task))  # type: ignore[arg-type]
    return convert.write(episodes, Path(path).expanduser(), wanted)
