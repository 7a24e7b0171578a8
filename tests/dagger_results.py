"""Make tests/results/dagger.json: how good a policy gets by the number of actions that an expert gave, and its picture.

python tests/dagger_results.py --runs runs/dagger --jobs 2                        # 2 experts, 12 clones, then 108 runs
python tests/dagger_results.py --runs runs/dagger --tasks Hopper-v5 --seeds 1 --labels 1000 2000
python tests/dagger_results.py --picture tests/pictures/dagger.png                # of the rows that there are

A clone of few demonstrations is where all ways begin. DAgger and HG-DAgger spend a budget of labels on the states that
this clone visits; cloning spends as many on further demonstrations, as whole episodes, so up to one more. The expert is
the policy of a run of PPO or SAC, or Meta-World's script. All make as many updates, and are evaluated on 100 episodes.
Finished runs are left out.
"""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from components import DATASET_BUILDER_REGISTRY  # noqa: E402
from components.data.figures import literal, save_figure  # noqa: E402
from components.intervals import moments, of_mean  # noqa: E402
from components.run.curves import read_lines  # noqa: E402
from making import ROOT  # noqa: E402

METHODS = {"bc": "more demonstrations", "dagger": "DAgger", "hg_dagger": "HG-DAgger"}
SPREAD = 4000  # steps over which DAgger's labels are spread: a clone that is stuck visits one state all the time
OFTEN = ["--eval-every", "0", "--eval-episodes", "100", "--log-every", "1000", "--env-timeout", "0"]


class Task(NamedTuple):
    """What is learnt from whom; `{expert}` is the run folder of the expert."""

    data: str
    """Options of the dataset, its name first."""
    number: str
    """Its option for the number of demonstrations."""
    few: int
    """Demonstrations of the clone that is corrected."""
    many: int
    """Demonstrations that may be cloned."""
    loss: str
    gate: str = ""
    """Options of HG-DAgger where its defaults, which are for a robot's steps, would leave a clone alone."""
    expert: str = ""
    """How the expert is trained; empty for Meta-World's script."""


def gait(env: str, trainer: str, steps: int) -> Task:
    """To run as a policy does that has learnt from rewards."""
    data = f"--dataset gymnasium --dataset.id {env} --dataset.policy {{expert}}"
    expert = f"--trainer {trainer} --env.id {env} --steps {steps}"
    expert += f" --eval-every {steps // 2} --eval-episodes 10 --log-every {steps // 20}"
    return Task(data, "episodes", 1, 8, "mse", "--trainer.takes-over 0.15 --trainer.gives-back 0.05", expert)


def script(task: str) -> Task:
    """To solve a task of Meta-World as its script does."""
    return Task(f"--dataset metaworld --dataset.task {task}", "demos", few=5, many=100, loss="l1")


TASKS = {
    "Hopper-v5": gait("Hopper-v5", "ppo", 300_000),
    "HalfCheetah-v5": gait("HalfCheetah-v5", "sac", 50_000),
    "peg-insert-side-v3": script("peg-insert-side-v3"),
    "coffee-pull-v3": script("coffee-pull-v3"),
}


@dataclass(frozen=True)
class Args:
    """Train, collect and draw."""

    runs: Path | None = None
    """Folder of the run folders."""
    jobs: int = 1
    """Trainings at a time, one thread each."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Of these."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of everything but the experts, which have seed 1."""
    labels: tuple[int, ...] = (500, 1000, 2000)
    """Budgets."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of: bc, dagger, hg_dagger."""
    steps: int = 8000
    """Updates of each run, and steps of its environment."""
    out: Path = ROOT / "tests" / "results" / "dagger.json"
    """File of the rows."""
    picture: Path | None = None
    """PNG of the rows."""


def data_words(args: Args, name: str) -> list[str]:
    """The options of a task's dataset."""
    assert args.runs is not None
    return TASKS[name].data.format(expert=args.runs.resolve() / f"expert-{name}").split()


@cache
def lengths(args: Args, name: str, seed: int) -> list[int]:
    """Steps of each demonstration, in their order; fewer demonstrations are the first of these."""
    _, dataset, *words = data_words(args, name)
    options = {key.removeprefix("--dataset."): value for key, value in zip(words[::2], words[1::2], strict=True)}
    factory: Any = DATASET_BUILDER_REGISTRY[dataset]
    data = factory(**options, **{TASKS[name].number: TASKS[name].many}, seed=seed, validation=0.0).build()
    return data["dataset"].episodes.lengths.tolist()


