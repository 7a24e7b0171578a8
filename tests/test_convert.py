"""`components.datasets.convert` and `.inspect`: what is written is read back equal, what is shown is there."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import toy
from components import DATASET_BUILDER_REGISTRY, UserError
from components.datasets import convert, inspect
from components.datasets.convert import environment_metadata
from components.datasets.episodes import EpisodeDataset, from_columns
from conftest import FIXTURES, build, everything
from test_formats import FORMATS

SOURCES = ["lerobot-3.0-video", "minari-pixels-arrow", "robomimic-image", "d4rl", "zarr"]
OGBENCH = "ogbench/pointmaze-medium-navigate-mini.npz"


def same(a: dict[str, Any], b: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    """Two batches hold the same, whatever the cameras' names; `but` are keys that only the first has."""
    named = [{("images" if "images" in key else key): value for key, value in batch.items()} for batch in (a, b)]
    assert named[0].keys() - set(but) == named[1].keys() - {"task"}
    for key, value in named[1].items():
        assert torch.equal(value, named[0][key]) if isinstance(value, Tensor) else True, key


# ---- convert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lerobot", "minari"])
@pytest.mark.parametrize("name", [*SOURCES, "ogbench"])
def test_what_is_converted_is_read_back_equal(name: str, form: str, tmp_path: Path) -> None:
    """Rows, pictures, rewards, flags and successors; windows too."""
    path, _, camera, _ = FORMATS.get(name, (OGBENCH, "", "", 0))
    dest = tmp_path / "copy"
    options = ["--dataset.cameras", camera] if camera else []
    assert convert.main([str(FIXTURES / path), str(dest), "--format", form, *options]) == 0
    source = build(path, validation=0, cameras=("all",) if camera else (), obs_steps=2, action_steps=3)
    if camera:
        source = build(path, validation=0, cameras=(camera,), obs_steps=2, action_steps=3)
    copy = build(dest, validation=0, cameras=("all",), obs_steps=2, action_steps=3)
    assert copy["dataset"].episodes.ends.tolist() == source["dataset"].episodes.ends.tolist()
    same(everything(source), everything(copy), ("task",))
    assert copy["norm_stats"] == source["norm_stats"]
    assert not [path.name for path in tmp_path.iterdir() if path != dest]


