"""Errors that a user can fix, each reported in one line."""

import difflib
import importlib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MANY, SHOWN = 2000, 100  # names among which near ones are looked for, and names that are listed


def plain(text: str) -> str:
    """A text in one line: control characters, such as those that steer a terminal, are written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in text)


class UserError(ValueError):
    """Invalid input; the message names the cause, what was expected and the remedy, in one line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(str(message)))

    reported = False  # whether a process other than the first has printed it


class StoppedError(Exception):
    """A stop was requested during long work, such as an evaluation, whose partial result is dropped."""


class SignalledExit(SystemExit):
    """A signal ended the process before its run had begun; a SystemExit of an environment is a fault instead."""


_through = False


def let_through(on: bool) -> None:
    """Say whether exceptions of components pass through unchanged, to a traceback or a debugger, as under `--debug`."""
    global _through
    _through = on


def crashes_pass() -> bool:
    """Whether whoever would report an exception in one line, or go on without what failed, has to raise it."""
    return _through


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "nearest: a, b" for a misspelt name, or "known: ..." with all names when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name[:100], known[:MANY], n=3, cutoff=0.5)
    shown = known[:SHOWN] + [f"and {len(known) - SHOWN} more"] * (len(known) > SHOWN)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(shown)}"


def require(module: str, install: str) -> Any:
    """Import an optional package. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the package {module!r} is needed here ({error}); pip install {install}") from error
    except Exception as error:  # MuJoCo raises these when MUJOCO_GL names a library that is not installed
        raise UserError(
            f"the package {module!r} fails to import ({error}); is MUJOCO_GL set to what is there?"
        ) from error


@contextmanager
def one_line(subject: str) -> Iterator[None]:
    """Turn any error inside into a UserError of one line that starts with `subject`, with its file and line.

    Where crashes pass, such an error only gets a note.
    """
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(subject) else f"{subject}: {error}") from error
    except Exception as error:
        if crashes_pass():
            error.add_note(f"in {subject}")
            raise
        raise UserError(f"{subject}: {type(error).__name__}: {error} ({where(error)})") from error


def first_line(error: BaseException, otherwise: str = "") -> str:
    """The first line of an error's message; of one without a message `otherwise`, or else its type."""
    return (str(error).strip().splitlines() or [otherwise or type(error).__name__])[0]


def where(error: BaseException) -> str:
    """The file and line of the innermost frame of user code in which `error` was raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = list(traceback.extract_tb(error.__traceback__))
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "importlib" not in frame.filename]
    frames = ours or frames
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
