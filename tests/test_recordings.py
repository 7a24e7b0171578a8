"""What a recording is used as: its episodes, the texts of its tasks, its times and the names of its dimensions."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components import UserError
from components.contracts import Window
from components.datasets import convert
from components.datasets.episodes import choose_episodes
from components.datasets.mixture import MixtureDataset
from components.datasets.transitions import transitions
from conftest import FIXTURES, build, everything
from test_formats import make_d4rl, make_robomimic

OPPOSITE = ["open the drawer", "close the drawer"]


def write_lerobot(
    root: Path,
    *,
    version: str = "v3.0",
    lengths: tuple[int, ...] = (6, 4, 5),
    numbers: tuple[int, ...] = (0, 1, 2),
    tasks: tuple[int, ...] = (0, 1, 0),
    texts: Any = None,
    names: Any = None,
    fps: Any = 10,
    times: Any = None,
    said: Any = None,
) -> Path:
    """A LeRobotDataset whose action is (row, -row), with the task's text; `texts` is written as meta/tasks as it is."""
    (root / "meta").mkdir(parents=True)
    tables, listed, index = [], [], 0
    said = said or [[OPPOSITE[task]] for task in tasks]
    for length, number, task, own in zip(lengths, numbers, tasks, said, strict=True):
        rows = np.arange(index, index + length, dtype=np.float32)
        both = pa.FixedSizeListArray.from_arrays(pa.array(np.stack([rows, -rows], 1).ravel()), 2)
        columns = {"observation.state": both, "action": both, "timestamp": np.float32(np.arange(length) / 10)}
        columns |= {"episode_index": np.full(length, number), "index": rows.astype(int)}
        tables.append(pa.table(columns | {"task_index": np.full(length, task)}))
        listed.append({"episode_index": number, "length": length, "tasks": own})
        listed[-1] |= {"data/chunk_index": 0, "data/file_index": 0} if version == "v3.0" else {}
        index += length
    if times is not None:
        tables[1] = tables[1].set_column(2, "timestamp", pa.array(np.asarray(times, np.float32)))
    v3 = version == "v3.0"
    path = "data/chunk-000/" + ("file-{file_index:03d}" if v3 else "episode_{episode_index:06d}") + ".parquet"
    (root / path).parent.mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [2], "names": names}
    features = {"observation.state": vector | {"names": None}, "action": vector}
    features |= {key: {"dtype": "int64", "shape": [1], "names": None} for key in ("episode_index", "task_index")}
    info = {"codebase_version": version, "fps": fps, "features": features, "data_path": path}
    (root / "meta/info.json").write_text(json.dumps(info))
    if v3:
        pq.write_table(pa.concat_tables(tables), root / path.format(file_index=0))
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(listed), root / "meta/episodes/chunk-000/file-000.parquet")
        if texts is not None:
            table = texts if isinstance(texts, pa.Table) else pa.Table.from_pylist(texts)
            pq.write_table(table, root / "meta/tasks.parquet")
    else:
        for table, number in zip(tables, numbers, strict=True):
            pq.write_table(table, root / path.format(episode_index=number))
        (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, listed)))
        if texts is not None:
            (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return root


LISTED = [{"task_index": i, "task": text} for i, text in enumerate(OPPOSITE)]


# ---- the episodes that are chosen ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), [3, 5, 6, 9]),
        (("3:6",), [3, 5]),
        ((":6", "9"), [3, 5, 9]),
        (("!5",), [3, 6, 9]),
        (("4:", "!6"), [5, 9]),
        (("4: !6",), [5, 9]),
        (("-1",), [9]),
        (("-2:",), [6, 9]),
        ((":-1", "!:5"), [5, 6]),
        (("9", "3", "3"), [3, 9]),
        ((5,), [5]),
    ],
)
def test_episodes_are_named_by_the_datas_own_numbers(words: tuple[Any, ...], expected: list[int]) -> None:
    numbers = [3, 5, 6, 9]
    assert [numbers[place] for place in choose_episodes(words, numbers, "it")] == expected


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("4", "there is no such episode"),
        ("0:3", "there is no such episode"),
        ("3:11", "there is no episode 10"),
        ("-5:", "there is no episode -5, counted from the end"),
        ("6:3", "there is no such episode"),
        ("!4", "there is no such episode"),
        ("!:", "no episode is left"),
        ("3 !3", "no episode is left"),
        ("0:4:2", "expected a number, a range such as 0:40, or !7 to leave one out"),
        ("first", "expected a number, .*"),
        ("", "expected a number, .*"),
        ("9" * 5000, "expected a number, .*"),
    ],
)
def test_bad_input_of_episodes_says_how_many_there_are(word: str, why: str) -> None:
    with pytest.raises(UserError, match=f"--dataset.episodes .*: {why}; it has 4 episodes, 3 to 9$"):
        choose_episodes((word,), [3, 5, 6, 9], "it")


