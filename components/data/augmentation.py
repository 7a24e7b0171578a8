"""Random changes to pictures, on the device, each a function of (seed, step, item) alone.

So they are equal for any number of processes and workers, and after a resume.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .pictures import is_picture, pictures_of

MOST_BLUR, REACH = 10, 2.5  # pixels; how far a blur reaches, in deviations
STATE, STATE_DRAWS = "observation.state", -1  # the key of its random numbers; those of pictures are their places
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
# Hue is a rotation of the two colour axes of YIQ.
TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the pictures of training batches, and to their states."""

    shift: int = 0
    """Largest random shift in pixels; edge pixels are repeated (DrQ, Kostrikov et al., 2021)."""
    crop: tuple[int, ...] = ()
    """Height and width of a random crop; evaluation and inference crop the centre."""
    drop_state: float = 0.0
    """Probability by which the state of an item becomes its mean, so that other observations are learnt from, too."""
    brightness: float = 0.0
    """Largest change x of the brightness, which is multiplied by 1 - x to 1 + x."""
    contrast: float = 0.0
    """Largest change x of the contrast, which is multiplied by 1 - x to 1 + x."""
    saturation: float = 0.0
    """Largest change x of the saturation, which is multiplied by 1 - x to 1 + x."""
    hue: float = 0.0
    """Largest rotation of the hue, as a fraction of a full circle, at most 0.5."""
    blur: float = 0.0
    """Largest deviation of a Gaussian blur in pixels, at most 10; each item draws its own from 0 to this."""
    drop_camera: float = 0.0
    """Probability by which each camera of an item becomes black, but never all of them; acting drops none."""

    def cropped(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The `spec` of the models' input: cropped pictures; `stored_shape` is their size before the crop.

        Raises:
            UserError: invalid options, or no pictures in the data.
        """
        jitter = (self.brightness, self.contrast, self.saturation)
        if self.shift < 0 or not all(0 <= x <= 1 for x in jitter) or not 0 <= self.hue <= 0.5:
            raise UserError("--augment: shift must be 0 or more, hue 0 to 0.5, the other amounts 0 to 1")
        if not 0 <= self.blur <= MOST_BLUR:
            raise UserError(f"--augment.blur {self.blur:g} must be 0 to {MOST_BLUR} pixels")
        if not 0 <= self.drop_camera < 1:
            raise UserError(f"--augment.drop-camera {self.drop_camera:g} must be a probability from 0 to below 1")
        if self.crop and (len(self.crop) != 2 or min(self.crop) < 1):
            raise UserError(f"--augment.crop {' '.join(map(str, self.crop))}: expected a height and a width")
        keys = pictures_of(spec)
        if self.drop_state:
            self._take_mean(spec)
        if replace(self, drop_state=0.0) != Augmentation() and not keys:
            raise UserError("--augment changes pictures, and the data has none; see --dataset.cameras")
        if self.drop_camera and len(cameras := {key.removeprefix("next.") for key in keys}) < 2:
            needs = "never drops all cameras, so it needs two or more"
            raise UserError(f"--augment.drop-camera {needs}; the data has {', '.join(cameras)}")
        spec = dict(spec)
        for key in keys if self.crop else ():
            shape = tuple(spec[key]["shape"])
            if shape[-2] < self.crop[0] or shape[-1] < self.crop[1]:
                raise UserError(f"--augment.crop {self.crop[0]} {self.crop[1]} is more than {key!r} has: {shape}")
            spec[key] = {**spec[key], "shape": (*shape[:-2], *self.crop), "stored_shape": shape}
        return spec

    def __call__(self, batch: dict[str, Any], rows: Tensor, seed: int, step: int) -> dict[str, Any]:
        """Change the pictures `[B, (To,) C, H, W]` uint8 of a batch, all time steps of an item in the same way.

        Args:
            rows: `[B]`, indices of the items.
        """
        if self == Augmentation():
            return batch
        out = self._without_state(batch, rows, (seed, step)) if self.drop_state else dict(batch)
        keys = pictures_in(batch)
        drawn = {}
        for number, key in enumerate(keys):
            drawn[key] = torch.from_numpy(uniform((seed, step, number), rows.cpu().numpy(), 8))  # [B, 8] in [0, 1)
            out[key] = self._change(batch[key], drawn[key])
        if self.drop_camera:
            now = {key: numbers[:, 7] for key, numbers in drawn.items() if not key.startswith("next.")}
            for key, keep in self._kept(now).items():
                for both in (key, f"next.{key}"):
                    if both in drawn:
                        out[both] = out[both] * keep.to(out[both].device).view(-1, *[1] * (out[both].ndim - 1))
        return out

    def _kept(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Camera -> 1 where it is kept and 0 where it is dropped, `[B]` uint8, by numbers `[B]` in [0, 1).

        Of those that would all be dropped, the one with the largest number is kept.
        """
        stacked = torch.stack([*numbers.values()])  # [cameras, B]
        keep = (stacked >= self.drop_camera) | (torch.arange(len(stacked))[:, None] == stacked.argmax(0))
        return dict(zip(numbers, keep.to(torch.uint8), strict=True))

    def _take_mean(self, spec: dict[str, Any]) -> None:
        """Take the mean of the state from its statistics. Raises UserError: no such state, or nothing besides."""
        others = [key for key in spec if key.startswith("observation.") and key != STATE]
        if not 0 <= self.drop_state < 1:
            raise UserError(f"--augment.drop-state {self.drop_state:g} must be a probability from 0 to below 1")
        if "mean" not in spec.get(STATE, {}).get("stats", {}) or not others:
            have = ", ".join(key for key in spec if key.startswith("observation.")) or "none"
            raise UserError(f"--augment.drop-state needs {STATE!r} and another observation beside it; found: {have}")
        object.__setattr__(self, "_mean", torch.tensor(spec[STATE]["stats"]["mean"], dtype=torch.float32))

    def _without_state(self, batch: dict[str, Any], rows: Tensor, key: tuple[int, int]) -> dict[str, Any]:
        """The batch with the states `[B, (To,) Ds]` of some items, and of their successors, replaced by the mean."""
        dropped = torch.from_numpy(uniform((*key, STATE_DRAWS), rows.cpu().numpy(), 1)[:, 0] < self.drop_state)
        out, mean = dict(batch), self._mean  # type: ignore[attr-defined]
        for name in (STATE, f"next.{STATE}"):
            if name in batch:
                x = batch[name]
                out[name] = torch.where(dropped.to(x.device).view(-1, *[1] * (x.ndim - 1)), mean.to(x.device), x)
        return out

    def _change(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Shift, crop, colour jitter and blur of pictures by `numbers` `[B, 7 or more]` in [0, 1)."""
        if self.shift or self.crop:
            x = self._move(x, numbers[:, :2])
        if self.brightness or self.contrast or self.saturation or self.hue:
            x = self._jitter(x, (2 * numbers[:, 2:6] - 1).to(x.device, torch.float32))
        return self._blurred(x, self.blur * numbers[:, 6]) if self.blur else x

    def _move(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Crop and shift by `numbers` `[B, 2]` in [0, 1): down and right."""
        flat = x.flatten(1, -3).permute(0, 2, 3, 1)  # [B, H, W, To * C]
        size, room = flat.shape[1:3], numbers.new_tensor([self.shift, self.shift])
        to = self.crop or size
        # The crop starts at 0 to size - to, and is shifted by -shift to shift.
        spread = numbers.new_tensor([size[0] - to[0], size[1] - to[1]]) + 2 * room
        start = ((numbers * (spread + 1)).floor() - room).long().to(x.device)  # [B, 2]
        rows = (start[:, 0, None] + torch.arange(to[0], device=x.device)).clamp(0, size[0] - 1)  # [B, h]
        columns = (start[:, 1, None] + torch.arange(to[1], device=x.device)).clamp(0, size[1] - 1)  # [B, w]
        item = torch.arange(len(x), device=x.device)[:, None, None]
        moved = flat[item, rows[:, :, None], columns[:, None, :]]  # [B, h, w, To * C]
        return moved.permute(0, 3, 1, 2).reshape(*x.shape[:-2], *to)

    def _jitter(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Colour jitter by `numbers` `[B, 4]` in [-1, 1): brightness, contrast, saturation, hue, in this order."""
        pictures = x.float().reshape(len(x), -1, *x.shape[-3:]) / 255  # [B, To, C, H, W]
        brightness, contrast, saturation, hue = (n.view(-1, 1, 1, 1, 1) for n in numbers.unbind(1))
        pictures = (pictures * (1 + self.brightness * brightness)).clamp(0, 1)
        coloured = pictures.shape[2] == 3
        grey = self._grey(pictures) if coloured else pictures
        mean = grey.mean((2, 3, 4), keepdim=True)
        pictures = (mean + (pictures - mean) * (1 + self.contrast * contrast)).clamp(0, 1)
        if coloured and self.saturation:
            grey = self._grey(pictures)
            pictures = (grey + (pictures - grey) * (1 + self.saturation * saturation)).clamp(0, 1)
        if coloured and self.hue:
            to = torch.tensor(TO_YIQ, device=x.device)
            angle = (2 * math.pi * self.hue) * hue.flatten()  # [B]
            turn = torch.zeros(len(x), 3, 3, device=x.device)
            turn[:, 0, 0] = 1
            turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
            turn[:, 2, 1] = angle.sin()
            turn[:, 1, 2] = -angle.sin()
            matrix = torch.linalg.inv(to) @ turn @ to  # [B, 3, 3]
            pictures = torch.einsum("bij,btjhw->btihw", matrix, pictures).clamp(0, 1)
        return (pictures * 255).round().to(torch.uint8).view_as(x)

    def _blurred(self, x: Tensor, deviations: Tensor) -> Tensor:
        """Pictures blurred by a Gaussian with `deviations` `[B]` in pixels; edge pixels are repeated.

        It adds up shifted pictures. So each item's result is the same in any batch, which no convolution promises.
        """
        radius = math.ceil(REACH * self.blur)
        taps = torch.arange(radius + 1, dtype=torch.float64)
        weights = (-0.5 * (taps / deviations.clamp(min=1e-3)[:, None]) ** 2).exp()  # [B, radius + 1]
        weights = (weights / (2 * weights.sum(1, keepdim=True) - 1)).to(x.device, torch.float32)
        y = x.flatten(1, -3).float()  # [B, To * C, H, W]
        for axis in (2, 3):
            length = y.shape[axis]
            place = torch.arange(-radius, length + radius, device=x.device).clamp(0, length - 1)
            padded, weight = y.index_select(axis, place), weights[..., None, None, None]  # [B, radius + 1, 1, 1, 1]
            y = padded.narrow(axis, radius, length) * weight[:, 0]
            both = torch.empty_like(y)
            for tap in range(1, radius + 1):
                before, after = (padded.narrow(axis, radius + to, length) for to in (-tap, tap))
                torch.add(before, after, out=both)
                y += both.mul_(weight[:, tap])
        return y.round().clamp(0, 255).to(torch.uint8).view_as(x)

    def _grey(self, pictures: Tensor) -> Tensor:
        """Luma of colour pictures, `[B, To, 1, H, W]`."""
        weights = torch.tensor(GREY, device=pictures.device).view(1, 1, 3, 1, 1)
        return (pictures * weights).sum(2, keepdim=True)


def pictures_in(batch: dict[str, Any]) -> list[str]:
    """The keys of a batch that are pictures."""
    return [key for key, value in batch.items() if isinstance(value, Tensor) and is_picture(key, value.dtype)]


def random_shift(batch: dict[str, Any], pixels: int) -> dict[str, Any]:
    """Shift the pictures of a batch and of its successors at random, by torch's global generator."""
    keys = pictures_in(batch) if pixels else []
    move = Augmentation(shift=pixels)._move
    return batch | {key: move(batch[key], torch.rand(len(batch[key]), 2)) for key in keys}


def uniform(key: tuple[int, ...], rows: np.ndarray, n: int) -> np.ndarray:
    """Uniform numbers in [0, 1), `[len(rows), n]` float64, each a function of `key`, its row and its column.

    SplitMix64 (Steele et al., 2014) in counter mode: its finaliser is applied once for each word of the key.
    """
    words: list[Any] = [np.uint64(word % 2**64) for word in key]
    state: Any = np.zeros((len(rows), n), np.uint64)
    with np.errstate(over="ignore"):
        for word in (*words, rows.astype(np.uint64)[:, None], np.arange(n, dtype=np.uint64)[None]):
            state = state + word + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / 2**53
