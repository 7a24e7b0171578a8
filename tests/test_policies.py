"""Policies before the end: in every checkpoint, the newest, the best or that of a step, from any folder of a run."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from components import UserError, evaluate, export, load_policy
from components.acting.evaluation import Evaluator
from components.learning.learner import Learner
from components.run import checkpoint
from components.run.best import Best, best_of
from components.run.curves import read_lines
from components.run.files import read_tree
from components.run.policies import choose

Script = Callable[..., Path]
STATE = {"observation.state": np.linspace(-1, 1, 5, dtype=np.float32)}
BC = ("--trainer", "bc", "--model.hidden-dims", 16, "--steps", 40, "--eval-every", 10, "--save-every", 20)


class Killed(BaseException):
    """Ends a run as kill -9 would: nothing is recorded."""


def line(step: int, success: float | None = None, value: float | None = None, **more: Any) -> dict[str, Any]:
    return {"step": step, "success_rate": success, "return_mean": value, **more}


def of_steps(monkeypatch: pytest.MonkeyPatch, success: dict[int, float]) -> None:
    """Let evaluations have these success rates."""
    whole = Evaluator.evaluate

    def evaluated(self: Evaluator, step: int) -> Any:
        result, problem = whole(self, step)
        assert result is not None
        return result | {"success_rate": success[step], "success_ci": [0.0, 1.0]}, problem

    monkeypatch.setattr(Evaluator, "evaluate", evaluated)


def act(policy: Any) -> list[float]:
    policy.reset()
    return policy.act(STATE).tolist()


def saved(run: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in checkpoint.steps(run / "checkpoints")]


# ---- which is the best ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measures", "best"),
    [
        ([line(1, 0.5, 3), line(2, 0.8, 1), line(3, 0.6, 9)], (2, "success_rate", 0.8)),
        ([line(1, 0.5, 3), line(2, 0.5, 4), line(3, 0.5, 4)], (2, "success_rate", 0.5)),  # the return, then the earlier
        ([line(1, None, -3), line(2, None, -9), line(3, None, -3)], (1, "return_mean", -3.0)),
        ([line(1, action_error=0.3), line(2, action_error=0.1), line(3, action_error=0.2)], (2, "action_error", 0.1)),
        ([4.0, 2.0, 3.0], (2, "val/loss", 2.0)),
        ([0.1, line(2, None, -50), 0.01], (2, "return_mean", -50.0)),  # losses count until an evaluation succeeds
        ([line(1, None, 5), line(2, 0.0, 1), line(3, None, 9)], (2, "success_rate", 0.0)),
        ([float("nan"), line(2, None, float("nan")), 7.0], (3, "val/loss", 7.0)),
        ([line(1)], None),
    ],
)
def test_the_best_by_what_was_measured(measures: list[Any], best: tuple[int, str, float] | None) -> None:
    found = Best()
    for step, measure in enumerate(measures, 1):
        if isinstance(measure, float):
            assert found.held_out(step, {"val/loss": measure}) == {"val/loss": measure}
        else:
            found.evaluated(measure)
        assert not found.improved(step + 1)
    expected = dict(zip(("step", "metric", "value"), best, strict=True)) if best else None
    assert found.record == expected and found.step == (best[0] if best else -1)
    again = Best()
    again.load_state_dict(json.loads(json.dumps(found.state_dict())))
    assert again.record == expected and not again.improved(max(again.step, 0))  # it is saved already
    for measure in measures:
        if not isinstance(measure, float):
            again.evaluated(measure)  # an evaluation that was owed is repeated
    assert again.record == expected


def test_the_best_that_was_not_saved_is_forgotten_and_an_older_run_goes_on() -> None:
    best = Best()
    best.evaluated(line(1, 0.5, 0))
    best.evaluated(line(2, 0.9, 0))
    best.lost(2)
    assert best.step == 1
    best.lost(3)
    assert best.step == 1
    best = Best()
    best.load_state_dict({"best_step": 20, "best_loss": 0.5})
    assert best.record == {"step": 20, "metric": "val/loss", "value": 0.5} and not best.improved(20)
    best.held_out(40, {"val/loss": 0.6})
    assert best.step == 20


# ---- in a run ------------------------------------------------------------------------------------------------------


def test_every_checkpoint_has_its_policy(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """The best between two saves is saved, kept and found; evaluate, export and --init-from take it, too."""
    of_steps(monkeypatch, {10: 0.9, 20: 0.5, 30: 0.9, 40: 0.1})
    run = script(*BC, "--eval-episodes", 2, "--keep-last", 1, "--ema-decay", 0.9, folder="run")
    folder = run / "checkpoints" / "best"
    assert saved(run) in ([10, 40], [30, 40]) and os.readlink(folder) == f"step-{saved(run)[0]:09d}"  # by the return
    step, out = saved(run)[0], capsys.readouterr().out
    assert best_of(run) == {"step": step, "metric": "success_rate", "value": 0.9}
    assert f"best: step {step}, success rate 0.9; load_policy({str(run)!r}, which='best')\n" in out
    best, last = load_policy(run, which="best"), load_policy(run)
    averages = read_tree(folder / "model-ema_policy.safetensors")
    for weights, value in zip(best.module.state_dict().values(), averages.values(), strict=True):
        assert torch.equal(weights, value)
    assert act(best) == act(load_policy(folder)) == act(load_policy(run, which=step)) != act(last)
    assert act(last) == act(load_policy(run / "checkpoints" / "step-000000040")) == act(load_policy(run, which="40"))
    assert str(choose(run, "best")) == f"policy of step {step} (best: success rate 0.9)"
    assert str(choose(run)) == "policy of step 40 (last)" and str(choose(run / "policy")) == "policy of step 40"

    capsys.readouterr()
    assert evaluate.main([str(run), "--which", "best", "--eval-episodes", "2"]) == 0
    assert evaluate.main([str(folder), "--eval-episodes", "2"]) == 0
    assert f"{run}: policy of step {step} (best: success rate 0.9)" in capsys.readouterr().out
    assert [entry["step"] for entry in read_lines(run / "eval.jsonl")[-2:]] == [step, step]
    monkeypatch.setattr(export, "export", lambda policy, path, *_: path.write_text(str(act(policy))) and 0.0)
    assert export.main([str(folder)]) == 0 and (run / f"policy-step-{step:09d}.pt2").read_text() == str(act(best))
    assert export.main([str(run)]) == 0 and (run / "policy" / "policy.pt2").read_text() == str(act(last))
    with pytest.raises(UserError, match="would damage this checkpoint; name one in another folder"):
        export.main([str(run), "--out", str(folder / "policy.pt2")])
    checkpoint.verify(folder.resolve())  # and is as it was

    of_steps(monkeypatch, {1: 0.0})
    script(*BC, "--steps", 1, "--init-from", folder, "--optimizer.lr", 1e-12, "--eval-episodes", 0, folder="after")
    assert f"weights of policy, encoder from {folder}: step {step}\n" in caplog.text
    assert act(load_policy(tmp_path / "after")) == pytest.approx(act(best), abs=1e-5)
    for path, which, message in (
        (run, 50, rf"no policy of step 50; there are those of steps {step} \(best\), 40$"),
        (run, "middle", "which='middle': expected 'best', 'last' or a step"),
        (run, 0.5, "which=0.5: expected"),
        (folder, "last ", "expected 'best', 'last' or a step"),
        (run / "policy", "best", "holds one policy; which='best' chooses among those of a run's folder"),
        (folder, 40, "holds one policy"),
    ):
        with pytest.raises(UserError, match=message):
            load_policy(path, which=which)  # type: ignore[arg-type]


def test_a_run_that_goes_on_or_was_killed_has_a_policy(
    script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run, whole, before = Path(), checkpoint.save, []

    def save(root: Path, step: int, *arguments: Any) -> None:
        nonlocal run
        run = root.parent
        if step == 10:
            with pytest.raises(UserError, match="no policy here .*; the run has not saved a checkpoint yet"):
                load_policy(run)
        if step == 30:  # killed inside a save
            (root / ".tmp-step-000000030").mkdir()
            raise Killed
        whole(root, step, *arguments)
        before.append(load_policy(run))  # the run goes on

    options = (*BC, "--dataset.validation", 0.2, "--save-every", 10)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", save)
        script(*options)
    assert "policy of step 20 (the newest checkpoint; the run has not finished)" in caplog.text
    assert act(before[0]) != act(before[1]) == act(load_policy(run))
    best = best_of(run)
    assert best and (best["step"], best["metric"]) == (20, "val/loss")
    caplog.clear()
    damaged = run / "checkpoints" / "step-000000020" / "model.safetensors"
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert act(load_policy(run)) == act(before[0]) and "damaged checkpoint, trying the one before" in caplog.text
    with pytest.raises(UserError, match=r"no policy of step 20 \(best: held-out loss .*model.safetensors: size or"):
        load_policy(run, which="best")
    link, damage = run / "checkpoints" / "best", r"best: damaged checkpoint \([^)]*size or hash does not match\); take"
    for take in (load_policy, lambda path: checkpoint.load_weights(nn.Linear(1, 1), "policy", path)):
        with pytest.raises(UserError, match=damage):
            take(link)
    damaged.write_bytes(kept)
    outside, kept_link = shutil.copytree(link.resolve(), tmp_path / "outside"), os.readlink(link)
    link.unlink()
    link.symlink_to(outside)
    for take in (load_policy, lambda path: checkpoint.load_weights(nn.Linear(1, 1), "policy", path)):
        with pytest.raises(UserError, match="checkpoints/best is a link out of .*; it is not followed"):
            take(link)
    link.unlink()
    link.symlink_to(kept_link)
    script("--resume", run, "--steps", 60)
    shutil.rmtree(run / "policy")  # the last checkpoint has the same
    assert choose(run).step == 60


def test_without_a_measure_or_a_policy(
    script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = (*BC, "--dataset.validation", 0)
    with monkeypatch.context() as patch:  # as an older version saved
        patch.setattr(checkpoint.Checkpoints, "_write_policy", lambda *arguments: None)
        run = script(*options, "--steps", 20)
    assert best_of(run) is None and not (run / "checkpoints" / "best").exists()
    assert act(load_policy(run, which="best")) == act(load_policy(run))
    assert "policy of step 20 (the last: nothing is recorded by which one could be the best)" in caplog.text
    kept = (run / "policy").rename(run / "kept")
    for which in ("last", "best"):
        with pytest.raises(UserError, match="no policy here: its trainer has none, or an older version wrote the"):
            load_policy(run, which=which)
    with pytest.raises(
        UserError, match=r"no policy of step 20, as its trainer has none, or an older .*; there is none$"
    ):
        load_policy(run, which=20)
    described = json.loads((kept / "policy.json").read_text())
    assert described.pop("step") == 20
    (kept / "policy.json").write_text(json.dumps(described))
    kept.rename(run / "policy")
    assert str(choose(run)) == "policy of the last step (last)" and load_policy(run)
    script("--resume", run, "--steps", 30)
    assert choose(run).step == 30


def test_online_the_statistics_are_those_of_the_step(online: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    of_steps(monkeypatch, {20: 0.2, 40: 0.8, 60: 0.3})
    running = ("--normalise-observations", "--save-every", 0, "--eval-every", 20, "--eval-episodes", 1)
    run = online(*running, "--env", "savable")
    assert saved(run) == [40, 60] and best_of(run) == {"step": 40, "metric": "success_rate", "value": 0.8}
    means = []
    for which in ("best", "last"):
        policy = load_policy(run, which=which)
        folder = run / "checkpoints" / f"step-{choose(run, which).step:09d}"
        moments = read_tree(folder / "trainer.safetensors")["parts"]["statistics"]["observation.state"]
        assert torch.allclose(policy.normaliser.offset["observation.state"].double(), moments[1], atol=1e-6)
        assert policy.spec["observation.state"]["stats"]["count"] == float(moments[0, 0])
        means.append(moments[1].tolist())
    assert means[0] != means[1]
    words = ("--init-from", run / "checkpoints" / "best", "--normalise-observations", "--steps", 4)
    again = online(*words, folder="again")
    begun = json.loads((again / "inherited" / "record.json").read_text())["normalisation"]["statistics"]
    assert begun["observation.state"]["mean"] == pytest.approx(means[0], abs=1e-6)


def test_a_residual_policy_of_a_checkpoint_has_its_base(online: Script, script: Script, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        base = script(*BC, "--steps", 10, folder="base")
        for path in (base / "checkpoints" / "step-000000010").iterdir():
            path.chmod(0o600)  # as older versions did
        words = ("--trainer", "residual", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16)
        run = online(*words, "--trainer.base", base / "checkpoints" / "step-000000010", "--env", "savable")
    finally:
        os.umask(old)
    assert sorted(path.name for path in (run / "inherited" / "base").iterdir()) == ["model.safetensors", "policy.json"]
    newest = checkpoint.steps(run / "checkpoints")[-1]
    assert act(load_policy(newest)) == act(load_policy(run)) != act(load_policy(base))
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*"))}
    assert set(modes.values()) == {0o640, 0o750}, modes
    moved = Path(shutil.move(run, tmp_path / "moved"))
    shutil.rmtree(base)
    assert act(load_policy(moved / "checkpoints" / newest.name)) == act(load_policy(moved))
    alone = shutil.copytree(moved / "checkpoints" / newest.name, tmp_path / "alone")
    with pytest.raises(UserError, match="the frozen policy that it corrects is not there; copy the whole run's folder"):
        load_policy(alone)


def test_files_have_the_mode_of_the_umask(script: Script) -> None:
    old = os.umask(0o022)
    try:
        run = script(*BC, "--eval-episodes", 1, "--steps", 10)
    finally:
        os.umask(old)
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*"))}
    assert len(modes) > 12 and set(modes.values()) == {0o644, 0o755}, modes


def test_a_policy_is_taken_without_a_trace_in_training() -> None:
    """Also from an optimizer whose way to its averages and back rounds."""

    class Averaging(torch.optim.SGD):
        def eval(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.lerp_(torch.full_like(p, 3.0), 0.3)

        def train(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.lerp_(torch.full_like(p, 3.0), -0.3 / 0.7)

    model = nn.Linear(50, 50)
    optimizer = Averaging(model.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.eval()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.train()
    assert not torch.equal(model.weight, before["weight"])
    model.load_state_dict(before)
    taken = Learner.acting_weights(SimpleNamespace(optimizers={"policy": optimizer}), model)  # type: ignore[arg-type]
    assert all(torch.equal(taken[key], expected[key]) for key in expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