@pytest.mark.parametrize(
    ("path", "camera"),
    [
        ("lerobot_v21_video", "corner2"),
        ("lerobot_v30_image", "corner2"),
        ("minari/metaworld/push-pixels-arrow-v0", "camera"),
        ("minari/metaworld/push-state-hdf5-v0", ""),
        ("robomimic/push_image.hdf5", "agentview"),
        ("zarr/push_replay.zarr", "img"),
        ("d4rl/push_no_next_no_timeouts.hdf5", ""),
    ],
)
def test_chosen_episodes_are_those_of_the_whole_in_every_format(path: str, camera: str, tmp_path: Path) -> None:
    """Rows, successors and pictures, also decoded to a disk that has those of another choice."""
    cameras, cache = ((camera,) if camera else ()), {"cache": "disk", "cache_dir": str(tmp_path)}
    whole = everything(build(path, validation=0, cameras=cameras))
    lengths = [64, 63, 58, 30]
    for words, kept in ((("1:", "!2"), (1, 3)), (("0", "3"), (0, 3))):
        some = build(path, validation=0, cameras=cameras, episodes=words, **cache)
        rows = torch.cat([torch.arange(sum(lengths[:k]), sum(lengths[: k + 1])) for k in kept])
        for key, value in everything(some).items():
            wanted = whole[key][rows] if isinstance(value, torch.Tensor) else [whole[key][row] for row in rows.tolist()]
            assert torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted, (words, key)
        assert some["norm_stats"]["action"]["mean"] == pytest.approx(whole["action"][rows].double().mean(0).tolist())
        assert some["dataset"].episodes.numbers == list(kept)
    with pytest.raises(UserError, match=r"--dataset.episodes 4: there is no such episode; .* has 4 episodes, 0 to 3"):
        build(path, episodes=("4",))


def test_files_of_episodes_that_are_not_chosen_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(shutil.copytree(FIXTURES / "lerobot_v21_video", tmp_path / "push"))
    for number in (0, 2):
        for file in root.rglob(f"episode_{number:06d}.*"):
            file.unlink()
    built = build(root, cameras=("corner2",), episodes=("1", "3"), validation=0)
    assert len(built["dataset"]) == 93
    with pytest.raises(UserError, match="episode_000002.parquet: missing"):
        build(root, episodes=("1:",))
    # Nor are they downloaded.
    import huggingface_hub

    from components.datasets.lerobot import LeRobotDataset

    asked: list[list[str]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: (asked.append(options["allow_patterns"]), root)[1]
    )
    LeRobotDataset(repo_id="lerobot/push", cameras=("corner2",), episodes=("1",)).build()
    video = "videos/chunk-000/observation.images.corner2/episode_000001.mp4"
    assert asked == [["meta/*"], ["meta/*", "data/chunk-000/episode_000001.parquet", video]]


