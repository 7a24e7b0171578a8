"""DSRL: losses against float64 by hand, and a frozen policy that is steered, saved, loaded, resumed and exported."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toy
from components import UserError, contracts, export, load_policy
from components.data.features import build_models
from components.datasets.transitions import prepared
from components.experience.frozen_base import Steered
from components.models.q_ensemble import QEnsemble
from components.models.tanh_gaussian import TanhGaussian
from components.models.temperature import Temperature
from components.run import checkpoint
from components.run.curves import read_lines
from components.trainers.dsrl import DSRL, Executed, Exploring
from conftest import difference, learned, states, weights
from test_offline import interrupt_after
from test_online_rl import recording_of
from test_sac import linear_stack

Script = Callable[..., Path]
STATE, THEN = "observation.state", "next.observation.state"
vector: Any = lambda *shape: {"shape": shape, "dtype": "float32"}  # noqa: E731
SPEC: dict[str, Any] = {STATE: vector(4), THEN: vector(4), "reward": vector(), "terminated": vector()}
LIMITS = [[-0.7, -1.0], [1.0, 0.6]]


class Line(nn.Module):
    """A policy that plans three actions, and whose noise moves them."""

    noise_shape = (3, 2)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch[STATE][:, None, :2] + self.weight * batch["noise"]


def tiny(chunk: int = 2, policy_starts: int = 0, **options: Any) -> DSRL:
    """In float64, with targets that differ from what they follow."""
    torch.manual_seed(0)
    action = vector(chunk, 2) if chunk > 1 else vector(2)
    spec = SPEC | {"action": action | {"noise": [3, 2], "limits": LIMITS}}
    config = DSRL.Config(chunk=chunk, policy_starts=policy_starts, **options)
    critic: Any = QEnsemble(hidden_dims=(7,))
    made = {"policy": TanhGaussian(hidden_dims=(8,)), "critic": critic, "noise_critic": critic}
    made["temperature"] = Temperature(initial=0.2)
    build: Any = lambda name, spec: made[name].build(spec)  # noqa: E731
    models = build_models(list(made), build, spec, contracts.model_spec_of(DSRL, config)).double()
    opts = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    trainer = contracts.construct(DSRL, models, opts, nn.MSELoss(), spec, config, torch.device("cpu"), Line().double())
    with torch.no_grad():
        for p in trainer.models["target_critic"].parameters():
            p += 0.3 * torch.randn_like(p)
    return trainer


def batch(chunk: int = 2) -> dict[str, Tensor]:
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    data = {STATE: draw(6, 4), THEN: draw(6, 4), "action": draw(6, *(chunk,) * (chunk > 1), 2).tanh()}
    data |= {"reward": draw(6), "terminated": torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.float64)}
    return (
        data | {"discount": torch.full((6,), 0.8, dtype=torch.float64)} | ({"complete": COMPLETE} if chunk > 1 else {})
    )


COMPLETE = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.float64)


def values(net: nn.Module, member: int, x: np.ndarray) -> np.ndarray:
    """Of one member of an ensemble, by hand."""
    layers: Any = [layer for layer in net if hasattr(layer, "weight")]
    weight = [layer.weight[member].detach().numpy() for layer in layers]
    bias = [layer.bias.reshape(2, -1)[member].detach().numpy() for layer in layers]
    return linear_stack(x, weight, bias)[-1][:, 0]


def drawn(net: nn.Module, state: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sample of the tanh-Gaussian and its log-probability."""
    layers: Any = [layer for layer in net if hasattr(layer, "weight")]
    array = lambda x: x.detach().numpy()  # noqa: E731
    out = linear_stack(state, [array(x.weight).T for x in layers], [array(x.bias) for x in layers])[-1]
    mean, log_std = out[:, :6], out[:, 6:]
    w = np.tanh(mean + np.exp(log_std) * noise)
    log_prob = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - w**2)
    return w, log_prob.sum(1)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("backup", [True, False])
