"""Conservative Q-learning (Kumar et al., 2020, arXiv:2006.04779), and Cal-QL (Nakamoto et al., 2023, arXiv:2303.05479).

Soft actor-critic whose critics are lowered at the policy's actions and raised at the data's. Equation numbers are
CQL's; a~ and a' are drawn from the policy pi, primes mark targets and successors:

    y       = r + gamma (1 - terminated) min_i Q'_i(s', a')
    R_i     = E [log sum_a exp Q_i(s, a) - Q_i(s, a)]                                     eq. 4
    J_Q     = sum_i E (Q_i(s, a) - y)^2 + alpha R_i
    J_pi    = E temperature log pi(a~|s) - min_i Q_i(s, a~)
    J_T     = E -log(temperature) (log pi(a~|s) + H)          H: the target entropy

The sum over actions is estimated from n actions each that are drawn uniformly, from pi(.|s) and, as in the authors'
code, from pi(.|s'), each divided by its density (appendix F). Cal-QL raises the values of pi's actions in that sum to
at least the return of the data (its section 5). All losses use the weights from before the step, so that one backward
pass serves them.

Deviations: the Lagrange variant of alpha is left out; there are no initial steps of behaviour cloning, of which the
authors' code has 40 000; the entropy is not added to the targets, as in their code; layers are initialised by torch's
defaults. The return of a truncated episode is the sum of its rewards, as in Cal-QL's code, whose option for sparse
negative rewards, which repeats the last reward forever, is left out.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..optimizers import update
from ..value_learning import (
    OFFLINE_RL,
    Explorer,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    frozen,
    summary,
)


class CQL:
    """Conservative Q-learning on single transitions or n-step returns, calibrated or not."""

    needs = {"policy": "tanh_gaussian", "critic": "q_ensemble", "temperature": "temperature"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "optimizer.lr-scale": ("policy=0.1", "temperature=0.1"),
        "model.hidden-dims": (256, 256, 256),
        "model.critic.hidden-dims": (256, 256, 256),
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Conservative Q-learning; the paper's values for locomotion (it trains for 1M steps)."""

        alpha: float = 5.0
        """Weight of the conservative term."""
        calibrated: bool = False
        """Cal-QL: do not lower the value of an action below the return of the data from that state."""
        actions: int = 10
        """Actions n drawn from each of the three distributions."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""
        target_entropy: float | None = None
        """Target H of the policy's entropy; None for minus the width of the action."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.optimizers, self.loss, self.config = optimizers, loss, config or self.Config()
        check_rates(self.config, alpha=(0, 1e9), actions=(1, 1e4), n_step=(1, 1e9))
        check_transitions(spec, "cql", more=["return_to_go"] if self.config.calibrated else [])
        check_actions(spec, "cql")
        width, entropy = int(spec["action"]["shape"][-1]), self.config.target_entropy
        self.target_entropy = -float(width) if entropy is None else entropy
        self.uniform_log_prob = -width * math.log(2)  # of an action in [-1, 1]^Da
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps; for Cal-QL with the return to go."""
        return Window(discount=config.discount, n_step=config.n_step, to_go=config.calibrated)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q; one pass of the critics serves the data's actions and all that are drawn."""
        n, policy = self.config.actions, self.models["policy"]
        with torch.no_grad():
            action, _ = policy.sample(data, prefix="next.")  # [B, Da]
            following = self.models["target_critic"](data, action, prefix="next.").amin(0)  # [B]
            y = bootstrapped(data, following, self.config.discount)
            uniform = 2 * torch.rand_like(data["action"][:, None].expand(-1, n, -1)) - 1  # [B, n, Da]
            here, here_log_prob = policy.sample(data, several=n)  # [B, n, Da], [B, n]
            there, there_log_prob = policy.sample(data, prefix="next.", several=n)
            actions = torch.cat([data["action"][:, None], uniform, here, there], dim=1)  # [B, 1 + 3n, Da]
            uniform_log_prob = torch.full_like(here_log_prob, self.uniform_log_prob)
            log_prob = torch.cat([uniform_log_prob, here_log_prob, there_log_prob], dim=1)  # [B, 3n]
        values = self.models["critic"](data, actions, several=True)  # [E, B, 1 + 3n]
        q, drawn = values[:, :, 0], values[:, :, 1:]
        if self.config.calibrated:
            reached = data["return_to_go"][:, None]  # [B, 1]
            drawn = torch.cat([drawn[:, :, :n], torch.maximum(drawn[:, :, n:], reached)], dim=2)
        soft_maximum = torch.logsumexp(drawn - log_prob, dim=2)  # [E, B]
        conservative = (soft_maximum - q).mean(1).sum()
        td_loss = len(q) * self.loss(q, y.expand_as(q))  # the sum over critics
        loss = td_loss + self.config.alpha * conservative
        metrics = {"critic_loss": td_loss, "conservative_loss": conservative, "q_policy": values[:, :, n + 1 :].mean()}
        return loss, {k: v.detach() for k, v in metrics.items()} | summary("q", q) | data_summary(data)

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi + J_T, without gradient for the critics, nor from J_pi for the temperature."""
        action, log_prob = self.models["policy"].sample(data)  # [B, Da], [B]
        q = frozen(self.models["critic"], data, action).amin(0)  # [B]
        temperature = self.models["temperature"]()
        actor_loss = (temperature.detach() * log_prob - q).mean()
        temperature_loss = -temperature.log() * (log_prob.detach().mean() + self.target_entropy)
        metrics = {"actor_loss": actor_loss, "temperature_loss": temperature_loss, "temperature": temperature}
        metrics = {name: value.detach() for name, value in metrics.items()} | {"entropy": -log_prob.detach().mean()}
        return actor_loss + temperature_loss, metrics

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses, which train different networks, and the metrics."""
        critic_loss, metrics = self.critic_loss(data)
        actor_losses, more = self.actor_losses(data)
        return critic_loss + actor_losses, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics

    def explorer(self) -> nn.Module:
        """The collecting policy, which samples from the policy."""
        return Explorer(self.models["policy"])
