"""What a picture is: the one rule of readers, environments, replay, a user's dataset and `Policy.act`.

A picture is uint8 from 0 to 255 or float from 0 to 1, `[C, H, W]` or `[H, W, C]` with 1, 3 or 4 channels, or `[H, W]`.
A stack of S pictures has one axis more in front, or S times as many channels. The shape, the bounds of a space, a
file's metadata or a policy's record tell these apart. Pictures are stored as uint8 `[C, H, W]`, stacks as
`[S * C, H, W]`. Where data is resized, so is what the policy observes, by the same function.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError, nearest

IMAGES = "observation.images."
CHANNELS = (1, 3, 4)
RULE = "a picture is uint8 0 to 255 or float 0 to 1, [C, H, W] or [H, W, C] with 1, 3 or 4 channels, or a stack of such"
SIDE = 4  # pixels; floats of smaller sides are numbers, such as poses
LEAST, MOST = 8, 4096  # pixels of a side, of pictures that are resized
SLACK = 1e-5  # by which rounding may take a float beyond its bounds


def is_picture(key: str, dtype: Any) -> bool:
    """Whether `key` names pictures, in an item, a batch or a spec: bytes below `observation.images.`."""
    return key.removeprefix("next.").startswith(IMAGES) and dtype_name(dtype) == "uint8"


def pictures_of(spec: dict[str, dict[str, Any]]) -> list[str]:
    """The keys of a spec that are pictures."""
    return [key for key, feature in spec.items() if is_picture(key, feature.get("dtype"))]


@lru_cache(maxsize=1024)
def dtype_name(dtype: Any) -> str:
    """The name of a type of numpy or torch, such as uint8."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def camera_of(name: str) -> str:
    """The camera that a feature is named after: `top` of observation.images.top, `image` of observation.image."""
    return name.removeprefix(IMAGES).removeprefix("observation.")


# ---- layout --------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The axes of pictures of one shape."""

    shape: tuple[int, ...]  # of a picture, or of a stack
    stored: tuple[int, int, int]  # [C, H, W], or [S * C, H, W]
    last: bool  # whether the channels are the last axis

    def __call__(self, pictures: Any) -> Any:
        """An array or tensor `[..., *shape]` as `[..., C, H, W]`; a view where no axis moves."""
        leading, n = pictures.shape[: pictures.ndim - len(self.shape)], pictures.ndim
        if self.last:
            axes = (*range(n - 3), n - 1, n - 3, n - 2)  # numpy's moveaxis is slow
            pictures = pictures.permute(axes) if isinstance(pictures, Tensor) else pictures.transpose(axes)
        return pictures.reshape(*leading, *self.stored)


