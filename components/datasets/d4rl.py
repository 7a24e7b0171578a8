"""D4RL's HDF5 files (Fu et al., 2020): all episodes one after the other in flat arrays.

A file has `observations`, `actions`, `rewards`, `terminals`, and usually `timeouts` and `next_observations`. Where
successors are missing, the next row is the successor, except at the end of an episode: that row is kept for imitation,
and left out by `transitions()`, as D4RL's own `qlearning_dataset` does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.features import INTERVENTION
from ..data.pictures import IMAGES, as_bytes, holds_pictures, layout_of
from ..errors import UserError
from .environment import recoverable
from .episodes import (
    Episodes,
    Reader,
    as_flags,
    as_tensor,
    chosen_cameras,
    flat_names,
    join_successors,
    steps_only,
    tell_unused,
)
from .untrusted import existing, hdf5, open_hdf5, read_hdf5

WHAT = "an HDF5 file of D4RL (observations, actions, rewards, terminals)"
NEEDED, OPTIONAL = ("observations", "actions", "rewards", "terminals"), ("timeouts", "next_observations", INTERVENTION)
FLAGS = ("rewards", "terminals", "timeouts", INTERVENTION)
# Names of the data that --dataset.rename may use, too.
ALIAS = {"observation.state": "observations", "action": "actions", "reward": "rewards", "terminated": "terminals"}
ALIAS |= {"truncated": "timeouts", "next.observation.state": "next_observations"}

# (random, expert) returns with which D4RL normalises: 100 * (return - random) / (expert - random); its infos.py.
REFERENCE_SCORES: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
}
# The physics that the v2 files were recorded in; Gymnasium's v5 differs in rewards and friction.
ENVIRONMENTS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}


@dataclass(frozen=True)
class D4RLDataset(Reader):
    """A D4RL file: flat HDF5, with or without timeouts and next_observations."""

    task: str = ""
    """Name such as hopper-medium-v2, for reference scores and environment; by default the file's name."""
    max_episode_steps: int = 1000
    """Steps after which an episode was cut, in files without timeouts."""
    terminals_end_episodes: bool | None = None
    """Whether `terminals` end episodes. None: not in files with infos/goal (antmaze, maze2d), whose terminals mark that
    the goal was reached while the episode continued."""

    env_name = "gymnasium"

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}, "env" where it can be made, "reference_scores" where known.

        Items: observation.state `[Ds]`, or observation.images.camera `[C, H, W]` of a file of pictures, action `[Da]`,
        reward, terminated, truncated, next.observation.X.

        Raises:
            UserError: no such file, arrays that are missing or do not fit together, damaged, dangerous or too large.
        """
        if self.max_episode_steps < 1:
            raise UserError(f"--dataset.max-episode-steps {self.max_episode_steps} must be 1 or more")
        path = existing(self.path, WHAT)
        episodes = self.chosen(read(path, self))
        episodes.stored["task"] = self.task
        built = self.finish(episodes)
        name = (self.task or path.stem).lower().replace("_", "-")
        for prefix in sorted(REFERENCE_SCORES, key=len, reverse=True):
            if name.startswith(prefix):
                built["reference_scores"] = REFERENCE_SCORES[prefix]
                if prefix in ENVIRONMENTS and (env := recoverable(episodes, {"id": ENVIRONMENTS[prefix]})):
                    built["env"] = env
                break
        return built


def read(path: Path, options: D4RLDataset) -> Episodes:
    """Read a file."""
    arrays, terminals_end, stored = _arrays(path, options)
    n = len(arrays["observations"])
    if n == 0:
        raise UserError(f"{path}: the dataset is empty; expected at least one episode with one step")
    following = arrays.get("next_observations")
    if following is not None and following.shape != arrays["observations"].shape:
        raise UserError(f"{path}: next_observations {following.shape}, observations {arrays['observations'].shape}")
    terminated = torch.from_numpy(arrays["terminals"].astype(bool))
    end = terminated.clone() if terminals_end else torch.zeros(n, dtype=torch.bool)
    if "timeouts" in arrays:
        end |= torch.from_numpy(arrays["timeouts"].astype(bool))
    end[-1] = True
    ends = end.nonzero().squeeze(1) + 1
    if "timeouts" not in arrays:
        starts, most = torch.cat([ends.new_zeros(1), ends[:-1]]), options.max_episode_steps
        long = ends - starts > most
        spans = zip(starts[long].tolist(), ends[long].tolist(), strict=True)
        ends = torch.cat([ends, *(torch.arange(a + most, b, most) for a, b in spans)]).unique()  # sorted
    shapes = {"observation.state": arrays["observations"].shape[1:], "action": arrays["actions"].shape[1:]}
    names = {k: flat_names(k.removeprefix("observation."), shape) for k, shape in shapes.items() if len(shape) != 1}
    columns = {"action": _vectors(arrays["actions"]), "reward": as_tensor(arrays["rewards"]), "terminated": terminated}
    if INTERVENTION in arrays:
        columns[INTERVENTION] = as_flags(arrays[INTERVENTION], f"{path}: {INTERVENTION!r}")
    key, convert = "observation.state", _vectors
    if holds_pictures(arrays["observations"].shape[1:], arrays["observations"].dtype):
        place = f"{path}: 'observations'"
        layout = layout_of(arrays["observations"].shape[1:], place)
        key, convert = IMAGES + "camera", lambda array: as_tensor(layout(as_bytes(array, place)))
        names.pop("observation.state", None)
    found = ["camera"] if key != "observation.state" else []
    if not chosen_cameras(options.cameras, found, str(path)) and found:
        raise UserError(f"{path}: its observations are pictures; choose them with --dataset.cameras camera")
    now = {key: convert(arrays["observations"])}
    if following is None:
        return Episodes(str(path), ends, columns, now, *steps_only(ends), stored=stored, names=names)
    then = {key: convert(following)}
    return Episodes(str(path), ends, columns, *join_successors(now, then, ends), stored=stored, names=names)


def _arrays(path: Path, options: D4RLDataset) -> tuple[dict[str, np.ndarray], bool, dict[str, str]]:
    """The arrays of a file `[N, ...]`, whether `terminals` end episodes, and what is stored of the format."""
    with open_hdf5(path) as file:
        names = options.renamed(file, path, ALIAS)
        arrays: dict[str, np.ndarray] = {}
        for name in NEEDED + OPTIONAL:
            if (array := hdf5(file, names.get(name, name))) is not None:
                arrays[name] = read_hdf5(array)
            elif name in NEEDED:
                found = ", ".join(file) or "nothing"
                raise UserError(f"{path}: no {name!r}; found: {found}; expected {WHAT}; see --dataset.rename OLD=NEW")
        asked = options.terminals_end_episodes
        ends = hdf5(file, "infos/goal") is None if asked is None else asked
        rest = {old: (None, "not of D4RL") for name, old in names.items() if name not in NEEDED + OPTIONAL}
    count = len(arrays["observations"]) if arrays["observations"].ndim else 0
    for name, array in arrays.items():
        if name in FLAGS and array.ndim == 2 and array.shape[1] == 1:
            array = arrays[name] = array.reshape(-1)
        axes = "1 axis" if name in FLAGS else "1 axis or more"
        if array.ndim < 1 or (name in FLAGS and array.ndim > 1) or len(array) != count:
            raise UserError(f"{path}: {name!r} has shape {array.shape}; expected {axes} and {count} rows")
    return arrays, ends, {"format": "d4rl"} | tell_unused(str(path), rest)


def _vectors(array: np.ndarray) -> Tensor:
    """An array of any number of axes as `[N, D]` float32."""
    return as_tensor(array.reshape(len(array), -1).astype(np.float32))
