"""Diffusion Policy (Chi et al., 2023, arXiv:2303.04137): denoising diffusion over action chunks.

Forward process (Ho et al., 2020, eq. 4), with abar_t from the cosine schedule (Nichol & Dhariwal, 2021, eq. 17):

    x_t = sqrt(abar_t) a + sqrt(1 - abar_t) e,    e ~ N(0, 1)

The network learns e, a, or v = sqrt(abar_t) e - sqrt(1 - abar_t) a (Salimans & Ho, 2022, appendix D), given
the observation. Sampling goes backwards over any subset of the steps (Song et al., 2021, eq. 12 and 16): from t to s,

    x_s = sqrt(abar_s) a + sqrt(1 - abar_s - sigma^2) e + sigma noise,
    sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)

with eta = 0 for DDIM and eta = 1 for DDPM. Deviation: as in the released code the predicted a is clipped, here to the
range of the data; then e is recomputed from x_t and the clipped a, so that the two stay consistent.

With a `previous` chunk Y, sampling is real-time chunking (Black, Galliker & Levine, 2025, arXiv:2506.07339) by the
pseudoinverse guidance that it is derived from (Song et al., 2023). There p(Y | x_t) is a Gaussian around the predicted
a with variance r^2 / W, where r^2 = 1 - abar_t is that of p(a | x_t) if a ~ N(0, 1) (W is the soft mask). The gradient
of its logarithm is g / r^2; added to the score, it moves a = (x_t + (1 - abar_t) score) / sqrt(abar_t) to

    a + min(beta, 1 / sqrt(abar_t)) g,    g = (Y - a)^T diag(W) da/dx_t

Without the bound this is eq. 2 to 4 of Black et al., by the change of variables to the flow's time
t / (1 - t) = sqrt(abar_t / (1 - abar_t)). The bound is theirs where there is much noise, where alone it is needed: a
step of the backward process does not overshoot. The first d actions are executed from Y meanwhile, so they are returned
as they are there. With `prefix` the network learns to continue d given actions (arXiv:2512.05964, see
`models.real_time`), and guidance is not needed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Demonstrations
from ..errors import UserError
from ..losses import WithAuxiliary, zero_padding
from ..models import real_time
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
    adds_auxiliary = ("policy",)

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
        prefix: int = 0
        """Learn to continue up to so many given actions: the largest --policy.delay without guidance; 0 for none."""

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

    @staticmethod
    def model_spec(model: str, spec: dict[str, Any], config: Any) -> dict[str, Any]:
        """The policy's chunks have a mark, if it learns to continue given actions."""
        return real_time.spec_with_mark(spec, config.prefix) if model == "policy" else spec

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss (Ho et al., 2020, eq. 14), at times and with noise drawn now, and the metrics."""
        action = data["action"]  # [B, (Ta,) Da]
        noise = torch.randn_like(action)
        step = (torch.rand_like(action.flatten(1)[:, 0]) * len(self.alpha_bar)).long()  # [B]
        alpha_bar = self.alpha_bar[step].view(-1, *[1] * (action.ndim - 1))
        noisy = alpha_bar.sqrt() * action + (1 - alpha_bar).sqrt() * noise
        targets = {"epsilon": noise, "sample": action}
        targets["v"] = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * action
        own = WithAuxiliary(self.models["policy"])
        condition = own.condition(self.encoder(data))
        network, left_out = real_time.trained_on(own, action, self.config.prefix, data.get("action_is_pad"))
        prediction, target = network(noisy, step / len(self.alpha_bar), condition), targets[self.config.prediction]
        if left_out is not None:
            prediction, target = zero_padding(prediction, target, left_out)
        return own.added(self.loss(prediction, target))

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The sampler."""
        bounds = self.action.get("range") if self.config.clip else None
        shape = tuple(self.action["shape"])
        encoder, network = self.encoder, self.models["policy"]
        prediction, prefix = self.config.prediction, self.config.prefix
        return DiffusionSampler(encoder, network, self.alpha_bar, prediction, shape, bounds, prefix)


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
    random_samplers = ("ddpm",)  # which draw noise in every step
    real_time = True
    most_guidance = 5.0  # beta, that of Black et al.

    def __init__(
        self,
        encoder: nn.Module,
        network: nn.Module,
        alpha_bar: Tensor,
        prediction: str,
        shape: tuple[int, ...],
        bounds: list[list[float]] | None,
        most_prefix: int = 0,
    ) -> None:
        super().__init__()
        self.most_prefix = most_prefix
        self.encoder, self.network, self.prediction, self.shape = encoder, network, prediction, shape
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        limits = None if bounds is None else torch.tensor(bounds)  # [2, (Ta,) Da]
        self.register_buffer("bounds", limits, persistent=False)
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
            x = self.step(x, t, alpha_bar[i + 1], condition, eta, noise[:, i + 1] if eta else None, batch)
        return real_time.ended(x, batch)

    def steps(self) -> list[int]:
        """Steps t, evenly spaced from T - 1 (noise) to 0. With `epsilon` they start lower, unless all T are taken.

        At T - 1 almost no signal is left, so that an error of e becomes an error of a that is 20 000 times as large.
        """
        first, n = self.most_steps - 1, self.sampling_steps
        if self.prediction == "epsilon" and n > 1:
            first = (n - 1) * self.most_steps // n
        return [round(first * (1 - i / max(n - 1, 1))) for i in range(n)]

    def step(
        self,
        x: Tensor,
        t: int,
        before: Tensor,
        condition: Tensor,
        eta: float = 0.0,
        noise: Tensor | None = None,
        batch: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """From x_t to x_s, whose abar_s is `before`."""
        now = self.alpha_bar[t]  # type: ignore[index]
        signal, spread = now.sqrt(), (1 - now).sqrt()
        action = self.predict(x, t, condition, signal, spread, batch or {})
        if self.bounds is not None:
            action = action.clamp(self.bounds[0], self.bounds[1])  # type: ignore[index]
        epsilon = (x - signal * action) / spread
        variance: Any = eta**2 * (1 - before) / (1 - now) * (1 - now / before) if eta else 0.0
        x = before.sqrt() * action + (1 - before - variance).clamp(min=0).sqrt() * epsilon
        return x if noise is None else x + variance.sqrt() * noise

    def predict(
        self, x: Tensor, t: int, condition: Tensor, signal: Tensor, spread: Tensor, batch: dict[str, Tensor]
    ) -> Tensor:
        """The predicted a, guided by the batch's `previous` chunk unless the network continues it by itself."""
        network, time = real_time.acting_on(self.network, batch, self.most_prefix), t / self.most_steps
        inputs = (torch.full((1,), time, device=x.device), condition, signal, spread)

        def denoised(x: Tensor, time: Tensor, condition: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
            predicted = network(x, time, condition)
            if self.prediction == "epsilon":
                return (x - spread * predicted) / signal
            return predicted if self.prediction == "sample" else signal * x - spread * predicted

        if "previous" not in batch or self.most_prefix:
            return denoised(x, *inputs)
        action, product = real_time.vjp(denoised, x, *inputs)
        gradient = product(batch["previous_weight"][..., None] * (batch["previous"] - action))  # g
        return action + (1 / signal).clamp(max=self.most_guidance) * gradient
