"""A film of evaluation episodes: side by side, as fast as the environment says, what became of each written below it.

Every episode is run to its end, and its first 20 s are filmed. A picture that is too large for the film is made
smaller; one of few pixels is magnified, so that there is room for the text.
"""

import io
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..data.random_state import preserved
from ..envs.gymnasium import follow_robots
from ..envs.observations import array_of, info_value
from ..envs.vector import Environments
from ..errors import first_line, plain
from ..intervals import number

EPISODES = 4
SECONDS, HOLD = 20.0, 1.5  # longest film, and how long the results are seen at its end
FPS = 30  # most frames a second
DRAWING = 120.0  # seconds that the environment may take to draw; a slower one gives fewer frames
LARGEST, SMALLEST = (640, 512), 240  # width and height of an episode's picture
MARGIN = 6  # between text and edge
GOALS = ("task", "goal", "instruction", "mission", "task_description", "language_instruction")  # keys of `info`
GREY, GREEN, RED = (200, 200, 200), (90, 220, 110), (255, 120, 100)


@dataclass
class Take:
    """One episode: its frames and the last one as JPEG, whether they are only its beginning, its goal, its result."""

    frames: list[bytes] = field(default_factory=list)
    last: bytes = b""
    cut: bool = False
    goal: str = ""
    result: dict[str, Any] = field(default_factory=dict)


