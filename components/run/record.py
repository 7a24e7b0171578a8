"""The run folder: arguments, logs, status, curves and videos."""

import contextlib
import fcntl
import inspect
import json
import logging
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..acting.evaluation import headline, scores
from ..acting.policy_folder import save_policy
from ..contracts import needs_of
from ..errors import StoppedError, UserError, crashes_pass, plain
from ..parallel import gather, on_first, world_size
from .best import Best, described
from .curves import draw_curves
from .files import write_json
from .inheritance import Inheritance
from .launch import again, last
from .logs import Logs
from .process import StopRequest, in_one_line, leave, report_alone, wait_for_first
from .progress import FILMING, Progress
from .provenance import environment
from .reading import read_status
from .tracking import Tracker, tracker_of
from .watch import Watch

# Options that a run chooses by its data and processes where they are not given.
CHOSEN = ("env", "env_options", "batch_size", "workers", "num_envs")


class Run:
    """One run: its folder, screen output and tracker; a context manager that records how the run ended.

    Only rank 0 writes and prints; most methods do nothing on other ranks. What the user can mend before `begin` leaves
    no folder behind; a crash leaves its traceback in `error-rank<r>.txt`. Log lines that a full disk rejects are
    retried.

    Args:
        path: Existing run folder.
        rank: Of this process.
        hang_timeout: Seconds without a `beat` after which the process ends itself; 0 for never.
        resumed: Whether it is a run to resume.
        unusual: Models that are not the trainer's own, as options of the command line.

    Raises:
        UserError: on every process, when another run holds the folder, or what it began with is damaged.
    """

    def __init__(
        self, path: Path, rank: int, hang_timeout: float = 0.0, resumed: bool = False, unusual: str = ""
    ) -> None:
        self.path, self.rank, self.first, self.unusual = path, rank, rank == 0, unusual
        self.inherited = Inheritance(path, rank, resumed)  # what it began with
        self.begun, self.step = False, 0
        self.watch = Watch(path, rank, hang_timeout, self._hangs)
        self.config: dict[str, Any] = {}
        self.ended: list[dict[str, Any]] = []  # episodes that are not written yet
        self.best = Best()
        self.counts: dict[str, int] = {}  # of the run so far, which every line of the logs has
        self.evaluations, self.unevaluated = 0, ""  # that succeeded; why the last one failed, if none did
        self.logs = Logs(path, self.say)
        self.lock: Any = None
        on_first(rank, self._take_lock)  # if the folder is in use, no process touches it
        self.tracker: Any = Tracker(path)
        self.progress = Progress(shown=self.first)
        self.stop = StopRequest()
        self.stop.last_words = self._leaves
        self.farewell, self.confirmations = "", list[str]()  # the last line on the screen; what a resume must repeat
        self.cleanup = contextlib.ExitStack()  # closed when the run ends, also after a failure

    @classmethod
    def of(cls, args: Any, rank: int) -> "Run":
        """The run that the arguments name: in a new folder, or the run to resume.

        Raises:
            UserError: on every process, when the folder cannot hold a new run, or another process holds it.
        """
        start_logging(rank)
        name = f"{args.trainer}-{args.subject}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = on_first(rank, lambda: args.resume or claim(args.run_dir, name))
        return cls(Path(path), rank, args.hang_timeout, bool(args.resume), unusual_models(args))

    def already_finished(self, steps: int) -> bool:
        """Whether the run has already made so many steps; if so, reports it."""
        status = read_status(self.path)
        finished = status["state"] == "finished" and status["step"] >= steps
        if finished:
            self.say(f"{self.path} is finished at step {status['step']}; increase --steps to continue")
        return finished

    def _take_lock(self) -> None:
        self.lock = lock(self.path)
        self.inherited.open()

    def __enter__(self) -> "Run":
        self.progress.open("preparing")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.watch.end()
        self.progress.close()
        if isinstance(error, StoppedError):  # after the last checkpoint: what is left is done by the resumed run
            self.preempted()
        elif error is not None:
            self._failed(error)
        self.cleanup.close()
        self.tracker.finish()
        if self.lock is not None:
            self.lock.close()
        self.bid_farewell()
        return isinstance(error, StoppedError)

    def _failed(self, error: BaseException) -> None:
        """Record why the run ended."""
        if isinstance(error, UserError) and not self.first:
            wait_for_first()
            self._write_error("".join(traceback.format_exception(error)))
            report_alone(error, self.rank)
        elif not isinstance(error, (UserError, SystemExit)):
            written = self._write_error("".join(traceback.format_exception(error)))
            if written and not crashes_pass():
                error.add_note(f"the traceback is in {self._error_file()}")
            if self.unusual and isinstance(error, (AttributeError, TypeError)):  # a member, or an argument, is missing
                error.add_note(f"where this trainer cannot use such a model, leave out {self.unusual}")
        for path in sorted(self.path.glob("error-rank*.txt")):
            if path.name != f"error-rank{self.rank}.txt":  # a process that lost its peer reports the peer's error, too
                error.add_note(f"see {path}: {last_line(path)}")
        if self.begun:
            self._status("failed", f"{type(error).__name__}: {in_one_line(error)}")
        elif self.first:
            discard(self.path, self.inherited)

    def _error_file(self) -> Path:
        return self.path / f"error-rank{self.rank}.txt"

    def _write_error(self, text: str) -> bool:
        with contextlib.suppress(OSError):  # the disk may be full, or the folder gone
            self._error_file().write_text(text, encoding="utf-8", errors="backslashreplace")
            return True
        return False

    def beat(self) -> None:
        """Record that the run makes progress; the loops call this at every step."""
        self.watch.beat()
        self.progress.draw()

    def tick(self) -> None:
        """`beat`, for long work inside a step. Raises StoppedError when a stop was requested."""
        self.beat()
        if self.stop.asked:
            raise StoppedError("stopped by a signal")

    def _hangs(self, reason: str, stack: str, alone: bool) -> None:
        """In the watch's thread: record why, and end the process; `alone` if the first one cannot record it."""
        self._write_error(f"{stack}{reason}\n")
        self._status("failed", reason, anyway=alone)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        leave(1)

    def advance(self, steps: int) -> None:
        """Count completed steps."""
        self.step += steps
        self.progress.step = self.step
        self.beat()

    def closing(self, thing: Any) -> Any:
        """Close `thing` when the run ends, also after a failure; returns it."""
        self.cleanup.callback(thing.close)
        return thing

    def begin(self, args: Any, env: dict[str, Any] | None, precision: str, size: str) -> None:
        """Write `args.json`, which makes the folder a run; sets `config` to the recorded options.

        Args:
            args: The script's arguments.
            env: {"name", options} of the evaluation.
            precision: Mixed precision of accelerate.
            size: Description of the data and the run, for the screen.
        """
        from .. import REGISTRIES

        config = asdict(args) | {"resume": ""}  # the same for a resumed run
        if args.resume:  # also in what was chosen to fit, so that every checkpoint of it has the same options
            config |= {name: args.stored["args"][name] for name in CHOSEN if name in args.stored["args"]}
        self.config, self.confirmations = config, confirmations(args)
        script = Path(inspect.getfile(type(args))).name
        record: dict[str, Any] = {"script": script, "args": config, "argv": args.argv, "command": sys.argv}
        record |= {"env": env, "seed": args.seed, "world_size": world_size(), "mixed_precision": precision}
        entries = {o: [config[o]] for o in REGISTRIES} | {"model": [entry for entry, _ in args.models.values()]}
        chosen = [REGISTRIES[o][entry] for o, names in entries.items() for entry in names if entry in REGISTRIES[o]]
        kept = {key: args.stored[key] for key in ("command", "started") if key in args.stored}  # of the run's beginning
        if self.first:
            for stale in self.path.glob("error-rank*.txt"):
                stale.unlink()
            surroundings = environment(chosen)
            if args.resume:
                self.compare_machine(args.stored, surroundings)
            try:
                self.inherited.write()
                write_json(self.path / "args.json", record | surroundings | kept)
            except OSError as error:
                problem = f"{self.path / 'args.json'} cannot be written ({error.strerror})"
                raise UserError(f"{problem}; free space on its disk, or make it writable") from error
            if args.track != "none":
                self.tracker = tracker_of(args.track, self.path)
                named = (args.track_project, args.track_name, args.track_group)
                self.tracker.start(asdict(args), *named, step=self.step)
        self.begun, self.stop.armed = True, True
        self.watch.start()
        self._status("running")
        self.say(f"{self.path}: {world_size()} process(es), {size}")
        self.progress.begin(args.steps, self.step)

    def compare_machine(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Report changes since the run began that change the last bits of its numbers: threads, CPU, torch."""
        for group, name in (("machine", "threads"), ("machine", "cpu"), ("packages", "torch")):
            if before[group].get(name) != now[group][name]:
                self.say(f"{name} was {before[group].get(name)} and is {now[group][name]}: the last bits will differ")

    def say(self, *lines: str) -> None:
        """Print lines on the first process, without the empty ones."""
        for line in filter(None, lines):
            self.progress.say(line)

    def report(self, text: str) -> None:
        """Print a line about this process, on any rank."""
        if self.first:
            self.say(text)
        else:
            self.progress.aside(f"process {self.rank}: {text}")

    def log(self, record: dict[str, Any]) -> None:
        """Add a line for the current step to `metrics.jsonl` and the screen."""
        record = {"step": self.step} | record | {f"train/{name}": count for name, count in self.counts.items()}
        if self.first:
            self.logs.append("metrics.jsonl", record)
            self.tracker.log(record, record["step"])
        self.progress.update(record["step"], record)

    def count_episodes(self, episodes: list[dict[str, Any]], metrics: Any) -> None:
        """Keep the episodes of this process that ended at this step, and add their numbers to the metrics."""
        for episode in episodes:
            self.ended.append({"step": self.step, **episode, **self.counts})
            metrics.add({key: value for key, value in episode.items() if key != "env"}, "train/")

    def write_episodes(self) -> None:
        """Add a line to `episodes.jsonl` for each episode of any process that ended since the last call."""
        for episode in (episode for part in gather(self.ended) for episode in part):
            if self.first:
                self.logs.append("episodes.jsonl", episode)
        self.ended = []

    def state_dict(self) -> dict[str, Any]:
        """What has been written to the logs, what became of the evaluations, and the best step."""
        evaluated = {"evaluations": self.evaluations, "unevaluated": self.unevaluated}
        return {"logs": self.logs.state_dict(), **evaluated, "best": self.best.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.logs.load_state_dict(state["logs"])
        self.evaluations, self.unevaluated = state["evaluations"], state["unevaluated"]
        self.best.load_state_dict(state.get("best", {}))

    def rank_state(self) -> dict[str, Any]:
        """The episodes of this process that are not written yet."""
        return {"episodes": self.ended}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        self.ended = state["episodes"]

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Restore the states of all former processes, on the first one."""
        self.ended = [episode for state in states for episode in state["episodes"]] if self.first else []

    def evaluated(self, result: dict[str, Any] | None, problem: str = "") -> None:
        """Add a line to `eval.jsonl` and the screen, which may be the best; or report why the evaluation failed."""
        if result is None:
            self.unevaluated = "" if self.evaluations else problem
            self.say(f"the evaluation at step {self.step} failed, training continues: {problem}")
            return
        self.evaluations, self.unevaluated, result = self.evaluations + 1, "", result | self.counts
        self.best.evaluated(result)
        if self.first:
            self.logs.append("eval.jsonl", result)
            self.tracker.log(scores(result), result["step"])
        self.say(f"step {result['step']}: {headline(result)}")

    def settle(self) -> None:
        """Write and fsync the logs; called before a checkpoint becomes valid. Raises OSError: the disk is full."""
        self.logs.settle()
        self.tracker.flush()

    def saved(self) -> None:
        """Record that a checkpoint of this step is valid."""
        self._status("running")
        if self.first:
            self.inherited.drop_weights()

    def leave_policy(self, policy: Any, evaluator: Any, args: Any) -> None:
        """Write the policy, and a film of it where the environment renders."""
        if self.first and policy is not None:
            save_policy(self.path / "policy", policy, args, self.step)
        if self.first and evaluator is not None and not args.debug:
            with self.progress.phase(FILMING):
                problem = evaluator.film(self.path / "videos" / f"step-{self.step:09d}.mp4")
            self.say(f"no video: {problem}" if problem else "")

    def preempted(self) -> None:
        """Record that the run was stopped before its last step, on request."""
        self.farewell = f"stopped at step {self.step}; continue with: {self.resuming()}"
        self._status("preempted", "stopped by a signal")
        self.stop.last_words = self.bid_farewell

    def resuming(self) -> str:
        """The command line, to be copied, that resumes this run."""
        return again("--resume", self.path, *self.confirmations)

    def bid_farewell(self) -> None:
        """Print the last line of a run that was stopped, once."""
        words, self.farewell = self.farewell, ""
        if words and self.first:
            last(words)

    def _leaves(self) -> None:
        """At a second signal: record that the run ends without saving, and say how it is continued."""
        self._status("preempted", "a second signal: left without saving")
        self.farewell = f"left without saving; continue from the last checkpoint with: {self.resuming()}"
        self.bid_farewell()

    def finished(self) -> None:
        """Record that the run reached its last step, and draw its curves.

        Raises:
            RuntimeError: every evaluation has failed, so that the run has not shown what it was to show.
        """
        if self.first:
            with self.progress.phase("drawing curves"):
                draw_curves([self.path], self.path / "curves.png")
            for seen in (self.path / "videos").glob(f"step-{self.step:09d}.*"):
                self.tracker.show("eval/film", seen, self.step)
            self.tracker.show("curves", self.path / "curves.png", self.step)
        if self.unevaluated:
            again = f"evaluate it again by python -m components.evaluate {self.path}"
            raise RuntimeError(f"no evaluation succeeded ({again}): {self.unevaluated}")
        self.progress.end()
        self._status("finished")
        if self.best.record and self.best.step != self.step:
            how = f"load_policy({str(self.path)!r}, which='best')"
            self.say(f"best: step {self.best.step}, {described(self.best.record)}; {how}")
        self.say(f"finished: {self.path}")

    def _status(self, state: str, reason: str = "", anyway: bool = False) -> None:
        if state != "running":
            self.stop.last_words = lambda: None  # a later signal does not overwrite how the run ended
            self.progress.stop()
        if self.first or anyway:
            path, status = self.path / "status.json", {"state": state, "step": self.step, "reason": reason}
            try:
                write_json(path, status)
            except OSError as error:  # on a full disk, overwrite the old file in place
                try:
                    with open(path, "r+") as file:
                        file.write(json.dumps(status))
                        file.truncate()
                except OSError:
                    self.say(f"{path} CANNOT BE WRITTEN ({error.strerror})")

    def rewind(self, step: int, counted: bool) -> None:
        """Take back what the logs have from after the checkpoint of `step`, which `counted` the lines, or did not."""
        if self.first:
            self.logs.rewind(step, counted)


class Plain(logging.Formatter):
    """Writes the control characters of a message, which may quote a file, as escapes; lines stay lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(plain, super().format(record).split("\n")))


class OnScreen(logging.Handler):
    """Prints messages, so that they appear above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def start_logging(rank: int) -> None:
    """Show the log messages of components, as plain text: all on the first process, errors alone on the others."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[OnScreen()])
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Plain("%(message)s"))
    logging.getLogger("components").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def last_line(path: Path) -> str:
    """The last line of a text file; "" if it cannot be read."""
    try:
        return ([""] + path.read_text(encoding="utf-8", errors="replace").splitlines())[-1]
    except OSError:
        return ""


def confirmations(args: Any) -> list[str]:
    """What a command line that resumes the run must repeat: its plugins, and options that reach beyond its folder."""
    plugins, words = list(args.plugins), list[str]()
    for option in ("env", "dataset"):
        factory = getattr(args, f"{option}_options")
        for name, module, _ in getattr(factory, "reaches", list)():
            value, word = getattr(factory, name), f"--{option}.{name.replace('_', '-')}"
            if module:
                plugins.append(module)
            elif word not in words:
                words += [word, *map(str, value if isinstance(value, tuple) else [value])]
    return [*(["--plugins", *dict.fromkeys(plugins)] if plugins else []), *words]


def unusual_models(args: Any) -> str:
    """The models that were chosen in place of the trainer's own, as options of the command line."""
    from .. import TRAINER_REGISTRY

    own = needs_of(TRAINER_REGISTRY[args.trainer])
    chosen = [f"{name}={entry}" for name, (entry, _) in args.models.items() if entry != own.get(name)]
    return f"--model {' '.join(chosen)}" if chosen else ""


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
        with contextlib.suppress(OSError):  # a folder with other files stays
            path.rmdir()
        raise UserError(f"--run-dir {path} cannot be written ({error.strerror}); choose another folder") from error
    return str(path)


def discard(path: Path, inherited: Inheritance) -> None:
    """Remove the folder of a run that did not begin, unless it holds other files."""
    if not (path / "args.json").exists():
        inherited.discard()
        (path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder with other files stays
            path.rmdir()


def lock(path: Path) -> Any:
    """Lock the run folder for as long as this process lives; the returned file keeps the lock.

    The lock belongs to this process alone: forked workers that outlive it do not hold it.

    Raises:
        UserError: another process holds it.
    """
    try:
        file = open(path / ".lock", "a+")  # noqa: SIM115  (held for life)
    except OSError as error:
        raise UserError(
            f"{path / '.lock'} cannot be written ({error.strerror}); free space, or make it writable"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        raise UserError(f"{path} is in use by process {file.read().strip() or '?'}; wait for it or stop it") from error
    with contextlib.suppress(OSError):  # a full disk: the number is for people, the lock is held without it
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), str(os.getpid()).encode())
    return file
