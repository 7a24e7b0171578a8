"""The online script: what it learns, leaves behind and resumes, and how it copes with environments that misbehave."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import toy
from components import TRAINER_REGISTRY, UserError, load_policy
from components.experience.collection import describe_env
from components.run import checkpoint
from components.run.curves import read_lines
from conftest import ONLINE, difference, learned, replayed, states, weights
from test_offline import interrupt_after

Script = Callable[..., Path]


# ---- what it learns and leaves behind ------------------------------------------------------------------------------


def test_sac_learns_the_toy_and_leaves_a_run_folder(
    online: Script, curves: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", 600, "--learning-starts", 100, "--eval-episodes", 10, "--eval-every", 300, "--batch-size", 64)
    run = online(*options, "--model.hidden-dims", 64, "--model.critic.hidden-dims", 64, "--trainer.discount", 0.5)
    args = json.loads((run / "args.json").read_text())
    assert args["script"] == "online_trainer.py" and args["args"]["updates_per_step"] == 1.0
    assert args["env"]["id"] == "TendonToy-v0" and args["component_versions"]["components.trainers.sac.SAC"]
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(50, 601, 50))
    assert lines[1]["updates"] == 0 and lines[-1]["updates"] == 500
    wanted = {"train/critic_loss", "train/actor_loss", "train/temperature", "train/lr.critic", "train/grad_norm.policy"}
    assert wanted <= set(lines[-1]) and lines[-1]["train/episode_length"] == 10
    evaluations = read_lines(run / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [300, 600]
    returns = [line["train/episode_return"] for line in lines]
    assert evaluations[-1]["return_mean"] > 0.6 * returns[0]  # returns are negative
    status = json.loads((run / "status.json").read_text())
    assert status == {"state": "finished", "step": 600, "reason": ""}
    assert (run / "curves.png").stat().st_size > 10_000
    assert re.search(r"replay buffer: up to 0\.0\d+ MB in memory and in checkpoints", capsys.readouterr().out)
    policy = load_policy(run)
    action = policy.act({"observation.state": np.zeros((3, 5), dtype=np.float32)})
    assert action.shape == (3, 2) and (abs(action) <= 5).all()  # in the environment's own units


@pytest.mark.parametrize("utd", [0.25, 2.0])
def test_updates_follow_environment_steps(online: Script, utd: float) -> None:
    run = online("--steps", 60, "--learning-starts", 20, "--updates-per-step", utd, "--num-envs", 4)
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == int(40 * utd)


@pytest.mark.parametrize("options", [("--updates-per-step", 0), ("--learning-starts", 90)])
def test_a_run_without_updates_says_so(online: Script, capsys: pytest.CaptureFixture[str], options: tuple) -> None:
    run = online(*options)
    assert "NO UPDATES (see --learning-starts, --updates-per-step)" in capsys.readouterr().out
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == 0


def test_evaluation_changes_nothing_in_training(online: Script) -> None:
    plain = online(folder="plain")
    evaluated = online("--eval-episodes", 3, "--eval-every", 7, folder="evaluated")
    assert difference(weights(plain), weights(evaluated)) == 0


def test_a_trainer_without_an_explorer_collects_with_its_policy(online: Script) -> None:
    """Evaluations, in other numbers of environments, come between the steps of its collection."""
    options = ("--model", "plain", "--model.critic.width", 8, "--steps", 40, "--eval-episodes", 3, "--eval-every", 10)
    run = online("--trainer", "actor_critic", *options)
    assert [line["step"] for line in read_lines(run / "eval.jsonl")] == [10, 20, 30, 40]
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == 20


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("died_at", [3, 28])
def test_resume_is_exact_where_the_environment_can_save_its_state(online: Script, mode: str, died_at: int) -> None:
    options = ("--env", "savable", "--env.mode", mode, "--steps", 70, "--save-every", 14, "--log-every", 9)
    options = (*options, "--trainer.n-step", 3, "--eval-episodes", 2, "--eval-every", 30)
    whole = online(*options, folder="whole")
    interrupt_after(online, died_at, "--trainer", "sac", *options)
    run = online("--resume", whole.parent / "run")
    assert states(run / ".." / "run") == states(whole)
    assert learned(whole.parent / "run") == learned(whole)
    assert (whole.parent / "run" / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()


def ended(run: Path, step: int) -> list[torch.Tensor]:
    """The flags of the environments' last transitions in a checkpoint's buffer."""
    return [env["ended"] for env in replayed(run / "checkpoints" / f"step-{step:09d}")]


def test_other_environments_begin_anew_and_the_cut_episode_is_truncated(online: Script, tmp_path: Path) -> None:
    interrupt_after(online, 20, "--trainer", "sac", "--save-every", 14, "--keep-last", 9)
    run = tmp_path / "run"
    before = ended(run, 28)
    assert all(len(flags) == 14 and flags.tolist() == [i == 9 for i in range(14)] for flags in before)
    online("--resume", run)
    for flags in ended(run, 60):  # 4 steps of the second episode were there; new ones of 10 steps follow
        assert flags.nonzero().squeeze(1).tolist() == [9, 13, 23]
    again = tmp_path / "again"
    interrupt_after(online, 20, "--trainer", "sac", "--save-every", 14, "--keep-last", 9, "--run-dir", again)
    online("--resume", again)
    assert states(again) == states(run)  # the new seeds follow from the run's seed and the step


def test_the_buffer_can_be_left_out(online: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--trainer", "sac", "--steps", 100, "--save-every", 40, "--no-save-buffer", "--log-every", 2)
    interrupt_after(online, 40, *options)
    assert "MB in memory only: a resumed run fills a new one" in capsys.readouterr().out
    run = tmp_path / "run"
    online("--resume", run)
    updates = {line["step"]: line["updates"] for line in read_lines(run / "metrics.jsonl")}
    assert updates[40] == 20 == updates[60] and updates[100] == 60  # it waits until the new one is filled, too


def test_a_default_beyond_the_run_shrinks_and_stays(
    online: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ONLINE, "--learning-starts")
    run = online("--steps", 60)
    assert "learning starts at step 30, the default of 1000 is beyond the run" in capsys.readouterr().out
    online("--resume", run, "--steps", 80)
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == 50


def test_a_run_of_the_other_script_is_refused(online: Script, script: Script) -> None:
    run = online("--steps", 30)
    message = "is a run of online_trainer.py; continue with: python online_trainer.py --resu"
    with pytest.raises(UserError, match=message):
        script("--resume", run)


def test_resume_of_a_finished_run_goes_on_with_more_steps(online: Script, capsys: pytest.CaptureFixture[str]) -> None:
    run = online("--steps", 40)
    online("--resume", run)
    assert "is finished at step 40; increase --steps" in capsys.readouterr().out
    online("--resume", run, "--steps", 60)
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == 40


# ---- environments that misbehave -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raise", r"raised ArithmeticError in step: simulator exploded"),
        ("hang", r"did not come back from step within 1 s \(--env-timeout\)"),
        ("die", r"died in step"),
        ("nan", r"returned a NaN or Inf in 'observation.state' \(as float32\)"),
        ("inf reward", r"returned a NaN or Inf in 'reward' \(as float32\)"),
        ("end nan", r"returned a NaN or Inf in 'observation.state' \(as float32\)"),
    ],
)
def test_a_faulty_environment_is_named_and_replaced(
    online: Script, capsys: pytest.CaptureFixture[str], kind: str, message: str, workers: bool
) -> None:
    if kind == "die" and not workers:
        pytest.skip("an environment in this process takes it along")
    options = ("--env", "faulty", "--env.kind", kind, "--env.at", 17, "--env-timeout", 1, "--steps", 60)
    run = online(*options, *(("--env.workers",) if workers else ()))
    out = capsys.readouterr().out
    named = rf"environment 1 \(seed \d+, step 6 of its episode\) {message}; action \[ *-?[\d.]+ +-?[\d.]+ *\]"
    assert re.search(named + r"; replaced \(1 of 10\), its episode is truncated", out), out
    state = checkpoint.read_tree(run / "checkpoints" / "step-000000060" / "rank-0.safetensors")
    assert state["collector"]["replaced"] == 1
    for env in replayed(run / "checkpoints" / "step-000000060"):
        assert env["rows"].isfinite().all() and len(env["rows"]) == 29  # the step of the fault is missing
        assert env["ended"].nonzero().squeeze(1).tolist() == [9, 15, 25]  # cut after 6 steps of the second episode
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_fault_before_there_is_anything_to_learn_from(online: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.FaultyEnv, "faults", 0)
    run = online("--env", "faulty", "--env.at", 1, "--env.once", "--learning-starts", 0, "--steps", 20)
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == 20 and toy.FaultyEnv.faults == 1


def test_too_many_faults_end_the_run(online: Script, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"environment 1 \(seed.*replacement 3 is above --env-restarts 2"):
        online("--env", "faulty", "--env-restarts", 2, "--steps", 600)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "--env-restarts 2" in status["reason"]


def test_one_that_cannot_be_made_again_is_a_fault_like_any(
    online: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.FaultyEnv, "built", 1)
    message = "cannot be rebuilt: env 'faulty': OSError: no licence on this machine.*above --env-restarts 2"
    with pytest.raises(RuntimeError, match=message):
        online("--env", "faulty", "--env.kind", "gone", "--env-restarts", 2, "--steps", 600)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_an_evaluation_with_a_faulty_environment_fails_alone(
    online: Script, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Training goes on to its end, where a run says so of which no evaluation succeeded."""
    options = ("--env", "faulty", "--env.kind", "hang", "--env.at", 15, "--env.index", 0, "--env-timeout", 1)
    told = (
        r"failed, training continues: process 0: RuntimeError: "
        r"environment 0 \(seed 1000001, step 4 of its episode\) did"
    )
    with pytest.raises(RuntimeError, match=r"no evaluation succeeded \(.*: environment 0 \(seed 1000001, step 4"):
        online(*options, "--eval-episodes", 3, "--eval-envs", 1, "--eval-every", 20, "--steps", 40, "--env.workers")
    assert len(re.findall(told, capsys.readouterr().out)) == 2
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 40 and "no evaluation succeeded" in status["reason"]
    assert load_policy(tmp_path / "run")


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--env.id", "CartPole-v1"), "the actions are discrete; use --trainer ppo or dqn"),
        (("--env.id", "TendonPair-v0"), r"env 'gymnasium': it has the observation space Tuple\(.*; expected Box, or"),
        (("--env.id", "Pendulum-v9"), "Pendulum-v9"),
        (("--env", "faulty", "--env.missing", "1"), r"env 'faulty': build\(2, seed\) returned 1 environments"),
        (("--env", "faulty", "--env.kind", "reset"), r"FaultyEnvError: environment 1 raised OSError in reset"),
        (("--env-timeout", "inf"), "--env-timeout inf must be 0 or more"),
        (("--trainer", "sacc"), "unknown trainer; nearest: sac"),
        (("--env", "nothing"), "unknown env"),
        (("--num-envs", "0"), "--num-envs 0 must be 1 or more"),
        (("--buffer-size", "1"), r"--buffer-size 1 has no room for 1 steps of 2 environments"),
        (("--trainer.n-step", "0"), "--trainer.n-step 0 must be 1 or more"),
        (("--trainer.discount", "1.5"), r"--trainer.discount 1.5 must be in \(0, 1\]"),
        (("--grad-accumulation", "2"), "--grad-accumulation above 1 needs a trainer that declares accumulates"),
        (("--model.temperature.initial", "0"), "--model.temperature.initial 0.0 must be above 0"),
        (("--model.critic.members", "0"), "--model.critic.members 0"),
        (("--updates-per-step", "-1"), "--updates-per-step -1.0 must be 0 or more"),
    ],
)
def test_bad_input_gets_one_line_before_step_1(
    online: Script, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        online(*options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_sac_on_data_without_successors_is_refused(script: Script) -> None:
    with pytest.raises(UserError, match="sac learns from rewards and successors; the data has no 'reward'"):
        script("--trainer", "sac", "--dataset", "minimal_data")


def test_sac_learns_from_a_dataset_too(script: Script) -> None:
    run = script(*toy.SAC, *toy.UNIT, "--steps", 20)
    assert "train/critic_loss" in read_lines(run / "metrics.jsonl")[-1]


# ---- --debug -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["script", "online"])
def test_debug_walks_the_whole_path(
    which: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"script": "bc", "online": "sac"}[which]
    anomaly: list[bool] = []
    whole = TRAINER_REGISTRY[trainer].train_step

    def train_step(self: Any, data: Any) -> Any:
        anomaly.append(torch.is_anomaly_enabled())
        return whole(self, data)

    monkeypatch.setattr(TRAINER_REGISTRY[trainer], "train_step", train_step)
    options = () if which == "script" else ("--env.workers", 2, "--steps", "40")
    run = request.getfixturevalue(which)("--trainer", trainer, "--debug", "--eval-episodes", 2, *options)
    out = capsys.readouterr().out
    args = json.loads((run / "args.json").read_text())["args"]
    assert args["hang_timeout"] == 0 and args["env_options"].get("workers", 0) == 0
    profiled = min(20, len(anomaly) - 1)
    assert all(anomaly[:-profiled]) and not any(anomaly[-profiled:]) and not torch.is_anomaly_enabled()
    first = {"script": "loss", "online": "critic_loss at fixed targets"}[which]
    assert re.search(rf"one batch: {first} [\d.]+ -> [\d.]+ in \d+ updates.*: (yes|not yet|NO), ", out)
    assert re.search(r"every parameter had a gradient within (20|40) updates\nupdates \d+ to .*trace.json", out)
    assert re.search(r"batch observation.state: \(16, 5\) float32  min -?\d.*mean.*max", out)
    assert re.search(r"model policy: \d+ parameters, \d+ trainable", out) and "gradient norms: policy " in out
    assert "return" in out or "success" in out
    assert "loaded step-000000040" in out and "loaded the policy; its action for zeros is [" in out
    request.getfixturevalue(which)("--resume", run, "--steps", 50)
    assert "loaded step-000000050" in capsys.readouterr().out


def test_actions_that_begin_elsewhere_are_refused() -> None:
    """Their numbers would be those of other actions."""
    space = gym.spaces.Discrete(3, start=1)
    with pytest.raises(UserError, match="expected one whose first action is 0"):
        describe_env(SimpleNamespace(single_action_space=space, single_observation_space=toy.ToyEnv.observation_space))
