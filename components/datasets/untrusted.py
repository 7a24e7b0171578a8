"""Safe reading of untrusted files: no code runs, no path leaves the dataset, no read exceeds the free memory.

Every reader uses these functions. They refuse, each with a one-line message: pickled objects, links and paths out of
the dataset's folder, HDF5 external storage and virtual datasets, headers that declare more than file or memory hold.
"""

import contextlib
import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data.pictures import RULE
from ..errors import UserError, first_line, require
from ..records import allowed_folders, check_regular, leaves, read_json

__all__ = ["read_json"]
# gzip reaches 1032 to 1. What declares more than that is not stored at all: rows that were never written, or values
# that a format repeats.
RATIO = 1100
UNSTORED = 1 << 24  # bytes of it that a dataset may have
ROW, CHUNK = 64, 256  # least bytes that a row without values, and a chunk of an array, count for
MEMBER = 128  # least bytes of an HDF5 group with an array in it


def inside(root: Path, relative: Any, named_by: Path) -> Path:
    """The path of a dataset's file, named `relative` by its metadata file `named_by`.

    Raises:
        UserError: the path leaves the folder `root` (absolute, `..`, symbolic link), or it is a pipe or device. Links
            of huggingface_hub's cache into its folder of blobs are allowed.
    """
    path = root / str(relative)
    if leaves(path, allowed_folders(root)):
        raise UserError(f"{named_by}: {str(relative)!r} points outside the dataset; it is not followed")
    check_regular(path, may_be_folder=True)
    return path


def existing(path: str, what: str) -> Path:
    """The path of the option `--dataset.path`. Raises UserError: the option is empty, or no such file."""
    if not path:
        raise UserError(f"--dataset.path is needed: {what}")
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"--dataset.path {path}: no such file or folder; expected {what}")
    check_regular(found, may_be_folder=True)
    return found


class Ledger:
    """Counts what a dataset declares and does not store, so that a small file cannot ask for all memory, or minutes.

    Args:
        size: Bytes of the file, which it may declare once more, such as rewards that were never written.
    """

    def __init__(self, size: int = 0) -> None:
        self.unstored, self.most = 0.0, max(size, UNSTORED)

    def add(self, place: str, shape: Sequence[int], itemsize: int, stored: int, chunks: int = 0) -> None:
        """Count an array of this shape, before anything of it is allocated.

        Args:
            stored: Its bytes in the file.
            chunks: Number of the pieces that it is declared to be in.

        Raises:
            UserError: too much of the dataset is declared and not stored.
        """
        rows = shape[0] if len(shape) else 1
        size = max(math.prod(shape) * itemsize, ROW * rows if not math.prod(shape) else 0, CHUNK * chunks)
        self.unstored += max(size - RATIO * stored, 0)
        if self.unstored > self.most:
            raise UserError(
                f"{place} declares {gigabytes(size)} (shape {tuple(shape)}), but stores {gigabytes(stored)};"
                " is the copy complete?"
            )


def free_memory() -> int:
    """Bytes of free memory: of the machine, or of the container or the process's limit where that is less."""
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
    with contextlib.suppress(ImportError, OSError, ValueError):  # not Linux
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]  # ulimit -v
        if most != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            free = min(free, max(most - taken, 0))
    return free


def check_memory(size: int, what: str, remedy: str = "use fewer episodes, or a machine with more") -> None:
    """Refuse a need of `size` bytes. Raises UserError: more than the free memory."""
    free = free_memory()
    if size > 0.9 * free:
        raise UserError(f"{what}: {gigabytes(size)} are needed, {gigabytes(free)} of memory are free; {remedy}")


def gigabytes(size: float) -> str:
    """A number of bytes as text."""
    size = min(size, 1e30)  # a whole number from a file may be too large for a float
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# ---- HDF5 ----------------------------------------------------------------------------------------------------------

LEDGERS: dict[str, Ledger] = {}  # of the files that were opened last, by their names


