"""The .jsonl files of a run: whole lines, none lost on a full disk, none twice after a resume."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from .curves import step_of
from .files import sync

LOGS = ("metrics.jsonl", "eval.jsonl", "episodes.jsonl")
LATER = "by"  # a key of lines that a command has added after the run, and its name


class Logs:
    """Appends lines, and takes back those that a resumed run writes again.

    A checkpoint has the number of lines that the run had written. Steps alone would not tell: a line about an earlier
    step may follow the checkpoint, such as an episode that ended before it, or an evaluation that was owed.

    Args:
        folder: Of the run.
        say: Prints a line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.lines = dict.fromkeys(LOGS, 0)  # that the run has written so far
        self.unwritten: list[tuple[str, dict[str, Any]]] = []

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append a line; while the disk is full, keep it."""
        self.lines[name] += 1
        self.unwritten.append((name, record))
        try:
            self.write()
        except OSError as error:
            if len(self.unwritten) == 1:
                self.say(f"{self.folder / name} CANNOT BE WRITTEN ({error.strerror}), its lines are kept and retried")

    def write(self) -> None:
        """Write the lines that are kept. Raises OSError: the disk is full."""
        while self.unwritten:
            name, record = self.unwritten[0]
            append_line(self.folder / name, record, wait=False)
            del self.unwritten[0]

    def settle(self) -> None:
        """Write and fsync; called before a checkpoint becomes valid. Raises OSError: the disk is full."""
        self.write()
        for name in LOGS:
            if (self.folder / name).exists():
                sync(self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        """The number of lines in each file."""
        return dict(self.lines)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.lines |= state

    def rewind(self, step: int, counted: bool) -> None:
        """Drop what was written after the checkpoint of `step`, and damaged lines, before a resume.

        Lines of other commands about steps until then are kept.

        Args:
            counted: Whether that checkpoint has the numbers of lines; else the steps alone decide.

        Raises:
            UserError: a file cannot be read or replaced.
        """
        for name in LOGS:
            path, damaged = self.folder / name, 0
            try:
                lines = path.read_bytes().splitlines(True) if path.exists() else []
                kept, own = [], 0
                for line in lines:
                    later = _is_later(line)
                    own += not later
                    wanted = later or not counted or own <= self.lines[name]
                    if wanted and step_of(line.decode(errors="replace")) <= step:
                        kept.append(line)
                    else:
                        damaged += wanted and counted and not later
                if kept != lines:
                    temporary = path.with_name(f".{name}-new")
                    temporary.write_bytes(b"".join(kept))
                    sync(temporary)
                    os.replace(temporary, path)
            except OSError as error:
                problem = f"{path} cannot be rewound to step {step} ({error.strerror})"
                raise UserError(f"{problem}; free space on its disk, or make it writable") from error
            if damaged:
                self.say(f"{path}: {damaged} damaged line(s) dropped")
            self.lines[name] = sum(not _is_later(line) for line in kept)


def _is_later(line: bytes) -> bool:
    """Whether a command has added the line after the run."""
    try:
        return LATER in json.loads(line)
    except (ValueError, TypeError):
        return False


def append_line(path: Path, record: dict[str, Any], wait: bool = True) -> None:
    """Append one JSON object as a line, completely or not at all; with `wait`, fsync it."""
    line = json.dumps(finite(record), allow_nan=False) + "\n"
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, before)
        raise
    if wait:
        sync(path)


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite by None, since JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
