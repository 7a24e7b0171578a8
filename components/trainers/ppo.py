"""Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347), for continuous and discrete actions.

Equation numbers are the paper's. r_t is the ratio of the new policy's probability of a_t to that of the policy that
acted, A_t the advantage, V' the value before the update, R_t = A_t + V'(s_t):

    delta_t = reward_t + gamma (1 - terminated_t) V'(s_{t+1}) - V'(s_t)                          eq. 12
    A_t     = delta_t + gamma lambda (1 - ended_t) A_{t+1}                                       eq. 11
    J_pi    = -E min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)                                   eq. 7
    J_V     = 1/2 E max((V - R_t)^2, (V' + clip(V - V', -eps, eps) - R_t)^2)
    J       = J_pi + c_1 J_V - c_2 E entropy                                                     eq. 9

An episode that is cut (truncated, or where the rollout ends) bootstraps from the value of the next state, one that
terminates does not. Advantages are normalised over the minibatch of all processes. The clipped J_V, these
networks, their weights and the numbers below are those of the authors' code and of CleanRL, not in the paper.

Deviations from CleanRL: truncated episodes bootstrap; the gradients of policy and value function are clipped
separately; a rollout is 256 steps of eight environments, not 2048 of one; observations are normalised by the statistics
from before the rollout.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Promises, Rollouts
from ..data.returns import generalised_advantage
from ..errors import UserError
from ..models.encoder import EncodedPolicy, encoder_of
from ..optimizers import update
from ..parallel import global_mean, global_moments
from ..value_learning import check_rates, check_transitions, networks, successors, summary


class PPO:
    """Proximal policy optimisation on rollouts."""

    needs = {"policy": "actor", "value": "v_ensemble", "encoder": "nature_cnn"}
    defaults: dict[str, Any] = {
        "env": "gymnasium",
        "loss": "mse",
        "optimizer": "adam",
        "optimizer.lr": 3e-4,
        "optimizer.eps": 1e-5,
        "optimizer.schedule": "linear",
        "grad-clip": 0.5,
        "steps": 1_000_000,
        "batch-size": 64,
        "online.num-envs": 8,
        "online.learning-starts": 0,
        "online.normalise-observations": True,
        "online.normalise-rewards": True,
        "eval-every": 50_000,
        "save-every": 100_000,
        **networks("", "value", hidden_dims=(64, 64), activation="tanh", init="orthogonal"),
        **networks("", squash="none", std="learned", final_scale=0.01),
    }
    debug_options = {"rollout": 16}

    @dataclass(frozen=True)
    class Config:
        """Proximal policy optimisation; the values of the paper's MuJoCo experiments."""

        rollout: int = 256
        """Steps of each environment between updates."""
        epochs: int = 10
        """Passes over a rollout."""
        discount: float = 0.99
        """Discount factor gamma per environment step."""
        gae_lambda: float = 0.95
        """Decay lambda of the generalised advantage."""
        clip: float = 0.2
        """Largest change eps of the probability ratio that is rewarded, and of the value."""
        clip_value: bool = True
        """Also clip the change of the value function."""
        value_weight: float = 0.5
        """Weight c_1 of the value function's loss."""
        entropy_weight: float = 0.0
        """Weight c_2 of the policy's entropy."""
        normalise_advantage: bool = True
        """Normalise the advantages of each minibatch to mean 0 and deviation 1."""
        target_kl: float | None = None
        """Divergence from the policy that acted, above which the rest of a rollout is skipped; None for no limit."""

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
        bounds = {"gae_lambda": (0, 1), "clip": (0, 1e9), "value_weight": (0, 1e9), "entropy_weight": (0, 1e9)}
        check_rates(self.config, **bounds)
        self.encoder, self.stopped = encoder_of(models), False
        if any(getattr(models[name], "members", 1) != 1 for name in models):
            raise UserError("ppo has one value function; set --model.value.members 1")
        if self.config.target_kl is None:
            self.promises = Promises(repeats_after=1)  # otherwise each step reads a divergence
        check_transitions(spec, "ppo")

    @staticmethod
    def data(config: Any) -> Rollouts:
        """Rollouts of these steps, with these passes. Raises UserError: a number below 1."""
        check_rates(config, rollout=(1, 1e9), epochs=(1, 1e9))
        return Rollouts(config.rollout, config.epochs)

    @torch.no_grad()
    def estimate(self, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
        """`rollout` `[T, N, ...]` with `log_prob`, `value`, `advantage`, `return` `[T, N]` of the policy that acted."""
        shape = rollout["reward"].shape
        flat = {key: value.flatten(0, 1) for key, value in rollout.items()}
        encoded = self.encoder(flat)
        log_prob, _ = self.models["policy"].evaluate(encoded, flat["action"])
        value = self.models["value"](encoded).view(shape)
        following = self.models["value"](self.encoder(successors(flat))).view(shape)
        delta = rollout["reward"] + self.config.discount * (1 - rollout["terminated"].float()) * following - value
        decay = self.config.discount * self.config.gae_lambda
        advantage = generalised_advantage(delta, rollout["ended"], decay)
        self.stopped = False
        rollout = {key: value for key, value in rollout.items() if not key.startswith("next.")}
        estimated = {"log_prob": log_prob.view(shape), "value": value, "advantage": advantage}
        return rollout | estimated | {"return": advantage + value}

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J of a minibatch, and the metrics."""
        encoded, clip = self.encoder(data), self.config.clip
        log_prob, entropy = self.models["policy"].evaluate(encoded, data["action"])  # [B], [B]
        advantage = data["advantage"]
        if self.config.normalise_advantage:
            mean, deviation = global_moments(advantage)
            advantage = (advantage - mean) / (deviation + 1e-8)
        log_ratio = log_prob - data["log_prob"]
        ratio = log_ratio.exp()
        policy_loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
        value, before = self.models["value"](encoded).squeeze(0), data["value"]
        error = (value - data["return"]).square()
        if self.config.clip_value:
            clipped = before + (value - before).clamp(-clip, clip)
            error = torch.maximum(error, (clipped - data["return"]).square())
        value_loss = 0.5 * error.mean()
        loss = policy_loss + self.config.value_weight * value_loss - self.config.entropy_weight * entropy.mean()
        with torch.no_grad():
            metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy.mean()}
            metrics |= {"kl": (ratio - 1 - log_ratio).mean(), "clipped": ((ratio - 1).abs() > clip).float().mean()}
        return loss, {k: v.detach() for k, v in metrics.items()} | summary("v", value)

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        if self.stopped:
            return {}
        loss, metrics = self.losses(data)
        limit = self.config.target_kl
        self.stopped = limit is not None and float(global_mean(metrics["kl"])) > limit
        if not self.stopped:
            update(self.optimizers, loss)
        return metrics

    def policy(self) -> nn.Module:
        """The evaluated policy: the mean, or the most likely action."""
        return EncodedPolicy(self.encoder, self.models["policy"])

    def explorer(self) -> nn.Module:
        """The collecting policy, which samples from the policy."""
        return Draw(self.encoder, self.models["policy"])


class Draw(nn.Module):
    """Samples actions, `[B, Da]` unclipped or `[B]` discrete, with the noise in the batch."""

    def __init__(self, encoder: nn.Module, policy: nn.Module) -> None:
        super().__init__()
        self.policy: Any = policy
        self.encoder, self.noise_shape = encoder, (self.policy.noise_width,)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.policy.draw(self.encoder(batch), batch["noise"])
