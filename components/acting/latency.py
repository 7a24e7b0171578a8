"""How long a policy takes from an observation to a plan, and what that means at a control rate."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

WARM_UP, MOST_CALLS, SECONDS = 10, 500, 4.0  # calls of each; seconds for each one's measured calls
RATES = (10, 20, 30, 50)  # Hz, where that of the data is unknown


class Latency(NamedTuple):
    """Milliseconds of one call."""

    median: float
    p95: float
    calls: int


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, Latency]:
    """Latency of each call. They take turns, so that whatever else the machine does slows all of them alike."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + SECONDS * len(calls)
    while len(next(iter(taken.values()))) < MOST_CALLS and time.monotonic() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(1000 * (time.perf_counter() - start))
    return {
        name: Latency(float(np.percentile(ms, 50)), float(np.percentile(ms, 95)), len(ms)) for name, ms in taken.items()
    }


def delay(ms: float, rate: float) -> int:
    """Steps from an observation until its plan is there, at `rate` Hz."""
    return math.ceil(ms * rate / 1000)


def meaning(latency: Latency, rate: float | None, action_steps: int) -> str:
    """What a latency means to whoever runs the policy, in a line for each rate; by the 95th percentile."""
    lines = []
    for hertz in (rate,) if rate else RATES:
        steps = latency.p95 * hertz / 1000
        line = f"at {hertz:g} Hz a plan takes {steps:.2g} steps: --policy.delay {delay(latency.p95, hertz)}"
        if steps > action_steps:
            line += f"; longer than the {action_steps} that are executed of it, so the robot would wait"
        lines.append(line)
    return "\n".join(lines)
