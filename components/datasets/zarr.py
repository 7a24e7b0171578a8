"""Replay buffers of diffusion_policy: a zarr store, as a folder or as one zip file.

Layout: `data/X` `[N, ...]` (state, action, img, keypoint, ...) and `meta/episode_ends` `[E]`, the row after each
episode's last one. The package zarr decodes, but it never opens the store: it reads metadata and chunks from memory,
after they were checked here. So a store cannot refer to other files or contain pickled objects, and a missing chunk is
an error, where zarr itself would return a fill value, as the option `fill_missing` does.
"""

import bz2
import gzip
import io
import itertools
import json
import logging
import lzma
import math
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.features import INTERVENTION
from ..data.pictures import IMAGES, as_bytes, camera_of, holds_pictures, layout_of
from ..errors import UserError, nearest, require
from .episodes import Episodes, Reader, as_flags, as_tensor, chosen_cameras, flat_names, steps_only, tell_unused
from .frames import Frames
from .untrusted import CHUNK, ROW, Ledger, check_memory, existing, inflated, inside

logger = logging.getLogger(__name__)
METADATA = (".zarray", "zarr.json")  # of an array in format 2 and 3
METADATA_LIMIT = 1 << 20  # bytes; real metadata takes less than a thousand
# zarr leaves out chunks that contain nothing else than the fill value.
INCOMPLETE = "is the copy complete? If the missing ones held the fill value alone, --dataset.fill-missing reads them so"
PACKERS = {2: ("blosc", "zlib", "gzip", "lz4", "zstd", "bz2", "lzma"), 3: ("blosc", "gzip", "zstd")}


@dataclass(frozen=True)
class ZarrDataset(Reader):
    """Replay buffer of diffusion_policy: a zarr store with data/ and meta/episode_ends, as a folder or zip file."""

    keys: tuple[str, ...] = ("state",)
    """Arrays of data/ that are concatenated to observation.state in this order."""
    fill_missing: bool = False
    """Read chunks that are not stored as the array's fill value. zarr leaves out chunks that contain nothing else; but
    in a copy that is incomplete, they are lost."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}.

        Items: observation.state `[D]` of `keys`, observation.images.X of the chosen cameras, action `[Da]`, reward and
        intervention where the store has them. The observation after an episode's last action is not stored.

        Raises:
            UserError: no such store or array, arrays that do not fit together, damaged, dangerous or too large data.
        """
        path = existing(self.path, "a zarr store (a folder or .zip) with data/ and meta/episode_ends")
        require("zarr.buffer", '"zarr>=3.1"')
        store = Store(path, self.fill_missing)
        held = store.shapes("data")
        files = self.renamed(held, path, {"observation.state": "state"})
        shapes = {name: held[old] for name, old in files.items()}
        if "action" not in shapes or (ends := store.array("meta/episode_ends")) is None:
            have = f"found in data/: {', '.join(held) or 'nothing'}; see --dataset.rename OLD=action"
            raise UserError(
                f"{path}: no data/action or no meta/episode_ends in it; expected both, as in diffusion_policy; {have}"
            )
        n = shapes["action"][0]
        for name, shape in shapes.items():
            if shape[0] != n:
                raise UserError(f"{path}: data/{name} has {shape[0]} rows, data/action {n}; they must agree")
        pictured = [
            name for name in shapes if name not in self.keys and is_camera(store, files[name], shapes[name][1:])
        ]
        found = {camera_of(name): name for name in pictured}
        cameras = chosen_cameras(self.cameras, list(found), str(path))
        for key in self.keys:
            if key not in shapes or is_camera(store, files[key], shapes[key][1:], floats=False):
                fit = [name for name in shapes if name not in found.values()]
                raise UserError(f"--dataset.keys {key}: no such array of vectors in {path}/data; {nearest(key, fit)}")
        if not self.keys and not cameras:
            raise UserError(f"{path}: no observations are chosen; see --dataset.keys and --dataset.cameras")
        rewards = [name for name in ("reward", "rewards") if name in shapes][:1]
        marks = [name for name in (INTERVENTION, "interventions") if math.prod(shapes.get(name, (0,))) == n][:1]
        declared = ("action", *self.keys, *rewards, *marks)
        store.check_declared("meta/episode_ends", *(f"data/{files[name]}" for name in declared))
        steps = _episode_ends(ends, n)
        columns = {"action": store.vectors(files["action"])}
        for name in rewards:
            if math.prod(shapes[name]) != n:
                raise UserError(f"{path}: data/{name} has shape {shapes[name]}; expected one number a row")
            columns["reward"] = store.vectors(files[name]).flatten()
        for name in marks:
            columns[INTERVENTION] = as_flags(store.vectors(files[name]).numpy(), f"{path}: data/{name}")
        observations: dict[str, Any] = {}
        if self.keys:
            observations["observation.state"] = torch.cat([store.vectors(files[key]) for key in self.keys], 1)
        observations |= {IMAGES + name: ZarrFrames(Array(store, f"data/{files[found[name]]}")) for name in cameras}
        read = {"action", "reward", "rewards", *marks, *self.keys, *found.values()}
        rest = {name: (shape[1:], "see --dataset.keys") for name, shape in shapes.items() if name not in read}
        names = {"action": flat_names("action", shapes["action"][1:])} if len(shapes["action"]) != 2 else {}
        if self.keys:
            parts = (flat_names(key, shapes[key][1:]) for key in self.keys)
            names["observation.state"] = [name for part in parts for name in part]
        at, after = steps_only(steps)
        about = {"format": "zarr"} | tell_unused(str(path), rest)
        episodes = Episodes(str(path), steps, columns, observations, at, after, stored=about, names=names)
        return self.finish(self.chosen(episodes))


