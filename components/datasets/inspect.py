"""Report what a dataset contains and what looks wrong about it: text on the screen and one page of pictures.

python -m components.datasets.inspect demos.hdf5
python -m components.datasets.inspect --dataset lerobot --dataset.path demos --dataset.cameras front --out demos.png

The data is read as for training, so the statistics are those that training would use, without the held-out episodes.
"""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.actions import learnt_names
from ..data.features import INTERVENTION, RECORDED, SUCCESS, facts_of, read
from ..data.figures import literal, save_figure
from ..data.items import as_kept
from ..data.pictures import CHANNELS, IMAGES
from ..errors import UserError, plain
from ..run import process
from .commands import built_by, parse
from .episodes import EpisodeDataset, Episodes, NotFiniteError, steps_only, take
from .mixture import Mixture
from .untrusted import gigabytes

SAMPLED = 100_000  # rows of a histogram
ITEMS = 10_000  # items read of a dataset without episodes
SPIKE = 10.0  # smallest jump reported, in multiples of the 99 % quantile of the changes from step to step
PANELS, ACROSS = 48, 6  # histograms on the page, and in a row of it
PICTURES = 10  # of a film strip
APART = ("format", "action_space", "not used")  # declarations of a format that are not in its line
WIDTH, LEFT, RIGHT = 14.0, 0.5, 0.2  # of the page and its margins, in inches


@dataclass(kw_only=True)
class Options:
    """Inspect a dataset: PATH, or --dataset NAME with its options."""

    out: Path = Path("dataset.png")
    """File of the page; a mixture gets one for each source, with its name."""


class Column(NamedTuple):
    """A key's values, and the row of each step among them."""

    key: str
    values: Tensor  # [M, D] or [M]
    at: Tensor  # [N]

    def steps(self) -> np.ndarray:
        """`[N, D]` float64, flags as 0 and 1."""
        return self.values[self.at].reshape(len(self.at), -1).numpy().astype(np.float64)


class Finding(NamedTuple):
    """Something suspicious."""

    key: str
    dim: int
    what: str


def main(argv: list[str]) -> int:
    """Print the report and draw the page; returns the exit code."""
    options, words, factory = parse(Options, argv, 1, {"cameras": ("all",)}, "[PATH] [OPTIONS]")
    logging.getLogger("components").setLevel(logging.WARNING)
    if not options.out.absolute().parent.is_dir() or options.out.is_dir():
        raise UserError(f"--out {options.out}: expected a file in a folder that exists")
    trouble = ""
    try:
        built = as_kept(built_by(factory))
    except UserError as error:
        bad = error if isinstance(error, NotFiniteError) else error.__cause__
        if not isinstance(bad, NotFiniteError):
            raise
        built = {"dataset": EpisodeDataset(bad.episodes), "norm_stats": {}}
        trouble = f"a training would refuse this data: {bad}"
    dataset = built["dataset"]
    several = isinstance(dataset, Mixture)
    parts = dict(zip(dataset.names, dataset.datasets, strict=True)) if several else {"": dataset}
    space = declared_space(built)
    for name, part in parts.items():
        episodes = as_episodes(part, type(factory).__name__)
        found = findings(episodes, space)
        path = options.out.with_stem(f"{options.out.stem}-{name}") if several else options.out
        lines = [*summary(episodes, getattr(factory, "path", "")), *table(episodes), *flags(episodes)]
        print("\n".join(map(plain, lines)))
        print("\nsuspicious:" if found else "\nnothing suspicious")
        for key, dims, what in grouped(found):
            print(plain(f"  {key}[{dims}]: {what}"))
        draw_page(page_of(episodes, found), path)
        print(f"\npage: {path}\n")
    names = getattr(getattr(dataset, "episodes", None), "names", {})
    if "form" in (told := facts_of(dataset).get("action", {})):
        names = names | {"action": learnt_names(told)}
    print("\n".join(map(plain, statistics_table(built["norm_stats"], names))))
    if "validation" in built:
        rest = len(built["validation"])
        print(f"({len(dataset)} steps to learn from, {rest} held out, which are not in the statistics)")
    if trouble:
        print(f"\n{trouble}")
    return 0


def as_episodes(dataset: Any, name: str) -> Episodes:
    """The episodes of a dataset; the first items of a dataset without episodes count as one."""
    if isinstance(dataset, EpisodeDataset):
        return dataset.episodes
    count = min(len(dataset), ITEMS)
    items = read(dataset, torch.arange(count))
    tensors = {key: value for key, value in items.items() if isinstance(value, Tensor)}
    now = {key: value for key, value in tensors.items() if key.startswith("observation.")}
    rest = {key: value for key, value in tensors.items() if not key.startswith(("observation.", "next."))}
    ends = torch.tensor([count])
    stored = {"format": f"the first {count} of {len(dataset)} items, which have no episodes"}
    return Episodes(name, ends, rest, now, *steps_only(ends), stored=stored)