def test_the_losses_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch, chunk: int, backup: bool) -> None:
    trainer, data = tiny(chunk, bound=1.3, backup_entropy=backup, target_entropy=-0.7), batch(chunk)
    noise = [torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
    order = iter((noise[0], noise[2]))  # for the successors, and for the policy
    monkeypatch.setattr(torch, "randn_like", lambda x: next(order))
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: noise[1])
    loss, metrics = trainer.losses(data)

    x = {key: value.numpy() for key, value in data.items()}
    e = [part.numpy() for part in noise]
    nets = {name: getattr(model, "net", None) for name, model in trainer.models.items()}

    def executed(state: np.ndarray, w: np.ndarray) -> np.ndarray:
        planned = state[:, None, :2] + 0.5 * w.reshape(6, 3, 2)
        return np.clip(planned, *np.float32(LIMITS))[:, :chunk].reshape(6, -1)

    w, log_prob = drawn(nets["policy"], x[THEN], e[0])
    after = np.concatenate([x[THEN], executed(x[THEN], 1.3 * w)], 1)
    following = np.minimum(*(values(nets["target_critic"], i, after) for i in range(2)))
    y = x["reward"] + 0.8 * (1 - x["terminated"]) * (following - 0.2 * log_prob * backup)
    complete = x.get("complete", np.ones(6))
    before = np.concatenate([x[STATE], x["action"].reshape(6, -1)], 1)
    j_a = sum(0.5 * (complete * (values(nets["critic"], i, before) - y) ** 2).mean() for i in range(2))
    here = np.concatenate([x[STATE], executed(x[STATE], e[1])], 1)
    of_noise = np.concatenate([x[STATE], e[1] / 1.3], 1)
    apart = [values(nets["noise_critic"], i, of_noise) - values(nets["critic"], i, here) for i in range(2)]
    j_w = sum(0.5 * (one**2).mean() for one in apart)
    w, log_prob = drawn(nets["policy"], x[STATE], e[2])
    q = np.minimum(*(values(nets["noise_critic"], i, np.concatenate([x[STATE], w], 1)) for i in range(2)))
    j_pi, j_alpha = (0.2 * log_prob - q).mean(), -0.2 * (log_prob.mean() - 0.7)
    names = ("critic_loss", "distill_loss", "actor_loss", "temperature_loss")
    assert [metrics[name].item() for name in names] == pytest.approx([j_a, j_w, j_pi, j_alpha], rel=1e-6)
    assert loss.item() == pytest.approx(j_a + j_w + j_pi + j_alpha, rel=1e-6)
    assert metrics["noise_abs"].item() == pytest.approx(1.3 * np.abs(w).mean())


def test_each_loss_trains_its_own_network_and_none_the_frozen_policy() -> None:
    trainer, data = tiny(), batch()
    parts = {"critic": trainer.critic_loss(data, data)[0], "noise_critic": trainer.distill_loss(data, data)[0]}
    for name, loss in (parts | {"policy": trainer.actor_losses(data)[0]}).items():
        trainer.models.zero_grad(set_to_none=True)
        loss.backward()
        found = {n for n, model in trainer.models.items() if any(p.grad is not None for p in model.parameters())}
        assert found == {name, *(["temperature"] if name == "policy" else [])}
    trainer.train_step(data)
    base = trainer.executed.base
    assert base.weight.item() == 0.5 and base.weight.grad is None and not base.weight.requires_grad


