"""Proximal policy optimisation: hand-worked numbers, torch.distributions, and a slow float64 reference from the paper.

With what it learns from: rollouts, generalised advantages, and normalisation by running statistics.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from components import UserError
from components.contracts import Rollouts
from components.data.normalisation import LIMIT, Normaliser, RunningStatistics
from components.data.returns import generalised_advantage
from components.datasets.transitions import prepared
from components.experience.rollout import Rollout
from components.models.actor import Actor
from components.models.q_ensemble import VEnsemble
from components.optimizers import Adam
from components.run import checkpoint
from components.trainers import ppo
from components.trainers.ppo import PPO
from test_sac import LR, adam_step

STATE = "observation.state"
SPEC: dict[str, Any] = {STATE: {"shape": (4,), "dtype": "float32"}, "action": {"shape": (2,), "dtype": "float32"}}
SPEC |= {f"next.{STATE}": SPEC[STATE], "reward": {"shape": (), "dtype": "float32"}}
SPEC |= {"terminated": {"shape": (), "dtype": "bool"}}
CHOICES = SPEC | {"action": {"shape": (), "dtype": "int64", "classes": 3}}


def actor(spec: dict[str, Any] = SPEC, **options: Any) -> Any:
    usual = {"activation": "tanh", "squash": "none", "std": "learned", "init": "orthogonal"}
    return Actor(hidden_dims=(8, 6), **usual | options).build(spec)


def build(spec: dict[str, Any] = SPEC, **options: Any) -> PPO:
    torch.manual_seed(0)
    value = VEnsemble(hidden_dims=(7, 5), activation="tanh", init="orthogonal").build(spec)
    models = nn.ModuleDict({"policy": actor(spec), "value": value})
    opts = {name: Adam(lr=LR).build(model.parameters()) for name, model in models.items()}
    trainer = PPO(models, opts, nn.MSELoss(), spec, PPO.Config(**options))
    with torch.no_grad():  # zero biases and deviations of 1 would hide what is done with them
        for p in models.parameters():
            p += 0.1 * torch.randn_like(p)
    return trainer


def batch(trainer: PPO, spread: float = 0.3, size: int = 32) -> dict[str, Tensor]:
    """A minibatch whose policy and value were others before, so much that a part of both changes is clipped."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    state, noise = draw(size, 4), draw(size, trainer.models["policy"].noise_width)
    with torch.no_grad():
        action = trainer.models["policy"].draw(state, noise)
        log_prob, _ = trainer.models["policy"].evaluate(state, action)
        value = trainer.models["value"](state).squeeze(0) + spread * draw(size)
    data = {STATE: state, "action": action, "log_prob": log_prob + spread * draw(size), "value": value}
    return data | {"advantage": 3 * draw(size) + 1, "return": draw(size)}


def weights(trainer: PPO) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.models.parameters()).detach().clone()


# ---- advantages ----------------------------------------------------------------------------------------------------


class StateAsValue(nn.Module):
    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        return observation[STATE].T  # [1, B]


# The first environment terminates at its third step, the second is truncated at its second; both go on.
STATES = [[1, 4], [2, 2], [3, 0], [8, 6], [4, 1]]
FOLLOWING = [[2, 2], [3, 12], [100, 6], [4, 1], [2, 3]]
REWARDS = [[1, 0], [2, 1], [4, 2], [-2, 3], [1, 4]]


def played() -> dict[str, Tensor]:
    terminated, ended = torch.zeros(5, 2, dtype=torch.bool), torch.zeros(5, 2, dtype=torch.bool)
    terminated[2, 0] = ended[2, 0] = ended[1, 1] = True
    table = lambda rows: torch.tensor(rows, dtype=torch.float32)  # noqa: E731
    rollout = {STATE: table(STATES)[..., None], f"next.{STATE}": table(FOLLOWING)[..., None], "reward": table(REWARDS)}
    rollout |= {"action": torch.linspace(-1, 1, 10).view(5, 2, 1), "terminated": terminated, "ended": ended}
    return rollout | {"valid": torch.ones(5, 2, dtype=torch.bool)}


def of_state(**options: Any) -> PPO:
    """It takes the state for its value; the numbers below are of discount 1/2, lambda 1/2, so decay 1/4."""
    spec = SPEC | {STATE: {"shape": (1,), "dtype": "float32"}, "action": {"shape": (1,), "dtype": "float32"}}
    models = nn.ModuleDict({"policy": actor(spec), "value": StateAsValue()})
    config = PPO.Config(discount=0.5, **{"gae_lambda": 0.5} | options)
    return PPO(models, {}, nn.MSELoss(), spec | {f"next.{STATE}": spec[STATE]}, config)


