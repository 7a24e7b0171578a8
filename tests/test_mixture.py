"""Several datasets as one: shares, order, statistics, losses by source."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components import DATASET_BUILDER_REGISTRY, UserError, register
from components.data.batches import Batches
from components.data.normalisation import statistics
from components.datasets.episodes import Episodes, build_episodes
from components.datasets.mixture import Mixture, MixtureDataset, align
from conftest import FIXTURES, learned


@register(DATASET_BUILDER_REGISTRY, "rows")
@dataclass(frozen=True)
class Rows:
    """Rows of one number, as a plugin's dataset."""

    count: int = 10
    """How many."""
    offset: float = 0.0
    """The first one."""
    wide: int = 1
    """How often each."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        state = (torch.arange(float(self.count)) + self.offset)[:, None].repeat(1, self.wide)
        ends = torch.tensor([self.count])
        return build_episodes({"observation.state": state, "action": state}, ends, "rows", validation=0)


def mixture(counts: list[int], shares: list[float]) -> Mixture:
    datasets = [Rows(count, 1000.0 * i).build()["dataset"] for i, count in enumerate(counts)]
    return Mixture(datasets, [f"s{i}" for i in range(len(counts))], shares, ["observation.state", "action"])


@pytest.mark.parametrize(
    ("counts", "shares", "batch_size"),
    [
        ([100, 100], [0.7, 0.3], 20),
        ([10, 990], [0.5, 0.5], 32),
        ([7, 300, 50], [0.2, 0.5, 0.3], 30),
        ([500, 1], [0.99, 0.01], 100),
    ],
)
def test_every_pass_has_the_shares_asked_for(counts: list[int], shares: list[float], batch_size: int) -> None:
    """To within one item of a source, in each batch and over the pass; no item comes up twice before all have."""
    data = mixture(counts, shares)
    total = data.rows_per_pass
    assert total * min(c for c in shares) >= 1
    for epoch in (0, 1):
        order = data.order(0, epoch)
        source = torch.searchsorted(data.starts, order, right=True) - 1
        found = torch.bincount(source, minlength=len(counts))
        assert all(abs(int(n) - share * total) <= 1 for n, share in zip(found, shares, strict=True))
        times = torch.bincount(order, minlength=len(data))
        for start, count in zip(data.starts.tolist(), counts, strict=True):
            mine = times[start : start + count]
            assert int(mine.min()) >= 1 and int(mine.max()) - int(mine.min()) <= 1
        for batch in source.split(batch_size):
            here = torch.bincount(batch, minlength=len(counts)).tolist()
            assert all(abs(n - share * len(batch)) <= 1.01 for n, share in zip(here, shares, strict=True)), here
    assert not torch.equal(data.order(0, 0), data.order(0, 1)) and not torch.equal(data.order(0, 0), data.order(1, 0))


def test_a_pass_stays_short_where_a_large_source_has_a_small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.datasets.mixture.LONGEST_PASS", 8000)
    data = mixture([100_000, 10], [0.001, 0.999])
    assert data.draws == [8, 7992]
    large = [set(order[order < 100_000].tolist()) for order in (data.order(0, 0), data.order(0, 1))]
    assert len(large[0]) == len(large[1]) == 8 and large[0] != large[1]


def test_batches_resume_and_split_over_processes() -> None:
    data = mixture([30, 70], [0.5, 0.5])
    whole = Batches(data, 10, seed=4).stream(0)
    batches = [next(whole) for _ in range(30)]
    later = Batches(data, 10, seed=4).stream(17)
    halves = [Batches(data, 10, seed=4, rank=rank, world=2).stream(17) for rank in (0, 1)]
    for batch in batches[17:]:
        resumed, parts = next(later), [next(half) for half in halves]
        assert torch.equal(resumed["action"], batch["action"]) and resumed["source"] == batch["source"]
        assert torch.equal(torch.cat([part["action"] for part in parts]), batch["action"])
        assert [name for part in parts for name in part["source"]] == batch["source"]
        assert [name == "s1" for name in batch["source"]] == (batch["action"][:, 0] >= 1000).tolist()


def test_statistics_are_those_of_what_is_drawn() -> None:
    """Equal to the plain ones of data in which each source is repeated by its share."""
    sources = (f"{FIXTURES}/lerobot_v30_image:0.75", f"{FIXTURES}/zarr/push_replay.zarr:0.25")
    same = MixtureDataset(sources, validation=0).build()["norm_stats"]
    one = DATASET_BUILDER_REGISTRY["zarr"](path=f"{FIXTURES}/zarr/push_replay.zarr", validation=0).build()["norm_stats"]
    for key, stats in one.items():
        for name in ("mean", "std", "min", "max"):
            assert np.allclose(same[key][name], stats[name], atol=1e-9), (key, name)
    built = MixtureDataset(("rows,count=100:0.8", "rows,count=50,offset=1000:0.2")).build()
    repeated = torch.cat([torch.arange(100.0).repeat(2), (torch.arange(50.0) + 1000)])[:, None]
    expected = statistics(repeated)
    for name in ("mean", "std", "min", "max"):
        assert built["norm_stats"]["action"][name] == pytest.approx(expected[name]), name
    # Quantiles, between the rows that are next to those of the repeated data.
    assert built["norm_stats"]["action"]["q01"] == pytest.approx(expected["q01"], abs=1)
    assert built["norm_stats"]["action"]["q99"] == pytest.approx(expected["q99"], abs=1)


def test_the_loss_of_each_source_is_in_the_log(script: Callable[..., Path]) -> None:
    """One source is a robot recording, the other one the same task as pictures' format: both are named."""
    sources = [f"{FIXTURES}/lerobot_v30_image:0.7", f"minari={FIXTURES}/minari/metaworld/push-state-arrow-v0:0.3"]
    run = script(
        "--trainer", "bc", "--dataset", "mixture", "--dataset.sources", *sources, "--steps", 20, "--log-every", 10
    )
    for line in learned(run):
        losses = {key: value for key, value in line.items() if key.startswith("train/loss.")}
        assert set(losses) == {"train/loss.lerobot_v30_image", "train/loss.push-state-arrow-v0"}
        assert 0.2 * line["train/loss"] < min(losses.values()) <= max(losses.values()) < 5 * line["train/loss"]
    last = learned(run)[-1]
    of = [last[f"val/loss.{name}"] for name in ("lerobot_v30_image", "push-state-arrow-v0")]
    assert last["val/loss"] == pytest.approx(0.7 * of[0] + 0.3 * of[1])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "--dataset.sources is needed"),
        (("rows",), r"--dataset.sources rows: expected SOURCE:WEIGHT"),
        (("rows:0",), "a weight above 0"),
        (("rows:nan",), "a weight above 0"),
        (("nope:1",), "nope: no such file or folder"),
        (("nope=x:1",), "no dataset 'nope'"),
        (("mixture:1",), "no dataset 'mixture'"),
        (("rows,cuont=3:1",), "cuont"),
        (("rows,count=many:1",), "count is 'many', expected a whole number"),
        (("ogbench=nope.npz,task=2,val_file=False:1",), "nope.npz: no such file"),
        (("zarr=x,cache=dsk:1",), "cache is 'dsk'; nearest: disk"),
        (("zarr=x,fill_missing=maybe:1",), "fill_missing is 'maybe', expected true or false"),
        (("rows:0.5", "rows,wide=2:0.5"), r"'action' has shape \(1,\) in 0-rows, \(2,\) in 1-rows"),
    ],
)
def test_bad_input_sources_that_make_no_sense(sources: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        MixtureDataset(sources).build()
    assert "\n" not in str(error.value)


def test_names_that_end_in_numbers_are_names_where_they_are_in_another_order() -> None:
    """joint.1 before joint.0; but joint.0 and joint.1, or flattened ones, tell no more than their places."""

    def source(names: list[str]) -> Episodes:
        columns, at, after = {"action": torch.tensor([[1.0, 2.0]])}, torch.tensor([0]), torch.tensor([-1])
        return Episodes("x", torch.tensor([1]), columns, {}, at, after, names={"action": names})

    for names, wanted in ((["joint.1", "joint.0"], [2.0, 1.0]), (["1", "0"], [2.0, 1.0]), (["a.0", "b.0"], [1.0, 2.0])):
        plain = [name.replace("1", "x").replace("0", "1").replace("x", "0") for name in names]
        sources = {"first": source(plain), "second": source(names)}
        align(sources, by_place=False)
        assert sources["second"].columns["action"].tolist() == [wanted], names


def test_transitions_of_a_mixture_are_those_of_its_sources() -> None:
    sources = (f"{FIXTURES}/lerobot_v30_image:0.5", f"{FIXTURES}/d4rl/push.hdf5:0.5")
    dataset = MixtureDataset(sources, validation=0).build()["dataset"].mapped(lambda source: source.transitions())
    assert dataset.sizes == [214, 215]
    batch = dataset.get_batch(torch.arange(len(dataset)))
    assert {"reward", "terminated", "truncated", "next.observation.state", "action"} <= set(batch)
