"""Whether the networks learn one batch by heart, under `--debug`: if not, data, loss and networks do not fit."""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .. import contracts
from ..data.random_state import preserved, seed_all
from ..errors import first_line
from ..intervals import number
from ..learning.held_out import total_loss
from .process import NO_MESSAGE

UPDATES, SECONDS, RATE = 200, 2.5, 3e-3
ZERO, DONE = 0.1, 0.01  # parts of the first loss: what counts as zero (of an L1 loss, too), and where it ends early
FALLS = 0.97  # part of the lowest loss in the first three quarters of the updates, below which it still falls
# Metric -> the model that is regressed on targets by it; the first that a trainer has. Others are trained as a whole.
REGRESSED = {"critic_loss": "critic", "value_loss": "value", "mse": "policy"}


def learn_by_heart(learner: Any, batch: dict[str, Any]) -> str:
    """Train on one batch with Adam, and take everything back; returns a line that says whether the loss falls to zero.

    The seed is the same in each update, so that flow matching and diffusion, too, have one target for each sample. Of
    an actor-critic it is the critic's loss: only the critic learns, hence its targets stay as they are.
    """
    began = time.perf_counter()
    try:
        with untouched(learner):
            step, what = stepper(learner, batch)
            losses = [step()]
            while len(losses) <= UPDATES and time.perf_counter() - began < SECONDS:
                losses.append(step())
                if not math.isfinite(losses[-1]) or losses[-1] < DONE * losses[0] and min(losses) >= 0:
                    break
    except Exception as error:
        return f"one batch: no verdict: {first_line(error, NO_MESSAGE)}"
    hurried = time.perf_counter() - began > SECONDS and len(losses) <= UPDATES
    end = f"{len(losses) - 1} updates" + f" ({SECONDS:g} s)" * hurried
    return f"one batch: {what} {number(losses[0])} -> {number(losses[-1])} in {end}: {verdict(losses, hurried)}"


def verdict(losses: list[float], hurried: bool) -> str:
    """Whether a loss fell to zero, as far as that shows in so many updates, or in the time."""
    first, last = losses[0], min(losses[-5:])
    early, late = losses[: 3 * len(losses) // 4] or losses, losses[3 * len(losses) // 4 :]
    if not math.isfinite(losses[-1]):
        return "NO, it is not finite"
    if min(first, last) < 0:
        how = "it falls below zero" if last < first else "NO, it is below zero, and does not fall"
        return f"{how}: right for a log-likelihood, wrong for an error"
    if last <= ZERO * first:
        return "yes, it falls to zero"
    left = f"{last / first:.0%} is left" if first else "it began at zero"
    falls = min(late) < FALLS * min(early)
    return f"{'not yet' if falls or hurried else 'NO'}, {left}{', and it still falls' * falls}"


def stepper(learner: Any, batch: dict[str, Any]) -> tuple[Callable[[], float], str]:
    """A function that makes an update and returns the loss before it, and the name of that loss.

    Raises:
        ValueError: there is no such loss.
    """
    method = contracts.losses_of(learner.trainer)
    if contracts.estimates(learner.trainer):
        raise ValueError("the losses keep the policy close to the one that collected it")
    groups = {name: [p for g in opt.param_groups for p in g["params"]] for name, opt in learner.optimizers.items()}
    if method is None:
        return by_train_step(learner, batch, groups)
    seed_all(0)
    result = method(batch)
    metrics = result[1] if isinstance(result, tuple) else {}
    if "conservative_loss" in metrics:
        raise ValueError("a conservative critic does not fit its targets")
    found = next(((m, model) for m, model in REGRESSED.items() if m in metrics and model in groups), None)
    parameters = groups[found[1]] if found else [p for group in groups.values() for p in group]
    optimizer = torch.optim.Adam(parameters, lr=RATE)

    def step() -> float:
        seed_all(0)
        optimizer.zero_grad()
        result = method(batch)
        loss = total_loss(result)
        loss.backward(inputs=parameters)
        optimizer.step()
        return float((torch.as_tensor(result[1][found[0]]) if found else loss).detach())

    return step, "loss" if not found else f"{found[0]} at fixed targets" if found[1] != "policy" else found[0]


def by_train_step(
    learner: Any, batch: dict[str, Any], groups: dict[str, list[nn.Parameter]]
) -> tuple[Callable[[], float], str]:
    """As `stepper`, for a trainer without `losses`: its whole `train_step`, whose optimizers are `untouched`."""
    keywords = {name: {**learner.where, "iterations": learner.updates}[name] for name in learner.keywords}
    for name, optimizer in learner.optimizers.items():
        fresh = torch.optim.Adam(groups[name], lr=RATE)
        optimizer.step, optimizer.zero_grad = fresh.step, fresh.zero_grad
    name = ""

    def step() -> float:
        nonlocal name
        seed_all(0)
        metrics = learner.trainer.train_step(batch, **keywords)
        name = name or next(iter(sorted((key for key in metrics if "loss" in key), key=len)), "")
        if not name:
            raise ValueError("the trainer has no losses(data), and returns no loss")
        return float(torch.as_tensor(metrics[name]).detach())

    return step, "loss"


@contextmanager
def untouched(learner: Any) -> Iterator[None]:
    """A context after which models, gradients, random state and the trainer's own numbers are as they were before.

    No debugger stops inside.
    """
    trainer, whole = learner.trainer, nn.ModuleList([learner.models, learner.loss])
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*whole.parameters(), *whole.buffers())]
    grads = [(p, p.grad) for p in whole.parameters()]
    pending = [(g, g.loss, g.loss_of_step) for g in learner.gradients.values()]
    methods = [(o, name, vars(o).get(name)) for o in learner.optimizers.values() for name in ("step", "zero_grad")]
    numbers = {name: value for name, value in vars(trainer).items() if isinstance(value, bool | int | float | str)}
    state = copy.deepcopy(contracts.state_of(trainer))
    hook, trace = sys.breakpointhook, sys.gettrace()
    for parameter, _ in grads:
        parameter.grad = None
    sys.breakpointhook = lambda *arguments, **keywords: None
    sys.settrace(None)
    with ExitStack() as stack:
        stack.enter_context(preserved())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        try:
            yield
        finally:
            sys.settrace(trace)
            sys.breakpointhook = hook
            with torch.no_grad():
                for tensor, before in tensors:
                    tensor.copy_(before)
            for parameter, grad in grads:
                parameter.grad = grad
            for gradients, loss, loss_of_step in pending:
                gradients.loss, gradients.loss_of_step = loss, loss_of_step
            for owner, name, method in methods:
                vars(owner).pop(name, None)
                if method is not None:
                    setattr(owner, name, method)
            vars(trainer).update(numbers)
            contracts.load_state(trainer, state)
