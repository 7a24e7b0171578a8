"""Reinforcement learning with prior data (Ball et al., 2023, arXiv:2302.02948, algorithm 1).

Soft actor-critic (`sac.py`) with half of each batch from a dataset, many critics with LayerNorm, and many updates of
the critics per environment step. Z is a random subset of the E critics, drawn at each update:

    y    = r + gamma (1 - terminated) (min_{i in Z} Q'_i(s', a') - alpha log pi(a'|s'))
    J_Q  = sum_i E 1/2 (Q_i(s, a) - y)^2
    J_pi = E alpha log pi(a|s) - mean_i Q_i(s, a)

Policy and temperature are updated every `policy_every` updates of the critics, by default once per environment step.

Deviations: LayerNorm comes after the nonlinearity, where the authors' comes before it. As in their code the target
entropy is minus half the width of the action.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..data.augmentation import random_shift
from ..models.encoder import detached, encoded
from ..optimizers import delay, update
from ..value_learning import ONLINE_RL, Counting, bootstrapped, check_rates, data_summary, follow, networks
from .sac import SAC


class RLPD(Counting, SAC):
    """Reinforcement learning with prior data, on single transitions or n-step returns."""

    name = "rlpd"
    defaults: dict[str, Any] = ONLINE_RL | {
        "steps": 250_000,
        "online.learning-starts": 5000,
        "online.updates-per-step": 20,
        "dataset.ratio": 0.5,
        "dataset.validation": 0.0,
        **networks("critic", members=10, layer_norm=True),
    }

    spans = {"policy_starts": "updates"}

    @dataclass(frozen=True)
    class Config(SAC.Config):
        """Reinforcement learning with prior data; the authors' values."""

        subset: int = 2
        """Number of critics in Z, whose minimum is the target; 1 or 2 by task in the paper."""
        policy_every: int = 20
        """Updates of the critics per update of policy and temperature; as many as --updates-per-step by default."""
        policy_starts: int = 0
        """Updates of the critics before the first update of policy and temperature."""
        backup_entropy: bool = True
        """Add the entropy to the targets; off for sparse rewards in the paper."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        super().__init__(models, optimizers, loss, spec, config)
        self.promises = Promises(self.config.policy_every, compiles=("critic_loss", "actor_losses"))
        members = getattr(models["critic"], "members", 1)
        check_rates(self.config, subset=(1, members), policy_every=(1, 1e9), policy_starts=(0, 1e9))
        if self.config.target_entropy is None:
            self.target_entropy = self.target_entropy / 2
        for name in ("policy", "temperature"):
            delay(optimizers, name, self.config.policy_every)

    @staticmethod
    def data(config: Any) -> Window:
        """As soft actor-critic, with a required dataset."""
        return replace(SAC.data(config), needs_dataset=True)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q."""
        data, critic = encoded(self.encoder, random_shift(data, self.config.shift)), self.models["critic"]
        with torch.no_grad():
            action, log_prob = self.models["policy"].sample(data, prefix="next.")  # [B, Da], [B]
            chosen = torch.rand(critic.members, device=log_prob.device).topk(self.config.subset).indices
            action = self.executed(data, action, prefix="next.")
            following = self.models["target_critic"].of(chosen, data, action, prefix="next.").amin(0)  # [B]
            if self.config.backup_entropy:
                following = following - self.models["temperature"]() * log_prob
            y = bootstrapped(data, following, self.config.discount)
        q = critic(data, self.executed(data, data["action"]))  # [E, B]
        loss = 0.5 * len(q) * self.loss(q, y.expand_as(q))
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()} | data_summary(data)

    def executed(self, data: dict[str, Any], action: Tensor, prefix: str = "") -> Tensor:
        """The action whose value the critics learn."""
        return action

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi + J_alpha."""
        with torch.no_grad():
            data = detached(encoded(self.encoder, random_shift(data, self.config.shift)))
        return super().actor_losses(data)

    def together(self, q: Tensor) -> Tensor:
        """The mean of the critics."""
        return q.mean(0)

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses at the same weights, for held-out data."""
        critic_loss, metrics = self.critic_loss(data)
        actor_losses, more = self.actor_losses(data)
        return critic_loss + actor_losses, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(data)
        update(self.optimizers, loss, "critic", "encoder")
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        self.updates += 1
        if self.updates % self.config.policy_every == 0 and self.updates > self.config.policy_starts:
            loss, more = self.actor_losses(data)
            update(self.optimizers, loss, "policy", "temperature")
            metrics |= more
        return metrics
