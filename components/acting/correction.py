"""A frozen policy and the residual policy that corrects it, combined into one."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.features import BASE_ACTION
from ..errors import UserError
from .learned import AT_ONCE
from .policy import Policy


def fingerprint(folder: Path) -> str:
    """SHA-256 of a saved policy's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class Middle:
    """Converts between corrections in [-1, 1] and actions of an environment.

    Args:
        low, high: Bounds of the actions, `[Da]`.
        scale: Largest correction, as a fraction of half the range.
        clips: Whether base actions are clipped before they are corrected; older versions clipped the sum alone.
    """

    def __init__(self, low: np.ndarray, high: np.ndarray, scale: float, clips: bool = True) -> None:
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        self.low, self.high, self.scale, self.clips = low, high, scale, clips
        self.middle, self.half = (high + low) / 2, (high - low) / 2
        self.divisor = np.where(self.half > 0, self.half, 1)  # of an action that cannot vary

    def corrected(self, base: np.ndarray, correction: np.ndarray) -> np.ndarray:
        """The sum `[..., Da]` of a base action and a scaled correction, clipped to the bounds.

        The base action is clipped first: a frozen policy that is far from its data asks for much more than the bounds
        allow, and no correction would have an effect there.
        """
        within = np.clip(base, self.low, self.high) if self.clips else base
        return np.clip(within + self.scale * self.half * correction, self.low, self.high).astype(np.float32)

    def correction(self, base: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The correction `[..., Da]` that leads from a base action to `action`, also where it is beyond [-1, 1]."""
        found = (action - np.clip(base, self.low, self.high)) / (self.scale * self.divisor)
        return np.where(self.half == 0, 0, found).astype(np.float32)

    def normalised(self, base: np.ndarray) -> np.ndarray:
        """A base action `[..., Da]` in [-1, 1], as it is observed."""
        return ((np.clip(base, self.low, self.high) - self.middle) / self.divisor).astype(np.float32)


class CorrectedPolicy:
    """A frozen policy and the residual policy that corrects it, with the interface of `Policy`.

    Args:
        frozen: The frozen policy, to which the inference settings apply.
        correction: The residual policy.
        bounds: Of the environment's actions, with the scale of the correction.
    """

    def __init__(self, frozen: Policy, correction: Policy, bounds: Middle) -> None:
        self.frozen, self.correction, self.bounds = frozen, correction, bounds
        self.spec, self.obs_steps, self.observation_keys = frozen.spec, frozen.obs_steps, frozen.observation_keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["frozen"], name)

    def configure(self, **settings: Any) -> "CorrectedPolicy":
        """As `Policy.configure`, for the frozen policy."""
        if delay := settings.get("delay", 0):
            raise UserError(f"--policy.delay {delay}: {AT_ONCE}")
        self.frozen.configure(**settings)
        self.correction.reset()
        return self

    def to(self, device: Any) -> "CorrectedPolicy":
        """As `Policy.to`, for both policies."""
        self.frozen.to(device)
        self.correction.to(device)
        return self

    def plan(self, observation: dict[str, Any], previous: Any = None, delay: int = 0) -> np.ndarray:
        """As `Policy.plan`, which a residual policy has not. Raises UserError."""
        raise UserError("a residual policy corrects each action at its own step and plans no chunk; use act()")

    def observe(self, observation: dict[str, Any]) -> None:
        """As `Policy.observe`, which a residual policy has not. Raises UserError."""
        raise UserError("a residual policy acts at each step, and observes only then; use act()")

    def reset(self, seeds: Any = None) -> None:
        """As `Policy.reset`."""
        self.frozen.reset(seeds)
        self.correction.reset(seeds)

    def restart(self, rows: torch.Tensor) -> None:
        """As `Policy.restart`."""
        self.frozen.restart(rows)
        self.correction.restart(rows)

    def act(self, observation: dict[str, Any], rows: torch.Tensor | None = None) -> np.ndarray:
        """As `Policy.act`."""
        base = self.frozen.act(observation, rows)
        extended = observation | {BASE_ACTION: self.bounds.normalised(base)}
        return self.bounds.corrected(base, self.correction.act(extended, rows))
