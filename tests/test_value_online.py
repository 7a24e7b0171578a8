"""TD3, DQN, RLPD and residual: hand-worked targets, what moves when, and a slow float64 reference of TD3."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components import UserError
from components.data.features import BASE_ACTION
from components.datasets.transitions import prepared
from components.models.actor import Actor
from components.models.discrete_q import DiscreteQ
from components.models.q_ensemble import QEnsemble
from components.models.tanh_gaussian import TanhGaussian
from components.models.temperature import Temperature
from components.optimizers import Adam
from components.trainers.dqn import DQN
from components.trainers.residual import Residual
from components.trainers.rlpd import RLPD
from components.trainers.td3 import TD3
from test_sac import LR, adam_step, backward, linear_stack

STATE = "observation.state"
THEN = f"next.{STATE}"
SPEC: dict[str, Any] = {STATE: {"shape": (4,), "dtype": "float32"}, "action": {"shape": (2,), "dtype": "float32"}}
SPEC |= {THEN: SPEC[STATE], "reward": {"shape": (), "dtype": "float32"}}
SPEC |= {"terminated": {"shape": (), "dtype": "bool"}}
CHOICES = SPEC | {"action": {"shape": (), "dtype": "int64", "classes": 3}}


def trained(kind: Any, factories: dict[str, Any], options: dict[str, Any], spec: dict[str, Any] = SPEC) -> Any:
    """A trainer whose targets differ from what they follow, so that a test can tell them apart."""
    torch.manual_seed(0)
    models = nn.ModuleDict({name: factory.build(spec) for name, factory in factories.items()})
    opts = {name: Adam(lr=LR).build(model.parameters()) for name, model in models.items()}
    trainer = kind(models, opts, nn.MSELoss(), spec, kind.Config(**options))
    with torch.no_grad():
        for name, model in models.items():
            for p in model.parameters() if name.startswith("target_") else ():
                p += 0.3 * torch.randn_like(p)
    return trainer


def batch(size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    data = {STATE: draw(size, 4), "action": draw(size, 2).tanh(), "reward": draw(size), THEN: draw(size, 4)}
    data |= {"terminated": torch.arange(size) % 5 == 0}
    return data | {"discount": torch.full((size,), 0.9) ** (1 + torch.arange(size) % 3)}


def weights(trainer: Any) -> dict[str, Tensor]:
    """All weights of each model, one after the other."""
    flat = nn.utils.parameters_to_vector
    return {name: flat(model.parameters()).detach().clone() for name, model in trainer.models.items()}


def moved(trainer: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, now in weights(trainer).items() if not torch.equal(now, before[name])}


def with_gradient(trainer: Any) -> set[str]:
    """The models that got one, each in all of its parameters."""
    found = {name: {p.grad is not None for p in model.parameters()} for name, model in trainer.models.items()}
    assert all(len(kinds) == 1 for kinds in found.values())
    return {name for name, kinds in found.items() if kinds == {True}}


class Recorded(nn.MSELoss):
    """Keeps the targets that it was given."""

    def forward(self, found: Tensor, target: Tensor) -> Tensor:
        self.target = target
        return super().forward(found, target)


class Function(nn.Module):
    """A function in the place of a network."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


# ---- TD3 -----------------------------------------------------------------------------------------------------------


def td3(**options: Any) -> TD3:
    factories = {"policy": Actor(hidden_dims=(8, 6)), "critic": QEnsemble(hidden_dims=(7, 5))}
    return trained(TD3, factories, options)


