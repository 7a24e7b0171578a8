"""The imitation trainers: their maths by hand, more than one mode, networks, pictures, tasks and fine-tuning."""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import toy
from components import (
    LOSS_BUILDER_REGISTRY,
    MODEL_BUILDER_REGISTRY,
    OPTIMIZER_BUILDER_REGISTRY,
    TRAINER_REGISTRY,
    load_policy,
)
from components.contracts import model_spec_of, weights_follow
from components.data.features import build_models
from components.errors import UserError
from components.losses import sinkhorn, zero_padding
from components.models.attention import Dropout
from components.models.encoder import ObservationEncoder
from components.models.resnet18 import spatial_softmax
from components.models.unet1d import Conv, ConvBlock, Double, Halve
from components.optimizers import averages, decay_at
from components.trainers import act, few_step, flow
from components.trainers.diffusion import DiffusionSampler, noise_schedule
from conftest import Launches, learned, states, weights

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


def test_a_block_of_the_unet_is_the_same_by_the_librarys_kernels() -> None:
    """A GPU takes those; values and gradients of input and parameters."""
    torch.manual_seed(0)
    block = ConvBlock(6, 16, 5, 8)
    nn.init.normal_(block.weight), nn.init.normal_(block.bias)
    x = torch.randn(4, 3, 6, requires_grad=True)
    weights = torch.randn(4, 3, 16)
    ours, theirs = block(x), block.by_library(x)
    assert torch.allclose(ours, theirs, atol=1e-5)
    tensors = [x, *block.parameters()]
    gradients = [torch.autograd.grad((y * weights).sum(), tensors) for y in (ours, theirs)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


def test_the_unet_launches_no_more_than_its_peer_on_a_gpu() -> None:
    """Counted on meta tensors, which take the same paths; diffusion_policy's launches 752, and 161 for one call."""
    spec: Any = {"observation.state": {"shape": (2, 20)}, "action": {"shape": (16, 2)}}
    unet = MODEL_BUILDER_REGISTRY["unet1d"](size="paper").build(spec).to("meta")

    def call(rows: int) -> Tensor:
        state = torch.empty(rows, 2, 20, device="meta")
        condition = unet.condition({"observation.state": state})
        return unet(torch.empty(rows, 16, 2, device="meta"), torch.empty(rows, device="meta"), condition)

    with Launches() as launches:
        call(4).sum().backward()
    assert 400 < launches.number <= 752
    with torch.no_grad(), Launches() as launches:
        call(1)
    assert 100 < launches.number <= 161


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
    small: dict[str, Any] = {"unet1d": {"channels": (16, 32)}, "dit": {"width": 32}, "act": {"width": 32}}
    cls = TRAINER_REGISTRY[name]
    entry = cls.needs["policy"]
    factory = model or MODEL_BUILDER_REGISTRY[entry](**small.get(entry, {}))
    factories = {"policy": factory, "encoder": MODEL_BUILDER_REGISTRY["cnn"]()}
    options = cls.Config(**config) if hasattr(cls, "Config") else None
    models = build_models(
        list(factories), lambda key, seen: factories[key].build(seen), spec, model_spec_of(cls, options)
    )
    optimizers = {"policy": OPTIMIZER_BUILDER_REGISTRY["adamw"](lr=3e-3).build(models["policy"].parameters())}
    arguments: dict[str, Any] = {"config": options} if options else {}
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


# ---- shortcuts -----------------------------------------------------------------------------------------------------


class Told(nn.Module):
    """A denoiser that is given as a function of (noisy, time, step size), each `[B]` or `[1]` but the first."""

    denoises = True

    def __init__(self, predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.predict = predict

    def condition(self, observation: dict[str, Tensor]) -> Tensor:
        reached = observation[few_step.KEY].sum(1)  # 4 for a whole step, 3 for half a one, 0 for an infinitesimal one
        return torch.where(reached > 0, 2.0 ** (reached - 4), 0.0)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.predict(noisy, time.view(-1, *[1] * (noisy.ndim - 1)), condition.view(-1, *[1] * (noisy.ndim - 1)))


def test_the_shortcut_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 0 and 4 learn from two half steps, of 1/4 and of 1/16, which counts as infinitesimal; without gradients."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    f = lambda x, t, d, w=w: w * x + t + 10 * d  # noqa: E731
    trainer = built("flow", SPEC, objective="shortcut")
    trainer.models["policy"] = Told(f)
    time = torch.tensor([0.8, 0.1, 0.2, 0.3, 0.99, 0.5, 0.6, 0.7], dtype=torch.float64)
    level = torch.tensor([0.3, 0.1, 0.1, 0.1, 0.8, 0.1, 0.1, 0.1], dtype=torch.float64)  # sizes 1/2 and 1/8
    drawn = iter([time, level])
    monkeypatch.setattr(torch, "rand_like", lambda x: next(drawn))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 2.0))
    action = torch.arange(8 * 8 * 2, dtype=torch.float64).view(8, 8, 2) / 100
    pad = torch.zeros(8, 8, dtype=torch.bool)
    pad[4, 5:] = pad[5, 2:] = True
    state = torch.zeros(8, 3, dtype=torch.float64)
    loss, _ = trainer.losses({"observation.state": state, "action": action, "action_is_pad": pad})

    begin = torch.tensor([0.5, 0.1, 0.2, 0.3, 0.875, 0.5, 0.6, 0.7], dtype=torch.float64)  # 0.8 and 0.99 on the grid
    squares = torch.zeros(8, 8, 2, dtype=torch.float64)
    for i, size in enumerate([0.5, 0, 0, 0, 0.125, 0, 0, 0]):
        t = float(begin[i])
        x, target = (1 - t) * 2 + t * action[i], action[i] - 2
        if size:
            half, known, now = size / 2, (0.25 if size == 0.5 else 0.0), w.detach()
            first = f(x, t, known, now)
            target = (first + f(x + half * first, t + half, known, now)) / 2
        squares[i] = (f(x, t, size) - target) ** 2 * ~pad[i, :, None]
    assert float(loss.detach()) == pytest.approx(float(squares.detach().mean()), rel=1e-12)
    found, expected = (torch.autograd.grad(value, w)[0] for value in (loss, squares.mean()))
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def mean_velocity(x: Tensor, t: Tensor, size: Tensor, mean: float, std: float) -> Tensor:
    """(x_(t+d) - x_t) / d between Gaussians, where a path keeps its quantile; for d = 0 the velocity."""
    spread = lambda t: ((1 - t) ** 2 + (t * std) ** 2).sqrt()  # noqa: E731
    end = mean * (t + size) + spread(t + size) / spread(t) * (x - mean * t)
    return torch.where(size > 0, (end - x) / size.clamp(min=1e-9), gaussian_velocity(x, t, mean, std))


