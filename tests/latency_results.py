"""Make tests/results/latency.json: what the time that planning takes costs, of run folders of `flow` or `diffusion`.

python tests/latency_results.py --runs runs/peg-0 runs/peg-1 runs/peg-2 runs/pusht-0 --jobs 2
python tests/latency_results.py --picture tests/pictures/latency.png    # of the rows that there are

Each run is evaluated with four methods and several delays, on the same seeds of episodes. Rows that the file has are
not made again, so it can go on over days. A robot that waits takes longer: an episode is cut after twice its usual
steps.
"""

import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from components import UserError, load_policy  # noqa: E402
from components.acting.evaluation import headline, offered_env, run_episodes, summarise, tracked_of  # noqa: E402
from components.data.figures import literal, save_figure  # noqa: E402
from components.envs.vector import Environments  # noqa: E402
from components.intervals import moments, of_mean  # noqa: E402
from components.report import result_row  # noqa: E402
from components.run.reading import read_args  # noqa: E402
from making import ROOT  # noqa: E402

METHODS: dict[str, tuple[str, ...]] = {
    "blocking": ("--policy.blocking",),
    "naive": (),
    "ensembling": ("--policy.ensemble", "0.01"),
    "real time": ("--policy.real-time",),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "blocking": {"blocking": True},
    "naive": {},
    "ensembling": {"ensemble": 0.01},
    "real time": {"real_time": True},
}
SMOOTH = ("jerk_mean", "border_mean", "inside_mean")


@dataclass(frozen=True)
class Args:
    """Evaluate under delay, collect and draw."""

    runs: tuple[Path, ...] = ()
    """Run folders."""
    delays: tuple[int, ...] = (0, 1, 2, 4, 6, 8)
    """Environment steps from an observation to the first action planned from it."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of: blocking, naive, ensembling, real time."""
    action_steps: int = 4
    """Steps of a chunk until the next one is planned; with a longer delay, as many as that."""
    blocking_steps: int = 8
    """The same of blocking, which fails where it stops as often."""
    episodes: int = 50
    """Of each row."""
    seed: int = 2_000_000
    """Of the first episode."""
    jobs: int = 1
    """Rows at a time, each on one thread."""
    out: Path = ROOT / "tests" / "results" / "latency.json"
    """Results file."""
    picture: Path | None = None
    """PNG to draw of the rows."""


def measure(run: Path, method: str, delay: int, steps: int, episodes: int, seed: int) -> dict[str, Any]:
    """One row: the episodes of one policy, method and delay."""
    import torch

    torch.set_num_threads(1)
    name, options = offered_env(read_args(run)["env"])
    options = replace(options, max_episode_steps=2 * options.max_episode_steps)
    policy = load_policy(run, delay=delay, action_steps=steps, **SETTINGS[method])
    envs = Environments(options.build, min(10, episodes), seed, 60.0)
    found = run_episodes(policy, envs, range(seed, seed + episodes))
    envs.close()
    result = summarise(found, {"name": name}, 0, policy)
    row = result_row(run)
    words = ["python -m components.evaluate", f"runs/{run.name}", *METHODS[method], f"--policy.delay {delay}"]
    words += [f"--policy.action-steps {steps}", f"--eval-episodes {episodes}", f"--eval-seed {seed}"]
    words += [f"--env.max-episode-steps {options.max_episode_steps}"]
    metric = "return_mean" if result["success_rate"] is None else "success_rate"
    kept = {key: result[key] for key in ("success_rate", "return_mean", "length_mean", *SMOOTH, *tracked_of(result))}
    print(f"{run.name} {method} {delay}: {headline(result)}", flush=True)
    own = {"method": method, "delay": delay, "action_steps": result["inference"]["action_steps"]}
    row |= {
        "suite": f"delay {delay}, {method}",
        "task": getattr(options, "task", name),
        "metric": metric,
        "value": result[metric],
        "episodes": episodes,
    }
    return {"run": name_of(run, method, delay)} | row | own | kept | {"command": " ".join(words)}


def name_of(run: Path, method: str, delay: int) -> str:
    """The name of a row."""
    return f"{run.name}-{method.replace(' ', '-')}-{delay}"


def collect(args: Args) -> None:
    """Make the rows that the file lacks, the small delays of all methods first."""
    rows = making.rows_of(args.out)
    wanted = [(run, method, delay) for delay in args.delays for run in args.runs for method in args.methods]
    left = [one for one in wanted if name_of(*one) not in rows]
    print(f"{len(wanted) - len(left)} of {len(wanted)} rows are there", flush=True)
    fresh: Any = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}  # MuJoCo keeps memory
    with ProcessPoolExecutor(args.jobs, **fresh) as pool:
        begun = {}
        for run, method, delay in left:
            steps = args.blocking_steps if method == "blocking" else args.action_steps
            begun[pool.submit(measure, run, method, delay, steps, args.episodes, args.seed)] = (run, method, delay)
        for made in as_completed(begun):
            try:
                making.keep(args.out, made.result())
            except UserError as error:
                print(f"{name_of(*begun[made])}: {error}", flush=True)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each task: how well it is done, and the jerk, against the delay; intervals are 95 % over seeds."""
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    known = {(row["task"], row["delay"]): None for row in rows}
    tasks = [task for task, number in Counter(task for task, _ in known).items() if number > 1]  # of several delays
    figure, axes = plt.subplots(2, len(tasks), figsize=(1 + 3.6 * len(tasks), 5.6), squeeze=False, sharex=True)
    for column, task in enumerate(tasks):
        row = next(row for row in rows if row["task"] == task)
        # Push-T's coverage in the end tells more than how often it is above 0.95.
        done, metric = ("coverage_final",) * 2 if "coverage_final" in row else ("value", row["metric"])
        for place, method in enumerate(METHODS):
            for axis, key in zip(axes[:, column], (done, "jerk_mean"), strict=True):
                points = points_of(rows, task, method, key)
                if points:
                    x, middle, low, high = np.array(points).T
                    x = x + 0.08 * (place - 1.5)
                    spread = np.maximum([middle - low, high - middle], 0)
                    axis.errorbar(x, middle, spread, marker="o", ms=3, lw=1.4, capsize=2, label=method)
        axes[0, column].set_title(literal(task), fontsize=10)
        axes[1, column].set_yscale("log")
        axes[1, column].yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes[1, column].yaxis.set_minor_formatter("")
        axes[1, column].set_xlabel("delay, steps of the environment", fontsize=9)
        if metric != "return_mean":
            axes[0, column].set_ylim(-0.03, 1.03)
        for axis, label in zip(axes[:, column], (metric.replace("_", " "), "jerk"), strict=True):
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
            axis.set_ylabel(label, fontsize=9)
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def points_of(
    rows: Sequence[dict[str, Any]], task: str, method: str, key: str
) -> list[tuple[float, float, float, float]]:
    """(delay, mean over seeds, low, high) of one line."""
    points = []
    mine = [row for row in rows if row["task"] == task and row["method"] == method and row[key] is not None]
    for delay in sorted({row["delay"] for row in mine}):
        values = [row[key] for row in mine if row["delay"] == delay]
        low, high = of_mean(*moments(values), len(values)) if len(values) > 1 else (values[0], values[0])
        if key != "jerk_mean" and mine[0]["metric"] == "success_rate":
            low, high = max(low, 0.0), min(high, 1.0)
        points.append((float(delay), float(np.mean(values)), max(low, 1e-12) if key == "jerk_mean" else low, high))
    return points


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.runs:
        collect(args)
    if args.picture:
        draw(json.loads(args.out.read_text()), args.picture)
        print(f"picture: {args.picture}")