@pytest.mark.parametrize("n_step", [False, True])
def test_the_target_of_td3_by_hand(monkeypatch: pytest.MonkeyPatch, n_step: bool) -> None:
    trainer = td3(discount=0.5, policy_noise=0.2, noise_clip=0.5)
    acted: list[Tensor] = []

    def values(data: dict[str, Tensor], action: Tensor, prefix: str) -> Tensor:
        assert prefix == "next."
        acted.append(action)
        return torch.stack([10 * action[:, 0], 6 + action[:, 1]])

    trainer.models["target_policy"] = Function(lambda data, prefix: data[f"{prefix}{STATE}"][:, :2])
    trainer.models["target_critic"] = Function(values)
    trainer.models["critic"] = Function(lambda data, action: torch.tensor([[0.0] * 4, [1.0] * 4]))
    trainer.loss = Recorded()
    noise = torch.tensor([[1.0, -2.0], [9.0, -9.0], [2.0, -1.0], [-0.5, 0.0]])
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    data = batch(4) | {"terminated": torch.tensor([False, False, False, True]), "reward": torch.tensor([1.0, 2, 3, 4])}
    data[THEN] = torch.tensor([[0.1, 0.1, 9, 9], [0.2, 0.2, 9, 9], [0.9, -0.9, 9, 9], [0.5, 0.0, 9, 9]])
    data["discount"] = torch.tensor([0.5, 0.25, 0.125, 0.5])
    if not n_step:
        del data["discount"]
    loss, metrics = trainer.critic_loss(data)
    # the second noise is cut to 0.5, the third action to 1
    assert torch.allclose(acted[0], torch.tensor([[0.3, -0.3], [0.7, -0.3], [1.0, -1.0], [0.4, 0.0]]))
    following = [min(3, 5.7), min(7, 5.7), min(10, 5)]
    factors = [0.5, 0.25, 0.125] if n_step else [0.5] * 3
    y = [r + f * q for r, f, q in zip((1, 2, 3), factors, following, strict=True)] + [4]
    assert trainer.loss.target.tolist() == [pytest.approx(y)] * 2
    expected = sum((0 - x) ** 2 + (1 - x) ** 2 for x in y) / 4  # the sum over critics, the mean over samples
    assert float(loss) == pytest.approx(expected) == float(metrics["critic_loss"])


def test_policy_and_targets_of_td3_move_with_every_second_update() -> None:
    trainer, data = td3(target_rate=0.1), batch()
    for update in range(1, 5):
        before = weights(trainer)
        metrics = trainer.train_step(data)
        if update % 2:
            assert moved(trainer, before) == {"critic"} and "actor_loss" not in metrics
            continue
        assert moved(trainer, before) == set(trainer.models) and "actor_loss" in metrics
        now = weights(trainer)
        for name in ("policy", "critic"):
            expected = 0.9 * before[f"target_{name}"] + 0.1 * now[name]
            assert torch.allclose(now[f"target_{name}"], expected, atol=1e-6)


def test_td3_goes_on_counting_where_it_was_saved() -> None:
    trainer, data = td3(), batch()
    trainer.train_step(data)
    other = td3()
    other.load_state_dict(trainer.state_dict())
    before = weights(other)
    other.train_step(data)
    assert moved(other, before) == set(other.models)


def test_each_loss_of_td3_moves_its_own_network() -> None:
    for method, own in (("critic_loss", "critic"), ("actor_loss", "policy")):
        trainer = td3()
        getattr(trainer, method)(batch())[0].backward()
        assert with_gradient(trainer) == {own}


def test_td3_explores_with_noise() -> None:
    trainer = td3()
    explorer, generator = trainer.explorer(), torch.Generator().manual_seed(1)
    state, noise = torch.randn(20, 4, generator=generator), 5 * torch.randn(20, 2, generator=generator)
    expected = (trainer.models["policy"](state) + 0.1 * noise).clamp(-1, 1)
    assert explorer.noise_shape == (2,) and torch.equal(explorer({STATE: state, "noise": noise}), expected)
    at_bounds = float((expected.abs() == 1).float().mean())
    assert 0 < at_bounds < 1
    quiet = td3(exploration_noise=0.0)
    assert torch.equal(quiet.explorer()({STATE: state, "noise": noise}), quiet.models["policy"](state))


