"""Read the .jsonl files of runs, and draw their curves: a line for each configuration, with a band of its seeds."""

import json
import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import intervals
from ..acting.evaluation import SCORES, tracked_of
from ..data.figures import literal, save_figure
from ..errors import UserError, nearest
from ..records import Evaluation, Line, check_regular, misfit, problem_of, read_json
from .groups import Group, cut, grouped, task_of

PANELS = 15
BANDED = 8  # configurations up to which each has a band
LEGEND = 60  # configurations that the legend names
POINTS = 1000  # of a mean over seeds
LARGEST = 1e100  # beyond, matplotlib's arithmetic overflows
STYLES = ("-", "-.", ":")  # of the first configurations, and of those that have the same colours again


def step_of(line: str) -> float:
    """The step of a line of a .jsonl file; infinite for an incomplete or damaged line."""
    return float("inf") if (record := read_line(line, Line)) is None else float(record["step"])


def read_line(line: str, schema: Any) -> dict[str, Any] | None:
    """The object in a line of a .jsonl file; None for an incomplete or damaged line."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    return None if problem_of(record, schema) else record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without incomplete or damaged lines, such as evaluations without a return.

    Raises:
        UserError: no file, but a pipe, socket or device.
    """
    if not path.exists():
        return []
    check_regular(path)
    schema = Evaluation if path.name == "eval.jsonl" else Line
    lines = path.read_text(errors="replace").splitlines(True)
    return [record for line in lines if (record := read_line(line, schema)) is not None]


def is_number(value: Any) -> bool:
    """Whether a value of a line can be drawn."""
    return math.isfinite(value) if type(value) is float else not misfit(value, float)


