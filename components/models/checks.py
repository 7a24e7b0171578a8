"""Checks that networks and losses fit the algorithm, before step 1."""

from torch import nn

from ..contracts import auxiliary_weights_of
from ..errors import UserError


def check_regression(models: nn.ModuleDict, loss: nn.Module) -> None:
    """Check models of regression: a network from observations to actions, and a loss of its output.

    Without a model `policy` there is nothing to check.

    Raises:
        UserError: a denoiser; a head and a loss that do not fit together.
    """
    if "policy" not in models:
        return
    network = models["policy"]
    check_kind(network, "")
    has_density = any(getattr(module, "gives_distribution", False) for module in network.modules())
    wants_density = getattr(loss, "takes_distribution", False)
    if wants_density and not has_density and auxiliary_weights_of(network):
        raise UserError("a network with experts or a codebook has losses of its own; choose --loss l1, mse or huber")
    if wants_density and not has_density:
        raise UserError("the loss 'nll' needs a distribution: add --model.head gaussian or --model.head mixture")
    if has_density and not wants_density:
        raise UserError("a head 'gaussian' or 'mixture' is trained by its likelihood: add --loss nll")


def check_chunks(models: nn.ModuleDict, loss: nn.Module, kind: str) -> None:
    """Check models of an algorithm that needs a special kind of network.

    Args:
        kind: "denoises" or "predicts_chunks".

    Raises:
        UserError: a network of another kind, or a loss of distributions.
    """
    if "policy" not in models:
        return
    network = models["policy"]
    check_kind(network, kind)
    if getattr(loss, "takes_distribution", False):
        raise UserError("the loss 'nll' goes with the trainer bc only; choose --loss mse, l1 or huber")


KINDS = {"": "mlp, resmlp, gru or transformer", "denoises": "unet1d or dit", "predicts_chunks": "act"}


def check_kind(network: nn.Module, kind: str) -> None:
    """Raise UserError unless the network is of this kind, "" for plain regression."""
    found = next((name for name in KINDS if name and getattr(network, name, False)), "")
    if found != kind:
        raise UserError(f"this trainer does not go with a {type(network).__name__}; choose --model {KINDS[kind]}")
