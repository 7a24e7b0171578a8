"""Every format gives the same four episodes, and each reader what is its own.

`fixtures/push.npz` holds what was recorded; the libraries of the formats wrote the other files from it.
"""

import json
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components import DATASET_BUILDER_REGISTRY, UserError
from components.data.normalisation import statistics
from components.datasets.recognise import recognise
from components.envs.observations import observation_batch
from conftest import FIXTURES, build, everything, learned

ENDS = [64, 127, 185, 215]
SUCCESSORS, PADDED = "with", "padded"
# Format -> (path, what it knows of successors, camera, mean error of its pictures in levels of 255).
FORMATS: dict[str, tuple[str, str, str, float]] = {
    "lerobot-2.1-image": ("lerobot_v21_image", PADDED, "corner2", 0),
    "lerobot-2.1-video": ("lerobot_v21_video", PADDED, "corner2", 4.5),
    "lerobot-3.0-image": ("lerobot_v30_image", PADDED, "gripperPOV", 0),
    "lerobot-3.0-video": ("lerobot_v30_video", PADDED, "gripperPOV", 4.5),
    "minari-hdf5": ("minari/metaworld/push-state-hdf5-v0", SUCCESSORS, "", 0),
    "minari-arrow": ("minari/metaworld/push-state-arrow-v0", SUCCESSORS, "", 0),
    "minari-parquet": ("minari/metaworld/push-state-parquet-v0", SUCCESSORS, "", 0),
    "minari-pixels-hdf5": ("minari/metaworld/push-pixels-hdf5-v0", SUCCESSORS, "camera", 6),
    "minari-pixels-arrow": ("minari/metaworld/push-pixels-arrow-v0", SUCCESSORS, "camera", 6),
    "robomimic": ("robomimic/push_low_dim.hdf5", SUCCESSORS, "", 0),
    "robomimic-image": ("robomimic/push_image.hdf5", SUCCESSORS, "agentview", 0),
    "d4rl": ("d4rl/push.hdf5", SUCCESSORS, "", 0),
    "d4rl-plain": ("d4rl/push_no_next_no_timeouts.hdf5", PADDED, "", 0),
    "zarr": ("zarr/push_replay.zarr", "", "img", 0),
    "zarr-zip": ("zarr/push_replay.zarr.zip", "", "img", 0),
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """The recorded arrays, under the names of the batches."""
    with np.load(FIXTURES / "push.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    names = {"observation": "observation.state", "next_observation": "next.observation.state"}
    pictures = {key: arrays.pop(key).permute(0, 3, 1, 2) for key in ("corner2", "gripperPOV")}
    return {names.get(key, key): value for key, value in arrays.items()} | pictures


# ---- the same data from every format -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tensors_windows_and_statistics(name: str, recorded: dict[str, Tensor]) -> None:
    path, successors, camera, error = FORMATS[name]
    built = build(path, validation=0, cameras=(camera,) if camera else ())
    assert built["dataset"].episodes.ends.tolist() == ENDS and "validation" not in built
    batch = everything(built)
    for key in ("observation.state", "action", *(["reward"] if successors else [])):
        assert batch[key].dtype == torch.float32 and torch.equal(batch[key], recorded[key]), key
    last = torch.zeros(215, dtype=torch.bool)
    last[torch.tensor(ENDS) - 1] = True
    if successors:
        following = recorded["next.observation.state"]
        if successors == PADDED:
            assert torch.equal(batch["next.is_pad"], last)
            following = torch.where(last[:, None], recorded["observation.state"], following)
        assert torch.equal(batch["next.observation.state"], following)
        # robomimic's `dones` marks the end of every demonstration in this file, so it is no success.
        terminated = recorded["terminated"] if not name.startswith("robomimic") else torch.zeros_like(last)
        assert torch.equal(batch["terminated"], terminated)
        assert torch.equal(batch["truncated"], last & ~terminated)
        success = built["dataset"].episodes.columns.get("success")
        assert success is None or (torch.equal(success, recorded["success"]) and "success" not in batch)
        assert (success is None) == (not name.startswith(("lerobot", "minari")))
    if camera:
        pictures, wanted = batch[f"observation.images.{camera}"], recorded[camera if camera in recorded else "corner2"]
        assert pictures.dtype == torch.uint8 and pictures.shape == wanted.shape
        # Each frame is the one of its own step, and not the one before or after.
        shifted = [(pictures[1:-1].float() - wanted[1 + by : 214 + by].float()).abs().mean() for by in (0, -1, 1)]
        assert shifted[0] <= error and shifted[0] < min(shifted[1:]), shifted
    assert built["norm_stats"] == {key: statistics(recorded[key]) for key in ("action", "observation.state")}
    window = build(path, validation=0, obs_steps=3, action_steps=8)["dataset"].get_batch(
        torch.tensor([0, 1, 62, 64, 214])
    )
    state, action = recorded["observation.state"], recorded["action"]
    history = [[0, 0, 0], [0, 0, 1], [60, 61, 62], [64, 64, 64], [212, 213, 214]]
    assert torch.equal(window["observation.state"], state[torch.tensor(history)])
    chunk = [list(range(8)), list(range(1, 9)), [62] + [63] * 7, list(range(64, 72)), [214] * 8]
    assert torch.equal(window["action"], action[torch.tensor(chunk)])
    assert window["action_is_pad"].sum(1).tolist() == [0, 0, 6, 0, 7]
    if successors == SUCCESSORS:
        assert torch.equal(
            window["next.observation.state"][:, -1], recorded["next.observation.state"][[0, 1, 62, 64, 214]]
        )
        assert torch.equal(window["next.observation.state"][:, 0], state[[0, 0, 61, 64, 213]])


def test_the_same_run_on_every_format_has_the_same_losses(script: Callable[..., Path]) -> None:
    """The same split, too: held out by the seed, whatever the format."""
    runs = {}
    for name, (path, *_) in FORMATS.items():
        where = str(FIXTURES / path)
        options = ["--dataset", recognise(where), "--dataset.path", where, "--steps", 20, "--log-every", 1]
        run = script(
            "--trainer",
            "bc",
            *options,
            "--model.encoder.task-features",
            0,
            "--model.hidden-dims",
            32,
            "--optimizer.lr",
            0.01,
            folder=name,
        )
        runs[name] = [(line["train/loss"], line.get("val/loss")) for line in learned(run)]
    first = runs.pop("lerobot-2.1-image")
    assert len(first) == 20 and first[-1][1] is not None and first[-1][0] < 0.9 * first[0][0]
    for name, losses in runs.items():
        assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in first], abs=1e-5), name
        assert losses[-1][1] == pytest.approx(first[-1][1], abs=1e-5), name


