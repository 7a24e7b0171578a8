"""V(s) as a distribution over bins of the return."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.features import vector_observations
from ..errors import UserError
from .mlp import Init, concatenated, hidden_layers, initialise


@dataclass(frozen=True, kw_only=True)
class VCategorical:
    """Distribution of the return, given the observation, over equal bins between the least and the largest one."""

    bins: int = 201
    """Number of bins."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm after the nonlinearity of each hidden layer."""
    init: Init = "torch"
    """Initial weights: torch's, Glorot's as in JAX code, which are larger, or orthogonal ones as in PPO."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: no vector observation in the data, or bad options."""
        if self.bins < 2 or any(dim < 1 for dim in self.hidden_dims):
            sizes = f"--model.value.bins {self.bins} must be 2 or more, --model.value.hidden-dims {self.hidden_dims}"
            raise UserError(f"{sizes} positive")
        keys = vector_observations(spec)
        inputs = sum(torch.Size(spec[key]["shape"]).numel() for key in keys)
        layers, inputs = hidden_layers(inputs, self.hidden_dims, self.activation, self.layer_norm)
        net = nn.Sequential(*layers, nn.Linear(inputs, self.bins))
        initialise(net, self.init)
        return Bins(net, keys, self.bins)


class Bins(nn.Module):
    """Observations of a batch -> logits `[B, bins]`; `prefix` "next." selects the successors'.

    The first and the last bin are the least and the largest return that `cover` has been told of, and 0 is between.
    """

    def __init__(self, net: nn.Sequential, keys: list[str], bins: int) -> None:
        super().__init__()
        self.net, self.keys, self.bins = net, keys, bins
        self.register_buffer("support", torch.zeros(2))
        self.register_buffer("threshold", torch.zeros(()))  # a trainer's, of advantages; runs from this one inherit it

    def forward(self, observation: dict[str, Tensor] | Tensor, prefix: str = "") -> Tensor:
        return self.net(concatenated(observation, self.keys, prefix))

    @torch.no_grad()
    def cover(self, least: Tensor, largest: Tensor) -> None:
        """Widen the support to returns from `least` to `largest`; it never shrinks."""
        support: Any = self.support
        support.copy_(torch.stack([torch.minimum(support[0], least), torch.maximum(support[1], largest)]))

    def mean(self, logits: Tensor) -> Tensor:
        """The expected return `[B]`."""
        support: Any = self.support
        share = torch.linspace(0, 1, self.bins, device=logits.device)
        return support[0] + (support[1] - support[0]) * (logits.float().softmax(1) * share).sum(1)

    def cross_entropy(self, logits: Tensor, returns: Tensor) -> Tensor:
        """Cross entropy `[B]` of returns `[B]`, each divided between the two bins next to it, so that means are kept.

        Returns beyond the support count as its ends.
        """
        support: Any = self.support
        share = (returns - support[0]) / (support[1] - support[0]).clamp(min=1e-8)
        place = share.clamp(0, 1) * (self.bins - 1)
        lower = place.floor().clamp(max=self.bins - 2)  # [B]
        near = torch.stack([lower, lower + 1], 1).long()
        log = logits.float().log_softmax(1).gather(1, near)  # [B, 2]
        return -(log[:, 0] * (lower + 1 - place) + log[:, 1] * (place - lower))