def test_advantages_by_hand() -> None:
    trainer = of_state()
    found = trainer.estimate(played())
    # delta = reward + value of what follows / 2 - value, without what follows where the episode terminated
    first = [1 + 1 - 1, 2 + 1.5 - 2, 4 - 3, -2 + 2 - 8, 1 + 1 - 4]
    second = [0 + 1 - 4, 1 + 6 - 2, 2 + 3 - 0, 3 + 0.5 - 6, 4 + 1.5 - 1]
    assert (first, second) == ([1, 1.5, 1, -8, -2], [-3, 5, 5, -2.5, 4.5])
    # advantage = delta + advantage of the next step / 4, of the same episode
    first = [1 + 1.75 / 4, 1.5 + 1 / 4, 1, -8 - 2 / 4, -2]
    second = [-3 + 5 / 4, 5, 5 - 1.375 / 4, -2.5 + 4.5 / 4, 4.5]
    assert found["advantage"].T.tolist() == [first, second]
    assert found["value"].tolist() == STATES
    assert found["return"].T.tolist() == [[2.4375, 3.75, 4, -0.5, 2], [2.25, 7, 4.65625, 4.625, 5.5]]
    assert not any(key.startswith("next.") for key in found)
    state, action = played()[STATE].flatten(0, 1), played()["action"].flatten(0, 1)
    log_prob, _ = trainer.models["policy"].evaluate({STATE: state}, action)
    assert torch.equal(found["log_prob"], log_prob.view(5, 2)) and not found["log_prob"].requires_grad


def test_the_ends_of_lambda_are_one_step_and_the_whole_return() -> None:
    found = of_state(gae_lambda=0.0).estimate(played())
    assert found["advantage"].T.tolist() == [[1, 1.5, 1, -8, -2], [-3, 5, 5, -2.5, 4.5]]
    found = of_state(gae_lambda=1.0).estimate(played())
    first = [1 + (2 + 4 / 2) / 2, 2 + 4 / 2, 4, -2 + (1 + 2 / 2) / 2, 1 + 2 / 2]
    second = [0 + (1 + 12 / 2) / 2, 1 + 12 / 2, 2 + (3 + (4 + 3 / 2) / 2) / 2, 3 + (4 + 3 / 2) / 2, 4 + 3 / 2]
    assert found["return"].T.tolist() == [first, second]


def test_advantages_against_the_sum_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    ended = torch.rand(12, 5, generator=generator) < 0.25
    found = generalised_advantage(delta, ended, 0.9)
    for t in range(12):
        for n in range(5):
            last = next((s for s in range(t, 12) if ended[s, n]), 11)
            expected = sum(0.9 ** (s - t) * float(delta[s, n]) for s in range(t, last + 1))
            assert float(found[t, n]) == pytest.approx(expected)


# ---- policies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squash", ["none", "tanh"])
@pytest.mark.parametrize(("log_std", "used"), [(None, (0, 0)), ((-0.4, 0.7), (-0.4, 0.7)), ((-9, 3), (-5, 2))])
def test_the_gaussian_against_torch_distributions(log_std: Any, used: Any, squash: str) -> None:
    """A deviation that is learned stays between e^-5 and e^2."""
    torch.manual_seed(0)
    policy = actor(std="learned" if log_std else "fixed", squash=squash).double()
    if log_std:
        policy.log_std.data = torch.tensor(log_std, dtype=torch.float64)
    state, action = torch.randn(50, 4, dtype=torch.float64), 2 * torch.randn(50, 2, dtype=torch.float64)
    normal = Normal(policy(state), torch.tensor(used, dtype=torch.float64).exp().expand(50, 2))
    log_prob, entropy = policy.evaluate({STATE: state}, action)
    assert torch.allclose(log_prob, normal.log_prob(action).sum(1), rtol=1e-10)
    assert entropy.shape == (50,) and torch.allclose(entropy, normal.entropy().sum(1), rtol=1e-10)


def test_a_draw_of_the_gaussian_is_not_cut() -> None:
    trainer = build()
    policy = trainer.models["policy"]
    state, noise = torch.randn(6, 4), 5 * torch.randn(6, 2)
    expected = policy(state) + policy.log_std.exp() * noise
    assert torch.allclose(policy.draw(state, noise), expected) and float(expected.detach().abs().max()) > 3
    explorer = trainer.explorer()
    assert explorer.noise_shape == (2,)
    assert torch.equal(explorer({STATE: state, "noise": noise}), policy.draw(state, noise))
    assert torch.equal(trainer.policy()({STATE: state}), policy(state))


def test_the_categorical_against_torch_distributions() -> None:
    torch.manual_seed(0)
    policy = actor(CHOICES).double()
    state, action = 3 * torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    categorical = Categorical(logits=policy.net(state))
    log_prob, entropy = policy.evaluate({STATE: state}, action)
    assert torch.allclose(log_prob, categorical.log_prob(action), rtol=1e-10)
    assert torch.allclose(entropy, categorical.entropy(), rtol=1e-10)
    assert torch.equal(policy({STATE: state}), categorical.probs.argmax(1))


def test_draws_of_the_categorical_have_its_frequencies() -> None:
    torch.manual_seed(0)
    spec = CHOICES | {"action": {"shape": (), "dtype": "int64", "classes": 4}}
    policy, count = actor(spec), 40_000
    probabilities = torch.tensor([0.6, 0.01, 0.09, 0.3])
    with torch.no_grad():
        policy.net[-1].weight.zero_()
        policy.net[-1].bias.copy_(probabilities.log() + 2)
    drawn = policy.draw(torch.zeros(count, 4), torch.randn(count, policy.noise_width))
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    expected = count * probabilities
    chi_square = ((torch.bincount(drawn, minlength=4) - expected).square() / expected).sum()
    assert float(chi_square) < 16.3  # which one in a thousand exceeds, at 3 degrees of freedom


