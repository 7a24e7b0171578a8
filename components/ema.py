"""Exponential moving averages of the weights: they act, are evaluated and exported in the place of the last ones."""

import copy
from typing import Any

import torch
from torch import nn

from .errors import UserError


def decay_at(update: int, most: float) -> float:
    """Decay at `update` (1 is the first): 1 - update^(-3/4), at most `most` (Chi et al., 2023, released code)."""
    return min(most, 1 - update**-0.75)


def averages(models: nn.ModuleDict, optimizers: dict[str, Any], most: float) -> nn.ModuleDict:
    """Average the weights of every model that an optimizer trains; returns the averages, as `ema_<name>`.

    They follow the optimizer's real steps, whose number stands in its first param group, so that it is saved with it.
    The optimizer gets `eval()`, which puts the averages into the models, and `train()`, which puts the last weights
    back.

    Args:
        most: The largest decay; 0 for no averages.

    Raises:
        UserError: a decay outside [0, 1), or a schedule-free optimizer, which averages by itself.
    """
    if not 0 <= most < 1:
        raise UserError(f"--ema-decay {most} must be from 0 to below 1")
    if not most:
        return nn.ModuleDict()
    for name, optimizer in optimizers.items():
        if hasattr(optimizer, "eval"):
            kind = type(optimizer).__name__
            raise UserError(f"--ema-decay {most}: {kind} of model {name!r} averages by itself; use --ema-decay 0")
    return nn.ModuleDict({f"ema_{name}": _follow(models[name], opt, most) for name, opt in optimizers.items()})


def _follow(model: nn.Module, optimizer: Any, most: float) -> nn.Module:
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer.param_groups[0]["ema_updates"] = 0
    learning = [(a, p) for a, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    averaged, weights = (list(tensors) for tensors in zip(*learning, strict=True))
    mine, theirs = ([*module.parameters(), *module.buffers()] for module in (average, model))
    tensors: list[Any] = [*zip(mine, theirs, strict=True)]
    averaged_buffers, buffers = list(average.buffers()), list(model.buffers())
    averages_in = False

    @torch.no_grad()
    def step(optimizer: Any, args: Any, kwargs: Any) -> None:
        group = optimizer.param_groups[0]
        group["ema_updates"] += 1
        torch._foreach_lerp_(averaged, weights, 1 - decay_at(group["ema_updates"], most))
        if buffers:
            torch._foreach_copy_(averaged_buffers, buffers)

    def exchange(averages_wanted: bool) -> None:
        nonlocal averages_in
        if averages_in != averages_wanted:
            averages_in = averages_wanted
            for kept, tensor in tensors:
                kept.data, tensor.data = tensor.data, kept.data

    optimizer.register_step_post_hook(step)
    optimizer.eval, optimizer.train = lambda: exchange(True), lambda: exchange(False)
    return average
