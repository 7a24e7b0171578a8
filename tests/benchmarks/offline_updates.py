"""How fast offline RL learns, against CORL's code and against the JAX originals of FQL and ReBRAC.

python tests/benchmarks/offline_updates.py --profile
python tests/benchmarks/offline_updates.py --corl ../CORL --compile --json rows.json    # of tinkoff-ai/CORL
python tests/benchmarks/offline_updates.py --fql ../fql --only fql rebrac               # of seohongpark/fql

The problem has CORL's published sizes: 1M transitions, observation 17, action 6, batch 256, networks of two or three
layers of 256. FQL and ReBRAC have those of FQL: observation 28, action 5, four layers of 512. An update is a batch
(sampled, and normalised where the trainer's defaults do so) and `train_step`, without the script's loop around it; of
the peer, `sample` and `train`, what it logs thrown away. Learning rates are 3e-4. Everything runs on one CPU thread of
one process. Figures of a trainer are measured in turns, in reverse order every second round, after a round that does
not count; a ratio is the median of the rounds' own ratios. The clock is the CPU time of the process, compiling left
out. "highest" and "medium" are the settings of `torch.set_float32_matmul_precision`, which may choose another GEMM
library; JAX has no such switch.

The floor is what the matrix products that an update cannot do without would take by themselves, at the rate of one
product of so many rows with a square matrix as wide as the hidden layers, which is measured in the same rounds.
`--profile` tells the share of the products in our eager update: torch.profiler's own CPU time.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import peers  # noqa: E402
from bc_updates import ACTION, BATCH, ROWS, STATE, random_episodes, repeated  # noqa: E402
from clock import learned  # noqa: E402
from measuring import SWITCHES, Figure, compare, describe_machine, measure  # noqa: E402
from peers import Peer, Step  # noqa: E402

from components import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY  # noqa: E402
from components.contracts import construct, options_of  # noqa: E402
from components.data import features  # noqa: E402
from components.data.batches import Batches  # noqa: E402
from components.data.normalisation import Normaliser  # noqa: E402
from components.datasets.episodes import build_episodes  # noqa: E402
from components.datasets.transitions import prepared  # noqa: E402
from components.optimizers import Adam  # noqa: E402
from components.speed.compile import compile_losses  # noqa: E402

SIZES = {"CORL": (17, 6), "JAX": (28, 5)}  # of observation and action
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PAIRS = (("medium", "medium"), ("medium", "highest"), ("highest", "highest"))  # switch of ours, and of the peer


@dataclass(frozen=True)
class Task:
    """A trainer to measure: the options of its models, which have the peer's sizes, and two goals each, one beyond."""

    models: dict[str, dict[str, Any]]
    same: tuple[float, float]  # both have the same switch
    alone: tuple[float, float]  # ours alone has it
    peer: str = "CORL"
    rows: int = BATCH  # of most matrix products
    slower: int = 1  # makes so many times fewer updates


TWO, THREE = {"hidden_dims": (256, 256)}, {"hidden_dims": (256, 256, 256)}
FOUR: dict[str, Any] = {"hidden_dims": (512, 512, 512, 512), "activation": "gelu"}
NORMED, LEARNED = FOUR | {"layer_norm": True}, {"std": "learned"}
AWAC: dict[str, Any] = {"policy": THREE | LEARNED | {"squash": "none"}, "critic": THREE}
CQL: dict[str, Any] = {"policy": THREE, "critic": THREE, "temperature": {}}
FQL: dict[str, Any] = {"policy": FOUR | {"time": False}, "flow": FOUR, "critic": NORMED}
TASKS = {
    "bc": Task({"policy": TWO}, (1.5, 2), (2, 3)),
    "td3_bc": Task({"policy": TWO, "critic": TWO}, (1.6, 2), (2.2, 3)),
    "iql": Task({"policy": TWO | LEARNED, "critic": TWO, "value": TWO}, (1.4, 2), (2, 3)),
    "awac": Task(AWAC, (1.4, 2), (1.8, 3)),
    "cql": Task(CQL, (3, 5), (3, 5), rows=31 * BATCH, slower=10),
    "fql": Task(FQL, (1, 2), (1, 2), peer="JAX", slower=10),
    "rebrac": Task({"policy": FOUR | {"final_scale": 1e-2}, "critic": NORMED}, (1, 2), (1, 2), peer="JAX", slower=10),
}


# ---- ours ----------------------------------------------------------------------------------------------------------


@lru_cache(1)
def random_data(state: int, action: int) -> dict[str, Any]:
    """What a dataset's factory returns: random episodes of 500 steps; every tenth terminates, the others are cut."""
    episodes = random_episodes(ROWS, state, action).episodes
    columns = episodes.observations | episodes.columns
    columns[f"next.{STATE}"] = columns[STATE].roll(-1, 0)
    columns["reward"] = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    columns["terminated"] = torch.zeros(ROWS, dtype=torch.bool)
    columns["terminated"][episodes.ends[::10] - 1] = True
    return build_episodes(columns, episodes.ends, "random", validation=0.0)


