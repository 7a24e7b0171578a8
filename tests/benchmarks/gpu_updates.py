"""How fast offline RL learns on a GPU: as it is, compiled, and with whole updates replayed as CUDA graphs.

python tests/benchmarks/gpu_updates.py --json tests/results/gpu_updates.json

The data is random: 1M transitions, observation 28, action 5 (17 and 6 for IQL and TD3+BC), batch 256, networks of the
published sizes, which are our defaults but for ReBRAC (FQL's four layers of 512). An update is what the script's loop
does for one: draw a batch, normalise it, `train_step` with the hooks of the optimizers, and collect the metrics. The
clock is the wall's, the device is waited for at the end of each round. Figures are measured in turns, after a round
that does not count; a ratio is the median of the rounds' own ratios.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from measuring import Figure, compare, measure  # noqa: E402
from offline_updates import SIZES, random_data, spread  # noqa: E402

import offline_trainer  # noqa: E402
from components import TRAINER_REGISTRY, captured, features  # noqa: E402
from components.datasets.transitions import prepared  # noqa: E402
from components.metrics import Metrics  # noqa: E402
from components.normalisation import Normaliser  # noqa: E402
from components.sampling import Batches, to_device  # noqa: E402

BATCH, GOAL = 256, 5.0  # times the eager updates
FOUR = ("512", "512", "512", "512")
REBRAC = ("--batch-size", "256", "--model.hidden-dims", *FOUR, "--model.critic.hidden-dims", *FOUR)
TASKS = {"iql": ("CORL", ()), "td3_bc": ("CORL", ()), "rebrac": ("JAX", REBRAC), "fql": ("JAX", ()), "qc": ("JAX", ())}


def updates(name: str, compile_: bool, graphs: bool) -> tuple[Callable[[], None], Metrics]:
    """One update of the script's learner, made ready, compiled and recorded; and where its metrics gather."""
    sizes, options = TASKS[name]
    args, _, _ = offline_trainer.parse_args(["--trainer", name, *options, *(["--compile"] if compile_ else [])])
    accelerator, cls = Accelerator(), TRAINER_REGISTRY[name]
    data = prepared(random_data(*SIZES[sizes]), cls, "benchmark", args.trainer_options)
    spec = features.describe(data["dataset"][0], data["norm_stats"])
    normaliser = Normaliser(spec, dict(mode.split("=") for mode in cls.defaults["normalise"])).to(accelerator.device)
    data["dataset"].to(accelerator.device)
    learner = offline_trainer.build_learner(args, accelerator, normaliser.with_ranges(spec), 1_000_000)
    update = captured.choose(learner.trainer, learner.metrics, learner.opts, accelerator.device, graphs, alone=True)
    learner = learner._replace(update=update)
    stream = Batches(data["dataset"], BATCH, seed=0).stream(0)

    def step() -> None:
        learner.update(normaliser(to_device(next(stream), accelerator.device)))

    if compile_:
        offline_trainer.tell_break_even(learner, normaliser(next(stream)), SimpleNamespace(say=print))  # type: ignore[arg-type]
    for _ in range(20):
        step()
    return step, learner.metrics


def repeated(step: Callable[[], None], metrics: Metrics, times: int) -> Figure:
    """Updates a second, all of them finished."""

    def once() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            step()
        torch.cuda.synchronize()
        rate = times / (time.perf_counter() - began)
        metrics.values = {}
        return rate

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--json", type=Path, help="file for the comparisons")
    parser.add_argument("--updates", type=int, default=300, help="of a figure in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    card = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {card}")

    rows: list[dict[str, Any]] = []
    for name in args.only:
        kinds = {"eager": (False, False), "CUDA graphs": (False, True)}
        if args.compile:
            kinds |= {"compiled": (True, False), "compiled, CUDA graphs": (True, True)}
        figures = {f"{name} {kind}": repeated(*updates(name, *how), args.updates) for kind, how in kinds.items()}
        rates = measure(figures, args.rounds)
        for figure, found in rates.items():
            print(f"{figure:32} {spread(found)} updates/s")
        eager = f"{name} eager"
        rows += [compare(rates, figure, eager, GOAL) | {"device": card} for figure in rates if figure != eager]
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