def stages(args: Args) -> Iterator[making.Runs]:
    """The experts, the clones of few demonstrations, then what goes on from them, and clones of more."""
    assert args.runs is not None
    lines = {name: TASKS[name].expert for name in args.tasks if TASKS[name].expert}
    trained = {name: ["online_trainer.py", *line.split(), "--seed", "1"] for name, line in lines.items()}
    yield {f"expert-{name}": ("expert", line) for name, line in trained.items()}
    first: making.Runs = {}
    then: making.Runs = {}
    for seed, name in itertools.product(args.seeds, args.tasks):
        task, few = TASKS[name], f"few-{name}-{seed}"
        own = ["--seed", str(seed), *data_words(args, name), "--dataset.seed", str(seed), "--dataset.validation", "0"]
        own += ["--loss", task.loss, "--steps", str(args.steps), *OFTEN, f"--dataset.{task.number}"]
        first[few] = ("0 bc", ["--trainer", "bc", *own, str(task.few)])
        for labels, method in itertools.product(args.labels, args.methods):
            line = ["online_trainer.py", "--trainer", "dagger", "--trainer.method", method, *own, str(task.few)]
            line += ["--trainer.labels", str(labels), "--init-from", str(args.runs / few)]
            line += ["--trainer.expert", str(args.runs.resolve() / f"expert-{name}")] if task.expert else []
            line += ["--trainer.share", str(min(labels / SPREAD, 1.0))] if method == "dagger" else task.gate.split()
            if method == "bc":
                line = ["--trainer", "bc", *own, str(demonstrations(args, name, seed, labels))]
            then[f"{method}-{labels}-{name}-{seed}"] = (f"{labels} {method}", line)
    yield first
    yield then


def demonstrations(args: Args, name: str, seed: int, labels: int) -> int:
    """As many as have so many steps more than the few."""
    steps = np.cumsum(lengths(args, name, seed))
    return min(int(np.searchsorted(steps, steps[TASKS[name].few - 1] + labels)) + 1, TASKS[name].many)


def tell(args: Args, folder: Path, suite: str, line: list[str]) -> dict[str, Any]:
    """A row of the results, with the labels beyond the few demonstrations; run folders are named without theirs."""
    found = making.row(folder, suite, [Path(word).name if "/" in word else word for word in line])
    if suite == "expert":
        return found
    labels = read_lines(folder / "eval.jsonl")[-1].get("expert_labels")
    if labels is None:
        name = next(name for name in TASKS if name in folder.name)
        steps = [0, *np.cumsum(lengths(args, name, found["seed"])).tolist()]
        labels = steps[int(line[-1])] - steps[TASKS[name].few]
    return found | {"method": suite.partition(" ")[2], "labels": labels}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A picture for each task: its score over labels; intervals are 95 % over seeds, by Student's t."""
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows if row["suite"] != "expert"))
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 3.6 * len(tasks), 3.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        for row in (row for row in mine if row["suite"] == "expert"):
            axis.axhline(row["value"], color="0.5", lw=1, ls="--", label="the expert")
        labels = [row["labels"] for row in mine if row["suite"] != "expert"]
        for place, (method, label) in enumerate(METHODS.items()):
            points = np.array(points_of(mine, method))
            if len(points):
                x, middle, low, high = points.T
                spread = np.maximum([middle - low, high - middle], 0)
                x = x + 0.005 * max(labels) * (place - 1)
                axis.errorbar(x, middle, spread, marker="o", ms=3, lw=1.4, capsize=2, label=label)
        few = next(one.few for name, one in TASKS.items() if name in task)
        axis.set_title(literal(task), fontsize=10)
        axis.set_xlabel(f"actions of the expert beyond {few} demonstration{'s' * (few > 1)}", fontsize=9)
        axis.set_ylabel({"success_rate": "success rate", "return_mean": "return"}[mine[0]["metric"]], fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0, 0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def points_of(rows: Sequence[dict[str, Any]], method: str) -> list[tuple[float, float, float, float]]:
    """(mean labels, mean score, low, high) over the seeds of each budget of a task.

    The clone of few demonstrations is in every line.
    """
    points = []
    rows = [row for row in rows if row["suite"] != "expert"]
    for suite in sorted({row["suite"] for row in rows}, key=lambda suite: int(suite.partition(" ")[0])):
        group = [row for row in rows if row["suite"] == suite and (row["method"] == method or suite == "0 bc")]
        if group:
            values = [row["value"] for row in group]
            low, high = of_mean(*moments(values), len(values)) if len(values) > 1 else (values[0], values[0])
            if group[0]["metric"] == "success_rate":
                low, high = max(low, 0.0), min(high, 1.0)
            points.append((float(np.mean([row["labels"] for row in group])), float(np.mean(values)), low, high))
    return points


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.runs:
        for stage in stages(args):
            making.collect(stage, args.runs, args.out, args.jobs, partial(tell, args))
    if args.picture:
        draw(json.loads(args.out.read_text()), args.picture)
        print(f"picture: {args.picture}")
