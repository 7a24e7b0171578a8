"""A whole training in plain PyTorch, with a copy of `components/` and nothing else of Tendon: python plain.py."""

import torch

from components import (
    DATASET_BUILDER_REGISTRY,
    LOSS_BUILDER_REGISTRY,
    MODEL_BUILDER_REGISTRY,
    OPTIMIZER_BUILDER_REGISTRY,
    TRAINER_REGISTRY,
)
from components.data.batches import Batches
from components.data.features import describe
from components.data.normalisation import Normaliser

data = DATASET_BUILDER_REGISTRY["metaworld"](demos=10).build()
spec = describe(data["dataset"][0], data["norm_stats"])
normalise = Normaliser(spec)
models = torch.nn.ModuleDict({"policy": MODEL_BUILDER_REGISTRY["mlp"]().build(spec)})
optimizers = {"policy": OPTIMIZER_BUILDER_REGISTRY["adamw"](lr=1e-3).build(models["policy"].parameters())}
trainer = TRAINER_REGISTRY["bc"](models, optimizers, LOSS_BUILDER_REGISTRY["l1"]().build())
for step, batch in zip(range(301), Batches(data["dataset"], batch_size=256, seed=0).stream(0), strict=False):
    metrics = trainer.train_step(normalise(batch))
    if step % 100 == 0:
        print(step, float(metrics["loss"]))
