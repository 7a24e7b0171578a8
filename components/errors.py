"""Errors that a user can mend, told in one line."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Input that cannot work: the message names the culprit, what was expected and the remedy."""

    told = False  # whether a process other than the first has put it on the screen


class StoppedError(Exception):
    """A stop was asked for while something long was going on; what it had done so far is dropped."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "nearest: a, b" for a misspelt name, or all the known names when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"


def require(module: str, install: str) -> Any:
    """Import an optional package, or say in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the package {module!r} is needed here ({error}); pip install {install}") from error
    except Exception as error:  # MuJoCo does this when MUJOCO_GL names a library that is not installed
        raise UserError(
            f"the package {module!r} fails to import ({error}); is MUJOCO_GL set to what is there?"
        ) from error
