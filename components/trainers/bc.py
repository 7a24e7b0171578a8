"""Behaviour cloning: regression from observations to the demonstrated actions (Pomerleau, 1989).

min_theta  E_(o, a ~ demonstrations)  loss(pi_theta(o), a)

With a Gaussian or mixture head and the loss `nll`, this is maximum likelihood; at inference the action is the mean of
the most likely component.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Demonstrations
from ..losses import zero_padding
from ..models.checks import check_regression
from ..models.encoder import EncodedPolicy, encoder_of
from ..optimizers import update


class BC:
    """Behaviour cloning of single actions or chunks, with any regression network, loss and observation."""

    needs = {"policy": "mlp", "encoder": "cnn"}
    defaults = {
        "dataset": "metaworld",
        "loss": "mse",  # l1 leaves small errors where small actions matter: clones of a balanced pendulum fell
        "optimizer": "adamw",
        "optimizer.lr": 1e-3,
        "optimizer.schedule": "cosine",
        "steps": 6000,
        "eval-every": 1000,
        "batch-size": 256,
    }
    accumulates = True

    def __init__(self, models: nn.ModuleDict, optimizers: dict[str, Optimizer], loss: nn.Module) -> None:
        check_regression(models, loss)
        self.models, self.optimizers, self.loss = models, optimizers, loss
        self.encoder = encoder_of(models)

    @staticmethod
    def data(config: Any) -> Demonstrations:
        """Items of the dataset, unchanged."""
        return Demonstrations()

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and the metrics."""
        prediction, target = self.models["policy"](self.encoder(data)), data["action"]  # [B, (Ta,) Da]
        if isinstance(prediction, Tensor):
            found, expected = tuple(prediction.shape), tuple(target.shape)
            assert found == expected, f"policy returns {found}, data has {expected}"
        if "action_is_pad" in data:
            prediction, target = zero_padding(prediction, target, data["action_is_pad"])
        loss = self.loss(prediction, target)
        return loss, {"loss": loss.detach()}

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The policy."""
        return EncodedPolicy(self.encoder, self.models["policy"])
