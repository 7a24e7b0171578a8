"""LeRobotDataset v3.0 from a local folder: its low-dimensional part (states and actions).

Layout: `meta/info.json` (features, path patterns), `meta/episodes/chunk-*/file-*.parquet` (which data file holds which
episode), `data/chunk-*/file-*.parquet` (rows of many episodes, ordered by `index`). The statistics in `meta/stats.json`
are left alone: its quantiles are averages over episodes, and it includes the episodes that are held out here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, require
from .episodes import build_episodes


@dataclass(frozen=True)
class LeRobotDataset:
    """LeRobotDataset v3.0 in a local folder, low-dimensional features."""

    path: str = ""
    """Folder of the dataset (the one that holds meta/ and data/)."""
    obs_steps: int = 1
    """Observation steps per sample, the last being now."""
    action_steps: int = 1
    """Action steps per sample; more than one makes chunks."""
    validation: float = 0.1
    """Fraction of the episodes to hold out: at least one, never more than a fifth of the rows; 0 for none."""
    seed: int = 0
    """Seed of the choice of held-out episodes."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}.

        Items: every vector feature `observation.*` `[D]` and `action` `[Da]`, float32, in the data's own units.

        Raises:
            UserError: no such folder, another version, a missing, truncated or lying file, NaN; each names the file.
        """
        if not self.path:
            raise UserError("--dataset.path is needed: the folder of a LeRobotDataset v3.0 (with meta/ and data/)")
        root = Path(self.path).expanduser()
        info = read_info(root)
        rows = read_rows(root, info)
        order = np.argsort(rows["index"], kind="stable")
        episode = rows["episode_index"][order]
        ends = np.flatnonzero(np.append(episode[1:] != episode[:-1], True)) + 1
        if len(set(episode[ends - 1].tolist())) != len(ends):
            raise UserError(f"{root}/data: the rows of an episode are not next to each other in the order of 'index'")
        columns = {key: torch.from_numpy(rows[key][order]) for key in vector_features(info)}
        return build_episodes(
            columns,
            torch.from_numpy(ends),
            str(root),
            self.obs_steps,
            self.action_steps,
            self.validation,
            self.seed,
        )


def read_info(root: Path) -> dict[str, Any]:
    """Read and check `meta/info.json`."""
    path = root / "meta" / "info.json"
    if not root.exists():
        raise UserError(f"--dataset.path {root}: no such folder")
    if not path.is_file():
        raise UserError(f"--dataset.path {root}: no meta/info.json in it; expected a LeRobotDataset v3.0 folder")
    try:
        info = json.loads(path.read_text())
        version, features = info["codebase_version"], info["features"]
        for key in ("action", *features):
            features[key]["shape"], features[key]["dtype"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: damaged or incomplete ({type(error).__name__}: {error})") from error
    if not str(version).startswith("v3."):
        raise UserError(f"{path}: version {version}; this reader knows v3.0 (LeRobot converts v2.1 datasets)")
    return info


def vector_features(info: dict[str, Any]) -> list[str]:
    """`action` and the observations with one axis; images and videos have three."""
    return [
        key
        for key, feature in info["features"].items()
        if (key == "action" or key.startswith("observation."))
        and len(feature["shape"]) == 1
        and feature["dtype"].startswith(("float", "int", "uint"))
    ]


def read_rows(root: Path, info: dict[str, Any]) -> dict[str, np.ndarray]:
    """Read the columns that are used from every data file that the episodes name: float32 `[N, D]`, int64 `[N]`."""
    require("pyarrow", "pyarrow")
    episodes: list[tuple[int, int, int]] = []
    names = ["data/chunk_index", "data/file_index", "length"]
    for path in sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet")):
        table = read_table(path, names)
        episodes += zip(*(table[name].to_pylist() for name in names), strict=True)
    if not episodes:
        raise UserError(f"{root}/meta/episodes: no episodes; expected chunk-*/file-*.parquet with at least one row")
    widths = {key: int(info["features"][key]["shape"][0]) for key in vector_features(info)}
    parts: dict[str, list[np.ndarray]] = {key: [] for key in (*widths, "index", "episode_index")}
    for chunk, file in sorted({(chunk, file) for chunk, file, _ in episodes}):
        path = inside(root, info.get("data_path", ""), chunk, file)
        table = read_table(path, list(parts))
        for key in parts:
            parts[key].append(as_array(table[key], widths.get(key), f"{path}: column {key!r}"))
    rows = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    found, expected = len(rows["index"]), sum(length for _, _, length in episodes)
    if found != expected:
        raise UserError(f"{root}/data: {found} rows, but meta/episodes promises {expected}; a data file is incomplete")
    return rows


def inside(root: Path, pattern: str, chunk: int, file: int) -> Path:
    """The data file that the metadata points at. Metadata is untrusted: a path that leaves the folder is refused."""
    try:
        path = root / pattern.format(chunk_index=chunk, file_index=file)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"{root}/meta/info.json: data_path {pattern!r} is no pattern of v3.0") from error
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root}/meta/info.json: data_path {pattern!r} points outside the dataset")
    return path


def read_table(path: Path, columns: list[str]) -> Any:
    """Read columns of a parquet file, or say in one line what is wrong with it."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise UserError(f"{path}: no column {missing[0]!r}; found: {', '.join(file.schema_arrow.names)}")
        return file.read(columns=columns)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing, though the dataset's metadata names it") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({str(error).splitlines()[0]})") from error


def as_array(column: Any, width: int | None, place: str) -> np.ndarray:
    """A parquet column as float32 `[N, width]`, or int64 `[N]` when `width` is None."""
    import pyarrow
    import pyarrow.compute

    if column.null_count:
        raise UserError(f"{place} has {column.null_count} missing values")
    values, rows = column.combine_chunks(), len(column)
    if isinstance(values, pyarrow.ChunkedArray):
        values = pyarrow.concat_arrays(values.chunks) if values.num_chunks else pyarrow.array([], values.type)
    if width is None:
        return values.to_numpy(zero_copy_only=False).astype(np.int64)
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_fixed_size_list(values.type):
        lengths = set(pyarrow.compute.unique(pyarrow.compute.list_value_length(values)).to_pylist())
        values = values.flatten()
    else:
        lengths = {1}  # features of shape (1,) are plain scalars
    if rows and lengths != {width}:
        raise UserError(f"{place} has width {sorted(lengths)}, but meta/info.json says {width}")
    if values.null_count:
        raise UserError(f"{place} has {values.null_count} missing values")
    return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows, width)
