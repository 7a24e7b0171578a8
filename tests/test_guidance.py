"""Classifier-free guidance of flows, and the threshold and the distribution of values by which recap labels actions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components import MODEL_BUILDER_REGISTRY, UserError, evaluate, load_policy
from components.contracts import Window
from components.datasets.transitions import Transitions
from components.experience.replay import ReplayBuffer
from components.models.guidance import KEY, Guided, hide, tell, told
from components.models.v_categorical import VCategorical
from components.models.vector_field import VectorField
from components.run.curves import read_lines
from components.trainers import flow
from components.trainers.flow import Flow, FlowSampler
from components.trainers.recap import Recap
from test_imitation import SPEC, Known
from test_offline_rl import METHODS, actions, chain, trained
from test_offline_rl_maths import three_episodes

STEPS, ROWS = 8, 3
NETWORKS = {"unet1d": {"channels": (16, 32)}, "dit": {"width": 32}, "vector_field": {"hidden_dims": (32, 32)}}


def network(name: str) -> Any:
    """A network over state and mark, with weights that are not small."""
    torch.manual_seed(0)
    made: Any = MODEL_BUILDER_REGISTRY[name](**NETWORKS[name]).build(told({**SPEC}))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return made


# ---- guided velocities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_guidance_extrapolates_from_what_knows_nothing(name: str) -> None:
    """One call for both velocities; none more for a weight of 1, which is the network that observes."""
    plain = network(name)
    guided, x, time = Guided(plain, hide), torch.randn(ROWS, *SPEC["action"]["shape"]), torch.full((1,), 0.3)
    seen = {"observation.state": torch.randn(ROWS, 3)}
    nothing = {"observation.state": torch.zeros(ROWS, 3), KEY: torch.zeros(ROWS, 1)}
    given = plain(x, time, plain.condition(tell(seen, torch.ones(ROWS, 1))))
    without = plain(x, time, plain.condition(nothing))
    assert (given - without).abs().max() > 0.01
    for weight in (0.0, 1.0, 2.5):
        guided.weight = weight
        found = guided(x, time, guided.condition(seen | {"noise": x}))
        assert torch.allclose(found, without + weight * (given - without), atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_guided_policy_chunks_in_real_time(prefix: int) -> None:
    """As one network that has the guided velocity: the Jacobian is of that, and given actions are marked for both."""
    width = 2 if prefix else 1
    matrix = torch.randn(STEPS * width, STEPS * width, generator=torch.Generator().manual_seed(1)) / 4

    class Linear(Known):
        def condition(self, observation: dict[str, Tensor]) -> Tensor:
            return observation[KEY][:, 0]

        def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            return (noisy.flatten(1) @ matrix * (1 + condition[:, None])).view_as(noisy)

    def guided_by_hand(x: Tensor, time: Tensor) -> Tensor:
        return (x.flatten(1) @ matrix * (1 + 2.5)).view_as(x)  # M x + 2.5 (2 M x - M x)

    samplers = [
        FlowSampler(nn.Identity(), Guided(Linear(lambda x, t: x), hide), (STEPS, 1), prefix),
        FlowSampler(nn.Identity(), Known(guided_by_hand), (STEPS, 1), prefix),
    ]
    samplers[0].guidance = 2.5
    known = {"previous": torch.ones(ROWS, STEPS, 1), "previous_weight": torch.linspace(1, 0, STEPS).expand(ROWS, -1)}
    batch = known | {"prefix": torch.tensor([0, 1, 3]), "noise": torch.randn(ROWS, STEPS, 1)}
    batch["observation.state"] = torch.randn(ROWS, 3)
    with torch.inference_mode():
        for given in (batch, {key: batch[key] for key in ("observation.state", "noise")}):
            assert torch.allclose(samplers[0](given), samplers[1](given), atol=1e-4)


def test_a_share_of_the_samples_learns_without_the_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "update", lambda *arguments: None)
    spec, config = {**SPEC}, Flow.Config(unconditional=0.25)
    net: Any = VectorField(hidden_dims=(4,)).build(Flow.model_spec("policy", spec, config))
    seen: list[dict[str, Tensor]] = []
    condition = net.condition
    net.condition = lambda observed: seen.append(observed) or condition(observed)
    trainer = Flow(nn.ModuleDict({"policy": net}), {}, nn.MSELoss(), spec, config)
    torch.manual_seed(0)
    data = {"observation.state": torch.rand(4000, 3) + 1, "action": torch.rand(4000, *SPEC["action"]["shape"])}
    trainer.train_step(data | {"action_is_pad": torch.zeros(4000, SPEC["action"]["shape"][0], dtype=torch.bool)})
    known = seen[0][KEY][:, 0] == 1
    assert known.float().mean() == pytest.approx(0.75, abs=0.02)
    assert (seen[0][KEY][~known] == 0).all() and (seen[0]["observation.state"][~known] == 0).all()
    assert torch.equal(seen[0]["observation.state"][known], data["observation.state"][known])


# ---- what a user sets ----------------------------------------------------------------------------------------------


def test_the_weight_is_saved_recorded_and_changed(script: Callable[..., Path], capsys: Any) -> None:
    small = ("--trainer", "flow", "--model.channels", 16, "--dataset.action-steps", 8, "--policy.sampling-steps", 2)
    small += ("--steps", 2, "--eval-episodes", 1)
    run = script(*small, "--trainer.unconditional", 0.1, "--policy.guidance", 1.5)
    policy, observation = load_policy(run), {"observation.state": torch.ones(5).numpy()}
    assert policy.inference["guidance"] == policy.module.guidance == 1.5
    chunks = []
    for weight in (1.5, 4.0):
        policy.configure(guidance=weight).reset(seeds=[0])
        chunks.append(torch.as_tensor(policy.plan(observation)))
    assert (chunks[0] - chunks[1]).abs().max() > 1e-4
    assert evaluate.main([str(run), "--policy.guidance", "2", "--eval-episodes", "1"]) == 0
    assert [line["inference"]["guidance"] for line in read_lines(run / "eval.jsonl")][-1] == 2
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--policy.guidance .* must be a number of 0 or more"):
            policy.configure(guidance=value)
    plain = load_policy(script(*small, "--eval-episodes", 0, folder="plain"))
    assert "guidance" not in plain.inference
    with pytest.raises(UserError, match="--policy.guidance: this policy has not learned to act without a condition"):
        plain.configure(guidance=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("flow", "--policy.guidance", 2), "train it by recap, or by flow with --trainer.unconditional 0.1"),
        (("bc", "--policy.guidance", 2), "--policy.guidance: this policy has not learned to act without"),
        (("flow", "--trainer.unconditional", 1), "--trainer.unconditional 1.0 must be a share from 0 to below 1"),
        (
            ("flow", "--trainer.unconditional", 0.1, "--trainer.objective", "shortcut"),
            "--trainer.unconditional goes with --trainer.objective flow",
        ),
        (("recap", "--model", "value=v_ensemble"), "recap's value is a distribution"),
        (("recap", "--model.value.bins", 1), "--model.value.bins 1 must be 2 or more"),
        (("recap", "--trainer.positive", 1), "--trainer.positive 1.0 must be 0.01 to 0.99"),
    ],
)
def test_bad_input(script: Callable[..., Path], options: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        script("--trainer", *options, "--dataset.action-scale", 4, "--steps", 1)


# ---- recap ---------------------------------------------------------------------------------------------------------


def test_more_guidance_goes_further() -> None:
    """Of steps that lead nowhere twice as often as right: what is cloned, what is better, and beyond."""
    trainer, policy = trained("recap", METHODS["recap"], 400, chain())
    found = {weight: actions(policy.configure(guidance=weight)) for weight in (0.0, 1.0, 2.0)}
    assert found[0.0].mean() + 0.3 < found[1.0].mean() < found[2.0].mean() - 0.1 and (found[2.0] > 0.3).all()
    value = trainer.models["value"]
    assert value.support[0] < -6 and value.support[1] == 0  # walks are cut after a cost of 2.71; endless ones cost 10
    v = value.mean(value(torch.eye(6)[:5])).detach()
    assert v[0] < v[3] < v[4]


def test_the_threshold_is_the_quantile_that_is_asked_for() -> None:
    """In whatever units the rewards are, also where a few are far from the others."""
    for scale, spread, failures, updates in ((0.01, 1.0, 0.0, 150), (100.0, 0.001, 0.1, 300)):
        torch.manual_seed(0)
        spec: Any = {"observation.state": {"shape": (2,)}, "action": {"shape": (2,)}}
        spec |= dict.fromkeys(("reward", "terminated", "next.observation.state", "return_to_go"), {"shape": ()})
        config = Recap.Config(chunk=1, positive=0.3)
        models = {"policy": VectorField(hidden_dims=(4,)), "value": VCategorical(hidden_dims=())}
        built = nn.ModuleDict({n: m.build(Recap.model_spec(n, spec, config)) for n, m in models.items()})
        still = {name: torch.optim.SGD(model.parameters(), lr=0.0) for name, model in built.items()}
        trainer = Recap(built, still, nn.MSELoss(), spec, config)

        def rewards(rows: int, spread: float = spread, failures: float = failures, scale: float = scale) -> Tensor:
            return scale * (1 + spread * torch.randn(rows) - 3.0 * (torch.rand(rows) < failures))

        for _ in range(updates):
            states, flags = torch.zeros(64, 2), torch.ones(64, dtype=torch.bool)
            reward = rewards(64)
            data = {"observation.state": states, "next.observation.state": states, "reward": reward}
            data |= {"terminated": flags, "return_to_go": reward, "action": torch.zeros(64, 2)}
            metrics = trainer.train_step(data)
        v = float(metrics["v"])  # of a network that does not learn
        share = float((rewards(10_000) - v > metrics["threshold"]).float().mean())
        assert share == pytest.approx(0.3, abs=0.06)


def test_returns_are_divided_between_the_bins_beside_them() -> None:
    value: Any = VCategorical(bins=5, hidden_dims=()).build({"observation.state": {"shape": (1,)}})
    value.cover(torch.tensor(-8.0), torch.tensor(-2.0))
    assert value.support.tolist() == [-8, 0]  # 0 is always there: what follows an episode's end
    value.cover(torch.tensor(-1.0), torch.tensor(-1.0))
    assert value.support.tolist() == [-8, 0]
    logits = torch.tensor([[0.1, -0.4, 0.3, 0.0, 0.7]])
    log = logits.log_softmax(1)[0]
    for returns, expected in ((-8.0, log[0]), (-5.0, (log[1] + log[2]) / 2), (-0.5, log[3] / 4 + log[4] * 3 / 4)):
        assert value.cross_entropy(logits, torch.tensor([returns])).item() == pytest.approx(-expected.item(), abs=1e-6)
    assert value.cross_entropy(logits, torch.tensor([7.0])).item() == pytest.approx(-log[4].item(), abs=1e-6)
    assert value.mean(logits).item() == pytest.approx((log.exp() * torch.linspace(-8, 0, 5)).sum().item(), abs=1e-6)


def test_rewards_are_summed_beyond_the_chunk() -> None:
    """The first two actions, and three steps of rewards; from the replay buffer as from a dataset."""
    window = Window(discount=0.5, n_step=3, chunk=2, to_go=True)
    table = Transitions(three_episodes(True)["dataset"], "test", window)
    found = table.get_batch(torch.arange(12))
    assert found["action"][:4, :, 0].tolist() == [[0, 1], [1, 2], [2, 3], [3, 3]]
    assert found["reward"][:4].tolist() == [1 + 1 + 1, 2 + 2 + 2, 4 + 4, 8]
    assert found["discount"][:4].tolist() == [0.125, 0.125, 0.25, 0.5]
    assert found["action_is_pad"][:4].tolist() == [[False, False]] * 3 + [[False, True]]
    assert len(Transitions(three_episodes(True)["dataset"], "test", Window(chunk=9, to_go=True))) == 12  # all are cut
    single = Transitions(three_episodes(True)["dataset"], "test", Window()).get_batch(torch.arange(12))
    spec = {key: {"shape": tuple(x.shape[1:]), "dtype": "float32"} for key, x in single.items() if key != "discount"}
    spec["terminated"]["dtype"] = "bool"
    buffer = ReplayBuffer(spec, 12, 1, 1, window)
    for t in range(12):
        step = {key: value[t : t + 1] for key, value in single.items() if key in spec}
        buffer.add(step | {"valid": torch.tensor([True]), "ended": torch.tensor([t in (3, 7, 9, 11)])})
        assert buffer.due(True) == (t >= 3) and not buffer.due(False)  # the first returns are known by then
    drawn = buffer.sample(200)
    rows = drawn["observation.state"][:, 0].long()
    for key, value in found.items():
        assert torch.equal(drawn[key].to(value.dtype), value[rows]), key
