"""LeRobotDataset v2.0, v2.1 and v3.0, from a local folder or from the Hugging Face hub.

`meta/info.json` declares the features and the paths of the files. v2 has one parquet file, and one video per camera,
for each episode (`meta/episodes.jsonl`). v3.0 stores many episodes in a file; `meta/episodes/*.parquet` lists them, and
the time at which each begins in a video. Rows are ordered by `index`. The format's own statistics are not used, and so
v2.0 and v2.1 are read alike: v3.0's quantiles are averages over episodes, and they include the episodes that are held
out here.

`next.reward` is the reward of the action in the same row. `next.done` marks the end of an episode, which need not be a
terminal state, so `terminated` is `next.done` where `next.success` also holds; a feature `next.terminated`, which
`convert` writes, is read directly. Whether a person chose the action is `intervention` (of `lerobot-rollout`) or
`complementary_info.is_intervention` (of the replay buffer of HIL-SERL). The format lacks the observation after the last
action; `convert` adds it as `next.observation.X`.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..data.features import INTERVENTION, SUCCESS
from ..data.pictures import CHANNELS, IMAGES, Layout, as_bytes, camera_of, holds_pictures, layout_of
from ..errors import UserError, first_line, require
from ..records import Size, problem_of
from ..run.progress import counted
from .episodes import (
    Episodes,
    Reader,
    as_flags,
    choose_episodes,
    chosen_cameras,
    flat_names,
    join_successors,
    steps_only,
    tell_unused,
)
from .frames import EncodedFrames, Frames, VideoFrames, require_video
from .untrusted import Ledger, check_memory, check_regular, existing, inside, read_json, read_parquet

logger = logging.getLogger(__name__)
WHAT = "the folder of a LeRobotDataset v2.0, v2.1 or v3.0 (with meta/ and data/)"
OLD = "LeRobot's scripts convert it: convert_dataset_v1_to_v2.py, then convert_dataset_v20_to_v21.py"
FIELD = re.compile(r"{(\w+)(?::(0\dd))?}")  # in a pattern; str.format would let the file evaluate more than names
FLAGS = ("next.reward", "next.done", "next.success", "next.terminated", "next.truncated")
INTERVENTIONS = (INTERVENTION, "complementary_info.is_intervention", "is_intervention")  # the first that is there
FASTEST = 1e6  # frames a second
NEAR = 0.25  # largest deviation of the time between two rows from 1 / fps, in multiples of that
COUNTS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
NUMBERS = ("float", "int", "uint", "bool")


@dataclass(frozen=True)
class LeRobotDataset(Reader):
    """LeRobotDataset v2.0 to v3.0, from a folder (--dataset.path) or the Hugging Face hub (--dataset.repo-id)."""

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
        return self.finish(read(root, self))

    def _download(self) -> Path:
        """Download the dataset, with videos of the chosen cameras only, into the hub's cache; returns its folder."""
        hub = require("huggingface_hub", "huggingface_hub")
        renamed = [entry.split("=", 1) for entry in self.rename if "=" in entry]
        named = {name: camera_of(old) for old, new in renamed for name in (new, camera_of(new))}
        wanted = [named.get(camera, camera_of(camera)) for camera in self.cameras]
        patterns = ["meta/*", "data/*", *("videos/*" if name == "all" else f"videos/*{name}/*" for name in wanted)]
        options: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision or None, "etag_timeout": 5}
        try:
            if self.episodes:  # which files have them is in the metadata
                root = Path(hub.snapshot_download(self.repo_id, allow_patterns=patterns[:1], **options))
                patterns = ["meta/*", *files_needed(root, self)]
            return Path(hub.snapshot_download(self.repo_id, allow_patterns=patterns, **options))
        except UserError:
            raise
        except Exception as error:  # no network, no such repository, no permission, a full disk, ...
            reason = first_line(error)[:120]
            raise UserError(
                f"--dataset.repo-id {self.repo_id}: neither in the cache nor to be had from the hub ({reason});"
                " check the name and the network, or give a local copy with --dataset.path"
            ) from error


