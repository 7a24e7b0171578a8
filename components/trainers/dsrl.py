"""Diffusion steering: reinforcement learning over the noise of a frozen policy (Wagenmaker et al., 2025).

DSRL-NA, "noise aliased", of arXiv:2506.15799 (algorithm 1). A flow or diffusion policy maps noise w to a chunk of
actions A = pi_dp(s, w) by a deterministic sampler, and stays as it is. Another policy pi_W chooses the noise, by soft
actor-critic (`sac.py`). Since many noises lead to one action, what the environment teaches is learnt by a critic of
actions Q_A, and what pi_W needs by a critic of noises Q_W that is distilled from it. Primes mark targets and what comes
after the h executed actions of a chunk:

    y       = sum_{i < h} gamma^i r_{t+i} + gamma^h (1 - terminated) (min_j Q_A'_j(s', A') - alpha log pi_W(w'|s'))
              where A' = pi_dp(s', w'), w' ~ pi_W(. | s')
    J_A     = sum_j E 1/2 (Q_A_j(s, A) - y)^2
    J_W     = sum_j E 1/2 (Q_W_j(s, w) - Q_A_j(s, pi_dp(s, w)))^2,     w ~ N(0, I)
    J_pi    = E alpha log pi_W(w|s) - min_j Q_W_j(s, w),               w ~ pi_W(. | s)
    J_alpha = E -alpha (log pi_W(w|s) + H)

The noise of pi_W is tanh of a Gaussian times b_W (`bound`); log pi_W is that of the tanh, in [-1, 1]. Q_A needs no
noise, so any data with rewards serves, also what others have done: a replay buffer, and a dataset beside it. Until
learning starts the noise is drawn from N(0, I), so the frozen policy itself collects the first data.

Where an episode ends inside a chunk, a terminated step ends the sum, and a truncated chunk is left out, as in `qc.py`.

Critics that have not learned yet lead pi_W away from what the frozen policy does well. So pi_W begins to learn after
them (`policy_starts`), with a short horizon and a small temperature. In the authors' code it begins with them, gamma is
0.99 for a chunk and alpha 1 at first.

Further deviations from the authors' code: it steps Q_A, pi_W and alpha 20 times and then Q_W 10 times, here all step
together; a chunk's rewards are discounted one by one, there they are summed; LayerNorm comes after the nonlinearity,
which is no tanh; the networks are smaller than its three layers of 2048; critics and pi_W see clipped observations.
"""

import copy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contracts import Place, Promises, Window
from ..data.augmentation import random_shift
from ..data.normalisation import LIMIT
from ..errors import UserError
from ..models.encoder import detached, encoded, encoder_of
from ..optimizers import update
from ..value_learning import (
    ONLINE_RL,
    Counting,
    bootstrapped,
    check_rates,
    check_transitions,
    data_summary,
    follow,
    frozen,
    networks,
    successors,
    summary,
)

SETTINGS = ("sampler", "sampling_steps", "samplers", "most_steps", "usual_steps", "guidance")  # of the frozen policy


