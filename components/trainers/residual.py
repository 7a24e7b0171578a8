"""A residual policy on top of a frozen imitation policy (Johannink et al., 2019; Silver et al., 2018).

The frozen policy pi_0, from a run folder, is a part of the environment here (`experience/frozen_base.py`): the state s
contains its action a_0. The residual policy pi(. | s) draws a, and the sum u of both is executed. Policy and critics
learn by soft actor-critic (`sac.py`) with LayerNorm in the critics and several updates of them per update of the policy
(as in Yuan et al., 2024, "Policy Decorator", arXiv:2412.13630, and Ball et al., 2023). As there and in ResFit (Ankile
et al., 2025, arXiv:2509.19301), the critics evaluate u, so that whole demonstrations serve them, whatever their size:

    u    = clip(a_0 + scale a, -1, 1)
    y    = r + gamma (1 - terminated) min_{i in Z} Q'_i(s', u')                       Z: a random pair of the critics
    J_Q  = sum_i E 1/2 (Q_i(s, u) - y)^2
    J_pi = E (alpha log pi(a|s) - min_i Q_i(s, u)) / mean |min_i Q_i| + w mean a^2

A small correction changes the values by less than the critics' errors. Five measures keep the policy from exploiting
these errors: its last layer is initialised with small weights, so that it starts as the frozen policy; the critics are
trained for a while before it; it maximises the minimum of many critics; the weight w of the correction's penalty falls
during training, so that the policy leaves the critics' data gradually; and there are several environment steps for each
update, since critics learn from further episodes what a correction does, and not from further updates on the same. The
evaluated policy has averaged weights (`--ema-decay`). The run copies the frozen weights, and compares them at its end.

Deviations from Policy Decorator: the critics also observe a_0; the falling weight w replaces a schedule that executes
corrections with a growing probability. From ResFit: soft actor-critic instead of TD3, the minimum of all critics for
the policy instead of their mean, and a quarter of an update per environment step where they have four.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Place
from ..data.augmentation import random_shift
from ..data.features import BASE_ACTION
from ..models.encoder import detached, encoded
from ..parallel import global_mean
from ..value_learning import ONLINE_RL, check_rates, frozen, networks
from .rlpd import RLPD
from .sac import SAC


class Residual(RLPD):
    """A residual policy on top of a frozen one, by soft actor-critic."""

    name = "residual"
    defaults: dict[str, Any] = ONLINE_RL | {
        "steps": 100_000,
        "online.num-envs": 8,
        "online.learning-starts": 8000,
        "online.updates-per-step": 0.25,
        "online.normalise-observations": True,
        "ema-decay": 0.999,
        "eval-every": 25_000,
        **networks("", final_scale=0.01),
        **networks("critic", members=5, layer_norm=True),
        **networks("temperature", initial=0.02),
    }

    spans = RLPD.spans | {"penalty_updates": "updates"}

    @dataclass(frozen=True)
    class Config(RLPD.Config):
        """A residual policy on top of a frozen one."""

        penalty: float = 0.1
        """Initial weight of the squared correction against the values, which are divided by their mean size."""
        penalty_end: float = 0.07
        """Final weight. Below it, the policy follows its critics' errors on the tables' task."""
        penalty_updates: int = 20_000
        """Updates of the critics over which the weight falls, by a constant factor per update."""
        base: Annotated[str, Place()] = ""
        """Run folder of the policy that is corrected."""
        scale: float = 0.3
        """Largest correction, as a fraction of half the range of an action."""
        discount: float = 0.98
        """Discount factor gamma per environment step."""
        n_step: int = 5
        """Rewards that are summed before bootstrapping."""
        policy_every: int = 2
        """Updates of the critics per update of policy and temperature."""
        policy_starts: int = 5000
        """Updates of the critics before the first update of policy and temperature."""
        backup_entropy: bool = False
        """Add the entropy to the targets."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        super().__init__(models, optimizers, loss, spec, config)
        self.promises = replace(self.promises, repeats_after=None)  # the weight of the correction changes in Python
        device = next((p.device for p in models.parameters()), torch.device("cpu"))
        self.weight = torch.tensor(self.config.penalty, device=device)
        bounds = {"penalty": (1e-9, 1e9), "penalty_end": (1e-9, 1e9), "penalty_updates": (1, 1e9)}
        check_rates(self.config, **bounds)

    def executed(self, data: dict[str, Any], correction: Tensor, prefix: str = "") -> Tensor:
        """u `[B, Da]`, whose gradient is that of the sum: with that of the clipping, none could leave a bound."""
        total = data[prefix + BASE_ACTION] + self.config.scale * correction
        return total + (total.clamp(-1, 1) - total).detach()

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi + J_alpha."""
        with torch.no_grad():
            data = detached(encoded(self.encoder, random_shift(data, self.config.shift)))
        action, log_prob = self.models["policy"].sample(data)  # [B, Da], [B]
        q = self.together(frozen(self.models["critic"], data, self.executed(data, action)))  # [B]
        alpha = self.models["temperature"]()
        size = global_mean(q.abs()).clamp(min=1e-8)
        actor_loss = ((alpha.detach() * log_prob - q) / size).mean() + self.weight * action.square().mean()
        temperature_loss = -alpha * (log_prob.detach().mean() + self.target_entropy)
        metrics = {"actor_loss": actor_loss, "temperature_loss": temperature_loss, "temperature": alpha}
        metrics |= {"entropy": -log_prob.mean(), "correction": action.abs().mean()}
        return actor_loss + temperature_loss, {name: value.detach() for name, value in metrics.items()}

    together = SAC.together
    data = staticmethod(SAC.data)  # a dataset is optional

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        first, last = self.config.penalty, self.config.penalty_end
        self.weight.fill_(first * (last / first) ** min(self.updates / self.config.penalty_updates, 1.0))
        return super().train_step(data)

    @staticmethod
    def base(config: Any) -> tuple[str, float]:
        """The run folder of the policy that is corrected, and the scale of the correction."""
        return config.base, config.scale
