"""Soft actor-critic against torch.distributions, hand-worked numbers and a slow float64 reference from the paper."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from components.models.q_ensemble import QEnsemble
from components.models.tanh_gaussian import TanhGaussian, tanh_gaussian_log_prob
from components.models.temperature import Temperature
from components.optimizers import Adam
from components.trainers.sac import SAC

SPEC = {"observation.state": {"shape": (4,), "dtype": "float32"}, "action": {"shape": (2,), "dtype": "float32"}}
SPEC |= {f"next.{key}": SPEC[key] for key in ("observation.state",)}
SPEC |= {"reward": {"shape": (), "dtype": "float32"}, "terminated": {"shape": (), "dtype": "bool"}}
LR = 1e-2


def build(seed: int = 0, **options: Any) -> SAC:
    torch.manual_seed(seed)
    factories = {
        "policy": TanhGaussian(hidden_dims=(8, 6)),
        "critic": QEnsemble(hidden_dims=(7, 5)),
        "temperature": Temperature(initial=0.3),
    }
    models = nn.ModuleDict({name: factory.build(SPEC) for name, factory in factories.items()})
    opts = {name: Adam(lr=LR).build(model.parameters()) for name, model in models.items()}
    return SAC(models, opts, nn.MSELoss(), SPEC, SAC.Config(**options))


def batch(size: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "observation.state": draw(size, 4),
        "action": draw(size, 2).tanh(),
        "reward": draw(size),
        "terminated": torch.arange(size) % 5 == 0,
        "next.observation.state": draw(size, 4),
        "discount": torch.full((size,), 0.9) ** (1 + torch.arange(size) % 3),
    }


def test_log_probability_against_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 50, 3, dtype=torch.float64)
    before = mean + log_std.exp() * noise
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, [torch.distributions.TanhTransform()])
    expected = squashed.log_prob(before.tanh()).sum(1)
    found = tanh_gaussian_log_prob(before, noise, log_std)
    easy = before.abs().amax(1) < 5  # further out tanh rounds to 1, and the inverse in the reference with it
    assert easy.sum() > 30 and torch.allclose(found[easy], expected[easy], atol=1e-8)
    far = tanh_gaussian_log_prob(*(torch.tensor([[x]]) for x in (30.0, 1.0, 0.0)))
    by_hand = -0.5 - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - 30)  # log(1 - tanh(30)^2) = 2 (log 2 - 30)
    assert float(far) == pytest.approx(by_hand)


def test_it_acts_by_the_mean_and_explores_by_a_draw() -> None:
    sac = build()
    state = torch.randn(5, 4)
    mean, log_std = sac.models["policy"].gaussian(state)
    assert torch.equal(sac.models["policy"](state), mean.tanh())
    noise = torch.randn(5, 2)
    explored = sac.explorer()({"observation.state": state, "noise": noise})
    assert torch.allclose(explored, (mean + log_std.exp() * noise).tanh())


def test_the_members_of_the_ensemble_are_independent_networks() -> None:
    torch.manual_seed(1)
    critic = QEnsemble(members=3, hidden_dims=(7, 5)).build(SPEC)
    state, action = torch.randn(6, 4), torch.randn(6, 2)
    x = torch.cat([state, action], 1)
    for member in range(3):
        y = x
        for layer in critic.net:
            linear = hasattr(layer, "weight")
            y = y @ layer.weight[member] + layer.bias.view(3, -1)[member] if linear else layer(y)
        assert torch.allclose(critic(state, action)[member], y.squeeze(1), atol=1e-6)


def test_the_temperature_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """J_alpha = -alpha (mean log pi + H), H = -2; its gradient in log alpha is J_alpha itself."""
    sac = build()
    log_prob = torch.tensor([1.0, 2.0, 6.0, 7.0])
    action = torch.zeros(4, 2, requires_grad=True)
    monkeypatch.setattr(type(sac.models["policy"]), "sample", lambda *a, **k: (action, log_prob))
    _, metrics = sac.actor_losses({"observation.state": torch.zeros(4, 4)})
    assert float(metrics["temperature_loss"]) == pytest.approx(-0.3 * (4 - 2))
    loss, _ = sac.actor_losses({"observation.state": torch.zeros(4, 4)})
    loss.backward()
    log = sac.models["temperature"].log
    assert float(log.grad) == pytest.approx(-0.6)
    before = float(log.detach())
    sac.optimizers["temperature"].step()
    assert float(log.detach()) == pytest.approx(before + LR)  # Adam's first step; a policy this sure gets hotter


# ---- the reference: numpy in float64, from the paper's equations ---------------------------------------------------


def linear_stack(x: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray]) -> list[np.ndarray]:
    """Activations of a ReLU network, the inputs first."""
    out = [x]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        y = out[-1] @ w + b
        out.append(np.maximum(y, 0) if i + 1 < len(weights) else y)
    return out


def backward(acts: list[np.ndarray], weights: list[np.ndarray], gradient: np.ndarray) -> tuple[list, list, np.ndarray]:
    """Gradients of weights, biases and inputs from that of the outputs."""
    gw: list[Any] = [None] * len(weights)
    gb: list[Any] = [None] * len(weights)
    for i in reversed(range(len(weights))):
        if i + 1 < len(weights):
            gradient = gradient * (acts[i + 1] > 0)
        gw[i], gb[i] = acts[i].T @ gradient, gradient.sum(0)
        gradient = gradient @ weights[i].T
    return gw, gb, gradient


def adam_step(value: np.ndarray, gradient: np.ndarray, m: np.ndarray, v: np.ndarray, t: int) -> np.ndarray:
    """Kingma & Ba, algorithm 1; m and v are updated in place."""
    m += 0.1 * (gradient - m)
    v += 0.001 * (gradient**2 - v)
    return value - LR * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


class Reference:
    """One update of the paper's algorithm 1 with all gradients at the same weights, by hand-written derivatives."""

    def __init__(self, sac: SAC) -> None:
        policy, critic = sac.models["policy"].net, sac.models["critic"].net
        array = lambda x: x.detach().double().numpy().copy()  # noqa: E731
        self.pw = [array(layer.weight).T for layer in policy if hasattr(layer, "weight")]
        self.pb = [array(layer.bias) for layer in policy if hasattr(layer, "weight")]
        layers = [layer for layer in critic if hasattr(layer, "weight")]
        self.qw = [[array(layer.weight)[i] for layer in layers] for i in range(2)]
        self.qb = [[array(layer.bias).reshape(2, -1)[i] for layer in layers] for i in range(2)]
        self.tw = [[w.copy() for w in ws] for ws in self.qw]
        self.tb = [[b.copy() for b in bs] for bs in self.qb]
        self.log_alpha = array(sac.models["temperature"].log)
        parameters = [*self.pw, *self.pb, *(w for ws in self.qw + self.qb for w in ws), self.log_alpha]
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
        self.steps = 0

    def sample(
        self, state: np.ndarray, noise: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list, np.ndarray, np.ndarray]:
        acts = linear_stack(state, self.pw, self.pb)
        mean, log_std = acts[-1][:, :2], acts[-1][:, 2:]
        u = mean + np.exp(log_std) * noise
        a = np.tanh(u)
        gaussian = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        return a, (gaussian - np.log(1 - a**2)).sum(1), acts, u, log_std  # eq. 21

    def update(self, data: dict[str, np.ndarray], noise: list[np.ndarray]) -> dict[str, float]:
        state, n = data["observation.state"], len(data["reward"])
        alpha = np.exp(self.log_alpha)
        # eq. 3 and 5: the target
        following, next_log_prob, *_ = self.sample(data["next.observation.state"], noise[0])
        x = np.concatenate([data["next.observation.state"], following], 1)
        q_next = np.minimum(*(linear_stack(x, self.tw[i], self.tb[i])[-1][:, 0] for i in range(2)))
        y = data["reward"] + data["discount"] * (1 - data["terminated"]) * (q_next - alpha * next_log_prob)
        # eq. 5: J_Q
        critic_loss, qgw, qgb = 0.0, [], []
        for i in range(2):
            acts = linear_stack(np.concatenate([state, data["action"]], 1), self.qw[i], self.qb[i])
            error = acts[-1][:, 0] - y
            critic_loss += 0.5 * (error**2).mean()
            gw, gb, _ = backward(acts, self.qw[i], error[:, None] / n)
            qgw.append(gw)
            qgb.append(gb)
        # eq. 7: J_pi, with the derivative of eq. 10 written out
        a, log_prob, acts, u, log_std = self.sample(state, noise[1])
        x = np.concatenate([state, a], 1)
        stacks = [linear_stack(x, self.qw[i], self.qb[i]) for i in range(2)]
        q = np.stack([stack[-1][:, 0] for stack in stacks])
        actor_loss = (alpha * log_prob - q.min(0)).mean()
        dq = np.zeros_like(a)
        for i in range(2):
            chosen = (q.argmin(0) == i).astype(float)[:, None]
            dq += backward(stacks[i], self.qw[i], chosen)[2][:, 4:]
        sigma_eps = np.exp(log_std) * noise[1]
        # with eps fixed: d log pi / du = 2 tanh(u), the Gaussian's part moves with log sigma alone (-1 a dimension)
        du = (alpha * 2 * a - dq * (1 - a**2)) / n
        gradient = np.concatenate([du, du * sigma_eps - alpha / n], 1)
        pgw, pgb, _ = backward(acts, self.pw, gradient)
        # eq. 18: J_alpha, H = -2
        temperature_loss = -alpha * (log_prob.mean() - 2)
        self.steps += 1
        places: list[Any] = [(self.pw, i) for i in range(3)] + [(self.pb, i) for i in range(3)]
        places += [(ws, i) for ws in self.qw + self.qb for i in range(3)]
        gradients = [*pgw, *pgb, *(g for gs in qgw + qgb for g in gs)]
        for (owner, i), gradient, (m, v) in zip(places, gradients, self.moments[:-1], strict=True):
            owner[i] = adam_step(owner[i], gradient, m, v, self.steps)
        self.log_alpha = adam_step(self.log_alpha, np.asarray(temperature_loss), *self.moments[-1], self.steps)
        for i in range(2):
            self.tw[i] = [0.995 * t + 0.005 * w for t, w in zip(self.tw[i], self.qw[i], strict=True)]
            self.tb[i] = [0.995 * t + 0.005 * b for t, b in zip(self.tb[i], self.qb[i], strict=True)]
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "temperature_loss": float(temperature_loss)}

    def compare(self, sac: SAC) -> float:
        """Largest difference of any parameter, targets included."""
        array = lambda x: x.detach().double().numpy()  # noqa: E731
        found = []
        for layer, w, b in zip(
            [x for x in sac.models["policy"].net if hasattr(x, "weight")], self.pw, self.pb, strict=True
        ):
            found += [abs(array(layer.weight).T - w).max(), abs(array(layer.bias) - b).max()]
        for name, ws, bs in (("critic", self.qw, self.qb), ("target_critic", self.tw, self.tb)):
            layers = [x for x in sac.models[name].net if hasattr(x, "weight")]
            for i in range(2):
                for layer, w, b in zip(layers, ws[i], bs[i], strict=True):
                    found.append(abs(array(layer.weight)[i] - w).max())
                    found.append(abs(array(layer.bias).reshape(2, -1)[i] - b).max())
        return max(*found, abs(array(sac.models["temperature"].log) - self.log_alpha))


@pytest.mark.parametrize("updates", [1, 3])
def test_updates_against_a_float64_reference(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    sac, data = build(), batch()
    reference = Reference(sac)
    numbers = {key: value.double().numpy() for key, value in data.items()}
    for update in range(updates):
        noise = [torch.randn(16, 2, generator=torch.Generator().manual_seed(10 * update + i)) for i in range(2)]
        draws = iter(noise)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x, draws=draws: next(draws))
            metrics = sac.train_step(data)
        expected = reference.update(numbers, [x.double().numpy() for x in noise])
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
    assert reference.compare(sac) < 1e-5


def test_the_actor_moves_no_critic_and_the_critic_no_actor() -> None:
    sac, data = build(), batch()
    sac.actor_losses(data)[0].backward()
    assert all(p.grad is None for p in sac.models["critic"].parameters())
    assert all(p.grad is not None for p in sac.models["policy"].parameters())
    sac = build()
    sac.critic_loss(data)[0].backward()
    assert all(p.grad is None for name in ("policy", "temperature") for p in sac.models[name].parameters())
    assert all(p.grad is None for p in sac.models["target_critic"].parameters())
