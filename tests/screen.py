"""The screen of a command on a terminal of its own, as a person sees it.

python tests/screen.py python offline_trainer.py --steps 300          # half-way, and at the end
python tests/screen.py --columns 80 --at 3 --at 10 python offline_trainer.py
"""

import argparse
import codecs
import contextlib
import errno
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyte

Key = tuple[str | Callable[[], bool], str]  # what a text must have come, or be true, and the keys that are pressed then


class Screen(NamedTuple):
    """What a terminal shows at a moment, without its empty lines at the end."""

    seconds: float
    lines: list[str]


class Terminal:
    """An emulated terminal, which keeps what it has shown whenever that changed.

    Args:
        columns, rows: Its size.
    """

    def __init__(self, columns: int, rows: int = 40) -> None:
        self.rows, self.screen = rows, pyte.Screen(columns, rows)
        self.stream, self.decoder = pyte.Stream(self.screen), codecs.getincrementaldecoder("utf-8")("replace")
        self.ours, self.theirs = os.openpty()  # what is written to `theirs` is read from `ours`
        self.began, self.screens, self.text = time.monotonic(), list[Screen](), ""  # all that was written
        self.keys, self.code = list[Key](), 0  # that are still to be pressed; of a command's exit
        self.resize(columns)

    def resize(self, columns: int) -> None:
        """Make it wider or narrower."""
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", self.rows, columns, 0, 0))
        self.screen.resize(self.rows, columns)

    def follow(self, keys: Sequence[Key] = ()) -> None:
        """Show what is written, until all who could write have closed it, and press keys, one after the other.

        Args:
            keys: (pattern of a text that has come since the keys before, or a condition, and the keys).
        """
        waiting, seen, self.keys = "", 0, list(keys)
        while True:
            if select.select([self.ours], [], [], 0.1)[0]:
                if not (data := self._read()):
                    break
                text = self.decoder.decode(data)
                self.text += text
                # What is shown in between is seen at whole lines and bars, not wherever a read happens to end.
                *whole, waiting = re.split(r"(?<=\n)|(?<=\x1b\[K)", waiting + text)
                for text in whole:
                    self._show(text)
            when = self.keys[0][0] if self.keys else lambda: False
            if when() if callable(when) else re.search(when, self.text[seen:], re.DOTALL):
                seen = len(self.text)
                os.write(self.ours, self.keys.pop(0)[1].encode())
        self._show(waiting)
        os.close(self.ours)

    def _show(self, text: str) -> None:
        self.stream.feed(text)
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            del lines[-1]
        if not self.screens or self.screens[-1].lines != lines:
            self.screens.append(Screen(time.monotonic() - self.began, lines))

    def _read(self) -> bytes:
        try:
            return os.read(self.ours, 65536)
        except OSError as error:  # Linux tells the end so
            if error.errno != errno.EIO:
                raise
            return b""


def record(
    command: Sequence[object], columns: int, keys: Sequence[Key] = (), rows: int = 40, seconds: float = 90, **popen: Any
) -> Terminal:
    """Run a command on a terminal, whose keys are pressed as in `follow`; it is killed after so many seconds."""
    terminal = Terminal(columns, rows)
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.theirs) | popen
    takes = lambda: fcntl.ioctl(terminal.theirs, termios.TIOCSCTTY, 0)  # noqa: E731 (so Ctrl-C is a signal)
    process = subprocess.Popen([str(word) for word in command], **ends, start_new_session=True, preexec_fn=takes)
    os.close(terminal.theirs)
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    terminal.follow(keys)
    terminal.code = process.wait()
    limit.cancel()
    return terminal


@contextlib.contextmanager
def on_terminal(columns: int, kind: str = "xterm") -> Iterator[Terminal]:
    """A terminal that has the output of this process."""
    terminal, before, kinds = Terminal(columns), (sys.stdout, sys.stderr), os.environ.get("TERM")
    reader = threading.Thread(target=terminal.follow)
    reader.start()
    try:
        os.environ["TERM"] = kind
        with os.fdopen(terminal.theirs, "w", encoding="utf-8") as out:
            sys.stdout = sys.stderr = out
            yield terminal
    finally:
        sys.stdout, sys.stderr = before
        os.environ["TERM"] = kinds or "dumb"
        reader.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--at", type=float, action="append", help="seconds after the start; by default half-way")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    env = os.environ | {"TERM": "xterm-256color"}
    screens = record(options.command, options.columns, seconds=1e6, env=env).screens
    for at in options.at or [screens[-1].seconds / 2]:
        shown = [screen for screen in screens if screen.seconds <= at] or screens[:1]
        print(f"# after {at:.0f} s", *shown[-1].lines, "", sep="\n")
    print("# at the end", *screens[-1].lines, sep="\n")


if __name__ == "__main__":
    main()
