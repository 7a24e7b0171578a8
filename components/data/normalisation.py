"""Normalisation: used by the training loop and saved inside the policy, so that the two cannot differ."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, nearest
from .features import check_widths

# Mode -> the statistics it needs; "auto" takes the first of those in AUTO whose statistics are there.
MODES = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99"), "none": ()}
MODES |= {"scale": ("scale",), "return_range": ("return_min", "return_max")}
MODES |= {"running": ("mean", "std"), "running_return": ("return_std",)}  # of what an environment has given so far
LIMIT = 10.0  # the largest size of what these two give
AUTO = ("mean_std", "min_max", "quantile")
RETURN_SPAN = 1000.0  # that the returns of the data have after `return_range` (Kostrikov et al., 2022, appendix)


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

    `mean_std` gives mean 0 and deviation 1; `min_max` and `quantile` map [min, max] and [q01, q99] to [-1, 1]; `scale`
    divides by the statistic of that name, where there is one; `return_range` divides rewards so that the returns of the
    data's episodes span 1000. `running` is `mean_std` and `running_return` divides by the deviation of the discounted
    return, both cut to [-10, 10]. A constant feature gets scale 1. `next.<key>` shares the statistics of `<key>`.
    Pictures that are larger than the models see them (`stored_shape` in `spec`) are cut to their centre.

    Args:
        spec: {key: {"shape", "dtype", "stats"}}.
        modes: {key: mode}, where `observation` stands for all observations; keys without an entry are "auto".

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
        self.like = {key: f["like"] for key, f in spec.items() if "like" in f}  # keys with another one's statistics
        for key, mode in expanded(modes or {}, spec).items():
            feature = spec[key]
            stats = feature.get("stats") or {}
            if mode == "auto":
                mode = next((m for m in AUTO if all(name in stats for name in MODES[m])), "mean_std")
            if mode == "none" or (mode == "scale" and "scale" not in stats):
                continue
            if missing := [name for name in MODES[mode] if name not in stats]:
                have = ", ".join(stats) or "none"
                raise UserError(f"normalisation {mode} of {key!r} needs the statistic {missing[0]!r}; found: {have}")
            check_widths(key, {**feature, "stats": stats})
            a, *b = (np.asarray(stats[name], dtype=np.float64) for name in MODES[mode])
            if mode in ("mean_std", "running"):
                offset, scale = a, b[0]
            elif mode in ("scale", "running_return"):
                offset, scale = np.zeros_like(a), a
            elif mode == "return_range":
                offset, scale = np.zeros_like(a), (b[0] - a) / RETURN_SPAN
            else:
                offset, scale = (a + b[0]) / 2, (b[0] - a) / 2
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
            base = self.like.get(base, base)
            if base in self.modes:
                out[key] = (value - self.offset[base]).div_(self.scale[base])
                if self.modes[base].startswith("running"):
                    out[key].clamp_(-LIMIT, LIMIT)
            elif base in self.crops:
                out[key] = centre(value, *self.crops[base])
        return out

    def with_ranges(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`spec` with the `range` of each key whose least and greatest values are known: both, normalised."""
        described = dict(spec)
        for key, feature in spec.items():
            if {"min", "max"} <= set(feature.get("stats", ())) and "images" not in key:
                bounds = torch.tensor([feature["stats"]["min"], feature["stats"]["max"]])
                if key in self.modes:
                    bounds = (bounds - self.offset[key].cpu()) / self.scale[key].cpu()
                described[key] = feature | {"range": bounds.tolist()}
        return described

    def undo(self, key: str, value: Tensor) -> Tensor:
        """Map a normalised tensor of `key` back to its own units."""
        key = self.like.get(key, key)
        return value * self.scale[key] + self.offset[key] if key in self.modes else value


def expanded(modes: dict[str, str], spec: dict[str, Any]) -> dict[str, str]:
    """The mode of every key of `spec`, "auto" where there are statistics for it and `modes` says nothing.

    Raises UserError: an unknown key or mode.
    """
    groups = {"observation": [key for key in spec if key.startswith("observation.") and "like" not in spec[key]]}
    for key, mode in modes.items():
        if key not in spec and key not in groups:
            raise UserError(f"normalisation of {key!r}: the data has no such key; {nearest(key, spec)}")
        if mode not in MODES:
            raise UserError(f"normalisation of {key!r}: unknown mode {mode!r}; {nearest(mode, MODES)}")
    complete = {key: "auto" if can_be_auto(feature) else "none" for key, feature in spec.items()}
    of_groups = {key: modes[group] for group, keys in groups.items() if group in modes for key in keys}
    return complete | of_groups | {key: mode for key, mode in modes.items() if key in spec}


def can_be_auto(feature: dict[str, Any]) -> bool:
    """Whether a key is normalised unless it is told otherwise: numbers with statistics of their values."""
    others = {"scale", *MODES["return_range"], *MODES["running_return"]}
    return feature["dtype"] != "uint8" and bool(set(feature.get("stats") or ()) - others)


def centre(pictures: Tensor, height: int, width: int) -> Tensor:
    """The centre of pictures `[..., H, W]`; those of that size stay as they are."""
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]
