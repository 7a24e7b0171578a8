"""The learner: models, loss, one optimizer per model, the trainer, and the metrics of its steps."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import contracts, optimizers, parallel
from ..acting.policy_folder import weights_of
from ..errors import UserError
from .gradients import Finite, Gradients, accumulate
from .held_out import loss_by_source
from .metrics import Metrics

logger = logging.getLogger(__name__)
PATIENCE = 1000  # updates after which a model that was never updated is named


class Learner:
    """Calls the trainer's `train_step`, and holds the objects that the calls share.

    Args:
        trainer: Built from these models, optimizers and loss.
        models: By name; the averages of `--ema-decay` are added, and all move to `device`.
        opts: One optimizer for each trained model.
        ema_decay: Largest decay of averaged weights; 0 for none.
        micro_steps: Calls of `train_step` per update.
        frozen: Names of models that stay in evaluation mode, so that their buffers do not change either.
        planned: Updates of the whole run; 0 for an unknown number.

    Raises:
        UserError: several micro-steps for a trainer that does not accumulate.
    """

    def __init__(
        self,
        trainer: Any,
        models: nn.ModuleDict,
        opts: dict[str, torch.optim.Optimizer],
        loss: nn.Module,
        device: torch.device,
        ema_decay: float = 0.0,
        micro_steps: int = 1,
        frozen: Iterable[str] = (),
        planned: int = 0,
    ) -> None:
        if micro_steps > 1 and not contracts.accumulates(trainer):
            raise UserError("--grad-accumulation above 1 needs a trainer that declares accumulates = True; use 1")
        self.trainer, self.optimizers, self.loss, self.device = trainer, opts, loss, device
        self.micro_steps, self.frozen, self.planned = micro_steps, list(frozen), planned
        # Updates after which a model that never learnt is named, more where the trainer declares a delay; those named.
        self.patience, self.named = PATIENCE, set[str]()
        self.asked_loss = ""  # the loss that was asked for, until it is known to be used
        averages = optimizers.averages(models, opts, ema_decay)
        self.models = nn.ModuleDict({**models, **averages}).to(device)
        self.averaged = bool(averages)
        parallel.broadcast(nn.ModuleList([self.models, loss]))
        self.metrics, self.finite = Metrics(), Finite(opts, device)
        self.gradients = {
            name: Gradients(i, name, opt, self.finite, micro_steps) for i, (name, opt) in enumerate(opts.items())
        }
        loss.register_forward_hook(self._watch)
        for optimizer in opts.values() if micro_steps > 1 else ():
            accumulate(optimizer, micro_steps)
        self.keywords = contracts.passed_to(trainer)
        self.updates, self.calls = 0, 0  # completed updates, and calls of `train_step`
        self.where: dict[str, int] = {}
        self.mixed: dict[str, Any] = {}  # the newest batch of a mixture
        self.train()

    def _watch(self, module: Any, inputs: Any, output: Any) -> None:
        """Pass each loss on to the models' gradients, whose next step checks that it is finite."""
        if isinstance(output, torch.Tensor) and torch.is_grad_enabled():
            value = output.detach().clone() if output.ndim == 0 else output.detach().sum()
            for gradients in self.gradients.values():
                gradients.add_loss(value)

    def train(self) -> None:
        """Put all models but the frozen ones into training mode."""
        self.models.train()
        for name in self.frozen:
            self.models[name].eval()
        optimizers.set_mode(self.optimizers, training=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, averaged weights, and rank 0's buffers on all processes; training mode again at the end.

        Raises FloatingPointError: a loss or gradient was not finite.
        """
        self.finite.check()
        parallel.broadcast(self.models, buffers_only=True)
        self.models.eval()
        optimizers.set_mode(self.optimizers, training=False)
        try:
            yield
        finally:
            self.train()

    def acting_weights(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """A copy of a policy's weights as evaluations have them; training goes on with every bit as it was.

        Where an optimizer averages by itself, the way to its averages and back rounds, hence the copies.
        """
        averaging = [opt for opt in self.optimizers.values() if callable(getattr(opt, "eval", None))]
        trained = [p for opt in averaging for group in opt.param_groups for p in group["params"]]
        before = [(p.data, p.detach().clone()) for p in trained]
        optimizers.set_mode(self.optimizers, training=False)
        try:
            return weights_of(module)
        finally:
            optimizers.set_mode(self.optimizers, training=True)
            for weights, kept in before:
                weights.copy_(kept)

    def begin(self, step: int, epoch: int = 0, total_epochs: int = 1) -> None:
        """Begin a step of the script, in this pass over the data, which `train_step` may ask for."""
        self.finite.begin(step)
        self.where = {"epoch": epoch, "total_epochs": total_epochs}

    def update(self, batch: dict[str, Any]) -> None:
        """Call `train_step` on a batch and keep its metrics."""
        self.call(batch)
        self.count(batch)

    def call(self, batch: dict[str, Any]) -> None:
        """Call `train_step` with the keywords that it asks for, without counting the call."""
        place = self.where | {"iterations": self.updates}
        self.metrics.add(self.trainer.train_step(batch, **{name: place[name] for name in self.keywords}), "train/")

    def count(self, batch: dict[str, Any]) -> None:
        """Count a call of `train_step`; every `micro_steps`-th completes an update."""
        self.calls += 1
        self.updates += self.calls % self.micro_steps == 0
        self.mixed = batch if "source" in batch else {}

    def summary(self) -> dict[str, float]:
        """Means of the metrics over the steps since the last call and over all processes, and the learning rates.

        Raises FloatingPointError: a loss or gradient was not finite.
        """
        self.finite.check()
        self.name_idle()
        if self.mixed:
            self.models.eval()
            self.metrics.add(loss_by_source(self.trainer, self.mixed, "train/"))
            self.train()
        rates = {f"train/lr.{name}": opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()}
        return self.metrics.means() | rates

    def name_idle(self) -> None:
        """Say once which models were never updated, and that a loss that was asked for is not used.

        All of them after the first updates, one after `patience` of them or at the end: some trainers update a model
        rarely, or late.
        """
        made = self.calls // self.micro_steps
        if not made:
            return
        idle = {name for name, gradients in self.gradients.items() if not gradients.learnt} - self.named
        over = bool(self.planned) and self.updates >= self.planned and self.patience == PATIENCE
        late = over or made >= self.patience
        if idle and (late or len(idle) == len(self.gradients)):
            self.named |= idle
            names = ", ".join(sorted(idle))
            logger.warning(
                "NO UPDATE of %s in %d calls of train_step: the trainer has to call backward() and"
                " optimizers[name].step() for each model that is to learn; --freeze %s where none is wanted",
                names,
                self.calls,
                " ".join(sorted(idle)),
            )
        if self.asked_loss and all(gradients.loss_of_step is None for gradients in self.gradients.values()):
            logger.warning("--loss %s has no effect: the trainer never calls its loss", self.asked_loss)
        self.asked_loss = ""

    def forget_losses(self) -> None:
        """Drop the losses that were computed since the last step, which belong to no update."""
        for gradients in self.gradients.values():
            gradients.loss = None
