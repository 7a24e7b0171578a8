"""Whole updates as CUDA graphs: the kernels of a `train_step` are recorded once, and replayed with every batch.

An update of small networks is hundreds of kernels of a few microseconds each, which Python launches more slowly than
the GPU runs them; a graph launches all of them at once. It repeats what was recorded, so values that change from step
to step must be in tensors: the batch, and the learning rates (`optimizers.carry_schedule`).
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..contracts import promises_of, updates_of

WARM_UP = 3  # eager calls of each kind, in which optimizers and libraries allocate their state


def choose(learner: Any) -> tuple[Callable[[dict[str, Any]], None], str]:
    """The update to call, as CUDA graphs where that works, else the learner's; and a line about it for the screen."""
    trainer, opts = learner.trainer, learner.optimizers
    if learner.device.type != "cuda":
        return learner.update, ""
    fused = all(group.get("fused") and hasattr(o, "advance") for o in opts.values() for group in o.param_groups)
    if parallel.world_size() > 1 or learner.micro_steps > 1 or learner.averaged:
        return learner.update, "no CUDA graphs: several processes, micro-steps or averaged weights"  # Python in between
    if not (repeats_after := promises_of(trainer).repeats_after):
        name = type(trainer).__name__
        return learner.update, f"no CUDA graphs: {name} does not say when its steps repeat (promises, repeats_after)"
    if not fused:
        return learner.update, "no CUDA graphs: they need --optimizer adam or adamw, fused"
    return Captured(learner), f"CUDA graphs: whole updates are replayed after {WARM_UP * repeats_after} steps"


@dataclass
class Recording:
    """A graph, the tensors of its batch and of its metrics, and the optimizers that step in it."""

    graph: Any
    batch: dict[str, Tensor]
    names: list[str]
    values: Tensor
    optimizers: list[Any]


class Captured:
    """A learner's `update` whose kernels are replayed, for a trainer that promises `repeats_after`.

    A batch of other keys, shapes or dtypes runs eagerly.
    """

    def __init__(self, learner: Any) -> None:
        self.learner, self.trainer, self.metrics = learner, learner.trainer, learner.metrics
        self.cycle = promises_of(learner.trainer).repeats_after or 1
        self.optimizers, self.calls, self.stream = list(learner.optimizers.values()), 0, torch.cuda.Stream()
        self.recordings: dict[int, Recording] = {}  # index of the call in a cycle -> its recording
        self.rates = {o: [Rate(group["lr"]) for group in o.param_groups] for o in self.optimizers}

    def __call__(self, batch: dict[str, Any]) -> None:
        turn = self.calls % self.cycle
        self.calls += 1
        recording = self.recordings.get(turn)
        unlike = self.learner.keywords or (recording is not None and layout(recording.batch) != layout(batch))
        if unlike or self.calls <= WARM_UP * self.cycle:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.learner.call(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.replay(turn, recording, batch)
        self.learner.count(batch)

    def replay(self, turn: int, recording: Recording | None, batch: dict[str, Any]) -> None:
        """Replay the recording of this call on a batch; make the recording first if there is none."""
        if recording is None:
            recording = self.recordings[turn] = self.record(batch)
        for optimizer in recording.optimizers:
            optimizer.advance()
            for rate, group in zip(self.rates[optimizer], optimizer.param_groups, strict=True):
                rate.set(group["lr"])
        torch._foreach_copy_(list(recording.batch.values()), list(batch.values()))
        recording.graph.replay()
        if (updates := updates_of(self.trainer)) is not None:
            self.trainer.updates = updates + 1
        for name, value in zip(recording.names, recording.values.clone().unbind(), strict=True):
            self.metrics.values.setdefault(name, []).append(value)

    def record(self, batch: dict[str, Any]) -> Recording:
        """Record the kernels of this call of a cycle, without running them."""
        static = {key: like(value).copy_(value) for key, value in batch.items()}
        before, self.metrics.values = self.metrics.values, {}
        updates = updates_of(self.trainer)
        graph, stepped = torch.cuda.CUDAGraph(), []
        watches = [o.register_step_pre_hook(lambda optimizer, *_: stepped.append(optimizer)) for o in self.optimizers]
        with self.rates_in_tensors(), torch.cuda.graph(graph, stream=self.stream):
            self.learner.call(static)
            named = [(name, value) for name, values in self.metrics.values.items() for value in values]
            values = torch.stack([value.float() for _, value in named])
        for watch in watches:
            watch.remove()
        self.metrics.values = before
        if updates is not None:
            self.trainer.updates = updates
        return Recording(graph, static, [name for name, _ in named], values, stepped)

    @contextmanager
    def rates_in_tensors(self) -> Any:
        """Let the optimizers read their learning rates from the device, within this context."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = [rate for optimizer in self.optimizers for rate in self.rates[optimizer]]
        before = [{"lr": group["lr"], "capturable": group["capturable"]} for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group.update(lr=rate.tensor, capturable=True)
        yield
        for group, options in zip(groups, before, strict=True):
            group.update(options)


class Rate:
    """A learning rate on the device, written when it changes."""

    def __init__(self, value: float) -> None:
        self.value, self.tensor = value, torch.tensor(value, device="cuda")

    def set(self, value: float) -> None:
        if value != self.value:
            self.value = value
            self.tensor.fill_(value)


def like(value: Tensor) -> Tensor:
    """An empty tensor of the same memory layout; with another one, compiled losses would be compiled again."""
    plain = value.is_contiguous() or 0 in value.stride()
    return torch.empty_like(value) if plain else value.new_empty_strided(value.shape, value.stride())


def layout(batch: dict[str, Any]) -> list[Any]:
    """Keys, shapes and dtypes of a batch."""
    return [(key, getattr(value, "shape", None), getattr(value, "dtype", None)) for key, value in batch.items()]
