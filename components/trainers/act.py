"""Action chunking with transformers (Zhao et al., 2023, arXiv:2304.13705, section IV, algorithms 1 and 2).

q(z | a, o) = N(mu, sigma^2) encodes a demonstrated chunk a, pi(o, z) reconstructs it:

    L = |pi(o, z) - a|_1 + beta KL(q(z | a, o) || N(0, 1)),   z ~ q         (algorithm 1)

At inference z is the prior's mean 0, and the chunks of several steps are averaged (temporal ensembling, algorithm 2).
Every policy has that setting: --policy.ensemble.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Demonstrations
from ..errors import UserError
from ..losses import WithAuxiliary, zero_padding
from ..models.checks import check_chunks
from ..models.encoder import EncodedPolicy, encoder_of
from ..optimizers import update


class ACT:
    """Action chunking with transformers."""

    needs = {"policy": "act", "encoder": "cnn"}
    # The paper trains at lr 1e-5 and batch 8 for hours, on chunks of 100 steps. These are for short tasks with states.
    defaults = {
        "dataset": "metaworld",
        "dataset.action-steps": 16,
        "loss": "l1",
        "optimizer": "adamw",
        "optimizer.lr": 3e-4,
        "optimizer.weight-decay": 1e-4,
        "optimizer.schedule": "cosine",
        "optimizer.warmup-steps": 100,
        "policy.action-steps": 1,
        "policy.ensemble": 0.01,
        "steps": 3000,
        "batch-size": 64,
        "eval-every": 1000,
    }
    accumulates = True
    adds_auxiliary = ("policy",)

    @dataclass(frozen=True)
    class Config:
        """Action chunking with transformers; the paper's value."""

        kl_weight: float = 10.0
        """Weight beta of the KL divergence."""

    def __init__(
        self, models: nn.ModuleDict, optimizers: dict[str, Optimizer], loss: nn.Module, config: Any = None
    ) -> None:
        self.config = config or self.Config()
        if not self.config.kl_weight >= 0:
            raise UserError(f"--trainer.kl-weight {self.config.kl_weight} must be 0 or more")
        check_chunks(models, loss, "predicts_chunks")
        self.models: Any = models
        self.encoder = encoder_of(models)
        self.optimizers, self.loss = optimizers, loss

    @staticmethod
    def data(config: Any) -> Demonstrations:
        """Items of the dataset, unchanged."""
        return Demonstrations()

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction plus weighted KL divergence, and the metrics."""
        action, is_pad = data["action"], data.get("action_is_pad")  # [B, Ta, Da], [B, Ta]
        observation = self.encoder(data)
        mean, log_variance = self.models["policy"].latent_of(observation, action, is_pad)  # [B, Z] each
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        network = WithAuxiliary(self.models["policy"])
        prediction = network(observation, z)  # [B, Ta, Da]
        target = action
        if is_pad is not None:
            prediction, target = zero_padding(prediction, target, is_pad)
        reconstruction, kl = self.loss(prediction, target), kl_divergence(mean, log_variance).mean()
        loss, metrics = network.added(reconstruction + self.config.kl_weight * kl)
        return loss, metrics | {"reconstruction": reconstruction.detach(), "kl": kl.detach()}

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The decoder at z = 0."""
        return EncodedPolicy(self.encoder, self.models["policy"])


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) summed over the latent's width, `[B, Z] -> [B]`."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
