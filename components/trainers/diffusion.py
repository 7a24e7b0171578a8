"""Diffusion Policy (Chi et al., 2023, arXiv:2303.04137): denoising diffusion over action chunks.

Forward process (Ho et al., 2020, eq. 4), with abar_t from the cosine schedule (Nichol & Dhariwal, 2021, eq. 17):

    x_t = sqrt(abar_t) a + sqrt(1 - abar_t) e,    e ~ N(0, 1)

The network learns e, a, or v = sqrt(abar_t) e - sqrt(1 - abar_t) a (Salimans & Ho, 2022, appendix D), given
the observation. Sampling goes backwards over any subset of the steps (Song et al., 2021, eq. 12 and 16): from t to s,

    x_s = sqrt(abar_s) a + sqrt(1 - abar_s - sigma^2) e + sigma noise,
    sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)

with eta = 0 for DDIM and eta = 1 for DDPM. Deviation: as in the released code the predicted a is clipped, here to the
range of the data; then e is recomputed from x_t and the clipped a, so that the two stay consistent.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Demonstrations
from ..errors import UserError
from ..losses import zero_padding
from ..models.checks import check_chunks
from ..models.encoder import encoder_of
from ..optimizers import update


class Diffusion:
    """Diffusion Policy on chunks, with any denoiser."""

    # The paper executes 8 steps of a chunk and trains for hours, on e; these are for short tasks and runs of minutes.
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
        "policy.sampler": "ddim",
        "policy.sampling-steps": 10,
        "steps": 3000,
        "batch-size": 64,
        "eval-every": 1000,
    }
    accumulates = True

    @dataclass(frozen=True)
    class Config:
        """Diffusion Policy; the paper's values but for `prediction`."""

        diffusion_steps: int = 100
        """Steps T of the forward process."""
        prediction: Literal["epsilon", "sample", "v"] = "sample"
        """Output of the network: the chunk, v, or the noise (epsilon) as in the paper, which learns more slowly."""
        schedule: Literal["cosine", "linear"] = "cosine"
        """Noise schedule: squared cosine, or the linear betas of Ho et al. (2020)."""
        clip: bool = True
        """Clip the predicted chunk to the range of the data while sampling."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
        device: torch.device | None = None,
    ) -> None:
        self.config = config or self.Config()
        if self.config.diffusion_steps < 2:
            raise UserError(f"--trainer.diffusion-steps {self.config.diffusion_steps} must be 2 or more")
        check_chunks(models, loss, "denoises")
        self.models: Any = models
        self.encoder = encoder_of(models)
        self.optimizers, self.loss, self.action = optimizers, loss, spec["action"]
        self.alpha_bar = noise_schedule(self.config.schedule, self.config.diffusion_steps).to(device)  # [T]

    @staticmethod
    def data(config: Any) -> Demonstrations:
        """Items of the dataset, unchanged."""
        return Demonstrations()

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss (Ho et al., 2020, eq. 14), at times and with noise drawn now, and the metrics."""
        action = data["action"]  # [B, (Ta,) Da]
        noise = torch.randn_like(action)
        step = (torch.rand_like(action.flatten(1)[:, 0]) * len(self.alpha_bar)).long()  # [B]
        alpha_bar = self.alpha_bar[step].view(-1, *[1] * (action.ndim - 1))
        noisy = alpha_bar.sqrt() * action + (1 - alpha_bar).sqrt() * noise
        targets = {"epsilon": noise, "sample": action}
        targets["v"] = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * action
        network = self.models["policy"]
        condition = network.condition(self.encoder(data))
        prediction, target = network(noisy, step / len(self.alpha_bar), condition), targets[self.config.prediction]
        if "action_is_pad" in data:
            prediction, target = zero_padding(prediction, target, data["action_is_pad"])
        loss = self.loss(prediction, target)
        return loss, {"loss": loss.detach()}

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The sampler."""
        bounds = self.action.get("range") if self.config.clip else None
        shape = tuple(self.action["shape"])
        encoder, network = self.encoder, self.models["policy"]
        return DiffusionSampler(encoder, network, self.alpha_bar, self.config.prediction, shape, bounds)


def noise_schedule(kind: str, steps: int) -> Tensor:
    """abar_t `[T]`, the share of the signal's variance that is left after t + 1 steps, in float32.

    `cosine`: Nichol & Dhariwal (2021), eq. 17, betas at most 0.999. `linear`: Ho et al. (2020), section 4, betas from
    1e-4 to 0.02 at 1000 steps, scaled to `steps`.
    """
    if kind == "linear":
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    else:
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        beta = 1 - f[1:] / f[:-1]
    return (1 - beta.clamp(max=0.999)).cumprod(0).float()


class DiffusionSampler(nn.Module):
    """Observations and noise -> chunk, by DDIM or DDPM over evenly spaced steps."""

    samplers = ("ddim", "ddpm")

    def __init__(
        self,
        encoder: nn.Module,
        network: nn.Module,
        alpha_bar: Tensor,
        prediction: str,
        shape: tuple[int, ...],
        bounds: list[list[float]] | None,
    ) -> None:
        super().__init__()
        self.encoder, self.network, self.prediction, self.shape = encoder, network, prediction, shape
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("bounds", None if bounds is None else torch.tensor(bounds), persistent=False)  # [2, Da]
        self.sampler, self.sampling_steps, self.most_steps = "ddim", min(10, len(alpha_bar)), len(alpha_bar)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the initial noise and, for DDPM, the noise of every step: (1 or steps, (Ta,) Da)."""
        return (1 if self.sampler == "ddim" else self.sampling_steps, *self.shape)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        condition = self.network.condition(self.encoder(batch))  # type: ignore[operator]
        noise = batch["noise"]  # [B, N, (Ta,) Da]
        x, steps = noise[:, 0], self.steps()
        known: Any = self.alpha_bar
        alpha_bar = [*(known[t] for t in steps), torch.ones_like(known[0])]  # views, without a GPU synchronisation
        for i, t in enumerate(steps):
            eta = float(self.sampler == "ddpm" and i + 1 < len(steps))  # the last step ends in the chunk itself
            x = self.step(x, t, alpha_bar[i + 1], condition, eta, noise[:, i + 1] if eta else None)
        return x

    def steps(self) -> list[int]:
        """Steps t, evenly spaced from T - 1 (noise) to 0. With `epsilon` they start lower, unless all T are taken.

        At T - 1 almost no signal is left, so that an error of e becomes an error of a that is 20 000 times as large.
        """
        first, n = self.most_steps - 1, self.sampling_steps
        if self.prediction == "epsilon" and n > 1:
            first = (n - 1) * self.most_steps // n
        return [round(first * (1 - i / max(n - 1, 1))) for i in range(n)]

    def step(
        self, x: Tensor, t: int, before: Tensor, condition: Tensor, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """From x_t to x_s, whose abar_s is `before`."""
        now = self.alpha_bar[t]  # type: ignore[index]
        signal, spread = now.sqrt(), (1 - now).sqrt()
        time = torch.full((1,), t / self.most_steps, device=x.device)
        predicted = self.network(x, time, condition)
        if self.prediction == "epsilon":
            action = (x - spread * predicted) / signal
        elif self.prediction == "sample":
            action = predicted
        else:
            action = signal * x - spread * predicted
        if self.bounds is not None:
            action = action.clamp(self.bounds[0], self.bounds[1])  # type: ignore[index]
        epsilon = (x - signal * action) / spread
        variance: Any = eta**2 * (1 - before) / (1 - now) * (1 - now / before) if eta else 0.0
        x = before.sqrt() * action + (1 - before - variance).clamp(min=0).sqrt() * epsilon
        return x if noise is None else x + variance.sqrt() * noise