@contextmanager
def open_hdf5(path: Path, ledger: Ledger | None = None) -> Any:
    """Open an HDF5 file to read; any error of it, also one during reading, becomes a one-line message.

    Args:
        ledger: That of a dataset of several files; by default, the file has its own.

    Raises:
        UserError: h5py is missing, or the file is no HDF5, truncated or damaged.
    """
    h5py = require("h5py", "h5py")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected an HDF5 file")
    check_regular(path)
    try:
        with h5py.File(path, "r") as file:
            LEDGERS[file.filename] = ledger or Ledger(path.stat().st_size)
            yield file
    except UserError:
        raise
    except (OSError, KeyError, IndexError, RuntimeError, ValueError, TypeError, OverflowError, zlib.error) as error:
        reason = first_line(error)[:100]
        raise UserError(f"{path}: truncated, damaged or no HDF5 file ({reason})") from error


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
    """A dataset of numbers, texts or bytes of any length, as an array.

    Raises:
        UserError: it unpacks to more than it declares, declares far more than it stores, or is too large for memory.
    """
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    check_memory(size, f"{dataset.file.filename}: {dataset.name} of shape {dataset.shape}")
    check_declared(dataset)
    check_chunks(dataset, None)
    return np.asarray(dataset[()]) if dataset.dtype.kind != "O" else read_texts(dataset)


