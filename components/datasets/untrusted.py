"""Safe reading of untrusted files: no code runs, no path leaves the dataset, no read exceeds the free memory.

Every reader uses these functions. They refuse, each with a one-line message: pickled objects, links and paths out of
the dataset's folder, HDF5 external storage and virtual datasets, headers that declare more than file or memory hold.
"""

import itertools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, require

JSON_LIMIT = 1 << 28  # bytes; real metadata takes a few MB


def inside(root: Path, relative: Any, named_by: Path) -> Path:
    """The path of a dataset's file, named `relative` by its metadata file `named_by`.

    Raises:
        UserError: the path leaves the folder `root` (absolute, `..`, symbolic link). Links of huggingface_hub's cache
            into its folder of blobs are allowed.
    """
    path = root / str(relative)
    allowed = [root.resolve()]
    if root.resolve().parent.name == "snapshots":
        allowed.append(root.resolve().parent.parent / "blobs")
    try:
        leaves = not any(path.resolve().is_relative_to(folder) for folder in allowed)
    except (OSError, ValueError, RuntimeError):  # a loop of links, a null byte, or too long a name
        leaves = True
    if leaves:
        raise UserError(f"{named_by}: {str(relative)!r} points outside the dataset; it is not followed")
    return path


def existing(path: str, what: str) -> Path:
    """The path of the option `--dataset.path`. Raises UserError: the option is empty, or no such file."""
    if not path:
        raise UserError(f"--dataset.path is needed: {what}")
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"--dataset.path {path}: no such file or folder; expected {what}")
    return found


def read_json(path: Path, lines: bool = False) -> Any:
    """A JSON file, or the list of its lines. Raises UserError naming the file."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise UserError(f"{path}: {path.stat().st_size >> 20} MB is too much for metadata")
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {str(error)[:80]})") from error


def free_memory() -> int:
    """Bytes of free memory: of the machine, or of the container where that is less."""
    try:
        import psutil

        free = int(psutil.virtual_memory().available)
    except ImportError:
        return 1 << 62
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, max(int(Path(limit).read_text()) - int(Path(used).read_text()), 0))
        except (OSError, ValueError):
            continue
    return free


def check_memory(size: int, what: str, remedy: str = "use fewer episodes, or a machine with more") -> None:
    """Refuse a need of `size` bytes. Raises UserError: more than the free memory."""
    free = free_memory()
    if size > 0.9 * free:
        raise UserError(f"{what}: {gigabytes(size)} are needed, {gigabytes(free)} of memory are free; {remedy}")


def gigabytes(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# ---- HDF5 ----------------------------------------------------------------------------------------------------------


@contextmanager
def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file to read; any error of it, also one during reading, becomes a one-line message.

    Raises:
        UserError: h5py is missing, or the file is no HDF5, truncated or damaged.
    """
    h5py = require("h5py", "h5py")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    except (OSError, KeyError, IndexError, RuntimeError, ValueError, TypeError, zlib.error) as error:
        raise UserError(f"{path}: truncated, damaged or no HDF5 file ({str(error).splitlines()[0][:100]})") from error


def hdf5(group: Any, name: str) -> Any:
    """A member of a group, or None. No link is followed, and no data outside the file is read.

    Raises:
        UserError: the member is a link, or a dataset with external or virtual storage.
    """
    import h5py

    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or part not in group:
            return None
        link = group.get(part, getlink=True)
        where = f"{group.file.filename}: {group.name.rstrip('/')}/{part}"
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{where} is a link ({type(link).__name__}); links are not followed, copy the data instead")
        group = group[part]
        if isinstance(group, h5py.Dataset) and (group.external or group.is_virtual):
            raise UserError(f"{where} is stored outside of the file (external or virtual); that is not read")
    return group


def read_hdf5(dataset: Any) -> np.ndarray:
    """A numeric dataset as an array. Raises UserError: objects, unknown compression, or too large for memory."""
    check_hdf5(dataset)
    return read_checked(dataset)


def read_checked(dataset: Any) -> np.ndarray:
    """A dataset of numbers, texts or bytes of any length, as an array. Raises UserError: it unpacks to more than it
    declares, or is too large for memory."""
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    check_memory(size, f"{dataset.file.filename}: {dataset.name} of shape {dataset.shape}")
    check_chunks(dataset, None)
    return np.asarray(dataset[()])


def check_hdf5(dataset: Any) -> None:
    """Refuse a dataset that is no plain array of numbers."""
    import h5py

    where = f"{dataset.file.filename}: {dataset.name}"
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{where} is a group; expected an array")
    if dataset.dtype.kind not in "biuf":
        raise UserError(f"{where} holds {dataset.dtype}; expected numbers")


def check_chunks(dataset: Any, rows: Iterable[int] | None) -> None:
    """Refuse compressed chunks that unpack to more than they declare, before HDF5 unpacks them.

    Args:
        rows: Indices on the first axis whose chunks will be read; None for all.
    """
    created = dataset.id.get_create_plist()
    codes = [created.get_filter(i)[0] for i in range(created.get_nfilters())]
    where = f"{dataset.file.filename}: {dataset.name}"
    packers = [code for code in codes if code in UNPACKED_SIZE]
    if len(packers) > 1 or set(codes) - set(packers) - {SHUFFLE, FLETCHER32}:
        raise UserError(
            f"{where} is stored with the HDF5 filters {codes}; gzip or lzf (with shuffle, fletcher32) are read"
        )
    if not packers:
        return
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    firsts = range(dataset.shape[0]) if rows is None else rows
    starts = [sorted({row // dataset.chunks[0] * dataset.chunks[0] for row in firsts})]
    starts += [list(range(0, size, step)) for size, step in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
    for start in itertools.product(*starts):
        info = dataset.id.get_chunk_info_by_coord(start)
        if info.byte_offset is None or info.filter_mask >> codes.index(packers[0]) & 1:  # not stored, or not compressed
            continue
        _, packed = dataset.id.read_direct_chunk(start)
        if UNPACKED_SIZE[packers[0]](packed[:-4] if dataset.fletcher32 else packed, chunk) > chunk:
            raise UserError(f"{where}: a chunk unpacks to more than the {chunk} bytes that it declares")


def inflated(packed: bytes, limit: int) -> int:
    """Bytes that a zlib stream unpacks to, counted to just above `limit`."""
    return len(zlib.decompressobj().decompress(packed, limit + 1))


def lzf_size(packed: bytes, limit: int) -> int:
    """Bytes that an LZF stream (Lehmann's liblzf) unpacks to, counted to just above `limit`."""
    size = place = 0
    while place < len(packed) and size <= limit:
        control = packed[place]
        if control < 32:  # control + 1 literal bytes follow
            size, place = size + control + 1, place + control + 2
        else:  # a copy: its length in 3 bits, or in one more byte, then its distance
            long = control >> 5 == 7
            size += (7 + packed[place + 1] if long else control >> 5) + 2
            place += 3 if long else 2
    return size


# HDF5's numbers of its filters, and for each compressor the size that a stream of it unpacks to.
SHUFFLE, FLETCHER32 = 2, 3
UNPACKED_SIZE: dict[int, Callable[[bytes, int], int]] = {1: inflated, 32000: lzf_size}


def demonstration_number(name: str) -> tuple[int, str]:
    """Sort key of names that end in a number: demo_2 before demo_10."""
    digits = name[len(name.rstrip("0123456789")) :]
    return (int(digits) if digits else -1, name)


# ---- npz -----------------------------------------------------------------------------------------------------------


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read the arrays among `names` that a npz file has. Nothing pickled is read.

    Raises:
        UserError: no npz, damaged, pickled objects, a header that declares more than the file or memory holds.
    """
    arrays: dict[str, np.ndarray] = {}
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            for name in names:
                if (info := members.get(f"{name}.npy")) is None:
                    continue
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = read[version](file)
                size = math.prod(shape) * dtype.itemsize
                if dtype.kind not in "biuf":
                    raise UserError(f"{path}: {name!r} holds {dtype}; expected numbers, and nothing pickled is read")
                if size > info.file_size:
                    raise UserError(
                        f"{path}: {name!r} declares {size} bytes (shape {shape}), has {info.file_size}; damaged"
                    )
                check_memory(size, f"{path}: {name!r} of shape {shape}")
                with archive.open(info) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{path}: truncated, damaged or no npz file ({str(error).splitlines()[0][:100]})") from error
    return arrays


# ---- parquet -------------------------------------------------------------------------------------------------------


def check_parquet(file: Any, path: Path, columns: list[str] | None = None) -> None:
    """Refuse a `pyarrow.parquet.ParquetFile` whose `columns` (None: all) are too large for the free memory.

    Repeated values take almost no space in the file, so each value counts as at least 8 bytes.
    """
    size = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if columns is None or chunk.path_in_schema.split(".")[0] in columns:
                size += max(chunk.total_uncompressed_size, 8 * chunk.num_values)
    check_memory(size, str(path))


# ---- pictures ------------------------------------------------------------------------------------------------------


def decode_picture(data: bytes, shape: tuple[int, int, int], place: str) -> np.ndarray:
    """A PNG or JPEG as uint8 `[C, H, W]`; its header must declare `shape` (C, H, W), which is checked first."""
    import io

    image_module = require("PIL.Image", "pillow")
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    try:
        with image_module.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if (picture.height, picture.width) != shape[1:]:
                found = f"{picture.height} x {picture.width}"
                raise UserError(f"{place}: a picture of {found}, but the metadata says {shape[1]} x {shape[2]}")
            pixels = np.asarray(picture.convert(modes[shape[0]]))
    except UserError:
        raise
    except Exception as error:  # Pillow raises errors of many types
        raise UserError(f"{place}: a picture is truncated or damaged ({str(error)[:80]})") from error
    return np.ascontiguousarray(pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1))