def test_an_item_is_a_row_of_the_batch_with_its_task() -> None:
    dataset = build("lerobot_v30_image", cameras=("corner2",), validation=0)["dataset"]
    batch = dataset.get_batch(torch.tensor([3, 200]))
    assert batch["task"] == ["push the puck to the goal", "push the puck (cut short)"]
    item = dataset[200]
    for key, value in batch.items():
        assert item[key] == value[1] if isinstance(value, list) else torch.equal(item[key], value[1]), key


@pytest.mark.parametrize("name", ["lerobot-3.0-image", "d4rl-plain", "minari-hdf5"])
def test_transitions_are_those_that_can_be_learnt_from(name: str, recorded: dict[str, Tensor]) -> None:
    """Where the last observation is not stored, only the terminated steps at the end are left: nothing follows them."""
    dataset = build(FORMATS[name][0], validation=0)["dataset"].transitions()
    lost = [] if FORMATS[name][1] == SUCCESSORS else [214]  # the one that was cut
    rows = torch.tensor([row for row in range(215) if row not in lost])
    assert torch.equal(dataset.rows, rows)
    batch = dataset.get_batch(torch.arange(len(dataset)))
    inner = ~batch["terminated"]
    assert torch.equal(batch["next.observation.state"][inner], recorded["next.observation.state"][rows][inner])


def test_cameras_are_offered_and_refused_by_name() -> None:
    built = build("lerobot_v30_video", cameras=("all",))
    keys = [key for key in built["dataset"][0] if key.startswith("observation.images.")]
    assert keys == ["observation.images.corner2", "observation.images.gripperPOV"]
    with pytest.raises(UserError, match=r"--dataset.cameras corner: no such camera in .*; nearest: corner2"):
        build("lerobot_v30_video", cameras=("corner",))
    with pytest.raises(UserError, match="it has none"):
        build("d4rl/push.hdf5", cameras=("corner2",))


# ---- shapes and names ----------------------------------------------------------------------------------------------


POSES = np.arange(10 * 6, dtype=np.float32).reshape(10, 2, 3) / 7  # the states of ten steps, two episodes of five
ACTIONS = np.arange(10 * 4, dtype=np.float32).reshape(10, 1, 4) / 3
HEIGHTS = np.arange(10, dtype=np.float32)  # a number each step


def lerobot_of(root: Path, features: dict[str, np.ndarray], **names: Any) -> Path:
    """A LeRobotDataset v2.1 of two episodes, whose arrays `[10, ...]` are stored as nested lists; `names` of some."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "meta").mkdir(parents=True)
    (root / "data").mkdir()
    info = {k: {"dtype": str(x.dtype), "shape": list(x.shape[1:]) or [1], "names": None} for k, x in features.items()}
    info = {key: feature | {"names": names[key]} if key in names else feature for key, feature in info.items()}
    for k in range(2):
        part = slice(5 * k, 5 * k + 5)
        table = {key: pa.array(values[part].tolist()) for key, values in features.items()}
        table |= {"timestamp": pa.array(np.arange(5) / 10), "index": pa.array(np.arange(10)[part])}
        pq.write_table(pa.table(table | {"episode_index": pa.array([k] * 5)}), root / f"data/{k}.parquet")
    meta = {"codebase_version": "v2.1", "fps": 10, "features": info, "data_path": "data/{episode_index}.parquet"}
    (root / "meta/info.json").write_text(json.dumps(meta))
    lines = (json.dumps({"episode_index": k, "length": 5}) for k in range(2))
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    (root / "meta/tasks.jsonl").write_text("")
    return root


def zarr_of(root: Path, **arrays: np.ndarray) -> Path:
    """A replay buffer of two episodes of five steps."""
    import zarr

    group = zarr.open_group(str(root), mode="w", zarr_format=2)
    for name, values in arrays.items():
        group.create_array(f"data/{name}", data=values)
    group.create_array("meta/episode_ends", data=np.array([5, 10]))
    return root


def pose_data(reader: str, folder: Path) -> tuple[Path, dict[str, Any], str]:
    """POSES as the state and ACTIONS in a format: its path, options, and the name of the state in the file."""
    ends = {"timeouts": np.arange(10) % 5 == 4}
    if reader == "lerobot":
        return lerobot_of(folder / "x", {"observation.state": POSES, "action": ACTIONS}), {}, "state"
    if reader == "robomimic":
        import h5py

        with h5py.File(folder / "x.hdf5", "w") as file:
            for k in range(2):
                file[f"data/demo_{k}/obs/pose"] = POSES[5 * k : 5 * k + 5]
                file[f"data/demo_{k}/actions"] = ACTIONS[5 * k : 5 * k + 5]
        return folder / "x.hdf5", {}, "pose"
    if reader == "d4rl":
        return make_d4rl(folder / "x.hdf5", 10, observations=POSES, actions=ACTIONS, **ends), {}, "state"
    if reader == "zarr":
        return zarr_of(folder / "x", pose=POSES, action=ACTIONS), {"keys": ("pose",)}, "pose"
    rows = np.array([0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 9])
    last = np.isin(np.arange(12), (5, 11))
    np.savez(folder / "x.npz", observations=POSES[rows], actions=ACTIONS[rows], terminals=last)
    return folder / "x.npz", {}, "state"


@pytest.mark.parametrize("reader", ["lerobot", "robomimic", "d4rl", "zarr", "ogbench"])
def test_vectors_of_several_axes_are_flattened_with_names(reader: str, tmp_path: Path) -> None:
    path, options, name = pose_data(reader, tmp_path)
    built = build(path, validation=0, **options)
    batch = everything(built)
    assert np.array_equal(batch["observation.state"].numpy(), POSES.reshape(10, 6))
    assert np.array_equal(batch["action"].numpy(), ACTIONS.reshape(10, 4))
    names = built["dataset"].episodes.names["observation.state"]
    assert names == [f"{name}.{i}.{j}" for i in range(2) for j in range(3)]


def test_lerobot_names_shapes_and_pictures_of_any_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scalars, an embedding under a camera's name, pictures as plain numbers, dots in a name, texts."""
    pictures = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3)).astype(np.uint8)
    features = {"observation.images.top.left": pictures, "observation.image": np.moveaxis(pictures, -1, 1) / 255}
    features |= {"observation.images.top.embedding": ACTIONS[:, 0], "observation.height": HEIGHTS, "action": ACTIONS}
    features |= {"language": np.array(["x"] * 10), "observation.note": np.array(["y"] * 10), "speed": HEIGHTS}
    axes = {"observation.images.top.left": ["height", "width", "channels"]}
    axes |= {"observation.image": ["channels", "height", "width"], "action": {"motors": ["x", "y", "z", "w"]}}
    root = lerobot_of(tmp_path / "x", features, **axes)
    with caplog.at_level("INFO", logger="components"):
        built = build(root, validation=0, cameras=("all",))
    batch = everything(built)
    for camera in ("top.left", "image"):
        assert np.array_equal(batch[f"observation.images.{camera}"].numpy(), np.moveaxis(pictures, -1, 1)), camera
    assert np.array_equal(batch["observation.images.top.embedding"].numpy(), ACTIONS[:, 0])
    assert np.array_equal(batch["observation.height"].numpy(), HEIGHTS[:, None])
    assert built["dataset"].episodes.names == {"action": ["x", "y", "z", "w"]}
    assert "observation.images.top.embedding" in built["norm_stats"]
    told = [record.message for record in caplog.records if "not used" in record.message]
    why = "language ([1], <U1), observation.note ([1], <U1), speed ([1], float32; see --dataset.rename)"
    assert told == [f"{root}: not used: {why}"] and built["dataset"].episodes.stored["not used"] == why
    same = build(root, validation=0, rename=("speed=observation.state", "observation.image=observation.images.front"))
    assert np.array_equal(everything(same)["observation.state"].numpy(), HEIGHTS[:, None])
    with pytest.raises(UserError, match=r"--dataset.cameras image: no such camera in .*front"):
        build(root, rename=("observation.image=observation.images.front",), cameras=("image",))


