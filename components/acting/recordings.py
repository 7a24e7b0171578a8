"""Evaluation against recordings, where no environment is known: predicted against recorded actions, open loop.

A policy walks through each held-out episode in time. It observes what was recorded, and plans when it would plan if it
acted; what it would have done is compared with what was done, for each dimension of the action in the data's units.
Nothing that it does changes what it observes next, so a low error is no proof that it can act alone.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..data.actions import ActionForm, robot_stats, robot_width
from ..data.features import frame_shape, reordered, same_frame
from ..data.figures import literal, save_figure
from ..data.normalisation import without_spread
from ..data.random_state import preserved
from ..errors import UserError, first_line, nearest, one_line, plain
from .divided import Divided
from .policy import Policy

AHEAD = 8  # steps whose observations are read together
SHOWN = 3  # episodes of a picture
PANELS = 16  # dimensions of a picture
LONGEST_NAME = 30  # characters of a dimension's name in a picture


class Recording(Protocol):
    """A recorded episode, such as `datasets.recorded.Recording`."""

    data: str  # the name of what it is from
    number: int
    names: list[str]  # of the action's dimensions
    tasks: set[str]  # texts of its tasks
    actions: np.ndarray  # [T, Da] in the data's units; discrete ones [T, 1]

    def __len__(self) -> int: ...

    def names_of(self, key: str) -> list[str]: ...

    def shape_of(self, key: str) -> tuple[int, ...] | None: ...

    def read(self, places: Sequence[int], keys: Sequence[str]) -> dict[str, Any]: ...


class Recordings(Divided):
    """Evaluates a policy against recorded episodes, which are divided among the processes.

    Args:
        policy: The policy.
        episodes: The recordings.
        seed: Of the noise in the first episode; the others follow.
        slots: Episodes that a process walks through together.
        rank, world: Rank of this process, and number of processes.
        tick: Called at each step; an exception from it ends the evaluation.
        data: What the episodes are from, for the record; by default the names of their files, without folders.

    Raises:
        UserError: no episodes, or their actions or observations do not match the policy.
    """

    env = None  # none is known

    def __init__(
        self,
        policy: Any,
        episodes: Sequence[Recording],
        seed: int,
        slots: int,
        rank: int = 0,
        world: int = 1,
        tick: Callable[[], None] = lambda: None,
        data: str = "",
    ) -> None:
        check_recordings(policy, episodes)
        super().__init__(policy, len(episodes), rank, world, tick)
        self.episodes, self.seed, self.slots = list(episodes), seed, slots
        self.names = self.episodes[0].names
        self.discrete, self.form = "classes" in policy.spec["action"], ActionForm.of(policy.spec)
        self.deviation = np.ones(1) if self.discrete else deviations(policy.spec["action"], self.episodes)
        sources = list(dict.fromkeys(Path(episode.data).name for episode in self.episodes))
        self.record = {"name": "recordings", "data": data or ", ".join(sources)}
        self.labels = [
            f"{Path(episode.data).name} {episode.number}" if len(sources) > 1 else episode.number
            for episode in self.episodes
        ]
        self.reference: Any = None  # recordings have no return

    @classmethod
    def of(cls, args: Any, run: Any, policy: Policy, held_out: Sequence[Recording], world: int) -> "Recordings | None":
        """The evaluator of a run; None, with a reported reason, if no episode is held out.

        Args:
            args: With `eval_episodes`, `eval_envs`, `eval_seed` and `dataset_options`.

        Raises:
            UserError: as of the class.
        """
        unknown = "no environment is known (see --env)"
        if not held_out:
            off = getattr(args.dataset_options, "validation", None) == 0
            how = "; --dataset.validation 0.1 holds out one in ten" if off else ""
            run.say(f"no evaluation: {unknown}, and no episodes are held out{how}")
            return None
        chosen = evenly(held_out, args.eval_episodes)
        with one_line("recordings"):
            found = cls(policy, chosen, args.eval_seed, args.eval_envs, run.rank, world, run.tick)
        found.seen = run.progress.done
        count = f"{len(chosen)} held-out episode{'s' * (len(chosen) > 1)}"
        run.say(f"evaluation against {count} of the recordings, since {unknown}")
        return found

    def _part(self) -> list[tuple[int, dict[str, Any]]]:
        """(place, errors) of the episodes of this process; those of similar length go together."""
        order = sorted(range(len(self.episodes)), key=lambda place: len(self.episodes[place]))
        mine = order[self.rank :: self.world]
        found: list[tuple[int, dict[str, Any]]] = []
        for start in range(0, len(mine), self.slots):
            places = mine[start : start + self.slots]
            for place, predicted in zip(places, self._predict(places, start), strict=True):
                found.append((place, self._errors(place, predicted)))
        return found

    def _predict(self, places: Sequence[int], before: int = 0) -> list[np.ndarray]:
        """The actions `[T, Da]` that the policy predicts in the episodes at `places`, after so many others."""
        episodes, seeds = [self.episodes[place] for place in places], [self.seed + place for place in places]
        predicted = walk(self.policy, episodes, seeds, self.tick, lambda done: self._ended(before + done))
        # The same rotation has several numbers: those nearest to the recorded ones are compared.
        alike = lambda actions, to: self.form.nearest(torch.from_numpy(actions), torch.from_numpy(to)).numpy()  # noqa: E731
        return [alike(*pair) for pair in zip(predicted, (episode.actions for episode in episodes), strict=True)]

    def _errors(self, place: int, predicted: np.ndarray) -> dict[str, Any]:
        """Mean errors of an episode: absolute and squared ones `[Da]`, and by steps since the plan `[action_steps]`.

        Raises:
            RuntimeError: the policy has predicted NaN or Inf.
        """
        recorded = self.episodes[place].actions
        if not np.isfinite(predicted).all():
            step, dimension = np.argwhere(~np.isfinite(predicted))[0]
            where = f"step {step} of episode {self.labels[place]}"
            raise RuntimeError(
                f"the policy predicts {predicted[step, dimension]} for {self.names[dimension]} at {where}"
            )
        error = (predicted != recorded).astype(np.float64) if self.discrete else predicted - recorded
        scaled = (np.abs(error) / self.deviation).mean(1)  # [T]
        period = self.policy.action_steps
        later = [scaled[age::period].mean() if age < len(scaled) else np.nan for age in range(period)]
        return {"absolute": np.abs(error).mean(0), "squared": (error**2).mean(0), "later": np.array(later)}

    def _summarise(self, found: list[tuple[int, dict[str, Any]]], step: int) -> dict[str, Any]:
        """One line of `eval.jsonl`; long and short episodes count alike."""
        errors = [one for _, one in sorted(found, key=lambda pair: pair[0])]
        absolute, squared = (np.mean([one[kind] for one in errors], 0) for kind in ("absolute", "squared"))
        later = np.array([one["later"] for one in errors])  # [E, action_steps]
        later = later[:, ~np.isnan(later).all(0)]  # steps that some episode is long enough for
        by_step = np.nanmean(later, 0) if later.shape[1] > 1 and self.policy.inference["ensemble"] is None else None
        return {
            "step": step,
            "env": self.record,
            "episodes": len(errors),
            "rule": "open loop",
            "success_rate": None,
            "success_ci": None,
            "return_mean": None,
            "length_mean": float(np.mean([len(episode) for episode in self.episodes])),
            "action_error": float((absolute / self.deviation).mean()),
            "action_mse": float((squared / self.deviation**2).mean()),
            "action_worst": self.names[int((absolute / self.deviation).argmax())],
            "action_error_by_name": dict(zip(self.names, absolute.tolist(), strict=True)),
            "action_mse_by_name": dict(zip(self.names, squared.tolist(), strict=True)),
            "action_error_by_step": None if by_step is None else by_step.tolist(),
            "action_error_of": [float((one["absolute"] / self.deviation).mean()) for one in errors],
            "recordings": self.labels,
            "discrete": self.discrete,
            "seeds": [self.seed + place for place in range(len(errors))],
            "inference": self.policy.inference,
        }

    @staticmethod
    def headline(result: dict[str, Any]) -> str:
        """One evaluation in a line for the screen."""
        count = f"{result['episodes']} episode{'s' * (result['episodes'] != 1)}"
        if result["discrete"]:
            return f"recordings: {100 * result['action_error']:.1f} % other actions over {count}"
        worst = result["action_worst"]
        return (
            f"recordings: action error {result['action_error']:.3g} of a deviation over {count}"
            f" (worst: {shortened(worst)} {result['action_error_by_name'][worst]:.3g})"
        )

    def film(self, path: Path) -> str:
        """Draw the actions in three of the episodes, as `path` with the ending .png; returns why not, or ""."""
        try:
            places = evenly(range(len(self.episodes)), SHOWN)
            with preserved():
                predicted = self._predict(places)
            path.parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of letters that matplotlib's font lacks
                self._draw(places, predicted, path.with_suffix(".png"))
        except Exception as error:
            return first_line(error)
        return ""

    def _draw(self, places: Sequence[int], predicted: list[np.ndarray], path: Path) -> None:
        """A column for each episode, and a row for each dimension: of many, those with the largest errors."""
        from matplotlib.figure import Figure

        absolute = [self._errors(*pair)["absolute"] for pair in zip(places, predicted, strict=True)]
        scaled = np.array(absolute) / self.deviation  # [episodes, Da]
        rows, columns = sorted(np.argsort(-scaled.mean(0), kind="stable")[:PANELS].tolist()), len(places)
        width, height = 0.7 + 4.2 * columns, 1.6 + 1.3 * len(rows)  # inches, as are the margins
        margins = {"left": 0.55 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - 1.1 / height}
        spaces = {"wspace": 0.06, "hspace": 0.4}
        figure: Any = Figure(figsize=(width, height))
        axes = figure.subplots(
            len(rows), columns, squeeze=False, sharex="col", sharey="row", gridspec_kw=margins | spaces
        )
        for column, (place, actions) in enumerate(zip(places, predicted, strict=True)):
            for axis, row in zip(axes[:, column], rows, strict=True):
                self._draw_panel(axis, self.episodes[place].actions[:, row], actions[:, row])
                name = f"{shortened(self.names[row])}, error {absolute[column][row]:.3g}"
                axis.set_title(literal(name), fontsize=7, loc="left", pad=3)
            mean = f"{scaled[column].mean():.3g}" + " of a deviation" * (not self.discrete)
            top = literal(f"episode {self.labels[place]}, {len(actions)} steps, error {mean}")
            where: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes[0, column].annotate(top, (0.5, 1), xytext=(0, 16), **where)
            axes[-1, column].set_xlabel("step", fontsize=8)
        some = "" if len(rows) == len(self.names) else f"; {len(rows)} of {len(self.names)}, those with the most error"
        text = f"Actions of {shortened(self.record['data'], 60)}, in the data's units{some}"
        figure.suptitle(literal(text), fontsize=9, x=0.2 / width, ha="left", y=1 - 0.1 / height, va="top")
        where = {"loc": "upper left", "bbox_to_anchor": (0.08 / width, 1 - 0.28 / height), "frameon": False}
        figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=3, **where)
        save_figure(figure, path, dpi=100)

    def _draw_panel(self, axis: Any, recorded: np.ndarray, predicted: np.ndarray) -> None:
        """One dimension `[T]` in one episode."""
        axis.plot(recorded, color="0.55", linewidth=2.2, label="recorded")
        axis.plot(predicted, color="tab:red", linewidth=1.0, label="predicted")
        if self.policy.action_steps > 1:
            starts = np.arange(0, len(predicted), self.policy.action_steps)
            axis.plot(starts, predicted[starts], "o", color="tab:red", markersize=3, label="planned here")
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)


def walk(
    policy: Any,
    episodes: Sequence[Recording],
    seeds: Sequence[int],
    tick: Callable[[], None] = lambda: None,
    seen: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """The actions `[T, Da]` that a policy predicts in each of several episodes, which it walks through together.

    Only what it looks at is read: a chunk of 100 steps is planned from the observations at its first step alone. Its
    task is the recorded one, unless its settings name another.

    Args:
        seeds: Of each episode's noise.
        tick: Called at each step; an exception from it ends the walk.
        seen: Called at each step with the number of episodes that have ended.
    """
    lengths, keys = np.array([len(episode) for episode in episodes]), policy.observation_keys
    # A residual policy looks at each step, whatever its frozen policy does.
    period, history = (policy.action_steps, policy.seen_steps) if isinstance(policy, Policy) else (1, 1)
    policy.reset(seeds=list(seeds))
    predicted = [np.empty(episode.actions.shape) for episode in episodes]
    latest: dict[int, dict[str, Any]] = {}  # episode -> its observation when the policy last looked
    ahead: dict[int, dict[int, dict[str, Any]]] = {}  # step -> episode -> observation
    for step in range(int(lengths.max())):
        tick()
        if step % AHEAD == 0:
            steps = [later for later in range(step, step + AHEAD) if -later % period < history]
            ahead = {}
            for place, episode in enumerate(episodes):
                if some := [later for later in steps if later < len(episode)]:
                    read = episode.read(some, keys)
                    for i, later in enumerate(some):
                        ahead.setdefault(later, {})[place] = {key: values[i] for key, values in read.items()}
        latest |= ahead.get(step, {})
        rows = np.flatnonzero(lengths > step).tolist()
        observation: dict[str, Any] = {key: torch.stack([latest[row][key] for row in rows]) for key in keys}
        if policy.settings.task is None and all("task" in latest[row] for row in rows):
            observation["task"] = [latest[row]["task"] for row in rows]
        actions = policy.act(observation, torch.tensor(rows))
        for row, action in zip(rows, actions, strict=True):
            predicted[row][step] = action
        seen(int((lengths <= step + 1).sum()))
    return predicted


def deviations(feature: dict[str, Any], episodes: Sequence[Recording]) -> np.ndarray:
    """The unit of each dimension's error, `[Da]`: the deviation of the actions that the policy has learnt from.

    Where these never change, it is that of the recordings; where these do not either, 1.
    """
    recorded = np.concatenate([episode.actions for episode in episodes])
    units = np.where(without_spread(recorded.mean(0), recorded.std(0)), 1.0, recorded.std(0))
    stats = robot_stats(feature)
    if {"mean", "std"} <= set(stats):
        mean, std = (np.asarray(stats[name], dtype=np.float64) for name in ("mean", "std"))
        if std.ndim > 1:  # of each step of a chunk
            mean, std = mean[0], std[0]
        units = np.where(without_spread(mean, std), units, std)
    return units


def check_recordings(policy: Any, episodes: Sequence[Recording]) -> None:
    """Refuse recordings whose actions or observations do not match a policy's.

    Raises:
        UserError: none of them, or names both widths or shapes, the key that is missing, or an unknown task.
    """
    if not episodes:
        raise UserError("there are no episodes; expected one or more")
    spec = policy.spec
    if delay := policy.settings.delay:
        problem = f"--policy.delay {delay}: nothing is late in recordings"
        raise UserError(f"{problem}; use --policy.delay 0, or name an environment")
    width = 1 if "classes" in spec["action"] else robot_width(spec["action"])
    language = getattr(getattr(policy, "normaliser", None), "language", None)
    for episode in episodes:
        if (other := episode.actions.shape[1]) != width:
            raise UserError(f"{episode.data} has actions of width {other}, the policy of {width}")
        for key in ("action", *policy.observation_keys):
            found, order = episode.names_of(key), [plain(name) for name in spec[key].get("names", ())]
            if reordered(order, found):
                orders = f"in the order {', '.join(found[:PANELS])}, the policy {', '.join(order[:PANELS])}"
                raise UserError(f"{episode.data} has the dimensions of {key!r} {orders}")
        known = spec.get("task", {}).get("values", ()) if policy.settings.task is None else ()
        if unknown := sorted(episode.tasks - set(known)) if known else []:
            if language is None:
                raise UserError(f"{episode.data}: unknown task {unknown[0]!r}; {nearest(unknown[0], known)}")
            with one_line(f"{episode.data}"):
                language.vectors(unknown)
        for key in policy.observation_keys:
            recorded = episode.shape_of(key)
            stored = frame_shape(spec[key], policy.obs_steps)
            if recorded is None:
                camera = f"; see --dataset.cameras {key.rpartition('.')[2]}" if len(stored) == 3 else ""
                raise UserError(f"{episode.data} has no {key!r}, which the policy observes{camera}")
            if not same_frame(spec[key], tuple(recorded), stored):
                raise UserError(f"{episode.data} has {key!r} of shape {tuple(recorded)}, the policy observes {stored}")


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, at equal distances, in their order."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def shortened(text: str, most: int = LONGEST_NAME) -> str:
    """A text with dots in its middle where it is long."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}..{text[-(most // 2 - 1) :]}"
