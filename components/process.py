"""How a process is stopped and how it ends: signals, the launcher's end, exit codes."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .command_line import where
from .errors import UserError


class StopRequest:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the run to save and stop; a second SIGTERM or Ctrl-C leaves at once.

    Before it is `armed` (while everything is being built) the first one leaves, too. Worker processes inherit the
    handlers when they are forked: there, SIGTERM ends them and Ctrl-C is left to their parent.
    """

    def __init__(self) -> None:
        self.asked, self.armed, self.asked_at, self.pid = False, False, 0.0, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self.pid:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if not self.armed:
            raise SystemExit(128 + number)
        if not self.asked:
            self.asked, self.asked_at = True, time.monotonic()
        # `timeout` and some launchers send the same signal to a process and then to its group: that is one request.
        elif number != signal.SIGUSR1 and time.monotonic() - self.asked_at > 0.1:
            leave(128 + number)


def end_with_launcher() -> None:
    """Ask Linux to signal this process when the `accelerate launch` that started it is gone, however it ended.

    Without this a one-process launch that is stopped leaves its training behind as an orphan. The signal is SIGUSR1: a
    request to save and stop which does not count as the second one when SIGTERM went to both. Under a shell nothing is
    done, since a run with `nohup` is meant to outlive it.
    """
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text().split("\0")[:4]
        if any(Path(word).name.startswith(("accelerate", "torchrun", "torch.distributed")) for word in words):
            ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # it went before we asked
                os.kill(os.getpid(), signal.SIGUSR1)
    except (OSError, ValueError, AttributeError):
        return


def leave(code: int) -> NoReturn:
    """End the process at once, and the workers that it has started."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script's `main` and end the process: at once, so that no library holds it up on the way out.

    Exit codes: 0; 2 for what the user can mend; 1 for a failed run; each told in one line.
    """
    end_with_launcher()
    first = os.environ.get("RANK", "0") == "0"
    code = 1
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = 2
        if first:
            print(f"error: {error}", file=sys.stderr)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        who = "" if first else f"process {os.environ['RANK']}: "
        print(f"error: {who}{type(error).__name__}: {first_line(error)} ({where(error)})", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    leave(code)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