def film_episodes(
    play: Callable[..., list[dict[str, Any]]],
    factory: Any,
    env: dict[str, Any],
    seeds: Sequence[int],
    path: Path,
    timeout: float = 0.0,
    tick: Callable[[], None] = lambda: None,
    around: Callable[[Any], Any] = lambda make: make,
    sees: bool = False,
) -> str:
    """Film one episode per seed as H.264. Returns "" or, in one line, why there is no film.

    Args:
        play: (environments, seeds, look, tick) -> results, as of `run_episodes` with a policy.
        factory: An environment factory with the option `render_mode`.
        env: {"name", options} of the environment, for the text.
        seeds: At most EPISODES are filmed.
        timeout: Seconds that a step of the environment may take.
        tick: Called at each step; an exception from it ends the film.
        around: Wraps `factory.build`.
        sees: Whether the policy sees pictures, so that what is drawn for it may not be changed.
    """
    if not (is_dataclass(factory) and hasattr(factory, "render_mode")):
        return f"{type(factory).__name__} has no option 'render_mode'"
    part = path.with_name(f".{path.name}")  # so that a film is whole or absent
    try:
        import av  # noqa: F401  (before any episode is run)
        from PIL import Image  # noqa: F401

        with preserved(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of graphics libraries; the result reports failures
            here = {"workers": 0} if hasattr(factory, "workers") else {}  # whose cameras can be moved
            filming: Any = replace(factory, render_mode="rgb_array", **here)  # type: ignore[type-var]
            envs = Environments(around(filming.build), 1, seeds[0], timeout)
            try:
                if not sees:
                    follow_robots(envs)
                camera = Camera(envs, getattr(filming, "max_episode_steps", None))
                takes = [camera.film(play, seed, tick) for seed in seeds[:EPISODES]]
            finally:
                envs.close()
        if not all(take.frames for take in takes):
            return "the environment renders no frames"
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(Screen(takes, _subject(env), camera), part, tick)
        os.replace(part, path)
    except Exception as error:
        reason = plain(first_line(error))
        if isinstance(error, ImportError):
            return f"{reason}; pip install {'pillow' if error.name == 'PIL' else error.name or 'av'}"
        needs = "; it needs EGL (Debian: apt-get install libegl1 libgl1-mesa-dri)"
        return reason + (needs if "gl" in reason.lower() else "")
    finally:
        part.unlink(missing_ok=True)
    return ""


class Camera:
    """Films episodes of a vector environment's first slot.

    Args:
        envs: `Environments` that render.
        longest: Most steps of an episode, if they are known.
    """

    def __init__(self, envs: Any, longest: int | None = None) -> None:
        self.envs = envs
        base = getattr(envs.envs, "unwrapped", None)
        self.inner: Any = next(iter(getattr(base, "envs", None) or ()), None)  # the slot's own, in this process
        self.rate = speed_of(envs, self.inner)  # steps a second
        self.every = math.ceil(self.rate / FPS)  # steps for each frame
        self.timed = False
        self.longest = longest or getattr(getattr(self.inner, "spec", None), "max_episode_steps", None) or math.inf

    @property
    def fps(self) -> Fraction:
        """Frames a second."""
        return Fraction(self.rate / self.every).limit_denominator(1001)

    @property
    def most(self) -> int:
        """Frames of the longest film."""
        return max(int(SECONDS * self.fps), 1)

    def film(self, play: Callable[..., list[dict[str, Any]]], seed: int, tick: Callable[[], None]) -> Take:
        """Run and film the episode of one seed."""
        take, steps = Take(), 0

        def look(info: dict[str, Any]) -> None:
            nonlocal steps
            if not steps:
                take.goal = _goal(info)
                self._time_drawing()
            if steps % self.every == 0 and len(take.frames) < self.most:
                take.frames += _jpeg(self.envs.render()[0])
            steps += 1

        with self._sees_end(take):
            take.result = play(self.envs, [seed], look=look, tick=tick)[0]
        take.cut = take.result["length"] > len(take.frames) * self.every
        if take.last and not take.cut:
            take.frames = [*take.frames, take.last][: self.most]
        return take

    def _time_drawing(self) -> None:
        """Before the first frame: choose fewer of them, but one a second, where all would take too long to draw."""
        if not self.timed:
            self.envs.render()  # which also sets up the library
            began = time.monotonic()
            self.envs.render()
            seconds = (time.monotonic() - began) * EPISODES * min(SECONDS * self.rate, self.longest)
            needed = min(math.ceil(seconds / DRAWING), math.ceil(self.rate))
            self.every, self.timed = max(self.every, needed), True

    @contextmanager
    def _sees_end(self, take: Take) -> Iterator[None]:
        """Inside, `take.last` becomes the frame after an episode's last step, before a reset hides it."""
        step = getattr(self.inner, "step", None)
        if self.inner is None or step is None:
            yield
            return

        def seen(action: Any) -> Any:
            answer = step(action)
            if answer[2] or answer[3]:
                with suppress(Exception):  # of one that only draws as a vector
                    take.last = next(iter(_jpeg(self.inner.render())), b"")
            return answer

        self.inner.step = seen
        try:
            yield
        finally:
            self.inner.step = step


def speed_of(envs: Any, inner: Any) -> float:
    """Steps a second: what the environment's metadata say, or its own time step; else 30."""
    said = ((getattr(envs, "metadata", None) or {}).get("render_fps"), _inverse(getattr(inner, "unwrapped", None)))
    return next((float(x) for x in said if isinstance(x, (int, float)) and 0 < x < 10_000), 30.0)


def _inverse(env: Any) -> float | None:
    dt = getattr(env, "dt", None)
    return 1 / dt if isinstance(dt, (int, float)) and dt > 0 else None


def _subject(env: dict[str, Any]) -> str:
    """What the episodes are of: the environment's task or id, else its name."""
    texts = (env.get(key) for key in ("task", "id", "name"))
    return next((text for text in texts if isinstance(text, str) and text), "")


def _goal(info: dict[str, Any]) -> str:
    """The goal that a reset's `info` states in words, or by a number."""
    for key in GOALS:
        value = info_value(info, key, 0)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            return f"{key} {value}"
    return ""


def _jpeg(frame: Any) -> list[bytes]:
    """A frame in the size that it has in the film; nothing for no frame."""
    from PIL import Image

    if frame is None:
        return []
    picture = Image.fromarray(np.ascontiguousarray(array_of(frame), dtype=np.uint8)).convert("RGB")
    width, height = picture.size
    scale = min(1.0, LARGEST[0] / width, LARGEST[1] / height)
    factor = scale if scale < 1 else min(-(-SMALLEST // width), max(LARGEST[1] // height, 1))
    if factor != 1:
        size = (max(round(width * factor), 1), max(round(height * factor), 1))
        picture = picture.resize(size, Image.Resampling.BILINEAR if factor < 1 else Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=95, subsampling=0)
    return [file.getvalue()]


class Screen:
    """The film's pictures: a grid of episodes, each with two lines of text below it.

    Args:
        takes: The episodes.
        subject: What they are of.
        camera: That filmed them.
    """

    def __init__(self, takes: list[Take], subject: str, camera: Camera) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.takes = takes
        self.step = camera.every / camera.rate  # seconds between frames
        self.second = 1 / camera.rate  # seconds of a step
        self.fps, self.hold = camera.fps, math.ceil(HOLD * camera.fps)
        self.length = min(max(len(take.frames) for take in takes) + self.hold, camera.most)
        self.width, self.height = self._picture(takes[0].frames[0]).size
        self.width = max(self.width, SMALLEST)
        self.columns = math.ceil(math.sqrt(len(takes)))
        rows = -(-len(takes) // self.columns)
        letters = max(14, self.width // 32)
        self.line = letters + MARGIN
        self.cell = self.height + 2 * self.line
        size = (self.columns * self.width, rows * self.cell)
        self.canvas = Image.new("RGB", tuple(side + side % 2 for side in size))  # H.264's chroma is halved
        self.draw = ImageDraw.Draw(self.canvas)
        self.font = ImageFont.load_default(letters)
        titles = [(subject, take.goal, f"seed {take.result['seed']}") for take in takes]
        self.titles = [self._fitting(", ".join(filter(None, parts))) for parts in titles]

    @staticmethod
    def _picture(frame: bytes) -> Any:
        from PIL import Image

        return Image.open(io.BytesIO(frame))

    def at(self, frame: int) -> np.ndarray:
        """The picture `[H, W, 3]` of a frame; frames are asked for in their order."""
        for i, take in enumerate(self.takes):
            end = self.end(take)
            if frame > end:
                continue  # it stays
            left, top = i % self.columns * self.width, i // self.columns * self.cell
            picture = self._picture(take.frames[min(frame, len(take.frames) - 1)])
            self.canvas.paste(picture, (left + (self.width - picture.width) // 2, top))
            below = (left, top + self.height, left + self.width - 1, top + self.cell - 1)
            self.draw.rectangle(below, fill=(0, 0, 0))
            self._write(self.titles[i], GREY, left, top + self.height)
            self._write(*self.caption(take, frame, frame >= end), left, top + self.height + self.line)
        return np.asarray(self.canvas)

    def end(self, take: Take) -> int:
        """The frame from which on the result is shown: an episode's last one, or for a while at the film's end."""
        return max(self.length - self.hold, 0) if take.cut else min(len(take.frames), self.length) - 1

    def caption(self, take: Take, frame: int, ended: bool) -> tuple[str, tuple[int, int, int]]:
        """What becomes of an episode, and its colour."""
        result = take.result
        whole = result["length"] * self.second
        if not ended:
            now = f"{frame * self.step:.1f} s"
            return f"{now}, first {SECONDS:g} s of {whole:.0f} s" if take.cut else now, GREY
        colour = {None: GREY, True: GREEN, False: RED}[result["success"]]
        verdict = {None: "", True: "success", False: "failure"}[result["success"]]
        returned = f"return {number(result['return'])}"
        length = f"after {whole:.0f} s" if take.cut else f"{result['length']} steps in {whole:.1f} s"
        return ", ".join(filter(None, (verdict, returned, length))), colour

    def _write(self, text: str, colour: tuple[int, int, int], left: int, top: int) -> None:
        """One line of text."""
        self.draw.text((left + MARGIN, top + 1), self._fitting(text), fill=colour, font=self.font)

    def _fitting(self, text: str) -> str:
        """As much of a text as there is room for."""
        room = self.width - 2 * MARGIN
        text = plain(text[:room]).encode("latin-1", "replace").decode("latin-1")
        if self.font.getlength(text) > room:
            while text and self.font.getlength(text + "...") > room:
                text = text[:-1]
            text += "..."
        return text


def _encode(screen: Screen, path: Path, tick: Callable[[], None]) -> None:
    """Write all pictures as a film."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=screen.fps, options={"preset": "veryfast", "crf": "21"})
        stream.width, stream.height, stream.pix_fmt = *screen.canvas.size, "yuv420p"
        for frame in range(screen.length):
            tick()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(screen.at(frame), format="rgb24")))
        container.mux(stream.encode())
