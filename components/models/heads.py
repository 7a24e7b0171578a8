"""Output heads of regression networks: an action, a mixture of Gaussians over actions or chunks, or a codebook."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import auxiliary_weights_of, with_auxiliary
from ..errors import UserError
from .codebook import CodebookOptions
from .experts import ExpertsOptions


class Mixture(NamedTuple):
    """A mixture of K diagonal Gaussians over actions `[B, Da]` or over chunks `[B, Ta, Da]` as a whole.

    Each component is a whole chunk, so its steps stay consistent: two ways around an obstacle are two components.
    """

    logits: Tensor
    """`[B, K]`"""
    mean: Tensor
    """`[B, K, (Ta,) Da]`"""
    std: Tensor
    """`[B, K, (Ta,) Da]`"""
    keep: Tensor | None = None
    """`[B, Ta, 1]` bool, the steps that are not padding; all of them when None."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Logarithm of the density `[B]` of `action` `[B, (Ta,) Da]` over the steps in `keep`."""
        z = (action[:, None] - self.mean) / self.std
        log_density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)  # [B, K, (Ta,) Da]
        if self.keep is not None:
            log_density = torch.where(self.keep[:, None], log_density, 0)
        return torch.logsumexp(self.logits.log_softmax(1) + log_density.flatten(2).sum(2), dim=1)

    @property
    def mode(self) -> Tensor:
        """Mean `[B, (Ta,) Da]` of the most probable component."""
        best = self.logits.argmax(1).view(-1, 1, *[1] * (self.mean.ndim - 2))  # [B, 1, ...]
        return self.mean.gather(1, best.expand(-1, 1, *self.mean.shape[2:])).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class HeadOptions(ExpertsOptions, CodebookOptions):
    """Options of every network that maps observations to actions."""

    head: Literal["deterministic", "gaussian", "mixture", "codebook"] = "deterministic"
    """Output: an action (losses mse, l1, huber, ...), a distribution over actions (loss nll), or codes of a codebook
    that is learnt with them, and an offset (losses mse, l1, huber, ... of the action)."""
    components: int = 5
    """Number of Gaussians of the mixture."""
    min_std: float = 1e-2
    """Smallest standard deviation of a Gaussian, in normalised units."""

    def idle_options(self) -> dict[str, str]:
        """Options that have no effect beside the others -> without which one."""
        belongs = {"components": "mixture"} | {field.name: "codebook" for field in fields(CodebookOptions)}
        if self.head not in ("gaussian", "mixture"):
            belongs["min_std"] = "mixture"
        idle = {name: f"head {head}" for name, head in belongs.items() if head != self.head}
        idle |= ExpertsOptions.idle_options(self)
        return {name.replace("_", "-"): without for name, without in idle.items()}

    def make_head(self, features: int, shape: tuple[int, ...]) -> nn.Module:
        """`[B, features]` -> an action of `shape`, or a `Mixture` over such actions. Raises UserError: bad options."""
        self.check_experts()
        if self.experts > 1 and self.head != "deterministic":
            raise UserError(f"--model.experts {self.experts} goes with --model.head deterministic, not {self.head}")
        if self.components < 1 or not self.min_std > 0:
            raise UserError(
                f"--model.components {self.components} must be 1 or more, --model.min-std {self.min_std} above 0"
            )
        if self.head == "codebook":
            return self.make_codebook(features, shape)
        if self.experts > 1:
            return ExpertsHead(self.make_experts(features, features, math.prod(shape)), shape)
        if self.head == "deterministic":
            return nn.Sequential(nn.Linear(features, math.prod(shape)), nn.Unflatten(1, shape))
        return MixtureHead(features, shape, self.components if self.head == "mixture" else 1, self.min_std)


class MixtureHead(nn.Module):
    """`[B, features]` -> `Mixture`, with one component for a Gaussian."""

    gives_distribution = True  # so it is trained by its likelihood

    def __init__(self, features: int, shape: tuple[int, ...], components: int, min_std: float) -> None:
        super().__init__()
        self.shape, self.components, self.min_std = shape, components, min_std
        self.net = nn.Linear(features, components * (1 + 2 * math.prod(shape)))

    def forward(self, features: Tensor) -> Mixture:
        logits, rest = self.net(features).split([self.components, self.net.out_features - self.components], dim=1)
        mean, std = rest.unflatten(1, (2, self.components, *self.shape)).unbind(1)
        return Mixture(logits, mean, functional.softplus(std) + self.min_std)


class ExpertsHead(nn.Module):
    """`[B, features]` -> an action of `shape`, decoded by a mixture of experts."""

    def __init__(self, experts: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.experts, self.shape, self.auxiliary_weights = experts, shape, auxiliary_weights_of(experts)

    def forward(self, features: Tensor) -> Tensor:
        return self.experts(features).unflatten(1, self.shape)

    def auxiliary(self, features: Tensor, **known: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The action, and the losses of the router."""
        output, losses = with_auxiliary(self.experts, features)
        return output.unflatten(1, self.shape), losses


class Headed(nn.Module):
    """A network that ends in a head: `features(observation)` `[B, F]`, and from them what the head makes.

    It has the head's losses of its own.
    """

    @property
    def auxiliary_weights(self) -> dict[str, float]:
        """Weights of the head's own losses."""
        return auxiliary_weights_of(self.head)

    def auxiliary(self, observation: dict[str, Tensor] | Tensor, **known: Any) -> tuple[Any, dict[str, Tensor]]:
        """What the head makes in training, and its own losses."""
        features: Any = self.features
        return with_auxiliary(self.head, features(observation), **known)
