"""What the benchmarks share: figures measured in turns, compared by the ratios of their rounds."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from components.run import provenance as surroundings

SWITCHES = ("highest", "medium")  # of torch.set_float32_matmul_precision

Figure = Callable[[], float]  # measures once; returns a rate per second


def measure(figures: dict[str, Figure], rounds: int) -> dict[str, list[float]]:
    """The rate of each figure in each round."""
    rates: dict[str, list[float]] = {name: [] for name in figures}
    for round_ in range(rounds + 1):
        for name in list(figures)[:: -1 if round_ % 2 else 1]:
            rate = figures[name]()
            if round_:
                rates[name].append(rate)
    return rates


def compare(rates: dict[str, list[float]], ours: str, peer: str, goal: float, overhead: bool = False) -> dict[str, Any]:
    """Print how many times as fast ours is, or what it adds to the peer's time in per cent; returns the row."""
    ratios = [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    if overhead:
        text = f"adds {100 / middle - 100:.1f} % [{100 / most - 100:.1f}..{100 / least - 100:.1f}]"
        aim = f"below {100 / goal - 100:.0f} %"
    else:
        text, aim = f"{middle:.2f}x [{least:.2f}..{most:.2f}]", f"{goal:g}x"
    name = f"{ours} / {peer}"
    print(f"{name:68} {text:26} goal {aim}: {'met' if middle >= goal else 'MISSED'}")
    speeds = {"ours_per_s": statistics.median(rates[ours]), "peer": peer, "peer_per_s": statistics.median(rates[peer])}
    return {"name": name, **speeds, "ratio": middle, "ratio_min": least, "ratio_max": most}


def describe_machine(clock: str) -> None:
    """Print what the figures belong to."""
    machine = surroundings.environment(())["machine"]
    print(f"torch {torch.__version__}, {machine['cpu']}, {torch.get_num_threads()} thread, {clock} clock")
    for switch in SWITCHES:
        error = matmul_error(switch)
        kind = "float32" if error < 1e-3 else "NOT float32"
        print(f"matmul precision {switch!r}: largest error {error:.1e}, {kind}")


def matmul_error(switch: str) -> float:
    """Largest error of a product of 256 x 256 normal matrices; float32 leaves some 1e-5, bfloat16 some 1e-1."""
    torch.set_float32_matmul_precision(switch)
    a, b = torch.randn(2, 256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    return float((a @ b - a.double() @ b.double()).abs().max())
