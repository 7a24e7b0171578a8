"""Policies of RL: a multi-layer perceptron to an action, the mean of a Gaussian, or the logits of discrete actions."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.features import vector_observations
from ..errors import UserError
from .mlp import ACTIVATIONS, Init, concatenated, flat_sizes, initialise

LOG_STD = (-5.0, 2.0)  # bounds of a learned deviation
HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Multi-layer perceptron to single actions; of discrete ones, to the logarithm of each one's probability."""

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
    """Initial weights: torch's, Glorot's, which JAX code has and which are larger, or PPO's orthogonal ones."""
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
        shape: tuple[int, ...]
        if classes := spec.get("action", {}).get("classes"):
            keys, shape = vector_observations(spec), (classes,)
            inputs = sum(math.prod(spec[key]["shape"]) for key in keys)
        else:
            keys, inputs, shape = flat_sizes(spec, "actor")
        if len(shape) != 1:
            raise UserError(f"this policy gives single actions; the data has {shape}: set --dataset.action-steps 1")
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers += [nn.Linear(inputs, hidden), ACTIVATIONS[self.activation]()]
            layers += [nn.LayerNorm(hidden)] if self.layer_norm else []
            inputs = hidden
        last = nn.Linear(inputs, shape[0])
        net = nn.Sequential(*layers, last, *([nn.Tanh()] if self.squash == "tanh" and not classes else []))
        initialise(net, self.init)
        with torch.no_grad():
            last.weight.mul_(self.final_scale)
            last.bias.mul_(self.final_scale)
        if classes:
            return CategoricalActor(net, keys, classes)
        return GaussianActor(net, keys, shape[0], self.std == "learned")


class GaussianActor(nn.Module):
    """Called, it gives the action `[B, Da]`, the mean; observations are a batch, or the one tensor itself.

    Args:
        net: From the concatenated observations to the mean.
        keys: The observations it sees.
        width: Da.
        learned: Whether the deviations are learned; otherwise they are 1.
    """

    def __init__(self, net: nn.Sequential, keys: list[str], width: int, learned: bool) -> None:
        super().__init__()
        self.net, self.keys, self.noise_width = net, keys, width
        self.log_std = nn.Parameter(torch.zeros(width)) if learned else None

    def forward(self, observation: dict[str, Tensor] | Tensor, prefix: str = "") -> Tensor:
        return self.net(concatenated(observation, self.keys, prefix))

    def deviation(self) -> Tensor | float:
        """Standard deviation `[Da]`, or 1."""
        return 1.0 if self.log_std is None else self.log_std.clamp(*LOG_STD).exp()

    def sample(self, observation: dict[str, Tensor] | Tensor, prefix: str = "", noise: Tensor | None = None) -> Tensor:
        """A draw `[B, Da]`, cut to [-1, 1]; `noise` `[B, Da]` is drawn unless given."""
        mean = self(observation, prefix)
        return (mean + self.deviation() * (torch.randn_like(mean) if noise is None else noise)).clamp(-1, 1)

    def draw(self, observation: dict[str, Tensor] | Tensor, noise: Tensor) -> Tensor:
        """A draw `[B, Da]` that is not cut."""
        return self(observation) + self.deviation() * noise

    def log_prob(self, mean: Tensor, action: Tensor) -> Tensor:
        """Logarithm of the density `[B]` of `action` `[B, Da]` around `mean` `[B, Da]`, which this network gave."""
        log_density = -0.5 * ((action - mean) / self.deviation()).square() - HALF_LOG_TAU
        if self.log_std is not None:
            log_density = log_density - self.log_std.clamp(*LOG_STD)
        return log_density.sum(1)

    def evaluate(self, observation: dict[str, Tensor] | Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the density of `action` `[B, Da]`, and the entropy, both `[B]`."""
        mean = self(observation)
        log_std = torch.zeros_like(mean[0]) if self.log_std is None else self.log_std.clamp(*LOG_STD)
        entropy = (0.5 + HALF_LOG_TAU + log_std).sum()
        return self.log_prob(mean, action), entropy.expand(len(mean))


class CategoricalActor(nn.Module):
    """Called, it gives the most likely action `[B]` int64; observations are a batch, or the one tensor itself."""

    def __init__(self, net: nn.Sequential, keys: list[str], classes: int) -> None:
        super().__init__()
        self.net, self.keys, self.noise_width = net, keys, classes

    def log_probs(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        """Logarithm of the probability of each action `[B, n]`."""
        return self.net(concatenated(observation, self.keys)).log_softmax(1)

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        return self.log_probs(observation).argmax(1)

    def draw(self, observation: dict[str, Tensor] | Tensor, noise: Tensor) -> Tensor:
        """A draw `[B]`, by the Gumbel-max trick from normal `noise` `[B, n]`."""
        uniform = torch.special.ndtr(noise).clamp(1e-7, 1 - 1e-7)
        return (self.log_probs(observation) - (-uniform.log()).log()).argmax(1)

    def evaluate(self, observation: dict[str, Tensor] | Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the probability of `action` `[B]`, and the entropy, both `[B]`."""
        log_probs = self.log_probs(observation)
        return log_probs.gather(1, action[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(1)
