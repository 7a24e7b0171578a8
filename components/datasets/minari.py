"""Minari datasets (Farama Foundation) in their three storages: hdf5, arrow and parquet.

Layout: `data/metadata.json` (spaces, environment, counts) and `data/main_data.hdf5` with a group `episode_<k>`, or
`data/<k>/part-*.arrow|parquet`. An episode of T actions has T + 1 observations; arrow and parquet fill the other
columns with one more row, which is dropped. Pictures are JPEG files unless the dataset was created without
`jpeg_encoding`.

Of `infos`, `intervention` and `success` are read. The library's collector has T + 1 rows of them, the first being that
of the reset.

Observations are named as `envs.observations.observation_batch` names those of the environment: a vector is
`observation.state`, a picture `observation.images.camera`; entries of a Dict are named by their keys (nested ones
joined by dots), those of a Tuple by their numbers. Actions of a Dict or Tuple are concatenated in the space's order; a
Discrete one is a single number.
"""

import json
import logging
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data.features import RECORDED
from ..data.pictures import IMAGES, as_bytes, camera_of, declared_top, find_layout, layout_of, top_of_space
from ..errors import UserError, require
from ..run.progress import counted
from .environment import plain_words, recoverable
from .episodes import Episodes, Reader, as_flags, choose_episodes, chosen_cameras, flat_names, tell_unused, with_final
from .frames import EncodedFrames, HDF5Frames
from .untrusted import (
    Ledger,
    check_arrow,
    check_declared,
    check_hdf5,
    check_members,
    check_memory,
    demonstration_number,
    existing,
    hdf5,
    inside,
    is_packed,
    open_hdf5,
    own_numbers,
    read_checked,
    read_hdf5,
    read_json,
    read_parquet,
)

logger = logging.getLogger(__name__)
WHAT = "the folder of a Minari dataset (with data/metadata.json)"
# Packages that register environments on import; no other package that a file names is imported.
REGISTER = ("gymnasium_robotics", "metaworld", "ogbench", "ale_py", "minigrid", "gym_pusht")


