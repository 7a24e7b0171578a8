"""Losses that a model has of its own: codebooks of actions, mixtures of experts, and who adds and logs them."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components import MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY, UserError
from components.contracts import check_auxiliary
from components.models import codebook, experts
from components.models.codebook import Codebook, CodebookHead, CodebookOptions, CodebookPolicy
from components.models.experts import Experts
from components.trainers.bc import BC
from components.trainers.fql import FQL
from components.trainers.recap import Recap

CHUNK = {
    "observation.state": {"shape": (3,), "dtype": "float32"},
    "action": {"shape": (4, 2), "dtype": "float32"},
    "action_is_pad": {"shape": (4,), "dtype": "bool"},
}
B, L, K, D, F = 6, 2, 3, 2, 5


def batch(rows: int = B) -> dict[str, Any]:
    """Chunks of which some are cut."""
    generator = torch.Generator().manual_seed(1)
    state, action = (torch.randn(rows, *shape, generator=generator) for shape in ((3,), (4, 2)))
    is_pad = torch.arange(4) >= 2 + torch.arange(rows)[:, None] % 3
    return {"observation.state": state, "action": action, "action_is_pad": is_pad}


# ---- a codebook ----------------------------------------------------------------------------------------------------


def head(**options: Any) -> CodebookHead:
    """In float64, with codes that are apart."""
    torch.manual_seed(0)
    small = CodebookOptions(codes=K, code_layers=L, code_width=D, **options)
    made = CodebookHead(F, (4, 2), small).double()
    made.codebook.codes.normal_()
    return made


def dense(net: nn.Sequential, x: Tensor) -> Tensor:
    """Linear, ReLU, linear, written out."""
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (net[0], net[2]))  # type: ignore[union-attr]
    return (x @ w1.T + b1).clamp(min=0) @ w2.T + b2  # type: ignore[operator,union-attr]


def nearest(z: Tensor, codes: Tensor) -> list[int]:
    """The code of each layer for one z `[D]`, by trying all."""
    found: list[int] = []
    for layer in codes:
        found.append(min(range(len(layer)), key=lambda k: float(sum((z[d] - layer[k, d]) ** 2 for d in range(D)))))
        z = z - layer[found[-1]]
    return found


def test_the_losses_of_a_codebook_by_hand() -> None:
    made, data = head(focal_gamma=1.5, finer_weight=0.3), batch()
    features, is_pad = torch.randn(B, F, dtype=torch.float64), data["action_is_pad"]
    keep = (~is_pad).double()[..., None]
    target = data["action"].double() * keep
    z = dense(made.encode, target.flatten(1))
    codes = made.codebook.codes
    chosen = [nearest(row, codes) for row in z.detach()]
    q = torch.stack([sum(codes[i, k] for i, k in enumerate(row)) for row in chosen])  # type: ignore[misc]
    focal = [0.0] * L
    for x, own in zip(features, chosen, strict=True):
        for layer, k in enumerate(own):
            inputs = torch.cat([x, codes[0, own[0]]]) if layer else x
            e = dense(made.prior[layer], inputs).exp()  # type: ignore[arg-type]
            p = float((e[k] / e.sum()).detach())
            focal[layer] -= (1 - p) ** 1.5 * math.log(p) / B
    action, losses = made.auxiliary(features, data["action"].double() + 9 * is_pad[..., None], is_pad)
    assert float(losses["code"].detach()) == pytest.approx(focal[0] + 0.3 * focal[1], rel=1e-12)
    error = (dense(made.decode, q).unflatten(1, (4, 2)) - target) * keep
    assert float(losses["reconstruction"].detach()) == pytest.approx(
        float(error.abs().sum().detach()) / (B * 8), rel=1e-12
    )
    assert float(losses["commitment"].detach()) == pytest.approx(
        float((z - q).square().sum().detach()) / (B * D), rel=1e-12
    )
    assert torch.allclose(action.flatten(1), dense(made.decode, q) + dense(made.offset, torch.cat([features, q], 1)))
    # The decoder's gradient at q passes straight through to the encoder, and commitment pulls it to q.
    at = q.detach().requires_grad_()
    error = (dense(made.decode, at).unflatten(1, (4, 2)) - target) * keep
    (straight,) = torch.autograd.grad(error.abs().sum() / (B * 8), at)
    wanted = torch.autograd.grad(z, list(made.encode.parameters()), straight + 2 * (z - q).detach() / (B * D))
    total = losses["reconstruction"] + losses["commitment"] + losses["code"] + action.sum()
    found = torch.autograd.grad(total, list(made.encode.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(found, wanted, strict=True))
    (plain,) = torch.autograd.grad(
        codebook.focal_loss(x := torch.randn(4, 3).requires_grad_(), torch.ones(4).long(), 0), x
    )
    (entropy,) = torch.autograd.grad(nn.functional.cross_entropy(x, torch.ones(4).long()), x)
    assert torch.allclose(plain, entropy)


def test_codes_are_averages_of_what_they_stand_for() -> None:
    """Two updates by hand: one code begins, the other takes half of its cluster, and both average from then on."""
    book = Codebook(1, 2, 1).double()
    first, second = (torch.tensor(values, dtype=torch.float64)[:, None] for values in ([1.0, 2, 6], [0.0, 5, 7, 8]))
    for z in (first[:2], first[2:]):  # in two micro-steps
        chosen, _, rests = book(z)
        assert not chosen.any()
        book.note(chosen, rests)
    book.learn()
    deviation, direction = math.sqrt(14 / 3), float(book.directions[1])
    child = 3 + codebook.APART * deviation * direction
    assert book.codes.flatten().tolist() == pytest.approx([3, child])
    assert book.tally[0, :, 0].tolist() == [0.5, 0.5] and float(book.perplexity) == pytest.approx(2)
    side = 1 if child > 3 else -1
    chosen, _, rests = book(second)
    assert chosen.flatten().tolist() == [int(side * (float(z) - (3 + child) / 2) > 0) for z in second]
    book.note(chosen, rests)
    book.learn()  # the second update keeps half
    for k, begin in enumerate((3.0, child)):
        own = [float(z) for z, c in zip(second, chosen, strict=True) if int(c) == k]
        share = 0.5 * 0.5 + 0.5 * len(own) / 4
        assert float(book.tally[0, k, 0]) == pytest.approx(share)
        assert float(book.codes[0, k, 0]) == pytest.approx((0.5 * 0.5 * begin + 0.5 * sum(own) / 4) / share)
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book.learn()  # nothing was counted
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())
    assert not {"pending", "directions"} & set(before)


def test_a_dead_code_comes_back_and_constant_actions_harm_nothing() -> None:
    book = Codebook(2, 4, 2)
    clusters = torch.tensor([[0.0, 0], [5, 0], [0, 5], [5, 5]])
    torch.manual_seed(0)
    for _ in range(300):
        z = clusters[torch.randint(4, (64,))] + 0.1 * torch.randn(64, 2)
        chosen, _, rests = book(z)
        book.note(chosen, rests)
        book.learn()
    found = torch.cdist(clusters, book.codes[0])
    assert found.min(1).values.max() < 0.2 and float(book.perplexity) > 3.5
    constant = Codebook(2, 4, 2)
    for _ in range(50):
        chosen, vectors, rests = constant(torch.ones(8, 2))
        constant.note(chosen, rests)
        constant.learn()
    assert constant.codes.isfinite().all() and torch.allclose(vectors.sum(1), torch.ones(8, 2))


def test_noise_draws_codes_by_their_probabilities() -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(5, 3)
    quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.1, 0.25, 0.69, 0.71, 0.5]))
    assert codebook.drawn(logits, quantile).tolist() == [0, 1, 1, 2, 1]
    assert codebook.drawn(logits[:2], torch.tensor([-50.0, 50.0])).tolist() == [0, 2]


def test_a_codebook_learns_both_modes_where_the_mean_is_neither() -> None:
    """By one step or the other, whatever the state says; a quarter of the updates of few_step_results.py's toy."""
    torch.manual_seed(0)
    spec = {"observation.state": {"shape": (1,), "dtype": "float32"}, "action": {"shape": (2,), "dtype": "float32"}}
    network = MODEL_BUILDER_REGISTRY["mlp"](hidden_dims=(32,), head="codebook", codes=4, code_width=8).build(spec)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    trainer = BC(nn.ModuleDict({"policy": network}), {"policy": optimizer}, nn.L1Loss())
    for _ in range(250):
        state, side = torch.rand(64, 1) * 2 - 1, torch.randint(2, (64, 1)) * 2.0 - 1
        trainer.train_step({"observation.state": state, "action": torch.cat([side, side * state], 1)})
    policy, state = trainer.policy().eval(), torch.rand(200, 1) * 2 - 1
    assert isinstance(policy, CodebookPolicy) and not hasattr(policy, "noise_shape")
    observed = {"observation.state": state, "noise": torch.randn(200, 2)}
    with torch.no_grad():
        likely = policy(observed)
        policy.sampler = "sample"
        drawn = policy(observed)
    assert policy.noise_shape == (2,) and torch.equal(network(observed), likely)
    for action in (likely, drawn):
        side = action[:, :1].sign()
        assert ((action - torch.cat([side, side * state], 1)).norm(dim=1) < 0.5).float().mean() > 0.95  # the mean: 1
    assert 0.3 < (drawn[:, 0] > 0).float().mean() < 0.7


