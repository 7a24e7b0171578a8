"""Gradients of one model between `backward` and `step`, and whether losses and gradients were finite."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Finite:
    """For each model, `bad`: 1.0 once a loss or gradient was not finite; and `step`: the step at which that happened.

    Both stay on the device, to avoid a synchronisation with the GPU at every step.

    Args:
        names: Of the trained models.
        device: Of the models.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(names)
        self.bad = torch.zeros(len(self.names), device=device)
        self.flags = self.bad.unbind()  # views, one per model
        self.step = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        self.one = torch.ones((), device=device)

    def begin(self, step: int) -> None:
        """Record the step that begins, for the models whose numbers are still finite."""
        self.step.masked_fill_(self.bad == 0, step)

    def note(self, index: int, numbers: list[Tensor]) -> None:
        """Set the flag of a model if one of these tensors is not finite; one kernel, which leaves them unchanged."""
        torch._amp_foreach_non_finite_check_and_unscale_(numbers, self.flags[index], self.one)

    def check(self) -> None:
        """Raise FloatingPointError if any flag is set. Called before a log line, a save or an evaluation."""
        for name, bad, step in zip(self.names, self.bad.tolist(), self.step.tolist(), strict=True):
            if bad:
                raise FloatingPointError(f"loss or gradient of model {name!r} is not finite at step {step}")


class Gradients:
    """Gradients of one optimizer: packed for the average over processes, checked, clipped, gated.

    Args:
        index: Of the model among the trained ones, the same on all processes.
        name: Of the model.
        optimizer: Of the model.
        finite: Flags of all models.
        micro_steps: Backward passes that are accumulated before a step, which uses their mean.
    """

    def __init__(self, index: int, name: str, optimizer: Any, finite: Finite, micro_steps: int = 1) -> None:
        self.index, self.name, self.optimizer, self.finite = index, name, optimizer, finite
        self.micro_steps, self.count, self.learnt = micro_steps, 0, False  # whether a step ever had a gradient
        self.loss: Any = None  # sum of the losses since the last step
        self.loss_of_step: Any = None
        self.waits = finite.bad.device.type != "cuda"
        self.fused = all(group.get("fused") for group in optimizer.param_groups)  # torch's, which obey `found_inf`
        if self.fused and not self.waits:
            optimizer.found_inf = finite.flags[index]

    def add_loss(self, value: Tensor) -> None:
        """Keep a loss `[]` for the check at the next step: its gradient may be finite when the loss is not."""
        self.loss = value if self.loss is None else self.loss + value

    def begin(self) -> None:
        """Begin a step: collect the parameters, and take over the losses since the last step."""
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.loss_of_step, self.loss = self.loss, None
        self.count += 1

    def place(self) -> Tensor:
        """Index of the model, count of its steps and its loss, `[3]`; `agree` checks the mean over processes."""
        place = torch.tensor([self.index, self.count % 4096, 0.0], device=self.finite.bad.device)
        place[2] = 0.0 if self.loss_of_step is None else self.loss_of_step
        return place

    def agree(self, mean: Tensor) -> None:
        """Check the mean of all processes' `place`. Raises RuntimeError: they are at different steps of this model."""
        index, count, self.loss_of_step = mean
        if index != self.index or count != self.count % 4096:
            step = int(self.finite.step[self.index])
            raise RuntimeError(f"model {self.name!r}: a process skipped one of its optimizer steps (step {step})")

    def packed(self) -> Tensor:
        """All gradients and, for each parameter, 1 if it has one else 0, in a flat float32 vector."""
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in self.parameters]
        has = [p.grad is not None for p in self.parameters]
        return torch.cat([*grads, torch.tensor(has, dtype=torch.float32, device=self.finite.bad.device)])

    def unpack(self, mean: Tensor) -> None:
        """Set the gradients from the mean of all processes' `packed`; None where no process has a gradient."""
        sizes = [p.numel() for p in self.parameters]
        *means, has = mean.split([*sizes, len(sizes)])
        for parameter, grad, some in zip(self.parameters, means, has.tolist(), strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype) if some else None

    def norm(self) -> Tensor | None:
        """Norm `[]` of the mean over the micro-steps; None when no parameter has a gradient."""
        gradients = self._present()
        if not gradients:
            return None
        if self.micro_steps > 1:
            torch._foreach_div_(gradients, self.micro_steps)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def guard(self, norm: Tensor) -> None:
        """Check that norm and loss are finite. Raises FloatingPointError if not; on a GPU only later, in `check`."""
        loss, self.learnt = self.loss_of_step, True
        if not self.waits:
            self.finite.note(self.index, [norm] if loss is None else [norm, loss])
        elif not math.isfinite(norm if loss is None else norm + loss):
            self.finite.flags[self.index].fill_(1.0)
            self.finite.check()

    def clip(self, largest: float, norm: Tensor) -> None:
        """Scale the gradients so that their norm is at most `largest`."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, largest, norm)

    def gate(self) -> None:
        """On a GPU, set the gradients to zero once the flag is set; torch's fused optimizers skip the step instead."""
        if not (self.waits or self.fused):
            stopped = self.finite.flags[self.index] > 0
            for gradient in self._present():
                gradient.masked_fill_(stopped, 0.0)

    def _present(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def accumulate(optimizer: Any, micro_steps: int) -> None:
    """Run only every n-th `step`, and `zero_grad` only after such a step; exact in both usual orders of the calls."""
    real_step, real_zero_grad = optimizer.step, optimizer.zero_grad
    calls = 0

    def step(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return real_step(*arguments, **keywords) if calls % micro_steps == 0 else None

    def zero_grad(*arguments: Any, **keywords: Any) -> None:
        if calls % micro_steps == 0:
            real_zero_grad(*arguments, **keywords)

    optimizer.step, optimizer.zero_grad = step, zero_grad
