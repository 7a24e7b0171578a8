"""`--debug`: what it shows beside a small run, and that a crash reaches a debugger."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import online_trainer
from components import REGISTRIES, TRAINER_REGISTRY, UserError
from components.errors import SignalledExit, crashes_pass, let_through, one_line
from components.learning.learner import Learner
from components.run import debug, process
from components.run.arguments import parse
from components.run.one_batch import learn_by_heart, verdict
from components.run.record import Run
from conftest import learned, states

Script = Callable[..., Path]


@pytest.mark.parametrize(
    ("which", "options"),
    [
        ("script", ("--trainer", "bc", "--model.dropout", 0.3, "--ema-decay", 0.9, "--grad-accumulation", 2)),
        ("script", ("--trainer", "minimal", "--optimizer.schedule", "cosine")),
        ("online", ("--trainer", "sac", "--steps", 40)),
    ],
    ids=["losses", "train_step", "online"],
)
def test_what_is_shown_changes_no_number(
    which: str, options: tuple, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = request.getfixturevalue(which)
    run = train(*options, "--debug", "--eval-episodes", 0)
    assert (run / "trace.json").exists()
    monkeypatch.setattr(debug, "learn_by_heart", lambda learner, batch: "")
    monkeypatch.setattr(debug, "PROFILED", 0)
    plain = train(*options, "--debug", "--eval-episodes", 0, folder="plain")
    assert not (plain / "trace.json").exists()
    assert states(run) == states(plain) and learned(run) == learned(plain)


class Regression:
    """Two models, of which the critic is regressed on targets."""

    def __init__(self, models: nn.ModuleDict, key: str = "") -> None:
        self.models, self.key, self.seen = models, key, 0

    def losses(self, data: dict[str, Tensor]) -> Any:
        self.seen += 1
        loss = (self.models["policy"](data["x"]) - data["y"]).square().mean()
        target = self.models["policy"](data["x"]).detach() + torch.randn_like(data["y"])
        critic = (self.models["critic"](data["x"]) - target).square().mean()
        return (loss + critic, {self.key: critic}) if self.key else loss

    def train_step(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        raise ArithmeticError("it is not called")


def learner_of(policy: nn.Module, trainer: Callable[[nn.ModuleDict], Any]) -> Learner:
    torch.manual_seed(0)
    models = nn.ModuleDict({"policy": policy, "critic": nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2))})
    opts = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    return Learner(trainer(models), models, opts, nn.MSELoss(), torch.device("cpu"), planned=3)


class Constant(nn.Module):
    """It does not look at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.unused = nn.Parameter(torch.zeros(2)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + 0 * self.unused.weight.sum()


def batch_of(count: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(count, 3, generator=generator), "y": torch.randn(count, 2, generator=generator)}


def test_a_batch_is_learnt_by_heart_or_not() -> None:
    line = learn_by_heart(
        learner_of(nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 2)), Regression), batch_of(4)
    )
    assert re.fullmatch(r"one batch: loss [\d.]+ -> [\d.e-]+ in \d+ updates: yes, it falls to zero", line)
    line = learn_by_heart(learner_of(Constant(), lambda models: Constantly(models)), batch_of())
    assert re.search(r"in 200 updates: NO, \d\d% is left", line)
    # Whatever the policy does, the critic learns its targets, noise and all, while the policy stays.
    line = learn_by_heart(learner_of(Constant(), lambda models: Regression(models, "critic_loss")), batch_of(4))
    assert "critic_loss at fixed targets" in line and line.endswith("yes, it falls to zero")


class Constantly(Regression):
    """The loss of the policy alone."""

    def losses(self, data: dict[str, Tensor]) -> Any:
        return (self.models["policy"](data["x"]) - data["y"]).square().mean()


class OnPolicy(Regression):
    """Has rollouts."""

    def estimate(self, rollout: Any) -> Any:
        return rollout


class NoLoss:
    """Returns no loss."""

    def __init__(self, models: nn.ModuleDict) -> None:
        self.models = models

    def train_step(self, data: dict[str, Tensor]) -> dict[str, float]:
        return {"q": 1.0}


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        (OnPolicy, "the losses keep the policy close"),
        (lambda models: Regression(models, "conservative_loss"), "a conservative critic"),
        (NoLoss, "no losses(data), and returns no loss"),
    ],
)
def test_a_loss_without_zero_is_not_tried_and_says_why(trainer: Any, reason: str) -> None:
    assert reason in learn_by_heart(learner_of(Constant(), trainer), batch_of())


@pytest.mark.parametrize(
    ("losses", "hurried", "said"),
    [
        ([1.0, 0.5, 0.09], False, "yes"),
        ([1.0, 0.2, -0.5], False, "it falls below zero: right for a log-likelihood"),
        ([-1.0, -2.0], False, "it falls below zero"),
        ([-2.0, -1.0], False, "NO, it is below zero, and does not fall"),
        ([0.0, *[0.5] * 20], False, "NO, it began at zero"),
        ([1.0, 0.5, float("nan")], False, "NO, it is not finite"),
        ([1.0, 0.8, 0.7, 0.5], False, "not yet, 50% is left, and it still falls"),
        ([1.0, *[0.5] * 20], False, "NO, 50% is left"),
        ([1.0, *[0.5] * 20], True, "not yet, 50% is left"),
    ],
)
def test_the_verdict(losses: list[float], hurried: bool, said: str) -> None:
    assert verdict(losses, hurried).startswith(said)