def columns(episodes: Episodes) -> list[Column]:
    """All numbers of a dataset by step: action, observations, then the rest."""
    every = torch.arange(len(episodes.at))
    named = [Column(key, values, every) for key, values in episodes.columns.items()]
    vectors = [(k, v) for k, v in episodes.observations.items() if k not in episodes.cameras]
    named += [Column(key, values, episodes.at) for key, values in vectors]
    return sorted(named, key=lambda column: (column.key != "action", not column.key.startswith("observation.")))


def vectors(episodes: Episodes) -> list[Column]:
    """The action and the vector observations."""
    return [column for column in columns(episodes) if column.key.startswith(("action", "observation."))]


def declared_space(built: dict[str, Any]) -> dict[str, list[float]]:
    """{"low", "high"} of the action space that the file declares, or else of the environment that the dataset names."""
    from .. import ENV_BUILDER_REGISTRY
    from ..acting.evaluation import offered_env

    stored = getattr(getattr(built["dataset"], "episodes", None), "stored", {})
    if "action_space" in stored:
        return stored["action_space"]
    try:
        name, options = offered_env(built["env"])
        envs = ENV_BUILDER_REGISTRY[name](**vars(options)).build(1, 0)
        space = envs.single_action_space
        envs.close()
        return {"low": space.low.ravel().tolist(), "high": space.high.ravel().tolist()}
    except Exception:  # no environment, or one that cannot be built here
        return {}


# ---- what looks wrong ----------------------------------------------------------------------------------------------


def findings(episodes: Episodes, space: dict[str, list[float]]) -> list[Finding]:
    """Suspicious dimensions of the action and the vector observations."""
    found: list[Finding] = []
    inner = steps_only(episodes.ends)[1] >= 0  # steps that are followed by one of the same episode
    for column in vectors(episodes):
        for dim, x in enumerate(column.steps().T):
            finite = x[np.isfinite(x)]
            if len(finite) < len(x):
                found.append(Finding(column.key, dim, f"{len(x) - len(finite)} NaN or Inf"))
            if not len(finite):
                continue
            distinct = np.unique(finite[:SAMPLED])
            if finite.min() == finite.max():
                found.append(Finding(column.key, dim, f"never changes: {finite[0]:.6g}"))
                continue
            if len(distinct) == 2 and len(finite) > 10:
                low, high = distinct
                found.append(Finding(column.key, dim, f"takes two values only, {low:.6g} and {high:.6g}; a gripper?"))
            elif spike := _spike(x, inner, episodes):
                found.append(Finding(column.key, dim, spike))
            if column.key == "action":
                found += [Finding("action", dim, what) for what in _outside(finite, dim, space)]
    return found


def grouped(found: list[Finding]) -> list[tuple[str, str, str]]:
    """Merge findings that differ in the dimension alone; their dimensions become text such as "3, 5-7"."""
    dims: dict[tuple[str, str], list[int]] = {}
    for key, dim, what in found:
        dims.setdefault((key, what), []).append(dim)
    texts = []
    for (key, what), numbers in dims.items():
        starts = [n for n in numbers if n - 1 not in numbers]
        stops = [n for n in numbers if n + 1 not in numbers]
        spans = [f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, stops, strict=True)]
        texts.append((key, ", ".join(spans), what))
    return texts


def _spike(x: np.ndarray, inner: Tensor, episodes: Episodes) -> str:
    """Describe the largest change from one step to the next where it is out of proportion, else ""."""
    after = np.flatnonzero(inner.numpy())
    change = np.abs(x[after + 1] - x[after]) if len(after) else np.zeros(1)
    change = np.nan_to_num(change, posinf=0.0)
    usual = float(np.quantile(change, 0.99))
    if len(change) < 50 or usual == 0 or change.max() < SPIKE * usual:
        return ""
    episode, step = episodes.place(int(after[change.argmax()]) + 1)
    return f"jumps by {change.max():.4g} at episode {episode}, step {step}; 99 % of the changes are below {usual:.4g}"


def _outside(x: np.ndarray, dim: int, space: dict[str, list[float]]) -> list[str]:
    """Describe values of an action outside its space; without one, outside [-1, 1] when most values are inside."""
    low, high = (space[bound][dim] if len(space.get(bound, ())) > dim else math.nan for bound in ("low", "high"))
    guessed = math.isnan(low) or math.isnan(high)
    low, high = (-1.0, 1.0) if guessed else (low, high)
    slack = 1e-5 * max(1.0, abs(low) if math.isfinite(low) else 1.0)
    share = float(((x < low - slack) | (x > high + slack)).mean())
    if share == 0 or (guessed and share > 0.2):
        return []
    where = f"[{low:.6g}, {high:.6g}]"
    what = f"most values are in {where}, is that its space?" if guessed else f"its space is {where}"
    return [f"{100 * share:.2g} % of the values are outside, from {x.min():.4g} to {x.max():.4g}; {what}"]


