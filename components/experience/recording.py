"""Experience as a dataset: episodes that a policy plays, or what a replay buffer still holds."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..datasets import convert
from ..datasets.episodes import Episodes, complete_flags, from_columns
from ..envs.vector import Environments
from ..errors import UserError, require
from .collection import Collector, describe_env

FORMATS = {"minari": (("minari", '"minari[hdf5]"'), ("h5py", "h5py")), "lerobot": (("pyarrow", "pyarrow"),)}


def check_destination(path: str, kind: str, what: str, keeps: bool, again: bool) -> None:
    """Refuse before a training what could not be written after it.

    Args:
        path: Folder to write; "" for none.
        kind: Of `FORMATS`.
        what: "policy" or "collected".
        keeps: Whether what is collected is kept.
        again: Whether the run is resumed, and may have written it already.

    Raises:
        UserError: it exists, cannot be made, packages are missing, or there will be nothing to write.
    """
    target = Path(path).expanduser()
    if not path or (again and target.exists()):
        return
    if target.exists():
        raise UserError(f"--save-dataset {path}: exists already; give another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        TemporaryDirectory(dir=target.parent).cleanup()
    except OSError as error:
        raise UserError(f"--save-dataset {path}: {error.strerror}; give another folder") from error
    if what == "collected" and not keeps:
        raise UserError("--save-what collected: rollouts are not kept; this trainer's policy can be saved, the default")
    for module, package in FORMATS[kind]:
        require(module, package)


def play(
    policy: Any, make: Callable[[int, int], Any], episodes: int, slots: int, seed: int, timeout: float, tick: Any
) -> Episodes:
    """So many episodes of a policy; each environment plays its share, so that short ones do not count more.

    Args:
        policy: With `act`, `reset` and `restart`.
        make: (num_envs, seed) -> a vector environment.
        slots: Environments that are stepped together.
        tick: Called at each step; what it raises ends the episodes.

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
            assert transitions is not None  # a fault raises, since none is mended
            for slot in transitions["valid"].nonzero().flatten().tolist():
                done[slot][-1].append({key: value[slot] for key, value in transitions.items()})
                if transitions["ended"][slot]:
                    done[slot].append([])
            policy.restart(transitions["ended"].nonzero().flatten())
        space = environments.single_action_space
    finally:
        environments.close()
    played = [episode for own, count in zip(done, wanted, strict=True) for episode in own[:count]]
    rows = [row for episode in played for row in episode]
    ends = torch.tensor([len(episode) for episode in played]).cumsum(0)
    columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return episodes_of(columns, ends, spec, space)


def episodes_of(columns: dict[str, torch.Tensor], ends: torch.Tensor, spec: dict[str, Any], space: Any) -> Episodes:
    """Transitions `[N, ...]`, episode after episode, as a dataset has them; `ended` without `terminated` is truncated.

    Args:
        spec: Of the transitions.
        space: Of one environment's actions.
    """
    kept = {key: columns[key] for key in spec if key in columns}
    if "classes" in spec["action"]:
        kept["action"] = kept["action"][:, None].float()
    kept["truncated"] = columns["ended"] & ~columns["terminated"]
    episodes = from_columns(kept, ends, "experience")
    complete_flags(episodes)
    if hasattr(space, "low"):
        episodes.stored["action_space"] = {"low": space.low.tolist(), "high": space.high.tolist()}
    else:
        episodes.stored["classes"] = int(space.n)
    return episodes


def collected(parts: list[dict[str, torch.Tensor]], spec: dict[str, Any], space: Any, rewards: Any) -> Episodes:
    """What the replay buffers of all processes hold, with the environment's own rewards.

    Args:
        parts: Of each process, `ReplayBuffer.transitions`.
        spec: Of the transitions.
        space: Of one environment's actions.
        rewards: (shift, scale) of the rewards that were learnt from.
    """
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    columns["reward"] = columns["reward"] / rewards[1] - rewards[0]
    return episodes_of(columns, columns["ended"].nonzero().flatten() + 1, spec, space)


def write(episodes: Episodes, path: str, kind: str, env: tuple[str, Any], origin: str, fps: float) -> str:
    """Write a dataset that names its environment; returns a line about it.

    Args:
        kind: "minari" or "lerobot".
        env: Registry name and options of the environment.
        origin: What made it, in a few words.
        fps: Steps a second.
    """
    name, options = env
    if Path(path).expanduser().exists():
        return f"{path}: exists already, left as it is"
    task = getattr(options, "task", "") or getattr(options, "id", "") or name
    episodes.stored |= {"format": origin, "fps": fps, "environment": {"name": name, **asdict(options)}}
    wanted = convert.Options(format=kind, task=str(task))  # type: ignore[arg-type]
    return convert.write(episodes, Path(path).expanduser(), wanted)
