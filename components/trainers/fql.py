"""Flow Q-learning (Park, Li & Levine, 2025, arXiv:2502.02538).

A flow policy mu clones behaviour. The policy that acts is a one-step policy pi(s, z), which is distilled from mu and
maximises the critics' values. Equation numbers are the paper's; primes mark targets and successors, z is noise from
N(0, 1), x_t = (1 - t) z + t a with t ~ U(0, 1):

    a'        = clip(pi(s', z), -1, 1)
    y         = r + gamma (1 - terminated) mean_i Q'_i(s', a')
    J_Q       = sum_i E (Q_i(s, a) - y)^2                                                  eq. 1
    J_flow    = E |v(x_t, t, s) - (a - z)|^2                                               eq. 5
    J_distill = E |pi(s, z) - mu(s, z)|^2     mu: Euler steps from z, clipped to [-1, 1]   eq. 7
    J_pi      = alpha J_distill - lambda E mean_i Q_i(s, clip(pi(s, z), -1, 1))            eq. 9

With --trainer.aggregate min, the mean over the critics in y is the minimum. All losses use the weights from before the
step, so that one backward pass serves them. Squared errors are means over action dimensions, as in the authors' code.
Online, pi itself collects, and the losses are the same.

Deviation: --dataset.ratio fixes the share of the offline data online, which the authors' buffer has by its size, or by
halves; the targets begin as copies of the critics.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..models.checks import check_chunks
from ..optimizers import update
from ..parallel import global_mean
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


class FQL:
    """Flow Q-learning on single transitions or n-step returns."""

    needs = {"policy": "vector_field", "flow": "vector_field", "critic": "q_ensemble"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "model.time": False,
        **networks("critic", **WIDE),
    }
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """Flow Q-learning; the paper's values (it trains for 1M steps and tunes alpha for each task)."""

        alpha: float = 10.0
        """Weight of the distillation against the Q-function: 300 for OGBench's cubes, 3 to 30000 elsewhere."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""
        flow_steps: int = 10
        """Euler steps of the flow policy."""
        aggregate: Literal["mean", "min"] = "mean"
        """Aggregation of the critics' values in the targets."""
        normalise_q: bool = False
        """Divide the Q-function by its mean size in the policy's loss (lambda)."""

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
        check_rates(self.config, alpha=(0, 1e9), flow_steps=(1, 1e4), n_step=(1, 1e9))
        check_chunks(models, loss, "denoises")
        check_transitions(spec, "fql")
        check_actions(spec, "fql")
        self.flow = FlowSampler(nn.Identity(), models["flow"], tuple(spec["action"]["shape"]))
        self.flow.sampling_steps = self.config.flow_steps
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps."""
        return Window(discount=config.discount, n_step=config.n_step)

    def critic_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q."""
        with torch.no_grad():
            noise = torch.randn_like(data["action"])
            action = one_step(self.models["policy"], successors(data), noise).clamp(-1, 1)  # [B, Da]
            following = self.models["target_critic"](data, action, prefix="next.")  # [E, B]
            following = following.amin(0) if self.config.aggregate == "min" else following.mean(0)
            y = bootstrapped(data, following, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        loss = len(q) * self.loss(q, y.expand_as(q))  # the sum over critics
        return loss, {"critic_loss": loss.detach()} | summary("q", q) | data_summary(data)

    def actor_loss(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_flow + J_pi, without gradient for the critics, nor from J_pi for the flow."""
        flow_loss = self.loss(*velocities(self.models["flow"], data))
        action, cloned = distilled(self.models["policy"], self.flow, data)
        distill_loss = self.loss(action, cloned)
        q = frozen(self.models["critic"], data, action.clamp(-1, 1)).mean(0)  # [B]
        q_loss = -q.mean()
        if self.config.normalise_q:
            q_loss = q_loss / global_mean(q.abs()).clamp(min=1e-8)
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
        """The one-step policy."""
        return OneStep(self.models["policy"], self.flow.noise_shape)


def one_step(network: Any, observation: dict[str, Any], noise: Tensor) -> Tensor:
    """pi(s, z): the network without time maps noise `[B, (Ta,) Da]` to actions of its shape, unclipped."""
    return network(noise, noise.new_zeros(1), network.condition(observation))


def distilled(policy: Any, flow: nn.Module, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """pi(s, z), unclipped, and mu(s, z) without gradient, both `[B, (Ta,) Da]`, from the same noise, drawn now."""
    noise = torch.randn_like(data["action"])
    with torch.no_grad():
        cloned = flow({**data, "noise": noise}).clamp(-1, 1)
    return one_step(policy, data, noise), cloned


def velocities(network: Any, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """v(x_t, t, s) and a - z `[B, (Ta,) Da]`, with times and noise drawn now, for the flow-matching loss."""
    action = data["action"]
    noise, time = torch.randn_like(action), torch.rand_like(action.flatten(1)[:, 0])  # [B]
    t = time.view(-1, *[1] * (action.ndim - 1))
    return network((1 - t) * noise + t * action, time, network.condition(data)), action - noise


class OneStep(nn.Module):
    """Observations and noise -> action in [-1, 1], by one evaluation of the network."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.noise_shape = network, shape

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return one_step(self.network, batch, batch["noise"]).clamp(-1, 1)
