"""Shortcut models (Frans et al., 2025, arXiv:2410.12557): a flow whose network is told the size of the step to take.

The network predicts the average velocity s(x_t, t, d) over a step from t to t + d. An infinitesimal step (d = 0) learns
the flow, and a step of size d learns what two steps of half its size do (eq. 5):

    s(x_t, t, 0) = a - x_0                                      on average, as in `flow.py`
    s(x_t, t, d) = (s(x_t, t, d/2) + s(x', t + d/2, d/2)) / 2,  x' = x_t + d/2 s(x_t, t, d/2)

So one or two steps arrive where many short ones do, also where several actions are right and the paths to them bend.

The step size is one more observation of the network, so that every denoiser can be told. Deviations from the paper:
targets are computed by the weights of the moment, not by averaged ones, and sizes begin with 1/8, not 1/128.
"""

from typing import Any

import torch
from torch import Tensor

KEY = "observation.step_size"
LEVELS = 4  # sizes 1, 1/2, 1/4 and 1/8, half of which counts as infinitesimal
EVERY = 4  # one sample in so many learns from two half steps, the others from the flow


def told(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec of a network that observes the step size, too."""
    return spec | {KEY: {"shape": (LEVELS,), "dtype": "float32"}}


def tell(observed: dict[str, Any], size: Tensor) -> dict[str, Any]:
    """Observations with the step sizes `[B]`: a one for each of 1, 1/2, ... that the size reaches."""
    known = 0.5 ** torch.arange(LEVELS, device=size.device)
    return observed | {KEY: (size[:, None] >= known).float()}  # [B, L]


def shortcut(
    network: Any, observed: dict[str, Any], noise: Tensor, action: Tensor, time: Tensor
) -> tuple[Tensor, Tensor]:
    """Predictions and targets of the loss, `[B, (Ta,) Da]` each.

    Args:
        observed: What the network observes.
        noise: x_0, of the actions' shape.
        action: a.
        time: Times in [0, 1], `[B]`; one sample in EVERY begins its step at the multiple of its size before that.
    """
    rows = torch.arange(len(time), device=time.device)
    size = 0.5 ** (torch.rand_like(time) * LEVELS).floor()
    size = torch.where(rows % EVERY == 0, size, 0.0)
    grid = (time / size).floor() * size  # not a number for the others
    time = torch.where(size > 0, torch.minimum(grid, 1 - size), time)
    target, x = action - noise, noise + over_actions(time, action) * (action - noise)
    with torch.no_grad():
        half, begin, x_few = size[::EVERY] / 2, time[::EVERY], x[::EVERY]
        condition = network.condition(tell({key: value[::EVERY] for key, value in observed.items()}, half))
        first = network(x_few, begin, condition)
        second = network(x_few + over_actions(half, action) * first, begin + half, condition)
        target[::EVERY] = (first + second) / 2
    return network(x, time, network.condition(tell(observed, size))), target


def over_actions(t: Tensor, action: Tensor) -> Tensor:
    """`[B]` as `[B, 1, ..]`, to scale actions."""
    return t.view(-1, *[1] * (action.ndim - 1))