class Declared(TypedDict):
    """A feature in `meta/info.json`."""

    dtype: str
    shape: list[Size]


class Info(TypedDict):
    """`meta/info.json`; further fields are read where they are there."""

    codebase_version: str
    fps: Any
    features: dict[str, Declared]
    data_path: NotRequired[str | None]
    video_path: NotRequired[str | None]
    chunks_size: NotRequired[Size]
    total_episodes: NotRequired[Size]


class Meta(NamedTuple):
    """Contents of `meta/`."""

    root: Path
    version: str
    fps: float
    features: dict[str, Any]  # by the names that are read; "column" is that in the files
    episodes: list[dict[str, Any]]  # those that are used
    patterns: dict[str, Any]  # "data_path", "video_path"
    tasks: dict[int, str]  # empty without a list of them
    rows: int  # of all episodes

    def of(self, words: tuple[str, ...]) -> "Meta":
        """With those episodes that `--dataset.episodes` chooses. Raises UserError: as `choose_episodes`."""
        numbers = [episode["episode_index"] for episode in self.episodes]
        places = choose_episodes(words, numbers, str(self.root))
        return self._replace(episodes=[self.episodes[place] for place in places])

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


def read(root: Path, options: LeRobotDataset) -> Episodes:
    """Read a dataset's folder: its vectors, and a decoder for the pictures of each of the chosen cameras."""
    require("pyarrow", "pyarrow")
    meta = read_meta(root, options).of(options.episodes)  # files of others are not opened
    pictured = picture_features(meta, options.cameras)
    chosen = {name: pictured[name] for name in chosen_cameras(options.cameras, list(pictured), str(root))}
    kinds = {key: meta.features[key]["dtype"] for key in chosen.values()}
    embedded = [key for key, kind in kinds.items() if kind == "image"]
    plain = [key for key, kind in kinds.items() if kind not in ("image", "video")]
    wanted = vector_features(meta.features)
    if not chosen and not any(key.startswith("observation.") for key in wanted):
        cameras = f"choose --dataset.cameras ({', '.join(pictured)}), or " if pictured else ""
        raise UserError(
            f"{root}: no observation.* of numbers; {cameras}name one with --dataset.rename OLD=observation.state;"
            f" found: {described(meta.features)}"
        )
    rows, encoded, files = read_rows(meta, embedded, plain)
    order = np.argsort(rows["index"], kind="stable")
    rows = {key: values[order] for key, values in rows.items()}
    episode = rows["episode_index"]
    ends = np.flatnonzero(np.append(episode[1:] != episode[:-1], True)) + 1
    if len(set(episode[ends - 1].tolist())) != len(ends):
        raise UserError(f"{root}/data: the rows of an episode are not next to each other in the order of 'index'")
    check_times(rows, ends, meta)
    vectors = {key: torch.from_numpy(rows[key]) for key in wanted if key != "action"}
    steps = torch.from_numpy(ends)
    following = {key.removeprefix("next."): vectors.pop(key) for key in list(vectors) if key.startswith("next.")}
    observations: dict[str, Any] = dict(vectors)
    at, after = steps_only(steps)
    shown = torch.arange(len(at))  # [M] the step whose picture each observation shows
    complete = bool(vectors) and set(following) == set(vectors)
    if complete:
        observations, at, after = join_successors(vectors, following, steps)
        shown = torch.empty(int(after.max()) + 1, dtype=torch.int64)
        shown[after] = torch.arange(len(at))  # final observations have no picture of their own and repeat the last one
        shown[at] = torch.arange(len(at))
    for name, feature in chosen.items():
        key, layout = IMAGES + name, picture_layout(meta, feature)
        if feature in embedded:
            data, starts, stops = encoded[feature]
            observations[key] = EncodedFrames(data, starts[order][shown], stops[order][shown], layout.stored, files)
        elif feature in plain:
            pictures = rows[feature].reshape(-1, *layout.shape)
            top = 255.0 if meta.features[feature]["dtype"] == "uint8" else 1.0  # the files may have wider integers
            observations[key] = torch.from_numpy(layout(as_bytes(pictures, f"{root}: {feature!r}", top)))[
                shown
            ].contiguous()
        else:
            observations[key] = video(meta, feature, layout.stored, rows, shown.numpy())
    columns = flags(rows, str(root)) | {"action": torch.from_numpy(rows["action"])}
    texts: list[str] = []
    if tasks := tasks_of(meta, rows, ends):
        texts = list(dict.fromkeys(tasks.values()))
        numbers = {index: texts.index(text) for index, text in tasks.items()}
        columns["task_index"] = torch.tensor([numbers[int(index)] for index in rows["task_index"]])
    stored = {"format": f"lerobot {meta.version}", "fps": meta.fps} | unused(meta, pictured, following, complete)
    names, own = names_of(meta.features, wanted), episode[ends - 1].tolist()
    return Episodes(str(root), steps, columns, observations, at, after, texts, stored, names, own)


