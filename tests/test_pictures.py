"""Pictures: decoded lazily or once into a store, by workers or not, and changed at random on the device."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from components import DATASET_BUILDER_REGISTRY, UserError, load_policy
from components.acting.evaluation import check_env
from components.data.augmentation import Augmentation, uniform
from components.data.batches import Batches
from components.data.items import as_kept
from components.data.pictures import as_bytes, as_recorded, find_layout, layout_of, resized, sizes_of
from components.datasets import frames
from components.datasets.lerobot import LeRobotDataset
from components.datasets.untrusted import decode_picture
from components.envs.observations import observation_batch
from components.envs.vector import Environments
from components.experience.collection import Collector, describe_env
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


# ---- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "stored", "last"),
    [
        ((3, 48, 64), (3, 48, 64), False),
        ((48, 64, 3), (3, 48, 64), True),
        ((2, 8, 3), (3, 2, 8), True),  # height below the number of channels
        ((48, 64), (1, 48, 64), False),
        ((4, 84, 84), (4, 84, 84), False),  # four grey frames, or four channels
        ((2, 84, 84), (2, 84, 84), False),
        ((84, 84, 12), (12, 84, 84), True),
        ((9, 32, 32), (9, 32, 32), False),
        ((4, 3, 48, 64), (12, 48, 64), False),
        ((4, 48, 64, 3), (12, 48, 64), True),
        ((5, 84, 84, 1), (5, 84, 84), True),
        ((3, 64, 3), None, False),  # both ends may be the channels
        ((4, 3, 64, 3), None, False),
        ((10, 64, 12), None, False),
        ((64, 64, 64), None, False),
        ((2, 2, 64, 64, 3), None, False),
        ((0, 64, 3), None, False),
        ((7,), None, False),
    ],
)
def test_the_shape_of_a_picture_tells_its_layout_or_it_is_refused(shape: Any, stored: Any, last: bool) -> None:
    layout = find_layout(shape)
    assert (layout and (layout.stored, layout.last)) == (stored and (stored, last))
    if layout is None:
        with pytest.raises(UserError, match=r"x has shape .*a picture is uint8 0 to 255 or float 0 to 1"):
            layout_of(shape, "x")
        return
    pictures = torch.randint(0, 256, (5, *shape), dtype=torch.uint8)
    frames = pictures if len(shape) == 4 else pictures.view(5, 1, *shape)
    frames = frames.movedim(-1, 2) if last else frames.reshape(5, frames.shape[1], -1, *stored[1:])
    wanted = torch.cat(list(frames.unbind(1)), 1)  # frame after frame along the channels
    for found in (layout(pictures), torch.from_numpy(layout(pictures.numpy()))):
        assert torch.equal(found, wanted.reshape(5, *stored))


def test_what_says_the_layout_is_believed() -> None:
    assert find_layout((3, 64, 3), "CHW") == ((3, 64, 3), (3, 64, 3), False)
    assert find_layout((3, 64, 3), "HWC") == ((3, 64, 3), (3, 3, 64), True)


def test_floats_are_bytes_and_nothing_else_is_taken_for_a_picture() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(as_bytes(every.to(dtype) / 255, "x"), every)
    assert np.array_equal(as_bytes(every.numpy() / np.float32(255), "x"), every.numpy())
    assert torch.equal(as_bytes(every.float(), "x", 255.0), every)
    for bad in (torch.tensor([0.5, 1.01]), torch.tensor([-0.1]), torch.tensor([0.5, torch.nan]), every.float()):
        with pytest.raises(UserError, match=r"x has values from .* expected 0 to 1: a picture is"):
            as_bytes(bad, "x")
    with pytest.raises(UserError, match="x holds int64: a picture is"):
        as_bytes(every.long(), "x")


U8, F32 = np.uint8, np.float32


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "low", "high", "found", "stored"),
    [
        ("", (3, 8, 9), F32, 0, 1, "images.camera", (3, 8, 9)),
        ("", (8, 9, 3), np.float64, 0, 1, "images.camera", (3, 8, 9)),
        ("", (8, 9, 3), F32, 0, 255, "images.camera", (3, 8, 9)),
        ("", (8, 9, 3), np.int32, 0, 255, "images.camera", (3, 8, 9)),
        ("", (4, 8, 9, 3), F32, 0, 1, "images.camera", (12, 8, 9)),
        ("", (4, 3, 8, 9), U8, 0, 255, "images.camera", (12, 8, 9)),
        ("", (8, 9), U8, 0, 255, "images.camera", (1, 8, 9)),
        ("", (8, 9, 3), F32, -1, 1, "state", (216,)),  # the bounds are no picture's
        ("", (8, 8, 8), F32, 0, 1, "state", (512,)),  # no axis of channels
        ("", (2, 3), F32, 0, 1, "state", (6,)),
        ("", (12,), U8, 0, 255, "state", (12,)),
        ("observation", (8, 9, 3), U8, 0, 255, "images.observation", (3, 8, 9)),
        ("observation.image", (8, 9, 3), U8, 0, 255, "images.image", (3, 8, 9)),
        ("observation.images.top.left", (8, 9, 3), F32, 0, 1, "images.top.left", (3, 8, 9)),
        ("observation.images.top", (3, 8, 3), U8, 0, 255, "images.top", (3, 8, 3)),  # by the data's own name
        ("observation.images.top.embedding", (5,), F32, 0, 1, "images.top.embedding", (5,)),
        ("pixels", (8, 9), F32, 0, 1, "images.camera", (1, 8, 9)),
    ],
)
def test_an_environments_space_says_what_is_a_picture(
    key: str, shape: Any, dtype: Any, low: float, high: float, found: str, stored: Any
) -> None:
    box = gym.spaces.Box(low, high, shape, dtype)
    box.seed(0)
    batch, space = np.stack([box.sample(), box.sample()]), gym.spaces.Dict({key: box}) if key else box
    (name, array), *more = observation_batch({key: batch} if key else batch, space).items()
    assert name == f"observation.{found}" and not more and array.shape == (2, *stored)
    assert array.dtype == (U8 if len(stored) > 1 else F32)
    if len(stored) > 1:
        layout = find_layout(shape) or layout_of(shape, "x", "CHW")
        assert np.array_equal(array, layout(np.rint(batch.astype(np.float64) * (255 / high)).astype(U8)))


def test_an_observation_that_would_be_lost_is_refused() -> None:
    two = {"agent_pos": np.zeros((2, 3)), "observation": np.zeros((2, 4))}
    with pytest.raises(UserError, match="two parts of the observation would both be 'observation.state'"):
        observation_batch(two)
    with pytest.raises(
        UserError,
        match=r"'observation.images.camera' has shape \[4, 64, 3\], which is no picture or may have two layouts",
    ):
        observation_batch({"pixels": np.zeros((2, 4, 64, 3), U8)})


class FloatPictures(gym.Env):
    """Step t shows t / 10, channels last; the third one is brighter than its space says."""

    observation_space = gym.spaces.Box(0, 1, (8, 9, 3), F32)
    action_space = gym.spaces.Box(-1, 1, (2,), F32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.t = 0
        return self._seen(), {}

    def _seen(self) -> np.ndarray:
        return np.full((8, 9, 3), [0, self.t / 10, 1], F32) * (1 if self.t < 3 else 2)

    def step(self, action: Any) -> Any:
        self.t += 1
        return self._seen(), 0.0, False, False, {}


def test_pictures_of_floats_are_collected_as_bytes_and_bad_ones_are_a_fault() -> None:
    def make(n: int, seed: int) -> Any:
        return gym.vector.SyncVectorEnv([FloatPictures] * n)

    assert describe_env(make(2, 0))["observation.images.camera"] == {"shape": (3, 8, 9), "dtype": "uint8"}
    said: list[str] = []
    collector = Collector(Environments(make, 2, 0, 0.0), 0, 0, 1, said.append)
    collector.start(0)
    for t in range(2):
        transitions, _ = collector.step(np.zeros((2, 2), F32))
        assert transitions is not None
        for key, shown in (("observation", t), ("next.observation", t + 1)):
            pictures = transitions[f"{key}.images.camera"]
            assert pictures.dtype == torch.uint8 and pictures[1, :, 4, 4].tolist() == [0, round(25.5 * shown), 255]
    assert collector.step(np.zeros((2, 2), F32)) == (None, [])
    assert "environment 0 (seed" in said[0] and "has values from 0 to 2, expected 0 to 1" in said[0]


def items(dtype: Any, last: bool) -> list[dict[str, Any]]:
    """Twenty pictures of random bytes with a state, a pose and an action, as a user's dataset may have them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(20):
        picture = torch.randint(0, 256, (3, 12, 14), generator=generator, dtype=torch.uint8)
        picture = picture if dtype == torch.uint8 else picture.to(dtype) / 255
        seen = {"observation.images.front": picture.permute(1, 2, 0) if last else picture}
        seen |= {"observation.state": torch.rand(3, generator=generator), "observation.grip": torch.rand(())}
        made.append(seen | {"observation.pose": torch.eye(4), "action": torch.rand(2, generator=generator)})
    return made