def test_the_mean_velocity_of_a_flow_is_what_a_shortcut_learns_and_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sizes 1, 1/2 and 1/4 two half steps tell the same, and each number of steps arrives at the exact end."""
    mean, std = 1.5, 0.5
    network = Told(lambda x, t, size: mean_velocity(x, t, size, mean, std))
    noise = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "rand_like", lambda x: draws * 3 / 4)
    found, target = few_step.shortcut(network, {}, noise, noise.flip(0), draws.flip(0))
    assert torch.allclose(found[::4], target[::4], atol=1e-12)
    assert torch.equal(target[1::4], (noise.flip(0) - noise)[1::4])
    policy = flow.FlowSampler(nn.Identity(), network, (1,), shortcut=True)
    assert policy.sampling_steps == 2
    for steps in (1, 2, 4, 8):
        policy.sampling_steps = steps
        assert torch.allclose(policy({"noise": noise}), mean + std * noise, atol=1e-6)
    for steps, error in ((10, 0.3), (1000, 3e-3)):  # the flow itself
        policy.sampling_steps = steps
        assert 0.1 * error < (policy({"noise": noise}) - (mean + std * noise)).abs().max() < error


def test_a_shortcut_is_guided_to_continue_a_chunk() -> None:
    """In one step the guided chunk is the old one where its weight is 1, of a constant velocity."""
    policy = flow.FlowSampler(nn.Identity(), Told(lambda x, t, size: size + 0 * x), (4, 2), shortcut=True)
    policy.sampling_steps = 1
    noise, previous = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[1.0, 1.0, 0.5, 0.0]]).expand(3, 4)
    batch = {"noise": noise, "previous": previous, "previous_weight": weight, "prefix": torch.tensor([1, 1, 1])}
    expected = noise + 1 + weight[..., None] * (previous - noise - 1)
    assert policy.real_time and torch.allclose(policy(batch), expected, atol=1e-5)


def test_two_processes_learn_the_shortcut_that_one_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples learn from half steps, whoever has them."""
    trainer = built("flow", SPEC, objective="shortcut")
    data = {"observation.state": torch.randn(16, 3), "action": torch.randn(16, 8, 2)}
    gradients = []
    for world in (1, 2):
        trainer.models.zero_grad()
        for rank in range(world):
            for name, draw in toy.sliced_noise(rank, world).items():
                monkeypatch.setattr(torch, name, draw)
            part = {key: value.tensor_split(world)[rank] for key, value in data.items()}
            (trainer.losses(part)[0] / world).backward()
        gradients.append([p.grad.clone() for p in trainer.models.parameters()])
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*gradients, strict=True))
    assert sum(float(grad.abs().sum()) for grad in gradients[0]) > 0


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


