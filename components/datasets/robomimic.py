"""robomimic's HDF5 files (Mandlekar et al., 2021), and the raw recordings of robosuite's human teleoperation.

Layout: `data/demo_<i>/{actions, rewards, dones, obs/<key>, next_obs/<key>}` and `mask/<name>`, lists of demonstrations.
The text of a task is that of RoboCasa's `ep_meta` of a demonstration, or of LIBERO's `problem_info` of the file.
The meaning of `dones` depends on how the file was made (`--done_mode`: 0 success, 1 the last step, 2 both), so it marks
no terminal state by itself; see the option `dones`. `interventions` marks the steps at which a person took over.

A raw recording has `states` (time, positions, velocities of the simulator) and actions, but no `obs`.
"""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data.features import INTERVENTION
from ..data.pictures import IMAGES, camera_of, holds_pictures, layout_of
from ..errors import UserError, nearest
from ..run.progress import counted
from .episodes import (
    Episodes,
    Reader,
    as_flags,
    choose_episodes,
    chosen_cameras,
    flat_names,
    held_out_episodes,
    join_successors,
    steps_only,
    tell_unused,
    with_final,
)
from .frames import HDF5Frames
from .untrusted import (
    check_declared,
    check_hdf5,
    check_members,
    check_memory,
    demonstration_number,
    existing,
    hdf5,
    open_hdf5,
    own_numbers,
    read_checked,
    read_hdf5,
)

logger = logging.getLogger(__name__)
WHAT = "an HDF5 file of robomimic or robosuite (data/demo_<i>/actions)"
# The observations of robomimic's published results, for one arm and for two.
PUBLISHED: tuple[str, ...] = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
PUBLISHED += ("robot1_eef_pos", "robot1_eef_quat", "robot1_gripper_qpos", "object")
STRETCH = 10  # consecutive steps that are held out where a demonstration is cut
RAW_ACTIONS = ("right_dpos", "right_dquat", "left_dpos", "left_dquat", "gripper_actuations")  # before robosuite 1.0


