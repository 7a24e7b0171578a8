"""Q-chunking: reinforcement learning over chunks of actions (Li, Zhou & Levine, 2025, arXiv:2507.07969).

A chunk of h actions is executed as a whole, so the critic may sum the h rewards of the data without the bias of an
n-step return. A is the chunk a_t ... a_{t+h-1}, primes mark targets and the chunk after it, z is noise from N(0, 1).
Equation numbers are the paper's, of QC and of QC-FQL:

    y      = sum_{i < h} gamma^i r_{t+i} + gamma^h (1 - terminated) mean_i Q'_i(s_{t+h}, A')
    J_Q    = sum_i E (Q_i(s_t, A) - y)^2                                             eq. 11, 15
    J_flow = E |v(x_t, t, s) - (A - z)|^2

With --trainer.method fql (QC-FQL), A' and the executed chunks come from a one-step policy with FQL's losses, J_pi =
alpha J_distill - E mean_i Q_i(s, pi(s, z)) (eq. 13); with best_of_n (QC), they are the best of N chunks of the flow by
the critics' mean.

When an episode ends inside a chunk, a terminated step ends the sum, without bootstrapping. If truncation or the end of
the data cuts the chunk, the critic does not learn from it, as in the authors' code; nor does the flow from padding.
Deviation: the authors' code leaves out a chunk with a terminated step if the data ends there, and otherwise (OGBench)
also sums the rewards that were recorded after the success.

Online, the policy itself collects, a chunk to its end or the episode's; the critic learns from chunks that
begin anywhere, as offline. The offline data keeps the share of --dataset.ratio (see `fql.py`).
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..losses import zero_padding
from ..models.checks import check_chunks
from ..optimizers import update
from ..value_learning import (
    OFFLINE_RL,
    WIDE,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    frozen,
    networks,
    successors,
    summary,
)
from .flow import FlowSampler
from .fql import OneStep, distilled, one_step, velocities
from .ifql import BestOfN


class QC:
    """Q-chunking with FQL or with the best of N chunks."""

    needs = {"policy": "vector_field", "flow": "vector_field", "critic": "q_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "model.time": False,
        **networks("critic", **WIDE),
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Q-chunking; the paper's values (it trains for 1M steps)."""

        method: Literal["fql", "best_of_n"] = "fql"
        """Choice of chunks: by a one-step policy, or as the best of several chunks of the flow."""
        chunk: int = 5
        """Actions h of a chunk."""
        alpha: float = 100.0
        """Weight of the distillation against the Q-function, for the method fql; 100 to 10000 by task in the paper."""
        candidates: int = 32
        """Candidate chunks N, of which the best is executed, for the method best_of_n."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""
        flow_steps: int = 10
        """Euler steps of the flow."""

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
        bounds = {"chunk": (2, 1e4), "alpha": (0, 1e9), "candidates": (1, 1e4), "flow_steps": (1, 1e4)}
        check_rates(self.config, **bounds)
        check_chunks(models, loss, "denoises")
        check_transitions(spec, "qc", more=["complete"])
        check_actions(spec, "qc")
        shape = tuple(spec["action"]["shape"])
        self.flow = FlowSampler(nn.Identity(), models["flow"], shape)
        self.flow.sampling_steps = self.config.flow_steps
        self.best = BestOfN(
            models["flow"], models["critic"], shape, self.config.candidates, self.config.flow_steps, "mean"
        )
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Chunks of actions, and their successors."""
        return Window(discount=config.discount, chunk=config.chunk)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q, over the chunks whose return is known."""
        with torch.no_grad():
            action = self.act(successors(data), data["action"])  # [B, h, Da]
            following = self.models["target_critic"](data, action, prefix="next.").mean(0)  # [B]
            y = bootstrapped(data, following, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        complete = data["complete"]  # [B], 1 or 0
        loss = len(q) * self.loss(q * complete, (y * complete).expand_as(q))  # the sum over critics
        metrics = {"critic_loss": loss.detach(), "complete": complete.mean()}
        return loss, metrics | summary("q", q) | data_summary(data)

    def act(self, observation: dict[str, Any], like: Tensor) -> Tensor:
        """Chunks `[B, h, Da]` of the policy, with noise drawn now."""
        if self.config.method == "fql":
            return one_step(self.models["policy"], observation, torch.randn_like(like)).clamp(-1, 1)
        noise = torch.randn_like(like[:, None].expand(-1, self.config.candidates, -1, -1))
        return self.best({**observation, "noise": noise})

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_flow, and J_pi of the method fql, without gradient for the critics, nor from J_pi for the flow."""
        flow_loss = self.loss(*zero_padding(*velocities(self.models["flow"], data), data["action_is_pad"]))
        if self.config.method == "best_of_n":
            return flow_loss, {"flow_loss": flow_loss.detach()}
        action, cloned = distilled(self.models["policy"], self.flow, data)  # [B, h, Da]
        distill_loss = self.loss(action, cloned)
        q_loss = -frozen(self.models["critic"], data, action.clamp(-1, 1)).mean()
        loss = flow_loss + self.config.alpha * distill_loss + q_loss
        metrics = {"actor_loss": loss, "flow_loss": flow_loss, "distill_loss": distill_loss, "q_loss": q_loss}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses, which train different networks, and the metrics."""
        critic_loss, metrics = self.critic_loss(data)
        actor_loss, more = self.actor_loss(data)
        return critic_loss + actor_loss, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics

    def policy(self) -> nn.Module:
        """The one-step policy, or the best of several chunks."""
        if self.config.method == "best_of_n":
            return self.best
        return OneStep(self.models["policy"], self.flow.noise_shape)
