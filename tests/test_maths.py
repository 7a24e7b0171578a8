"""Numbers worked by hand: normalisation, losses, schedules, batch order, intervals, the global moments."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from components import LOSS_BUILDER_REGISTRY, OPTIMIZER_BUILDER_REGISTRY, UserError, intervals, optimizers, parallel
from components.data.batches import Batches, batch_indices, fit_batch
from components.data.normalisation import Normaliser, statistics
from components.learning.metrics import Metrics
from components.losses import Huber, zero_padding
from components.optimizers import SGD, Adam, AdamW, learning_rate_factor
from components.run.logs import finite


def spec(**stats: object) -> dict:
    return {"observation.state": {"shape": (2,), "dtype": "float32", "stats": stats}}


# ---- normalisation -------------------------------------------------------------------------------------------------


def test_statistics_are_float64_population_statistics() -> None:
    stats = statistics(torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0], [0.1, 6.0]]))
    assert stats["std"][0] < 1e-16  # float32 arithmetic would give 7e-9
    assert stats["mean"][1] == 3.0 and stats["std"][1] == pytest.approx(math.sqrt(3.5))
    assert stats["min"] == pytest.approx([0.1, 1.0]) and stats["max"] == pytest.approx([0.1, 6.0])
    assert stats["q01"][1] == pytest.approx(1.03)  # 1 + 0.03 * (2 - 1), numpy's linear interpolation


@pytest.mark.parametrize(
    ("mode", "stats", "expected"),
    [
        ("mean_std", {"mean": [1.0, 0.0], "std": [2.0, 4.0]}, [1.0, 0.5]),  # (3 - 1) / 2, 2 / 4
        ("min_max", {"min": [1.0, 0.0], "max": [5.0, 8.0]}, [0.0, -0.5]),  # halfway; a quarter of the way
        ("quantile", {"q01": [3.0, 0.0], "q99": [5.0, 2.0]}, [-1.0, 1.0]),
        ("none", {"mean": [1.0, 0.0], "std": [2.0, 4.0]}, [3.0, 2.0]),
    ],
)
def test_modes(mode: str, stats: dict, expected: list[float]) -> None:
    normaliser = Normaliser(spec(**stats), {"observation.state": mode})
    x = torch.tensor([[3.0, 2.0]])
    y = normaliser({"observation.state": x, "next.observation.state": x, "other": x})
    assert y["observation.state"].tolist() == [expected] == y["next.observation.state"].tolist()
    assert y["other"] is x
    assert torch.allclose(normaliser.undo("observation.state", y["observation.state"]), x)


def test_a_constant_feature_gets_scale_1() -> None:
    normaliser = Normaliser(spec(mean=[5.0, 0.0], std=[7e-9, 1.0]))
    assert normaliser({"observation.state": torch.tensor([[5.1, 1.0]])})["observation.state"][0, 0] == pytest.approx(
        0.1
    )


def test_what_is_rarely_another_value_is_mapped_by_its_range() -> None:
    """Its quantiles are equal: one in a hundred rows, whose 99 % quantile would be 0.4 by interpolation."""
    stats = statistics(torch.tensor([[0.0, 5.0]] * 99 + [[40.0, 5.0]]))
    assert stats["q01"] == stats["q99"] == [0.0, 5.0]
    normalised = Normaliser(spec(**stats), {"observation.state": "quantile"})
    found = normalised({"observation.state": torch.tensor([[0.0, 5.0], [40.0, 5.0]])})["observation.state"]
    assert found.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


ROWS = torch.tensor([[-1.0, 0.0213, 1e5, 0.0], [-1.0, 0.0213, 1e5, 1.0]])


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "quantile", "none", "scale"])
@pytest.mark.parametrize("names", [("mean", "std", "min", "max", "q01", "q99"), ("mean", "std"), ("min", "max")])
def test_a_constant_of_the_actions_is_exact_in_every_mode(mode: str, names: tuple[str, ...]) -> None:
    known = {name: value for name, value in statistics(ROWS).items() if name in names}
    needed = {"mean_std": "std", "min_max": "max", "quantile": "q99"}.get(mode)
    if needed and needed not in names:
        mode = "none"
    for stats in (known, {name: [value] * 3 for name, value in known.items()}):  # the latter for each step of a chunk
        feature = {"shape": (3, 4), "dtype": "float32", "stats": stats | ({"scale": 2.0} if mode == "scale" else {})}
        normaliser = Normaliser({"action": feature}, {"action": mode}).to(torch.device("cpu"))
        shaken = torch.randn(5, 3, 4)
        found = normaliser.undo("action", shaken)
        assert torch.equal(found[..., :3], ROWS[0, :3].expand(5, 3, 3))
        assert found[..., 3].unique().numel() == 15  # which is no constant
        assert torch.equal(normaliser.exact("action", shaken[:, 0])[:, :3], ROWS[0, :3].expand(5, 3))  # one step
        feature["bounds"] = {"min": [-1.0] * 4, "max": [-1.0, 1.0, 1.0, 1.0]}  # of an environment to learn in
        assert Normaliser({"action": feature}, {"action": mode}).fixed["action"][0].tolist() == [True] + [False] * 3


def test_statistics_may_be_per_time_step_of_a_chunk() -> None:
    action = {"shape": (2, 1), "dtype": "float32", "stats": {"mean": [[1.0], [2.0]], "std": [[1.0], [2.0]]}}
    normaliser = Normaliser({"action": action})
    assert normaliser({"action": torch.tensor([[[3.0], [6.0]]])})["action"].flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("stats", "modes", "message"),
    [
        ({"mean": [0.0, 0.0]}, {}, r"mean_std of 'observation.state' needs the statistic 'std'; found: mean"),
        ({"min": [0.0, 0.0]}, {"observation.state": "min_max"}, r"needs the statistic 'max'"),
        ({"mean": [0.0] * 3, "std": [1.0] * 3}, {}, r"'observation.state' 'mean' has width 3, but the data has 2"),
        ({"mean": [0.0, float("nan")], "std": [1.0, 1.0]}, {}, r"'mean' is not finite"),
        ({}, {"observation.stat": "none"}, r"no such key; nearest: observation.state"),
        ({}, {"observation.state": "mean-std"}, r"unknown mode 'mean-std'; nearest: mean_std"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_by_name(stats: dict, modes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Normaliser(spec(**stats), modes)


# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("mse", (1 + 9) / 2), ("l1", 2.0), ("huber", (0.5 + 2.5) / 2)])
def test_losses(name: str, expected: float) -> None:
    loss = LOSS_BUILDER_REGISTRY[name]().build()
    assert float(loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))) == pytest.approx(expected)


def test_huber_delta() -> None:
    loss = Huber(delta=2.0).build()
    assert float(loss(torch.tensor([3.0]), torch.tensor([0.0]))) == pytest.approx(
        2 * (3 - 1)
    )  # delta (|x| - delta / 2)


def test_padded_steps_count_in_the_denominator_only() -> None:
    prediction, target = torch.tensor([[[1.0], [5.0]]]), torch.tensor([[[3.0], [0.0]]])
    prediction, target = zero_padding(prediction, target, torch.tensor([[False, True]]))
    assert float(nn.functional.mse_loss(prediction, target)) == 2.0  # (4 + 0) / 2


# ---- optimizers and schedules --------------------------------------------------------------------------------------


def test_schedules_by_hand() -> None:
    factor = learning_rate_factor
    assert [factor("constant", k, None, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = [factor("cosine", k, 6, 2) for k in range(6)]
    assert cosine == pytest.approx(
        [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]
    )
    assert factor("cosine", 100, 6, 2) == cosine[-1]  # the last value holds
    one = [factor("onecycle", k, 10, 0) for k in range(10)]
    assert one[:3] == pytest.approx([1 / 25, (1 / 25 + 1) / 2, 1.0]) and one[-1] == pytest.approx(1 / 250_000)
    assert one[2:] == sorted(one[2:], reverse=True)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_the_schedule_lives_in_the_state_dict(name: str, schedule: str) -> None:
    def make(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        factory = OPTIMIZER_BUILDER_REGISTRY[name](lr=0.1, schedule=schedule, schedule_steps=steps)
        return net, factory.build(net.parameters())

    def rates(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        found = []
        for _ in range(count):
            net(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    net, optimizer = make(8)
    whole = rates(net, optimizer, 8)
    assert whole == pytest.approx([0.1 * learning_rate_factor(schedule, k, 8, 0) for k in range(8)])
    net, optimizer = make(8)
    rates(net, optimizer, 3)
    again, resumed = make(20)  # a longer run: the stored length stays
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert rates(again, resumed, 5) == whole[3:]
    if schedule != "constant":
        assert "keeps its length of 8 updates" in optimizers.kept_length({"policy": resumed}, 20)


def test_weight_decay_touches_matrices_only() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(net.parameters())
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(net[0].weight)}


def test_one_adam_step_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0]]))
    optimizer = Adam(lr=0.1, fused=False).build([weight])
    (3 * weight).sum().backward()
    optimizer.step()
    assert weight.item() == pytest.approx(0.9, abs=1e-6)  # the first step is lr times the sign of the gradient


def test_learning_rate_of_single_models() -> None:
    factory = SGD(lr=1.0, lr_scale=("encoder=0.1",))
    assert optimizers.for_model(factory, "encoder", ["encoder", "policy"]).lr == pytest.approx(0.1)
    assert optimizers.for_model(factory, "policy", ["encoder", "policy"]).lr == 1.0
    with pytest.raises(UserError, match="no model 'encoder'; known: policy"):
        optimizers.for_model(factory, "policy", ["policy"])
    with pytest.raises(UserError, match="factor above 0"):
        optimizers.for_model(SGD(lr_scale=("policy=x",)), "policy", ["policy"])


def test_schedule_free_evaluates_averaged_weights() -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    optimizer = OPTIMIZER_BUILDER_REGISTRY["schedulefree"](lr=0.1).build(net.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
    trained = net.weight.clone()
    optimizers.set_mode({"policy": optimizer}, training=False)
    averaged = net.weight.clone()
    optimizers.set_mode({"policy": optimizer}, training=True)
    assert not torch.equal(trained, averaged)
    assert torch.allclose(net.weight, trained, atol=1e-6)


# ---- batches -------------------------------------------------------------------------------------------------------


def test_a_pass_visits_every_row_once_and_drops_another_remainder_each_time() -> None:
    passes = [torch.cat([batch_indices(10, 3, 0, e * 3 + i) for i in range(3)]).tolist() for e in range(3)]
    assert all(len(set(rows)) == 9 for rows in passes)
    assert len({frozenset(set(range(10)) - set(rows)) for rows in passes}) > 1
    assert passes != [torch.cat([batch_indices(10, 3, 1, e * 3 + i) for i in range(3)]).tolist() for e in range(3)]


@pytest.mark.parametrize(("world", "micro"), [(2, 1), (1, 2), (2, 2)])
def test_processes_and_micro_steps_share_the_same_batches(world: int, micro: int) -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 20

        def get_batch(self, indices: torch.Tensor, seed: int) -> dict:
            noise = torch.rand(len(indices), generator=torch.Generator().manual_seed(seed))
            return {"row": indices, "noise": noise}

    whole = Batches(Rows(), 8, seed=3).stream(5)
    parts = [Batches(Rows(), 8, 3, rank, world, micro).stream(5) for rank in range(world)]
    for _ in range(4):
        one = next(whole)
        together = [next(part) for _ in range(micro) for part in parts]
        for key in ("row", "noise"):
            assert torch.equal(one[key], torch.cat([part[key] for part in together]))


def test_lazy_and_resident_data_give_the_same_batches() -> None:
    class Lazy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> dict:
            return {"row": torch.tensor(i)}

    state = torch.get_rng_state()
    for workers in (0, 2):
        stream = Batches(Lazy(), 8, seed=3, workers=workers).stream(2)
        for step in range(2, 6):
            assert torch.equal(next(stream)["row"], batch_indices(20, 8, 3, step))
        del stream
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn from the global generator


def test_batch_sizes_that_do_not_fit() -> None:
    assert fit_batch(256, 1000, 2, asked=True) == (256, "")
    assert fit_batch(256, 101, 2, asked=False)[0] == 100
    with pytest.raises(UserError, match="not divisible by 4 .*; use 8 or 12"):
        fit_batch(10, 1000, 4, asked=False)
    with pytest.raises(UserError, match="larger than the data, which has 101 samples; use 100 or fewer"):
        fit_batch(256, 101, 2, asked=True)


# ---- intervals, metrics, moments -----------------------------------------------------------------------------------


def test_intervals_of_rates() -> None:
    """Of one rate (Wilson), and of a difference, an example of Newcombe's (1998): 56 of 70 against 48 of 80."""
    assert intervals.wilson(50, 50) == pytest.approx((0.92865, 1.0), abs=1e-4)
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert intervals.wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-4)
    assert intervals.newcombe((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert intervals.newcombe((10, 10), (0, 10)) == pytest.approx((0.6075, 1.0), abs=1e-4)
    assert intervals.newcombe((10, 10), (0, 20)) == pytest.approx((0.6791, 1.0), abs=1e-4)


def test_intervals_of_means() -> None:
    """Student's quantiles as tables have them, also between whole numbers; Welch's against scipy 1.16."""
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 10: 2.22814, 30: 2.04227, 1e5: 1.95999, 9e5: 1.95997}
    table |= {1.3: 7.50053, 2.7: 3.39215, 7.5: 2.33304, math.inf: 1.95996}
    assert {n: intervals.student_t(n) for n in table} == pytest.approx(table, rel=3e-6)
    mean, deviation = intervals.moments([1.0, 2.0, 3.0])
    assert intervals.of_mean(mean, deviation, 3) == pytest.approx(
        (2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5
    )
    assert intervals.welch((1, 2, 5), (3, 4, 9)) == pytest.approx((-5.49911, 1.49911), rel=1e-5)
    assert intervals.welch((1, 0, 2), (3, 0, 2)) == (-2, -2)


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (1290.4, None, "1290"),
        (-152.63, None, "-152.6"),
        (0.96, None, "0.96"),
        (0.0, None, "0"),
        (3e-5, None, "3e-5"),
        (1e308, None, "1e308"),
        (1e6, None, "1000000"),
        (float("nan"), None, "nan"),
        (0.96, (0.865, 0.989), "0.96 [0.86, 0.99]"),
        (1.0, (0.975, 1.0), "1.000 [0.975, 1.000]"),
        (-152.69, (-154.13, -151.21), "-152.7 [-154.1, -151.2]"),
        (3800.2, (2448.1, 5152.3), "3800 [2448, 5152]"),
        (0.3, (0.3, 0.3), "0.3 [0.3, 0.3]"),
        (-0.001, (-0.2, 0.2), "0.00 [-0.20, 0.20]"),
    ],
)
def test_numbers_are_written_as_people_do(value: float, interval: tuple[float, float] | None, text: str) -> None:
    assert intervals.measured(value, interval) == text
    assert [intervals.thousands(n) for n in (0, 500, 20_000, 1.5e6)] == ["0", "500", "20k", "1.5M"]


def test_metrics_are_means_over_the_interval() -> None:
    metrics = Metrics()
    metrics.add({"a": torch.tensor(1.0, requires_grad=True), "b": 2}, "train/")
    metrics.add({"a": np.float32(3.0)}, "train/")
    assert metrics.means() == {"train/a": 2.0, "train/b": 2.0}
    assert metrics.means() == {}
    assert finite({"a": float("nan"), "b": float("inf"), "c": 1.0}) == {"a": None, "b": None, "c": 1.0}


@pytest.mark.parametrize(
    ("value", "found"), [(torch.zeros(3), r"shape \(3,\)"), ("high", "is a str"), (None, "NoneType")]
)
def test_a_metric_that_is_no_scalar_is_named(value: object, found: str) -> None:
    with pytest.raises(TypeError, match=f"metric 'odd' .*{found}"):
        Metrics().add({"odd": value})


def test_moments_on_one_process() -> None:
    mean, deviation = parallel.global_moments(torch.tensor([1.0, 3.0], requires_grad=True))
    assert (float(mean), float(deviation)) == (2.0, 1.0) and not mean.requires_grad
    assert float(parallel.global_mean(torch.tensor([1.0, 3.0]))) == 2.0
