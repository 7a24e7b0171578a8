"""How a process stops and ends: signals, the end of its launcher, exit codes."""

import bdb
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ..envs.vector import hurry
from ..errors import SignalledExit, UserError, crashes_pass, first_line, let_through, plain, where
from .launch import hint, last, launched, started
from .screen import steady

ALONE = 5.0  # seconds in which rank 0 reports an error that it has, too
SEVERAL = "TENDON_SEEDS"  # in the environment of a run that `--seeds` has started
NO_MESSAGE = "no message"
SHOWN = "; --debug shows the traceback"
PATIENCE = 10.0  # seconds by which an environment that does not return may delay a stop


class StopRequest:
    """SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C ask the run to save and stop; a second SIGTERM or Ctrl-C exits immediately.

    SIGHUP comes when the terminal is closed; under `nohup`, which ignores it, the run continues.
    Before it is `armed` (while the run is being built), the first signal exits, too. Worker processes inherit the
    handlers when they are forked: in them, SIGTERM exits and Ctrl-C is ignored, since the parent handles it.
    Where crashes pass, Ctrl-C is Python's, or its debugger's.
    """

    def __init__(self) -> None:
        self.asked, self.armed, self.asked_at, self.pid = False, False, 0.0, os.getpid()
        self.last_words: Callable[[], None] = lambda: None  # called before a second signal exits
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1", "SIGHUP", *([] if crashes_pass() else ["SIGINT"])):
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
            if number == signal.SIGINT:
                tell("stopping: the run is saved first; another Ctrl-C leaves at once")
        # `timeout` and some launchers send the same signal to a process and then to its group: it counts once.
        elif number in (signal.SIGTERM, signal.SIGINT) and time.monotonic() - self.asked_at > 0.1:
            try:
                self.last_words()
            finally:  # they may meet a `print` that this signal interrupted
                leave(128 + number)


def end_with_launcher() -> None:
    """Watch the `accelerate launch` or torchrun that started this process, and stop the run when it has ended.

    Otherwise, stopping a launch of one process would leave its training behind as an orphan. The signal is SIGUSR1: it
    asks to save and stop, and does not count as a second signal when SIGTERM went to both. A parent that is a shell is
    not watched, since a run with `nohup` must outlive it.
    """
    if not (launched() or SEVERAL in os.environ):
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

    Exit codes: 0 for success, 1 for a failed run, 2 for a UserError; each error is reported in one line. With `--debug`
    an exception passes through instead, and the process ends as any other, so that a debugger keeps control.
    """
    steady()
    started()
    sys.excepthook = uncaught
    end_with_launcher()
    let_through("--debug" in sys.argv)
    if (words := hint()) and sys.stderr.isatty() and is_first():
        print(words, file=sys.stderr)
    code = 1
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        code = 2
        report_mistake(error)
    except (SystemExit, KeyboardInterrupt) as stop:
        if isinstance(stop, KeyboardInterrupt) and crashes_pass():
            raise
        code = 130 if isinstance(stop, KeyboardInterrupt) else exit_code(stop)
        if isinstance(stop, KeyboardInterrupt | SignalledExit) and is_first():
            last("stopped before the run began")
    except Exception as error:
        if crashes_pass():
            raise
        words = f"{type(error).__name__}: {crash_in_one_line(error)}"
        if is_first():
            last(f"error: {words}", error=True)
        else:
            print(f"error: process {os.environ['RANK']}: {words}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if crashes_pass():
        sys.exit(code)
    leave(code)


def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show the traceback of an exception that ends the process, but not of a debugger that was left by `quit`."""
    if not isinstance(error, bdb.BdbQuit):
        sys.__excepthook__(kind, error, trace)


def is_first() -> bool:
    """Whether this process, whose run may not exist yet, speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def exit_code(stop: SystemExit) -> int:
    """The code of a `sys.exit`, which may be a text or nothing."""
    return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def tell(text: str) -> None:
    """Tell who sits at a terminal, from a signal handler, in which `print` could meet itself."""
    if is_first() and os.isatty(2) and SEVERAL not in os.environ:  # else `--seeds` tells it
        with contextlib.suppress(OSError):
            os.write(2, f"\r\x1b[K{text}\n".encode())


def report_mistake(error: UserError) -> None:
    """Report what the user can mend, once of all processes."""
    if is_first():
        in_code = re.search(r"\(\S+:\d+\)$", str(error)) and not crashes_pass()  # of a component
        last(f"error: {error}{SHOWN if in_code else ''}", error=True)
    elif not error.reported:
        wait_for_first()
        report_alone(error, os.environ["RANK"])


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
    return plain("; ".join([first_line(error, NO_MESSAGE), *getattr(error, "__notes__", ())]))


def crash_in_one_line(error: BaseException) -> str:
    """The first line of an error's message, its place, and its notes, or else how its traceback is seen."""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return plain(f"{first_line(error, NO_MESSAGE)} ({where(error)}){notes or SHOWN}")
