"""Episodes, windows, the validation split, Meta-World demonstrations and LeRobot folders."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from components import UserError
from components.data import features
from components.data.normalisation import statistics
from components.datasets.episodes import EpisodeDataset, build_episodes, from_columns, held_out_episodes
from components.datasets.lerobot import LeRobotDataset
from components.datasets.metaworld import MetaWorldDemonstrations
from conftest import FIXTURES, everything

LEROBOT = FIXTURES / "lerobot_v30_image"


def dataset(obs_steps: int, action_steps: int) -> EpisodeDataset:
    """Two episodes of 3 and 2 steps; row i holds state i and action 10 i."""
    rows = torch.arange(5.0)[:, None]
    episodes = from_columns({"observation.state": rows, "action": 10 * rows}, torch.tensor([3, 5]), "rows")
    return EpisodeDataset(episodes, None, obs_steps, action_steps)


# ---- windows -------------------------------------------------------------------------------------------------------


def test_history_repeats_the_first_observation_and_chunks_the_last_action() -> None:
    batch = dataset(3, 2).get_batch(torch.arange(5))
    assert batch["observation.state"].squeeze(-1).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 3, 4]]
    assert batch["action"].squeeze(-1).tolist() == [[0, 10], [10, 20], [20, 20], [30, 40], [40, 40]]
    assert batch["action_is_pad"].tolist() == [
        [False, False],
        [False, False],
        [False, True],
        [False, False],
        [False, True],
    ]


def test_single_steps_have_no_time_axis() -> None:
    item = dataset(1, 1)[4]
    assert item["observation.state"].tolist() == [4.0] and item["action"].tolist() == [40.0]
    assert "action_is_pad" not in item


@pytest.mark.parametrize(("obs_steps", "action_steps"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_the_fast_path_gives_what_a_plain_loader_gives(obs_steps: int, action_steps: int) -> None:
    data = dataset(obs_steps, action_steps)
    batch = next(iter(DataLoader(data, batch_size=5)))
    fast = data.get_batch(torch.arange(5))
    assert batch.keys() == fast.keys()
    assert all(torch.equal(batch[key], fast[key]) for key in fast)


def test_an_episode_shorter_than_the_window_is_padded_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"observation.state": torch.randn(3, 2), "action": torch.randn(3, 1)}
    with caplog.at_level("INFO", logger="components"):
        built = build_episodes(columns, torch.tensor([3]), "short", action_steps=8, validation=0)
    assert built["dataset"][0]["action_is_pad"].tolist() == [False] * 3 + [True] * 5
    assert [r.message for r in caplog.records] == [
        "short: 1 episodes are shorter than the window of 8 steps; they are padded"
    ]


def test_fewer_held_out_episodes_than_asked_for_are_said(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"observation.state": torch.randn(40, 2), "action": torch.randn(40, 1)}
    with caplog.at_level("INFO", logger="components"):
        built = [build_episodes(columns, torch.arange(5, 41, 5), "half", validation=v) for v in (0.5, 0.1, 0)]
    assert [len(one.get("validation", ())) for one in built] == [5, 5, 0]
    (record,) = caplog.records
    assert record.message.startswith("half: --dataset.validation 0.5: 1 of 8 episodes held out")


# ---- validation split and statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "fraction", "episodes"),
    [
        ([10] * 50, 0.1, 5),
        ([10] * 3, 0.1, 0),
        ([10] * 5, 0.1, 1),
        ([64, 63, 58, 30], 0.1, 1),
        ([10] * 50, 0.9, 10),
        ([10] * 50, 0.0, 0),
    ],
)
def test_the_split_takes_one_in_ten_and_never_more_than_a_fifth(
    lengths: list[int], fraction: float, episodes: int
) -> None:
    for seed in range(5):
        held_out = held_out_episodes(torch.tensor(lengths), fraction, seed)
        assert int(held_out.sum()) == episodes
        assert 5 * int(torch.tensor(lengths)[held_out].sum()) <= sum(lengths)


def test_statistics_are_those_of_the_training_episodes() -> None:
    columns = {"observation.state": torch.randn(100, 2), "action": torch.randn(100, 1), "reward": torch.randn(100)}
    built = build_episodes(columns, torch.arange(10, 101, 10), "data", seed=1)
    train = built["dataset"].get_batch(torch.arange(90))
    assert len(built["dataset"]) == 90 and len(built["validation"]) == 10
    assert built["norm_stats"] == {key: statistics(train[key]) for key in ("observation.state", "action")}


@pytest.mark.parametrize("rows", [1, 2, 3, 150])
def test_statistics_are_numpys(rows: int) -> None:
    """Also of one row, and with quantiles between two of them; a value that nearly all rows have is both quantiles."""
    values = torch.cat([torch.randn(rows, 2), torch.arange(rows)[:, None] == rows // 2], 1).float()
    x, found = values.numpy().astype(np.float64), statistics(values)
    expected: dict[str, Any] = {name: getattr(x, name)(0) for name in ("mean", "std", "min", "max")}
    expected |= {"q01": np.quantile(x, 0.01, axis=0), "q99": np.quantile(x, 0.99, axis=0)}
    if rows == 150:
        expected["q99"][2] = 0
    for name, value in expected.items():
        assert np.allclose(found[name], value, rtol=1e-12, atol=1e-12), name


def test_episodes_of_a_plugin_are_kept_as_those_of_files() -> None:
    """Pictures of floats with the channels last, poses, and a number a step."""
    pictures = torch.randint(0, 256, (5, 6, 7, 3), dtype=torch.uint8)
    columns = {"observation.images.front": pictures / 255, "observation.pose": torch.rand(5, 4, 4)}
    columns |= {"observation.height": torch.rand(5), "action": torch.rand(5, 1, 2)}
    built = build_episodes(dict(columns), torch.tensor([3, 5]), "data", validation=0)
    batch = everything(built)
    assert torch.equal(batch["observation.images.front"], pictures.permute(0, 3, 1, 2))
    for key, width in (("observation.pose", 16), ("observation.height", 1), ("action", 2)):
        assert (
            torch.equal(batch[key], columns[key].reshape(5, width)) and len(built["norm_stats"][key]["mean"]) == width
        )
    assert built["dataset"].episodes.names["observation.pose"][4:6] == ["pose.1.0", "pose.1.1"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_counted_and_located(bad: float) -> None:
    columns = {"observation.state": torch.randn(5, 2), "action": torch.randn(5, 1)}
    columns["action"][3:] = bad
    with pytest.raises(UserError, match=r"data: 2 NaN or Inf values in 'action', first in episode 1 at step 0"):
        build_episodes(columns, torch.tensor([3, 5]), "data")
    with pytest.raises(UserError, match=r"1 NaN or Inf values in 'x', first at item 2"):
        features.check_dataset([{"x": torch.tensor([bad if i == 2 else 0.0, 1.0])} for i in range(4)], "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs_steps": 0}, "must be 1 or more"),
        ({"validation": 1.0}, "must be a fraction"),
        ({"action_steps": -1}, "1 or more"),
    ],
)
def test_windows_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_episodes({"action": torch.zeros(3, 1)}, torch.tensor([3]), "data", **options)


def test_what_a_dataset_tells_beside_shapes_is_checked() -> None:
    class Telling(list):
        facts: Any = {"action": {"names": ("x", "y"), "fps": 30}}

    data = {"dataset": Telling([{"action": torch.zeros(2)}]), "norm_stats": {}}
    assert features.describe_data(data, "mine")["action"] == {
        "shape": (2,), "dtype": "float32", "names": ["x", "y"], "fps": 30
    }  # fmt: skip
    for facts in (3, None, {"action": None}, {"action": {"shape": (9,)}}, {"action": {"fps": math.nan}}, {"a": len}):
        Telling.facts = facts
        with pytest.raises(UserError, match="the attribute facts of Telling is not such as") as error:
            features.describe_data(data, "mine")
        assert "\n" not in str(error.value)


def test_a_dataset_must_be_map_style_and_hold_something() -> None:
    with pytest.raises(UserError, match="map-style"):
        features.check_dataset(iter([1]), "data")
    with pytest.raises(UserError, match="empty"):
        features.check_dataset([], "data")
    with pytest.raises(UserError, match="empty"):
        build_episodes({"action": torch.zeros(0, 1)}, torch.zeros(0, dtype=torch.int64), "data")


# ---- Meta-World ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demonstrations_are_seeded_cached_and_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    def columns(**options: object) -> dict[str, torch.Tensor]:
        return everything(MetaWorldDemonstrations(demos=3, validation=0, **options).build(params={}))  # type: ignore[arg-type]

    one = columns(cache_dir=str(tmp_path))
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].name.startswith("metaworld-push-v3-3-")
    for again in (columns(cache_dir=str(tmp_path)), columns(cache_dir=""), columns(cache_dir="", workers=2)):
        assert all(torch.equal(one[key], again[key]) for key in one)
    other = columns(cache_dir="", seed=1)
    assert not torch.equal(one["observation.state"][0], other["observation.state"][0])
    assert one["action"].abs().max() <= 1 and one["observation.state"].shape[1] == 39
    assert int(one["terminated"].sum()) == 3 and not one["truncated"].any()  # each ends at its first success
    files[0].write_bytes(files[0].read_bytes()[:100])  # a damaged cache is made again
    assert torch.equal(columns(cache_dir=str(tmp_path))["action"], one["action"])
    assert [path.name for path in tmp_path.iterdir()] == [files[0].name]  # and nothing half-written stays


def test_successors_never_cross_an_episode(tmp_path: Path) -> None:
    columns = everything(MetaWorldDemonstrations(demos=2, validation=0, cache_dir="").build())
    inside = ~columns["terminated"][:-1]
    following = columns["next.observation.state"][:-1]
    assert torch.equal(following[inside], columns["observation.state"][1:][inside])
    assert not torch.equal(following[~inside], columns["observation.state"][1:][~inside])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "push-v4"}, "no task 'push-v4'; nearest: push-v3"),
        ({"demos": 0}, "demos 0 must be 1 or more"),
        ({"max_episode_steps": 501}, "1 to 500"),
        ({"demos": 1, "max_episode_steps": 5}, "solved 0 of 25 goals within 5 steps, 1 were wanted"),
    ],
)
def test_demonstrations_that_cannot_be_made(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MetaWorldDemonstrations(cache_dir="", **options).build()


# ---- LeRobot -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LEROBOT, tmp_path / "data"))


def test_lerobot_gives_the_rows_that_were_recorded() -> None:
    """The folder was written by lerobot 0.4.4 from the arrays in `push.npz`."""
    built = LeRobotDataset(path=str(LEROBOT), validation=0).build()
    rows = np.load(LEROBOT.parent / "push.npz")
    assert len(built["dataset"]) == 215
    assert built["dataset"].episodes.ends.tolist() == [64, 127, 185, 215]
    batch = built["dataset"].get_batch(torch.arange(215))
    assert not [key for key in batch if "images" in key]  # only for cameras that are asked for
    assert np.array_equal(batch["observation.state"].numpy(), rows["observation"].astype(np.float32))
    assert np.array_equal(batch["action"].numpy(), rows["action"].astype(np.float32))


def test_lerobot_split_and_windows() -> None:
    built = LeRobotDataset(path=str(LEROBOT), obs_steps=2, action_steps=8).build()
    assert len(built["dataset"]) == 185 and len(built["validation"]) == 30  # the one episode within a fifth of the rows
    assert built["dataset"][0]["observation.state"].shape == (2, 39)
    assert built["dataset"][0]["action"].shape == (8, 4)


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage(root: Path, kind: str) -> None:
    """Break a dataset in one way."""
    data = root / "data" / "chunk-000" / "file-000.parquet"
    info = json.loads((root / "meta" / "info.json").read_text())
    if kind == "no info":
        (root / "meta" / "info.json").unlink()
    elif kind == "torn info":
        (root / "meta" / "info.json").write_text("{")
    elif kind == "v1.6":
        edit_info(root, codebase_version="v1.6")
    elif kind == "v1":
        (root / "meta").rename(root / "meta_data")
    elif kind == "truncated":
        data.write_bytes(data.read_bytes()[:2000])
    elif kind == "missing":
        data.unlink()
    elif kind == "no episodes":
        shutil.rmtree(root / "meta" / "episodes")
    elif kind == "outside":
        edit_info(root, data_path="../../{chunk_index}/{file_index}.parquet")
    elif kind == "absolute":
        edit_info(root, data_path="/etc/passwd")
    elif kind == "width":
        info["features"]["action"]["shape"] = [7]
        edit_info(root, features=info["features"])
    elif kind == "no action":
        del info["features"]["action"]
        edit_info(root, features=info["features"])
    elif kind in ("fewer rows", "nan"):
        import pyarrow.parquet as pq

        table = pq.read_table(data)
        if kind == "nan":
            state = table["observation.state"].to_pylist()
            state[70][3] = float("nan")
            table = table.set_column(table.schema.get_field_index("observation.state"), "observation.state", [state])
        pq.write_table(table.slice(0, 100) if kind == "fewer rows" else table, data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no info", "no meta/info.json in it"),
        ("torn info", r"info.json: damaged"),
        ("v1.6", "version v1.6; this reader knows .*; LeRobot's scripts convert it: convert_dataset_v1_to_v2.py"),
        ("v1", "a LeRobotDataset v1, which is not read; LeRobot's scripts convert it"),
        ("truncated", r"file-000.parquet: truncated or damaged"),
        ("missing", r"file-000.parquet: missing"),
        ("no episodes", "no episodes"),
        ("outside", "points outside the dataset"),
        ("absolute", "points outside the dataset"),
        ("width", r"column 'action' has rows of width 4, but meta/info.json says 7"),
        ("no action", "no feature .action.; name it with --dataset.rename OLD=action; found: observation.state"),
        ("fewer rows", "100 rows, but the list of episodes promises 215"),
        ("nan", r"1 NaN or Inf values in 'observation.state', first in episode 1 at step 6"),
    ],
)
def test_a_damaged_lerobot_folder_gets_one_line(lerobot: Path, kind: str, message: str) -> None:
    damage(lerobot, kind)
    with pytest.raises(UserError, match=message) as error:
        LeRobotDataset(path=str(lerobot)).build()
    assert "\n" not in str(error.value)


def test_lerobot_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of --dataset.path and --dataset.repo-id is needed"):
        LeRobotDataset().build()
    with pytest.raises(UserError, match="no such file or folder"):
        LeRobotDataset(path=str(tmp_path / "nope")).build()