@pytest.mark.parametrize("name", ["mse", "l1", "huber"])
def test_dimensions_of_the_action_have_weights(name: str) -> None:
    """A number for each or by name; padding is zero in any case; without them torch's own module is used."""
    factory, plain = LOSS_BUILDER_REGISTRY[name], LOSS_BUILDER_REGISTRY[name]().build()
    x, y, is_pad = torch.randn(5, 4, 3), torch.randn(5, 4, 3), torch.rand(5, 4) < 0.4
    action = {"shape": (4, 3), "names": ["a", "b", "b"]}
    for words, factors in ((("1", "0.5", "4"), [1, 0.5, 4]), (("b=2",), [1, 2, 2]), (("a=0", "b=3"), [0, 3, 3])):
        loss = factory(weights=words).build()
        loss.fit_action(action)
        each = [plain(*zero_padding(x[..., d : d + 1], y[..., d : d + 1], is_pad)) for d in range(3)]
        expected = sum(w * one for w, one in zip(factors, each, strict=True)) / 3
        assert torch.allclose(loss(*zero_padding(x, y, is_pad)), torch.as_tensor(expected))
        assert not loss.state_dict()
    turned = {"shape": (4, 7), "form": {"width": 4, "rotations": [{"places": [0, 1, 2]}]}}  # the gripper is first
    loss = factory(weights=("3=2", "0,1,2=5")).build()
    loss.fit_action(turned)
    assert loss.factors.tolist() == [2] + [5] * 6
    assert type(plain).__module__.startswith("torch.nn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss.weights", 1, 2, 3), "--loss.weights: 3 numbers; the action as it is learnt has 2"),
        (("--loss.weights", "wrist=2"), "--loss.weights wrist: no such dimension; the action as it is learnt has 2"),
        (("--loss.weights", "0=2", 1), "expected either numbers or NAME=NUMBER for each"),
        (("--loss.weights", "0=nan"), "'nan' is no number of 0 or more"),
        (("--loss.weights", "0=1", "0=2"), "NAME=NUMBER for each, once"),
        (("--loss.weights", 0, 0), "all are 0, so that nothing would be learnt"),
        (("--loss.weights", "1,2"), "'1,2' is no number of 0 or more"),
        (("--trainer", "iql", "--loss.weights", 1, 2), "--loss.weights: they are for imitation"),
    ],
)
def test_bad_input_weights_that_do_not_fit(script: Script, options: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        script(*options, *([] if "iql" in options else ["--trainer", "bc"]), "--steps", 1)
    assert "\n" not in str(error.value)


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


SLOW = pytest.mark.slow
ROUTES = {
    "observation.state": {"shape": (1,), "dtype": "float32"},
    "action": {"shape": (8, 1), "dtype": "float32"},
    "action_is_pad": {"shape": (8,), "dtype": "bool"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loss", "model", "passes"),
    [
        ("bc", "mse", MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64)), False),
        ("bc", "nll", MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64), head="mixture"), True),
        ("bc", "nll", MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64), head="gaussian"), False),
        ("bc", "l1", MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(64, 64), head="codebook"), True),
        pytest.param("diffusion", "mse", MODEL_BUILDER_REGISTRY["unet1d"](channels=(32, 64)), True, marks=SLOW),
        pytest.param("flow", "mse", MODEL_BUILDER_REGISTRY["unet1d"](channels=(32, 64)), True, marks=SLOW),
        ("flow", "mse", MODEL_BUILDER_REGISTRY["dit"](width=32, layers=2), True),
    ],
)
def test_where_the_mean_of_two_routes_crosses_an_obstacle(name: str, loss: str, model: Any, passes: bool) -> None:
    trainer = built(name, ROUTES, loss, model)
    for _ in range(300):
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


# ---- networks ------------------------------------------------------------------------------------------------------


