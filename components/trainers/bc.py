"""Behaviour cloning: regression from observations to the demonstrated actions (Pomerleau, 1989).

min_theta  E_(o, a ~ demonstrations)  loss(pi_theta(o), a)
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..losses import zero_padding


class BC:
    """Behaviour cloning of single actions or chunks, with any model, loss and observation."""

    needs = {"policy": "mlp"}
    defaults = {
        "dataset": "metaworld",
        "loss": "l1",
        "optimizer": "adamw",
        "optimizer.lr": 1e-3,
        "optimizer.schedule": "cosine",
        "steps": 3000,
        "batch-size": 256,
    }
    accumulates = True

    def __init__(self, models: nn.ModuleDict, optimizers: dict[str, Optimizer], loss: nn.Module) -> None:
        self.models, self.optimizers, self.loss = models, optimizers, loss

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and what is logged."""
        prediction, target = self.models["policy"](data), data["action"]  # both [B, Da] or [B, Ta, Da]
        assert prediction.shape == target.shape, f"policy gives {tuple(prediction.shape)}, data {tuple(target.shape)}"
        if "action_is_pad" in data:
            prediction, target = zero_padding(prediction, target, data["action_is_pad"])
        loss = self.loss(prediction, target)
        return loss, {"loss": loss.detach()}

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return metrics