def test_half_a_batch_on_each_of_two_processes_has_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mean: also where a chunk is cut in one half alone."""
    trainer, data = tiny(), batch()
    noise = [torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]

    def gradients(rows: slice) -> list[Tensor]:
        order = iter((noise[0][rows], noise[2][rows]))
        monkeypatch.setattr(torch, "randn_like", lambda x: next(order))
        monkeypatch.setattr(torch, "randn", lambda *shape, **how: noise[1][rows])
        trainer.models.zero_grad(set_to_none=True)
        trainer.losses({key: value[rows] for key, value in data.items()})[0].backward()
        return [p.grad.clone() for p in trainer.models.parameters() if p.grad is not None]

    for whole, *halves in zip(*map(gradients, (slice(0, 6), slice(0, 3), slice(3, 6))), strict=True):
        assert torch.allclose(whole, sum(halves) / 2, rtol=1e-9, atol=1e-12)


def test_the_policy_learns_once_the_critics_have() -> None:
    trainer = tiny(policy_starts=2)
    weights_of = lambda name: nn.utils.parameters_to_vector(trainer.models[name].parameters()).detach().clone()  # noqa: E731
    before = {name: weights_of(name) for name in trainer.models}
    moved = []
    for _ in range(3):
        trainer.train_step(batch())
        moved.append({name for name, weights in before.items() if not torch.equal(weights, weights_of(name))})
    critics = {"critic", "noise_critic", "target_critic"}
    assert moved == [critics, critics, critics | {"policy", "temperature"}]
    assert trainer.state_dict() == {"updates": 3} and trainer.promises.repeats_after is None


def test_the_steered_policy_acts_by_the_mean_noise_and_the_explorer_at_first_by_none_of_its_own() -> None:
    """The frozen policy sees what is; the other one nothing beyond ten deviations."""
    trainer, data = tiny(bound=1.3), batch()
    near = {STATE: data[STATE].clone()}
    data[STATE][0, 0], near[STATE][0, 0] = 1000.0, 10.0
    policy, explorer = trainer.policy(), trainer.explorer()
    w = 1.3 * trainer.models["policy"](near)
    limits = torch.tensor(LIMITS)
    assert trainer.losses(data)[1]["q_max"] < 100
    plan = lambda w: (data[STATE][:, None, :2] + 0.5 * w.view(6, 3, 2))[:, :2].clamp(limits[0], limits[1])  # noqa: E731
    assert torch.equal(policy(data), plan(w)) and not hasattr(policy, "noise_shape")
    noise = torch.randn(6, *explorer.noise_shape, dtype=torch.float64)
    assert contracts.random_steps(explorer, 20) == 0 and contracts.random_steps(policy, 20) == 20
    contracts.set_env_step(explorer, 19)
    assert torch.equal(explorer({**data, "noise": noise}), plan(noise))
    contracts.set_env_step(explorer, 20)
    assert torch.equal(explorer({**data, "noise": noise}), plan(1.3 * trainer.models["policy"].draw(near, noise)))
    names = set(policy.state_dict())
    assert names and all(name.startswith("policy.") for name in names)
    policy.load_state_dict(policy.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        policy.load_state_dict({})
    assert not policy.train().executed.base.training


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(script: Script) -> Path:
    """A flow that plans six actions in two steps of its sampler."""
    return script(*toy.FLOW_OF_AN_MLP, "--steps", 30, folder="base")


def test_a_steered_run_keeps_the_frozen_policy_and_its_policy_acts_alone(online: Script, base: Path) -> None:
    digest = lambda path: hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()  # noqa: E731
    before = digest(base / "policy")
    more = ("--eval-episodes", 4, "--eval-every", 30, "--save-every", 20, "--dataset", "toy")
    run = online(*toy.DSRL, "--trainer.base", base, *more)
    kept = run / "policy" / "base"
    assert digest(kept) == digest(run / "inherited" / "base") == before == digest(base / "policy")
    assert json.loads((run / "policy" / "steered.json").read_text()) == {"sha256": before}
    assert not {name for name in checkpoint.newest(run / "checkpoints")[1]["shapes"] if "base" in name}
    evaluations = read_lines(run / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 30, 60] and evaluations[0]["inference"]["sampling_steps"] == 2
    (base / "policy" / "model.safetensors").unlink()
    policy, found = load_policy(run), load_policy(run, which=40)
    assert recording_of(policy, toy.Savable().build(4, 0), evaluations[-1]["seeds"]) == pytest.approx(
        evaluations[-1]["return_mean"], rel=1e-5
    )
    assert policy.chunk == found.chunk == 4 and policy.inference["sampler"] == "euler"
    assert difference(policy.module.policy.state_dict(), weights(run)) == 0
    policy.reset()
    faster = load_policy(run, sampling_steps=1, action_steps=2)
    state = {STATE: np.ones(toy.STATE, np.float32)}
    assert faster.inference["sampling_steps"] == 1 and not np.allclose(faster.plan(state), policy.plan(state))
    for settings, message in (
        ({"sampler": "midpoint"}, "--policy.sampler midpoint: this policy knows euler"),
        ({"guidance": 2.0}, "this policy has not learned to act without a condition"),
    ):
        with pytest.raises(UserError, match=message):
            load_policy(run, **settings)
    (kept / "model.safetensors").write_bytes((run / "policy" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="weights"):
        load_policy(run)


def test_a_steered_run_resumes_in_the_middle_of_a_chunk(online: Script, script: Script, base: Path) -> None:
    """And begins with the frozen policy itself; another goes on from it."""
    options = (*toy.DSRL, "--trainer.base", base, "--save-every", 14, "--log-every", 7)
    options += ("--steps", 36, "--learning-starts", 8)
    whole = online(*options, folder="whole")
    interrupt_after(online, 12, *options)
    run = online("--resume", whole.parent / "run")
    assert states(run) == states(whole) and learned(run) == learned(whole)
    assert (run / "episodes.jsonl").read_text() == (whole / "episodes.jsonl").read_text()
    words = ("--init-from", run, "--updates-per-step", 0, "--steps", 10)
    further = online(*toy.DSRL, "--trainer.base", run / "policy" / "base", *words, folder="further")
    assert difference(weights(further), weights(run)) == 0
    other = script(*toy.FLOW_OF_AN_MLP, "--steps", 1, "--dataset.episodes", 7, folder="other")
    with pytest.raises(UserError, match="its 'observation.state' is normalised in another way than by the policy of"):
        online(*toy.DSRL, "--trainer.base", other, *words, folder="third")
    kept = run / "inherited" / "base" / "model.safetensors"
    kept.write_bytes((other / "policy" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="base: not the weights of the policy that was steered until now; put them"):
        online("--resume", run, "--steps", 70)


def test_a_guided_policy_is_steered_with_its_guidance_and_as_much_as_it_plans(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    """And of a policy whose noise has another shape than its chunk, the chunk counts."""
    ways = ("--trainer.unconditional", 0.1, "--policy.guidance", 1.5, "--policy.ensemble", 0.1)
    flow = ("--trainer", "flow", *toy.FLOW_OF_AN_MLP[2:-2])
    guided = Steered(script(*flow, *ways, "--policy.action-steps", 2, "--steps", 1, folder="guided"), chunk=6)
    assert "the --policy.ensemble that it was trained with is left out" in caplog.text
    action = vector(4, 2) | {"noise": [6, 2]}
    steered = Exploring(nn.Identity(), nn.Identity(), Executed(guided.module, action), 1.0)
    assert steered.guidance == 1.5
    batch = {STATE: torch.ones(1, toy.STATE), "noise": torch.ones(1, 12)}
    steered.random_until = 1
    before = steered(batch)
    assert torch.equal(before, guided.module({**batch, "noise": torch.ones(1, 6, 2)})[:, :4])
    steered.guidance = 3.0
    assert guided.module.guidance == 3.0 and not torch.allclose(steered(batch), before)
    with pytest.raises(UserError, match=r"noise has shape \(6, 2\), that of the policy here \(3, 2\)"):
        Executed(guided.module, action | {"noise": [3, 2]})
    drawing = script(*toy.TRAINERS["bc"], "--policy.sampler", "sample", "--steps", 1, folder="drawing")
    assert Steered(drawing, chunk=4).policy.chunk == 4
    with pytest.raises(UserError, match="--trainer.chunk 5 is more than the 4 actions that the frozen policy plans"):
        Steered(drawing, chunk=5)


DIFFUSION = ("--trainer", "diffusion", "--model", "vector_field", "--model.hidden-dims", 16)
DIFFUSION += ("--dataset.obs-steps", 1, "--dataset.action-steps", 4)
UNFIT: dict[str, tuple[tuple[object, ...], str]] = {
    "plain": (("--trainer", "bc"), "it draws no noise, which could be chosen; steer a policy of --trainer flow or dif"),
    "late": (
        (*toy.FLOW_OF_AN_MLP, "--dataset.state-steps", 3),
        "it observes 3 steps; train it with --dataset.obs-steps 1",
    ),
    "relative": (
        (*toy.FLOW_OF_AN_MLP, "--dataset.action", "relative"),
        "its actions are relative to the state, or 6D; train it wi",
    ),
    "ddpm": ((*DIFFUSION, "--policy.sampler", "ddpm"), "ddpm draws noise in every step; train it with --policy.sa"),
}


def test_what_cannot_be_steered_is_refused_in_one_line(online: Script, script: Script, tmp_path: Path) -> None:
    for name, (options, message) in UNFIT.items():
        with pytest.raises(UserError, match=f"{name}/policy: {message}"):
            Steered(script(*options, "--steps", 1, folder=name))
    (path := tmp_path / "ddpm" / "policy" / "policy.json").write_text(path.read_text().replace("ddpm", "ddim"))
    base = ("--trainer.base", tmp_path / "ddpm")
    for options, message in (
        ((), "--trainer.base is needed: the run folder of the policy to steer"),
        ((*base, "--trainer.chunk", 5), "--trainer.chunk 5 is more than the 4 actions that the frozen policy plans"),
        ((*base, "--trainer.chunk", 0), "--trainer.chunk 0 must be 1 to 10000"),
        ((*base, "--trainer.bound", 0), "--trainer.bound 0.0 must be 0.001 to 1000"),
        ((*base, "--normalise-observations"), "--normalise-observations: the frozen policy needs its own"),
        ((*base, "--env", "gymnasium", "--env.id", "Pendulum-v1"), "has shape .5,., the environment's .3,."),
    ):
        with pytest.raises(UserError, match=message):
            online(*toy.DSRL, *options)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="dsrl steers a frozen policy while that acts; run it by online_trainer.py"):
        prepared({}, DSRL, "dsrl", DSRL.Config())
    run = online(*toy.DSRL, *base, "--trainer.chunk", 1, "--steps", 22)  # of a diffusion policy
    assert load_policy(run).inference["sampler"] == "ddim" and load_policy(run).chunk == 1
    with pytest.raises(UserError, match="--policy.sampler ddpm: this policy knows ddim"):
        load_policy(run, sampler="ddpm")


@pytest.mark.slow
def test_compiled_losses_are_the_same() -> None:
    """By what --compile traces and differentiates, without its kernels."""
    trainer, data, found = tiny(), batch(), []
    for losses in (trainer.losses, torch.compile(trainer.losses, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        trainer.models.zero_grad(set_to_none=True)
        losses(data)[0].backward()
        found.append([p.grad.clone() for p in trainer.models.parameters() if p.grad is not None])
    torch._dynamo.reset()
    assert found[0] and all(torch.allclose(eager, traced) for eager, traced in zip(*found, strict=True))


@pytest.mark.slow
def test_steering_makes_a_poor_flow_a_good_policy_which_is_exported(online: Script, script: Script) -> None:
    more = ("--env", "savable", "--eval-episodes", 50)
    poor = script(*toy.FLOW_OF_AN_MLP, "--model.hidden-dims", 32, 32, "--steps", 60, *more, folder="poor")
    options = ("--trainer", "dsrl", *more, "--trainer.base", poor, "--trainer.chunk", 1, "--trainer.discount", 0.5)
    options += ("--trainer.policy-starts", 0, "--steps", 1000, "--learning-starts", 500, "--batch-size", 128)
    options += ("--eval-every", 1000, "--num-envs", 4)
    names = ("--model.hidden-dims", "--model.critic.hidden-dims", "--model.noise-critic.hidden-dims")
    options += (*(word for name in names for word in (name, 64, 64)), "--optimizer.lr", 1e-3)
    (before, after), begin = read_lines(online(*options) / "eval.jsonl"), read_lines(poor / "eval.jsonl")[-1]
    assert max(begin["success_rate"], before["success_rate"]) < 0.5 and after["success_rate"] > 0.7
    policy = load_policy(poor.parent / "run")
    assert export.export(policy, poor / "policy.pt2") < 1e-5
    assert list(export.description(policy)["inputs"]) == [STATE]  # it needs no noise
