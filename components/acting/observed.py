"""An observation as it comes from a robot, an environment or a user's own code, as tensors that are checked."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.pictures import as_recorded, is_picture
from ..errors import UserError


def frames_of(
    observation: Any, spec: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], bool]:
    """One frame of each key for each row, `[N, *shape]`, and whether the observation came as a batch.

    Args:
        observation: As of `Policy.act`.
        spec: Of the policy.
        shapes: Observation key -> shape of one frame.

    Raises:
        UserError: as of `Policy.act`.
    """
    if not isinstance(observation, Mapping):
        found = type(observation).__name__
        raise UserError(f"an observation is a dict by the data's keys, {', '.join(shapes)}; found {found}")
    frames, batched = {}, True
    for key, shape in shapes.items():
        if key not in observation:
            found = ", ".join(map(str, observation)) or "nothing"
            names = ", ".join(spec[key].get("names", ()))
            told = f"; expected {shape}{names and ', of ' + names}"
            raise UserError(f"the policy needs the observation {key!r}; found: {found}{told}")
        frame = numbers(observation[key], f"the observation {key!r}")
        if is_picture(key, spec[key]["dtype"]):
            frames[key], batched = as_recorded(frame, shape, key, "resized_from" in spec[key])
        else:
            frames[key], batched = vectors(frame, shape, key)
    return frames, batched


def numbers(value: Any, place: str) -> Tensor:
    """An array or list as a tensor. Raises UserError: it holds no real numbers, or rows of several lengths."""
    try:
        if isinstance(value, Tensor):
            return value
        if np.iscomplexobj(array := np.asarray(value)):
            raise TypeError("they are complex")
        if array.dtype == object:
            raise TypeError(f"found {type(value).__name__}")
        # torch takes no mirrored arrays, as of frame[..., ::-1], and warns of read-only ones, as of Pillow.
        return torch.as_tensor(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} is no array of numbers ({str(error)[:80]})") from error


def vectors(frame: Tensor, shape: tuple[int, ...], key: str) -> tuple[Tensor, bool]:
    """An observation as float32 `[N, *shape]`, and whether it came as a batch; one of several axes is flattened.

    Raises:
        UserError: another width, or values that are not finite in float32.
    """
    if tuple(frame.shape[-len(shape) :]) == shape and frame.ndim - len(shape) in (0, 1):
        batched = frame.ndim > len(shape)
    elif frame.ndim != 1 and frame.numel() == math.prod(shape):
        batched = False
    elif frame.ndim > 1 and len(frame) and frame[0].numel() == math.prod(shape):
        batched = True
    else:
        raise UserError(f"the policy expects {key!r} of shape {shape}, found {tuple(frame.shape)}")
    converted = frame.float().reshape(-1 if batched else 1, *shape)
    if not converted.isfinite().all():
        beyond = frame.isfinite().all() if frame.is_floating_point() else True
        problem = "values beyond the range of float32" if beyond else "NaN or Inf"
        raise UserError(f"the observation {key!r} has {problem}, which no policy can act on; check what it comes from")
    return converted, batched
