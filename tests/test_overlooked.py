"""Options without effect, and trainers that do not train, are said once, in one line with the remedy."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toy
from components import TRAINER_REGISTRY, UserError
from components.models.mlp import MLP
from components.models.q_ensemble import QEnsemble
from components.models.vector_field import VectorField
from components.optimizers import Adam, kept_length
from components.run import overlooked
from components.run.overlooked import check_launch, no_effect
from components.trainers.dqn import DQN
from components.trainers.qc import QC
from components.trainers.residual import Residual

Script = Callable[..., Path]
MODELS = {"policy": ("mlp", MLP(head="gaussian"))}


def notes(trainer: type = toy.Minimal, planned: int = 100, online: bool = False, **options: Any) -> list[str]:
    """What is said of a run of 100 steps with these options."""
    given = options.pop("given", ())
    optimizer = options.pop("optimizer", Adam())
    built = Adam(**vars(optimizer) | {"schedule_steps": optimizer.schedule_steps or planned})
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    learner = SimpleNamespace(
        trainer=object.__new__(trainer), planned=planned, patience=0, optimizers={"policy": built.build([parameter])}
    )
    config: Any = trainer.Config() if hasattr(trainer, "Config") else None  # type: ignore[attr-defined]
    args = {"trainer_options": config, "optimizer_options": optimizer, "steps": 100, "loss": "mse", "resume": ""}
    args |= {
        "save_every": 10,
        "save_minutes": 5.0,
        "eval_every": 10,
        "eval_episodes": 5,
        "track": "none",
        "workers": None,
    }
    args |= {"load": (), "freeze": (), "init_from": "", "models": {}, "batch_size": 16, "dataset": "none"}
    if online:
        args |= {"save_dataset": "", "dataset_ratio": 0.5, "buffer_size": 1000}
    batches = None if online else SimpleNamespace(resident=True)
    args["trainer"] = options.pop("trainer_name", "")
    whole = SimpleNamespace(**args | options, given=lambda name: name in given)
    return no_effect(whole, learner, batches)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"trainer": DQN, "online": True},
            "--trainer.exploration-steps 250000 is longer than the run of 100 environment",
        ),
        ({"trainer": Residual, "online": True}, "--trainer.policy-starts 5000 is longer than the run of 100 updates"),
        (
            {"optimizer": Adam(schedule="cosine", schedule_steps=20)},
            "--optimizer.schedule-steps 20 is shorter than the",
        ),
        (
            {"optimizer": Adam(schedule="linear", schedule_steps=900)},
            "--optimizer.schedule-steps 900 is longer than the",
        ),
        ({"optimizer": Adam(warmup_steps=500)}, "--optimizer.warmup-steps 500 is as long as the run of 100 updates"),
        ({"optimizer": Adam(schedule_steps=5), "given": ["optimizer.schedule-steps"]}, "on a constant learning rate"),
        (
            {"optimizer": Adam(schedule="onecycle", warmup_steps=5), "given": ["optimizer.warmup-steps"]},
            "--optimizer.warmup-steps has no effect on the schedule onecycle",
        ),
        ({"save_every": 101, "save_minutes": 0.0}, r"no checkpoint before the end \(--save-every 101"),
        ({"save_every": 0, "save_minutes": 0.0}, r"no checkpoint before the end \(--save-every 0, --save-minutes 0\)"),
        (
            {"eval_every": 500, "given": ["eval-every"]},
            "--eval-every 500 is more than --steps 100: evaluated at the end",
        ),
        ({"given": ["track-project"]}, "--track-project has no effect without --track wandb"),
        ({"given": ["save-what"], "online": True}, "--save-what has no effect without --save-dataset"),
        ({"optimizer": Adam(lr_scale=("encoder=2",))}, "--optimizer.lr-scale encoder has no effect"),
        ({"models": MODELS, "given": ["model.codes"]}, "--model.codes has no effect without --model.head codebook"),
        ({"models": MODELS, "given": ["model.top-k"]}, "--model.top-k has no effect without --model.experts 2 or more"),
        ({"workers": 3}, "--workers 3 has no effect: this data is in memory"),
        ({"freeze": ("encoder",)}, "--freeze encoder: it stays at random weights; load others with --load encoder=RUN"),
        ({"dataset": "toy", "dataset_ratio": 0.0, "online": True}, "--dataset.ratio 0: the dataset has no part in any"),
        ({"buffer_size": 9, "online": True}, "--buffer-size 9 is less than --batch-size 16: a batch repeats"),
    ],
)
def test_an_option_without_effect_is_said(options: dict[str, Any], said: str) -> None:
    lines = notes(**options)
    assert [line for line in lines if re.search(said, line)], lines
    assert all("\n" not in line for line in lines)


def test_what_has_its_effect_is_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert notes() == notes(online=True) == notes(planned=3000) == []
    assert notes(optimizer=Adam(schedule="cosine", warmup_steps=10)) == []
    assert notes(freeze=("policy",), load=("policy=runs/x",)) == notes(freeze=("policy",), init_from="runs/x") == []
    assert notes(models=MODELS, given=["model.min-std", "model.hidden-dims"]) == []
    assert notes(workers=3, resume="runs/x") == []  # it was said when the run began
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as each launch sets it
    assert notes() == []
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert notes() == ["--dynamo_backend of the launch has no effect; use --compile"]


def test_what_the_run_before_was_given_and_this_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its policy would act by a network that was never trained, and its critic expect another discount."""
    run = tmp_path / "run"
    (run / "checkpoints" / "best").mkdir(parents=True)
    (run / "args.json").touch()
    was = {"trainer": "qc", "trainer_options": {"method": "best_of_n", "chunk": 5, "discount": 0.9, "gone": 1}}
    was["model_options"] = {"critic": {"hidden_dims": [8], "layer_norm": False}, "policy": {"activation": "relu"}}
    monkeypatch.setattr(overlooked, "read_args", lambda folder: {"args": was})
    options: dict[str, Any] = {"trainer": QC, "init_from": str(run / "checkpoints" / "best")}
    models = {
        "policy": ("vector_field", VectorField()),
        "critic": ("q_ensemble", QEnsemble(hidden_dims=(8,), layer_norm=True)),
    }
    was["dataset_options"] = {"reward_scale": 2.0, "reward_shift": 0.0, "episodes": 3}
    name = {"trainer_name": "qc", "models": models, "dataset_options": toy.ToyData()}
    said = f"{run} was trained with --trainer.method best_of_n --trainer.discount 0.9"
    said += " --model.activation relu --model.critic.no-layer-norm --dataset.reward-scale 2.0"
    said += ": not given here, where other defaults hold"
    assert notes(**options, **name) == [said]
    given = ["trainer.method", "trainer.discount", "model.critic.layer-norm", "model.activation", "reward-scale"]
    assert notes(**options, **name, given=given) == []
    assert notes(**options, **name | {"trainer_name": "fql"}) == []
    critics = name | {"models": {"critic": models["critic"]}}  # whose options are those of --model, as of dqn's
    assert notes(**options, **critics, given=[*given, "model.layer-norm"]) == []
    assert "--model.no-layer-norm" in notes(**options, **critics, given=given)[0]
    assert notes(**options | {"init_from": ""}, **name) == []


