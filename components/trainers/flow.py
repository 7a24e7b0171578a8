"""Flow matching over action chunks: a straight path from noise to data (Lipman et al., 2023; Liu et al., 2023).

Conditional flow matching with the paths of Tong et al. (2024), table 1, at sigma = 0, which are rectified flow's:

    x_t = (1 - t) x_0 + t a,    x_0 ~ N(0, 1),    u = a - x_0               (Lipman et al., eq. 22 with sigma_min = 0)
    min_theta  E_t |v_theta(x_t, t, o) - u|^2                               (eq. 9)

Sampling integrates dx/dt = v_theta(x, t, o) from noise at t = 0 to the chunk at t = 1.

With `coupling` ot, x_0 and a of a batch are paired by entropic optimal transport (Tong et al., 2024, section 3.2.2),
which straightens the paths. It pairs within each process's part of the batch. Since the pairing ignores observations,
the noise for a given observation is no longer exactly N(0, 1), so it is off by default.

With a `previous` chunk Y, sampling is real-time chunking (Black, Galliker & Levine, 2025, arXiv:2506.07339), which has
the same times: v is replaced by the guided velocity (pseudoinverse guidance, Song et al., 2023)

    v + min(beta, (1 - t) / (t r^2)) g,    g = (Y - A)^T diag(W) dA/dx        (eq. 2; W is the soft mask of eq. 5)
    A = x + (1 - t) v,                     r^2 = (1 - t)^2 / (t^2 + (1 - t)^2)   (eq. 3 and 4)

Its first d actions are executed from Y meanwhile, so they are returned as they are there. With `prefix` the network
learns to continue d given actions (arXiv:2512.05964, see `models.real_time`), and guidance is not needed.

With `unconditional`, that share of the samples is trained without the observation, so that the policy can be guided by
it (--policy.guidance, see `models.guidance`).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Demonstrations
from ..errors import UserError
from ..losses import WithAuxiliary, sinkhorn, zero_padding
from ..models import guidance, real_time
from ..models.checks import check_chunks
from ..models.encoder import encoder_of
from ..optimizers import update
from . import few_step


class Flow:
    """Flow matching on chunks, with any denoiser."""

    needs = {"policy": "unet1d", "encoder": "cnn"}
    defaults = {
        "dataset": "metaworld",
        "dataset.obs-steps": 2,
        "dataset.action-steps": 16,
        "loss": "mse",
        "optimizer": "adamw",
        "optimizer.lr": 1e-3,
        "optimizer.weight-decay": 1e-6,
        "optimizer.schedule": "cosine",
        "optimizer.warmup-steps": 300,
        "ema-decay": 0.9999,
        "policy.action-steps": 4,
        "policy.sampler": "euler",
        "policy.sampling-steps": 10,
        "steps": 3000,
        "batch-size": 64,
        "eval-every": 1000,
    }
    accumulates = True
    adds_auxiliary = ("policy",)

    @dataclass(frozen=True)
    class Config:
        """Flow matching."""

        objective: Literal["flow", "shortcut"] = "flow"
        """What is learned: the flow, or a shortcut model, whose chunk takes one or two calls of the network."""
        time: Literal["uniform", "logit_normal", "beta"] = "uniform"
        """Distribution of training times; logit_normal is denser in the middle (Esser et al., 2024, section 3.1), beta
        where there is more noise (Black et al., 2024, appendix B)."""
        coupling: Literal["independent", "ot"] = "independent"
        """How noise and chunks of a batch are paired: as drawn, or by optimal transport."""
        coupling_epsilon: float = 0.05
        """Strength of the entropy in the transport, relative to the mean cost."""
        prefix: int = 0
        """Learn to continue up to so many given actions: the largest --policy.delay without guidance; 0 for none."""
        unconditional: float = 0.0
        """Share of the samples that learn without the observation, for --policy.guidance; 0 for none."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        self.config = config or self.Config()
        if not self.config.coupling_epsilon > 0:
            raise UserError(f"--trainer.coupling-epsilon {self.config.coupling_epsilon} must be above 0")
        if self.config.objective != "flow" and self.config.prefix:
            raise UserError("--trainer.prefix goes with --trainer.objective flow; a shortcut model is guided instead")
        if self.config.objective != "flow" and self.config.unconditional:
            raise UserError("--trainer.unconditional goes with --trainer.objective flow; a shortcut is not guided")
        if not 0 <= self.config.unconditional < 1:
            raise UserError(f"--trainer.unconditional {self.config.unconditional} must be a share from 0 to below 1")
        check_chunks(models, loss, "denoises")
        self.models: Any = models
        self.encoder = encoder_of(models)
        self.optimizers, self.loss, self.action = optimizers, loss, spec["action"]

    @staticmethod
    def data(config: Any) -> Demonstrations:
        """Items of the dataset, unchanged."""
        return Demonstrations()

    @staticmethod
    def model_spec(model: str, spec: dict[str, Any], config: Any) -> dict[str, Any]:
        """The policy's network is told the step size of a shortcut, or that it is told nothing else, and has a mark for
        given actions to continue.
        """
        if model != "policy":
            return spec
        spec = real_time.spec_with_mark(spec, config.prefix)
        spec = guidance.told(spec) if config.unconditional else spec
        return few_step.told(spec) if config.objective == "shortcut" else spec

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The flow-matching loss, at times and with noise drawn now, and the metrics."""
        action = data["action"]  # [B, (Ta,) Da]
        noise = torch.randn_like(action)
        if self.config.coupling == "ot":
            noise = couple(noise, action, self.config.coupling_epsilon)
        time = draw_times(self.config.time, action.flatten(1)[:, 0])
        t = time.view(-1, *[1] * (action.ndim - 1))
        own, observed = WithAuxiliary(self.models["policy"]), self.encoder(data)
        if self.config.unconditional:
            observed = guidance.hide(observed, (torch.rand_like(time) >= self.config.unconditional).to(time.dtype))
        network, left_out = real_time.trained_on(own, action, self.config.prefix, data.get("action_is_pad"))
        if self.config.objective == "shortcut":
            velocity, target = few_step.shortcut(network, observed, noise, action, time)
        else:
            condition = self.models["policy"].condition(observed)
            velocity, target = network((1 - t) * noise + t * action, time, condition), action - noise
        if left_out is not None:
            velocity, target = zero_padding(velocity, target, left_out)
        return own.added(self.loss(velocity, target))

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The sampler, which integrates the flow."""
        shortcut, shape = self.config.objective == "shortcut", tuple(self.action["shape"])
        network = self.models["policy"]
        network = guidance.Guided(network, guidance.hide) if self.config.unconditional else network
        return FlowSampler(self.encoder, network, shape, self.config.prefix, shortcut)