def files_needed(root: Path, options: LeRobotDataset) -> list[str]:
    """The data and video files of the chosen episodes and cameras, relative to `root`, which needs `meta/` alone."""
    meta = read_meta(root, options).of(options.episodes)
    pictured = picture_features(meta, options.cameras)
    filmed = [meta.features[pictured[name]] for name in chosen_cameras(options.cameras, list(pictured), str(root))]
    files = [meta.file("data_path", episode) for episode in meta.episodes]
    for feature in (feature for feature in filmed if feature["dtype"] == "video"):
        files += [meta.file("video_path", episode, f"videos/{feature['column']}") for episode in meta.episodes]
    return [file.relative_to(root).as_posix() for file in dict.fromkeys(files)]


def names_of(features: dict[str, Any], keys: list[str]) -> dict[str, list[str]]:
    """Names of the dimensions of vectors, where the metadata has them or the feature has several axes."""
    names: dict[str, list[str]] = {}
    for key in (key for key in keys if not key.startswith("next.")):
        short, shape = key.removeprefix("observation."), features[key]["shape"]
        found, plain = flat_names(short, shape, features[key].get("names")), flat_names(short, shape)
        names[key] = given_names(features[key]) or (found if found != plain or len(shape) != 1 else [])
    return {key: found for key, found in names.items() if found}


def unused(meta: Meta, pictured: dict[str, str], following: dict[str, Any], complete: bool) -> dict[str, str]:
    """The features that are not read, for `stored`; cameras that can be chosen are told elsewhere."""
    read = {*vector_features(meta.features), *pictured.values(), *flag_features(meta.features), *COUNTS}
    rest: dict[str, tuple[Any, str]] = {}
    for key, feature in meta.features.items():
        if key not in read:
            kind = feature["dtype"]
            why = f"{kind}; see --dataset.rename" if kind.startswith(NUMBERS) else kind
            rest[key] = (feature["shape"], why)
    if following and not complete:
        why = "not all observations have a successor"
        rest |= {f"next.{key}": (list(value.shape[1:]), why) for key, value in following.items()}
    return tell_unused(str(meta.root), rest)


def flag_features(features: dict[str, Any]) -> list[str]:
    """The features that `flags` reads."""
    named = ((key, features[key]) for key in INTERVENTIONS if key in features)
    single = [key for key, told in named if told["dtype"].startswith(NUMBERS) and math.prod(told["shape"]) == 1]
    return [*(key for key in FLAGS if key in features), *single[:1]]


