"""Multi-layer perceptron from vector observations to an action or a chunk of actions."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..features import vector_observations, width

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "elu": nn.ELU}


@dataclass(frozen=True)
class MLP:
    """Multi-layer perceptron over all vector observations."""

    hidden_dims: tuple[int, ...] = (256, 256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm after each hidden linear layer."""
    dropout: float = 0.0
    """Probability of dropping a hidden unit in training."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for the keys and shapes of `spec`.

        Raises:
            UserError: no action or vector observation in the data, or options that make no sense.
        """
        if any(dim < 1 for dim in self.hidden_dims) or not 0 <= self.dropout < 1:
            raise UserError(
                f"--model.hidden-dims {self.hidden_dims} must be positive, --model.dropout {self.dropout} in [0, 1)"
            )
        if pictures := [key for key in spec if key.startswith("observation.images.")]:
            raise UserError(f"the model 'mlp' takes no pictures, and the data has {pictures[0]!r}; use --model cnn")
        keys = vector_observations(spec)
        inputs = sum(math.prod(spec[key]["shape"]) for key in keys)
        width(spec, "action")
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers.append(nn.Linear(inputs, hidden))
            layers += [nn.LayerNorm(hidden)] if self.layer_norm else []
            layers.append(ACTIVATIONS[self.activation]())
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            inputs = hidden
        shape = tuple(spec["action"]["shape"])
        return MLPPolicy(nn.Sequential(*layers, nn.Linear(inputs, math.prod(shape))), keys, shape)


def concatenated(observation: dict[str, Tensor] | Tensor, keys: list[str], prefix: str = "") -> Tensor:
    """The vector observations of a batch side by side, `[B, sum of widths]`; the one tensor itself may be given."""
    if isinstance(observation, Tensor):
        return observation.flatten(1)
    parts = [observation[prefix + key].flatten(1) for key in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class MLPPolicy(nn.Module):
    """Concatenates the observations `[B, ...]` and returns actions `[B, Da]` or chunks `[B, Ta, Da]`.

    Takes the batch, or the one observation tensor itself.
    """

    def __init__(self, net: nn.Sequential, keys: list[str], action_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.keys, self.action_shape = net, keys, action_shape

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        return self.net(concatenated(observation, self.keys)).unflatten(1, self.action_shape)
