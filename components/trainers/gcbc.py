"""Goal-conditioned behaviour cloning (Lynch et al., 2019; Ghosh et al., 2021), as in OGBench (arXiv:2410.20092).

min_theta  E_(s, a, g)  -log pi_theta(a | s, g),    g a later state of the same episode

pi is a Gaussian of unit variance, so this is regression; the action at inference is its mean.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Goals, GoalSampling, Promises
from ..optimizers import update
from ..value_learning import OFFLINE_RL, check_rates, networks

# Network of all goal-conditioned policies; the initial variance of its last layer is scaled by a hundredth.
GOAL_ACTOR: dict[str, Any] = {"hidden_dims": (512, 512, 512), "activation": "gelu", "init": "glorot"}
GOAL_ACTOR |= {"squash": "none", "final_scale": 0.1}


class GCBC:
    """Goal-conditioned behaviour cloning."""

    needs = {"policy": "actor"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "dataset": "ogbench",
        **networks("", **GOAL_ACTOR),
        "batch-size": 1024,
    }

    accumulates = True
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Goal-conditioned behaviour cloning; OGBench's values (it trains for 1M steps)."""

        actor_goals: tuple[float, float, float] = (0.0, 1.0, 0.0)
        """Shares of the policy's goals that are the current state, a later one of the episode, any state."""
        actor_geometric: bool = False
        """Draw the distance of later states geometrically, not uniformly."""
        discount: float = 0.99
        """Parameter of the geometric distance."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.optimizers, self.loss, self.config = optimizers, loss, config or self.Config()
        check_rates(self.config)

    @staticmethod
    def data(config: Any) -> Goals:
        """Transitions with goals."""
        return Goals(
            actor=GoalSampling(config.actor_goals, config.actor_geometric),
            discount=config.discount,
        )

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative log-likelihood, and the metrics."""
        policy = self.models["policy"]
        action = policy(data)  # [B, Da]
        loss = -policy.log_prob(action, data["action"]).mean()
        return loss, {"actor_loss": loss.detach(), "mse": self.loss(action, data["action"]).detach()}

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics
