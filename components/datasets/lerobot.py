"""LeRobotDataset v2.1 and v3.0, from a local folder or from the Hugging Face hub.

`meta/info.json` declares the features and the paths of the files. v2.1 has one parquet file, and one video per camera,
for each episode (`meta/episodes.jsonl`). v3.0 stores many episodes in a file; `meta/episodes/*.parquet` lists them, and
the time at which each begins in a video. Rows are ordered by `index`. The format's own statistics are not used: v3.0's
quantiles are averages over episodes, and they include the episodes that are held out here.

`next.reward` is the reward of the action in the same row. `next.done` marks the end of an episode, which need not be a
terminal state, so `terminated` is `next.done` where `next.success` also holds; a feature `next.terminated`, which
`convert` writes, is read directly. The format lacks the observation after the last action; `convert` adds it as
`next.observation.X`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, require
from .episodes import IMAGES, Episodes, Reader, chosen_cameras, join_successors, steps_only
from .frames import EncodedFrames, Frames, VideoFrames, require_video
from .untrusted import check_memory, check_parquet, existing, inside, read_json

WHAT = "the folder of a LeRobotDataset v2.1 or v3.0 (with meta/ and data/)"
FIELD = re.compile(r"{(\w+)(?::(0\dd))?}")  # in a pattern; str.format would let the file evaluate more than names
FLAGS = ("next.reward", "next.done", "next.success", "next.terminated", "next.truncated")


@dataclass(frozen=True)
class LeRobotDataset(Reader):
    """LeRobotDataset v2.1 or v3.0, from a folder (--dataset.path) or the Hugging Face hub (--dataset.repo-id)."""

    repo_id: str = ""
    """Dataset on the Hugging Face hub, such as lerobot/pusht; downloaded once into huggingface_hub's cache."""
    revision: str = ""
    """Branch, tag or commit of --dataset.repo-id; its main branch by default."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}.

        Items: every vector feature `observation.*` `[D]` and `action` `[Da]`, float32, in the data's own units;
        `observation.images.<camera>` `[C, H, W]` uint8; `task`; reward, terminated and truncated where recorded.

        Raises:
            UserError: no such data, another version, a missing, truncated or inconsistent file, NaN; names the file.
        """
        if bool(self.path) == bool(self.repo_id):
            raise UserError(f"one of --dataset.path and --dataset.repo-id is needed: {WHAT}")
        root = self._download() if self.repo_id else existing(self.path, WHAT)
        return self.finish(read(root, self.cameras))

    def _download(self) -> Path:
        """Download the dataset, with videos of the chosen cameras only, into the hub's cache; returns its folder."""
        hub = require("huggingface_hub", "huggingface_hub")
        patterns = ["meta/*", "data/*", *(f"videos/*{camera.removeprefix(IMAGES)}/*" for camera in self.cameras)]
        options: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision or None, "etag_timeout": 5}
        try:
            return Path(hub.snapshot_download(self.repo_id, allow_patterns=patterns, **options))
        except Exception as error:  # no network, no such repository, no permission, a full disk, ...
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--dataset.repo-id {self.repo_id}: neither in the cache nor to be had from the hub ({reason});"
                " check the name and the network, or give a local copy with --dataset.path"
            ) from error


