"""Stochastic policy whose actions are Gaussian samples squashed by tanh (Haarnoja et al., 2018, appendix C)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.features import vector_observations, width
from ..errors import UserError
from .mlp import ACTIVATIONS, concatenated

LOG_STD = (-20.0, 2.0)  # the bounds of the authors' code


@dataclass(frozen=True)
class TanhGaussian:
    """Multi-layer perceptron to the mean and standard deviation of a Gaussian, squashed by tanh into (-1, 1)."""

    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    final_scale: float = 1.0
    """Factor on the initial weights and biases of the mean's last layer; a small one leads to small initial actions."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for the keys and shapes of `spec`.

        Raises:
            UserError: no action or vector observation in the data, chunks of actions, or invalid options.
        """
        if not self.hidden_dims or any(dim < 1 for dim in self.hidden_dims):
            raise UserError(f"--model.hidden-dims {self.hidden_dims} must be positive")
        if not self.final_scale > 0:
            raise UserError(f"--model.final-scale {self.final_scale} must be above 0")
        outputs = width(spec, "action")
        if len(spec["action"]["shape"]) != 1:
            raise UserError(f"this policy produces single actions; the data has {tuple(spec['action']['shape'])}")
        keys = vector_observations(spec)
        inputs = sum(math.prod(spec[key]["shape"]) for key in keys)
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers += [nn.Linear(inputs, hidden), ACTIVATIONS[self.activation]()]
            inputs = hidden
        last = nn.Linear(inputs, 2 * outputs)
        with torch.no_grad():
            last.weight[:outputs].mul_(self.final_scale)
            last.bias[:outputs].mul_(self.final_scale)
        return TanhGaussianPolicy(nn.Sequential(*layers, last), keys, outputs)


class TanhGaussianPolicy(nn.Module):
    """Observations, a batch or a single tensor, -> the action of the mean `[B, Da]`, for evaluation; `sample` draws.

    `prefix` "next." selects the successors' observations of a batch.
    """

    def __init__(self, net: nn.Sequential, keys: list[str], width: int) -> None:
        super().__init__()
        self.net, self.keys, self.noise_width = net, keys, width

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        return self.gaussian(observation)[0].tanh()

    def gaussian(self, observation: dict[str, Tensor] | Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation before tanh, both `[B, Da]`."""
        mean, log_std = self.net(concatenated(observation, self.keys, prefix)).chunk(2, dim=1)
        return mean, log_std.clamp(*LOG_STD)

    def draw(self, observation: dict[str, Tensor] | Tensor, noise: Tensor) -> Tensor:
        """A sample `[B, Da]`, without its log-probability."""
        mean, log_std = self.gaussian(observation)
        return (mean + log_std.exp() * noise).tanh()

    def sample(
        self, observation: dict[str, Tensor] | Tensor, noise: Tensor | None = None, prefix: str = "", several: int = 0
    ) -> tuple[Tensor, Tensor]:
        """A reparametrised action `[B, Da]` and its log-probability `[B]`; `noise` `[B, Da]` is drawn by default.

        With `several`, n samples for each observation: `[B, n, Da]` and `[B, n]`.
        """
        mean, log_std = self.gaussian(observation, prefix)
        if several:
            mean, log_std = (x[:, None].expand(-1, several, -1) for x in (mean, log_std))  # [B, n, Da]
        noise = torch.randn_like(mean) if noise is None else noise
        before = mean + log_std.exp() * noise  # u = mu + sigma * eps
        return before.tanh(), tanh_gaussian_log_prob(before, noise, log_std)


def tanh_gaussian_log_prob(before: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability `[...]` of a = tanh(u), eq. 21: log N(u; mu, sigma) - sum log(1 - tanh(u)^2).

    Args:
        before: u `[..., Da]`.
        noise: (u - mu) / sigma `[..., Da]`.
        log_std: log sigma `[..., Da]`.

    log(1 - tanh(u)^2) is computed as 2 (log 2 - u - softplus(-2 u)), which is equal and does not overflow.
    """
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - before - functional.softplus(-2 * before))
    return (gaussian - squash).sum(-1)
