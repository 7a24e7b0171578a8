"""Q(s, .) of discrete actions."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..data.features import vector_observations
from ..errors import UserError
from .mlp import ACTIVATIONS, concatenated


@dataclass(frozen=True, kw_only=True)
class DiscreteQ:
    """Multi-layer perceptron to the values of all actions."""

    hidden_dims: tuple[int, ...] = (120, 84)
    """Widths of the hidden layers; no layer after the encoder nature_cnn is the original deep Q-network."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    dueling: bool = False
    """Sum a value of the state and advantages of the actions (Wang et al., 2016, eq. 9)."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: actions that are not discrete, no observation, bad options."""
        if "classes" not in spec.get("action", ()):
            raise UserError(
                "this network evaluates discrete actions, and these are vectors; use --trainer ppo, sac or td3"
            )
        if any(dim < 1 for dim in self.hidden_dims):
            raise UserError(f"--model.hidden-dims {self.hidden_dims} must be positive")
        keys = vector_observations(spec)
        inputs = sum(math.prod(spec[key]["shape"]) for key in keys)
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers += [nn.Linear(inputs, hidden), ACTIVATIONS[self.activation]()]
            inputs = hidden
        actions = spec["action"]["classes"]
        value = nn.Linear(inputs, 1) if self.dueling else None
        return DiscreteValues(nn.Sequential(*layers), nn.Linear(inputs, actions), value, keys)


class DiscreteValues(nn.Module):
    """Observations, a batch or a single tensor, -> values of all actions `[B, n]`."""

    def __init__(self, net: nn.Sequential, advantage: nn.Linear, value: nn.Linear | None, keys: list[str]) -> None:
        super().__init__()
        self.net, self.advantage, self.value, self.keys = net, advantage, value, keys

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        x = self.net(concatenated(observation, self.keys))
        advantage = self.advantage(x)
        return advantage if self.value is None else self.value(x) + advantage - advantage.mean(1, keepdim=True)