def test_a_tap_convolution_is_conv1d() -> None:
    """Forward and all gradients; also where the chunk is shorter than the kernel, or all there is is one row."""
    for steps, rows, kernel in ((16, 2, 5), (4, 2, 5), (2, 2, 5), (1, 2, 3), (7, 2, 1), (1, 1, 5)):
        conv = Conv(3, 6, kernel).double()
        x = torch.randn(steps, rows, 3, dtype=torch.float64, requires_grad=True)
        weight, bias, before = conv.weight.permute(2, 1, 0), conv.bias, conv.bias.detach().clone()
        reference = nn.functional.conv1d(x.permute(1, 2, 0), weight, bias, padding=kernel // 2).permute(2, 0, 1)
        found, direction = conv(x), torch.randn(steps, rows, 6, dtype=torch.float64)
        assert torch.allclose(found, reference) and torch.equal(conv.bias, before)
        leaves = [x, conv.weight, conv.bias]
        for a, b in zip(
            torch.autograd.grad(found, leaves, direction),
            torch.autograd.grad(reference, leaves, direction),
            strict=True,
        ):
            assert torch.allclose(a, b)


def test_halving_and_doubling_are_the_strided_convolutions() -> None:
    halve, double, x = Halve(4), Double(4), torch.randn(8, 2, 4)
    weight = halve.net.weight.unflatten(1, (3, 4)).transpose(1, 2)  # [Co, Ci, 3]
    reference = nn.functional.conv1d(x.permute(1, 2, 0), weight, halve.net.bias, stride=2, padding=1)
    assert torch.allclose(halve(x), reference.permute(2, 0, 1), atol=1e-6)
    # Output 2 t is x[t - 1] w_3 + x[t] w_1, output 2 t + 1 is x[t] w_2 + x[t + 1] w_0 (kernel 4, stride 2, padding 1).
    (w3, w1), (w2, w0) = (layer.weight.unflatten(1, (2, 4)).unbind(1) for layer in (double.even, double.odd))
    weight = torch.stack([w0.T, w1.T, w2.T, w3.T], 2)  # [Ci, Co, 4]
    reference = nn.functional.conv_transpose1d(x.permute(1, 2, 0), weight, double.even.bias, stride=2, padding=1)
    assert torch.allclose(double(x), reference.permute(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("name", ["unet1d", "dit"])
@pytest.mark.parametrize("shape", [(16, 2), (10, 3), (1, 2), (2,)])
def test_denoisers_take_any_chunk_and_a_common_time(name: str, shape: tuple[int, ...]) -> None:
    spec = {"observation.state": {"shape": (2, 3), "dtype": "float32"}, "action": {"shape": shape, "dtype": "float32"}}
    torch.manual_seed(0)
    network = MODEL_BUILDER_REGISTRY[name]().build(spec)
    for parameter in network.parameters():  # a transformer that starts as the identity looks at nothing
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
    noisy, condition = torch.randn(5, *shape), network.condition({"observation.state": torch.randn(5, 2, 3)})
    one = network(noisy, torch.full((1,), 0.3), condition)
    each = network(noisy, torch.full((5,), 0.3), condition)
    assert one.shape == noisy.shape and torch.allclose(one, each, atol=1e-5)
    other = network.condition({"observation.state": torch.randn(5, 2, 3)})
    assert (network(noisy, torch.full((1,), 0.3), other) - one).abs().max() > 1e-4
    assert (network(noisy, torch.full((1,), 0.6), condition) - one).abs().max() > 1e-4


def test_published_sizes() -> None:
    """Parameters of the published networks: diffusion_policy's U-Net for Push-T, LeRobot's ACT for states."""
    unet = {"observation.state": {"shape": (2, 20)}, "action": {"shape": (16, 2)}}
    act_ = {"observation.state": {"shape": (14,)}, "observation.environment_state": {"shape": (14,)}}
    act_ |= {"action": {"shape": (100, 14)}}
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in MODEL_BUILDER_REGISTRY[name](size="paper").build(spec).parameters()) / 1e6
            for name, spec in (("unet1d", unet), ("act", act_))
        }
    assert sizes == {"unet1d": pytest.approx(65.78, abs=0.01), "act": pytest.approx(40.2, abs=0.1)}


def test_act_in_its_last_layer_only_computes_the_class_token_and_ignores_padding() -> None:
    torch.manual_seed(0)
    network = MODEL_BUILDER_REGISTRY["act"](width=16, dropout=0.0).build(SPEC)
    observation, chunk = {"observation.state": torch.randn(3, 3)}, torch.randn(3, 8, 2)
    is_pad = torch.arange(8).expand(3, 8) >= 5
    mean, log_variance = network.latent_of(observation, chunk, is_pad)
    assert torch.equal(mean, network.latent_of(observation, torch.where(is_pad[..., None], 9.0, chunk), is_pad)[0])
    x, position = torch.randn(3, 10, 16), torch.randn(10, 16)
    layer = network.vae[-1]
    assert torch.allclose(layer(x, position, queries=1), layer(x, position)[:, :1], atol=1e-6)
    assert network(observation).shape == (3, 8, 2) and mean.shape == log_variance.shape == (3, 32)
    assert not torch.allclose(network(observation), network(observation, torch.ones(3, 32)))


def test_dropout_keeps_each_entry_with_its_probability_and_the_mean() -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.1), torch.ones(1001, 999, requires_grad=True)
    y = layer(x)
    kept = (y > 0).float()
    assert torch.allclose(y[y > 0], torch.tensor(1 / 0.9), rtol=1e-4)
    for lane in range(4):  # four entries come from one word of 64 bits
        assert float(kept.flatten()[lane::4].mean()) == pytest.approx(0.9, abs=0.002)
    assert float((kept[:, :-1] * kept[:, 1:]).mean()) == pytest.approx(0.81, abs=0.003)  # neighbours are independent
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert layer.eval()(x) is x and torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_sequence_models_see_the_history_in_its_order(name: str) -> None:
    spec = {"observation.state": {"shape": (4, 3), "dtype": "float32"}, "action": {"shape": (2,), "dtype": "float32"}}
    torch.manual_seed(0)
    network, history = MODEL_BUILDER_REGISTRY[name]().build(spec), torch.randn(5, 4, 3)
    found = network({"observation.state": history})
    assert found.shape == (5, 2) and torch.equal(found, network(history))
    assert (network(history.flip(1)) - found).abs().max() > 1e-3
    assert (
        network(torch.cat([history[:, :1] + 1, history[:, 1:]], 1)) - found
    ).abs().max() > 1e-4  # also its beginning


