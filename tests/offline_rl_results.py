"""Make tests/results/offline_rl.json: every run of its table but those that are finished, so it can go on over days.

python tests/offline_rl_results.py --cube cube-single-play-v0.npz --maze pointmaze-medium-navigate-v0.npz --jobs 2

The files are OGBench's. Networks, batches and steps are smaller than the published ones, so that a run takes one
to twenty minutes of one CPU core; --full 1000000 takes the published ones, fewer steps the published networks.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path[:0] = [str(Path(__file__).parent)]

import making  # noqa: E402
from making import ROOT  # noqa: E402

SMALL, FULL = ("256", "256"), ("512", "512", "512", "512")
VALUES = {  # the models of each trainer besides its policy
    "bc": (),
    "iql": ("critic", "value"),
    "td3_bc": ("critic",),
    "rebrac": ("critic",),
    "fql": ("flow", "critic"),
    "recap": ("value",),
    "gcbc": (),
    "gciql": ("critic", "value"),
    "hiql": ("high", "value", "representation"),
}
CUBE = {  # the published choices of each task: FQL's table 6, and OGBench's list
    "bc": ("--loss", "mse", "--optimizer", "adam", "--optimizer.lr", "3e-4", "--model.activation", "gelu")
    + ("--normalise", "observation=none", "action=none"),
    "iql": ("--trainer.temperature", "1", "--trainer.expectile", "0.9"),
    "rebrac": ("--trainer.actor-penalty", "1", "--trainer.critic-penalty", "0", "--optimizer.lr", "3e-4")
    + ("--model.activation", "gelu", "--model.init", "glorot", "--model.final-scale", "0.1")
    + ("--model.critic.activation", "gelu", "--model.critic.init", "glorot"),
    "fql": ("--trainer.alpha", "300", "--compile"),
    "recap": ("--optimizer.schedule", "cosine", "--compile", "--eval-episodes", "100"),
}
MAZE = {"gcbc": (), "gciql": ("--trainer.alpha", "0.003"), "hiql": ()}
NOISY = {
    "bc": ("--loss", "mse", "--dataset.validation", "0"),
    "iql": (),
    "td3_bc": ("--model.critic.layer-norm",),  # without it Q falls below what the rewards allow
    "fql": ("--trainer.aggregate", "min", "--normalise", "observation=mean_std"),
    "recap": ("--normalise", "observation=mean_std", "--optimizer.schedule", "cosine", "--eval-episodes", "100"),
}
NOISE = ("--dataset.demos", "400", "--dataset.noise", "0.3", "--dataset.random", "0.5")
NOISE += ("--dataset.max-episode-steps", "80")  # the expert needs some 60; half of the data is random, half noisy
SEEDS = {"bc": 3, "iql": 3, "td3_bc": 3, "fql": 3, "recap": 3, "rebrac": 3, "gcbc": 3, "gciql": 3, "hiql": 3}


@dataclass(frozen=True)
class Args:
    """Train, evaluate and collect."""

    runs: Path = Path("runs/offline_rl")
    """Folder of the run folders; whose runs are elsewhere, but in the results file, are not made again."""
    out: Path = ROOT / "tests" / "results" / "offline_rl.json"
    """Results file."""
    jobs: int = 1
    """Runs at a time, each on one thread."""
    cube: str = ""
    """OGBench's cube-single-play-v0.npz; empty leaves the cube out."""
    maze: str = ""
    """OGBench's pointmaze-medium-navigate-v0.npz; empty leaves the maze out."""
    only: str = ""
    """Part of the names of the runs to make."""
    full: int = 0
    """Steps of runs with networks and batches as published (1M); 0 for small networks."""


def wanted(args: Args) -> making.Runs:
    """Run name -> suite and command line, the first seed of everything first."""
    runs: making.Runs = {}
    full = args.full
    for seed in range(3):
        for trainer, own in CUBE.items() if args.cube else ():
            line = ["--dataset", "ogbench", "--dataset.path", args.cube, "--dataset.task", "default", *own]
            line += [*quick(trainer, full), *sizes(trainer, full or 60_000, FULL if full else SMALL)]
            add(runs, "cube-single-play", trainer, seed, line)
        for trainer, own in NOISY.items() if not full else ():
            line = [*NOISE, *own, *quick(trainer, full), *sizes(trainer, 20_000, SMALL)]
            add(runs, "push-v3-noisy", trainer, seed, line)
        for trainer, own in MAZE.items() if args.maze else ():
            line = ["--dataset", "ogbench", "--dataset.path", args.maze, *own]
            line += sizes(trainer, full or 30_000, () if full else SMALL)
            add(runs, "pointmaze-medium-navigate", trainer, seed, line)
    suffix = f"-full-{full}" if full else ""
    return {name + suffix: (suite + suffix, line) for name, (suite, line) in runs.items() if args.only in name}


def add(runs: making.Runs, suite: str, trainer: str, seed: int, line: list[str]) -> None:
    """One run, if this trainer has so many seeds."""
    if seed < SEEDS[trainer]:
        runs[f"{suite}-{trainer}-{seed}"] = (suite, ["--trainer", trainer, "--seed", str(seed), *line])


def quick(trainer: str, full: int) -> tuple[str, ...]:
    """What short runs need whose policy climbs the critics: targets that follow sooner, a learning rate that falls."""
    short = ("--trainer.target-rate", "0.02", "--optimizer.schedule", "cosine")
    return short if full < 1_000_000 and trainer in ("td3_bc", "rebrac", "fql") else ()


def sizes(trainer: str, steps: int, widths: tuple[str, ...]) -> list[str]:
    """Options for the size of a run, its networks and their evaluation; without `widths` the trainer's defaults."""
    options = ["--steps", str(steps), "--eval-every", str(steps // 2)]
    if widths != SMALL and trainer in ("iql", "rebrac", "gciql", "hiql"):
        options.append("--compile")  # FQL is compiled at any size
    if widths:
        options += ["--batch-size", "256", "--model.hidden-dims", *widths]
        options += [word for name in VALUES[trainer] for word in (f"--model.{name}.hidden-dims", *widths)]
    return options


if __name__ == "__main__":
    args = tyro.cli(Args)
    making.collect(wanted(args), args.runs, args.out, args.jobs)
