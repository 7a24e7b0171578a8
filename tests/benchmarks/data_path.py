"""How fast pictures come: resident, from a store on disk, decoded lazily, and by a plain DataLoader; and who waits.

python tests/benchmarks/data_path.py
python tests/benchmarks/data_path.py --path DATASET --camera front --json rows.json     # a LeRobotDataset with videos

First, samples per second that training batches of 64 come at, by `Batches`, which the scripts use, and by a plain
torch DataLoader over the same dataset, which asks for items one by one. Then the script itself: `bc` from pictures, and
the share of a step that it waits for data (`data_s` against `data_s + step_s` in metrics.jsonl). All are measured in
turns, after a round that does not count, by the wall clock, since workers and the disk are what is measured.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import offline_trainer  # noqa: E402
from components.data.batches import Batches  # noqa: E402
from components.datasets.lerobot import LeRobotDataset  # noqa: E402
from components.run import provenance as surroundings  # noqa: E402
from components.run.curves import read_lines  # noqa: E402

BATCH = 64
WARM_UP = 5  # batches before each measurement
CACHES = ("memory", "disk", "none")


def endless(make: Callable[[], Any]) -> Generator[Any, None, None]:
    """Pass after pass."""
    while True:
        yield from make()


def rate(batches: Generator[Any, None, None], count: int) -> float:
    """Samples a second."""
    for _ in range(WARM_UP):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - began
    batches.close()  # its workers would go on
    return BATCH * count / seconds


def loaders(datasets: dict[str, Any], workers: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (how its batches are made, how many to measure)."""
    plain: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "drop_last": True}
    some = {**plain, "num_workers": workers, "persistent_workers": True}
    lazy = DataLoader(datasets["none"], **some)
    return {
        "resident": (lambda: Batches(datasets["memory"], BATCH, 0).stream(0), 2000),
        "disk cache": (lambda: Batches(datasets["disk"], BATCH, 0).stream(0), 2000),
        f"lazy video, {workers} workers": (lambda: Batches(datasets["none"], BATCH, 0, workers=workers).stream(0), 30),
        "plain DataLoader, resident": (lambda: endless(lambda: DataLoader(datasets["memory"], **plain)), 100),
        f"plain DataLoader, lazy video, {workers} workers": (lambda: endless(lambda: lazy), 15),
    }


def waiting(args: argparse.Namespace, cache: str, folder: str) -> tuple[float, float]:
    """Seconds of an update of the script that it waits for data, and the rest of it, without the first interval."""
    options = ["--trainer", "bc", "--model", "cnn", "--dataset", "lerobot", "--dataset.path", str(args.path)]
    options += ["--dataset.cameras", args.camera, "--dataset.cache", cache, "--dataset.cache-dir", folder]
    options += ["--batch-size", str(BATCH), "--steps", str(args.updates), "--log-every", "10", "--save-every", "0"]
    options += ["--dataset.validation", "0", "--workers", str(args.workers), "--run-dir", tempfile.mkdtemp(dir=folder)]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        offline_trainer.main(options)
    lines = read_lines(Path(options[-1]) / "metrics.jsonl")[1:]
    data, step = (statistics.mean(line[name] for line in lines) for name in ("data_s", "step_s"))
    return data, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=ROOT / "tests" / "fixtures" / "lerobot_v30_video")
    parser.add_argument("--camera", default="corner2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=60, help="of the script, each round")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"path": str(args.path), "cameras": (args.camera,), "validation": 0}
        built = {cache: LeRobotDataset(**options, cache=cache, cache_dir=folder).build() for cache in CACHES}
        datasets = {cache: part["dataset"] for cache, part in built.items()}
        key = f"observation.images.{args.camera}"
        size = " x ".join(map(str, datasets["memory"][0][key].shape))
        for number in range(args.rounds + 1):
            figures = {name: rate(make(), count) for name, (make, count) in loaders(datasets, args.workers).items()}
            for cache in CACHES:
                figures[f"bc, cache {cache}: data_s"], figures[f"bc, cache {cache}: step_s"] = waiting(
                    args, cache, folder
                )
            for name, value in figures.items():
                if number:  # the first round warms up
                    found.setdefault(name, []).append(value)
            print(f"round {number} of {args.rounds}", file=sys.stderr)
    for cache in CACHES:
        data, step = (found[f"bc, cache {cache}: {name}"] for name in ("data_s", "step_s"))
        found[f"bc, cache {cache}: share of waiting"] = [d / (d + s) for d, s in zip(data, step, strict=True)]
    plain = found[f"plain DataLoader, lazy video, {args.workers} workers"]
    rows = []
    for name, values in found.items():
        row: dict[str, Any] = {
            "figure": name,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
        scale, unit = (1, "samples/s") if "bc" not in name else (100, "%") if "share" in name else (1000, "ms")
        low, middle, high = (scale * row[key] for key in ("min", "median", "max"))
        line = f"{name:48s} {middle:10.4g} {unit} [{low:.4g}, {high:.4g}]"
        if "bc" not in name:
            row["ratio"] = statistics.median(value / base for value, base in zip(values, plain, strict=True))
            line += f"  {row['ratio']:.1f}x"
        print(line)
        rows.append(row | {"rounds": args.rounds, "batch_size": BATCH, "pictures": size, "workers": args.workers})
    if args.json:
        machine = surroundings.environment(())
        args.json.write_text(
            json.dumps([row | {"machine": machine["machine"], "torch": torch.__version__} for row in rows], indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