def test_a_draw_of_the_categorical_depends_on_its_own_noise() -> None:
    trainer = build(CHOICES)
    state = torch.randn(5, 4)
    draw = lambda noise: trainer.explorer()({STATE: state, "noise": noise})  # noqa: E731
    assert trainer.explorer().noise_shape == (3,)
    for same in (
        -40.0,
        0.0,
        40.0,
    ):  # far out they stand for 0 and 1, whose logarithms are not finite
        assert torch.equal(draw(torch.full((5, 3), same)), trainer.policy()({STATE: state}))
    choice = torch.tensor([2, 0, 1, 1, 0])
    assert torch.equal(draw(10 * nn.functional.one_hot(choice, 3).float()), choice)


# ---- the loss by hand ----------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A policy with these log-probabilities and entropies, or a value function with these values."""

    def __init__(self, numbers: list[float], entropy: list[float]) -> None:
        super().__init__()
        self.numbers, self.entropy = nn.Parameter(torch.tensor(numbers)), torch.tensor(entropy)

    def evaluate(self, observation: dict[str, Tensor], action: Tensor) -> tuple[Tensor, Tensor]:
        return self.numbers, self.entropy

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        return self.numbers[None]


RATIOS = [1.1, 1.5, 0.5, 1.1, 1.5, 0.5]
ADVANTAGES = [2.0, 2, 2, -1, -1, -1]
# The lesser of ratio and clipped ratio, times the advantage; the clip is 0.2.
GAINS = [1.1 * 2, 1.2 * 2, 0.5 * 2, -1.1, -1.5, -0.8]
BEFORE, VALUES, RETURNS = [1.0, 1, 1, 0, 0, 2], [1.1, 1.5, 1.5, -1, -1, 2], [2.0, 2, 0, 0, -1, 2.5]
ERRORS = [0.81, 0.25, 2.25, 1, 0, 0.25]
CLIPPED_ERRORS = [0.81, 0.64, 1.44, 0.04, 0.64, 0.25]  # of the values 1.1, 1.2, 1.2, -0.2, -0.2, 2


def by_hand(**options: Any) -> tuple[PPO, dict[str, Tensor]]:
    policy = Given([math.log(ratio) - 3 for ratio in RATIOS], [1.0, 2, 3, 4, 5, 6])
    models = nn.ModuleDict({"policy": policy, "value": Given(VALUES, [])})
    data = {"action": torch.zeros(6), "log_prob": torch.full((6,), -3.0), "advantage": torch.tensor(ADVANTAGES)}
    data |= {"value": torch.tensor(BEFORE), "return": torch.tensor(RETURNS)}
    usual: dict[str, Any] = {"normalise_advantage": False}
    return PPO(models, {}, nn.MSELoss(), SPEC, PPO.Config(**usual | options)), data


@pytest.mark.parametrize("clip_value", [True, False])
def test_the_loss_by_hand(clip_value: bool) -> None:
    trainer, data = by_hand(clip_value=clip_value, value_weight=0.7, entropy_weight=0.1)
    loss, metrics = trainer.losses(data)
    policy_loss = -sum(GAINS) / 6
    errors = [max(pair) for pair in zip(ERRORS, CLIPPED_ERRORS, strict=True)] if clip_value else ERRORS
    value_loss = 0.5 * sum(errors) / 6
    expected = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": 3.5, "clipped": 4 / 6}
    expected |= {"kl": sum(r - 1 - math.log(r) for r in RATIOS) / 6, "v": sum(VALUES) / 6, "v_min": -1, "v_max": 2}
    assert set(metrics) == set(expected) and not any(value.requires_grad for value in metrics.values())
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-6), name
    assert float(loss.detach()) == pytest.approx(policy_loss + 0.7 * value_loss - 0.1 * 3.5, abs=1e-6)


def test_advantages_are_normalised_to_mean_0_and_deviation_1() -> None:
    trainer, data = by_hand(normalise_advantage=True)
    gains = [1.1, 1.2, 0.5, -1.1, -1.5, -0.8]  # mean 1/2 and deviation 3/2 before; the sample's would be 1.64
    _, metrics = trainer.losses(data)
    assert float(metrics["policy_loss"]) == pytest.approx(-sum(gains) / 6, abs=1e-6)
    assert data["advantage"].tolist() == ADVANTAGES  # the next pass needs them as they were
    data["advantage"] = torch.full((6,), 5.0)
    assert float(trainer.losses(data)[1]["policy_loss"]) == 0


def test_a_clipped_sample_has_no_gradient() -> None:
    trainer, data = by_hand(value_weight=1.0)
    trainer.losses(data)[0].backward()
    policy, value = trainer.models["policy"].numbers.grad, trainer.models["value"].numbers.grad
    assert policy.tolist() == pytest.approx([-2.2 / 6, 0, -1 / 6, 1.1 / 6, 1.5 / 6, 0])  # -ratio advantage / 6
    assert value.tolist() == pytest.approx([-0.9 / 6, 0, 1.5 / 6, -1 / 6, 0, -0.5 / 6])  # (V - return) / 6


def test_a_clipped_minibatch_moves_no_policy() -> None:
    trainer = build(normalise_advantage=False)
    data = batch(trainer)
    data["log_prob"] = trainer.models["policy"].evaluate(data[STATE], data["action"])[0].detach()
    data["log_prob"] -= torch.linspace(0.2, 2, 32)  # ratios from 1.22 on
    data["advantage"] = data["advantage"].abs() + 0.1
    before = weights(trainer)
    loss, metrics = trainer.losses(data)
    loss.backward()
    assert float(metrics["clipped"]) == 1
    assert all(float(p.grad.abs().max()) == 0 for p in trainer.models["policy"].parameters())
    assert all(float(p.grad.abs().max()) > 0 for p in trainer.models["value"].parameters())
    assert torch.equal(weights(trainer), before)


