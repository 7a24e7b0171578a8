"""The run folder: what was asked, what happened, how it ended, and the pictures that a person looks at first."""

import contextlib
import fcntl
import inspect
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..acting.evaluation import headline, scores
from ..errors import StoppedError, UserError
from ..parallel import on_first, world_size
from .checkpoint import sync, write_json
from .curves import draw_curves, step_of
from .process import StopRequest, in_one_line, leave, tell_alone, wait_for_first
from .progress import Progress
from .provenance import environment
from .tracking import Tracker

LOGS = ("metrics.jsonl", "eval.jsonl", "episodes.jsonl")


class Run:
    """One run: its folder, its screen and its mirror, as a context that tells how the run ended.

    Rank 0 writes and shows; elsewhere most methods do nothing. What fails before `begin` leaves no folder behind; what
    fails later leaves its traceback in `error-rank<r>.txt`. What the disk has no room for is kept and tried again.

    Args:
        path: The folder, which exists.
        rank: This process.
        hang_timeout: Seconds without a `beat` after which the process ends itself; 0 for never.

    Raises:
        UserError: on every process, when another run holds the folder.
    """

    def __init__(self, path: Path, rank: int, hang_timeout: float = 0.0) -> None:
        self.path, self.rank, self.first = path, rank, rank == 0
        self.begun, self.step, self.hang_timeout = False, 0, hang_timeout
        self.config: dict[str, Any] = {}
        self.unwritten: list[tuple[str, dict[str, Any]]] = []
        self.lock: Any = None
        on_first(rank, self._take_lock)  # where the folder is in use, every process leaves it as it is
        self.tracker, self.progress = Tracker(path), Progress(0, 0, shown=self.first)
        self.stop = StopRequest()
        self.stop.last_words = lambda: self._status("preempted", "a second signal: left without saving")
        self.cleanup = contextlib.ExitStack()  # what must be closed however the run ends

    def _take_lock(self) -> None:
        self.lock = lock(self.path)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.hang_timeout = 0.0
        self.progress.close()
        if error is not None:
            self._failed(error)
        self.cleanup.close()
        self.tracker.finish()
        if self.lock is not None:
            self.lock.close()

    def _failed(self, error: BaseException) -> None:
        """Leave word of what ended the run."""
        if isinstance(error, UserError) and not self.first:
            wait_for_first()
            self._write_error("".join(traceback.format_exception(error)))
            tell_alone(error, self.rank)
        elif not isinstance(error, (UserError, SystemExit)):
            self._write_error("".join(traceback.format_exception(error)))
        for path in sorted(self.path.glob("error-rank*.txt")):
            if path.name != f"error-rank{self.rank}.txt":  # whoever lost its peer passes on the peer's own last words
                error.add_note(f"see {path}: {last_line(path)}")
        if self.begun:
            self._status("failed", f"{type(error).__name__}: {in_one_line(error)}")
        elif self.first:
            discard(self.path)

    def _write_error(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the disk may be full, or the folder gone
            (self.path / f"error-rank{self.rank}.txt").write_text(text)

    def beat(self) -> None:
        """Tell that the run gets on. Raises nothing; the loops call it at every step."""
        self.alive_at = time.monotonic()

    def tick(self) -> None:
        """`beat`, for long work inside a step. Raises StoppedError when a stop was asked for."""
        self.beat()
        if self.stop.asked:
            raise StoppedError("stopped by a signal")

    def _watch(self) -> None:
        """In a thread: end the process when it hangs, and leave word of where."""
        main = threading.main_thread().ident
        while self.hang_timeout > 0:
            time.sleep(min(1.0, self.hang_timeout / 4))
            silent = time.monotonic() - self.alive_at
            if 0 < self.hang_timeout < silent:
                frames = sys._current_frames()
                stack = traceback.extract_stack(frames[main]) if main in frames else traceback.StackSummary()
                place = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "an unknown place"
                reason = f"hangs at {place}: no progress for {silent:.0f} s (--hang-timeout)"
                self._write_error("".join(stack.format()) + f"process {self.rank} {reason}\n")
                self._status("failed", f"process {self.rank} {reason}")
                print(f"error: process {self.rank} {reason}", file=sys.stderr, flush=True)
                leave(1)

    def begin(self, args: Any, argv: list[str], env: dict[str, Any] | None, step: int, precision: str) -> None:
        """Write `args.json`: from here on the folder holds a run. `config` has the options as recorded.

        Args:
            args: The script's arguments.
            argv: The command line behind them.
            env: {"name", options} of the evaluation.
            step: Where the run starts.
            precision: What accelerate computes in.
        """
        from .. import REGISTRIES

        config = self.config = asdict(args) | {"resume": ""}  # the same for a resumed run
        record: dict[str, Any] = {
            "script": Path(inspect.getfile(type(args))).name,
            "args": config,
            "argv": argv,
            "command": sys.argv,
        }
        record |= {"env": env, "seed": args.seed, "world_size": world_size(), "mixed_precision": precision}
        names = {o: [config[o]] if isinstance(config[o], str) else config[o] for o in REGISTRIES if o in config}
        entries = {option: [word.rpartition("=")[2] for word in words] for option, words in names.items()}
        chosen = [REGISTRIES[o][entry] for o, words in entries.items() for entry in words if entry in REGISTRIES[o]]
        if self.first:
            for stale in self.path.glob("error-rank*.txt"):
                stale.unlink()
            surroundings = environment(chosen)
            if args.resume:
                self.compare_machine(surroundings)
            try:
                write_json(self.path / "args.json", record | surroundings)
            except OSError as error:
                raise UserError(f"{self.path} cannot be written ({error.strerror}); make room or mend it") from error
            if args.track:
                self.tracker.start(config, args.track_project, args.track_name, args.track_group)
        self.progress = Progress(args.steps, step, shown=self.first)
        self.begun, self.step, self.stop.armed = True, step, True
        self.beat()
        if self.hang_timeout > 0:
            threading.Thread(target=self._watch, daemon=True).start()
        self._status("running")

    def compare_machine(self, now: dict[str, Any]) -> None:
        """Say when what decides a run's last bits is not what it was when the run began."""
        before = read_args(self.path)
        for group, name in (("machine", "threads"), ("machine", "cpu"), ("packages", "torch")):
            if before[group][name] != now[group][name]:
                self.say(f"{name} was {before[group][name]} and is {now[group][name]}: the last bits will differ")

    def say(self, text: str) -> None:
        """Print a line, once."""
        self.progress.say(text)

    def tell(self, text: str) -> None:
        """Print a line about this process, whichever it is."""
        if self.first:
            self.say(text)
        else:
            print(f"process {self.rank}: {text}", flush=True)

    def log(self, record: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`, and of the screen."""
        if self.first:
            self._append("metrics.jsonl", record)
            self.tracker.log(record, record["step"])
        self.progress.update(record["step"], record)

    def episodes(self, episodes: list[dict[str, Any]]) -> None:
        """Lines of `episodes.jsonl`, one for each episode that ended while data was collected."""
        for episode in episodes if self.first else ():
            self._append("episodes.jsonl", episode)

    def evaluated(self, result: dict[str, Any]) -> None:
        """One line of `eval.jsonl`."""
        if self.first:
            self._append("eval.jsonl", result)
            self.tracker.log(scores(result), result["step"])
        self.say(f"step {result['step']}: {headline(result)}")

    def _append(self, name: str, record: dict[str, Any]) -> None:
        """Append a line, or keep it until there is room for it."""
        self.unwritten.append((name, record))
        try:
            self._write_lines()
        except OSError as error:
            if len(self.unwritten) == 1:
                self.say(f"{self.path / name} CANNOT BE WRITTEN ({error.strerror}), its lines are kept and tried again")

    def _write_lines(self) -> None:
        while self.unwritten:
            name, record = self.unwritten[0]
            append_line(self.path / name, record, wait=False)
            del self.unwritten[0]

    def settle(self) -> None:
        """Put on disk what the logs say so far; called before a checkpoint counts. Raises OSError: no room."""
        self._write_lines()
        for name in LOGS:
            if (self.path / name).exists():
                sync(self.path / name)

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
        if state != "running":
            self.stop.last_words = lambda: None  # nothing that comes later changes how the run ended
        if self.first:
            path, status = self.path / "status.json", {"state": state, "step": self.step, "reason": reason}
            try:
                write_json(path, status)
            except OSError as error:  # a full disk has room for what replaces the old words in their place
                try:
                    with open(path, "r+") as file:
                        file.write(json.dumps(status))
                        file.truncate()
                except OSError:
                    self.say(f"{path} CANNOT BE WRITTEN ({error.strerror})")

    def finished_at(self) -> int:
        """The step at which the run finished; -1 when it did not."""
        status = read_status(self.path)
        return status["step"] if status["state"] == "finished" else -1

    def rewind(self, step: int) -> None:
        """Drop what the .jsonl files say of later steps, and a torn last line, before the run goes on from `step`."""
        for name in LOGS if self.first else ():
            path = self.path / name
            if path.exists():
                text = path.read_text(errors="replace")
                kept = "".join(line for line in text.splitlines(True) if step_of(line) <= step)
                if kept != text:
                    temporary = path.with_name(f".{name}-new")
                    temporary.write_text(kept)
                    os.replace(temporary, path)


def start_logging(rank: int) -> None:
    """Let components say things once: on the first process."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("components").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def last_line(path: Path) -> str:
    """Of a text file; empty where it cannot be read."""
    try:
        return ([""] + path.read_text(errors="replace").splitlines())[-1]
    except OSError:
        return ""


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
    """Append one JSON object as a line, whole or not at all, and wait until it is on disk if asked to."""
    line = json.dumps(finite(record), allow_nan=False) + "\n"
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, before)
        raise
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
        try:
            probe.write_text("a full disk takes an empty file, but no words")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # nothing is in it, or it was there before
            path.rmdir()
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

    The lock is the process's own: workers that it has forked, and that outlive it, do not hold it.

    Raises:
        UserError: another process holds it.
    """
    file = open(path / ".lock", "a+")  # noqa: SIM115  (held for life)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        raise UserError(f"{path} is in use by process {file.read().strip() or '?'}; wait for it or stop it") from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def read_args(run: Path, made_by: str = "") -> dict[str, Any]:
    """Read a run's `args.json`. Raises UserError when there is no run, it is damaged, or another script's."""
    path = run / "args.json"
    if not path.exists():
        raise UserError(f"{run}: no run here (args.json is missing)")
    try:
        record = json.loads(path.read_text())
        script, *_ = record["script"], record["args"]["seed"], [word.split() for word in record["argv"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if made_by and script != made_by:
        raise UserError(f"{run} is a run of {script}; go on with: python {script} --resume {run}")
    return record


def read_status(run: Path) -> dict[str, Any]:
    """A run's `status.json`; a run that was killed before it wrote one is at step 0, as is one where it is damaged."""
    try:
        status = json.loads((run / "status.json").read_text())
        return {"state": str(status["state"]), "step": int(status["step"]), "reason": str(status["reason"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"state": "unknown", "step": 0, "reason": ""}