def evaluations_in(run: Path, env: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A run's evaluations in its environment `env`; without one, in the last one, or against its own recordings.

    They are in the order of their steps: an older policy may have been evaluated again.
    """
    lines = read_lines(run / "eval.jsonl")
    played = [line["env"] for line in reversed(lines) if line["env"].get("name") != "recordings"]
    own = env or next(iter([*played, *(line["env"] for line in lines)]), None)
    return sorted((line for line in lines if line["env"] == own), key=lambda line: line["step"])


def diverging(run: Path) -> str:
    """Describe values of a run that exceed what its rewards allow, or "".

    No value exceeds that of the largest reward in every step, max |r| / (1 - discount); twice that bound is reported.
    """
    try:
        discount = read_json(run / "args.json")["args"]["trainer_options"]["discount"]
    except (UserError, KeyError, TypeError):
        return ""
    lines = [line for line in read_lines(run / "metrics.jsonl") if is_number(line.get("train/reward_abs_max"))]
    if not lines or not is_number(discount) or discount >= 1:
        return ""
    bound = max(line["train/reward_abs_max"] for line in lines) / (1 - discount)
    for key in ("train/q", "train/v"):
        values = [line[key] for line in lines[-max(1, len(lines) // 10) :] if is_number(line.get(key))]
        if values and not max(abs(value) for value in values) <= 2 * bound:
            return f"{key.removeprefix('train/')} reaches {values[-1]:.3g}, rewards allow {bound:.3g}"
    return ""


# ---- what is drawn -------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """One metric of one run, by increasing steps."""

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """Its band, NaN where there is none."""
    inside: bool
    """Whether the band is the least and largest value inside of an interval, not an interval over episodes."""


def series_of(lines: list[dict[str, Any]], name: str) -> Series | None:
    """A metric of a run's lines; None if no line has it. Of several lines about one step, the last counts."""
    ends = (f"{name}_min", f"{name}_max")
    points: dict[int, tuple[Any, ...]] = {}
    for line in lines:
        if is_number(value := line.get(name)):
            least, most = line.get(f"{name}_ci") or (line.get(end) for end in ends)
            points[line["step"]] = (value, *((least, most) if is_number(least) and is_number(most) else [math.nan] * 2))
    if not points:
        return None
    steps = sorted(points)
    values, low, high = np.clip(np.array([points[step] for step in steps], float).T, -LARGEST, LARGEST)
    return Series(np.array(steps, float), values, low, high, any(ends[0] in line for line in lines))


def mean_of_seeds(series: Sequence[Series]) -> tuple[Series, np.ndarray]:
    """The mean of two or more seeds, and at each step whether all of them have come so far.

    Between its own steps a seed has the values of its line, so that the mean is that of the lines that one would draw.
    The band is the 95 % interval of the mean by Student's t, or the range where there are two seeds.
    """
    steps = np.unique(np.concatenate([one.steps for one in series]))
    begin = max(one.steps[0] for one in series)  # before, the mean would be that of those that happen to log first
    steps = steps[steps >= begin] if begin <= min(one.steps[-1] for one in series) else steps
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))]
    values = np.stack([np.interp(steps, one.steps, one.values, math.nan, math.nan) for one in series])
    count = np.isfinite(values).sum(0)
    steps, values, count = steps[count > 0], values[:, count > 0], count[count > 0]
    mean = np.nanmean(values, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.sqrt(np.nansum(np.square(values - mean), 0) / (count - 1))
        half = np.array([intervals.student_t(max(1, n - 1)) for n in count]) * deviation / np.sqrt(count)
    low, high = np.where(count > 2, [mean - half, mean + half], [np.nanmin(values, 0), np.nanmax(values, 0)])
    alone = count < 2
    low[alone], high[alone] = math.nan, math.nan
    return Series(steps, mean, low, high, False), count == len(series)


def lines_of(run: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a run's metrics, and its evaluations as such lines, with the intervals over their episodes."""
    lines = read_lines(run / "metrics.jsonl")
    for one in evaluations_in(run, record.get("env")):
        names = [*(name for name, _ in SCORES), "return_normalised", *tracked_of(one)]
        line = {"step": one["step"]} | {f"eval/{name}": one[name] for name in names if is_number(one.get(name))}
        if "eval/success_rate" in line and one["success_ci"]:
            line["eval/success_rate_ci"] = tuple(one["success_ci"])
        episodes, deviation = one["episodes"], one.get("return_std", math.nan)
        if "eval/return_mean" in line and is_number(deviation) and deviation >= 0 and episodes > 1:
            deviation = intervals.unbiased(deviation, episodes)
            line["eval/return_mean_ci"] = intervals.of_mean(one["return_mean"], deviation, episodes)
        lines.append(line)
    return lines


def curve_names(runs: list[list[dict[str, Any]]]) -> tuple[list[str], list[str]]:
    """The metrics that have a panel, in order, and those that never change in any run.

    Minima and maxima are drawn in the panel of their mean. An evaluation's numbers are always drawn.
    """
    changing: set[str] = set()
    several: dict[str, bool] = {}  # whether any run has more than one value
    for lines in runs:
        first: dict[str, float] = {}
        for line in lines:
            for key, value in line.items():
                if key.startswith(("train/", "val/", "eval/")) and is_number(value):
                    several[key] = several.get(key, False) or key in first
                    if first.setdefault(key, value) != value:
                        changing.add(key)
    names = sorted((key for key in several if _mean_of(key) not in several.keys() - {key}), key=_place)
    constant = [key for key in names if several[key] and key not in changing and not key.startswith("eval/")]
    return [key for key in names if key not in constant], constant


def _chosen(names: list[str], only: Sequence[str]) -> list[str]:
    """The metrics that are asked for, such as `success_rate` or `train/loss`. Raises UserError: one that no run has."""
    short = {name.partition("/")[2]: name for name in reversed(names)} | {name: name for name in names}
    for name in only:
        if name not in short:
            raise UserError(f"--metrics {name}: no run has it; {nearest(name, short)}")
    return list(dict.fromkeys(short[name] for name in only))


# ---- the picture ---------------------------------------------------------------------------------------------------


def draw_curves(
    runs: Sequence[Path], path: Path, only: Sequence[str] = (), against: Sequence[Path] = (), each: bool = False
) -> None:
    """Draw evaluations, losses and other metrics of several runs in common panels.

    The seeds of a configuration are one line and a band. Metrics that never change are named instead.

    Args:
        runs: The runs.
        path: The picture.
        only: Metrics to draw; all by default.
        against: Further runs, which are no seeds of the others.
        each: Whether each run has a line, also of the same configuration.

    Raises:
        UserError: no run has one of `only`.
    """
    import matplotlib

    matplotlib.use("Agg")

    groups = grouped(runs, against, each)
    lines = [[lines_of(*pair) for pair in zip(group.runs, group.records, strict=True)] for group in groups]
    names, constant = curve_names([one for of_group in lines for one in of_group])
    names, constant = (_chosen(names + constant, only), []) if only else (names, constant)
    panels = names[:PANELS] or ["train/loss"]
    drawn = [[[s for one in of_group if (s := series_of(one, name))] for of_group in lines] for name in panels]
    diverged = any(diverging(run) for group in groups for run in group.runs)

    palette = matplotlib.colormaps["tab10" if len(groups) <= 10 else "tab20"]
    styles = [(palette(i % palette.N), STYLES[i // palette.N % len(STYLES)]) for i in range(len(groups))]
    figure, axes = _grid(len(panels), _caption(groups, drawn, constant, names[PANELS:]), groups, styles)
    for axis, name, of_groups in zip(axes, panels, drawn, strict=False):
        shown: list[np.ndarray] = []  # what must be visible
        for group, style, series in zip(groups, styles, of_groups, strict=True):
            shown += _draw(axis, name, series, style, group.label, len(groups) <= BANDED)
        there = [group for group, series in zip(groups, of_groups, strict=True) if series]
        _finish_panel(axis, name, shown, _unit(there or groups), diverged and name in ("train/q", "train/v"))
    for axis in axes[len(panels) :]:
        axis.axis("off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font does not have
        save_figure(figure, path, dpi=100)


def _caption(groups: list[Group], drawn: Any, constant: list[str], further: list[str]) -> list[str]:
    """What a reader needs to know: the runs, what lines and bands are, and what is not drawn."""
    tasks = {task_of(record) for group in groups for record in group.records if record}
    heads = [f"{len(groups)} configurations"] if len(groups) > 1 else [groups[0].name, groups[0].label]
    if len(groups) == 1 and groups[0].seeds:
        heads.append(_seeds(groups[0]))
    if len(tasks) == 1:
        heads.append(f"task {tasks.pop()}")
    together = [series for of_groups in drawn for series in of_groups]
    counts = {len(series) for series in together}
    texts = ["line: mean of the seeds"] if max(counts, default=0) > 1 else []
    if len(groups) > BANDED:
        texts.append(f"no bands, for more than {BANDED} configurations")
    else:
        alone = [series[0] for series in together if len(series) == 1]
        texts += ["band: 95 % interval of the mean (Student's t)"] if max(counts, default=0) > 2 else []
        texts += ["band of two seeds: their range"] if 2 in counts else []
        over_episodes = any(np.isfinite(one.low).any() and not one.inside for one in alone)
        texts += ["band of one seed: 95 % interval over its episodes"] if over_episodes else []
        inside = any(one.inside for series in together for one in series)
        texts += ["light band: least to largest value"] if inside else []
    reach = [{float(one.steps[-1]) for one in series} for series in together]
    texts += ["dashed: not all of the seeds"] if any(len(ends) > 1 for ends in reach) else []
    lists = [("constant, not drawn", constant), ("not drawn, see --metrics", further)]
    texts += [
        f"{title}: {', '.join(cut(n, 40) for n in found[:12])}{', ...' * (len(found) > 12)}"
        for title, found in lists
        if found
    ]
    return [", ".join(heads), *(["; ".join(texts)] if texts else [])]


def _seeds(group: Group) -> str:
    return f"{len(group.runs)} seeds" if len(group.runs) > 1 else f"seed {group.seeds[0]}"


def _unit(groups: list[Group]) -> str:
    """What the steps of the runs count."""
    scripts = {str(group.options.get("script")) for group in groups}
    if len(scripts) > 1:
        return "updates (offline), environment steps (online)"
    return {"online": "environment steps", "offline": "updates"}.get(scripts.pop(), "steps")


def _grid(count: int, caption: list[str], groups: list[Group], styles: list[Any]) -> tuple[Any, list[Any]]:
    """A figure and its panels, `count` or a few more, at most three in a row, under its caption and legend."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    columns = min(3, count)
    rows = -(-count // columns)
    width, line = 4.2 * columns, 0.15  # inches, as are the margins; fitting them to the text would draw all twice
    text = [part for words in caption for part in textwrap.wrap(words, int(18 * width))]
    labels = [f"{group.label}, {_seeds(group)}" if group.seeds else group.label for group in groups][:LEGEND]
    labels += [f"and {len(groups) - LEGEND} more"] * (len(groups) > LEGEND)
    beside = max(1, int(width / (0.5 + 0.058 * max(map(len, labels)))))
    legend = -(-len(labels) // beside) if len(groups) > 1 else 0
    top = 0.1 + line * len(text) + (0.14 * legend + 0.1 if legend else 0)
    height = 3.0 * rows + top
    margins = {
        "left": 0.75 / width,
        "right": 1 - 0.15 / width,
        "bottom": 0.45 / height,
        "top": 1 - (top + 0.3) / height,
    }
    margins |= {"wspace": 0.75 / 3.4, "hspace": 0.8 / 2.2}  # in widths and heights of a panel
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, gridspec_kw=margins)
    for i, words in enumerate(text):
        figure.text(0.1 / width, 1 - (0.08 + line * i) / height, literal(words), fontsize=7, va="top")
    if legend:
        names = [literal(f" {label}") for label in labels]  # matplotlib leaves out names that begin with "_"
        handles = [
            Line2D([], [], color=c, linestyle=s, label=n) for (c, s), n in zip(styles[:LEGEND], names, strict=False)
        ]
        handles += [Line2D([], [], alpha=0, label=n) for n in names[len(handles) :]]
        place = (0.05 / width, 1 - (0.06 + line * len(text)) / height)
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=place, ncols=beside, fontsize=7, frameon=False,
            borderaxespad=0, borderpad=0.2, labelspacing=0.35,
        )  # fmt: skip
    return figure, list(axes.flat)


def _draw(axis: Any, name: str, series: list[Series], style: Any, label: str, banded: bool) -> list[np.ndarray]:
    """The line of one configuration in one panel, and its bands; returns the values that must be visible."""
    if not series:
        return []
    color, linestyle = style
    line, whole = (series[0], np.full(len(series[0].steps), True)) if len(series) == 1 else mean_of_seeds(series)
    x, y = line.steps, line.values
    if name == "eval/success_rate":  # Student's interval may go beyond what there is
        line.low, line.high = line.low.clip(0, 1), line.high.clip(0, 1)
    draw = {"marker": "o" if len(x) < 20 else None, "markersize": 3, "linewidth": 1.2, "color": color, "label": label}
    if whole.any():
        axis.plot(x, np.where(whole, y, math.nan), linestyle=linestyle, **draw)
    if not whole.all():  # with the points where the rest begins
        near = ~whole | np.append(~whole[1:], False) | np.append(False, ~whole[:-1])
        axis.plot(x, np.where(near, y, math.nan), linestyle=(0, (3, 2)), **draw)
    shown = [one.values for one in series]
    if banded:
        inside = [one for one in series if one.inside]
        if len(series) > 1 or not inside:
            axis.fill_between(x, line.low, line.high, alpha=0.2, color=color, linewidth=0)
            if len(x) == 1:
                axis.vlines(x, line.low, line.high, color=color, alpha=0.5)
            shown += [line.low, line.high] if len(series) < 3 else []
        for one in inside:
            axis.fill_between(one.steps, one.low, one.high, alpha=0.15 / len(inside), color=color, linewidth=0)
            shown += [one.low, one.high]
    return shown


def _finish_panel(axis: Any, name: str, shown: list[np.ndarray], unit: str, diverged: bool) -> None:
    """Scale, title and ticks of a panel; positive losses of several decades have a logarithmic scale."""
    values = np.concatenate([part[np.isfinite(part)] for part in shown] or [np.zeros(0)])
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if name == "eval/success_rate":
        axis.set_ylim(-0.02, 1.02)
    elif "loss" in name and 0 < 10 * low < high:
        axis.set_yscale("log")
        axis.set_ylim(low * (low / high) ** 0.05, high * (high / low) ** 0.05)
    elif high > low:  # a band may go far beyond the seeds
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.set_major_formatter(lambda step, position: intervals.thousands(step))
    title = name.replace("_", " ") + (" DIVERGING" if diverged else "")
    axis.set_title(literal(cut(title)), fontsize=9, color="red" if diverged else "black")
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)


def _mean_of(key: str) -> str:
    """The metric of which `key` is the minimum or maximum."""
    return key.removesuffix("_min").removesuffix("_max")


def _place(key: str) -> tuple[int, str]:
    """Sort key of panels: evaluations, episodes, losses, then other metrics, gradient norms and learning rates."""
    names = [f"eval/{name}" for name, _ in SCORES]
    if key.startswith("eval/"):
        return (names.index(key) if key in names else len(names)), key
    words = (("train/episode_", 0), ("loss", 1), ("/grad_norm", 3), ("reward_abs_max", 4), ("/lr.", 4))
    return 10 + next((place for word, place in words if word in key), 2), key
