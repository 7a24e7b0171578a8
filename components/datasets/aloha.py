"""ALOHA's HDF5 files (Zhao et al., 2023): a folder with one file `episode_<k>.hdf5` for each episode.

Layout: `/action` `[T, 14]`, `/observations/qpos` and `/observations/qvel` `[T, 14]`, `/observations/images/<camera>`
`[T, 480, 640, 3]` uint8. With the attribute `compress`, a camera is `[T, bytes]`, one JPEG a row with zeros after it.
A JPEG's colours are those that its file declares: recorders that gave OpenCV red and blue exchanged have them exchanged
here. The files have no rewards, and no observation after the last action. The attribute `sim` tells simulation from
robot.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.features import INTERVENTION
from ..data.pictures import IMAGES, Layout, camera_of, layout_of
from ..errors import UserError, nearest, require
from ..run.progress import counted
from .episodes import Episodes, Reader, as_flags, choose_episodes, chosen_cameras, flat_names, steps_only, tell_unused
from .frames import Frames, HDF5Frames, HDF5Jpegs
from .untrusted import (
    Ledger,
    check_chunks,
    check_hdf5,
    check_memory,
    demonstration_number,
    existing,
    hdf5,
    inside,
    open_hdf5,
    own_numbers,
    read_hdf5,
)

WHAT = "a folder of ALOHA (episode_0.hdf5, ... with /action and /observations/qpos)"
FPS = 50.0  # ALOHA records every 0.02 s, and the files do not say
BOOKKEEPING = ("compress_len",)  # the lengths of the JPEGs, which say so themselves


@dataclass(frozen=True)
class AlohaDataset(Reader):
    """ALOHA's HDF5 files, one for each episode, in a folder; or one of them."""

    keys: tuple[str, ...] = ("qpos",)
    """Arrays of /observations that are concatenated to observation.state in this order, such as qpos qvel."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}.

        Items: observation.state `[D]` of `keys`, observation.images.X of the chosen cameras, action `[Da]`.

        Raises:
            UserError: no such files, arrays that are missing or do not fit together, damaged or dangerous files.
        """
        path = existing(self.path, WHAT)
        files = episode_files(path)
        if not files:
            raise UserError(f"--dataset.path {path}: no episode_<k>.hdf5 in it; expected {WHAT}")
        numbers = own_numbers([file.stem for file in files])
        places = choose_episodes(self.episodes, numbers, str(path))  # the files of others are not opened
        episodes = read(path, [files[place] for place in places], self)
        return self.finish(replace(episodes, numbers=[numbers[place] for place in places]))


def episode_files(path: Path) -> list[Path]:
    """The files of the episodes, in the order of their numbers; a link out of the folder is refused."""
    if path.is_file():
        return [path]
    found = [file for file in path.iterdir() if file.name.startswith("episode_") and file.suffix in (".hdf5", ".h5")]
    return [inside(path, file.name, path) for file in sorted(found, key=lambda file: demonstration_number(file.stem))]


def read(path: Path, files: list[Path], options: AlohaDataset) -> Episodes:
    """Read the vectors of all episodes; the pictures of the chosen cameras remain in the files."""
    with open_hdf5(files[0]) as file:
        first = arrays_of(file)
        names = options.renamed(first, files[0], {"observation.state": "qpos"})
        shapes = {name: first[old].shape for name, old in names.items()}
        simulated = bool(file.attrs.get("sim", False))
    cameras = {camera_of(name): old for name, old in names.items() if old.startswith(IMAGES)}
    vectors = [name for name, old in names.items() if not old.startswith(IMAGES) and name != "action"]
    if "action" not in names:
        raise UserError(f"{files[0]}: no action; found: {', '.join(first)}; name it with --dataset.rename OLD=action")
    for key in options.keys:
        if key not in vectors:
            raise UserError(f"--dataset.keys {key}: no such array of vectors in {files[0]}; {nearest(key, vectors)}")
    chosen = chosen_cameras(options.cameras, list(cameras), str(path))
    if not options.keys and not chosen:
        raise UserError(f"{path}: no observations are chosen; see --dataset.keys and --dataset.cameras")
    marks = [INTERVENTION] if math.prod(shapes.get(INTERVENTION, (0, 0))[1:]) == 1 else []
    wanted = {name: (names[name], shapes[name][1:]) for name in ("action", *options.keys, *marks)}
    lengths, parts, ledger = [], [], Ledger(sum(number.stat().st_size for number in files))
    for number in counted(files, "reading files"):
        with open_hdf5(number, ledger) as file:
            parts.append(episode(file, wanted, [cameras[name] for name in chosen]))
        lengths.append(len(parts[-1]["action"]))
    ends = torch.tensor(lengths).cumsum(0)
    check_memory(2 * sum(array.nbytes for part in parts for array in part.values()), str(path))
    columns = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in wanted}
    kept = {"action": columns["action"]}
    kept |= {name: as_flags(columns[name].numpy(), f"{path}: {name!r}") for name in marks}
    observations: dict[str, Any] = {}
    if options.keys:
        observations["observation.state"] = torch.cat([columns[key] for key in options.keys], 1)
    observations |= {IMAGES + name: pictures(files, cameras[name], lengths) for name in chosen}
    rest = {k: (shapes[k][1:], "see --dataset.keys") for k in vectors if k not in (*options.keys, *marks, *BOOKKEEPING)}
    stored = {"format": "aloha", "fps": FPS, "sim": simulated, "keys": list(options.keys)}
    named = {"action": flat_names("action", shapes["action"][1:])} if len(shapes["action"]) != 2 else {}
    if options.keys:
        named["observation.state"] = [name for key in options.keys for name in flat_names(key, shapes[key][1:])]
    stored |= tell_unused(str(path), rest)
    return Episodes(str(path), ends, kept, observations, *steps_only(ends), stored=stored, names=named)


