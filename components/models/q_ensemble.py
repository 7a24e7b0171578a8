"""Q(s, a) as an ensemble whose members are evaluated together, in one batched matrix product a layer."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..features import vector_observations, width
from .mlp import ACTIVATIONS, concatenated


@dataclass(frozen=True)
class QEnsemble:
    """Independent Q-functions of observation and action; two of them are the usual twin critics."""

    members: int = 2
    """Number of Q-functions."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the networks for the keys and shapes of `spec`.

        Raises:
            UserError: no action or vector observation in the data, or options that make no sense.
        """
        if self.members < 1 or not self.hidden_dims or any(dim < 1 for dim in self.hidden_dims):
            sizes = f"--model.critic.members {self.members} and --model.critic.hidden-dims {self.hidden_dims}"
            raise UserError(f"{sizes} must be positive")
        keys = vector_observations(spec)
        inputs = sum(math.prod(spec[key]["shape"]) for key in keys) + width(spec, "action")
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers += [BatchedLinear(self.members, inputs, hidden), ACTIVATIONS[self.activation]()]
            inputs = hidden
        return QFunctions(nn.Sequential(*layers, BatchedLinear(self.members, inputs, 1)), keys, self.members)


class BatchedLinear(nn.Module):
    """A linear layer of each member, `[E, B, inputs] -> [E, B, outputs]`, initialised as `nn.Linear`."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.members = members
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members * outputs).uniform_(-bound, bound))  # flat: no weight decay

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.view(self.members, 1, -1), x, self.weight)


class QFunctions(nn.Module):
    """Values `[E, B]` of actions `[B, Da]` at the observations of a batch; `prefix` "next." takes the successors'."""

    def __init__(self, net: nn.Sequential, keys: list[str], members: int) -> None:
        super().__init__()
        self.net, self.keys, self.members = net, keys, members

    def forward(self, observation: dict[str, Tensor] | Tensor, action: Tensor, prefix: str = "") -> Tensor:
        x = torch.cat([concatenated(observation, self.keys, prefix), action], dim=1)  # [B, Ds + Da]
        return self.net(x.expand(self.members, *x.shape)).squeeze(2)
