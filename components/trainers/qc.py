"""Q-chunking: reinforcement learning over chunks of actions (Li, Zhou & Levine, 2025, arXiv:2507.07969).

A chunk of h actions is executed as a whole, so the critic may sum the h rewards of the data without any bias of an
n-step return. A is the chunk a_t ... a_{t+h-1}, primes mark targets and what follows it, z is noise from N(0, 1).
Equation numbers are the paper's, of QC and of QC-FQL:

    y      = sum_{i < h} gamma^i r_{t+i} + gamma^h (1 - terminated) mean_i Q'_i(s_{t+h}, A')
    J_Q    = sum_i E (Q_i(s_t, A) - y)^2                                             eq. 11, 15
    J_flow = E |v(x_t, t, s) - (A - z)|^2

With --trainer.method fql (QC-FQL), A' and what acts come from a one-step policy with FQL's losses, J_pi = alpha
J_distill - E mean_i Q_i(s, pi(s, z)) (eq. 13); with best_of_n (QC), from N chunks of the flow, the best by the critics'
mean.

An episode that ends inside a chunk: a terminated step cuts the sum, and nothing is bootstrapped. Where truncation or
the end of the data cuts it, the critic does not learn from it, as in the authors' code; nor does the flow from padding.
Deviation: the authors' code leaves out a chunk with a terminated step where the data ends there, and sums on, over what
was recorded after the success, where it does not (OGBench).
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
    cycle = 1

    @dataclass(frozen=True)
    class Config:
        """Q-chunking; the paper's values (it trains for 1M steps)."""

        method: Literal["fql", "best_of_n"] = "fql"
        """How chunks are chosen: by a one-step policy, or as the best of several of the flow."""
        chunk: int = 5
        """Actions h of a chunk."""
        alpha: float = 100.0
        """Weight of the distillation against the Q-function, for the method fql; 100 to 10000 by task in the paper."""
        candidates: int = 32
        """Chunks N of which the best acts, for the method best_of_n."""
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
        spec: dict[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.optimizers, self.loss, self.config = optimizers, loss, config or self.Config()
        bounds = {"chunk": (2, 1e4), "alpha": (0, 1e9), "candidates": (1, 1e4), "flow_steps": (1, 1e4)}
        check_rates(self.config, **bounds)
        check_chunks(models, loss, "denoises")
        if spec is None:  # built without data, to look at
            return
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
    def window(config: Any) -> dict[str, Any]:
        """Chunks of actions, and what follows them."""
        return {"discount": config.discount, "chunk": config.chunk}

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
        """J_flow, and J_pi of the method fql; the critics get no gradient, nor does the flow through J_pi."""
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
        """The sum of all losses, whose gradients do not meet, and what is logged."""
        critic_loss, metrics = self.critic_loss(data)
        actor_loss, more = self.actor_loss(data)
        return critic_loss + actor_loss, metrics | more

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics

    def policy(self) -> nn.Module:
        """What acts: the one-step policy, or the best of several chunks."""
        if self.config.method == "best_of_n":
            return self.best
        return OneStep(self.models["policy"], self.flow.noise_shape)
