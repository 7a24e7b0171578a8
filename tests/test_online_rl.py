"""Online RL through the script: every trainer, from an offline run, beside a dataset, on top of a frozen policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy
from components import TRAINER_REGISTRY, UserError, load_policy
from components.curves import read_lines
from conftest import difference, learned, states, weights
from test_offline import interrupt_after

Script = Callable[..., Path]
CONTINUED = ("iql", "awac", "cql", "td3_bc", "rebrac", "fql", "qc")
# A small run of every trainer for the online script; some have a dataset beside.
LEARNERS: dict[str, tuple[object, ...]] = {
    "ppo": toy.ONLINE_ALONE["ppo"],
    "dqn": toy.ONLINE_ALONE["dqn"],
    "rlpd": (*toy.ONLINE_ALONE["rlpd"], "--env", "savable"),
    "sac": toy.SAC,
    "td3": ("--trainer", "td3", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16),
}
DATA = ("--dataset", "toy", *toy.UNIT)


def small(name: str) -> tuple[object, ...]:
    """A trainer's options without those of a dataset."""
    words = [word for word in toy.TRAINERS[name] if word not in (*toy.UNIT, "--normalise", *toy.PLAIN)]
    return (*words, "--env", "savable")


# ---- every trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_every_trainer_resumes_exactly(online: Script, name: str) -> None:
    """In the middle of a rollout, too: its parts, statistics, exploration and own counts go on."""
    env = () if "--env" in LEARNERS[name] else ("--env", "savable")
    options = (*LEARNERS[name], *env, "--steps", 60, "--save-every", 14, "--eval-every", 30, "--eval-episodes", 2)
    whole = online(*options, folder="whole")
    interrupt_after(online, 3 if name == "ppo" else 12, *options)
    run = online("--resume", whole.parent / "run")
    assert states(run) == states(whole) and learned(run) == learned(whole)
    for log in ("eval.jsonl", "episodes.jsonl"):
        assert (run / log).read_text() == (whole / log).read_text()


def test_there_is_a_small_run_of_every_trainer_that_learns_online() -> None:
    assert set(LEARNERS) >= set(toy.ONLINE_ALONE)


def test_ppo_learns_the_toy(online: Script) -> None:
    options = ("--trainer", "ppo", "--trainer.discount", 0.5, "--num-envs", 4, "--trainer.rollout", 50)
    run = online(*options, "--steps", 6000, "--optimizer.lr", 3e-3, "--log-every", 500)
    returns = [line["train/episode_return"] for line in read_lines(run / "metrics.jsonl")]
    assert returns[-1] > 0.5 * returns[0]  # returns are negative


def test_dqn_learns_to_choose(online: Script) -> None:
    options = (*toy.ONLINE_ALONE["dqn"], "--steps", 1500, "--learning-starts", 100, "--optimizer.lr", 3e-3)
    run = online(*options, "--trainer.exploration-steps", 500, "--trainer.discount", 0.5, "--log-every", 250)
    returns = [line["train/episode_return"] for line in read_lines(run / "metrics.jsonl")]
    assert returns[0] < 5 and returns[-1] > 7  # of 10; at random 3.3
    policy = load_policy(run)
    action = policy.act({"observation.state": np.eye(3, 5, dtype=np.float32) * 3})
    assert action.dtype == np.int64 and action.tolist() == [0, 1, 2]


# ---- on from an offline run, and beside a dataset ------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTINUED)
def test_an_offline_run_goes_on_online(script: Script, online: Script, name: str) -> None:
    """What is handed over acts as it did, and learns from a mix of old and new data."""
    more = ("--trainer.calibrated",) if name == "cql" else ()
    before = script(*toy.TRAINERS[name], *more, "--steps", 30, "--eval-episodes", 4, folder="offline")
    mixed = (*DATA, "--dataset.ratio", 0.25, "--eval-episodes", 4, "--eval-every", 40, "--reward-scale", 1)
    run = online(*small(name), *more, "--init-from", before, *mixed, "--steps", 60, folder="online")
    last, first = read_lines(before / "eval.jsonl")[-1], read_lines(run / "eval.jsonl")[0]
    assert first["step"] == 0 and first["return_mean"] == pytest.approx(last["return_mean"], rel=1e-6)
    lines = read_lines(run / "metrics.jsonl")
    assert lines[-1]["updates"] == 40 and difference(weights(run), weights(before)) > 0
    assert load_policy(run).act({"observation.state": np.zeros(5, np.float32)}).shape == (2,)


