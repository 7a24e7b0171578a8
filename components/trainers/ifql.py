"""Implicit flow Q-learning: IQL's values, and the best of several actions of a flow policy (Park et al., 2025).

The flow variant of IDQL (Hansen-Estruch et al., 2023, arXiv:2304.10573), as FQL's paper compares with it
(arXiv:2502.02538, section 5.1, eq. 11, and appendix E.2). L_tau is the expectile loss, Q'_i are targets, x_t = (1 - t)
z + t a with z ~ N(0, 1):

    J_V    = E L_tau(min_i Q'_i(s, a) - V(s))
    J_Q    = sum_i E (r + gamma (1 - terminated) V(s') - Q_i(s, a))^2
    J_flow = E |v(x_t, t, s) - (a - z)|^2
    pi(s)  = argmax over N actions a_k of the flow of min_i Q_i(s, a_k)

All losses use the weights from before the step, so that one backward pass serves them. Online, pi itself collects: its
noise is the exploration. The offline data keeps the share of --dataset.ratio (see `fql.py`).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..models.checks import check_chunks
from ..optimizers import update
from ..value_learning import (
    OFFLINE_RL,
    WIDE,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    expectile_loss,
    follow,
    networks,
    summary,
)
from .flow import FlowSampler
from .fql import velocities
from .iql import IQL


class IFQL:
    """Implicit flow Q-learning on single transitions or n-step returns."""

    needs = {"policy": "vector_field", "critic": "q_ensemble", "value": "v_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        **networks("critic", "value", **WIDE),
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Implicit flow Q-learning; the paper's values (it trains for 1M steps)."""

        expectile: float = 0.9
        """Expectile tau of the value function; nearer to 1 is nearer to the best action of the data."""
        candidates: int = 32
        """Candidate actions N, of which the best is executed."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""
        flow_steps: int = 10
        """Euler steps of the flow policy."""

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
        bounds = {"expectile": (0, 1), "candidates": (1, 1e4), "flow_steps": (1, 1e4), "n_step": (1, 1e9)}
        check_rates(self.config, **bounds)
        check_chunks(models, loss, "denoises")
        check_transitions(spec, "ifql")
        check_actions(spec, "ifql")
        self.action_shape = tuple(spec["action"]["shape"])
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps."""
        return Window(discount=config.discount, n_step=config.n_step)

    def value_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_V."""
        with torch.no_grad():
            q = self.models["target_critic"](data, data["action"]).amin(0)  # [B]
        v = self.models["value"](data).squeeze(0)  # [B]
        loss = expectile_loss(q - v, self.config.expectile)
        return loss, {"value_loss": loss.detach()} | summary("v", v) | summary("advantage", q - v)

    critic_loss: Any = IQL.critic_loss  # J_Q

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the three losses, which train different networks, and the metrics."""
        value_loss, metrics = self.value_loss(data)
        critic_loss, more = self.critic_loss(data)
        flow_loss = self.loss(*velocities(self.models["policy"], data))
        metrics |= more | {"flow_loss": flow_loss.detach()} | data_summary(data)
        return value_loss + critic_loss + flow_loss, metrics

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics

    def policy(self) -> nn.Module:
        """The best of several actions."""
        networks = (self.models["policy"], self.models["critic"])
        return BestOfN(*networks, self.action_shape, self.config.candidates, self.config.flow_steps)


class BestOfN(nn.Module):
    """Observations and noise -> the best by the critics of N actions or chunks of a flow, clipped to [-1, 1].

    Args:
        flow: The velocity field.
        critic: Ensemble of Q-functions.
        shape: Of one action or chunk.
        candidates: Number N of actions or chunks.
        flow_steps: Euler steps of the flow.
        aggregate: Aggregation of the critics' values, "min" or "mean".
    """

    def __init__(
        self,
        flow: nn.Module,
        critic: nn.Module,
        shape: tuple[int, ...],
        candidates: int,
        flow_steps: int,
        aggregate: str = "min",
    ) -> None:
        super().__init__()
        self.flow, self.critic, self.aggregate = flow, critic, aggregate
        self.noise_shape = (candidates, *shape)
        self.flow_steps = flow_steps

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        noise = batch["noise"]  # [B, N, (Ta,) Da]
        several, shape = noise.shape[1], tuple(noise.shape[2:])
        observation = {key: value for key, value in batch.items() if key.startswith("observation.")}
        repeated = {k: v[:, None].expand(-1, several, *v.shape[1:]).flatten(0, 1) for k, v in observation.items()}
        sampler = FlowSampler(nn.Identity(), self.flow, shape)
        sampler.sampling_steps = self.flow_steps
        action = sampler({**repeated, "noise": noise.flatten(0, 1)}).unflatten(0, (-1, several)).clamp(-1, 1)
        q = self.critic(batch, action, several=True)  # [E, B, N]
        best = (q.amin(0) if self.aggregate == "min" else q.mean(0)).argmax(1)  # [B]
        return action.gather(1, best.view(-1, *[1] * (noise.ndim - 1)).expand(-1, 1, *shape)).squeeze(1)
