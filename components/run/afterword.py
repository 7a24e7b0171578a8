"""A command that prints a line when a process says no more: python -I -S afterword.py NUMBER LINE.

It outlives the run that starts it, imports nothing but Python's own, and ends within seconds.
"""

import os
import signal
import sys
import time
from pathlib import Path

PATIENCE = 10.0  # seconds after which the line is printed anyway


def main(process: int, line: str) -> None:
    """Wait until the process is about to end, or has ended, and print the line."""
    for name in ("SIGINT", "SIGHUP", "SIGTTOU"):  # another Ctrl-C, or that the terminal has passed to the shell
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    limit = time.monotonic() + PATIENCE
    while (state := state_of(process)) == "speaks" and time.monotonic() < limit:
        time.sleep(0.005)
    # A process that has ended leaves the terminal to the shell, whose prompt may stand in the line.
    os.write(1, b"\n" * (state == "ended") + os.fsencode(line) + b"\n")


def state_of(process: int) -> str:
    """What a process does: "speaks", "ended" or, on Linux, "ends".

    A Python process that ends has printed its traceback when it stops to catch Ctrl-C; to release its modules takes it
    another half second.
    """
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        if fields["State"].startswith("Z"):
            return "ended"
        return "speaks" if int(fields["SigCgt"], 16) >> (signal.SIGINT - 1) & 1 else "ends"
    except ProcessLookupError:
        return "ended"
    except (OSError, KeyError, ValueError):  # no such file on this system
        return "speaks"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
