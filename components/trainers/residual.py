"""A residual policy on top of a frozen imitation policy (Johannink et al., 2019; Silver et al., 2018).

The frozen policy pi_0, from a run folder, is a part of the environment here (`components/residual.py`): the state s
holds its action a_0, and what is executed is clip(a_0 + scale a), a being drawn from the residual policy pi(. | s).
Policy and critics learn by soft actor-critic (`sac.py`) with LayerNorm in the critics and several updates of them for
each of the policy (as in Yuan et al., 2024, "Policy Decorator", arXiv:2412.13630, and Ball et al., 2023).

The residual policy's last layer begins small, so that what acts first is the frozen policy; that one's weights are
copied into the run, and checked when it ends.

Deviations from Policy Decorator: the critics value (s, a), not s and the sum of both actions; there is no schedule by
which corrections set in, but for `learning_starts` steps, at which they are small.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..augmentation import random_shift
from ..models.encoder import detached, encoded
from ..parallel import global_mean
from ..value_learning import ONLINE_RL, frozen, networks
from .rlpd import RLPD


class Residual(RLPD):
    """A residual policy on top of a frozen one, by soft actor-critic."""

    name = "residual"
    needs_data = False
    defaults: dict[str, Any] = ONLINE_RL | {
        "steps": 100_000,
        "learning-starts": 2000,
        "updates-per-step": 2,
        "eval-every": 5000,
        **networks("", final_scale=0.01),
        **networks("critic", members=2, layer_norm=True),
    }

    @dataclass(frozen=True)
    class Config(RLPD.Config):
        """A residual policy on top of a frozen one."""

        penalty: float = 0.5
        """Weight of the squared correction against the values, which are divided by their mean size."""
        base: str = ""
        """Run folder of the policy that is corrected."""
        scale: float = 0.2
        """Largest correction, as a fraction of half the range of an action."""
        policy_every: int = 2
        """Updates of the critics for each of policy and temperature."""
        policy_starts: int = 5000
        """Updates of the critics before the first of policy and temperature."""
        backup_entropy: bool = False
        """Add the entropy to the targets."""

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi + J_alpha, with the values divided by their mean size, and the corrections held small."""
        with torch.no_grad():
            data = detached(encoded(self.encoder, random_shift(data, self.config.shift)))
        action, log_prob = self.models["policy"].sample(data)  # [B, Da], [B]
        q, alpha = self.together(frozen(self.models["critic"], data, action)), self.models["temperature"]()
        size = global_mean(q.abs()).clamp(min=1e-8)
        actor_loss = ((alpha.detach() * log_prob - q) / size).mean() + self.config.penalty * action.square().mean()
        temperature_loss = -alpha * (log_prob.detach().mean() + self.target_entropy)
        metrics = {"actor_loss": actor_loss, "temperature_loss": temperature_loss, "temperature": alpha}
        metrics |= {"entropy": -log_prob.mean(), "correction": action.abs().mean()}
        return actor_loss + temperature_loss, {name: value.detach() for name, value in metrics.items()}

    @staticmethod
    def base(config: Any) -> tuple[str, float]:
        """The policy that is corrected, and by how much at most."""
        return config.base, config.scale
