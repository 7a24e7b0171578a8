"""Shared by the algorithms with value functions: losses, targets, and checks of the data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .data.features import NO_CHOICE
from .errors import UserError

# Defaults of all offline trainers, to which each adds further ones. The papers train for 1M steps.
OFFLINE_RL: dict[str, Any] = {
    "loss": "mse",
    "optimizer": "adam",
    "optimizer.lr": 3e-4,
    "offline.normalise": ("action=scale", "observation=none"),
    "dataset.validation": 0.0,
    "steps": 100_000,
    "batch-size": 256,
    "eval-every": 10_000,
    "save-every": 10_000,
}
# Defaults of the online trainers with a replay buffer.
ONLINE_RL: dict[str, Any] = {
    "env": "gymnasium",
    "loss": "mse",
    "optimizer": "adam",
    "optimizer.lr": 3e-4,
    "offline.normalise": ("action=scale", "observation=none"),
    "steps": 1_000_000,
    "batch-size": 256,
    "online.num-envs": 1,
    "eval-every": 20_000,
    "save-every": 100_000,
}
# The critics of FQL, and OGBench's value functions.
WIDE = {"hidden_dims": (512, 512, 512, 512), "activation": "gelu", "layer_norm": True, "init": "glorot"}
GOAL_VALUE = WIDE | {"hidden_dims": (512, 512, 512)}
TOLERANCE = 1e-3  # by which an action may exceed [-1, 1]: float32, and quantised recordings


def networks(*names: str, **options: Any) -> dict[str, Any]:
    """Defaults of a trainer that set these options of its models of these names; "" is the policy."""
    parts = [".".join(filter(None, ("model", name))) for name in names]
    return {f"{part}.{option.replace('_', '-')}": value for part in parts for option, value in options.items()}


def bootstrapped(data: dict[str, Any], following: Tensor, discount: float) -> Tensor:
    """r + gamma (1 - terminated) following, `[B]`; gamma^n where the batch sums the rewards of n steps."""
    factor = data.get("discount", discount)
    return data["reward"] + factor * (1 - data["terminated"].float()) * following


def expectile_loss(difference: Tensor, expectile: float, advantage: Tensor | None = None) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2 (Kostrikov et al., 2022, eq. 4, 5); `advantage` may set the sign."""
    sign = difference if advantage is None else advantage
    return (torch.where(sign < 0, 1 - expectile, expectile) * difference.square()).mean()


def advantage_weight(advantage: Tensor, temperature: float, largest: float = 100.0) -> Tensor:
    """exp(temperature * A), clipped at `largest`, without gradient: the weight of advantage-weighted regression."""
    return (temperature * advantage.detach()).exp().clamp(max=largest)


def frozen(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """Call a module with constant parameters: gradients flow to its inputs only, and no others are computed."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return functional_call(module, weights, arguments, keywords)


class Counting:
    """A trainer that counts its updates as part of its state."""

    updates = 0

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


class Explorer(nn.Module):
    """Samples actions `[B, Da]` from a policy with the noise in the batch.

    Args:
        policy: `draw(observation, noise) -> action`, which is clipped to [-1, 1].
        encoder: Of the observations, if they have pictures.
    """

    def __init__(self, policy: nn.Module, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.policy: Any = policy
        self.encoder, self.noise_shape = encoder or nn.Identity(), (self.policy.noise_width,)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.policy.draw(self.encoder(batch), batch["noise"]).clamp(-1, 1)


class GaussianNoise(nn.Module):
    """The policy's action `[B, Da]` plus the noise in the batch, scaled to this deviation, clipped to [-1, 1]."""

    def __init__(self, policy: nn.Module, deviation: float) -> None:
        super().__init__()
        self.policy: Any = policy
        self.noise_shape, self.deviation = (self.policy.noise_width,), deviation

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return (self.policy(batch) + self.deviation * batch["noise"]).clamp(-1, 1)


def successors(data: dict[str, Any]) -> dict[str, Any]:
    """The next observations, under the keys of the current ones."""
    return {key.removeprefix("next."): value for key, value in data.items() if key.startswith("next.observation.")}


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Move a target network's weights towards `source` by the fraction `rate` (Polyak averaging)."""
    moving: list[Any] = list(target.parameters())
    torch._foreach_lerp_(moving, list(source.parameters()), rate)


def check_rates(config: Any, **bounds: tuple[float, float]) -> None:
    """Refuse numbers out of range: `discount` and `target_rate`, if any, in (0, 1], and those of `bounds`.

    Args:
        bounds: option=(least, largest), both allowed.

    Raises:
        UserError: naming the option, its value and its range.
    """
    for name in ("discount", "target_rate"):
        value = getattr(config, name, 1.0)
        if not 0 < value <= 1:
            raise UserError(f"--trainer.{name.replace('_', '-')} {value} must be in (0, 1]")
    for name, (least, largest) in bounds.items():
        value = getattr(config, name)
        if not least <= value <= largest:
            option = f"--trainer.{name.replace('_', '-')} {value}"
            raise UserError(
                f"{option} must be {f'{least:g} to {largest:g}' if largest < 1e9 else f'{least:g} or more'}"
            )


def check_transitions(spec: dict[str, Any], trainer: str, more: Iterable[str] = ()) -> None:
    """Refuse data without rewards and successors, or without what this trainer needs besides.

    Raises:
        UserError: naming the key that is missing.
    """
    state = [key for key in spec if key.startswith("observation.")]
    for key in ("reward", "terminated", *(f"next.{key}" for key in state), *more):
        if key not in spec:
            raise UserError(f"{trainer} learns from rewards and successors; the data has no {key!r}")


def check_actions(spec: dict[str, Any], trainer: str) -> None:
    """Refuse actions that the policy of this trainer cannot produce: discrete ones, or outside [-1, 1].

    Raises:
        UserError: names the trainers for discrete actions, or the range and the option that scales it.
    """
    if "classes" in spec["action"]:
        raise UserError(f"{trainer} {NO_CHOICE}")
    low, high = spec["action"].get("range", (None, None))
    if low is None:
        return
    least, largest = float(torch.tensor(low).min()), float(torch.tensor(high).max())
    if max(-least, largest) > 1 + TOLERANCE:
        raise UserError(
            f"{trainer} produces actions in [-1, 1]; the data's lie in [{least:.4g}, {largest:.4g}]: set"
            f" --dataset.action-scale {max(-least, largest):.4g}, which divides them and undoes it when the policy acts"
        )


def summary(name: str, values: Tensor) -> dict[str, Tensor]:
    """Mean, least and largest value, for the log."""
    values = values.detach()
    least, largest = values.aminmax()
    return {name: values.mean(), f"{name}_min": least, f"{name}_max": largest}


def data_summary(data: dict[str, Any]) -> dict[str, Tensor]:
    """Statistics of a batch for the log: mean reward, largest absolute reward, and fraction of terminated steps."""
    reward, terminated = data["reward"], data["terminated"]
    largest = torch.linalg.vector_norm(reward, float("inf"))
    return {"reward": reward.mean(), "reward_abs_max": largest, "terminated": terminated.mean(dtype=torch.float32)}
