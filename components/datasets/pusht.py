"""Push-T demonstrations in a npz file: a round end effector pushes a T-shaped block to its goal (Chi et al., 2023)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .episodes import Reader, as_tensor, chosen_cameras, from_columns, tell_unused
from .ogbench import names_in
from .untrusted import existing, read_npz

WHAT = "a npz file of Push-T (state, action, episode_ends)"
WIDTHS = {"state": 5, "action": 2}


@dataclass(frozen=True)
class PushTDataset(Reader):
    """Push-T demonstrations from a npz file: state `[N, 5]`, action `[N, 2]`, episode_ends `[E]`, reward `[N]`."""

    env_name = "pusht"

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats", "env"}.

        Items: observation.state `[5]` (agent x and y, block x and y in pixels of 512, block angle in radians), action
        `[2]` (target position of the agent, in pixels); with rewards also reward, terminated and truncated.

        Raises:
            UserError: no such file, arrays that are missing or do not fit together, a damaged or dangerous file.
        """
        path = existing(self.path, WHAT)
        chosen_cameras(self.cameras, [], str(path))
        names = self.renamed(names_in(path), path, {"observation.state": "state"})
        wanted = (*WIDTHS, "episode_ends", "reward")
        read = read_npz(path, [names.get(name, name) for name in wanted])
        arrays = {name: read[names.get(name, name)] for name in wanted if names.get(name, name) in read}
        for name in (*WIDTHS, "episode_ends"):
            if name not in arrays:
                found = ", ".join(names) or "none of its arrays"
                raise UserError(f"{path}: no {name!r}; found: {found}; expected {WHAT}; see --dataset.rename OLD=NEW")
        rest = {old: (None, "not of Push-T") for name, old in names.items() if name not in wanted}
        ends = arrays["episode_ends"]
        if (
            ends.ndim != 1
            or not np.issubdtype(ends.dtype, np.integer)
            or not len(ends)
            or np.any(np.diff(ends, prepend=0) < 1)
        ):
            raise UserError(
                f"{path}: episode_ends must be whole numbers that grow, the row after each episode's last one"
            )
        rows = int(ends[-1])
        for name, width in WIDTHS.items():
            if arrays[name].size == rows * width and len(arrays[name]) == rows:
                arrays[name] = arrays[name].reshape(rows, width)
            if arrays[name].shape != (rows, width):
                raise UserError(f"{path}: {name!r} has shape {arrays[name].shape}, expected {(rows, width)}")
        columns = {"observation.state": as_tensor(arrays["state"]), "action": as_tensor(arrays["action"])}
        if "reward" in arrays:
            if arrays["reward"].shape != (rows,):
                raise UserError(f"{path}: 'reward' has shape {arrays['reward'].shape}, expected {(rows,)}")
            columns["reward"] = as_tensor(arrays["reward"])
            # The reward is coverage / 0.95, at most 1; above a coverage of 0.95 the environment ends the episode.
            columns["terminated"] = columns["reward"] >= 1
        episodes = from_columns(columns, torch.from_numpy(ends.astype(np.int64)), str(path))
        episodes.stored |= tell_unused(str(path), rest)
        return self.finish(self.chosen(episodes)) | {"env": {"name": "pusht"}}
