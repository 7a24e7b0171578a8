"""Minutes long: the default command as a user runs it, kill -9, and the compiled losses."""

import gc
import json
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import toy
from components import load_policy
from components.data.batches import Batches
from components.run.curves import read_lines
from conftest import ROOT, build, command, difference, two_processes, weights

pytestmark = [pytest.mark.slow, pytest.mark.launched]
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")


def check_default_run(run: Path) -> None:
    """What the README promises of the default command."""
    last = read_lines(run / "eval.jsonl")[-1]
    assert last["success_rate"] >= 0.95 and last["episodes"] == 50
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    for name in ("args.json", "metrics.jsonl", "curves.png", "policy/model.safetensors", "policy/policy.json"):
        assert (run / name).stat().st_size > 0
    assert load_policy(run).inference["obs_steps"] == 1


def test_the_default_command_reaches_095_on_goals_it_has_not_seen(tmp_path: Path) -> None:
    done = command(*LAUNCH, ROOT / "offline_trainer.py", "--trainer", "bc", cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    check_default_run(run)
    if not (run / "videos").exists():
        assert done.stdout.count("no video: ") == 1
    again = command(sys.executable, "-m", "components.evaluate", run, "--eval-episodes", 10, cwd=ROOT)
    assert again.returncode == 0 and read_lines(run / "eval.jsonl")[-1]["episodes"] == 10
    report = command(sys.executable, "-m", "components.report", run, "--out", tmp_path / "report.png", cwd=ROOT)
    assert "success_rate" in report.stdout and (tmp_path / "report.png").stat().st_size > 10_000


def test_another_seed_does_as_well_on_two_processes(tmp_path: Path) -> None:
    options = ("--trainer", "bc", "--seed", 1, "--steps", 1000, "--eval-every", 0)
    done = two_processes(ROOT / "offline_trainer.py", *options, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    check_default_run(run)
    assert json.loads((run / "args.json").read_text())["world_size"] == 2


def test_lerobot_files_through_the_launcher(tmp_path: Path) -> None:
    path = ROOT / "tests" / "fixtures" / "lerobot_v30_image"
    options = ("--trainer", "bc", "--dataset", "lerobot", "--dataset.path", path, "--steps", 200)
    done = command(*LAUNCH, "--mixed_precision", "bf16", ROOT / "offline_trainer.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no environment is known" in done.stdout and "the default of 256 is more than the data" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    lines = read_lines(run / "metrics.jsonl")
    assert lines[-1]["train/loss"] < 0.5 * lines[0]["train/loss"]
    assert json.loads((run / "args.json").read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize("names", [("bc", "sac-two"), ("bc-two", "residual")])
def test_kill_9_at_random_moments_loses_nothing(names: tuple[str, ...]) -> None:
    options = ("--configurations", *names, "--kills", 7, "--seed", 1)
    done = command(sys.executable, ROOT / "tests" / "killer.py", *options, cwd=ROOT, timeout=400)
    assert done.returncode == 0 and " 0 lost, 0 different" in done.stdout, done.stdout + done.stderr
    kills, inside = re.search(r"2 configurations: (\d+) kills, (\d+) inside a save", done.stdout).groups()
    assert int(kills) >= 14 and int(inside) >= 3


SAC = (ROOT / "online_trainer.py", "--trainer", "sac", "--run-dir", "run")


def check_pendulum(run: Path, steps: int, processes: int) -> None:
    """It learns, as fast on two processes as on one, and the policy does what a person would."""
    evaluations = {line["step"]: line["return_mean"] for line in read_lines(run / "eval.jsonl")}
    assert evaluations[1000] < -1000 and max(value for step, value in evaluations.items() if step >= 3000) > -400
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == steps - 1000
    assert json.loads((run / "args.json").read_text())["world_size"] == processes
    policy = load_policy(run)
    for angle in (-0.3, 0.3):  # leaning and still: it pushes back up, in the environment's own units
        policy.reset()
        state = np.array([np.cos(angle), np.sin(angle), 0.0], dtype=np.float32)
        action = float(policy.act({"observation.state": state})[0])
        assert 1 < -action * np.sign(angle) <= 2


def test_sac_solves_pendulum_and_its_episodes_are_cloned(tmp_path: Path) -> None:
    """The circle: what the policy does in the end is a dataset that the other script learns from.

    Its batches are smaller, which takes half as long; the default ones are those of the two processes below.
    """
    options = ("--steps", 6000, "--batch-size", 128, "--save-dataset", "data")
    done = command(*LAUNCH, *SAC, *options, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    check_pendulum(tmp_path / "run", 6000, 1)
    last = read_lines(tmp_path / "run" / "eval.jsonl")[-1]
    assert last["return_mean"] > -200 and last["episodes"] == 20
    options = ("--trainer", "bc", "--dataset", "minari", "--dataset.path", "data")
    options += ("--run-dir", "clone", "--steps", 1500, "--eval-every", 0)
    done = command(*LAUNCH, ROOT / "offline_trainer.py", *options, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "clone" / "eval.jsonl")[-1]["return_mean"] > -200


SOLVED: dict[str, tuple[float, tuple[object, ...]]] = {
    "td3": (
        -200,
        ("--steps", 8000, "--learning-starts", 1000, "--num-envs", 4) + ("--batch-size", 64, "--optimizer.lr", 1e-3),
    ),
    "ppo": (475, ("--env.id", "CartPole-v1", "--steps", 30_720)),
    "dqn": (
        475,
        ("--steps", 30_000, "--learning-starts", 1000, "--num-envs", 4, "--buffer-size", 30_000, "--batch-size", 64)
        + ("--optimizer.lr", 2.3e-3, "--optimizer.schedule", "linear", "--model.hidden-dims", 256, 256)
        + ("--updates-per-step", 0.5, "--trainer.target-every", 5, "--trainer.exploration-steps", 6000),
    ),
}


@pytest.mark.parametrize("name", SOLVED)
def test_a_classic_task_is_solved_within_its_budget(tmp_path: Path, name: str) -> None:
    """Pendulum-v1 by continuous actions, CartPole-v1 by discrete ones, in one of the evaluations of 20 episodes."""
    least, options = SOLVED[name]
    options += ("--eval-every", 5000, "--log-every", 1000, "--run-dir", "run")
    done = command(*LAUNCH, ROOT / "online_trainer.py", "--trainer", name, *options, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    evaluations = read_lines(tmp_path / "run" / "eval.jsonl")
    assert max(line["return_mean"] for line in evaluations) >= least and evaluations[-1]["episodes"] == 20


def test_sac_on_two_processes_learns_as_fast(tmp_path: Path) -> None:
    done = two_processes(*SAC, "--steps", 3500, "--eval-every", 1000, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    check_pendulum(tmp_path / "run", 3500, 2)


DIT = ("--trainer", "flow", "--model", "dit", "--model.width", 16, "--model.layers", 1, "--dataset.action-steps", 8)
OF_FLOW = {
    "flow": (*DIT, "--model.experts", 3),
    "shortcut": (*DIT, "--trainer.objective", "shortcut"),
}  # the U-Net, longer, with diffusion


@pytest.mark.parametrize("name", [*toy.TRAINERS, "shortcut"])
def test_compiled_losses_train_the_same(script: Callable[..., Path], name: str) -> None:
    """What is drawn, too; dropout is on where a trainer has it by default."""
    options = OF_FLOW.get(name) or toy.TRAINERS[name]
    options += ("--optimizer", "sgd", "--optimizer.lr", 0.01, "--steps", 30)
    options += ("--model.dropout", 0.1) if name in ("bc", "act") else ()
    eager = script(*options, folder="eager")
    compiled = script(*options, "--compile", folder="compiled")
    torch._dynamo.reset()
    assert difference(weights(eager), weights(compiled)) < 1e-5


@pytest.mark.parametrize("name", ["ppo", "dqn", "rlpd"])
def test_compiled_losses_train_the_same_online(online: Callable[..., Path], name: str) -> None:
    options = (*toy.ONLINE_ALONE[name], "--optimizer", "sgd", "--optimizer.lr", 0.01)
    options += ("--env", "savable") * ("--env" not in options)
    eager = online(*options, folder="eager")
    compiled = online(*options, "--compile", folder="compiled")
    torch._dynamo.reset()
    model = "critic" if name == "dqn" else "policy"
    assert difference(weights(eager, model), weights(compiled, model)) < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lerobot_v30_video", {"cameras": ("corner2",)}),
        ("zarr/push_replay.zarr", {"cameras": ("img",)}),
    ],
)
def test_memory_stays_flat_over_three_thousand_batches(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Of this process and its workers, from batch 1000 on; the shared pages of a store count once."""
    dataset = build(name, cache_dir=str(tmp_path), **options)["dataset"]

    def used() -> int:
        me = psutil.Process()
        return sum(process.memory_full_info().pss for process in (me, *me.children(recursive=True)))

    with closing(Batches(dataset, 1, seed=0, workers=2).stream(0)) as stream:
        for number, _ in zip(range(3_000), stream, strict=False):
            if number == 1000:
                gc.collect()
                before = used()
        gc.collect()
        after = used()
    assert after < 1.03 * before + 1e6, (before, after)
