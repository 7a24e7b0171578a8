"""A dataset is a file that nobody vouches for: hostile and damaged ones, made here, each told in one line."""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from components import DATASET_BUILDER_REGISTRY, UserError
from components.datasets import inspect, untrusted
from components.datasets.recognise import recognise
from conftest import FIXTURES
from test_records import damaged, hold

Make = Callable[[Path], tuple[Path, dict[str, Any]]]


class Payload:
    """Leaves a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("hacked", "w"))


def refused(made: tuple[Path, dict[str, Any]], message: str) -> None:
    """Building the dataset, and reading all of it, ends in one line that names its file and says `message`."""
    path, options = made
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        name = options.pop("name", None) or recognise(str(path))
        dataset = DATASET_BUILDER_REGISTRY[name](path=str(path), **{"validation": 0} | options).build()["dataset"]
        dataset.get_batch(torch.arange(len(dataset)))
    assert "\n" not in str(error.value) and path.name in str(error.value)
    assert time.monotonic() - start < 5 and not Path("hacked").exists()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a payload would leave lies in the test's folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(np.arange(8, dtype=np.float64).tobytes())


# ---- npz -----------------------------------------------------------------------------------------------------------


def npz(folder: Path, **members: bytes | np.ndarray) -> tuple[Path, dict[str, Any]]:
    """OGBench's file, with some members replaced; bytes as they are."""
    rows = np.arange(6, dtype=np.float32)
    arrays = {"observations": rows[:, None], "actions": rows[:, None], "terminals": rows == 5} | members
    with zipfile.ZipFile(folder / "data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            file = io.BytesIO()
            if isinstance(value, np.ndarray):
                np.lib.format.write_array(file, value)
            archive.writestr(f"{name}.npy", value if isinstance(value, bytes) else file.getvalue())
    return folder / "data.npz", {}


def header(shape: str, descr: str = "'<f4'") -> bytes:
    """The first bytes of a .npy member."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def damaged_npz(folder: Path) -> tuple[Path, dict[str, Any]]:
    path, options = npz(folder, observations=np.random.default_rng(0).normal(size=(6, 999)).astype(np.float32))
    data = bytearray(path.read_bytes())
    data[5000:5100] = bytes(100)
    path.write_bytes(data)
    return path, options


def pickled() -> np.ndarray:
    return np.array([Payload()] * 6, dtype=object)


NPZ: dict[str, tuple[Make, str]] = {
    "pickled objects": (lambda d: npz(d, actions=pickled()), "'actions' holds object; expected numbers, and nothing"),
    "a header that lies": (lambda d: npz(d, actions=header("(6, 1000)") + bytes(24)), "declares 24000 bytes"),
    "a header of 2**60 rows": (lambda d: npz(d, actions=header("(1152921504606846976, 9)")), "declares"),
    "a header that is code": (lambda d: npz(d, actions=header("open('hacked', 'w')")), "damaged or no npz"),
    "truncated": (lambda d: (_cut(npz(d)[0]), {}), "truncated, damaged or no npz file"),
    "flipped bytes": (damaged_npz, "truncated, damaged or no npz file"),
    "widths that differ": (lambda d: npz(d, actions=np.zeros((5, 1), np.float32)), r"'actions' has shape \(5, 1\)"),
    "no rows": (
        lambda d: npz(
            d, **{k: np.zeros((0, 1)[:n]) for k, n in (("observations", 2), ("actions", 2), ("terminals", 1))}
        ),
        "is empty",
    ),  # fmt: skip
    "no end": (lambda d: npz(d, terminals=np.zeros(6)), "the last row is not marked in 'terminals'"),
    "NaN": (
        lambda d: npz(d, observations=np.full((6, 1), np.nan)),
        "6 NaN or Inf values in 'observation.state', first in episode 0 at step 0",
    ),  # fmt: skip
}


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("case", NPZ)
def test_a_hostile_or_damaged_npz(case: str, tmp_path: Path) -> None:
    make, message = NPZ[case]
    refused(make(tmp_path), message)


# ---- HDF5 ----------------------------------------------------------------------------------------------------------


def hdf5(folder: Path, change: Callable[[Any], Any]) -> tuple[Path, dict[str, Any]]:
    """Two demonstrations of robomimic, changed; `outside.hdf5` beside has what a link would lead to."""
    with h5py.File(folder / "outside.hdf5", "w") as file:
        file["actions"] = np.ones((3, 1))
    with h5py.File(folder / "demos.hdf5", "w") as file:
        for number in range(2):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = 3
            demo["actions"] = np.zeros((3, 1))
            demo["obs/state"] = np.zeros((3, 2))
        change(file["data/demo_1"])
    return folder / "demos.hdf5", {}


def replace(name: str, **created: Any) -> Callable[[Any], Any]:
    """Put another dataset in the place of `name`."""

    def change(demo: Any) -> None:
        del demo[name]
        demo.create_dataset(name, **created)

    return change


def link(to: Any) -> Callable[[Any], None]:
    def change(demo: Any) -> None:
        del demo["actions"]
        demo["actions"] = to

    return change


def bomb(compression: str, packed: bytes, mask: int = 0, **options: Any) -> Callable[[Any], None]:
    """A chunk of 12 bytes that unpacks to millions."""

    def change(demo: Any) -> None:
        del demo["actions"]
        demo.create_dataset("actions", (3, 1), "f4", chunks=(3, 1), compression=compression, **options)
        demo["actions"].id.write_direct_chunk((0, 0), packed, mask)

    return change


def virtual(demo: Any) -> None:
    layout = h5py.VirtualLayout((3, 1), "f8")
    layout[:] = h5py.VirtualSource("outside.hdf5", "actions", (3, 1))
    del demo["actions"]
    demo.create_virtual_dataset("actions", layout)


def twice_packed(demo: Any) -> None:
    del demo["actions"]
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_chunk((3, 1))
    created.set_deflate(9)
    created.set_deflate(9)
    h5py.h5d.create(demo.id, b"actions", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((3, 1)), created)


def member_link(demo: Any) -> None:
    del demo.parent["demo_1"]
    demo.file["data/demo_1"] = h5py.ExternalLink("outside.hdf5", "/")


def attribute(demo: Any) -> None:
    demo.attrs["num_samples"] = 10**12


ZEROS = zlib.compress(bytes(50_000_000), 9)
LZF_ZEROS = b"\x00\x00" + b"\xe0\xff\x00" * 20_000  # one zero, then copies of it, 264 at a time
HDF5: dict[str, tuple[Callable[[Any], Any], str]] = {
    "external link": (link(h5py.ExternalLink("outside.hdf5", "/actions")), "demo_1/actions is a link .ExternalLink."),
    "soft link": (link(h5py.SoftLink("/data/demo_0/actions")), "demo_1/actions is a link .SoftLink."),
    "external link to a group": (member_link, "demo_1 is a link"),
    "external storage": (
        replace("actions", shape=(3, 1), dtype="f8", external=[("secret", 0, 24)]),
        "outside of the file",
    ),
    "virtual dataset": (virtual, "stored outside of the file"),
    "objects": (
        replace("actions", data=np.array([[b"x"]] * 3, dtype=object), dtype=h5py.string_dtype()),
        "expected numbers",
    ),
    "a compound type": (replace("actions", data=np.zeros((3, 1), [("a", "f4")])), "expected numbers"),
    "more than memory holds": (replace("actions", shape=(3, 2**50), dtype="f4", chunks=(1, 4096)), "width|are needed"),
    "more rows than memory holds": (
        replace("obs/state", shape=(2**50, 2), dtype="f4", chunks=(4096, 2)),
        "expected 3 rows",
    ),
    "a gzip bomb": (bomb("gzip", ZEROS), "unpacks to more than the 12 bytes"),
    "a gzip bomb behind a skipped filter": (bomb("gzip", ZEROS, 1, shuffle=True), "unpacks to more than the 12 bytes"),
    "a gzip bomb with a sum": (bomb("gzip", ZEROS + b"1234", fletcher32=True), "unpacks to more than the 12 bytes"),
    "a lzf bomb": (bomb("lzf", LZF_ZEROS), "unpacks to more than the 12 bytes"),
    "packed twice": (twice_packed, "stored with the HDF5 filters .1, 1."),
    "another filter": (replace("actions", shape=(3, 1), dtype="i4", scaleoffset=3), "stored with the HDF5 filters"),
    "rows that do not agree": (replace("obs/state", data=np.zeros((2, 2))), "expected 3 rows"),
    "widths that differ": (replace("obs/state", data=np.zeros((3, 5))), "has width 5, .* has 2"),
    "a missing key": (lambda demo: demo.__delitem__("obs/state"), "no data/demo_1/obs/state, which other"),
    "a number of samples that lies": (attribute, "has 3 actions, its num_samples is 1000000000000"),
    "no steps": (
        lambda demo: [replace(n, data=np.zeros((0, 1)))(demo) for n in ("actions", "obs/state")],
        "has 0 actions",
    ),
    "NaN": (
        replace("obs/state", data=np.full((3, 2), np.nan)),
        "6 NaN or Inf values in 'observation.state', first in episode 1 at step 0",
    ),  # fmt: skip
    "no demonstrations": (lambda demo: demo.file.__delitem__("data"), "not recognised"),
}


@pytest.mark.parametrize("case", HDF5)
def test_a_hostile_or_damaged_hdf5(case: str, tmp_path: Path) -> None:
    change, message = HDF5[case]
    refused(hdf5(tmp_path, change), message)


def test_a_truncated_hdf5(tmp_path: Path) -> None:
    path, _ = hdf5(tmp_path, lambda demo: None)
    refused((_cut(path), {}), "truncated, damaged or no HDF5 file")


@pytest.mark.parametrize("name", ["d4rl/push.hdf5", "minari/metaworld/push-state-hdf5-v0/data/main_data.hdf5"])
def test_the_other_readers_of_hdf5_follow_no_links(name: str, tmp_path: Path) -> None:
    root = FIXTURES / name if name.startswith("d4rl") else (FIXTURES / name).parent.parent
    copy = shutil.copytree(root, tmp_path / "copy") if root.is_dir() else shutil.copy(root, tmp_path / "copy.hdf5")
    file = next(Path(copy).rglob("main_data.hdf5")) if root.is_dir() else Path(copy)
    array = "actions" if name.startswith("d4rl") else "episode_0/actions"
    with h5py.File(file, "a") as opened:
        shape = opened[array].shape
        del opened[array]
        opened[array] = h5py.ExternalLink("elsewhere.hdf5", "/x")
    refused((Path(copy), {}), "is a link")
    with h5py.File(file, "a") as opened:
        del opened[array]
        opened.create_dataset(array, shape, "f4", external=[("secret", 0, 4 * int(np.prod(shape)))])
    refused((Path(copy), {}), "stored outside of the file")


def test_a_mask_that_is_a_bomb(tmp_path: Path) -> None:
    def change(demo: Any) -> None:
        demo.file.create_dataset("mask/train", (2**50,), "S8", chunks=(4096,))

    path, _ = hdf5(tmp_path, change)
    refused((path, {"split": "train"}), "are needed")


# ---- sizes against memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "d4rl/push.hdf5",
        "robomimic/push_low_dim.hdf5",
        "ogbench/pointmaze-medium-navigate-mini.npz",
        "zarr/push_replay.zarr",
        "lerobot_v30_image",
        "minari/metaworld/push-state-hdf5-v0",
        "minari/metaworld/push-state-parquet-v0",
    ],
)
def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "free_memory", lambda: 1000)
    refused((FIXTURES / name, {}), "are needed, 0.0 MB of memory are free")


def test_repeated_values_count_against_memory_too(lerobot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes of parquet hold millions of equal numbers."""
    rows = pa.ListArray.from_arrays([0, *[4_000_000] * 215], pa.array(np.zeros(4_000_000, np.float32)))
    rewrite(lerobot, lambda table: with_column(table, "action", rows))
    assert (lerobot / DATA).stat().st_size < 3_000_000
    monkeypatch.setattr(untrusted, "free_memory", lambda: 20_000_000)
    refused((lerobot, {}), "32.1 MB are needed, 20.0 MB of memory are free")


# ---- LeRobot -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "lerobot_v30_image", tmp_path / "push"))


DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def rewrite(root: Path, change: Callable[[Any], Any], file: str = DATA) -> None:
    """Change the table of a parquet file."""
    pq.write_table(change(pq.read_table(root / file)), root / file)


def edit(root: Path, **values: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_column(table: Any, name: str, values: Any) -> Any:
    return table.set_column(table.schema.get_field_index(name), name, values)


def pictures(table: Any, encoded: bytes) -> Any:
    """The same picture in every row."""
    cells = [{"bytes": encoded, "path": "x.png"}] * len(table)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return with_column(table, "observation.images.corner2", [cells]).cast(
        table.schema.set(
            table.schema.get_field_index("observation.images.corner2"), pa.field("observation.images.corner2", kind)
        )
    )


def png(size: tuple[int, int], claims: tuple[int, int] | None = None) -> bytes:
    """A PNG; its header may claim another size."""
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    data = bytearray(file.getvalue())
    if claims:
        data[16:24] = struct.pack(">II", *claims)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def features(root: Path, key: str, **values: Any) -> None:
    known = json.loads((root / "meta" / "info.json").read_text())["features"]
    known[key] |= values
    edit(root, features=known)


def ragged(table: Any) -> Any:
    rows = table["action"].to_pylist()
    rows[7] = rows[7][:2]
    return with_column(table, "action", pa.array(rows, pa.list_(pa.float32())))


def symlink(root: Path, file: str = DATA) -> None:
    (root / file).rename(root.parent / "elsewhere")
    (root / file).symlink_to(root.parent / "elsewhere")


LEROBOT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link to a file outside": (symlink, "points outside the dataset"),
    "a link to metadata outside": (lambda root: symlink(root, "meta/tasks.parquet"), "points outside the dataset"),
    "rows of several widths": (lambda root: rewrite(root, ragged), "column 'action' has rows of width 2, 4"),
    "pictures that claim to be huge": (
        lambda root: rewrite(root, lambda t: pictures(t, png((64, 64), (6000, 6000)))),
        "a picture of 6000 x 6000, but the metadata says 64 x 64",
    ),  # fmt: skip
    "pictures of another size": (
        lambda root: rewrite(root, lambda t: pictures(t, png((32, 64)))),
        "a picture of 64 x 32, but",
    ),
    "pictures that are something else": (
        lambda root: rewrite(root, lambda t: pictures(t, pickle.dumps(Payload()))),
        "a picture is truncated or damaged",
    ),  # fmt: skip
    "a picture's shape that lies": (
        lambda root: features(root, "observation.images.corner2", shape=[9, 9, 3]),
        "but the metadata says 9 x 9",
    ),  # fmt: skip
    "a shape that is no shape": (lambda root: features(root, "action", shape="big"), "damaged or incomplete"),
    "a feature that is missing": (
        lambda root: rewrite(root, lambda t: t.drop_columns(["action"])),
        "no column 'action'",
    ),
    "texts instead of numbers": (
        lambda root: rewrite(root, lambda t: with_column(t, "action", [["x"] * len(t)])),
        "expected numbers|width",
    ),  # fmt: skip
    "missing values": (
        lambda root: rewrite(root, lambda t: with_column(t, "action", [t["action"].to_pylist()[:-1] + [None]])),
        "missing values",
    ),  # fmt: skip
    "zero episodes": (
        lambda root: (
            edit(root, total_episodes=0),
            rewrite(root, lambda t: t.slice(0, 0), "meta/episodes/chunk-000/file-000.parquet"),
        ),
        "no episodes",
    ),  # fmt: skip
    "a number of episodes that lies": (
        lambda root: edit(root, total_episodes=7),
        "total_episodes is 7, but .* lists 4",
    ),
    "metadata that is deep": (lambda root: (root / "meta/info.json").write_text("[" * 100_000), "info.json: damaged"),
    "a pattern that asks for a gigabyte": (
        lambda root: edit(root, data_path="data/{chunk_index:01000000000d}"),
        "is no pattern of v3.0",
    ),  # fmt: skip
    "a pattern that looks into objects": (
        lambda root: edit(root, data_path="{chunk_index.__class__}"),
        "is no pattern of",
    ),
    "a pattern with a null byte": (lambda root: edit(root, data_path="data/\0"), "points outside the dataset"),
    "truncated": (lambda root: _cut(root / DATA), "file-000.parquet: truncated or damaged"),
}


@pytest.mark.parametrize("case", LEROBOT)
def test_a_hostile_or_damaged_lerobot_folder(case: str, lerobot: Path) -> None:
    change, message = LEROBOT[case]
    change(lerobot)
    refused((lerobot, {"cameras": ("corner2",)}), message)


@pytest.mark.parametrize("version", ["v21", "v30"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda video: video.unlink(), "missing, though --dataset.cameras corner2 asks for it"),
        (_cut, "truncated or damaged|no frame at"),
        (lambda video: video.write_bytes(b"no video" * 100), "truncated or damaged"),
    ],
)
def test_a_video_that_is_missing_or_damaged(version: str, damage: Any, message: str, tmp_path: Path) -> None:
    """It is named when its camera is asked for, and not missed otherwise."""
    root = Path(shutil.copytree(FIXTURES / f"lerobot_{version}_video", tmp_path / "push"))
    damage(next(path for path in sorted(root.rglob("*.mp4")) if "corner2" in str(path)))
    assert len(DATASET_BUILDER_REGISTRY["lerobot"](path=str(root), validation=0).build()["dataset"]) == 215
    refused((root, {"cameras": ("corner2",)}), message)