def flags(rows: dict[str, np.ndarray], name: str) -> dict[str, Tensor]:
    """reward, terminated, truncated, intervention and success `[N]`, as far as recorded; see the module's docstring."""
    columns: dict[str, Tensor] = {}
    if "next.reward" in rows:
        columns["reward"] = torch.from_numpy(rows["next.reward"].astype(np.float32))
    for name in ("terminated", "truncated"):
        if f"next.{name}" in rows:
            columns[name] = torch.from_numpy(rows[f"next.{name}"].astype(bool))
    if "terminated" not in columns and "next.done" in rows and "next.success" in rows:
        columns["terminated"] = torch.from_numpy(rows["next.done"].astype(bool) & rows["next.success"].astype(bool))
    for key in INTERVENTIONS:
        if key in rows:
            columns[INTERVENTION] = as_flags(rows[key], f"{name}: {key!r}")
    if "next.success" in rows:
        columns[SUCCESS] = as_flags(rows["next.success"], f"{name}: 'next.success'")
    return columns


# ---- metadata ------------------------------------------------------------------------------------------------------


def read_meta(root: Path, options: LeRobotDataset) -> Meta:
    """Read and check `meta/`."""
    path = root / "meta" / "info.json"
    if not path.is_file() and (root / "meta_data").is_dir():
        raise UserError(f"--dataset.path {root}: a LeRobotDataset v1, which is not read; {OLD}")
    if not path.is_file():
        raise UserError(f"--dataset.path {root}: no meta/info.json in it; expected {WHAT}")
    info = read_json(inside(root, "meta/info.json", path))
    version = str(info.get("codebase_version"))[:40] if isinstance(info, dict) else "None"
    if not version.startswith(("v2.0", "v2.1", "v3.")):
        remedy = OLD if version.startswith("v1") else "LeRobot converts"
        raise UserError(f"{path}: version {version}; this reader knows v2.0, v2.1 and v3.0; {remedy}")
    if problem := problem_of(info, Info):
        raise UserError(f"{path}: damaged or incomplete: {problem}; copy the dataset again")
    try:
        features, fps = dict(info["features"]), info["fps"]
        for key in features:
            features[key] = {**features[key], "shape": [int(size) for size in features[key]["shape"]], "column": key}
            if not isinstance(features[key]["dtype"], str) or any(size < 0 for size in features[key]["shape"]):
                raise ValueError(f"feature {key!r}")
        patterns = {name: info.get(name) for name in ("data_path", "video_path")}
        patterns["chunks_size"] = max(int(info.get("chunks_size", 1000)), 1)
        total = int(info.get("total_episodes", -1))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: damaged or incomplete ({type(error).__name__}: {error})") from error
    if type(fps) not in (int, float) or not 0 < fps <= FASTEST:
        raise UserError(f"{path}: fps is {fps!r:.40}; expected frames a second, a number above 0")
    features = {name: features[old] for name, old in options.renamed(features, path).items()}
    if "action" not in features:
        raise UserError(
            f"{path}: no feature 'action'; name it with --dataset.rename OLD=action; found: {described(features)}"
        )
    if "action" not in vector_features(features):
        raise UserError(f"{path}: the feature 'action' is no vector of numbers; found: {described(features)}")
    if version.startswith("v2."):
        episodes = read_json(inside(root, "meta/episodes.jsonl", path), lines=True)
    else:
        episodes, ledger = [], Ledger()
        for file in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
            table = read_table(inside(root, file.relative_to(root), path), ["episode_index", "length"], ledger)
            names = [name for name in table.schema.names if not name.startswith("stats/")]
            episodes += table.select(names).to_pylist()
    where = f"{root}/meta/episodes" + (".jsonl" if version.startswith("v2.") else "")
    try:
        for episode in episodes:
            episode["episode_index"], episode["length"] = int(episode["episode_index"]), int(episode["length"])
            if episode["length"] < 1:
                raise ValueError(f"episode {episode['episode_index']} has length {episode['length']}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: damaged or incomplete ({type(error).__name__}: {error})") from error
    if not episodes:
        raise UserError(f"{where}: no episodes; expected at least one")
    if total >= 0 and total != len(episodes):
        raise UserError(f"{path}: total_episodes is {total}, but {where} lists {len(episodes)}; a file is incomplete")
    rows = sum(episode["length"] for episode in episodes)
    return Meta(root, version, float(fps), features, episodes, patterns, read_tasks(root, version), rows)


