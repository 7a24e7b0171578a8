"""Make tests/results/four_tasks.json: one policy of four Meta-World tasks beside four policies of one task each.

python tests/four_tasks_results.py --runs runs/four_tasks
python -m components.report --results tests/results/four_tasks.json
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from components import load_policy  # noqa: E402
from components.acting.evaluation import Evaluator  # noqa: E402
from components.envs.metaworld import MetaWorldEnv  # noqa: E402
from components.envs.vector import Environments  # noqa: E402
from components.report import run_seconds  # noqa: E402
from components.run.reading import read_args, read_status  # noqa: E402
from components.run.record import start_logging  # noqa: E402
from making import ROOT  # noqa: E402

# The first three share their scene: hand, puck and goal look alike. Wordings that no training has seen, of which the
# near ones change some words, and the far ones all but the name of the object; not changed after the first evaluation.
WORDINGS = {
    "push-v3": ("push the puck into the goal", "shove the puck over to the target"),
    "pick-place-v3": ("pick the puck up and put it at the goal", "lift the puck and carry it over to the target"),
    "reach-v3": ("reach for the goal with your hand", "move the hand to the target"),
    "drawer-open-v3": ("please open this drawer", "pull the drawer out"),
}
TASKS = tuple(WORDINGS)
SEEDS = range(3)
SOURCES = [f"metaworld,task={task}:1" for task in TASKS]
FIRST_SEED = 1_000_000  # of the goals, as in `components.evaluate`


@dataclass(frozen=True)
class Args:
    """Train, evaluate and collect."""

    runs: Path = Path("runs/four_tasks")
    """Folder of the run folders; those that are finished are not made again."""
    out: Path = ROOT / "tests" / "results" / "four_tasks.json"
    """Results file."""
    episodes: int = 50
    """Episodes of each policy in each task."""
    only: str = ""
    """Part of the names of the runs to make and to evaluate."""


def wanted(only: str) -> dict[str, list[str]]:
    """Run name -> command line; the one policy has as many updates as the four together."""
    runs = {}
    for seed in SEEDS:
        common = ["--seed", str(seed), "--eval-episodes", "0"]
        mixture = [
            "--trainer",
            "bc",
            "--dataset",
            "mixture",
            "--dataset.sources",
            *SOURCES,
            "--steps",
            "24000",
            *common,
        ]
        runs[f"one-{seed}"] = mixture
        for task in reversed(TASKS):
            runs[f"{task}-{seed}"] = ["--trainer", "bc", "--dataset.task", task, "--steps", "6000", *common]
        runs[f"untold-{seed}"] = [*mixture, "--model.encoder.task-features", "0"]
    return {name: line for name, line in runs.items() if only in name}


def asked_of(name: str, task: str) -> dict[str, str | None]:
    """Suite -> what a run is told in a task, None for what the environment says; {} if it has not learnt the task."""
    if name.startswith("one-"):
        near, far = WORDINGS[task]
        return {"one policy": None, "one policy, near wording": near, "one policy, far wording": far}
    if name.startswith("untold-"):
        return {"one policy, not told": None}
    return {"one task": None} if name.startswith(f"{task}-") else {}


def row(folder: Path, line: list[str], suite: str, task: str, result: dict[str, Any]) -> dict[str, Any]:
    """A row of the results: a run in one task."""
    record, steps = read_args(folder), read_status(folder)["step"]
    found = {"run": f"{folder.name} {task} {suite}", "suite": suite, "task": task, "trainer": "bc"}
    found |= {"seed": record["seed"], "steps": steps, "metric": "success_rate", "value": result["success_rate"]}
    found |= {"episodes": result["episodes"], "train_seconds": round(run_seconds(folder), 1)}
    found |= {"command": " ".join(making.words_of(line)), "commit": record["git_commit"]}
    return found | {"told": result["inference"].get("task")}


def main(args: Args) -> None:
    """Make the runs that are not finished, then evaluate each in its tasks, whose environments they share."""
    torch.set_num_threads(1)
    start_logging(rank=0)
    runs = wanted(args.only)
    for name, line in runs.items():
        making.make(args.runs.resolve() / name, line)
    done = making.rows_of(args.out)
    seeds = range(FIRST_SEED, FIRST_SEED + args.episodes)
    for task in TASKS:
        asked = [(name, suite, told) for name in runs for suite, told in asked_of(name, task).items()]
        asked = [one for one in asked if f"{one[0]} {task} {one[1]}" not in done]
        options = MetaWorldEnv(task=task)
        envs = Environments(partial(MetaWorldEnv.build, options), 1, FIRST_SEED, 0.0) if asked else None
        for name, suite, told in asked:
            policy = load_policy(args.runs / name, **({"task": told} if told else {}))
            evaluator = Evaluator(policy, envs, {"name": "metaworld", **asdict(options)}, seeds)  # type: ignore[arg-type]
            result, problem = evaluator.evaluate(0)
            assert result is not None, problem
            making.keep(args.out, row(args.runs / name, runs[name], suite, task, result))
            print(f"{name} {task} {suite}: {result['success_rate']:.2f}", flush=True)
        if envs:
            envs.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
