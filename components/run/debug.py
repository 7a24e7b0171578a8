"""`--debug`: small sizes in one process, and a first look at models, batch and gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..acting.policy_folder import load_policy


def alone(options: Any, always: dict[str, Any]) -> Any:
    """A script's options with the values of `always`, and without worker processes in its components."""
    nested = {name: value for name, value in vars(options).items() if hasattr(value, "workers")}
    changes = {n: replace(value, workers=0 if n == "env_options" else 1) for n, value in nested.items()}
    return replace(options, **always, **changes)


def watch(learner: Any, run: Any) -> None:
    """Print the models now, the first batch when it arrives, and the gradient norms with each log line."""
    update, log = learner.update, run.log

    def first_update(batch: dict[str, Any]) -> None:
        show_batch(batch, run.say)
        learner.update = update
        update(batch)

    def log_with_norms(record: dict[str, Any]) -> None:
        log(record)
        show_norms(record, run.say)

    show_models(learner.models, run.say)
    learner.update, run.log = first_update, log_with_norms


def show_models(models: nn.ModuleDict, say: Callable[[str], None]) -> None:
    """Print the parameter counts of the models."""
    for name, model in models.items():
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        say(f"model {name}: {total} parameters, {trainable} trainable")


def show_batch(batch: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print keys, shapes and ranges of a batch, as `train_step` receives it."""
    for key, value in batch.items():
        if isinstance(value, Tensor):
            x = value.float()
            numbers = f"min {x.min():.4g}  mean {x.mean():.4g}  max {x.max():.4g}" if x.numel() else "empty"
            say(f"batch {key}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}  {numbers}")
        else:
            say(f"batch {key}: {type(value).__name__} {str(value)[:60]}")


def show_norms(record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print the gradient norms of a log line."""
    norms = {key.rpartition(".")[2]: value for key, value in record.items() if "grad_norm" in key}
    if norms:
        say("gradient norms: " + "  ".join(f"{name} {value:.4g}" for name, value in norms.items()))


def load_again(run: Any, checkpoints: Any, acts: bool) -> None:
    """Load the newest checkpoint and, where it acts, the saved policy, which acts once."""
    run.say(f"loaded {checkpoints.load_newest()}")
    if acts:
        policy = load_policy(run.path)
        shapes = {key: policy.spec[key] for key in policy.observation_keys}
        frames = {
            key: np.zeros(tuple(f.get("stored_shape", f["shape"]))[policy.obs_steps > 1 :], f["dtype"])
            for key, f in shapes.items()
        }
        run.say(f"loaded the policy; its action for zeros is {policy.act(frames)}")
