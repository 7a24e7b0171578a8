"""Offline RL and imitation in plain PyTorch, from a copy of trainers/, models/, data/ and the modules beside them."""

import torch
from learning_kit.losses import MSE
from learning_kit.models.actor import Actor
from learning_kit.models.q_ensemble import QEnsemble, VEnsemble
from learning_kit.models.unet1d import UNet1d
from learning_kit.optimizers import AdamW
from learning_kit.trainers.diffusion import Diffusion
from learning_kit.trainers.iql import IQL
from safetensors.torch import save_file

torch.manual_seed(0)
STATE, EXPERT = "observation.state", torch.randn(5, 2)


def transitions() -> dict[str, torch.Tensor]:
    """A batch of single steps; the reward falls with the distance from the expert's action."""
    state, following, noise = torch.randn(128, 5), torch.randn(128, 5), torch.randn(128, 2)
    action = (state @ EXPERT / 4 + 0.3 * noise).clamp(-1, 1)
    batch = {STATE: state, "action": action, "reward": -noise.square().sum(1), f"next.{STATE}": following}
    return batch | {"terminated": torch.rand(128) < 0.5}


def chunks() -> dict[str, torch.Tensor]:
    """A batch of demonstrated chunks of four actions."""
    state = torch.randn(32, 5)
    return {STATE: state, "action": (state @ EXPERT / 4)[:, None].repeat(1, 4, 1).clamp(-1, 1)}


iql = {"policy": Actor(std="learned"), "critic": QEnsemble(), "value": VEnsemble()}
for kind, factories, draw in ((IQL, iql, transitions), (Diffusion, {"policy": UNet1d(channels=(16, 32))}, chunks)):
    spec = {key: {"shape": tuple(x.shape[1:]), "dtype": str(x.dtype).split(".")[1]} for key, x in draw().items()}
    models = torch.nn.ModuleDict({name: factory.build(spec) for name, factory in factories.items()})
    optimizers = {name: AdamW(lr=1e-3).build(model.parameters()) for name, model in models.items()}
    trainer = kind(models, optimizers, MSE().build(), spec)
    for step in range(151):
        metrics = trainer.train_step(draw())
        if step % 50 == 0:
            print(kind.__name__, step, sum(float(value) for name, value in metrics.items() if name.endswith("loss")))
    policy = trainer.policy() if kind is Diffusion else models["policy"]
    print(policy({STATE: torch.randn(3, 5), "noise": torch.randn(3, *getattr(policy, "noise_shape", ()))}).shape)
    save_file(policy.state_dict(), f"{kind.__name__}.safetensors")