# ---- the report ----------------------------------------------------------------------------------------------------


def summary(episodes: Episodes, path: str) -> list[str]:
    """Format, counts, storage and memory."""
    lengths = episodes.lengths
    stored = {key: value for key, value in episodes.stored.items() if value and key not in APART}
    about = "".join(f", {key} {value}" for key, value in stored.items())
    vectors = sum(column.values.nbytes for column in columns(episodes))
    decoded = sum(store.nbytes for store in episodes.cameras.values())
    lines = [f"{episodes.name}: {episodes.stored.get('format', 'made')}{about}"]
    lines += [f"{len(lengths)} episodes, {len(episodes.at)} steps"]
    where = Path(path).expanduser() if path else Path(episodes.name)
    if where.exists():
        files = [where] if where.is_file() else [file for file in where.rglob("*") if file.is_file()]
        lines += [f"storage: {gigabytes(sum(file.stat().st_size for file in files))} in {len(files)} files"]
    pictures = f", and {gigabytes(decoded)} of decoded pictures with --dataset.cache memory or disk" if decoded else ""
    lines += [f"memory: {gigabytes(vectors)} a process{pictures}"]
    if "not used" in episodes.stored:
        lines += [f"not used: {episodes.stored['not used']}"]
    if episodes.tasks:
        texts = [repr(text) for text in episodes.tasks]
        lines += [f"tasks: {', '.join(texts[:5])}" + f" and {len(texts) - 5} more" * (len(texts) > 5)]
    return lines


