"""Tasks with pictures or several ways: Meta-World's cameras, Push-T, and numbers that environments track."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import toy
from components import DATASET_BUILDER_REGISTRY, ENV_BUILDER_REGISTRY, UserError
from components.datasets.metaworld import demonstrate
from components.envs.metaworld import MetaWorldEnv
from components.envs.observations import observation_batch
from components.run.curves import read_lines
from conftest import everything

Script = Callable[..., Path]


# ---- Meta-World ----------------------------------------------------------------------------------------------------


def test_resets_without_a_seed_meet_ever_new_goals() -> None:
    """More than the one list of 50, others in each environment, and the same ones after the same seed."""
    envs = MetaWorldEnv("reach-v3").build(2, 7)
    goals = [tuple(goal) for _ in range(60) for goal in envs.reset()[0][:, -3:]]
    assert len(set(goals)) == 120
    envs.reset(seed=7)
    assert [tuple(goal) for goal in envs.reset()[0][:, -3:]] == goals[:2]


def test_the_expert_of_an_environment_is_the_one_of_the_demonstrations() -> None:
    """Also in worker processes."""
    shown = demonstrate(3, "reach-v3", 200)
    assert shown is not None
    envs = MetaWorldEnv("reach-v3", workers=1).build(1, 0)
    try:
        envs.reset(seed=[3])
        for action in shown["action"][:5]:
            assert np.array_equal(envs.expert()[0], action)
            envs.step(action[None])
    finally:
        envs.close()


# ---- Meta-World from pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """Two demonstrations with two cameras."""
    options = {
        "demos": 2,
        "cameras": ("behindGripper", "corner2"),
        "image_size": ("behindGripper=48x64", "corner2=48"),
        "cache_dir": "",
        "validation": 0.0,
    }
    try:
        return DATASET_BUILDER_REGISTRY["metaworld"](**options).build()
    except Exception as error:
        if "gl" in str(error).lower():
            pytest.skip(f"nothing can be drawn here: {error}")
        raise


def test_demonstrations_with_cameras_are_those_without(seen: dict[str, Any]) -> None:
    plain = DATASET_BUILDER_REGISTRY["metaworld"](demos=2, cache_dir="", validation=0.0).build()
    a, b = everything(seen), everything(plain)
    assert torch.equal(a["action"], b["action"]) and torch.equal(a["reward"], b["reward"])
    assert torch.equal(
        a["observation.state"], b["observation.state"][:, :4]
    )  # where object and goal are has to be seen
    for camera, width in (("behindGripper", 64), ("corner2", 48)):
        pictures = a[f"observation.images.{camera}"]
        assert pictures.shape == (len(a["action"]), 3, 48, width) and pictures.dtype == torch.uint8
        assert pictures.float().std() > 20 and not torch.equal(pictures[0], pictures[-1])
    assert seen["env"]["cameras"] == ("behindGripper", "corner2") and "cameras" not in plain["env"]
    steps = seen["dataset"].transitions().get_batch(torch.tensor([0]))
    following = everything(seen)["observation.images.corner2"][1]
    assert torch.equal(steps["next.observation.images.corner2"][0], following)


def test_the_environment_shows_what_the_demonstrations_show(seen: dict[str, Any]) -> None:
    """The same goal, the same first picture; evaluation needs no more."""
    options = {key: value for key, value in seen["env"].items() if key != "name"}
    envs = MetaWorldEnv(**options).build(2, 0)
    observation, _ = envs.reset(seed=[3, 4])
    named = observation_batch(observation)
    assert named["observation.state"].shape == (2, 4) and named["observation.images.corner2"].shape == (2, 3, 48, 48)
    assert named["observation.images.behindGripper"].shape == (2, 3, 48, 64)
    again = observation_batch(envs.reset(seed=[3, 5])[0])
    assert np.array_equal(named["observation.images.corner2"][0], again["observation.images.corner2"][0])
    assert not np.array_equal(named["observation.images.corner2"][1], again["observation.images.corner2"][1])
    envs.close()


def test_an_unknown_camera_is_named(seen: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Meta-World has no camera 'behindgripper'; nearest: behindGripper"):
        DATASET_BUILDER_REGISTRY["metaworld"](demos=1, cameras=("behindgripper",), cache_dir="").build()
    with pytest.raises(UserError, match="--env.image-size 4: expected a height .* of 8 to 4096 pixels"):
        ENV_BUILDER_REGISTRY["metaworld"](cameras=("corner2",), image_size=4).build(1, 0)
    with pytest.raises(UserError, match="--dataset.image-size: no size for the camera 'corner'; add corner=64x64"):
        cameras = ("corner", "corner2")
        DATASET_BUILDER_REGISTRY["metaworld"](cameras=cameras, image_size=("corner2=48x64",)).build()
    with pytest.raises(UserError, match="--dataset.image-size 48: the data has no pictures; see --dataset.cameras"):
        DATASET_BUILDER_REGISTRY["metaworld"](image_size=48).build()


# ---- Push-T --------------------------------------------------------------------------------------------------------


def push_t(path: Path, **changes: Any) -> str:
    """A file of two episodes, of six and four steps."""
    rng = np.random.default_rng(0)
    arrays = {"state": rng.uniform(0, 500, (10, 5)).astype(np.float32), "episode_ends": np.array([6, 10])}
    arrays |= {"action": rng.uniform(0, 500, (10, 2)).astype(np.float32), "reward": np.linspace(0, 1, 10)} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_push_t_demonstrations(tmp_path: Path) -> None:
    path = push_t(tmp_path / "t.npz")
    built = DATASET_BUILDER_REGISTRY["pusht"](path=path, validation=0.0, action_steps=3).build()
    batch = everything(built)
    with np.load(path) as arrays:
        assert np.array_equal(batch["observation.state"], arrays["state"])
        assert np.array_equal(batch["action"][:, 0], arrays["action"])
    assert batch["action_is_pad"].sum(1).tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 1, 2]
    assert batch["terminated"].tolist() == [False] * 9 + [True] and built["env"] == {"name": "pusht"}
    path = push_t(tmp_path / "plain.npz", reward=None)
    assert "reward" not in everything(DATASET_BUILDER_REGISTRY["pusht"](path=path, validation=0.0).build())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": None}, "no 'action'; found: .*; expected a npz file of Push-T"),
        ({"episode_ends": np.array([6, 6, 10])}, "episode_ends must be whole numbers that grow"),
        ({"episode_ends": np.array([6, 9])}, r"'state' has shape \(10, 5\), expected \(9, 5\)"),
        ({"state": np.zeros((10, 4))}, r"'state' has shape \(10, 4\), expected \(10, 5\)"),
        ({"reward": np.zeros(3)}, r"'reward' has shape \(3,\), expected \(10,\)"),
        ({"action": np.full((10, 2), np.nan)}, "20 NaN or Inf values in 'action'"),
    ],
)
def test_push_t_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DATASET_BUILDER_REGISTRY["pusht"](path=push_t(tmp_path / "t.npz", **changes)).build()
    with pytest.raises(UserError, match="absent.npz"):
        DATASET_BUILDER_REGISTRY["pusht"](path=str(tmp_path / "absent.npz")).build()


def test_push_t_is_simulated(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht", reason="pip install gym-pusht")
    data = ("--dataset", "pusht", "--dataset.path", push_t(tmp_path / "t.npz"), "--steps", 2, "--batch-size", 4)
    run = script("--trainer", "bc", *data, "--eval-episodes", 2, "--env.max-episode-steps", 20)
    line = read_lines(run / "eval.jsonl")[-1]
    assert 0 <= line["coverage_final"] <= line["coverage_max"] <= 1 and line["length_mean"] <= 20
    assert line["env"] == {"name": "pusht", "max_episode_steps": 20, "render_mode": None, "workers": 0}


# ---- tracked numbers -----------------------------------------------------------------------------------------------


class Tracked(toy.ToyEnv):
    """Tells how far it is: 3, 1, 4, 1, 5, 9, ... at each step."""

    def step(self, action: np.ndarray) -> Any:
        *rest, info = super().step(action)
        return (*rest, info | {"digits": float("314159265358"[self.count - 1])})


def test_the_last_and_the_largest_of_a_tracked_number(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Factory:
        def build(self, num_envs: int, seed: int) -> Any:
            envs: Any = gym.vector.SyncVectorEnv([Tracked] * num_envs)
            envs.tracked = ("digits", "absent")
            return envs

    monkeypatch.setitem(ENV_BUILDER_REGISTRY, "tracked", Factory)
    run = script("--trainer", "bc", "--env", "tracked", "--steps", 2, "--eval-episodes", 3, "--eval-envs", 2)
    line = read_lines(run / "eval.jsonl")[-1]
    assert line["digits_final"] == 3.0 and line["digits_max"] == 9.0  # of ten steps; absent ones are left out
    assert "absent_final" not in line
