"""How fast behaviour cloning learns: the bare step, the script's loop around it, CORL's, and the data path.

python tests/benchmarks/bc_updates.py
python tests/benchmarks/bc_updates.py --corl ../CORL --json rows.json        # ../CORL: a checkout of tinkoff-ai/CORL
python tests/benchmarks/bc_updates.py --corl ../CORL --clock wall --compile

The problem has the size of CORL's published behaviour cloning: 1M transitions, observation 17, action 6, batch 256, two
hidden layers of 256, MSE. Everything runs on one CPU thread of one process. Figures are measured in turns, in reverse
order every second round, after a round that does not count; a ratio is the median of the rounds' own ratios. The clock
is the CPU time of the process, which leaves out waiting for the disk and for other programs; `--clock wall` counts it.
"highest" and "medium" are the settings of `torch.set_float32_matmul_precision`, which may choose another GEMM library.
"""

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from measuring import SWITCHES, Figure, compare, describe_machine, measure  # noqa: E402
from peers import corl  # noqa: E402

import offline_trainer  # noqa: E402
from components import REGISTRIES, losses, optimizers  # noqa: E402
from components.data import features, normalisation  # noqa: E402
from components.data.batches import Batches, batch_indices  # noqa: E402
from components.datasets.episodes import EpisodeDataset, from_columns  # noqa: E402
from components.models.mlp import MLP  # noqa: E402
from components.speed.compile import compile_losses  # noqa: E402
from components.trainers.bc import BC  # noqa: E402

STATE, ACTION, BATCH, ROWS = "observation.state", "action", 256, 1_000_000
WARM_UP = 50  # updates before each measurement
SCRIPT = "--trainer clocked_bc --dataset random --model mlp --model.hidden-dims 256 256 --loss mse --optimizer adam"
SCRIPT += f" --optimizer.lr 1e-3 --batch-size {BATCH} --eval-episodes 0 --log-every 50 --save-every 0"

WIDTHS = [17, 256, 256, 6]
LAYERS = [(torch.randn(BATCH, i), torch.randn(o, i), torch.randn(BATCH, o)) for i, o in itertools.pairwise(WIDTHS)]

clock = time.process_time


def random_episodes(rows: int, state: int, action: int, **window: int) -> EpisodeDataset:
    """Normally distributed data in episodes of 500 steps."""
    generator = torch.Generator().manual_seed(0)
    columns = {STATE: torch.randn(rows, state, generator=generator)}
    columns[ACTION] = torch.randn(rows, action, generator=generator).clamp(-1, 1)
    return EpisodeDataset(from_columns(columns, torch.arange(500, rows + 1, 500), "random"), None, **window)


def make_trainer(spec: dict[str, Any]) -> BC:
    """The trainer as the script builds it, without the script's hooks."""
    torch.manual_seed(0)
    models = nn.ModuleDict({"policy": MLP(hidden_dims=(256, 256)).build(spec)})
    optimizer = optimizers.Adam(lr=1e-3).build(models["policy"].parameters())
    return BC(models, {"policy": optimizer}, losses.MSE().build())


def repeated(step: Callable[[], Any], times: int, switch: str = "highest", samples: int = 1) -> Figure:
    """The rate of a step that counts as so many samples."""

    def rate() -> float:
        torch.set_float32_matmul_precision(switch)
        for _ in range(min(WARM_UP, times)):
            step()
        began = clock()
        for _ in range(times):
            step()
        return samples * times / (clock() - began)

    return rate


class ClockedBC(BC):
    """Behaviour cloning that notes when call WARM_UP and call `last` begin: whole turns of the loop lie between."""

    last = 0
    noted: list[float] = []

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        self.calls = getattr(self, "calls", -1) + 1
        if self.calls in (WARM_UP, self.last):
            self.noted.append(clock())
        return super().train_step(data)


def matrix_products() -> None:
    """The eight matrix products of an update and nothing else: a floor for all code over the same GEMM."""
    for layer, (x, weight, gradient) in enumerate(LAYERS):
        x @ weight.T, gradient.T @ x
        if layer:
            gradient @ weight


def script(dataset: EpisodeDataset, stats: dict[str, Any], folder: str, updates: int, switch: str) -> Figure:
    """The rate of the loop of `offline_trainer.py` itself, with its logging and without its set-up."""

    @dataclass(frozen=True)
    class RandomData:
        def build(self, **keywords: Any) -> dict[str, Any]:
            return {"dataset": dataset, "norm_stats": stats}

    REGISTRIES["dataset"]["random"], REGISTRIES["trainer"]["clocked_bc"] = RandomData, ClockedBC
    options = [*SCRIPT.split(), "--steps", str(WARM_UP + updates + 1), "--run-dir"]

    def rate() -> float:
        torch.set_float32_matmul_precision(switch)
        ClockedBC.last, ClockedBC.noted = WARM_UP + updates, []
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            offline_trainer.main([*options, tempfile.mkdtemp(dir=folder)])
        assert torch.get_float32_matmul_precision() == switch, "the script sets a precision of its own"
        first, last = ClockedBC.noted
        return updates / (last - first)

    return rate


