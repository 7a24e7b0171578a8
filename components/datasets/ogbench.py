"""OGBench's npz files (Park et al., 2025).

A file has one row for each observation. `terminals` marks the last one of an episode, which has no successor and a
meaningless action, so 1001 rows are 1000 transitions. It marks the end of an episode and never of the task: all
episodes are truncated. The single-task variants relabel the same rows with rewards and terminate on success.
"""

import logging
import re
import warnings
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..data.pictures import IMAGES, as_bytes, holds_pictures, layout_of
from ..envs.metaworld import draw_off_screen
from ..errors import UserError, nearest, require
from .episodes import Episodes, Reader, as_tensor, choose_episodes, chosen_cameras, flat_names, tell_unused, with_final
from .untrusted import existing, read_npz

logger = logging.getLogger(__name__)
WHAT = "a npz file of OGBench (observations, actions, terminals)"
ARRAYS = ("observations", "actions", "terminals", "rewards", "masks")
FLAGS = ("terminals", "rewards", "masks")
# Names of the data that --dataset.rename may use, too.
ALIAS = {"observation.state": "observations", "action": "actions", "reward": "rewards"}
STATE = ("qpos", "button_states")  # the arrays that single-task rewards are computed from
KINDS = ("play", "noisy", "navigate", "stitch", "explore")  # of data: the word after the environment in a file's name


def names_in(path: Path) -> list[str]:
    """The names of the arrays of a npz file; none where it is no zip file."""
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


