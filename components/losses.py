"""Loss factories for supervised targets: means over all entries.

A factory builds a module that maps (prediction, target) of equal shapes to a scalar, so torch's own losses fit, too.
The module of `nll` takes a distribution as the prediction.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError


@dataclass(frozen=True)
class MSE:
    """Mean squared error."""

    def build(self) -> nn.Module:
        return nn.MSELoss()


@dataclass(frozen=True)
class L1:
    """Mean absolute error; less sensitive to outliers than the squared error."""

    def build(self) -> nn.Module:
        return nn.L1Loss()


@dataclass(frozen=True)
class Huber:
    """Huber loss: squared error below `delta`, linear above (Huber, 1964)."""

    delta: float = 1.0
    """Error in normalised units from which on the loss is linear."""

    def build(self) -> nn.Module:
        if not self.delta > 0:
            raise UserError(f"--loss.delta {self.delta} must be above 0")
        return nn.HuberLoss(delta=self.delta)


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of the target, for networks with a Gaussian or mixture head."""

    def build(self) -> nn.Module:
        return LikelihoodLoss()


class LikelihoodLoss(nn.Module):
    """Mean over samples of -log p(target), for predictions with `log_prob(target) -> [B]`."""

    takes_distribution = True

    def forward(self, prediction: Any, target: Tensor) -> Tensor:
        return -prediction.log_prob(target).mean()


@dataclass(frozen=True)
class Sinkhorn:
    """Entropic optimal transport between the steps of two chunks; tolerates actions that are slightly early or late."""

    epsilon: float = 0.01
    """Weight of the entropy, relative to the mean cost; the limit at 0 is optimal transport."""
    iterations: int = 100
    """Number of Sinkhorn iterations."""
    time_weight: float = 10.0
    """Cost of moving an action by the length of the chunk."""

    def build(self) -> nn.Module:
        if not self.epsilon > 0 or self.iterations < 1 or self.time_weight < 0:
            raise UserError(
                f"--loss.epsilon {self.epsilon} must be above 0, --loss.iterations {self.iterations} 1 or more,"
                f" --loss.time-weight {self.time_weight} 0 or more"
            )
        return SinkhornLoss(self.epsilon, self.iterations, self.time_weight)


class SinkhornLoss(nn.Module):
    """Sinkhorn divergence (Feydy et al., 2019, eq. 3) of chunks `[B, Ta, Da]`, each a cloud of Ta points.

    S(x, y) = OT(x, y) - (OT(x, x) + OT(y, y)) / 2, which is 0 for equal chunks. The cost of two points is the mean
    squared difference of their actions plus `time_weight` times the squared difference of their times in the chunk.
    For single actions `[B, Da]`, clouds of one point, the loss is the mean squared error.
    """

    def __init__(self, epsilon: float, iterations: int, time_weight: float) -> None:
        super().__init__()
        self.epsilon, self.iterations, self.time_weight = epsilon, iterations, time_weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        x, y = (chunk if chunk.ndim > 2 else chunk[:, None] for chunk in (prediction, target))
        between = self.transport(x, y)
        return (between - (self.transport(x, x) + self.transport(y, y)) / 2).mean()

    def transport(self, x: Tensor, y: Tensor) -> Tensor:
        """OT(x, y), `[B]`."""
        time = torch.arange(x.shape[1], device=x.device) / x.shape[1]
        cost = (x[:, :, None] - y[:, None]).square().mean(3) + self.time_weight * (time[:, None] - time).square()
        plan = sinkhorn(cost.detach(), self.epsilon, self.iterations).exp()
        return (plan * cost).sum((1, 2))  # its gradient is the one with the plan fixed (Danskin)


def sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Logarithm of the entropic transport plan between uniform weights, `[..., N, M] -> [..., N, M]`.

    Minimises <plan, cost> - epsilon mean(cost) H(plan) over plans with row sums 1/N and column sums 1/M, by alternating
    scaling in log space (Sinkhorn & Knopp, 1967; Cuturi, 2013, algorithm 1; Peyre & Cuturi, 2019, remark 4.23).
    """
    kernel = -cost / (epsilon * cost.mean((-2, -1), keepdim=True)).clamp(min=1e-12)  # [..., N, M]
    rows, columns = math.log(cost.shape[-2]), math.log(cost.shape[-1])
    potential = torch.zeros_like(cost[..., :1, :])  # of the columns, [..., 1, M]
    for _ in range(iterations):
        of_rows = -rows - torch.logsumexp(kernel + potential, -1, keepdim=True)  # [..., N, 1]
        potential = -columns - torch.logsumexp(kernel + of_rows, -2, keepdim=True)
    return kernel + of_rows + potential


def zero_padding(prediction: Any, target: Tensor, is_pad: Tensor) -> tuple[Any, Tensor]:
    """Set the padded steps of both `[B, Ta, Da]` to zero before a mean; `is_pad` is `[B, Ta]`.

    Padded entries still count in the denominator of the mean (as in ACT, Zhao et al., 2023), so a loss is a mean over
    samples and needs no communication between processes. A distribution omits them from its density.
    """
    keep = ~is_pad[..., None]
    if isinstance(prediction, Tensor):
        return torch.where(keep, prediction, 0), torch.where(keep, target, 0)
    return prediction._replace(keep=keep), target
