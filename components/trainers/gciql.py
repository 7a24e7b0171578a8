"""Goal-conditioned implicit Q-learning, as in OGBench (Park et al., 2025, arXiv:2410.20092, and its reference code).

IQL (arXiv:2110.06169) with goals g: the reward is -1 a step and 0 where s is g, which ends the task. L_tau is the
expectile loss, Q'_i are targets:

    J_V  = E L_tau(min_i Q'_i(s, a, g) - V(s, g))
    J_Q  = sum_i E (r + gamma (1 - terminated) V(s', g) - Q_i(s, a, g))^2
    J_pi = E [-min_i Q_i(s, clip(pi(s, g), -1, 1), g) / mean |Q| - alpha log pi(a|s, g)]          ddpg_bc
    J_pi = -E exp(alpha (min_i Q_i(s, a, g) - V(s, g))) log pi(a|s, g)                            awr

pi is a Gaussian of unit variance; the action at inference is its mean. All losses use the weights from before the step,
so that one backward pass serves them.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import GOAL, Goals, GoalSampling, Promises
from ..optimizers import update
from ..parallel import global_mean
from ..value_learning import (
    GOAL_VALUE,
    OFFLINE_RL,
    advantage_weight,
    bootstrapped,
    check_actions,
    check_rates,
    data_summary,
    expectile_loss,
    follow,
    frozen,
    networks,
    summary,
)
from .gcbc import GOAL_ACTOR


class GCIQL:
    """Goal-conditioned implicit Q-learning."""

    needs = {"policy": "actor", "critic": "q_ensemble", "value": "v_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "dataset": "ogbench",
        **networks("", **GOAL_ACTOR),
        **networks("critic", "value", **GOAL_VALUE),
        "batch-size": 1024,
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Goal-conditioned implicit Q-learning; OGBench's values (it trains for 1M steps)."""

        extraction: Literal["ddpg_bc", "awr"] = "ddpg_bc"
        """Policy extraction: by the gradient of Q with behaviour cloning, or by advantage-weighted regression."""
        alpha: float = 0.3
        """Weight of behaviour cloning (ddpg_bc; 0.003 for the point mazes), or inverse temperature (awr)."""
        expectile: float = 0.9
        """Expectile tau of the value function."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""
        value_goals: tuple[float, float, float] = (0.2, 0.5, 0.3)
        """Shares of the value functions' goals that are the current state, a later one of the episode, any state."""
        value_geometric: bool = True
        """Draw the distance of later states geometrically, not uniformly."""
        actor_goals: tuple[float, float, float] = (0.0, 1.0, 0.0)
        """The same shares of the policy's goals."""
        actor_geometric: bool = False
        """The same for the policy's goals."""

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
        check_rates(self.config, alpha=(0, 1e9), expectile=(0, 1))
        check_actions(spec, "gciql")
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Goals:
        """Transitions with goals."""
        return Goals(
            actor=GoalSampling(config.actor_goals, config.actor_geometric),
            value=GoalSampling(config.value_goals, config.value_geometric),
            discount=config.discount,
        )

    def value_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_V + J_Q, for the goals of the value functions."""
        data = towards(data, "value_goal")
        with torch.no_grad():
            target = self.models["target_critic"](data, data["action"]).amin(0)  # [B]
            following = self.models["value"](data, prefix="next.").squeeze(0)  # [B]
            y = bootstrapped(data, following, self.config.discount)
        v = self.models["value"](data).squeeze(0)  # [B]
        q = self.models["critic"](data, data["action"])  # [E, B]
        value_loss = expectile_loss(target - v, self.config.expectile)
        critic_loss = len(q) * self.loss(q, y.expand_as(q))  # the sum over critics
        metrics = {"value_loss": value_loss.detach(), "critic_loss": critic_loss.detach()} | summary("v", v)
        return value_loss + critic_loss, metrics | summary("q", q) | data_summary(data)

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi, without gradient for the critics and the value function."""
        policy = self.models["policy"]
        mean = policy(data)  # [B, Da]
        log_prob = policy.log_prob(mean, data["action"])  # [B]
        metrics = {"mse": self.loss(mean, data["action"]).detach(), "bc_log_prob": log_prob.detach().mean()}
        if self.config.extraction == "awr":
            with torch.no_grad():
                q = self.models["critic"](data, data["action"]).amin(0)
                advantage = q - self.models["value"](data).squeeze(0)  # [B]
            weight = advantage_weight(advantage, self.config.alpha)
            loss = -(weight * log_prob).mean()
            metrics |= summary("advantage", advantage) | summary("weight", weight)
        else:
            q = frozen(self.models["critic"], data, mean.clamp(-1, 1)).amin(0)  # [B]
            q_loss = -q.mean() / (global_mean(q.abs()) + 1e-6)
            loss = q_loss - self.config.alpha * log_prob.mean()
            metrics |= {"q_loss": q_loss.detach()}
        return loss, {"actor_loss": loss.detach()} | metrics

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses, which train different networks, and the metrics."""
        value_losses, metrics = self.value_losses(data)
        actor_loss, more = self.actor_loss(data)
        return value_losses + actor_loss, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics


def towards(data: dict[str, Any], goal: str) -> dict[str, Any]:
    """The batch with another of its goals in the observation and in its successor."""
    return data | {GOAL: data[goal], f"next.{GOAL}": data[goal]}
