"""Soft actor-critic with a learned temperature (Haarnoja et al., 2018, arXiv:1812.05905).

Equation numbers are the paper's. a' and a are drawn from the policy pi, Q_i are the critics, Q'_i their targets:

    y       = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s'))          eq. 3, 5
    J_Q     = sum_i E 1/2 (Q_i(s, a) - y)^2                                                   eq. 5
    J_pi    = E alpha log pi(a|s) - min_i Q_i(s, a)                                           eq. 7, 9
    J_alpha = E -alpha (log pi(a|s) + H)        H: the target entropy                         eq. 18

With pictures, only J_Q trains the encoder, and the pictures are shifted at random, as in DrQ-v2 (Yarats et al., 2022).

Deviation: the three gradients are taken at the same weights, before any of them steps (the paper's algorithm 1 steps
one after the other), so that one backward pass serves all.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..data.augmentation import random_shift
from ..models.encoder import EncodedPolicy, detached, encoded, encoder_of
from ..optimizers import update
from ..value_learning import (
    Explorer,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    frozen,
)


class SAC:
    """Soft actor-critic on single transitions or n-step returns, from a replay buffer or a dataset with rewards."""

    name = "sac"
    needs = {"policy": "tanh_gaussian", "critic": "q_ensemble", "temperature": "temperature", "encoder": "cnn"}
    defaults = {
        "env": "gymnasium",
        "loss": "mse",
        "optimizer": "adam",
        "optimizer.lr": 1e-3,
        "offline.normalise": ("action=scale", "observation=none"),
        "steps": 10_000,
        "batch-size": 256,
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Soft actor-critic; the paper's values."""

        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""
        target_entropy: float | None = None
        """Target H of the policy's entropy; None for minus the width of the action."""
        shift: int = 4
        """Largest random shift of pictures in pixels."""

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
        check_rates(self.config, n_step=(1, 1e9), shift=(0, 1e3))
        self.encoder = encoder_of(models)
        check_transitions(spec, self.name)
        check_actions(spec, self.name)
        entropy = self.config.target_entropy
        self.target_entropy = -float(spec["action"]["shape"][-1]) if entropy is None else entropy
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps."""
        return Window(discount=config.discount, n_step=config.n_step)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q, whose targets have no gradient."""
        with torch.no_grad():
            action, log_prob = self.models["policy"].sample(data, prefix="next.")  # [B, Da], [B]
            following = self.models["target_critic"](data, action, prefix="next.").amin(0)  # [B]
            soft_value = following - self.models["temperature"]() * log_prob
            y = bootstrapped(data, soft_value, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        y = y.expand_as(q)
        loss = 0.5 * len(q) * self.loss(q, y)  # the mean over members and samples, times the members
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()} | data_summary(data)

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi + J_alpha at new actions, without gradient for the critics, nor from J_pi for the temperature."""
        action, log_prob = self.models["policy"].sample(data)  # [B, Da], [B]
        q = self.together(frozen(self.models["critic"], data, action))  # [B]
        alpha = self.models["temperature"]()
        actor_loss = (alpha.detach() * log_prob - q).mean()
        temperature_loss = -alpha * (log_prob.detach().mean() + self.target_entropy)
        metrics = {"actor_loss": actor_loss, "temperature_loss": temperature_loss, "temperature": alpha}
        metrics = {name: value.detach() for name, value in metrics.items()} | {"entropy": -log_prob.detach().mean()}
        return actor_loss + temperature_loss, metrics

    def together(self, q: Tensor) -> Tensor:
        """The value `[B]` that the policy maximises, from those of the critics `[E, B]`."""
        return q.amin(0)

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses, which train different networks, and the metrics."""
        data = encoded(self.encoder, random_shift(data, self.config.shift))
        critic_loss, metrics = self.critic_loss(data)
        actor_losses, more = self.actor_losses(detached(data))
        return critic_loss + actor_losses, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics

    def policy(self) -> nn.Module:
        """The evaluated policy, which returns the mean action."""
        return EncodedPolicy(self.encoder, self.models["policy"])

    def explorer(self) -> nn.Module:
        """The collecting policy, which samples from the policy."""
        return Explorer(self.models["policy"], self.encoder)
