"""A watch over the progress of a process, which tells one that hangs from one that waits for another."""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ..parallel import world_size

GRACE = 3.0  # seconds by which a process that hangs speaks before those that wait for it
SILENCE = 5.0  # seconds without a sign of life after which a process is stopped, or hangs where no thread runs
COLLECTIVE = os.path.join("torch", "distributed")


class Watch:
    """A thread that calls `fail` when the process makes no progress.

    Where there are several processes, each writes once a second what it is doing into the run folder: a process that is
    stopped, or hangs in C code, cannot say so itself, and those that wait for it have nothing else to go by.

    Args:
        folder: Of the run.
        rank: Of this process.
        timeout: Seconds without a `beat`; 0 for no watch.
        fail: (reason, traceback, whether this process speaks for the first one) -> ends the process.
    """

    def __init__(self, folder: Path, rank: int, timeout: float, fail: Callable[[str, str, bool], None]) -> None:
        self.folder, self.rank, self.timeout, self.fail = folder, rank, timeout, fail
        self.beaten_at, self.world = time.monotonic(), 1

    def beat(self) -> None:
        """Record that the process makes progress."""
        self.beaten_at = time.monotonic()

    def start(self) -> None:
        """Begin to watch; called by all processes."""
        self.beat()
        self.world = world_size()
        if self.timeout > 0:
            threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """Watch no longer."""
        self.timeout = 0.0
        self._file(self.rank).unlink(missing_ok=True)

    def _run(self) -> None:
        main = threading.main_thread().ident
        while self.timeout > 0:
            time.sleep(min(1.0, self.timeout / 4))
            self.look(sys._current_frames().get(main or 0))

    def look(self, frame: FrameType | None) -> None:
        """Write what this process is doing, and call `fail` if it has done so for too long.

        Args:
            frame: The innermost one of the main thread.
        """
        frames = [f for f, _ in traceback.walk_stack(frame)] if frame else []  # innermost first
        waits = any(COLLECTIVE in f.f_code.co_filename for f in frames)
        own = [f for f in frames if "site-packages" not in f.f_code.co_filename] if waits else frames
        place = f"{own[0].f_code.co_filename}:{own[0].f_lineno}" if own else "an unknown place"
        if self.world > 1 and self.timeout > 0:
            with contextlib.suppress(OSError):  # the disk may be full, or the folder gone
                self._file(self.rank).write_text(json.dumps({"waits": waits, "place": place}))
        silent = time.monotonic() - self.beaten_at
        if not 0 < self.timeout < silent - GRACE * waits:
            return
        reason, alone = f"process {self.rank} hangs at {place}: no progress for {silent:.0f} s (--hang-timeout)", False
        if waits:
            absent = self._absent()
            if not absent and silent - GRACE - SILENCE <= self.timeout:
                return  # another may have stopped after this one began to wait, and is silent soon
            who = "; ".join(f"process {rank} did not come: {what}" for rank, what in absent.items())
            wait = f"process {self.rank} waits for the others at {place}, for {silent:.0f} s (--hang-timeout)"
            reason = f"{who} ({wait})" if who else wait
            alone = 0 in absent and all(rank in absent for rank in range(self.rank))
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        self.fail(reason, stack, alone)

    def _absent(self) -> dict[int, str]:
        """The processes that do not wait, and what is known of each."""
        absent: dict[int, str] = {}
        for rank in range(self.world):
            try:
                silent = self._file(self.rank).stat().st_mtime - self._file(rank).stat().st_mtime
                state: Any = json.loads(self._file(rank).read_text())
                if silent > SILENCE:
                    absent[rank] = f"no sign of life for {silent:.0f} s, it is stopped or hangs at {state['place']}"
                elif not state["waits"]:
                    absent[rank] = f"it is at {state['place']}"
            except (OSError, ValueError, KeyError, TypeError):  # it is being written, or on another machine's disk
                continue
        return absent

    def _file(self, rank: int) -> Path:
        return self.folder / f".alive-rank{rank}"
