"""A clock inside a training process, which another process reads: it times turns of the loop, and counts what they do.

As a plugin it puts itself into our scripts: `--plugins clock`, with this folder on PYTHONPATH, makes every trainer tick
at each call of `train_step` (and at each replay of a CUDA graph, which stands for one), or, with TICKS=env, the
environment ClockedHalfCheetah-v0 at each of its steps, which works for scripts of others, too. Between two ticks lies
one whole turn of the loop: the batch, the update, its hooks, the log. A process that waits for a command stands still
inside a tick, so that several of them can be measured in turns.

The process that measures listens at the socket CLOCK; the first WARM_UP ticks do not count.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from multiprocessing.connection import Client
from typing import Any

import torch

SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
LAUNCHING = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


class Clock:
    """Answers the commands ("time", n) and ("count", n) about the next n ticks.

    Args:
        about: What the measuring process is told of this one when it is ready.
    """

    def __init__(self, **about: Any) -> None:
        self.about, self.inside = about, 0.0  # seconds that an environment has taken
        self.wait: Callable[[], Any] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self.memory: Callable[[], float] = torch_memory
        self.pipe: Any = Client(os.environ["CLOCK"])
        self.pipe.send(os.environ["CLOCK_NAME"])
        self.program = self._run()

    def tick(self) -> None:
        """One turn of the loop ends here, and the next one begins."""
        next(self.program)

    def _run(self) -> Iterator[None]:
        for _ in range(int(os.environ["WARM_UP"])):
            yield
        self.wait()
        self.pipe.send({"ready": True, **self.about})
        while True:
            command, ticks = self.pipe.recv()
            answer = yield from (self._time if command == "time" else self._count)(ticks)
            self.pipe.send(answer)

    def _time(self, ticks: int) -> Any:
        """Seconds of so many turns, all that they started finished; the environment's part; most memory in MB."""
        self.wait()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.inside, began = 0.0, time.perf_counter()
        for _ in range(ticks):
            yield
        self.wait()
        return {"seconds": time.perf_counter() - began, "inside": self.inside, "memory": self.memory()}

    def _count(self, ticks: int) -> Any:
        """What a turn does: milliseconds until all of it is issued to an idle device, and what a profiler sees."""
        host = []
        for _ in range(ticks):
            self.wait()
            began = time.perf_counter()
            yield
            host.append(1000 * (time.perf_counter() - began))
        self.wait()
        cuda = torch.cuda.is_available()
        kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind]) as profiler:
            for _ in range(ticks):
                yield
            self.wait()
        return {"host_ms": statistics.fmean(host)} | counted(profiler.events(), ticks)


def counted(events: Any, ticks: int) -> dict[str, float]:
    """Of a turn: kernels, their milliseconds, copies, launches, waits for the device; without one, operations."""
    found = dict.fromkeys(("kernels", "device_ms", "copies", "launches", "synchronisations", "operations"), 0.0)
    for event in events:
        name = event.name
        if event.device_type == torch.autograd.DeviceType.CUDA:
            copies = name.startswith(("Memcpy", "Memset"))
            found["copies" if copies else "kernels"] += 1
            found["device_ms"] += event.device_time_total / 1000
        elif name in SYNCHRONISING:
            found["synchronisations"] += 1
        elif name in LAUNCHING:
            found["launches"] += 1
        elif name.startswith("aten::") and not any(child.name.startswith("aten::") for child in event.cpu_children):
            found["operations"] += 1
    return {name: number / ticks for name, number in found.items()}


def torch_memory() -> float:
    """The most MB that tensors have held: on the GPU, or, where there is none, all of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def learned(networks: Iterable[torch.nn.Module]) -> int:
    """How many numbers networks learn; what is frozen, and single numbers, such as temperatures, are left out."""
    return sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad and p.ndim)


# ---- the plugin ----------------------------------------------------------------------------------------------------


def ticking(trainer: type) -> type:
    """The trainer, whose first call of `train_step` starts a clock that the others move on."""
    step: Any = trainer.train_step  # type: ignore[attr-defined]
    clocks: list[Clock] = []

    @wraps(step)
    def train_step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not clocks:
            clocks.append(Clock(learned=learned(getattr(self, "models", {}).values())))
            replayed(clocks[0])
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            clocks[0].tick()
        return step(self, *arguments, **keywords)

    return type(trainer.__name__, (trainer,), {"train_step": train_step, "__doc__": trainer.__doc__})


def replayed(clock: Clock) -> None:
    """Tick at each replay of a CUDA graph."""
    replay = torch.cuda.CUDAGraph.replay

    def tick_and_replay(self: Any) -> None:
        clock.tick()
        replay(self)

    torch.cuda.CUDAGraph.replay = tick_and_replay  # type: ignore[method-assign]


def register_environment() -> None:
    """ClockedHalfCheetah-v0: HalfCheetah-v5 without an end, so that no reset falls into what is measured."""
    import gymnasium
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

    clocks: list[Clock] = []

    class ClockedHalfCheetah(HalfCheetahEnv):
        def step(self, action: Any) -> Any:
            if not clocks:
                clocks.append(Clock())
            clocks[0].tick()
            began = time.perf_counter()
            result = super().step(action)
            clocks[0].inside += time.perf_counter() - began
            return result

    gymnasium.register("ClockedHalfCheetah-v0", ClockedHalfCheetah)


if "CLOCK" in os.environ:
    if os.environ.get("TICKS") == "env":
        register_environment()
    elif os.environ.get("TICKS") == "updates":
        from components import TRAINER_REGISTRY

        TRAINER_REGISTRY.update({name: ticking(trainer) for name, trainer in TRAINER_REGISTRY.items()})
