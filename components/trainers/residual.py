"""A residual policy on top of a frozen imitation policy (Ankile et al., 2025, "ResFit", arXiv:2509.19301).

The frozen policy pi_0, from a run folder, is a part of the environment here (`experience/frozen_base.py`): the state s
contains its action a_0, and the sum u of both, within the bounds, is executed. Policy and critics learn by TD3
(`td3.py`). Primes mark targets and successors, Z is a random pair of the critics, drawn at each update:

    u(s) = clip(a_0 + scale pi(s), -1, 1)
    y    = r + gamma (1 - terminated) min_{i in Z} Q'_i(s', clip(u'(s') + clip(eps, -c, c), -1, 1))
    J_Q  = sum_i E 1/2 (Q_i(s, u) - y)^2
    J_pi = -E mean_i Q_i(s, u(s)) / E |mean_i Q_i| + w E pi(s)^2

The critics do not observe a_0, so that what demonstrations tell about an action holds whatever the frozen policy does.
A policy that follows critics faster than they learn loses what it began with. So the frozen policy collects the first
transitions, with noise, the critics learn alone for a while, and the policy learns at a small part of their rate. Its
last layer is initialised with small weights: it starts as the frozen policy. The evaluated policy has averaged weights
(`--ema-decay`). The run copies the frozen weights, and compares them at its end.

Deviations: values are divided by their mean size, against which the authors' penalty is weighted (0 by default there);
clipping u keeps the gradient, without which a policy at the bound could not leave it.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Place
from ..data.augmentation import random_shift
from ..data.features import BASE_ACTION
from ..models.encoder import EncodedPolicy, detached, encoded, encoder_of
from ..optimizers import update
from ..parallel import global_mean
from ..value_learning import (
    ONLINE_RL,
    GaussianNoise,
    bootstrapped,
    check_rates,
    data_summary,
    follow,
    frozen,
    networks,
    summary,
)
from .td3 import TD3


class Residual(TD3):
    """A residual policy on top of a frozen one, by TD3 with many critics."""

    name = "residual"
    needs = TD3.needs | {"encoder": "cnn"}
    defaults: dict[str, Any] = ONLINE_RL | {
        "steps": 30_000,
        "batch-size": 128,
        "optimizer.lr-scale": ("policy=0.1",),
        "online.learning-starts": 3000,
        "online.updates-per-step": 4,
        "online.normalise-observations": True,
        "dataset.validation": 0.0,
        "ema-decay": 0.999,
        "eval-every": 5000,
        **networks("", final_scale=0.01),
        **networks("critic", members=5, layer_norm=True),
    }

    spans = {"policy_starts": "updates"}

    @dataclass(frozen=True)
    class Config(TD3.Config):
        """A residual policy on top of a frozen one."""

        base: Annotated[str, Place()] = ""
        """Run folder of the policy that is corrected."""
        scale: float = 0.5
        """Largest correction, as a fraction of half the range of an action."""
        penalty: float = 0.02
        """Weight w of the squared correction."""
        n_step: int = 3
        """Rewards that are summed before bootstrapping."""
        subset: int = 2
        """Number of critics in Z, whose minimum is the target."""
        policy_noise: float = 0.1
        """Deviation of eps, the noise on the target policy's actions."""
        noise_clip: float = 0.3
        """Largest size c of that noise."""
        policy_starts: int = 15_000
        """Updates of the critics before the first update of the policy."""
        exploration_noise: float = 0.2
        """Deviation of the noise on executed actions while data is collected, as a fraction of half their range."""
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
        super().__init__(models, optimizers, loss, spec, config)
        self.encoder = encoder_of(models)
        members = getattr(models["critic"], "members", 1)
        bounds = {"penalty": (0, 1e9), "subset": (1, members), "policy_starts": (0, 1e9), "shift": (0, 1e3)}
        check_rates(self.config, scale=(1e-9, 2), **bounds)
        if self.config.policy_starts:
            self.promises = replace(self.promises, repeats_after=None)  # the first updates differ from the others

    @staticmethod
    def model_spec(model: str, spec: dict[str, Any], config: Any) -> dict[str, Any]:
        """The critics are built for observations without the frozen policy's action."""
        return {key: feature for key, feature in spec.items() if model != "critic" or not key.endswith(BASE_ACTION)}

    def executed(self, data: dict[str, Any], correction: Tensor, prefix: str = "") -> Tensor:
        """u `[B, Da]`, whose gradient is that of the sum."""
        total = data[prefix + BASE_ACTION] + self.config.scale * correction
        return total + (total.clamp(-1, 1) - total).detach()

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q."""
        data, critic = encoded(self.encoder, random_shift(data, self.config.shift)), self.models["critic"]
        with torch.no_grad():
            noise = self.config.policy_noise * torch.randn_like(data["action"])
            noise = noise.clamp(-self.config.noise_clip, self.config.noise_clip)
            action = self.executed(data, self.models["target_policy"](data, prefix="next."), prefix="next.")  # [B, Da]
            chosen = torch.rand(critic.members, device=action.device).topk(self.config.subset).indices
            following = self.models["target_critic"].of(chosen, data, (action + noise).clamp(-1, 1), prefix="next.")
            y = bootstrapped(data, following.amin(0), self.config.discount)  # [B]
        q = critic(data, self.executed(data, data["action"]))  # [E, B]
        loss = 0.5 * len(q) * self.loss(q, y.expand_as(q))
        return loss, {"critic_loss": loss.detach()} | summary("q", q) | data_summary(data)

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi, without gradient for the critics."""
        with torch.no_grad():
            data = detached(encoded(self.encoder, random_shift(data, self.config.shift)))
        correction = self.models["policy"](data)  # [B, Da]
        q = frozen(self.models["critic"], data, self.executed(data, correction)).mean(0)  # [B]
        size = global_mean(q.abs()).clamp(min=1e-8)
        loss = -(q / size).mean() + self.config.penalty * correction.square().mean()
        return loss, {"actor_loss": loss.detach(), "correction": correction.detach().abs().mean()}

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(data)
        update(self.optimizers, loss, "critic", "encoder")
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        self.updates += 1
        if self.updates % self.config.policy_every == 0 and self.updates > self.config.policy_starts:
            loss, more = self.actor_loss(data)
            update(self.optimizers, loss, "policy")
            follow(self.models["target_policy"], self.models["policy"], self.config.target_rate)
            metrics |= more
        return metrics

    def policy(self) -> nn.Module:
        """The evaluated policy."""
        return EncodedPolicy(self.encoder, self.models["policy"])

    def explorer(self) -> nn.Module:
        """The collecting policy: the policy with noise."""
        deviation = self.config.exploration_noise / self.config.scale
        explorer: Any = GaussianNoise(self.models["policy"], deviation, self.encoder)
        explorer.random_until = 0  # no random actions first: what the frozen policy does, with noise, is worth more
        return explorer

    @staticmethod
    def base(config: Any) -> tuple[str, float]:
        """The run folder of the policy that is corrected, and the scale of the correction."""
        return config.base, config.scale
