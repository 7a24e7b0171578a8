"""The screen of a process: a reader that goes away, or a character that it cannot show, ends no run."""

import contextlib
import os
import sys
from typing import Any


class Steadfast:
    """A text stream that falls silent when its reader has gone (`| head -1`, a closed terminal).

    Characters that its encoding lacks are replaced. All else is the stream's own.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)

    def write(self, text: str) -> int:
        """Write a text, or nothing if nobody reads it; returns its length."""
        try:
            self.stream.write(text)
        except (OSError, ValueError):
            self._silence()
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it is still there."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._silence()

    def _silence(self) -> None:
        """Send what follows to nowhere, also what the buffer holds, and what libraries write by themselves."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def steady() -> None:
    """Make stdout and stderr of this process `Steadfast`; where one was closed, open it to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  (held for life)
        if not isinstance(stream, Steadfast):
            setattr(sys, name, Steadfast(stream))
