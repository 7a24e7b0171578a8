"""Optimizer factories; each optimizer has its learning-rate schedule, and its averaged weights, in step hooks.

The schedule's state (its length, the updates so far) lives in the param groups, hence in `state_dict()`, so it resumes
with the optimizer. It counts real optimizer updates, whatever the number of processes or of accumulated micro-steps.
"""

import copy
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
    paper: the momentum is constant.
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
    """Set each group's `lr` before every step from its base rate and the group's count of updates.

    Rates in tensors, which a CUDA graph reads, are set by the code that replays it, with the optimizer's `advance()`.
    """
    for group in optimizer.param_groups:
        group.update(initial_lr=group["lr"], schedule=schedule, schedule_steps=length, updates=0)

    def rate_at(group: dict[str, Any], update: int) -> float:
        return group["initial_lr"] * learning_rate_factor(schedule, update, group["schedule_steps"], warmup)

    def advance() -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(group, group["updates"])
            group["updates"] += 1

    def set_learning_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            advance()

    optimizer.advance, optimizer.rate_at = advance, rate_at  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(set_learning_rates)


def decay_groups(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights with two or more dimensions decay, biases and normalisation scales do not."""
    params = list(params)
    if not weight_decay:
        return [{"params": params, "weight_decay": 0.0}]
    matrices = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of all optimizers."""

    lr: float = 3e-4
    """Highest learning rate of the schedule."""
    lr_scale: tuple[str, ...] = ()
    """Factors on the learning rate of single models, such as encoder=0.1."""
    weight_decay: float = 0.0
    """Weight decay of weights with two or more dimensions."""

    def check(self) -> None:
        """Refuse values out of range. Raises UserError."""
        if not self.lr > 0 or self.weight_decay < 0:
            raise UserError(
                f"--optimizer.lr {self.lr} must be above 0, --optimizer.weight-decay {self.weight_decay} not below"
            )


@dataclass(frozen=True, kw_only=True)
class _Scheduled(_Options):
    """The optimizers whose learning rate follows a schedule."""

    schedule: Schedule = "constant"
    """Schedule of the learning rate."""
    warmup_steps: int = 0
    """Updates of linear warm-up, for the schedules constant, linear and cosine."""
    schedule_steps: int | None = None
    """Length of the schedule in updates; None takes the length of the run."""

    def scheduled(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Attach the schedule to the optimizer; returns it. Raises UserError: lengths out of range, or none."""
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
    """One kernel for all parameters: about three times faster, with other last bits than the plain loop."""

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam over one model's trainable parameters; weight decay is added to the gradient."""
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
    """Schedule-free AdamW (Defazio et al., 2024): averaged weights in place of a schedule."""

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
    """One gradient step on a loss, by every optimizer or by those of `models` that are not frozen."""
    chosen = [optimizers[name] for name in models if name in optimizers] if models else list(optimizers.values())
    if not chosen:
        return
    for optimizer in chosen:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in chosen:
        optimizer.step()


def trainable(models: nn.ModuleDict, frozen: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each model that is trained. Raises UserError: there are none, as all are frozen."""
    found = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    found = {name: parameters for name, parameters in found.items() if parameters}
    if not found:
        raise UserError(f"nothing to train: --freeze {' '.join(frozen)} leaves no trainable parameters")
    return found


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
    """The factory with the length of the run as that of its schedule, unless that is set."""
    return replace(factory, schedule_steps=steps) if getattr(factory, "schedule_steps", 0) is None else factory


def delay(optimizers: dict[str, torch.optim.Optimizer], name: str, every: int) -> None:
    """Shorten the schedule of a model that is updated only at every `every`-th update of the others."""
    for group in optimizers[name].param_groups if name in optimizers else ():
        if group.get("schedule_steps"):
            group["schedule_steps"] = max(group["schedule_steps"] // every, 1)


def longest_schedule(optimizers: dict[str, Any]) -> tuple[int, float] | None:
    """(updates, last learning rate) of the longest schedule; None without any. A delayed model's is shorter."""
    scheduled = [
        (group["schedule_steps"], optimizer.rate_at(group, group["schedule_steps"]))
        for optimizer in optimizers.values()
        for group in optimizer.param_groups
        if hasattr(optimizer, "rate_at") and group.get("schedule", "constant") != "constant" and group["schedule_steps"]
    ]
    return max(scheduled, key=lambda one: one[0], default=None)


def kept_length(optimizers: dict[str, torch.optim.Optimizer], updates: int) -> str:
    """A note if restored schedules are shorter than the run, with the rate that holds and the remedy; else "".

    Args:
        updates: Of the whole run.
    """
    length, rate = longest_schedule(optimizers) or (updates, 0.0)
    if length >= updates:
        return ""
    return (
        f"; the learning-rate schedule keeps its length of {length} updates, its last value holds: {rate:.1e}; for a"
        " new schedule start a new run with --init-from"
    )


def set_mode(optimizers: dict[str, torch.optim.Optimizer], training: bool) -> None:
    """Switch optimizers with averaged weights: the models hold the averages, or with `training` the trained weights."""
    for optimizer in optimizers.values():
        switch = getattr(optimizer, "train" if training else "eval", None)
        if callable(switch):
            switch()


# ---- exponential moving averages of the weights ----
# Evaluation, the saved policy and its export use them in place of the last weights.


def decay_at(update: int, most: float) -> float:
    """Decay at `update` (1 is the first): 1 - update^(-3/4), at most `most` (Chi et al., 2023, released code)."""
    return min(most, 1 - update**-0.75)


def averages(models: nn.ModuleDict, optimizers: dict[str, Any], most: float) -> nn.ModuleDict:
    """Average the weights of every model that an optimizer trains; returns the averages, as `ema_<name>`.

    They are updated after each real step of the optimizer; the number of updates is in its first param group, hence in
    its state. The optimizer gets `eval()`, which puts the averages into the models, and `train()`, which restores the
    last weights.

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
    of_average, of_model = ([*module.parameters(), *module.buffers()] for module in (average, model))
    tensors: list[Any] = [*zip(of_average, of_model, strict=True)]
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