# ---- the reference: numpy in float64, from the paper's equations ---------------------------------------------------


def tanh_stack(x: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray]) -> list[np.ndarray]:
    """Activations of a network with tanh between its layers, the inputs first."""
    out = [x]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        y = out[-1] @ w + b
        out.append(np.tanh(y) if i + 1 < len(weights) else y)
    return out


def tanh_backward(acts: list[np.ndarray], weights: list[np.ndarray], gradient: np.ndarray) -> tuple[list, list]:
    """Gradients of weights and biases from that of the outputs."""
    gw: list[Any] = [None] * len(weights)
    gb: list[Any] = [None] * len(weights)
    for i in reversed(range(len(weights))):
        if i + 1 < len(weights):
            gradient = gradient * (1 - acts[i + 1] ** 2)
        gw[i], gb[i] = acts[i].T @ gradient, gradient.sum(0)
        gradient = gradient @ weights[i].T
    return gw, gb


class Reference:
    """One update down eq. 9 with the clipped value function, by hand-written derivatives."""

    def __init__(self, trainer: PPO) -> None:
        self.config = trainer.config
        self.parameters = self.read(trainer)
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.parameters]
        self.steps = 0

    @staticmethod
    def read(trainer: PPO) -> list[np.ndarray]:
        """Weights `[inputs, outputs]` and biases of the policy, of the value function, and log sigma."""
        array = lambda x: x.detach().double().numpy().copy()  # noqa: E731
        policy = [layer for layer in trainer.models["policy"].net if hasattr(layer, "weight")]
        value = [layer for layer in trainer.models["value"].net if hasattr(layer, "weight")]
        found = [array(layer.weight).T for layer in policy] + [array(layer.bias) for layer in policy]
        found += [array(layer.weight)[0] for layer in value] + [array(layer.bias) for layer in value]
        return [*found, array(trainer.models["policy"].log_std)]

    def update(self, data: dict[str, np.ndarray]) -> dict[str, float]:
        c, n = self.config, len(data["return"])
        pw, pb, vw, vb = (self.parameters[i : i + 3] for i in (0, 3, 6, 9))
        log_std = self.parameters[12]
        sigma = np.exp(log_std)
        # eq. 7
        acts = tanh_stack(data[STATE], pw, pb)
        z = (data["action"] - acts[-1]) / sigma
        log_prob = (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(1)
        entropy = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum()
        advantage = data["advantage"]
        if c.normalise_advantage:
            advantage = (advantage - advantage.mean()) / advantage.std()
        ratio = np.exp(log_prob - data["log_prob"])
        gain, clipped_gain = ratio * advantage, np.clip(ratio, 1 - c.clip, 1 + c.clip) * advantage
        policy_loss = -np.minimum(gain, clipped_gain).mean()
        d_log_prob = np.where(gain <= clipped_gain, -gain / n, 0)[:, None]  # d ratio / d log pi = ratio
        pgw, pgb = tanh_backward(acts, pw, d_log_prob * z / sigma)
        d_log_std = (d_log_prob * (z**2 - 1)).sum(0) - c.entropy_weight
        # the value function
        acts = tanh_stack(data[STATE], vw, vb)
        value, before = acts[-1][:, 0], data["value"]
        error = value - data["return"]
        clipped_error = before + np.clip(value - before, -c.clip, c.clip) - data["return"]
        inside = np.abs(value - before) < c.clip
        d_value = np.where(error**2 >= clipped_error**2, error, clipped_error * inside)
        value_loss = 0.5 * np.maximum(error**2, clipped_error**2).mean()
        vgw, vgb = tanh_backward(acts, vw, c.value_weight * d_value[:, None] / n)
        self.steps += 1
        gradients = [*pgw, *pgb, *vgw, *vgb, d_log_std]
        for i, (gradient, (m, v)) in enumerate(zip(gradients, self.moments, strict=True)):
            self.parameters[i] = adam_step(self.parameters[i], gradient, m, v, self.steps)
        clipped = float((np.abs(ratio - 1) > c.clip).mean())
        kl = float((ratio - 1 - np.log(ratio)).mean())
        losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        return losses | {"clipped": clipped, "kl": kl}

    def compare(self, trainer: PPO) -> float:
        """Largest difference of any parameter."""
        pairs = zip(self.read(trainer), self.parameters, strict=True)
        return max(float(abs(found - expected).max()) for found, expected in pairs)


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("normalise", [True, False])
def test_updates_against_a_float64_reference(normalise: bool, updates: int) -> None:
    trainer = build(entropy_weight=0.01, normalise_advantage=normalise)
    data, before = batch(trainer), weights(trainer)
    reference = Reference(trainer)
    numbers = {key: value.double().numpy() for key, value in data.items()}
    for _ in range(updates):
        metrics = trainer.train_step(data)
        for name, value in reference.update(numbers).items():
            assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
        assert 0.2 < float(metrics["clipped"]) < 0.8
    assert reference.compare(trainer) < 1e-5
    assert bool((weights(trainer) != before).all())  # every parameter took part


def test_the_gradient_for_discrete_actions_against_autograd_in_float64() -> None:
    trainer = build(CHOICES, entropy_weight=0.05)
    data, c = batch(trainer, spread=0.2), trainer.config
    policy, value = (copy.deepcopy(trainer.models[name]).double() for name in ("policy", "value"))
    loss, metrics = trainer.losses(data)
    loss.backward()
    x = {key: number.double() if number.is_floating_point() else number for key, number in data.items()}
    categorical = Categorical(logits=policy.net(x[STATE]))
    ratio = (categorical.log_prob(x["action"]) - x["log_prob"]).exp()
    advantage = (x["advantage"] - x["advantage"].mean()) / x["advantage"].std(correction=0)
    gain = torch.min(ratio * advantage, ratio.clip(1 - c.clip, 1 + c.clip) * advantage)
    found = value(x[STATE])[0]
    clipped = torch.min(torch.max(found, x["value"] - c.clip), x["value"] + c.clip)
    error = torch.max((found - x["return"]) ** 2, (clipped - x["return"]) ** 2)
    expected = -gain.mean() + 0.5 * error.mean() / 2 - 0.05 * categorical.entropy().mean()
    expected.backward()
    assert 0.1 < float(metrics["clipped"]) < 0.9
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, reference in (("policy", policy), ("value", value)):
        for mine, theirs in zip(trainer.models[name].parameters(), reference.parameters(), strict=True):
            assert float((mine.grad - theirs.grad).abs().max()) < 1e-6
            assert float(theirs.grad.abs().max()) > 1e-4


# ---- when it stops -------------------------------------------------------------------------------------------------


def test_beyond_the_divergence_a_rollout_is_learnt_from_no_more() -> None:
    trainer = build(target_kl=0.05)
    near, far = batch(trainer, spread=0.01), batch(trainer, spread=1.0)
    start = weights(trainer)
    assert float(trainer.train_step(near)["kl"]) < 0.05
    moved = weights(trainer)
    assert not torch.equal(moved, start)
    assert float(trainer.train_step(far)["kl"]) > 0.05
    assert trainer.train_step(near) == {} and torch.equal(weights(trainer), moved)
    spread = {key: value.view(16, 2, *value.shape[1:]) for key, value in near.items() if key in (STATE, "action")}
    flags = {"terminated": torch.zeros(16, 2, dtype=torch.bool), "ended": torch.zeros(16, 2, dtype=torch.bool)}
    trainer.estimate(spread | flags | {f"next.{STATE}": spread[STATE], "reward": torch.zeros(16, 2)})
    assert trainer.train_step(near) and not torch.equal(weights(trainer), moved)


def test_without_a_limit_it_goes_on() -> None:
    trainer = build()
    far, before = batch(trainer, spread=1.0), weights(trainer)
    for _ in range(2):
        assert float(trainer.train_step(far)["kl"]) > 0.05
        assert not torch.equal(weights(trainer), before)
        before = weights(trainer)


def test_the_divergence_of_all_processes_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for world, stops in ((0.06, True), (0.04, False)):
        trainer = build(target_kl=0.05)
        data, before = batch(trainer, spread=0.01 if stops else 1.0), weights(trainer)
        monkeypatch.setattr(ppo, "global_mean", lambda own, world=world: torch.tensor(world))
        trainer.train_step(data)
        assert torch.equal(weights(trainer), before) == stops


def test_it_refuses_a_dataset_and_numbers_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="ppo learns from rollouts .* online_trainer.py"):
        prepared({}, PPO, "ppo", PPO.Config())
    for option, value in (("rollout", 0), ("epochs", 0), ("gae_lambda", 1.1), ("clip", -0.1), ("value_weight", -1)):
        with pytest.raises(UserError, match=f"--trainer.{option.replace('_', '-')} {value} must be"):
            PPO.data(build(**{option: value}).config)


