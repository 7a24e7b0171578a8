"""Whether losses and gradients were finite, and in which step one was not: noted on the device, without a wait."""

from collections.abc import Iterable

import torch


class Finite:
    """Of each model: `bad`, 1.0 since a loss or gradient was not finite, and `step`, the one under way until then.

    Args:
        names: The models that learn.
        device: Where they do.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(names)
        self.bad = torch.zeros(len(self.names), device=device)
        self.flags = self.bad.unbind()  # views, one a model
        self.step = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        self.one = torch.ones((), device=device)

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step.masked_fill_(self.bad == 0, step)

    def note(self, index: int, numbers: list[torch.Tensor]) -> None:
        """Look at numbers of a model, which stay as they are, in one kernel."""
        torch._amp_foreach_non_finite_check_and_unscale_(numbers, self.flags[index], self.one)

    def check(self) -> None:
        """Raises FloatingPointError: something was not finite. Before a log, a save or an evaluation."""
        for name, bad, step in zip(self.names, self.bad.tolist(), self.step.tolist(), strict=True):
            if bad:
                raise FloatingPointError(f"loss or gradient of model {name!r} is not finite at step {step}")
