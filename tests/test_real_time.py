"""Samplers that continue the previous chunk: guidance against known conditionals, networks that are given actions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components import MODEL_BUILDER_REGISTRY
from components.acting.inference import Inference
from components.acting.policy import Policy
from components.data.normalisation import Normaliser
from components.errors import UserError
from components.models import real_time
from components.trainers.diffusion import Diffusion, DiffusionSampler, noise_schedule
from components.trainers.flow import Flow, FlowSampler, draw_times
from test_imitation import SPEC, Known

STEPS, FROZEN, ROWS = 8, 3, 500
MEAN = torch.linspace(-1, 1, STEPS)
NEAR = (-(torch.arange(STEPS)[:, None] - torch.arange(STEPS)).abs() / 4).exp()  # covariance of neighbouring actions
ALPHA_BAR = noise_schedule("cosine", 100)
NETWORKS = {"unet1d": {"channels": (16, 32)}, "dit": {"width": 32}, "vector_field": {"hidden_dims": (32, 32)}}


def posterior(x: Tensor, signal: float, noise: float) -> Tensor:
    """E[a | signal a + noise e = x] for chunks a ~ N(MEAN, NEAR)."""
    gain = signal * NEAR @ torch.linalg.inv(signal**2 * NEAR + noise**2 * torch.eye(STEPS))
    return (MEAN + (x[..., 0] - signal * MEAN) @ gain.T)[..., None]


def velocity(x: Tensor, time: Tensor) -> Tensor:
    """E[a - x_0 | x_t = x], the velocity of a perfect flow."""
    t = float(time)
    return (posterior(x, t, 1 - t) - x) / (1 - t)


def denoised(prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The output of a perfect denoiser."""

    def predict(x: Tensor, time: Tensor) -> Tensor:
        now = float(ALPHA_BAR[round(float(time) * 100)])
        signal, spread = math.sqrt(now), math.sqrt(1 - now)
        action = posterior(x, signal, spread)
        epsilon = (x - signal * action) / spread
        return {"epsilon": epsilon, "sample": action, "v": signal * epsilon - spread * action}[prediction]

    return predict


def sampler(kind: str, how: str, network: nn.Module | None = None, prefix: int = 0, width: int = 1) -> Any:
    """A sampler of chunks `[STEPS, width]`, by default with the perfect network."""
    if kind == "flow":
        made: Any = FlowSampler(nn.Identity(), network or Known(velocity), (STEPS, width), prefix)
    else:
        network = network or Known(denoised(kind))
        made = DiffusionSampler(nn.Identity(), network, ALPHA_BAR, kind, (STEPS, width), None, prefix)
    made.sampler = how
    return made


def batch_for(made: Any, rows: int, weight: float = 1.0, width: int = 1) -> dict[str, Tensor]:
    """Noise, and a previous chunk of ones whose first `FROZEN` actions are executed."""
    generator = torch.Generator().manual_seed(0)
    soft = (torch.arange(STEPS) < FROZEN) * weight
    known = {"previous": torch.ones(rows, STEPS, width), "previous_weight": soft.expand(rows, STEPS)}
    known["prefix"] = torch.full((rows,), FROZEN)
    return known | {"noise": torch.randn(rows, *made.noise_shape, generator=generator)}


