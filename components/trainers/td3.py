"""Twin delayed deterministic policy gradient (Fujimoto, van Hoof & Meger, 2018, arXiv:1802.09477, algorithm 1).

Equation numbers are the paper's; primes mark targets and successors:

    a'   = clip(pi'(s') + clip(eps, -c, c), -1, 1)    eps ~ N(0, sigma)          eq. 14, 15
    y    = r + gamma (1 - terminated) min_i Q'_i(s', a')                         eq. 10
    J_Q  = sum_i E (Q_i(s, a) - y)^2
    J_pi = -E Q_1(s, pi(s))

Policy and targets are updated at every second step of the critics. The collecting policy is pi(s) + N(0, 0.1).

Deviations, as in CleanRL: layers and learning rates are 256 wide and 3e-4, where the paper has 400, 300 and 1e-3;
actions are random for 25 000 steps, where the paper takes 10 000 for some environments and 1000 for the others.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..optimizers import delay, update
from ..value_learning import (
    ONLINE_RL,
    Counting,
    GaussianNoise,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    frozen,
    summary,
)


class TD3(Counting):
    """Twin delayed deterministic policy gradient on single transitions or n-step returns."""

    name = "td3"
    needs = {"policy": "actor", "critic": "q_ensemble"}
    defaults: dict[str, Any] = ONLINE_RL | {"online.learning-starts": 25_000}

    @dataclass(frozen=True)
    class Config:
        """Twin delayed deterministic policy gradient; the paper's values."""

        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_rate: float = 0.005
        """Fraction of the networks mixed into their targets (tau)."""
        policy_noise: float = 0.2
        """Deviation of the noise on the target policy's actions."""
        noise_clip: float = 0.5
        """Largest size of that noise."""
        policy_every: int = 2
        """Steps of the critics per step of policy and targets."""
        exploration_noise: float = 0.1
        """Deviation of the noise on the collecting policy's actions."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.config: Any = config or self.Config()
        self.optimizers, self.loss = optimizers, loss
        self.promises = Promises(self.config.policy_every, compiles=("critic_loss", "actor_loss"))
        bounds = {"policy_noise": (0, 1e9), "noise_clip": (0, 1e9), "policy_every": (1, 1e9)}
        check_rates(self.config, n_step=(1, 1e9), exploration_noise=(0, 1e9), **bounds)
        check_transitions(spec, self.name)
        check_actions(spec, self.name)
        delay(optimizers, "policy", self.config.policy_every)
        for name in ("policy", "critic"):
            models[f"target_{name}"] = copy.deepcopy(models[name]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps."""
        return Window(discount=config.discount, n_step=config.n_step)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q."""
        with torch.no_grad():
            noise = self.config.policy_noise * torch.randn_like(data["action"])
            noise = noise.clamp(-self.config.noise_clip, self.config.noise_clip)
            action = (self.models["target_policy"](data, prefix="next.") + noise).clamp(-1, 1)  # [B, Da]
            following = self.models["target_critic"](data, action, prefix="next.").amin(0)  # [B]
            y = bootstrapped(data, following, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        loss = len(q) * self.loss(q, y.expand_as(q))  # the sum over critics
        return loss, {"critic_loss": loss.detach()} | summary("q", q) | data_summary(data)

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi, without gradient for the critic."""
        loss = -frozen(self.models["critic"], data, self.models["policy"](data), first=1).mean()
        return loss, {"actor_loss": loss.detach()}

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses at the same weights, for held-out data."""
        critic_loss, metrics = self.critic_loss(data)
        actor_loss, more = self.actor_loss(data)
        return critic_loss + actor_loss, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(data)
        update(self.optimizers, loss, "critic")
        self.updates += 1
        if self.updates % self.config.policy_every == 0:
            loss, more = self.actor_loss(data)
            update(self.optimizers, loss, "policy")
            for name in ("policy", "critic"):
                follow(self.models[f"target_{name}"], self.models[name], self.config.target_rate)
            metrics |= more
        return metrics

    def explorer(self) -> nn.Module:
        """The collecting policy: the policy with noise."""
        return GaussianNoise(self.models["policy"], self.config.exploration_noise)
