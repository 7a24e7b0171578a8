"""Whole updates as CUDA graphs: what a `train_step` launches is recorded once, and then replayed with every batch.

An update of small networks is hundreds of kernels of a few microseconds each, which Python launches more slowly than
the GPU runs them; a graph launches all of them at once. It repeats what was recorded, so what changes from step to step
has to be in tensors: the batch, and the learning rates (`optimizers.carry_schedule`).
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..learning.metrics import Metrics

WARM_UP = 3  # calls of each kind that run as they are: optimizers and libraries first make what they keep


class Update:
    """One call of `train_step`, and the collection of its metrics."""

    note = ""  # for the screen

    def __init__(self, trainer: Any, metrics: Metrics) -> None:
        self.trainer, self.metrics = trainer, metrics

    def __call__(self, batch: dict[str, Any], **where: Any) -> None:
        self.metrics.add(self.trainer.train_step(batch, **where), "train/")


def choose(
    trainer: Any, metrics: Metrics, optimizers: dict[str, Any], device: torch.device, wanted: bool, alone: bool
) -> "Update":
    """A trainer's updates: replayed where that is wanted and works, which its `note` tells, or as they are.

    Args:
        alone: One process, one micro-step and no averaged weights, which need Python between the kernels.
    """
    update = Update(trainer, metrics)
    if not wanted or device.type != "cuda":
        return update
    fused = all(group.get("fused") and hasattr(o, "advance") for o in optimizers.values() for group in o.param_groups)
    if not alone:
        update.note = "no CUDA graphs: several processes, micro-steps or averaged weights"
    elif not hasattr(trainer, "cycle"):
        update.note = f"no CUDA graphs: {type(trainer).__name__} does not say when its steps repeat (cycle)"
    elif not fused:
        update.note = "no CUDA graphs: they need --optimizer adam or adamw, fused"
    else:
        update = CapturedUpdate(trainer, metrics, optimizers)
    return update


@dataclass
class Recording:
    """A graph, where it reads a batch and leaves its metrics, and the optimizers that step in it."""

    graph: Any
    batch: dict[str, Tensor]
    names: list[str]
    values: Tensor
    optimizers: list[Any]


class CapturedUpdate(Update):
    """An `Update` whose kernels are replayed, for a trainer with `cycle`: after so many calls its Python repeats.

    The trainer may count its calls in `updates`. A batch of other keys or shapes runs as it is.
    """

    def __init__(self, trainer: Any, metrics: Metrics, optimizers: dict[str, Any]) -> None:
        super().__init__(trainer, metrics)
        self.note = f"CUDA graphs: whole updates are replayed after {WARM_UP * trainer.cycle} steps"
        self.optimizers, self.calls, self.stream = list(optimizers.values()), 0, torch.cuda.Stream()
        self.recordings: dict[int, Recording] = {}  # which call of a cycle -> what it launches
        self.rates = {o: [Rate(group["lr"]) for group in o.param_groups] for o in self.optimizers}

    def __call__(self, batch: dict[str, Any], **where: Any) -> None:
        turn = self.calls % self.trainer.cycle
        self.calls += 1
        recording = self.recordings.get(turn)
        unlike = bool(where) or (recording is not None and layout(recording.batch) != layout(batch))
        if unlike or self.calls <= WARM_UP * self.trainer.cycle:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                super().__call__(batch, **where)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if recording is None:
            recording = self.recordings[turn] = self.record(batch)
        for optimizer in recording.optimizers:
            optimizer.advance()
            for rate, group in zip(self.rates[optimizer], optimizer.param_groups, strict=True):
                rate.set(group["lr"])
        torch._foreach_copy_(list(recording.batch.values()), list(batch.values()))
        recording.graph.replay()
        if hasattr(self.trainer, "updates"):
            self.trainer.updates += 1
        for name, value in zip(recording.names, recording.values.clone().unbind(), strict=True):
            self.metrics.values.setdefault(name, []).append(value)

    def record(self, batch: dict[str, Any]) -> Recording:
        """What this call of a cycle launches; nothing is computed."""
        static = {key: like(value).copy_(value) for key, value in batch.items()}
        before, self.metrics.values = self.metrics.values, {}
        updates = getattr(self.trainer, "updates", None)
        graph, stepped = torch.cuda.CUDAGraph(), []
        watches = [o.register_step_pre_hook(lambda optimizer, *_: stepped.append(optimizer)) for o in self.optimizers]
        with self.rates_in_tensors(), torch.cuda.graph(graph, stream=self.stream):
            super().__call__(static)
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
        """The optimizers read their learning rates from the device, as long as this lasts."""
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
    """Room for a tensor, laid out like it in memory, or else what is compiled would be compiled again."""
    plain = value.is_contiguous() or 0 in value.stride()
    return torch.empty_like(value) if plain else value.new_empty_strided(value.shape, value.stride())


def layout(batch: dict[str, Any]) -> list[Any]:
    """Keys, shapes and kinds of a batch."""
    return [(key, getattr(value, "shape", None), getattr(value, "dtype", None)) for key, value in batch.items()]