# ---- guidance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"),
    [("flow", "euler"), ("flow", "midpoint"), ("epsilon", "ddim"), ("sample", "ddim"), ("v", "ddim"), ("v", "ddpm")],
)
@torch.no_grad()
def test_guidance_leads_to_the_conditional_of_a_gaussian(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chunks with known mean and covariance, E[rest | first 3 = 1] is known; plain samples are 1.1 away from it."""
    monkeypatch.setattr(real_time, "ended", lambda x, batch: x)  # what the guidance alone does with the first actions
    early, rest = NEAR[:FROZEN, :FROZEN], slice(FROZEN, STEPS)
    expected = MEAN[rest] + NEAR[rest, :FROZEN] @ torch.linalg.solve(early, 1 - MEAN[:FROZEN])
    made = sampler(kind, how)
    found = {weight: made(batch_for(made, ROWS, weight))[..., 0] for weight in (0.0, 0.1, 1.0)}
    off = [float((chunk[:, :FROZEN] - 1).mean().abs()) for chunk in found.values()]
    assert off[0] > 1.6 and off[2] < 0.04 and off[0] > 1.3 * off[1] > 20 * off[2]  # the agreement grows with the weight
    beyond = [(chunk[:, rest].mean(0) - expected).abs() for chunk in found.values()]
    assert beyond[0][0] > 1.0 and beyond[2].max() < 0.35
    assert found[1.0][:, -1].std() > 0.7  # the far end remains free


@pytest.mark.parametrize("kind", ["flow", "sample"])
def test_guidance_by_hand(kind: str) -> None:
    """Of a linear network M x the Jacobians of velocity and predicted chunk are known; beta bounds the strength."""
    matrix = torch.randn(STEPS, STEPS, generator=torch.Generator().manual_seed(1)) / 4
    made = sampler(kind, "euler" if kind == "flow" else "ddim", Known(lambda x, time: matrix @ x))
    batch = batch_for(made, 2) | {"previous_weight": torch.linspace(1, 0, STEPS).expand(2, STEPS)}
    x, weight, y = torch.randn(2, STEPS, 1), torch.linspace(1, 0, STEPS)[:, None], batch["previous"]
    condition, eye = torch.zeros(1), torch.eye(STEPS)
    if kind == "flow":
        for t, strength in ((0.0, 5.0), (0.1, 5.0), (0.5, 2.0), (0.7, 0.58 / 0.21), (0.95, 5.0)):
            jacobian = eye + (1 - t) * matrix
            guided = matrix @ x + strength * jacobian.T @ (weight * (y - jacobian @ x))
            assert torch.allclose(made.velocity(x, t, condition, batch), guided, atol=1e-4)
        made.sampling_steps = 2
        assert made.strength(0.1) == 2  # so that a step of 1/2 goes as far as the previous chunk, no further
    else:
        for t in (0, 50, 99):
            guided = matrix @ x + min(5.0, float(ALPHA_BAR[t] ** -0.5)) * matrix.T @ (weight * (y - matrix @ x))
            now = ALPHA_BAR[t]
            found = made.predict(x, t, condition, now.sqrt(), (1 - now).sqrt(), batch)
            assert torch.allclose(found, guided, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["flow", "v"])
def test_a_policy_is_guided_wherever_it_acts(name: str, kind: str) -> None:
    """Without gradients outside, in inference mode, frozen, in bfloat16, for one step or several; it leaves nothing."""
    torch.manual_seed(0)
    network: Any = MODEL_BUILDER_REGISTRY[name](**NETWORKS[name]).build({**SPEC})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    made = sampler(kind, "euler" if kind == "flow" else "ddim", network, width=2)
    batch = batch_for(made, 3, width=2) | {"observation.state": torch.randn(3, 3), "prefix": torch.tensor([0, 1, 3])}
    made.sampling_steps = 3
    with torch.no_grad():
        chunk = made(batch)
        nothing = made(batch | {"previous_weight": torch.zeros(3, STEPS), "prefix": torch.zeros(3, dtype=torch.int64)})
        plain = made({key: batch[key] for key in ("observation.state", "noise")})
        with torch.autocast("cpu", torch.bfloat16):
            rough = made(batch)
        network.requires_grad_(False)
        assert torch.equal(made(batch), chunk)
    with torch.inference_mode():
        inside = made({key: value.clone() for key, value in batch.items()})
    for row, known in enumerate((0, 1, 3)):
        assert torch.equal(chunk[row, :known], batch["previous"][row, :known])
    assert torch.allclose(plain, nothing, atol=1e-5) and (chunk - plain)[0].abs().max() > 0.01
    assert torch.allclose(inside, chunk, atol=1e-6) and torch.allclose(rough, chunk, atol=0.1)
    assert not chunk.requires_grad and all(parameter.grad is None for parameter in network.parameters())
    made.sampling_steps = 1
    assert made(batch).isfinite().all()


def test_the_range_of_the_data_bounds_a_guided_chunk() -> None:
    """Where the prediction is outside, its derivative is not lost by clipping before."""
    made = DiffusionSampler(
        nn.Identity(), Known(lambda x, t: 2 + 0.5 * x), ALPHA_BAR, "sample", (STEPS, 1), [[-1], [1]]
    )
    batch = batch_for(made, 4) | {"previous": torch.full((4, STEPS, 1), -9.0), "prefix": torch.zeros(4)}
    chunk = made(batch)
    assert chunk.abs().max() <= 1 and chunk[:, :FROZEN].max() < 0.9 and (chunk[:, FROZEN:] == 1).all()


# ---- networks that learn to continue given actions -----------------------------------------------------------------


def level(rows: int) -> Tensor:
    """Chunks `[B, STEPS, 1]` of one action each, which is drawn anew for each chunk."""
    return torch.randn(rows, 1, 1).expand(rows, STEPS, 1)


@pytest.mark.parametrize("cls", [Flow, Diffusion])
def test_a_network_learns_to_continue_given_actions(cls: Any) -> None:
    """Of chunks that stay where they begin, one given action tells all; without any the chunk is free."""
    torch.manual_seed(0)
    spec = {"observation.state": {"shape": (1,)}, "action": {"shape": (STEPS, 1)}, "action_is_pad": {"shape": (STEPS,)}}
    config = cls.Config(prefix=FROZEN)
    factory = MODEL_BUILDER_REGISTRY["vector_field"](hidden_dims=(64, 64))
    models = nn.ModuleDict({"policy": factory.build(cls.model_spec("policy", spec, config))})
    optimizer = torch.optim.Adam(models.parameters())
    trainer = cls(models, {"policy": optimizer}, nn.MSELoss(), spec=spec, config=config)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 200)
        padding = torch.zeros(128, STEPS, dtype=torch.bool)
        trainer.train_step({"observation.state": torch.zeros(128, 1), "action": level(128), "action_is_pad": padding})
    policy, truth = trainer.policy(), level(200)
    assert policy.real_time and policy.most_prefix == FROZEN
    batch = {"observation.state": torch.zeros(200, 1), "noise": torch.randn(200, *policy.noise_shape)}
    known = {"previous": truth, "previous_weight": torch.ones(200, STEPS), "prefix": torch.full((200,), FROZEN)}
    with torch.no_grad():
        free, continued = policy(batch), policy(batch | known)
        none = policy(batch | known | {"prefix": torch.zeros(200, dtype=torch.int64)})
    assert torch.equal(continued[:, :FROZEN], truth[:, :FROZEN]) and torch.equal(none, free)
    assert (free - truth).square().mean() > 1.0 and (continued - truth).square().mean() < 0.1
    assert free.std(0).mean() > 0.7


@pytest.mark.parametrize("cls", [Flow, Diffusion])
def test_given_actions_are_clean_marked_and_left_out_of_the_loss(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = cls.Config(prefix=2), list[Tensor]()

    def predict(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x)
        return torch.full_like(x, 100.0)

    trainer = cls(nn.ModuleDict({"policy": Known(predict)}), {}, nn.MSELoss(), spec=SPEC, config=config)
    draws = iter([torch.full((3,), 0.5), torch.tensor([0.1, 0.5, 0.9])])  # times, and d = 0, 1, 2
    monkeypatch.setattr(torch, "rand_like", lambda like: next(draws))
    action, is_pad = torch.randn(3, 8, 2), torch.arange(8).expand(3, 8) >= 7
    loss, _ = trainer.losses({"observation.state": torch.zeros(3, 3), "action": action, "action_is_pad": is_pad})
    given = torch.arange(8) < torch.arange(3)[:, None]
    assert seen[0].shape == (3, 8, 3) and torch.equal(seen[0][..., 2], given.float())
    same = (seen[0][..., :2] == action).all(-1)
    assert torch.equal(same, given)
    counted = float(loss) / 100**2 * 24
    assert counted == pytest.approx(24 - 3 - 3, rel=0.1)  # neither the padding of each nor the given 0 + 1 + 2


@pytest.mark.parametrize("prefix", [-1, 8, 100])
def test_the_longest_prefix_leaves_something_to_learn(prefix: int) -> None:
    with pytest.raises(UserError, match=f"--trainer.prefix {prefix} must be 0 to 7"):
        Flow.model_spec("policy", SPEC, Flow.Config(prefix=prefix))
    single = {"action": {"shape": (2,)}}
    with pytest.raises(UserError, match="must be 0 to 0"):
        Diffusion.model_spec("policy", single, Diffusion.Config(prefix=1))
    assert Flow.model_spec("policy", single, Flow.Config()) is single
    assert Flow.model_spec("encoder", SPEC, Flow.Config(prefix=3)) is SPEC


def test_a_delay_longer_than_the_longest_prefix_is_refused() -> None:
    spec = {key: {**feature, "names": None} for key, feature in SPEC.items()}
    network = MODEL_BUILDER_REGISTRY["vector_field"](hidden_dims=(8,)).build(real_time.spec_with_mark(SPEC, 2))
    module = FlowSampler(nn.Identity(), network, (8, 2), 2)
    policy = Policy(module, Normaliser(spec, {}), spec, Inference(real_time=True, delay=2))
    with pytest.raises(UserError, match="--policy.delay 3: .* up to 2 actions .* --trainer.prefix 3"):
        policy.configure(delay=3)
    policy.configure(real_time=False, delay=3)
    policy.configure(real_time=True, delay=0)
    chunk = policy.plan({"observation.state": torch.zeros(3)}, previous=torch.ones(5, 2), delay=2)
    assert (chunk[:2] == 1).all() and (chunk[2:] != 1).all()
    with pytest.raises(UserError, match="delay 4: this policy"):
        policy.plan({"observation.state": torch.zeros(3)}, previous=torch.ones(5, 2), delay=4)


def test_times_of_pi0_are_denser_where_there_is_noise() -> None:
    """(s - t) / s ~ Beta(1.5, 1) with s = 0.999, where t = 0 is noise as here: mean 0.6, variance 12 / 175."""
    torch.manual_seed(0)
    share = (0.999 - draw_times("beta", torch.zeros(200_000))) / 0.999
    assert share.min() >= 0 and share.max() <= 1
    assert float(share.mean()) == pytest.approx(0.6, abs=3e-3) and float(share.var()) == pytest.approx(
        12 / 175, abs=1e-3
    )
    assert float(share.pow(3).mean()) == pytest.approx(1 / 3, abs=3e-3)  # 1.5 / (1.5 + 3)