# ---- a mixture of experts ------------------------------------------------------------------------------------------


def test_experts_and_the_losses_of_their_router_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made = Experts(3, 4, 2, 3, 2, {}).double()
    x = torch.randn(B, 3, dtype=torch.float64)
    output, losses = made.auxiliary(x)
    counts, mean, z, logits = [0.0] * 3, [0.0] * 3, 0.0, x @ made.router.weight.T
    for row in range(B):
        e = logits[row].exp().tolist()
        p = [value / sum(e) for value in e]
        largest = sorted(range(3), key=lambda i: -p[i])[:2]
        z += math.log(sum(e)) ** 2 / B
        y = torch.zeros(2, dtype=torch.float64)
        for i in largest:
            counts[i] += 1 / (2 * B)
            hidden = x[row] @ made.first.weight[i] + made.first.bias.view(3, -1)[i]
            gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            y += p[i] * (gelu @ made.second.weight[i] + made.second.bias.view(3, -1)[i])
        mean = [m + value / B for m, value in zip(mean, p, strict=True)]
        assert torch.allclose(output[row], y, rtol=1e-5)  # the router counts in float32
    balance = 3 * sum(f * m for f, m in zip(counts, mean, strict=True))
    assert float(losses["load_balance"].detach()) == pytest.approx(balance, rel=1e-6)
    assert float(losses["router_z"].detach()) == pytest.approx(z, rel=1e-6)
    assert torch.equal(output, made(x))
    # Equal shares have a loss of 1, a single expert that takes all has N.
    certain = 50 * torch.eye(4).double()
    assert float(experts.load_balance(certain, torch.eye(4))) == pytest.approx(1)
    assert float(experts.load_balance(certain[:1], torch.eye(4)[:1])) == pytest.approx(4)
    # Two processes: with the shares of both, the mean of their gradients is that of one with all rows.
    logits = logits.detach().requires_grad_()
    chosen = made.routed(x)[1]
    (whole,) = torch.autograd.grad(experts.load_balance(logits, chosen), logits)
    monkeypatch.setattr(experts, "over_processes", lambda share: torch.tensor(counts).double())
    halves = [experts.load_balance(logits[part], chosen[part]) for part in (slice(0, 3), slice(3, 6))]
    (both,) = torch.autograd.grad(sum(halves) / 2, logits)  # type: ignore[operator]
    assert torch.allclose(both, whole, rtol=1e-6)
    assert float(sum(halves).detach()) / 2 == pytest.approx(balance, rel=1e-6)