# ---- rollouts ------------------------------------------------------------------------------------------------------


class Numbering:
    """A trainer that numbers the samples of a rollout, and keeps what it was given."""

    def estimate(self, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen = rollout
        steps, envs = rollout["reward"].shape
        return rollout | {"number": torch.arange(steps * envs).view(steps, envs)}


def rollout(minibatch: int = 4, epochs: int = 3, normaliser: Normaliser | None = None) -> tuple[Rollout, Numbering]:
    """Of six steps of two environments."""
    trainer, device = Numbering(), torch.device("cpu")
    return Rollout(trainer, normaliser or Normaliser({}), device, 2, minibatch, Rollouts(6, epochs)), trainer


def step(t: int, valid: tuple[bool, bool] = (True, True)) -> dict[str, Tensor]:
    """Everything of sample n = 2 t + environment tells of n."""
    n = torch.tensor([2.0 * t, 2.0 * t + 1])
    found = {STATE: n[:, None], f"next.{STATE}": n[:, None] + 1, "drawn": 10 * n[:, None], "action": -n[:, None]}
    found |= {"reward": n, "terminated": torch.zeros(2, dtype=torch.bool), "valid": torch.tensor(valid)}
    return found | {"ended": torch.tensor([t == 2, False])}


def minibatches(memory: Rollout, start: int = 0, stop: int = 6, **options: Any) -> list[dict[str, Tensor]]:
    for t in range(start, stop):
        assert memory.due(True) == 0
        memory.add(step(t, **options))
    return [memory.sample(4) for _ in range(int(memory.due(True)))]


def numbers(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def test_the_minibatches_of_an_epoch_are_a_partition() -> None:
    torch.manual_seed(0)
    memory, trainer = rollout()
    batches = minibatches(memory)
    found = numbers(batches)
    assert len(found) == 9 and all(len(part) == 4 for part in found) and memory.due(True) == 0
    epochs = [sum(found[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(12))]}) == 4  # each is shuffled, and another way
    for part in batches:
        assert set(part) == {STATE, f"next.{STATE}", "action", "number"}
        assert torch.equal(part[STATE].squeeze(1), part["number"].float())
        assert torch.equal(part["action"], 10 * part[STATE])  # as they were drawn, not as they were executed
    assert trainer.seen["ended"].tolist() == [[t == 2, False] for t in range(6)]
    assert trainer.seen[STATE].shape == (6, 2, 1)


def test_a_rollout_is_forgotten_and_the_next_one_counts_anew() -> None:
    memory, _ = rollout()
    assert memory.between and len(memory) == 0
    first = minibatches(memory)
    assert memory.between and len(memory) == 0
    memory.add(step(6))
    assert not memory.between and len(memory) == 2 and memory.due(True) == 0
    second = minibatches(memory, 7, 12)
    assert len(first) == len(second) == 9
    assert sorted(n for part in second[:3] for n in part[STATE].flatten().tolist()) == list(range(12, 24))


def test_what_is_left_over_by_the_minibatches_waits_for_another_epoch() -> None:
    torch.manual_seed(0)
    memory, _ = rollout(minibatch=5)
    found = numbers(minibatches(memory))
    assert len(found) == 6 and all(len(part) == 5 for part in found)
    assert all(len(set(found[i] + found[i + 1])) == 10 for i in (0, 2, 4))


def test_steps_that_only_reset_are_left_out_and_the_updates_stay_as_many() -> None:
    torch.manual_seed(0)
    memory, trainer = rollout()
    for t in range(6):
        memory.add(step(t, valid=(t != 3, t < 4)))
    assert memory.due(True) == 9
    found = numbers([memory.sample(4) for _ in range(9)])
    kept = sorted({*range(12)} - {6, 9, 11})
    for i in (0, 3, 6):
        epoch = sum(found[i : i + 3], [])
        assert len(epoch) == 12 and sorted(epoch[:9]) == kept and len(set(epoch[9:])) == 3 and set(epoch) == set(kept)
    assert trainer.seen["reward"].shape == (6, 2)  # the estimate sees all steps, so that those after a reset count


def test_a_rollout_too_small_for_the_minibatch_is_refused() -> None:
    rollout(minibatch=12)
    with pytest.raises(UserError, match="--batch-size: 13 samples .* 6 steps of 2 environments .* at most 12"):
        rollout(minibatch=13)


@pytest.mark.parametrize("begun", [1, 4])
def test_a_rollout_goes_on_where_it_was_saved(tmp_path: Path, begun: int) -> None:
    torch.manual_seed(0)
    memory, trainer = rollout()
    minibatches(memory, 0, begun)
    checkpoint.write_tree(tmp_path / "own.safetensors", {"buffer": memory.state_dict()})
    other, another = rollout()
    other.restore(checkpoint.read_tree(tmp_path / "own.safetensors"), 0)
    assert len(other) == 2 * begun
    found = []
    for one in (memory, other):
        torch.manual_seed(5)
        found.append(minibatches(one, begun, 6))
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(trainer.seen[key], another.seen[key]) for key in trainer.seen)
    anew, _ = rollout()
    anew.restore({}, 0)
    assert len(anew) == 0