@lru_cache(maxsize=1024)
def find_layout(shape: tuple[int, ...], says: str = "") -> Layout | None:
    """The layout of a picture, or of a stack, of this shape; None where the shape does not tell.

    Args:
        says: What the data says of the axes of each picture, "CHW" or "HWC"; "" for nothing.
    """
    if min(shape, default=0) < 1 or not 2 <= len(shape) <= 4:
        return None
    if len(shape) == 2:
        return Layout(shape, (1, *shape), False)
    axis = says.index("C") if says else _channel_axis(shape[-3:])
    if axis is None or (len(shape) == 4 and not says and shape[-3:][axis] not in CHANNELS):
        return None
    channels, height, width = np.roll(shape[-3:], axis // 2).tolist()
    return Layout(shape, (channels * (shape[0] if len(shape) == 4 else 1), height, width), axis == 2)


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """0 or 2, or None where both or none can be the channels."""
    fits = [axis for axis in (0, 2) if shape[axis] in CHANNELS]
    if fits:
        return fits[0] if len(fits) == 1 else None
    axis = 0 if shape[0] <= shape[2] else 2  # of stacked frames: an axis that is clearly shorter than both sides
    channels, height, other = shape[axis], shape[1], shape[2 - axis]
    return axis if channels < height and (2 * channels <= other or height == other) else None


def layout_of(shape: tuple[int, ...], place: str, says: str = "") -> Layout:
    """`find_layout`. Raises UserError: the shape does not tell, or is none of a picture."""
    if (layout := find_layout(tuple(map(int, shape)), says)) is None:
        problem = f"{place} has shape {list(shape)}, which is no picture or may have two layouts"
        raise UserError(f"{problem}; transpose it, or make it a vector of one axis: {RULE}")
    return layout


# ---- values --------------------------------------------------------------------------------------------------------


def as_bytes(pictures: Any, place: str, top: float = 1.0) -> Any:
    """uint8 pictures unchanged; floats from 0 to `top` as round(255 x / top).

    Raises:
        UserError: another type, or values outside these bounds.
    """
    name = dtype_name(pictures.dtype)
    if name == "uint8":
        return pictures
    is_float = name.startswith(("float", "bfloat"))
    if not is_float and top == 1:
        raise UserError(f"{place} holds {name}: {RULE}")
    low, high = (float(pictures.min()), float(pictures.max())) if 0 not in pictures.shape else (0.0, 0.0)
    if not (low >= -SLACK * top and high <= top + SLACK * top):  # NaN fails too
        raise UserError(f"{place} has values from {low:.6g} to {high:.6g}, expected 0 to {top:g}: {RULE}")
    if isinstance(pictures, Tensor):
        return (pictures.float() * (255 / top)).round().to(torch.uint8)
    return np.rint(np.asarray(pictures, np.float32) * np.float32(255 / top)).astype(np.uint8)


def holds_pictures(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether rows of an array, of which a file says no more, are pictures: bytes, or floats with an axis of channels.

    Args:
        shape: Of a row.
    """
    if dtype_name(dtype) == "uint8":
        return len(shape) >= 2
    layout = find_layout(shape) if dtype_name(dtype).startswith("float") and len(shape) == 3 else None
    return layout is not None and layout.stored[0] in CHANNELS and min(layout.stored[1:]) > SIDE


def top_of_space(shape: tuple[int, ...], dtype: Any, low: Any = None, high: Any = None) -> float | None:
    """The largest value of the pictures that a space holds, 255 or 1; None for a space of other numbers.

    A picture is uint8 of two axes or more, or a Box from exactly 0 to 1 or 255 with a channel axis and sides over SIDE.
    """
    if len(shape) < 2:
        return None
    if dtype_name(dtype) == "uint8":
        return 255.0
    layout = find_layout(tuple(shape)) if len(shape) in (3, 4) and low is not None else None
    if layout is None or shape[-1 if layout.last else -3] not in CHANNELS or min(layout.stored[1:]) <= SIDE:
        return None
    return declared_top(dtype, low, high)


def declared_top(dtype: Any, low: Any, high: Any) -> float | None:
    """255 or 1 where the bounds are exactly 0 and that; None otherwise."""
    low, high = np.asarray(low), np.asarray(high)
    if not (low == 0).all():
        return None
    if (high == 255).all():
        return 255.0
    return 1.0 if dtype_name(dtype).startswith("float") and (high == 1).all() else None


# ---- size ----------------------------------------------------------------------------------------------------------


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 pictures `[..., C, H, W]` scaled by one factor until they fit `size`, centred, with black around them.

    Height and width are scaled by the same factor, and rounded to pixels. The filter is bilinear with antialiasing, on
    bytes, as Pillow's: reduced pictures average all pixels that they cover. It runs on the CPU, in training and when
    a policy acts, so that both see the same bytes. Pictures of this size are returned as they are.
    """
    height, width = pictures.shape[-2:]
    if (height, width) == size:
        return pictures
    if height * size[1] >= width * size[0]:  # the height decides, as it is relatively larger
        inner = (size[0], max((2 * width * size[0] + height) // (2 * height), 1))
    else:
        inner = (max((2 * height * size[1] + width) // (2 * width), 1), size[1])
    flat = pictures.cpu().flatten(0, -4) if pictures.ndim > 3 else pictures.cpu()[None]
    if not len(flat):
        return pictures.new_empty(*pictures.shape[:-2], *size)
    flat = functional.interpolate(flat, inner, mode="bilinear", antialias=True)
    if inner != size:
        top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
        small, flat = flat, flat.new_zeros(len(flat), flat.shape[1], *size)
        flat[..., top : top + inner[0], left : left + inner[1]] = small
    return flat.reshape(*pictures.shape[:-2], *size).to(pictures.device)


def sizes_of(words: int | Sequence[Any], keys: Iterable[str], option: str = "--dataset.image-size") -> dict[str, Any]:
    """Key -> (height, width), of the cameras whose size the option `image_size` says.

    Args:
        words: A number for squares, a height and a width, or CAMERA=HEIGHTxWIDTH for some of the cameras; these come
            before numbers for all.
        keys: Of the cameras that there are, by name or as observation.images.X.

    Raises:
        UserError: other words, sides out of range, an unknown camera, no pictures.
    """
    texts = [str(words)] if isinstance(words, int) else [part for word in words for part in str(word).split()]
    given = f"{option} {' '.join(texts)}"
    cameras = {camera_of(key): key for key in keys}
    if texts and not cameras:
        raise UserError(f"{given}: the data has no pictures; see --dataset.cameras")
    named = [text.rpartition("=") for text in texts if "=" in text]
    every = "x".join(text for text in texts if "=" not in text)
    sizes = {key: _size(every, given) for key in cameras.values()} if every else {}
    own: dict[str, tuple[int, int]] = {}
    for name, _, text in named:
        if (camera := camera_of(name)) not in cameras:
            raise UserError(f"{given}: no such camera is read as {name!r}; {nearest(camera, cameras)}")
        if cameras[camera] in own:
            raise UserError(f"{given}: two sizes for the camera {camera!r}")
        own[cameras[camera]] = _size(text, given)
    return sizes | own


def _size(text: str, given: str) -> tuple[int, int]:
    """(height, width) of such as 224x320, or of a square. Raises UserError."""
    parts = text.split("x")
    sides = [int(part) if part.isascii() and part.isdigit() and len(part) < 9 else 0 for part in parts]
    if len(sides) > 2 or not all(LEAST <= side <= MOST for side in sides):
        forms = "a height and a width (224 320), a square (224), or one for each camera (front=224x320 wrist=128x128)"
        raise UserError(f"{given}: expected {forms}, of {LEAST} to {MOST} pixels")
    return sides[0], sides[-1]


def as_recorded(pictures: Tensor, shape: tuple[int, ...], key: str, resizes: bool = False) -> tuple[Tensor, bool]:
    """Pictures as a policy's record has them, uint8 `[N, C, H, W]`, and whether they came as a batch.

    Args:
        pictures: One picture or N of them, in any layout of the rule that fits the record.
        shape: (C, H, W) of the record.
        key: Its key, for messages.
        resizes: Whether pictures of other sizes are resized, as the policy's data was.

    Raises:
        UserError: another shape, type or range; a shape that may be two layouts.
    """
    channels, height, width = shape
    found = _fitting(tuple(pictures.shape), (channels, height, width))
    others = [] if found else _fitting(tuple(pictures.shape), (channels, 0, 0))
    if len({layout.last for layout, _ in others}) > 1:
        place = f"{key!r} of shape {tuple(pictures.shape)} may have its channels first or last"
        raise UserError(f"the observation {place}; give it with {channels} channels and larger sides: {RULE}")
    if not found and not (resizes and others):
        note = "; it would be resized, had the policy been trained with --dataset.image-size" if others else ""
        shapes = f"{key!r} of shape {(channels, height, width)}, found {tuple(pictures.shape)}"
        raise UserError(f"the policy expects {shapes}{note}: {RULE}")
    layout, batched = (found or others)[0]
    stored = layout(as_bytes(pictures, f"the observation {key!r}"))
    return resized(stored if batched else stored[None], (height, width)), batched


def _fitting(found: tuple[int, ...], shape: tuple[int, int, int]) -> list[tuple[Layout, bool]]:
    """Layouts in which pictures of shape `found` are one of `shape`, or, True, a batch of these.

    Args:
        shape: (C, H, W); H and W are 0 for those that are found.
    """
    channels, *sides = shape
    forms: list[tuple[Any, ...]] = [(channels, None, None), (None, None, channels)]
    for c in CHANNELS:
        if channels % c == 0 and channels > c:  # a stack, as an environment gives it
            forms += [(channels // c, c, None, None), (channels // c, None, None, c)]
    forms += [(None, None)] if channels == 1 else []
    fitting = []
    for form in forms:
        batched, own = len(found) - len(form), found[-len(form) :]
        if batched not in (0, 1):
            continue
        free = [own[axis] for axis, length in enumerate(form) if length is None]
        fixed = all(length is None or own[axis] == length for axis, length in enumerate(form))
        if fixed and (free == sides if any(sides) else min(free) > 0):
            last = form[-1] is not None
            fitting.append((Layout(own, (channels, free[0], free[1]), last), bool(batched)))
    return fitting