# ---- who adds them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "resmlp", "gru", "transformer"])
@pytest.mark.parametrize(("option", "names"), [("experts", "load_balance router_z"), ("head", "code commitment")])
def test_every_regression_network_has_them(model: str, option: str, names: str) -> None:
    torch.manual_seed(0)
    options: Any = {"experts": 3} if option == "experts" else {"head": "codebook"}
    network, data = MODEL_BUILDER_REGISTRY[model](**options).build(CHUNK), batch()
    prediction, own = network.auxiliary(data, target=data["action"], is_pad=data["action_is_pad"])
    assert prediction.shape == network(data).shape == (B, 4, 2) and set(names.split()) <= set(own)
    assert set(own) == set(network.auxiliary_weights)
    assert MODEL_BUILDER_REGISTRY[model]().build(CHUNK).auxiliary_weights == {}


@pytest.mark.parametrize(
    ("name", "entry", "options"),
    [
        ("bc", "mlp", {}),
        ("act", "act", {"width": 16, "layers": 1, "dropout": 0.0}),
        ("diffusion", "dit", {"width": 16, "layers": 1}),
        ("flow", "dit", {"width": 16, "layers": 1}),
    ],
)
def test_every_imitation_trainer_adds_and_logs_them(name: str, entry: str, options: dict[str, Any]) -> None:
    """Those of its own networks, and those of a plugin's, which says what it has and what that weighs."""
    data, cls = batch(), TRAINER_REGISTRY[name]
    found = {}
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        factory = MODEL_BUILDER_REGISTRY[entry](experts=3, load_balance=weight, router_z=0.0, **options)
        models = nn.ModuleDict({"policy": factory.build(CHUNK)})
        keywords = {"spec": CHUNK} if name in ("diffusion", "flow") else {}
        trainer = cls(models, {}, nn.MSELoss(), **keywords)
        torch.manual_seed(1)
        found[weight] = trainer.losses(data)
    loss, metrics = found[0.5]
    assert float(loss - found[0.0][0]) == pytest.approx(0.5 * float(metrics["load_balance"]), rel=1e-4)
    assert float(metrics["loss"]) == float(loss) and float(metrics["router_z"]) > 0

    class Plugin(type(models["policy"])):  # type: ignore[misc]
        auxiliary_weights = {"mine": 2.0}

        def auxiliary(self, *arguments: Any, **known: Any) -> tuple[Any, dict[str, Tensor]]:
            assert set(known) == ({"target", "is_pad"} if name == "bc" else set())
            return self(*arguments), {"mine": torch.tensor(3.0)}

    models["policy"].__class__ = Plugin
    torch.manual_seed(1)
    loss, metrics = trainer.losses(data)
    assert float(loss - found[0.0][0]) == pytest.approx(6, rel=1e-5) and float(metrics["mine"]) == 3
    models["policy"].auxiliary = lambda *_, **known: (None, {"yours": torch.ones(2)})
    with pytest.raises(UserError, match=r"expected a scalar tensor for each of mine; found yours \[2\]"):
        trainer.losses(data)
    models["policy"].auxiliary = None
    with pytest.raises(UserError, match="Plugin has auxiliary_weights, but no auxiliary"):
        trainer.losses(data)