def test_masks_own_splits_and_commands_follow_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import h5py

    path = make_robomimic(tmp_path / "a.hdf5", [2, 3, 4, 5])
    with h5py.File(path, "a") as file:
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0", b"demo_2"]), np.array([b"demo_3"])
    built = build(path, split="train", episodes=("1:",))
    assert built["dataset"].values("action").flatten().tolist() == [5, 6, 7, 8]
    assert built["validation"].values("action").flatten().tolist() == [9, 10, 11, 12, 13]
    with pytest.raises(UserError, match=r"episodes 1: there is no such .* \(mask/train\) has 3 episodes, 0 to 3"):
        build(path, split="train", episodes=("1",))
    maze = FIXTURES / "ogbench/pointmaze-medium-navigate-mini.npz"  # with a file of held-out episodes beside it
    whole, one = build(maze), build(maze, episodes=("-1",))
    assert len(one["validation"]) == len(whole["validation"]) and len(one["dataset"]) < len(whole["dataset"])
    assert torch.equal(everything(one)["action"], everything(whole)["action"][-len(one["dataset"]) :])
    dest = str(tmp_path / "copy")
    assert convert.main([str(FIXTURES / "d4rl/push.hdf5"), dest, "--dataset.episodes", "-2:", "!-1"]) == 0
    assert build(dest, validation=0)["dataset"].episodes.ends.tolist() == [58]
    sources = [f"{FIXTURES}/d4rl/push.hdf5,episodes={words}:0.5" for words in ("0:3 !1", "3")]
    assert len(MixtureDataset(tuple(sources), validation=0).build()["dataset"]) == 64 + 58 + 30


# ---- LeRobot's versions, tasks and times ---------------------------------------------------------------------------


def test_version_2_0_is_read_as_2_1(tmp_path: Path) -> None:
    """It has the statistics of the whole in place of those of each episode; neither is used."""
    root = Path(shutil.copytree(FIXTURES / "lerobot_v21_video", tmp_path / "push"))
    (root / "meta/episodes_stats.jsonl").unlink()
    (root / "meta/stats.json").write_text("{}")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    one, two = (build(path, validation=0, cameras=("corner2",)) for path in (root, "lerobot_v21_video"))
    assert one["norm_stats"] == two["norm_stats"] and one["dataset"].tasks == two["dataset"].tasks
    for key, value in everything(one).items():
        other = everything(two)[key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key


def pandas_table(index: str) -> pa.Table:
    """As LeRobot v3.0 writes the tasks: their texts are the index, of whatever name."""
    table = pa.table({"category": ["drawer"] * 2, "task_index": [0, 1], index: OPPOSITE})
    return table.replace_schema_metadata({"pandas": json.dumps({"index_columns": [index]})})


@pytest.mark.parametrize(
    ("version", "texts"),
    [
        ("v2.1", [{"category": "drawer", **row} for row in LISTED]),
        ("v2.1", [*LISTED, {"task_index": 7, "task": "never done"}]),
        ("v3.0", [{"category": "drawer", **row} for row in LISTED]),
        ("v3.0", pandas_table("__index_level_0__")),
        ("v3.0", pandas_table("task")),
        ("v3.0", pandas_table("what to do")),
        ("v3.0", None),  # each episode's own text
        ("v2.1", None),
    ],
)
def test_the_text_of_a_task_is_in_its_own_column(version: str, texts: Any, tmp_path: Path) -> None:
    dataset = build(write_lerobot(tmp_path / "a", version=version, texts=texts), validation=0)["dataset"]
    assert list(dataset.tasks) == OPPOSITE
    assert dataset.get_batch(torch.tensor([0, 6, 14]))["task"] == [OPPOSITE[i] for i in (0, 1, 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"said": [["a", "b"], ["b"], ["a", "b"]], "texts": None},
            "task 0 of the data has no text in the list of tasks, which",
        ),
        ({"said": [["a"], ["b"], ["c"]], "texts": None}, "has two texts for task 0: 'a' and 'c'"),
        ({"texts": LISTED[:1]}, "task 1 of the data has no text in the list of tasks$"),
        ({"texts": [*LISTED, LISTED[1]]}, "two tasks have the number 1, 'close the drawer' and"),
        ({"texts": [{"task_index": 0, "task": 3}]}, "a task has the number 0 and the text 3; expected both"),
        ({"texts": [{"task_index": None, "task": "a"}]}, "a task has the number None and the text 'a'"),
        ({"texts": [{"task_index": 0, "category": "a"}]}, "no column 'task' with the texts, and no pandas index"),
        ({"texts": [{"task_index": 0, "category": "a"}], "version": "v2.1"}, "has the number 0 and the text None"),
        ({"fps": 0}, "fps is 0; expected frames a second"),
        ({"fps": -30}, "fps is -30"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"fps": "30"}, "fps is '30'"),
        ({"fps": None}, "fps is None"),
        ({"fps": 30}, "steps 0 and 1 are 0.1 s apart; at 30 fps .* expected 0.0333333$"),
        ({"times": [0, 0.1, np.nan, 0.3]}, "episode 1: the timestamp of step 2 is nan"),
        ({"times": [0, 0.1, np.inf, 0.3]}, "episode 1: the timestamp of step 2 is inf"),
        (
            {"times": [0, 0.2, 0.1, 0.3]},
            "steps 0 and 1 are 0.2 s apart; .*; --dataset.episodes '!1' leaves out",
        ),
        ({"times": [0.3, 0.2, 0.1, 0.0]}, "episode 1: the timestamps of steps 0 and 1 are -0.1 s apart"),
    ],
)
def test_bad_input_of_tasks_and_times(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "a", **{"texts": LISTED} | changes)
    with pytest.raises(UserError, match=message) as error:
        build(root)
    assert "\n" not in str(error.value)


