"""Normalisation by what an environment has given so far, the same on all processes, saved with the policy."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import world_size
from .normalisation import Normaliser

COUNT = 10_000.0  # for how many observations the statistics of a run stand that did not count them
SMALL = 1e-8  # added to a variance, as Gymnasium's wrappers do


class RunningStatistics:
    """Mean and deviation of the observations, and the deviation of the discounted return, which divides the rewards.

    What is added counts from `settle` on, so that nothing changes between acting and learning from it. The return
    begins anew after an episode's last step, terminated or truncated; that of gymnasium.wrappers.NormalizeReward
    forgets what came before at a terminating step, goes on with its reward, and through truncations.

    Args:
        spec: Of the transitions; the keys that are normalised get the statistics of a normal distribution.
        observations, rewards: Which of them.
        discount: Per environment step.
        num_envs: Of this process.
    """

    def __init__(self, spec: dict[str, Any], observations: bool, rewards: bool, discount: float, num_envs: int) -> None:
        self.keys = [k for k, f in spec.items() if k.startswith("observation.") and f["dtype"] == "float32"]
        self.keys = self.keys if observations else []
        self.rewards, self.discount = rewards, discount
        self.returns, self.ended = torch.zeros(num_envs), torch.ones(num_envs, dtype=torch.bool)
        self.moments: dict[str, Tensor] = {}  # key -> [3, D] float64: count, mean, sum of squared deviations
        self.new: dict[str, list[Tensor]] = {}
        self.modes = dict.fromkeys(self.keys, "running")
        for key in self.keys:
            before = spec[key].get("stats", {})  # of the run that this one begins from
            width, known = spec[key]["shape"][-1], {"mean", "std"} <= set(before)
            mean, std = (torch.tensor(before[n] if known else [v] * width) for n, v in (("mean", 0.0), ("std", 1.0)))
            spec[key]["stats"] = {"mean": mean.tolist(), "std": std.tolist()}
            counts = torch.full((width,), float(before.get("count", COUNT) if known else 0))
            self.moments[key] = torch.stack([counts, mean, counts * std.square()]).double()
        if rewards:
            self.modes["reward"] = "running_return"
            before = spec["reward"].get("stats", {})
            deviation, count = before.get("return_std", 1.0), float(before.get("count", 0.0))
            spec["reward"]["stats"] = {"return_std": deviation}
            self.moments["reward"] = torch.tensor([[count], [0.0], [count * deviation**2]], dtype=torch.float64)

    def add(self, transitions: dict[str, Tensor]) -> None:
        """Count a transition `[N, ...]` of each environment where `valid` `[N]` holds."""
        if not self.modes:
            return
        valid = transitions["valid"]
        new = {key: transitions[key] for key in self.keys}
        if self.rewards:
            self.returns = torch.where(self.ended, 0.0, self.returns * self.discount) + transitions["reward"]
            self.ended = transitions["ended"] | ~valid
            new["reward"] = self.returns[:, None]
        everything = bool(valid.all())
        for key, value in new.items():
            self.new.setdefault(key, []).append(value if everything else value[valid])

    def cut(self) -> None:
        """All episodes were broken off."""
        self.ended = torch.ones_like(self.ended)

    def settle(self, normaliser: Normaliser) -> None:
        """Let what was added on all processes count, by Chan's update (Chan et al., 1979)."""
        for key, (count, mean, squares) in self.moments.items():  # the same on all processes, whatever they have added
            sums = torch.zeros_like(self.moments[key])
            if key in self.new:
                x = torch.cat(self.new[key]).double()
                sums = torch.stack([torch.full_like(mean, len(x)), x.sum(0), x.square().sum(0)])  # [3, D]
            if world_size() > 1:
                dist.all_reduce(sums)
            more, total, square = sums
            if not float(more[0]):
                continue
            other = total / more
            delta, whole = other - mean, count + more
            squares = squares + (square - more * other.square()).clamp(min=0) + delta.square() * count * more / whole
            self.moments[key] = torch.stack([whole, mean + delta * more / whole, squares])
        self.new = {}
        self._tell(normaliser)

    def _tell(self, normaliser: Normaliser) -> None:
        for key, (count, mean, squares) in self.moments.items():
            if float(count[0]):
                deviation = (squares / count + SMALL).sqrt()
                if key == "reward":
                    normaliser.scale[key].copy_(deviation[0])
                else:
                    normaliser.offset[key].copy_(mean)
                    normaliser.scale[key].copy_(deviation)

    def describe(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`spec` with the statistics that count now."""
        spec = dict(spec)
        for key, (count, mean, squares) in self.moments.items():
            if key in spec and float(count[0]):
                deviation = (squares / count + SMALL).sqrt()
                stats: dict[str, Any] = {"mean": mean.tolist(), "std": deviation.tolist()}
                stats = {"return_std": float(deviation)} if key == "reward" else stats
                spec[key] = spec[key] | {"stats": stats | {"count": float(count[0])}}
        return spec

    def state_dict(self) -> dict[str, Any]:
        """What all processes have alike."""
        return dict(self.moments)

    def own_state(self) -> dict[str, Any]:
        """What this process has: returns so far, and what does not count yet."""
        new = {key: torch.cat(parts) for key, parts in self.new.items()}
        return {"returns": self.returns, "ended": self.ended, "new": new} if self.modes else {}

    def load_state_dict(self, shared: dict[str, Any], own: dict[str, Any] | None, normaliser: Normaliser) -> None:
        """Go on from both; with another number of processes, `own` is None."""
        self.moments = dict(shared)
        if own:
            self.returns, self.ended = own["returns"], own["ended"]
            self.new = {key: [part] for key, part in own["new"].items()}
        self._tell(normaliser)