def test_a_video_that_is_a_list_of_other_files(tmp_path: Path) -> None:
    """FFmpeg would open what it names."""
    root = Path(shutil.copytree(FIXTURES / "lerobot_v30_video", tmp_path / "push"))
    video = next(path for path in root.rglob("*.mp4") if "corner2" in str(path))
    video.rename(video.with_name("other.mp4"))
    video.write_text("ffconcat version 1.0\nfile 'other.mp4'\n")
    refused((root, {"cameras": ("corner2",)}), "file-000.mp4: truncated or damaged")


def test_a_video_whose_size_is_not_the_metadatas(tmp_path: Path) -> None:
    root = Path(shutil.copytree(FIXTURES / "lerobot_v30_video", tmp_path / "push"))
    features(root, "observation.images.corner2", shape=[32, 32, 3])
    refused((root, {"cameras": ("corner2",)}), "pictures of 64 x 64, but the metadata says 32 x 32")


# ---- Minari --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"observation_space": "{"}, "damaged or incomplete"),
        ({"observation_space": json.dumps({"type": "Custom"})}, "a space that is not known or damaged"),
        ({"action_space": json.dumps({"type": "Box", "shape": [7], "low": [0] * 7, "high": [1] * 7})}, "says width 7"),
        ({"total_episodes": 9}, "4 episodes, but metadata.json says 9"),
        ({"data_format": "pickle"}, "storage 'pickle' is not known"),
    ],
)
def test_minari_metadata_that_lies(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(FIXTURES / "minari/metaworld/push-state-hdf5-v0", tmp_path / "push"))
    path = root / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    refused((root, {}), message)


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    for name, folder in (("minari/metaworld/push-state-hdf5-v0", "data"), ("lerobot_v30_image", "meta")):
        root = Path(shutil.copytree(FIXTURES / name, tmp_path / Path(name).name))
        (root / folder).rename(tmp_path / f"elsewhere-{folder}")
        (root / folder).symlink_to(tmp_path / f"elsewhere-{folder}")
        refused((root, {}), "points outside the dataset")


