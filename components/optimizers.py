"""Optimizer factories; each optimizer carries its own learning-rate schedule in a step hook.

The schedule's state (its length, the updates so far) lives in the param groups, hence in `state_dict()`, so it resumes
with the optimizer. It counts real optimizer updates, whatever the number of processes or of accumulated micro-steps.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from .errors import UserError, require

Schedule = Literal["constant", "linear", "cosine", "onecycle"]


def learning_rate_factor(schedule: str, update: int, length: int | None, warmup: int) -> float:
    """Factor on the base learning rate at `update` (0 is the first); past `length` the last value holds.

    `constant`, `linear` and `cosine` (to 0; Loshchilov & Hutter, 2017) rise over `warmup` updates. `onecycle` (Smith &
    Topin, 2019) rises from 1/25 by half a cosine over 30 % of the length and falls to 1/250 000. Deviation from the
    paper: the momentum stays as it is.
    """
    update = update if length is None else min(update, length - 1)
    if update < warmup and schedule != "onecycle":
        return (update + 1) / warmup
    if schedule == "constant" or length is None:
        return 1.0
    if schedule == "linear":
        return 1 - (update - warmup) / max(length - warmup, 1)
    if schedule == "cosine":
        return 1 - _half_cosine((update - warmup) / max(length - warmup, 1))
    peak = max(round(0.3 * length) - 1, 1)
    if update <= peak:
        return 1 / 25 + (1 - 1 / 25) * _half_cosine(update / peak)
    return 1 - (1 - 1 / 250_000) * _half_cosine((update - peak) / max(length - 1 - peak, 1))


def _half_cosine(fraction: float) -> float:
    """From 0 to 1 along half a cosine."""
    return (1 - math.cos(math.pi * min(fraction, 1.0))) / 2


def carry_schedule(optimizer: torch.optim.Optimizer, schedule: str, length: int | None, warmup: int) -> None:
    """Set each group's `lr` before every step from its base and the group's own count of updates.

    Rates in tensors, which a CUDA graph reads, are left to whoever replays it, by the optimizer's `advance()`.
    """
    for group in optimizer.param_groups:
        group.update(initial_lr=group["lr"], schedule=schedule, schedule_steps=length, updates=0)

    def advance() -> None:
        for group in optimizer.param_groups:
            factor = learning_rate_factor(schedule, group["updates"], group["schedule_steps"], warmup)
            group["lr"] = group["initial_lr"] * factor
            group["updates"] += 1

    def set_learning_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            advance()

    optimizer.advance = advance  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(set_learning_rates)


def decay_groups(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decay touches weights with two or more dimensions; biases and normalisation scales keep their size."""
    params = list(params)
    if not weight_decay:
        return [{"params": params, "weight_decay": 0.0}]
    matrices = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What all optimizers share."""

    lr: float = 3e-4
    """Highest learning rate of the schedule."""
    lr_scale: tuple[str, ...] = ()
    """Factors on the learning rate of single models, such as encoder=0.1."""
    weight_decay: float = 0.0
    """Weight decay of weights with two or more dimensions."""

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        if not self.lr > 0 or self.weight_decay < 0:
            raise UserError(
                f"--optimizer.lr {self.lr} must be above 0, --optimizer.weight-decay {self.weight_decay} not below"
            )


@dataclass(frozen=True, kw_only=True)
class _Scheduled(_Options):
    """The optimizers whose learning rate follows a schedule."""

    schedule: Schedule = "constant"
    """Course of the learning rate."""
    warmup_steps: int = 0
    """Updates of linear warm-up, for the schedules constant, linear and cosine."""
    schedule_steps: int | None = None
    """Length of the schedule in updates; None takes the length of the run."""

    def scheduled(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Give the optimizer its schedule."""
        if self.warmup_steps < 0 or (self.schedule_steps is not None and self.schedule_steps < 1):
            raise UserError(
                f"--optimizer.warmup-steps {self.warmup_steps} must be 0 or more,"
                f" --optimizer.schedule-steps {self.schedule_steps} 1 or more"
            )
        if self.schedule != "constant" and self.schedule_steps is None:
            raise UserError(f"--optimizer.schedule {self.schedule} needs --optimizer.schedule-steps (updates)")
        carry_schedule(optimizer, self.schedule, self.schedule_steps, self.warmup_steps)
        return optimizer


