"""Films of evaluation episodes: a grid at the environment's speed, with what became of each episode."""

import gc
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import numpy as np
import pytest

from components.acting.evaluation import run_episodes
from components.acting.film import Screen, film_episodes
from components.envs.gymnasium import GymnasiumEnv, follow_robots

RATE = 50  # steps a second


class Counted(gym.Env):
    """Each frame says in its brightness how many steps the episode has made; seed s succeeds after s steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": RATE}

    def __init__(self, limit: int) -> None:
        self.limit, self.drawn = limit, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.wanted = 0, self.wanted if seed is None else seed
        return np.zeros(2, np.float32), {"task": f"reach {self.wanted}"}

    def step(self, action: Any) -> Any:
        self.steps += 1
        done = self.steps == self.wanted
        return np.zeros(2, np.float32), 1.0, done, self.steps == self.limit, {"success": done}

    def render(self) -> Any:
        return np.full((100, 101, 3), min(2 * self.steps, 250), np.uint8)  # odd, and smaller than the text


@dataclass(frozen=True)
class Drawn:
    """Environments that can be seen."""

    limit: int = 60
    render_mode: str | None = None
    workers: int = 3

    def build(self, num_envs: int, seed: int) -> Any:
        assert self.render_mode == "rgb_array" and self.workers == 0
        same_step = gym.vector.AutoresetMode.SAME_STEP
        return gym.vector.SyncVectorEnv([lambda: Counted(self.limit)] * num_envs, autoreset_mode=same_step)


class Still:
    def reset(self, seeds: Any) -> None: ...

    def act(self, observation: Any) -> np.ndarray:
        return np.zeros((1, 1), np.float32)


def film(path: Path, factory: Any, seeds: list[int], **keywords: Any) -> str:
    play = lambda *arguments, **more: run_episodes(Still(), *arguments, **more)  # type: ignore[arg-type]  # noqa: E731
    return film_episodes(play, factory, {"name": "drawn", "task": "counting"}, seeds, path, 60.0, **keywords)


def seen(path: Path) -> tuple[np.ndarray, Fraction]:
    """All frames `[T, H, W, 3]`, and how many are shown a second."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), Fraction(rate or 0)


def test_episodes_run_side_by_side_and_the_last_frame_of_each_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    caption = Screen.caption
    monkeypatch.setattr(Screen, "caption", lambda *a: (answer := caption(*a), said.append(answer[0]))[0])
    assert film(tmp_path / "videos" / "film.mp4", Drawn(), [40, 10, 99, 20, 7]) == ""
    assert [p.name for p in (tmp_path / "videos").iterdir()] == ["film.mp4"]
    frames, fps = seen(tmp_path / "videos" / "film.mp4")
    assert fps == 25  # one step in two of 50 a second
    assert len(frames) == 31 + 38  # 60 steps, one frame more for their end, and the results for 1.5 s
    height, width = frames.shape[1] // 2, frames.shape[2] // 2
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0 and width >= 240
    middles = frames[:, [50, 50, height + 50, height + 50], [width // 2, width * 3 // 2] * 2].mean(-1)
    assert np.abs(middles[10] - [40, 20, 40, 40]).max() < 6  # frame 10 is step 20; the second ended after 10
    assert np.abs(middles[-1] - [80, 20, 120, 40]).max() < 6
    assert {"success, return 40, 40 steps in 0.8 s", "failure, return 60, 60 steps in 1.2 s", "0.4 s"} <= set(said)
    text = frames[-1, height - 20 : height, :width].reshape(-1, 3).astype(int)  # green: a success
    assert (text[:, 1] - text[:, 0]).max() > 60


def test_what_is_longer_than_20_s_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.acting.film.SECONDS", 2.0)
    said: list[str] = []
    caption = Screen.caption
    monkeypatch.setattr(Screen, "caption", lambda *a: (answer := caption(*a), said.append(answer[0]))[0])
    assert film(tmp_path / "film.mp4", Drawn(limit=200), [150]) == ""
    frames, fps = seen(tmp_path / "film.mp4")
    assert len(frames) == 50 == 2 * fps  # neither faster nor longer
    assert said[0] == "0.0 s, first 2 s of 3 s" and said[-1] == "success, return 150, after 3 s"


@pytest.mark.parametrize(
    ("render", "reason"),
    [(lambda self: None, "no frames"), (lambda self: 1 / 0, "ZeroDivisionError"), (lambda self: "x" * 9, "")],
)
def test_without_pictures_there_is_a_reason_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, render: Any, reason: str
) -> None:
    monkeypatch.setattr(Counted, "render", render)
    problem = film(tmp_path / "film.mp4", Drawn(), [3])
    assert problem and reason in problem and "\n" not in problem and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kwargs", "follows"), [("", True), ('{"camera_id": -1}', False)])
def test_the_camera_follows_a_walker_unless_another_is_asked_for(kwargs: str, follows: bool) -> None:
    pytest.importorskip("mujoco")
    envs = GymnasiumEnv("HalfCheetah-v5", render_mode="rgb_array", kwargs=kwargs).build(1, 0)
    follow_robots(envs)
    base = envs.envs[0].unwrapped
    assert base.mujoco_renderer.camera_id == (base.model.camera("track").id if follows else -1)
    envs.close()


def test_a_viewer_that_cannot_be_opened_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MUJOCO_GL", "none of them")
    again: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", again.append)
    problem = film(tmp_path / "film.mp4", GymnasiumEnv("HalfCheetah-v5", max_episode_steps=3), [3])
    gc.collect()
    assert "MUJOCO_GL must be one of" in problem and problem.endswith("apt-get install libegl1 libgl1-mesa-dri)")
    assert not again  # it would be a traceback on the screen
