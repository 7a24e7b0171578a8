"""Pictures: decoded lazily or once into a store, by workers or not, and changed at random on the device."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components import UserError, load_policy
from components.data.augmentation import Augmentation, uniform
from components.data.batches import Batches
from components.datasets import frames
from components.datasets.lerobot import LeRobotDataset
from conftest import FIXTURES, build, difference, learned, states, weights

Script = Callable[..., Path]
KEY = "observation.images.corner2"
STORED = {
    "lerobot_v30_video": "corner2",
    "lerobot_v21_image": "corner2",
    "robomimic/push_image.hdf5": "agentview",
    "minari/metaworld/push-pixels-hdf5-v0": "camera",
    "zarr/push_replay.zarr.zip": "img",
}


def images(dataset: Any, rows: Tensor) -> Tensor:
    batch = dataset.get_batch(rows)
    return next(value for key, value in batch.items() if key.startswith("observation.images."))


# ---- stores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED)
def test_a_store_holds_what_is_decoded_lazily(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = torch.randperm(215, generator=torch.Generator().manual_seed(0))[:64]
    options: dict[str, Any] = {"cameras": (STORED[name],), "validation": 0, "cache_dir": str(tmp_path)}
    lazy = build(name, **options)["dataset"]
    assert not lazy.resident
    wanted = images(lazy, rows)
    with caplog.at_level("INFO", logger="components"):
        for cache in ("memory", "disk"):
            dataset = build(name, cache=cache, **options)["dataset"]
            assert dataset.resident and torch.equal(images(dataset, rows), wanted), cache
    told = [record.message for record in caplog.records if "decoding" in record.message]
    assert len(told) == 2 and all("2.6 MB" in line or "2.7 MB" in line for line in told), told
    assert "into memory" in told[0] and str(tmp_path) in told[1]
    # The second run maps the file of the first one, and decodes nothing.
    camera = next(store for key, store in lazy.episodes.observations.items() if "images" in key)
    monkeypatch.setattr(type(camera), "decode", None)
    assert torch.equal(images(build(name, cache="disk", **options)["dataset"], rows), wanted)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "lerobot_v30_video", tmp_path / "video"))


def stores(folder: Path) -> list[Path]:
    return sorted(folder.glob("frames-*.u8"))


def test_a_store_that_is_damaged_or_out_of_date_is_made_again(video: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    factory = LeRobotDataset(path=str(video), cameras=("corner2",), cache="disk", cache_dir=str(folder))
    wanted = images(factory.build()["dataset"], torch.arange(9))
    (store,) = stores(folder)
    store.write_bytes(store.read_bytes()[:1000])
    assert torch.equal(images(factory.build()["dataset"], torch.arange(9)), wanted)
    file = next(path for path in video.rglob("*.mp4") if "corner2" in str(path))
    shutil.copy(next(path for path in video.rglob("*.mp4") if "gripper" in str(path)), file)
    other = images(factory.build()["dataset"], torch.arange(9))
    assert not torch.equal(other, wanted) and len(stores(folder)) == 2
    gripper = LeRobotDataset(path=str(video), cameras=("gripperPOV",)).build()["dataset"]
    assert torch.equal(other, images(gripper, torch.arange(9)))


def test_a_run_that_dies_while_decoding_leaves_no_store(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    factory = LeRobotDataset(path=str(video), cameras=("corner2",), cache="disk", cache_dir=str(folder))
    monkeypatch.setattr(frames, "AT_ONCE", 50)
    whole, calls = frames.VideoFrames.decode, iter(range(99))

    def decode(self: Any, rows: np.ndarray, out: np.ndarray) -> None:
        if next(calls) == 2:
            raise MemoryError
        whole(self, rows, out)

    monkeypatch.setattr(frames.VideoFrames, "decode", decode)
    with pytest.raises(MemoryError):
        factory.build()
    assert not stores(folder) and not [path for path in folder.iterdir() if "lock" not in path.name]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_what_does_not_fit_is_refused_before_it_is_decoded(
    cache: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames.VideoFrames, "decode", None)
    monkeypatch.setattr("components.datasets.untrusted.free_memory", lambda: 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=rf"--dataset.cache {cache}: .* 2.6 MB are needed, 1.0 MB .*free") as error:
        LeRobotDataset(path=str(video), cameras=("corner2",), cache=cache, cache_dir=str(tmp_path)).build()
    assert "\n" not in str(error.value) and "--dataset.cache none" in str(error.value)


# ---- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lerobot_v30_video", "robomimic/push_image.hdf5", "zarr/push_replay.zarr"])
def test_workers_give_the_same_batches(name: str) -> None:
    dataset = build(name, cameras=(STORED.get(name, "img"),), obs_steps=2, validation=0)["dataset"]
    plain = Batches(dataset, 16, seed=3, workers=0).stream(5)
    loaded = Batches(dataset, 16, seed=3, workers=2).stream(5)
    halves = [Batches(dataset, 16, seed=3, rank=rank, world=2, workers=1).stream(5) for rank in (0, 1)]
    for _ in range(4):
        wanted, found = next(plain), next(loaded)
        both = [next(half) for half in halves]
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                assert torch.equal(found[key], value) and torch.equal(torch.cat([b[key] for b in both]), value), key
    assert next(plain)[next(key for key in wanted if "images" in key)].shape == (16, 2, 3, 64, 64)


def test_a_picture_that_is_damaged_stops_the_run_in_one_line(video: Path, script: Script) -> None:
    """Also when a worker finds it."""
    file = next(path for path in video.rglob("*.mp4") if "corner2" in str(path))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    options = ["--dataset", "lerobot", "--dataset.path", video, "--dataset.cameras", "corner2", "--workers", 1]
    with pytest.raises(UserError, match=r"\.mp4: (truncated or damaged|no frame at)") as error:
        script("--trainer", "bc", "--model", "cnn", *options, "--steps", 50, "--batch-size", 128)
    assert "\n" not in str(error.value)


# ---- augmentation --------------------------------------------------------------------------------------------------


EVERYTHING = Augmentation(shift=3, crop=(20, 24), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


@pytest.fixture
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {KEY: pictures, "action": torch.zeros(8, 2)}


def test_changes_are_a_function_of_seed_step_and_item(batch: dict[str, Any]) -> None:
    rows = torch.tensor([5, 900, 7, 3, 2**40, 1, 12, 44])
    whole = EVERYTHING(batch, rows, 1, 10)[KEY]
    assert whole.shape == (8, 2, 3, 20, 24) and whole.dtype == torch.uint8
    assert torch.equal(EVERYTHING(batch, rows, 1, 10)[KEY], whole)
    for part in (slice(0, 4), slice(4, 8), slice(3, 5)):  # of any number of processes
        mine = {key: value[part] for key, value in batch.items()}
        assert torch.equal(EVERYTHING(mine, rows[part], 1, 10)[KEY], whole[part])
    for other in (EVERYTHING(batch, rows, 2, 10), EVERYTHING(batch, rows, 1, 11), EVERYTHING(batch, rows + 1, 1, 10)):
        assert all((a != b).any() for a, b in zip(other[KEY], whole, strict=True))


def test_a_crop_is_a_part_of_the_picture_and_every_place_comes_up() -> None:
    place = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).expand(500, 3, 6, 6).contiguous()
    cropped = Augmentation(crop=(5, 4))({KEY: place}, torch.arange(500), 0, 0)[KEY]
    first = cropped[:, 0, 0, 0]
    assert set(first.tolist()) == {0, 1, 2, 6, 7, 8}
    assert torch.equal(cropped[:, 0], first[:, None, None] + place[0, 0, :5, :4])
    shifted = Augmentation(shift=1)({KEY: place}, torch.arange(500), 0, 0)[KEY]
    assert set(shifted[:, 0, 2, 2].tolist()) == {7, 8, 9, 13, 14, 15, 19, 20, 21}
    assert set(shifted[:, 0, 0, 0].tolist()) == {0, 1, 6, 7}  # the edge is repeated
    counts = torch.bincount(shifted[:, 0, 2, 2].long())[[7, 8, 9, 13, 14, 15, 19, 20, 21]]
    assert int(counts.min()) > 30  # of 500 / 9


def test_colours_change_as_the_options_say() -> None:
    grey = torch.full((400, 3, 4, 4), 100, dtype=torch.uint8)
    brighter = Augmentation(brightness=0.2)({KEY: grey}, torch.arange(400), 0, 0)[KEY].float()
    assert 80 <= brighter.min() < 85 and 115 < brighter.max() <= 120 and abs(float(brighter.mean()) - 100) < 2
    for keeps in (Augmentation(contrast=0.5), Augmentation(saturation=0.5), Augmentation(hue=0.5)):
        assert (keeps({KEY: grey}, torch.arange(400), 0, 0)[KEY].float() - 100).abs().max() <= 1
    colour = torch.tensor([200, 60, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(400, 3, 4, 4).contiguous()
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    for option in (Augmentation(hue=0.05), Augmentation(saturation=0.2)):
        changed = option({KEY: colour}, torch.arange(400), 0, 0)[KEY].float()
        assert (changed - colour.float()).abs().amax((1, 2, 3)).max() > 5
        assert ((changed * luma).sum(1) - (colour * luma).sum(1)).abs().max() <= 2  # its brightness stays
    full = Augmentation(hue=0.5)({KEY: colour}, torch.arange(400), 0, 0)[KEY]
    assert int(full[:, 2].max()) > 150  # red turned to blue


def test_the_numbers_are_uniform_and_independent() -> None:
    numbers = uniform((3, 5, 0), np.arange(20_000), 6)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.01 and np.abs(numbers.var(0) - 1 / 12).max() < 0.003
    together = np.corrcoef(np.concatenate([numbers, uniform((3, 6, 0), np.arange(20_000), 6)], 1).T)
    assert np.abs(together - np.eye(12)).max() < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--augment.crop", 99, 64], "--augment.crop 99 64 is more than 'observation.images.corner2' has"),
        (["--augment.crop", 3], "expected a height and a width"),
        (["--augment.hue", 0.7], "hue 0 to 0.5"),
        (["--augment.shift", -1], "shift must be 0 or more"),
    ],
)
def test_bad_input_changes_that_make_no_sense(script: Script, options: list[Any], message: str) -> None:
    path = FIXTURES / "lerobot_v30_image"
    with pytest.raises(UserError, match=message):
        data = ["--dataset", "lerobot", "--dataset.path", path, "--dataset.cameras", "corner2"]
        script("--trainer", "bc", "--model", "cnn", *data, *options)


def test_bad_input_changes_of_pictures_that_are_not_there(script: Script) -> None:
    with pytest.raises(UserError, match="--augment changes pictures, and the data has none"):
        script("--trainer", "bc", "--augment.shift", 2)


# ---- training ------------------------------------------------------------------------------------------------------


def test_bc_learns_from_pictures_and_acts_on_whole_ones(script: Script) -> None:
    """Crops are random in training, and of the centre when the policy acts; a resumed run goes on bit for bit."""
    path = FIXTURES / "lerobot_v30_image"
    options = [
        "--dataset",
        "lerobot",
        "--dataset.path",
        path,
        "--dataset.cameras",
        "corner2",
        "--dataset.cache",
        "memory",
    ]
    options += [
        "--model",
        "cnn",
        "--augment.crop",
        56,
        56,
        "--augment.brightness",
        0.2,
        "--log-every",
        1,
        "--save-every",
        6,
    ]
    run = script("--trainer", "bc", *options, "--steps", 12, folder="whole")
    losses = [line["train/loss"] for line in learned(run)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    stopped = script("--trainer", "bc", *options, "--steps", 12, folder="stopped")
    shutil.rmtree(stopped / "checkpoints" / "step-000000012")
    (stopped / "status.json").write_text(json.dumps({"state": "preempted", "step": 6, "reason": ""}))
    resumed = script("--resume", stopped, folder="stopped")
    assert difference(weights(run), weights(resumed)) == 0 and states(run).keys() == states(resumed).keys()
    policy = load_policy(str(run))
    item = build(path, cameras=("corner2",), validation=0)["dataset"][100]
    observation = {KEY: item[KEY].numpy(), "observation.state": item["observation.state"].numpy()}
    policy.reset()
    action = policy.act(observation)
    assert action.shape == (4,) and np.isfinite(action).all()
    edges = observation[KEY].copy()
    edges[:, :4], edges[:, -4:], edges[:, :, :4], edges[:, :, -4:] = 0, 0, 0, 0
    policy.reset()
    assert np.array_equal(policy.act(observation | {KEY: edges}), action)  # it sees the centre
    edges[:, 30:34, 30:34] = 255
    policy.reset()
    assert not np.array_equal(policy.act(observation | {KEY: edges}), action)


def test_the_fixtures_are_small() -> None:
    """They travel with the repository."""
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 13e6