def test_parameters_without_gradient_are_named_and_the_time_is_shown(tmp_path: Path) -> None:
    class Trainer(Constantly):
        def train_step(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = self.losses(data)
            loss.backward()
            for optimizer in learner.optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            return {"loss": loss.detach()}

    learner, said = learner_of(Constant(), Trainer), list[str]()
    log: Any = lambda record: None  # noqa: E731
    run: Any = SimpleNamespace(path=tmp_path, say=lambda *lines: said.extend(filter(None, lines)), log=log)
    run.cleanup = SimpleNamespace(callback=lambda function: None)
    debug.watch(learner, run)
    step, update = torch.optim.Optimizer.step, learner.update  # the loops keep it
    for _ in range(3):
        update(batch_of())
    assert sum(line.startswith("batch x:") for line in said) == 1
    names = "policy.unused.weight, policy.unused.bias, critic.0.weight, critic.0.bias, critic.2.weight, critic.2.bias"
    assert f"NO GRADIENT, or zero, in 3 updates: {names}" in said
    where = next(i for i, line in enumerate(said) if line.startswith("updates 2 to 3 took "))
    assert len(said[where + 1 :]) == 5 and any("ms  backward" in line for line in said[where:])
    assert sum(int(re.findall(r"(\d+)%", line)[0]) for line in said[where + 1 :]) in range(80, 103)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"backward", "optimizer step", "rest of train_step"} <= {event.get("name") for event in events}
    assert torch.optim.Optimizer.step is step and "train_step" not in vars(learner.trainer)


# ---- crashes -------------------------------------------------------------------------------------------------------


def end_of(monkeypatch: pytest.MonkeyPatch, main: Callable[[list[str]], int], *argv: str) -> int:
    """The exit code of a script with this `main`."""
    monkeypatch.setattr(process, "leave", sys.exit)
    monkeypatch.setattr(process, "steady", lambda: None)
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as stop:
        process.run_script(main)
    return int(stop.value.code or 0)


@pytest.mark.parametrize("begun", [False, True])
def test_a_crash_is_one_line_that_names_the_file_with_the_traceback(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def main(argv: list[str]) -> int:
        with Run(folder, 0) as run:
            run.begun = begun
            raise ZeroDivisionError("one\ntwo")

    assert end_of(monkeypatch, main) == 1
    place = rf"\({re.escape(__file__)}:\d+\)"
    shown = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: ZeroDivisionError: one {place}; the traceback is in {folder}/error-rank0.txt\n", shown
    )
    assert "ZeroDivisionError: one\ntwo" in (folder / "error-rank0.txt").read_text()


def test_a_crash_without_a_folder_says_how_its_traceback_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(argv: list[str]) -> int:
        raise KeyError("x")

    def component(argv: list[str]) -> int:
        with one_line("model 'mine'"):
            raise KeyError("x")

    def mistake(argv: list[str]) -> int:
        raise UserError("--steps 0 must be 1 or more")

    assert end_of(monkeypatch, crash) == 1
    assert capsys.readouterr().err.endswith(
        ".py:" + str(crash.__code__.co_firstlineno + 1) + "); --debug shows the traceback\n"
    )
    assert end_of(monkeypatch, component) == 2
    assert re.search(r"^error: model 'mine': KeyError.*; --debug shows the traceback\n$", capsys.readouterr().err)
    assert end_of(monkeypatch, mistake) == 2 and capsys.readouterr().err == "error: --steps 0 must be 1 or more\n"


def test_a_stop_before_the_run_began_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> int:
        raise SignalledExit(143)

    assert end_of(monkeypatch, main) == 143 and capsys.readouterr().out == "stopped before the run began\n"


def test_with_debug_a_crash_passes_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def main(argv: list[str]) -> int:
        with Run(tmp_path, 0), one_line("model 'mine'"):
            raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError) as crash:
        end_of(monkeypatch, main, "--debug")
    assert crash.value.__notes__ == ["in model 'mine'"] and crash.traceback[-1].name == "main"
    monkeypatch.setattr(process, "leave", lambda code: pytest.fail("a debugger would lose control"))
    with pytest.raises(SystemExit, match="0"):
        process.run_script(lambda argv: 0)
    let_through(False)


@pytest.mark.parametrize("which", ["evaluation", "collection", "model"])
def test_with_debug_a_crash_of_a_component_passes_through(
    which: str, script: Script, online: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = ("--env", "faulty", "--env.at", 3, "--env.index", 0, "--debug")
    if which == "evaluation":
        with pytest.raises(ArithmeticError, match="simulator exploded"):
            script("--trainer", "bc", *faulty, "--eval-episodes", 1)
    elif which == "collection":
        with pytest.raises(ArithmeticError, match="simulator exploded"):
            online(*faulty)
    else:
        monkeypatch.setattr(TRAINER_REGISTRY["bc"], "policy", lambda self: nn.Linear(3, 3))
        with pytest.raises(TypeError, match="linear"):
            script("--trainer", "bc", "--debug")
        with pytest.raises(UserError, match=r"the policy fails on an observation: .*\(\S+\.py:\d+\)$"):
            script("--trainer", "bc", folder="again")
        assert not crashes_pass()  # as this command line has it


def test_rollouts_begin_without_random_actions() -> None:
    """The small value of --learning-starts is for replay buffers."""
    for name, steps in (("ppo", 0), ("sac", 20)):
        assert parse(online_trainer.Args, ["--trainer", name, "--debug"], REGISTRIES).learning_starts == steps