@dataclass(frozen=True, kw_only=True)
class Adam(_Scheduled):
    """Adam (Kingma & Ba, 2015)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    fused: bool = True
    """One kernel for all parameters: about three times faster, other bits than the plain loop."""

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam over one model's trainable parameters; here weight decay adds to the gradient."""
        self.check()
        groups = decay_groups(params, self.weight_decay)
        return self.scheduled(torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused))


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    weight_decay: float = 1e-2
    """Decoupled weight decay of weights with two or more dimensions."""

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW over one model's trainable parameters."""
        self.check()
        groups = decay_groups(params, self.weight_decay)
        return self.scheduled(torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused))


@dataclass(frozen=True, kw_only=True)
class SGD(_Scheduled):
    """Stochastic gradient descent."""

    lr: float = 1e-2
    """Highest learning rate of the schedule."""
    momentum: float = 0.0
    """Momentum; 0 for none."""

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD over one model's trainable parameters."""
        self.check()
        groups = decay_groups(params, self.weight_decay)
        return self.scheduled(torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum))


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(_Options):
    """Schedule-free AdamW (Defazio et al., 2024): averaged weights in the place of a schedule."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Interpolation between iterate and average, and decay of the running mean of the gradient's square."""
    warmup_steps: int = 0
    """Updates of linear warm-up."""

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer in training mode; the script calls its `train()` and `eval()` around evaluations."""
        self.check()
        schedulefree = require("schedulefree", "schedulefree")
        groups = decay_groups(params, self.weight_decay)
        optimizer = schedulefree.AdamWScheduleFree(groups, lr=self.lr, betas=self.betas, warmup_steps=self.warmup_steps)
        optimizer.train()
        return optimizer


def update(optimizers: dict[str, torch.optim.Optimizer], loss: torch.Tensor, *models: str) -> None:
    """One step down the gradient of one loss, of every optimizer or of those of `models` that are not frozen."""
    chosen = [optimizers[name] for name in models if name in optimizers] if models else list(optimizers.values())
    if not chosen:
        return
    for optimizer in chosen:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in chosen:
        optimizer.step()


def for_model(factory: Any, model: str, known: Iterable[str]) -> Any:
    """The factory with the learning rate of one model (`--optimizer.lr-scale NAME=FACTOR`).

    Raises UserError: an entry names none of the `known` models, or its factor is no number above 0.
    """
    scale = 1.0
    for entry in factory.lr_scale if hasattr(factory, "lr_scale") else ():
        name, _, factor = entry.partition("=")
        if name not in set(known):
            raise UserError(f"--optimizer.lr-scale {entry}: no model {name!r}; known: {', '.join(known)}")
        try:
            value = float(factor)
        except ValueError:
            value = 0.0
        if not value > 0:
            raise UserError(f"--optimizer.lr-scale {entry}: expected NAME=FACTOR with a factor above 0")
        if name == model:
            scale = value
    return replace(factory, lr=factory.lr * scale) if scale != 1.0 else factory


def with_length(factory: Any, steps: int) -> Any:
    """The factory with the length of the run for its schedule, unless it has a length of its own."""
    return replace(factory, schedule_steps=steps) if getattr(factory, "schedule_steps", 0) is None else factory


def delay(optimizers: dict[str, torch.optim.Optimizer], name: str, every: int) -> None:
    """Fit the schedule of a model that moves with every so many-th update of the others to its own fewer updates."""
    for group in optimizers[name].param_groups if name in optimizers else ():
        if group.get("schedule_steps"):
            group["schedule_steps"] = max(group["schedule_steps"] // every, 1)


def kept_length(optimizers: dict[str, torch.optim.Optimizer], steps: int) -> str:
    """What to say when restored schedules are shorter than the run: their last value holds."""
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    lengths = [g["schedule_steps"] or steps for g in groups if g.get("schedule", "constant") != "constant"]
    longest = max(lengths, default=steps)  # that of a delayed model is shorter
    short = f"; the learning-rate schedule keeps its length of {longest} updates, its last value holds"
    return short if longest < steps else ""


def set_mode(optimizers: dict[str, torch.optim.Optimizer], training: bool) -> None:
    """Schedule-free optimizers swap the weights that are trained with the averaged ones that are used."""
    for optimizer in optimizers.values():
        switch = getattr(optimizer, "train" if training else "eval", None)
        if callable(switch):
            switch()
