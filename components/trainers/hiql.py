"""Hierarchical implicit Q-learning (Park et al., 2023, arXiv:2307.11949), with what OGBench (arXiv:2410.20092) changes.

A high-level policy chooses, every step, a subgoal k steps ahead on the way to g, in a learned representation phi; a
low-level policy acts towards it. The reward is -1 a step and 0 where s is g, which ends the task. V_1, V_2 are values
V_i(s, phi(s, g)), V' their targets; equation numbers are the first paper's, L_tau(u; A) = |tau - 1(A < 0)| u^2:

    A      = r + gamma (1 - terminated) min_i V'_i(s', g) - mean_i V'_i(s, g)
    J_V    = sum_i E L_tau(r + gamma (1 - terminated) V'_i(s', g) - V_i(s, g); A)                 eq. 4
    J_low  = -E exp(alpha (V(s', w) - V(s, w))) log pi_low(a | s, phi(s, w))                       eq. 7
    J_high = -E exp(alpha (V(w, g) - V(s, g))) log pi_high(phi(s, w) | s, g)                      eq. 6

w is the state k steps later, V the mean of V_1 and V_2. Both policies are Gaussians of unit variance; at inference they
return their means. phi has the length sqrt(its width), and the high-level policy's subgoal is scaled to that length for
the low-level one. Only J_V trains phi. All losses use the weights from before the step, so that one backward pass
serves them.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from ..contracts import GOAL, STATE, Goals, GoalSampling, Promises
from ..optimizers import update
from ..value_learning import (
    GOAL_VALUE,
    OFFLINE_RL,
    advantage_weight,
    bootstrapped,
    check_rates,
    data_summary,
    expectile_loss,
    follow,
    networks,
    summary,
)
from .gcbc import GOAL_ACTOR


class HIQL:
    """Hierarchical implicit Q-learning."""

    needs = {"policy": "actor", "high": "actor", "value": "v_ensemble", "representation": "actor"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "dataset": "ogbench",
        **networks("", "high", **GOAL_ACTOR),
        **networks("value", "representation", **GOAL_VALUE),
        "model.value.members": 2,
        "model.representation.squash": "none",
        "batch-size": 1024,
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Hierarchical implicit Q-learning; OGBench's values (it trains for 1M steps)."""

        expectile: float = 0.7
        """Expectile tau of the value function."""
        low_alpha: float = 3.0
        """Inverse temperature of the low-level policy's weights."""
        high_alpha: float = 3.0
        """Inverse temperature of the high-level policy's weights."""
        subgoal_steps: int = 25
        """Steps k to the subgoal."""
        representation: int = 10
        """Width of phi."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        target_rate: float = 0.005
        """Fraction of the value functions mixed into their targets after each update (tau)."""
        value_goals: tuple[float, float, float] = (0.2, 0.5, 0.3)
        """Shares of the value functions' goals that are the current state, a later one of the episode, any state."""
        value_geometric: bool = True
        """Draw the distance of later states geometrically, not uniformly."""
        actor_goals: tuple[float, float, float] = (0.0, 1.0, 0.0)
        """The same shares of the high-level policy's goals."""
        actor_geometric: bool = False
        """The same for the high-level policy's goals."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.optimizers, self.loss, self.config = optimizers, loss, config or self.Config()
        bounds = {"expectile": (0, 1), "low_alpha": (0, 1e9), "high_alpha": (0, 1e9)}
        check_rates(self.config, subgoal_steps=(1, 1e9), representation=(1, 1e6), **bounds)
        models["target_value"] = copy.deepcopy(models["value"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Goals:
        """Transitions with goals and subgoals."""
        return Goals(
            actor=GoalSampling(config.actor_goals, config.actor_geometric),
            value=GoalSampling(config.value_goals, config.value_geometric),
            discount=config.discount,
            subgoal_steps=config.subgoal_steps,
        )

    @staticmethod
    def model_spec(model: str, spec: dict[str, Any], config: Any) -> dict[str, Any]:
        """Value functions and low-level policy have phi as their goal; the other two models output it as an action."""
        phi = {"shape": (config.representation,), "dtype": "float32"}
        return spec | ({GOAL: phi} if model in ("policy", "value") else {"action": phi})

    def phi(self, state: Tensor, goal: Tensor) -> Tensor:
        """phi(s, g) `[B, width]`."""
        return to_length(self.models["representation"]({STATE: state, GOAL: goal}))

    def value_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_V, which also trains phi."""
        goal, state, then = data["value_goal"], data[STATE], data[f"next.{STATE}"]
        phi = self.phi(state, goal)
        v = self.models["value"]({STATE: state, GOAL: phi})  # [2, B]
        with torch.no_grad():
            following = self.models["target_value"]({STATE: then, GOAL: self.phi(then, goal)})  # [2, B]
            now = self.models["target_value"]({STATE: state, GOAL: phi}).mean(0)  # [B]
            advantage = bootstrapped(data, following.amin(0), self.config.discount) - now  # [B]
            y = bootstrapped(data, following, self.config.discount)  # [2, B]
        loss = len(v) * expectile_loss(y - v, self.config.expectile, advantage.expand_as(v))  # the sum over values
        return loss, {"value_loss": loss.detach()} | summary("v", v) | data_summary(data)

    @torch.no_grad()
    def advantage(self, state: Tensor, then: Tensor, goal: Tensor) -> Tensor:
        """V(then, g) - V(s, g) `[B]`."""
        both = torch.cat([state, then])
        twice = torch.cat([goal, goal])
        now, later = self.models["value"]({STATE: both, GOAL: self.phi(both, twice)}).mean(0).chunk(2)
        return later - now

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_low + J_high, without gradient for the value functions and phi."""
        state, low, high = data[STATE], self.models["policy"], self.models["high"]
        advantage = self.advantage(state, data[f"next.{STATE}"], data["subgoal"])
        weight = advantage_weight(advantage, self.config.low_alpha)
        with torch.no_grad():
            subgoal, target = self.phi(state, data["subgoal"]), self.phi(state, data["high_target"])
        log_prob = low.log_prob(low({STATE: state, GOAL: subgoal}), data["action"])
        low_loss = -(weight * log_prob).mean()
        high_advantage = self.advantage(state, data["high_target"], data[GOAL])
        high_weight = advantage_weight(high_advantage, self.config.high_alpha)
        high_loss = -(high_weight * high.log_prob(high(data), target)).mean()
        metrics = {"low_loss": low_loss.detach(), "high_loss": high_loss.detach()}
        metrics |= summary("advantage", advantage) | summary("weight", weight)
        metrics |= summary("high_advantage", high_advantage) | summary("high_weight", high_weight)
        return low_loss + high_loss, metrics

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses, which train different networks, and the metrics."""
        value_loss, metrics = self.value_loss(data)
        actor_losses, more = self.actor_losses(data)
        return value_loss + actor_losses, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_value"], self.models["value"], self.config.target_rate)
        return metrics

    def policy(self) -> nn.Module:
        """The low-level policy with the subgoal of the high-level one."""
        return Hierarchy(self.models["high"], self.models["policy"])


def to_length(x: Tensor) -> Tensor:
    """Scale the rows of `[B, D]` to length sqrt(D)."""
    return functional.normalize(x, dim=1) * x.shape[1] ** 0.5


class Hierarchy(nn.Module):
    """State and goal -> action `[B, Da]`, clipped to [-1, 1]."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high, self.low = high, low

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.low({STATE: batch[STATE], GOAL: to_length(self.high(batch))}).clamp(-1, 1)