def test_minari_files_that_are_links_or_damaged(tmp_path: Path) -> None:
    for storage in ("arrow", "parquet"):
        root = Path(shutil.copytree(FIXTURES / f"minari/metaworld/push-state-{storage}-v0", tmp_path / storage))
        file = next((root / "data" / "2").glob("part-*"))
        whole = file.read_bytes()
        symlink(root, str(file.relative_to(root)))
        refused((root, {}), "points outside the dataset")
        file.unlink()
        file.write_bytes(whole[: len(whole) // 2])
        refused((root, {}), "data/2/part-0.* truncated or damaged")
        file.unlink()
        refused((root, {}), f"data/2: no part-.*{storage} in it")


# ---- zarr ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def zarr_store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "zarr" / "push_replay.zarr", tmp_path / "push.zarr"))


def array(root: Path, name: str, **values: Any) -> None:
    """Change the metadata of an array."""
    path = root / name / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def chunk(root: Path, name: str) -> Path:
    return next(path for path in sorted((root / name).iterdir()) if path.name[0].isdigit())


def claims(root: Path) -> None:
    """A blosc chunk whose header claims a gigabyte."""
    path = chunk(root, "data/action")
    data = bytearray(path.read_bytes())
    data[4:8] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(data)


def gzipped(root: Path) -> None:
    array(root, "data/action", compressor={"id": "zlib", "level": 9})
    chunk(root, "data/action").write_bytes(ZEROS)


ZARR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled objects": (
        lambda root: array(root, "data/action", dtype="|O", filters=[{"id": "pickle"}]),
        "nothing pickled",
    ),
    "a pickle filter": (lambda root: array(root, "data/action", filters=[{"id": "pickle"}]), "filters or compression"),
    "another compressor": (
        lambda root: array(root, "data/action", compressor={"id": "pickle"}),
        "filters or compression",
    ),
    "a chunk that is a link": (
        lambda root: symlink(root, str(chunk(root, "data/action").relative_to(root))),
        "points outside",
    ),
    "a chunk that claims too much": (claims, "unpacks to more than"),
    "a chunk that is a bomb": (gzipped, "unpacks to more than"),
    "a missing chunk": (lambda root: chunk(root, "data/action").unlink(), "chunk .* is missing"),
    "a missing picture": (lambda root: chunk(root, "data/img").unlink(), "chunk .* is missing"),
    "a truncated chunk": (lambda root: _cut(chunk(root, "data/action")), "truncated or damaged"),
    "a truncated picture": (lambda root: _cut(chunk(root, "data/img")), "truncated or damaged"),
    "more rows than the others": (lambda root: array(root, "data/state", shape=[2**39, 39]), "they must agree"),
    "chunks of 2**60 bytes": (lambda root: array(root, "data/state", chunks=[2**39, 2**39]), "are needed"),
    "another number of axes": (lambda root: array(root, "data/state", chunks=[1]), "do not fit the shape"),
    "no metadata": (lambda root: (root / "data/action/.zarray").unlink(), "no data/action"),
    "torn metadata": (lambda root: (root / "data/action/.zarray").write_text("{"), "damaged metadata"),
}