def table(episodes: Episodes) -> list[str]:
    """One line for each key."""
    rows = [("key", "shape", "dtype", "min", "max", "NaN", "constant dimensions")]
    for column in columns(episodes):
        key, values, x = column.key, column.values, column.steps()
        finite = x[np.isfinite(x)]
        low, high = (f"{finite.min():.5g}", f"{finite.max():.5g}") if len(finite) else ("-", "-")
        constant = int((x == x[:1]).all(0).sum())
        dtype = str(values.dtype).removeprefix("torch.")
        note = f"{constant} of {x.shape[1]}" if values.ndim > 1 else "yes" if constant else ""
        rows.append((key, _shape(values.shape[1:]), dtype, low, high, str(x.size - len(finite)), note))
    for key, store in episodes.cameras.items():
        shown = take(store, episodes.at[evenly(len(episodes.at), 50)]).numpy()
        black = sum(picture.min() == picture.max() for picture in shown)
        sizes = " and ".join(_shape(size) for size in episodes.resized_from.get(key, ()))
        notes = [f"{black} of {len(shown)} pictures of one colour"] if black else []
        note = "; ".join([*notes, *([f"resized from {sizes}"] if sizes else [])])
        rows.append((key, _shape(store.shape[-3:]), "uint8", str(shown.min()), str(shown.max()), "0", note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return ["", *(line.rstrip() for line in lines)]


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "number"


def evenly(count: int, most: int) -> Tensor:
    """At most `most` numbers below `count`, evenly spaced."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


def flags(episodes: Episodes) -> list[str]:
    """Episode lengths, returns, rewards, and the flags at the ends of episodes."""
    data, last = episodes.columns, episodes.ends - 1
    lines = ["", f"episode lengths: {_range(episodes.lengths.float())}"]
    if single := int((episodes.lengths == 1).sum()):
        lines += [f"{single} episodes have a single step"]
    named = {INTERVENTION: "interventions", SUCCESS: "success"}
    episode = torch.repeat_interleave(torch.arange(len(last)), episodes.lengths)
    for key in (key for key in RECORDED if key in data):
        steps = data[key].bool()
        begins = steps & ~torch.cat([steps[:1] & False, steps[:-1] & (episode[1:] == episode[:-1])])
        times = f", {int(begins.sum())} times in {len(episode[steps].unique())} of {len(last)} episodes"
        lines += [f"{named[key]}: {int(steps.sum())} of {len(steps)} steps" + times * bool(steps.any())]
    if "reward" not in data:
        return [*lines, "no rewards"]
    lines += [f"returns: {_range(returns(episodes))}"]
    values, counts = (found.tolist() for found in data["reward"].unique(return_counts=True))
    each = [f"{value:.6g} ({count} times)" for value, count in zip(values, counts, strict=True)]
    few = f"; the values {', '.join(each)}" if len(values) <= 5 else ""
    lines += [f"rewards: {_range(data['reward'])}{few}"]
    ends = torch.zeros(len(episodes.at), dtype=torch.bool)
    ends[last] = True
    for name in ("terminated", "truncated"):
        if name in data:
            flag = data[name].bool()
            at_end, within = int((flag & ends).sum()), int((flag & ~ends).sum())
            lines += [f"{name}: {at_end} of {len(last)} episodes" + f", and {within} times within one" * (within > 0)]
    unknown = int((episodes.after < 0).sum())
    lines += ["the observation after the last action: " + (f"not known, {unknown} times" if unknown else "known")]
    return lines


def returns(episodes: Episodes) -> Tensor:
    """`[E]`, the sum of the rewards of each episode."""
    episode = torch.repeat_interleave(torch.arange(len(episodes.ends)), episodes.lengths)
    total = torch.zeros(len(episodes.ends), dtype=torch.float64)
    return total.index_add_(0, episode, episodes.columns["reward"].double())


def _range(values: Tensor) -> str:
    x = values.double().numpy()
    return f"{x.min():.6g} to {x.max():.6g}, mean {x.mean():.6g}, median {np.median(x):.6g}"


def statistics_table(norm_stats: dict[str, Any], names: dict[str, list[str]]) -> list[str]:
    """One line for each dimension that is normalised, with its name where it has one."""
    lines = ["statistics for normalisation:" if norm_stats else "no statistics"]
    for key, stats in norm_stats.items():
        named = ((name, value) for name, value in stats.items() if name != "count")
        arrays = {name: np.atleast_1d(np.asarray(value, float)) + 0.0 for name, value in named}
        known = names.get(key, [])
        if max(array.ndim for array in arrays.values()) == 2:  # each step of a chunk
            arrays = {name: array[0] if array.ndim == 2 else array for name, array in arrays.items()}
            key += ", first step"
        lines += [f"  {key:28s} " + " ".join(f"{name:>11s}" for name in arrays)]
        for dim in range(len(next(iter(arrays.values())))):
            numbers = " ".join(f"{array.reshape(len(array), -1)[dim, 0]:11.5g}" for array in arrays.values())
            lines += [f"  {f'[{dim}]':28s} {numbers}" + (f"  {known[dim]}" if dim < len(known) else "")]
    return lines


# ---- the page ------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A histogram."""

    name: str
    values: np.ndarray
    suspicious: bool = False


@dataclass
class Page:
    """The content of the page."""

    title: str
    strips: dict[str, np.ndarray]
    """Camera -> pictures `[n, C, H, W]` of an episode, n at most PICTURES."""
    steps: list[int]
    """`[n]`, the steps that these pictures show."""
    times: dict[str, np.ndarray]
    """Drawn without a camera: key -> its values over the episode, `[T, D]`."""
    panels: list[Panel]


def page_of(episodes: Episodes, found: list[Finding]) -> Page:
    """Histograms of all values, and an episode of median length."""
    odd = {(key, dim) for key, dim, _ in found}
    panels = [Panel("episode length", episodes.lengths.numpy())]
    if "reward" in episodes.columns:
        panels += [Panel("return", returns(episodes).numpy()), Panel("reward", episodes.columns["reward"].numpy())]
    for key, values in ((column.key, column.steps()) for column in vectors(episodes)):
        some = values[evenly(len(values), SAMPLED).numpy()].T
        name, known = key.removeprefix("observation."), episodes.names.get(key, [])
        titles = [f"{name}[{dim}]" + (f" {known[dim]}"[:22] if dim < len(known) else "") for dim in range(len(some))]
        panels += [Panel(titles[dim], x, (key, dim) in odd) for dim, x in enumerate(some)]
    length = int(episodes.lengths.median())
    episode = int((episodes.lengths - length).abs().argmin())
    last = int(episodes.ends[episode])
    steps = torch.arange(last - int(episodes.lengths[episode]), last)
    shown = steps[evenly(len(steps), PICTURES)]
    strips = {
        key.removeprefix(IMAGES): take(store, episodes.at[shown]).numpy() for key, store in episodes.cameras.items()
    }
    times = {} if strips else {column.key: column.steps()[steps.numpy()] for column in vectors(episodes)}
    title = f"{literal(episodes.name)}\nepisode {episode}, {len(steps)} steps"
    return Page(title, strips, (shown - steps[0]).tolist(), times, panels)


def draw_page(page: Page, path: Path) -> None:
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
        """A grid of panels, `top` inches below the top. Margins fitted to the text would take seconds instead."""
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
        axis.set_title(literal(name), fontsize=8, color=colour if suspicious else "black")
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
            if len(picture) not in CHANNELS:  # of a stack, the newest frame
                picture = picture[-3:] if len(picture) % 3 == 0 else picture[-1:]
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
        axis.set_title(literal(key), fontsize=8)
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=6)


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
