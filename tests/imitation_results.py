"""Make tests/results/imitation.json: every run of its table but those that are finished, so it can go on over days.

python tests/imitation_results.py --runs runs/imitation --jobs 2
python tests/imitation_results.py --runs runs/imitation --pusht pusht_planner.npz    # with the runs on Push-T
python tests/imitation_results.py --only codebook --pusht pusht_planner.npz          # some of them: chunk, experts, ...
"""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from components import load_policy  # noqa: E402
from components.report import own_evaluations  # noqa: E402
from making import ROOT  # noqa: E402

TRAINERS = ("bc", "act", "diffusion", "flow")
SEEDS = {"push-v3": 3, "pick-place-v3": 3, "peg-insert-side-v3": 3}
PUSHT = ["--steps", "6000", "--batch-size", "128", "--dataset.obs-steps", "2"]
REPLANS = ["--policy.action-steps", "2"]  # of the chunks of diffusion and flow; bc is best with single actions
ONCE = ("--eval-every", "0")  # evaluated at the end
# Ways to decode an action, of chunks; suite -> options of bc.
DECODERS = {"chunk": [], "codebook": ["--model.head", "codebook"], "experts": ["--model.experts", "4"]}
CHUNKS = ["--loss", "l1", "--dataset.action-steps", "8", "--policy.action-steps", "2"]
IMAGES = ("--dataset.cameras", "behindGripper", "--batch-size", "64")


@dataclass(frozen=True)
class Args:
    """Train, evaluate and collect."""

    runs: Path = Path("runs/imitation")
    """Folder of the run folders; whose runs are elsewhere, but in the results file, are not made again."""
    out: Path = ROOT / "tests" / "results" / "imitation.json"
    """Results file."""
    jobs: int = 1
    """Runs at a time, each on one thread."""
    pusht: str = ""
    """npz file of Push-T demonstrations; empty leaves Push-T out."""
    only: str = ""
    """Part of the names of the runs to make."""


def wanted(args: Args) -> making.Runs:
    """Run name -> suite and command line; first the first seed of everything, last Push-T, which takes longest."""
    runs: making.Runs = {}
    for seed in range(3):
        for task, trainer in itertools.product((task for task in SEEDS if seed < SEEDS[task]), TRAINERS):
            line = ["--trainer", trainer, "--dataset.task", task, "--seed", str(seed)]
            runs[f"{task}-{trainer}-{seed}"] = ("metaworld-state", line)
        line = ["--trainer", "bc", "--dataset.task", "push-v3", "--seed", str(seed), *IMAGES]
        runs[f"push-v3-images-bc-{seed}"] = ("metaworld-images", line)
    for seed in range(3):
        for trainer in ("bc", "diffusion", "flow") if args.pusht else ():
            line = ["--trainer", trainer, "--dataset", "pusht", "--dataset.path", args.pusht, "--seed", str(seed)]
            own = REPLANS if trainer != "bc" else ("--loss", "l1")
            runs[f"pusht-{trainer}-{seed}"] = ("pusht", [*line, *PUSHT, *own])
    for seed, (decoder, own) in itertools.product(range(3), DECODERS.items()):
        line = ["--trainer", "bc", "--seed", str(seed), *CHUNKS, *own]
        task = ["--dataset.task", "peg-insert-side-v3"]
        runs[f"peg-insert-side-v3-{decoder}-{seed}"] = (f"metaworld-{decoder}", [*line, *task])
        if args.pusht:
            data = ["--dataset", "pusht", "--dataset.path", args.pusht, *PUSHT]
            runs[f"pusht-{decoder}-{seed}"] = (f"pusht-{decoder}", [*line, *data])
    return {name: (suite, [*line, *ONCE]) for name, (suite, line) in runs.items() if args.only in name}


def row(folder: Path, suite: str, line: list[str]) -> dict[str, Any]:
    """A row of the results, with the latency of an action that is planned, and what the environment tracks."""
    result = own_evaluations(folder)[-1]
    more = {key: round(result[key], 4) for key in result if key.startswith("coverage")}
    return making.row(folder, suite, line) | {"plan_ms": plan_ms(folder)} | more


def plan_ms(folder: Path, times: int = 20) -> float:
    """Median milliseconds that planning a chunk for one observation takes, on one thread."""
    torch.set_num_threads(1)
    policy, seconds = load_policy(folder), []
    observation = {
        key: np.zeros(policy.spec[key]["shape"][policy.obs_steps > 1 :], policy.spec[key]["dtype"])
        for key in policy.observation_keys
    }
    for _ in range(times):
        policy.reset()
        began = time.perf_counter()
        policy.act(observation)
        seconds.append(time.perf_counter() - began)
    return round(1000 * float(np.median(seconds)), 2)


if __name__ == "__main__":
    args = tyro.cli(Args)
    making.collect(wanted(args), args.runs, args.out, args.jobs, row)
