"""TD3+BC: twin delayed deterministic policy gradient with behaviour cloning (Fujimoto & Gu, 2021, arXiv:2106.06860).

Equation numbers are the paper's; critics, targets and delays are TD3's (`td3.py`), the policy's loss is

    J_pi = E [-lambda Q_1(s, pi(s)) + (pi(s) - a)^2]                             eq. 3
    lambda = alpha / mean |Q_1|                                                  eq. 5

Squares of actions are means over their dimensions, as in the authors' code. States are normalised to mean 0 and
deviation 1 (eq. 4).

Deviations: the mean in lambda is over Q_1(s, pi(s)), as in the authors' code, where eq. 5 has the data's actions; a
constant state feature keeps its scale, where eq. 4 adds 0.001 to every deviation.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..parallel import global_mean
from ..value_learning import OFFLINE_RL, check_rates, frozen
from .td3 import TD3


class TD3BC(TD3):
    """TD3+BC on single transitions or n-step returns."""

    name = "td3_bc"
    defaults: dict[str, Any] = OFFLINE_RL | {"offline.normalise": ("action=scale",)}

    @dataclass(frozen=True)
    class Config(TD3.Config):
        """TD3+BC; the paper's values (it trains for 1M steps)."""

        alpha: float = 2.5
        """Weight of the Q-function against behaviour cloning."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        super().__init__(models, optimizers, loss, spec, config)
        check_rates(self.config, alpha=(0, 1e9))

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi, without gradient for the critic."""
        action = self.models["policy"](data)  # [B, Da]
        q = frozen(self.models["critic"], data, action, first=1)  # [1, B]
        lambda_ = self.config.alpha / global_mean(q.abs()).clamp(min=1e-8)
        bc_loss = self.loss(action, data["action"])
        loss = -lambda_ * q.mean() + bc_loss
        return loss, {"actor_loss": loss.detach(), "bc_loss": bc_loss.detach(), "lambda": lambda_}