def read_tasks(root: Path, version: str) -> dict[int, str]:
    """Number -> text of each task; {} without a list of them. Raises UserError: it is damaged or names none."""
    file = "meta/tasks.jsonl" if version.startswith("v2.") else "meta/tasks.parquet"
    path = inside(root, file, root / "meta" / "info.json")
    if not path.is_file():
        return {}
    if path.suffix == ".jsonl":
        listed, column = read_json(path, lines=True), "task"
    else:
        table = read_table(path, ["task_index"], Ledger())
        listed, column = table.to_pylist(), task_column(table, path)
    texts: dict[int, str] = {}
    for row in listed:
        number, text = (row.get("task_index"), row.get(column)) if isinstance(row, dict) else (None, None)
        if type(number) is not int or not isinstance(text, str):
            raise UserError(f"{path}: a task has the number {number!r:.40} and the text {text!r:.40}; expected both")
        if number in texts:
            raise UserError(f"{path}: two tasks have the number {number}, {texts[number]!r:.60} and {text!r:.60}")
        texts[number] = text
    return texts


def task_column(table: Any, path: Path) -> str:
    """The column with the texts: `task`, or the pandas index, as LeRobot writes it. Raises UserError: neither."""
    names = table.schema.names
    try:
        indices = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
        named = [name for name in indices if isinstance(name, str)]
    except (ValueError, AttributeError, TypeError, RecursionError):
        named = []
    for name in ("task", "__index_level_0__", *named):
        if name in names and name != "task_index":
            return name
    raise UserError(f"{path}: no column 'task' with the texts, and no pandas index; found: {', '.join(names[:20])}")


def tasks_of(meta: Meta, rows: dict[str, np.ndarray], ends: np.ndarray) -> dict[int, str]:
    """Number -> text of the tasks of these rows, in the order of the list; {} where no row has one.

    Without a list, the texts are those of `meta/episodes` where these are certain: of episodes that have one text and
    one number. Raises UserError: a number without a text, where the data has several.
    """
    if "task_index" not in rows:
        return {}
    column, texts = rows["task_index"], dict(meta.tasks)
    used = set(np.unique(column).tolist())
    if not texts:
        said = {episode["episode_index"]: episode.get("tasks") for episode in meta.episodes}
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            number, text = int(column[start]), said[int(rows["episode_index"][start])]
            if not (isinstance(text, list) and len(text) == 1 and isinstance(text[0], str)):
                continue
            if (column[start:end] == number).all() and texts.setdefault(number, text[0]) != text[0]:
                raise UserError(
                    f"{meta.root}/meta: there is no list of tasks, and the list of episodes has two texts for task"
                    f" {number}: {texts[number]!r:.60} and {text[0]!r:.60}"
                )
        if len(used) == 1 and not texts:
            return {}
        if used <= set(texts):
            logger.warning("%s/meta: no list of tasks; their texts are those of the list of episodes", meta.root)
    if unknown := sorted(used - set(texts)):
        raise UserError(
            f"{meta.root}/meta: task {unknown[0]} of the data has no text in the list of tasks"
            + ("" if meta.tasks else ", which is missing; add it, or choose episodes of one task (--dataset.episodes)")
        )
    return {number: text for number, text in texts.items() if number in used}


def given_names(feature: dict[str, Any]) -> list[str]:
    """The names of a vector's dimensions: a list, {"motors": list} or {name: place}; [] where there are none."""
    names: Any = feature.get("names")
    if isinstance(names, dict) and all(type(place) is int for place in names.values()):
        names = sorted(names, key=names.__getitem__)
    elif isinstance(names, dict):
        parts = [(f"{group}." * (len(names) > 1), part) for group, part in names.items() if isinstance(part, list)]
        names = [f"{group}{name}" for group, part in parts for name in part]
    width = math.prod(feature["shape"])
    fit = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    return names if fit and len(names) == len(set(names)) == width else []


