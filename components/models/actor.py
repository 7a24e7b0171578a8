"""Policies of RL: a multi-layer perceptron to an action, a Gaussian's mean, or the logits of discrete actions."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.features import vector_observations
from ..errors import UserError
from .mlp import Init, concatenated, flat_sizes, hidden_layers, initialise

LOG_STD = (-5.0, 2.0)  # bounds of a learned deviation
HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Multi-layer perceptron to single actions, or to the log-probabilities of discrete actions."""

    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm after the nonlinearity of each hidden layer."""
    squash: Literal["tanh", "none"] = "tanh"
    """Bound of the action (the Gaussian's mean): tanh to (-1, 1), or none."""
    std: Literal["fixed", "learned"] = "fixed"
    """Standard deviation of the Gaussian: 1, or learned for each dimension; unused by algorithms without a density."""
    init: Init = "torch"
    """Initial weights: torch's, Glorot's as in JAX code, which are larger, or orthogonal ones as in PPO."""
    final_scale: float = 1.0
    """Factor on the initial weights and biases of the last layer; a small one leads to small initial actions."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for the keys and shapes of `spec`.

        Raises:
            UserError: no action or vector observation in the data, chunks of actions, or invalid options.
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
            raise UserError(f"this policy produces single actions; the data has {shape}: set --dataset.action-steps 1")
        layers, inputs = hidden_layers(inputs, self.hidden_dims, self.activation, self.layer_norm)
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
    """Observations, a batch or a single tensor, -> the action `[B, Da]`, which is the Gaussian's mean.

    Args:
        net: Concatenated observations -> mean.
        keys: The observations that are used.
        width: Da.
        learned: Whether the standard deviations are learned; otherwise they are 1.
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
        """A sample `[B, Da]`, clipped to [-1, 1]; `noise` `[B, Da]` is drawn by default."""
        mean = self(observation, prefix)
        return (mean + self.deviation() * (torch.randn_like(mean) if noise is None else noise)).clamp(-1, 1)

    def draw(self, observation: dict[str, Tensor] | Tensor, noise: Tensor) -> Tensor:
        """A sample `[B, Da]` that is not clipped."""
        return self(observation) + self.deviation() * noise

    def log_prob(self, mean: Tensor, action: Tensor) -> Tensor:
        """Logarithm of the density `[B]` of `action` `[B, Da]`, given this network's output `mean` `[B, Da]`."""
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
    """Observations, a batch or a single tensor, -> the most likely action `[B]` int64."""

    def __init__(self, net: nn.Sequential, keys: list[str], classes: int) -> None:
        super().__init__()
        self.net, self.keys, self.noise_width = net, keys, classes

    def log_probs(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        """Logarithm of the probability of each action `[B, n]`."""
        return self.net(concatenated(observation, self.keys)).log_softmax(1)

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        return self.log_probs(observation).argmax(1)

    def draw(self, observation: dict[str, Tensor] | Tensor, noise: Tensor) -> Tensor:
        """A sample `[B]`, by the Gumbel-max trick from normal `noise` `[B, n]`."""
        uniform = torch.special.ndtr(noise).clamp(1e-7, 1 - 1e-7)
        return (self.log_probs(observation) - (-uniform.log()).log()).argmax(1)

    def evaluate(self, observation: dict[str, Tensor] | Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the probability of `action` `[B]`, and the entropy, both `[B]`."""
        log_probs = self.log_probs(observation)
        return log_probs.gather(1, action[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(1)