@dataclass(frozen=True)
class RobomimicDataset(Reader):
    """A robomimic HDF5 file, or a raw recording of robosuite's teleoperation."""

    split: str = ""
    """Name under mask/ of the demonstrations for training; all by default. With `train`, those of mask/valid are held
    out."""
    keys: tuple[str, ...] = ()
    """Low-dimensional observations that are concatenated to observation.state in this order. The default for robosuite
    files is that of robomimic's published results (end effector's position, quaternion and gripper, then object);
    otherwise all: those first, then the others by name."""
    dones: Literal["auto", "success", "end"] = "auto"
    """Meaning of `dones`: success, which is terminal, or the end of the demonstration. auto: success where some
    demonstration ends without it or, with rewards that are all 0 or 1, where the reward is 1; the end otherwise."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}.

        Items: observation.state `[D]` of `keys` (in a raw recording, the simulator's positions and velocities),
        observation.images.X of the chosen cameras, action `[Da]`; reward, terminated, truncated and
        next.observation.state where recorded.

        Raises:
            UserError: no such file, demonstration, key or mask; inconsistent, damaged or dangerous arrays.
        """
        path = existing(self.path, WHAT)
        with open_hdf5(path) as file:
            data = hdf5(file, "data") or {}
            names = sorted(data.keys(), key=demonstration_number)
            check_members(path, names, "demonstrations")
            known = self._known(path, file, names)
            marks = (known.get("actions", "actions"), "states")
            names = [name for name in names if any(hdf5(data, f"{name}/{mark}") for mark in marks)]
            if not names:
                have = "found in data/: " + (", ".join(known) or "nothing")
                raise UserError(f"{path}: no demonstrations; {have}; expected {WHAT}; see --dataset.rename OLD=NEW")
            held_out: Tensor | None = None
            valid: set[str] = set()
            if self.split:
                chosen = self._mask(file, self.split, names)
                if self.split == "train" and hdf5(file, "mask/valid"):
                    valid = set(self._mask(file, "valid", names))
                names = [name for name in names if name in chosen or name in valid]
            of = f"{path} (mask/{self.split})" if self.split else str(path)
            numbers = own_numbers(names)
            places = choose_episodes(self.episodes, numbers, of)
            names, numbers = [names[place] for place in places], [numbers[place] for place in places]
            if valid & set(names):
                held_out = torch.tensor([name in valid for name in names])
            if hdf5(file, f"data/{names[0]}/obs") is None:
                chosen_cameras(self.cameras, [], str(path))
                if self.rename:
                    raise UserError(f"--dataset.rename: {path} is a raw recording, whose names are known; leave it out")
                if self.keys:
                    raise UserError(f"--dataset.keys: {path} is a raw recording, which has states only; leave it out")
                episodes = replace(read_raw(path, file, names), numbers=numbers)
                whole = held_out_episodes(episodes.lengths, self.validation, self.seed)
                if self.validation > 0 and held_out is None and not whole.any():
                    episodes, held_out = by_time(episodes, self.validation)
            else:
                episodes = replace(self._read(path, file, names, known), numbers=numbers)
        return self.finish(episodes, held_out)

    def _mask(self, file: Any, name: str, known: list[str]) -> list[str]:
        """The demonstrations of a mask, by name."""
        mask = hdf5(file, f"mask/{name}")
        if mask is None:
            raise UserError(
                f"--dataset.split {name}: no such mask in {file.filename}; {_found(hdf5(file, 'mask') or ())}"
            )
        if not hasattr(mask, "dtype") or mask.dtype.kind not in "SUO":
            raise UserError(f"{file.filename}: mask/{name} holds no names of demonstrations")
        values = [v.decode() if isinstance(v, bytes) else str(v) for v in read_checked(mask).reshape(-1).tolist()]
        if missing := [value for value in values if value not in known]:
            raise UserError(f"{file.filename}: mask/{name} names {missing[0]!r}, which is not among the demonstrations")
        if not values:
            raise UserError(f"{file.filename}: mask/{name} is empty; expected at least one demonstration")
        return values

    def _known(self, path: Path, file: Any, demos: list[str]) -> dict[str, str]:
        """Name that is read -> name in the file, of the arrays of the first demonstration and of its observations."""
        if not demos:
            return {}
        own = [key for key in hdf5(file, f"data/{demos[0]}") or () if key not in ("obs", "next_obs")]
        obs = [key for key in hdf5(file, f"data/{demos[0]}/obs") or () if key not in own]
        return self.renamed([*own, *obs], path, {"action": "actions", "reward": "rewards"})

    def _read(self, path: Path, file: Any, names: list[str], known: dict[str, str]) -> Episodes:
        """Read the demonstrations `names` of a robomimic file; `known` has the names of its arrays."""
        demos = [f"data/{name}" for name in names]
        actions, rewards, done = (known.get(name, name) for name in ("actions", "rewards", "dones"))
        lengths = [_rows(file, demo, actions) for demo in demos]
        ends = torch.tensor(lengths).cumsum(0)
        members = hdf5(file, f"{demos[0]}/obs")
        observed = {key: hdf5(file, f"{demos[0]}/obs/{old}") for key, old in known.items() if old in members}
        observed = {key: array for key, array in observed.items() if hasattr(array, "ndim")}
        found = _cameras(observed)
        asked = [name if name in found else name.removesuffix("_image") for name in map(camera_of, self.cameras)]
        cameras = chosen_cameras(asked, list(found), str(path))
        vectors = [key for key in observed if key not in found.values()]
        keys = self.keys or self._default_keys(file, [key for key in vectors if observed[key].ndim <= 3])
        for key in keys:
            if key not in vectors:
                raise UserError(
                    f"--dataset.keys {key}: no such low-dimensional observation in {path}; {nearest(key, vectors)}"
                )
        if not keys and not cameras:
            raise UserError(f"{path}: no observations are chosen; see --dataset.keys and --dataset.cameras")
        rest = {key: (observed[key].shape[1:], "see --dataset.keys") for key in vectors if key not in keys}
        marks = [key for key in (INTERVENTION, "interventions") if key in known and known[key] not in members]
        marked = next((k for k in marks if all(hdf5(file, f"{demo}/{known[k]}") is not None for demo in demos)), None)
        read = ("actions", "rewards", "dones", marked)
        own = (key for key, old in known.items() if old not in members and key not in read)
        rest |= dict.fromkeys(own, (None, "no observation"))
        files_names = [known[key] for key in keys]
        has_next = all(hdf5(file, f"{demo}/next_obs") is not None for demo in demos)
        columns = {"action": _columns(file, [f"{demo}/{actions}" for demo in demos], lengths)}
        if all(hdf5(file, f"{demo}/{rewards}") is not None for demo in demos):
            columns["reward"] = _columns(file, [f"{demo}/{rewards}" for demo in demos], lengths).squeeze(1)
            if all(hdf5(file, f"{demo}/{done}") is not None for demo in demos):
                dones = _columns(file, [f"{demo}/{done}" for demo in demos], lengths).squeeze(1) > 0
                columns["terminated"] = self._terminated(dones, columns["reward"], ends, str(path))
        if marked:
            taken = _columns(file, [f"{demo}/{known[marked]}" for demo in demos], lengths)
            columns[INTERVENTION] = as_flags(taken.numpy(), f"{path}: {marked}")
        now, then = {}, {}
        if keys:
            now["observation.state"] = _beside(file, demos, "obs", files_names, lengths)
            if has_next:
                then["observation.state"] = _beside(file, demos, "next_obs", files_names, lengths)
        if has_next and now:
            now, at, after = join_successors(now, then, ends)
        else:
            at, after = steps_only(ends)
            if has_next:  # pictures only
                at, after = with_final(ends)
        observations: dict[str, Any] = dict(now)
        for camera in cameras:
            observations[IMAGES + camera] = _pictures(path, file, demos, known[found[camera]], lengths, at, after)
        if texts := task_texts(file, demos):
            tasks = list(dict.fromkeys(texts))
            of_each = torch.tensor([tasks.index(text) for text in texts])
            columns["task_index"] = torch.repeat_interleave(of_each, torch.tensor(lengths))
        stored = {"format": "robomimic", "keys": list(keys)} | tell_unused(str(path), rest)
        named = {"observation.state": [name for key in keys for name in flat_names(key, observed[key].shape[1:])]}
        names_of, tasks = named if keys else {}, list(dict.fromkeys(texts))
        return Episodes(str(path), ends, columns, observations, at, after, tasks, stored, names_of)

    def _default_keys(self, file: Any, vectors: list[str]) -> tuple[str, ...]:
        """The default of the option `keys`."""
        first = [key for key in PUBLISHED if key in vectors]
        try:
            robosuite = json.loads(file["data"].attrs.get("env_args", "{}")).get("env_type") == 1
        except (ValueError, TypeError, AttributeError, RecursionError):
            robosuite = False
        keys = first if robosuite and "object" in first else first + sorted(set(vectors) - set(first))
        logger.info("%s: observation.state is %s", file.filename, " ".join(keys))
        return tuple(keys)

    def _terminated(self, dones: Tensor, reward: Tensor, ends: Tensor, name: str) -> Tensor:
        """The terminal steps `[N]`, by the option `dones`."""
        kind = self.dones
        if kind == "auto":
            sparse = bool(((reward == 0) | (reward == 1)).all())
            if not dones[ends - 1].all():
                kind = "success"
            elif sparse:
                return dones & (reward > 0)
            else:
                kind = "end"
                logger.info("%s: `dones` marks ends of demonstrations, so no step is terminal (--dataset.dones)", name)
        return dones if kind == "success" else torch.zeros_like(dones)


