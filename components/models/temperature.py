"""The temperature of maximum-entropy RL as a module, so that it is trained, saved and synchronised like others."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError


@dataclass(frozen=True)
class Temperature:
    """One positive number, learned through its logarithm."""

    initial: float = 1.0
    """Initial value."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Make the module, independently of the data. Raises UserError: a value that is not above 0."""
        if not self.initial > 0:
            raise UserError(f"--model.temperature.initial {self.initial} must be above 0")
        return LogTemperature(math.log(self.initial))


class LogTemperature(nn.Module):
    """Returns the temperature, a scalar; its logarithm is the parameter."""

    def __init__(self, log: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(log, dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.log.exp()