def check_times(rows: dict[str, np.ndarray], ends: np.ndarray, meta: Meta) -> None:
    """Refuse times that are not finite, or not 1 / fps apart within an episode. Raises UserError: names the first."""
    times, episode = rows["timestamp"].astype(np.float64), rows["episode_index"]
    starts = np.append(0, ends[:-1])
    where = f"{meta.root}/data: episode"
    if len(bad := np.flatnonzero(~np.isfinite(times))):
        step = bad[0] - starts[np.searchsorted(ends, bad[0], side="right")]
        raise UserError(f"{where} {episode[bad[0]]}: the timestamp of step {step} is {times[bad[0]]}")
    inner = np.ones(len(times), bool)
    inner[starts] = False
    rounding = 2.0**-22 * np.abs(times).max()  # they are stored as float32
    apart = np.diff(times, prepend=times[:1])
    if len(bad := np.flatnonzero(inner & (np.abs(apart - 1 / meta.fps) > NEAR / meta.fps + rounding))):
        step = bad[0] - starts[np.searchsorted(ends, bad[0], side="right")]
        wrong = np.unique(episode[bad])  # a frame that was dropped is in few of them, another rate in all
        words = " ".join(f"'!{number}'" for number in wrong[:20])
        rest = "" if len(wrong) == len(ends) else f"; --dataset.episodes {words} leaves out such episodes"
        raise UserError(
            f"{where} {episode[bad[0]]}: the timestamps of steps {step - 1} and {step} are {apart[bad[0]]:.6g} s apart;"
            f" at {meta.fps:g} fps (meta/info.json) expected {1 / meta.fps:.6g}{rest}"
        )


def described(features: dict[str, Any]) -> str:
    """The features in a line: name, type and shape."""
    return ", ".join(f"{key} ({f['dtype']} {f['shape']})" for key, f in features.items() if key not in COUNTS) or "none"


def vector_features(features: dict[str, Any]) -> list[str]:
    """`action`, and the observations and successors that are numbers, but no pictures."""
    return [
        key
        for key, feature in features.items()
        if (key == "action" or key.startswith(("observation.", "next.observation.")))
        and feature["dtype"].startswith(NUMBERS)
        and (key == "action" or not of_pictures(feature))
    ]


def picture_features(meta: Meta, asked: Sequence[str]) -> dict[str, str]:
    """Camera -> its feature. Raises UserError: two features of the same camera, where some camera is asked for."""
    pictured: dict[str, str] = {}
    for key, feature in meta.features.items():
        if key == "action" or key.startswith("next.") or not of_pictures(feature):
            continue
        name = camera_of(key)
        if name in pictured and asked:
            both = f"{pictured[name]!r} and {key!r}"
            raise UserError(f"{meta.root}: {both} would both be the camera {name!r}; see --dataset.rename OLD=NEW")
        pictured[name] = key
    return pictured


def of_pictures(feature: dict[str, Any]) -> bool:
    """Whether a feature is of pictures: encoded, or numbers by the names of the axes, or else by type and shape."""
    kind = feature["dtype"]
    plain = bool(axes_of(feature)) or (kind.startswith(NUMBERS) and holds_pictures(tuple(feature["shape"]), kind))
    return kind in ("image", "video") or plain


def axes_of(feature: dict[str, Any]) -> str:
    """ "CHW" or "HWC" where the names of a feature's axes say so, else ""."""
    names = feature.get("names")
    if not isinstance(names, list) or len(names) != 3 or len(feature["shape"]) != 3:
        return ""
    letters = "".join(str(name)[:1] for name in names).upper()
    known = all(str(name).rstrip("s") in ("channel", "height", "width") for name in names)
    return letters if known and letters in ("CHW", "HWC") else ""