def our_trainer(name: str, task: Task, spec: dict[str, Any], compiled: bool) -> Any:
    """The trainer as the script builds it, without the script's hooks; `compiled` as by its --compile."""
    torch.manual_seed(0)
    cls: Any = TRAINER_REGISTRY[name]
    factories = {model: MODEL_BUILDER_REGISTRY[cls.needs[model]](**options) for model, options in task.models.items()}
    models = nn.ModuleDict({model: factory.build(spec) for model, factory in factories.items()})
    optimizers = {model: Adam(lr=3e-4).build(module.parameters()) for model, module in models.items()}
    trainer = construct(
        cls, models, optimizers, LOSS_BUILDER_REGISTRY["mse"]().build(), spec, options_of(cls), torch.device("cpu")
    )
    if compiled:
        compile_losses(trainer, torch.device("cpu"))
    return trainer


def our_steps(name: str, task: Task, compiled: bool) -> tuple[dict[str, Step], int]:
    """Our updates by name, the compiled one ready for every switch; and how many numbers they learn."""
    cls: Any = TRAINER_REGISTRY[name]
    data = random_data(*SIZES[task.peer])
    data = prepared(data, cls, "benchmark", options_of(cls))
    spec = features.describe(data["dataset"][0], data["norm_stats"])
    normaliser = Normaliser(spec, dict(mode.split("=") for mode in cls.defaults.get("offline.normalise", ())))
    spec = normaliser.with_ranges(spec)
    stream = Batches(data["dataset"], BATCH, seed=0).stream(0)

    def step_of(trainer: Any) -> Step:
        return lambda: trainer.train_step(normaliser(next(stream)))

    trainer = our_trainer(name, task, spec, compiled=False)
    steps = {name: step_of(trainer)}
    if compiled:
        steps[f"{name} compiled"] = step_of(our_trainer(name, task, spec, compiled=True))
        for switch in SWITCHES:
            torch.set_float32_matmul_precision(switch)
            began = time.perf_counter()
            for _ in range(2):  # the second one moves the policy, too
                steps[f"{name} compiled"]()
            seconds = time.perf_counter() - began
            print(f"{name}: compiled for {switch!r} in {seconds:.0f} s, or found in the cache of earlier runs")
    return steps, learned(trainer.models.values())


# ---- peers ---------------------------------------------------------------------------------------------------------


def as_arrays(peer: str) -> dict[str, Any]:
    """The random data as the peers take it."""
    episodes = random_data(*SIZES[peer])["dataset"].episodes
    columns, states, terminated = episodes.columns, episodes.observations[STATE], episodes.columns["terminated"].float()
    arrays = {"observations": states[episodes.at], "next_observations": states[episodes.after]}
    arrays |= {
        "actions": columns[ACTION],
        "rewards": columns["reward"],
        "terminals": terminated,
        "masks": 1 - terminated,
    }
    return {key: array.numpy() for key, array in arrays.items()}


def peer_step(name: str, task: Task, args: argparse.Namespace) -> Peer | None:
    """The peer's update and how many numbers it learns; None where there is no checkout, or JAX is not installed."""
    if task.peer == "CORL":
        return peers.corl(name, args.corl, as_arrays("CORL"), BATCH) if args.corl else None
    if not args.fql:
        return None
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    try:
        peer = peers.jax_agent(name, args.fql, as_arrays("JAX"), BATCH)
    except ImportError as error:
        print(f"{name}: its peer is left out ({error}); pip install {peers.JAX_PACKAGES}")
        return None

    def step() -> None:
        peer.step()
        assert peer.wait is not None
        peer.wait()

    return peer._replace(step=step)


# ---- matrix products -----------------------------------------------------------------------------------------------


def forward(widths: tuple[int, ...]) -> int:
    """Multiplications of a network of these widths for one row."""
    return sum(i * o for i, o in itertools.pairwise(widths))


def learning(widths: tuple[int, ...]) -> int:
    """Forward, backward to the weights, and backward to the inputs of all layers but the first."""
    return 3 * forward(widths) - widths[0] * widths[1]


def through(widths: tuple[int, ...], inputs: int) -> int:
    """Forward, and backward to so many of the inputs alone."""
    return 2 * forward(widths) - (widths[0] - inputs) * widths[1]


def needed(name: str, task: Task) -> int:
    """Floating-point operations of the matrix products that an update needs; delayed ones count by their share."""
    (state, action), hidden = SIZES[task.peer], task.models["policy"]["hidden_dims"]
    actor, gaussian, value = (state, *hidden, action), (state, *hidden, 2 * action), (state, *hidden, 1)
    critic, one_step = (state + action, *hidden, 1), (state + action, *hidden, action)
    flow = (state + action + 1, *hidden, action)
    targets, critics, followed = 2 * forward(critic), 2 * learning(critic), through(critic, action)
    multiplications = {
        "bc": learning(actor),
        "td3_bc": forward(actor) + targets + critics + (learning(actor) + followed) / 2,
        "iql": targets + critics + forward(value) + learning(value) + learning(actor),
        "awac": forward(actor) + targets + critics + 4 * forward(critic) + learning(actor),
        "cql": forward(gaussian) + targets + 31 * critics + learning(gaussian) + 2 * followed,
        "fql": forward(one_step) + targets + critics + 10 * forward(flow) + learning(flow),
        "rebrac": forward(actor) + targets + critics + (learning(actor) + 2 * followed) / 2,
    }
    multiplications["fql"] += learning(one_step) + 2 * followed
    return int(2 * BATCH * multiplications[name])