def test_the_steps_before_learning_are_the_policys_own(script: Script, online: Script) -> None:
    before = script(*toy.TRAINERS["td3_bc"], "--steps", 300, "--optimizer.lr", 1e-2, folder="offline")
    options = (*small("td3_bc"), "--learning-starts", 50, "--steps", 60, "--trainer.exploration-noise", 0)
    own = online(*options, "--init-from", before, folder="own")
    random = online(*options, folder="random")
    returns = [[e["episode_return"] for e in read_lines(run / "episodes.jsonl")] for run in (own, random)]
    assert min(returns[0]) > max(returns[1])  # a clone of an expert against random actions


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_the_dataset_is_exact(online: Script, monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """The dataset's actions are an expert's, those of the new transitions are not."""
    shares = []
    whole = TRAINER_REGISTRY["rlpd"].train_step

    def train_step(self: Any, data: dict[str, Any]) -> dict[str, Any]:
        expert = (data["observation.state"] @ toy.EXPERT / 5 - data["action"]).abs().amax(1) < 0.05
        shares.append(float(expert.float().mean()))
        return whole(self, data)

    monkeypatch.setattr(TRAINER_REGISTRY["rlpd"], "train_step", train_step)
    online(*LEARNERS["rlpd"], "--dataset.ratio", ratio, "--steps", 60)
    assert shares and all(abs(share - ratio) <= 1 / 16 for share in shares), shares  # a new one may be right by chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer", "rlpd"), "--trainer rlpd learns from old transitions, too; name them"),
        (
            (*LEARNERS["rlpd"], "--dataset.ratio", 0.3),
            "--dataset.ratio 0.3 of 16 samples is no whole number; use 0.3125",
        ),
        ((*LEARNERS["rlpd"], "--dataset.ratio", 1.5), "--dataset.ratio 1.5 must be a share from 0 to 1"),
        ((*toy.SAC, "--dataset.ratio", 0.5), "--dataset.ratio is a share of a dataset; choose one with --dataset"),
        ((*toy.SAC, "--dataset", "toy", "--env", "goal"), "unknown env|invalid choice"),
        (("--trainer", "ppo", "--buffer-size", 100), "--buffer-size: ppo learns from rollouts of its own policy"),
        (("--trainer", "ppo", "--dataset", "toy"), "--dataset: ppo learns from rollouts of its own policy"),
        (("--trainer", "ppo", "--batch-size", 64, "--trainer.rollout", 10), "64 samples are more than the rollout"),
        (("--trainer", "dqn"), "discrete actions, and these are not"),
        (("--trainer", "residual"), "--trainer.base is needed: the run folder of the policy to correct"),
        (("--trainer", "residual", "--trainer.base", "nowhere"), "nowhere: no policy here"),
        ((*toy.SAC, "--init-from", "nowhere"), "nowhere: no"),
        ((*toy.SAC, "--save-what", "collected", "--save-dataset", "/"), "--save-dataset /: exists already"),
        (("--trainer", "ppo", "--save-what", "collected", "--save-dataset", "x"), "rollouts are not kept"),
        ((*toy.SAC, "--env.wrappers", "RescaleActoin"), "no wrapper of gymnasium.wrappers; nearest: RescaleAction"),
        ((*toy.SAC, "--env.wrappers", "RescaleAction:[1"), "expected NAME:JSON with an object"),
        ((*toy.SAC, "--env.workers", -1), "--env.workers -1 must be 0 or more"),
    ],
)
def test_bad_input_gets_one_line_before_step_1(online: Script, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises((UserError, SystemExit), match=message):
        online(*options)
    assert not (tmp_path / "run").exists()