def corl_step(checkout: Path, dataset: EpisodeDataset) -> Callable[[], Any]:
    """One update of CORL's own classes."""
    states, actions = dataset.episodes.observations[STATE].numpy(), dataset.episodes.columns[ACTION].numpy()
    data = {"observations": states, "actions": actions, "next_observations": np.roll(states, -1, 0)}
    data |= {"rewards": np.zeros(len(states), np.float32), "terminals": np.zeros(len(states), np.float32)}
    return corl("bc", checkout, data, BATCH).step


def bc_figures(args: argparse.Namespace, folder: str) -> dict[str, Figure]:
    """Updates per second of all that can be compared, under both switches."""
    dataset = random_episodes(ROWS, 17, 6)
    columns = dataset.episodes.observations | dataset.episodes.columns
    stats = {key: normalisation.statistics(column) for key, column in columns.items()}
    spec = features.describe(dataset[0], stats)
    normaliser = normalisation.Normaliser(spec)
    indices = itertools.cycle([batch_indices(ROWS, BATCH, 0, step) for step in range(ROWS // BATCH)])
    prepared = itertools.cycle([normaliser(dataset.get_batch(next(indices))) for _ in range(64)])
    stream = Batches(dataset, BATCH, seed=0).stream(0)
    trainer = make_trainer(spec)
    steps: dict[str, Callable[[], Any]] = {
        "matrix products alone": matrix_products,
        "train_step": lambda: trainer.train_step(next(prepared)),
        "get_batch + train_step": lambda: trainer.train_step(dataset.get_batch(next(indices))),
        "batch + normalise + train_step": lambda: trainer.train_step(normaliser(next(stream))),
    }
    if args.compile:
        compiled = make_trainer(spec)
        compile_losses(compiled, torch.device("cpu"))
        steps["the same, compiled"] = lambda: compiled.train_step(normaliser(next(stream)))
    if args.corl:
        steps["CORL"] = corl_step(args.corl, dataset)
    figures: dict[str, Figure] = {}
    for switch in SWITCHES:
        figures |= {f"{name}, {switch}": repeated(step, args.updates, switch) for name, step in steps.items()}
        figures[f"script's loop, {switch}"] = script(dataset, stats, folder, args.updates, switch)
    return figures


def data_figures(updates: int) -> dict[str, Figure]:
    """Samples per second of windows of states: the resident path and torch's loader over the same items."""
    dataset = random_episodes(25_000, 39, 4, obs_steps=2, action_steps=16)
    stream = Batches(dataset, BATCH, seed=0).stream(0)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    return {
        "windows by get_batch": repeated(lambda: next(stream), updates, samples=BATCH),
        "windows by DataLoader": repeated(lambda: next(endless), max(updates // 50, 2), samples=BATCH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corl", type=Path, help="checkout of tinkoff-ai/CORL to compare with")
    parser.add_argument("--json", type=Path, help="file for the comparisons")
    parser.add_argument("--updates", type=int, default=1000, help="updates of each figure in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="also measure compiled losses; compiling takes a minute")
    args = parser.parse_args()
    global clock
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(1)

    describe_machine(args.clock)
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(bc_figures(args, folder), args.rounds)
    rates |= measure(data_figures(args.updates), args.rounds)
    print(f"\nper second: median [min..max] of {args.rounds} rounds of {args.updates} updates (DataLoader: a fiftieth)")
    for name, values in rates.items():
        print(f"{name:42} {statistics.median(values):10.1f} [{min(values):.1f}..{max(values):.1f}]")

    print(f"\nours / peer: median [min..max] of the ratios of {args.rounds} rounds")
    rows = []
    for switch in SWITCHES:
        for peer in ("train_step", "get_batch + train_step"):
            rows.append(compare(rates, f"script's loop, {switch}", f"{peer}, {switch}", 1 / 1.1, overhead=True))
    bodies = ["batch + normalise + train_step", *(["the same, compiled"] if args.compile else []), "script's loop"]
    for body in bodies if args.corl else []:
        for ours, theirs in (("highest", "highest"), ("medium", "medium"), ("medium", "highest")):
            goal = 1.5 if ours == theirs else 2.0
            rows.append(compare(rates, f"{body}, {ours}", f"CORL, {theirs}", goal))
    rows.append(compare(rates, "windows by get_batch", "windows by DataLoader", 50.0))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
