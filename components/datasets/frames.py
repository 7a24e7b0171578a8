"""Pictures of a dataset: decoded when they are needed, or once into a store of bytes.

A `Frames` is one camera with M pictures, each uint8 `[C, H, W]`. Worker processes read it, so it opens its files in
the process that reads. `stored` decodes all pictures into memory, or into a file that is mapped into memory.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.fingerprint import digest
from ..data.pictures import Layout, as_bytes, resized
from ..errors import UserError, require
from ..run.files import beside
from ..run.progress import phase
from .untrusted import check_chunks, check_memory, check_mp4, decode_picture, gigabytes, hdf5, open_hdf5

logger = logging.getLogger(__name__)
LARGE = 1 << 28  # bytes of pictures from which on the free memory is asked for
AT_ONCE = 256  # pictures that are decoded together into a store
VIDEO_FORMATS = {".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}
PARTS, PART, MOST_FILES = 256, 4096, 256  # of a fingerprint: parts, bytes of each, files that are opened
MOST_OPEN = 32  # video files that a process keeps open


class Frames:
    """One camera's pictures.

    Args:
        count: Number of pictures.
        shape: (C, H, W) of each.
        files: The files that hold them; a store is made again when one of these changes.
    """

    dtype = torch.uint8

    def __init__(self, count: int, shape: tuple[int, int, int], files: Sequence[Path]) -> None:
        self.count, self.shape, self.files = count, shape, list(files)

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Size of all pictures when decoded."""
        return self.count * math.prod(self.shape)

    def fingerprint(self) -> str:
        """Number, shape, and a checksum of the files: of all their sizes, and of `PARTS` parts in some of them.

        A subclass adds which pictures of the files these are, so that no other ones have the same fingerprint.
        """
        present = [path for path in self.files if path.is_file()]
        sizes = [path.stat().st_size for path in present]
        check, some = zlib.crc32(json.dumps(sizes).encode()), present[:: max(len(present) // MOST_FILES, 1)]
        for path in some:
            with open(path, "rb") as file:
                last, parts = path.stat().st_size - PART, max(PARTS // len(some), 2)
                for i in range(parts):
                    file.seek(max(last * i // (parts - 1), 0))
                    check = zlib.crc32(file.read(PART), check)
        return f"{self.count} pictures {list(self.shape)} {check:08x}"

    def read(self, rows: np.ndarray) -> Tensor:
        """Pictures `rows` `[n]` in that order, `[n, C, H, W]` uint8; a repeated picture is decoded once."""
        unique, inverse = np.unique(rows, return_inverse=True)
        if (size := (len(unique) + len(rows)) * math.prod(self.shape)) > LARGE:
            check_memory(size, f"{self.files[0]}: {len(rows)} pictures of {self.shape}", "use a smaller batch")
        pictures = np.empty((len(unique), *self.shape), np.uint8)
        self.decode(unique, pictures)
        return torch.from_numpy(pictures[inverse])

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode pictures `rows` `[n]`, increasing, into `out` `[n, C, H, W]`."""
        raise NotImplementedError

    def subset(self, rows: np.ndarray) -> "Frames":
        """The pictures `rows` `[m]`, increasing, as a camera of their own."""
        return SomeFrames(self, rows)

    def _check(self, picture: np.ndarray, place: str) -> np.ndarray:
        if picture.shape != self.shape:
            raise UserError(f"{place}: a picture of shape {picture.shape}, but the metadata says {self.shape}")
        return picture


class SomeFrames(Frames):
    """Some pictures of a camera.

    Args:
        whole: The camera.
        rows: `[m]`, their numbers there, increasing.
    """

    def __init__(self, whole: Frames, rows: np.ndarray) -> None:
        super().__init__(len(rows), whole.shape, whole.files)
        self.whole, self.rows = whole, rows

    def fingerprint(self) -> str:
        return f"{self.whole.fingerprint()} {digest(self.rows)}"

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        self.whole.decode(self.rows[rows], out)


class ResizedFrames(Frames):
    """The pictures of a camera in another size; each is resized as soon as it is decoded.

    Args:
        whole: The camera.
        size: Height and width.
    """

    def __init__(self, whole: Frames, size: tuple[int, int]) -> None:
        super().__init__(len(whole), (whole.shape[0], *size), whole.files)
        self.whole, self.size = whole, size

    def fingerprint(self) -> str:
        return f"{self.whole.fingerprint()} resized to {list(self.size)}"

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        into: Any = _Resizing(out, self.size)
        self.whole.decode(rows, into)


class _Resizing:
    """Stands for the array that a camera decodes into, so that no more than it decodes at once is kept whole."""

    def __init__(self, out: np.ndarray, size: tuple[int, int]) -> None:
        self.out, self.size = out, size

    def __setitem__(self, slots: Any, pictures: np.ndarray) -> None:
        owned = pictures if pictures.flags.writeable else pictures.copy(order="K")
        self.out[slots] = resized(torch.from_numpy(owned), self.size).numpy()


def resized_store(store: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures `[M, C, H, W]` that are in memory, in another size."""
    check_memory(len(store) * store.shape[1] * math.prod(size), "--dataset.image-size", "choose a smaller size")
    small = store.new_empty(len(store), store.shape[1], *size)
    with phase("resizing pictures", len(store)) as done:
        for start in range(0, len(store), AT_ONCE):
            small[start : start + AT_ONCE] = resized(store[start : start + AT_ONCE], size)
            done(min(start + AT_ONCE, len(store)))
    return small


class EncodedFrames(Frames):
    """PNG or JPEG files that are kept in memory in encoded form.

    Args:
        data: `[bytes]` uint8, the files one after the other.
        starts, ends: `[M]`, the range of each picture in `data`.
    """

    def __init__(
        self,
        data: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        shape: tuple[int, int, int],
        files: Sequence[Path],
    ) -> None:
        super().__init__(len(ends), shape, files)
        self.data, self.starts, self.ends = data, starts, ends

    def fingerprint(self) -> str:
        return f"{self.count} pictures {list(self.shape)} {digest(self.ends - self.starts)} {digest(self.data)}"

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        of = str(self.files[0]) if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"
        for i, row in enumerate(rows):
            encoded = self.data[self.starts[row] : self.ends[row]].tobytes()
            out[i] = decode_picture(encoded, self.shape, f"{of}: picture {row}")


class VideoFrames(Frames):
    """Frames of video files, found by their time.

    Args:
        files: The videos.
        file_of: `[M]`, the number of the file of each frame.
        times: `[M]` float64, its time in seconds from the start of that file.
        fps: Frames a second; a frame must be within a quarter of a frame's duration of its time.
    """

    def __init__(
        self, files: Sequence[Path], file_of: np.ndarray, times: np.ndarray, shape: tuple[int, int, int], fps: float
    ) -> None:
        super().__init__(len(times), shape, files)
        self.file_of, self.times, self.fps = file_of, times, fps
        self._open: dict[int, Any] = {}
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {digest(self.file_of)} {digest(self.times)}"

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        order = np.lexsort((self.times[rows], self.file_of[rows]))
        for number in np.unique(self.file_of[rows]):
            mine = order[self.file_of[rows][order] == number]
            self._decode_file(int(number), self.times[rows[mine]], out, mine)

    def _decode_file(self, number: int, times: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        """Decode the frames at increasing `times` into `out[slots]`; seeks to a keyframe where that is faster."""
        import av

        path = self.files[number]
        near = 0.25 / self.fps
        try:
            container = self._container(number)
            stream = container.streams.video[0]
            if (stream.codec_context.height, stream.codec_context.width) != self.shape[1:]:
                found = f"{stream.codec_context.height} x {stream.codec_context.width}"
                raise UserError(f"{path}: pictures of {found}, but the metadata says {self.shape[1]} x {self.shape[2]}")
            base, frames, at = float(stream.time_base), None, -math.inf
            start = (stream.start_time or 0) * base
            frame: Any = None
            for time, slot in zip(times + start, slots, strict=True):
                if frames is None or not at - near <= time <= at + 1.0:
                    container.seek(max(int((time + near) / base), 0), stream=stream, backward=True)
                    frames, at = container.decode(stream), -math.inf
                while at < time - near:
                    frame = next(frames, None)
                    if frame is None:
                        break
                    at = frame.pts * base
                if frame is None or at > time + near:
                    raise UserError(f"{path}: no frame at {time:.4f} s, though the metadata names it; is it truncated?")
                out[slot] = self._check(frame.to_ndarray(format="rgb24").transpose(2, 0, 1), str(path))
        except UserError:
            raise
        except (av.error.FFmpegError, OSError, IndexError, ValueError, TypeError) as error:
            reason = "missing" if not path.exists() else f"truncated or damaged ({str(error)[:80]})"
            raise UserError(f"{path}: {reason}") from error

    def _container(self, number: int) -> Any:
        import av

        if self._process != os.getpid():  # a worker process must not share the open files of its parent
            self._open, self._process = {}, os.getpid()
        container = self._open.pop(number, None)
        if container is None:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            path = self.files[number].resolve()
            # The format follows from the name, not from the content: a playlist would make FFmpeg open further files.
            form = VIDEO_FORMATS.get(path.suffix.lower(), "mp4")
            if form == "mp4":
                check_mp4(path)
            container = av.open(str(path), format=form, options={"protocol_whitelist": "file"})
            context = container.streams.video[0].codec_context
            context.thread_count = 1  # the worker processes run in parallel already
            context.options = {"max_pixels": str((self.shape[1] + 128) * (self.shape[2] + 128))}
        self._open[number] = container  # the most recently used one is last
        return container


class HDF5Frames(Frames):
    """Pictures in arrays `[n, ...]` of HDF5 files, bytes or floats.

    Args:
        files: The file of each array, or one file for all.
        names: The arrays.
        array_of, row_of: `[M]`, the array of each picture and its row there.
        layout: Of the pictures in the arrays.
        top: Largest value of floats.
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        array_of: np.ndarray,
        row_of: np.ndarray,
        layout: Layout,
        top: float = 1.0,
    ) -> None:
        super().__init__(len(row_of), layout.stored, files)
        self.names, self.array_of, self.row_of = list(names), array_of, row_of
        self.layout, self.top = layout, top

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {zlib.crc32(json.dumps(self.names).encode()):08x} {digest(self.row_of)}"

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        file_of = self.array_of[rows] if len(self.files) > 1 else np.zeros(len(rows), np.int64)
        for number in np.unique(file_of):
            path, here = self.files[number], np.flatnonzero(file_of == number)
            with open_hdf5(path) as file:
                for array_number in np.unique(self.array_of[rows[here]]):
                    slots = here[self.array_of[rows[here]] == array_number]
                    array, wanted = hdf5(file, self.names[array_number]), self.row_of[rows[slots]]
                    check_chunks(array, wanted)
                    for slot, row in zip(slots, wanted, strict=True):
                        out[slot] = self.picture(array[int(row)], f"{path}: {self.names[array_number]}")

    def picture(self, stored: np.ndarray, place: str) -> np.ndarray:
        """A row of an array as uint8 `[C, H, W]`. Raises UserError: another shape than that of the others."""
        if stored.shape != self.layout.shape:
            raise UserError(f"{place}: a picture of shape {stored.shape}, but the first is {self.layout.shape}")
        return self.layout(as_bytes(stored, place, self.top))


class HDF5Jpegs(HDF5Frames):
    """JPEG files in arrays `[n, bytes]` of HDF5 files, with zeros after their end; `layout` is that of the pictures."""

    def picture(self, stored: np.ndarray, place: str) -> np.ndarray:
        return decode_picture(stored.tobytes().rstrip(b"\0"), self.shape, place)


# ---- stores --------------------------------------------------------------------------------------------------------


def stored(frames: dict[str, Frames], mode: str, folder: str, name: str, prints: dict[str, str]) -> dict[str, Any]:
    """Decode all pictures once, by `--dataset.cache`: into "memory" or on "disk"; "none" leaves them as they are.

    Args:
        prints: Key -> fingerprint; a store on disk belongs to one, whatever the camera is called.

    Returns:
        key -> `[M, C, H, W]` uint8; with "disk", pages of the file are read when they are used.

    Raises:
        UserError: they do not fit; raised before anything is decoded.
    """
    size = sum(camera.nbytes for camera in frames.values())
    if mode == "none" or not frames:
        return dict(frames)
    count, cameras = sum(len(camera) for camera in frames.values()), ", ".join(frames)
    remedy = "use fewer cameras, or --dataset.cache none"
    if mode == "memory":
        logger.info("%s: decoding %d pictures (%s) into memory: %s a process", name, count, cameras, gigabytes(size))
        check_memory(size, f"--dataset.cache memory: {name}", f"{remedy} or disk")
        stores = {}
        for key, camera in frames.items():
            store = np.empty((len(camera), *camera.shape), np.uint8)
            for start, pictures in _in_order(camera):
                store[start : start + len(pictures)] = pictures
            stores[key] = torch.from_numpy(store)
        return stores
    return {
        key: _on_disk(camera, Path(folder or "~/.cache/tendon").expanduser(), key, name, prints[key])
        for key, camera in frames.items()
    }


def _in_order(camera: Frames) -> Iterator[tuple[int, np.ndarray]]:
    """Decode a camera in parts of some hundred pictures; yields the number of the first one, and the pictures."""
    with phase("decoding pictures", len(camera)) as decoded:
        for start in range(0, len(camera), AT_ONCE):
            end = min(start + AT_ONCE, len(camera))
            yield start, camera.read(np.arange(start, end)).numpy()
            decoded(end)


def _on_disk(camera: Frames, folder: Path, key: str, name: str, fingerprint: str) -> Tensor:
    """The store of one camera in `folder`, made where it is missing; a killed run leaves no incomplete store."""
    stamps = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in camera.files if path.exists()
    ]
    path = folder / f"frames-{hashlib.sha256(json.dumps([fingerprint, stamps]).encode()).hexdigest()[:20]}.u8"
    if not (path.exists() and path.stat().st_size == camera.nbytes):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f".{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # when several runs start at once, one of them decodes
                if not (path.exists() and path.stat().st_size == camera.nbytes):
                    _decode_to(camera, path, key, name)
        except OSError as error:
            raise UserError(
                f"--dataset.cache disk: {folder}: {error.strerror or error}; see --dataset.cache-dir"
            ) from error
    store = torch.from_file(str(path), shared=False, size=camera.nbytes, dtype=torch.uint8)
    return store.view(len(camera), *camera.shape)


def _decode_to(camera: Frames, path: Path, key: str, name: str) -> None:
    """Decode a camera into the file `path`. Raises UserError: the disk has too little space."""
    free = shutil.disk_usage(path.parent).free
    logger.info("%s: decoding %d pictures (%s) to %s: %s", name, len(camera), key, path, gigabytes(camera.nbytes))
    if camera.nbytes > 0.95 * free:
        raise UserError(
            f"--dataset.cache disk: {name}: {gigabytes(camera.nbytes)} are needed, {gigabytes(free)} are free in"
            f" {path.parent}; choose another --dataset.cache-dir, or --dataset.cache none"
        )
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            for _, pictures in _in_order(camera):
                file.write(pictures.tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_video() -> None:
    """Raise UserError with the install line when PyAV is missing."""
    require("av", "av")
