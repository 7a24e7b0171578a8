"""Write any dataset as LeRobotDataset v3.0 or Minari.

python -m components.datasets.convert demos.hdf5 demos-lerobot --format lerobot
python -m components.datasets.convert demos.zarr demos-minari --format minari --dataset.cameras img
python -m components.datasets.convert demos-minari --dataset metaworld --dataset.demos 20 --format minari

Rewards, flags and successors are converted, too. LeRobot gets the features next.terminated, next.truncated and
next.observation.X beside its own, among which are intervention and next.success; Minari has these two in `infos`, and
gets the observation after the last action; where that is unknown, the last observation is repeated and the metadata
record it. Pictures are written without loss.
"""

import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..data.features import INTERVENTION, RECORDED, SUCCESS
from ..data.pictures import CHANNELS, IMAGES, is_picture
from ..errors import UserError, require
from ..run import command_line as cli
from ..run import process
from ..run.files import beside
from .commands import parse, recorded_by
from .episodes import Episodes, take
from .untrusted import check_memory

# LeRobot's own limits: bytes of a data file, files of a folder.
FILE_BYTES, FILES_PER_CHUNK = 100 << 20, 1000


@dataclass(kw_only=True)
class Options:
    """Convert a dataset: SOURCE DEST, or DEST with --dataset NAME."""

    format: Literal["lerobot", "minari"] = "lerobot"
    """Format to write."""
    fps: float = 0.0
    """Steps a second; by default those of the source, or 30."""
    task: str = ""
    """Text of the task, where the source has none (lerobot); by default Meta-World's instruction for its tasks."""
    robot: str = "unknown"
    """Name of the robot (lerobot)."""
    id: str = ""
    """Id in Minari's form, such as lab/demos-v0; by default derived from the folder's name (minari)."""
    storage: Literal["hdf5", "arrow", "parquet"] = "hdf5"
    """Storage (minari)."""


def main(argv: list[str]) -> int:
    """Convert; returns the exit code."""
    wants = {"cameras": ("all",), "validation": 0.0}
    options, words, factory = parse(Options, argv, 2, wants, "[SOURCE] DEST [OPTIONS]")
    if len(words) == 1 and (cli.given(argv, "dataset") or cli.given(argv, "dataset.path")):
        words = ["", *words]
    if len(words) != 2:
        raise UserError("expected SOURCE DEST, or --dataset NAME with its options and DEST")
    dest = Path(words[1]).expanduser()
    if dest.exists():
        raise UserError(f"{dest}: exists already; give another folder")
    print(write(recorded_by(factory)["dataset"].episodes, dest, options))
    return 0


