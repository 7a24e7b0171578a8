"""RECAP, RL with experience and corrections by advantage-conditioned policies, on flows (Physical Intelligence, 2025).

Of "pi*0.6: a VLA that learns from experience", arXiv:2511.14759, whose equation numbers these are. Its guidance, and
why it improves on the data, is CFGRL's (Frans et al., 2025, arXiv:2505.23458). A is the chunk a_t ... a_{t+h-1}, R_t
the return to go, p(. | s) a categorical distribution over bins of it, V its mean, H the cross entropy:

    J_V  = E H(R_t, p(. | s_t))                                                                   eq. 1
    Adv  = sum_{i < N} gamma^i r_{t+i} + gamma^N (1 - terminated) V(s_{t+N}) - V(s_t)             N steps, appendix F
    I    = 1(Adv > threshold), 1 where a person or an expert intervened                           section IV-B
    J_pi = E |v(x, time, s, I or nothing) - (A - z)|^2,   x = (1 - time) z + time A, z ~ N(0, 1)  eq. 3
    v    = v(x, time, s) + w (v(x, time, s, I = 1) - v(x, time, s))                               acting, of eq. 2

A share `unknown` of the samples learns eq. 3's first term, the policy without the indicator; the others learn the
second one. The threshold follows the quantile at which a share `positive` of the data is better. The last equation aims
at pi(A | s) (pi(A | s, I = 1) / pi(A | s))^w: by Bayes, the data's policy times a power of the probability that A is an
improvement, which is better than the data's policy, and the more so, the larger w (CFGRL, theorems 1 and 2).

To iterate: collect with the policy, and learn again from the old and the new data, offline, or online by --init-from.

Deviations: by default R_t is the first two terms of Adv, since the return of an episode that is cut tells nothing of
what would have followed (the paper's end with success or a large penalty: --trainer.target returns); values and policy
learn in one run, where the paper first finishes V; returns are discounted, and each is divided between its two nearest
bins; chunks are as long as --trainer.chunk says, not the paper's 50 steps.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..errors import UserError
from ..losses import WithAuxiliary, zero_padding
from ..models.checks import check_chunks
from ..models.guidance import Guided, tell, told
from ..optimizers import update
from ..parallel import global_mean, global_range
from ..value_learning import (
    OFFLINE_RL,
    bootstrapped,
    check_actions,
    check_rates,
    check_transitions,
    data_summary,
    networks,
    summary,
)
from .flow import FlowSampler
from .fql import velocities

RATE = 0.05  # of the threshold, in mean distances of the advantages from it, for each update
NEAREST = 1e-26  # distance that counts for a smaller one, of which there is no logarithm


class Recap:
    """Advantage-conditioned flow policies."""

    needs = {"policy": "vector_field", "value": "v_categorical"}
    defaults: dict[str, Any] = OFFLINE_RL | {
        "policy.sampling-steps": 10,
        "policy.guidance": 3.0,
        **networks("value", hidden_dims=(512, 512, 512), activation="gelu", layer_norm=True),
    }
    adds_auxiliary = ("policy",)
    promises = Promises(repeats_after=1)

    @dataclass(frozen=True)
    class Config:
        """RECAP; the paper's values but for discount, chunk and N, which is 50 there at 50 steps a second."""

        chunk: int = 1
        """Actions h of a chunk; 1 for single actions, which a small network learns faster."""
        n_step: int = 10
        """Steps N of the advantage, at least those of a chunk; 0 for all until the episode's end."""
        positive: float = 0.4
        """Share of the data that counts as better: 0.3 to 0.4, and 0.1 where speed is to be improved."""
        unknown: float = 0.3
        """Share of the samples that learn without the indicator."""
        target: Literal["bootstrapped", "returns"] = "bootstrapped"
        """What V learns: the rewards of N steps and the V that follows, or the data's returns as in the paper, for
        episodes that end by themselves."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""

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
        check_rates(self.config, chunk=(1, 1e4), n_step=(0, 1e9), positive=(0.01, 0.99), unknown=(0.01, 0.99))
        check_chunks(models, loss, "denoises")
        check_transitions(spec, "recap", more=["return_to_go"])
        check_actions(spec, "recap")
        if not hasattr(models["value"], "cross_entropy"):
            raise UserError("recap's value is a distribution; leave out --model value=..., or choose v_categorical")
        self.action_shape = tuple(spec["action"]["shape"])

    @staticmethod
    def data(config: Any) -> Window:
        """Chunks of actions, N steps, and returns to go."""
        return Window(discount=config.discount, n_step=max(config.n_step, 1), chunk=config.chunk, to_go=True)

    @staticmethod
    def model_spec(model: str, spec: dict[str, Any], config: Any) -> dict[str, Any]:
        """The policy's network is told whether the advantage is positive."""
        return told(spec, 2) if model == "policy" else spec

    def value_loss(self, data: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """J_V, the advantage `[B]`, and the metrics."""
        value, returns = self.models["value"], data["return_to_go"]
        logits = value(data)  # [B, bins]
        with torch.no_grad():
            v, following = value.mean(logits), value.mean(value(data, prefix="next."))  # [B]
            ahead = bootstrapped(data, following, self.config.discount) if self.config.n_step else returns
            target = ahead if self.config.target == "bootstrapped" else returns
        loss = value.cross_entropy(logits, target).mean()
        return loss, ahead - v, {"value_loss": loss.detach()} | summary("v", v) | summary("target", target)

    def policy_loss(self, data: dict[str, Any], advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi."""
        better = advantage > self.models["value"].threshold  # [B]
        distance = (advantage - self.models["value"].threshold).abs().clamp(min=NEAREST)
        metrics = {"positive": better.float().mean(), "log_distance": distance.log().mean()}
        better = better | data["intervention"].bool() if "intervention" in data else better
        indicator = torch.stack([better, ~better], 1) & (torch.rand_like(advantage) >= self.config.unknown)[:, None]
        network = WithAuxiliary(self.models["policy"])
        velocity, target = velocities(network, tell(data, indicator.to(advantage.dtype)))
        if "action_is_pad" in data:
            velocity, target = zero_padding(velocity, target, data["action_is_pad"])
        loss, own = network.added(self.loss(velocity, target))
        return loss, metrics | {"flow_loss": own.pop("loss")} | own

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both losses, which train different networks, and the metrics."""
        value_loss, advantage, metrics = self.value_loss(data)
        policy_loss, more = self.policy_loss(data, advantage)
        metrics |= more | summary("advantage", advantage) | data_summary(data)
        return value_loss + policy_loss, metrics

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        value, learns = self.models["value"], "value" in self.optimizers  # a frozen one keeps its bins
        if learns:
            value.cover(*global_range(data["return_to_go"]))
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        if learns:  # for the next update
            value.cover(*global_range(torch.stack([metrics["target_min"], metrics["target_max"]])))
        too_many = global_mean(metrics["positive"]) - self.config.positive
        # By the geometric mean, on which a few large distances, as of success or failure, have little influence.
        value.threshold += RATE * global_mean(metrics["log_distance"]).exp() * too_many
        return metrics | {"threshold": value.threshold.clone()}

    def policy(self) -> nn.Module:
        """The sampler of better actions."""
        return Better(nn.Identity(), Guided(self.models["policy"], better_or_unknown), self.action_shape)


def better_or_unknown(observed: dict[str, Any], known: Tensor) -> dict[str, Any]:
    """Observations that are told "positive" where `known` `[B]`, nothing elsewhere."""
    return tell(observed, torch.stack([known, torch.zeros_like(known)], 1))


class Better(FlowSampler):
    """Observations and noise -> an action or chunk in [-1, 1], since guidance may go beyond the data."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch).clamp(-1, 1)