def task_texts(file: Any, demos: list[str]) -> list[str]:
    """The text of each demonstration's task, as RoboCasa and LIBERO write it; [] where some have none."""
    found: list[str] = []
    for demo in demos:
        for group, attribute, name in ((demo, "ep_meta", "lang"), ("data", "problem_info", "language_instruction")):
            try:
                text = json.loads(hdf5(file, group).attrs[attribute])[name]
            except (KeyError, ValueError, TypeError, RecursionError):
                continue
            if isinstance(text, str):
                found.append(text)
                break
    return found if len(found) == len(demos) else []


def read_raw(path: Path, file: Any, names: list[str]) -> Episodes:
    """A raw recording: observation.state is `states` without the time, action the command to the robot."""
    demos = [f"data/{name}" for name in names]
    group = hdf5(file, demos[0])
    parts = ["actions"] if "actions" in group else [name for name in RAW_ACTIONS if name in group]
    parts = [name for name in parts if hdf5(group, name).shape[-1] > 0]
    if "states" not in group or not parts:
        raise UserError(f"{path}: {demos[0]} has no states or no actions; found: {', '.join(group)}; expected {WHAT}")
    lengths = [_rows(file, demo, parts[0]) for demo in demos]
    ends = torch.tensor(lengths).cumsum(0)
    states = _columns(file, [f"{demo}/states" for demo in demos], lengths, np.float64)
    inner = steps_only(ends)[1] >= 0
    increases = states.shape[1] > 1 and bool((states[1:, 0] > states[:-1, 0])[inner[:-1]].all())
    if increases:  # the time: it encodes the progress of the demonstration, which no policy observes
        states = states[:, 1:]
    logger.info(
        "%s: a raw recording of robosuite; observation.state is its simulator's state%s",
        path,
        " without time" * increases,
    )
    action = torch.cat([_columns(file, [f"{demo}/{part}" for demo in demos], lengths) for part in parts], 1)
    stored = {"format": "robosuite raw", "keys": ["states"]}
    return Episodes(
        str(path), ends, {"action": action}, {"observation.state": states.float()}, *steps_only(ends), stored=stored
    )