@dataclass(frozen=True)
class MinariDataset(Reader):
    """A Minari dataset, from a folder (--dataset.path) or by its id (--dataset.id)."""

    id: str = ""
    """Id such as D4RL/pen/human-v2: from Minari's local folder, or downloaded into it."""

    env_name = "gymnasium"

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}, "env" where it can be made, "reference_scores" where known.

        Items: observation.X `[D]` float32, observation.images.X `[C, H, W]` uint8 of the chosen cameras, action `[Da]`,
        reward, terminated, truncated, next.observation.X.

        Raises:
            UserError: no such dataset; missing, damaged, inconsistent or dangerous files. Names the file and the place.
        """
        if bool(self.path) == bool(self.id):
            raise UserError(f"one of --dataset.path and --dataset.id is needed: {WHAT}")
        root = self._local() if self.id else existing(self.path, WHAT)
        if (root / "data" / "metadata.json").is_file():
            root = inside(root, "data", root)
        if not (root / "metadata.json").is_file():
            raise UserError(f"--dataset.path {root}: no data/metadata.json in it; expected {WHAT}")
        meta = read_json(inside(root, "metadata.json", root))
        if not isinstance(meta, dict):
            raise UserError(f"{root}/metadata.json: damaged or incomplete (no object)")
        episodes = read(root, meta, self)
        episodes.name = str(root.parent if root.name == "data" else root)  # as it is called everywhere
        built = self.finish(episodes)
        if env := recovered(episodes, meta):
            built["env"] = env
        scores = meta.get("ref_min_score"), meta.get("ref_max_score")
        if all(isinstance(score, (int, float)) for score in scores) and scores[0] != scores[1]:
            built["reference_scores"] = scores
        return built

    def _local(self) -> Path:
        """The folder of the dataset `id`, which is downloaded when it is missing."""
        minari = require("minari", "minari")
        with suppress(ImportError):  # Minari's default remote, which logs each of its retries
            from huggingface_hub.utils import logging as chatter

            chatter.set_verbosity_error()
        from minari.storage import get_dataset_path

        try:
            path = Path(get_dataset_path(self.id))
            if not path.exists():
                minari.download_dataset(self.id)
        except Exception as error:  # no network, no such dataset, no package for the remote, ...
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(
                f"--dataset.id {self.id}: neither in Minari's folder nor to be downloaded ({reason}); check the name"
                " and the network, or give a local copy with --dataset.path"
            ) from error
        return path


class Part(NamedTuple):
    """One leaf of a space."""

    path: tuple[str | int, ...]  # keys of Dicts and indices of Tuples down to it
    shape: tuple[int, ...]
    top: float | None = None  # the largest value of pictures, None for other numbers
    renamed: str = ""  # another key, by --dataset.rename

    @property
    def picture(self) -> bool:
        return self.top is not None

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    @property
    def key(self) -> str:
        """Its key as an observation."""
        names = [str(name) for name in self.path]
        if self.renamed:
            return self.renamed
        if self.picture:
            names = names[1:] if names[:1] == ["pixels"] else names
            return IMAGES + (camera_of(".".join(names)) or "camera")
        name = ".".join(names).removeprefix("observation.")
        return "observation." + ("state" if names in ([], ["observation"], ["agent_pos"]) else name)


def parts_of(space: Any, place: str, path: tuple[str | int, ...] = ()) -> list[Part]:
    """The leaves of a space in Minari's description. Raises UserError: damaged, or not numbers."""
    try:
        kind = space["type"]
        if kind in ("Dict", "Tuple"):
            inner = space["subspaces"]
            named = list(inner.items()) if kind == "Dict" else list(enumerate(inner))
            return [part for name, sub in named for part in parts_of(sub, place, (*path, name))]
        if kind == "Text":
            return []
        if kind == "Discrete":
            return [Part(path, (1,))]
        shape = {"Box": "shape", "MultiDiscrete": "nvec", "MultiBinary": "n"}[kind]
        sizes = np.shape(space[shape]) if kind == "MultiDiscrete" else tuple(np.atleast_1d(space[shape]).tolist())
        if any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError(f"shape {sizes}")
        low, high = space.get("low"), space.get("high")
        top = top_of_space(sizes, space.get("dtype", ""), low, high)
        told = path[:1] == ("pixels",) or str(*path[:1]).startswith(IMAGES)  # by the name
        if top is None and told and len(sizes) > 1:
            top = declared_top(space.get("dtype", ""), low, high) or 1.0
        return [Part(path, sizes, top)]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: a space that is not known or damaged ({type(error).__name__}: {error})") from error


class Declared(NamedTuple):
    """Declarations of metadata.json."""

    observed: list[Part]
    acted: list[Part]
    bounds: dict[str, Any]  # {"action_space": {"low", "high"}}, where there are any
    storage: str
    episodes: int
    unused: dict[str, str]  # an entry of `Episodes.stored`


def texts_of(space: Any, path: tuple[str, ...] = ()) -> list[str]:
    """The names of the texts in a space."""
    inner = space.get("subspaces", {})
    named = inner.items() if isinstance(inner, dict) else enumerate(inner)
    own = ["/".join(path)] if space.get("type") == "Text" else []
    return own + [text for name, sub in named for text in texts_of(sub, (*path, str(name)))]


