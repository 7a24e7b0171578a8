"""Multi-layer perceptron as the velocity field of a flow over actions, or as a policy of noise and observation."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .mlp import Init, concatenated, flat_sizes, hidden_layers, initialise


@dataclass(frozen=True, kw_only=True)
class VectorField:
    """Multi-layer perceptron over observation, noisy action and time (FQL, arXiv:2502.02538, appendix C)."""

    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "gelu"
    """Nonlinearity of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm after the nonlinearity of each hidden layer."""
    init: Init = "glorot"
    """Initial weights: torch's, or Glorot's as in JAX code, which are larger."""
    time: bool = True
    """Take the time as an input; without it, the network maps noise to an action in one step."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: no vector observation or action, bad options."""
        if any(dim < 1 for dim in self.hidden_dims):
            raise UserError(f"--model.hidden-dims {self.hidden_dims} must be positive")
        keys, observed, shape = flat_sizes(spec, "vector_field")
        inputs, outputs = observed + math.prod(shape) + self.time, math.prod(shape)
        layers, inputs = hidden_layers(inputs, self.hidden_dims, self.activation, self.layer_norm)
        net = nn.Sequential(*layers, nn.Linear(inputs, outputs))
        initialise(net, self.init)
        return FlatField(net, keys, self.time)


class FlatField(nn.Module):
    """`(x [B, (Ta,) Da], time [B] or [1], condition(observation))` -> a tensor of the shape of x."""

    denoises = True

    def __init__(self, net: nn.Sequential, keys: list[str], takes_time: bool) -> None:
        super().__init__()
        self.net, self.keys, self.takes_time = net, keys, takes_time

    def condition(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        """The observation as an input of the network, `[B, Ds]`."""
        return concatenated(observation, self.keys)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        parts = [condition, x.flatten(1)]
        if self.takes_time:
            parts.append(time.expand(x.shape[0])[:, None])  # len is not symbolic in an export
        return self.net(torch.cat(parts, dim=1)).view_as(x)
