"""Offline RL against slow float64 references from the papers' equations; transitions and goals by hand.

A reference has the trainer's weights and repeats its draws of noise. Networks, Adam and Polyak averaging are written
out; autograd differentiates the papers' losses, each for the networks that it trains.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components import TRAINER_REGISTRY, UserError
from components.contracts import GOAL, STATE, Goals, GoalSampling, Window, construct, model_spec_of
from components.data.features import build_models, describe
from components.data.normalisation import Normaliser
from components.data.returns import returns_to_go
from components.datasets.episodes import build, build_episodes, from_columns
from components.datasets.goals import GoalTransitions, goal_transitions
from components.datasets.transitions import Transitions, transitions
from components.models.actor import Actor
from components.models.q_ensemble import QEnsemble, VEnsemble
from components.models.tanh_gaussian import TanhGaussian
from components.models.temperature import Temperature
from components.models.v_categorical import VCategorical
from components.models.vector_field import VectorField
from components.optimizers import Adam

Data = dict[str, Tensor]
B, DS, DA, CHUNK, LR = 16, 3, 2, 3, 1e-2
THEN = f"next.{STATE}"
USUAL = (STATE, "action", "reward", "terminated", THEN)
GOALS = (GOAL, "value_goal")


def batch(keys: Iterable[str], chunk: bool = False) -> Data:
    """The same numbers for every trainer, as far as it takes them; of the chunks, three are cut after one step."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    everything = {key: normal(B, DS) for key in (STATE, THEN, *GOALS, "subgoal", "high_target")}
    everything |= {"action": 2 * uniform(B, DA) - 1, "next.action": 2 * uniform(B, DA) - 1}
    everything |= {"reward": normal(B), "terminated": uniform(B) < 1 / 3, "return_to_go": normal(B)}
    everything |= {"discount": 0.9 ** (1 + torch.arange(B) % 3), "intervention": torch.arange(B) % 5 == 2}
    if chunk:
        everything |= {"action": 2 * uniform(B, CHUNK, DA) - 1, "complete": (torch.arange(B) % 7 != 1).float()}
        everything["action_is_pad"] = (torch.arange(B) % 7 == 1)[:, None] & (torch.arange(CHUNK) > 0)
    return {key: everything[key] for key in keys}