class Reference:
    """Updates of the paper's algorithm 1 in numpy and float64, by hand-written derivatives; tau is 0.005."""

    def __init__(self, trainer: TD3) -> None:
        self.nets = self.read(trainer)
        own = ("policy", "critic0", "critic1")
        self.moments = {name: [(np.zeros_like(p), np.zeros_like(p)) for p in sum(self.nets[name], [])] for name in own}
        self.counts, self.updates = dict.fromkeys(own, 0), 0

    @staticmethod
    def read(trainer: TD3) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
        """Weights `[inputs, outputs]` and biases of each network, of each critic by itself."""
        array = lambda x: x.detach().double().numpy().copy()  # noqa: E731
        found = {}
        for prefix in ("", "target_"):
            layers = [x for x in trainer.models[f"{prefix}policy"].net if hasattr(x, "weight")]
            found[f"{prefix}policy"] = [array(x.weight).T for x in layers], [array(x.bias) for x in layers]
            layers = [x for x in trainer.models[f"{prefix}critic"].net if hasattr(x, "weight")]
            for i in range(2):
                biases = [array(x.bias).reshape(2, -1)[i] for x in layers]
                found[f"{prefix}critic{i}"] = [array(x.weight)[i] for x in layers], biases
        return found

    def act(self, name: str, state: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        acts = linear_stack(state, *self.nets[name])
        return np.tanh(acts[-1]), acts

    def improve(self, name: str, gw: list[np.ndarray], gb: list[np.ndarray]) -> None:
        self.counts[name] += 1
        values = [*self.nets[name][0], *self.nets[name][1]]
        steps = zip(values, [*gw, *gb], self.moments[name], strict=True)
        new = [adam_step(value, gradient, m, v, self.counts[name]) for value, gradient, (m, v) in steps]
        self.nets[name] = new[:3], new[3:]

    def update(self, data: dict[str, np.ndarray], noise: np.ndarray) -> dict[str, float]:
        n, state, then = len(data["reward"]), data[STATE], data[THEN]
        # eq. 14, 15 and 10: the target
        action = np.clip(self.act("target_policy", then)[0] + np.clip(0.4 * noise, -0.5, 0.5), -1, 1)
        x = np.concatenate([then, action], 1)
        q_next = np.minimum(*(linear_stack(x, *self.nets[f"target_critic{i}"])[-1][:, 0] for i in range(2)))
        y = data["reward"] + data["discount"] * (1 - data["terminated"]) * q_next
        metrics = {"critic_loss": 0.0}
        for i in range(2):
            acts = linear_stack(np.concatenate([state, data["action"]], 1), *self.nets[f"critic{i}"])
            error = acts[-1][:, 0] - y
            metrics["critic_loss"] += (error**2).mean()
            gw, gb, _ = backward(acts, self.nets[f"critic{i}"][0], 2 * error[:, None] / n)
            self.improve(f"critic{i}", gw, gb)
        self.updates += 1
        if self.updates % 2:
            return metrics
        # the deterministic policy gradient, through the first critic as it is now
        a, policy_acts = self.act("policy", state)
        acts = linear_stack(np.concatenate([state, a], 1), *self.nets["critic0"])
        dq = backward(acts, self.nets["critic0"][0], np.ones((n, 1)))[2][:, 4:]
        gw, gb, _ = backward(policy_acts, self.nets["policy"][0], -dq * (1 - a**2) / n)
        self.improve("policy", gw, gb)
        for name in self.moments:
            pairs = zip(self.nets[f"target_{name}"], self.nets[name], strict=True)
            mixed = [[0.995 * t + 0.005 * w for t, w in zip(*both, strict=True)] for both in pairs]
            self.nets[f"target_{name}"] = mixed[0], mixed[1]
        return metrics | {"actor_loss": -acts[-1].mean()}

    def compare(self, trainer: TD3) -> float:
        """Largest difference of any parameter, targets included."""
        found = self.read(trainer)
        assert found.keys() == self.nets.keys()
        pairs = [pair for name in found for pair in zip(sum(found[name], []), sum(self.nets[name], []), strict=True)]
        return max(float(abs(mine - theirs).max()) for mine, theirs in pairs)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_updates_of_td3_against_a_float64_reference(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    trainer, data = td3(policy_noise=0.4), batch()
    reference = Reference(trainer)
    numbers = {key: value.double().numpy() for key, value in data.items()}
    for update in range(updates):
        noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(update))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x, noise=noise: noise)
            metrics = trainer.train_step(data)
        expected = reference.update(numbers, noise.double().numpy())
        assert ("actor_loss" in expected) == ("actor_loss" in metrics)
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
    assert reference.compare(trainer) < 1e-5


# ---- DQN -----------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Q(s, a) of states that are numbers."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        return self.rows[observation[STATE][:, 0].long()]


def dqn(factory: DiscreteQ | None = None, **options: Any) -> DQN:
    return trained(DQN, {"critic": factory or DiscreteQ(hidden_dims=(7, 5))}, options, CHOICES)


def choices(size: int = 16) -> dict[str, Tensor]:
    return batch(size) | {"action": torch.arange(size) % 3}


