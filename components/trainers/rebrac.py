"""ReBRAC: behaviour-regularised actor-critic, revisited (Tarasov et al., 2023, arXiv:2305.09836).

TD3+BC with a penalty for actor and critic each, deeper networks, LayerNorm in the critics and larger batches. Equation
numbers are the paper's; primes mark targets and successors, a^ is the data's next action:

    a'   = clip(pi'(s') + clip(eps, -c, c), -1, 1)    eps ~ N(0, sigma)
    y    = r + gamma (1 - terminated) (min_i Q'_i(s', a') - beta_2 |a' - a^|^2)        eq. 4
    J_Q  = sum_i E (Q_i(s, a) - y)^2
    J_pi = E [beta_1 |pi(s) - a|^2 - lambda min_i Q_i(s, pi(s))]                        eq. 3
    lambda = 1 / mean |min_i Q_i(s, pi(s))|

Policy and targets are updated at every second step of the critics. The penalties sum over the action's dimensions.

Deviation: biases and the critics' last layer are initialised by torch's defaults; in the authors' code biases start at
0.1 and that layer is uniform within 0.003.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..optimizers import delay
from ..parallel import global_mean
from ..value_learning import (
    OFFLINE_RL,
    Counting,
    GaussianNoise,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    frozen,
    summary,
)
from .td3 import TD3


class ReBRAC(Counting):
    """ReBRAC on single transitions."""

    needs = {"policy": "actor", "critic": "q_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "optimizer.lr": 1e-3,
        "model.hidden-dims": (256, 256, 256),
        "model.final-scale": 1e-2,
        "model.critic.hidden-dims": (256, 256, 256),
        "model.critic.layer-norm": True,
        "batch-size": 1024,
    }

    @dataclass(frozen=True)
    class Config:
        """ReBRAC; the paper's values (it trains for 1M steps and tunes both penalties for each task)."""

        actor_penalty: float = 1.0
        """Weight beta_1 of behaviour cloning in the policy's loss."""
        critic_penalty: float = 1.0
        """Weight beta_2 of the distance to the data's next action in the critics' targets."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        target_rate: float = 0.005
        """Fraction of the networks mixed into their targets (tau)."""
        policy_noise: float = 0.2
        """Deviation of the noise on the target policy's actions."""
        noise_clip: float = 0.5
        """Largest size of that noise."""
        policy_every: int = 2
        """Steps of the critics per step of policy and targets."""
        exploration_noise: float = 0.1
        """Deviation of the noise on the collecting policy's actions, online."""

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
        self.promises = Promises(self.config.policy_every, compiles=("critic_loss", "actor_loss"))
        bounds = {"actor_penalty": (0, 1e9), "critic_penalty": (0, 1e9), "policy_every": (1, 1e9)}
        check_rates(self.config, policy_noise=(0, 1e9), noise_clip=(0, 1e9), exploration_noise=(0, 1e9), **bounds)
        check_transitions(spec, "rebrac", more=["next.action"])
        check_actions(spec, "rebrac")
        delay(optimizers, "policy", self.config.policy_every)
        for name in ("policy", "critic"):
            models[f"target_{name}"] = copy.deepcopy(models[name]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions with the next action."""
        return Window(discount=config.discount, next_action=True)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q."""
        with torch.no_grad():
            noise = self.config.policy_noise * torch.randn_like(data["action"])
            noise = noise.clamp(-self.config.noise_clip, self.config.noise_clip)
            action = (self.models["target_policy"](data, prefix="next.") + noise).clamp(-1, 1)  # [B, Da]
            penalty = (action - data["next.action"]).square().sum(1)  # [B]
            following = self.models["target_critic"](data, action, prefix="next.").amin(0)  # [B]
            following = following - self.config.critic_penalty * penalty
            y = bootstrapped(data, following, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        loss = len(q) * self.loss(q, y.expand_as(q))  # the sum over critics
        metrics = {"critic_loss": loss.detach(), "critic_penalty": penalty.mean()}
        return loss, metrics | summary("q", q) | data_summary(data)

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi, without gradient for the critics."""
        action = self.models["policy"](data)  # [B, Da]
        q = frozen(self.models["critic"], data, action).amin(0)  # [B]
        lambda_ = 1 / global_mean(q.abs()).clamp(min=1e-8)
        bc_loss = (action - data["action"]).square().sum(1).mean()
        loss = self.config.actor_penalty * bc_loss - lambda_ * q.mean()
        return loss, {"actor_loss": loss.detach(), "bc_loss": bc_loss.detach(), "lambda": lambda_}

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses at the same weights, for held-out data."""
        critic_loss, metrics = self.critic_loss(data)
        actor_loss, more = self.actor_loss(data)
        return critic_loss + actor_loss, metrics | more

    train_step: Any = TD3.train_step

    def explorer(self) -> nn.Module:
        """The collecting policy: the policy with noise."""
        return GaussianNoise(self.models["policy"], self.config.exploration_noise)
