"""The catalogue of components, plain dicts from name to class, and the map of this folder.

TRAINER_REGISTRY["my_trainer"] = MyTrainer          # or, refusing a name that is taken:
@register(TRAINER_REGISTRY, "my_trainer")

The map, each line standing on those above it:

    errors, parallel, records    what a user can mend, in one line; what processes agree on; what a record may hold
    intervals            95 % intervals of rates, of means and of differences
    data/                features and fingerprint of a dataset, batches by (seed, step), normalisation, augmentation
    losses, optimizers, value_learning, contracts      what several algorithms share; what a trainer may offer
    models/              networks, one file each
    trainers/            algorithms, one file each

    envs/                environments, one file a family; vector environments that may fail
    acting/              a policy in the environment's units: chunks, evaluation, a robot's loop, saving, loading
    learning/            what is trained as one object: gradients, metrics, held-out loss
    speed/               --compile, CUDA graphs, matrix products
    run/                 arguments, run folder, what it began from, checkpoints, policies, clock, curves, how it ends
    datasets/            formats, one file each; transitions, goals, mixtures; inspect and convert
    experience/          collection, replay, rollouts, a frozen policy underneath, recording
    evaluate, export, report                           commands: python -m components.<name>

The first six lines are plain PyTorch and stand alone: a fork copies `trainers/`, `models/`, `data/` and the flat
modules beside them, without this file (tests/examples/fork.py is a training with them alone). All else needs the whole
folder, but neither the scripts nor accelerate.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from . import losses, optimizers
from .datasets.aloha import AlohaDataset
from .datasets.d4rl import D4RLDataset
from .datasets.gymnasium import GymnasiumRollouts
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
from .envs.ogbench import OGBenchEnv
from .envs.pusht import PushTEnv
from .errors import UserError
from .models.act import ACTransformer
from .models.actor import Actor
from .models.cnn import CNN
from .models.discrete_q import DiscreteQ
from .models.dit import DiT
from .models.mlp import MLP, ResMLP
from .models.nature_cnn import NatureCNN
from .models.q_ensemble import QEnsemble, VEnsemble
from .models.resnet18 import ResNet18
from .models.sequence import GRU, Transformer
from .models.tanh_gaussian import TanhGaussian
from .models.temperature import Temperature
from .models.unet1d import UNet1d
from .models.v_categorical import VCategorical
from .models.vector_field import VectorField
from .run.policies import load_policy
from .trainers.act import ACT
from .trainers.awac import AWAC
from .trainers.bc import BC
from .trainers.cql import CQL
from .trainers.dagger import DAgger
from .trainers.diffusion import Diffusion
from .trainers.dqn import DQN
from .trainers.dsrl import DSRL
from .trainers.flow import Flow
from .trainers.fql import FQL
from .trainers.gcbc import GCBC
from .trainers.gciql import GCIQL
from .trainers.hiql import HIQL
from .trainers.ifql import IFQL
from .trainers.iql import IQL
from .trainers.ppo import PPO
from .trainers.qc import QC
from .trainers.rebrac import ReBRAC
from .trainers.recap import Recap
from .trainers.residual import Residual
from .trainers.rlpd import RLPD
from .trainers.sac import SAC
from .trainers.td3 import TD3
from .trainers.td3_bc import TD3BC

__all__ = ["REGISTRIES", "UserError", "load_policy", "register"]

TRAINER_REGISTRY: dict[str, type] = {
    "bc": BC,
    "act": ACT,
    "diffusion": Diffusion,
    "flow": Flow,
    "td3_bc": TD3BC,
    "iql": IQL,
    "awac": AWAC,
    "cql": CQL,
    "rebrac": ReBRAC,
    "fql": FQL,
    "ifql": IFQL,
    "qc": QC,
    "recap": Recap,
    "gcbc": GCBC,
    "gciql": GCIQL,
    "hiql": HIQL,
    "ppo": PPO,
    "sac": SAC,
    "td3": TD3,
    "dqn": DQN,
    "rlpd": RLPD,
    "residual": Residual,
    "dagger": DAgger,
    "dsrl": DSRL,
}

DATASET_BUILDER_REGISTRY: dict[str, type] = {
    "aloha": AlohaDataset,
    "d4rl": D4RLDataset,
    "gymnasium": GymnasiumRollouts,
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
    "nature_cnn": NatureCNN,
    "resnet18": ResNet18,
    "actor": Actor,
    "vector_field": VectorField,
    "q_ensemble": QEnsemble,
    "v_ensemble": VEnsemble,
    "v_categorical": VCategorical,
    "discrete_q": DiscreteQ,
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
    "ogbench": OGBenchEnv,
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