def test_a_cut_ends_every_episode_at_the_newest_step() -> None:
    memory, trainer = rollout()
    memory.cut()  # nothing has begun
    memory.add(step(0))
    own = step(1)
    memory.add(own)
    memory.cut()
    assert own["ended"].tolist() == [False, False]  # others have it, too
    for t in range(2, 6):
        memory.add(step(t))
    assert trainer.seen["ended"].tolist() == [[False, False], [True, True], [True, False], *[[False, False]] * 3]
    assert not trainer.seen["terminated"].any()


def test_what_is_estimated_is_normalised() -> None:
    spec = {STATE: {"shape": (1,), "dtype": "float32", "stats": {"mean": [3.0], "std": [2.0]}}}
    memory, trainer = rollout(normaliser=Normaliser(spec, {STATE: "running"}))
    batches = minibatches(memory)
    assert torch.equal(trainer.seen[STATE].flatten(), (torch.arange(12) - 3) / 2)
    assert torch.equal(trainer.seen[f"next.{STATE}"].flatten(), (torch.arange(12) - 2) / 2)
    assert all(torch.equal(part[STATE].flatten(), (part["number"] - 3) / 2) for part in batches)


# ---- running statistics --------------------------------------------------------------------------------------------


def statistics(
    spec: dict[str, Any] | None = None, envs: int = 2, observations: bool = True, rewards: bool = True
) -> tuple[RunningStatistics, Normaliser, dict[str, Any]]:
    spec = copy.deepcopy(spec or SPEC | {STATE: {"shape": (3,), "dtype": "float32"}})
    running = RunningStatistics(spec, observations, rewards, 0.9, envs)
    return running, running.normaliser_of(spec, {}), spec