@pytest.mark.parametrize("case", ZARR)
def test_a_hostile_or_damaged_zarr_store(case: str, zarr_store: Path) -> None:
    change, message = ZARR[case]
    change(zarr_store)
    refused((zarr_store, {"cameras": ("img",)}), message)


@pytest.mark.parametrize("member", ["../../evil", "/etc/evil", "data/../../evil"])
def test_a_zip_whose_members_lead_elsewhere(member: str, tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "zarr" / "push_replay.zarr.zip", tmp_path / "push.zip"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, b"x")
    refused((path, {}), "points outside the store")


def test_a_zip_member_that_is_a_bomb(tmp_path: Path) -> None:
    source, path = FIXTURES / "zarr" / "push_replay.zarr.zip", tmp_path / "push.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in whole.infolist():
            big = info.filename.startswith("data/action/0")
            archive.writestr(info.filename, bytes(100_000_000) if big else whole.read(info))
    refused((path, {}), "100000000 bytes are more than the")


def test_episode_ends_that_are_none(zarr_store: Path) -> None:
    import zarr

    ends = zarr.open_array(zarr_store / "meta" / "episode_ends", mode="r+")
    for values in ([64, 127, 185, 999], [64, 64, 185, 215], [0, 127, 185, 215]):
        ends[:] = values
        refused((zarr_store, {}), "expected increasing numbers from 1 on, the last being the 215 rows")


