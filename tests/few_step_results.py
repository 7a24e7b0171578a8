"""Make tests/results/few_step.json: success and milliseconds of a flow and of a shortcut model by calls of the network.

python tests/few_step_results.py --runs runs/few --jobs 2

Trains each run unless it is finished, and evaluates each at every number of calls unless its eval.jsonl has that, so it
can go on over days. Every row has the same 50 episodes.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from components import load_policy  # noqa: E402
from components.run.curves import read_lines  # noqa: E402
from making import ROOT  # noqa: E402

TASK = "peg-insert-side-v3"
CALLS = {"flow": (10, 2, 1), "shortcut": (2, 1)}


@dataclass(frozen=True)
class Args:
    """Train, evaluate and collect."""

    runs: Path = Path("runs/few")
    """Folder of the run folders."""
    out: Path = ROOT / "tests" / "results" / "few_step.json"
    """Results file."""
    jobs: int = 1
    """Runs at a time, each on one thread."""
    seeds: int = 3
    """Seeds of each objective."""


def line_of(objective: str, seed: int) -> list[str]:
    """The options of a training."""
    own = ["--trainer.objective", objective] if objective != "flow" else []
    return ["--trainer", "flow", *own, "--dataset.task", TASK, "--seed", str(seed), "--eval-every", "0"]


def evaluated(folder: Path, calls: int) -> dict[str, Any]:
    """The run's evaluation with so many calls of the network for a chunk, made now if there is none yet."""
    path = folder / "eval.jsonl"
    own = lambda: [line for line in read_lines(path) if line["inference"]["sampling_steps"] == calls]  # noqa: E731
    if not own():
        options = ["--eval-episodes", "50", "--env-timeout", "600", "--policy.sampling-steps", str(calls)]
        words = [sys.executable, "-m", "components.evaluate", str(folder), *options]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return own()[-1]


def milliseconds(folder: Path, calls: int, reference: Path, times: int = 20) -> tuple[float, float]:
    """Median CPU milliseconds to plan a chunk for one observation; median of the ratios to the flow's in 10 calls.

    The two take turns, so that both meet the same load of the machine, and waiting for others is not counted.
    """
    torch.set_num_threads(1)
    policies = [load_policy(folder, sampling_steps=calls), load_policy(reference, sampling_steps=10)]
    feature = policies[0].spec["observation.state"]
    state = np.zeros(feature["shape"][1:], np.float32)  # of one step of the history
    taken = np.zeros((times, 2))
    for turn in range(times):
        for i, policy in enumerate(policies):
            policy.reset()
            began = time.process_time()
            policy.act({"observation.state": state})
            taken[turn, i] = 1000 * (time.process_time() - began)
    return round(float(np.median(taken[:, 0])), 2), round(float(np.median(taken[:, 0] / taken[:, 1])), 3)


def rows(folder: Path, reference: Path, objective: str, seed: int) -> list[dict[str, Any]]:
    """A row for each number of calls."""
    made = []
    for calls in CALLS[objective]:
        result = evaluated(folder, calls)
        row = making.row(folder, f"{calls} call{'s' * (calls > 1)}", line_of(objective, seed))
        ms, ratio = milliseconds(folder, calls, reference)
        row |= {"run": f"{folder.name}-{calls}", "trainer": objective, "value": result["success_rate"]}
        made.append(row | {"episodes": result["episodes"], "plan_ms": ms, "plan_ratio": ratio})
    return made


if __name__ == "__main__":
    args = tyro.cli(Args)
    folder = args.runs.resolve()
    lines = {f"{objective}-{seed}": (objective, seed) for seed in range(args.seeds) for objective in CALLS}
    with ThreadPoolExecutor(args.jobs) as pool:
        finished = list(pool.map(lambda name: making.make(folder / name, line_of(*lines[name])), lines))
    for (name, (objective, seed)), done in zip(lines.items(), finished, strict=True):
        if done:
            for row in rows(folder / name, folder / f"flow-{seed}", objective, seed):
                making.keep(args.out, row)
