"""An optimizer: `build` gets the parameters of one model and returns its optimizer, complete with its schedule.

PYTHONPATH=tests/examples python offline_trainer.py --plugins my_data my_optimizer --dataset my_data --trainer bc \
    --optimizer my_optimizer --steps 1000
"""

from dataclasses import dataclass

import torch

from components import OPTIMIZER_BUILDER_REGISTRY, register


@register(OPTIMIZER_BUILDER_REGISTRY, "my_optimizer")
@dataclass(frozen=True)
class RMSprop:
    """RMSprop."""

    lr: float = 1e-3
    """Learning rate."""

    def build(self, params):
        return torch.optim.RMSprop(params, lr=self.lr)
