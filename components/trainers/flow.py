"""Flow matching over action chunks: a straight path from noise to data (Lipman et al., 2023; Liu et al., 2023).

Conditional flow matching with the paths of Tong et al. (2024), table 1, at sigma = 0, which are rectified flow's:

    x_t = (1 - t) x_0 + t a,    x_0 ~ N(0, 1),    u = a - x_0               (Lipman et al., eq. 22 with sigma_min = 0)
    min_theta  E_t |v_theta(x_t, t, o) - u|^2                               (eq. 9)

Sampling integrates dx/dt = v_theta(x, t, o) from noise at t = 0 to the chunk at t = 1.

With `coupling` ot, x_0 and a of a batch are paired by entropic optimal transport (Tong et al., 2024, section 3.2.2),
which straightens the paths. It pairs within each process's part of the batch. Since the pairing ignores observations,
the noise for a given observation is no longer exactly N(0, 1), so it is off by default.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Demonstrations
from ..errors import UserError
from ..losses import sinkhorn, zero_padding
from ..models.checks import check_chunks
from ..models.encoder import encoder_of
from ..optimizers import update


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

    @dataclass(frozen=True)
    class Config:
        """Flow matching."""

        time: Literal["uniform", "logit_normal"] = "uniform"
        """Distribution of training times; logit_normal is denser in the middle (Esser et al., 2024, section 3.1)."""
        coupling: Literal["independent", "ot"] = "independent"
        """How noise and chunks of a batch are paired: as drawn, or by optimal transport."""
        coupling_epsilon: float = 0.05
        """Strength of the entropy in the transport, relative to the mean cost."""

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
        check_chunks(models, loss, "denoises")
        self.models: Any = models
        self.encoder = encoder_of(models)
        self.optimizers, self.loss, self.action = optimizers, loss, spec["action"]

    @staticmethod
    def data(config: Any) -> Demonstrations:
        """Items of the dataset, unchanged."""
        return Demonstrations()

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The flow-matching loss, at times and with noise drawn now, and the metrics."""
        action = data["action"]  # [B, (Ta,) Da]
        noise = torch.randn_like(action)
        if self.config.coupling == "ot":
            noise = couple(noise, action, self.config.coupling_epsilon)
        one_each = action.flatten(1)[:, 0]
        time = torch.randn_like(one_each).sigmoid() if self.config.time == "logit_normal" else torch.rand_like(one_each)
        t = time.view(-1, *[1] * (action.ndim - 1))
        network = self.models["policy"]
        condition = network.condition(self.encoder(data))
        velocity, target = network((1 - t) * noise + t * action, time, condition), action - noise
        if "action_is_pad" in data:
            velocity, target = zero_padding(velocity, target, data["action_is_pad"])
        loss = self.loss(velocity, target)
        return loss, {"loss": loss.detach()}

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The sampler, which integrates the flow."""
        return FlowSampler(self.encoder, self.models["policy"], tuple(self.action["shape"]))


def couple(noise: Tensor, action: Tensor, epsilon: float) -> Tensor:
    """The noise `[B, ...]` in an order drawn from the transport plan to the actions `[B, ...]`, one for each action.

    Deviation from Tong et al., algorithm 3, which draws pairs: each action is in the batch exactly once.
    """
    cost = torch.cdist(action.flatten(1), noise.flatten(1)).square()
    plan = sinkhorn(cost, epsilon, iterations=50)  # [B, B], logarithms
    gumbel = -(-torch.rand_like(plan).clamp(1e-20).log()).log()
    return noise[(plan + gumbel).argmax(1)]  # a draw from each row of the plan


class FlowSampler(nn.Module):
    """Observations and noise -> chunk, by Euler or midpoint steps of equal length."""

    samplers = ("euler", "midpoint")

    def __init__(self, encoder: nn.Module, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.network, self.noise_shape = encoder, network, shape
        self.sampler, self.sampling_steps, self.most_steps = "euler", 10, 10_000

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        condition = self.network.condition(self.encoder(batch))  # type: ignore[operator]
        x, step = batch["noise"], 1 / self.sampling_steps  # [B, (Ta,) Da]
        for i in range(self.sampling_steps):
            velocity = self.velocity(x, i * step, condition)
            if self.sampler == "midpoint":
                velocity = self.velocity(x + step / 2 * velocity, (i + 0.5) * step, condition)
            x = x + step * velocity
        return x

    def velocity(self, x: Tensor, t: float, condition: Tensor) -> Tensor:
        """v(x, t, o)."""
        return self.network(x, torch.full((1,), t, device=x.device), condition)
