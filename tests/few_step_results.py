"""Make tests/results/few_step.json: success and milliseconds of a flow and of a shortcut model by calls of the network.

python tests/few_step_results.py --runs runs/few --jobs 2
python tests/few_step_results.py --toy                     # the rows of two modes alone, in five minutes
python tests/few_step_results.py --toy --only bc           # those of bc: a mean, experts, a mixture, a codebook

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
from torch import nn

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from components import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, load_policy  # noqa: E402
from components.run import provenance  # noqa: E402
from components.run.curves import read_lines  # noqa: E402
from components.trainers.bc import BC  # noqa: E402
from components.trainers.flow import Flow  # noqa: E402
from making import ROOT  # noqa: E402

TASK = "peg-insert-side-v3"
CALLS = {"flow": (10, 2, 1), "shortcut": (2, 1)}
SPEC = {"observation.state": {"shape": (1,), "dtype": "float32"}, "action": {"shape": (2,), "dtype": "float32"}}
# Of two modes alone: loss and network of bc. The mean is neither mode, and no mixture of experts changes that.
CLONES: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("mse", {}),
    "bc-experts": ("mse", {"experts": 4}),
    "bc-mixture": ("nll", {"head": "mixture"}),
    "bc-codebook": ("l1", {"head": "codebook"}),
    "bc-codebook-drawn": ("l1", {"head": "codebook"}),
}
TOY_STEPS, SPREAD, NEAR, DRAWN = 5000, 0.05, 0.2, 4000


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
    toy: bool = False
    """Make the rows of two modes instead."""
    only: str = ""
    """Part of the names of these rows."""


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


# ---- two modes -----------------------------------------------------------------------------------------------------


def modes(state: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """The right action `[B, 2]` of a state `[B, 1]` on one side, -1 or 1: both are right."""
    return torch.cat([side, side * state], 1)


def toy_trainer(objective: str) -> tuple[Any, torch.optim.Optimizer]:
    """A trainer of two modes, and its optimizer: of an objective of `flow`, or of a way of `bc` to decode an action."""
    if objective in CLONES:
        loss, options = CLONES[objective]
        network = MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64, 64), **options).build(SPEC)
        optimizer = torch.optim.Adam(network.parameters())
        made = LOSS_BUILDER_REGISTRY[loss]().build()
        return BC(nn.ModuleDict({"policy": network}), {"policy": optimizer}, made), optimizer
    config = Flow.Config(objective=objective)  # type: ignore[arg-type]
    factory = MODEL_BUILDER_REGISTRY["vector_field"](hidden_dims=(64, 64, 64), init="torch")
    network = factory.build(Flow.model_spec("policy", SPEC, config))
    optimizer = torch.optim.Adam(network.parameters())
    return Flow(nn.ModuleDict({"policy": network}), {"policy": optimizer}, nn.MSELoss(), SPEC, config), optimizer


def toy_rows(objective: str, seed: int) -> list[dict[str, Any]]:
    """The share of actions that are within NEAR of a mode, for each number of calls; data deviates by SPREAD."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    began = time.process_time()
    trainer, optimizer = toy_trainer(objective)
    for step in range(TOY_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / TOY_STEPS)
        state, side = torch.rand(256, 1) * 2 - 1, torch.randint(2, (256, 1)) * 2.0 - 1
        action = modes(state, side) + SPREAD * torch.randn(256, 2)
        trainer.train_step({"observation.state": state, "action": action})
    seconds, policy = time.process_time() - began, trainer.policy()
    batch = {"observation.state": torch.rand(DRAWN, 1) * 2 - 1, "noise": torch.randn(DRAWN, 2)}
    if objective.endswith("drawn"):
        policy.sampler = "sample"
    made = []
    for calls in CALLS.get(objective, (1,)):
        policy.sampling_steps = calls  # type: ignore[assignment]
        with torch.no_grad():
            action = policy(batch)
        away = (action - modes(batch["observation.state"], action[:, :1].sign())).norm(dim=1)
        row = {"run": f"toy-{objective}-{seed}-{calls}", "suite": f"{calls} call{'s' * (calls > 1)}"}
        row |= {"task": "two modes", "trainer": objective, "seed": seed, "steps": TOY_STEPS, "metric": "near_a_mode"}
        row |= {"value": float((away < NEAR).float().mean()), "episodes": DRAWN, "train_seconds": round(seconds, 1)}
        commit = provenance.environment(())["git_commit"]
        made.append(row | {"command": "tests/few_step_results.py --toy", "commit": commit})
    return made


if __name__ == "__main__":
    args = tyro.cli(Args)
    ways = [way for way in (*CALLS, *CLONES) if args.only in way] if args.toy else []
    for objective, seed in [(one, seed) for one in ways for seed in range(args.seeds)]:
        for row in toy_rows(objective, seed):
            making.keep(args.out, row)
            print(f"{row['run']}: {row['value']:.3f}", flush=True)
    if args.toy:
        sys.exit()
    folder = args.runs.resolve()
    lines = {f"{objective}-{seed}": (objective, seed) for seed in range(args.seeds) for objective in CALLS}
    with ThreadPoolExecutor(args.jobs) as pool:
        finished = list(pool.map(lambda name: making.make(folder / name, line_of(*lines[name])), lines))
    for (name, (objective, seed)), done in zip(lines.items(), finished, strict=True):
        if done:
            for row in rows(folder / name, folder / f"flow-{seed}", objective, seed):
                making.keep(args.out, row)