@pytest.mark.parametrize("n_step", [False, True])
@pytest.mark.parametrize(("double", "values"), [(True, [5.0, 40.0, 8.0]), (False, [7.0, 60.0, 9.0])])
def test_the_target_of_dqn_by_hand(double: bool, values: list[float], n_step: bool) -> None:
    trainer = dqn(double=double, discount=0.5)
    trainer.models["critic"] = Table([[1.0, 3, 2], [10, 0, 0], [0, 1, 2]])
    trainer.models["target_critic"] = Table([[6.0, 5, 7], [40, 50, 60], [9, 9, 8]])
    trainer.loss = Recorded()
    data: dict[str, Tensor] = {STATE: torch.tensor([[1.0], [2.0], [0.0], [0.0]])}
    data |= {THEN: torch.tensor([[0.0], [1.0], [2.0], [1.0]]), "action": torch.tensor([0, 2, 1, 1])}
    data |= {"reward": torch.tensor([1.0, -2.0, 0.5, 3.0]), "terminated": torch.tensor([False, False, False, True])}
    factors = [0.5] * 3
    if n_step:
        factors = [0.25, 0.125, 0.5]
        data["discount"] = torch.tensor([*factors, 0.5])
    loss, metrics = trainer.losses(data)
    rewards = (1, -2, 0.5)
    y = [r + f * q for r, f, q in zip(rewards, factors, values, strict=True)] + [3]
    assert trainer.loss.target.tolist() == pytest.approx(y)
    errors = [10 - y[0], 2 - y[1], 3 - y[2], 3 - y[3]]
    assert float(loss.detach()) == pytest.approx(sum(e**2 for e in errors) / 4) == float(metrics["critic_loss"])
    loss.backward()
    expected = torch.zeros(3, 3)
    for state, action, error in zip((1, 2, 0, 0), (0, 2, 1, 1), errors, strict=True):
        expected[state, action] += 2 * error / 4  # of the action that was taken alone
    assert torch.allclose(trainer.models["critic"].rows.grad, expected)
    assert trainer.models["target_critic"].rows.grad is None


def test_the_target_of_dqn_takes_over_after_so_many_updates() -> None:
    trainer, data = dqn(target_every=3), choices()
    for update in range(1, 8):
        before = weights(trainer)
        trainer.train_step(data)
        assert moved(trainer, before) == ({"critic"} if update % 3 else {"critic", "target_critic"})
        same = torch.equal(weights(trainer)["critic"], weights(trainer)["target_critic"])
        assert same == (update % 3 == 0)
    other = dqn(target_every=3)
    other.load_state_dict(trainer.state_dict())
    turns = []
    for _ in range(3):
        before = weights(other)
        other.train_step(data)
        turns.append("target_critic" in moved(other, before))
    assert turns == [False, True, False]  # after 7 updates there come the 8th, 9th and 10th


def test_the_target_of_dqn_may_take_over_in_part() -> None:
    trainer = dqn(target_every=1, target_rate=0.25)
    before = weights(trainer)
    trainer.train_step(choices())
    now = weights(trainer)
    assert torch.allclose(now["target_critic"], 0.75 * before["target_critic"] + 0.25 * now["critic"], atol=1e-6)


def normal(uniform: Tensor) -> Tensor:
    """The noise that stands for these uniform numbers."""
    return torch.distributions.Normal(0, 1).icdf(uniform)


def test_epsilon_falls_linearly_with_the_steps_of_the_environments() -> None:
    trainer = dqn(epsilon_start=0.9, epsilon_end=0.1, exploration_steps=1000)
    explorer, state = trainer.explorer(), torch.randn(3, 4)
    best = trainer.policy()({STATE: state})
    assert torch.equal(best, trainer.models["critic"](state).argmax(1)) and explorer.noise_shape == (2,)
    expected = {0: 0.9, 250: 0.7, 500: 0.5, 999: 0.1008, 1000: 0.1, 5000: 0.1}
    for steps, epsilon in expected.items():
        explorer.env_step = steps
        for choice in range(3):
            second = torch.full((3,), (choice + 0.5) / 3)
            for first, acted in ((epsilon - 0.001, torch.full((3,), choice)), (epsilon + 0.001, best)):
                noise = normal(torch.stack([torch.full((3,), first), second], 1))
                assert torch.equal(explorer({STATE: state, "noise": noise}), acted), (steps, first)
    none = dqn(epsilon_start=1.0, epsilon_end=0.0, exploration_steps=0).explorer()
    assert torch.equal(none({STATE: state, "noise": torch.full((3, 2), -5.0)}), best)


