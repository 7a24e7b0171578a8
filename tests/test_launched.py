"""Two processes, really launched: they train what one trains, agree on everything, and fail together."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import toy
from components import load_policy
from components.run.checkpoint import newest, read_tree
from components.run.curves import read_lines
from components.run.policies import choose
from conftest import ROOT, difference, learned, replayed, states, two_processes, weights

pytestmark = pytest.mark.launched


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, (*options, *toy.SGD, "--optimizer.lr", 0.01)) for name, options in toy.TRAINERS.items()),
        ("experts", (*toy.EXPERTS, *toy.SGD)),
        ("clipped", ("--trainer", "bc", "--loss", "l1", *toy.SGD, "--grad-clip", 0.3)),
        ("accumulated", ("--trainer", "bc", *toy.SGD)),
        ("actor_critic", ("--trainer", "actor_critic")),
        ("pictures", (*toy.PICTURES, *toy.SGD[:-1], 10)),
    ],
)
def test_two_processes_train_what_one_trains(
    pair: Path,
    script: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: tuple,
) -> None:
    for function, draw in toy.sliced_noise(0, 1).items():
        monkeypatch.setattr(torch, function, draw)
    alone = script(*options)
    _, manifest = newest(alone / "checkpoints")
    models = [
        key.removeprefix("model-") for key, shapes in manifest["shapes"].items() if key.startswith("model-") and shapes
    ]
    assert "policy" in models and ("ema_policy" in models) == (name in ("diffusion", "flow"))
    found = [difference(weights(alone, model), weights(pair / name, model)) for model in models]
    assert 0 < max(found) < 1e-6
    one, two = (read_lines(run / "metrics.jsonl") for run in (alone, pair / name))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        keys = [
            key for key in a if "train/" in key or ("val/" in key and name not in toy.DRAWS_NOISE)
        ]  # whose noise is not sliced there
        keys = [key for key in keys if not key.endswith(("_min", "_max"))]  # extremes are those of a process's part
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5) for key in keys)


def test_two_processes_of_ppo_learn_what_one_learns(
    pair: Path, online: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics and advantages are those of all processes."""
    monkeypatch.setattr(torch, "randn", toy.sliced_randn(0, 1))
    alone = online(*toy.WHOLE_ROLLOUTS)
    lines = [read_lines(run / "metrics.jsonl")[-1] for run in (alone, pair / "ppo")]
    assert lines[0]["updates"] == lines[1]["updates"] == 4 * 2
    assert lines[0]["train/episode_return"] == pytest.approx(lines[1]["train/episode_return"], rel=1e-5)
    found = [difference(weights(alone, model), weights(pair / "ppo", model)) for model in ("policy", "value")]
    assert 0 < max(found) < 1e-5


def test_the_online_script_on_two_processes(pair: Path, online: Callable[..., Path]) -> None:
    run = pair / "online"
    assert json.loads((run / "args.json").read_text())["world_size"] == 2
    lines = read_lines(run / "metrics.jsonl")
    assert lines[-1]["step"] == 80 and lines[-1]["updates"] == 60  # over all processes
    assert {line["train/episode_length"] for line in lines if "train/episode_length" in line} == {10}
    assert len(read_lines(run / "eval.jsonl")[-1]["seeds"]) == 3
    assert choose(run, "best").step in [line["step"] for line in read_lines(run / "eval.jsonl")]
    folder, manifest = newest(run / "checkpoints")
    own = [read_tree(folder / f"rank-{rank}.safetensors") for rank in range(2)]
    seeds = [seed for state in own for seed in state["collector"]["seeds"]]
    assert len(set(seeds)) == 4  # each process steps environments of its own
    streams = [env["rows"] for rank in range(2) for env in replayed(folder, rank)]
    assert [len(rows) for rows in streams] == [20 - 1] * 4  # every eleventh step only resets
    online("--resume", run, "--steps", 120)  # one process takes over the buffers of both
    folder, manifest = newest(run / "checkpoints")
    envs = replayed(folder)
    assert manifest["step"] == 120 and manifest["world_size"] == 1 and len(envs) == 4
    assert all(torch.equal(env["rows"][:19], rows) for env, rows in zip(envs, streams, strict=True))
    assert all(env["ended"][18] for env in envs)  # the episodes that were cut


def test_the_budget_of_labels_is_of_all_processes(pair: Path, online: Callable[..., Path]) -> None:
    """Exactly so many are stored and learnt from; one process goes on with the count."""
    run = pair / "dagger"
    line = read_lines(run / "metrics.jsonl")[-1]
    assert (line["step"], line["updates"], line["train/expert_labels"]) == (80, 60, 45)
    folder, _ = newest(run / "checkpoints")
    assert read_tree(folder / "trainer.safetensors")["parts"]["collector"]["guide"]["used"] == 45
    stored = []
    for rank in range(2):
        parts = read_tree(folder / f"rank-{rank}.safetensors")["memory"]["parts"]
        stored += [env["labelled"] for part in parts for env in read_tree(folder / f"{part}.safetensors")["envs"]]
    assert sum(int(labelled.sum()) for labelled in stored) == 45 and all(labelled[:5].all() for labelled in stored)
    online("--resume", run, "--steps", 100)
    line = read_lines(run / "metrics.jsonl")[-1]
    assert (line["step"], line["updates"], line["train/expert_labels"]) == (100, 80, 45)