class Own:
    """A user's dataset of pictures."""

    kind: Any = (torch.uint8, False)

    def build(self, **kwargs: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        return {
            "dataset": items(*self.kind),
            "norm_stats": {"observation.pose": {"mean": torch.zeros(4, 4), "std": 1.0}},
        }


def test_a_users_pictures_train_and_act_the_same_in_any_form_of_the_rule(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASET_BUILDER_REGISTRY, "own", Own)
    options = ["--trainer", "bc", "--dataset", "own", "--model", "cnn", "--ema-decay", 0.9, "--augment.shift", 2]
    options += ["--augment.brightness", 0.3, "--steps", 4, "--model.hidden-dims", 8, "--batch-size", 10]
    runs = {}
    for kind in ((torch.uint8, False), (torch.float64, True)):
        monkeypatch.setattr(Own, "kind", kind)
        runs[kind] = script(*options, folder=str(kind[1]))
    plain, other = runs.values()
    assert difference(weights(plain), weights(other)) == 0 and learned(plain) == learned(other)
    policy, item = load_policy(other), items(torch.uint8, False)[0]
    assert policy.spec["observation.images.front"]["dtype"] == "uint8"
    assert policy.spec["observation.pose"]["shape"] == [16] and policy.spec["observation.grip"]["shape"] == [1]
    seen = {key: value.numpy() for key, value in item.items() if key != "action"}
    seen["observation.grip"], picture = seen["observation.grip"][None], seen["observation.images.front"]
    actions = []
    for form in (picture, picture / 255, np.moveaxis(picture, 0, -1), np.moveaxis(picture, 0, -1) / np.float32(255)):
        for batched in (False, True):
            policy.reset()
            given = seen | {"observation.images.front": form}
            action = policy.act({k: np.stack([v, v]) for k, v in given.items()} if batched else given)
            actions.append(action[0] if batched else action)
    assert all(np.allclose(action, actions[0], atol=1e-6) for action in actions) and actions[0].shape == (2,)
    for bad, message in (
        (picture.astype(float), r"'observation.images.front' has values from 0 to 255, expected 0 to 1: a picture is"),
        (picture.astype(int), "'observation.images.front' holds int64: a picture is"),
        (picture[:, :9], r"expects 'observation.images.front' of shape \(3, 12, 14\), found \(3, 9, 14\)"),
        (np.full_like(picture, np.nan, F32), "'observation.images.front' has values from nan"),
    ):
        with pytest.raises(UserError, match=message):
            policy.act(seen | {"observation.images.front": bad})


def test_a_users_pictures_that_are_none_are_refused_by_key(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    for picture, message in (
        (
            torch.rand(3, 12, 3),
            r"'observation.images.front' has shape \[3, 12, 3\], which is no picture or may have two layouts",
        ),
        (255 * torch.rand(3, 12, 12), "'observation.images.front' has values from .* expected 0 to 1"),
    ):
        made = [{"observation.images.front": picture, "action": torch.zeros(2)}] * 9
        with pytest.raises(UserError, match=message):
            as_kept({"dataset": made, "norm_stats": {}})["dataset"][0]
    # LeRobot's own items, a history of two steps, and a stack, whose state has no such axis.
    kept = [
        as_kept({"dataset": [one], "norm_stats": {}})["dataset"][0]
        for one in (
            {"observation.image": torch.rand(3, 12, 12)},
            {"observation.images.image": torch.rand(2, 12, 12, 3), "observation.state": torch.zeros(2, 5)},
            {"observation.images.image": torch.rand(2, 12, 12, 3), "observation.state": torch.zeros(5)},
        )
    ]
    assert [tuple(x["observation.images.image"].shape) for x in kept] == [(3, 12, 12), (2, 3, 12, 12), (6, 12, 12)]


def test_frames_are_stacked_in_act_as_the_environment_gives_them() -> None:
    stack = torch.randint(0, 256, (4, 8, 9, 3), dtype=torch.uint8)
    stored = layout_of((4, 8, 9, 3), "x")(stack)
    for given in (stack, stack.movedim(-1, 1), stored, stack.float() / 255):
        for batched in (False, True):
            found, was = as_recorded(given[None] if batched else given, (12, 8, 9), "x")
            assert was == batched and torch.equal(found, stored[None])
    grey = torch.randint(0, 256, (8, 9), dtype=torch.uint8)
    assert torch.equal(as_recorded(grey, (1, 8, 9), "x")[0], grey[None, None])


def test_bad_input_an_encoder_without_pictures(script: Script) -> None:
    for words in (["--model", "cnn"], ["--model", "encoder=resnet18", "mlp"]):
        with pytest.raises(
            UserError, match=r"--model (cnn|encoder=resnet18) encodes pictures, and there are none; leave"
        ):
            script("--trainer", "bc", *words, "--steps", 2)


# ---- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "to", "rows", "columns"),  # of what is no padding
    [
        ((480, 640), (224, 224), (28, 196), (0, 224)),
        ((64, 48), (40, 64), (0, 40), (17, 47)),
        ((48, 64), (96, 128), (0, 96), (0, 128)),
        ((9, 11), (32, 64), (0, 32), (12, 51)),
        ((2, 300), (8, 16), (3, 4), (0, 16)),
    ],
)
def test_pictures_are_resized_as_pillow_does_and_centred_on_black(size: Any, to: Any, rows: Any, columns: Any) -> None:
    pictures = torch.randint(0, 256, (2, 2, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = resized(pictures, to)
    assert found.shape == (2, 2, 3, *to) and found.dtype == torch.uint8
    inner = (columns[1] - columns[0], rows[1] - rows[0])
    for i in range(2):
        one = Image.fromarray(pictures[i, 1].permute(1, 2, 0).numpy()).resize(inner, Image.Resampling.BILINEAR)
        wanted = np.zeros((*to, 3), np.int64)
        wanted[slice(*rows), slice(*columns)] = np.asarray(one)
        assert np.abs(found[i, 1].permute(1, 2, 0).numpy() - wanted).max() <= 1
        assert torch.equal(resized(pictures[i, 1].permute(1, 2, 0).contiguous().permute(2, 0, 1), to), found[i, 1])
    wide = resized(pictures.flatten(1, 2), to)  # a stack
    assert torch.equal(wide.view_as(found), found) and resized(found, to) is found


def test_a_size_is_for_all_cameras_or_for_one_of_them() -> None:
    a, b = f"{KEY}.a", f"{KEY}.b"
    for words, wanted in (
        (("48", "64"), {a: (48, 64), b: (48, 64)}),
        (64, {a: (64, 64), b: (64, 64)}),
        (("48x64",), {a: (48, 64), b: (48, 64)}),
        (("corner2.a=48x64", f"{b}=32"), {a: (48, 64), b: (32, 32)}),
        ((f"{b}=32x40", 96, 128), {a: (96, 128), b: (32, 40)}),
        (("corner2.b=32x40",), {b: (32, 40)}),
        ((), {}),
    ):
        assert sizes_of(words, [a, b]) == wanted
    for words, message in (
        (("48", "64", "3"), "--dataset.image-size 48 64 3: expected a height and a width"),
        (("0", "64"), "of 8 to 4096 pixels"),
        (("-8",), "of 8 to 4096 pixels"),
        (("64.5",), "expected a height and a width"),
        (("corner2.a=64", f"{a}=32"), "two sizes for the camera 'corner2.a'"),
        (("corner2.a=5000x64",), "of 8 to 4096 pixels"),
        (("top=64x64",), "no such camera is read as 'top'; known: corner2.a, corner2.b"),
    ):
        with pytest.raises(UserError, match=message):
            sizes_of(words, [a, b])
    with pytest.raises(UserError, match="--dataset.image-size 64: the data has no pictures; see --dataset.cameras"):
        sizes_of(("64",), [])


@pytest.mark.parametrize("name", [*STORED, "aloha"])
def test_every_reader_resizes_what_it_decodes(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cameras": (STORED.get(name, "top"),), "validation": 0, "cache_dir": str(tmp_path)}
    rows = torch.tensor([7, 3, 50, 3, 0])
    whole = build(name, **options)["dataset"]
    size = (40, 56)
    wanted = resized(images(whole, rows), size)
    prints = {json.dumps(whole.fingerprint())}
    for cache in ("none", "disk"):
        dataset = build(name, cache=cache, image_size=("40", "56"), **options)["dataset"]
        assert torch.equal(images(dataset, rows), wanted), cache
        (sizes,) = (told["resized_from"] for told in dataset.facts.values() if "resized_from" in told)
        assert sizes == [list(images(whole, rows).shape[-2:])]
        prints.add(json.dumps(dataset.fingerprint()))
    assert len(prints) == 2  # the size tells a run's data, and not the cache
    (file,) = (path for path in tmp_path.iterdir() if path.suffix == ".u8")
    assert file.stat().st_size == 3 * 40 * 56 * len(next(iter(dataset.episodes.cameras.values())))


def test_a_policy_resizes_what_it_sees_as_its_data_was_and_cameras_may_differ(script: Script) -> None:
    path, sizes = FIXTURES / "lerobot_v30_image", ("corner2=40x56", "gripperPOV=32")
    words = ["--dataset", "lerobot", "--dataset.path", path, "--dataset.cameras", "all", "--model", "cnn"]
    words += ["--augment.drop-camera", 0.3, "--augment.blur", 1, "--augment.shift", 2, "--workers", 1, "--steps", 2]
    policy = load_policy(script("--trainer", "bc", *words, "--dataset.image-size", *sizes, "--batch-size", 8))
    other = KEY.replace("corner2", "gripperPOV")
    assert [policy.spec[key]["shape"] for key in (KEY, other)] == [[3, 40, 56], [3, 32, 32]]
    assert policy.spec[KEY]["resized_from"] == policy.spec[other]["resized_from"] == [[64, 64]]
    item = build(path, cameras=("all",), validation=0)["dataset"][100]
    seen = {key: item[key] for key in (KEY, other, "observation.state")}
    small = seen | {KEY: resized(item[KEY], (40, 56)), other: resized(item[other], (32, 32))}
    action = policy.act(small)
    mirrored = item[KEY].numpy()[:, ::-1].copy()[:, ::-1]  # its strides are negative, as of frame[..., ::-1]
    for one in (item[KEY], item[KEY].permute(1, 2, 0), item[KEY] / 255, mirrored):
        policy.reset()
        assert np.array_equal(policy.act(seen | {KEY: one}), action)
        policy.reset()
        batch = {key: np.stack([value, value]) for key, value in (seen | {KEY: one}).items()}
        assert np.allclose(policy.act(batch), [action, action], atol=1e-6)
    for bad, message in (
        (item[KEY][:2], r"expects .* of shape \(3, 40, 56\), found \(2, 64, 64\): a picture is"),
        (torch.zeros(3, 64, 3), "may have its channels first or last"),
        (255 * torch.ones(3, 64, 64), "has values from 255 to 255, expected 0 to 1"),
    ):
        policy.reset()
        with pytest.raises(UserError, match=message):
            policy.act(seen | {KEY: bad})
    with pytest.raises(UserError, match="it would be resized, had the policy been trained with --dataset.image-size"):
        as_recorded(item[KEY], (3, 40, 56), KEY)


def test_an_environment_may_show_other_sizes_to_a_policy_that_resizes() -> None:
    envs = gym.vector.SyncVectorEnv([FloatPictures] * 2)
    picture = {"shape": (3, 16, 16), "dtype": "uint8"}
    spec = {"observation.images.camera": picture, "action": {"shape": (2,), "dtype": "float32"}}
    with pytest.raises(UserError, match=r"of width \(3, 8, 9\), the dataset has \(3, 16, 16\)"):
        check_env(envs, spec)
    picture["resized_from"] = [[480, 640]]
    check_env(envs, spec)
    with pytest.raises(UserError, match=r"of width \(3, 8, 9\), the dataset has \(1, 16, 16\)"):
        check_env(envs, spec | {"observation.images.camera": picture | {"shape": (1, 16, 16)}})


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


def test_a_store_belongs_to_its_pictures_whatever_they_are_called(tmp_path: Path) -> None:
    """Two cameras of one file under the same name, by --dataset.rename."""
    import h5py

    values = np.random.default_rng(0).integers(0, 256, (2, 6, 16, 16, 3)).astype(np.uint8)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((6, 2))
        file["data/demo_0/obs/left"], file["data/demo_0/obs/right"] = values
    for camera, pictures in zip(("left", "right"), values, strict=True):
        options = {"cameras": ("front",), "cache": "disk", "cache_dir": str(tmp_path / "cache")}
        built = build(tmp_path / "x.hdf5", validation=0, rename=(f"{camera}=front",), **options)
        assert np.array_equal(images(built["dataset"], torch.arange(6)).numpy(), np.moveaxis(pictures, -1, 1)), camera
    assert len(stores(tmp_path / "cache")) == 2


def test_a_picture_of_more_than_eight_bits_is_refused() -> None:
    """Pillow would make every depth above 255 white."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1200, np.uint16)).save(file, "PNG")
    with pytest.raises(UserError, match=r"x: its channel has more than 8 bits \(I;16\): a picture is uint8"):
        decode_picture(file.getvalue(), (1, 8, 8), "x")


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


EVERYTHING = Augmentation(shift=3, crop=(20, 24), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, blur=2.0)


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


def test_a_blur_is_a_gaussian_whose_width_is_each_items_own() -> None:
    place = torch.zeros(300, 2, 3, 21, 17, dtype=torch.uint8)
    place[..., 10, 8] = 255
    blurred = Augmentation(blur=2.0)({KEY: place}, torch.arange(300), 0, 0)[KEY]
    deviations = 2.0 * uniform((0, 0, 0), np.arange(300), 7)[:, 6]
    assert torch.equal(blurred[:, :1].expand_as(blurred), blurred)  # all steps of an item alike
    for i in range(0, 300, 7):
        kernels = [np.exp(-0.5 * ((np.arange(n) - m) / deviations[i]) ** 2) for n, m in ((21, 10), (17, 8))]
        kernels = [kernel * (np.abs(np.arange(len(kernel)) - len(kernel) // 2) <= 5) for kernel in kernels]
        wanted = 255 * np.outer(*(kernel / kernel.sum() for kernel in kernels))
        assert np.abs(blurred[i, 0, 0].numpy() - wanted).max() <= 0.51
    bright = torch.full((300, 3, 9, 9), 251, dtype=torch.uint8)
    assert torch.equal(Augmentation(blur=9.0)({KEY: bright}, torch.arange(300), 0, 0)[KEY], bright)  # also at the edges


def test_cameras_are_dropped_at_random_but_never_all_of_an_item(batch: dict[str, Any]) -> None:
    shown = torch.full((4000, 2, 3, 4, 5), 9, dtype=torch.uint8)
    keys = [f"observation.images.{name}" for name in ("a", "b", "c")]
    data = {key: shown for key in (*keys, f"next.{keys[1]}")} | {"observation.state": torch.ones(4000, 2)}
    found = Augmentation(drop_camera=0.3)(data, torch.arange(4000), 3, 5)
    kept = torch.stack([found[key].flatten(1).min(1).values == 9 for key in keys])
    assert torch.equal(kept[1], found[f"next.{keys[1]}"].flatten(1).min(1).values == 9)  # of a successor, too
    assert all(set(found[key].flatten(1).float().std(1).tolist()) == {0.0} for key in keys)  # all of a picture or none
    assert kept.any(0).all() and abs(float((~kept).float().mean()) - (0.3 - 0.3**3 / 3)) < 0.01
    assert torch.equal(found["observation.state"], data["observation.state"])
    most = Augmentation(drop_camera=0.999)(data, torch.arange(4000), 3, 5)
    counts = torch.stack([most[key].flatten(1).any(1).bool() for key in keys]).float().mean(1)
    assert float(counts.sum()) < 1.02 and float(counts.min()) > 0.3
    # What else is random is as it would be without them.
    both, rows = {KEY: batch[KEY], keys[0]: batch[KEY]}, torch.arange(8)
    colours = Augmentation(shift=2, hue=0.1, brightness=0.2)
    plain, changed = (x(both, rows, 1, 2) for x in (colours, replace(colours, drop_camera=0.5)))
    assert any(not changed[key][i].any() for key in both for i in range(8))
    for key in both:
        here = changed[key].flatten(1).any(1).bool()
        assert torch.equal(plain[key][here], changed[key][here])
    assert np.array_equal(uniform((1, 2, 0), np.arange(9), 8)[:, :6], uniform((1, 2, 0), np.arange(9), 6))


def test_states_are_dropped_by_chance() -> None:
    """All steps of an item's history at once, with its successor; each a function of (seed, step, item)."""
    key, other = "observation.state", "observation.environment_state"
    spec = {key: {"shape": (2, 3), "dtype": "float32", "stats": {"mean": [7.0, 8.0, 9.0]}}, other: {"shape": (1,)}}
    drop, rows = Augmentation(drop_state=0.3), torch.arange(2000)
    assert drop.cropped(spec)[key] == spec[key]
    state = torch.randn(2000, 2, 3)
    batch = {key: state, f"next.{key}": -state, other: torch.ones(2000, 1)}
    found = drop(batch, rows, 1, 2)
    dropped = (found[key] == torch.tensor([7.0, 8.0, 9.0])).all(-1)
    assert bool((dropped[:, 0] == dropped[:, 1]).all()) and 0.25 < float(dropped.float().mean()) < 0.35
    assert torch.equal(found[key][~dropped[:, 0]], state[~dropped[:, 0]]) and found[other] is batch[other]
    assert torch.equal((found[f"next.{key}"] == torch.tensor([7.0, 8.0, 9.0])).all(-1), dropped)
    part = drop({name: value[500:600] for name, value in batch.items()}, rows[500:600], 1, 2)
    assert torch.equal(part[key], found[key][500:600])
    assert not torch.equal(drop(batch, rows, 1, 3)[key], found[key]) and torch.equal(batch[key], state)
    for odd, data in ((1.0, spec), (-0.1, spec), (0.3, {key: spec[key]}), (0.3, {other: spec[other]})):
        with pytest.raises(UserError, match="--augment.drop-state"):
            Augmentation(drop_state=odd).cropped(data)


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
        (["--augment.blur", 11], "--augment.blur 11 must be 0 to 10 pixels"),
        (["--augment.drop-camera", 0.1], "--augment.drop-camera never drops all cameras, so it needs two or more"),
        (["--augment.crop", 40, 40, "--dataset.image-size", 39, 64], "--augment.crop 40 40 is more than"),
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
        "--augment.blur",
        0.5,
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