def test_actions_are_uniform_at_first_and_the_best_ones_in_the_end() -> None:
    trainer = dqn(epsilon_start=1.0, epsilon_end=0.0, exploration_steps=100)
    explorer, count = trainer.explorer(), 30_000
    torch.manual_seed(1)
    state = torch.randn(count, 4)
    best, noise = trainer.policy()({STATE: state}), torch.randn(count, 2)
    found = explorer({STATE: state, "noise": noise})
    assert found.dtype == torch.int64
    chi_square = ((torch.bincount(found, minlength=3) - count / 3).square() / (count / 3)).sum()
    assert float(chi_square) < 13.8  # which one in a thousand exceeds, at 2 degrees of freedom
    assert float((found == best).float().mean()) == pytest.approx(1 / 3, abs=0.02)  # whatever the state
    explorer.env_step = 50
    found = explorer({STATE: state, "noise": noise})
    assert float((found == best).float().mean()) == pytest.approx(1 / 2 + 1 / 6, abs=0.02)
    others = torch.bincount((found - best)[found != best] % 3, minlength=3)
    assert float(others[1] / others.sum()) == pytest.approx(1 / 2, abs=0.03)
    explorer.env_step = 100
    assert torch.equal(explorer({STATE: state, "noise": noise}), best)
    extremes = torch.tensor([[-40.0, 40.0], [40.0, -40.0]])  # they stand for 0 and 1
    explorer.env_step = 50
    found = explorer({STATE: state[:2], "noise": extremes})
    assert found.tolist() == [2, int(best[1])]


def test_a_dueling_network_adds_up_value_and_centred_advantages() -> None:
    torch.manual_seed(0)
    critic = DiscreteQ(hidden_dims=(7, 5), dueling=True).build(CHOICES)
    state = torch.randn(6, 4)
    features = critic.net(state)
    value, advantage = critic.value(features), critic.advantage(features)
    assert value.shape == (6, 1) and advantage.shape == (6, 3)
    expected = value + advantage - advantage.mean(1, keepdim=True)
    assert torch.allclose(critic({STATE: state}), expected, atol=1e-6)
    assert torch.allclose(critic(state).mean(1), value.squeeze(1), atol=1e-6)
    assert not torch.allclose(expected, advantage, atol=1e-2)
    trainer = dqn(DiscreteQ(hidden_dims=(7, 5), dueling=True))
    trainer.losses(choices())[0].backward()
    assert with_gradient(trainer) == {"critic"}


def test_dqn_refuses_continuous_actions() -> None:
    with pytest.raises(UserError, match="this network evaluates discrete actions"):
        DiscreteQ().build(SPEC)
    models = nn.ModuleDict({"critic": DiscreteQ().build(CHOICES)})
    with pytest.raises(UserError, match="dqn chooses among discrete actions; .* sac, td3 or ppo"):
        DQN(models, {}, nn.MSELoss(), SPEC)


