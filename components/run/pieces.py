"""Pieces of a state that never change once written, such as a part of a replay buffer: one file each in a checkpoint.

The next checkpoints link to a piece, so that a save costs what is new. A file that several checkpoints share is damaged
in all of them by one flipped bit, so there are two files of each piece: the second checkpoint that needs it gets a
copy, and from then on each one links to the file that the checkpoint before it does not have. A piece is written twice
in its life, however long it is kept, and the two newest checkpoints never share it.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import fingerprint, sync

logger = logging.getLogger(__name__)
Records = dict[Path, dict[str, list[Any]]]  # folder of a checkpoint, newest first -> file name -> its fingerprint


class DamagedError(Exception):
    """A checkpoint whose files do not match its manifest."""


@dataclass
class Parts:
    """The pieces of a process's state."""

    kept: Sequence[str] = ()
    """Names of the pieces that an earlier checkpoint has."""
    new: dict[str, Any] = field(default_factory=dict)
    """Name -> tree of the pieces to write."""


def keep(name: str, records: Records, before: Path | None, to: Path) -> None:
    """Put a piece of earlier checkpoints into a new one: a link to a file that `before` does not have, or a copy.

    Args:
        name: Of the file.
        records: The earlier checkpoints.
        before: The one that will be the second newest; None if there is to be one only.
        to: Folder of the new one.

    Raises:
        DamagedError: no earlier checkpoint has the piece as it was written.
    """
    holders = [folder for folder, files in records.items() if name in files and (folder / name).exists()]
    holders = [folder for folder in holders if records[folder][name] == records[holders[0]][name]]
    taken = (before / name).stat().st_ino if before in holders and before is not None else None
    for folder in holders:
        if (folder / name).stat().st_ino != taken:
            try:
                os.link(folder / name, to / name)
                return
            except OSError:  # a disk without hard links
                break
    for folder in holders:
        shutil.copyfile(folder / name, to / name)
        sync(to / name)
        if fingerprint(to / name) == records[folder][name]:
            return
    raise DamagedError(f"{name}: damaged in every checkpoint")


def recover(folder: Path, files: dict[str, list[Any]], damaged: Iterable[str], others: Sequence[Path]) -> list[str]:
    """Replace damaged pieces of a checkpoint by equal ones of other checkpoints; returns those that have none.

    Args:
        files: File name -> fingerprint, of this checkpoint.
        damaged: Names of the pieces.
        others: Folders of other checkpoints, also of damaged ones.
    """
    lost = []
    for name in damaged:
        path, copy = folder / name, folder / f".new-{name}"
        sound = next((other for other in others if _equal(other / name, files[name])), None)
        if sound is None:
            lost.append(name)
            continue
        shared = path.stat().st_ino if path.exists() else None
        shutil.copyfile(sound / name, copy)
        sync(copy)
        for other in [other for other in others if (other / name).exists()]:
            if (other / name).stat().st_ino == shared:  # the same damage
                (other / f".new-{name}").unlink(missing_ok=True)
                os.link(copy, other / f".new-{name}")
                os.replace(other / f".new-{name}", other / name)
        os.replace(copy, path)
        logger.warning("%s: damaged; recovered from %s", path, sound.name)
    return lost


def _equal(path: Path, expected: list[Any]) -> bool:
    try:
        return path.stat().st_size == expected[0] and fingerprint(path) == list(expected)
    except OSError:
        return False


def leave_out(folder: Path, lost: Iterable[str]) -> None:
    """Set damaged pieces of a checkpoint aside, so that it can be used without them."""
    for name in lost:
        if (folder / name).exists():
            os.replace(folder / name, folder / f".damaged-{name}")
        logger.warning("%s: damaged, and there is no other copy; it is left out", folder / name)
