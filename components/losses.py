"""Loss factories for supervised targets: the plain mean over all entries, a scalar.

Each is also a module that maps (prediction, target) of equal shapes to a scalar, so torch's own losses fit as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UserError


@dataclass(frozen=True)
class MSE:
    """Mean squared error."""

    def build(self) -> nn.Module:
        return nn.MSELoss()


@dataclass(frozen=True)
class L1:
    """Mean absolute error; less drawn to outliers than the squared one."""

    def build(self) -> nn.Module:
        return nn.L1Loss()


@dataclass(frozen=True)
class Huber:
    """Squared below `delta`, linear above (Huber, 1964)."""

    delta: float = 1.0
    """Error, in normalised units, at which the loss turns linear."""

    def build(self) -> nn.Module:
        if not self.delta > 0:
            raise UserError(f"--loss.delta {self.delta} must be above 0")
        return nn.HuberLoss(delta=self.delta)


def zero_padding(prediction: Tensor, target: Tensor, is_pad: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the padded steps of both, `[B, Ta, Da]` with `is_pad` `[B, Ta]`, before a plain mean.

    Padded entries still count in the mean's denominator (ACT's definition, Zhao et al., 2023), so a loss is a mean over
    samples and needs no communication between processes.
    """
    keep = ~is_pad[..., None]
    return torch.where(keep, prediction, 0), torch.where(keep, target, 0)