def test_texts_of_robomimics_demonstrations_are_their_tasks(tmp_path: Path) -> None:
    """RoboCasa's of each demonstration, LIBERO's of the file."""
    import h5py

    path = make_robomimic(tmp_path / "a.hdf5", [2, 3])
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "stack"})
        file["data/demo_1"].attrs["ep_meta"] = json.dumps({"lang": OPPOSITE[1]})
    batch = everything(build(path, validation=0))
    assert batch["task"] == ["stack"] * 2 + [OPPOSITE[1]] * 3
    with h5py.File(path, "a") as file:
        del file["data"].attrs["problem_info"]
    assert "task" not in everything(build(path, validation=0))  # one of them has none


# ---- mixtures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [["up", "left"], {"motors": ["up", "left"]}, {"up": 0, "left": 1}])
def test_dimensions_of_a_mixture_are_in_the_order_of_their_names(
    named: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    each = {"lengths": (6, 4, 2), "texts": LISTED}  # the last one is held out
    one = write_lerobot(tmp_path / "one", names=["left", "up"], **each)
    two = write_lerobot(tmp_path / "two", names=named, **each)
    with caplog.at_level("INFO", logger="components"):
        built = MixtureDataset((f"{one}:0.5", f"{two}:0.5"), validation=0.2).build()
    rows = torch.arange(10.0)
    assert torch.equal(everything(built)["action"][:, 0], torch.cat([rows, -rows]))  # left; (row, -row) is stored
    assert built["validation"].get_batch(torch.arange(4))["action"][:, 0].tolist() == [10, 11, -10, -11]
    assert built["norm_stats"]["action"]["min"] == [-9, -9] and built["norm_stats"]["action"]["max"] == [9, 9]
    said = [r.message for r in caplog.records if "order of" in r.message]
    assert said == ["mixture: 'action' of two is put in the order of one: left, up"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"names": ["left", "down"]}, {}, "of 'action' have different names: 'up' is in one alone, 'down' in two"),
        ({"names": ["left", "down"]}, {"allow_names": True}, None),
        ({"names": None}, {}, None),
        ({"fps": 10.05}, {}, None),
        ({"fps": 12.0}, {}, "one has 10 frames a second, two has 12, so that the same action is another one"),
        ({"fps": 12.0}, {"allow_fps": True}, None),
    ],
)
def test_sources_whose_names_or_rates_differ_are_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    one = write_lerobot(tmp_path / "one", texts=LISTED, names=["left", "up"])
    two = write_lerobot(tmp_path / "two", **{"texts": LISTED, "names": ["left", "up"]} | changes)
    mixture = MixtureDataset((f"{one}:0.5", f"{two}:0.5"), validation=0, **options)
    if message is None:
        batch = everything(mixture.build())
        assert torch.equal(batch["action"][:15], batch["action"][15:])
        return
    with pytest.raises(UserError, match=message) as error:
        mixture.build()
    assert "\n" not in str(error.value)


