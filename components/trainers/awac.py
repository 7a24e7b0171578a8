"""Advantage-weighted actor-critic (Nair et al., 2020, arXiv:2006.09359).

The equation number is the paper's; primes mark targets and successors, a' and a~ are drawn from the policy:

    y    = r + gamma (1 - terminated) min_i Q'_i(s', a')
    J_Q  = sum_i E (Q_i(s, a) - y)^2
    A    = min_i Q_i(s, a) - min_i Q_i(s, a~)
    J_pi = -E exp(A / lambda) log pi(a|s)                       eq. 13

The critics step first; the advantage uses their new weights (algorithm 1).

Deviations: the normalising constant of eq. 13 is left out, as the paper does in practice, and the weight is clipped at
100; actions that the policy draws are clipped to [-1, 1].
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..optimizers import update
from ..value_learning import (
    OFFLINE_RL,
    Explorer,
    advantage_weight,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    summary,
)


class AWAC:
    """Advantage-weighted actor-critic on single transitions or n-step returns."""

    needs = {"policy": "actor", "critic": "q_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "model.std": "learned",
        "model.squash": "none",
        "model.hidden-dims": (256, 256, 256),
        "model.critic.hidden-dims": (256, 256, 256),
    }
    promises = Promises(repeats_after=1, compiles=("critic_loss", "actor_loss"))

    @dataclass(frozen=True)
    class Config:
        """Advantage-weighted actor-critic; CORL's values and networks (the authors' batch has 1024 transitions)."""

        temperature: float = 1.0
        """Temperature lambda of the policy's weights; with a small one the advantage matters more."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.optimizers, self.loss, self.config = optimizers, loss, config or self.Config()
        check_rates(self.config, temperature=(1e-6, 1e9), n_step=(1, 1e9))
        check_transitions(spec, "awac")
        check_actions(spec, "awac")
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps."""
        return Window(discount=config.discount, n_step=config.n_step)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q."""
        with torch.no_grad():
            action = self.models["policy"].sample(data, prefix="next.")  # [B, Da]
            following = self.models["target_critic"](data, action, prefix="next.").amin(0)  # [B]
            y = bootstrapped(data, following, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        loss = len(q) * self.loss(q, y.expand_as(q))  # the sum over critics
        return loss, {"critic_loss": loss.detach()} | summary("q", q) | data_summary(data)

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi, without gradient for the critic."""
        policy = self.models["policy"]
        mean = policy(data)  # [B, Da]
        with torch.no_grad():
            drawn = (mean + policy.deviation() * torch.randn_like(mean)).clamp(-1, 1)
            both = torch.stack([data["action"], drawn], dim=1)  # [B, 2, Da]
            q, v = self.models["critic"](data, both, several=True).amin(0).unbind(1)  # [B] each
            weight = advantage_weight(q - v, 1 / self.config.temperature)
        loss = -(weight * policy.log_prob(mean, data["action"])).mean()
        return loss, {"actor_loss": loss.detach()} | summary("advantage", q - v) | summary("weight", weight)

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses at the same weights, for held-out data."""
        critic_loss, metrics = self.critic_loss(data)
        actor_loss, more = self.actor_loss(data)
        return critic_loss + actor_loss, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(data)
        update(self.optimizers, loss, "critic")
        loss, more = self.actor_loss(data)
        update(self.optimizers, loss, "policy")
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics | more

    def explorer(self) -> nn.Module:
        """The collecting policy, which samples from the policy."""
        return Explorer(self.models["policy"])