def stream(steps: int = 60, envs: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Transitions with means and deviations of their own, some steps of which only reset."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda share: torch.rand(envs, generator=generator) < share  # noqa: E731
    found = []
    for _ in range(steps):
        state = torch.randn(envs, 3, generator=generator) * torch.tensor([1.0, 3.0, 0.1]) + torch.tensor([5.0, 0, -100])
        one = {STATE: state, f"next.{STATE}": state + 1, "reward": torch.randn(envs, generator=generator) + 1}
        found.append(one | {"ended": uniform(0.2), "valid": ~uniform(0.1), "terminated": uniform(0.1)})
    return found


def returns(transitions: list[dict[str, Tensor]], envs: int = 2) -> np.ndarray:
    """Discounted returns so far, of each episode's first step on."""
    found: list[float] = []
    for env in range(envs):
        so_far = 0.0
        for one in transitions:
            if bool(one["valid"][env]):
                so_far = so_far * 0.9 + float(one["reward"][env])
                found.append(so_far)
            if bool(one["ended"][env]) or not bool(one["valid"][env]):
                so_far = 0.0
    return np.array(found)


def test_running_statistics_are_those_of_everything_so_far() -> None:
    running, normaliser, _ = statistics()
    transitions = stream()
    for t, one in enumerate(transitions, 1):
        running.add(one)
        if t in (1, 7, 8, 40, 60):
            running.settle()
            states = torch.cat([one[STATE][one["valid"]] for one in transitions[:t]]).double().numpy()
            assert np.allclose(normaliser.offset[STATE], states.mean(0), rtol=1e-6, atol=1e-6)
            assert np.allclose(normaliser.scale[STATE], np.sqrt(states.var(0) + 1e-8), rtol=1e-5)
            assert float(normaliser.scale["reward"]) == pytest.approx(
                math.sqrt(returns(transitions[:t]).var() + 1e-8), rel=1e-5
            )
    running.settle()  # nothing new
    assert np.allclose(normaliser.offset[STATE], states.mean(0), rtol=1e-6, atol=1e-6)


def test_nothing_changes_between_acting_and_learning() -> None:
    running, normaliser, _ = statistics()
    transitions = stream(20)
    for one in transitions[:10]:
        running.add(one)
    running.settle()
    before = normaliser(transitions[0])
    for one in transitions[10:]:
        running.add(one)
        after = normaliser(transitions[0])
        assert all(torch.equal(before[key], after[key]) for key in before)
    running.settle()
    after = normaliser(transitions[0])
    assert {key for key in before if not torch.equal(before[key], after[key])} == {STATE, f"next.{STATE}", "reward"}


@pytest.mark.parametrize("observations", [True, False])
@pytest.mark.parametrize("rewards", [True, False])
def test_what_is_not_asked_for_is_not_normalised(observations: bool, rewards: bool) -> None:
    running, normaliser, spec = statistics(observations=observations, rewards=rewards)
    one = stream(1)[0] | {"valid": torch.ones(2, dtype=torch.bool)}
    running.add(one)
    running.settle()
    found = normaliser(one)
    for key, asked in ((STATE, observations), (f"next.{STATE}", observations), ("reward", rewards)):
        assert torch.equal(found[key], one[key]) == (not asked), key
    assert ("stats" in spec[STATE], "stats" in spec["reward"]) == (observations, rewards)


class Playback(gym.Env):
    """Plays numbers back; an episode terminates after `length` steps."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, states: Tensor, rewards: Tensor, length: int) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, states.shape[1:], np.float32)
        self.states, self.rewards, self.length = iter(states.numpy()), rewards.tolist(), length
        self.steps = 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return next(self.states), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return next(self.states), self.rewards[self.steps - 1], self.steps % self.length == 0, False, {}


def played_by(env: Any, steps: int) -> Iterator[bool]:
    """Play as much; yields whether the step terminated."""
    env.reset()
    for _ in range(steps):
        *_, terminated, _, _ = env.step(0)
        yield terminated


def test_observations_are_normalised_as_gymnasium_does() -> None:
    states = torch.randn(501, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0, 0.2]) + 2
    wrapped: Any = gym.wrappers.NormalizeObservation(Playback(states, torch.zeros(500), 1000))
    assert not any(played_by(wrapped, 500))
    running, normaliser, _ = statistics(envs=1)
    for i, state in enumerate(states):
        flags = dict.fromkeys(("valid", "ended"), torch.tensor([True]))
        running.add({STATE: state[None], "reward": torch.ones(1), **flags})
        if i % 100 == 0:
            running.settle()
    assert np.allclose(normaliser.offset[STATE], wrapped.obs_rms.mean, rtol=1e-4)
    assert np.allclose(normaliser.scale[STATE], np.sqrt(wrapped.obs_rms.var), rtol=1e-4)


def test_rewards_are_normalised_as_gymnasium_does() -> None:
    """Gymnasium forgets the return so far a step early, at the reward of the step that terminates, and not after it."""
    rewards = torch.randn(1200, generator=torch.Generator().manual_seed(0)) + 1
    wrapped: Any = gym.wrappers.NormalizeReward(Playback(torch.zeros(1201, 3), rewards, 60), gamma=0.9)
    terminated = list(played_by(wrapped, 1200))
    assert sum(terminated) == 20
    deviation = math.sqrt(wrapped.return_rms.var)
    early = [*terminated[1:], False]
    for ended, tolerance in ((early, 1e-5), (terminated, 0.02), ([False] * 1200, None)):
        running, normaliser, _ = statistics(envs=1)
        for reward, end in zip(rewards, ended, strict=True):
            one = {STATE: torch.zeros(1, 3), "reward": reward[None], "valid": torch.tensor([True])}
            running.add(one | {"ended": torch.tensor([end])})
        running.settle()
        found = float(normaliser.scale["reward"])
        if tolerance is None:  # so the numbers do depend on the ends of episodes
            assert abs(found / deviation - 1) > 0.1
        else:
            assert found == pytest.approx(deviation, rel=tolerance)


def test_the_return_begins_anew_when_an_episode_ends_or_is_cut() -> None:
    running, normaliser, _ = statistics(envs=1)
    one = {STATE: torch.zeros(1, 3), "reward": torch.ones(1), "valid": torch.tensor([True])}
    for end in (False, True, False):
        running.add(one | {"ended": torch.tensor([end])})
    running.cut()
    running.add(one | {"ended": torch.tensor([False])})
    running.add(one | {"ended": torch.tensor([False]), "valid": torch.tensor([False])})
    running.add(one | {"ended": torch.tensor([False])})
    running.settle()
    assert float(normaliser.scale["reward"]) == pytest.approx(np.sqrt(np.var([1, 1.9, 1, 1, 1])), rel=1e-5)


def test_what_running_statistics_give_is_cut_at_10() -> None:
    running, normaliser, _ = statistics()
    assert running.modes == {STATE: "running", "reward": "running_return"} and LIMIT == 10
    for one in stream():
        running.add(one)
    running.settle()
    one = {STATE: torch.tensor([[1e3, -1e3, -100.0]]), "reward": torch.tensor([-1e4])}
    one |= {f"next.{STATE}": torch.tensor([[6.0, 1e3, 1e3]])}
    found = normaliser(one)
    inside = (-100 - float(normaliser.offset[STATE][2])) / float(normaliser.scale[STATE][2])
    assert found[STATE].tolist() == [[10, -10, pytest.approx(inside, abs=1e-3)]] and abs(inside) < 1
    assert found["reward"].tolist() == [-10]
    assert found[f"next.{STATE}"][0, 1:].tolist() == [10, 10] and 0 < float(found[f"next.{STATE}"][0, 0]) < 2
    assert float(one["reward"]) == -1e4  # what was given stays as it is
    mean = float(normaliser(one | {"reward": torch.tensor([0.5])})["reward"])
    assert mean == pytest.approx(0.5 / float(normaliser.scale["reward"]))  # no mean is taken from rewards


def test_other_modes_are_not_cut() -> None:
    stats = {"mean": [0.0], "std": [1.0]}
    for mode, expected in (("running", 10.0), ("mean_std", 50.0)):
        spec = {STATE: {"shape": (1,), "dtype": "float32", "stats": stats}}
        assert float(Normaliser(spec, {STATE: mode})({STATE: torch.tensor([[50.0]])})[STATE]) == expected


@pytest.mark.parametrize("own", [True, False])
def test_running_statistics_go_on_where_they_were_saved(tmp_path: Path, own: bool) -> None:
    """With another number of processes, what had not counted yet is forgotten."""
    transitions = stream()
    running, normaliser, _ = statistics()
    for t, one in enumerate(transitions[:30]):
        running.add(one)
        if t == 19:
            running.settle()
    checkpoint.write_tree(tmp_path / "file", {"shared": running.state_dict(), "own": running.rank_state()})
    saved = checkpoint.read_tree(tmp_path / "file")
    other, another, _ = statistics()
    other.load_state_dict(saved["shared"])
    if own:
        other.load_rank_state(saved["own"])
    assert torch.equal(another.offset[STATE], normaliser.offset[STATE])
    assert torch.equal(another.scale["reward"], normaliser.scale["reward"])
    for one in transitions[30:]:
        running.add(one)
        other.add(one)
    running.settle()
    other.settle()
    assert torch.equal(another.scale["reward"], normaliser.scale["reward"]) == own
    assert torch.equal(another.offset[STATE], normaliser.offset[STATE]) == own
    parts = transitions if own else transitions[:20] + transitions[30:]
    states = torch.cat([one[STATE][one["valid"]] for one in parts]).numpy()
    assert np.allclose(another.offset[STATE], states.mean(0), rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_with_the_statistics_of_the_one_it_begins_from() -> None:
    running, normaliser, spec = statistics()
    transitions = stream()
    for one in transitions[:30]:
        running.add(one)
    running.settle()
    described = running.describe(spec)
    assert described[STATE]["stats"]["count"] == sum(int(one["valid"].sum()) for one in transitions[:30])
    assert described[STATE]["stats"]["mean"] == pytest.approx(normaliser.offset[STATE].tolist(), rel=1e-6)
    following, another, _ = statistics(described)
    for name in ("offset", "scale"):
        for key in (STATE, "reward"):
            assert torch.allclose(getattr(another, name)[key], getattr(normaliser, name)[key], rtol=1e-6)
    following.cut()
    for one in transitions[30:]:
        following.add(one)
    following.settle()
    states = torch.cat([one[STATE][one["valid"]] for one in transitions]).double().numpy()
    assert np.allclose(another.offset[STATE], states.mean(0), rtol=1e-5, atol=1e-5)
    assert np.allclose(another.scale[STATE], states.std(0), rtol=1e-4)
