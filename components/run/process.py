"""How a process stops and ends: signals, the end of its launcher, exit codes."""

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
from ..errors import SignalledExit, UserError, plain, where
from .screen import steady

ALONE = 5.0  # seconds in which rank 0 reports an error that it has, too
PATIENCE = 10.0  # seconds by which an environment that does not return may delay a stop


class StopRequest:
    """SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C ask the run to save and stop; a second SIGTERM or Ctrl-C exits immediately.

    SIGHUP comes when the terminal is closed; under `nohup`, which ignores it, the run continues.
    Before it is `armed` (while the run is being built), the first signal exits, too. Worker processes inherit the
    handlers when they are forked: in them, SIGTERM exits and Ctrl-C is ignored, since the parent handles it.
    """

    def __init__(self) -> None:
        self.asked, self.armed, self.asked_at, self.pid = False, False, 0.0, os.getpid()
        self.last_words: Callable[[], None] = lambda: None  # called before a second signal exits
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows lacks some
                if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self.pid:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if not self.armed:
            raise SignalledExit(128 + number)
        if not self.asked:
            self.asked, self.asked_at = True, time.monotonic()
            hurry(PATIENCE)
        # `timeout` and some launchers send the same signal to a process and then to its group: it counts once.
        elif number in (signal.SIGTERM, signal.SIGINT) and time.monotonic() - self.asked_at > 0.1:
            self.last_words()
            leave(128 + number)


def end_with_launcher() -> None:
    """Watch the `accelerate launch` or torchrun that started this process, and stop the run when it has ended.

    Otherwise, stopping a launch of one process would leave its training behind as an orphan. The signal is SIGUSR1: it
    asks to save and stop, and does not count as a second signal when SIGTERM went to both. A parent that is a shell is
    not watched, since a run with `nohup` must outlive it.
    """
    if not {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & set(os.environ):  # a launcher sets them
        return
    parent, asked = os.getppid(), signal.SIGUSR1

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), asked)

    if _adopts_orphans(parent):  # the launcher ended while this process was starting
        os.kill(os.getpid(), asked)
    threading.Thread(target=watch, daemon=True).start()


def _adopts_orphans(pid: int) -> bool:
    """Whether a process is init or systemd, and not a launcher (which may be process 1 in a container)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # not Linux, or not readable
        command = ""
    first = pid == 1 or Path(command.split("\0")[0]).name == "systemd"
    return first and not any(launcher in command for launcher in ("accelerate", "torch"))


def leave(code: int) -> NoReturn:
    """End this process and its workers immediately."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a script's `main`, then end the process immediately, so that no library delays the exit.

    Exit codes: 0 for success, 1 for a failed run, 2 for a UserError; each error is reported in one line.
    """
    steady()
    end_with_launcher()
    first = os.environ.get("RANK", "0") == "0"
    code = 1
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = 2
        if first:
            print(f"error: {error}", file=sys.stderr)
        elif not error.reported:
            wait_for_first()
            report_alone(error, os.environ["RANK"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        who = "" if first else f"process {os.environ['RANK']}: "
        print(f"error: {who}{type(error).__name__}: {in_one_line(error)} ({where(error)})", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    leave(code)


def wait_for_first() -> None:
    """Wait for rank 0 to report an error: it usually has the same one, and the launcher then ends this process.

    If this process exited first, the launcher could end rank 0 before its report.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(ALONE)


def report_alone(error: UserError, rank: int | str) -> None:
    """Report an error that only this process has."""
    error.reported = True
    print(f"error: process {rank}: {error}", file=sys.stderr, flush=True)


def in_one_line(error: BaseException) -> str:
    """The first line of an error's message, and its notes."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return plain("; ".join([first, *getattr(error, "__notes__", ())]))