@pytest.mark.parametrize("model", ["mlp", "resmlp", "gru", "transformer"])
@pytest.mark.parametrize(("head", "loss"), [("deterministic", "l1"), ("gaussian", "nll"), ("mixture", "nll")])
def test_every_regression_network_with_every_head(script: Script, model: str, head: str, loss: str) -> None:
    window = ("--dataset.obs-steps", 2, "--dataset.action-steps", 3, "--eval-episodes", 1)
    run = script("--trainer", "bc", "--model", model, "--model.head", head, "--loss", loss, *window, "--steps", 20)
    assert learned(run)[-1]["step"] == 20


# ---- pictures and tasks --------------------------------------------------------------------------------------------

PICTURES = {
    "observation.images.a": {"shape": (2, 3, 32, 32), "dtype": "uint8"},
    "observation.images.b": {"shape": (2, 3, 32, 32), "dtype": "uint8"},
    "observation.state": {"shape": (2, 5), "dtype": "float32"},
    "action": {"shape": (8, 2), "dtype": "float32"},
    "task": {"shape": (), "dtype": "text", "values": ["push", "pull", "lift"]},
}


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
@pytest.mark.parametrize("share", [False, True])
def test_an_encoder_puts_one_vector_in_the_place_of_pictures_and_task(name: str, share: bool) -> None:
    torch.manual_seed(0)
    language = "table" if share else "ngrams"
    factory = MODEL_BUILDER_REGISTRY[name](features=16, task_features=4, share_weights=share, language=language)
    encoder = factory.build(PICTURES)
    if not share:
        nn.init.normal_(encoder.task.layer.weight)  # it begins at zero
    pictures = torch.randint(256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    batch = {"observation.images.a": pictures, "observation.images.b": pictures, "action": torch.zeros(3, 8, 2)}
    batch |= {"observation.state": torch.zeros(3, 2, 5), "task_index": torch.tensor([0, 2, 0])}
    found = encoder(batch)
    assert set(found) == {"observation.features", "observation.state", "action", "task_index"}
    features = found["observation.features"]
    assert features.shape == (3, 2, 2 * 16 + 4) and encoder.spec["observation.features"]["shape"] == (2, 36)
    assert "observation.images.a" not in encoder.spec and "task" not in encoder.spec
    first, second, task = features.split([16, 16, 4], 2)
    assert torch.equal(first, second) == share and len(encoder.networks) == 2 - share
    assert torch.equal(task[0], task[2]) and not torch.equal(task[0], task[1])


def test_without_pictures_and_tasks_an_encoder_changes_nothing() -> None:
    encoder = MODEL_BUILDER_REGISTRY["cnn"]().build(SPEC)
    batch = {"observation.state": torch.zeros(2, 3)}
    assert encoder(batch) is batch and encoder.spec == SPEC and not list(encoder.parameters())


def test_cameras_of_other_shapes_cannot_share_weights() -> None:
    spec = PICTURES | {"observation.images.b": {"shape": (2, 3, 48, 32), "dtype": "uint8"}}
    with pytest.raises(UserError, match="--model.encoder.share-weights needs cameras of one shape; found: .*images.b"):
        MODEL_BUILDER_REGISTRY["cnn"](share_weights=True).build(spec)
    assert isinstance(MODEL_BUILDER_REGISTRY["cnn"]().build(spec), ObservationEncoder)


def test_the_spatial_softmax_says_where_a_point_is() -> None:
    maps = torch.full((1, 2, 5, 9), -1e4)
    maps[0, 0, 0, 8], maps[0, 1, 4, 2] = 1e4, 1e4
    assert torch.allclose(spatial_softmax(maps), torch.tensor([[1.0, -0.5, -1.0, 1.0]]))  # all x, then all y


def torchvision_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet18, as its documentation's architecture has them."""

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        parts = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.{part}": (width,) for part in parts} | {f"{name}.num_batches_tracked": ()}

    names: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    before = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            at, inputs = f"layer{layer}.{block}", before if block == 0 else width
            names |= {f"{at}.conv1.weight": (width, inputs, 3, 3), **norm(f"{at}.bn1", width)}
            names |= {f"{at}.conv2.weight": (width, width, 3, 3), **norm(f"{at}.bn2", width)}
            if block == 0 and layer > 1:
                names |= {f"{at}.downsample.0.weight": (width, inputs, 1, 1), **norm(f"{at}.downsample.1", width)}
        before = width
    return names | {"fc.weight": (1000, 512), "fc.bias": (1000,)}


def test_imagenet_weights_by_torchvisions_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {name: 0.05 * torch.rand(shape) + 0.01 for name, shape in torchvision_names().items()}
    save_file(weights, tmp_path / "resnet18.safetensors")
    factory = MODEL_BUILDER_REGISTRY["resnet18"](weights=str(tmp_path / "resnet18.safetensors"))
    backbone = factory.build(PICTURES).networks[0].backbone
    # The first block by hand: BatchNorm with its stored statistics.
    x = torch.randn(2, 3, 32, 32)
    bn = [weights[f"bn1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    y = nn.functional.batch_norm(nn.functional.conv2d(x, weights["conv1.weight"], stride=2, padding=3), *bn)
    assert torch.allclose(backbone.bn1(backbone.conv1(x)), y, atol=1e-5)
    assert torch.equal(backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    assert "bn1.weight" not in dict(backbone.named_parameters())  # frozen
    del weights["layer2.0.conv1.weight"]
    save_file(weights | {"odd": torch.zeros(1)}, tmp_path / "damaged.safetensors")
    for name, message in (
        ("damaged", r"does not hold ResNet-18's weights: layer2.0.conv1.weight: None, expected \(128, 64, 3, 3\); odd"),
        ("absent", "absent.safetensors: .*expected a safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            MODEL_BUILDER_REGISTRY["resnet18"](weights=str(tmp_path / f"{name}.safetensors")).build(PICTURES)
    with weights_follow():  # as a policy is loaded, elsewhere
        again = MODEL_BUILDER_REGISTRY["resnet18"](weights="absent.safetensors").build(PICTURES).networks[0].backbone
    assert again.state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.parametrize("trainer", ["bc", "act", "diffusion", "flow"])
@pytest.mark.parametrize("dataset", ["lerobot", "pictures-alone"])
def test_every_imitation_trainer_takes_pictures_and_tasks(script: Script, trainer: str, dataset: str) -> None:
    """Its file knows nothing of them; the acting policy tells the tasks apart."""
    options = [word for word in toy.PICTURES if word not in ("--trainer", "bc", "--augment.hue", 0.1)]
    small = [word for word in toy.TRAINERS[trainer] if word not in ("--trainer", trainer)]
    history = () if trainer in ("diffusion", "flow") else ("--dataset.obs-steps", 2)  # which they have anyway
    run = script("--trainer", trainer, *small, *options, "--dataset", dataset, *history, "--steps", 3)
    assert ("observation.state" in load_policy(run).spec) == (dataset == "lerobot")
    assert {key.split(".")[0] for key in weights(run, "encoder")} == {"networks", "task"}
    policy = load_policy(run)
    observation = {
        key: torch.zeros(
            policy.spec[key].get("stored_shape", policy.spec[key]["shape"])[policy.obs_steps > 1 :]
        ).numpy()
        for key in policy.observation_keys
    }
    observation = {k: v.astype(policy.spec[k]["dtype"]) for k, v in observation.items()}
    actions = []
    for task in policy.spec["task"]["values"]:
        policy.reset(seeds=[0])
        actions.append(policy.act(observation | {"task": task}))
    assert abs(actions[0] - actions[1]).max() > 0
    with pytest.raises(UserError, match="unknown task 'dance'"):
        policy.reset()
        policy.act(observation | {"task": "dance"})


# ---- averaged weights ----------------------------------------------------------------------------------------------


def test_averages_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("count", torch.zeros(1))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    kept = averages(nn.ModuleDict({"policy": model}), {"policy": optimizer}, 0.5)["ema_policy"]
    assert [decay_at(k, 0.5) for k in (1, 2, 16, 17)] == [0.0, 1 - 2**-0.75, 0.5, 0.5]
    average = 0.0
    for update in range(1, 6):
        model.weight.grad = torch.full((1, 1), -1.0)
        with torch.no_grad():
            model.count += 1
            model.weight.fill_(float(update * update))
        optimizer.step()  # which adds one
        average += (1 - decay_at(update, 0.5)) * (update * update + 1 - average)
        assert float(kept.weight) == pytest.approx(average) and float(kept.count) == update
    optimizer.eval()
    optimizer.eval()  # twice does no harm
    assert float(model.weight) == pytest.approx(average) and float(kept.weight) == 26.0
    optimizer.train()
    assert float(model.weight) == 26.0 and optimizer.state_dict()["param_groups"][0]["ema_updates"] == 5


def test_averages_are_evaluated_exported_and_loaded_and_count_updates(script: Script) -> None:
    flags = ("--trainer", "bc", "--ema-decay", 0.9, "--steps", 20, "--grad-accumulation", 2, "--model.hidden-dims", 8)
    run = script(*flags, folder="first")
    last, average = weights(run), weights(run, "ema_policy")
    assert any(not torch.equal(last[key], average[key]) for key in last)
    saved = load_policy(run).module.network.state_dict()
    assert all(torch.equal(saved[key], average[key]) for key in average)
    next_run = script(
        "--trainer", "bc", "--init-from", run, "--model.hidden-dims", 8, "--steps", 1, "--freeze", "encoder"
    )
    assert next_run.exists()
    with pytest.raises(UserError, match="--ema-decay 0.9: AdamWScheduleFree of model 'policy' averages by itself"):
        script("--trainer", "bc", "--ema-decay", 0.9, "--optimizer", "schedulefree", folder="refused")
    with pytest.raises(UserError, match="--ema-decay 1.0 must be from 0 to below 1"):
        script("--trainer", "bc", "--ema-decay", 1, folder="refused")


# ---- part by part --------------------------------------------------------------------------------------------------


def test_part_by_part_fine_tuning(script: Script) -> None:
    """Load the encoder of one run, freeze it or give it a smaller rate; frozen weights do not move."""
    first = script(*toy.PICTURES, "--steps", 3, folder="first")
    before = weights(first, "encoder")
    scaled = ("--optimizer.lr-scale", "encoder=0.1", "--optimizer", "sgd", "--optimizer.lr", 0.1)
    frozen = script(
        *toy.PICTURES, "--steps", 5, "--load", f"encoder={first}", "--freeze", "encoder", *scaled, folder="b"
    )
    assert all(torch.equal(before[key], value) for key, value in weights(frozen, "encoder").items())
    policies = weights(first), weights(frozen)
    assert any(not torch.equal(policies[0][key], policies[1][key]) for key in policies[0])
    assert not any(path.endswith("optimizer-encoder.safetensors") for path in states(frozen))
    moved = {}
    for name, more in (("slow", scaled), ("fast", scaled[2:])):
        run = script(*toy.PICTURES, "--steps", 1, "--load", f"encoder={first}", *more, folder=name)
        after = weights(run, "encoder")
        moved[name] = max(float((after[key] - before[key]).abs().max()) for key in before)
        assert learned(run)[-1]["train/lr.encoder"] == pytest.approx(0.01 if name == "slow" else 0.1)
    assert moved["slow"] == pytest.approx(0.1 * moved["fast"], rel=1e-2)


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer", "bc", "--loss", "nll"), "'nll' needs a distribution: add --model.head gaussian or"),
        (("--trainer", "bc", "--model.head", "mixture"), "trained by its likelihood: add --loss nll"),
        (("--trainer", "bc", "--model", "unet1d"), "does not go with a ConditionalUNet; choose --model mlp"),
        (("--trainer", "diffusion", "--model", "mlp"), "does not go with a FlatPolicy; choose --model unet1d or dit"),
        (("--trainer", "flow", "--model", "act"), "does not go with a ACTNetwork; choose --model unet1d or dit"),
        (("--trainer", "act", "--model", "mlp"), "does not go with a FlatPolicy; choose --model act"),
        (("--trainer", "flow", "--loss", "nll"), "'nll' goes with the trainer bc only"),
        (("--trainer", "diffusion", "--trainer.diffusion-steps", 1), "--trainer.diffusion-steps 1 must be 2 or more"),
        (("--trainer", "act", "--trainer.kl-weight", -1), "--trainer.kl-weight -1.0 must be 0 or more"),
        (("--trainer", "flow", "--trainer.coupling-epsilon", 0), "--trainer.coupling-epsilon 0.0 must be above 0"),
        (("--trainer", "bc", "--model.components", 0), "--model.components 0 must be 1 or more"),
        (("--trainer", "bc", "--model.head", "codebook", "--model.codes", 1), "--model.codes 1 must be 2 or more"),
        (
            ("--trainer", "bc", "--model.head", "codebook", "--loss", "nll"),
            "codebook has losses of its own; choose --loss",
        ),
        (("--trainer", "bc", "--model.head", "codebook", "--policy.sampler", "ddim"), "this policy knows mode, sample"),
        (("--trainer", "bc", "--model.experts", 2, "--model.top-k", 3), "--model.top-k 3 of --model.experts 2"),
        (("--trainer", "bc", "--model.experts", 2, "--model.head", "codebook"), "goes with --model.head deterministic"),
        (("--trainer", "flow", "--model", "dit", "--model.experts", 0), "--model.experts 0 must be 1 or more"),
        (("--trainer", "act", "--model.width", 30), "--model.width 30 must be a multiple of --model.heads 4"),
        (("--trainer", "flow", "--model.channels", 12), "must be positive multiples of --model.groups 8"),
        (("--trainer", "bc", "--loss", "sinkhorn", "--loss.epsilon", 0), "--loss.epsilon 0.0 must be above 0"),
        (("--trainer", "bc", "--model", "mlp", "gru"), "'mlp' and 'gru' are both for the model 'policy'"),
        (("--trainer", "bc", "--model", "critic=mlp"), "the trainer has no model 'critic'; it has policy, encoder"),
        (
            ("--trainer", "iql", "--model", "cnn"),
            "the trainer has no model 'encoder'; it has policy, critic, value",
        ),
        (("--trainer", "bc", "--model", "encodr=cnn"), "the trainer has no model 'encodr'"),
        (("--trainer", "bc", "--model", "unet2d"), "--model unet2d: unknown model; nearest: unet1d"),
        (("--trainer", "diffusion", "--policy.action-steps", 17), "--policy.action-steps 17 must be 1 to 16"),
        (
            ("--trainer", "diffusion", "--policy.sampler", "euler"),
            "--policy.sampler euler: this policy knows ddim, ddpm",
        ),
        (("--trainer", "flow", "--policy.sampling-steps", 0), "--policy.sampling-steps 0 must be 1 to 10000"),
        (
            ("--trainer", "flow", "--trainer.objective", "shortcut", "--policy.sampler", "midpoint"),
            "--policy.sampler midpoint: this policy knows euler",
        ),
        (
            ("--trainer", "flow", "--trainer.objective", "shortcut", "--trainer.prefix", 2),
            "--trainer.prefix goes with --trainer.objective flow",
        ),
        (("--trainer", "bc", "--policy.ensemble", 0.1), "--policy.ensemble averages chunks"),
    ],
)
def test_bad_input(script: Script, options: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        script(*options, "--steps", 2)


def test_defaults_shrink_to_what_there_is(script: Script) -> None:
    """Data without chunks, or with shorter ones than the default executes; fewer steps than it samples in."""
    small = ("--model.channels", 16, "--trainer.diffusion-steps", 5, "--steps", 2)
    run = script("--trainer", "diffusion", *small, folder="few")
    assert load_policy(run).inference["sampling_steps"] == 5
    run = script("--trainer", "diffusion", "--model.channels", 16, "--dataset", "minimal_data", "--steps", 2)
    assert load_policy(run).inference["chunk"] == 1
    run = script("--trainer", "flow", "--model.channels", 16, "--dataset.action-steps", 2, "--steps", 2, folder="short")
    assert load_policy(run).inference["action_steps"] == 2
    short = ("--trainer.objective", "shortcut", "--steps", 2)
    run = script("--trainer", "flow", "--model.channels", 16, *short, folder="shortcut")
    assert load_policy(run).inference["sampling_steps"] == 2