@pytest.mark.parametrize("form", ["lerobot", "minari"])
def test_names_embeddings_and_stacks_survive(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vector under a camera's name, a stack of more channels than its sides have pixels, names of dimensions."""
    columns = {"observation.images.top.embedding": torch.rand(6, 5), "action": torch.rand(6, 2)}
    columns["observation.images.top.left"] = torch.randint(0, 256, (6, 3, 8, 9), dtype=torch.uint8)
    if form == "minari":
        columns["observation.images.stack"] = torch.randint(0, 256, (6, 12, 8, 8), dtype=torch.uint8)
    episodes = from_columns(dict(columns), torch.tensor([4, 6]), "x")
    episodes.names = {"action": ["left", "right"]}
    episodes.stored["not used"] = "x (text)"
    dest = tmp_path / "copy"
    if form == "minari":
        with pytest.raises(UserError, match="'observation.images.stack' has 12 channels, and LeRobot's pictures"):
            convert.write(episodes, dest, convert.Options(format="lerobot"))
    told = convert.write(episodes, dest, convert.Options(format=form))  # type: ignore[arg-type]
    assert told.endswith("without names of dimensions, for which Minari has no place") == (form == "minari")
    built = build(dest, validation=0, cameras=("all",))
    batch = everything(built)
    assert all(torch.equal(batch[key], value) for key, value in columns.items())
    assert built["dataset"].episodes.names == (episodes.names if form == "lerobot" else {})
    assert inspect.main([str(dest), "--out", str(tmp_path / "page.png")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"observation\.images\.top\.embedding +5 +float32", out)
    assert form == "minari" or re.search(r"\[1\] .* right\n", out)
    assert inspect.summary(episodes, "")[-1] == "not used: x (text)"


def test_minari_opens_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official library, for each of its storages."""
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded = np.load(FIXTURES / "push.npz")
    for storage in ("hdf5", "arrow", "parquet"):
        words = [str(FIXTURES / "robomimic/push_image.hdf5"), str(tmp_path / f"{storage}-v0"), "--format", "minari"]
        assert convert.main([*words, "--storage", storage, "--id", f"{storage}-v0"]) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = minari.load_dataset(f"{storage}-v0")
        assert dataset.total_episodes == 4 and dataset.total_steps == 215
        episode = dataset[1]
        rows = slice(64, 127)
        assert np.array_equal(episode.actions, recorded["action"][rows])
        assert np.array_equal(episode.observations["state"][:-1], recorded["observation"][rows])
        assert np.array_equal(episode.observations["state"][1:], recorded["next_observation"][rows])
        assert np.array_equal(episode.observations["pixels"]["agentview"][:-1], recorded["corner2"][rows])
        assert np.allclose(episode.rewards, recorded["reward"][rows]) and episode.truncations[-1]


def test_the_lerobot_layout_is_the_librarys_field_by_field(tmp_path: Path) -> None:
    """Against the folder that lerobot 0.4.4 wrote from the same episodes."""
    theirs, ours = FIXTURES / "lerobot_v30_image", tmp_path / "push"
    assert convert.main([str(theirs), str(ours), "--dataset.cameras", "corner2", "gripperPOV"]) == 0
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in (theirs, ours)
    ]
    assert names[0] == names[1]
    info = [json.loads((root / "meta/info.json").read_text()) for root in (theirs, ours)]
    features = [part.pop("features") for part in info]
    assert info[0].keys() == info[1].keys()
    for key in info[0].keys() - {"robot_type", "video_path"}:  # what another format does not say
        assert info[0][key] == info[1][key], key
    extra = {"next.terminated", "next.truncated"}  # ours, beside next.done
    assert features[1].keys() - extra == features[0].keys()
    for key in features[0].keys() & features[1].keys():
        assert features[0][key]["dtype"] == features[1][key]["dtype"], key
        assert list(features[0][key]["shape"]) == list(features[1][key]["shape"]), key
    data = [pq.read_table(root / "data/chunk-000/file-000.parquet") for root in (theirs, ours)]
    for field in data[1].schema:
        if field.name not in extra:
            assert data[0].schema.field(field.name).type == field.type, field.name
            if "images" not in field.name:
                assert data[0][field.name].to_pylist() == data[1][field.name].to_pylist(), field.name
    described = [json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] for table in data]
    assert all(described[0][key] == described[1][key] for key in described[0].keys() & described[1].keys())
    episodes = [pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet") for root in (theirs, ours)]
    wanted = set(episodes[0].column_names)
    assert {n for n in episodes[1].column_names if not any(e in n for e in extra)} == wanted
    for name in wanted:
        if not name.startswith("stats/"):
            assert episodes[0][name].to_pylist() == episodes[1][name].to_pylist(), name
        elif "images" not in name:  # those of pictures are of samples
            mine, other = (np.array(table[name].to_pylist(), float).ravel() for table in episodes)
            if "/q" in name:  # the library's are those of a histogram with wide bins
                ends = [f"{name.rsplit('/', 1)[0]}/{end}" for end in ("min", "max")]
                least, most = (np.array(episodes[1][end].to_pylist(), float).ravel() for end in ends)
                assert mine.shape == other.shape and (least <= other).all() and (other <= most).all(), name
            else:  # its deviations of what never changes are up to 1e-3, being computed in float32
                assert np.allclose(mine, other, rtol=1e-4, atol=2e-3), name
    tasks = [pq.read_table(root / "meta/tasks.parquet").to_pylist() for root in (theirs, ours)]
    # The text's column is a pandas index in theirs, of whatever name.
    assert [[set(row.values()) for row in rows] for rows in tasks][0] == [set(row.values()) for row in tasks[1]]
    index = [json.loads(pq.read_schema(root / "meta/tasks.parquet").metadata[b"pandas"]) for root in (theirs, ours)]
    assert all(len(of["index_columns"]) == 1 for of in index) and index[1]["index_columns"] == ["task"]
    stats = [json.loads((root / "meta/stats.json").read_text()) for root in (theirs, ours)]
    assert stats[0].keys() == stats[1].keys() - extra
    for key in ("action", "observation.state"):
        for name in ("mean", "std", "min", "max"):
            assert np.allclose(stats[0][key][name], stats[1][key][name], atol=1e-4), (key, name)


def test_statistics_of_large_pictures_are_those_of_some_pixels() -> None:
    """As LeRobot takes them; of an episode of two cameras at 480 x 640 all of them took 10 s."""
    pictures = np.random.default_rng(0).integers(0, 255, (3, 480, 640, 1), np.uint8)
    assert convert._picture_stats(pictures) == convert._picture_stats(pictures[:, ::4, ::4])
    assert convert._picture_stats(pictures)["mean"][0][0][0] == pytest.approx(pictures.mean() / 255, abs=0.01)
    small = pictures[:, :240, :300]
    assert convert._picture_stats(small)["mean"][0][0][0] == pytest.approx(small.mean() / 255, abs=1e-9)


def test_a_made_dataset_is_written_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In LeRobot's format with the task's instruction, unless another one is given."""
    dest = tmp_path / "push-v0"
    words = ["--dataset", "metaworld", "--dataset.demos", "1", "--dataset.cache-dir", str(tmp_path / "c")]
    for name, told, text in (("a", [], "push the puck to the goal"), ("b", ["--task", "push"], "push")):
        assert convert.main([str(tmp_path / name), *words, *told]) == 0
        assert pq.read_table(tmp_path / name / "meta/tasks.parquet")["task"].to_pylist() == [text]
    capsys.readouterr()
    assert convert.main([str(dest), *words, "--format", "minari"]) == 0
    assert re.search(r"push-v0: 1 episodes, \d+ steps as minari", capsys.readouterr().out)
    assert everything(build(dest, validation=0))["terminated"].sum() == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{push}"], "expected SOURCE DEST"),
        (["{push}", "{push}"], "exists already"),
        (["{push}", "{tmp}/x", "--dataset.state-steps", "2"], "are of what is learnt; this writes"),
        (["{push}", "{tmp}/x", "--format", "minari", "--id", "no id at all"], "Minari does not take it"),
        (["{push}", "{tmp}/x", "--dataset.camera", "x"], "unknown option --dataset.camera; nearest: --dataset.cameras"),
        (["{tmp}/nothing", "{tmp}/x"], "no such file or folder"),
        (["{tmp}/x", "--dataset", "mixture", "--dataset.sources", "{push}:1"], "has no episodes to write"),
        (["{push}", "{tmp}/x", "--dataset", "metaworld"], "--dataset metaworld takes no path"),
    ],
)
def test_bad_input_of_convert(words: list[str], message: str, tmp_path: Path) -> None:
    known = {"push": str(FIXTURES / "lerobot_v30_image"), "tmp": str(tmp_path)}
    with pytest.raises(UserError, match=message) as error:
        convert.main([word.format(**known) for word in words])
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


