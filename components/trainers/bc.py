"""Behaviour cloning: regression from observations to the demonstrated actions (Pomerleau, 1989).

min_theta  E_(o, a ~ demonstrations)  loss(pi_theta(o), a)

With a Gaussian or mixture head and the loss `nll`, this is maximum likelihood; at inference the action is the mean of
the most likely component.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Demonstrations
from ..losses import WithAuxiliary, zero_padding
from ..models.checks import check_regression
from ..models.codebook import acting, learn_with
from ..models.encoder import encoder_of
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
    adds_auxiliary = ("policy",)

    def __init__(self, models: nn.ModuleDict, optimizers: dict[str, Optimizer], loss: nn.Module) -> None:
        check_regression(models, loss)
        self.models, self.optimizers, self.loss = models, optimizers, loss
        self.encoder = encoder_of(models)
        if "policy" in models:
            learn_with(models["policy"], optimizers.get("policy"))

    @staticmethod
    def data(config: Any) -> Demonstrations:
        """Items of the dataset, unchanged."""
        return Demonstrations()

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, and the metrics."""
        network, target, is_pad = WithAuxiliary(self.models["policy"]), data["action"], data.get("action_is_pad")
        prediction = network(self.encoder(data), target=target, is_pad=is_pad)  # [B, (Ta,) Da]
        if isinstance(prediction, Tensor):
            found, expected = tuple(prediction.shape), tuple(target.shape)
            assert found == expected, f"policy returns {found}, data has {expected}"
        if is_pad is not None:
            prediction, target = zero_padding(prediction, target, is_pad)
        return network.added(self.loss(prediction, target))

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The policy; with a codebook, one that may draw its codes."""
        return acting(self.encoder, self.models["policy"])
