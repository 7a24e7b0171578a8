"""Q(s, a) and V(s) as ensembles whose members are evaluated together, by one batched matrix product in each layer."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data.features import vector_observations
from ..errors import UserError
from .batched import BatchedLayerNorm, BatchedLinear
from .mlp import ACTIVATIONS, Init, concatenated, initialise


@dataclass(frozen=True, kw_only=True)
class QEnsemble:
    """Independent Q-functions of observation and action; two of them are the usual twin critics."""

    members: int = 2
    """Number of functions."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "silu", "tanh", "elu"] = "relu"
    """Nonlinearity of the hidden layers."""
    layer_norm: bool = False
    """LayerNorm after the nonlinearity of each hidden layer, as in ReBRAC and FQL."""
    init: Init = "torch"
    """Initial weights: torch's, Glorot's as in JAX code, which are larger, or orthogonal ones as in PPO."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the networks for the keys and shapes of `spec`; an action may be a chunk.

        Raises:
            UserError: no action or vector observation in the data, or invalid options.
        """
        if "action" not in spec:
            raise UserError(f"the data has no 'action'; found: {', '.join(spec)}")
        return self._build(spec, math.prod(spec["action"]["shape"]), "critic")

    def _build(self, spec: dict[str, Any], more: int, name: str) -> nn.Module:
        """An ensemble over the vector observations and `more` further inputs."""
        if self.members < 1 or not self.hidden_dims or any(dim < 1 for dim in self.hidden_dims):
            sizes = f"--model.{name}.members {self.members} and --model.{name}.hidden-dims {self.hidden_dims}"
            raise UserError(f"{sizes} must be positive")
        keys = vector_observations(spec)
        inputs = sum(math.prod(spec[key]["shape"]) for key in keys) + more
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers += [BatchedLinear(self.members, inputs, hidden), ACTIVATIONS[self.activation]()]
            layers += [BatchedLayerNorm(self.members, hidden)] if self.layer_norm else []
            inputs = hidden
        net = nn.Sequential(*layers, BatchedLinear(self.members, inputs, 1))
        initialise(net, self.init)
        return Functions(net, keys, self.members)


@dataclass(frozen=True, kw_only=True)
class VEnsemble(QEnsemble):
    """Independent value functions of the observation; one of them by default."""

    members: int = 1
    """Number of functions."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the networks for `spec`. Raises UserError as `QEnsemble.build` does."""
        return self._build(spec, 0, "value")


class Functions(nn.Module):
    """Observations of a batch -> values `[E, B]`: Q of `action` `[B, (Ta,) Da]`, or V without an action.

    `prefix` "next." selects the successors' observations; `first` restricts the ensemble to its first members. With
    `several`, each observation has n actions `[B, n, Da]`, and the values are `[E, B, n]`.
    """

    def __init__(self, net: nn.Sequential, keys: list[str], members: int) -> None:
        super().__init__()
        self.net, self.keys, self.members = net, keys, members

    def forward(
        self,
        observation: dict[str, Tensor] | Tensor,
        action: Tensor | None = None,
        prefix: str = "",
        first: int | None = None,
        several: bool = False,
    ) -> Tensor:
        x = concatenated(observation, self.keys, prefix)  # [B, Ds]
        if action is not None and several:
            x = torch.cat([x[:, None].expand(-1, action.shape[1], -1), action.flatten(2)], dim=2)  # [B, n, Ds + Da]
        elif action is not None:
            x = torch.cat([x, action.flatten(1)], dim=1)  # [B, Ds + Da]
        rows, members = x.flatten(0, -2), first or self.members
        return self.net(rows.expand(members, *rows.shape)).view(members, *x.shape[:-1])

    def of(self, chosen: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Values `[n, B]` of the members `chosen` `[n]`, without gradients for their parameters."""
        split = {key: value.detach().unflatten(0, (self.members, -1)) for key, value in self.named_parameters()}
        weights = {key: value.index_select(0, chosen).flatten(0, 1) for key, value in split.items()}
        return functional_call(self, weights, arguments, keywords | {"first": len(chosen)})