class Meta(NamedTuple):
    """Contents of `meta/`."""

    root: Path
    version: str
    fps: float
    features: dict[str, Any]
    episodes: list[dict[str, Any]]
    patterns: dict[str, Any]  # "data_path", "video_path"
    tasks: dict[int, str]

    def file(self, pattern: str, episode: dict[str, Any], key: str = "data") -> Path:
        """The data or video file that holds an episode."""
        number = int(episode["episode_index"])
        names: dict[str, Any] = {"episode_index": number, "episode_chunk": number // self.patterns["chunks_size"]}
        names |= {"chunk_index": episode.get(f"{key}/chunk_index"), "file_index": episode.get(f"{key}/file_index")}
        names["video_key"] = key.removeprefix("videos/")
        where = self.root / "meta" / "info.json"
        try:
            relative = FIELD.sub(lambda found: f"{names[found[1]]:{found[2] or ''}}", self.patterns[pattern])
            if "{" in relative:
                raise ValueError
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{where}: {pattern} {self.patterns[pattern]!r} is no pattern of {self.version}") from error
        return inside(self.root, relative, where)


def read(root: Path, cameras: tuple[str, ...]) -> Episodes:
    """Read a dataset's folder: its vectors, and a decoder for the pictures of each of `cameras`."""
    require("pyarrow", "pyarrow")
    meta = read_meta(root)
    pictured = {k.removeprefix(IMAGES): f for k, f in meta.features.items() if f["dtype"] in ("image", "video")}
    chosen = chosen_cameras(cameras, list(pictured), str(root))
    embedded = [IMAGES + name for name in chosen if pictured[name]["dtype"] == "image"]
    rows, encoded, files = read_rows(meta, embedded)
    order = np.argsort(rows["index"], kind="stable")
    rows = {key: values[order] for key, values in rows.items()}
    episode = rows["episode_index"]
    ends = np.flatnonzero(np.append(episode[1:] != episode[:-1], True)) + 1
    if len(set(episode[ends - 1].tolist())) != len(ends):
        raise UserError(f"{root}/data: the rows of an episode are not next to each other in the order of 'index'")
    vectors = {key: torch.from_numpy(rows[key]) for key in vector_features(meta.features) if key != "action"}
    steps = torch.from_numpy(ends)
    following = {key.removeprefix("next."): vectors.pop(key) for key in list(vectors) if key.startswith("next.")}
    observations: dict[str, Any] = dict(vectors)
    at, after = steps_only(steps)
    shown = torch.arange(len(at))  # [M] the step whose picture each observation shows
    if vectors and set(following) == set(vectors):
        observations, at, after = join_successors(vectors, following, steps)
        shown = torch.empty(int(after.max()) + 1, dtype=torch.int64)
        shown[after] = torch.arange(len(at))  # final observations have no picture of their own and repeat the last one
        shown[at] = torch.arange(len(at))
    for name in chosen:
        key, shape = IMAGES + name, picture_shape(meta, IMAGES + name)
        if key in embedded:
            data, starts, stops = encoded[key]
            observations[key] = EncodedFrames(data, starts[order][shown], stops[order][shown], shape, files)
        else:
            observations[key] = video(meta, key, shape, rows, shown.numpy())
    columns = flags(rows) | {"action": torch.from_numpy(rows["action"])}
    texts: list[str] = []
    if meta.tasks and "task_index" in rows:
        if unknown := sorted(set(np.unique(rows["task_index"]).tolist()) - set(meta.tasks)):
            raise UserError(f"{root}/meta: task {unknown[0]} has no text in the list of tasks")
        texts = list(dict.fromkeys(meta.tasks.values()))
        numbers = {index: texts.index(text) for index, text in meta.tasks.items()}
        columns["task_index"] = torch.tensor([numbers[int(index)] for index in rows["task_index"]])
    stored = {"format": f"lerobot {meta.version}", "fps": meta.fps}
    return Episodes(str(root), steps, columns, observations, at, after, texts, stored)


def flags(rows: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """reward, terminated and truncated `[N]`, as far as they are recorded; see the module's docstring."""
    columns: dict[str, Tensor] = {}
    if "next.reward" in rows:
        columns["reward"] = torch.from_numpy(rows["next.reward"].astype(np.float32))
    for name in ("terminated", "truncated"):
        if f"next.{name}" in rows:
            columns[name] = torch.from_numpy(rows[f"next.{name}"].astype(bool))
    if "terminated" not in columns and "next.done" in rows and "next.success" in rows:
        columns["terminated"] = torch.from_numpy(rows["next.done"].astype(bool) & rows["next.success"].astype(bool))
    return columns


# ---- metadata ------------------------------------------------------------------------------------------------------


def read_meta(root: Path) -> Meta:
    """Read and check `meta/`."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(f"--dataset.path {root}: no meta/info.json in it; expected {WHAT}")
    info = read_json(inside(root, "meta/info.json", path))
    try:
        version, features, fps = str(info["codebase_version"]), dict(info["features"]), float(info["fps"])
        for key in ("action", *features):
            features[key] = {**features[key], "shape": [int(size) for size in features[key]["shape"]]}
            if not isinstance(features[key]["dtype"], str) or any(size < 0 for size in features[key]["shape"]):
                raise ValueError(f"feature {key!r}")
        patterns = {name: info.get(name) for name in ("data_path", "video_path")}
        patterns["chunks_size"] = max(int(info.get("chunks_size", 1000)), 1)
        total = int(info.get("total_episodes", -1))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged or incomplete ({type(error).__name__}: {error})") from error
    if not version.startswith(("v2.1", "v3.")) or not fps > 0:
        raise UserError(f"{path}: version {version} at {fps:g} fps; this reader knows v2.1 and v3.0 (LeRobot converts)")
    if version.startswith("v2.1"):
        episodes = read_json(inside(root, "meta/episodes.jsonl", path), lines=True)
        listed = read_json(inside(root, "meta/tasks.jsonl", path), lines=True)
    else:
        episodes = []
        for file in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
            table = read_table(inside(root, file.relative_to(root), path), ["episode_index", "length"])
            names = [name for name in table.schema.names if not name.startswith("stats/")]
            episodes += table.select(names).to_pylist()
        tasks = root / "meta" / "tasks.parquet"
        listed = (
            read_table(inside(root, "meta/tasks.parquet", path), ["task_index"]).to_pylist() if tasks.exists() else []
        )
    where = f"{root}/meta/episodes" + (".jsonl" if version.startswith("v2.1") else "")
    try:
        for episode in episodes:
            episode["episode_index"], episode["length"] = int(episode["episode_index"]), int(episode["length"])
            if episode["length"] < 1:
                raise ValueError(f"episode {episode['episode_index']} has length {episode['length']}")
        # In v3.0 the text is a pandas index, whose column name depends on the writer.
        texts = {int(t["task_index"]): str(next(v for k, v in t.items() if k != "task_index")) for t in listed}
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(f"{where}: damaged or incomplete ({type(error).__name__}: {error})") from error
    if not episodes:
        raise UserError(f"{where}: no episodes; expected at least one")
    if total >= 0 and total != len(episodes):
        raise UserError(f"{path}: total_episodes is {total}, but {where} lists {len(episodes)}; a file is incomplete")
    return Meta(root, version, fps, features, episodes, patterns, texts)


def vector_features(features: dict[str, Any]) -> list[str]:
    """`action`, and the observations and successors with one axis; pictures have three."""
    return [
        key
        for key, feature in features.items()
        if (key == "action" or key.startswith(("observation.", "next.observation.")))
        and len(feature["shape"]) == 1
        and feature["dtype"].startswith(("float", "int", "uint", "bool"))
    ]


def picture_shape(meta: Meta, key: str) -> tuple[int, int, int]:
    """(C, H, W) of a camera; the metadata may declare the channels last or first."""
    shape, names = meta.features[key]["shape"], meta.features[key].get("names") or []
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"{meta.root}/meta/info.json: {key!r} has shape {shape}; expected height, width, channels")
    first = isinstance(names, list) and len(names) == 3 and str(names[0]).startswith("channel")
    channels, height, width = shape if first or shape[2] not in (1, 3, 4) else (shape[2], *shape[:2])
    if channels not in (1, 3, 4):
        raise UserError(f"{meta.root}/meta/info.json: {key!r} has shape {shape}; expected 1, 3 or 4 channels")
    return channels, height, width


# ---- rows ----------------------------------------------------------------------------------------------------------


def read_rows(meta: Meta, embedded: list[str]) -> tuple[dict[str, np.ndarray], dict[str, Any], list[Path]]:
    """Read the columns that are used from every data file of the episodes.

    Returns:
        Columns, float32 `[N, D]` or plain `[N]`; for each camera of `embedded`, the arguments of `EncodedFrames`; the
        files.
    """
    root, features = meta.root, meta.features
    widths = {key: features[key]["shape"][0] for key in vector_features(features)}
    plain = ["index", "episode_index", "timestamp", *(["task_index"] if meta.tasks else [])]
    plain += [key for key in FLAGS if key in features]
    expected = sum(episode["length"] for episode in meta.episodes)
    check_memory(4 * expected * (sum(widths.values()) + 2 * len(plain)), f"{root}: {expected} rows")
    files = list(dict.fromkeys(meta.file("data_path", episode) for episode in meta.episodes))
    parts: dict[str, list[np.ndarray]] = {key: [] for key in (*widths, *plain)}
    pictures: dict[str, list[list[np.ndarray]]] = {key: [[], []] for key in embedded}
    for path in files:
        table = read_table(path, [*parts, *embedded], expected)
        for key in parts:
            parts[key].append(as_array(table[key], widths.get(key), f"{path}: column {key!r}"))
        for key in embedded:
            for data, lengths in as_bytes(table[key], f"{path}: column {key!r}"):
                pictures[key][0].append(data)
                pictures[key][1].append(lengths)
    rows = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    if len(rows["index"]) != expected:
        raise UserError(
            f"{root}/data: {len(rows['index'])} rows, but the list of episodes promises {expected}; it is incomplete"
        )
    promised = {episode["episode_index"]: episode["length"] for episode in meta.episodes}
    numbers, counts = np.unique(rows["episode_index"], return_counts=True)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        if promised.get(number) != count:
            raise UserError(
                f"{root}/data: episode {number} has {count} rows, its metadata says {promised.get(number, 0)}"
            )
    encoded = {}
    for key, (blobs, sizes) in pictures.items():
        ends = np.concatenate(sizes).cumsum()
        encoded[key] = (np.concatenate(blobs), np.append(0, ends[:-1]), ends)
    return rows, encoded, files


def read_table(path: Path, columns: list[str], most_rows: int | None = None) -> Any:
    """Read columns of a parquet file, or all of them without `most_rows`. Raises UserError: a bad file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise UserError(f"{path}: no column {missing[0]!r}; found: {', '.join(file.schema_arrow.names[:20])}")
        if most_rows is not None and file.metadata.num_rows > most_rows:
            raise UserError(f"{path}: {file.metadata.num_rows} rows, but the list of episodes promises {most_rows}")
        wanted = columns if most_rows is not None else None
        check_parquet(file, path, wanted)
        return file.read(columns=wanted)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing, though the dataset's metadata names it") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({str(error).splitlines()[0][:100]})") from error


def as_array(column: Any, width: int | None, place: str, says: str = "meta/info.json") -> np.ndarray:
    """A parquet column as float32 `[N, width]`, or as plain numbers `[N]` when `width` is None."""
    import pyarrow
    import pyarrow.compute

    if column.null_count:
        raise UserError(f"{place} has {column.null_count} missing values")
    values, rows = column.combine_chunks(), len(column)
    if isinstance(values, pyarrow.ChunkedArray):
        values = pyarrow.concat_arrays(values.chunks) if values.num_chunks else pyarrow.array([], values.type)
    types, nested = pyarrow.types, lambda t: pyarrow.types.is_list(t) or pyarrow.types.is_fixed_size_list(t)
    lengths = {1}  # features of shape (1,) are plain scalars
    if nested(values.type):
        lengths = set(pyarrow.compute.unique(pyarrow.compute.list_value_length(values)).to_pylist())
        values = values.flatten()
    if rows and lengths != {1 if width is None else width}:
        found = ", ".join(map(str, sorted(lengths)))
        raise UserError(f"{place} has rows of width {found}, but {says} says {1 if width is None else width}")
    kind = values.type
    if values.null_count or not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise UserError(f"{place} holds {kind} with {values.null_count} missing values; expected numbers")
    array = values.to_numpy(zero_copy_only=False)
    return array if width is None else array.astype(np.float32).reshape(rows, width)


def as_bytes(column: Any, place: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The bytes of a column of pictures, `struct{bytes, path}`: for each chunk, data `[bytes]` and lengths `[n]`."""
    import pyarrow

    parts = []
    for chunk in column.chunks:
        if not (pyarrow.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0):
            raise UserError(f"{place} holds {chunk.type}; expected pictures (struct of bytes and path)")
        binary = chunk.flatten()[chunk.type.get_field_index("bytes")]
        if binary.null_count:
            raise UserError(f"{place} has {binary.null_count} rows without the bytes of their picture")
        binary = binary.cast(pyarrow.large_binary())
        offsets = np.frombuffer(binary.buffers()[1], np.int64)[binary.offset : binary.offset + len(binary) + 1]
        data = np.frombuffer(binary.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        parts.append((data, np.diff(offsets)))
    return parts


def video(meta: Meta, key: str, shape: tuple[int, int, int], rows: dict[str, np.ndarray], shown: np.ndarray) -> Frames:
    """One camera's videos: picture i has the time of row `shown[i]`, counted from its episode's start in the file."""
    require_video()
    named: dict[Path, int] = {}
    numbers, starts = {}, {}
    for episode in meta.episodes:
        path = meta.file("video_path", episode, f"videos/{key}")
        if path not in named and not path.is_file():
            raise UserError(f"{path}: missing, though --dataset.cameras {key.removeprefix(IMAGES)} asks for it")
        numbers[episode["episode_index"]] = named.setdefault(path, len(named))
        try:
            starts[episode["episode_index"]] = float(episode.get(f"videos/{key}/from_timestamp") or 0.0)
        except (TypeError, ValueError) as error:
            raise UserError(f"{meta.root}/meta/episodes: {key!r} has no number as from_timestamp") from error
    episodes = rows["episode_index"][shown].tolist()
    times = np.array([starts[e] for e in episodes]) + rows["timestamp"][shown].astype(np.float64)
    return VideoFrames(list(named), np.array([numbers[e] for e in episodes]), times, shape, meta.fps)
