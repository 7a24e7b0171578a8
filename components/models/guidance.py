"""Classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598) of denoisers: a condition that may be left out.

A share of the samples is trained without the condition c. When acting, the velocity is extrapolated from the one
without it to the one with it, towards p(a) (p(a | c) / p(a))^w:

    v = v(x, t, none) + w (v(x, t, c) - v(x, t, none))          w = 1: the condition alone; w = 0: without it

The network is told the condition as one more observation, so that every denoiser can be told.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

KEY = "observation.condition"


def told(spec: dict[str, Any], width: int = 1) -> dict[str, Any]:
    """The spec of a network that observes a condition of so many numbers, too. Raises UserError: the data has one."""
    if KEY in spec:
        raise UserError(f"the data has a key {KEY!r}, which guidance needs for itself; give it another name")
    return spec | {KEY: {"shape": (width,), "dtype": "float32"}}


def tell(observed: dict[str, Any], condition: Tensor) -> dict[str, Any]:
    """Observations with a condition `[B, W]`."""
    return observed | {KEY: condition}


def hide(observed: dict[str, Any], known: Tensor) -> dict[str, Any]:
    """Observations as the condition themselves: all zeros where not `known` `[B]`, 1 or 0, and that as a mark."""
    parts = {key: value for key, value in observed.items() if key.startswith("observation.")}
    shown = {key: value * known.view(-1, *[1] * (value.ndim - 1)) for key, value in parts.items()}
    return tell(observed | shown, known[:, None])


class Guided(nn.Module):
    """A denoiser that acts by a condition, with guidance.

    Args:
        network: Trained with and without the condition.
        tell: (observations, whether each is to know the condition `[B]`, 1 or 0) -> the network's observations.
    """

    denoises = True

    def __init__(self, network: nn.Module, tell: Callable[[dict[str, Any], Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.network: Any = network
        self.tell, self.weight = tell, 1.0

    def condition(self, observed: dict[str, Any]) -> Any:
        """The network's condition; with guidance of twice as many rows, those that know it first."""
        seen = {key: value for key, value in observed.items() if key.startswith("observation.")}
        known = torch.ones_like(next(iter(seen.values())).flatten(1)[:, 0])
        if self.weight != 1:
            seen = {key: torch.cat([value, value]) for key, value in seen.items()}
            known = torch.cat([known, torch.zeros_like(known)])
        return self.network.condition(self.tell(seen, known))

    def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The guided velocity of `x` `[B, (Ta,) Da]` at the time `[1]` of all."""
        if self.weight == 1:
            return self.network(x, time, condition)
        with_it, without = self.network(torch.cat([x, x]), time, condition).unflatten(0, (2, -1)).unbind(0)
        return without + self.weight * (with_it - without)
