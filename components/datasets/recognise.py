"""Recognise the format of a file or folder."""

import re
import zipfile
from pathlib import Path

from ..errors import UserError
from .untrusted import check_regular, hdf5, open_hdf5

NAME_IT = "name the format by --dataset, or in a mixture as NAME=PATH"


def recognise(path: str) -> str:
    """The registry's name of the reader for `path`. Raises UserError: no such file, no known format, or several."""
    found = Path(path).expanduser()
    if not found.exists():
        is_id = re.fullmatch(r"[\w-]+/[\w-]+", path)
        hub = f"; if it is on the hub: --dataset lerobot --dataset.repo-id {path}" if is_id else ""
        raise UserError(f"{path}: no such file or folder{hub}")
    check_regular(found, may_be_folder=True)
    fits: list[str] = []
    if found.is_dir():
        marks = {
            "meta/info.json": "lerobot",
            "meta_data/info.json": "lerobot",
            "data/metadata.json": "minari",
            "metadata.json": "minari",
        }
        marks |= {"meta/episode_ends": "zarr"}
        fits = [name for mark, name in marks.items() if (found / mark).exists()]
        fits += ["aloha"] if next(found.glob("episode_*.hdf5"), None) else []
    elif found.suffix == ".npz":
        names = zipfile.ZipFile(found).namelist() if zipfile.is_zipfile(found) else []
        fits = ["pusht" if "episode_ends.npy" in names else "ogbench"]
    elif found.suffix == ".zip":
        fits = ["zarr"]
    elif found.suffix in (".hdf5", ".h5"):
        with open_hdf5(found) as file:
            if (observations := hdf5(file, "observations")) is not None:
                fits = ["aloha" if hasattr(observations, "keys") else "d4rl"]
            fits += ["robomimic"] if hdf5(file, "data") is not None else []
    if fits and len(set(fits)) == 1:
        return fits[0]
    if fits:
        raise UserError(f"{path}: several formats fit, {' and '.join(dict.fromkeys(fits))}; {NAME_IT}")
    raise UserError(
        f"{path}: not recognised as lerobot (meta/info.json), minari (data/metadata.json), robomimic or d4rl (.hdf5),"
        " aloha (episode_0.hdf5), ogbench or pusht (.npz) or zarr (meta/episode_ends); " + NAME_IT
    )
