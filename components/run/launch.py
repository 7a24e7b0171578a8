"""How this process was started: the command line that does so again, and words that follow those of its launcher."""

import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import plain
from . import afterword

LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run")
FULL = ("--num_processes", "--num_machines", "--mixed_precision", "--dynamo_backend")  # given, accelerate says nothing


@dataclass(frozen=True)
class Start:
    """How a process was started.

    Args:
        words: Of its command line, without the script's arguments.
        variables: That change what the launch means, and were set for it.
        launcher: Process number of `accelerate launch` or torchrun; 0 without one, or if it is unknown.
    """

    words: tuple[str, ...]
    variables: tuple[str, ...] = ()
    launcher: int = 0


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process, or one that it descends from."""
    return bool({"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & set(os.environ))


@functools.cache
def started() -> Start:
    """How this process was started. Call it early, since a launcher may end before this process does."""
    if not launched():
        return Start(script_of(sys.orig_argv, sys.argv) or ("python", sys.argv[0]), variables_of(os.environ))
    parent, command, environment = os.getppid(), list[str](), dict[str, str]()
    with contextlib.suppress(Exception):  # psutil comes with accelerate; the process may have ended, or be another's
        import psutil

        command, environment = psutil.Process(parent).cmdline(), psutil.Process(parent).environ()
    if any(Path(word).name in LAUNCHERS for word in command[:3]):
        words = script_of(command, sys.argv) or fallback()
        return Start(words, variables_of(environment), parent)
    return Start(fallback(), variables_of(os.environ), 0 if command else parent)


def script_of(command: list[str], argv: list[str]) -> tuple[str, ...]:
    """The words of a command line up to its script, which has the arguments `argv`; () if it ends otherwise."""
    end = len(command) - len(argv) + 1
    if end < 2 or command[end:] != argv[1:]:
        return ()
    words = command[:end]
    if os.path.isabs(words[1]) and shutil.which(Path(words[1]).name) == words[1]:
        return Path(words[1]).name, *words[2:]  # a command, whose first line names the interpreter
    name = Path(words[0]).name
    return name if shutil.which(name) == words[0] else words[0], *words[1:]


def fallback() -> tuple[str, ...]:
    """The usual launch of so many processes, where the launcher's own command line cannot be read."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "ACCELERATE_DYNAMO_BACKEND" not in os.environ:
        return "torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", count), sys.argv[0]
    several = () if count == "1" else ("--multi_gpu", "--num_processes", count)
    return "accelerate", "launch", *several, sys.argv[0]


def variables_of(environment: Any) -> tuple[str, ...]:
    """NAME=VALUE of the variables that change what a launch means."""
    return tuple(f"{name}={shlex.quote(environment[name])}" for name in ("ACCELERATE_USE_CPU",) if name in environment)


def again(*arguments: object) -> str:
    """The command line, to be copied, that starts this script in the same way with these arguments."""
    start = started()
    return plain(" ".join([*start.variables, shlex.join([*start.words, *map(str, arguments)])]))


def last(text: str, error: bool = False) -> None:
    """Print a line, on a terminal after what the launcher prints when it ends, such as its traceback of a Ctrl-C.

    Where the launcher lives, another process waits for that, since the launcher may wait for this one to end.
    """
    launcher, text, stream = started().launcher, plain(text), sys.stderr if error else sys.stdout
    if launcher and stream.isatty():
        if os.getppid() == launcher:
            stream.flush()
            words = [sys.executable, "-I", "-S", afterword.__file__, str(launcher), text]
            with contextlib.suppress(OSError, ValueError):
                subprocess.Popen(words, stdout=stream.fileno())
                return
        text = f"\n{text}"  # below the prompt of the shell
    print(text, file=stream, flush=True)


def hint() -> str:
    """What ends the warning with which `accelerate launch` begins; "" if there was none."""
    start, home = started(), os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    configured = (Path(home).expanduser() / "accelerate/default_config.yaml").exists()
    given = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in start.words}
    quiet = configured or "ACCELERATE_LOG_LEVEL" in os.environ or "--config_file" in given or given.issuperset(FULL)
    if quiet or not start.launcher or "accelerate" not in start.words[:2]:
        return ""
    return "(accelerate's warning above needs nothing done; without it: export ACCELERATE_LOG_LEVEL=error)"
