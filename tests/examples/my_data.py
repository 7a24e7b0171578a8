"""A dataset: `build` returns a map-style dataset whose items are dicts, and statistics of the keys to normalise.

PYTHONPATH=tests/examples python offline_trainer.py --plugins my_data --dataset my_data --trainer bc --steps 1000

A dataset with `get_batch(indices, seed) -> dict of batched tensors` skips the item-by-item loading;
`components/datasets/episodes.py` has one with history, chunks and a validation split.
"""

import my_env  # noqa: F401  (registers the environment that "env" names)
import numpy as np
import torch

from components import DATASET_BUILDER_REGISTRY, register


@register(DATASET_BUILDER_REGISTRY, "my_data")
class MyData:
    """Expert steps towards the goal."""

    def build(self, **kwargs):
        states = np.random.default_rng(0).uniform(-1, 1, (2000, 4)).astype(np.float32)
        actions = np.clip(states[:, 2:] - states[:, :2], -0.1, 0.1)
        rows = zip(states, actions, strict=True)
        items = [{"observation.state": torch.tensor(s), "action": torch.tensor(a)} for s, a in rows]
        norm_stats = {"action": {"mean": actions.mean(0), "std": actions.std(0)}}
        return {"dataset": items, "norm_stats": norm_stats, "env": {"name": "my_env"}}
