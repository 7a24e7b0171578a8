"""`--debug`: everything small and in one process, and what a person with a debugger wants to see first."""

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..acting.saved import load_policy
from . import checkpoint

# Defaults under --debug, of the scripts that have them; what the command line gives stays. A component may add its own
# in `debug_options`.
SMALL = {"steps": 40, "batch_size": 32, "log_every": 10, "eval_every": 20, "eval_episodes": 1, "eval_envs": 1}
SMALL |= {"save_every": 20, "num_envs": 2, "learning_starts": 20, "buffer_size": 1000}

# Under --debug, whatever the command line says: no processes beside this one, no clocks, nothing between the debugger
# and the code.
PLAIN = {"workers": 0, "compile": False, "hang_timeout": 0.0, "env_timeout": 0.0}
PLAIN_COMPONENT = {"workers": 1}
PLAIN_ENV = {"workers": 0}


def plain(options: Any, values: dict[str, Any] = PLAIN) -> Any:
    """Set what `PLAIN` names in the script's options, and the others in those of the components."""
    changes = {name: value for name, value in values.items() if hasattr(options, name)}
    nested = {name: value for name, value in vars(options).items() if is_dataclass(value)}
    own = {"env_options": PLAIN_ENV}
    return replace(options, **changes, **{n: plain(value, own.get(n, PLAIN_COMPONENT)) for n, value in nested.items()})


def show_models(models: nn.ModuleDict, say: Callable[[str], None]) -> None:
    """Parameter counts."""
    for name, model in models.items():
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        say(f"model {name}: {total} parameters, {learning} learn")


def show_batch(batch: dict[str, Any], say: Callable[[str], None]) -> None:
    """Keys, shapes and ranges, as `train_step` gets them."""
    for key, value in batch.items():
        if isinstance(value, Tensor):
            x = value.float()
            numbers = f"min {x.min():.4g}  mean {x.mean():.4g}  max {x.max():.4g}" if x.numel() else "empty"
            say(f"batch {key}: {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}  {numbers}")
        else:
            say(f"batch {key}: {type(value).__name__} {str(value)[:60]}")


def show_norms(record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Gradient norms of a line of the log."""
    norms = {key.rpartition(".")[2]: value for key, value in record.items() if "grad_norm" in key}
    if norms:
        say("gradient norms: " + "  ".join(f"{name} {value:.4g}" for name, value in norms.items()))


def load_again(
    run: Path, restore: Callable[[Path, dict[str, Any]], Any], acts: bool, say: Callable[[str], None]
) -> None:
    """Load what the run has left: its newest checkpoint, and its policy, which acts once."""
    folder, manifest = checkpoint.newest(run / "checkpoints", set_aside=False)
    restore(folder, manifest)
    say(f"loaded {folder.name}")
    if acts:
        policy = load_policy(run)
        shapes = {key: policy.spec[key] for key in policy.observation_keys}
        frames = {
            key: np.zeros(tuple(f.get("stored_shape", f["shape"]))[policy.obs_steps > 1 :], f["dtype"])
            for key, f in shapes.items()
        }
        say(f"loaded the policy; at zero it acts {policy.act(frames)}")
