"""A replay buffer of all steps, of which those are drawn that an expert labelled."""

from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..contracts import Window
from ..data.features import INTERVENTION
from .replay import ReplayBuffer

LABEL = "expert.action"  # what the expert does in a step; where the policy acts, `action` is another
LABELLED = "labelled"


class Labelled(ReplayBuffer):
    """The newest transitions, with what an expert did or would have done; only steps that it labelled are drawn.

    Batches have the observations and `action`, the expert's. Arguments are those of `ReplayBuffer`.
    """

    def __init__(
        self, spec: dict[str, Any], size: int, num_envs: int, of_rank: int, window: Window, rate: float = 1.0
    ) -> None:
        flag = {"shape": (), "dtype": "bool"}
        label = {name: spec["action"][name] for name in ("shape", "dtype")}
        super().__init__(
            spec | {INTERVENTION: flag, LABELLED: flag, LABEL: label}, size, num_envs, of_rank, window, rate
        )
        self.learnt = [*(key for key in spec if key.startswith("observation.")), "action"]
        self.data[LABELLED].fill_(False)
        self.found: Tensor | None = None
        self.everywhere = 0  # labels that are stored on all processes, as `due` found them

    def labels(self) -> Tensor:
        """Environment and slot of each labelled transition, `[n, 2]`."""
        if self.found is None:
            slots = torch.arange(min(self.length, int(self.total.max())))
            ages = (slots - (self.head - self.count)[:, None]).remainder(self.length)  # [N, slots]
            self.found = (self.data[LABELLED][:, : len(slots)] & (ages < self.count[:, None])).nonzero()
        return self.found

    def add(self, transitions: dict[str, Tensor]) -> None:
        """As of `ReplayBuffer`."""
        super().add(transitions)
        self.found = None

    def restore(self, state: dict[str, Any], first: int) -> bool:
        """As of `ReplayBuffer`."""
        self.found = None
        return super().restore(state, first)

    def due(self, ready: bool) -> float:
        """Updates that are due for one step of all environments; 0 while there is a process without any label."""
        counts = parallel.gather(len(self.labels()))
        self.everywhere = sum(counts)
        return super().due(ready and min(counts) > 0)

    def _draw(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Draw labelled transitions uniformly: environments and ages, `[B]` each."""
        places = self.labels()
        env, slot = places[torch.randint(len(places), (batch_size,))].unbind(1)
        return env, (slot - (self.head - self.count)[env]).remainder(self.length)

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Draw labelled transitions uniformly, with replacement: their observations, and the expert's actions."""
        batch = super().sample(batch_size)
        batch["action"] = batch[LABEL]
        return {key: batch[key] for key in self.learnt}
