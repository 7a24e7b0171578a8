"""Normalisation: used by the training loop and saved inside the policy, so that the two cannot differ."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError, nearest
from ..parallel import world_size
from .features import BASE_ACTION, check_widths
from .pictures import is_picture, pictures_of

# Mode -> the statistics it needs; "auto" takes the first of those in AUTO whose statistics are there.
MODES = {"mean_std": ("mean", "std"), "min_max": ("min", "max"), "quantile": ("q01", "q99"), "none": ()}
MODES |= {"scale": ("scale",), "return_range": ("return_min", "return_max")}
MODES |= {
    "running": ("mean", "std"),
    "running_return": ("return_std",),
}  # of the transitions collected so far
LIMIT = 10.0  # at which these two modes clip
AUTO = ("mean_std", "min_max", "quantile")
RETURN_SPAN = 1000.0  # range of the data's returns after `return_range` (Kostrikov et al., 2022, appendix)
SPREAD = 1e-6  # least spread of a feature that is no constant, relative to its size, or to 1 where that is larger
COUNT = 10_000.0  # number of observations behind the statistics of a run that did not count them
SMALL = 1e-8  # added to a variance, as Gymnasium's wrappers do


def statistics(values: Tensor) -> dict[str, list[float]]:
    """Statistics over rows, `[N, D] -> {name: [D]}`, in float64 (the float32 deviation of a constant is not 0)."""
    found = [_statistics(np.sort(column)) for column in values.numpy().T]  # one by one, which stay in a cache
    mean, std, low, high, q01, usual, q99, share = np.array(found, np.float64).reshape(-1, 8).T
    q01, q99 = on_plateau(usual, share, q01, q99)
    stats = {"mean": mean, "std": std, "min": low, "max": high, "q01": q01, "q99": q99}
    return {name: value.tolist() for name, value in stats.items()}


def _statistics(ordered: np.ndarray) -> list[float]:
    """Mean, deviation, least, largest, two quantiles around the median, and the median's share, of `[N]` in order."""
    x, last = ordered.astype(np.float64), len(ordered) - 1
    usual = x[last // 2]
    share = (np.searchsorted(x, usual, "right") - np.searchsorted(x, usual)) / len(x)
    q01, q99 = np.interp([0.01 * last, 0.99 * last], np.arange(len(x)), x)
    return [x.mean(), x.std(), x[0], x[-1], q01, usual, q99, share]


def quantiles(values: np.ndarray, weights: np.ndarray, wanted: Sequence[float]) -> list[np.ndarray]:
    """Weighted quantiles over rows `[N, D]` with weights `[N]`, each `[D]`; with equal weights, numpy's linear ones."""
    found = []
    for column in np.ascontiguousarray(values.T):
        order = np.argsort(column)
        x, w = column[order], weights[order]
        # Row i is at the share of weight below it, scaled so that the first row is at 0 and the last at 1.
        below = np.cumsum(w) - w
        found.append(np.interp(wanted, below / below[-1].clip(min=1e-300), x))
    return list(np.array(found).T)


def on_plateau(usual: np.ndarray, share: np.ndarray, q01: np.ndarray, q99: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The quantiles `[D]`, both `usual` where that value has a `share` of at least 98 %.

    Interpolation would mix it with a rare value, which would then be far from it in units of their difference.
    """
    plateau = share > 0.98 - 1e-9
    return np.where(plateau, usual, q01), np.where(plateau, usual, q99)


class Normaliser:
    """Maps each key that has statistics to (x - offset) / scale and back; other keys pass unchanged.

    `mean_std` maps to mean 0 and deviation 1; `min_max` and `quantile` map [min, max] and [q01, q99] to [-1, 1];
    `scale` divides by the statistic of that name, if there is one; `return_range` divides rewards so that the returns
    of the data's episodes span 1000. `running` is `mean_std` and `running_return` divides by the deviation of the
    discounted return, both clipped to [-10, 10]. A constant feature has scale 1; `quantile` maps one that changes in so
    few rows that its quantiles are equal by its minimum and maximum. `next.<key>` shares the statistics of `<key>`.
    Pictures larger than the models' input (`stored_shape` in `spec`) are cropped to their centre.

    A dimension of the action that is constant in the data is that constant in every action that `undo` returns, in any
    mode: whatever else a network or a sampler's noise makes of it was never shown. A key's `bounds` in `spec`, if any,
    decide this instead of its statistics.

    Args:
        spec: {key: {"shape", "dtype", "stats"}}.
        modes: {key: mode}, where `observation` stands for all observations; keys without an entry are "auto".

    Raises:
        UserError: an unknown key or mode, a missing statistic or one of the wrong width.
    """

    def __init__(self, spec: dict[str, Any], modes: dict[str, str] | None = None) -> None:
        self.modes: dict[str, str] = {}
        self.running: RunningStatistics | None = None  # which change it
        # Texts of the tasks; the models receive their numbers, as `task_index`.
        self.tasks = {text: number for number, text in enumerate(spec.get("task", {}).get("values", ()))}
        self.language: Any = None  # the model that understands further texts, as `task_vector`
        self.crops = {key: tuple(f["shape"][-2:]) for key, f in spec.items() if "stored_shape" in f}
        self.offset: dict[str, Tensor] = {}
        self.scale: dict[str, Tensor] = {}
        self.like = {key: f["like"] for key, f in spec.items() if "like" in f}  # keys that use another's statistics
        self.fixed: dict[str, tuple[Tensor, Tensor]] = {}  # key -> (whether a dimension is constant, its value)
        if found := constants(spec.get("action", {})):
            self.fixed["action"] = found
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
                if mode == "quantile" and {"min", "max"} <= set(stats):
                    low, high = (np.asarray(stats[name], dtype=np.float64) for name in ("min", "max"))
                    rare = without_spread(offset, scale)
                    offset, scale = np.where(rare, (low + high) / 2, offset), np.where(rare, (high - low) / 2, scale)
            constant = without_spread(offset, scale)
            self.modes[key] = mode
            self.offset[key] = torch.tensor(offset, dtype=torch.float32)
            self.scale[key] = torch.tensor(np.where(constant, 1.0, scale), dtype=torch.float32)

    def to(self, device: torch.device) -> "Normaliser":
        """Move the statistics to a device; returns itself."""
        for values in (self.offset, self.scale):
            values.update({key: value.to(device) for key, value in values.items()})
        self.fixed = {key: (where.to(device), value.to(device)) for key, (where, value) in self.fixed.items()}
        return self

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalise every known key of a batch; the dict is new, the tensors that need no change are shared.

        Raises UserError: as `described`.
        """
        out = dict(batch)
        if len(self.tasks) > 1 and "task" in batch:
            device = next(value.device for value in batch.values() if isinstance(value, Tensor))
            out |= {key: value.to(device) for key, value in self.described(batch["task"]).items()}
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

    def described(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The texts of tasks `[B]` as the models take them: their numbers, or what `language` makes of further ones.

        Raises UserError: a text that neither the data nor `language` knows.
        """
        if all(text in self.tasks for text in texts):
            return {"task_index": torch.tensor([self.tasks[text] for text in texts])}
        if self.language is not None:
            return {"task_vector": self.language.vectors(texts)}
        unknown = next(text for text in texts if text not in self.tasks)
        raise UserError(f"unknown task {unknown!r}; {nearest(unknown, self.tasks)}")

    def with_ranges(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`spec` with the `range` of each key with known bounds: [min, max], normalised."""
        described = dict(spec)
        for key, feature in spec.items():
            if {"min", "max"} <= set(feature.get("stats", ())) and not is_picture(key, feature.get("dtype")):
                low, high = np.broadcast_arrays(feature["stats"]["min"], feature["stats"]["max"])  # one may be a scalar
                bounds = torch.tensor(np.stack([low, high]), dtype=torch.float32)
                if key in self.modes:
                    bounds = (bounds - self.offset[key].cpu()) / self.scale[key].cpu()
                described[key] = feature | {"range": bounds.tolist()}
        return described

    def describe(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`spec` with the statistics as they are now, which may be running ones; to be saved."""
        return self.running.describe(spec) if self.running else spec

    def undo(self, key: str, value: Tensor) -> Tensor:
        """Map a normalised tensor of `key` back to its original units; constants of an action are exact."""
        key = self.like.get(key, key)
        return self.exact(key, value * self.scale[key] + self.offset[key] if key in self.modes else value)

    def exact(self, key: str, value: Tensor) -> Tensor:
        """`value` of `key` `[..., D]` in its original units, with its constant dimensions as they are in the data."""
        if key not in self.fixed:
            return value
        where, constant = (part.to(value.device) for part in self.fixed[key])
        if where.ndim > max(value.ndim - 1, 1):  # statistics of each step of a chunk, and one step that mixes several
            same = where.all(0) & (constant == constant[0]).all(0)
            where, constant = same, constant[0]
        return torch.where(where, constant, value)


def without_spread(offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Where a feature is constant but for rounding."""
    return scale < SPREAD * np.maximum(1, np.abs(offset))


def constants(feature: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The dimensions of an action that never change, bool, and their values, float32; None for none.

    They are found by minimum and maximum (`bounds`, or else the statistics), without these by the deviation.
    """
    stats = feature.get("bounds") or feature.get("stats") or {}
    if {"min", "max"} <= set(stats):
        low, high = (np.asarray(stats[name], dtype=np.float64) for name in ("min", "max"))
        value, spread = (low + high) / 2, (high - low) / 2
    elif {"mean", "std"} <= set(stats):
        value, spread = (np.asarray(stats[name], dtype=np.float64) for name in ("mean", "std"))
    else:
        return None
    where = without_spread(value, spread)
    return (torch.tensor(where), torch.tensor(value, dtype=torch.float32)) if where.any() else None


def expanded(modes: dict[str, str], spec: dict[str, Any]) -> dict[str, str]:
    """The mode of every key of `spec`; without an entry in `modes`, "auto" for keys with statistics, else "none".

    Raises UserError: an unknown key or mode.
    """
    pictures = pictures_of(spec)
    vectors = [k for k in spec if k.startswith("observation.") and "like" not in spec[k] and k not in pictures]
    groups = {"observation": vectors}
    for key, mode in modes.items():
        if key not in spec and key not in groups:
            raise UserError(f"normalisation of {key!r}: the data has no such key; {nearest(key, spec)}")
        if mode not in MODES:
            raise UserError(f"normalisation of {key!r}: unknown mode {mode!r}; {nearest(mode, MODES)}")
        if key in pictures and mode != "none":
            raise UserError(f"normalisation of {key!r}: pictures are not normalised, an encoder scales them to 0 to 1")
    complete = {key: "auto" if can_be_auto(feature) else "none" for key, feature in spec.items()}
    of_groups = {key: modes[group] for group, keys in groups.items() if group in modes for key in keys}
    return complete | of_groups | {key: mode for key, mode in modes.items() if key in spec}


def can_be_auto(feature: dict[str, Any]) -> bool:
    """Whether a key is normalised by default: numbers with statistics of their values."""
    others = {"scale", *MODES["return_range"], *MODES["running_return"]}
    return feature["dtype"] != "uint8" and bool(set(feature.get("stats") or ()) - others)


def centre(pictures: Tensor, height: int, width: int) -> Tensor:
    """Crop pictures `[..., H, W]` to their centre of `height` times `width`."""
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]


class RunningStatistics:
    """Mean and deviation of the observations, and the deviation of the discounted return, which divides the rewards.

    Added transitions take effect at `settle`, so that a policy acts and learns with the same statistics. The return
    starts from zero after an episode's last step, terminated or truncated. Deviation: the return of
    gymnasium.wrappers.NormalizeReward restarts with a terminating step's reward, and continues through truncations.

    Args:
        spec: Of the transitions; the normalised keys start with the statistics of a standard normal distribution.
        observations, rewards: Whether each is normalised.
        discount: Per environment step.
        num_envs: Environments of this process.
    """

    def __init__(self, spec: dict[str, Any], observations: bool, rewards: bool, discount: float, num_envs: int) -> None:
        self.keys = [k for k, f in spec.items() if k.startswith("observation.") and f["dtype"] == "float32"]
        self.keys = [k for k in self.keys if k != BASE_ACTION] if observations else []  # an action has its own bounds
        self.rewards, self.discount = rewards, discount
        self.returns, self.ended = torch.zeros(num_envs), torch.ones(num_envs, dtype=torch.bool)
        self.moments: dict[str, Tensor] = {}  # key -> [3, D] float64: count, mean, sum of squared deviations
        self.new: dict[str, list[Tensor]] = {}
        self.modes = dict.fromkeys(self.keys, "running")
        for key in self.keys:
            before = spec[key].get("stats", {})  # of the run that this one starts from
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

    def normaliser_of(self, spec: dict[str, Any], modes: dict[str, str]) -> Normaliser:
        """A normaliser of `spec` with these modes, into which the statistics are written whenever they change."""
        self.normaliser = Normaliser(spec, modes | self.modes)
        self.normaliser.running = self
        return self.normaliser

    def add(self, transitions: dict[str, Tensor] | None) -> None:
        """Add transitions `[N, ...]` where `valid` `[N]` holds; None after a fault, which truncates all episodes."""
        if transitions is None:
            self.cut()
            return
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
        """Start the returns of new episodes in all environments."""
        self.ended = torch.ones_like(self.ended)

    def settle(self) -> None:
        """Merge the added transitions of all processes into the statistics by Chan's update (Chan et al., 1979)."""
        for key, (count, mean, squares) in self.moments.items():  # the same keys on all processes
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
        self._write()

    def _write(self) -> None:
        normaliser = self.normaliser
        for key, (count, mean, squares) in self.moments.items():
            if float(count[0]):
                deviation = (squares / count + SMALL).sqrt()
                if key == "reward":
                    normaliser.scale[key].copy_(deviation[0])
                else:
                    normaliser.offset[key].copy_(mean)
                    normaliser.scale[key].copy_(deviation)

    def describe(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`spec` with the current statistics."""
        spec = dict(spec)
        for key, (count, mean, squares) in self.moments.items():
            if key in spec and float(count[0]):
                deviation = (squares / count + SMALL).sqrt()
                stats: dict[str, Any] = {"mean": mean.tolist(), "std": deviation.tolist()}
                stats = {"return_std": float(deviation)} if key == "reward" else stats
                spec[key] = spec[key] | {"stats": stats | {"count": float(count[0])}}
        return spec

    def state_dict(self) -> dict[str, Any]:
        """The statistics, the same on all processes."""
        return dict(self.moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.moments = dict(state)
        self._write()

    def rank_state(self) -> dict[str, Any]:
        """State of this process: the returns so far, and transitions that are not merged yet."""
        new = {key: torch.cat(parts) for key, parts in self.new.items()}
        return {"returns": self.returns, "ended": self.ended, "new": new} if self.modes else {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        if state:
            self.returns, self.ended = state["returns"], state["ended"]
            self.new = {key: [part] for key, part in state["new"].items()}
