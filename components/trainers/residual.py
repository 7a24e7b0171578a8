"""A residual policy on top of a frozen imitation policy (Johannink et al., 2019; Silver et al., 2018).

The frozen policy pi_0, from a run folder, is a part of the environment here (`experience/frozen_base.py`): the state s
holds its action a_0, and what is executed is clip(a_0 + scale a), a being drawn from the residual policy pi(. | s).
Policy and critics learn by soft actor-critic (`sac.py`) with LayerNorm in the critics and several updates of them for
each of the policy (as in Yuan et al., 2024, "Policy Decorator", arXiv:2412.13630, and Ball et al., 2023).

    J_pi = E (alpha log pi(a|s) - min_i Q_i(s, a)) / mean |min_i Q_i| + w mean a^2

A small correction changes the values by less than the critics err, so four things keep the policy from following their
errors: it starts as the frozen policy, since its last layer begins small; the critics learn for a while before it does;
it takes the least of many critics, whose horizon is short (discount 0.95); and the weight w of the correction falls
from step to step, so that the policy leaves what the critics know no faster than they come to know it. What is
evaluated is an average of its weights (`--ema-decay`). The frozen weights are copied into the run, and compared when it
ends.

Deviations from Policy Decorator: the critics value (s, a), not s and the sum of both actions; the falling weight w
stands in the place of a schedule by which corrections are executed with a growing probability.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.augmentation import random_shift
from ..models.encoder import detached, encoded
from ..parallel import global_mean
from ..value_learning import ONLINE_RL, check_rates, frozen, networks
from .rlpd import RLPD
from .sac import SAC


class Residual(RLPD):
    """A residual policy on top of a frozen one, by soft actor-critic."""

    name = "residual"
    needs_data = False
    defaults: dict[str, Any] = ONLINE_RL | {
        "steps": 100_000,
        "learning-starts": 2000,
        "normalise-observations": True,
        "ema-decay": 0.999,
        "eval-every": 10_000,
        **networks("", final_scale=0.01),
        **networks("critic", members=5, layer_norm=True),
        **networks("temperature", initial=0.02),
    }

    @dataclass(frozen=True)
    class Config(RLPD.Config):
        """A residual policy on top of a frozen one."""

        penalty: float = 0.1
        """Weight of the squared correction, at first, against the values, which are divided by their mean size."""
        penalty_end: float = 0.04
        """That weight in the end; with the default scale, what TD3+BC gives to the distance from its data."""
        penalty_updates: int = 20_000
        """Updates of the critics over which it falls, by the same factor each."""
        base: str = ""
        """Run folder of the policy that is corrected."""
        scale: float = 0.3
        """Largest correction, as a fraction of half the range of an action."""
        discount: float = 0.95
        """Discount factor gamma per environment step."""
        n_step: int = 3
        """Rewards that are summed before bootstrapping."""
        policy_every: int = 2
        """Updates of the critics for each of policy and temperature."""
        policy_starts: int = 5000
        """Updates of the critics before the first of policy and temperature."""
        backup_entropy: bool = False
        """Add the entropy to the targets."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        super().__init__(models, optimizers, loss, spec, config)
        del self.cycle  # the weight of the correction changes in Python
        device = next((p.device for p in models.parameters()), torch.device("cpu"))
        self.weight = torch.tensor(self.config.penalty, device=device)
        bounds = {"penalty": (1e-9, 1e9), "penalty_end": (1e-9, 1e9), "penalty_updates": (1, 1e9)}
        check_rates(self.config, **bounds)

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi + J_alpha."""
        with torch.no_grad():
            data = detached(encoded(self.encoder, random_shift(data, self.config.shift)))
        action, log_prob = self.models["policy"].sample(data)  # [B, Da], [B]
        q, alpha = self.together(frozen(self.models["critic"], data, action)), self.models["temperature"]()
        size = global_mean(q.abs()).clamp(min=1e-8)
        actor_loss = ((alpha.detach() * log_prob - q) / size).mean() + self.weight * action.square().mean()
        temperature_loss = -alpha * (log_prob.detach().mean() + self.target_entropy)
        metrics = {"actor_loss": actor_loss, "temperature_loss": temperature_loss, "temperature": alpha}
        metrics |= {"entropy": -log_prob.mean(), "correction": action.abs().mean()}
        return actor_loss + temperature_loss, {name: value.detach() for name, value in metrics.items()}

    together = SAC.together

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        first, last = self.config.penalty, self.config.penalty_end
        self.weight.fill_(first * (last / first) ** min(self.updates / self.config.penalty_updates, 1.0))
        return super().train_step(data)

    @staticmethod
    def base(config: Any) -> tuple[str, float]:
        """The policy that is corrected, and by how much at most."""
        return config.base, config.scale
