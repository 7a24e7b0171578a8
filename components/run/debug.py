"""`--debug`: small sizes in one process, and a first look at models, batch, gradients and times."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..intervals import number
from .one_batch import learn_by_heart
from .policies import load_policy
from .profiling import Profile

PROFILED = 20  # updates, the last ones of the run
NAMED = 10  # parameters


def alone(options: Any, always: dict[str, Any]) -> Any:
    """A script's options with the values of `always`, and without worker processes in its components."""
    nested = {name: value for name, value in vars(options).items() if hasattr(value, "workers")}
    changes = {n: replace(value, workers=0 if n == "env_options" else 1) for n, value in nested.items()}
    return replace(options, **always, **changes)


def watch(learner: Any, run: Any) -> None:
    """Print the models now, what a first look at the updates shows, and the gradient norms with each log line."""
    log = run.log

    def log_with_norms(record: dict[str, Any]) -> None:
        log(record)
        show_norms(record, run.say)

    show_models(learner.models, run.say)
    learner.update, run.log = FirstLook(learner, run), log_with_norms


class FirstLook:
    """A learner's `update`, which looks at the updates of a short run.

    It prints the first batch, then whether it is learnt by heart; after the last update, which parameters had no
    gradient, and where the time of the last updates went. The numbers of the run stay the same.
    """

    def __init__(self, learner: Any, run: Any) -> None:
        self.learner, self.run, self.update = learner, run, learner.update
        self.made = self.left = 0  # calls
        self.profile: Profile | None = None
        self.found: dict[Any, bool] = {}  # parameter that an optimizer steps -> whether a gradient was not zero
        for optimizer in learner.optimizers.values():
            optimizer.register_step_pre_hook(self.find_gradients)

    def __call__(self, batch: dict[str, Any]) -> None:
        if not self.made:
            show_batch(batch, self.run.say)
            self.left = (self.learner.planned - self.learner.updates) * self.learner.micro_steps
        count = min(PROFILED * self.learner.micro_steps, max(self.left - 1, 0))
        if count and self.made == self.left - count:
            self.profile = Profile(self.learner, self.run)
            self.profile.begin()
            self.run.cleanup.callback(self.profile.stop)
        self.update(batch)
        self.made += 1
        if self.made == 1:
            self.run.say(learn_by_heart(self.learner, batch))
        if self.made == self.left:
            self.run.say(without_gradient(self.learner.models, self.found, self.learner.updates))
            if self.profile:
                last = self.learner.updates
                made = count // self.learner.micro_steps
                updates = f"{last - made + 1} to {last}"
                self.run.say(*self.profile.end(updates, max(made, 1), self.run.path / "trace.json"))

    def find_gradients(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """Before a step: note which parameters have a gradient."""
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if not self.found.get(parameter):
                self.found[parameter] = parameter.grad is not None and bool(parameter.grad.any())


def without_gradient(models: nn.ModuleDict, found: dict[Any, bool], updates: int) -> str:
    """A line that names the parameters that were stepped, and never had a gradient.

    Args:
        found: Parameter -> whether it had one.
    """
    names = [name for name, parameter in models.named_parameters() if not found.get(parameter, True)]
    if not names:
        return f"every parameter had a gradient within {updates} updates" if found else ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"NO GRADIENT, or zero, in {updates} updates: {', '.join(names[:NAMED])}{more}"


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
            numbers = [f"{name} {number(float(getattr(x, name)()))}" for name in ("min", "mean", "max") if x.numel()]
            kind = str(value.dtype).removeprefix("torch.")
            say(f"batch {key}: {tuple(value.shape)} {kind}  {'  '.join(numbers) or 'empty'}")
        else:
            say(f"batch {key}: {type(value).__name__} {str(value)[:60]}")


def show_norms(record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print the gradient norms of a log line."""
    norms = {key.rpartition(".")[2]: value for key, value in record.items() if "grad_norm" in key}
    if norms:
        say("gradient norms: " + "  ".join(f"{name} {number(value)}" for name, value in norms.items()))


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
