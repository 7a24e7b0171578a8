"""The run folder: what was asked, what happened, how it ended, and the pictures that a person looks at first."""

import contextlib
import fcntl
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .checkpoint import sync, write_json
from .command_line import where
from .curves import draw_curves, step_of
from .errors import UserError
from .evaluation import headline, scores
from .parallel import world_size
from .progress import Progress
from .tracking import Tracker

PACKAGES = (
    "torch",
    "accelerate",
    "wandb",
    "safetensors",
    "tyro",
    "numpy",
    "gymnasium",
    "metaworld",
    "mujoco",
    "pyarrow",
)


class Run:
    """One run: its folder, its screen and its mirror, as a context that tells how the run ended.

    Rank 0 writes and shows; elsewhere most methods do nothing. What fails before `begin` leaves no folder behind; what
    fails later leaves its traceback in `error-rank<r>.txt`.

    Args:
        path: The folder, which exists.
        rank: This process.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank, self.first = path, rank, rank == 0
        self.begun, self.step = False, 0
        self.lock = lock(path) if self.first else None
        self.tracker, self.progress = Tracker(path), Progress(0, 0, shown=self.first)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.progress.close()
        if error is not None and not isinstance(error, (UserError, SystemExit)) and self.path.exists():
            text = "".join(traceback.format_exception(error))
            (self.path / f"error-rank{self.rank}.txt").write_text(text)
        if error is not None and self.begun:
            self._status("failed", f"{type(error).__name__}: {error}")
        elif error is not None and self.first:
            discard(self.path)
        self.tracker.finish()
        if self.lock is not None:
            self.lock.close()

    def begin(
        self, args: Any, argv: list[str], env: dict[str, Any] | None, step: int, precision: str
    ) -> dict[str, Any]:
        """Write `args.json`: from here on the folder holds a run. Returns the options as recorded.

        Args:
            args: The script's arguments.
            argv: The command line behind them.
            env: {"name", options} of the evaluation.
            step: Where the run starts.
            precision: What accelerate computes in.
        """
        from . import REGISTRIES

        self.begun, self.step = True, step
        config = asdict(args) | {"resume": ""}  # the same for a resumed run
        record = {"args": config, "argv": argv, "command": sys.argv, "env": env, "seed": args.seed}
        record |= {"world_size": world_size(), "mixed_precision": precision}
        chosen = [registry[config[option]] for option, registry in REGISTRIES.items() if config[option] in registry]
        if self.first:
            surroundings = environment(chosen)
            if args.resume:
                self.compare_machine(surroundings)
            write_json(self.path / "args.json", record | surroundings)
            if args.track:
                self.tracker.start(config, args.track_project, args.track_name, args.track_group)
        self.progress = Progress(args.steps, step, shown=self.first)
        self._status("running")
        return config

    def compare_machine(self, now: dict[str, Any]) -> None:
        """Say when what decides a run's last bits is not what it was when the run began."""
        before = read_args(self.path)
        for group, name in (("machine", "threads"), ("machine", "cpu"), ("packages", "torch")):
            if before[group][name] != now[group][name]:
                self.say(f"{name} was {before[group][name]} and is {now[group][name]}: the last bits will differ")

    def say(self, text: str) -> None:
        """Print a line, once."""
        self.progress.say(text)

    def log(self, record: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`, and of the screen."""
        if self.first:
            append_line(self.path / "metrics.jsonl", record, wait=False)
            self.tracker.log(record, record["step"])
        self.progress.update(record["step"], record)

    def evaluated(self, result: dict[str, Any]) -> None:
        """One line of `eval.jsonl`."""
        if self.first:
            append_line(self.path / "eval.jsonl", result)
            self.tracker.log(scores(result), result["step"])
        self.say(f"step {result['step']}: {headline(result)}")

    def settle(self) -> None:
        """Put on disk what the log says so far; called before a checkpoint counts."""
        if self.first and (self.path / "metrics.jsonl").exists():
            sync(self.path / "metrics.jsonl")

    def saved(self) -> None:
        """A checkpoint of this step counts."""
        self._status("running")

    def preempted(self) -> None:
        """The run stopped before its end, on request."""
        self._status("preempted", "stopped by a signal")
        self.say(f"stopped at step {self.step}; go on with --resume {self.path}")

    def finished(self) -> None:
        """The run reached its last step."""
        if self.first:
            draw_curves([self.path], self.path / "curves.png")
            for film in (self.path / "videos").glob(f"*{self.step}.mp4"):
                self.tracker.video(film, self.step)
        self._status("finished")
        self.progress.close()
        self.say(f"finished: {self.path}")

    def _status(self, state: str, reason: str = "") -> None:
        if self.first:
            write_json(self.path / "status.json", {"state": state, "step": self.step, "reason": reason})

    def finished_at(self) -> int:
        """The step at which the run finished; -1 when it did not."""
        status = read_status(self.path)
        return status["step"] if status["state"] == "finished" else -1

    def rewind(self, step: int) -> None:
        """Drop what the .jsonl files say of later steps, and a torn last line, before the run goes on from `step`."""
        for name in ("metrics.jsonl", "eval.jsonl") if self.first else ():
            path = self.path / name
            if path.exists():
                kept = "".join(line for line in path.read_text().splitlines(True) if step_of(line) <= step)
                temporary = path.with_name(f".{name}-new")
                temporary.write_text(kept)
                os.replace(temporary, path)


class StopRequest:
    """SIGTERM and Ctrl-C ask the run to save and stop; a second one leaves at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True


def run(main: Callable[[list[str]], int]) -> int:
    """Run a script's `main`. Exit codes: 0; 2 for what the user can mend; 1 for a failed run; each told in one line."""
    first = os.environ.get("RANK", "0") == "0"
    code = 1
    try:
        return main(sys.argv[1:])
    except UserError as error:
        code = 2
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        who = "" if first else f"process {os.environ['RANK']}: "
        print(f"error: {who}{type(error).__name__}: {error} ({where(error)})", file=sys.stderr, flush=True)
    if "RANK" in os.environ:  # a process that waits for its peers on the way out would keep the job alive
        os._exit(code)
    return code


def start_logging(rank: int) -> None:
    """Let components say things once: on the first process."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("components").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def refuse_changes(run: str, stored: dict[str, Any], asked: dict[str, Any], may_change: Container[str]) -> None:
    """Refuse options beside `--resume` that would make another run. Raises UserError listing them."""
    stored, asked = (_flat(json.loads(json.dumps(options))) for options in (stored, asked))
    changed = [key for key in asked if key.split(".")[0] not in may_change and asked[key] != stored.get(key)]
    if changed:
        lines = [f"{key.replace('_options', '')} {stored.get(key)} -> {asked[key]}" for key in changed]
        raise UserError(
            f"--resume {run} cannot change: {'; '.join(lines)}; start a new run (--init-from {run}) for that"
        )


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def append_line(path: Path, record: dict[str, Any], wait: bool = True) -> None:
    """Append one JSON object as a line, and wait until it is on disk if asked to."""
    with open(path, "a") as file:
        file.write(json.dumps(finite(record), allow_nan=False) + "\n")
    if wait:
        sync(path)


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: numbers that are not finite become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def claim(wanted: str, default_name: str) -> str:
    """Make a new run folder, or refuse one that cannot hold a new run. Returns its path.

    Raises:
        UserError: it holds a run already, cannot be written, or lies below a file.
    """
    path = Path(wanted) if wanted else Path("runs") / default_name
    try:
        for attempt in range(2, 1000):
            try:
                path.mkdir(parents=True, exist_ok=bool(wanted))
                break
            except FileExistsError:
                if wanted:
                    raise
                path = Path("runs") / f"{default_name}-{attempt}"
        if (path / "args.json").exists():
            raise UserError(f"--run-dir {path} holds a run; continue it with --resume {path}, or choose another folder")
        probe = path / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--run-dir {path} cannot be written ({error.strerror}); choose another folder") from error
    return str(path)


def discard(path: Path) -> None:
    """Remove a folder in which a run did not come to begin, when nothing else is in it."""
    if not (path / "args.json").exists():
        (path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it may have been there before, with files of its own
            path.rmdir()


def lock(path: Path) -> Any:
    """Hold the run folder for as long as this process lives; the returned file keeps the lock.

    Raises:
        UserError: another process holds it.
    """
    file = open(path / ".lock", "a+")  # noqa: SIM115  (held for life)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        raise UserError(f"{path} is in use by process {file.read().strip() or '?'}; wait for it or stop it") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def read_args(run: Path) -> dict[str, Any]:
    """Read a run's `args.json`. Raises UserError when there is no run, or it is damaged."""
    path = run / "args.json"
    if not path.exists():
        raise UserError(f"{run}: no run here (args.json is missing)")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from error


def read_status(run: Path) -> dict[str, Any]:
    """A run's `status.json`; a run that was killed before it wrote one is at step 0."""
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "unknown", "step": 0, "reason": ""}


def environment(components: Iterable[type]) -> dict[str, Any]:
    """Versions, commit and machine: what else decides a run's numbers. No environment variables, so no secrets."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "component_versions": {f"{c.__module__}.{c.__qualname__}": _source_hash(c) for c in components},
        "packages": packages,
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "machine": {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "platform": platform.platform()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _source_hash(component: type) -> str | None:
    """A component's version is its file: the first digits of the SHA-256 of its source."""
    try:
        file = inspect.getsourcefile(component)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else None
    except (OSError, TypeError):
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