@dataclass(frozen=True)
class OGBenchDataset(Reader):
    """An OGBench npz file, goal-conditioned or relabelled with a single task's rewards."""

    task: str = ""
    """Single task whose rewards are added: 1 to 5, default, or a name such as cube-single-singletask-task2-v0; empty
    for none, which goal-conditioned trainers need."""
    success_timing: Literal["pre", "post"] = "pre"
    """Whether reward and success of a step are computed before its action, as in ogbench since 1.2, or after it."""
    val_file: bool = True
    """Hold out the file <name>-val.npz in the same folder, where it exists, instead of a part of the episodes."""

    env_name = "ogbench"

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}, and as "env" the environment of the task, or of the goals.

        Items: observation.state `[Ds]` (or observation.images.camera `[C, H, W]` of the visual sets), action `[Da]`;
        with a task also reward, terminated, truncated and next.observation.state. The reward is minus the number of
        unfinished parts of the task, and 0 with `terminated` when all are done.

        Raises:
            UserError: no such file or task, arrays that are missing or do not fit together, damaged or dangerous files,
                or a task without the package ogbench.
        """
        path = existing(self.path, WHAT)
        beside = path.with_name(f"{path.stem}-val.npz")
        files = [path, beside] if self.val_file and self.validation > 0 and beside.is_file() else [path]
        parts = [self._rows(file) for file in files]
        for name, array in parts[0].items():
            if array.shape[1:] != parts[-1].get(name, np.empty(0)).shape[1:]:
                raise UserError(f"{files[-1]}: {name!r} has another width than in {path}, or is missing")
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        last = rows["terminals"].astype(bool)
        counts = torch.from_numpy(np.diff(np.flatnonzero(last), prepend=-1) - 1)  # actions of each episode
        if int(counts.min()) < 1:
            raise UserError(f"{path}: an episode without an action; expected two rows or more up to each terminal")
        ends = counts.cumsum(0)
        at, after = with_final(ends)
        shapes = {"observation.state": rows["observations"].shape[1:], "action": rows["actions"].shape[1:]}
        columns = {"action": as_tensor(rows["actions"][~last].reshape(int((~last).sum()), -1))}
        name = self._environment(path)
        if name:
            columns |= self._rewards(path, name, rows, at, after)
        elif "rewards" in rows:
            columns["reward"] = as_tensor(rows["rewards"][~last])
            if "masks" in rows:
                columns["terminated"] = torch.from_numpy(rows["masks"][~last] == 0)
        observations: dict[str, Any] = {}
        if holds_pictures(shapes["observation.state"], rows["observations"].dtype):
            place = f"{path}: 'observations'"
            layout = layout_of(shapes.pop("observation.state"), place)
            if not chosen_cameras(self.cameras, ["camera"], str(path)):
                raise UserError(f"{path}: its observations are pictures; choose them with --dataset.cameras camera")
            observations[IMAGES + "camera"] = as_tensor(layout(as_bytes(rows["observations"], place)))
        else:
            chosen_cameras(self.cameras, [], str(path))
            state = rows["observations"].reshape(len(last), -1).astype(np.float32)
            observations["observation.state"] = as_tensor(state)
        stored = {"format": "ogbench", "env": name} | self._unused(files)
        names = {k: flat_names(k.removeprefix("observation."), shape) for k, shape in shapes.items() if len(shape) != 1}
        episodes = Episodes(str(path), ends, columns, observations, at, after, stored=stored, names=names)
        held_out, own = None, int(parts[0]["terminals"].astype(bool).sum())
        if self.episodes:  # of the first file; those of the other one stay held out
            chosen = choose_episodes(self.episodes, range(own), str(path))
            episodes, own = episodes.subset([*chosen, *range(own, len(ends))]), len(chosen)
        if len(files) == 2:
            held_out = torch.arange(len(episodes.ends)) >= own
        built = self.finish(episodes, held_out)
        if name:
            built["env"] = {"name": "ogbench", "id": name, "success_timing": self.success_timing}
        elif (stem := self._stem(path)) and not episodes.cameras:
            if find_spec("ogbench"):
                built["env"] = {"name": "ogbench", "id": f"{stem}-v0"}
            else:
                logger.info("%s: an evaluation in its environment needs ogbench (pip install ogbench)", path)
        return built

    def _rows(self, file: Path) -> dict[str, np.ndarray]:
        """The arrays of a file, after checks that they fit together."""
        found = names_in(file)
        names = self.renamed(found, file, ALIAS)
        wanted = ARRAYS + (STATE if self.task else ())
        read = read_npz(file, [names.get(name, name) for name in wanted])
        rows = {name: read[names.get(name, name)] for name in wanted if names.get(name, name) in read}
        for name in ("observations", "actions", "terminals"):
            if name not in rows:
                have = ", ".join(found) or "none of its arrays"
                raise UserError(f"{file}: no {name!r}; found: {have}; expected {WHAT}; see --dataset.rename OLD=NEW")
        count = len(rows["observations"]) if rows["observations"].ndim else 0
        for name, array in rows.items():
            if name in FLAGS and array.ndim == 2 and array.shape[1] == 1:
                array = rows[name] = array.reshape(-1)
            if array.ndim < 1 or (name in FLAGS and array.ndim > 1) or len(array) != count:
                raise UserError(
                    f"{file}: {name!r} has shape {array.shape}; expected {count} rows like the observations"
                )
        if not count:
            raise UserError(f"{file}: the dataset is empty; expected at least one episode with one step")
        if not rows["terminals"][-1]:
            raise UserError(f"{file}: the last row is not marked in 'terminals'; the file is incomplete")
        return rows

    def _unused(self, files: list[Path]) -> dict[str, str]:
        """The arrays that are not read, for `stored`."""
        names = self.renamed(names_in(files[0]), files[0], ALIAS)
        wanted = ARRAYS + (STATE if self.task else ())
        why = dict.fromkeys(STATE, "for --dataset.task")
        rest = {old: (None, why.get(name, "not of OGBench")) for name, old in names.items() if name not in wanted}
        return tell_unused(str(files[0]), rest)

    def _stem(self, path: Path) -> str:
        """The environment in the file's name, such as cube-single; "" where the name has none."""
        words = path.stem.split("-")
        kind = next((word for word in words if word in KINDS), "")
        return "-".join(words[: words.index(kind)]) if kind else ""

    def _environment(self, path: Path) -> str:
        """Id of the single-task environment, "" without a task."""
        if not self.task:
            return ""
        if self.task.isdigit() or self.task == "default":
            if not (stem := self._stem(path)):
                raise UserError(
                    f"--dataset.task {self.task}: the name of {path} does not name the environment; set the task to"
                    " cube-single-singletask-task2-v0"
                )
            number = f"-task{self.task}" if self.task.isdigit() else ""
            return f"{stem}-singletask{number}-v0"
        return re.sub(f"-({'|'.join(KINDS)})-singletask", "-singletask", self.task)  # also from the name of a dataset

    def _rewards(self, path: Path, name: str, rows: dict[str, np.ndarray], at: Any, after: Any) -> dict[str, Any]:
        """reward and terminated by the library's relabelling, which computes both from the simulator's state."""
        draw_off_screen()  # before MuJoCo is first imported, which reads the setting
        require("ogbench", 'ogbench "mujoco==3.3.0"')
        from gymnasium import make, registry
        from ogbench.relabel_utils import relabel_dataset

        if name not in registry:
            known = [known for known in registry if "singletask" in known]
            raise UserError(f"--dataset.task {self.task}: no environment {name!r} in ogbench; {nearest(name, known)}")
        judged = at if self.success_timing == "pre" else after
        state = {key: rows[key][judged.numpy()] for key in STATE if key in rows}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about spaces, and about a display that is not used
            env = make(name)
            try:
                relabel_dataset(name, env, state)
            except (KeyError, ValueError, IndexError) as error:
                lacks = f"it lacks what {name!r} is judged by ({type(error).__name__}: {error})"
                raise UserError(f"{path}: {lacks}") from error
            finally:
                env.close()
        return {"reward": as_tensor(state["rewards"]), "terminated": torch.from_numpy(state["masks"] == 0)}