def read_declared(meta: dict[str, Any], place: Path, options: MinariDataset) -> Declared:
    """Read the spaces, the storage and the number of episodes. Raises UserError: damaged, or unusable spaces."""
    try:
        spaces = [json.loads(meta[name]) for name in ("observation_space", "action_space")]
        storage, total = str(meta.get("data_format", "hdf5")), int(meta["total_episodes"])
        bounds: dict[str, Any] = {}
        if spaces[1].get("type") == "Box":
            low_high = ((bound, np.ravel(spaces[1][bound]).astype(np.float64)) for bound in ("low", "high"))
            bounds = {"action_space": {bound: values.tolist() for bound, values in low_high}}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{place}: damaged or incomplete ({type(error).__name__}: {error})") from error
    observed = parts_of(spaces[0], f"{place}: observation_space")
    acted = parts_of(spaces[1], f"{place}: action_space")
    if not acted:
        raise UserError(f"{place}: action_space: no numbers in it; expected at least one")
    names = options.renamed([".".join(map(str, part.path)) for part in observed], place)
    new = {old: name for name, old in names.items() if name != old}
    for i, part in enumerate(observed):
        if name := new.get(".".join(map(str, part.path))):
            name = IMAGES + camera_of(name) if part.picture else f"observation.{name.removeprefix('observation.')}"
            observed[i] = part._replace(renamed=name)
    keys = [part.key for part in observed]
    if len(set(keys)) != len(keys):
        raise UserError(f"{place}: two parts of the observation space would both be {max(keys, key=keys.count)!r}")
    texts = dict.fromkeys([text for space in spaces for text in texts_of(space)], (None, "a text"))
    return Declared(observed, acted, bounds, storage, total, tell_unused(str(place.parent), texts))


def read(root: Path, meta: dict[str, Any], options: MinariDataset) -> Episodes:
    """Read the episodes below `root`, the folder data/; of these, those that `--dataset.episodes` names."""
    place = root / "metadata.json"
    declared = read_declared(meta, place, options)
    pictured = {part.key.removeprefix(IMAGES): part for part in declared.observed if part.picture}
    chosen = {IMAGES + name: pictured[name] for name in chosen_cameras(options.cameras, list(pictured), str(root))}
    if declared.storage not in ("hdf5", "arrow", "parquet"):
        raise UserError(f"{place}: storage {declared.storage!r} is not known; expected hdf5, arrow or parquet")
    store = HDF5Store(root) if declared.storage == "hdf5" else ArrowStore(root, declared.storage)
    with store.opened() as names:
        if len(names) != declared.episodes:
            found = f"{len(names)} episodes, but metadata.json says {declared.episodes}"
            raise UserError(f"{store.path}: {found}; is the copy complete?")
        if not names:
            raise UserError(f"{store.path}: the dataset is empty; expected at least one episode with one step")
        numbers = own_numbers(names)
        places = choose_episodes(options.episodes, numbers, str(root))
        each = [read_episode(store, names[place], declared, chosen) for place in counted(places, "reading episodes")]
    keys = [key for key in each[0][0] if all(key in values for values, _ in each)]  # only `infos` may lack some
    vectors = {key: torch.from_numpy(np.concatenate([values[key] for values, _ in each])) for key in keys}
    observations: dict[str, Any] = {key: x for key, x in vectors.items() if key.startswith("observation.")}
    known = (
        meta["converted"] if isinstance(meta.get("converted"), dict) else {}
    )  # from a format without rewards or final observations
    for key, part in chosen.items():
        says = "HWC" if known.get("pictures") == "HWC" else ""
        observations[key] = joined([pictures[key] for _, pictures in each], part, store.files, says)
    columns = {"action": vectors["action"], "reward": vectors["reward"].squeeze(1)}
    columns |= {key: vectors[key].squeeze(1) > 0 for key in ("terminated", "truncated")}
    recorded = {key: as_flags(vectors[key].numpy(), f"{store.path}: infos/{key}") for key in RECORDED if key in vectors}
    ends = torch.tensor([len(values["action"]) for values, _ in each]).cumsum(0)
    at, after = with_final(ends)
    if known.get("rewards") is False:
        columns = {"action": columns["action"]}
    columns |= recorded
    if known.get("final_observations") is False:
        after[ends - 1] = -1
    stored: dict[str, Any] = {"format": f"minari {declared.storage}", **declared.bounds} | declared.unused
    if any("antmaze" in str(meta.get(name)).lower() for name in ("dataset_id", "env_spec", "eval_env_spec")):
        stored["task"] = "antmaze"
    own, named = [numbers[place] for place in places], dimension_names(declared)
    return Episodes(str(root), ends, columns, observations, at, after, stored=stored, names=named, numbers=own)