@pytest.mark.parametrize(("option", "value"), [("epsilon_end", 1.5), ("target_every", 0), ("exploration_steps", -1)])
def test_dqn_refuses_numbers_that_make_no_sense(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--trainer.{option.replace('_', '-')} {value} must be"):
        dqn(**{option: value})


# ---- RLPD ----------------------------------------------------------------------------------------------------------


def rlpd(members: int = 5, kind: Any = RLPD, spec: dict[str, Any] = SPEC, **options: Any) -> Any:
    factories = {
        "policy": TanhGaussian(hidden_dims=(8, 6)),
        "critic": QEnsemble(members=members, hidden_dims=(7, 5), layer_norm=True),
        "temperature": Temperature(initial=0.3),
    }
    trainer = trained(kind, factories, options, spec)
    trainer.loss = Recorded()
    return trainer


def check_policy_gradient(trainer: Any, loss: Tensor, expected: Tensor) -> None:
    """The losses of policy and temperature move these alone, and the policy as `expected` would."""
    gradients = torch.autograd.grad(expected, list(trainer.models["policy"].parameters()))
    loss.backward()
    assert with_gradient(trainer) == {"policy", "temperature"}
    for p, gradient in zip(trainer.models["policy"].parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-6)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_chosen_members_have_the_values_that_they_have_among_all(layer_norm: bool) -> None:
    torch.manual_seed(0)
    critic = QEnsemble(members=5, hidden_dims=(7, 5), layer_norm=layer_norm).build(SPEC)
    with torch.no_grad():
        for p in critic.parameters():
            p += 0.3 * torch.randn_like(p)  # LayerNorms begin alike
    data, action = batch(), torch.randn(16, 2, requires_grad=True)
    everything = critic(data, action, prefix="next.")
    for chosen in ([3], [4, 1], [2, 0, 3], [0, 1, 2, 3, 4]):
        found = critic.of(torch.tensor(chosen), data, action, prefix="next.")
        assert torch.allclose(found, everything[chosen], atol=1e-6)
    critic.of(torch.tensor([4, 1]), data, action).sum().backward()
    assert all(p.grad is None for p in critic.parameters()) and float(action.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("subset", "draw", "chosen"),
    [
        (1, (0.1, 0.2, 0.9, 0.3, 0.4), (2,)),
        (2, (0.1, 0.9, 0.3, 0.8, 0.2), (1, 3)),
        (2, (0.9, 0.1, 0.2, 0.3, 0.8), (0, 4)),
        (5, (0.1, 0.2, 0.9, 0.3, 0.4), (0, 1, 2, 3, 4)),
    ],
)
@pytest.mark.parametrize("backup_entropy", [True, False])
def test_the_target_of_rlpd_is_the_least_value_of_a_subset(
    monkeypatch: pytest.MonkeyPatch, subset: int, draw: tuple[float, ...], chosen: tuple[int, ...], backup_entropy: bool
) -> None:
    trainer, data = rlpd(subset=subset, backup_entropy=backup_entropy), batch()
    noise = torch.randn(16, 2)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.tensor(draw))
    loss, metrics = trainer.critic_loss(data)
    action, log_prob = trainer.models["policy"].sample(data, noise, prefix="next.")
    members = trainer.models["target_critic"](data, action, prefix="next.")
    least = members[list(chosen)].amin(0)
    assert subset == 5 or not torch.allclose(least, members.amin(0))
    soft = least - 0.3 * log_prob if backup_entropy else least
    y = data["reward"] + data["discount"] * ~data["terminated"] * soft
    assert torch.allclose(trainer.loss.target, y.detach().expand(5, 16), atol=1e-5)
    q = trainer.models["critic"](data, data["action"])
    expected = 0.5 * (q - y).square().mean(1).sum()  # the sum over members, the mean over samples
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5) == float(metrics["critic_loss"])