def by_time(episodes: Episodes, fraction: float) -> tuple[Episodes, Tensor | None]:
    """Cut demonstrations so that short, evenly spaced stretches can be held out where no whole demonstration can.

    Holding out the end of a recording instead would remove a part of the task from training.
    """
    steps = int(episodes.ends[-1])
    count = round(min(fraction, 0.2) * steps / STRETCH)
    if count < 1:
        return episodes, None
    logger.info(
        "%s: too few demonstrations to hold one out; %d stretches of %d steps are held out instead",
        episodes.name,
        count,
        STRETCH,
    )
    starts = ((torch.arange(count) + 0.5) * steps / count - STRETCH / 2).long()
    ends = torch.cat([episodes.ends, starts, starts + STRETCH]).unique()  # sorted
    ends = ends[ends > 0]
    at, after = steps_only(ends)
    held_out = ((ends[:, None] > starts) & (ends[:, None] <= starts + STRETCH)).any(1)
    stored = episodes.stored | {"held out": f"{count} stretches of {STRETCH} steps, at which the episodes are cut"}
    return replace(episodes, ends=ends, at=at, after=after, stored=stored, numbers=()), held_out


def _rows(file: Any, demo: str, array: str = "actions") -> int:
    """Steps of a demonstration. Raises UserError: none, or another number than `num_samples`."""
    actions = hdf5(file, f"{demo}/{array}")
    if actions is None or not getattr(actions, "ndim", 0):
        raise UserError(f"{file.filename}: {demo} has no {array}; expected {WHAT}")
    rows = int(actions.shape[0])
    promised: Any = hdf5(file, demo).attrs.get("num_samples", rows)
    if promised != rows or rows < 1:
        raise UserError(
            f"{file.filename}: {demo} has {rows} {array}, its num_samples is {promised}; expected them equal"
        )
    return rows


