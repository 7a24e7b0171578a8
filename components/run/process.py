"""How a process is stopped and how it ends: signals, the launcher's end, exit codes."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..envs.vector import hurry
from ..errors import UserError
from .command_line import where

ALONE = 5.0  # seconds after which an error that rank 0 has not told must be this process's own
PATIENCE = 10.0  # seconds that an environment which does not come back may hold up a stop


class StopRequest:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the run to save and stop; a second SIGTERM or Ctrl-C leaves at once.

    Before it is `armed` (while everything is being built) the first one leaves, too. Worker processes inherit the
    handlers when they are forked: there, SIGTERM ends them and Ctrl-C is left to their parent.
    """

    def __init__(self) -> None:
        self.asked, self.armed, self.asked_at, self.pid = False, False, 0.0, os.getpid()
        self.last_words: Callable[[], None] = lambda: None  # said before a second signal leaves at once
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
            hurry(PATIENCE)
        # `timeout` and some launchers send the same signal to a process and then to its group: that is one request.
        elif number != signal.SIGUSR1 and time.monotonic() - self.asked_at > 0.1:
            self.last_words()
            leave(128 + number)


def end_with_launcher() -> None:
    """Watch the `accelerate launch` or torchrun that started this process, and ask it to stop when that is gone.

    Without this a one-process launch that is stopped leaves its training behind as an orphan. The signal is SIGUSR1: a
    request to save and stop which does not count as the second one when SIGTERM went to both. A process that a shell
    started is not watched, since a run with `nohup` is meant to outlive it.
    """
    if not {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & set(os.environ):  # a launcher sets them
        return
    parent, asked = os.getppid(), signal.SIGUSR1

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), asked)

    if _adopts_orphans(parent):  # it went while this process was being loaded
        os.kill(os.getpid(), asked)
    threading.Thread(target=watch, daemon=True).start()


def _adopts_orphans(pid: int) -> bool:
    """Whether a process is the system's first one, or systemd, and no launcher (in a container it may be the first)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # no Linux, or not ours to read
        command = ""
    first = pid == 1 or Path(command.split("\0")[0]).name == "systemd"
    return first and not any(launcher in command for launcher in ("accelerate", "torch"))


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
        elif not error.told:
            wait_for_first()
            tell_alone(error, os.environ["RANK"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        who = "" if first else f"process {os.environ['RANK']}: "
        print(f"error: {who}{type(error).__name__}: {in_one_line(error)} ({where(error)})", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
            stream.flush()
    leave(code)


def wait_for_first() -> None:
    """Leave it to rank 0 to tell an error: nearly always it has the same one, and the launcher then ends this process.

    The launcher would also end rank 0 as soon as this process had left, before it has spoken.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(ALONE)


def tell_alone(error: UserError, rank: int | str) -> None:
    """Tell an error that must be this process's own."""
    error.told = True
    print(f"error: process {rank}: {error}", file=sys.stderr, flush=True)


def in_one_line(error: BaseException) -> str:
    """The first line of an error's message, and its notes."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return "; ".join([first, *getattr(error, "__notes__", ())])
