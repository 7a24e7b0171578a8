"""The form in which a dataset's actions and states are learnt: options, and statistics of what is learnt."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..data.actions import STATE, ActionForm, Dimensions, check_rotations, described, form_of, step_statistics
from ..data.normalisation import statistics
from ..errors import UserError
from ..run.progress import phase

if TYPE_CHECKING:
    from .episodes import EpisodeDataset, Episodes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LearntOptions:
    """Options of the form in which actions (`data/actions.py`) and states are learnt; the policy does the same."""

    action: Literal["absolute", "relative", "delta"] = "absolute"
    """How actions are learnt: as they are, relative to the state at the chunk's start, or as steps from one to the
    next, the first one from the state. Dimensions of action and state are paired by their names where both have some,
    or else by their places."""
    action_keys: tuple[str, ...] = ()
    """Dimensions that --dataset.action changes, all by default: names or places such as 0:6, NAME=STATE_NAME for a pair
    of other names, and '!gripper' for one that stays absolute."""
    rotations: tuple[str, ...] = ()
    """Rotations of the action, which are learnt as 6D (Zhou et al., 2019), as NAMES=KIND, such as rx,ry,rz=axis_angle
    or 3:7=quaternion_xyzw, with @NAMES=KIND after it where the state has another form. Kinds: axis_angle,
    quaternion_xyzw, quaternion_wxyz, matrix, 6d_rows, 6d_columns, euler_xyz (fixed axes), euler_XYZ (turning axes) and
    the other orders."""
    state_steps: int = 1
    """Steps of the state alone, the last being now, as one longer vector; pictures keep their --dataset.obs-steps."""

    def form(self, episodes: "Episodes") -> ActionForm | None:
        """The form of the actions of some episodes that these options describe; None for actions as they are.

        Raises:
            UserError: as `form_of`; actions that are no vectors of numbers, or no rotations.
        """
        if self.action == "absolute" and not self.rotations and not self.action_keys:
            return None
        column, state = episodes.columns.get("action"), episodes.observations.get(STATE)
        if column is None or column.ndim != 2 or not column.is_floating_point():
            raise UserError(f"--dataset.action {self.action}: the actions of {episodes.name} are no vectors of numbers")
        state = state if isinstance(state, Tensor) and state.ndim == 2 else None
        action = Dimensions.of("action", column.shape[1], episodes.names.get("action", ()))
        names = episodes.names.get(STATE, ())
        of_state = None if state is None else Dimensions.of(STATE, state.shape[1], names)
        form = form_of(self.action, self.action_keys, self.rotations, action, of_state)
        check_rotations(form, column, state, episodes.name)
        logger.info("%s", described(form, action, of_state))
        return form

    def remember(self, datasets: Iterable[Any], norm_stats: dict[str, Any]) -> None:
        """Give the states of all these datasets their history, and repeat their statistics.

        Raises:
            UserError: no such state, or a history of all observations beside it.
        """
        if self.state_steps == 1:
            return
        for dataset in datasets:
            store = getattr(getattr(dataset, "episodes", None), "observations", {}).get(STATE)
            if self.state_steps < 1 or not isinstance(store, Tensor) or store.ndim != 2:
                raise UserError(f"--dataset.state-steps {self.state_steps} must be 1 or more, of data with {STATE!r}")
            if dataset.obs_steps > 1:
                rest = f"the state has a history already, of --dataset.obs-steps {dataset.obs_steps}; set that to 1"
                raise UserError(f"--dataset.state-steps {self.state_steps}: {rest}")
            dataset.state_steps = self.state_steps
        norm_stats[STATE] = {name: list(value) * self.state_steps for name, value in norm_stats[STATE].items()}

    def formed(self, built: dict[str, Any]) -> dict[str, Any]:
        """The result of `build` with actions and states as these options say, and their statistics."""
        dataset = built["dataset"]
        self.remember([built[part] for part in ("dataset", "validation") if part in built], built["norm_stats"])
        if (form := self.form(dataset.episodes)) is not None:
            form = replace(form, stats=built["norm_stats"]["action"])
            for part in (dataset, built.get("validation")):
                if part is not None:
                    part.form = form
            with phase("computing statistics"):
                built["norm_stats"]["action"] = learnt_statistics([dataset], statistics_of)
        return built


def statistics_of(parts: list[Tensor]) -> dict[str, list[float]]:
    """`statistics` of the rows of all parts."""
    return statistics(torch.cat(parts))


def learnt_statistics(
    datasets: Sequence["EpisodeDataset"], statistics: Callable[[list[Tensor]], dict[str, list[float]]]
) -> dict[str, Any]:
    """Statistics of the actions as they are learnt: `[D]`, or `[T, D]` where steps of a chunk differ by their nature.

    Args:
        statistics: Of the actions `[n, D]` of each dataset, maybe none.
    """
    form, steps = datasets[0].form, datasets[0].action_steps
    actions = [dataset.learnt() for dataset in datasets]
    if form is None or form.mode == "absolute" or steps == 1:
        return statistics([at(0) for at in actions])
    counts = [sum(of) for of in zip(*(dataset.counts() for dataset in datasets), strict=True)]

    def of(steps: Sequence[int]) -> dict[str, list[float]]:
        return statistics([torch.cat([at(step) for step in steps]) for at in actions])

    return step_statistics(counts, of)