def is_camera(store: "Store", name: str, shape: tuple[int, ...], floats: bool = True) -> bool:
    """Whether an array of data/ holds pictures of this shape: bytes, or `floats` with an axis of channels."""
    try:
        dtype = Array(store, f"data/{name}").dtype if len(shape) > 1 else np.dtype(bool)
    except UserError:  # of a kind that is not read, which is said when it is chosen
        return False
    return (floats or dtype == np.uint8) and holds_pictures(shape, dtype)


def _episode_ends(array: "Array", n: int) -> Tensor:
    """`meta/episode_ends` `[E]` int64. Raises UserError: these are no partition of `n` rows."""
    if len(array.shape) != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{array.place}: {array.dtype} of shape {array.shape}; expected integers with one axis")
    ends = torch.from_numpy(array.read().astype(np.int64))
    if not len(ends):
        raise UserError(f"{array.store.root}: the dataset is empty; expected at least one episode with one step")
    if int(ends[-1]) != n or int(ends[0]) < 1 or not bool((ends.diff() > 0).all()):
        raise UserError(
            f"{array.place}: expected increasing numbers from 1 on, the last being the {n} rows of data/action"
        )
    return ends


class Store:
    """The files of a zarr store as bytes, from a folder or a zip file; nothing outside the store is read.

    Args:
        root: The folder or zip file.
        fill: Whether chunks may be missing.
    """

    def __init__(self, root: Path, fill: bool) -> None:
        self.root, self.fill = root, fill
        self._archive: zipfile.ZipFile | None = None
        self._process = 0
        for name in self.files("") if root.is_file() else ():
            if name.startswith(("/", "\\")) or ".." in Path(name).parts:
                raise UserError(f"{root}: the member {name!r} points outside the store; it is not read")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}

    def files(self, folder: str) -> list[str]:
        """Names of the files below `folder`, relative to the root. Links to other folders are not followed."""
        if self.root.is_file():
            return [name for name in self._zip().namelist() if name.startswith(f"{folder}/" if folder else "")]
        top = inside(self.root, folder, self.root)
        names = [os.path.join(where, name) for where, folders, files in os.walk(top) for name in (*files, *folders)]
        return [Path(name).relative_to(self.root).as_posix() for name in names]

    def read(self, name: str, limit: int) -> bytes | None:
        """A file's content, or None if it is missing. Raises UserError: damaged, a link that leaves, over `limit`."""
        try:
            if self.root.is_file():
                archive = self._zip()
                try:
                    info = archive.getinfo(name)
                except KeyError:
                    return None
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise UserError(f"{self.root}: {name}: only plain and deflated members of a zip file are read")
                size = info.file_size
                if size <= limit:
                    with archive.open(info) as member:
                        return member.read(size + 1)  # never unpacks more than the limit
            else:
                path = inside(self.root, name, self.root)
                if not path.is_file():
                    return None
                size = path.stat().st_size
                if size <= limit:
                    return path.read_bytes()
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.root}: {name}: truncated or damaged ({_brief(error)})") from error
        raise UserError(f"{self.root}: {name}: {size} bytes are more than the {limit} that can be right")

    def metadata(self, name: str) -> dict[str, Any] | None:
        """The content of `.zarray` or `zarr.json`; None where `name` is no array. Raises UserError: damaged."""
        place = f"{self.root}: {name}"
        found = [self.read(f"{name}/{file}", METADATA_LIMIT) for file in METADATA]
        if all(found):
            raise UserError(f"{place}: has both {METADATA[0]} and {METADATA[1]}; which one holds is not known")
        for number, content in zip((2, 3), found, strict=True):
            if content is None:
                continue
            try:
                meta = json.loads(content)
                if meta.get("node_type", "array") != "array":
                    return None
                if meta["zarr_format"] != number or not _sizes(meta["shape"], least=0):
                    raise ValueError(f"format {meta['zarr_format']}, shape {meta['shape']}")
                return meta
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{place}: damaged metadata ({_brief(error)})") from error
        return None

    def shapes(self, folder: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays directly in `folder`."""
        names = sorted({name.split("/")[1] for name in self.files(folder) if "/" in name})
        found = {name: self.metadata(f"{folder}/{name}") for name in names}
        return {name: tuple(meta["shape"]) for name, meta in found.items() if meta is not None}

    def array(self, name: str) -> "Array | None":
        """An array, or None."""
        return None if self.metadata(name) is None else Array(self, name)

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> stored bytes of the files directly in `folder`, and in folders in it."""
        if self.root.is_file():
            infos = self._zip().infolist()
            return {info.filename: info.compress_size for info in infos if info.filename.startswith(f"{folder}/")}
        paths = ((name, self.root / name) for name in self.files(folder))
        return {name: path.lstat().st_size for name, path in paths if not path.is_dir()}

    def check_declared(self, *names: str) -> None:
        """Refuse arrays that together declare far more than they store, or have more chunks than files."""
        size = stored = 0
        for name in names:
            array, files = Array(self, name), self.sizes(name)
            array.check_count(len(files))
            width = math.prod(array.shape[1:]) * array.dtype.itemsize
            size += array.shape[0] * max(width, ROW if not width else 0)
            stored += sum(files.values())
        Ledger().add(f"{self.root}: {', '.join(names)}", (size,), 1, stored)

    def vectors(self, name: str) -> Tensor:
        """An array of data/ as `[N, D]` float32."""
        array = Array(self, f"data/{name}").read()
        return as_tensor(array.reshape(len(array), -1).astype(np.float32))

    def _zip(self) -> zipfile.ZipFile:
        """The zip file, opened by this process. Raises UserError: truncated or damaged."""
        if self._archive is None or self._process != os.getpid():  # processes must not share a position in the file
            try:
                self._archive, self._process = zipfile.ZipFile(self.root), os.getpid()
            except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
                raise UserError(f"{self.root}: truncated, damaged or no zip file ({_brief(error)})") from error
        return self._archive


class Array:
    """One array. Its metadata is checked when it is created, its chunks when they are read.

    Args:
        store: The store that holds it.
        name: Its path within the store.

    Raises:
        UserError: no numbers, unknown filters or compression, invalid sizes.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.place = store, name, f"{store.root}: {name}"
        meta = store.metadata(name) or {}
        try:
            self.format = int(meta["zarr_format"])
            if self.format == 2:
                declared, chunks, other = str(meta["dtype"]), meta["chunks"], meta.get("filters")
                codecs = [meta["compressor"]["id"]] if meta.get("compressor") else []
            else:
                declared, chunks = str(meta["data_type"]), meta["chunk_grid"]["configuration"]["chunk_shape"]
                other = meta.get("storage_transformers") or meta["chunk_grid"]["name"] != "regular"
                codecs = [codec["name"] for codec in meta["codecs"] if codec["name"] not in ("bytes", "transpose")]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.place}: damaged metadata ({_brief(error)})") from error
        if not re.fullmatch(r"[<>|][biuf][1248]|bool|u?int(8|16|32|64)|float(16|32|64)", declared):
            raise UserError(f"{self.place} holds {declared[:40]!r}; expected numbers, and nothing pickled is read")
        codecs = list(map(str, codecs))
        packers = [codec for codec in codecs if self.format == 2 or codec != "crc32c"]
        if other or len(packers) > 1 or not set(packers) <= set(PACKERS[self.format]):
            raise UserError(f"{self.place}: filters or compression {str(other or packers)[:60]!r} are not read")
        if not _sizes(chunks, least=1) or len(chunks) != len(meta["shape"]):
            raise UserError(f"{self.place}: chunks {str(chunks)[:60]} do not fit the shape {str(meta['shape'])[:60]}")
        self.meta, self.dtype, self.shape, self.chunks = meta, np.dtype(declared), tuple(meta["shape"]), tuple(chunks)
        self.packer = packers[0] if packers else None
        self.sums = len(codecs) - len(packers)  # checksums, of 4 bytes each
        self.trailing = 4 * (self.sums if not packers else len(codecs) - 1 - codecs.index(packers[0]))
        self.chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize
        self.told = False  # that chunks are missing
        self._held: dict[str, Any] = {}
        self._array: Any = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None, "_held": {}}

    def check_count(self, files: int) -> None:
        """Refuse an array that has more chunks than its folder has files, or far more where some may be missing."""
        chunks = math.prod(-(-rows // step) for rows, step in zip(self.shape, self.chunks, strict=True))
        if chunks > files and not self.store.fill:
            raise UserError(f"{self.place}: of its {chunks} chunks, {files} are stored; {INCOMPLETE}")
        if chunks > files:
            Ledger().add(f"{self.place}: its list of missing chunks", (chunks - files,), CHUNK, 0)

    def missing(self, key: str) -> None:
        """Refuse a missing chunk, unless it may be missing and the metadata say what it contains. Raises UserError."""
        if not self.store.fill:
            raise UserError(f"{self.place}: the chunk {key} is missing; {INCOMPLETE}")
        if self.meta.get("fill_value") is None:
            raise UserError(f"{self.place}: the chunk {key} is missing, and the array has no fill value; copy it again")
        if not self.told:
            logger.warning("%s: not all chunks are stored; they are read as %s", self.place, self.meta["fill_value"])
        self.told = True

    def chunk_names(self, firsts: list[int] | None = None) -> Any:
        """The names of the chunks within the array's folder: at `firsts` along the first axis, or all of them."""
        grid: list[Any] = [range(-(-size // step)) for size, step in zip(self.shape, self.chunks, strict=True)]
        name = self._opened().metadata.encode_chunk_key
        return (name(place) for place in itertools.product(firsts or grid[0], *grid[1:]))

    def read(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Rows `[n]` of the array, or all of it.

        Raises:
            UserError: too large, or a chunk is missing, truncated, damaged, or unpacks to more than it declares.
        """
        from zarr.buffer.cpu import Buffer

        count = self.shape[0] if rows is None else len(rows)
        size = count * math.prod(self.shape[1:]) * self.dtype.itemsize
        check_memory(2 * size, f"{self.place} of shape {self.shape}")
        check_memory(2 * self.chunk_bytes, f"{self.place} with chunks of shape {self.chunks}")
        array = self._opened()
        keys = self.chunk_names(None if rows is None else np.unique(rows // self.chunks[0]).tolist())
        try:
            for key in keys:
                if (chunk := self._chunk(key)) is not None:
                    self._held[key] = Buffer.from_bytes(chunk)
            return np.asarray(array[...] if rows is None else array.oindex[rows])
        except UserError:
            raise
        except Exception as error:  # every codec has errors of its own
            raise UserError(f"{self.place}: a chunk is truncated or damaged ({_brief(error)})") from error
        finally:
            self._held.clear()

    def _opened(self) -> Any:
        """The array as zarr reads it: from memory, where its chunks are in `_held`."""
        if self._array is None or self._process != os.getpid():  # zarr's threads do not exist in a forked process
            import zarr
            from zarr.buffer.cpu import Buffer

            self._held = {METADATA[self.format - 2]: Buffer.from_bytes(json.dumps(self.meta).encode())}
            try:
                number: Any = self.format
                self._array, self._process = zarr.open_array(self._held, mode="r", zarr_format=number), os.getpid()
            except Exception as error:  # zarr raises errors of many types
                raise UserError(f"{self.place}: damaged metadata ({_brief(error)})") from error
            self._held.clear()
        return self._array

    def _chunk(self, key: str) -> bytes | None:
        """A chunk in stored form, after a check of the size that it unpacks to; None where it is missing."""
        limit = self.chunk_bytes + 4 * self.sums
        data = self.store.read(f"{self.name}/{key}", limit + limit // 64 + (1 << 16))  # incompressible data grows
        if data is None:
            self.missing(key)
            return None
        if _unpacked(self.packer, data[: len(data) - self.trailing], limit) > limit:
            raise UserError(f"{self.place}: the chunk {key} unpacks to more than the {limit} bytes that it declares")
        return data


class ZarrFrames(Frames):
    """Pictures in an array, bytes or floats; those of diffusion_policy are floats from 0 to 255.

    Floats of which none in the first and the last chunk is above 1 are from 0 to 1: others would be black.

    Args:
        array: The array that holds them.

    Raises:
        UserError: a chunk is missing.
    """

    def __init__(self, array: Array) -> None:
        self.array, self.layout = array, layout_of(array.shape[1:], array.place)
        there, files = set(array.store.files(array.name)), [array.store.root]
        array.check_count(len(there))
        for key in array.chunk_names():
            if (name := f"{array.name}/{key}") not in there:
                array.missing(key)
            elif array.store.root.is_dir():
                files.append(array.store.root / name)
        super().__init__(array.shape[0], self.layout.stored, files)
        some = min(array.chunks[0], len(self))
        ends = np.unique([*range(some), *range(len(self) - some, len(self))])
        self.top = 255.0 if array.dtype == np.uint8 or np.nanmax(array.read(ends)) > 1 else 1.0

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self.array.name}"

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        chunks = rows // self.array.chunks[0]
        for chunk in np.unique(chunks):  # each is unpacked once, and one is kept at a time
            slots = np.flatnonzero(chunks == chunk)
            out[slots] = self.layout(as_bytes(self.array.read(rows[slots]), self.array.place, self.top))


def _unpacked(packer: str | None, data: bytes, limit: int) -> int:
    """Bytes that a chunk unpacks to: from its header, or counted to just above `limit` where it has none."""
    if packer is None:
        return len(data)
    if packer == "zlib":
        return inflated(data, limit)
    if packer in ("gzip", "bz2", "lzma"):
        with {"gzip": gzip.open, "bz2": bz2.open, "lzma": lzma.open}[packer](io.BytesIO(data)) as file:  # type: ignore[operator]
            return len(file.read(limit + 1))
    if packer == "lz4":
        return int.from_bytes(data[:4], "little")
    if packer == "blosc":
        if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):  # blosc would read past the end
            raise ValueError("the length in its header is not that of the chunk")
        return int.from_bytes(data[4:8], "little")
    return _zstd_size(data)


def _zstd_size(data: bytes) -> int:
    """The content size in the header of a zstd frame (RFC 8878, 3.1.1.1). Raises ValueError: no such size."""
    flags = data[4] if len(data) > 4 else 0
    single = flags >> 5 & 1
    start = 6 - single + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    if data[:4] != b"\x28\xb5\x2f\xfd" or not width or len(data) < start + width:
        raise ValueError("a zstd frame without its size")
    return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)


def _sizes(values: Any, least: int) -> bool:
    """Whether `values` are the lengths of 1 to 8 axes."""
    return (
        isinstance(values, list)
        and 1 <= len(values) <= 8
        and all(type(v) is int and least <= v < 1 << 40 for v in values)
    )


def _brief(error: BaseException) -> str:
    """Type and message of an error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
