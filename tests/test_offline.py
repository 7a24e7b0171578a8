"""The offline script: what it trains, leaves behind, resumes and refuses."""

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import offline_trainer
import online_trainer
import toy
from components import LOSS_BUILDER_REGISTRY, REGISTRIES, TRAINER_REGISTRY, UserError, load_policy
from components.learning.gradients import Finite, Gradients
from components.learning.metrics import Metrics
from components.run import checkpoint
from components.run.arguments import parse
from components.run.curves import read_lines
from components.run.record import lock
from conftest import ROOT, Launches, command, difference, in_this_process, learned, states, weights

Script = Callable[..., Path]


# ---- what it learns and leaves behind ------------------------------------------------------------------------------


def test_bc_learns_the_toy_and_leaves_a_run_folder(script: Script, curves: None) -> None:
    run = script("--trainer", "bc", "--steps", 300, "--eval-episodes", 20, "--eval-every", 100, "--save-every", 100)
    args = json.loads((run / "args.json").read_text())
    assert args["args"]["steps"] == 300 and args["args"]["optimizer_options"]["lr"] == 1e-3
    assert {"argv", "packages", "component_versions", "git_commit", "seed", "world_size", "machine"} <= set(args)
    assert args["component_versions"]["components.trainers.bc.BC"] and args["packages"]["torch"]
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(50, 301, 50))
    wanted = {"train/loss", "train/lr.policy", "train/grad_norm.policy", "data_s", "step_s", "samples_per_s"}
    assert all(wanted <= set(line) for line in lines)
    assert [line["step"] for line in lines if "val/loss" in line] == [100, 200, 300]
    evaluations = read_lines(run / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [100, 200, 300]
    last = evaluations[-1]
    assert last["success_rate"] >= 0.9 and last["episodes"] == 20 and len(set(last["seeds"])) == 20
    assert last["success_ci"][0] < last["success_rate"] <= last["success_ci"][1] and last["rule"] == "once"
    assert last["env"]["id"] == "TendonToy-v0" and last["length_mean"] == 10 and last["inference"]["obs_steps"] == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "step-000000200", "step-000000300"]
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 300, "reason": ""}
    assert (run / "curves.png").stat().st_size > 10_000 and (run / "policy" / "policy.json").exists()
    files = {path.suffix for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert files <= {".json", ".jsonl", ".safetensors", ".png"}


def test_evaluation_changes_nothing_in_training(script: Script) -> None:
    options = ("--trainer", "bc", "--steps", 60, "--model.dropout", 0.2)
    plain = script(*options, folder="plain")
    evaluated = script(*options, "--eval-episodes", 4, "--eval-every", 7, folder="evaluated")
    assert difference(weights(plain), weights(evaluated)) == 0


def test_evaluation_does_not_depend_on_the_number_of_slots(script: Script) -> None:
    def episodes(envs: int) -> dict[str, Any]:
        run = script("--trainer", "bc", "--steps", 60, "--eval-episodes", 7, "--eval-envs", envs, folder=f"envs{envs}")
        return read_lines(run / "eval.jsonl")[-1]

    one, four = episodes(1), episodes(4)
    rounded = ["return_mean", "return_std", "jerk_mean", "border_mean"]
    for key in rounded:
        assert one[key] == pytest.approx(four[key], rel=1e-5), key
    assert {k: v for k, v in one.items() if k not in rounded} == {k: v for k, v in four.items() if k not in rounded}


def test_a_crash_in_the_evaluation_is_reported_and_training_goes_on(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = iter(range(10**9))
    whole = toy.ToyEnv.step

    def step(self: Any, action: Any) -> Any:
        if next(steps) == 25:
            raise ArithmeticError("simulator exploded")
        return whole(self, action)

    monkeypatch.setattr(toy.ToyEnv, "step", step)
    run = script("--trainer", "bc", "--steps", 20, "--eval-every", 10, "--eval-episodes", 10, "--eval-envs", 2)
    out = capsys.readouterr().out
    told = r"the evaluation at step 10 failed, training continues: process 0: RuntimeError: environment 1 "
    told += r"\(seed 1000003, step 2 of its episode\) raised ArithmeticError in step: simulator exploded; action \["
    assert re.search(told, out), out
    assert [line["step"] for line in read_lines(run / "eval.jsonl")] == [20]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("trainer", ["minimal", "with_keywords"])
def test_minimal_trainer_and_dataset(script: Script, trainer: str) -> None:
    run = script("--trainer", trainer, "--dataset", "minimal_data", "--steps", 50, "--log-every", 10)
    lines = read_lines(run / "metrics.jsonl")
    assert lines[-1]["train/loss_policy"] < lines[0]["train/loss_policy"]
    if trainer == "with_keywords":  # 64 samples make 4 batches an epoch; means over the calls 40 to 49
        assert lines[-1]["train/iterations"] == 44.5 and lines[-1]["train/total_epochs"] == 13
        assert lines[-1]["train/epoch"] == np.mean([i // 4 for i in range(40, 50)])
        assert lines[0]["train/iterations"] == 4.5


def test_actor_critic_with_a_target_network(script: Script) -> None:
    run = script("--trainer", "actor_critic", "--model.critic.width", 8, "--model.hidden-dims", 12)
    assert weights(run, "critic")["0.weight"].shape == (8, 7) and weights(run)["net.0.weight"].shape == (12, 5)
    assert difference(weights(run, "critic"), weights(run, "target_critic")) > 0
    assert {"train/lr.critic", "train/grad_norm.policy", "train/q"} <= set(read_lines(run / "metrics.jsonl")[-1])


def test_a_loss_with_parameters_joins_as_a_model(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Learned:
        def build(self) -> nn.Module:
            class Weighted(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.log_scale = nn.Parameter(torch.zeros(()))

                def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
                    return (prediction - target).abs().mean() * self.log_scale.exp() - self.log_scale

            return Weighted()

    monkeypatch.setitem(LOSS_BUILDER_REGISTRY, "learned", Learned)
    run = script("--trainer", "bc", "--loss", "learned", "--steps", 10)
    assert float(weights(run, "loss")["log_scale"]) != 0
    assert "train/lr.loss" in read_lines(run / "metrics.jsonl")[-1]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "schedulefree"])
def test_every_optimizer_trains_and_resumes(script: Script, optimizer: str) -> None:
    options = (
        "--trainer",
        "bc",
        "--optimizer",
        optimizer,
        "--optimizer.lr",
        0.01,
        "--save-every",
        10,
        "--log-every",
        7,
    )
    whole = script(*options, "--steps", 30, folder="whole")
    lines = read_lines(whole / "metrics.jsonl")
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    interrupt_after(script, 15, *options, "--steps", 30)
    assert states(script("--resume", whole.parent / "run")) == states(whole)


# ---- precision, accumulation, clipping -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["zero first", "zero last"])
def test_accumulated_micro_steps_equal_one_step(script: Script, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    if order == "zero last":

        def train_step(self: Any, data: dict[str, Any]) -> dict[str, Any]:
            loss, metrics = self.losses(data)
            loss.backward()
            self.optimizers["policy"].step()
            self.optimizers["policy"].zero_grad()
            return metrics

        monkeypatch.setattr(TRAINER_REGISTRY["bc"], "train_step", train_step)
    options = ("--trainer", "bc", "--optimizer", "sgd", "--optimizer.lr", 0.1, "--steps", 50, "--grad-clip", 0.5)
    one = script(*options, folder="one")
    two = script(*options, "--grad-accumulation", 2, folder="two")
    assert 0 < difference(weights(one), weights(two)) < 1e-6
    norms = [[line["train/grad_norm.policy"] for line in read_lines(run / "metrics.jsonl")] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_accumulation_is_refused_where_it_would_be_wrong(script: Script) -> None:
    with pytest.raises(UserError, match="--grad-accumulation above 1 needs a trainer that declares accumulates"):
        script("--trainer", "actor_critic", "--grad-accumulation", 2)


def step_hook(optimizer: Any, finite: Finite, clip: float) -> offline_trainer.StepHook:
    """The hook of a learner that has one model, "policy", and nothing else."""
    from accelerate import Accelerator

    gradients = {"policy": Gradients(0, "policy", optimizer, finite)}
    learner: Any = SimpleNamespace(gradients=gradients, metrics=Metrics(), optimizers={"policy": optimizer})
    return offline_trainer.StepHook(Accelerator(), learner, "policy", clip)


def test_clipping_bounds_the_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0)
    parameter = optimizer.param_groups[0]["params"][0]
    hook = step_hook(optimizer, Finite(["policy"], torch.device("cpu")), clip=0.5)
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.3, 0.0, -0.4], rel=1e-4)  # norm 5 cut to 0.5
    assert hook.metrics.means() == {"train/grad_norm.policy": 5.0}  # the norm before


def test_bf16_trains_as_well_with_many_updates_in_one_call(script: Script) -> None:
    def loss(precision: str) -> float:
        options = ("--trainer", "many_updates", "--steps", 20, "--log-every", 1, "--optimizer.lr", 3e-3)
        run = script(*options, "--mixed-precision", precision, folder=precision)
        assert json.loads((run / "args.json").read_text())["mixed_precision"] == precision
        return read_lines(run / "metrics.jsonl")[-1]["train/loss_policy"]

    full, half = loss("no"), loss("bf16")
    assert full != half and half < 2 * full + 0.02


def test_bf16_through_the_launchers_variable(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what accelerate launch --mixed_precision bf16 sets
    run = script("--trainer", "bc", "--steps", 3)
    assert json.loads((run / "args.json").read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16 is not supported .* use bf16"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed and FSDP launches are not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "DeepSpeed and FSDP launches are not supported"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but accelerate sees 1 process.*ACCELERATE_USE_CPU=true"),
    ],
)
def test_launches_that_would_train_wrongly_are_refused(
    script: Script, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        script("--trainer", "bc", "--steps", 1)


# ---- stopping on numbers that are not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_before_the_step(script: Script, tmp_path: Path, kind: str) -> None:
    options = ("--trainer", "bc", "--loss", "bad", "--loss.kind", kind, "--save-every", 5, "--steps", 60)
    with pytest.raises(FloatingPointError, match="loss or gradient of model 'policy' is not finite at step 20"):
        script(*options)
    run = tmp_path / "run"
    assert "step 20" in json.loads((run / "status.json").read_text())["reason"]
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert (run / "error-rank0.txt").exists()
    assert all(bool(value.isfinite().all()) for value in weights(run).values())
    folder, manifest = checkpoint.newest(run / "checkpoints")
    assert manifest["step"] == 20


def test_a_gradient_that_is_not_finite_stops_before_the_step(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Explodes(toy.Minimal):
        def train_step(self, data: dict[str, Any], iterations: int) -> dict[str, Any]:  # type: ignore[override]
            if iterations == 7:
                for parameter in self.models["policy"].parameters():
                    parameter.register_hook(lambda gradient: gradient * float("inf"))
            return super().train_step(data)

    monkeypatch.setitem(TRAINER_REGISTRY, "explodes", Explodes)
    with pytest.raises(FloatingPointError, match="model 'policy' is not finite at step 7"):
        script("--trainer", "explodes", "--steps", 20)


@pytest.mark.parametrize("whose", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gated_step_changes_nothing_until_it_is_looked_at(fused: bool, whose: str) -> None:
    """On a GPU nothing may wait for the flag: the update is gated on the device, `check` reads the flag later.

    A fused optimizer obeys the flag, another one gets gradients of zero.
    """
    parameter = nn.Parameter(torch.ones(2))
    optimizer: Any = torch.optim.Adam([parameter], fused=True) if fused else torch.optim.SGD([parameter], lr=1.0)
    finite = Finite(["policy"], torch.device("cpu"))
    hook = step_hook(optimizer, finite, clip=0.0)
    hook.gradients.waits = False  # as where there is a GPU
    if fused:
        optimizer.found_inf = finite.flags[0]
    with Launches() as launches:  # norm of all gradients, loss, flag
        parameter.grad, hook.gradients.loss = torch.ones(2), torch.tensor(1.0)
        hook(optimizer, (), {})
    assert launches.number <= (4 if fused else 6) + 2  # with those of this test's own tensors
    hook.clip = 1.0  # by the norm, which is not finite either
    for iteration, bad in ((3, False), (4, True), (5, False)):
        finite.begin(iteration)
        parameter.grad = torch.tensor([float("nan"), 1.0] if bad and whose == "gradient" else [1.0, 1.0])
        hook.gradients.loss = torch.tensor(float("inf") if bad and whose == "loss" else 1.0)
        optimizer.step()
        if iteration == 3:
            finite.check()
            before = parameter.tolist()
            assert before != [1.0, 1.0]
    assert parameter.tolist() == before
    with pytest.raises(FloatingPointError, match="step 4"):
        finite.check()


def test_a_metric_that_is_no_scalar_is_named(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(toy.Minimal):
        def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
            return super().train_step(data) | {"histogram": torch.zeros(3)}

    monkeypatch.setitem(TRAINER_REGISTRY, "odd", Odd)
    with pytest.raises(TypeError, match=r"metric 'histogram' has shape \(3,\); expected a scalar"):
        script("--trainer", "odd", "--steps", 5)


# ---- resume --------------------------------------------------------------------------------------------------------


class InterruptError(Exception):
    """Stands in for kill -9: nothing of the script runs after it."""


def interrupt_after(script: Script, calls: int, *options: object) -> None:
    """Train until the trainer has been called so often, then die."""
    name = str(options[options.index("--trainer") + 1])
    cls = TRAINER_REGISTRY[name]
    count = iter(range(10**9))
    whole = cls.train_step

    def train_step(self: Any, data: dict[str, Any]) -> dict[str, Any]:
        if next(count) == calls:
            raise InterruptError
        return whole(self, data)

    cls.train_step = train_step
    try:
        with pytest.raises(InterruptError):
            script(*options)
    finally:
        cls.train_step = whole


@pytest.mark.parametrize("died_at", [11, 20, 37])
def test_a_resumed_run_equals_one_that_never_stopped(script: Script, died_at: int) -> None:
    options = ("--trainer", "bc", "--steps", 45, "--save-every", 10, "--log-every", 7, "--model.dropout", 0.3)
    options = (*options, "--eval-every", 15, "--eval-episodes", 3)
    whole = script(*options, folder="whole")
    interrupt_after(script, died_at, *options)
    resumed = whole.parent / "run"
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write('{"step": 44, "torn')
    script("--resume", resumed)
    assert states(resumed) == states(whole)  # weights, optimizer, schedule, random generators, unlogged metrics
    assert learned(resumed) == learned(whole)
    assert (resumed / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    policies = [(run / "policy" / "model.safetensors").read_bytes() for run in (resumed, whole)]
    assert policies[0] == policies[1]
    assert os.readlink(resumed / "checkpoints" / "best") == os.readlink(whole / "checkpoints" / "best")


@pytest.mark.parametrize("name", [*toy.TRAINERS, "shortcut"])
def test_every_trainer_resumes_exactly(script: Script, name: str) -> None:
    """Averaged weights and what is drawn, too."""
    shortcut = (*toy.TRAINERS["flow"], "--trainer.objective", "shortcut")
    options = (*toy.TRAINERS.get(name, shortcut), "--steps", 24, "--save-every", 8)
    options = (*options, "--eval-every", 12, "--eval-episodes", 1)
    whole = script(*options, folder="whole")
    interrupt_after(script, 13, *options)
    resumed = script("--resume", whole.parent / "run")
    assert states(resumed) == states(whole) and learned(resumed) == learned(whole)
    assert (resumed / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    policies = [(run / "policy" / "model.safetensors").read_bytes() for run in (resumed, whole)]
    assert policies[0] == policies[1]


def test_actor_critic_resumes_exactly(script: Script) -> None:
    options = ("--trainer", "actor_critic", "--optimizer", "adam", "--save-every", 10, "--steps", 40)
    whole = script(*options, folder="whole")
    interrupt_after(script, 25, *options)
    assert states(script("--resume", whole.parent / "run")) == states(whole)


def test_own_state_of_a_trainer_is_kept(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(toy.Minimal):
        total = 0

        def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
            self.total += 1
            return super().train_step(data) | {"total": self.total}

        def state_dict(self) -> dict[str, Any]:
            return {"total": self.total, "nested": (1, [torch.ones(2)])}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            assert state["nested"][0] == 1 and torch.equal(state["nested"][1][0], torch.ones(2))
            self.total = state["total"]

    monkeypatch.setitem(TRAINER_REGISTRY, "counts", Counts)
    run = script("--trainer", "counts", "--steps", 10, "--log-every", 1)
    script("--resume", run, "--steps", 15)
    assert read_lines(run / "metrics.jsonl")[-1]["train/total"] == 15


def test_resume_of_a_finished_run(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    run = script("--trainer", "bc", "--steps", 10)
    before = states(run)
    script("--resume", run)
    assert "is finished at step 10; increase --steps" in capsys.readouterr().out
    assert states(run) == before
    script("--resume", run, "--steps", 20)
    assert "the learning-rate schedule keeps its length of 10 updates" in capsys.readouterr().out
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 20, "reason": ""}
    script("--resume", run)  # the new number of steps is the run's own now
    assert "is finished at step 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--optimizer.lr", "0.5"), r"cannot change: optimizer.lr 0.001 -> 0.5"),
        (("--seed", "3", "--grad-clip", "1"), r"cannot change: grad_clip 0.0 -> 1.0; seed 0 -> 3"),
        (("--trainer", "minimal"), r"cannot change: trainer bc -> minimal"),
        (("--model.hidden-dims", "8"), r"model.policy.hidden_dims \[256, 256, 256\] -> \[8\]"),
    ],
)
def test_resume_refuses_what_would_be_another_run(script: Script, options: tuple[str, ...], message: str) -> None:
    run = script("--trainer", "bc", "--steps", 5)
    with pytest.raises(UserError, match=message):
        script("--resume", run, "--steps", 9, *options)


def test_a_run_records_what_it_used_and_keeps_that_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset knows the environment, and is smaller than the default batch."""
    monkeypatch.setitem(TRAINER_REGISTRY["bc"].defaults, "batch-size", 10**6)
    options = ["--dataset", "toy", "--steps", "5", "--eval-episodes", "2", "--run-dir", str(tmp_path / "run")]
    in_this_process(offline_trainer.main, options)
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    used = record["args"]
    assert used["env"] == "gymnasium" and used["env_options"]["id"] == "TendonToy-v0"
    result = read_lines(tmp_path / "run" / "eval.jsonl")[0]
    assert record["env"] == {"name": "gymnasium"} | used["env_options"] == result["env"]
    assert used["batch_size"] == 180 and used["workers"] == 0
    in_this_process(offline_trainer.main, ["--resume", str(tmp_path / "run"), "--steps", "9"])
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"] == used | {"steps": 9}


def test_a_run_that_recorded_what_it_did_not_use_resumes_with_that_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs did once: what is recorded stays as it is in their checkpoints."""
    options = ["--dataset", "toy", "--steps", "5", "--eval-episodes", "2", "--run-dir", str(tmp_path / "run")]
    chosen = {"env_options": {"id": "Pendulum-v1"}, "workers": None}
    with monkeypatch.context() as before:
        settled = asdict
        before.setattr("components.run.record.asdict", lambda args: settled(args) | chosen)
        in_this_process(offline_trainer.main, options)
    for steps in ("9", "12"):
        in_this_process(offline_trainer.main, ["--resume", str(tmp_path / "run"), "--steps", steps])
        record = json.loads((tmp_path / "run" / "args.json").read_text())
        assert record["args"] | chosen == record["args"] and record["env"]["id"] == "TendonToy-v0"
    with pytest.raises(UserError, match=r"cannot change: env.id Pendulum-v1 -> TendonToy-v0"):
        parse(offline_trainer.Args, ["--resume", str(tmp_path / "run"), "--env.id", "TendonToy-v0"], REGISTRIES)


@pytest.mark.parametrize(
    ("argv", "task", "folder"),
    [
        (["--dataset", "metaworld", "--dataset.task", "reach-v3"], "reach-v3", "reach-v3"),
        (["--dataset", "metaworld", "--dataset.task", "reach-v3", "--env.task", "push-v3"], "push-v3", None),
        (["--dataset", "d4rl", "--dataset.path", "x/half_cheetah-v2.hdf5"], None, "half_cheetah-v2"),
    ],
)
def test_help_and_folder_name_the_environment_of_the_data(
    argv: list[str], task: str | None, folder: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for script, trainer in ((offline_trainer, "iql"), (online_trainer, "rlpd")):
        args = parse(script.Args, ["--trainer", trainer, *argv], REGISTRIES)
        assert getattr(args.env_options, "task", None) == task
        assert folder is None or args.subject == folder
    if task:
        with pytest.raises(SystemExit):
            parse(offline_trainer.Args, [*argv, "--help"], REGISTRIES)
        assert f"(default: {'reach-v3' if folder else task})" in capsys.readouterr().out


def test_resume_keeps_what_the_run_recorded_when_defaults_have_changed(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version has other defaults and further options; the record is compared with the checkpoint's."""
    run = script("--trainer", "bc", "--steps", 1)
    path, whole = run / "args.json", json.loads((run / "args.json").read_text())

    def resumed(*options: str, **recorded: Any) -> Any:
        path.write_text(json.dumps(whole | {"args": whole["args"] | recorded}))
        return parse(offline_trainer.Args, ["--resume", str(run), *options], REGISTRIES)

    for option, value in (("loss", "l1"), ("optimizer", "sgd"), ("optimizer.lr", 0.5), ("grad-clip", 7.0)):
        monkeypatch.setitem(TRAINER_REGISTRY["bc"].defaults, option, value)
    args = resumed()
    assert (args.loss, args.optimizer, args.optimizer_options.lr, args.grad_clip) == ("mse", "adamw", 1e-3, 0.0)
    older = {key: value for key, value in whole["args"]["optimizer_options"].items() if key != "warmup_steps"}
    assert resumed(optimizer_options=older).optimizer_options.warmup_steps == 0
    for options, recorded, message in (
        (("--optimizer.warmup-steps", "5"), older, "cannot change: optimizer.warmup_steps 0 -> 5"),
        ((), older | {"lr": 0.1}, "cannot change: optimizer.lr 0.001 -> 0.1"),
        (
            (),
            older | {"lr": "fast"},
            "args.json: damaged .* args.optimizer_options.lr is 'fast'; expected a number",
        ),
    ):
        with pytest.raises(UserError, match=message):
            resumed(*options, optimizer_options=recorded)


def test_resume_goes_back_behind_a_damaged_checkpoint(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    whole = script("--trainer", "bc", "--steps", 30, "--save-every", 10, folder="whole")
    interrupt_after(script, 25, "--trainer", "bc", "--steps", 30, "--save-every", 10)
    run = whole.parent / "run"
    path = run / "checkpoints" / "step-000000020" / "model-policy.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    script("--resume", run)
    assert any("model-policy.safetensors: size or hash does not match" in r.message for r in caplog.records)
    assert (run / "checkpoints" / ".damaged-step-000000020").exists()
    assert states(run) == states(whole)


def test_resume_to_a_step_that_lies_behind(script: Script, tmp_path: Path) -> None:
    interrupt_after(script, 25, "--trainer", "bc", "--steps", 30, "--save-every", 10)
    with pytest.raises(UserError, match="--steps 15 is below step 20, which .*run has reached"):
        script("--resume", tmp_path / "run", "--steps", 15)


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_the_held_out_loss_of_other_kinds_of_losses(script: Script, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    class Own(toy.Minimal):
        def losses(self, data: dict[str, Any]) -> Any:
            loss = self.loss(self.models["policy"](data), data["action"])
            return loss if kind == "tensor" else {"a": loss / 2, "b": loss / 2}

    monkeypatch.setitem(TRAINER_REGISTRY, "own", Own)
    options = ("--steps", 10, "--optimizer", "sgd", "--loss", "mse")
    own, bc = script("--trainer", "own", *options, folder="own"), script("--trainer", "bc", *options, folder="bc")
    values = [read_lines(run / "metrics.jsonl")[-1]["val/loss"] for run in (own, bc)]
    assert values[0] > 0 and abs(values[0] - values[1]) < 0.2


def test_a_run_is_not_finished_without_its_last_checkpoint(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when another process is killed while the last checkpoint is written."""
    whole = script("--trainer", "bc", "--steps", 30, "--save-every", 10, folder="whole")
    save = checkpoint.save

    def failing(root: Path, step: int, *arguments: Any) -> None:
        if step in (10, 30):
            raise RuntimeError("Connection reset by peer")
        save(root, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", failing)
        with pytest.raises(RuntimeError, match="Connection reset by peer"):
            script("--trainer", "bc", "--steps", 30, "--save-every", 10)
    run = tmp_path / "run"
    assert "CHECKPOINT AT STEP 10 FAILED, 1 in a row" in capsys.readouterr().out
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    script("--resume", run)
    assert states(run) == states(whole)


def test_resume_of_nothing(script: Script, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        script("--resume", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no run here"):
        script("--resume", tmp_path / "file")


# ---- starting from another run -------------------------------------------------------------------------------------


def test_init_from_load_and_freeze(script: Script) -> None:
    first = script("--trainer", "actor_critic", "--steps", 20, folder="first")
    second = script(
        "--trainer", "actor_critic", "--steps", 1, "--init-from", first, "--optimizer.lr", 1e-9, folder="second"
    )
    for name in ("policy", "critic"):
        assert difference(weights(first, name), weights(second, name)) < 1e-6
    third = script("--trainer", "bc", "--steps", 1, "--load", f"policy={first}", "--optimizer.lr", 1e-9, folder="third")
    assert difference(weights(first), weights(third)) < 1e-6


def test_frozen_weights_do_not_move(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(toy.Minimal):
        """An encoder with batch statistics, and a policy after it."""

        needs = {"policy": "mlp", "encoder": "norm"}

        def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
            loss = self.loss(self.models["policy"](self.models["encoder"](data["observation.state"])), data["action"])
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
            return {"loss": loss}

    class Norm:
        def build(self, spec: dict[str, Any]) -> nn.Module:
            return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))

    from components import MODEL_BUILDER_REGISTRY

    monkeypatch.setitem(TRAINER_REGISTRY, "both", Both)
    monkeypatch.setitem(MODEL_BUILDER_REGISTRY, "norm", Norm)
    first = script("--trainer", "both", "--steps", 20, folder="first")
    options = (
        "--trainer",
        "both",
        "--load",
        f"encoder={first}",
        "--freeze",
        "encoder",
        "--optimizer.weight-decay",
        0.1,
    )
    second = script(*options, "--steps", 30, "--eval-every", 5, folder="second")
    assert difference(weights(first, "encoder"), weights(second, "encoder")) == 0  # running means, too
    assert difference(weights(first), weights(second)) > 0
    assert "train/lr.encoder" not in read_lines(second / "metrics.jsonl")[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--freeze", "policy"), "nothing to train: --freeze policy"),
        (("--freeze", "polcy"), "no model 'polcy' to load or freeze; nearest: policy"),
        (("--load", "policy"), "--load policy: expected NAME=RUN"),
        (("--load", "policy=nowhere"), "nowhere: no such run folder to load model 'policy' from"),
        (
            ("--init-from", "FIRST", "--model.hidden-dims", "8"),
            r"model 'policy' does not fit: net.0.weight: \[256, 5\] there, \[8, 5\] here; net.0.bias.*"
            r"; it was built with --model.hidden-dims 256 256",
        ),
        (
            ("--init-from", "FIRST", "--model", "gru"),
            "'policy' does not fit: .*; it was built with --model policy=mlp$",
        ),
        (("--load", "critic=FIRST", "--trainer", "actor_critic"), "no model 'critic'; it holds policy"),
        (("--optimizer.lr-scale", "polcy=2"), "no model 'polcy'; known: policy"),
    ],
)
def test_parts_that_do_not_fit_are_listed_and_refused(script: Script, options: tuple[str, ...], message: str) -> None:
    first = script("--trainer", "bc", "--steps", 1, folder="first")
    options = tuple(option.replace("FIRST", str(first)) for option in options)
    with pytest.raises(UserError, match=message):
        script(*(() if "--trainer" in options else ("--trainer", "bc")), *options, folder="second")


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer", "bcc"), "--trainer bcc: unknown trainer; nearest: bc"),
        (("--dataset", "metawrld"), "--dataset metawrld: unknown dataset; nearest: metaworld"),
        (("--env", "gymnasum"), "--env gymnasum: unknown env; nearest: gymnasium"),
        (("--dataset.episods", "3"), "unknown option --dataset.episods; nearest: --dataset.episodes"),
        (("--batchsize", "3"), "unknown option --batchsize; nearest: --batch-size"),
        (("--steps", "many"), "^Error parsing --steps: invalid literal for int.*'many'$"),
        (
            ("--mixed-precision", "int8"),
            r"^invalid choice 'int8' for argument '--mixed-precision'\. Expected one of .*bf16",
        ),
        (("x?",), r"^unexpected word x\?: it is no option.s value; see --help$"),
        (("--trainer",), "^Missing value for argument '--trainer'"),
        (("--steps", "0"), "--steps 0 must be 1 or more"),
        (("--log-every", "-5"), "--log-every -5 must be 1 or more"),
        (("--batch-size", "0"), "--batch-size 0 must be 1 or more"),
        (("--batch-size", "181"), "--batch-size 181 is larger than the data, which has 180 samples"),
        (("--batch-size", "15", "--grad-accumulation", "2"), "--batch-size 15 is not divisible by 2 .*use 14 or 16"),
        (("--optimizer.lr", "-1"), "--optimizer.lr -1.0 must be above 0"),
        (("--model.hidden-dims", "0"), "--model.hidden-dims"),
        (("--dataset.nan",), "1 NaN or Inf values in 'observation.state', first in episode 3 at step 2"),
        (
            ("--dataset.action-dim", "3", "--eval-episodes", "2"),
            "takes actions of width 2, the dataset and the model have 3",
        ),
        (("--env", "gymnasium", "--env.id", "Pendulum-v2", "--eval-episodes", "2"), "Pendulum"),
        (
            ("--env", "gymnasium", "--env.id", "Pendulum-v1", "--eval-episodes", "2"),
            "takes actions of width 1, .* have 2",
        ),
        (("--plugins", "no_such_module"), "--plugins no_such_module: no such module"),
        (("--normalise", "action=quantil"), "unknown mode 'quantil'; nearest: quantile"),
        (("--normalise", "action"), "--normalise action: expected KEY=VALUE"),
        (("--compile", "--trainer", "minimal"), r"--compile needs a trainer with losses\(data\)"),
    ],
)
def test_bad_input_gets_one_line_before_step_1(
    script: Script, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        script(*(() if "--trainer" in options else ("--trainer", "bc")), *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_plugin_that_fails_names_its_file_and_line(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text("x = 1\ny = x / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--plugins broken_plugin: ZeroDivisionError: .*broken_plugin.py:2"):
        script("--plugins", "broken_plugin")


@pytest.mark.parametrize("model", ["policy=mlp", "critic=mlp", ""])
def test_a_model_that_the_trainer_cannot_use_is_named_with_the_remedy(
    script: Script, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    if not model:  # a crash of the trainer's own models is not theirs
        monkeypatch.setattr(TRAINER_REGISTRY["iql"], "losses", lambda self, data: None.absent)  # type: ignore[attr-defined]
    with pytest.raises((AttributeError, TypeError)) as crash:
        script("--trainer", "iql", "--steps", 1, "--dataset.action-scale", 3, *(("--model", model) if model else ()))
    remedy = f"where this trainer cannot use such a model, leave out --model {model}"
    assert (remedy in crash.value.__notes__) == bool(model)
    assert len(crash.value.__notes__) == 1 + bool(model)


def lock_and_leave(run: Path) -> None:
    """In another process, which holds no lock of this one."""
    lock(run).close()


def test_run_folders_that_cannot_be_used(script: Script, tmp_path: Path) -> None:
    run = script("--trainer", "bc", "--steps", 1)
    with pytest.raises(UserError, match=f"holds a run; continue it with --resume {re.escape(str(run))}"):
        script("--trainer", "bc", "--steps", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        script("--trainer", "bc", folder="file/run")
    with multiprocessing.get_context("fork").Pool(1) as other:
        held = lock(run)
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            other.apply(lock_and_leave, (run,))
        held.close()
        other.apply(lock_and_leave, (run,))


def test_damaged_records_of_a_run(script: Script, tmp_path: Path) -> None:
    """Lines that are no JSON are dropped; what cannot be read is named, in one line."""
    run = script("--trainer", "bc", "--steps", 20, "--log-every", 10)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n{"step": "x"}\n{"step": Infinity}\n{"step"')
    (run / "status.json").write_text('{"state": 1, "step": "x", "reason": []}')
    script("--resume", run, "--steps", 30)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [10, 20, 30]
    record = json.loads((run / "args.json").read_text())
    for damage in ({"argv": 3}, {"args": []}, {"args": {}}):
        (run / "args.json").write_text(json.dumps(record | damage))
        with pytest.raises(UserError, match="args.json: damaged"):
            script("--resume", run)


def test_a_folder_with_other_files_is_used_and_kept(script: Script, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        script("--trainer", "bc", "--dataset.nan")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    assert (script("--trainer", "bc", "--steps", 1) / "notes.txt").read_text() == "mine"


def test_a_failed_run_is_one_line_and_its_exit_code(tmp_path: Path) -> None:
    """As a process; those of a mistake are in `test_debug.py`."""
    script_path = ROOT / "offline_trainer.py"
    toy = ("--plugins", "toy", "--dataset", "toy", "--eval-episodes", 0, "--batch-size", 16, "--steps", 25)
    failed = command("python", script_path, "--loss", "bad", *toy, "--run-dir", "bad", cwd=tmp_path)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "step 20" in failed.stderr


def test_help_is_quick_and_shows_true_defaults(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("python", ROOT / "offline_trainer.py", "--trainer", "bc", "--help", cwd=tmp_path, COLUMNS="200")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0 and seconds < 5, f"{seconds} s"  # about 2.5 s on an idle machine
    for text in ("One of bc, ", "--optimizer.lr FLOAT", "(default: 0.001)", "--dataset.demos INT", "(default: mse)"):
        assert text in done.stdout, text
    assert "--optimizer.schedule {constant,linear,cosine,onecycle}" in done.stdout
    assert "Schedule of the learning rate. (default: cosine)" in done.stdout
    assert "Adam with decoupled weight decay" in done.stdout  # what a component says of itself heads its options


def test_secrets_stay_out_of_the_run_folder(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-in-the-run-folder")
    run = script("--trainer", "bc", "--steps", 2)
    for path in run.rglob("*"):
        assert not path.is_file() or b"canary-in-the-run-folder" not in path.read_bytes()


def test_policy_and_run_agree(script: Script) -> None:
    run = script("--trainer", "bc", "--steps", 300)
    state = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    expert = state @ toy.EXPERT.numpy()
    assert np.abs(load_policy(run).act({"observation.state": state}) - expert).mean() < 0.15