def product(rows: int, width: int) -> Step:
    """One matrix product."""
    a, b, out = torch.randn(rows, width), torch.randn(width, width), torch.empty(rows, width)
    return lambda: torch.mm(a, b, out=out)


def product_share(step: Step, times: int, switch: str) -> tuple[float, float]:
    """The share of matrix products in the CPU time of a step, and how many steps a second they alone would allow."""
    torch.set_float32_matmul_precision(switch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            with torch.profiler.record_function("step"):  # so that the time between the operations counts
                step()
    own = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}  # microseconds
    products = sum(own.get(key, 0.0) for key in PRODUCTS)
    return products / sum(own.values()), 1e6 * times / products


# ---- measuring -----------------------------------------------------------------------------------------------------


def run(name: str, task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print a trainer; returns its comparisons."""
    steps, ours = our_steps(name, task, args.compile)
    peer, times = peer_step(name, task, args), max(args.updates // task.slower, 2)
    if peer:
        assert peer.learned == ours, f"{name} learns {ours} numbers, its peer {peer.learned}"
        steps[f"{task.peer} {name}"] = peer.step
    flop, width = needed(name, task), task.models["policy"]["hidden_dims"][0]
    figures: dict[str, Figure] = {}
    for (label, step), switch in itertools.product(steps.items(), SWITCHES):
        figures[f"{label}, {switch}"] = repeated(step, times, switch)
    products: dict[str, Figure] = {}
    for rows, switch in itertools.product(sorted({BATCH, task.rows}), SWITCHES):
        calls = max(args.updates * BATCH // rows, 2)
        step = product(rows, width)
        products[f"product of {rows} rows, {switch}"] = repeated(step, calls, switch, 2 * rows * width**2)
    rates = measure(figures | products, args.rounds)
    print(f"\n{name}: {ours} numbers learned; an update needs {flop / 1e6:.0f} MFLOP of matrix products")
    print(f"updates/s: median [min..max] of {args.rounds} rounds of {times} updates")
    for figure in figures:
        print(f"{figure:42} {spread(rates[figure])}")
    for figure in products:
        print(f"{'floor: ' + figure:42} {spread([rate / flop for rate in rates[figure]])}", end="")
        print(f" at {statistics.median(rates[figure]) / 1e9:.0f} GFLOP/s")
    for switch in SWITCHES if args.profile else ():
        share, alone = product_share(steps[name], min(times, 100), switch)
        print(f"{name}, {switch}: {share:.0%} of the time in matrix products; they alone: {alone:.1f} updates/s")
    return comparisons(name, task, rates, [label for label in steps if label.startswith(name)]) if peer else []


def spread(rates: list[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(rates):10.1f} [{min(rates):.1f}..{max(rates):.1f}]"


def comparisons(name: str, task: Task, rates: dict[str, list[float]], ours: list[str]) -> list[dict[str, Any]]:
    """Print how many times as fast as the peer ours are; returns the rows."""
    rows = []
    for label, (mine, theirs) in itertools.product(ours, PAIRS):
        goal, beyond = task.same if mine == theirs else task.alone
        rows.append(compare(rates, f"{label}, {mine}", f"{task.peer} {name}, {theirs}", goal))
        print(f"  beyond: {beyond:g}x: {'met' if rows[-1]['ratio'] >= beyond else 'missed'}")
    return rows


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put the comparisons into the file, in the place of those of the same names."""
    before = json.loads(path.read_text()) if path.exists() else []
    merged = {row["name"]: row for row in [*before, *rows]}
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corl", type=Path, help="checkout of tinkoff-ai/CORL to compare with")
    parser.add_argument("--fql", type=Path, help=f"checkout of seohongpark/fql; pip install {peers.JAX_PACKAGES}")
    parser.add_argument("--only", nargs="+", choices=TASKS, help="by default those whose peer is given, or all")
    parser.add_argument("--json", type=Path, help="file for the comparisons; those not made now stay in it")
    parser.add_argument("--updates", type=int, default=1000, help="of a figure in each round; the slow ones: a tenth")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also compiled losses; compiling takes minutes")
    parser.add_argument("--profile", action="store_true", help="also the share of the matrix products")
    args = parser.parse_args()
    torch.set_num_threads(1)

    describe_machine("cpu")
    print(f"load average {os.getloadavg()[0]:.1f}")
    given = {"CORL": args.corl, "JAX": args.fql}
    wanted = [name for name, task in TASKS.items() if given[task.peer] or not any(given.values())]
    for name in args.only or wanted:
        rows = run(name, TASKS[name], args)
        if args.json:
            merge(args.json, rows)


if __name__ == "__main__":
    main()
