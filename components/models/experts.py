"""Mixtures of experts with a router that learns (Shazeer et al., 2017), as networks in the place of one.

The router's probabilities are p = softmax(x W). Of N experts E_i, those T of the k largest p_i count (Fedus et al.,
2022, arXiv:2101.03961, eq. 2, there with k = 1):

    y = sum_(i in T) p_i(x) E_i(x)

Auxiliary losses keep all experts in use, and the router's numbers small. F_i is the share of the choices that fall on
an expert, P_i the mean of its probability:

    load_balance = N sum_i F_i P_i                          (Fedus et al., eq. 4; 1 if all have equal shares)
    router_z     = mean (log sum_i exp (x W)_i)^2           (ST-MoE, Zoph et al., 2022, arXiv:2202.08906, eq. 5)

F has no gradient and is that of the batches of all processes, so the gradient is a mean over samples, and several
processes learn what one learns. With --grad-accumulation it is that of the micro-step.

Deviation: every expert computes every row, and no row is dropped: there is no capacity. That is quick enough for small
networks, and can be exported.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from ..parallel import over_processes
from .batched import BatchedLinear


@dataclass(frozen=True, kw_only=True)
class ExpertsOptions:
    """Options of a mixture of experts."""

    experts: int = 1
    """Networks among which a router chooses for each input; 1 for no choice, and one network."""
    top_k: int = 2
    """How many of them count."""
    load_balance: float = 0.01
    """Weight of the loss that spreads the choices evenly over the experts; that of Fedus et al."""
    router_z: float = 0.001
    """Weight of the loss of large numbers in the router; that of Zoph et al."""

    def idle_options(self) -> dict[str, str]:
        """Options that have no effect beside the others -> without which one."""
        return dict.fromkeys(("top-k", "load-balance", "router-z") if self.experts == 1 else (), "experts 2 or more")

    def check_experts(self) -> None:
        """Raise UserError for options out of range."""
        if self.experts < 1:
            raise UserError(f"--model.experts {self.experts} must be 1 or more")
        if self.experts > 1 and not 1 <= self.top_k <= self.experts:
            raise UserError(f"--model.top-k {self.top_k} of --model.experts {self.experts}: choose 1 to {self.experts}")
        for name in ("load_balance", "router_z"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--model.{name.replace('_', '-')} {getattr(self, name)} must be a number of 0 or more")

    def make_experts(self, inputs: int, hidden: int, outputs: int) -> "Experts":
        """A mixture of networks with one hidden layer, `[..., inputs] -> [..., outputs]`."""
        weights = {"load_balance": self.load_balance, "router_z": self.router_z}
        return Experts(inputs, hidden, outputs, self.experts, self.top_k, weights)


class Experts(nn.Module):
    """A mixture of networks with one hidden layer, `[..., inputs] -> [..., outputs]`."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, experts: int, top_k: int, weights: dict[str, float]
    ) -> None:
        super().__init__()
        self.top_k, self.auxiliary_weights = top_k, weights
        self.router = nn.Linear(inputs, experts, bias=False)
        self.first, self.second = BatchedLinear(experts, inputs, hidden), BatchedLinear(experts, hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x, *self.routed(x))

    def auxiliary(self, x: Tensor, **known: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the losses of the router."""
        logits, chosen = self.routed(x)
        losses = {"load_balance": load_balance(logits, chosen), "router_z": logits.logsumexp(-1).square().mean()}
        return self.mixed(x, logits, chosen), losses

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The router's numbers `[n, N]` for all rows, and where the k largest of each are: 1, elsewhere 0."""
        logits = self.router(x.flatten(0, -2)).float()
        return logits, torch.zeros_like(logits).scatter(1, logits.topk(self.top_k, 1).indices, 1.0)

    def mixed(self, x: Tensor, logits: Tensor, chosen: Tensor) -> Tensor:
        """The outputs of the chosen experts, weighted by their probabilities."""
        rows = x.flatten(0, -2)
        experts = self.second(functional.gelu(self.first(rows.expand(logits.shape[1], *rows.shape))))  # [N, n, outputs]
        weight = logits.softmax(1) * chosen
        return (weight.t()[..., None] * experts).sum(0).unflatten(0, x.shape[:-1])


def load_balance(logits: Tensor, chosen: Tensor) -> Tensor:
    """Load-balancing loss of `logits` `[n, N]`, of which `chosen` `[n, N]` is 1 where an expert counts."""
    share = over_processes((chosen / chosen.sum(1, keepdim=True)).mean(0).detach())
    return logits.shape[1] * (share * logits.softmax(1).mean(0)).sum()


Heard = list[dict[str, Tensor]]
"""The losses of a network's parts, one entry for each."""


def heard(part: nn.Module, x: Tensor, losses: Heard | None) -> Tensor:
    """The output of a part of a network, whose own losses are added to `losses` where they are wanted."""
    if losses is None or not isinstance(part, Experts):
        return part(x)
    output, own = part.auxiliary(x)
    losses.append(own)
    return output


def means(losses: Heard) -> dict[str, Tensor]:
    """The mean of each loss over the parts that have it."""
    return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]} if losses else {}
