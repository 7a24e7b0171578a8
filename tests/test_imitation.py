"""The imitation trainers: their maths by hand, more than one mode, networks, pictures, tasks and fine-tuning."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from components import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, OPTIMIZER_BUILDER_REGISTRY, TRAINER_REGISTRY
from components.features import build_models
from components.losses import sinkhorn, zero_padding
from components.trainers import act, flow
from components.trainers.diffusion import DiffusionSampler, noise_schedule

Script = Callable[..., Path]


class Known(nn.Module):
    """A denoiser that is given as a function of (noisy, time)."""

    denoises = True

    def __init__(self, predict: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.predict = predict

    def condition(self, observation: dict[str, Tensor]) -> Tensor:
        return torch.zeros(1)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.predict(noisy, time)


# ---- diffusion -----------------------------------------------------------------------------------------------------


def test_noise_schedules_have_their_closed_form() -> None:
    steps = 100
    found = noise_schedule("cosine", steps).double()
    f = lambda t: math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    expected = torch.tensor([f(t + 1) / f(0) for t in range(steps)], dtype=torch.float64)
    assert torch.allclose(found[:-1], expected[:-1], rtol=1e-5)  # betas telescope until the last, which is capped
    assert float(found[-1]) == pytest.approx(float(found[-2]) * 0.001, rel=1e-4)
    linear, product = noise_schedule("linear", 1000).double(), 1.0
    for t, value in enumerate(linear.tolist()):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert value == pytest.approx(product, rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 1), ("ddim", 7), ("ddim", 50), ("ddpm", 5), ("ddpm", 50)])
def test_a_perfect_denoiser_gives_the_chunk_back(prediction: str, sampler: str, steps: int) -> None:
    """Of data that is one chunk a, noise and v follow from x_t; every sampler must arrive at a."""
    a, alpha_bar = torch.linspace(-1, 1, 8).view(4, 2), noise_schedule("cosine", 50)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        now = alpha_bar[(time * 50).round().long()].view(-1, 1, 1)
        epsilon = (x - now.sqrt() * a) / (1 - now).sqrt()
        v = now.sqrt() * epsilon - (1 - now).sqrt() * a
        return {"epsilon": epsilon, "sample": a.expand_as(x), "v": v}[prediction]

    policy = DiffusionSampler(nn.Identity(), Known(predict), alpha_bar, prediction, (4, 2), None)
    policy.sampler, policy.sampling_steps = sampler, steps
    noise = torch.randn(3, *policy.noise_shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(policy({"noise": noise}), a.expand(3, -1, -1), atol=1e-3)


def test_with_all_steps_the_mean_is_the_posterior_of_ddpm() -> None:
    """Ho et al. (2020), eq. 7, with its variance at eta = 1; at eta = 0 there is none, Song et al., eq. 12."""
    alpha_bar = noise_schedule("cosine", 20)
    network = Known(lambda x, time: 0.3 * x + time.view(-1, 1, 1))
    policy = DiffusionSampler(nn.Identity(), network, alpha_bar, "epsilon", (4, 2), None)
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    for t in range(19, 0, -1):
        now, before = alpha_bar[t], alpha_bar[t - 1]
        beta, epsilon = 1 - now / before, network(x, torch.tensor([t / 20]), x)
        a = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
        mean = before.sqrt() * beta / (1 - now) * a + (1 - beta).sqrt() * (1 - before) / (1 - now) * x
        close = {"atol": 1e-4 * float(mean.abs().max())}
        assert torch.allclose(policy.step(x, t, before, x, eta=1.0), mean, **close)
        noise = torch.ones_like(x)
        moved = policy.step(x, t, before, x, eta=1.0, noise=noise) - policy.step(x, t, before, x, eta=1.0)
        assert torch.allclose(moved, ((1 - before) / (1 - now) * beta).sqrt() * noise, atol=1e-4)
        deterministic = before.sqrt() * a + (1 - before).sqrt() * epsilon
        assert torch.allclose(policy.step(x, t, before, x), deterministic, **close)
        x = mean.clamp(-3, 3)


def test_the_predicted_chunk_is_clipped_to_the_range_of_the_data() -> None:
    bounds = [[-1.0, -2.0], [1.0, 0.5]]
    network = Known(lambda x, time: torch.full_like(x, 9.0))
    policy = DiffusionSampler(nn.Identity(), network, noise_schedule("cosine", 10), "sample", (4, 2), bounds)
    assert torch.allclose(policy({"noise": torch.randn(2, 1, 4, 2)}), torch.tensor([1.0, 0.5]).expand(2, 4, 2))


def built(name: str, spec: dict[str, Any], loss: str = "mse", model: Any = None, **config: Any) -> Any:
    """A trainer as the script makes it, with small networks."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"unet1d": {"channels": (32, 64)}, "dit": {"width": 32}, "act": {"width": 32}}
    cls = TRAINER_REGISTRY[name]
    entry = cls.needs["policy"]
    factory = model or MODEL_BUILDER_REGISTRY[entry](**small.get(entry, {}))
    factories = {"policy": factory, "encoder": MODEL_BUILDER_REGISTRY["cnn"]()}
    models = build_models(list(factories), lambda key, seen: factories[key].build(seen), spec)
    optimizers = {"policy": OPTIMIZER_BUILDER_REGISTRY["adamw"](lr=3e-3).build(models["policy"].parameters())}
    arguments: dict[str, Any] = {"config": cls.Config(**config)} if hasattr(cls, "Config") else {}
    if name in ("diffusion", "flow"):
        arguments["spec"] = spec
    return cls(models, optimizers, LOSS_BUILDER_REGISTRY[loss]().build(), **arguments)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_the_denoising_loss_by_hand(prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At noise e = 2 and time 3 of 10: x_t = sqrt(abar) a + sqrt(1 - abar) e, against each target, without padding."""
    trainer = built("diffusion", SPEC, prediction=prediction, diffusion_steps=10)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 2.0))
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.35))
    seen: list[Tensor] = []

    def predict(noisy: Tensor, time: Tensor) -> Tensor:
        seen.extend([noisy, time])
        return torch.zeros_like(noisy)

    trainer.models["policy"] = Known(predict)
    action = torch.randn(2, 8, 2)
    is_pad = torch.arange(8).expand(2, 8) >= 6
    loss, _ = trainer.losses({"observation.state": torch.zeros(2, 3), "action": action, "action_is_pad": is_pad})
    s, n = trainer.alpha_bar[3].sqrt(), (1 - trainer.alpha_bar[3]).sqrt()
    assert torch.allclose(seen[0], s * action + n * 2) and torch.allclose(seen[1], torch.tensor(0.3))
    target = {"epsilon": torch.full_like(action, 2.0), "sample": action, "v": s * 2 - n * action}[prediction]
    assert torch.allclose(loss, target[:, :6].square().sum() / action.numel())


SPEC = {
    "observation.state": {"shape": (3,), "dtype": "float32"},
    "action": {"shape": (8, 2), "dtype": "float32"},
    "action_is_pad": {"shape": (8,), "dtype": "bool"},
}

# ---- flow ----------------------------------------------------------------------------------------------------------


def gaussian_velocity(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """E[a - x_0 | x_t = x] for x_0 ~ N(0, 1), a ~ N(mean, std^2), x_t = (1 - t) x_0 + t a: jointly Gaussian."""
    variance = (1 - t) ** 2 + (t * std) ** 2
    return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)


def test_flow_learns_the_analytic_velocity_between_gaussians() -> None:
    mean, std = 1.5, 0.5
    spec = {"observation.state": {"shape": (1,), "dtype": "float32"}, "action": {"shape": (1,), "dtype": "float32"}}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    models = nn.ModuleDict({"policy": Known(lambda x, t: net(torch.cat([x, t.expand(len(x)).view(-1, 1)], 1)))})
    optimizer = torch.optim.Adam(net.parameters())
    trainer = flow.Flow(models, {"policy": optimizer}, nn.MSELoss(), spec=spec)
    state = torch.zeros(1024, 1)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 1500)
        trainer.train_step({"observation.state": state, "action": mean + std * torch.randn(1024, 1)})
    for t in (0.1, 0.5, 0.9):
        centre, spread = t * mean, math.sqrt((1 - t) ** 2 + (t * std) ** 2)
        x = (centre + spread * torch.linspace(-1.5, 1.5, 7)).view(-1, 1)
        with torch.no_grad():
            found = models["policy"](x, torch.tensor([t]), torch.zeros(1))
        assert torch.allclose(found, gaussian_velocity(x, torch.tensor(t), mean, std), atol=0.06)


@pytest.mark.parametrize(("sampler", "steps", "error"), [("euler", 400, 5e-3), ("midpoint", 40, 1e-3)])
def test_the_integrators_follow_the_exact_path(sampler: str, steps: int, error: float) -> None:
    """Between Gaussians x(t) stays at the same quantile, so the end is mean + std x_0; midpoint is of second order."""
    mean, std, x0 = 1.5, 0.5, torch.linspace(-2, 2, 9).view(-1, 1)
    policy = flow.FlowSampler(nn.Identity(), Known(lambda x, t: gaussian_velocity(x, t, mean, std)), (1,))
    policy.sampler, policy.sampling_steps = sampler, steps
    assert (policy({"noise": x0}) - (mean + std * x0)).abs().max() < error
    policy.sampling_steps = steps // 4
    assert (policy({"noise": x0}) - (mean + std * x0)).abs().max() > error / 5


def test_coupling_pairs_noise_with_what_is_near() -> None:
    """Two clusters far apart, and noise on either side: every action gets noise of its side."""
    torch.manual_seed(0)
    side = torch.tensor([-1.0, 1.0]).repeat(32)[:, None]
    noise, action = side[torch.randperm(64)] + 0.1 * torch.randn(64, 1), 5 * side + 0.1 * torch.randn(64, 1)
    paired = flow.couple(noise, action, 0.01)
    assert torch.equal(paired.sign(), action.sign()) and not torch.equal(noise.sign(), action.sign())
    assert set(paired.flatten().tolist()) <= set(noise.flatten().tolist())
    assert len(set(paired.flatten().tolist())) > 16


def test_logit_normal_times_are_denser_in_the_middle() -> None:
    times: dict[str, Tensor] = {}
    for kind in ("uniform", "logit_normal"):
        trainer = built("flow", SPEC, time=kind)

        def predict(noisy: Tensor, time: Tensor, kind: str = kind) -> Tensor:
            times[kind] = time
            return noisy

        trainer.models["policy"] = Known(predict)
        trainer.losses({"observation.state": torch.zeros(4000, 3), "action": torch.zeros(4000, 8, 2)})
    middle = {kind: float(((time > 0.25) & (time < 0.75)).float().mean()) for kind, time in times.items()}
    assert middle["uniform"] == pytest.approx(0.5, abs=0.03)
    assert middle["logit_normal"] == pytest.approx(math.erf(math.log(3) / math.sqrt(2)), abs=0.03)  # |normal| < log 3


# ---- losses --------------------------------------------------------------------------------------------------------


def test_sinkhorn_tends_to_the_linear_program() -> None:
    """Between uniform weights the optimum is a permutation (Birkhoff), of which five points have 120."""
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = min(sum(float(cost[i, p[i]]) for i in range(5)) / 5 for p in itertools.permutations(range(5)))
    plan = sinkhorn(cost, 0.005, 3000).exp()
    assert torch.allclose(plan.sum(0), torch.full((5,), 0.2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(plan.sum(1), torch.full((5,), 0.2, dtype=torch.float64), atol=1e-3)
    assert float((plan * cost).sum()) == pytest.approx(best, abs=2e-3)
    blurred = [float((sinkhorn(cost, eps, 500).exp() * cost).sum()) for eps in (0.05, 0.5, 50.0)]
    assert best < blurred[0] < blurred[1] < blurred[2] == pytest.approx(float(cost.mean()), abs=1e-2)


def test_the_sinkhorn_loss_forgives_what_comes_a_step_late() -> None:
    loss = LOSS_BUILDER_REGISTRY["sinkhorn"]().build()
    target = torch.zeros(1, 16, 1)
    target[:, 8:] = 1.0
    late, wrong = target.roll(1, 1).clone(), target.clone()
    late[:, 0] = 0.0
    wrong[:, 0] = 1.0  # as large an error in one step, at a time when nothing like it is near
    assert float(loss(target, target)) == pytest.approx(0, abs=1e-6)
    assert float(nn.functional.mse_loss(late, target)) == float(nn.functional.mse_loss(wrong, target))
    assert 0 < float(loss(late, target)) < 0.5 * float(loss(wrong, target))
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.allclose(loss(x, y), nn.functional.mse_loss(x, y))
    prediction = torch.zeros(2, 6, 2, requires_grad=True)
    optimizer = torch.optim.Adam([prediction], 0.1)
    goal = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        optimizer.zero_grad()
        loss(prediction, goal).backward()
        optimizer.step()
    assert (prediction - goal).abs().max() < 0.1  # the order of the steps is learned, too


def test_the_mixture_has_the_density_of_torch_distributions() -> None:
    torch.manual_seed(0)
    head = MODEL_BUILDER_REGISTRY["mlp"](head="mixture", components=3).build(SPEC)
    mixture = head({"observation.state": torch.randn(5, 3)})
    action = torch.randn(5, 8, 2)
    components = Independent(Normal(mixture.mean, mixture.std), 2)
    reference = MixtureSameFamily(Categorical(logits=mixture.logits), components)
    assert torch.allclose(mixture.log_prob(action), reference.log_prob(action), atol=1e-4)
    is_pad = torch.arange(8).expand(5, 8) >= 3
    masked, target = zero_padding(mixture, action, is_pad)
    shorter = Independent(Normal(mixture.mean[:, :, :3], mixture.std[:, :, :3]), 2)
    reference = MixtureSameFamily(Categorical(logits=mixture.logits), shorter)
    assert torch.allclose(masked.log_prob(target), reference.log_prob(action[:, :3]), atol=1e-4)
    best = mixture.logits.argmax(1)
    assert torch.equal(mixture.mode, torch.stack([mean[k] for mean, k in zip(mixture.mean, best, strict=True)]))
    loss = LOSS_BUILDER_REGISTRY["nll"]().build()
    assert torch.allclose(loss(mixture, action), -mixture.log_prob(action).mean())


def test_the_kl_divergence_of_the_latent() -> None:
    mean, log_variance = torch.randn(6, 4), torch.randn(6, 4)
    reference = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(act.kl_divergence(mean, log_variance), reference, atol=1e-5)


# ---- more than one mode --------------------------------------------------------------------------------------------


def two_routes(rows: int) -> dict[str, Tensor]:
    """From a place beside the line past an obstacle at 0, half the time to the left of it and half to the right."""
    start, side = torch.rand(rows, 1) - 0.5, torch.randint(2, (rows, 1)) * 2.0 - 1
    t = torch.linspace(0, 1, 8)
    path = start * (1 - t) + side * (math.pi * t).sin()
    return {"observation.state": start, "action": path[:, :, None]}


ROUTES = {
    "observation.state": {"shape": (1,), "dtype": "float32"},
    "action": {"shape": (8, 1), "dtype": "float32"},
    "action_is_pad": {"shape": (8,), "dtype": "bool"},
}


@pytest.mark.parametrize(
    ("name", "loss", "model", "passes"),
    [
        ("bc", "mse", MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64)), False),
        ("bc", "nll", MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64), head="mixture"), True),
        ("bc", "nll", MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64), head="gaussian"), False),
        ("diffusion", "mse", None, True),
        ("diffusion", "mse", MODEL_BUILDER_REGISTRY["dit"](width=32, layers=2), True),
        ("flow", "mse", None, True),
        ("flow", "mse", MODEL_BUILDER_REGISTRY["dit"](width=32, layers=2), True),
    ],
)
def test_where_the_mean_of_two_routes_crosses_an_obstacle(name: str, loss: str, model: Any, passes: bool) -> None:
    trainer = built(name, ROUTES, loss, model)
    for _ in range(400):
        trainer.train_step(two_routes(128))
    trainer.models.eval()
    policy = trainer.policy()
    observation = two_routes(200)
    noise = {"noise": torch.randn(200, *policy.noise_shape)} if hasattr(policy, "noise_shape") else {}
    with torch.no_grad():
        path = policy(observation | noise)[:, 3:5, 0]
    clear = (path.abs() > 0.5).all(1).float().mean()
    assert clear > 0.9 if passes else clear < 0.1
    if name != "bc":  # and it knows both ways
        assert 0.2 < (path[:, 0] > 0).float().mean() < 0.8
