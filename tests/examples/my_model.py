"""A model: `build` gets `spec`, which has the shape, the dtype and the statistics of every key of the data.

PYTHONPATH=tests/examples python offline_trainer.py --plugins my_data my_trainer my_model --dataset my_data \
    --trainer my_trainer --model my_model --model.width 128 --optimizer.lr 1e-3 --steps 1000
"""

from dataclasses import dataclass

import torch

from components import MODEL_BUILDER_REGISTRY, register


@register(MODEL_BUILDER_REGISTRY, "my_model")
@dataclass(frozen=True)
class MyModel:
    """Two layers."""

    width: int = 64
    """Hidden units."""

    def build(self, spec):
        inputs, outputs = spec["observation.state"]["shape"][-1], spec["action"]["shape"][-1]
        return torch.nn.Sequential(
            torch.nn.Linear(inputs, self.width), torch.nn.ReLU(), torch.nn.Linear(self.width, outputs)
        )
