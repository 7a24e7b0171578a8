"""A loss: `build` returns a module that maps (prediction, target) to a scalar.

PYTHONPATH=tests/examples python offline_trainer.py --plugins my_data my_loss --dataset my_data --trainer bc \
    --loss my_loss --loss.scale 0.5 --steps 1000
"""

from dataclasses import dataclass

import torch

from components import LOSS_BUILDER_REGISTRY, register


@register(LOSS_BUILDER_REGISTRY, "my_loss")
@dataclass(frozen=True)
class LogCosh:
    """Smooth absolute error."""

    scale: float = 1.0
    """Error at which it turns linear."""

    def build(self):
        scale = self.scale

        class Loss(torch.nn.Module):
            def forward(self, prediction, target):
                return (scale * torch.cosh((prediction - target) / scale).log()).mean()

        return Loss()