RENAMED = {
    "lerobot": ({"state": POSES, "actions": ACTIONS}, ("state=observation.state", "actions=action")),
    "zarr": ({"agent_pos": POSES, "act": ACTIONS}, ("agent_pos=state", "act=action")),
    "d4rl": ({"obs": POSES, "act": ACTIONS}, ("obs=observation.state", "act=actions")),
    "robomimic": ({"eef": POSES, "act": ACTIONS}, ("eef=robot0_eef_pos", "act=action")),
}


@pytest.mark.parametrize("reader", RENAMED)
def test_features_of_other_names_are_found_and_can_be_renamed(reader: str, tmp_path: Path) -> None:
    import h5py

    arrays, rename = RENAMED[reader]
    if reader == "lerobot":
        path = lerobot_of(tmp_path / "x", arrays)
    elif reader == "zarr":
        path = zarr_of(tmp_path / "x", **arrays)
    elif reader == "d4rl":
        path = make_d4rl(tmp_path / "x.hdf5", 10, **arrays)
        with h5py.File(path, "a") as file:
            del file["observations"], file["actions"]
    else:
        path = make_robomimic(tmp_path / "x.hdf5", [10])
        with h5py.File(path, "a") as file:
            del file["data/demo_0/actions"], file["data/demo_0/obs/state"]
            file["data/demo_0/act"], file["data/demo_0/obs/eef"] = ACTIONS, POSES
    options: dict[str, Any] = {} if reader == "d4rl" else {"validation": 0}
    reading = DATASET_BUILDER_REGISTRY[reader]
    with pytest.raises(UserError, match=r"act|states") as error:
        reading(path=str(path), **options).build()
    assert reader == "robomimic" or ("--dataset.rename" in str(error.value) and "found" in str(error.value))
    assert "\n" not in str(error.value)
    batch = everything(reading(path=str(path), rename=rename, validation=0).build())
    assert np.array_equal(batch["observation.state"].numpy(), POSES.reshape(10, 6))
    assert np.array_equal(batch["action"].numpy(), ACTIONS.reshape(10, 4))
    for bad, message in ((("nope=action",), "no feature 'nope' in .*; found: "), (("x",), "expected OLD=NEW")):
        with pytest.raises(UserError, match=message):
            reading(path=str(path), rename=bad).build()


def test_two_features_of_one_name_are_refused(tmp_path: Path) -> None:
    root = lerobot_of(tmp_path / "x", {"observation.state": POSES, "action": ACTIONS, "state": POSES})
    with pytest.raises(UserError, match="'observation.state' and 'state' of .* would both be 'observation.state'"):
        build(root, rename=("state=observation.state",))


def test_zarr_floats_are_pictures_of_either_range_and_poses_are_none(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3))
    arrays = {"dim": pictures / 255.0, "img": pictures.astype(np.float32), "pose": np.ones((10, 2, 4, 4), np.float32)}
    path = zarr_of(tmp_path / "x", state=POSES, action=ACTIONS, **arrays)
    built = build(path, validation=0, cameras=("all",))
    batch = everything(built)
    for camera in ("img", "dim"):
        assert np.array_equal(batch[f"observation.images.{camera}"].numpy(), np.moveaxis(pictures, -1, 1)), camera
    assert built["dataset"].episodes.stored["not used"] == "pose ([2, 4, 4], see --dataset.keys)"
    assert everything(build(path, validation=0, keys=("pose",)))["observation.state"].shape == (10, 32)


