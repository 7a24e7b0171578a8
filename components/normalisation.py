"""Normalisation: used by the training loop and saved inside the policy, so that the two cannot differ."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError, nearest
from .features import check_widths

# Mode -> the statistics it needs; "auto" takes the first mode whose statistics are there.
MODES = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99"), "none": ()}


def statistics(values: Tensor) -> dict[str, list[float]]:
    """Statistics over rows, `[N, D] -> {name: [D]}`, in float64 (the float32 deviation of a constant is not 0)."""
    x = values.numpy().astype(np.float64)
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    stats = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0), "q01": q01, "q99": q99}
    return {name: value.tolist() for name, value in stats.items()}


def quantile(values: np.ndarray, weights: np.ndarray, q: float) -> np.ndarray:
    """Weighted quantile over rows, `[N, D]` with weights `[N] -> [D]`; equal weights give numpy's linear one."""
    order = np.argsort(values, axis=0)
    x, w = np.take_along_axis(values, order, 0), weights[order]
    # Row i stands at the share of weight below it, scaled so that the first row is at 0 and the last at 1.
    below = np.cumsum(w, axis=0) - w
    places = below / below[-1].clip(min=1e-300)
    return np.array([np.interp(q, places[:, d], x[:, d]) for d in range(x.shape[1])])


class Normaliser:
    """Maps each key that has statistics to (x - offset) / scale and back; other keys pass unchanged.

    `mean_std` gives mean 0 and deviation 1; `min_max` and `quantile` map [min, max] and [q01, q99] to [-1, 1].
    A constant feature gets scale 1. `next.<key>` shares the statistics of `<key>`. Pictures that are larger than the
    models see them (`stored_shape` in `spec`) are cut to their centre.

    Args:
        spec: {key: {"shape", "dtype", "stats"}}.
        modes: {key: mode}; keys without an entry are "auto".

    Raises:
        UserError: an unknown key or mode, a missing statistic or one of the wrong width.
    """

    def __init__(self, spec: dict[str, Any], modes: dict[str, str] | None = None) -> None:
        self.modes: dict[str, str] = {}
        # Texts of the tasks; the models get their numbers, as `task_index`.
        self.tasks = {text: number for number, text in enumerate(spec.get("task", {}).get("values", ()))}
        self.crops = {key: tuple(f["shape"][-2:]) for key, f in spec.items() if "stored_shape" in f}
        self.offset: dict[str, Tensor] = {}
        self.scale: dict[str, Tensor] = {}
        modes = dict(modes or {})
        for key, mode in modes.items():
            if key not in spec:
                raise UserError(f"normalisation of {key!r}: the data has no such key; {nearest(key, spec)}")
            if mode not in MODES:
                raise UserError(f"normalisation of {key!r}: unknown mode {mode!r}; {nearest(mode, MODES)}")
        for key, feature in spec.items():
            stats = feature.get("stats")
            mode = modes.get(key, "auto" if stats else "none")
            if mode == "none" or (mode == "auto" and feature["dtype"] == "uint8"):
                continue
            stats = stats or {}
            if mode == "auto":
                mode = next((m for m, need in MODES.items() if need and all(n in stats for n in need)), "mean_std")
            if missing := [name for name in MODES[mode] if name not in stats]:
                have = ", ".join(stats) or "none"
                raise UserError(f"normalisation {mode} of {key!r} needs the statistic {missing[0]!r}; found: {have}")
            check_widths(key, {**feature, "stats": stats})
            a, b = (np.asarray(stats[name], dtype=np.float64) for name in MODES[mode])
            offset, scale = (a, b) if mode == "mean_std" else ((a + b) / 2, (b - a) / 2)
            constant = scale < 1e-6 * np.maximum(1, np.abs(offset))
            self.modes[key] = mode
            self.offset[key] = torch.tensor(offset, dtype=torch.float32)
            self.scale[key] = torch.tensor(np.where(constant, 1.0, scale), dtype=torch.float32)

    def to(self, device: torch.device) -> "Normaliser":
        """Move the statistics to a device; returns itself."""
        for values in (self.offset, self.scale):
            values.update({key: value.to(device) for key, value in values.items()})
        return self

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalise every known key of a batch; the dict is new, the tensors that need no change are shared.

        Raises UserError: a task that the data did not have, where it had several.
        """
        out = dict(batch)
        if len(self.tasks) > 1 and "task" in batch:
            for text in batch["task"]:
                if text not in self.tasks:
                    raise UserError(f"unknown task {text!r}; {nearest(text, self.tasks)}")
            device = next(value.device for value in batch.values() if isinstance(value, Tensor))
            out["task_index"] = torch.tensor([self.tasks[text] for text in batch["task"]], device=device)
        for key, value in batch.items():
            base = key.removeprefix("next.")
            if base in self.modes:
                out[key] = (value - self.offset[base]).div_(self.scale[base])
            elif base in self.crops:
                out[key] = centre(value, *self.crops[base])
        return out

    def with_ranges(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`spec` with the `range` of each key whose least and greatest values are known: both, normalised."""
        described = dict(spec)
        for key, feature in spec.items():
            if key in self.modes and {"min", "max"} <= set(feature["stats"]):
                bounds = torch.tensor([feature["stats"]["min"], feature["stats"]["max"]], device=self.scale[key].device)
                described[key] = feature | {"range": ((bounds - self.offset[key]) / self.scale[key]).tolist()}
        return described

    def undo(self, key: str, value: Tensor) -> Tensor:
        """Map a normalised tensor of `key` back to its own units."""
        return value * self.scale[key] + self.offset[key] if key in self.modes else value


def centre(pictures: Tensor, height: int, width: int) -> Tensor:
    """The centre of pictures `[..., H, W]`; those of that size stay as they are."""
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]
