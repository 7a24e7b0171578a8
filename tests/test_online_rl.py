"""Online RL through the script: every trainer, from an offline run, beside a dataset, on top of a frozen policy."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import toy
from components import TRAINER_REGISTRY, UserError, load_policy
from components.acting.evaluation import Evaluator
from components.contracts import Window
from components.data.fingerprint import changes, fingerprint
from components.data.normalisation import RunningStatistics
from components.datasets import convert, inspect
from components.datasets.episodes import build as build_episodes
from components.datasets.episodes import from_columns
from components.datasets.mixture import MixtureDataset
from components.datasets.transitions import Transitions, transitions
from components.envs.gymnasium import GymnasiumEnv
from components.envs.vector import Environments
from components.experience import recording
from components.experience.frozen_base import BASE_ACTION, Middle, OnTop, relabelled
from components.experience.memory import Mixed
from components.experience.replay import ReplayBuffer
from components.run import checkpoint
from components.run.curves import read_lines
from conftest import build, difference, everything, learned, states, weights
from test_offline import interrupt_after

Script = Callable[..., Path]
CONTINUED = ("iql", "awac", "cql", "td3_bc", "rebrac", "fql", "ifql", "qc", "qc best_of_n", "recap")
# A small run of every trainer for the online script; some have a dataset beside.
LEARNERS: dict[str, tuple[object, ...]] = {
    "ppo": toy.ONLINE_ALONE["ppo"],
    "dqn": toy.ONLINE_ALONE["dqn"],
    "rlpd": (*toy.ONLINE_ALONE["rlpd"], "--env", "savable"),
    "dagger": (*toy.ONLINE_ALONE["dagger"], "--trainer.beta", 0.5, "--trainer.share", 0.7, "--trainer.iteration", 10),
    "sac": toy.SAC,
    "td3": ("--trainer", "td3", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16),
    "qc": ("--trainer", "qc", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16)
    + ("--model.flow.hidden-dims", 16),
    "ifql": ("--trainer", "ifql", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16, *toy.SMALL_VALUE),
}
DATA = ("--dataset", "toy", *toy.UNIT)


def small(name: str) -> tuple[object, ...]:
    """A trainer's options without those of a dataset."""
    words = [word for word in toy.TRAINERS[name] if word not in (*toy.UNIT, "--normalise", *toy.PLAIN)]
    return (*words, "--env", "savable")


# ---- every trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_every_trainer_resumes_exactly(online: Script, name: str) -> None:
    """In the middle of a rollout or a chunk, too: its parts, statistics, exploration and own counts go on."""
    env = () if "--env" in LEARNERS[name] else ("--env", "savable")
    options = (*LEARNERS[name], *env, "--steps", 60, "--save-every", 14, "--eval-every", 30, "--eval-episodes", 2)
    options = (*options, "--log-every", 7)
    whole = online(*options, folder="whole")
    interrupt_after(online, 3 if name == "ppo" else 12, *options)
    run = online("--resume", whole.parent / "run")
    assert states(run) == states(whole) and learned(run) == learned(whole)
    for log in ("eval.jsonl", "episodes.jsonl"):
        assert (run / log).read_text() == (whole / log).read_text()


def test_there_is_a_small_run_of_every_trainer_that_learns_online() -> None:
    assert set(LEARNERS) >= set(toy.ONLINE_ALONE) - {"residual", "dsrl"}


def test_ppo_learns_the_toy(online: Script) -> None:
    options = ("--trainer", "ppo", "--trainer.discount", 0.5, "--num-envs", 4, "--trainer.rollout", 50)
    options += ("--trainer.epochs", 4, "--batch-size", 50, "--optimizer.lr", 3e-3)
    run = online(*options, "--steps", 6000, "--log-every", 500)
    returns = [line["train/episode_return"] for line in read_lines(run / "metrics.jsonl")]
    assert returns[-1] > 0.75 * returns[0]  # returns are negative


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
    name, *method = name.split()
    more = (
        ("--trainer.calibrated",)
        if name == "cql"
        else ("--trainer.method", *method, "--freeze", "policy")
        if method
        else ()
    )
    before = script(*toy.TRAINERS[name], *more, "--steps", 30, "--eval-episodes", 4, folder="offline")
    mixed = (*DATA, "--dataset.ratio", 0.25, "--eval-episodes", 4, "--eval-every", 40, "--reward-scale", 1)
    run = online(*small(name), *more, "--init-from", before, *mixed, "--steps", 60, folder="online")
    last, first = read_lines(before / "eval.jsonl")[-1], read_lines(run / "eval.jsonl")[0]
    assert first["step"] == 0 and first["return_mean"] == pytest.approx(last["return_mean"], rel=1e-6)
    lines = read_lines(run / "metrics.jsonl")
    learnt = "flow" if method else "policy"
    assert lines[-1]["updates"] == 40 and difference(weights(run, learnt), weights(before, learnt)) > 0
    assert load_policy(run).act({"observation.state": np.zeros(5, np.float32)}).shape == (2,)


