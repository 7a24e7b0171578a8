"""Reading a run's .jsonl files, and drawing them."""

import json
import os
from pathlib import Path
from typing import Any

PANELS = 15


def step_of(line: str) -> float:
    """The step of a line of a .jsonl file; infinite for a torn or damaged one."""
    try:
        return float(int(json.loads(line)["step"])) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; torn and damaged lines are left out."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(True)
    return [json.loads(line) for line in lines if step_of(line) < float("inf")]


def diverging(run: Path) -> str:
    """What shows that a run's values have left what its rewards allow, or "".

    No value can be larger than the largest reward in every step, max |r| / (1 - discount); twice that is too much.
    """
    try:
        options = json.loads((run / "args.json").read_text())["args"]["trainer_options"]
        discount = float(options["discount"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "train/reward_abs_max" in line]
    if not lines or discount >= 1:
        return ""
    bound = max(line["train/reward_abs_max"] for line in lines) / (1 - discount)
    for key in ("train/q", "train/v"):
        values = [line[key] for line in lines[-max(1, len(lines) // 10) :] if key in line]
        if values and not max(abs(value) for value in values) <= 2 * bound:
            return f"{key.removeprefix('train/')} reaches {values[-1]:.3g}, rewards allow {bound:.3g}"
    return ""


def draw_curves(runs: list[Path], path: Path) -> None:
    """Draw the losses, the evaluation and the learning rates of runs over each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    metrics = {run: read_lines(run / "metrics.jsonl") for run in runs}
    evaluations = {run: read_lines(run / "eval.jsonl") for run in runs}
    found = {key for lines in metrics.values() for line in lines for key in line if _is_curve(key)}
    names = sorted((key for key in found if _mean_of(key) not in found - {key}), key=_place)
    score = (
        "success_rate"
        if any(e["success_rate"] is not None for es in evaluations.values() for e in es)
        else "return_mean"
    )
    diverge = any(diverging(run) for run in runs)
    panels = [score, *names] if any(evaluations.values()) else names
    crowded = len(runs) > 5  # the legend has a panel of its own then
    panels = panels[: PANELS - crowded] or ["train/loss"]
    columns = min(3, len(panels) + crowded)
    rows = -(-(len(panels) + crowded) // columns)
    width, height = 4.2 * columns, 3.0 * rows  # inches, as the margins; fitting those to the text would draw all twice
    margins = {"left": 0.75 / width, "right": 1 - 0.15 / width, "bottom": 0.45 / height, "top": 1 - 0.35 / height}
    margins |= {"wspace": 0.75 / 3.4, "hspace": 0.8 / 2.2}  # in widths and heights of a panel
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, gridspec_kw=margins)
    palette = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"]
    colors = {run: palette(index % palette.N) for index, run in enumerate(runs)}  # the same in every panel
    for axis, name in zip(axes.flat, panels, strict=False):
        for run in runs:
            lines = evaluations[run] if name == score else metrics[run]
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            marker, color = "o" if len(x) < 20 else None, colors[run]
            axis.plot(x, y, marker=marker, markersize=3, linewidth=1.2, label=run.name, color=color)
            ends = (f"{name}_min", f"{name}_max")  # the band of what the mean is of, in the runs that have one
            if band := [(line["step"], *(line[end] for end in ends)) for line in lines if ends[0] in line]:
                axis.fill_between(*zip(*band, strict=True), alpha=0.15, color=color)
            if name == "success_rate":
                low, high = zip(*(line["success_ci"] for line in lines if line.get(name) is not None), strict=True)
                axis.fill_between(x, low, high, alpha=0.2, color=color)
                axis.set_ylim(-0.02, 1.02)
        shown = [value for line in axis.lines for value in line.get_ydata()]
        if "loss" in name and min(shown, default=0) > 0:
            axis.set_yscale("log")
        wrong = diverge and name in ("train/q", "train/v")
        title = name.replace("_", " ") + (" DIVERGING" if wrong else "")
        axis.set_title(title, fontsize=9, color="red" if wrong else "black")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    if len(runs) > 1:
        legend = [Line2D([], [], color=colors[run], label=run.name) for run in runs]
        where = axes.flat[len(panels) if crowded else 0]
        where.legend(handles=legend, fontsize=7, loc="upper left" if crowded else "best")
    save_figure(figure, path, dpi=100)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot as plt

    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=dpi, format="png")
    os.replace(temporary, path)
    plt.close(figure)


def _is_curve(key: str) -> bool:
    return key.startswith(("train/", "val/"))


def _mean_of(key: str) -> str:
    """What `key`, a least or largest value, belongs to."""
    return key.removesuffix("_min").removesuffix("_max")


def _place(key: str) -> tuple[int, str]:
    """Losses first, what is the same in every run last."""
    return ("loss" not in key) + 2 * ("/grad_norm" in key) + 4 * ("/lr." in key), key