def _columns(file: Any, names: list[str], lengths: list[int], dtype: Any = np.float32) -> Tensor:
    """One array of all demonstrations, one after the other, `[N, D]`."""
    arrays: list[Any] = []
    for name, rows in zip(names, lengths, strict=True):
        array = hdf5(file, name)
        if array is None:
            raise UserError(f"{file.filename}: no {name}, which other demonstrations have")
        check_hdf5(array)
        if array.ndim < 1 or array.shape[0] != rows:
            raise UserError(f"{file.filename}: {name} has shape {array.shape}; expected {rows} rows of vectors")
        if arrays and array.shape[1:] != arrays[0].shape[1:]:
            raise UserError(f"{file.filename}: {name} has width {_width(array)}, {names[0]} has {_width(arrays[0])}")
        arrays.append(array)
    width = math.prod(arrays[0].shape[1:])
    check_memory(sum(lengths) * width * np.dtype(dtype).itemsize, f"{file.filename}: {names[0]} and its like")
    out = np.empty((sum(lengths), width), dtype)
    start = 0
    for array, rows in counted([*zip(arrays, lengths, strict=True)], "reading demonstrations"):
        out[start : start + rows] = read_hdf5(array).reshape(rows, width)
        start += rows
    return torch.from_numpy(out)


def _beside(file: Any, demos: list[str], group: str, keys: tuple[str, ...] | list[str], lengths: list[int]) -> Tensor:
    """Several observations, concatenated to `[N, D]`."""
    return torch.cat([_columns(file, [f"{demo}/{group}/{key}" for demo in demos], lengths) for key in keys], 1)


def _pictures(
    path: Path, file: Any, demos: list[str], key: str, lengths: list[int], at: Tensor, after: Tensor
) -> HDF5Frames:
    """One camera's pictures in the order of `at` and `after`; `next_obs` has the successors without a next row."""
    shape = hdf5(file, f"{demos[0]}/obs/{key}").shape[1:]
    names = [f"{demo}/obs/{key}" for demo in demos]
    if int(after.max()) >= len(at):
        names += [f"{demo}/next_obs/{key}" for demo in demos]
    for name, rows in zip(names, lengths * 2, strict=False):
        array = hdf5(file, name)
        if array is None or array.shape != (rows, *shape) or array.dtype.kind not in "uf":
            found = "missing" if array is None else f"{array.dtype} of shape {array.shape}"
            raise UserError(f"{path}: {name} is {found}; expected {rows} pictures of shape {shape}")
        check_declared(array)
    episode = np.repeat(np.arange(len(demos)), lengths)
    step = np.concatenate([np.arange(rows) for rows in lengths])
    count = int(max(at.max(), after.max())) + 1
    array_of, row_of = np.zeros(count, np.int64), np.zeros(count, np.int64)
    known = after >= 0
    array_of[after[known]], row_of[after[known]] = episode[known] + len(demos), step[known]
    array_of[at], row_of[at] = episode, step  # where both have a picture, they are equal
    return HDF5Frames([path], names, array_of, row_of, layout_of(shape, f"{path}: {names[0]}"))


def _width(array: Any) -> Any:
    """Width of the rows of an array, or their shape where they have several axes."""
    shape = array.shape[1:] or (1,)
    return shape[0] if len(shape) == 1 else shape


def _cameras(observed: dict[str, Any]) -> dict[str, str]:
    """Camera -> its observation, named without `_image` at the end where no other has that name."""
    pictured = [key for key, array in observed.items() if holds_pictures(array.shape[1:], array.dtype)]
    found: dict[str, str] = {}
    for key in sorted(pictured, key=lambda key: key.endswith("_image")):
        short = camera_of(key).removesuffix("_image")
        found[camera_of(key) if short in found else short] = key
    return found


def _found(names: Any) -> str:
    return f"found: {', '.join(names) or 'none'}"
