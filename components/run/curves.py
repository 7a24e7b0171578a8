"""Read a run's .jsonl files and draw their curves."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError, plain
from ..records import Evaluation, Line, check_regular, misfit, problem_of, read_json

PANELS = 15


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
    return not misfit(value, float)


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


def draw_curves(runs: list[Path], path: Path) -> None:
    """Draw losses, evaluations and learning rates of several runs in common panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.lines import Line2D

    metrics = {run: read_lines(run / "metrics.jsonl") for run in runs}
    evaluations = {run: read_lines(run / "eval.jsonl") for run in runs}
    names = curve_names([line for lines in metrics.values() for line in lines])
    scored = [line for lines in evaluations.values() for line in lines]
    score = "success_rate" if any(line["success_rate"] is not None for line in scored) else "return_mean"
    panels = [score, *names] if scored else names
    crowded = len(runs) > 5  # then the legend has a separate panel
    panels = panels[: PANELS - crowded] or ["train/loss"]
    figure, axes = _grid(len(panels) + crowded)
    palette = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"]
    colors = {run: palette(index % palette.N) for index, run in enumerate(runs)}  # the same in every panel
    diverged = any(diverging(run) for run in runs)
    for axis, name in zip(axes, panels, strict=False):
        for run in runs:
            _draw_run(axis, name, evaluations[run] if name == score else metrics[run], run.name, colors[run])
        _finish_panel(axis, name, diverged and name in ("train/q", "train/v"))
    for axis in axes[len(panels) :]:
        axis.axis("off")
    if len(runs) > 1:
        legend = [Line2D([], [], color=colors[run], label=literal(run.name)) for run in runs]
        where = axes[len(panels) if crowded else 0]
        where.legend(handles=legend, fontsize=7, loc="upper left" if crowded else "best")
    save_figure(figure, path, dpi=100)


def curve_names(lines: list[dict[str, Any]]) -> list[str]:
    """The metrics that have a panel, in order; minima and maxima are drawn in the panel of their mean."""
    found = {key for line in lines for key in line if key.startswith(("train/", "val/"))}
    return sorted((key for key in found if _mean_of(key) not in found - {key}), key=_place)


def _grid(count: int) -> tuple[Any, list[Any]]:
    """A figure and its panels, `count` or a few more, at most three in a row."""
    from matplotlib import pyplot as plt

    columns = min(3, count)
    rows = -(-count // columns)
    width, height = (
        4.2 * columns,
        3.0 * rows,
    )  # inches, as are the margins; fitting them to the text would draw all twice
    margins = {"left": 0.75 / width, "right": 1 - 0.15 / width, "bottom": 0.45 / height, "top": 1 - 0.35 / height}
    margins |= {"wspace": 0.75 / 3.4, "hspace": 0.8 / 2.2}  # in widths and heights of a panel
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, gridspec_kw=margins)
    return figure, list(axes.flat)


def _draw_run(axis: Any, name: str, lines: list[dict[str, Any]], label: str, color: Any) -> None:
    """One run's curve of one metric, with the band from its least to its largest value, or of its interval."""
    lines = [line for line in lines if is_number(line.get(name))]
    points = [(line["step"], line[name]) for line in lines]
    if not points:
        return
    x, y = zip(*points, strict=True)
    axis.plot(x, y, marker="o" if len(x) < 20 else None, markersize=3, linewidth=1.2, label=label, color=color)
    ends = (f"{name}_min", f"{name}_max")
    banded = [line for line in lines if all(is_number(line.get(end)) for end in ends)]
    if band := [(line["step"], *(line[end] for end in ends)) for line in banded]:
        axis.fill_between(*zip(*band, strict=True), alpha=0.15, color=color)
    if name == "success_rate":
        low, high = zip(*(line["success_ci"] or [line[name]] * 2 for line in lines), strict=True)
        axis.fill_between(x, low, high, alpha=0.2, color=color)
        axis.set_ylim(-0.02, 1.02)


def _finish_panel(axis: Any, name: str, diverged: bool) -> None:
    """Scale, title and ticks of a panel; losses that are all positive are drawn on a logarithmic scale."""
    shown = [value for line in axis.lines for value in line.get_ydata()]
    if "loss" in name and min(shown, default=0) > 0:
        axis.set_yscale("log")
    title = name.replace("_", " ") + (" DIVERGING" if diverged else "")
    axis.set_title(literal(title), fontsize=9, color="red" if diverged else "black")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot as plt

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=dpi, format="png")
    os.replace(temporary, path)
    plt.close(figure)


def literal(text: str) -> str:
    """A text that matplotlib draws as it is, not as a formula."""
    return plain(text).replace("$", r"\$")


def _mean_of(key: str) -> str:
    """The metric of which `key` is the minimum or maximum."""
    return key.removesuffix("_min").removesuffix("_max")


def _place(key: str) -> tuple[int, str]:
    """Sort key of panels: losses first, then metrics, gradient norms and learning rates."""
    return ("loss" not in key) + 2 * ("/grad_norm" in key) + 4 * ("/lr." in key), key