def draw_times(kind: str, like: Tensor) -> Tensor:
    """Training times `[B]`, 0 for noise.

    `beta`: Black et al. (2024, arXiv:2410.24164), appendix B, whose times are these: (s - t) / s ~ Beta(1.5, 1) with
    s = 0.999, so t / s ~ Beta(1, 1.5). Its distribution function 1 - (1 - x)^1.5 is inverted.
    """
    if kind == "logit_normal":
        return torch.randn_like(like).sigmoid()
    uniform = torch.rand_like(like)
    return 0.999 * (1 - uniform ** (2 / 3)) if kind == "beta" else uniform


def couple(noise: Tensor, action: Tensor, epsilon: float) -> Tensor:
    """The noise `[B, ...]` in an order drawn from the transport plan to the actions `[B, ...]`, one for each action.

    Deviation from Tong et al., algorithm 3, which draws pairs: each action is in the batch exactly once.
    """
    cost = torch.cdist(action.flatten(1), noise.flatten(1)).square()
    plan = sinkhorn(cost, epsilon, iterations=50)  # [B, B], logarithms
    gumbel = -(-torch.rand_like(plan).clamp(1e-20).log()).log()
    return noise[(plan + gumbel).argmax(1)]  # a draw from each row of the plan


class FlowSampler(nn.Module):
    """Observations and noise -> chunk, by Euler or midpoint steps of equal length; a shortcut model is told it."""

    real_time = True
    most_guidance = 5.0  # beta, the paper's

    def __init__(
        self,
        encoder: nn.Module,
        network: nn.Module,
        shape: tuple[int, ...],
        most_prefix: int = 0,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.encoder, self.noise_shape, self.most_prefix = encoder, shape, most_prefix
        self.shortcut, self.samplers = shortcut, ("euler",) if shortcut else ("euler", "midpoint")
        self.sampler, self.sampling_steps, self.most_steps = "euler", 2 if shortcut else 10, 10_000
        self.usual_steps = 2 if shortcut else self.most_steps  # a larger default is reduced to it

    @property
    def guidance(self) -> float | None:
        """The weight of classifier-free guidance, which can be set; None for a network that knows none."""
        return getattr(self.network, "weight", None)

    @guidance.setter
    def guidance(self, weight: float) -> None:
        self.network.weight = weight

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        observed = self.encoder(batch)
        x, step = batch["noise"], 1 / self.sampling_steps  # [B, (Ta,) Da]
        if self.shortcut:
            observed = few_step.tell(observed, torch.full((x.shape[0],), step, device=x.device))
        condition = self.network.condition(observed)
        for i in range(self.sampling_steps):
            velocity = self.velocity(x, i * step, condition, batch)
            if self.sampler == "midpoint":
                velocity = self.velocity(x + step / 2 * velocity, (i + 0.5) * step, condition, batch)
            x = x + step * velocity
        return real_time.ended(x, batch)

    def velocity(self, x: Tensor, t: float, condition: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """v(x, t, o), guided by the batch's `previous` chunk unless the network continues it by itself."""
        network, time = real_time.acting_on(self.network, batch, self.most_prefix), torch.full((1,), t, device=x.device)
        if "previous" not in batch or self.most_prefix:
            return network(x, time, condition)
        velocity, product = real_time.vjp(network, x, time, condition)
        error = batch["previous_weight"][..., None] * (batch["previous"] - (x + (1 - t) * velocity))
        gradient = error + (1 - t) * product(error)  # g; dA/dx = 1 + (1 - t) dv/dx
        return velocity + self.strength(t) * gradient

    def strength(self, t: float) -> float:
        """min(beta, (1 - t) / (t r^2)). Deviation: at most the number of steps, since one would overshoot beyond."""
        unbounded = (t**2 + (1 - t) ** 2) / (t * (1 - t)) if t else math.inf
        return min(self.most_guidance, unbounded, self.sampling_steps)