# ---- the reference: networks, Adam and targets ---------------------------------------------------------------------


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) (Hendrycks & Gimpel, 2016)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class Reference:
    """A trainer's weights as float64 leaves, and what is done with them."""

    def __init__(self, trainer: Any, activation: Callable[[Tensor], Tensor]) -> None:
        self.config, self.activation, self.updates = trainer.config, activation, 0
        self.threshold, self.seen = 0.0, [0.0]  # recap's, and the returns that its values have seen
        self.weights = {
            name: {key: p.detach().double().requires_grad_() for key, p in model.named_parameters()}
            for name, model in trainer.models.items()
        }
        zeros = lambda ws: [(torch.zeros_like(w), torch.zeros_like(w)) for w in ws.values()]  # noqa: E731
        self.moments = {name: zeros(ws) for name, ws in self.weights.items()}
        self.steps = dict.fromkeys(self.weights, 0)

    def stack(self, weights: Data, x: Tensor) -> Tensor:
        """Linear layers `[outputs, inputs]` with a nonlinearity between them, and LayerNorms after those."""
        numbers = sorted({int(key.split(".")[1]) for key in weights if key.startswith("net.")})
        for number in numbers:
            weight, bias = weights[f"net.{number}.weight"], weights[f"net.{number}.bias"]
            if weight.ndim == 1:
                centred = x - x.mean(-1, keepdim=True)
                x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
            else:
                x = x @ weight.T + bias
                x = x if number == numbers[-1] else self.activation(x)
        return x

    def net(self, name: str, *parts: Tensor) -> Tensor:
        """A plain network of its inputs side by side, in the order of their keys' names."""
        return self.stack(self.weights[name], torch.cat(parts, -1))

    def ensemble(self, name: str, *parts: Tensor) -> Tensor:
        """The values `[E, ...]` of the members, one after the other."""
        ws, x = self.weights[name], torch.cat(parts, -1)
        count = len(ws["net.0.weight"])
        members = [
            {key: w[i].T if w.ndim == 3 else w.view(count, -1)[i] for key, w in ws.items()} for i in range(count)
        ]
        return torch.stack([self.stack(member, x).squeeze(-1) for member in members])

    def gradients(self, losses: Data) -> dict[str, tuple[Tensor, ...]]:
        """Of each loss by the weights of the model of that name, and by no others."""
        leaves = {name: list(self.weights[name].values()) for name in losses}
        return {name: torch.autograd.grad(loss, leaves[name], retain_graph=True) for name, loss in losses.items()}

    @torch.no_grad()
    def improve(self, **losses: Tensor) -> None:
        """One step of Adam (Kingma & Ba, 2015, algorithm 1) for each model, at the same weights for all."""
        for name, gradients in self.gradients(losses).items():
            self.steps[name] += 1
            t = self.steps[name]
            for w, g, (m, v) in zip(self.weights[name].values(), gradients, self.moments[name], strict=True):
                m += 0.1 * (g - m)
                v += 0.001 * (g**2 - v)
                w -= LR * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    @torch.no_grad()
    def follow(self, *names: str) -> None:
        """Polyak averaging."""
        for name in names:
            rate = self.config.target_rate
            for key, w in self.weights[name].items():
                target = self.weights[f"target_{name}"][key]
                target.copy_((1 - rate) * target + rate * w)

    def distance(self, trainer: Any) -> float:
        """Largest difference of any weight, targets included."""
        assert set(self.weights) == set(trainer.models)
        found = []
        for name, model in trainer.models.items():
            for key, p in model.named_parameters():
                found.append(float((p.detach().double() - self.weights[name][key].detach()).abs().max()))
        return max(found)

    def gamma(self, data: Data) -> Any:
        return data.get("discount", self.config.discount)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).double()


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape).double()


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2), summed over the dimensions."""
    return (-((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def summed_squares(q: Tensor, y: Tensor) -> Tensor:
    """sum_i E (Q_i - y)^2."""
    return torch.stack([((member - y.detach()) ** 2).mean() for member in q]).sum()


def expectile(u: Tensor, tau: float, sign: Tensor | None = None) -> Tensor:
    """E |tau - 1(u < 0)| u^2."""
    return ((tau - ((u if sign is None else sign) < 0).double()).abs() * u**2).mean()


# ---- the reference: algorithms, each one update and what it logs ---------------------------------------------------


def td3_bc(ref: Reference, data: Data) -> Data:
    c, s, a, then = ref.config, data[STATE], data["action"], data[THEN]
    eps = (c.policy_noise * normal(B, DA)).clamp(-c.noise_clip, c.noise_clip)
    following = (ref.net("target_policy", then).tanh() + eps).clamp(-1, 1)
    y = ref.ensemble("target_critic", then, following).amin(0)
    y = data["reward"] + ref.gamma(data) * (1 - data["terminated"]) * y
    metrics = {"critic_loss": summed_squares(ref.ensemble("critic", s, a), y)}
    ref.improve(critic=metrics["critic_loss"])
    ref.updates += 1
    if ref.updates % 2 == 0:
        pi = ref.net("policy", s).tanh()
        q = ref.ensemble("critic", s, pi)[0]
        metrics["lambda"] = c.alpha / q.abs().mean().detach()  # eq. 5
        metrics["bc_loss"] = ((pi - a) ** 2).mean()
        metrics["actor_loss"] = metrics["bc_loss"] - metrics["lambda"] * q.mean()  # eq. 3
        ref.improve(policy=metrics["actor_loss"])
        ref.follow("policy", "critic")
    return metrics


def rebrac(ref: Reference, data: Data) -> Data:
    c, s, a, then = ref.config, data[STATE], data["action"], data[THEN]
    eps = (c.policy_noise * normal(B, DA)).clamp(-c.noise_clip, c.noise_clip)
    following = (ref.net("target_policy", then).tanh() + eps).clamp(-1, 1)
    penalty = ((following - data["next.action"]) ** 2).sum(1)
    y = ref.ensemble("target_critic", then, following).amin(0) - c.critic_penalty * penalty
    y = data["reward"] + c.discount * (1 - data["terminated"]) * y  # eq. 4
    metrics = {"critic_loss": summed_squares(ref.ensemble("critic", s, a), y), "critic_penalty": penalty.mean()}
    ref.improve(critic=metrics["critic_loss"])
    ref.updates += 1
    if ref.updates % 2 == 0:
        pi = ref.net("policy", s).tanh()
        q = ref.ensemble("critic", s, pi).amin(0)
        metrics["lambda"] = 1 / q.abs().mean().detach()
        metrics["bc_loss"] = ((pi - a) ** 2).sum(1).mean()
        metrics["actor_loss"] = c.actor_penalty * metrics["bc_loss"] - metrics["lambda"] * q.mean()  # eq. 3
        ref.improve(policy=metrics["actor_loss"])
        ref.follow("policy", "critic")
    return metrics


def awac(ref: Reference, data: Data) -> Data:
    s, a, then = data[STATE], data["action"], data[THEN]
    std = ref.weights["policy"]["log_std"].clamp(-5, 2).exp()
    following = (ref.net("policy", then) + std * normal(B, DA)).clamp(-1, 1)
    y = ref.ensemble("target_critic", then, following).amin(0)
    y = data["reward"] + ref.gamma(data) * (1 - data["terminated"]) * y
    critic_loss = summed_squares(ref.ensemble("critic", s, a), y)
    ref.improve(critic=critic_loss)
    mean = ref.net("policy", s)
    drawn = (mean + std * normal(B, DA)).clamp(-1, 1)
    advantage = ref.ensemble("critic", s, a).amin(0) - ref.ensemble("critic", s, drawn).amin(0)
    weight = (advantage / ref.config.temperature).exp().clamp(max=100).detach()
    actor_loss = -(weight * gaussian_log_prob(a, mean, std)).mean()  # eq. 13
    ref.improve(policy=actor_loss)
    ref.follow("critic")
    return {"critic_loss": critic_loss, "actor_loss": actor_loss, "weight_max": weight.max()}


# The others compute all losses at the same weights: the losses by the models that they train, and what is logged.


def iql(ref: Reference, data: Data) -> tuple[Data, Data]:
    c, s, a = ref.config, data[STATE], data["action"]
    u = ref.ensemble("target_critic", s, a).amin(0) - ref.ensemble("value", s)[0]
    y = data["reward"] + ref.gamma(data) * (1 - data["terminated"]) * ref.ensemble("value", data[THEN])[0]
    weight = (c.temperature * u).exp().clamp(max=100).detach()
    log_prob = gaussian_log_prob(a, ref.net("policy", s).tanh(), ref.weights["policy"]["log_std"].clamp(-5, 2).exp())
    value_loss = expectile(u, c.expectile)  # eq. 5
    critic_loss = summed_squares(ref.ensemble("critic", s, a), y)  # eq. 6
    actor_loss = -(weight * log_prob).mean()  # eq. 7
    metrics = {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
    return {"value": value_loss, "critic": critic_loss, "policy": actor_loss}, metrics | {"weight_max": weight.max()}


def squashed(ref: Reference, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """An action of the tanh-Gaussian and its log-probability (Haarnoja et al., 2018, eq. 21)."""
    mean, log_std = ref.net("policy", state).split(DA, -1)
    std = log_std.clamp(-20, 2).exp()
    u = mean + std * noise
    return u.tanh(), gaussian_log_prob(u, mean, std) - (1 - u.tanh() ** 2).log().sum(-1)


def cql(ref: Reference, data: Data) -> tuple[Data, Data]:
    c, s, a, then = ref.config, data[STATE], data["action"], data[THEN]
    n, each = c.actions, lambda x: x[:, None].expand(-1, c.actions, -1)
    y = ref.ensemble("target_critic", then, squashed(ref, then, normal(B, DA))[0]).amin(0)
    y = data["reward"] + ref.gamma(data) * (1 - data["terminated"]) * y
    random = 2 * uniform(B, n, DA) - 1
    here, here_log_prob = squashed(ref, each(s), normal(B, n, DA))
    there, there_log_prob = squashed(ref, each(then), normal(B, n, DA))
    q, conservative = ref.ensemble("critic", s, a), torch.zeros(()).double()
    values = [ref.ensemble("critic", each(s), x.detach()) for x in (random, here, there)]  # [E, B, n] each
    td_loss = summed_squares(q, y)
    if c.calibrated:
        reached = data["return_to_go"][:, None]
        raised = [values[0], *(torch.where(v > reached, v, reached) for v in values[1:])]
    else:
        raised = values
    log_probs = (torch.full((B, n), DA * math.log(0.5)).double(), here_log_prob.detach(), there_log_prob.detach())
    for i in range(len(q)):
        terms = [(v[i] - log_prob).exp() for v, log_prob in zip(raised, log_probs, strict=True)]
        conservative = conservative + (torch.cat(terms, 1).sum(1).log() - q[i]).mean()  # R_i, eq. 4
    drawn, log_prob = squashed(ref, s, normal(B, DA))
    log_temperature = ref.weights["temperature"]["log"]
    actor_loss = (log_temperature.exp().detach() * log_prob - ref.ensemble("critic", s, drawn).amin(0)).mean()
    temperature_loss = -log_temperature * (log_prob.mean().detach() - DA)
    metrics = {"critic_loss": td_loss, "conservative_loss": conservative, "actor_loss": actor_loss}
    metrics |= {"temperature_loss": temperature_loss, "q_policy": torch.stack(values[1:]).mean()}
    losses = {"critic": td_loss + c.alpha * conservative, "policy": actor_loss, "temperature": temperature_loss}
    return losses, metrics


def euler(ref: Reference, name: str, state: Tensor, z: Tensor) -> Tensor:
    """From noise along the velocity field, `[N, width of the action or chunk]`, cut to [-1, 1]."""
    x, steps = z, ref.config.flow_steps
    for i in range(steps):
        x = x + ref.net(name, state, x, torch.full((len(x), 1), i / steps).double()) / steps
    return x.clamp(-1, 1)


def flow_errors(ref: Reference, name: str, data: Data) -> Tensor:
    """(v(x_t, t, s) - (a - z))^2, of the width of the action or chunk."""
    a = data["action"].flatten(1)
    z, t = normal(*a.shape), uniform(B)[:, None]
    return (ref.net(name, data[STATE], (1 - t) * z + t * a, t) - (a - z)) ** 2


def one_step_losses(ref: Reference, data: Data, alpha: float) -> tuple[Tensor, Data]:
    """alpha J_distill - lambda E mean_i Q_i(s, pi(s, z)), where lambda is 1 or 1 / mean |mean_i Q_i|."""
    s, z = data[STATE], normal(*data["action"].flatten(1).shape)
    mu = euler(ref, "flow", s, z).detach()
    pi = ref.net("policy", s, z)
    q = ref.ensemble("critic", s, pi.clamp(-1, 1)).mean(0)
    scale = q.abs().mean().detach() if getattr(ref.config, "normalise_q", False) else 1.0
    distill_loss, q_loss = ((pi - mu) ** 2).mean(), -q.mean() / scale
    return alpha * distill_loss + q_loss, {"distill_loss": distill_loss, "q_loss": q_loss}


def fql(ref: Reference, data: Data) -> tuple[Data, Data]:
    c, s, a, then = ref.config, data[STATE], data["action"], data[THEN]
    q = ref.ensemble("target_critic", then, ref.net("policy", then, normal(B, DA)).clamp(-1, 1))
    y = q.amin(0) if c.aggregate == "min" else q.mean(0)
    y = data["reward"] + ref.gamma(data) * (1 - data["terminated"]) * y
    critic_loss = summed_squares(ref.ensemble("critic", s, a), y)
    flow_loss = flow_errors(ref, "flow", data).mean()
    policy_loss, metrics = one_step_losses(ref, data, c.alpha)
    metrics |= {"critic_loss": critic_loss, "flow_loss": flow_loss, "actor_loss": flow_loss + policy_loss}
    return {"critic": critic_loss, "flow": flow_loss, "policy": policy_loss}, metrics


def ifql(ref: Reference, data: Data) -> tuple[Data, Data]:
    s, a = data[STATE], data["action"]
    u = ref.ensemble("target_critic", s, a).amin(0) - ref.ensemble("value", s)[0]
    y = data["reward"] + ref.gamma(data) * (1 - data["terminated"]) * ref.ensemble("value", data[THEN])[0]
    value_loss, critic_loss = expectile(u, ref.config.expectile), summed_squares(ref.ensemble("critic", s, a), y)
    flow_loss = flow_errors(ref, "policy", data).mean()
    metrics = {"value_loss": value_loss, "critic_loss": critic_loss, "flow_loss": flow_loss}
    return {"value": value_loss, "critic": critic_loss, "policy": flow_loss}, metrics


def best_of(ref: Reference, flow: str, state: Tensor, noise: Tensor, aggregate: str) -> Tensor:
    """Of the actions from noise `[B, N, W]`, one after the other, the one of the greatest value `[B, W]`."""
    best, greatest = torch.zeros(len(noise), noise.shape[2]).double(), torch.full((len(noise),), -math.inf).double()
    for k in range(noise.shape[1]):
        a = euler(ref, flow, state, noise[:, k])
        q = ref.ensemble("critic", state, a)
        q = q.amin(0) if aggregate == "min" else q.mean(0)
        best, greatest = torch.where((q > greatest)[:, None], a, best), torch.maximum(q, greatest)
    return best


def qc(ref: Reference, data: Data) -> tuple[Data, Data]:
    c, s, a, then, width = ref.config, data[STATE], data["action"].flatten(1), data[THEN], CHUNK * DA
    if c.method == "fql":
        following = ref.net("policy", then, normal(B, width)).clamp(-1, 1)
    else:
        following = best_of(ref, "flow", then, normal(B, c.candidates, width), "mean")
    y = ref.ensemble("target_critic", then, following).mean(0)
    y = data["reward"] + data["discount"] * (1 - data["terminated"]) * y
    known = data["complete"].bool()
    critic_loss = summed_squares(ref.ensemble("critic", s, a)[:, known], y[known]) * known.double().mean()
    real = ~data["action_is_pad"].bool().repeat_interleave(DA, 1)
    flow_loss = (flow_errors(ref, "flow", data) * real).mean()
    losses, metrics = {"critic": critic_loss, "flow": flow_loss}, {"critic_loss": critic_loss, "flow_loss": flow_loss}
    if c.method == "fql":
        losses["policy"], more = one_step_losses(ref, data, c.alpha)
        metrics |= more | {"actor_loss": flow_loss + losses["policy"]}
    return losses, metrics


def recap(ref: Reference, data: Data) -> tuple[Data, Data]:
    c, s, reached = ref.config, data[STATE], data["return_to_go"]
    cover = lambda x: [*ref.seen, float(x.min()), float(x.max())]  # noqa: E731
    bins = torch.linspace(min(cover(reached)), max(cover(reached)), 6).double()
    value = lambda state: ref.net("value", state).softmax(1) @ bins  # noqa: E731
    after = data["reward"] + data["discount"] * (1 - data["terminated"]) * value(data[THEN])
    ahead = after if c.n_step else reached
    goal, advantage = ahead if c.target == "bootstrapped" else reached, ahead - value(s)
    ref.seen = cover(goal.detach())
    cut = goal.detach().clamp(bins[0], bins[-1])[:, None]
    shares = (1 - (cut - bins).abs() / (bins[1] - bins[0])).clamp(min=0)  # of the two nearest bins
    value_loss = -(shares * ref.net("value", s).log_softmax(1)).sum(1).mean()  # eq. 1
    better = (advantage > ref.threshold).double().detach()
    distance, positive = (advantage - ref.threshold).abs().log().mean().detach(), better.mean()
    ref.threshold = float(ref.threshold + 0.05 * distance.exp() * (positive - c.positive))
    better = torch.maximum(better, data["intervention"]) if "intervention" in data else better
    told = torch.stack([better, 1 - better], 1) * (uniform(B) >= c.unknown)[:, None]
    errors = flow_errors(ref, "policy", data | {STATE: torch.cat([told, s], 1)})
    if "action_is_pad" in data:
        errors = errors * ~data["action_is_pad"].bool().repeat_interleave(DA, 1)
    metrics = {"value_loss": value_loss, "flow_loss": errors.mean(), "positive": positive, "log_distance": distance}
    return {"value": value_loss, "policy": errors.mean()}, metrics


def gciql(ref: Reference, data: Data) -> tuple[Data, Data]:
    c, s, a, then, g = ref.config, data[STATE], data["action"], data[THEN], data["value_goal"]
    u = ref.ensemble("target_critic", g, s, a).amin(0) - ref.ensemble("value", g, s)[0]
    y = data["reward"] + c.discount * (1 - data["terminated"]) * ref.ensemble("value", g, then)[0]
    value_loss, critic_loss = expectile(u, c.expectile), summed_squares(ref.ensemble("critic", g, s, a), y)
    g = data[GOAL]
    mean = ref.net("policy", g, s)
    log_prob = gaussian_log_prob(a, mean, torch.ones(DA).double())
    metrics = {"value_loss": value_loss, "critic_loss": critic_loss, "mse": ((mean - a) ** 2).mean()}
    if c.extraction == "awr":
        advantage = ref.ensemble("critic", g, s, a).amin(0) - ref.ensemble("value", g, s)[0]
        actor_loss = -((c.alpha * advantage).exp().clamp(max=100).detach() * log_prob).mean()
    else:
        q = ref.ensemble("critic", g, s, mean.clamp(-1, 1)).amin(0)
        metrics["q_loss"] = -q.mean() / q.abs().mean().detach()
        actor_loss = metrics["q_loss"] - c.alpha * log_prob.mean()
    metrics["actor_loss"] = actor_loss
    return {"value": value_loss, "critic": critic_loss, "policy": actor_loss}, metrics


def of_length(x: Tensor) -> Tensor:
    """Rows of length sqrt(their width)."""
    return x / x.square().sum(1, keepdim=True).sqrt() * math.sqrt(x.shape[1])


def hiql(ref: Reference, data: Data) -> tuple[Data, Data]:
    c, s, a, then, g = ref.config, data[STATE], data["action"], data[THEN], data["value_goal"]
    phi = lambda state, goal: of_length(ref.net("representation", goal, state))  # noqa: E731
    values = lambda name, state, goal: ref.ensemble(name, phi(state, goal), state)  # noqa: E731
    factor = c.discount * (1 - data["terminated"])
    following, now = values("target_value", then, g), values("target_value", s, g)
    advantage = data["reward"] + factor * torch.minimum(following[0], following[1]) - (now[0] + now[1]) / 2
    v = values("value", s, g)
    value_loss = torch.zeros(()).double()
    for i in range(2):
        u = (data["reward"] + factor * following[i]).detach() - v[i]
        value_loss = value_loss + expectile(u, c.expectile, advantage)  # eq. 4
    one = torch.ones(()).double()
    w = data["subgoal"]
    weight = (c.low_alpha * (values("value", then, w).mean(0) - values("value", s, w).mean(0))).exp().clamp(max=100)
    low_loss = -(weight.detach() * gaussian_log_prob(a, ref.net("policy", phi(s, w).detach(), s), one)).mean()  # eq. 7
    w, g = data["high_target"], data[GOAL]
    weight = (c.high_alpha * (values("value", w, g).mean(0) - values("value", s, g).mean(0))).exp().clamp(max=100)
    log_prob = gaussian_log_prob(phi(s, w).detach(), ref.net("high", g, s), one)
    high_loss = -(weight.detach() * log_prob).mean()  # eq. 6
    losses = {"value": value_loss, "representation": value_loss, "policy": low_loss, "high": high_loss}
    return losses, {"value_loss": value_loss, "low_loss": low_loss, "high_loss": high_loss}


# ---- updates and losses against the reference ----------------------------------------------------------------------

SMALL: Any = {"hidden_dims": (7, 5)}
GELU: Any = SMALL | {"activation": "gelu"}
NORMED: Any = GELU | {"layer_norm": True}
TWIN = {"critic": QEnsemble(**SMALL)}
TD3 = TWIN | {"policy": Actor(final_scale=4.0, **SMALL)}
AWAC = TWIN | {"policy": Actor(std="learned", squash="none", **SMALL)}
IQL = TWIN | {"policy": Actor(std="learned", **SMALL), "value": VEnsemble(**SMALL)}
CQL = TWIN | {"policy": TanhGaussian(**SMALL), "temperature": Temperature(initial=0.3)}
VALUES = {"critic": QEnsemble(**NORMED), "value": VEnsemble(**NORMED)}
FLOWS = {"critic": QEnsemble(**NORMED), "policy": VectorField(time=False, **SMALL), "flow": VectorField(**SMALL)}
IFQL = VALUES | {"policy": VectorField(**SMALL)}
GOAL_POLICY = Actor(squash="none", **GELU)
GCIQL = VALUES | {"policy": GOAL_POLICY}
HIQL = {"policy": GOAL_POLICY, "high": GOAL_POLICY, "value": VEnsemble(members=2, **NORMED)}
HIQL |= {"representation": Actor(squash="none", **NORMED)}
NOISY = {"policy_noise": 0.5, "noise_clip": 0.5}  # a third of the draws is cut
MIN = {"flow_steps": 4, "aggregate": "min", "normalise_q": True, "alpha": 3.0}
BEST = {"chunk": CHUNK, "flow_steps": 4, "method": "best_of_n", "candidates": 5}
N_STEP = (*USUAL, "discount")
CHUNKS = (*N_STEP, "action_is_pad", "complete")
REACHED = (*N_STEP, "return_to_go", "intervention")
RECAP = {"policy": VectorField(**SMALL), "value": VCategorical(bins=6, **NORMED)}
TO_GOALS = (*USUAL, *GOALS)
SUBGOALS = (*TO_GOALS, "subgoal", "high_target")


@dataclass(frozen=True)
class Case:
    """A small trainer, and the keys of its batch."""

    trainer: str
    activation: Callable[[Tensor], Tensor]
    models: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = USUAL

    def build(self) -> tuple[Any, Data, Reference, Data]:
        """The trainer and its batch, the reference and the same in float64; targets differ from what they follow."""
        torch.manual_seed(2)
        data, kind = batch(self.keys, "action_is_pad" in self.keys), TRAINER_REGISTRY[self.trainer]
        spec = {k: {"shape": tuple(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")} for k, x in data.items()}
        faster = {"target_rate": 0.1} if hasattr(kind.Config, "target_rate") else {}  # type: ignore[attr-defined]
        config = kind.Config(**faster, **self.config)  # type: ignore[attr-defined]
        factory = lambda name, seen: self.models[name].build(seen)  # noqa: E731
        models = build_models(list(self.models), factory, spec, model_spec_of(kind, config))
        optimizers = {name: Adam(lr=LR).build(model.parameters()) for name, model in models.items()}
        trainer = construct(kind, models, optimizers, nn.MSELoss(), spec, config, torch.device("cpu"))
        with torch.no_grad():
            for p in trainer.models.parameters():
                p += 0.3 * torch.randn_like(p)
        if self.trainer == "recap":
            trainer.models["value"].cover(*data["return_to_go"].aminmax())
        return trainer, data, Reference(trainer, self.activation), {key: x.double() for key, x in data.items()}


CASES = {
    "td3_bc": Case("td3_bc", relu, TD3, NOISY),
    "td3_bc-three": Case("td3_bc", relu, TD3 | {"critic": QEnsemble(members=3, **SMALL)}, NOISY, N_STEP),
    "rebrac": Case(
        "rebrac",
        relu,
        TD3 | {"critic": QEnsemble(layer_norm=True, **SMALL)},
        NOISY | {"actor_penalty": 0.7, "critic_penalty": 0.3},
        (*USUAL, "next.action"),
    ),
    "awac": Case("awac", relu, AWAC),
    "awac-n_step": Case("awac", relu, AWAC, {"temperature": 0.008}, N_STEP),
    "iql": Case("iql", relu, IQL),
    "iql-n_step": Case("iql", relu, IQL, {"temperature": 30.0, "expectile": 0.9}, N_STEP),
    "cql": Case("cql", relu, CQL, {"actions": 4}),
    "cql-calibrated": Case("cql", relu, CQL, {"actions": 4, "calibrated": True}, (*N_STEP, "return_to_go")),
    "fql": Case("fql", gelu, FLOWS, {"flow_steps": 4}),
    "fql-n_step": Case("fql", gelu, FLOWS, MIN, N_STEP),
    "ifql": Case("ifql", gelu, IFQL, {"flow_steps": 4, "candidates": 5}),
    "ifql-n_step": Case("ifql", gelu, IFQL, {"expectile": 0.6}, N_STEP),
    "qc-fql": Case("qc", gelu, FLOWS, {"chunk": CHUNK, "flow_steps": 4}, CHUNKS),
    "qc-best_of_n": Case("qc", gelu, FLOWS, BEST, CHUNKS),
    "recap": Case("recap", gelu, RECAP, {"chunk": 1, "target": "returns"}, REACHED),
    "recap-chunks": Case(
        "recap",
        gelu,
        RECAP,
        {"chunk": CHUNK, "positive": 0.2},
        (*CHUNKS, "return_to_go"),
    ),
    "recap-episode": Case("recap", gelu, RECAP, {"chunk": 1, "n_step": 0}, (*N_STEP, "return_to_go")),
    "gciql-ddpg_bc": Case("gciql", gelu, GCIQL, {"extraction": "ddpg_bc"}, TO_GOALS),
    "gciql-awr": Case("gciql", gelu, GCIQL, {"extraction": "awr", "alpha": 6.0}, TO_GOALS),
    "hiql": Case("hiql", gelu, HIQL, {"representation": 4, "low_alpha": 10.0, "high_alpha": 10.0}, SUBGOALS),
}
SECOND = ("td3_bc", "rebrac")  # their policies and targets move with every second update
IN_TURN = {"td3_bc": td3_bc, "rebrac": rebrac, "awac": awac}
AT_ONCE = {"iql": iql, "cql": cql, "fql": fql, "ifql": ifql, "qc": qc, "gciql": gciql, "hiql": hiql, "recap": recap}


def reference_update(ref: Reference, trainer: str, data: Data) -> Data:
    if trainer in IN_TURN:
        return IN_TURN[trainer](ref, data)
    losses, metrics = AT_ONCE[trainer](ref, data)
    ref.improve(**losses)
    ref.follow(*(name for name in ("value", "critic") if f"target_{name}" in ref.weights))
    return metrics


def check_metrics(found: Data, expected: Data) -> None:
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value.detach()), rel=1e-5, abs=1e-5), name


def weights(trainer: Any) -> dict[str, Tensor]:
    """All weights of each model, one after the other."""
    flat = nn.utils.parameters_to_vector
    return {name: flat(model.parameters()).detach().clone() for name, model in trainer.models.items()}


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_updates_against_a_float64_reference(name: str, updates: int) -> None:
    case = CASES[name]
    trainer, data, ref, numbers = case.build()
    before = weights(trainer)
    for update in range(updates):
        torch.manual_seed(100 + update)
        metrics = trainer.train_step(data)
        torch.manual_seed(100 + update)
        check_metrics(metrics, reference_update(ref, case.trainer, numbers))
    assert ref.distance(trainer) < 1e-5
    moved = {key: float((w - before[key]).abs().max()) for key, w in weights(trainer).items()}
    first = case.trainer in SECOND and updates == 1
    still = {"policy", "target_policy", "target_critic"} if first else {"policy"} if name == "qc-best_of_n" else set()
    assert {key for key, distance in moved.items() if distance == 0} == still
    assert all(distance > 1e-3 for key, distance in moved.items() if key not in still)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trainer in AT_ONCE])
def test_each_loss_moves_its_own_networks_alone(name: str) -> None:
    """One backward pass of all losses gives each network the gradient of its own."""
    trainer, data, ref, numbers = CASES[name].build()
    torch.manual_seed(7)
    loss, metrics = trainer.losses(data)
    loss.backward()
    torch.manual_seed(7)
    losses, expected = AT_ONCE[CASES[name].trainer](ref, numbers)
    check_metrics(metrics, expected)
    gradients = ref.gradients(losses)
    for key, model in trainer.models.items():
        found = [p.grad for p in model.parameters()]
        if key not in gradients:
            assert found == [None] * len(found), key
            continue
        for mine, theirs in zip(found, gradients[key], strict=True):
            assert float((mine - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max())), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trainer in IN_TURN])
def test_losses_that_take_turns_move_their_own_network_alone(name: str) -> None:
    for method, own in (("critic_loss", "critic"), ("actor_loss", "policy")):
        trainer, data, *_ = CASES[name].build()
        getattr(trainer, method)(data)[0].backward()
        for key, model in trainer.models.items():
            assert all((p.grad is not None) == (key == own) for p in model.parameters()), (method, key)


@pytest.mark.parametrize("name", ["awac-n_step", "iql-n_step", "gciql-awr", "hiql"])
def test_weights_of_the_regression_are_cut_at_100(name: str) -> None:
    trainer, data, *_ = CASES[name].build()
    torch.manual_seed(7)
    metrics = trainer.losses(data)[1]
    for key in ("weight", "high_weight") if name == "hiql" else ("weight",):
        assert float(metrics[f"{key}_max"]) == 100 and float(metrics[f"{key}_min"]) < 1


@pytest.mark.parametrize("name", ["fql", "ifql", "qc-best_of_n", "recap", "hiql"])
def test_what_acts_against_the_reference(name: str) -> None:
    trainer, data, ref, numbers = CASES[name].build()
    policy, s = trainer.policy(), numbers[STATE]
    noise = torch.randn(B, *getattr(policy, "noise_shape", (0,)))
    z = noise.double()
    match name:
        case "fql":
            expected = ref.net("policy", s, z).clamp(-1, 1)
        case "ifql":
            expected = best_of(ref, "policy", s, z, "min")
        case "qc-best_of_n":
            expected = best_of(ref, "flow", s, z.flatten(2), "mean").view(B, CHUNK, DA)
        case "recap":
            policy.guidance, expected = 1.7, z
            for i in range(10):
                more = (expected, torch.full((B, 1), i / 10).double())
                good, any_ = (ref.net("policy", torch.tensor([[p, 0.0]] * B).double(), s, *more) for p in (1.0, 0.0))
                expected = expected + (any_ + 1.7 * (good - any_)) / 10
            expected = expected.clamp(-1, 1)
        case _:
            expected = ref.net("policy", of_length(ref.net("high", numbers[GOAL], s)), s)
    assert torch.allclose(policy(data | {"noise": noise}).double(), expected, atol=1e-5)


# ---- transitions ---------------------------------------------------------------------------------------------------

# Steps 0 to 3 end in a terminated one, 4 to 7 are cut short, 8 to 11 have a terminated step in their middle, at 9, and
# are cut short. The state and the action of step t are t; after the episodes' last steps the states are 50, 51 and 52.
REWARDS = [1, 2, 4, 8, 16, 32, 64, 128, 3, 5, 7, 9]
TO_GO = [4, 6, 8, 8, 64, 96, 128, 128, 5.5, 5, 11.5, 9]  # at discount 0.5


def three_episodes(known: bool) -> dict[str, Any]:
    """What a factory returns; without `known`, the observations after the episodes' last steps are missing."""
    t = torch.arange(12.0)
    columns = {STATE: t[:, None], "action": t[:, None], "reward": torch.tensor(REWARDS).float()}
    columns["terminated"] = (t == 3) | (t == 9)
    if known:
        columns[THEN] = torch.where((t + 1) % 4 == 0, 50 + t // 4, t + 1)[:, None]
    return build(from_columns(columns, torch.tensor([4, 8, 12]), "three"), validation=0.0)


# Of each step: the sum of the rewards, the factor of what follows, terminated, and the next state. Step 1 sums
# 2 + 4 / 2 + 8 / 4 and terminates inside its window at step 3; the windows of 6 and 7 are cut by truncation.
WINDOWS = {
    True: {
        0: (3, 0.125, False, 3),
        1: (6, 0.125, True, 50),
        2: (8, 0.25, True, 50),
        3: (8, 0.5, True, 50),
        4: (48, 0.125, False, 7),
        5: (96, 0.125, False, 51),
        6: (128, 0.25, False, 51),
        7: (128, 0.5, False, 51),
        8: (5.5, 0.25, True, 10),
        9: (5, 0.5, True, 10),
        10: (11.5, 0.25, False, 52),
        11: (9, 0.5, False, 52),
    },
    # What follows 7 and 11 is unknown: no window holds them. Nothing bootstraps from what follows 3: its own state.
    False: {
        0: (3, 0.125, False, 3),
        1: (6, 0.125, True, 3),
        2: (8, 0.25, True, 3),
        3: (8, 0.5, True, 3),
        4: (48, 0.125, False, 7),
        5: (64, 0.25, False, 7),
        6: (64, 0.5, False, 7),
        8: (5.5, 0.25, True, 10),
        9: (5, 0.5, True, 10),
        10: (7, 0.5, False, 11),
    },
}
# Of each step: the actions of its chunk (after its end the last one again), how many are real, complete.
CHUNKED = {
    True: {
        0: ([0, 1, 2], 3, 1),
        1: ([1, 2, 3], 3, 1),
        2: ([2, 3, 3], 2, 1),
        3: ([3, 3, 3], 1, 1),
        4: ([4, 5, 6], 3, 1),
        5: ([5, 6, 7], 3, 1),
        6: ([6, 7, 7], 2, 0),
        7: ([7, 7, 7], 1, 0),
        8: ([8, 9, 9], 2, 1),
        9: ([9, 9, 9], 1, 1),
        10: ([10, 11, 11], 2, 0),
        11: ([11, 11, 11], 1, 0),
    },
    False: {
        0: ([0, 1, 2], 3, 1),
        1: ([1, 2, 3], 3, 1),
        2: ([2, 3, 3], 2, 1),
        3: ([3, 3, 3], 1, 1),
        4: ([4, 5, 6], 3, 1),
        5: ([5, 6, 6], 2, 0),
        6: ([6, 6, 6], 1, 0),
        8: ([8, 9, 9], 2, 1),
        9: ([9, 9, 9], 1, 1),
        10: ([10, 10, 10], 1, 0),
    },
}


def rows(dataset: Any) -> dict[int, dict[str, Any]]:
    """The items by their step."""
    return {int(dataset[i][STATE]): {k: v.tolist() for k, v in dataset[i].items()} for i in range(len(dataset))}


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("known", [True, False])
def test_windows_by_hand(known: bool, chunk: int) -> None:
    """Three steps of rewards, or a chunk of three actions: both end with the episode."""
    options: Any = {"chunk": 3} if chunk > 1 else {"n_step": 3}
    found = rows(Transitions(three_episodes(known)["dataset"], "test", Window(discount=0.5, **options)))
    wanted = ("reward", "discount", "terminated", THEN)
    assert {t: tuple(row[key] for key in wanted) for t, row in found.items()} == {
        t: (*numbers, [then]) for t, (*numbers, then) in WINDOWS[known].items()
    }
    if chunk == 1:
        assert all(row["action"] == [t] for t, row in found.items())
        return
    assert {t: (row["action"], row["action_is_pad"], row["complete"]) for t, row in found.items()} == {
        t: ([[a] for a in actions], [i >= real for i in range(3)], complete)
        for t, (actions, real, complete) in CHUNKED[known].items()
    }


def test_single_transitions_by_hand() -> None:
    found = rows(Transitions(three_episodes(True)["dataset"], "test", Window(discount=0.5)))
    assert [found[t]["reward"] for t in range(12)] == REWARDS
    assert [found[t][THEN] for t in range(12)] == [[s] for s in (1, 2, 3, 50, 5, 6, 7, 51, 9, 10, 11, 52)]
    assert {row["discount"] for row in found.values()} == {0.5}
    assert [t for t in range(12) if found[t]["terminated"]] == [3, 9]


def test_returns_to_go_by_hand() -> None:
    """A terminated step ends a return, even inside an episode; truncation ends it without more to come."""
    terminated = torch.zeros(12, dtype=torch.bool)
    terminated[[3, 9]] = True
    assert returns_to_go(torch.tensor(REWARDS).float(), terminated, torch.tensor([4, 8, 12]), 0.5).tolist() == TO_GO
    for known in (True, False):
        data = transitions(three_episodes(known), "test", Window(discount=0.5, to_go=True))
        found = rows(data["dataset"])
        assert {t: row["return_to_go"] for t, row in found.items()} == {t: TO_GO[t] for t in WINDOWS[known]}
        assert data["norm_stats"]["reward"] == {"return_min": 15, "return_max": 240}  # 1 + 2 + 4 + 8, 16 + ... + 128


@pytest.mark.parametrize(
    ("known", "chunk", "complete"), [(True, 5, {0, 1, 2, 3, 8, 9}), (False, 4, {0, 1, 2, 3, 8, 9})]
)
def test_a_chunk_longer_than_an_episode_is_cut_like_any_other(known: bool, chunk: int, complete: set[int]) -> None:
    """Its return is known where a terminated step ends it; otherwise its value is not learnt, its actions are."""
    found = rows(Transitions(three_episodes(known)["dataset"], "test", Window(chunk=chunk)))
    assert set(found) == set(WINDOWS[known])
    assert {t for t, row in found.items() if row["complete"]} == {0, 1, 2, 3, 8, 9}
    short = found[4]  # of an episode of 4 steps that truncation ends
    assert short["action_is_pad"] == [False] * (4 if known else 3) + [True] * (chunk - (4 if known else 3))
    assert [a[0] for a in short["action"]] == sorted(a[0] for a in short["action"])  # the last one is repeated


def test_chunks_of_which_none_is_complete_are_refused() -> None:
    columns = {"observation.state": torch.rand(8, 2), "action": torch.rand(8, 2), "reward": torch.zeros(8)}
    data = build_episodes(columns, torch.tensor([3, 8]), "cut", validation=0.0)
    told = "--trainer.chunk 5: the end of its episode cuts every chunk of cut, whose longest episode has 4 steps"
    with pytest.raises(UserError, match=told):
        Transitions(data["dataset"], "test", Window(chunk=5))
    assert len(Transitions(data["dataset"], "test", Window(chunk=4))) == 6


def test_next_actions_are_those_of_the_data() -> None:
    """Steps after which the data did nothing are left out; after a terminated one, what it did counts for nothing."""
    found = rows(Transitions(three_episodes(True)["dataset"], "test", Window(next_action=True)))
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert all(row["next.action"] == [t + 1] for t, row in found.items() if t != 3)
    assert found[3]["terminated"]


# ---- goals ---------------------------------------------------------------------------------------------------------

EPISODES, LENGTH = 200, 20
VALUE_GOAL, LATER = "value_goal", (0.0, 1.0, 0.0)


def numbered_episodes(known: bool = True) -> dict[str, Any]:
    """Episodes of unlike lengths, 20 on average; a state is (its episode, its step)."""
    lengths = torch.full((EPISODES,), LENGTH) + torch.arange(EPISODES) % 11 - 5
    ends = lengths.cumsum(0)
    episode = torch.repeat_interleave(torch.arange(EPISODES), lengths)
    step = torch.arange(int(ends[-1])) - (ends - lengths)[episode]
    columns = {STATE: torch.stack([episode, step], 1).float(), "action": torch.rand(len(step), 1)}
    columns |= {"reward": torch.zeros(len(step))}
    if known:
        columns[THEN] = torch.stack([episode, step + 1], 1).float()
    return build(from_columns(columns, ends, "numbered"), validation=0.0)


def last_step(state: Tensor, known: bool) -> Tensor:
    """The number of the last state of the episodes of these states, by the lengths above."""
    return LENGTH + state[:, 0] % 11 - 5 - int(not known)


def drawn(dataset: GoalTransitions, times: int, seed: int = 0) -> Data:
    return dataset.get_batch(torch.arange(len(dataset)).repeat(times), seed)


@pytest.mark.parametrize("geometric", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_later_goals_lie_ahead_in_the_same_episode(known: bool, geometric: bool) -> None:
    sampling = GoalSampling(LATER, geometric)
    dataset = GoalTransitions(numbered_episodes(known)["dataset"], "test", Goals(sampling, sampling, discount=0.8))
    batch = drawn(dataset, 10)
    here, end = batch[STATE], last_step(batch[STATE], known)
    assert torch.equal(batch[THEN], here + torch.tensor([0.0, 1.0]))
    assert int(here[:, 1].min()) == 0 and torch.equal(here[:, 1].max(), end.max() - 1)
    for key in (GOAL, VALUE_GOAL):
        goal = batch[key]
        assert torch.equal(goal[:, 0], here[:, 0])
        assert (goal[:, 1] > here[:, 1]).all() and (goal[:, 1] <= end).all()
        distance, left = goal[:, 1] - here[:, 1], end - here[:, 1]
        chosen = left == 8
        found = [float((distance[chosen] == k).float().mean()) for k in range(1, 9)]
        if geometric:  # with parameter 1 - 0.8, and all that would lie beyond the end at the end
            expected = [0.2 * 0.8 ** (k - 1) for k in range(1, 8)] + [0.8**7]
        else:  # between the next state and the last one, rounded
            expected = [1 / 14, *[1 / 7] * 6, 1 / 14]
        assert found == pytest.approx(expected, abs=0.02)


def test_shares_of_goals_and_what_the_way_there_pays() -> None:
    shares = (0.2, 0.5, 0.3)
    sampling = GoalSampling(shares, True)
    batch = drawn(GoalTransitions(numbered_episodes()["dataset"], "test", Goals(sampling, sampling)), 10)
    for key in (GOAL, VALUE_GOAL):
        here, goal = batch[STATE], batch[key]
        same = goal[:, 0] == here[:, 0]
        current = (goal == here).all(1)
        later = same & (goal[:, 1] > here[:, 1])
        found = [float(share.float().mean()) for share in (current, later, ~same)]
        assert found == pytest.approx(shares, abs=0.02), key  # a random goal of the same episode is one in 200
    reached = (batch[VALUE_GOAL] == batch[STATE]).all(1)
    assert torch.equal(batch["terminated"], reached) and torch.equal(batch["reward"], torch.where(reached, 0.0, -1.0))
    assert not torch.equal(batch[GOAL], batch[VALUE_GOAL])


@pytest.mark.parametrize("known", [True, False])
def test_subgoals_are_k_steps_ahead_and_not_beyond_the_goal(known: bool) -> None:
    sampling = GoalSampling((0.0, 0.5, 0.5), False)
    dataset = GoalTransitions(numbered_episodes(known)["dataset"], "test", Goals(sampling, subgoal_steps=7))
    batch = drawn(dataset, 3)
    here, goal, end = batch[STATE], batch[GOAL], last_step(batch[STATE], known)
    ahead = torch.minimum(here[:, 1] + 7, end)
    assert torch.equal(batch["subgoal"], torch.stack([here[:, 0], ahead], 1))
    on_the_way = (goal[:, 0] == here[:, 0]) & (goal[:, 1] > here[:, 1])
    nearer = on_the_way & (goal[:, 1] < ahead)
    assert 0.1 < float(nearer.float().mean()) < float(on_the_way.float().mean()) < 0.6
    wanted = torch.where(nearer[:, None], goal, batch["subgoal"])
    assert torch.equal(batch["high_target"], wanted)


def test_goals_depend_on_the_seed_alone() -> None:
    sampling = GoalSampling((0.2, 0.5, 0.3), True)
    dataset = GoalTransitions(numbered_episodes()["dataset"], "test", Goals(sampling, sampling, subgoal_steps=3))
    first = drawn(dataset, 1, seed=5)
    torch.manual_seed(1)
    again, other = drawn(dataset, 1, seed=5), drawn(dataset, 1, seed=6)
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[GOAL], other[GOAL]) and not torch.equal(first[VALUE_GOAL], other[VALUE_GOAL])
    assert torch.equal(first[STATE], other[STATE])


def test_goals_have_the_statistics_of_states() -> None:
    sampling = GoalSampling(LATER, False)
    options: Any = {"actor": sampling, "value": sampling, "subgoal_steps": 3}
    data = goal_transitions(numbered_episodes(), "test", Goals(**options))
    stats, item = data["norm_stats"], data["dataset"][0]
    goals = (GOAL, VALUE_GOAL, "subgoal", "high_target")
    assert all(stats[key] == {"like": STATE} for key in goals) and set(stats) == {STATE, "action", *goals}
    normalised = Normaliser(describe(item, stats))(data["dataset"].get_batch(torch.tensor([30])))
    plain = data["dataset"].get_batch(torch.tensor([30]))
    mean, std = (torch.tensor(stats[STATE][name]) for name in ("mean", "std"))
    for key in (STATE, THEN, *goals):
        assert torch.allclose(normalised[key], (plain[key] - mean) / std, atol=1e-6)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_shares_that_make_no_sense_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="must sum to 1, found"):
        GoalSampling(shares, True)