def test_chunks_that_zarr_leaves_out_are_read_as_the_fill_value_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """zarr stores no chunk that holds its fill value alone, such as rewards that are all zero or dark pictures."""
    arrays = {"reward": np.zeros(10, np.float32), "img": np.zeros((10, 6, 8, 3), np.uint8)}
    for name, key in (("reward", "reward"), ("img", "observation.images.img")):
        path = zarr_of(tmp_path / name, state=POSES, action=ACTIONS, **{name: arrays[name]})
        options: dict[str, Any] = {"cameras": ("img",)} if name == "img" else {}
        with pytest.raises(UserError, match=rf"data/{name}: the chunk .* is missing; .*--dataset.fill-missing"):
            build(path, **options)
        read = everything(build(path, validation=0, fill_missing=True, **options))[key]
        assert len(read) == 10 and not read.any()
        assert f"data/{name}: not all chunks are stored; they are read as 0" in caplog.text
    metadata = path / "data" / "img" / ".zarray"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"fill_value": None}))
    with pytest.raises(UserError, match="the array has no fill value"):
        build(path, fill_missing=True, cameras=("img",))


def test_arrays_of_pictures_are_recognised_by_type_and_shape_in_every_reader(tmp_path: Path) -> None:
    """Bytes and floats, where the file says no more of them; without a camera, nothing would be left to observe."""
    pictures = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3)).astype(np.uint8)
    wanted, ends = np.moveaxis(pictures, -1, 1), np.arange(10) % 5 == 4
    for name, values in (("bytes", pictures), ("floats", (wanted / 255).astype(np.float32))):
        lerobot = lerobot_of(tmp_path / f"l{name}", {"observation.images.camera": values, "action": ACTIONS})
        d4rl = make_d4rl(tmp_path / f"{name}.hdf5", 10, observations=values, actions=ACTIONS, timeouts=ends)
        np.savez(tmp_path / f"{name}.npz", observations=values, actions=ACTIONS, terminals=ends[:, None])
        for path in (lerobot, d4rl, tmp_path / f"{name}.npz"):
            rows = np.flatnonzero(~ends) if path.suffix == ".npz" else np.arange(10)
            batch = everything(build(path, validation=0, cameras=("camera",)))
            assert np.array_equal(batch["observation.images.camera"].numpy(), wanted[rows]), path
            with pytest.raises(UserError, match="choose .*--dataset.cameras"):
                build(path)


# ---- ALOHA ---------------------------------------------------------------------------------------------------------


def make_aloha(folder: Path, lengths: tuple[int, ...], jpeg: bool = False, size: tuple[int, int] = (24, 32)) -> Path:
    """Episodes as ALOHA records them; step i of an episode shows a bright square i pixels from the left."""
    import io

    import h5py
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for k, length in enumerate(lengths):
        pictures = np.zeros((length, *size, 3), np.uint8)
        for i in range(length):
            pictures[i, :, i % size[1] : i % size[1] + 8] = (200, 40 * (k % 4), 40)
        with h5py.File(folder / f"episode_{k}.hdf5", "w") as file:
            file.attrs["sim"], file.attrs["compress"] = True, jpeg
            steps = np.arange(length)[:, None] / 50 + k
            file["action"] = np.sin(steps + np.arange(14)).astype(np.float32)
            file["observations/qpos"] = np.sin(steps - 0.02 + np.arange(14))
            file["observations/qvel"] = np.cos(steps + np.arange(14))
            if not jpeg:
                file.create_dataset("observations/images/top", data=pictures, compression="gzip", chunks=(1, *size, 3))
                continue
            encoded = []
            for picture in pictures:
                Image.fromarray(picture).save(buffer := io.BytesIO(), "JPEG", quality=95)
                encoded.append(buffer.getvalue())
            longest = max(map(len, encoded)) + 3
            rows = np.array([np.frombuffer(data.ljust(longest, b"\0"), np.uint8) for data in encoded])
            file["observations/images/top"], file["compress_len"] = rows, [[len(data) for data in encoded]]
    return folder