# ---- what is declared and not stored --------------------------------------------------------------------------------


def unwritten(folder: Path, rows: int = 30_000_000, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A D4RL file of a few kilobytes whose arrays were never written."""
    widths = {"observations": (4,), "actions": (2,), "rewards": (), "terminals": ()}
    with h5py.File(folder / "data.hdf5", "w") as file:
        for name, width in widths.items():
            chunks = {"chunks": (options["chunks"], *width), "compression": "gzip"} if "chunks" in options else {}
            file.create_dataset(name, (rows, *width), options.get("dtype", "f4"), **chunks)
    return folder / "data.hdf5", {"name": "d4rl"}


def unwritten_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Episodes of ALOHA that were never written, each below the limit of a file."""
    for number in range(9):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            for name in ("action", "observations/qpos"):
                file.create_dataset(name, (200_000, 5), "f4")
    return folder, {"name": "aloha"}


def same_group(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Tens of thousands of names for one demonstration."""
    with h5py.File(folder / "demos.hdf5", "w", libver="latest") as file:
        file["data/demo_0/actions"], file["data/demo_0/obs/state"] = np.zeros((3, 1)), np.zeros((3, 2))
        for number in range(1, 20_000):
            file[f"data/demo_{number}"] = file["data/demo_0"]
    return folder / "demos.hdf5", {}


def bz2_npz(folder: Path) -> tuple[Path, dict[str, Any]]:
    with zipfile.ZipFile(folder / "data.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("observations.npy", header("(1000000, 4)") + bytes(16_000_000))
    return folder / "data.npz", {}


def bare_zarr(folder: Path, rows: int, width: int, chunk: int) -> tuple[Path, dict[str, Any]]:
    """A store of metadata alone, but for the ends of its one episode."""
    for name, shape, kind in (("data/action", [rows, width], "<f4"), ("meta/episode_ends", [1], "<i8")):
        (folder / "x.zarr" / name).mkdir(parents=True)
        chunks = [chunk, max(width, 1)][: len(shape)]
        meta = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": kind, "compressor": None, "order": "C"}
        (folder / "x.zarr" / name / ".zarray").write_text(json.dumps(meta | {"fill_value": 0, "filters": None}))
    (folder / "x.zarr" / "meta/episode_ends/0").write_bytes(struct.pack("<q", rows))
    return folder / "x.zarr", {"keys": ("action",)}


UNSTORED: dict[str, tuple[Make, str]] = {
    "HDF5 that was never written": (unwritten, "observations declares 0.48 GB .*, but stores 0.0 MB"),
    "HDF5 in pieces of a row": (lambda d: unwritten(d, 1_000_000, chunks=1), "declares .*, but stores 0.0 MB"),
    "HDF5 of bytes": (lambda d: unwritten(d, 4_000_000, dtype="u1"), "declares .*, but stores 0.0 MB"),
    "HDF5 in several files": (unwritten_files, "episode_2.hdf5: /action declares 4.0 MB .*, but stores 0.0 MB"),
    "one demonstration many times": (same_group, "20000 demonstrations in .* most are the same"),
    "npz of another compression": (bz2_npz, "only plain and deflated members"),
    "npz without values": (
        lambda d: npz(d, **{k: np.zeros((10**7, 0), np.float32) for k in ("observations", "actions")}),
        "'observations' declares 0.64 GB",
    ),
    "zarr without chunks": (lambda d: bare_zarr(d, 10**11, 4, 1), "of its 100000000000 chunks, 1 are stored"),
    "zarr without values": (lambda d: bare_zarr(d, 10**11, 0, 1), "declares 12800.00 GB"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSTORED)
def test_what_is_declared_and_not_stored_is_refused(case: str, tmp_path: Path) -> None:
    make, message = UNSTORED[case]
    refused(make(tmp_path), message)


def test_a_file_may_declare_as_much_again_as_it_has() -> None:
    """Such as rewards that were never written, beside 50 MB of observations."""
    untrusted.Ledger(50_000_000).add("x", (6_000_000,), 8, 0)
    for size in (40_000_000, 0):
        with pytest.raises(UserError, match="x declares 48.0 MB"):
            untrusted.Ledger(size).add("x", (6_000_000,), 8, 0)


def test_a_table_of_equal_rows_is_refused(lerobot: Path) -> None:
    episodes = {"episode_index": np.zeros(3 * 10**6, np.int64), "length": np.ones(3 * 10**6, np.int64)}
    pq.write_table(pa.table(episodes), lerobot / EPISODES)
    refused((lerobot, {}), "its table of 3000000 rows declares .*, but stores")


def test_pictures_that_are_one_entry_of_a_dictionary(tmp_path: Path) -> None:
    one = pa.array([np.random.default_rng(0).bytes(100_000)])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), one)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": column}), path, store_schema=False)  # 200 MB when it is read
    with pytest.raises(UserError, match="its texts or pictures are far larger than the file"):
        untrusted.read_parquet(pq.ParquetFile(path), path, untrusted.Ledger())


def test_columns_of_zeros_are_data(tmp_path: Path) -> None:
    """gzip packs zeros a thousandfold, as in the rewards of a sparse task."""
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name, width in {"observations": (4,), "actions": (2,), "rewards": (), "terminals": ()}.items():
            values = np.zeros((300_000, *width), np.float32)
            file.create_dataset(name, data=values, compression="gzip", compression_opts=9, chunks=(100_000, *width))
    assert (tmp_path / "data.hdf5").stat().st_size < 40_000
    built = DATASET_BUILDER_REGISTRY["d4rl"](path=str(tmp_path / "data.hdf5"), validation=0).build()
    assert len(built["dataset"]) == 300_000


def test_pictures_that_share_their_bytes(tmp_path: Path) -> None:
    """Elements of any length are references, and many may refer to the same bytes."""
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        data = file.create_dataset("x", (1000,), h5py.vlen_dtype(np.uint8), chunks=(1000,))
        data[0] = np.zeros(100_000, np.uint8)
        _, raw = data.id.read_direct_chunk((0,))
        data.id.write_direct_chunk((0,), raw[:16] * 1000)
    with untrusted.open_hdf5(tmp_path / "x.hdf5") as file, pytest.raises(UserError, match="x holds more than the file"):
        untrusted.read_checked(file["x"])


def test_a_video_that_claims_more_pictures_than_bytes(tmp_path: Path) -> None:
    root = Path(shutil.copytree(FIXTURES / "lerobot_v30_video", tmp_path / "push"))
    video = next(path for path in root.rglob("*.mp4") if "corner2" in str(path))
    data = bytearray(video.read_bytes())
    struct.pack_into(">II", data, data.find(b"stsz") + 8, 1, 10**9)
    video.write_bytes(data)
    refused((root, {"cameras": ("corner2",)}), "file-000.mp4: 1000000000 pictures in 0.1 MB")


def test_packed_arrow_files_are_refused(tmp_path: Path) -> None:
    root = Path(shutil.copytree(FIXTURES / "minari/metaworld/push-state-arrow-v0", tmp_path / "push"))
    file = root / "data/0/part-0.arrow"
    assert not untrusted.is_packed(file)
    table = pa.ipc.open_file(file).read_all()
    with pa.ipc.new_file(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    refused((root, {}), "part-0.arrow is compressed")


def test_the_limit_of_the_process_is_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (taken + 10**6, taken + 10**6))
    assert untrusted.free_memory() < 10**8


# ---- pipes, terminals, damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("d4rl/push.hdf5", ""),
        ("ogbench/pointmaze-medium-navigate-mini.npz", ""),
        ("lerobot_v30_image", "data/chunk-000/file-000.parquet"),
        ("lerobot_v30_image", "meta/tasks.parquet"),
        ("minari/metaworld/push-state-hdf5-v0", "data/main_data.hdf5"),
        ("minari/metaworld/push-state-arrow-v0", "data/1/part-0.arrow"),
    ],
)
def test_a_pipe_is_not_waited_for(name: str, file: str, tmp_path: Path) -> None:
    source, copy = FIXTURES / name, tmp_path / Path(name).name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    (copy / file if file else copy).unlink()
    os.mkfifo(copy / file if file else copy)
    refused((copy, {}), "is a pipe, socket or device; expected a file")


def test_names_from_a_file_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = hdf5(tmp_path, lambda demo: None)
    with h5py.File(path, "a") as file:
        for number in range(2):
            file[f"data/demo_{number}/obs/\x1b[2J$\\frac{{"] = np.zeros((3, 1))
    with pytest.raises(UserError, match=re.escape("\\x1b[2J")) as error:
        DATASET_BUILDER_REGISTRY["robomimic"](path=str(path), keys=("absent",)).build()
    assert str(error.value).isprintable()
    inspect.main([str(path), "--out", str(tmp_path / "page.png")])
    assert "\x1b" not in capsys.readouterr().out


HOSTILE: tuple[dict[str, Any], ...] = ({"id": "evil_env:Env-v0"}, {"id": "Env-v0", "entry_point": "evil_env:Env"})
HOSTILE += ({"id": "Hopper-v5", "kwargs": {"xml_file": "/etc/passwd"}},)
HOSTILE += ({"id": "Env-v0", "additional_wrappers": [{"entry_point": "evil_env:W"}]},)


def test_an_environment_that_a_dataset_names_imports_and_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "evil_env.py").write_text("open('hacked', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    root = Path(shutil.copytree(FIXTURES / "minari/metaworld/push-state-hdf5-v0", tmp_path / "push"))
    path = root / "data" / "metadata.json"
    whole = json.loads(path.read_text())
    named: list[dict[str, Any]] = [{"eval_env_spec": "", "env_spec": json.dumps(spec)} for spec in HOSTILE]
    options = {"id": "Hopper-v5", "kwargs": '{"xml_file": "/etc/passwd"}'}
    named += [{"environment": options}, {"environment": options | {"kwargs": "", "id": "evil_env:Env-v0"}}]
    named += [{"environment": {"id": "Hopper-v5", "wrappers": ["RecordVideo"]}}]
    for change in named:
        path.write_text(json.dumps(whole | change))
        assert "env" not in DATASET_BUILDER_REGISTRY["minari"](path=str(root)).build()
    assert not Path("hacked").exists() and "root:" not in caplog.text


DESCRIBED = {"lerobot_v21_video": "meta/info.json", "zarr/push_replay.zarr": "data/state/.zarray"}
DESCRIBED |= {"minari/metaworld/push-state-hdf5-v0": "data/metadata.json"}


@pytest.mark.parametrize("name", DESCRIBED)
def test_no_damage_to_metadata_is_more_than_one_line(name: str, tmp_path: Path) -> None:
    chance, root = random.Random(1), Path(shutil.copytree(FIXTURES / name, tmp_path / "data"))
    path = root / DESCRIBED[name]
    whole = path.read_text()
    for _ in range(30):
        path.write_text(text := damaged(whole, chance))
        hold(lambda: DATASET_BUILDER_REGISTRY[recognise(str(root))](path=str(root)).build(), text[:2000])


# ---- all of them through the script --------------------------------------------------------------------------------


def test_the_script_tells_it_in_one_line_and_exits_with_2(tmp_path: Path, script: Callable[..., Path]) -> None:
    path, _ = hdf5(tmp_path, link(h5py.ExternalLink("outside.hdf5", "/actions")))
    with pytest.raises(UserError, match="demos.hdf5: /data/demo_1/actions is a link"):
        script("--trainer", "bc", "--dataset", "robomimic", "--dataset.path", path)
