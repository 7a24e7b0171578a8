"""Policies of offline RL: a multi-layer perceptron to an action, the mean of a Gaussian where a density is needed."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .mlp import ACTIVATIONS, Init, concatenated, flat_sizes, initialise

LOG_STD = (-5.0, 2.0)  # bounds of a learned deviation


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Multi-layer perceptron to single actions."""

    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm after the nonlinearity of each hidden layer."""
    squash: Literal["tanh", "none"] = "tanh"
    """What bounds the action (the Gaussian's mean): tanh to (-1, 1), or nothing."""
    std: Literal["fixed", "learned"] = "fixed"
    """Deviation of the Gaussian: 1, or one learned number for each dimension; an algorithm without density has none."""
    init: Init = "torch"
    """Initial weights: torch's, or Glorot's, which JAX code has and which are larger."""
    final_scale: float = 1.0
    """Factor on the initial weights and biases of the last layer; small ones begin with small actions."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for the keys and shapes of `spec`.

        Raises:
            UserError: no action or vector observation in the data, chunks of actions, or options that make no sense.
        """
        if any(dim < 1 for dim in self.hidden_dims) or not self.final_scale > 0:
            sizes = f"--model.hidden-dims {self.hidden_dims} must be positive"
            raise UserError(f"{sizes}, --model.final-scale {self.final_scale} above 0")
        keys, inputs, shape = flat_sizes(spec, "actor")
        if len(shape) != 1:
            raise UserError(f"this policy gives single actions; the data has {shape}: set --dataset.action-steps 1")
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers += [nn.Linear(inputs, hidden), ACTIVATIONS[self.activation]()]
            layers += [nn.LayerNorm(hidden)] if self.layer_norm else []
            inputs = hidden
        last = nn.Linear(inputs, shape[0])
        net = nn.Sequential(*layers, last, *([nn.Tanh()] if self.squash == "tanh" else []))
        initialise(net, self.init)
        with torch.no_grad():
            last.weight.mul_(self.final_scale)
            last.bias.mul_(self.final_scale)
        return GaussianActor(net, keys, shape[0] if self.std == "learned" else 0)


class GaussianActor(nn.Module):
    """Called, it gives the action `[B, Da]`, the mean; observations are a batch, or the one tensor itself.

    Args:
        net: From the concatenated observations to the mean.
        keys: The observations it sees.
        learned: How many deviations are learned; 0 fixes them at 1.
    """

    def __init__(self, net: nn.Sequential, keys: list[str], learned: int) -> None:
        super().__init__()
        self.net, self.keys = net, keys
        self.log_std = nn.Parameter(torch.zeros(learned)) if learned else None

    def forward(self, observation: dict[str, Tensor] | Tensor, prefix: str = "") -> Tensor:
        return self.net(concatenated(observation, self.keys, prefix))

    def deviation(self) -> Tensor | float:
        """Standard deviation `[Da]`, or 1."""
        return 1.0 if self.log_std is None else self.log_std.clamp(*LOG_STD).exp()

    def sample(self, observation: dict[str, Tensor] | Tensor, prefix: str = "") -> Tensor:
        """A draw `[B, Da]`, cut to [-1, 1]."""
        mean = self(observation, prefix)
        return (mean + self.deviation() * torch.randn_like(mean)).clamp(-1, 1)

    def log_prob(self, mean: Tensor, action: Tensor) -> Tensor:
        """Logarithm of the density `[B]` of `action` `[B, Da]` around `mean` `[B, Da]`, which this network gave."""
        log_density = -0.5 * ((action - mean) / self.deviation()).square() - 0.5 * math.log(2 * math.pi)
        if self.log_std is not None:
            log_density = log_density - self.log_std.clamp(*LOG_STD)
        return log_density.sum(1)
