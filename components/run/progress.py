"""What a person sees while something runs: one bar on a terminal, plain lines elsewhere.

    training    ━━━━━━━━━━────── 450/3000  1:56 left  loss 0.0123  12034 samples/s
    evaluating  ━━━━━─────────── 20/50 episodes  1:56 left  step 500/3000

The bar is the last line of the terminal, and leaves it when all is done; whatever is printed appears above it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from ..errors import crashes_pass, plain
from ..intervals import number

T = TypeVar("T")
CLEAR = "\r\x1b[K"  # moves to the line's begin, and clears it
NARROW = 40  # columns of a terminal below which there is no bar
OFTEN = 0.1  # seconds between two drawings of the bar
LONG = 10.0  # seconds from which on a phase before the run is worth a line where there is no bar
FIRST = ("episode_return", "episode_length", "episode_success")  # what is looked for in reinforcement learning
EVALUATING, SAVING, FILMING = "evaluating", "saving", "filming"  # phases of a run


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Phase:
    """Work of a known kind: a part of a run, or what comes before it."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit, self.done, self.began = what, total, unit, 0, time.monotonic()
        self.prepared: float | None = None  # seconds until it was told that none is done yet

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self.began


class Above:
    """A text stream of a terminal with a bar, which gives way to each text; all else is the stream's own."""

    def __init__(self, stream: Any, progress: "Progress") -> None:
        self.stream, self.progress = stream, progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)

    def write(self, text: str) -> int:
        """Write a text where the bar was; until its line ends, there is none."""
        if text:
            self.progress.hide()
            self.progress.within = not text.endswith("\n")
        return int(self.stream.write(text))