def test_geometric_distances_need_a_discount() -> None:
    sampling = GoalSampling(LATER, True)
    with pytest.raises(UserError, match="--trainer.discount 1"):
        goal_transitions(numbered_episodes(), "test", Goals(sampling, discount=1.0))


# ---- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["torch", "glorot"])
def test_initial_weights(init: Any) -> None:
    """Torch's are below 1 / sqrt(D); Glorot's below sqrt(6 / (D + D')), without biases."""
    spec = {STATE: {"shape": (6,)}, "action": {"shape": (3,)}}
    shape = {"hidden_dims": (500, 400), "init": init}
    nets = [VectorField(**shape).build(spec), QEnsemble(**shape).build(spec), Actor(**shape).build(spec)]
    for net, inputs, last in zip(nets, (6 + 3 + 1, 6 + 3, 6), (3, 1, 3), strict=True):
        layers = [layer for layer in net.net if hasattr(layer, "weight")]
        for layer, (before, after) in zip(layers, itertools.pairwise((inputs, 500, 400, last)), strict=True):
            bound = {"torch": before**-0.5, "glorot": (6 / (before + after)) ** 0.5}[init]
            assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
            assert bool(layer.bias.detach().abs().max() > 0) == (init == "torch")


def test_the_last_layer_can_begin_small() -> None:
    spec = {STATE: {"shape": (6,)}, "action": {"shape": (3,)}}
    nets = [(torch.manual_seed(0), Actor(final_scale=scale).build(spec))[1] for scale in (1.0, 0.1)]
    whole, small = (net.net[-2] for net in nets)
    assert torch.allclose(small.weight, 0.1 * whole.weight) and torch.allclose(small.bias, 0.1 * whole.bias)
