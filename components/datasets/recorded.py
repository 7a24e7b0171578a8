"""Held-out episodes of a recording, for an evaluation that walks through each in time (`acting/recordings.py`)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts import GOAL, STATE
from ..data.fingerprint import changes, fingerprint
from ..data.items import as_kept
from ..errors import UserError, plain
from ..run.inheritance import read_inherited
from .episodes import EpisodeDataset, Episodes, flat_names, take
from .frames import Frames


class Recording:
    """One recorded episode: what was observed, and what was done.

    Args:
        episodes: The data.
        steps: `[T]`, the steps of this episode there.
    """

    def __init__(self, episodes: Episodes, steps: Tensor) -> None:
        self.episodes, self.steps = episodes, steps

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def data(self) -> str:
        """Name of the data, a path for what is read from files."""
        return self.episodes.name

    @property
    def number(self) -> int:
        """The data's own number of the episode, or its place."""
        return self.episodes.place(int(self.steps[0]))[0]

    @cached_property
    def actions(self) -> np.ndarray:
        """`[T, Da]` float64, in the data's units; discrete ones are a single number each."""
        return self.episodes.columns["action"][self.steps].numpy().astype(np.float64).reshape(len(self), -1)

    @property
    def names(self) -> list[str]:
        """The name of each dimension of the action; by its place where the data has no names, or some twice."""
        width, names = self.actions.shape[1], self.names_of("action")
        return names if len(set(names)) == width else flat_names("action", (width,))

    def names_of(self, key: str) -> list[str]:
        """The data's names of the dimensions of a vector; [] where it has none."""
        return [plain(name) for name in self.episodes.names.get(key, ())]

    @property
    def tasks(self) -> set[str]:
        """The texts of its tasks."""
        numbers = self.episodes.columns.get("task_index")
        return set() if numbers is None else {self.episodes.tasks[i] for i in numbers[self.steps].unique().tolist()}

    def shape_of(self, key: str) -> tuple[int, ...] | None:
        """Shape of an observation at one step; None where it was not recorded."""
        store = self.episodes.observations.get(STATE if self._is_goal(key) else key)
        return None if store is None else tuple(store.shape if isinstance(store, Frames) else store.shape[1:])

    def read(self, places: Sequence[int], keys: Iterable[str]) -> dict[str, Any]:
        """The observations `keys` at steps `places` of the episode, `[n, ...]`, and the texts of their tasks.

        The goal of a goal-conditioned policy is the state that the episode ends in.
        """
        data, steps = self.episodes, self.steps[list(places)]
        found: dict[str, Any] = {}
        for key in keys:
            if self._is_goal(key):
                last = self.steps[-1:]
                final = torch.where(data.after[last] >= 0, data.after[last], data.at[last])
                found[key] = take(data.observations[STATE], final).expand(len(steps), -1)
            else:
                found[key] = take(data.observations[key], data.at[steps])
        if "task_index" in data.columns:
            found["task"] = [data.tasks[i] for i in data.columns["task_index"][steps].tolist()]
        return found

    def _is_goal(self, key: str) -> bool:
        return key == GOAL and key not in self.episodes.observations


def recordings(dataset: Any) -> list[Recording]:
    """The episodes whose steps are items of a dataset, or of a mixture's sources; [] for data without episodes."""
    found: list[Recording] = []
    for source in getattr(dataset, "datasets", [dataset]):
        if isinstance(source, EpisodeDataset) and "action" in source.episodes.columns:
            episode = torch.searchsorted(source.episodes.ends, source.rows, right=True)
            lengths = episode.unique_consecutive(return_counts=True)[1]
            found += [Recording(source.episodes, steps) for steps in source.rows.split(lengths.tolist())]
    return found


def to_compare(run: Path, factory: Any, options: Any, asked: bool) -> tuple[list[Recording], str]:
    """The episodes to compare with, and what they are from, in full; "" for the run's own, of which it held out some.

    Args:
        factory: Of the data, with its options.
        asked: Whether the command line sets an option of the data, which may then be other data.

    Raises:
        UserError: no such episodes; the data of the run is not what it was, or another part of it would be held out.
    """
    launch = {"local_rank": 0, "dist_enabled": False, "save_dir": str(run)}
    built = as_kept(factory.build(opt_params=launch, params=asdict(options)))
    held_out = recordings(built.get("validation"))
    before: dict[str, Any] = read_inherited(run).get("data") or {}
    now = fingerprint(built)
    changed = changes(before, now) if before else ""
    if changed and not asked:
        raise UserError(f"the data changed since the run began: {changed}; restore it, or see --dataset.path")
    same = _recorded(before, "dataset") == _recorded(now, "dataset")  # maybe with more cameras
    if same and _recorded(before, "validation") != _recorded(now, "validation"):
        raise UserError(
            "another part of the run's own recordings would be held out, from which it has learnt; leave out"
            " --dataset.validation and --dataset.seed"
        )
    if same or not (changed or asked):
        if not held_out:
            raise UserError("the run held out no episode of its own; name other recordings, as with --dataset.path")
        return held_out, ""
    found = recordings(built["dataset"]) + held_out
    if not found:
        raise UserError(f"the data is a {type(built['dataset']).__name__} of single items; expected episodes")
    return found, ", ".join(dict.fromkeys(episode.data for episode in found))


def _recorded(data: dict[str, Any], part: str) -> list[Any]:
    """What was done in each source of a fingerprint: borders and actions, and of the held-out part its steps."""
    whole = data.get(part) or {}
    sources = whole.get("sources", [whole])
    chosen = [one.get("chosen") if part == "validation" else None for one in sources]
    actions = [(one.get("borders"), one.get("content", {}).get("action")) for one in sources]
    return [*zip(actions, chosen, strict=True)]
