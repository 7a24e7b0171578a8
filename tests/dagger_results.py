"""Make tests/results/dagger.json: success over the number of actions that an expert gave, and its picture.

python tests/dagger_results.py --runs runs/dagger --jobs 2                        # 9 clones, then 108 runs
python tests/dagger_results.py --runs runs/dagger --tasks peg-insert-side-v3 --seeds 1 --labels 1000 2000
python tests/dagger_results.py --picture tests/pictures/dagger.png                # of the rows that there are

A clone of few demonstrations is where all ways begin. DAgger and HG-DAgger spend a budget of labels on the states that
this clone visits; cloning spends as many on further demonstrations, as whole episodes, so up to one more. The expert is
Meta-World's script. All make as many updates, and are evaluated on 100 goals. Finished runs are left out.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from components import DATASET_BUILDER_REGISTRY  # noqa: E402
from components.data.figures import literal, save_figure  # noqa: E402
from components.intervals import moments, of_mean  # noqa: E402
from components.run.curves import read_lines  # noqa: E402
from making import ROOT  # noqa: E402

FEW, MANY = 20, 100  # demonstrations of the clone that is corrected, and of all that may be cloned
METHODS = {"bc": "more demonstrations", "dagger": "DAgger", "hg_dagger": "HG-DAgger"}
SPREAD = 4000  # steps over which DAgger's labels are spread: a clone that is stuck visits one state all the time
OFTEN = ["--eval-every", "0", "--eval-episodes", "100", "--log-every", "1000", "--env-timeout", "0"]


@dataclass(frozen=True)
class Args:
    """Train, collect and draw."""

    runs: Path | None = None
    """Folder of the run folders."""
    jobs: int = 1
    """Trainings at a time, one thread each."""
    tasks: tuple[str, ...] = ("basketball-v3", "peg-insert-side-v3", "soccer-v3")
    """Of Meta-World."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of everything."""
    labels: tuple[int, ...] = (500, 1000, 2000, 4000)
    """Budgets."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of: bc, dagger, hg_dagger."""
    steps: int = 8000
    """Updates of each run, and steps of its environment."""
    out: Path = ROOT / "tests" / "results" / "dagger.json"
    """File of the rows."""
    picture: Path | None = None
    """PNG of the rows."""


def lengths(task: str, seed: int) -> list[int]:
    """Steps of each demonstration, in their order; fewer demonstrations are the first of these."""
    factory: Any = DATASET_BUILDER_REGISTRY["metaworld"]
    data = factory(task=task, demos=MANY, seed=seed, validation=0.0).build()
    return data["dataset"].episodes.lengths.tolist()


def stages(args: Args) -> list[making.Runs]:
    """The clones of few demonstrations, then what goes on from them, and clones of more."""
    assert args.runs is not None
    first: making.Runs = {}
    then: making.Runs = {}
    for seed in args.seeds:
        for task in args.tasks:
            own = ["--seed", str(seed), "--dataset", "metaworld", "--dataset.task", task, "--dataset.seed", str(seed)]
            own += ["--dataset.validation", "0", "--loss", "l1", "--steps", str(args.steps), *OFTEN]
            few = f"few-{task}-{seed}"
            first[few] = ("0 bc", ["--trainer", "bc", *own, "--dataset.demos", str(FEW)])
            long = lengths(task, seed)
            for labels in args.labels:
                for method in args.methods:
                    line = ["online_trainer.py", "--trainer", "dagger", "--trainer.method", method, *own]
                    line += ["--dataset.demos", str(FEW), "--trainer.labels", str(labels)]
                    line += ["--init-from", str(args.runs / few)]
                    line += ["--trainer.share", str(min(labels / SPREAD, 1.0))] if method == "dagger" else []
                    if method == "bc":
                        demos = int(np.searchsorted(np.cumsum(long), sum(long[:FEW]) + labels)) + 1
                        line = ["--trainer", "bc", *own, "--dataset.demos", str(min(demos, MANY))]
                    then[f"{method}-{labels}-{task}-{seed}"] = (f"{labels} {method}", line)
    return [first, then]


def tell(folder: Path, suite: str, line: list[str]) -> dict[str, Any]:
    """A row of the results, with the labels beyond the few demonstrations."""
    found = making.row(folder, suite, line)
    labels = read_lines(folder / "eval.jsonl")[-1].get("expert_labels")
    if labels is None:
        long = lengths(found["task"].removeprefix("metaworld "), found["seed"])
        labels = sum(long[: int(line[line.index("--dataset.demos") + 1])]) - sum(long[:FEW])
    return found | {"method": suite.partition(" ")[2], "labels": labels}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each task: success over labels; intervals are 95 % over seeds, by Student's t."""
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 3.6 * len(tasks), 3.4), squeeze=False, sharey=True)
    for axis, task in zip(axes[0], tasks, strict=True):
        for place, (method, label) in enumerate(METHODS.items()):
            points = np.array(points_of(rows, task, method))
            if len(points):
                x, middle, low, high = points.T
                spread = np.maximum([middle - low, high - middle], 0)
                axis.errorbar(x + 20 * (place - 1), middle, spread, marker="o", ms=3, lw=1.4, capsize=2, label=label)
        axis.set_title(literal(task), fontsize=10)
        axis.set_xlabel(f"actions of the expert beyond {FEW} demonstrations", fontsize=9)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("success rate", fontsize=9)
    axes[0, -1].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def points_of(rows: Sequence[dict[str, Any]], task: str, method: str) -> list[tuple[float, float, float, float]]:
    """(mean labels, mean success, low, high) over the seeds of each budget; the clone of few is in every line."""
    points = []
    mine = [row for row in rows if row["task"] == task]
    for suite in sorted({row["suite"] for row in mine}, key=lambda suite: int(suite.partition(" ")[0])):
        group = [row for row in mine if row["suite"] == suite and (row["method"] == method or suite == "0 bc")]
        if group:
            values = [row["value"] for row in group]
            low, high = of_mean(*moments(values), len(values)) if len(values) > 1 else (values[0], values[0])
            labels = float(np.mean([row["labels"] for row in group]))
            points.append((labels, float(np.mean(values)), max(low, 0.0), min(high, 1.0)))
    return points


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.runs:
        for stage in stages(args):
            making.collect(stage, args.runs, args.out, args.jobs, tell)
    if args.picture:
        draw(json.loads(args.out.read_text()), args.picture)
        print(f"picture: {args.picture}")
