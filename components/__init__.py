"""The catalogue of components: plain dicts from name to class, to be read, extended and copied.

TRAINER_REGISTRY["my_trainer"] = MyTrainer          # or, refusing a name that is taken:
@register(TRAINER_REGISTRY, "my_trainer")
"""

from collections.abc import Callable
from typing import Any, TypeVar

from . import losses, optimizers
from .datasets.d4rl import D4RLDataset
from .datasets.lerobot import LeRobotDataset
from .datasets.metaworld import MetaWorldDemonstrations
from .datasets.minari import MinariDataset
from .datasets.mixture import MixtureDataset
from .datasets.ogbench import OGBenchDataset
from .datasets.pusht import PushTDataset
from .datasets.robomimic import RobomimicDataset
from .datasets.zarr import ZarrDataset
from .envs.gymnasium import GymnasiumEnv
from .envs.metaworld import MetaWorldEnv
from .envs.pusht import PushTEnv
from .errors import UserError
from .models.act import ACTransformer
from .models.cnn import CNN
from .models.dit import DiT
from .models.mlp import MLP, ResMLP
from .models.q_ensemble import QEnsemble
from .models.resnet18 import ResNet18
from .models.sequence import GRU, Transformer
from .models.tanh_gaussian import TanhGaussian
from .models.temperature import Temperature
from .models.unet1d import UNet1d
from .saved_policy import load_policy
from .trainers.act import ACT
from .trainers.bc import BC
from .trainers.diffusion import Diffusion
from .trainers.flow import Flow
from .trainers.sac import SAC

__all__ = ["REGISTRIES", "UserError", "load_policy", "register"]

TRAINER_REGISTRY: dict[str, type] = {
    "bc": BC,
    "act": ACT,
    "diffusion": Diffusion,
    "flow": Flow,
    "sac": SAC,
}

DATASET_BUILDER_REGISTRY: dict[str, type] = {
    "d4rl": D4RLDataset,
    "lerobot": LeRobotDataset,
    "metaworld": MetaWorldDemonstrations,
    "minari": MinariDataset,
    "mixture": MixtureDataset,
    "ogbench": OGBenchDataset,
    "pusht": PushTDataset,
    "robomimic": RobomimicDataset,
    "zarr": ZarrDataset,
}

MODEL_BUILDER_REGISTRY: dict[str, type] = {
    "mlp": MLP,
    "resmlp": ResMLP,
    "gru": GRU,
    "transformer": Transformer,
    "unet1d": UNet1d,
    "dit": DiT,
    "act": ACTransformer,
    "cnn": CNN,
    "resnet18": ResNet18,
    "q_ensemble": QEnsemble,
    "tanh_gaussian": TanhGaussian,
    "temperature": Temperature,
}

LOSS_BUILDER_REGISTRY: dict[str, type] = {
    "mse": losses.MSE,
    "l1": losses.L1,
    "huber": losses.Huber,
    "nll": losses.NLL,
    "sinkhorn": losses.Sinkhorn,
}

OPTIMIZER_BUILDER_REGISTRY: dict[str, type] = {
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
    "sgd": optimizers.SGD,
    "schedulefree": optimizers.ScheduleFree,
}

ENV_BUILDER_REGISTRY: dict[str, type] = {
    "gymnasium": GymnasiumEnv,
    "metaworld": MetaWorldEnv,
    "pusht": PushTEnv,
}

# The option that chooses from each registry.
REGISTRIES: dict[str, dict[str, type]] = {
    "trainer": TRAINER_REGISTRY,
    "dataset": DATASET_BUILDER_REGISTRY,
    "model": MODEL_BUILDER_REGISTRY,
    "loss": LOSS_BUILDER_REGISTRY,
    "optimizer": OPTIMIZER_BUILDER_REGISTRY,
    "env": ENV_BUILDER_REGISTRY,
}

C = TypeVar("C", bound=type[Any])


def register(registry: dict[str, type], name: str) -> Callable[[C], C]:
    """Class decorator that adds a component under `name`. Raises UserError when the name is taken."""

    def add(component: C) -> C:
        if name in registry:
            taken = registry[name]
            raise UserError(f"{name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another name")
        registry[name] = component
        return component

    return add
