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

from ..errors import UserError
from .environment import recoverable
from .episodes import Episodes, Reader, as_tensor, chosen_cameras, join_successors, steps_only
from .untrusted import existing, hdf5, open_hdf5, read_hdf5

WHAT = "an HDF5 file of D4RL (observations, actions, rewards, terminals)"
NEEDED, OPTIONAL = ("observations", "actions", "rewards", "terminals"), ("timeouts", "next_observations")

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

        Items: observation.state `[Ds]`, action `[Da]`, reward, terminated, truncated, next.observation.state.

        Raises:
            UserError: no such file, arrays that are missing or do not fit together, damaged, dangerous or too large.
        """
        if self.max_episode_steps < 1:
            raise UserError(f"--dataset.max-episode-steps {self.max_episode_steps} must be 1 or more")
        path = existing(self.path, WHAT)
        chosen_cameras(self.cameras, [], str(path))
        episodes = read(path, self.max_episode_steps, self.terminals_end_episodes)
        built = self.finish(episodes)
        name = (self.task or path.stem).lower().replace("_", "-")
        for prefix in sorted(REFERENCE_SCORES, key=len, reverse=True):
            if name.startswith(prefix):
                built["reference_scores"] = REFERENCE_SCORES[prefix]
                if prefix in ENVIRONMENTS and (env := recoverable(episodes, {"id": ENVIRONMENTS[prefix]})):
                    built["env"] = env
                break
        return built


def read(path: Path, max_episode_steps: int = 1000, terminals_end: bool | None = None) -> Episodes:
    """Read a file; the arguments are options of `D4RLDataset`."""
    with open_hdf5(path) as file:
        arrays: dict[str, np.ndarray] = {}
        for name in NEEDED + OPTIONAL:
            if (array := hdf5(file, name)) is not None:
                arrays[name] = read_hdf5(array)
            elif name in NEEDED:
                raise UserError(f"{path}: no {name!r}; found: {', '.join(file) or 'nothing'}; expected {WHAT}")
        if terminals_end is None:
            terminals_end = hdf5(file, "infos/goal") is None
    n = len(arrays["observations"]) if arrays["observations"].ndim else 0
    for name, array in arrays.items():
        if name in ("rewards", "terminals", "timeouts"):
            array = arrays[name] = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
        axes = 1 if name in ("rewards", "terminals", "timeouts") else 2
        if array.ndim != axes or len(array) != n:
            raise UserError(f"{path}: {name!r} has shape {array.shape}; expected {axes} axes and {n} rows")
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
        starts = [0, *ends[:-1].tolist()]
        cuts = [range(a + max_episode_steps, b, max_episode_steps) for a, b in zip(starts, ends.tolist(), strict=True)]
        ends = torch.tensor(sorted({*ends.tolist(), *(cut for span in cuts for cut in span)}))
    columns = {"action": as_tensor(arrays["actions"]), "reward": as_tensor(arrays["rewards"]), "terminated": terminated}
    now = {"observation.state": as_tensor(arrays["observations"].astype(np.float32))}
    if following is None:
        return Episodes(str(path), ends, columns, now, *steps_only(ends), stored={"format": "d4rl"})
    then = {"observation.state": as_tensor(following.astype(np.float32))}
    return Episodes(str(path), ends, columns, *join_successors(now, then, ends), stored={"format": "d4rl"})