def picture_layout(meta: Meta, key: str) -> Layout:
    """The layout of a camera's pictures; videos and encoded pictures have only their size from it.

    Raises:
        UserError: neither the names of the axes nor their lengths tell the layout.
    """
    feature, place = meta.features[key], f"{meta.root}/meta/info.json: {key!r}"
    if len(feature["shape"]) not in (2, 3) or min(feature["shape"]) < 1:
        raise UserError(f"{place} has shape {feature['shape']}; expected height, width, channels")
    layout = layout_of(tuple(feature["shape"]), place, axes_of(feature))
    if layout.stored[0] not in CHANNELS:  # names in another order than the lengths
        layout = layout_of(tuple(feature["shape"]), place)
    if layout.stored[0] not in CHANNELS:
        raise UserError(f"{place} has shape {feature['shape']}; expected 1, 3 or 4 channels")
    return layout


# ---- rows ----------------------------------------------------------------------------------------------------------


def read_rows(
    meta: Meta, embedded: list[str], pictured: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[Path]]:
    """Read the columns that are used from every data file of the episodes.

    Args:
        embedded: Cameras of encoded pictures.
        pictured: Cameras whose pictures are plain numbers.

    Returns:
        Columns, float32 `[N, D]` or plain `[N]`; for each camera of `embedded`, the arguments of `EncodedFrames`; the
        files.
    """
    import pyarrow

    root, features = meta.root, meta.features
    numbers = [episode["episode_index"] for episode in meta.episodes]
    widths = {key: math.prod(features[key]["shape"]) for key in (*vector_features(features), *pictured)}
    plain = ["index", "episode_index", "timestamp"]
    plain += ["task_index"] if meta.tasks or "task_index" in features else []
    plain += flag_features(features)
    expected = sum(episode["length"] for episode in meta.episodes)
    check_memory(4 * expected * (sum(widths.values()) + 2 * len(plain)), f"{root}: {expected} rows")
    ledger = Ledger()
    files = list(dict.fromkeys(meta.file("data_path", episode) for episode in meta.episodes))
    parts: dict[str, list[np.ndarray]] = {key: [] for key in (*widths, *plain)}
    pictures: dict[str, list[list[np.ndarray]]] = {key: [[], []] for key in embedded}
    named = {key: features[key]["column"] if key in features else key for key in (*parts, *embedded)}
    for path in counted(files, "reading files"):
        table = read_table(path, list(named.values()), ledger, meta.rows)
        if expected < meta.rows:  # a file of v3.0 holds rows of other episodes, too
            episode = as_array(table["episode_index"], None, f"{path}: column 'episode_index'")
            table = table.filter(pyarrow.array(np.isin(episode, numbers)))
        for key in parts:
            place, kind = f"{path}: column {named[key]!r}", None if key in pictured else np.float32
            parts[key].append(as_array(table[named[key]], widths.get(key), place, dtype=kind))
        for key in embedded:
            for data, lengths in files_of(table[named[key]], f"{path}: column {named[key]!r}"):
                pictures[key][0].append(data)
                pictures[key][1].append(lengths)
    rows = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    for key in ("index", "episode_index", "task_index"):
        if key in rows and rows[key].dtype.kind not in "iu":
            raise UserError(f"{root}/data: column {key!r} holds {rows[key].dtype}; expected whole numbers")
    if len(rows["index"]) != expected:
        raise UserError(
            f"{root}/data: {len(rows['index'])} rows, but the list of episodes promises {expected}; it is incomplete"
        )
    promised = {episode["episode_index"]: episode["length"] for episode in meta.episodes}
    found, counts = np.unique(rows["episode_index"], return_counts=True)
    for number, count in zip(found.tolist(), counts.tolist(), strict=True):
        if promised.get(number) != count:
            raise UserError(
                f"{root}/data: episode {number} has {count} rows, its metadata says {promised.get(number, 0)}"
            )
    encoded = {}
    for key, (blobs, sizes) in pictures.items():
        ends = np.concatenate(sizes).cumsum()
        encoded[key] = (np.concatenate(blobs), np.append(0, ends[:-1]), ends)
    return rows, encoded, files


