"""Implicit Q-learning (Kostrikov et al., 2022, arXiv:2110.06169).

Equation numbers are the paper's; Q'_i are the critics' targets, L_tau is the expectile loss |tau - 1(u < 0)| u^2:

    J_V  = E L_tau(min_i Q'_i(s, a) - V(s))                                      eq. 5
    J_Q  = sum_i E (r + gamma (1 - terminated) V(s') - Q_i(s, a))^2              eq. 6
    J_pi = -E exp(beta (min_i Q'_i(s, a) - V(s))) log pi(a|s)                    eq. 7

All three use the weights before the step, so that one backward pass serves them. The weight in J_pi is clipped at 100.

Deviations: the policy's learning rate is constant, where the paper has a cosine schedule (--optimizer.schedule cosine,
for all models); layers are initialised by torch's defaults, as in CORL, not orthogonally. The paper divides the rewards
of locomotion tasks so that the returns of the data span 1000: --normalise reward=return_range; it subtracts 1 from
those of AntMaze: --dataset.reward-shift -1.
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
    expectile_loss,
    follow,
    summary,
)


class IQL:
    """Implicit Q-learning on single transitions or n-step returns."""

    needs = {"policy": "actor", "critic": "q_ensemble", "value": "v_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "model.std": "learned",
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Implicit Q-learning; the paper's values for locomotion (it trains for 1M steps)."""

        expectile: float = 0.7
        """Expectile tau of the value function; nearer to 1 is nearer to the best action of the data."""
        temperature: float = 3.0
        """Inverse temperature beta of the policy's weights; 0 clones behaviour."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (alpha in the paper)."""

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
        check_rates(self.config, expectile=(0, 1), temperature=(0, 1e9), n_step=(1, 1e9))
        check_transitions(spec, "iql")
        check_actions(spec, "iql")
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps."""
        return Window(discount=config.discount, n_step=config.n_step)

    def value_loss(self, data: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """J_V, the advantage `[B]` of the data's actions, and the metrics."""
        with torch.no_grad():
            q = self.models["target_critic"](data, data["action"]).amin(0)  # [B]
        v = self.models["value"](data).squeeze(0)  # [B]
        loss = expectile_loss(q - v, self.config.expectile)
        return loss, (q - v).detach(), {"value_loss": loss.detach()} | summary("v", v)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q."""
        with torch.no_grad():
            following = self.models["value"](data, prefix="next.").squeeze(0)  # [B]
            y = bootstrapped(data, following, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        loss = len(q) * self.loss(q, y.expand_as(q))  # the sum over critics
        return loss, {"critic_loss": loss.detach()} | summary("q", q)

    def actor_loss(self, data: dict[str, Any], advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi."""
        weight = advantage_weight(advantage, self.config.temperature)  # [B]
        policy = self.models["policy"]
        loss = -(weight * policy.log_prob(policy(data), data["action"])).mean()
        return loss, {"actor_loss": loss.detach()} | summary("advantage", advantage) | summary("weight", weight)

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the three losses, which train different networks, and the metrics."""
        value_loss, advantage, metrics = self.value_loss(data)
        critic_loss, more = self.critic_loss(data)
        actor_loss, most = self.actor_loss(data, advantage)
        return value_loss + critic_loss + actor_loss, metrics | more | most | data_summary(data)

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics

    def explorer(self) -> nn.Module:
        """The collecting policy, which samples from the policy."""
        return Explorer(self.models["policy"])