def test_the_steps_before_learning_are_the_policys_own(script: Script, online: Script) -> None:
    before = script(*toy.TRAINERS["td3_bc"], "--steps", 300, "--optimizer.lr", 1e-2, folder="offline")
    options = (*small("td3_bc"), "--learning-starts", 50, "--steps", 60, "--trainer.exploration-noise", 0)
    own = online(*options, "--init-from", before, folder="own")
    random = online(*options, folder="random")
    returns = [[e["episode_return"] for e in read_lines(run / "episodes.jsonl")] for run in (own, random)]
    assert np.mean(returns[0]) > np.mean(returns[1]) + 5  # a clone of an expert against random actions


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
        (("--trainer", "rlpd"), "--trainer rlpd also learns from a dataset; name one"),
        (
            (*LEARNERS["rlpd"], "--dataset.ratio", 0.3),
            "--dataset.ratio 0.3 of 16 samples is not a whole number; use 0.3125",
        ),
        ((*LEARNERS["rlpd"], "--dataset.ratio", 1.5), "--dataset.ratio 1.5 must be a share from 0 to 1"),
        ((*toy.SAC, "--dataset.ratio", 0.5), "--dataset.ratio is a share of a dataset; choose one with --dataset"),
        ((*toy.SAC, "--dataset", "toy", "--env", "goal"), "unknown env|invalid choice"),
        (("--trainer", "ppo", "--buffer-size", 100), "--buffer-size: ppo learns from rollouts of its own policy"),
        (("--trainer", "ppo", "--dataset", "toy"), "--dataset: ppo learns from rollouts of its own policy"),
        (("--trainer", "ppo", "--batch-size", 64, "--trainer.rollout", 10), "64 samples are more than the rollout"),
        (("--trainer", "ppo", "--trainer.rollout", 0), "--trainer.rollout 0 must be 1 or more"),
        (("--trainer", "hiql"), "--trainer hiql learns from a dataset as a whole"),
        (("--trainer", "bc"), "--trainer bc imitates demonstrations, not its own experience; run it by offline"),
        (("--trainer", "diffusion", "--dataset", "toy"), "--trainer diffusion imitates"),
        (("--trainer", "dqn"), "discrete actions, and these are vectors; use --trainer ppo, sac"),
        *(
            (
                ("--trainer", name, "--env.id", "CartPole-v1"),
                f"{name} produces vectors, and the actions are discrete; use --tra",
            )
            for name in ("td3", "iql", "rebrac")
        ),
        ((*toy.SAC, "--env.wrappers", "ClipAction"), r"actions without bounds \(.*expected bounds that are finite"),
        (("--trainer", "residual"), "--trainer.base is needed: the run folder of the policy to correct"),
        (("--trainer", "residual", "--trainer.base", "nowhere"), "nowhere: no policy here"),
        ((*toy.SAC, "--init-from", "nowhere"), "nowhere: no"),
        ((*toy.SAC, "--save-what", "collected", "--save-dataset", "/"), "--save-dataset /: exists already"),
        (("--trainer", "ppo", "--save-what", "collected", "--save-dataset", "x"), "rollouts are not kept"),
        ((*toy.SAC, "--save-dataset", "/proc/x"), "--save-dataset /proc/x: .*; choose another folder"),
        ((*toy.SAC, "--env.wrappers", "RescaleActoin"), "no wrapper of gymnasium.wrappers; nearest: RescaleAction"),
        ((*toy.SAC, "--env.wrappers", "RescaleAction:[1"), "expected NAME:JSON with an object"),
        ((*toy.SAC, "--env.workers", -1), "--env.workers -1 must be 0 or more"),
    ],
)
def test_bad_input_gets_one_line_before_step_1(online: Script, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises((UserError, SystemExit), match=message):
        online(*options)
    assert not (tmp_path / "run").exists()


# ---- on top of a frozen policy -------------------------------------------------------------------------------------


@pytest.fixture
def frozen(script: Script) -> Path:
    """A run whose policy looks back and plans in chunks."""
    options = ("--trainer", "bc", "--dataset.action-steps", 4, "--dataset.obs-steps", 2, "--steps", 200)
    return script(*options, "--policy.action-steps", 3, "--eval-episodes", 4, folder="frozen")


STATE = "observation.state"
RESIDUAL = ("--trainer", "residual", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16)
RESIDUAL += ("--updates-per-step", 1)


def test_a_residual_policy_begins_as_the_frozen_one_and_leaves_it_as_it_was(online: Script, frozen: Path) -> None:
    before = hashlib.sha256((frozen / "policy" / "model.safetensors").read_bytes()).hexdigest()
    options = ("--trainer.base", frozen, "--env", "savable", "--eval-episodes", 4, "--eval-every", 30)
    run = online(*RESIDUAL, *options, "--model.final-scale", 1e-6)
    evaluations = read_lines(run / "eval.jsonl")
    last = read_lines(frozen / "eval.jsonl")[-1]
    assert [line["step"] for line in evaluations] == [0, 30, 60]
    assert evaluations[0]["return_mean"] == pytest.approx(last["return_mean"], rel=1e-4)
    kept = run / "policy" / "base" / "model.safetensors"
    assert (
        hashlib.sha256(kept.read_bytes()).hexdigest()
        == before
        == json.loads((run / "policy" / "residual.json").read_text())["sha256"]
    )
    assert not {name for name in checkpoint.newest(run / "checkpoints")[1]["shapes"] if "base" in name}
    policy = load_policy(run)
    envs = toy.Savable().build(4, 0)
    found = recording_of(policy, envs, evaluations[-1]["seeds"])
    assert found == pytest.approx(evaluations[-1]["return_mean"], rel=1e-5)  # alone it acts as it did in training
    assert policy.inference["action_steps"] == 3 and "observation.base_action" not in policy.observation_keys
    kept.write_bytes((run / "policy" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="weights"):
        load_policy(run)


def test_a_residual_policy_of_an_older_version_acts_as_it_did_and_learns_no_further(
    online: Script, frozen: Path
) -> None:
    """It clipped the sum alone, and its critics learnt the value of corrections."""
    run = online(*RESIDUAL, "--trainer.base", frozen, "--env", "savable", "--steps", 22)
    base, correction = np.array([9.0, -6.0]), np.array([-0.5, 1.0])
    assert load_policy(run).bounds.corrected(base, correction) == pytest.approx([4.25, -3.5])
    for folder in (run / "policy", checkpoint.newest(run / "checkpoints")[0]):
        record = json.loads((folder / "residual.json").read_text())
        assert record.pop("clips")
        (folder / "residual.json").write_text(json.dumps(record))
    assert load_policy(run / "policy").bounds.corrected(base, correction) == pytest.approx([5, -4.5])
    for options in (("--resume", run), (*RESIDUAL, "--trainer.base", frozen, "--env", "savable", "--init-from", run)):
        with pytest.raises(UserError, match="an older version's critics learnt the value of its corrections"):
            online(*options, "--steps", 30, folder="further")


def test_a_residual_run_resumes_in_the_middle_of_a_plan(online: Script, script: Script) -> None:
    """The frozen policy's plan, history and noise are a part of the environments."""
    chunks = ("--dataset.action-steps", 8, "--policy.action-steps", 3, "--model.channels", 16)
    base = script("--trainer", "flow", *chunks, "--steps", 5, folder="drawing")
    options = (*RESIDUAL, "--trainer.base", base, "--env", "savable", "--save-every", 14)
    whole = online(*options, folder="whole")
    interrupt_after(online, 12, *options)
    run = online("--resume", whole.parent / "run")
    assert states(run) == states(whole)
    assert (run / "episodes.jsonl").read_text() == (whole / "episodes.jsonl").read_text()


def test_an_episode_is_logged_once_also_if_its_line_is_later_than_the_checkpoint(online: Script) -> None:
    options = (*toy.SAC, "--env", "savable", "--steps", 100, "--save-every", 44)
    whole = online(*options, folder="whole")
    interrupt_after(online, 36, *options)  # after the line of step 50, which has the episodes from before the save
    assert read_lines(whole.parent / "run" / "episodes.jsonl")
    run = online("--resume", whole.parent / "run")
    assert (run / "episodes.jsonl").read_text() == (whole / "episodes.jsonl").read_text()


@dataclass(frozen=True)
class Drawn(toy.Savable):
    """Toys that can be seen."""

    render_mode: str | None = None

    def build(self, num_envs: int, seed: int) -> Any:
        envs = super().build(num_envs, seed)
        envs.metadata = envs.metadata | {"render_modes": ["rgb_array"]}
        envs.render = lambda: [np.zeros((64, 64, 3), np.uint8)] * num_envs
        return envs


def test_a_residual_policy_is_filmed_after_its_run(online: Script, frozen: Path, tmp_path: Path) -> None:
    run = online(*RESIDUAL, "--trainer.base", frozen, "--env", "savable", "--steps", 30)
    envs = Environments(Drawn().build, 2, 0, 10.0)
    evaluator = Evaluator(load_policy(run), envs, {"name": "drawn"}, range(3), options=Drawn())
    assert evaluator.evaluate(30)[1] == evaluator.film(tmp_path / "film.mp4") == ""
    assert (tmp_path / "film.mp4").stat().st_size > 0


def recording_of(policy: Any, envs: Any, seeds: list[int]) -> float:
    """Mean return of one episode a seed."""
    observation, _ = envs.reset(seed=seeds)
    policy.reset(seeds=seeds)
    total = np.zeros(len(seeds))
    for _ in range(toy.LENGTH):
        observation, reward, *_ = envs.step(policy.act({"observation.state": observation}).clip(-5, 5))
        total += reward
    return float(total.mean())


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_the_frozen_policy_sees_whole_episodes_in_any_autoreset_mode(frozen: Path, mode: str) -> None:
    """What it would do is what it does alone, also after the last step of an episode and in the next one."""
    make = lambda: OnTop(gym.vector.SyncVectorEnv([toy.ToyEnv] * 2, autoreset_mode=mode), load_policy(frozen), 0.5)  # noqa: E731
    envs, alone = make(), [load_policy(frozen) for _ in range(2)]
    observation, _ = envs.reset(seed=[3, 4])
    half = envs.sum.half

    def check(row: int, seen: dict[str, Any]) -> None:
        expected = alone[row].act({"observation.state": seen["observation.state"][row]})
        assert seen[BASE_ACTION][row] * half == pytest.approx(expected.clip(-5, 5), abs=1e-5)

    for row in range(2):
        check(row, observation)
    for step in range(3 * toy.LENGTH):
        correction = np.full((2, 2), 0.1 * (step % 3), np.float32)
        before = envs.action + 0.5 * half * correction
        observation, _, terminated, truncated, info = envs.step(correction)
        if mode != "NextStep" or step % (toy.LENGTH + 1) != toy.LENGTH:
            assert np.isfinite(before).all()
        ended = terminated | truncated
        for row in range(2):
            if mode == "SameStep" and ended[row]:
                check(row, info["final_obs"])
                alone[row].reset()
            if mode == "NextStep" and step % (toy.LENGTH + 1) == toy.LENGTH:
                alone[row].reset()
            check(row, observation)
        if mode == "Disabled" and ended.any():
            observation, _ = envs.reset(options={"reset_mask": ended})
            for row in range(2):
                alone[row].reset()
                check(row, observation)


def test_demonstrations_become_corrections_of_the_frozen_policy(
    online: Script, frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corrected action is the demonstrated one, also where it is beyond the largest correction."""
    batches: list[dict[str, Any]] = []
    whole = TRAINER_REGISTRY["residual"].train_step

    def train_step(self: Any, data: dict[str, Any]) -> dict[str, Any]:
        batches.append(data)
        return whole(self, data)

    monkeypatch.setattr(TRAINER_REGISTRY["residual"], "train_step", train_step)
    online("--env", "savable", "--save-dataset", tmp_path / "data", "--save-what", "collected", folder="made")
    data = ("--dataset", "minari", "--dataset.path", tmp_path / "data", "--dataset.validation", 0)
    more = ("--dataset.ratio", 1, "--env", "savable", "--trainer.base", frozen, "--no-normalise-observations")
    online(*RESIDUAL, *data, *more, "--trainer.scale", 0.2, "--steps", 30, folder="exact")
    stored = everything(build(tmp_path / "data", validation=0.0))
    known = {tuple(s.tolist()): a for s, a in zip(stored["observation.state"], stored["action"], strict=True)}
    seen = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    for state, base, correction in zip(seen["observation.state"], seen[BASE_ACTION], seen["action"], strict=True):
        assert torch.allclose(5 * (base + 0.2 * correction), known[tuple(state.tolist())], atol=1e-4)
    assert float(seen["action"].abs().max()) > 1
    policy = load_policy(frozen)
    first = stored["observation.state"][:10].numpy()
    acted = {tuple(s.tolist()): policy.act({"observation.state": s}).clip(-5, 5) / 5 for s in first}
    checked = [tuple(s.tolist()) in acted for s in seen["observation.state"]]
    for state, base in zip(seen["observation.state"][checked], seen[BASE_ACTION][checked], strict=True):
        assert base.numpy() == pytest.approx(acted[tuple(state.tolist())], abs=1e-5)
    assert sum(checked) > 20


def test_demonstrations_beyond_the_largest_correction_are_kept() -> None:
    """A frozen policy that always does (0.9, 0), corrected by 0.3 at most."""
    shown = torch.tensor([[0.9, 0.3], [1.0, 0.0], [0.7, 0.4], [0.9, 0.0], [0.6, -0.3], [0.9, -0.31], [0.9, 0.0]])
    ends = torch.tensor([6, 7])
    states = torch.arange(8.0)[:, None]
    columns = {"action": shown, "reward": torch.ones(7), STATE: states[:-1]}
    columns |= {f"next.{STATE}": states[1:], "terminated": torch.zeros(7, dtype=torch.bool)}
    base = SimpleNamespace(scale=0.3, sum=Middle(-np.ones(2, np.float32), np.ones(2, np.float32), 0.3))
    base.new = lambda: SimpleNamespace(act=lambda seen, rows: np.tile(np.float32([0.9, 0.0]), (len(seen[STATE]), 1)))
    data = build_episodes(from_columns(columns, ends, "these"), 1, 1, 0.0, 0)
    found = relabelled(data, base)["dataset"]
    one = Transitions(found, "residual", Window(discount=0.5, n_step=3)).get_batch(torch.arange(5))
    assert one[STATE].flatten().tolist() == [0, 1, 2, 3, 4]
    assert one[f"next.{STATE}"].flatten().tolist() == [3, 4, 5, 6, 6]
    assert one["reward"].tolist() == [1.75, 1.75, 1.75, 1.75, 1.5]
    expected = torch.tensor([[0, 1], [1 / 3, 0], [-2 / 3, 4 / 3], [0, 0], [-1, -1]])
    assert torch.allclose(one["action"], expected, atol=1e-5)
    # Where the bound makes the demonstrated action of what the frozen policy does, there is nothing to correct.
    base.new = lambda: SimpleNamespace(act=lambda seen, rows: np.tile(np.float32([1.4, -9.0]), (len(seen[STATE]), 1)))
    columns["action"] = torch.tensor([[1.0, -1.0]]).repeat(7, 1)
    data = build_episodes(from_columns(columns, ends, "these"), 1, 1, 0.0, 0)
    batch = everything(relabelled(data, base))
    assert len(batch["action"]) == 7 and not batch["action"].any()
    assert torch.equal(batch[BASE_ACTION], columns["action"])


def test_an_action_whose_bounds_are_equal_is_neither_corrected_nor_shown_as_nan() -> None:
    both = Middle(np.float32([-1, 0.3]), np.float32([1, 0.3]), 0.5)
    base, shown = np.float32([[0.5, 0.3], [0.0, 0.29999]]), np.float32([[0.75, 0.3], [-1.0, 0.3]])
    assert np.allclose(both.normalised(base), [[0.5, 0], [0, 0]], atol=1e-4)
    assert np.array_equal(both.correction(base, shown), np.float32([[0.5, 0], [-2, 0]]))
    assert np.array_equal(both.corrected(base, np.ones((2, 2))), np.float32([[1, 0.3], [0.5, 0.3]]))


def test_a_base_action_beyond_the_bounds_is_corrected_from_the_bound() -> None:
    """Far from its data a frozen policy asks for much more than the bounds allow; a correction has its effect there."""
    both = Middle(np.float32([-1, -4]), np.float32([1, 2]), 0.5)
    base, correction = np.float32([18, -30]), np.float32([-0.4, 1])
    assert both.corrected(base, correction) == pytest.approx([0.8, -2.5])
    assert both.correction(base, np.float32([0.8, -2.5])) == pytest.approx(correction)
    assert both.normalised(base).tolist() == [1, -1]
    older = Middle(both.low, both.high, 0.5, clips=False)  # as the policies of older versions were trained and measured
    assert older.corrected(base, correction).tolist() == [1, -4]
    # As it is in [-1, 1], and the critics add a correction to it, running statistics leave it as it is.
    spec = {key: {"shape": (2,), "dtype": "float32"} for key in (STATE, BASE_ACTION)}
    assert [*RunningStatistics(spec, True, False, 0.99, 1).modes] == [STATE]


# ---- environments in processes of their own, and wrapped -----------------------------------------------------------


def test_workers_step_like_one_process() -> None:
    for name in ("Pendulum-v1", "CartPole-v1"):
        one, several = (GymnasiumEnv(id=name, max_episode_steps=15, workers=w).build(5, 3) for w in (0, 2))
        assert len(several.processes) == 2 and several.single_action_space == one.single_action_space
        assert np.array_equal(one.reset(seed=[*range(5)])[0], several.reset(seed=[*range(5)])[0])
        one.action_space.seed(0)
        for _ in range(40):
            action = one.action_space.sample()
            (*first, info), (*second, other) = one.step(action), several.step(action)
            assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)) and set(info) == set(other)
            if "final_obs" in info:
                finals = zip(info["final_obs"], other["final_obs"], strict=True)
                assert all((a is None and b is None) or np.array_equal(a, b) for a, b in finals)
        processes = several.processes
        one.close()
        several.close()
        assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("kind", ["raise", "hang", "die", "nan"])
def test_a_fault_in_a_worker_names_its_environment(
    online: Script, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    options = ("--env", "spread_faulty", "--env.kind", kind, "--env.at", 17, "--env.index", 2, "--num-envs", 4)
    run = online(*options, "--steps", 100, "--env-timeout", 1)
    out = capsys.readouterr().out
    said = {"raise": "raised ArithmeticError in step: simulator exploded", "hang": "did not come back from step"}
    said |= {"die": "died in step", "nan": "returned a NaN or Inf in 'observation.state'"}
    assert re.search(rf"environment 2 \(seed \d+, step \d+ of its episode\) {said[kind]}", out), out
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_wrappers_by_name(online: Script) -> None:
    scaled = ('RescaleAction:{"min_action": -1, "max_action": 1}', 'TimeLimit:{"max_episode_steps": 6}')
    run = online("--env.wrappers", *scaled, "--env.id", "TendonToy-v0", "--env.max-episode-steps", 10)
    args = json.loads((run / "policy" / "policy.json").read_text())
    assert args["spec"]["action"]["stats"] == {"min": [-1.0, -1.0], "max": [1.0, 1.0]}
    assert {line["episode_length"] for line in read_lines(run / "episodes.jsonl")} == {6}


def test_episodes_are_recorded_for_each_environment(online: Script) -> None:
    run = online("--num-envs", 3, "--batch-size", 15, "--steps", 90, "--env", "savable", "--env.mode", "SameStep")
    lines = read_lines(run / "episodes.jsonl")
    assert [line["env"] for line in lines] == [0, 1, 2] * 3 and [line["step"] for line in lines][::3] == [30, 60, 90]
    logged = [line["train/episode_return"] for line in read_lines(run / "metrics.jsonl")]
    assert sum(line["episode_return"] for line in lines[:3]) / 3 == pytest.approx(logged[0])


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn", "rlpd"])
def test_pictures_are_learnt_from(online: Script, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes all the way to the encoder, which learns, and which the acting policy has."""
    kinds = set()
    cls = TRAINER_REGISTRY[name]
    whole = cls.train_step

    def train_step(self: Any, data: dict[str, Any]) -> dict[str, Any]:
        kinds.update(value.dtype for key, value in data.items() if "images" in key)
        return whole(self, data)

    monkeypatch.setattr(cls, "train_step", train_step)
    words = [
        w for w in LEARNERS[name] if w not in ("--env", "savable", "--env.discrete", "--dataset", "toy", *toy.UNIT)
    ]
    if name == "rlpd":  # without a dataset, just here
        monkeypatch.setattr(cls, "data", staticmethod(TRAINER_REGISTRY["sac"].data))
    env = ("--env", "pictures", *(("--env.discrete",) if name == "dqn" else ()), "--model", "encoder=cnn")
    run = online(*words, *env, "--model.encoder.channels", 4, 4, "--model.encoder.features", 8)
    assert kinds == {torch.uint8}
    first = online(
        *words, *env, "--model.encoder.channels", 4, 4, "--model.encoder.features", 8, "--steps", 1, folder="first"
    )
    assert difference(weights(run, "encoder"), weights(first, "encoder")) > 0
    action = load_policy(run).act({"observation.images.camera": np.zeros((2, 3, 12, 12), np.uint8)})
    assert action.shape == ((2,) if name == "dqn" else (2, 2))


# ---- datasets from a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["minari", "lerobot"])
@pytest.mark.parametrize("what", ["policy", "collected"])
def test_a_run_leaves_a_dataset_that_the_other_script_reads(
    online: Script, script: Script, tmp_path: Path, kind: str, what: str
) -> None:
    path = tmp_path / "data"
    saving = ("--save-dataset", path, "--save-format", kind, "--save-what", what, "--save-episodes", 5)
    scale = ("--reward-shift", 2.0, "--reward-scale", 0.5)
    run = online("--env.id", "Pendulum-v1", "--env.max-episode-steps", 12, *saving, *scale, "--num-envs", 2)
    built = build(path, validation=0.0)
    data = everything(built)
    lengths = built["dataset"].episodes.lengths.tolist()
    assert lengths == ([12] * 5 if what == "policy" else [12, 12, 6] * 2)
    ends = built["dataset"].episodes.ends - 1
    assert data["truncated"].nonzero().flatten().tolist() == ends.tolist() and not data["terminated"].any()
    assert (data["action"].abs() <= 2).all() and data["action"].abs().max() > 1  # the environment's units
    state, torque = data["observation.state"].double(), data["action"].double().squeeze(1)
    angle = torch.atan2(state[:, 1], state[:, 0])
    cost = angle**2 + 0.1 * state[:, 2] ** 2 + 0.001 * torque**2  # of gymnasium's Pendulum, before the step
    assert torch.allclose(data["reward"].double(), -cost, atol=1e-4)  # rewards as they were, not as they were learnt
    inner = torch.ones(len(state), dtype=torch.bool)
    inner[ends] = False
    assert torch.equal(data["next.observation.state"][inner], data["observation.state"][1:][inner[:-1]])
    if what == "collected":
        returns = [line["episode_return"] for line in read_lines(run / "episodes.jsonl")]
        assert data["reward"][:12].sum() == pytest.approx(returns[0], abs=1e-3)
    again = script("--dataset", kind, "--dataset.path", path, "--trainer", "bc", "--steps", 5, folder="again")
    assert json.loads((again / "status.json").read_text())["state"] == "finished"
    if kind == "minari":
        assert built["env"] == {"name": "gymnasium", "id": "Pendulum-v1", "max_episode_steps": 12, "kwargs": ""}


def test_a_resumed_run_may_leave_a_dataset_that_it_was_not_asked_for(online: Script, tmp_path: Path) -> None:
    run = online(*toy.SAC, "--steps", 40)
    online("--resume", run, "--steps", 42, "--save-dataset", tmp_path / "data", "--save-what", "collected")
    built = build(tmp_path / "data", validation=0.0)
    assert built["dataset"].episodes.lengths.sum() == 42 and built["env"]["id"] == "TendonToy-v0"
    with pytest.raises(UserError, match="/proc/x: .*; choose another folder"):
        online("--resume", run, "--steps", 44, "--save-dataset", "/proc/x")


def test_a_dataset_of_a_residual_policy_holds_what_was_executed(
    online: Script, frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--trainer.base", frozen, "--env", "savable", "--save-dataset", tmp_path / "data", "--save-episodes", 3)
    run = online(*RESIDUAL, *options)
    data = everything(build(tmp_path / "data", validation=0.0))
    assert BASE_ACTION not in data and data["observation.state"].shape == (30, 5)
    policy = load_policy(run)
    policy.reset()
    first = data["observation.state"][:10].numpy()
    acted = np.stack([policy.act({"observation.state": state}) for state in first])
    assert data["action"][:10].numpy() == pytest.approx(acted, abs=1e-5)


def test_what_was_collected_is_the_same_in_every_format(tmp_path: Path) -> None:
    """Interventions, successes, rewards in the environment's units, an episode cut by a fault, one that goes on."""
    spec: dict[str, Any] = {key: {"shape": (2,), "dtype": "float32"} for key in ("observation.state", "action")}
    spec |= {"reward": {"shape": (), "dtype": "float32"}, "terminated": {"shape": (), "dtype": "bool"}}
    spec |= {"next.observation.state": spec["observation.state"]}
    made = ReplayBuffer(spec, 100, 2, 2, Window(chunk=3))
    for t in range(9):
        state = torch.tensor([[t, 0.0], [t, 1.0]])
        step = {"observation.state": state, "next.observation.state": state + torch.tensor([1.0, 0.0])}
        step |= {"action": state / 10, "reward": (state[:, 0] - 1) / 2, "terminated": torch.tensor([t == 4, False])}
        step |= {"ended": torch.tensor([t == 4, t == 6]), "valid": torch.tensor([True, t != 7])}
        step |= {"intervention": torch.tensor([t % 2 == 0, t > 5]), "success": torch.tensor([t == 4, False])}
        made.add(step)
        if t == 2:
            made.miss()  # a fault, which truncates both episodes
    space = gym.spaces.Box(-1, 1, (2,))
    episodes = recording.collected([made.transitions()], spec, space, (-1.0, 0.5))
    assert episodes.ends.tolist() == [3, 5, 9, 12, 16, 17]
    kept = dict(episodes.columns)
    assert kept["reward"].tolist() == [*range(9), *range(7), 8] and kept["success"].nonzero().tolist() == [[4]]
    assert kept["intervention"].nonzero().flatten().tolist() == [0, 2, 4, 6, 8, 15, 16]
    assert kept["truncated"].nonzero().flatten().tolist() == [2, 8, 11, 15, 16]
    env: Any = ("savable", toy.Savable())
    whole = {form: tmp_path / form for form in ("minari", "lerobot")}
    for form, path in whole.items():
        recording.write(episodes, str(path), form, env, "a test", 10.0)
    arrow, back = tmp_path / "arrow", tmp_path / "back"
    assert convert.main([str(whole["lerobot"]), str(arrow), "--format", "minari", "--storage", "arrow"]) == 0
    assert convert.main([str(arrow), str(back), "--format", "lerobot"]) == 0
    for place in (*whole.values(), arrow, back):
        found = build(place, validation=0.0)["dataset"].episodes
        assert found.ends.tolist() == episodes.ends.tolist()
        assert all(torch.equal(found.columns[key], value) for key, value in kept.items()), place
        state = found.observations["observation.state"]
        assert torch.equal(state[found.after], episodes.observations["observation.state"][episodes.after])
    told = inspect.flags(episodes)
    assert "interventions: 7 of 17 steps, 7 times in 5 of 6 episodes" in told
    assert "success: 1 of 17 steps, 1 times in 1 of 6 episodes" in told
    # As an item, of whatever window, and beside data in which nobody took over.
    item = everything(build(whole["lerobot"], validation=0.0, action_steps=4, obs_steps=2))
    assert torch.equal(item["intervention"], kept["intervention"]) and "success" not in item
    table = transitions(build(whole["minari"], validation=0.0), "rlpd", Window(chunk=2))["dataset"]
    assert torch.equal(table.get_batch(torch.arange(17))["intervention"], kept["intervention"])
    plain = replace(episodes, columns={key: x for key, x in kept.items() if key in ("action", "reward", "terminated")})
    recording.write(plain, str(tmp_path / "plain"), "minari", env, "a test", 10.0)
    sources = (f"{whole['lerobot']}:0.5", f"{tmp_path / 'plain'}:0.5")
    both = MixtureDataset(sources=sources, validation=0.0).build()["dataset"]
    assert both.get_batch(torch.arange(34))["intervention"].tolist() == kept["intervention"].tolist() + [False] * 17
    old = build(tmp_path / "plain", validation=0.0)
    mixed = Mixed(made, transitions(old, "rlpd", Window(chunk=3))["dataset"], 0.5, 64).sample(64)
    assert not mixed["intervention"][:32].any() and mixed["intervention"][32:].any()
    new = build(whole["minari"], validation=0.0)
    before = fingerprint(new)
    for key in ("intervention", "success"):  # which a version that did not read them had not noted
        del before["dataset"]["content"][key]
    assert changes(before, fingerprint(new)) == ""


def test_pictures_and_choices_are_written_too(tmp_path: Path) -> None:
    spec = {"observation.images.camera": {"shape": (3, 8, 8), "dtype": "uint8"}}
    spec |= {"next.observation.images.camera": spec["observation.images.camera"]}
    spec |= {"action": {"shape": (), "dtype": "int64", "classes": 3}, "reward": {"shape": (), "dtype": "float32"}}
    spec |= {"terminated": {"shape": (), "dtype": "bool"}}
    made = ReplayBuffer(spec, 100, 1, 1, Window())
    for t in range(7):
        picture = torch.full((1, 3, 8, 8), 10 * t, dtype=torch.uint8)
        flags = {"terminated": torch.tensor([t == 3]), "ended": torch.tensor([t == 3]), "valid": torch.tensor([True])}
        step = {"observation.images.camera": picture, "next.observation.images.camera": picture + 10, **flags}
        made.add(step | {"reward": torch.tensor([float(t)]), "action": torch.tensor([t % 3])})
    episodes = recording.collected([made.transitions()], spec, gym.spaces.Discrete(3), (0.0, 1.0))
    said = recording.write(episodes, str(tmp_path / "data"), "minari", ("pictures", toy.Pictures(True)), "a test", 10.0)
    assert "2 episodes, 7 steps as minari" in said
    data = everything(build(tmp_path / "data", validation=0.0, cameras=("all",)))
    assert data["observation.images.camera"][:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert data["action"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 0] and data["terminated"].nonzero().tolist() == [[3]]
