"""Where the time of updates goes, under `--debug`: a trace for a viewer, and the longest parts of the loop."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import contracts
from ..acting.divided import Divided
from ..acting.policy import Policy
from ..data.augmentation import Augmentation
from ..data.normalisation import Normaliser
from ..envs.vector import Environments
from .checkpoint import Checkpoints

LONGEST = 5
OUTSIDE = "data, and the loop itself"  # what is in no other part


class Profile:
    """Records some updates: `begin` before the first, `end` after the last.

    Seconds are added up by parts, each without the parts inside it; the parts are in the trace, too. A GPU is waited
    for at both ends of a part, as its work would count for a later one.

    Args:
        learner: Whose trainer, losses and optimizers are parts.
        run: Whose log is one.
    """

    def __init__(self, learner: Any, run: Any) -> None:
        self.learner, self.run = learner, run
        self.seconds: dict[str, float] = {}
        self.inside: list[str] = []
        self.undo: list[Callable[[], Any]] = []
        on_gpu = learner.device.type == "cuda"
        self.wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the recorder's own messages
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        self.profiler = torch.profiler.profile(activities=kinds)

    def begin(self) -> None:
        """Begin to record. Autograd's anomaly detection, which slows backward passes, is off until the end."""
        trainer, methods = self.learner.trainer, contracts.promises_of(self.learner.trainer).compiles
        self.mark(trainer, "train_step", "rest of train_step")
        for name in {"losses", *methods}:
            if contracts.losses_of(trainer, name):
                self.mark(trainer, name, "losses, forward")
        for optimizer in self.learner.optimizers.values():
            self.mark(optimizer, "step", "optimizer step")
        self.mark(torch.autograd, "backward", "backward")
        self.mark(Normaliser, "__call__", "normalise")
        self.mark(Augmentation, "__call__", "augment")
        self.mark(Environments, "step", "environment step")
        self.mark(Policy, "act", "policy acts")
        self.mark(Divided, "evaluate", "evaluation")
        self.mark(Checkpoints, "save", "checkpoint")
        self.mark(self.run, "log", "log")
        was_on = torch.is_anomaly_enabled()
        torch.autograd.set_detect_anomaly(False)
        self.undo.append(lambda: torch.autograd.set_detect_anomaly(was_on))
        self.profiler.start()
        self.since = time.perf_counter()
        self.inside = [OUTSIDE]

    def mark(self, owner: Any, method: str, name: str) -> None:
        """Make a method of a class, module or object a part, until the end."""
        had, whole = method in vars(owner), getattr(owner, method)

        def marked(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return whole(*arguments, **keywords)

        setattr(owner, method, marked)
        self.undo.append(lambda: setattr(owner, method, whole) if had else delattr(owner, method))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context that is a part of the loop."""
        self.wait()
        self.switch()
        self.inside.append(name)
        try:
            with torch.profiler.record_function(name):
                yield
                self.wait()
        finally:
            self.switch()
            self.inside.pop()

    def switch(self) -> None:
        """Count the time since the last switch for the innermost part."""
        now, name = time.perf_counter(), self.inside[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def end(self, updates: str, count: int, path: Path) -> list[str]:
        """Write the trace; returns lines with the longest parts of these `count` updates."""
        self.switch()
        self.stop()
        try:
            self.profiler.export_chrome_trace(str(path))
            where = f"{path} shows them in https://ui.perfetto.dev"
        except (OSError, RuntimeError) as error:
            where = f"{path} cannot be written ({error})"
        whole = sum(self.seconds.values())
        longest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:LONGEST]
        lines = [f"  {s / whole:4.0%}  {1000 * s / count:7.2f} ms  {name}" for name, s in longest]
        return [f"updates {updates} took {1000 * whole / count:.2f} ms each, recorded; {where}", *lines]

    def stop(self) -> None:
        """Record no more, and take all marks back; a second time does nothing."""
        if self.undo:
            self.profiler.stop()
        while self.undo:
            self.undo.pop()()