def arrays_of(file: Any) -> dict[str, Any]:
    """Feature -> array of an episode: the cameras by the data's names, vectors by their own."""
    seen = hdf5(file, "observations")
    if not hasattr(seen, "keys"):
        raise UserError(
            f"{file.filename}: no group /observations; found: {', '.join(file) or 'nothing'}; expected {WHAT}"
        )
    found = {name: hdf5(file, name) for name in file if name != "observations"}
    found |= {name: hdf5(seen, name) for name in seen if name != "images"}
    images = hdf5(seen, "images")
    found |= {IMAGES + name: hdf5(images, name) for name in (images if hasattr(images, "keys") else ())}
    return {name: array for name, array in found.items() if getattr(array, "ndim", 0)}


def episode(file: Any, wanted: dict[str, tuple[str, tuple[int, ...]]], cameras: list[str]) -> dict[str, np.ndarray]:
    """The vectors `[T, D]` float32 of an episode, after a check that all that is chosen has T rows.

    Args:
        wanted: Name -> name in the file, shape of a row.
        cameras: Names in the file.
    """
    arrays, found = arrays_of(file), {}
    steps = len(arrays[wanted["action"][0]]) if wanted["action"][0] in arrays else 0
    for name in (*(old for old, _ in wanted.values()), *cameras):
        if name not in arrays:
            raise UserError(f"{file.filename}: no {name}, which the first episode has")
        if len(arrays[name]) != steps or not steps:
            raise UserError(
                f"{file.filename}: {name} has {len(arrays[name])} rows, action {steps}; expected them equal"
            )
    for name, (old, shape) in wanted.items():
        array = arrays[old]
        check_hdf5(array)
        if array.shape[1:] != shape:
            raise UserError(f"{file.filename}: {old} has rows of {array.shape[1:]}, the first episode {shape}")
        check_memory(4 * array.size, f"{file.filename}: {old}")
        found[name] = read_hdf5(array).reshape(steps, -1).astype(np.float32)
    return found


def pictures(files: list[Path], camera: str, lengths: list[int]) -> Frames:
    """One camera's pictures in all files; the first one tells shape and kind."""
    name = f"observations/images/{camera.removeprefix(IMAGES)}"
    array_of = np.repeat(np.arange(len(files)), lengths)
    row_of = np.concatenate([np.arange(length) for length in lengths])
    compressed = None
    for path in files:
        with open_hdf5(path) as file:
            array = hdf5(file, name)
            encoded = (array.dtype == np.uint8 and array.ndim == 2) or (array.dtype.kind == "S" and array.ndim == 1)
            if compressed not in (None, encoded) or not (encoded or (array.dtype.kind in "uf" and array.ndim > 2)):
                raise UserError(
                    f"{path}: {name} holds {array.dtype} {array.shape[1:]}; expected pictures as in {files[0]}"
                )
            if compressed is None:
                layout = (
                    jpeg_layout(array, f"{path}: {name}") if encoded else layout_of(array.shape[1:], f"{path}: {name}")
                )
            compressed = encoded
    kind = HDF5Jpegs if compressed else HDF5Frames
    return kind(files, [name] * len(files), array_of, row_of, layout)


def jpeg_layout(array: Any, place: str) -> Layout:
    """The layout of a camera whose rows are JPEGs: colour, of the size that the first one declares."""
    import io

    image_module = require("PIL.Image", "pillow")
    try:
        with image_module.open(io.BytesIO(read_row(array)), formats=("JPEG", "PNG")) as picture:
            shape = (3, picture.height, picture.width)
    except UserError:
        raise
    except Exception as error:  # Pillow raises errors of many types
        raise UserError(f"{place}: its first row is no JPEG ({str(error)[:80]})") from error
    return Layout(shape, shape, False)


def read_row(array: Any) -> bytes:
    """The first row of an array."""
    check_chunks(array, [0])
    return array[0].tobytes()