class DSRL(Counting):
    """Soft actor-critic over the noise of a frozen flow or diffusion policy."""

    needs = {
        "policy": "tanh_gaussian",
        "critic": "q_ensemble",
        "noise_critic": "q_ensemble",
        "temperature": "temperature",
        "encoder": "cnn",
    }
    defaults: dict[str, Any] = ONLINE_RL | {
        "steps": 50_000,
        "online.learning-starts": 2000,
        "eval-every": 10_000,
        **networks("", hidden_dims=(256, 256, 256)),
        **networks("critic", hidden_dims=(256, 256, 256), layer_norm=True),
        **networks("noise_critic", hidden_dims=(256, 256, 256), layer_norm=True),
        **networks("temperature", initial=0.05),
    }
    spans = {"policy_starts": "updates"}

    @dataclass(frozen=True)
    class Config:
        """Diffusion steering; the authors' values where nothing else is said."""

        base: Annotated[str, Place()] = ""
        """Run folder of the policy that is steered."""
        chunk: int = 4
        """Actions h that are executed of each of its chunks, as by --policy.action-steps of its own run."""
        bound: float = 1.0
        """Largest absolute value b_W of a noise; 1 to 2.5 by task in the authors' code, mostly 1.5."""
        discount: float = 0.95
        """Discount factor gamma per environment step; 0.99 of a whole chunk in the authors' code, mostly."""
        target_rate: float = 0.005
        """Fraction of the critics mixed into their targets after each update (tau)."""
        target_entropy: float = 0.0
        """Target H of the entropy of the noise before the factor b_W."""
        backup_entropy: bool = True
        """Add the entropy to the targets."""
        policy_starts: int = 2000
        """Updates of the critics before the first update of policy and temperature; 0 in the authors' code."""
        shift: int = 4
        """Largest random shift of pictures in pixels."""

    def __init__(
        self,
        models: nn.ModuleDict,
        optimizers: dict[str, Optimizer],
        loss: nn.Module,
        spec: dict[str, Any],
        config: Any = None,
        base: nn.Module | None = None,
    ) -> None:
        self.models: Any = models
        self.config: Any = config or self.Config()
        self.optimizers, self.loss = optimizers, loss
        if base is None:
            raise UserError("dsrl steers a frozen policy: --trainer.base RUN")
        bounds = {"bound": (1e-3, 1e3), "target_entropy": (-1e9, 1e9), "policy_starts": (0, 1e9), "shift": (0, 1e3)}
        check_rates(self.config, **bounds)
        self.promises = Promises(None if self.config.policy_starts else 1)  # else its steps do not repeat
        check_transitions(spec, "dsrl")
        self.encoder = encoder_of(models)
        self.executed = Executed(base, spec["action"])
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    @staticmethod
    def data(config: Any) -> Window:
        """Chunks of actions as they are executed, and their successors."""
        check_rates(config, chunk=(1, 1e4))
        return Window(discount=config.discount, chunk=config.chunk)

    @staticmethod
    def base(config: Any) -> tuple[str, None]:
        """The run folder of the policy that is steered, and no scale."""
        return config.base, None

    @staticmethod
    def model_spec(model: str, spec: dict[str, Any], config: Any) -> dict[str, Any]:
        """For the policy and the critic of noises, the action is the noise `[W]`."""
        if model not in ("policy", "noise_critic"):
            return spec
        width = int(torch.Size(spec["action"]["noise"]).numel())
        return spec | {"action": {"shape": (width,), "dtype": "float32"}}

    def critic_loss(self, raw: dict[str, Any], data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_A, over the chunks whose return is known."""
        with torch.no_grad():
            w, log_prob = self.models["policy"].sample(data, prefix="next.")  # [B, W], [B]
            action = self.executed(successors(raw), self.config.bound * w)  # [B, (h,) Da]
            following = self.models["target_critic"](data, action, prefix="next.").amin(0)  # [B]
            if self.config.backup_entropy:
                following = following - self.models["temperature"]() * log_prob
            y = bootstrapped(data, following, self.config.discount)
        q = self.models["critic"](data, data["action"])  # [E, B]
        complete = data.get("complete", torch.ones_like(y))  # [B], 1 or 0
        loss = 0.5 * len(q) * self.loss(q * complete, (y * complete).expand_as(q))  # the sum over critics
        metrics = {"critic_loss": loss.detach(), "complete": complete.mean()}
        return loss, metrics | summary("q", q) | data_summary(data)

    def distill_loss(self, raw: dict[str, Any], data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_W, each member from its own of Q_A."""
        with torch.no_grad():
            w = torch.randn(len(data["reward"]), self.executed.width, device=data["reward"].device)  # [B, W]
            target = self.models["critic"](data, self.executed(raw, w))  # [E, B]
        q = self.models["noise_critic"](data, w / self.config.bound)
        loss = 0.5 * len(q) * self.loss(q, target)
        return loss, {"distill_loss": loss.detach(), "q_noise": q.detach().mean()}

    def actor_losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """J_pi + J_alpha, without gradient for the critic, nor from J_pi for the temperature."""
        w, log_prob = self.models["policy"].sample(data)  # [B, W], [B]
        q = frozen(self.models["noise_critic"], data, w).amin(0)  # [B]
        alpha = self.models["temperature"]()
        actor_loss = (alpha.detach() * log_prob - q).mean()
        temperature_loss = -alpha * (log_prob.detach().mean() + self.config.target_entropy)
        metrics = {"actor_loss": actor_loss, "temperature_loss": temperature_loss, "temperature": alpha}
        metrics |= {"entropy": -log_prob.mean(), "noise_abs": self.config.bound * w.abs().mean()}
        return actor_loss + temperature_loss, {name: value.detach() for name, value in metrics.items()}

    def losses(self, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all losses, which train different networks, and the metrics."""
        seen = encoded(self.encoder, clipped(random_shift(data, self.config.shift)))  # the frozen policy sees `data`
        critic_loss, metrics = self.critic_loss(data, seen)
        distill_loss, more = self.distill_loss(data, detached(seen))
        actor_losses, most = self.actor_losses(detached(seen))
        return critic_loss + distill_loss + actor_losses, metrics | more | most

    def train_step(self, data: dict[str, Any]) -> dict[str, Tensor]:
        loss, metrics = self.losses(data)
        waits = self.updates < self.config.policy_starts
        update(self.optimizers, loss, *(("critic", "noise_critic", "encoder") if waits else ()))
        self.updates += 1
        follow(self.models["target_critic"], self.models["critic"], self.config.target_rate)
        return metrics

    def policy(self) -> nn.Module:
        """The frozen policy with the mean noise."""
        return Steered(self.encoder, self.models["policy"], self.executed, self.config.bound)

    def explorer(self) -> nn.Module:
        """The frozen policy with noise that is drawn from pi_W, at first from N(0, I)."""
        return Exploring(self.encoder, self.models["policy"], self.executed, self.config.bound)


class Executed(nn.Module):
    """Observations and noise `[B, W]` -> what is executed of the frozen policy's chunk, normalised: `[B, (h,) Da]`.

    Args:
        base: Normalised observations and `noise` `[B, *noise_shape]` -> normalised action or chunk.
        action: Spec of the action that is executed; `limits` are the environment's.

    Raises:
        UserError: the frozen policy's noise has another shape than in `action`.
    """

    def __init__(self, base: nn.Module, action: dict[str, Any]) -> None:
        super().__init__()
        self.base: Any = base.eval().requires_grad_(False)
        self.noise_shape, self.shape = tuple(action["noise"]), tuple(action["shape"])
        self.width = int(torch.Size(self.noise_shape).numel())
        if (found := tuple(getattr(base, "noise_shape", self.noise_shape))) != self.noise_shape:
            raise UserError(f"the frozen policy's noise has shape {found}, that of the policy here {self.noise_shape}")
        limits = action.get("limits")
        self.limits: Any
        self.register_buffer("limits", None if limits is None else torch.tensor(limits), persistent=False)  # [2, Da]

    def forward(self, batch: dict[str, Any], noise: Tensor) -> Tensor:
        observation = {key: value for key, value in batch.items() if key.startswith("observation.")}
        chunk = self.base({**observation, "noise": noise.view(-1, *self.noise_shape)})  # [B, (Ta,) Da]
        if chunk.ndim > 2:
            chunk = chunk[:, : self.shape[0]] if len(self.shape) > 1 else chunk[:, 0]
        return chunk if self.limits is None else chunk.clamp(self.limits[0], self.limits[1])

    def train(self, mode: bool = True) -> "Executed":
        """The frozen policy stays in evaluation mode."""
        return super().train(False)


class Steered(nn.Module):
    """Observations -> the chunk of the frozen policy for the mean noise of pi_W.

    Its weights are those of pi_W: the frozen policy's are kept once, in a folder of their own.
    """

    def __init__(self, encoder: nn.Module, policy: nn.Module, executed: Executed, bound: float) -> None:
        super().__init__()
        self.policy: Any = policy
        self.encoder, self.executed, self.bound = encoder, executed, bound
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    def noise(self, batch: dict[str, Any]) -> Tensor:
        """The noise `[B, W]`."""
        return self.bound * self.policy(self.encoder(clipped(batch)))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.executed(batch, self.noise(batch))

    def __getattr__(self, name: str) -> Any:
        """The settings of the frozen policy are this one's; its samplers without those of noise in each step."""
        if name not in SETTINGS:
            return super().__getattr__(name)
        base = self.executed.base
        if name != "samplers":
            return getattr(base, name)
        return tuple(x for x in base.samplers if x not in getattr(base, "random_samplers", ()))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            setattr(self.executed.base, name, value)
        else:
            super().__setattr__(name, value)


class Exploring(Steered):
    """Observations and `noise` -> the chunk of the frozen policy for a noise that is drawn from pi_W.

    Until `random_until` environment steps it is the noise in the batch, from N(0, I).
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noise_shape, self.env_step, self.random_until = (self.executed.width,), 0, 0

    def noise(self, batch: dict[str, Any]) -> Tensor:
        if self.env_step < self.random_until:
            return batch["noise"]
        return self.bound * self.policy.draw(self.encoder(clipped(batch)), batch["noise"])


def clipped(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose observations are at most `LIMIT` deviations away, as those of running statistics are.

    The frozen policy's statistics are of demonstrations, in which much hardly moves: the turning of a ball that rolls
    away in basketball-v3 is 1000 deviations.
    """
    seen = {k: v for k, v in batch.items() if "observation." in k and v.is_floating_point()}
    return batch | {key: value.clamp(-LIMIT, LIMIT) for key, value in seen.items()}


def _drop_frozen(module: nn.Module, weights: dict[str, Any], prefix: str, local: Any) -> None:
    for name in [name for name in weights if name.startswith(f"{prefix}executed.")]:
        del weights[name]


def _expect_no_frozen(module: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.startswith("executed.")]