def test_the_subset_of_rlpd_is_drawn_anew_and_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data = rlpd(subset=2), batch(2)
    found: list[tuple[int, ...]] = []
    of = trainer.models["target_critic"].of

    def recorded(chosen: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        found.append(tuple(sorted(chosen.tolist())))
        return of(chosen, *arguments, **keywords)

    monkeypatch.setattr(trainer.models["target_critic"], "of", recorded)
    torch.manual_seed(0)
    for _ in range(300):
        trainer.critic_loss(data)
    assert len(found) == 300 and all(len(set(pair)) == 2 for pair in found)
    counts = [found.count((i, j)) for j in range(5) for i in range(j)]
    assert sum(counts) == 300 and sum((count - 30) ** 2 / 30 for count in counts) < 27.9  # 1 in 1000, 9 degrees


def test_the_actor_of_rlpd_goes_by_the_mean_of_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data = rlpd(), batch()
    noise = torch.randn(16, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: noise)
        loss, metrics = trainer.actor_losses(data)
    action, log_prob = trainer.models["policy"].sample(data, noise)
    q = trainer.models["critic"](data, action)
    expected = (0.3 * log_prob - q.mean(0)).mean()
    assert float(metrics["actor_loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    check_policy_gradient(trainer, loss, expected)
    trainer = rlpd()
    trainer.critic_loss(data)[0].backward()
    assert with_gradient(trainer) == {"critic"}


def test_policy_and_temperature_of_rlpd_move_with_every_so_many_th_update() -> None:
    trainer, data = rlpd(policy_every=3, target_rate=0.1), batch()
    for update in range(1, 7):
        before = weights(trainer)
        metrics = trainer.train_step(data)
        now = weights(trainer)
        rare = set() if update % 3 else {"policy", "temperature"}
        assert moved(trainer, before) == {"critic", "target_critic"} | rare
        assert ("actor_loss" in metrics) == ("temperature_loss" in metrics) == bool(rare)
        expected = 0.9 * before["target_critic"] + 0.1 * now["critic"]
        assert torch.allclose(now["target_critic"], expected, atol=1e-6)
    trainer.train_step(data)
    other = rlpd(policy_every=3)
    other.load_state_dict(trainer.state_dict())
    assert ["actor_loss" in other.train_step(data) for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize(("given", "used"), [(None, -1.0), (-3.0, -3.0), (0.0, 0.0)])
def test_the_target_entropy_of_rlpd_is_half_of_minus_the_width(given: float | None, used: float) -> None:
    trainer = rlpd(target_entropy=given)
    torch.manual_seed(4)
    _, metrics = trainer.actor_losses(batch())
    entropy = float(metrics["entropy"])
    assert float(metrics["temperature_loss"]) == pytest.approx(-0.3 * (-entropy + used), abs=1e-6)


def test_residual_is_refused_without_an_environment() -> None:
    with pytest.raises(UserError, match="residual corrects a frozen policy while that acts; run it by online_trainer"):
        prepared({}, Residual, "residual", Residual.Config(base="runs/x"))


def residual(**options: Any) -> Any:
    spec = SPEC | {key: SPEC["action"] for key in (BASE_ACTION, f"next.{BASE_ACTION}")}
    return rlpd(kind=Residual, spec=spec, **options)


def on_top(size: int = 16) -> dict[str, Tensor]:
    """A batch with the frozen policy's actions, some at the bounds; corrections of demonstrations may exceed 1."""
    base = torch.linspace(-1.4, 1.4, 2 * size).reshape(size, 2).clamp(-1, 1)
    data = batch(size) | {BASE_ACTION: base, f"next.{BASE_ACTION}": base.flip(0)}
    data["action"][:2] = torch.tensor([[2.5, -3.0], [1.5, 0.5]])
    return data


def test_the_critics_of_residual_learn_the_value_of_the_sum_that_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data, noise = residual(scale=0.4), on_top(), torch.randn(16, 2)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.tensor((0.1, 0.9, 0.3, 0.8, 0.2)))
    loss, metrics = trainer.critic_loss(data)
    correction, _ = trainer.models["policy"].sample(data, noise, prefix="next.")
    following = (data[f"next.{BASE_ACTION}"] + 0.4 * correction).clamp(-1, 1)
    members = trainer.models["target_critic"](data, following, prefix="next.")
    y = data["reward"] + data["discount"] * ~data["terminated"] * members[[1, 3]].amin(0)
    assert torch.allclose(trainer.loss.target, y.detach().expand(5, 16), atol=1e-5)
    done = (data[BASE_ACTION] + 0.4 * data["action"]).clamp(-1, 1)
    assert float((data[BASE_ACTION] + 0.4 * data["action"] - done).abs().max()) > 0.1
    expected = 0.5 * (trainer.models["critic"](data, done) - y).square().mean(1).sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5) == float(metrics["critic_loss"])


def test_the_actor_of_residual_goes_by_the_least_member_and_is_held_back_less_and_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the sum is clipped, its gradient is that of the sum."""
    options = {"penalty": 0.8, "penalty_end": 0.05, "penalty_updates": 4, "policy_every": 1, "policy_starts": 0}
    trainer, data, noise = residual(scale=0.4, **options), on_top(), torch.randn(16, 2)
    for weight in (0.8, 0.4, 0.2, 0.1, 0.05, 0.05):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: noise)
            trainer.weight.fill_(weight)
            loss, metrics = trainer.actor_losses(data)
        action, log_prob = trainer.models["policy"].sample(data, noise)
        done = (data[BASE_ACTION] + 0.4 * action).detach().clamp(-1, 1).requires_grad_()
        least, alpha = trainer.models["critic"](data, done).amin(0), trainer.models["temperature"]().detach()
        (slope,) = torch.autograd.grad(least.sum(), done)  # of each row
        least = least.detach() + (slope * 0.4 * (action - action.detach())).sum(1)
        expected = ((alpha * log_prob - least) / least.abs().mean().detach()).mean() + weight * action.square().mean()
        assert float(metrics["actor_loss"]) == pytest.approx(float(expected.detach()), rel=1e-4)
        check_policy_gradient(trainer, loss, expected)
        trainer.train_step(data)
        assert float(trainer.weight) == pytest.approx(weight)  # the step has set the weight that belongs to it
        trainer.models.zero_grad()


def test_rlpd_refuses_more_critics_than_there_are() -> None:
    rlpd(members=3, subset=3)
    for subset in (0, 4):
        with pytest.raises(UserError, match=f"--trainer.subset {subset} must be 1 to 3"):
            rlpd(members=3, subset=subset)
