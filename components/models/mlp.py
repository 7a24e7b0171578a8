"""Multi-layer perceptrons from vector observations to an action or a chunk of actions."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.features import vector_observations, width
from ..data.pictures import pictures_of
from ..errors import UserError
from .heads import Headed, HeadOptions, Mixture

Init = Literal["torch", "glorot", "orthogonal"]
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "elu": nn.ELU}


@dataclass(frozen=True, kw_only=True)
class MLP(HeadOptions):
    """Multi-layer perceptron over all vector observations."""

    hidden_dims: tuple[int, ...] = (256, 256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm after each hidden linear layer."""
    dropout: float = 0.0
    """Dropout probability of a hidden unit in training."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for the keys and shapes of `spec`.

        Raises:
            UserError: no action or vector observation in the data, or invalid options.
        """
        if any(dim < 1 for dim in self.hidden_dims) or not 0 <= self.dropout < 1:
            raise UserError(
                f"--model.hidden-dims {self.hidden_dims} must be positive, --model.dropout {self.dropout} in [0, 1)"
            )
        keys, inputs, shape = flat_sizes(spec, "mlp")
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers.append(nn.Linear(inputs, hidden))
            layers += [nn.LayerNorm(hidden)] if self.layer_norm else []
            layers.append(ACTIVATIONS[self.activation]())
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            inputs = hidden
        return FlatPolicy(nn.Sequential(*layers, self.make_head(inputs, shape)), keys)


@dataclass(frozen=True, kw_only=True)
class ResMLP(HeadOptions):
    """Multi-layer perceptron of residual blocks with LayerNorm, which remains trainable when it is deep."""

    width: int = 256
    """Width of the residual stream."""
    blocks: int = 3
    """Residual blocks: LayerNorm, linear, GELU, linear."""
    expansion: int = 2
    """Hidden width of a block, in multiples of `width`."""
    dropout: float = 0.0
    """Dropout probability of a block's outputs in training."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for the keys and shapes of `spec`. Raises UserError as `MLP.build` does."""
        if min(self.width, self.blocks, self.expansion) < 1 or not 0 <= self.dropout < 1:
            sizes = f"--model.width {self.width}, blocks {self.blocks} and expansion {self.expansion}"
            raise UserError(f"{sizes} must be positive, --model.dropout {self.dropout} in [0, 1)")
        keys, inputs, shape = flat_sizes(spec, "resmlp")
        blocks = [ResidualBlock(self.width, self.expansion * self.width, self.dropout) for _ in range(self.blocks)]
        layers = [nn.Linear(inputs, self.width), *blocks, nn.LayerNorm(self.width)]
        return FlatPolicy(nn.Sequential(*layers, self.make_head(self.width, shape)), keys)


class ResidualBlock(nn.Module):
    """x + f(x), where f begins with a LayerNorm."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        layers = [nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)]
        self.net = nn.Sequential(*layers, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def flat_sizes(spec: dict[str, Any], model: str) -> tuple[list[str], int, tuple[int, ...]]:
    """The keys of the vector observations, the sum of their sizes over the history, and the shape of the action.

    Raises:
        UserError: no action or vector observation in the data, or pictures without an encoder.
    """
    if pictures := [key for key in pictures_of(spec) if key.startswith("observation.")]:
        raise UserError(
            f"the model {model!r} takes no pictures, and the data has {pictures[0]!r}; the trainer needs a model"
            " 'encoder', such as cnn"
        )
    keys = vector_observations(spec)
    width(spec, "action")
    return keys, sum(math.prod(spec[key]["shape"]) for key in keys), tuple(spec["action"]["shape"])


def hidden_layers(
    inputs: int, widths: tuple[int, ...], activation: str, layer_norm: bool
) -> tuple[list[nn.Module], int]:
    """The hidden layers of an RL network, with LayerNorm after the nonlinearity if at all, and the last one's width."""
    layers: list[nn.Module] = []
    for hidden in widths:
        layers += [nn.Linear(inputs, hidden), ACTIVATIONS[activation]()]
        layers += [nn.LayerNorm(hidden)] if layer_norm else []
        inputs = hidden
    return layers, inputs


@torch.no_grad()
def initialise(net: nn.Module, init: Init) -> None:
    """Initialise the weights of all linear layers, `[..., D, D']`: as torch does, by Glorot's uniform, or orthogonal.

    The latter two set biases to zero; orthogonal weights are scaled by sqrt 2 except in the last layer (Saxe et al.,
    2014).
    """
    layers: list[Any] = [layer for layer in net.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) > 1]
    for layer in layers if init != "torch" else ():
        if init == "glorot":
            bound = math.sqrt(6 / sum(layer.weight.shape[-2:]))
            layer.weight.uniform_(-bound, bound)
        else:
            for weight in layer.weight if layer.weight.ndim > 2 else [layer.weight]:
                nn.init.orthogonal_(weight, 1.0 if layer is layers[-1] else math.sqrt(2))
        layer.bias.zero_()


def concatenated(observation: dict[str, Tensor] | Tensor, keys: list[str], prefix: str = "") -> Tensor:
    """The vector observations of a batch, concatenated to `[B, sum of widths]`; a single tensor is also accepted."""
    if isinstance(observation, Tensor):
        return observation.flatten(1)
    parts = [observation[prefix + key].flatten(1) for key in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class FlatPolicy(Headed):
    """Observations, a batch or a single tensor, -> actions `[B, Da]` or chunks `[B, Ta, Da]`, or a `Mixture`."""

    def __init__(self, net: nn.Sequential, keys: list[str]) -> None:
        super().__init__()
        self.net, self.keys = net, keys

    @property
    def head(self) -> nn.Module:
        """The last layer."""
        return self.net[-1]

    def features(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        """The head's input `[B, F]`."""
        return self.net[:-1](concatenated(observation, self.keys))

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor | Mixture:
        return self.net(concatenated(observation, self.keys))