def dimension_names(declared: Declared) -> dict[str, list[str]]:
    """Names of the dimensions of vectors of several axes, and of actions in parts."""
    flat = {part.key: part for part in declared.observed if not part.picture and len(part.shape) != 1}
    names = {key: flat_names(key.removeprefix("observation."), part.shape) for key, part in flat.items()}
    if len(declared.acted) > 1 or len(declared.acted[0].shape) != 1:
        named = [(".".join(map(str, part.path)) or "action", part) for part in declared.acted]
        names["action"] = [name for name, part in named for name in flat_names(name, part.shape)]
    return names


def read_episode(
    store: Any, name: str, declared: Declared, chosen: dict[str, Part]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One episode's vectors `[rows, width]` and its pictures, as the storage holds them.

    Raises:
        UserError: an array is missing, damaged, or has a number of rows that does not fit the number of actions.
    """
    flags = {key: store.vector(name, (key,), 1) for key in ("rewards", "terminations", "truncations")}
    values = {"action": np.concatenate([store.vector(name, ("actions", *p.path), p.width) for p in declared.acted], 1)}
    values |= {"reward": flags["rewards"], "terminated": flags["terminations"], "truncated": flags["truncations"]}
    for part in declared.observed:
        if not part.picture:
            values[part.key] = store.vector(name, ("observations", *part.path), part.width)
    pictures = {key: store.pictures(name, ("observations", *part.path), part) for key, part in chosen.items()}
    steps = len(values["action"])
    for key, value in {**values, **pictures}.items():
        rows = steps + 1 if key.startswith("observation.") else steps
        if len(value) != rows or steps < 1:
            raise UserError(f"{store.path}: {name}: {len(value)} rows of {key}, {steps} actions; expected {rows}")
    for key in RECORDED:
        if (info := store.info(name, key)) is not None and len(info) in (steps, steps + 1):
            values[key] = info[-steps:]
    return values, pictures


def joined(parts: list[Any], part: Part, files: list[Path], says: str) -> Any:
    """One camera's pictures of all episodes in the form of the storage: encoded, in HDF5 arrays, or plain.

    Args:
        says: Layout that `convert` noted, "" for none.
    """
    place = f"{files[0]}: {part.key!r}"
    says = says or ("CHW" if str(*part.path[:1]).startswith(IMAGES) else "")  # of the data's own names
    layout = find_layout(part.shape) or layout_of(part.shape, place, says)
    if isinstance(parts[0], list):  # encoded, one array of bytes a picture
        sizes = np.array([len(picture) for episode in parts for picture in episode])
        check_memory(int(sizes.sum()), f"{files[0]}: the encoded pictures of {part.key}")
        data = np.concatenate([picture for episode in parts for picture in episode])
        return EncodedFrames(data, sizes.cumsum() - sizes, sizes.cumsum(), layout.stored, files)
    if isinstance(parts[0], HDF5Array):
        array_of = np.repeat(np.arange(len(parts)), [len(array) for array in parts])
        row_of = np.concatenate([np.arange(len(array)) for array in parts])
        names = [array.name for array in parts]
        return HDF5Frames(files[:1], names, array_of, row_of, layout, part.top or 1.0)
    pictures = np.concatenate(parts).reshape(-1, *part.shape)
    return torch.from_numpy(layout(as_bytes(pictures, place, part.top or 1.0))).contiguous()


class HDF5Array(NamedTuple):
    """Pictures that remain in the file."""

    name: str
    rows: int

    def __len__(self) -> int:
        return self.rows


class HDF5Store:
    """`main_data.hdf5`: one group for each episode."""

    def __init__(self, root: Path) -> None:
        self.path = inside(root, "main_data.hdf5", root / "metadata.json")
        self.files: list[Path] = [self.path]
        self.file: Any = None

    @contextmanager
    def opened(self) -> Iterator[list[str]]:
        """A context in which episodes can be read; yields their names."""
        with open_hdf5(self.path) as self.file:
            names = sorted((name for name in self.file if name.startswith("episode_")), key=demonstration_number)
            check_members(self.path, names, "episodes")
            yield names

    def _array(self, episode: str, path: tuple[str | int, ...]) -> Any:
        """The HDF5 object at `path` of an episode. Raises UserError: none there."""
        name = "/".join(f"_index_{part}" if isinstance(part, int) else part for part in (episode, *path))
        if (array := hdf5(self.file, name)) is None:
            raise UserError(f"{self.path}: no {name}, though metadata.json promises it")
        return array

    def vector(self, episode: str, path: tuple[str | int, ...], width: int) -> np.ndarray:
        """An array of an episode as float32 `[rows, width]`."""
        array = self._array(episode, path)
        check_hdf5(array)
        if array.ndim == 0 or math.prod(array.shape[1:]) != width:
            raise UserError(f"{self.path}: {array.name} has shape {array.shape}, metadata.json says width {width}")
        return read_hdf5(array).reshape(len(array), width).astype(np.float32)

    def info(self, episode: str, key: str) -> np.ndarray | None:
        """Numbers of `infos`, `[rows, 1]`; None without them."""
        array = hdf5(self.file, f"{episode}/infos/{key}")
        if getattr(array, "dtype", np.dtype(object)).kind not in "biuf" or array.ndim not in (1, 2):
            return None
        return self.vector(episode, ("infos", key), 1) if math.prod(array.shape[1:]) == 1 else None

    def pictures(self, episode: str, path: tuple[str | int, ...], part: Part) -> Any:
        """A list of encoded pictures, or the array that holds plain ones."""
        import h5py

        array = self._array(episode, path)
        if isinstance(array, h5py.Dataset) and array.dtype.kind in "uif" and array.ndim > 2:
            if array.shape[1:] != part.shape:
                raise UserError(f"{self.path}: {array.name} has shape {array.shape}, metadata.json says {part.shape}")
            check_declared(array)
            return HDF5Array(array.name.strip("/"), len(array))
        if not isinstance(array, h5py.Dataset) or array.ndim != 1 or h5py.check_vlen_dtype(array.dtype) != np.uint8:
            raise UserError(f"{self.path}: {array.name} holds no pictures; expected bytes")
        return [np.asarray(picture, np.uint8) for picture in read_checked(array)]


class ArrowStore:
    """`<k>/part-*.arrow|parquet`: one folder for each episode."""

    def __init__(self, root: Path, storage: str) -> None:
        require("pyarrow", "pyarrow")
        self.path, self.storage = root, storage
        self.files: list[Path] = []
        self.name, self.table = "", None
        self.ledger = Ledger()

    @contextmanager
    def opened(self) -> Iterator[list[str]]:
        """A context in which episodes can be read; yields their names."""
        folders = [path.name for path in self.path.iterdir() if path.is_dir() and path.name.isdigit()]
        yield sorted(folders, key=int)

    def _column(self, episode: str, path: tuple[str | int, ...]) -> Any:
        """A column of an episode, without a last row of padding; the most recent table is kept."""
        if self.name != episode:
            self.name, self.table = episode, self._read(episode)
        column: Any = self.table
        where = f"{self.path}/{episode}"
        for depth, name in enumerate(map(str, path)):
            names = column.column_names if depth == 0 else [field.name for field in column.type]
            if name not in names:
                raise UserError(f"{where}: no {'/'.join(map(str, path))}, though metadata.json promises it")
            column = column[name].combine_chunks() if depth == 0 else column.field(name)
        return column if path[0] in ("observations", "infos") else column[:-1]

    def _read(self, episode: str) -> Any:
        """The table of an episode. Raises UserError: missing, truncated or damaged files."""
        import pyarrow
        import pyarrow.parquet

        tables = []
        for path in sorted((self.path / episode).glob(f"part-*.{self.storage}")):
            path = inside(self.path, path.relative_to(self.path), self.path / "metadata.json")
            try:
                check_memory(path.stat().st_size, str(path))
                if self.storage == "arrow":
                    if is_packed(path):
                        raise UserError(f"{path} is compressed; plain Arrow files are read, and Parquet")
                    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
                    check_arrow(path, table, self.ledger)
                else:
                    file = pyarrow.parquet.ParquetFile(path)
                    table = read_parquet(file, path, self.ledger)
                table.validate(full=True)  # checks the offsets, which must not leave the file
            except (pyarrow.ArrowException, OSError, MemoryError, struct.error) as error:
                raise UserError(f"{path}: truncated or damaged ({' '.join(str(error).split())[:100]})") from error
            tables.append(table)
            self.files.append(path)
        if not tables:
            raise UserError(f"{self.path}/{episode}: no part-*.{self.storage} in it, though metadata.json promises it")
        return pyarrow.concat_tables(tables)

    def vector(self, episode: str, path: tuple[str | int, ...], width: int) -> np.ndarray:
        """A column of an episode as float32 `[rows, width]`."""
        import pyarrow

        from .lerobot import as_array

        where = f"{self.path}/{episode}: {'/'.join(map(str, path))}"
        return as_array(pyarrow.chunked_array([self._column(episode, path)]), width, where, "metadata.json")

    def info(self, episode: str, key: str) -> np.ndarray | None:
        """Numbers of `infos`, `[rows, 1]`; None without them."""
        import pyarrow

        self._column(episode, ("rewards",))  # which reads the table
        table: Any = self.table
        infos: Any = table.schema.field("infos").type if "infos" in table.column_names else pyarrow.null()
        kind = infos.field(key).type if pyarrow.types.is_struct(infos) and infos.get_field_index(key) >= 0 else None
        if kind is not None and pyarrow.types.is_fixed_size_list(kind) and kind.list_size == 1:
            kind = kind.value_type
        if kind not in (pyarrow.bool_(), pyarrow.int64(), pyarrow.float32(), pyarrow.float64()):
            return None
        return self.vector(episode, ("infos", key), 1)

    def pictures(self, episode: str, path: tuple[str | int, ...], part: Part) -> Any:
        """A list of encoded pictures, or the plain ones `[rows, H * W * C]`."""
        import pyarrow

        column = self._column(episode, path)
        where = f"{self.path}/{episode}: {'/'.join(map(str, path))}"
        if column.null_count:
            raise UserError(f"{where} has {column.null_count} rows without a picture")
        if pyarrow.types.is_binary(column.type):
            return [np.frombuffer(value.as_buffer(), np.uint8) for value in column]
        if not pyarrow.types.is_fixed_size_list(column.type) or pyarrow.types.is_nested(column.type.value_type):
            raise UserError(f"{where} holds {column.type}; expected pictures of {part.shape}")
        return column.flatten().to_numpy().reshape(len(column), -1)


def recovered(episodes: Episodes, meta: dict[str, Any]) -> dict[str, Any] | None:
    """The environment of the evaluation, or None.

    The description is not trusted. Only a registered id, a number of steps and plain arguments are used; code that it
    names, such as an entry point or wrappers, is never imported.
    """
    import importlib

    env = meta.get("environment")
    if isinstance(env, dict) and env.get("name") != "gymnasium":  # of another family, written by `convert`
        return recoverable(episodes, env)
    text = meta.get("eval_env_spec") or meta.get("env_spec")
    if not text:
        logger.info("%s: it names no environment", episodes.name)
        return None
    try:
        spec = json.loads(text) if isinstance(text, str) else text
        name, limit = str(spec["id"]), spec.get("max_episode_steps")
        package = str(spec.get("entry_point", "")).partition(".")[0].partition(":")[0]
        if not all(part.replace("_", "").replace("-", "").isalnum() for part in name.split("/")):
            raise ValueError(f"the id {name!r}")
        options = {
            "name": "gymnasium",
            "id": name,
            "max_episode_steps": limit if isinstance(limit, int) and limit > 0 else None,
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.info("%s: its environment is not understood (%s)", episodes.name, error)
        return None
    if spec.get("additional_wrappers"):
        logger.info("%s: the wrappers of the environment %s are left out", episodes.name, name)
    if package in REGISTER:
        try:
            importlib.import_module(package)
        except Exception as error:
            logger.info("%s: %s is needed for %s (%s)", episodes.name, package, name, error)
    return recoverable(episodes, options | {"kwargs": plain_words(spec.get("kwargs"))})