def test_keys_of_a_state_must_agree_and_tasks_are_not_lost_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = FIXTURES / "robomimic/push_low_dim.hdf5"
    sources = (f"{path},keys=goal robot0_eef_pos:0.5", f"{path},keys=robot0_eef_pos goal:0.5")
    with pytest.raises(UserError, match="observation.state is goal robot0_eef_pos in 0-push_low_dim"):
        MixtureDataset(sources, validation=0).build()
    one = write_lerobot(tmp_path / "one", texts=LISTED)
    two = make_d4rl(tmp_path / "two.hdf5", 4, observations=np.zeros((4, 2)), actions=np.zeros((4, 2)))
    MixtureDataset((f"{one},episodes=0:0.5", f"{two}:0.5"), validation=0).build()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    MixtureDataset((f"{one}:0.5", f"{two}:0.5"), validation=0).build()
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "mixture: two.hdf5 has no texts of tasks, so the 2 tasks of one are not told apart"
    ]


# ---- antmaze -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("antmaze-umaze-v0", {}, True),
        ("data", {"task": "antmaze-large-play-v2"}, True),
        ("antmaze-umaze-v0", {"reward_shift": -1.0}, False),
        ("antmaze-umaze-v0", {"reward_shift": -1.0, "reward_scale": 2.0}, False),
        ("other", {}, False),
    ],
)
def test_antmazes_rewards_of_zero_and_one_are_said_once(
    name: str, options: dict[str, Any], said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = np.arange(9) % 3 == 2
    path = make_d4rl(tmp_path / f"{name}.hdf5", 9, terminals=flags, rewards=flags.astype(np.float32))
    transitions(build(path, validation=0, **options), "iql", Window())
    found = [r.message for r in caplog.records if "antmaze" in r.message]
    assert len(found) == said and all("--dataset.reward-shift -1 each step" in message for message in found)


@pytest.mark.parametrize("name", ["intervention", "complementary_info.is_intervention", "is_intervention"])
@pytest.mark.parametrize("kind", ["bool", "float32", "int64"])
def test_interventions_are_read_by_lerobots_names(name: str, kind: str, tmp_path: Path) -> None:
    """What `lerobot-rollout` writes, and its replay buffer; what is no number is left, and NaN refused."""
    taken = np.arange(15) % 4 == 1
    root = write_lerobot(tmp_path / "a")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path).append_column(name, pa.array(taken.astype(kind)))
    pq.write_table(table, path)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][name] = {"dtype": kind, "shape": [1], "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))
    found = build(root, validation=0)["dataset"].episodes
    assert found.columns["intervention"].tolist() == taken.tolist() and "not used" not in found.stored
    if kind == "float32":
        wrong = np.where(taken, np.nan, 0).astype(kind)
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, pa.array(wrong)), path)
        with pytest.raises(UserError, match=f"{name}.* has shape .*, or NaN or Inf; expected a finite number"):
            build(root, validation=0)
    info["features"][name]["dtype"] = "string"
    (root / "meta/info.json").write_text(json.dumps(info))
    found = build(root, validation=0)["dataset"].episodes
    assert "intervention" not in found.columns and found.stored["not used"] == f"{name} ([1], string)"