def test_two_processes_steer_one_frozen_policy(pair: Path) -> None:
    run = pair / "dsrl"
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 40, "reason": ""}
    assert read_lines(run / "metrics.jsonl")[-1]["updates"] == 20
    kept = [(folder / "model.safetensors").read_bytes() for folder in (run / "inherited/base", run / "policy/base")]
    assert kept == [(pair / "steered" / "policy" / "model.safetensors").read_bytes()] * 2
    assert load_policy(run).chunk == 4


@pytest.mark.parametrize("name", ["ppo_fault", "sac_fault"])
def test_a_fault_on_one_process_keeps_the_others_in_step(pair: Path, name: str) -> None:
    """Rollouts end together, and statistics are shared, also where one process has a step less."""
    run = pair / name
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 120, "reason": ""}
    folder, _ = newest(run / "checkpoints")
    replaced = [read_tree(folder / f"rank-{rank}.safetensors")["collector"]["replaced"] for rank in range(2)]
    assert replaced == [0, 1]
    updates = read_lines(run / "metrics.jsonl")[-1]["updates"]
    assert updates == (3 * 2 * 2 if name == "ppo_fault" else 100)  # 3 rollouts of 40 steps, 2 epochs of 2 minibatches
    statistics = read_tree(folder / "trainer.safetensors")["parts"]["statistics"]
    assert statistics["observation.state"][0, 0] == 120 - 2  # of the two environments that were replaced together


@pytest.mark.parametrize("name", ["minimal", "with_keywords"])
def test_minimal_components_on_two_processes(pair: Path, name: str) -> None:
    status = json.loads((pair / name / "status.json").read_text())
    assert status == {"state": "finished", "step": 20, "reason": ""}


def test_evaluation_is_shared_out(pair: Path, script: Callable[..., Path]) -> None:
    alone = script("--trainer", "bc", *toy.SGD, "--eval-episodes", 7)
    one, two = (read_lines(run / "eval.jsonl")[-1] for run in (alone, pair / "evaluated"))
    assert one["seeds"] == two["seeds"] and one["success_rate"] == two["success_rate"]
    assert one["return_mean"] == pytest.approx(two["return_mean"], rel=1e-4)


def test_resume_on_two_processes_equals_a_run_that_never_stopped(pair: Path) -> None:
    assert "killed" in (pair / "resumed-error-0.txt").read_text()
    assert states(pair / "resumed") == states(pair / "whole")
    assert learned(pair / "resumed") == learned(pair / "whole")


def test_resume_on_another_number_of_processes(
    pair: Path, script: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = pair / "whole"
    script("--resume", run, "--steps", 35)
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 35


def test_a_crash_on_one_process_is_everybodys(pair: Path) -> None:
    status = json.loads((pair / "crashed" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 20) and "no evaluation succeeded" in status["reason"]
    assert not (pair / "crashed" / "eval.jsonl").exists() and (pair / "crashed" / "policy").exists()


def test_what_one_process_has_alone(pair: Path) -> None:
    line = read_lines(pair / "one_rank" / "metrics.jsonl")[-1]
    assert line["train/rank"] == 0.5 and line["train/only_on_one"] == 3.0  # (sum, count) over the union of the keys
    policy = weights(pair / "one_rank")
    assert torch.equal(policy["unused"], torch.ones(3, 3))  # no gradient anywhere: weight decay leaves it alone
    assert (policy["sometimes"] < 1).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skipped", "RuntimeError: model 'policy': a process skipped one of its optimizer steps (step"),
        ("bad_on_one", "FloatingPointError: loss or gradient of model 'policy' is not finite at step 20"),
        ("closure", "RuntimeError: model 'policy': step(closure) works on one process only"),
        ("bad_data", "UserError: dataset 'toy': toy: 1 NaN or Inf values in 'observation.state'"),
    ],
)
def test_processes_fail_together(pair: Path, name: str, message: str) -> None:
    errors = [(pair / f"{name}-error-{rank}.txt").read_text() for rank in range(2)]
    if name == "skipped":  # each names the model that it was about to step
        assert all("a process skipped one of its optimizer steps" in error for error in errors)
        assert any(message in error for error in errors)
    else:
        assert all(message in error for error in errors)


def test_moments_over_processes(pair: Path) -> None:
    expected = [4.0, math.sqrt(5.0), 4.0]  # of 1, 3, 5, 7
    for rank in range(2):
        assert json.loads((pair / f"moments-{rank}.json").read_text()) == pytest.approx(expected)


@pytest.mark.slow
def test_help_and_errors_appear_once(tmp_path: Path) -> None:
    bad = two_processes(ROOT / "offline_trainer.py", "--trainer", "bcc", cwd=tmp_path)
    assert bad.returncode != 0 and bad.stderr.count("error: --trainer bcc: unknown trainer; nearest: bc") == 1
    shown = two_processes(ROOT / "offline_trainer.py", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout.count("--grad-accumulation") == 1


def test_a_launch_of_two_that_would_be_two_of_one_is_refused(tmp_path: Path) -> None:
    """Without ACCELERATE_USE_CPU each process would believe that it is alone."""
    from conftest import command

    if torch.cuda.is_available():
        pytest.skip("with GPUs this launch is right")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
    done = command(*launcher, ROOT / "offline_trainer.py", "--trainer", "bc", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("WORLD_SIZE is 2, but accelerate sees 1 process") == 1
