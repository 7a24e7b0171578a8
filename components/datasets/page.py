"""One page of pictures about a dataset: an episode above, histograms below."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..run.curves import save_figure

PANELS, ACROSS = 48, 6  # histograms on the page, and in a row of it
PICTURES = 10  # of a film strip
WIDTH, LEFT, RIGHT = 14.0, 0.5, 0.2  # of the page and its margins, in inches


class Panel(NamedTuple):
    """A histogram."""

    name: str
    values: np.ndarray
    suspicious: bool = False


@dataclass
class Page:
    """What is drawn."""

    title: str
    strips: dict[str, np.ndarray]
    """Camera -> pictures `[n, C, H, W]` of an episode, n at most PICTURES."""
    steps: list[int]
    """`[n]`, which of its steps those show."""
    times: dict[str, np.ndarray]
    """Without a camera: key -> its values over the episode, `[T, D]`."""
    panels: list[Panel]


def draw(page: Page, path: Path) -> None:
    """Draw a page as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = page.panels[:PANELS]
    strips, rows = max(len(page.strips), 1), -(-len(panels) // ACROSS)
    upper, lower = 0.5 + 1.5 * strips, 0.3 + 1.4 * rows  # inches
    height = 0.5 + upper + lower
    figure = plt.figure(figsize=(WIDTH, height))

    def axes(top: float, tall: float, rows: int, across: int, gap: float) -> Any:
        """A grid of panels, so far below the top; fitting the margins to the text instead would take seconds."""
        margins = {"left": LEFT / WIDTH, "right": 1 - RIGHT / WIDTH, "wspace": 0.12}
        margins |= {"top": 1 - (top + gap) / height, "bottom": 1 - (top + tall) / height}
        margins["hspace"] = gap / ((tall - gap * rows) / rows)  # in heights of a panel
        return figure.add_gridspec(rows, across, **margins).subplots(squeeze=False)

    left_out = len(page.panels) - len(panels)
    more = f"; {left_out} more dimensions are not drawn" * (left_out > 0)
    figure.suptitle(page.title + more, fontsize=9, y=1 - 0.1 / height)
    if page.strips:
        film(axes(0.4, upper, strips, PICTURES, 0.2), page)
    else:
        over_time(axes(0.4, upper - 0.4, 1, len(page.times), 0.3)[0], page)
    grid = axes(0.5 + upper, lower - 0.3, rows, ACROSS, 0.45)
    for axis, (name, values, suspicious) in zip(grid.flat, panels, strict=False):
        colour = "tab:red" if suspicious else "tab:blue"
        axis.stairs(*np.histogram(values[np.isfinite(values)], bins=40), fill=True, color=colour)
        axis.set_title(name, fontsize=8, color=colour if suspicious else "black")
        axis.tick_params(labelsize=6)
        axis.locator_params(axis="x", nbins=4)
        axis.set_yticks([])
    for axis in list(grid.flat)[len(panels) :]:
        axis.remove()
    save_figure(figure, path, dpi=90)


def film(grid: Any, page: Page) -> None:
    """A row of pictures for each camera, with the number of their step."""
    for row, (camera, pictures) in zip(grid, page.strips.items(), strict=True):
        row[0].set_ylabel(camera, fontsize=8)
        for axis, picture, step in zip(row, pictures, page.steps, strict=False):
            grey = {"cmap": "gray"} if len(picture) == 1 else {}
            axis.imshow(picture.transpose(1, 2, 0).squeeze(), **grey)
            axis.set_title(f"{step}", fontsize=7)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis in row[len(pictures) :]:
            axis.set_visible(False)


def over_time(row: Any, page: Page) -> None:
    """Numbers over time, a row a dimension, each from its least to its largest value."""
    for axis, (key, numbers) in zip(row, page.times.items(), strict=True):
        values = np.nan_to_num(numbers)
        spans = np.ptp(values, axis=0)
        axis.imshow(((values - values.min(0)) / np.where(spans > 0, spans, 1)).T, aspect="auto", cmap="viridis")
        axis.set_title(key, fontsize=8)
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=6)