@pytest.mark.parametrize("jpeg", [False, True])
def test_aloha_episodes_are_those_of_the_files(jpeg: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twelve of them, whose names sort 0, 1, 10, 11, 2."""
    import h5py

    path, lengths = tmp_path / "x", (3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5)
    make_aloha(path, lengths, jpeg)
    with caplog.at_level("INFO", logger="components"):
        built = build(path, validation=0, cameras=("top",), keys=("qpos", "qvel"))
    assert not [record for record in caplog.records if "not used" in record.message]
    episodes, batch = built["dataset"].episodes, everything(built)
    assert recognise(str(path)) == recognise(str(path / "episode_3.hdf5")) == "aloha"
    assert episodes.lengths.tolist() == list(lengths) and episodes.stored["sim"] is True
    row = sum(lengths[:10]) + 2  # step 2 of episode 10
    with h5py.File(path / "episode_10.hdf5") as file:
        state = np.concatenate([file["observations/qpos"][2], file["observations/qvel"][2]]).astype(np.float32)
        assert np.array_equal(batch["observation.state"][row].numpy(), state)
        assert np.array_equal(batch["action"][row].numpy(), file["action"][2])
    pictures = batch["observation.images.top"]
    assert pictures.shape == (48, 3, 24, 32) and pictures.dtype == torch.uint8
    error = (pictures[row, :, 12].float() - torch.tensor([200.0, 80, 40])[:, None] * torch.eye(32)[2:10].sum(0)).abs()
    assert error.mean() <= (12 if jpeg else 0)
    stored = build(path, validation=0)["dataset"].episodes.stored
    assert stored["not used"] == "qvel ([14], see --dataset.keys)"
    cached = build(path, validation=0, cameras=("all",), cache="disk", cache_dir=str(tmp_path / "c"))
    assert torch.equal(everything(cached)["observation.images.top"], pictures)
    (path / "episode_11.hdf5").write_bytes(b"not opened")
    high = {"cameras": ("high",), "rename": ("observation.images.top=high",)}
    some = build(path, validation=0, episodes=("9:11", "!9"), cache="disk", cache_dir=str(tmp_path / "c"), **high)
    assert some["dataset"].episodes.numbers == [10]
    assert torch.equal(everything(some)["observation.images.high"], pictures[sum(lengths[:10]) : sum(lengths[:11])])


def test_aloha_files_that_are_damaged_get_one_line(tmp_path: Path) -> None:
    import h5py

    def change(name: str, values: Any) -> Callable[[Any], None]:
        def apply(file: Any) -> None:
            del file[name]
            if values is not None:
                file[name] = values

        return apply

    top = "observations/images/top"
    for number, (edit, message) in enumerate(
        (
            (change("action", None), "episode_1.hdf5: no action, which the first episode has"),
            (change("action", np.zeros((4, 7))), r"action has rows of \(7,\), the first episode \(14,\)"),
            (change("observations/qpos", np.zeros((9, 14))), "qpos has 9 rows, action 4"),
            (change("observations/qpos", np.full((4, 14), np.nan)), "56 NaN or Inf values in 'observation.state'"),
            (change("observations/qpos", h5py.ExternalLink("y.hdf5", "/x")), "is a link"),
            (change(top, h5py.SoftLink("/action")), "is a link"),
            (change(top, np.zeros((4, 9, 9, 3), np.uint8)), "a picture of shape"),
            (change(top, np.zeros((4, 50), np.uint8)), "expected pictures as in"),
            (change(top, np.zeros((4, 24, 32, 3))[:, :, :, 0] * 1j), "holds complex128|expected pictures"),
            (change("observations", np.zeros(4)), "no group /observations"),
        )
    ):
        path = make_aloha(tmp_path / str(number), (3, 4))
        with h5py.File(path / "episode_1.hdf5", "a") as file:
            edit(file)
        with pytest.raises(UserError, match=message) as error:
            everything(build(path, validation=0, cameras=("top",)))
        assert "\n" not in str(error.value)
    path = make_aloha(tmp_path / "jpeg", (3,), jpeg=True)
    with h5py.File(path / "episode_0.hdf5", "a") as file:
        file[top][1] = 7
    with pytest.raises(UserError, match=f"episode_0.hdf5: {top}: a picture is truncated or damaged"):
        everything(build(path, validation=0, cameras=("top",)))
    (path / "episode_1.hdf5").symlink_to(tmp_path / "0" / "episode_0.hdf5")
    with pytest.raises(UserError, match="points outside the dataset"):
        build(path)
    with pytest.raises(UserError, match="--dataset.keys effort: no such array of vectors in .*; known: qpos, qvel"):
        build(tmp_path / "0", keys=("effort",))


# ---- LeRobot -------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_what_is_needed_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself is huggingface_hub's; its snapshot is read like any folder."""
    import huggingface_hub

    from components.datasets.lerobot import LeRobotDataset

    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(FIXTURES / "lerobot_v30_video")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    built = LeRobotDataset(repo_id="lerobot/push", revision="v3.0", cameras=("corner2",)).build()
    assert len(built["dataset"]) + len(built["validation"]) == 215
    assert asked["repo_id"] == "lerobot/push" and asked["repo_type"] == "dataset" and asked["revision"] == "v3.0"
    assert asked["allow_patterns"] == ["meta/*", "data/*", "videos/*corner2/*"]
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"lerobot/nothing-of-that-name: neither in the cache nor to be had") as error:
        LeRobotDataset(repo_id="lerobot/nothing-of-that-name").build()
    assert "\n" not in str(error.value)


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    """A snapshot is a folder of links into blobs/ beside it."""
    from components.datasets.lerobot import LeRobotDataset

    source, root = FIXTURES / "lerobot_v30_image", tmp_path / "models" / "snapshots" / "abc"
    blobs = root.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in source.rglob("*") if path.is_file()):
        shutil.copy(file, blobs / str(number))
        link = root / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    assert len(LeRobotDataset(path=str(root), validation=0).build()["dataset"]) == 215
    outside = shutil.copy(source / "data/chunk-000/file-000.parquet", tmp_path / "elsewhere")
    (root / "data/chunk-000/file-000.parquet").unlink()
    (root / "data/chunk-000/file-000.parquet").symlink_to(outside)
    with pytest.raises(UserError, match="points outside the dataset"):
        LeRobotDataset(path=str(root)).build()


def test_rows_are_ordered_by_their_index(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    root = Path(shutil.copytree(FIXTURES / "lerobot_v30_image", tmp_path / "data"))
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), file)
    one, two = (
        build(root, validation=0, cameras=("corner2",)),
        build("lerobot_v30_image", validation=0, cameras=("corner2",)),
    )
    assert all(torch.equal(value, everything(two)[key]) for key, value in everything(one).items() if key != "task")


# ---- Minari --------------------------------------------------------------------------------------------------------


@pytest.fixture
def minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library writes, for the tests that make datasets with it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


