"""Random changes to pictures, on the device, each a function of (seed, step, item) alone.

So they are equal for any number of processes and workers, and after a resume.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .pictures import is_picture, pictures_of

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
# Hue is a rotation of the two colour axes of YIQ.
TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the pictures of training batches."""

    shift: int = 0
    """Largest random shift in pixels; edge pixels are repeated (DrQ, Kostrikov et al., 2021)."""
    crop: tuple[int, ...] = ()
    """Height and width of a random crop; evaluation and inference crop the centre."""
    brightness: float = 0.0
    """Largest change x of the brightness, which is multiplied by 1 - x to 1 + x."""
    contrast: float = 0.0
    """Largest change x of the contrast, which is multiplied by 1 - x to 1 + x."""
    saturation: float = 0.0
    """Largest change x of the saturation, which is multiplied by 1 - x to 1 + x."""
    hue: float = 0.0
    """Largest rotation of the hue, as a fraction of a full circle, at most 0.5."""

    def cropped(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The `spec` of the models' input: cropped pictures; `stored_shape` is their size before the crop.

        Raises:
            UserError: invalid options, or no pictures in the data.
        """
        jitter = (self.brightness, self.contrast, self.saturation)
        if self.shift < 0 or not all(0 <= x <= 1 for x in jitter) or not 0 <= self.hue <= 0.5:
            raise UserError("--augment: shift must be 0 or more, hue 0 to 0.5, the other amounts 0 to 1")
        if self.crop and (len(self.crop) != 2 or min(self.crop) < 1):
            raise UserError(f"--augment.crop {' '.join(map(str, self.crop))}: expected a height and a width")
        keys = pictures_of(spec)
        if self != Augmentation() and not keys:
            raise UserError("--augment changes pictures, and the data has none; see --dataset.cameras")
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
        out = dict(batch)
        keys = pictures_in(batch)
        for number, key in enumerate(keys):
            numbers = torch.from_numpy(uniform((seed, step, number), rows.cpu().numpy(), 6))  # [B, 6] in [0, 1)
            out[key] = self._change(batch[key], numbers)
        return out

    def _change(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Shift, crop and colour jitter of pictures by `numbers` `[B, 6]` in [0, 1)."""
        if self.shift or self.crop:
            x = self._move(x, numbers[:, :2])
        if self.brightness or self.contrast or self.saturation or self.hue:
            x = self._jitter(x, (2 * numbers[:, 2:] - 1).to(x.device, torch.float32))
        return x

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