def test_recap_adds_them_and_trainers_that_do_not_refuse_such_models() -> None:
    data, found = batch(), {}
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        factory = MODEL_BUILDER_REGISTRY["dit"](experts=3, load_balance=weight, router_z=0.0, width=16, layers=1)
        models = nn.ModuleDict({"policy": factory.build(Recap.model_spec("policy", CHUNK, None))})
        models["value"] = MODEL_BUILDER_REGISTRY["v_categorical"](hidden_dims=()).build(CHUNK)
        known = dict.fromkeys(("reward", "terminated", "next.observation.state", "return_to_go"), {"shape": ()})
        trainer = Recap(models, {}, nn.MSELoss(), CHUNK | known)
        torch.manual_seed(1)
        found[weight] = trainer.policy_loss(data, torch.zeros(B))
    loss, metrics = found[0.5]
    difference = float((loss - found[0.0][0]).detach())
    assert difference == pytest.approx(0.5 * float(metrics["load_balance"]), rel=1e-4)
    check_auxiliary(Recap, models, ["policy", "value"])
    models["flow"] = models.pop("policy")
    with pytest.raises(UserError, match="FQL does not add load_balance, losses that its model 'flow'") as error:
        check_auxiliary(FQL, models, ["flow", "value"])
    assert "leave out --model.flow.experts" in str(error.value)
    offered = re.split(", | or ", str(error.value).rpartition("choose ")[2])
    assert offered == [name for name, cls in TRAINER_REGISTRY.items() if "policy" in getattr(cls, "adds_auxiliary", ())]
    check_auxiliary(FQL, models, ["value"])  # frozen
    models["flow"].blocks[0].feed_forward.auxiliary_weights = {"load_balance": 0.0}
    check_auxiliary(FQL, models, ["flow"])  # not wanted