# ---- inspect -------------------------------------------------------------------------------------------------------


class Odd:
    """Episodes with everything that somebody should look at."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        n = 200
        state, action = torch.randn(n, 6, generator=generator) * 0.1, torch.randn(n, 3, generator=generator) * 0.2
        state = state.cumsum(0) * 0.1
        state[:, 2] = 0.25  # a joint that never moves
        state[131:, 4] += 50.0  # an encoder that jumped
        action[:, 1] = torch.where(action[:, 1] > 0, 1.0, -1.0)
        action[7, 2] = 3.0  # outside of [-1, 1], where all others are
        reward = (torch.arange(n) % 50 == 49).float()
        columns = {"observation.state": state, "action": action, "reward": reward, "terminated": reward.bool()}
        ends = torch.tensor([50, 99, 100, 200])
        episodes = from_columns(columns, ends, "odd")
        return {"dataset": EpisodeDataset(episodes), "norm_stats": {"action": {"mean": [0.0] * 3, "std": [1.0] * 3}}}


DATASET_BUILDER_REGISTRY["odd"] = Odd


def test_inspect_shows_what_looks_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--dataset", "odd", "--out", str(tmp_path / "odd.png")]) == 0
    out = capsys.readouterr().out
    for line in (
        "observation.state[2]: never changes: 0.25",
        "observation.state[4]: jumps by 49.99",
        "at episode 3, step 31",
        "action[1]: takes two values only, -1 and 1; a gripper?",
        "action[2]: 0.5 % of the values are outside",
        "4 episodes, 200 steps",
        "episode lengths: 1 to 100, mean 50, median 49.5",
        "1 episodes have a single step",
        "returns: 0 to 2",
        "the values 0 (196 times), 1 (4 times)",
        "terminated: 3 of 4 episodes, and 1 times within one",
        "the observation after the last action: not known, 4 times",
    ):
        assert line in out, (line, out)
    assert out.count("never changes") == 1 and out.count("jumps") == 1
    width, height, pixels = page(tmp_path / "odd.png")
    assert width > 1000 and height > 300
    assert red(pixels) > 100  # the suspicious ones are red
    episodes = Odd().build()["dataset"].episodes
    episodes.names["action"] = ["shoulder_pan.pos", "n" * 40, "gripper.pos"]
    panels = [panel.name for panel in inspect.page_of(episodes, []).panels if panel.name.startswith("action")]
    assert panels == ["action[0] shoulder_pan.pos", f"action[1] {'n' * 21}", "action[2] gripper.pos"]


def page(path: Path) -> tuple[int, int, np.ndarray]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.width, picture.height, np.asarray(picture.convert("RGB"))


def red(pixels: np.ndarray) -> int:
    return int(((pixels[..., 0] > 190) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)).sum())


def test_inspect_prints_keys_ranges_storage_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = FIXTURES / "lerobot_v30_video"
    assert inspect.main([str(path), "--out", str(tmp_path / "page.png")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"observation\.images\.corner2 +3 x 64 x 64 +uint8 +0 +255", out)
    assert re.search(r"observation\.state +39 +float32 +-0\.13967 +1 +0 +15 of 39", out)
    assert "observation.state[11-17, 29-35]: never changes: 0" in out
    assert "0.4 MB in 7 files" in out or "0.3 MB in 7 files" in out
    assert "5.3 MB of decoded pictures" in out and "'push the puck to the goal'" in out
    stats = build(path)["norm_stats"]["action"]
    assert re.search(rf"\[2\] +{stats['mean'][2]:.5g} +{stats['std'][2]:.5g}", out)
    assert "(185 steps to learn from, 30 held out" in out
    # The film strip has the pictures of the episode: many colours above, few below.
    _, height, pixels = page(tmp_path / "page.png")
    colours = [len(np.unique(part.reshape(-1, 3), axis=0)) for part in (pixels[: height // 4], pixels[height // 2 :])]
    assert colours[0] > 5 * colours[1]


def test_inspect_shows_data_that_a_training_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import h5py

    path = tmp_path / "a.hdf5"
    state = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    state[40, 1] = np.nan
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"], file["rewards"] = state, state, np.zeros(60)
        file["terminals"] = np.arange(60) % 30 == 29
    assert inspect.main([str(path), "--out", str(tmp_path / "page.png")]) == 0
    out = capsys.readouterr().out
    assert "observation.state[1]: 1 NaN or Inf" in out and "action[1]: 1 NaN or Inf" in out
    assert "a training would refuse this data" in out and "first in episode 1 at step 10" in out


def test_inspect_takes_mixtures_and_plain_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [f"{FIXTURES}/lerobot_v30_image:0.7", f"{FIXTURES}/d4rl/push.hdf5:0.3"]
    assert (
        inspect.main(["--dataset", "mixture", "--dataset.sources", *sources, "--out", str(tmp_path / "mix.png")]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix-lerobot_v30_image.png", "mix-push.hdf5.png"]
    assert inspect.main(["--dataset", "minimal_data", "--out", str(tmp_path / "plain.png")]) == 0
    assert "the first 64 of 64 items, which have no episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which dataset"),
        (["x.hdf5", "--dataset", "metaworld"], "--dataset metaworld takes no path"),
        (["--dataset", "minary"], "minary.*nearest: minari"),
        (["x", "--out", "/nowhere/x.png"], "no such file or folder|--out"),
    ],
)
def test_bad_input_of_inspect(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect.main(words)


def test_what_minari_is_told_of_an_environment() -> None:
    """A class as the words that name it; nothing where JSON has none; and the registry stays as it is."""
    env = {"name": "gymnasium", "id": "TendonToy-v0", "max_episode_steps": 5, "kwargs": ""}
    told = json.loads(environment_metadata(env)["env_spec"])
    assert told["entry_point"] == "toy:ToyEnv" and told["max_episode_steps"] == 5
    assert gym.spec("TendonToy-v0").entry_point is toy.ToyEnv and gym.spec("TendonToy-v0").max_episode_steps is None
    gym.register("TendonUntold-v0", entry_point=toy.ToyEnv, kwargs={"made": object()})
    assert environment_metadata(env | {"id": "TendonUntold-v0"}) == {}