def write(episodes: Episodes, dest: Path, options: Options) -> str:
    """Write episodes to a folder, whole or not at all; returns a line about it. Raises UserError: writing failed."""
    temporary = beside(dest)
    try:
        temporary.mkdir(parents=True)
        (write_lerobot if options.format == "lerobot" else write_minari)(episodes, temporary, options, dest)
        if dest.exists():
            raise UserError(f"{dest}: exists already; give another folder")
        temporary.rename(dest)  # so a killed process leaves no folder that looks complete
    except OSError as error:
        raise UserError(f"{dest}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    told = {"texts of tasks": episodes.tasks, "names of dimensions": episodes.names, "fps": episodes.stored.get("fps")}
    lost = ", ".join(what for what, found in told.items() if found) if options.format == "minari" else ""
    note = f"; without {lost}, for which Minari has no place" if lost else ""
    return f"{dest}: {len(episodes.ends)} episodes, {len(episodes.at)} steps as {options.format}{note}"


def episode_slices(episodes: Episodes) -> Iterator[slice]:
    """The range of steps of each episode."""
    start = 0
    for end in episodes.ends.tolist():
        yield slice(start, end)
        start = end


def picture_rows(store: Any, rows: Any) -> np.ndarray:
    """Pictures `rows`, `[n, H, W, C]` uint8."""
    return take(store, rows).permute(0, 2, 3, 1).contiguous().numpy()


# ---- LeRobot -------------------------------------------------------------------------------------------------------


def write_lerobot(episodes: Episodes, root: Path, options: Any, dest: Path) -> None:
    """Write `root` as LeRobotDataset v3.0, pictures as PNG within the data files."""
    pa = require("pyarrow", "pyarrow")
    require("PIL", "pillow")
    fps = options.fps or float(episodes.stored.get("fps", 30))
    fps = int(fps) if fps == int(fps) else fps
    texts = list(episodes.tasks) or [options.task or episodes.instruction or "no description"]
    vectors, cameras = lerobot_columns(episodes)
    features = lerobot_features(episodes, vectors, cameras)
    files = DataFiles(root, features)
    listed: list[dict[str, Any]] = []
    collected: dict[str, list[dict[str, Any]]] = {key: [] for key in features}
    for number, rows in enumerate(episode_slices(episodes)):
        columns = {key: values[rows] for key, values in vectors.items()}
        columns["timestamp"] = (columns["frame_index"] / fps).astype(np.float32)
        stats = {key: _stats(values) for key, values in columns.items()}
        arrays = {key: _vector_array(pa, values, features[key]) for key, values in columns.items()}
        for key in cameras:
            pictures = picture_rows(episodes.observations[key], episodes.at[rows])
            arrays[key] = _picture_array(pa, pictures, features[key], f"{key}-{number:06d}")
            stats[key] = _picture_stats(pictures)
        chunk, file = files.add(arrays)
        tasks = sorted({int(i) for i in columns["task_index"]})
        entry: dict[str, Any] = {"episode_index": number, "tasks": [texts[i] for i in tasks]}
        entry |= {"length": rows.stop - rows.start, "data/chunk_index": chunk, "data/file_index": file}
        entry |= {"dataset_from_index": rows.start, "dataset_to_index": rows.stop}
        entry |= {f"stats/{key}/{name}": value for key in stats for name, value in stats[key].items()}
        listed.append(entry | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        for key in stats:
            collected[key].append(stats[key])
    files.flush()
    total = {key: _aggregated(parts, vectors.get(key)) for key, parts in collected.items()}
    total["timestamp"] = _stats((vectors["frame_index"] / fps).astype(np.float32))
    count = len(listed)
    info = {"codebase_version": "v3.0", "robot_type": options.robot, "total_episodes": count}
    info |= {"total_frames": len(episodes.at), "total_tasks": len(texts), "chunks_size": FILES_PER_CHUNK}
    info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": fps, "splits": {"train": f"0:{count}"}}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "video_path": None}
    _write_meta(root, info | {"features": features}, listed, total, texts)


class DataFiles:
    """The data files, one after the other: a file is written when the next episode no longer fits into it.

    Args:
        root: The dataset's folder.
        features: The columns, as `info.json` describes them.
    """

    def __init__(self, root: Path, features: dict[str, Any]) -> None:
        import pyarrow as pa

        schema = pa.schema([(key, _arrow_type(pa, feature)) for key, feature in features.items()])
        declared = {"huggingface": json.dumps({"info": {"features": _hugging_face(features)}})}
        self.root, self.schema = root, schema.with_metadata(declared)
        self.chunk = self.file = self.size = 0
        self.tables: list[Any] = []

    def add(self, arrays: dict[str, Any]) -> tuple[int, int]:
        """Add an episode's columns; returns (chunk, file), the place where they are written."""
        import pyarrow as pa

        table = pa.table([arrays[key] for key in self.schema.names], schema=self.schema)
        if self.tables and self.size + table.nbytes > FILE_BYTES:
            self.flush()
        self.size += table.nbytes
        self.tables.append(table)
        return self.chunk, self.file

    def flush(self) -> None:
        """Write the episodes that were added since the last file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.root / f"data/chunk-{self.chunk:03d}/file-{self.file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(self.tables), path)
        full = self.file + 1 == FILES_PER_CHUNK
        self.chunk, self.file = (self.chunk + 1, 0) if full else (self.chunk, self.file + 1)
        self.size, self.tables = 0, []


def lerobot_features(episodes: Episodes, vectors: dict[str, np.ndarray], cameras: list[str]) -> dict[str, Any]:
    """The features as `info.json` describes them, cameras first."""
    features: dict[str, Any] = {}
    for key in cameras:
        channels, height, width = episodes.observations[key].shape[-3:]
        if channels not in CHANNELS:
            raise UserError(f"{key!r} has {channels} channels, and LeRobot's pictures 1, 3 or 4; use --format minari")
        names = ["height", "width", "channels"]
        features[key] = {"dtype": "image", "shape": [height, width, channels], "names": names}
    for key, values in vectors.items():
        width = values.shape[1] if values.ndim == 2 else 1
        kind = {"float32": "float32", "bool": "bool", "int64": "int64"}[str(values.dtype)]
        features[key] = {"dtype": kind, "shape": [width], "names": episodes.names.get(key.removeprefix("next."))}
    return features


def lerobot_columns(episodes: Episodes) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of the data files by LeRobot's names, `[N, D]` or `[N]`, and the names of the cameras."""
    cameras = list(episodes.cameras)
    vectors: dict[str, np.ndarray] = {}
    observed = {key: store for key, store in episodes.observations.items() if key not in cameras}
    for key, store in observed.items():
        vectors[key] = store[episodes.at].float().numpy()
    if observed and bool((episodes.after >= 0).all()):
        vectors |= {f"next.{key}": store[episodes.after].float().numpy() for key, store in observed.items()}
    data = episodes.columns
    vectors["action"] = data["action"].float().numpy()
    steps = len(episodes.at)
    if "reward" in data:
        end = np.zeros(steps, bool)
        end[episodes.ends.numpy() - 1] = True
        vectors["next.reward"] = data["reward"].float().numpy()
        vectors["next.done"] = end
        vectors |= {f"next.{name}": data[name].numpy() for name in ("terminated", "truncated")}
    named = {INTERVENTION: INTERVENTION, SUCCESS: f"next.{SUCCESS}"}
    vectors |= {named[key]: data[key].numpy() for key in RECORDED if key in data}
    lengths = episodes.lengths.numpy()
    vectors["timestamp"] = np.zeros(steps, np.float32)
    vectors["frame_index"] = np.concatenate([np.arange(length) for length in lengths])
    vectors["episode_index"] = np.repeat(np.arange(len(lengths)), lengths)
    vectors["index"] = np.arange(steps)
    vectors["task_index"] = data["task_index"].numpy() if "task_index" in data else np.zeros(steps, np.int64)
    return vectors, cameras


def _write_meta(
    root: Path, info: dict[str, Any], listed: list[dict[str, Any]], stats: dict[str, Any], texts: list[str]
) -> None:
    """Write `meta/`: the list of episodes, the statistics of the whole, the tasks' texts and `info.json`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(listed), path)
    (root / "meta/stats.json").write_text(json.dumps(stats, indent=4))
    tasks = pa.table({"task_index": list(range(len(texts))), "task": texts})
    plain = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}  # pandas', whose index LeRobot looks at
    told: list[Any] = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": stored, "metadata": None}
        for name, (kind, stored) in plain.items()
    ]
    pandas = json.dumps({"index_columns": ["task"], "column_indexes": [], "columns": told})
    pq.write_table(tasks.replace_schema_metadata({"pandas": pandas}), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))


def _vector_array(pa: Any, values: np.ndarray, feature: dict[str, Any]) -> Any:
    """A column of an episode, `[T, D]` or `[T]`, as Arrow stores it: lists of D numbers, or numbers."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2 and values.shape[1] != 1:
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return flat.cast(_arrow_type(pa, feature))


def _picture_array(pa: Any, pictures: np.ndarray, feature: dict[str, Any], prefix: str) -> Any:
    """An episode's pictures `[T, H, W, C]` as PNG files with names that begin with `prefix`."""
    names = [f"{prefix}-{i:06d}.png" for i in range(len(pictures))]
    encoded = [{"bytes": _png(picture), "path": name} for picture, name in zip(pictures, names, strict=True)]
    return pa.array(encoded, type=_arrow_type(pa, feature))


def _arrow_type(pa: Any, feature: dict[str, Any]) -> Any:
    """The Arrow type of a feature's column."""
    if feature["dtype"] == "image":
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    plain = {"float32": pa.float32(), "bool": pa.bool_(), "int64": pa.int64()}[feature["dtype"]]
    width = feature["shape"][0]
    return plain if width == 1 else pa.list_(plain, width)


def _hugging_face(features: dict[str, Any]) -> dict[str, Any]:
    """The features as Hugging Face's package `datasets` describes them in a file's schema."""
    described: dict[str, Any] = {}
    for key, feature in features.items():
        plain = {"dtype": feature["dtype"], "_type": "Value"}
        wide = {"feature": plain, "length": feature["shape"][0], "_type": "List"}
        one = feature["shape"][0] == 1
        described[key] = {"_type": "Image"} if feature["dtype"] == "image" else plain if one else wide
    return described


def _png(picture: np.ndarray) -> bytes:
    """A picture `[H, W, C]` as a PNG file."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(file, "PNG", compress_level=4)
    return file.getvalue()


QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def _stats(values: np.ndarray) -> dict[str, list[Any]]:
    """LeRobot's statistics of a column, each a list with one number for each dimension."""
    x = values.reshape(len(values), -1)
    wide = x.astype(np.float64)
    stats = {"min": x.min(0), "max": x.max(0), "mean": wide.mean(0), "std": wide.std(0), "count": np.array([len(x)])}
    stats |= {name: np.quantile(wide, q, axis=0) for name, q in QUANTILES.items()}
    return {name: value.tolist() for name, value in stats.items()}


def _picture_stats(pictures: np.ndarray, most: int = 100) -> dict[str, list[Any]]:
    """LeRobot's statistics of at most `most` pictures in [0, 1], each a `[C, 1, 1]` list.

    As there, only some pixels of large pictures count, since those of an episode at 480 x 640 would take 5 s.
    """
    longest = max(pictures.shape[1:3])
    apart = longest // 150 if longest > 300 else 1
    chosen = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).astype(int)
    some = pictures[chosen, ::apart, ::apart] / 255.0
    stats = _stats(some.reshape(-1, some.shape[-1]))
    shaped = {name: [[[value]] for value in values] for name, values in stats.items() if name != "count"}
    return shaped | {"count": [len(some)]}


def _aggregated(parts: list[dict[str, Any]], values: np.ndarray | None) -> dict[str, Any]:
    """Statistics of the whole data: a column's own; for pictures, those of the episodes weighted by their counts."""
    if values is not None:
        return _stats(values)
    counts = np.array([part["count"][0] for part in parts], np.float64)
    weights = (counts / counts.sum())[:, None, None, None]
    of = {name: np.array([part[name] for part in parts]) for name in parts[0] if name != "count"}
    mean = (weights * of["mean"]).sum(0)
    stats = {"min": of["min"].min(0), "max": of["max"].max(0), "mean": mean}
    stats["std"] = np.sqrt((weights * (of["std"] ** 2 + (of["mean"] - mean) ** 2)).sum(0))
    stats |= {name: (weights * of[name]).sum(0) for name in QUANTILES}
    return {name: value.tolist() for name, value in stats.items()} | {"count": [int(counts.sum())]}


# ---- Minari --------------------------------------------------------------------------------------------------------


def write_minari(episodes: Episodes, root: Path, options: Any, dest: Path) -> None:
    """Write `root` as a Minari dataset by means of the library."""
    require("minari", '"minari[hdf5]"')
    require("h5py", "h5py")
    steps = len(episodes.at)
    size = sum(int(np.prod(store.shape[-3:])) for store in episodes.cameras.values()) * steps
    check_memory(2 * size, f"{dest}: the decoded pictures", "choose fewer --dataset.cameras, or --format lerobot")
    spaces = minari_spaces(episodes)
    buffers = [minari_buffer(episodes, number, rows) for number, rows in enumerate(episode_slices(episodes))]
    name = options.id or re.sub(r"[^a-z0-9]+", "-", dest.name.lower()).strip("-") + "-v0"
    store = root / "store"
    store.mkdir()
    with _minari_folder(store):
        create_minari(name, buffers, spaces, episodes.stored.get("format", "a dataset"), options.storage, dest)
    (store / name / "data").rename(root / "data")
    shutil.rmtree(store)
    path = root / "data" / "metadata.json"
    known: dict[str, Any] = {"rewards": "reward" in episodes.columns, "pictures": "HWC"}
    known |= {"final_observations": bool((episodes.after >= 0).all())}
    more = {"converted": known} | environment_metadata(episodes.stored.get("environment"))
    path.write_text(json.dumps(json.loads(path.read_text()) | more))  # `datasets.minari` reads these


def minari_spaces(episodes: Episodes) -> tuple[Any, Any]:
    """The observation and the action space, which Minari requires; bounds that the source declares are kept."""
    import gymnasium as gym

    boxes: dict[str, Any] = {}
    for key, store in episodes.observations.items():
        if key in episodes.cameras:
            channels, height, width = store.shape[-3:]
            boxes[key] = gym.spaces.Box(0, 255, (height, width, channels), np.uint8)
        else:
            boxes[key] = gym.spaces.Box(-np.inf, np.inf, (store.shape[1],), np.float32)
    observation_space = _as_environment(boxes, gym.spaces.Dict)
    bounds = episodes.stored.get("action_space", {"low": -np.inf, "high": np.inf})
    low, high = (np.broadcast_to(np.float32(bounds[b]), episodes.columns["action"].shape[1:]) for b in ("low", "high"))
    action_space: Any = gym.spaces.Box(low, high, dtype=np.float32)
    if "classes" in episodes.stored:
        action_space = gym.spaces.Discrete(episodes.stored["classes"])
    return observation_space, action_space


def minari_buffer(episodes: Episodes, number: int, rows: slice) -> Any:
    """One episode, of steps `rows`, with the observation after its last action, as the library expects it."""
    from minari.data_collector import EpisodeBuffer

    columns, steps = episodes.columns, rows.stop - rows.start
    last = rows.stop - 1
    final = episodes.after[last] if episodes.after[last] >= 0 else episodes.at[last]
    at = torch.cat([episodes.at[rows], final.view(1)])
    observed = {
        key: picture_rows(store, at) if key in episodes.cameras else store[at].float().numpy()
        for key, store in episodes.observations.items()
    }
    actions = columns["action"][rows].float().numpy()
    if "classes" in episodes.stored:
        actions = actions[:, 0].astype(np.int64)
    ends = torch.zeros(steps, dtype=torch.bool)
    ends[-1] = True  # without flags, an episode is truncated at its end
    infos = {key: np.append(False, columns[key][rows].numpy()) for key in RECORDED if key in columns}  # of the reset
    return EpisodeBuffer(
        id=number,
        observations=_as_environment(observed, dict),
        actions=actions,
        rewards=columns["reward"][rows].tolist() if "reward" in columns else [0.0] * steps,
        terminations=columns["terminated"][rows].tolist() if "terminated" in columns else [False] * steps,
        truncations=(columns["truncated"][rows] if "truncated" in columns else ends).tolist(),
        infos={key: flags.tolist() for key, flags in infos.items()} or None,
    )


def _as_environment(leaves: dict[str, Any], group: Callable[[dict[str, Any]], Any]) -> Any:
    """Name and group observations, or their spaces, by the data's keys as an environment does.

    A state alone is not grouped, and neither is a single camera named `camera`.

    Args:
        group: {name: leaf} -> the group.
    """
    if list(leaves) == ["observation.state"]:
        return leaves["observation.state"]
    named: dict[str, Any] = {}
    for key, leaf in leaves.items():
        if is_picture(key, leaf.dtype):
            named.setdefault("pixels", {})[key.removeprefix(IMAGES)] = leaf
        else:
            named[key.removeprefix("observation.")] = leaf
    if pixels := named.get("pixels"):
        named["pixels"] = pixels["camera"] if list(pixels) == ["camera"] else group(pixels)
    return group(named)


@contextmanager
def _minari_folder(folder: Path) -> Iterator[None]:
    """A context in which the library writes into `folder`."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def create_minari(
    name: str, buffers: list[Any], spaces: tuple[Any, Any], source: str, storage: str, dest: Path
) -> None:
    """Write the dataset `name` by the library. Raises UserError: the library refuses it, for example its id."""
    import minari

    warnings.filterwarnings("ignore", message=".*env", category=UserWarning, module="minari")  # a file has none
    try:
        minari.create_dataset_from_buffers(
            name,
            buffers,
            observation_space=spaces[0],
            action_space=spaces[1],
            data_format=storage,
            description=f"Converted from {source}.",
            algorithm_name="unknown",
            author="unknown",
            author_email="unknown",
            code_permalink="unknown",
            jpeg_encoding=False,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"{dest}: Minari does not take it ({' '.join(str(error).split())[:150]}); see --id") from error


def environment_metadata(env: dict[str, Any] | None) -> dict[str, Any]:
    """Minari's metadata of an environment {"name", options}: its `env_spec` where the environment is Gymnasium's.

    Empty without an environment, and for one that these metadata cannot describe.
    """
    if env is None or env.get("wrappers"):  # without its wrappers it would be another environment
        return {}
    if env["name"] != "gymnasium":
        return {"environment": env}
    import gymnasium as gym

    spec = copy.copy(gym.spec(env["id"]))
    made_by: Any = spec.entry_point
    spec.entry_point = f"{made_by.__module__}:{made_by.__qualname__}" if callable(made_by) else made_by
    spec.kwargs = spec.kwargs | json.loads(env.get("kwargs") or "{}")
    spec.max_episode_steps = env.get("max_episode_steps") or spec.max_episode_steps
    try:
        return {"env_spec": spec.to_json()}
    except (TypeError, ValueError):  # arguments that JSON cannot express
        return {}


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