def test_accumulation_that_only_the_launcher_knows_is_refused(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    check_launch(1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    check_launch(4)
    with pytest.raises(UserError, match="--gradient_accumulation_steps 4 .* the script --grad-accumulation 4$"):
        script("--trainer", "bc", "--steps", 2)


def test_a_finished_schedule_says_its_rate_and_what_to_do() -> None:
    optimizer = Adam(lr=1e-3, schedule="cosine", schedule_steps=1000).build([torch.nn.Parameter(torch.zeros(2, 2))])
    said = (
        "keeps its length of 1000 updates, its last value holds: 2.5e-09; for a new schedule start a new run with --in"
    )
    assert said in kept_length({"policy": optimizer}, 2000)
    assert kept_length({"policy": optimizer}, 1000) == kept_length({}, 9) == ""


class Forgets(toy.Minimal):
    """Leaves out a step, or the gradient, of its only model or of one of two."""

    needs = {"policy": "mlp", "critic": "toy_critic"}
    what, late = "step", 0

    def train_step(self, data: dict[str, Any], iterations: int) -> dict[str, Any]:  # type: ignore[override]
        loss = (self.models["policy"](data["observation.state"]) - data["action"]).square().mean()
        if self.what != "backward":
            loss.backward()
        if self.what in ("critic", "backward"):
            self.optimizers["policy"].step()
        if self.what == "critic" and self.late and iterations >= self.late:
            both = torch.cat([data["observation.state"], data["action"]], 1)
            self.models["critic"](both).square().mean().backward()
            self.optimizers["critic"].step()
        return {"loss": loss}


@pytest.mark.parametrize(
    ("what", "late", "said"),
    [
        ("step", 0, "NO UPDATE of critic, policy in 10 calls of train_step"),
        ("backward", 0, "NO UPDATE of critic, policy in 10 calls"),
        ("critic", 0, "NO UPDATE of critic in 30 calls"),
        ("critic", 22, ""),
    ],
)
def test_a_model_that_never_learns_is_named_once(
    script: Script, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, late: int, said: str
) -> None:
    monkeypatch.setitem(TRAINER_REGISTRY, "forgets", Forgets)
    monkeypatch.setattr(Forgets, "what", what)
    monkeypatch.setattr(Forgets, "late", late)
    script("--trainer", "forgets", "--steps", 30, "--log-every", 10, "--loss", "mse")
    found = [record.getMessage() for record in caplog.records if "NO UPDATE" in record.message]
    assert len(found) == bool(said) and all(line.startswith(said) for line in found), found
    unused = [record.message for record in caplog.records if "--loss mse has no effect" in record.message]
    assert len(unused) == 1  # it has a loss of its own
