"""On a GPU: training there, and whole updates replayed as CUDA graphs. Skipped where there is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from components import TRAINER_REGISTRY, load_policy
from components.run import checkpoint
from components.run.curves import read_lines
from conftest import difference, learned, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
Script = Callable[..., Path]
RECORDED = ("td3_bc", "iql", "awac", "cql", "rebrac", "fql", "ifql", "qc", "gcbc", "gciql", "hiql", "sac", "td3")
RECORDED += ("recap",)
OPTIONS = ("--log-every", 10, "--optimizer.schedule", "cosine", "--eval-every", 0)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile without compiling, which takes so long, so that only the graphs are left of it."""
    monkeypatch.setattr(torch, "compile", lambda method: method)


@pytest.mark.parametrize("name", toy.TRAINERS)
def test_training_on_a_gpu(script: Script, name: str) -> None:
    run = script(*toy.TRAINERS[name], "--steps", 20, "--log-every", 10, "--grad-clip", 1)
    assert all(bool(value.isfinite().all()) for value in weights(run).values())


def test_training_evaluation_and_use(script: Script) -> None:
    """With bf16 and averaged weights, which graphs leave to Python; the policy acts on the CPU, too."""
    env = ("--env", "gymnasium", "--env.id", "TendonToy-v0", "--eval-episodes", 4, "--eval-envs", 2)
    more = ("--mixed-precision", "bf16", "--ema-decay", 0.9, "--steps", 20)
    run = script("--trainer", "bc", *env, *more)
    assert read_lines(run / "eval.jsonl")[-1]["episodes"] == 4
    assert np.isfinite(load_policy(run).act({"observation.state": np.zeros(toy.STATE, np.float32)})).all()


def test_a_loaded_policy_moves_to_a_gpu(script: Script) -> None:
    """It acts and plans as on the CPU, also in the middle of an episode."""
    run = script(*toy.TRAINERS["act"], "--dataset.obs-steps", 2, "--steps", 2)
    here, there = load_policy(run), load_policy(run, device="cuda")
    for state in np.random.default_rng(0).normal(size=(6, 3, toy.STATE)).astype(np.float32):
        seen = {"observation.state": state}
        assert there.act(seen) == pytest.approx(here.act(seen), abs=1e-3)
        assert there.plan(seen) == pytest.approx(here.plan(seen), abs=1e-3)
        there.to("cpu" if there._device.type == "cuda" else "cuda")


@pytest.mark.parametrize("name", ["sac", "ppo", "dqn", "rlpd"])
def test_online_training_on_a_gpu(online: Script, uncompiled: None, name: str) -> None:
    """Replayed updates train the same there, too."""
    options = (*{"sac": toy.SAC, **toy.ONLINE_ALONE}[name], "--steps", 100)
    options += ("--env", "savable") * ("--env" not in options)
    eager, replayed = online(*options, folder="eager"), online(*options, "--compile", folder="replayed")
    model = "critic" if name == "dqn" else "policy"
    assert difference(weights(eager, model), weights(replayed, model)) < 1e-4


@pytest.mark.parametrize("name", RECORDED)
def test_replayed_updates_train_the_same(
    script: Script, uncompiled: None, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """What is drawn, learnt and logged, with a learning rate that falls."""
    eager = script(*toy.TRAINERS[name], *OPTIONS, "--steps", 40, folder="eager")
    replayed = script(*toy.TRAINERS[name], *OPTIONS, "--steps", 40, "--compile", folder="replayed")
    assert "CUDA graphs: whole updates are replayed" in capfd.readouterr().out
    folder, _ = checkpoint.newest(eager / "checkpoints")
    for file in folder.glob("model-*.safetensors"):
        model = file.stem.removeprefix("model-")
        assert difference(weights(eager, model), weights(replayed, model)) < 1e-5, model
    for line, other in zip(learned(eager), learned(replayed), strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["td3_bc", "fql"])
@pytest.mark.parametrize("how", [(), ("--compile",)])
def test_a_run_resumes(script: Script, uncompiled: None, name: str, how: tuple[str, ...]) -> None:
    """From an odd step on, which matters to a policy that moves with every second one."""
    options = (*toy.TRAINERS[name], *OPTIONS, "--optimizer.schedule-steps", 40, *how)
    whole = script(*options, "--steps", 40, folder="whole")
    script(*options, "--steps", 13, folder="parts")
    parts = script("--resume", whole.parent / "parts", "--steps", 40, folder="parts")
    assert difference(weights(whole), weights(parts)) < (1e-5 if how else 1e-6)


def test_compiled_and_replayed(script: Script) -> None:
    eager = script(*toy.TRAINERS["iql"], *OPTIONS, "--steps", 40, folder="eager")
    compiled = script(*toy.TRAINERS["iql"], *OPTIONS, "--steps", 40, "--compile", folder="compiled")
    assert difference(weights(eager), weights(compiled)) < 1e-4


@pytest.mark.parametrize("options", [(), ("--compile",)])
def test_a_loss_that_is_not_finite_stops_the_run(
    script: Script, uncompiled: None, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """At the step where it was, though nobody waits for it."""

    class Explodes(TRAINER_REGISTRY["iql"]):  # type: ignore[misc]
        def losses(self, data: dict[str, Any]) -> Any:
            loss, metrics = super().losses(data)
            self.calls = getattr(self, "calls", torch.zeros((), device=loss.device)).add_(1)
            return loss * torch.where(self.calls >= 26, float("inf"), 1.0), metrics

    monkeypatch.setitem(TRAINER_REGISTRY, "explodes", Explodes)
    monkeypatch.setattr("components.speed.compile.break_even", lambda *_: "")
    with pytest.raises(FloatingPointError, match="is not finite at step 25"):
        script("--trainer", "explodes", *toy.TRAINERS["iql"][2:], *OPTIONS, "--steps", 40, *options)
