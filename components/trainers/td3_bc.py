"""TD3+BC: twin delayed deterministic policy gradient with behaviour cloning (Fujimoto & Gu, 2021, arXiv:2106.06860).

Equation numbers are the paper's; its critics are TD3's (Fujimoto et al., 2018, arXiv:1802.09477, algorithm 1). Primes
mark targets and successors:

    a'   = clip(pi'(s') + clip(eps, -c, c), -1, 1)    eps ~ N(0, sigma)          TD3 eq. 14, 15
    y    = r + gamma (1 - terminated) min_i Q'_i(s', a')
    J_Q  = sum_i E (Q_i(s, a) - y)^2
    J_pi = E [-lambda Q_1(s, pi(s)) + (pi(s) - a)^2]                             eq. 3
    lambda = alpha / mean |Q_1|                                                  eq. 5

Squares of actions are means over their dimensions, as in the authors' code. Policy and targets move with every second
step of the critics. States are normalised to mean 0 and deviation 1 (eq. 4).

Deviations: the mean in lambda is over Q_1(s, pi(s)), as in the authors' code, where eq. 5 has the data's actions; a
constant state feature keeps its scale, where eq. 4 adds 0.001 to every deviation.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..datasets.transitions import transitions
from ..optimizers import delay, update
from ..parallel import global_mean
from ..value_learning import (
    OFFLINE_RL,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    frozen,
    summary,
)


class TD3BC:
    """TD3+BC on single transitions or n-step returns."""

    needs = {"policy": "actor", "critic": "q_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {"normalise": ("action=scale",)}
    compiles = ("critic_loss", "actor_loss")

    @dataclass(frozen=True)
    class Config:
        """TD3+BC; the paper's values (it trains for 1M steps)."""

        alpha: float = 2.5
        """Weight of the Q-function against behaviour cloning."""
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
        """Steps of the critics for each step of policy and targets."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.optimizers, self.loss, self.config, self.updates = optimizers, loss, config or self.Config(), 0
        self.cycle = self.config.policy_every
        bounds = {"alpha": (0, 1e9), "policy_noise": (0, 1e9), "noise_clip": (0, 1e9), "policy_every": (1, 1e9)}
        check_rates(self.config, n_step=(1, 1e9), **bounds)
        if spec is None:  # built without data, to look at
            return
        check_transitions(spec, "td3_bc")
        check_actions(spec, "td3_bc")
        delay(optimizers, "policy", self.config.policy_every)
        for name in ("policy", "critic"):
            models[f"target_{name}"] = copy.deepcopy(models[name]).requires_grad_(False)

    @staticmethod
    def prepare(data: dict[str, Any], config: Any) -> dict[str, Any]:
        """The data as single transitions."""
        return transitions(data, "td3_bc", discount=config.discount, n_step=config.n_step)

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
        """J_pi; the critic gets no gradient."""
        action = self.models["policy"](data)  # [B, Da]
        q = frozen(self.models["critic"], data, action, first=1)  # [1, B]
        lambda_ = self.config.alpha / global_mean(q.abs()).clamp(min=1e-8)
        bc_loss = self.loss(action, data["action"])
        loss = -lambda_ * q.mean() + bc_loss
        return loss, {"actor_loss": loss.detach(), "bc_loss": bc_loss.detach(), "lambda": lambda_}

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

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