def make_minari(name: str, lengths: list[int], space: Any, observe: Callable[[int], Any], **options: Any) -> None:
    """Write a dataset with the official library; observation i of the whole is `observe(i)`, action i is i."""
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers, row = [], 0
    for number, length in enumerate(lengths):
        observations = [observe(row + number + i) for i in range(length + 1)]
        buffers.append(
            EpisodeBuffer(
                id=number,
                observations=stack(observations),
                actions=np.arange(row, row + length, dtype=np.float32)[:, None],
                rewards=[float(number)] * length,
                terminations=[False] * length,
                truncations=[False] * (length - 1) + [True],
            )
        )
        row += length
    action_space = gym.spaces.Box(-1000, 1000, (1,), np.float32)
    options = {"algorithm_name": "none", "code_permalink": "none", "author": "me", "author_email": "me"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no environment and no description
        minari.create_dataset_from_buffers(name, buffers, observation_space=space, action_space=action_space, **options)


def stack(values: list[Any]) -> Any:
    """Observations of one space below each other."""
    if isinstance(values[0], dict):
        return {key: stack([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(stack([value[i] for value in values]) for i in range(len(values[0])))
    return np.stack(values)


@pytest.mark.parametrize("storage", ["hdf5", "arrow", "parquet"])
def test_minari_episodes_are_in_the_order_of_their_numbers(minari_folder: Path, storage: str) -> None:
    """Twelve of them, whose names sort 0, 1, 10, 11, 2; of one step, too."""
    import gymnasium as gym

    lengths = [1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 6]
    space = gym.spaces.Box(-1000, 1000, (2,), np.float32)
    make_minari("t-v0", lengths, space, lambda i: np.full(2, i, np.float32), data_format=storage)
    built = build(minari_folder / "t-v0", validation=0)
    batch = everything(built)
    assert built["dataset"].episodes.lengths.tolist() == lengths
    assert batch["action"].flatten().tolist() == list(range(33))
    assert built["dataset"].episodes.name == str(minari_folder / "t-v0")  # not that of its folder "data"
    episode = np.repeat(np.arange(12), lengths)
    assert batch["observation.state"][:, 0].tolist() == (np.arange(33) + episode).tolist()
    assert batch["next.observation.state"][:, 0].tolist() == (np.arange(33) + episode + 1).tolist()
    assert batch["reward"].tolist() == episode.tolist() and batch["truncated"].sum() == 12


@pytest.mark.parametrize("storage", ["hdf5", "arrow"])
def test_minari_spaces_of_dicts_and_tuples(minari_folder: Path, storage: str) -> None:
    import gymnasium as gym

    box = gym.spaces.Box(-1000, 1000, (2,), np.float32)
    inner = gym.spaces.Dict({"goal": box, "count": gym.spaces.Discrete(50)})
    space = gym.spaces.Dict({"observation": box, "more": gym.spaces.Tuple((box, inner))})

    def observe(i: int) -> Any:
        vector = np.array([i, -i], np.float32)
        return {"observation": vector, "more": (vector * 2, {"goal": vector * 3, "count": np.int64(i)})}

    make_minari("t-v0", [3, 2], space, observe, data_format=storage)
    batch = everything(build(minari_folder / "t-v0", validation=0))
    rows = torch.tensor([0.0, 1, 2, 4, 5])[:, None] * torch.tensor([1.0, -1.0])
    for key, factor in (("state", 1), ("more.0", 2), ("more.1.goal", 3)):
        assert torch.equal(batch[f"observation.{key}"], factor * rows), key
    assert batch["observation.more.1.count"].flatten().tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("storage", ["hdf5", "parquet"])
def test_minari_spaces_say_what_is_a_picture_as_environments_do(minari_folder: Path, storage: str) -> None:
    """Floats, grey ones, stacks and poses; convert and read again."""
    import gymnasium as gym

    box = gym.spaces.Box
    space = {"pose": box(-9, 9, (2, 3), np.float32), "rgb": box(0, 1, (6, 8, 3), np.float32)}
    space |= {"grey": box(0, 255, (6, 8), np.uint8), "stack": box(0, 255, (2, 3, 6, 8), np.uint8)}
    space["pixels"] = gym.spaces.Dict({"top": box(0, 255, (6, 8, 3), np.uint8)})
    whole: Any = gym.spaces.Dict(space)
    whole.seed(0)
    seen = [whole.sample() for _ in range(7)]
    make_minari("t-v0", [3, 2], whole, lambda i: seen[i], data_format=storage)
    built = build(minari_folder / "t-v0", validation=0, cameras=("all",), rename=("pose=state", "grey=line"))
    batch, rows = everything(built), [0, 1, 2, 4, 5]
    assert built["dataset"].episodes.names["observation.state"][4] == "state.1.1"
    for i, row in enumerate(rows):
        named = observation_batch({k: _batched(v) for k, v in seen[row].items()}, whole)
        named["observation.state"] = named.pop("observation.pose")
        named["observation.images.line"] = named.pop("observation.images.grey")
        for key, value in named.items():  # videos of JPEGs differ a little
            assert batch[key].shape[1:] == value.shape[1:] and batch[key].dtype == torch.from_numpy(value).dtype, key
            if "top" not in key:
                assert np.array_equal(batch[key][i].numpy(), value[0]), key
    with pytest.raises(UserError, match="no feature 'nope' in .*; found: grey, pixels.top, pose"):
        build(minari_folder / "t-v0", rename=("nope=state",))


def _batched(value: Any) -> Any:
    return {k: _batched(v) for k, v in value.items()} if isinstance(value, dict) else value[None]


def test_minari_by_id_and_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own folder is used; the recorded environment is made again for the evaluation."""
    from components.datasets.minari import MinariDataset

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(FIXTURES / "minari"))
    built = MinariDataset(id="pendulum/energy-v0").build()
    assert built["env"]["name"] == "gymnasium" and built["env"]["id"] == "Pendulum-v1"
    monkeypatch.setattr("minari.download_dataset", lambda name: (_ for _ in ()).throw(OSError("no network\nat all")))
    with pytest.raises(UserError, match="neither in Minari's folder nor to be downloaded .no network at all.") as error:
        MinariDataset(id="pendulum/none-v0").build()
    assert "\n" not in str(error.value)


def test_a_policy_of_minari_data_is_evaluated_in_its_environment(script: Callable[..., Path]) -> None:
    path = FIXTURES / "minari/pendulum/energy-v0"
    options = ["--dataset", "minari", "--dataset.path", path, "--steps", 5, "--eval-episodes", 2]
    run = script("--trainer", "bc", *options)
    line = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert line["episodes"] == 2 and line["env"]["id"] == "Pendulum-v1"


@pytest.mark.parametrize(
    "spec",
    [
        {"id": "os:system", "kwargs": {"command": "touch hacked"}},
        {"id": "Pendulum-v1", "entry_point": "evil_module:Env", "kwargs": {"__import__": "os", "g": "evil_module"}},
        {"id": "../evil_module"},
        {"id": "evil_module:Pendulum-v1"},
        ["no", "object"],
        "{",
    ],
)
def test_an_environment_that_the_data_names_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any
) -> None:
    root = Path(shutil.copytree(FIXTURES / "minari/pendulum/energy-v0", tmp_path / "data"))
    meta = json.loads((root / "data/metadata.json").read_text())
    meta |= {"env_spec": spec if isinstance(spec, str) else json.dumps(spec), "eval_env_spec": None}
    (root / "data/metadata.json").write_text(json.dumps(meta))
    (tmp_path / "evil_module.py").write_text("open('hacked', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    built = build(root)
    assert not Path("hacked").exists() and "evil_module" not in sys.modules
    assert built.get("env", {}).get("id") in (None, "Pendulum-v1")


# ---- robomimic -----------------------------------------------------------------------------------------------------


def make_robomimic(path: Path, lengths: list[int], next_obs: bool = False, **arrays: Callable[[int], Any]) -> Path:
    """Demonstrations as robomimic writes them; row i of the whole is i in every array."""
    import h5py

    with h5py.File(path, "w") as file:
        row = 0
        for number, length in enumerate(lengths):
            rows = np.arange(row, row + length, dtype=np.float64)
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rows[:, None]
            demo["obs/state"] = np.stack([rows, -rows], 1)
            if next_obs:
                demo["next_obs/state"] = np.stack([rows + 0.5, -rows], 1)
            for name, values in arrays.items():
                demo[name] = values(length)
            row += length
    return path


def test_robomimic_demonstrations_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 6]
    batch = everything(build(make_robomimic(tmp_path / "a.hdf5", lengths), validation=0))
    assert batch["action"].flatten().tolist() == list(range(33))
    assert batch["observation.state"].tolist() == [[i, -i] for i in range(33)]
    assert "reward" not in batch and "next.observation.state" not in batch


def test_robomimic_successors_that_are_no_next_observation_are_kept(tmp_path: Path) -> None:
    """A file whose rows were subsampled: next_obs is not the obs of the row below."""
    path = make_robomimic(tmp_path / "a.hdf5", [2, 3], True, rewards=np.zeros, dones=np.zeros)
    batch = everything(build(path, validation=0))
    assert batch["observation.state"].tolist() == [[i, -i] for i in range(5)]
    assert batch["next.observation.state"].tolist() == [[i + 0.5, -i] for i in range(5)]
    assert "next.is_pad" not in batch


@pytest.mark.parametrize(
    ("rewards", "dones", "option", "terminated"),
    [
        ("01", "last", "auto", [4]),  # of rewards 0 and 1: where the reward is 1
        ("dense", "last", "auto", []),  # every demonstration ends in it: the end
        ("dense", "first only", "auto", [1]),  # some end without it: success
        ("dense", "last", "success", [1, 4]),
        ("01", "last", "end", []),
    ],
)
def test_what_dones_marks(tmp_path: Path, rewards: str, dones: str, option: str, terminated: list[int]) -> None:
    def reward(length: int) -> np.ndarray:
        values = np.zeros(length)
        values[-1] = float(length == 3) if rewards == "01" else 0.3
        return values

    def done(length: int) -> np.ndarray:
        values = np.zeros(length, int)
        values[-1] = dones == "last" or length == 2
        return values

    path = make_robomimic(tmp_path / "a.hdf5", [2, 3], True, rewards=reward, dones=done)
    batch = everything(build(path, validation=0, dones=option))
    assert batch["terminated"].nonzero().flatten().tolist() == terminated
    assert batch["truncated"].nonzero().flatten().tolist() == [row for row in (1, 4) if row not in terminated]


def test_masks_choose_and_hold_out(tmp_path: Path) -> None:
    import h5py

    path = make_robomimic(tmp_path / "a.hdf5", [2, 3, 4])
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_1"])
        file["mask/wrong"] = np.array([b"demo_7"])
    built = build(path, split="train")
    assert built["dataset"].get_batch(torch.arange(6))["action"].flatten().tolist() == [0, 1, 5, 6, 7, 8]
    assert built["validation"].get_batch(torch.arange(3))["action"].flatten().tolist() == [2, 3, 4]
    with pytest.raises(UserError, match=r"--dataset.split nope: no such mask in .*; found: train, valid, wrong"):
        build(path, split="nope")
    with pytest.raises(UserError, match="mask/wrong names 'demo_7', which is not among the demonstrations"):
        build(path, split="wrong")


def test_chosen_keys_stand_in_the_order_asked_for(recorded: dict[str, Tensor]) -> None:
    batch = everything(build("robomimic/push_low_dim.hdf5", validation=0, keys=("goal", "robot0_eef_pos")))
    state = recorded["observation.state"]
    assert torch.equal(batch["observation.state"], torch.cat([state[:, -3:], state[:, :3]], 1))
    with pytest.raises(
        UserError, match="--dataset.keys gaol: no such low-dimensional observation in .*; nearest: goal"
    ):
        build("robomimic/push_low_dim.hdf5", keys=("gaol",))


@pytest.mark.parametrize("name", ["lift_panda_v1.0.0_demo", "stack_panda_v1.0.0_demo", "SawyerLift_v0.3.0_demo"])
def test_bc_learns_from_human_recordings(script: Callable[..., Path], name: str) -> None:
    """Held-out error below that of the mean action; constant dimensions do no harm, the gripper takes -1 and 1."""
    where = FIXTURES / f"robosuite_raw/{name}.hdf5"
    built = build(where)
    action, held_out = everything(built)["action"], built["validation"].values("action")
    assert torch.isfinite(action).all() and len(held_out)
    stats = built["norm_stats"]["action"]
    mean, std = torch.tensor(stats["mean"]), torch.tensor(stats["std"])
    std = torch.where(std < 1e-6, 1.0, std)
    # The script's loss is the mean absolute error of normalised actions.
    of_mean = float(((held_out - mean) / std).abs().mean())
    options = [
        "--loss",
        "l1",
        "--dataset",
        "robomimic",
        "--dataset.path",
        where,
        "--steps",
        150,
        "--eval-every",
        25,
        "--save-every",
        0,
    ]
    run = script("--trainer", "bc", *options)
    losses = [line["val/loss"] for line in learned(run) if "val/loss" in line]
    assert all(np.isfinite(losses)) and min(losses) < 0.9 * of_mean, (losses, of_mean)


# ---- D4RL ----------------------------------------------------------------------------------------------------------


def make_d4rl(path: Path, n: int, **arrays: Any) -> Path:
    import h5py

    rows = np.arange(n, dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = rows[:, None], rows[:, None]
        file["rewards"], file["terminals"] = rows, np.zeros(n, bool)
        for name, values in arrays.items():
            if name in file:
                del file[name]
            file[name] = values
    return path


def test_antmaze_terminals_do_not_end_an_episode(tmp_path: Path) -> None:
    """They mark the goal while the episode goes on, in files that have infos/goal."""
    import h5py

    flags = np.arange(9) % 3 == 2
    path = make_d4rl(tmp_path / "antmaze-umaze-v0.hdf5", 9, terminals=flags, timeouts=np.arange(9) == 4)
    assert build(path, validation=0)["dataset"].episodes.ends.tolist() == [3, 5, 6, 9]
    with h5py.File(path, "a") as file:
        file["infos/goal"] = np.zeros((9, 2))
    built = build(path, validation=0)
    assert built["dataset"].episodes.ends.tolist() == [5, 9] and built["reference_scores"] == (0.0, 1.0)
    batch = everything(built)
    assert batch["terminated"].tolist() == flags.tolist()
    assert batch["next.observation.state"].flatten().tolist() == [1, 2, 3, 4, 4, 6, 7, 8, 8]
    assert build(path, validation=0, terminals_end_episodes=True)["dataset"].episodes.ends.tolist() == [3, 5, 6, 9]


def test_without_timeouts_episodes_are_cut_where_the_environment_cut_them(tmp_path: Path) -> None:
    path = make_d4rl(tmp_path / "a.hdf5", 10, terminals=np.arange(10) == 6)
    built = build(path, validation=0, max_episode_steps=4)
    assert built["dataset"].episodes.ends.tolist() == [4, 7, 10]
    batch = everything(built)
    assert batch["truncated"].nonzero().flatten().tolist() == [3, 9]
    assert batch["next.is_pad"].nonzero().flatten().tolist() == [3, 6, 9]
    assert built["dataset"].transitions().rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]


def test_d4rl_returns_are_normalised_by_the_reference_scores(tmp_path: Path) -> None:
    from components.datasets.d4rl import REFERENCE_SCORES

    assert REFERENCE_SCORES["hopper"] == (-20.272305, 3234.3)
    path = make_d4rl(tmp_path / "hopper_medium-v2.hdf5", 4)
    built = build(path)
    assert built["reference_scores"] == REFERENCE_SCORES["hopper"] and "env" not in built  # its width is another one
    assert "reference_scores" not in build(make_d4rl(tmp_path / "mine.hdf5", 4))
    assert build(tmp_path / "mine.hdf5", task="maze2d-umaze-dense-v1")["reference_scores"][0] == 68.537689


# ---- OGBench -------------------------------------------------------------------------------------------------------


def test_ogbench_drops_the_last_row_of_an_episode_and_holds_out_the_file_beside() -> None:
    path = FIXTURES / "ogbench/pointmaze-medium-navigate-mini.npz"
    built = build(path)
    rows, beside = np.load(path), np.load(path.with_name(f"{path.stem}-val.npz"))
    last = rows["terminals"].astype(bool)
    batch = everything(built)
    assert (
        len(built["dataset"]) == (~last).sum() and len(built["validation"]) == (~beside["terminals"].astype(bool)).sum()
    )
    assert torch.equal(batch["action"], torch.from_numpy(rows["actions"][~last]))
    assert "reward" not in batch  # goal-conditioned: the trainer makes them
    episodes = built["dataset"].episodes
    following = episodes.observations["observation.state"][episodes.after[: len(batch["action"])]]
    after = np.flatnonzero(~last) + 1
    assert torch.equal(following, torch.from_numpy(rows["observations"][after]).float())


@pytest.mark.parametrize(("timing", "first"), [("pre", 0), ("post", 1)])
def test_ogbench_rewards_are_the_librarys_judged_before_or_after_the_action(
    monkeypatch: pytest.MonkeyPatch, timing: str, first: int
) -> None:
    """What the library gets is the simulator's state of the observation, or of the one after the action.

    A stand-in for the library, which this suite does not install: it notes the rows, and rewards the first's sign.
    """
    got = {}

    def relabel(name: str, env: Any, rows: dict[str, np.ndarray]) -> None:
        got.update(rows, name=name)
        done = rows["qpos"][:, 0] > np.median(rows["qpos"][:, 0])
        rows["rewards"], rows["masks"] = done - 1.0, 1.0 - done

    import gymnasium as gym

    gym.register("cube-single-singletask-task2-v0", entry_point=lambda: types.SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(gym, "make", lambda name: types.SimpleNamespace(close=lambda: None))
    monkeypatch.setitem(sys.modules, "ogbench", types.ModuleType("ogbench"))
    fake: Any = types.ModuleType("ogbench.relabel_utils")
    fake.relabel_dataset = relabel
    monkeypatch.setitem(sys.modules, "ogbench.relabel_utils", fake)
    path = FIXTURES / "ogbench/cube-single-play-mini.npz"
    try:
        built = build(path, validation=0, task="2", success_timing=timing)
        with pytest.raises(UserError, match="no environment 'cube-single-singletask-task9-v0' in ogbench; nearest"):
            build(path, task="9")
    finally:
        del gym.registry["cube-single-singletask-task2-v0"]
    rows = np.load(path)
    last = rows["terminals"].astype(bool)
    assert got["name"] == "cube-single-singletask-task2-v0"
    assert np.array_equal(got["qpos"], rows["qpos"][np.flatnonzero(~last) + first])
    batch = everything(built)
    assert torch.equal(batch["terminated"], batch["reward"] == 0) and 0 < batch["terminated"].sum() < len(last)
    assert not (batch["terminated"] & batch["truncated"]).any()
    env = {"name": "ogbench", "id": "cube-single-singletask-task2-v0", "success_timing": timing}
    assert built["env"] == env


def test_ogbench_gives_what_the_official_loader_gives() -> None:
    """Where it is installed: pip install ogbench "mujoco==3.3.0"."""
    library = pytest.importorskip("ogbench")
    import gymnasium as gym
    from ogbench.relabel_utils import relabel_dataset
    from ogbench.utils import load_dataset

    path, name = FIXTURES / "ogbench/cube-single-play-mini.npz", "cube-single-singletask-task2-v0"
    rows = load_dataset(str(path), compact_dataset=False, add_info=True)
    env = gym.make(name)
    relabel_dataset(name, env, rows)
    env.close()
    batch = everything(build(path, validation=0, task="2"))
    names = {"observation.state": "observations", "action": "actions", "reward": "rewards"}
    for key, theirs in (names | {"next.observation.state": "next_observations"}).items():
        assert np.array_equal(batch[key].numpy(), rows[theirs].astype(np.float32)), (key, library)
    assert np.array_equal(batch["terminated"].numpy(), rows["masks"] == 0)


def test_what_no_reader_knows_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(UserError, match="no such file or folder; if .* --dataset.repo-id owner/name$"):
        recognise("owner/name")
    with pytest.raises(UserError, match="not recognised as lerobot"):
        recognise(str(tmp_path / "x.csv"))
    with pytest.raises(UserError, match="no such file or folder"):
        recognise(str(tmp_path / "y"))