def read_table(path: Path, columns: list[str], ledger: Ledger, most_rows: int | None = None) -> Any:
    """Read columns of a parquet file, or all of them without `most_rows`. Raises UserError: a bad file."""
    import pyarrow
    import pyarrow.parquet

    check_regular(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise UserError(f"{path}: no column {missing[0]!r}; found: {', '.join(file.schema_arrow.names[:20])}")
        if most_rows is not None and file.metadata.num_rows > most_rows:
            raise UserError(f"{path}: {file.metadata.num_rows} rows, but the list of episodes promises {most_rows}")
        wanted = columns if most_rows is not None else None
        return read_parquet(file, path, ledger, wanted)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing, though the dataset's metadata names it") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({first_line(error)[:100]})") from error


def as_array(
    column: Any, width: int | None, place: str, says: str = "meta/info.json", dtype: Any = np.float32
) -> np.ndarray:
    """A parquet column as `[N, width]`, from lists of any depth, or as plain numbers `[N]` when `width` is None.

    Args:
        dtype: Of the former; None for the column's own.
    """
    import pyarrow
    import pyarrow.compute

    if column.null_count:
        raise UserError(f"{place} has {column.null_count} missing values")
    values, rows = column.combine_chunks(), len(column)
    if isinstance(values, pyarrow.ChunkedArray):
        values = pyarrow.concat_arrays(values.chunks) if values.num_chunks else pyarrow.array([], values.type)
    types, found = pyarrow.types, 1  # features of shape (1,) are plain scalars
    while True:
        if isinstance(values.type, pyarrow.BaseExtensionType):  # Hugging Face's arrays of several axes
            values = values.storage
        if not (
            types.is_list(values.type) or types.is_large_list(values.type) or types.is_fixed_size_list(values.type)
        ):
            break
        lengths = sorted(filter(None, pyarrow.compute.unique(pyarrow.compute.list_value_length(values)).to_pylist()))
        if values.null_count or len(lengths) > 1:
            raise UserError(f"{place} has rows of width {', '.join(map(str, lengths))}, but {says} says {width or 1}")
        found *= lengths[0] if lengths else 0
        values = values.flatten()
    if rows and found != (1 if width is None else width):
        raise UserError(f"{place} has rows of width {found}, but {says} says {1 if width is None else width}")
    if len(values) != rows * found:
        raise UserError(f"{place} has rows of different widths, but {says} says {1 if width is None else width}")
    kind = values.type
    if values.null_count or not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise UserError(f"{place} holds {kind} with {values.null_count} missing values; expected numbers")
    array = values.to_numpy(zero_copy_only=False)
    return array if width is None else array.astype(dtype or array.dtype).reshape(rows, width)


def files_of(column: Any, place: str) -> list[tuple[np.ndarray, np.ndarray]]:
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
    column = meta.features[key]["column"]
    named: dict[Path, int] = {}
    numbers, starts = {}, {}
    for episode in meta.episodes:
        path = meta.file("video_path", episode, f"videos/{column}")
        if path not in named and not path.is_file():
            raise UserError(f"{path}: missing, though --dataset.cameras {camera_of(key)} asks for it")
        numbers[episode["episode_index"]] = named.setdefault(path, len(named))
        try:
            start = starts[episode["episode_index"]] = float(episode.get(f"videos/{column}/from_timestamp") or 0.0)
            if not 0 <= start < math.inf:
                raise ValueError
        except (TypeError, ValueError) as error:
            raise UserError(f"{meta.root}/meta/episodes: {column!r} has no number as from_timestamp") from error
    episodes = rows["episode_index"][shown].tolist()
    times = np.array([starts[e] for e in episodes]) + rows["timestamp"][shown].astype(np.float64)
    return VideoFrames(list(named), np.array([numbers[e] for e in episodes]), times, shape, meta.fps)