def read_texts(dataset: Any) -> np.ndarray:
    """Texts or bytes of any length. Many of them may refer to the same place in the file: together they must not be
    longer than the file.

    Raises:
        UserError: they are.
    """
    stored = Path(dataset.file.filename).stat().st_size
    step, total = min(max((1 << 30) // max(stored, 1), 8), 4096), 0
    values = np.empty(dataset.shape, dtype=object)
    for start in range(0, len(dataset) if dataset.shape else 1, step):
        part = dataset[start : start + step] if dataset.shape else dataset[()]
        total += sum(len(value) for value in np.ravel(part))
        if total > stored:
            raise UserError(f"{dataset.file.filename}: {dataset.name} holds more than the file; it is damaged")
        values[start : start + step] = part
    return values


def check_declared(dataset: Any) -> None:
    """Refuse a dataset that declares far more than it stores, together with the others of its file."""
    shape, stored, chunks = dataset.shape, dataset.id.get_storage_size(), 0
    if dataset.chunks:
        chunks = math.prod(-(-size // step) for size, step in zip(shape, dataset.chunks, strict=True))
    ledger = LEDGERS.setdefault(dataset.file.filename, Ledger())
    ledger.add(f"{dataset.file.filename}: {dataset.name}", shape, dataset.dtype.itemsize, stored, chunks)


def check_members(path: Path, names: Sequence[str], what: str) -> None:
    """Refuse more groups than fit into a file: names that lead to the same group take 30 bytes. Raises UserError."""
    if (size := path.stat().st_size) < MEMBER * len(names):
        raise UserError(f"{path}: {len(names)} {what} in {gigabytes(size)}: most are the same; it is damaged")


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
    for start, info in stored_chunks(dataset, rows):
        if info.byte_offset is None or info.filter_mask >> codes.index(packers[0]) & 1:  # not stored, or not compressed
            continue
        _, packed = dataset.id.read_direct_chunk(start)
        if UNPACKED_SIZE[packers[0]](packed[:-4] if dataset.fletcher32 else packed, chunk) > chunk:
            raise UserError(f"{where}: a chunk unpacks to more than the {chunk} bytes that it declares")


def stored_chunks(dataset: Any, rows: Iterable[int] | None) -> Iterable[tuple[tuple[int, ...], Any]]:
    """(place, what HDF5 says of it) of the chunks that hold `rows`, or of all stored ones."""
    firsts = None if rows is None else {int(row) // dataset.chunks[0] * dataset.chunks[0] for row in rows}
    others = [range(0, size, step) for size, step in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
    if firsts is not None and len(firsts) * math.prod(map(len, others)) < 1000:
        places = itertools.product(sorted(firsts), *others)
        return [(place, dataset.id.get_chunk_info_by_coord(place)) for place in places]
    found: list[Any] = []
    dataset.id.chunk_iter(found.append)
    return [(info.chunk_offset, info) for info in found if firsts is None or info.chunk_offset[0] in firsts]


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


def own_numbers(names: Sequence[str]) -> list[int]:
    """The numbers in which names end, where each has one of its own; else their places."""
    numbers = [demonstration_number(name)[0] for name in names]
    return numbers if min(numbers, default=0) >= 0 and len(set(numbers)) == len(names) else list(range(len(names)))


# ---- npz -----------------------------------------------------------------------------------------------------------


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read the arrays among `names` that a npz file has. Nothing pickled is read.

    Raises:
        UserError: no npz, damaged, pickled objects, a header that declares more than the file or memory holds.
    """
    arrays: dict[str, np.ndarray] = {}
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a npz file")
    check_regular(path)
    ledger = Ledger()
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            for name in names:
                if (info := members.get(f"{name}.npy")) is None:
                    continue
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise UserError(f"{path}: {name!r}: only plain and deflated members of a npz file are read")
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
                ledger.add(f"{path}: {name!r}", shape, dtype.itemsize, info.compress_size)
                check_memory(size, f"{path}: {name!r} of shape {shape}")
                with archive.open(info) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{path}: truncated, damaged or no npz file ({first_line(error)[:100]})") from error
    return arrays


# ---- parquet -------------------------------------------------------------------------------------------------------


def check_parquet(file: Any, path: Path, ledger: Ledger, columns: list[str] | None = None) -> None:
    """Refuse a `pyarrow.parquet.ParquetFile` whose `columns` (None: all) are too large for the free memory.

    Repeated values take almost no space in the file, so each value counts as at least 8 bytes.

    Raises:
        UserError: they are, or they declare far more than the file stores.
    """
    size = stored = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for chunk in (group.column(i) for i in range(group.num_columns)):
            name = chunk.path_in_schema
            if columns is None or any(name == one or name.startswith(f"{one}.") for one in columns):
                size += max(chunk.total_uncompressed_size, 8 * chunk.num_values)
                stored += chunk.total_compressed_size
    check_memory(size, str(path))
    ledger.add(f"{path}: its table of {file.metadata.num_rows} rows", (size + file.metadata.num_rows,), 1, stored)


def read_parquet(file: Any, path: Path, ledger: Ledger, columns: list[str] | None = None) -> Any:
    """`columns` of a `pyarrow.parquet.ParquetFile` (None: all), after `check_parquet`.

    Texts and bytes may all refer to the same entry of a dictionary, so they are read in parts.

    Raises:
        UserError: as of `check_parquet`, or they are far larger than the file.
    """
    import pyarrow

    check_parquet(file, path, ledger, columns)
    wanted = [field for field in file.schema_arrow if columns is None or field.name in columns]
    if not any(is_variable(field.type) for field in wanted):
        return file.read(columns=columns)
    stored, total, parts = path.stat().st_size, 0, []
    for part in file.iter_batches(min(max((1 << 28) // max(stored, 1), 1), 4096), columns=columns):
        total += part.nbytes
        if total > UNSTORED + RATIO * stored:
            raise UserError(f"{path}: its texts or pictures are far larger than the file; it is damaged")
        check_memory(2 * part.nbytes, str(path))
        parts.append(part)
    return pyarrow.Table.from_batches(parts, None if parts else pyarrow.schema(wanted))


def is_variable(kind: Any) -> bool:
    """Whether an Arrow type holds texts or bytes."""
    import pyarrow

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    simple = pyarrow.types.is_binary(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_large_binary(kind)
    return simple or pyarrow.types.is_large_string(kind) or any(map(is_variable, inner))


def check_arrow(path: Path, table: Any, ledger: Ledger) -> None:
    """Refuse a `pyarrow.Table` that is far larger than its file, since it refers to the same place many times."""
    ledger.add(f"{path}: its table of {table.num_rows} rows", (table.nbytes + table.num_rows,), 1, path.stat().st_size)


def is_packed(path: Path) -> bool:
    """Whether an Arrow IPC file has compressed batches: their sizes are not declared before they are unpacked.

    The footer lists the batches; a batch's header is a table of FlatBuffers, whose field 3 says how it is compressed.
    """
    data: Any = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)

    def number(form: str, place: int) -> int:
        return struct.unpack_from(form, data, place)[0]

    def field(table: int, index: int) -> int:
        """Place of a field of a table; 0 where the table lacks it."""
        layout = table - number("<i", table)
        known = 4 + 2 * index < number("<H", layout)
        offset = number("<H", layout + 4 + 2 * index) if known else 0
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + number("<I", place)

    footer = len(data) - 10 - number("<i", len(data) - 10)
    for kind in (2, 3):  # dictionaries and batches: structs of 24 bytes, the first 8 their place
        listed = field(follow(footer), kind)
        places = follow(listed) if listed else 0
        for i in range(number("<I", places) if listed else 0):
            at = number("<q", places + 4 + 24 * i)
            at += 8 if number("<I", at) == 0xFFFFFFFF else 4
            header = follow(field(follow(at), 2))
            if kind == 2:  # a dictionary's batch is its field 1
                header = follow(field(header, 1))
            if field(header, 3):
                return True
    return False


# ---- pictures ------------------------------------------------------------------------------------------------------


def decode_picture(data: bytes, shape: tuple[int, int, int], place: str) -> np.ndarray:
    """A PNG or JPEG as uint8 `[C, H, W]`; its header must declare `shape` (C, H, W), which is checked first."""
    import io

    image_module = require("PIL.Image", "pillow")
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    Ledger().add(f"{place}: a picture", (shape[1], shape[2], shape[0]), 1, len(data))
    try:
        with image_module.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if (picture.height, picture.width) != shape[1:]:
                found = f"{picture.height} x {picture.width}"
                raise UserError(f"{place}: a picture of {found}, but the metadata says {shape[1]} x {shape[2]}")
            if picture.mode[0] in "IF":  # which Pillow would cut off at 255
                raise UserError(f"{place}: its channel has more than 8 bits ({picture.mode}): {RULE}")
            pixels = np.asarray(picture.convert(modes[shape[0]]))
    except UserError:
        raise
    except Exception as error:  # Pillow raises errors of many types
        raise UserError(f"{place}: a picture is truncated or damaged ({str(error)[:80]})") from error
    return pixels.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)


# ---- videos --------------------------------------------------------------------------------------------------------

BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")  # of an mp4 file, with others inside
COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}  # boxes with a number of pictures, and its place


def check_mp4(path: Path) -> None:
    """Refuse an mp4 file that declares more pictures than it has bytes; FFmpeg would make a list of them all.

    Raises:
        UserError: it does. Other damage is left to FFmpeg.
    """
    size = path.stat().st_size
    found = dict.fromkeys((*COUNTS, b"stts", b"ctts"), 0)
    with path.open("rb") as file:
        spans = [(0, size)]
        for _ in range(len(BOXES)):
            spans = [inner for span in spans for inner in _boxes(file, *span, found)]
    if max(found.values()) > size:
        raise UserError(f"{path}: {max(found.values())} pictures in {gigabytes(size)}; it is damaged")


def _boxes(file: Any, at: int, end: int, found: dict[bytes, int]) -> Iterable[tuple[int, int]]:
    """The contents (start, end) of the boxes within a span that have others inside; adds up what the others count."""
    while at + 8 <= end:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if length == 1:
            head, length = 16, int.from_bytes(file.read(8), "big")
        stop = min(at + length, end) if length else end
        if kind in BOXES:
            yield at + head, stop
        elif kind in COUNTS:
            file.seek(at + head + COUNTS[kind])
            found[kind] += int.from_bytes(file.read(4), "big")
        elif kind in found and stop - at > head + 8:  # runs of equal durations
            file.seek(at + head + 8)
            runs = np.frombuffer(file.read((stop - at - head - 8) // 8 * 8), ">u4")
            found[kind] += int(runs[::2].sum())
        at = max(stop, at + 8)
