"""Deep Q-network (Mnih et al., 2015), with double Q-learning (van Hasselt et al., 2016, arXiv:1509.06461) and n steps.

Primes mark targets and what follows n steps later:

    y   = sum_{i < n} gamma^i r_{t+i} + gamma^n (1 - terminated) Q'(s', argmax_a Q(s', a))       double: eq. 4
    J_Q = E (Q(s, a) - y)^2

With --trainer.no-double the argmax is over Q'. The collecting policy takes a random action with a probability that
falls from `epsilon_start` to `epsilon_end`. The target copies the weights every `target_every` updates.

Deviations, as in CleanRL: the squared error is not clipped (--loss huber does so), Adam in place of RMSProp, its
values for classic control.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Window
from ..data.augmentation import random_shift
from ..errors import UserError
from ..models.encoder import encoder_of
from ..optimizers import update
from ..value_learning import (
    ONLINE_RL,
    Counting,
    bootstrapped,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    successors,
    summary,
)


class DQN(Counting):
    """Deep Q-network on single transitions or n-step returns, for discrete actions."""

    needs = {"critic": "discrete_q", "encoder": "nature_cnn"}
    defaults: dict[str, Any] = ONLINE_RL | {
        "optimizer.lr": 2.5e-4,
        "steps": 500_000,
        "batch-size": 128,
        "online.buffer-size": 10_000,
        "online.learning-starts": 10_000,
        "online.updates-per-step": 0.1,
        "env.id": "CartPole-v1",
    }

    spans = {"exploration_steps": "environment steps"}

    @dataclass(frozen=True)
    class Config:
        """Deep Q-network; CleanRL's values for classic control."""

        double: bool = True
        """Choose the best next action by the network, and evaluate it by the target."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        n_step: int = 1
        """Rewards that are summed before bootstrapping."""
        target_every: int = 50
        """Updates of the network per update of the target."""
        target_rate: float = 1.0
        """Fraction of the network mixed into the target at each of its updates."""
        epsilon_start: float = 1.0
        """Initial probability of a random action."""
        epsilon_end: float = 0.05
        """Final probability of a random action."""
        exploration_steps: int = 250_000
        """Environment steps over which that probability falls, linearly."""
        shift: int = 0
        """Largest random shift of pictures in pixels (DrQ, Kostrikov et al., 2021)."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
    ) -> None:
        self.models: Any = models
        self.optimizers, self.loss, self.config = optimizers, loss, config or self.Config()
        bounds = {"n_step": (1, 1e9), "target_every": (1, 1e9), "exploration_steps": (0, 1e9), "shift": (0, 1e3)}
        check_rates(self.config, epsilon_start=(0, 1), epsilon_end=(0, 1), **bounds)
        self.encoder, self.promises = encoder_of(models), Promises(repeats_after=self.config.target_every)
        check_transitions(spec, "dqn")
        if "classes" not in spec["action"]:
            raise UserError("dqn chooses among discrete actions; for continuous ones use --trainer sac, td3 or ppo")
        self.actions = spec["action"]["classes"]
        for name in [name for name in ("critic", "encoder") if name in models and list(models[name].parameters())]:
            models[f"target_{name}"] = copy.deepcopy(models[name]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Single transitions, or n steps."""
        return Window(discount=config.discount, n_step=config.n_step)

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_Q, and the metrics."""
        data = random_shift(data, self.config.shift)
        with torch.no_grad():
            then = successors(data)
            target = encoder_of(self.models, "target_encoder")
            following = self.models["target_critic"](target(then))  # [B, n]
            best = (self.models["critic"](self.encoder(then)) if self.config.double else following).argmax(1)  # [B]
            y = bootstrapped(data, following.gather(1, best[:, None]).squeeze(1), self.config.discount)
        values = self.models["critic"](self.encoder(data))  # [B, n]
        q = values.gather(1, data["action"][:, None]).squeeze(1)  # [B]
        loss = self.loss(q, y)
        return loss, {"critic_loss": loss.detach()} | summary("q", q) | data_summary(data)

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        update(self.optimizers, loss)
        self.updates += 1
        if self.updates % self.config.target_every == 0:
            for name in [name for name in ("critic", "encoder") if f"target_{name}" in self.models]:
                follow(self.models[f"target_{name}"], self.models[name], self.config.target_rate)
        return metrics

    def policy(self) -> nn.Module:
        """The evaluated policy: the best action."""
        return Greedy(self.encoder, self.models["critic"])

    def explorer(self) -> nn.Module:
        """The collecting policy: the best action, or a random one."""
        return EpsilonGreedy(self.policy(), self.actions, self.config)


class Greedy(nn.Module):
    """The action `[B]` with the largest value."""

    def __init__(self, encoder: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.encoder, self.critic = encoder, critic

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.critic(self.encoder(batch)).argmax(1)


class EpsilonGreedy(nn.Module):
    """A policy's action `[B]`, or a random one with a probability that falls with `env_step`."""

    def __init__(self, policy: nn.Module, actions: int, config: Any) -> None:
        super().__init__()
        self.policy, self.actions, self.config = policy, actions, config
        self.noise_shape, self.env_step = (2,), 0

    def forward(self, batch: dict[str, Any]) -> Tensor:
        config = self.config
        fraction = min(self.env_step / config.exploration_steps, 1.0) if config.exploration_steps else 1.0
        epsilon = config.epsilon_start + fraction * (config.epsilon_end - config.epsilon_start)
        first, second = torch.special.ndtr(batch["noise"]).unbind(1)  # uniform in [0, 1]
        anything = (second * self.actions).long().clamp(max=self.actions - 1)
        return torch.where(first < epsilon, anything, self.policy(batch))
