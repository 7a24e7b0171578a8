"""--compile: how losses are compiled, what that gains, and from which step on a run is faster for it."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..acting.evaluation import total_loss
from ..data.random_state import preserved
from ..errors import UserError

TIMES = 5


def methods_of(trainer: Any) -> tuple[str, ...]:
    """The methods of a trainer that are compiled."""
    return tuple(getattr(trainer, "compiles", ("losses",)))


def compile_losses(trainer: Any, device: torch.device) -> None:
    """Have the losses of a trainer compiled when they are first called.

    Raises:
        UserError: it has no `losses(data)`.
    """
    if not callable(getattr(trainer, "losses", None)):
        raise UserError("--compile needs a trainer with losses(data)")
    import torch._functorch.config as functorch  # which take their time to import
    import torch._inductor.config as inductor

    from .partition import AsInEager

    inductor.fallback_random = True  # what is drawn is what would be drawn without --compile
    functorch.cse = False  # it takes two draws of `randn_like` of one tensor for the same
    inductor.custom_partitioner_fn = AsInEager() if device.type == "cpu" else None
    for name in methods_of(trainer):
        setattr(trainer, name, torch.compile(getattr(trainer, name)))


def break_even(trainer: Any, batch: dict[str, Any], models: nn.Module) -> str:
    """Compile the losses of a trainer now, and say from which step on that pays.

    Leaves random generators, gradients and buffers as they were.

    Args:
        trainer: After `compile_losses`; its class has the methods as they were.
        batch: A batch as `train_step` gets it.
        models: All models of the trainer.
    """
    buffers = [(buffer, buffer.clone()) for buffer in models.buffers()]
    eager = compiled = compiling = 0.0  # seconds
    with preserved():
        for name in methods_of(trainer):
            eager += median(partial(getattr(type(trainer), name), trainer), batch)
            began = time.perf_counter()
            gradient(getattr(trainer, name), batch)
            compiling += time.perf_counter() - began
            compiled += median(getattr(trainer, name), batch)
    for parameter in models.parameters():
        parameter.grad = None
    for buffer, before in buffers:
        buffer.copy_(before)
    pays = f"pays from step {compiling / (eager - compiled):.0f} on" if compiled < eager else "gains nothing here"
    times = f"{1000 * compiled:.2f} ms a step instead of {1000 * eager:.2f}"
    return f"--compile: {compiling:.0f} s of compiling; losses and gradients take {times}: it {pays}"


def median(method: Callable[..., Any], batch: dict[str, Any]) -> float:
    """Median seconds of a loss and its gradient, after a first time that does not count."""
    seconds = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        gradient(method, batch)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[TIMES // 2]


def gradient(method: Callable[..., Any], batch: dict[str, Any]) -> None:
    """A loss and its gradient, both finished."""
    loss = total_loss(method(batch))
    loss.backward()
    if loss.device.type == "cuda":
        torch.cuda.synchronize()
