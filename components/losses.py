"""Loss factories for supervised targets: means over all entries.

A factory builds a module that maps (prediction, target) of equal shapes to a scalar, so torch's own losses fit, too.
The module of `nll` takes a distribution as the prediction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contracts import auxiliary_weights_of, with_auxiliary
from .data.actions import SHOWN, learnt_names
from .errors import UserError


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the action's dimensions, for losses that are means over entries; for imitation."""

    weights: tuple[str, ...] = ()
    """Factors of the errors of the action's dimensions: a number for each, or NAME=NUMBER for some, the others having
    1. They multiply the mean over all entries, and are not normalised."""

    def reduced(self, loss: Any, **options: Any) -> nn.Module:
        """The module of a class such as nn.MSELoss, with these weights. Raises UserError: no such numbers."""
        if not self.weights:
            return loss(**options)
        return WeightedLoss(loss(reduction="none", **options), [str(word) for word in self.weights])


class WeightedLoss(nn.Module):
    """The mean of a loss whose entries `[..., Da]` are multiplied by a factor for each dimension of the action.

    Args:
        loss: Without a reduction.
        words: The factors, as in `Weights`; `fit_action` turns them into numbers.

    Raises:
        UserError: words that are neither all numbers of 0 or more, nor all NAME=NUMBER.
    """

    def __init__(self, loss: nn.Module, words: Sequence[str]) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("factors", None, persistent=False)  # [Da]
        self.words = [(name, _factor(number, words)) for name, _, number in (word.rpartition("=") for word in words)]
        named = [name for name, _ in self.words if name]
        if len(named) not in (0, len(words)) or len(set(named)) < len(named):
            raise UserError(f"--loss.weights {' '.join(words)}: expected either numbers or NAME=NUMBER for each, once")

    def fit_action(self, action: dict[str, Any], device: Any = None) -> None:
        """Take the factors for an action, a feature of `spec`. Raises UserError: another width, or no such name."""
        width, names = int(action["shape"][-1]), learnt_names(action)
        more = [f"and {width - SHOWN} more"] * (width > SHOWN)
        told = f"the action as it is learnt has {width}: {', '.join(names[:SHOWN] + more)}"
        if not self.words[0][0]:
            if len(self.words) != width:
                raise UserError(f"--loss.weights: {len(self.words)} numbers; {told}")
            factors = [number for _, number in self.words]
        else:
            factors = [1.0] * width
            for name, number in self.words:
                places = [place for place in range(width) if name == names[place]]
                if not places:
                    raise UserError(f"--loss.weights {name}: no such dimension; {told}")
                for place in places:  # those of a rotation have the same name
                    factors[place] = number
        if not any(factors):
            raise UserError("--loss.weights: all are 0, so that nothing would be learnt")
        self.factors = torch.tensor(factors, device=device)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.factors is None or prediction.shape[-1] != len(self.factors):
            raise UserError(f"--loss.weights are of actions; this trainer compares {tuple(prediction.shape)}")
        return (self.loss(prediction, target) * self.factors).mean()


def _factor(text: str, words: Sequence[str]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"--loss.weights {' '.join(words)}: {text!r} is no number of 0 or more, nor NAME=NUMBER")
    return number


@dataclass(frozen=True)
class MSE(Weights):
    """Mean squared error."""

    def build(self) -> nn.Module:
        return self.reduced(nn.MSELoss)


@dataclass(frozen=True)
class L1(Weights):
    """Mean absolute error; less sensitive to outliers than the squared error."""

    def build(self) -> nn.Module:
        return self.reduced(nn.L1Loss)


@dataclass(frozen=True)
class Huber(Weights):
    """Huber loss: squared error below `delta`, linear above (Huber, 1964)."""

    delta: float = 1.0
    """Error in normalised units from which on the loss is linear."""

    def build(self) -> nn.Module:
        if not self.delta > 0:
            raise UserError(f"--loss.delta {self.delta} must be above 0")
        return self.reduced(nn.HuberLoss, delta=self.delta)


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


class WithAuxiliary:
    """A network in one computation of a loss, which is called in its place and keeps the losses of its own.

    These are the auxiliary losses of the last call: of a mixture of experts, or of a codebook.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.own = network, dict[str, Tensor]()
        self.condition: Any = getattr(network, "condition", None)  # of a denoiser

    def __call__(self, *arguments: Any, **known: Any) -> Any:
        """What the network returns; `known` as of `with_auxiliary`."""
        output, self.own = with_auxiliary(self.network, *arguments, **known)
        return output

    def added(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss plus the network's own by their weights, and the metrics: the sum, and each of them unweighted."""
        weights = auxiliary_weights_of(self.network)
        for name, value in self.own.items():
            if weights[name]:
                loss = loss + weights[name] * value
        return loss, {name: value.detach() for name, value in {"loss": loss, **self.own}.items()}