class Progress:
    """A bar on a terminal, plain lines otherwise; silent on all processes but the first.

    Args:
        shown: Whether this process shows anything.
    """

    def __init__(self, shown: bool) -> None:
        self.shown, self.total, self.step, self.doing = shown, 0, 0, ""
        self.left: Callable[[float], str] = lambda also: ""  # what the rest of the run takes, and so many seconds more
        self.phases: list[Phase] = []  # innermost last
        self.took: dict[str, float] = {}  # seconds of the last phase of each kind
        self.spent = 0.0  # seconds in phases that are over
        self.episodes: dict[str, float] = {}  # the newest numbers about episodes
        self.losses: list[str] = []
        self.speed = ""
        self.out, self.err = sys.stdout, sys.stderr
        # Whether there is a bar, whether the cursor is inside of another line, whether all is over.
        self.drawn = self.within = self.closed = False
        self.drawn_at, self.began = 0.0, time.monotonic()

    # ---- what happens ----

    def open(self, doing: str = "") -> None:
        """Let what is printed appear above the bar, and show the phases that begin anywhere in this process.

        Args:
            doing: What is done outside of phases.
        """
        global _current
        self.before, _current = _current, self
        self.out, self.err = sys.stdout, sys.stderr
        if self.columns():
            sys.stdout = Above(self.out, self)
            sys.stderr = Above(self.err, self) if self.err.isatty() else self.err
        self.doing = doing
        self.draw(now=True)

    def close(self) -> None:
        """Remove the bar, for good; what is said later is a plain line."""
        global _current
        self.hide()
        self.closed = True
        if _current is self:
            _current = self.before
        if isinstance(sys.stdout, Above):
            sys.stdout, sys.stderr = self.out, self.err

    def begin(self, total: int, step: int) -> None:
        """Begin a run of so many steps at this one."""
        self.total, self.step, self.began, self.doing = total, step, time.monotonic(), "training"
        self.draw(now=True)

    def at(self, step: int) -> None:
        """The run has come to this step."""
        self.step = step
        self.draw()

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Show the metrics of a log line: in the bar, or as a line unless it would tell of no episode or update."""
        self.step = step
        new = {key: metrics[f"train/{key}"] for key in FIRST if metrics.get(f"train/{key}") is not None}
        self.episodes |= new
        self.losses, self.speed = losses_of(metrics), speed_of(metrics)
        if self.columns():
            self.draw(now=True)
        elif self.shown and (new or metrics.get("updates") != 0 or step >= self.total):
            parts = (f"step {step}/{self.total}", *self.returns(), *self.losses, self.speed, self.left(0.0))
            print("  ".join(filter(None, parts)), flush=True)

    def returns(self) -> list[str]:
        """What is known of the newest episodes."""
        return [f"{key.removeprefix('episode_')} {number(self.episodes[key])}" for key in FIRST if key in self.episodes]

    def end(self) -> None:
        """Leave the last metrics on a terminal, where the bar had them."""
        if (columns := self.columns()) and self.speed:
            last = f"{self.speed}  in {duration(time.monotonic() - self.began)}"
            self.say(fitted(columns - 1, f"step {self.step}/{self.total}", self.returns(), self.losses, last))
        self.stop()

    def stop(self) -> None:
        """The run makes no more steps: remove its bar."""
        self.hide()
        self.total, self.doing = 0, ""

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        if self.shown:
            print(plain(text), flush=True)
            self.draw(now=True)

    def aside(self, text: str) -> None:
        """Print a line of a process that has no bar, in the place of the bar of another one."""
        print(f"{CLEAR if columns_of(sys.stdout) else ''}{plain(text)}", flush=True)

    @contextmanager
    def phase(self, what: str, total: int = 0, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Show that this is being done, and keep how long it took; yields a function that is told how many are done.

        Args:
            what: Such as "making demonstrations".
            total: How many of them; 0 if unknown, or known later.
            unit: Of what, in the plural; "" where `what` says it.
        """
        phase = Phase(what, total, unit)
        self.phases.append(phase)
        self.draw(now=True)
        try:
            yield self.done
            # The first one may prepare what the others find, such as the goals of a task.
            self.took[what] = phase.seconds - (0.0 if what in self.took else phase.prepared or 0.0)
        finally:
            self.phases.remove(phase)
            self.spent += 0.0 if self.phases else phase.seconds
        if self.shown and not self.total and not self.columns() and phase.seconds > LONG:
            print(f"{what} took {duration(phase.seconds)}", flush=True)
        self.draw(now=True)

    def done(self, done: int, total: int = 0) -> None:
        """So many of the innermost phase are done, of a total if it is known only now."""
        if self.phases:
            phase = self.phases[-1]
            phase.done, phase.total = done, total or phase.total
            if not done and phase.prepared is None:
                phase.prepared = phase.seconds
        self.draw()

    @property
    def away(self) -> float:
        """Seconds in phases so far."""
        return self.spent + (self.phases[0].seconds if self.phases else 0.0)

    # ---- the bar ----

    def columns(self) -> int:
        """Columns of the terminal where there is a bar; or else 0."""
        shown = self.shown and not self.closed and not crashes_pass()  # a debugger's prompt needs the line
        return columns_of(self.out) if shown else 0

    def draw(self, now: bool = False) -> None:
        """Draw the bar, if it is time for it."""
        if (time.monotonic() - self.drawn_at < OFTEN and not now) or self.within or not self.shown:
            return
        self.drawn_at = time.monotonic()
        if columns := self.columns():
            if text := self.bar(columns - 3):  # so that not even a `^C` behind it begins another line
                self.out.write(f"\r{text}\x1b[K")
                self.out.flush()
                self.drawn = True
            else:
                self.hide()

    def hide(self) -> None:
        """Take the bar away until it is drawn again."""
        if self.drawn:
            self.drawn = False
            self.out.write(CLEAR)
            self.out.flush()

    def bar(self, room: int) -> str:
        """The bar in at most so many characters: what is done, how far it is, and what there is room for."""
        run = f"{self.step}/{self.total}" if self.total else ""
        if not self.phases and not run:
            return fitted(room, f"{self.doing} ...") if self.doing else ""
        if not self.phases:
            head = self.head(self.doing, self.step, self.total, run, room)
            return fitted(room, head, [self.left(0.0), *self.returns()], self.losses, self.speed)
        phase = self.phases[-1]
        rest = self.rest_of(phase)
        left = self.left(rest) if run else f"{duration(rest)} left" if rest else ""
        if phase.total:
            count = f"{phase.done}/{phase.total} {phase.unit}".rstrip()
            head = self.head(phase.what, phase.done, phase.total, count, room)
            return fitted(room, head, [left, run and f"step {run}"])
        if run:  # how long it is, is not known: the bar stays where the run is
            return fitted(room, self.head(phase.what, self.step, self.total, f"step {run}", room), [left])
        return fitted(room, f"{phase.what} ...")

    def head(self, what: str, done: int, total: int, count: str, room: int) -> str:
        """What is being done, and how far it is, as a bar and as a text."""
        width = min(max(room // 6, 10), 40)
        filled = int(width * min(done / max(total, 1), 1))
        heavy, light = ("━", "─") if self.drawable("━─") else ("#", "-")
        return f"{what.ljust(len(EVALUATING))}  {heavy * filled}{light * (width - filled)} {count}"

    def rest_of(self, phase: Phase) -> float:
        """Seconds that a phase still takes: by those of the last one of its kind, or by what is done of it."""
        if phase.what in self.took:
            return max(self.took[phase.what] - phase.seconds, 0.0)
        return phase.seconds / phase.done * (phase.total - phase.done) if phase.done else 0.0

    def drawable(self, text: str) -> bool:
        """Whether the terminal has these characters."""
        try:
            text.encode(self.out.encoding or "ascii")
            return True
        except (LookupError, UnicodeEncodeError):
            return False


def fitted(room: int, head: str, first: Sequence[str] = (), losses: Sequence[str] = (), speed: str = "") -> str:
    """A line of at most `room` characters: losses are left out from the last one on, before the first the speed."""
    parts = [head, *filter(None, first)]
    fewer = [(*parts, *losses[:n], speed) for n in range(len(losses), 0, -1)] or [(*parts, speed)]
    fewer += [(*parts, *losses[:1]), *(tuple(parts[:n]) for n in range(len(parts), 0, -1))]
    texts = ["  ".join(filter(None, some)) for some in fewer]
    return next((text for text in texts if len(text) <= room), head[:room])


def shown_as(what: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorator of a method of what has a `run`: while it works, the run's bar says `what`."""

    def decorate(method: Callable[..., T]) -> Callable[..., T]:
        @wraps(method)
        def shown(self: Any, *arguments: Any, **keywords: Any) -> T:
            with self.run.progress.phase(what):
                return method(self, *arguments, **keywords)

        return shown

    return decorate


def columns_of(stream: Any) -> int:
    """Columns of a terminal that can have a bar; 0 for none, for a narrow one, and for one without a cursor."""
    try:
        if os.environ.get("TERM", "dumb") == "dumb" or not stream.isatty():
            return 0
        columns = os.get_terminal_size(stream.fileno()).columns or int(os.environ.get("COLUMNS", "0"))
        return columns if columns >= NARROW else 0
    except (OSError, ValueError):
        return 0


def losses_of(metrics: dict[str, Any]) -> list[str]:
    """The losses of a log line; where a trainer has none, its other metrics."""
    known = {key.removeprefix("train/"): value for key, value in metrics.items() if value is not None and "/" in key}
    own = {key: value for key, value in known.items() if not key.startswith(("lr.", "grad_norm.", "episode_"))}
    losses = {key: value for key, value in own.items() if "loss" in key}
    return [f"{key} {number(value)}" for key, value in (losses or own).items()]


def speed_of(metrics: dict[str, Any]) -> str:
    """The environment steps or samples per second of a log line."""
    of = "env_steps" if "env_steps_per_s" in metrics else "samples"
    rate = metrics[f"{of}_per_s"]
    return f"{rate:.0f} {of}/s" if rate >= 10 else f"{rate:.2g} {of}/s"


# ---- phases of whoever has no run at hand --------------------------------------------------------------------------

_current: Progress | None = None  # what shows the phases of this process


@contextmanager
def phase(what: str, total: int = 0, unit: str = "") -> Iterator[Callable[[int], None]]:
    """`Progress.phase` of what shows the progress in this process; without any, nothing is shown."""
    if _current is None:
        yield lambda done: None
    else:
        with _current.phase(what, total, unit) as done:
            yield done


def counted(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, as a `phase` that shows how many are done."""
    with phase(what, len(items)) as done:
        for n, item in enumerate(items):
            yield item
            done(n + 1)


@contextmanager
def showing() -> Iterator[Progress]:
    """Show the phases inside, for a command without a run."""
    progress = Progress(shown=True)
    progress.open()
    try:
        yield progress
    finally:
        progress.close()
