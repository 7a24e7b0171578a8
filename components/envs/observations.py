"""The observations and the `info` of a vector environment by the data's names.

Environments, datasets and collection share these names, so that a policy reads the same keys everywhere.
"""

from typing import Any

import numpy as np
from torch import Tensor

from ..data.pictures import IMAGES, as_bytes, camera_of, declared_top, find_layout, layout_of, top_of_space
from ..errors import UserError

SUCCESSES = ("success", "is_success")  # the keys of `info` that environments report success under


def observation_batch(observation: Any, space: Any = None) -> dict[str, np.ndarray]:
    """Rename an environment's observations to the data's keys.

    A vector `[N, D]` is `observation.state`; pictures are `observation.images.camera` `[N, C, H, W]` uint8, with
    stacked frames concatenated along C. In a dict, `agent_pos` and `observation` are the state, `environment_state`
    keeps its name, and `pixels` holds pictures; keys that begin with `observation.` are kept.

    Args:
        space: Of one environment's observations, whose bounds tell pictures of floats from other numbers.

    Raises:
        UserError: pictures that do not follow the rule of `data.pictures`, or two entries of the same name.
    """
    named: dict[str, np.ndarray] = {}
    for name, value, part, says in _leaves(observation, space):
        array = array_of(value)
        top = _picture_top(name, array, part)
        key = _vector_key(name) if top is None else IMAGES + camera_of(name or "camera")
        if key in named:
            raise UserError(f"two parts of the observation would both be {key!r}; rename one of them")
        named[key] = _vectors(array) if top is None else _pictures(key, array, top, says)
    return named


def array_of(value: Any) -> np.ndarray:
    """What an environment returned as an array; a tensor may be on a GPU, and have a gradient."""
    if isinstance(value, np.ndarray):
        return value
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def _leaves(observation: Any, space: Any) -> list[tuple[str, Any, Any, str]]:
    """(name, batch, space, layout where the shape does not tell) of each entry; an observation alone has no name.

    Keys of the data's own names say that channels are first; pictures of `pixels` only get such a name here.
    """
    if not isinstance(observation, dict):
        return [("", observation, space, "")]
    leaves = []
    for key, value in observation.items():
        part = _part(space, key)
        if key == "pixels":
            cameras = value if isinstance(value, dict) else {"camera": value}
            leaves += [(IMAGES + name, x, _part(part, name) or part, "") for name, x in cameras.items()]
        else:
            leaves.append((key, value, part, "CHW" if key.startswith(IMAGES) else ""))
    return leaves


def _part(space: Any, key: str) -> Any:
    """The space of an entry of a Dict; None if it is not known."""
    spaces: Any = getattr(space, "spaces", {})
    return spaces.get(key) if hasattr(spaces, "get") else None


def _picture_top(name: str, array: np.ndarray, space: Any) -> float | None:
    """The largest value of the pictures `[N, ...]`, None if they are none: their name, type and space tell."""
    shape, low, high = array.shape[1:], getattr(space, "low", None), getattr(space, "high", None)
    top = top_of_space(shape, array.dtype, low, high)
    if top is None and name.startswith(IMAGES) and len(shape) >= 2:  # the name tells, and floats are 0 to 1 by the rule
        return (None if low is None else declared_top(array.dtype, low, high)) or 1.0
    return top


def _vector_key(name: str) -> str:
    if name in ("", "agent_pos", "observation"):
        return "observation.state"
    return name if name.startswith("observation.") else f"observation.{name}"


def _pictures(key: str, array: np.ndarray, top: float, says: str) -> np.ndarray:
    """Pictures `[N, C, H, W]` uint8."""
    shape = array.shape[1:]
    layout = find_layout(shape) or layout_of(shape, repr(key), says)
    return as_bytes(layout(array), repr(key), top)


def _vectors(array: np.ndarray) -> np.ndarray:
    """An observation that is no picture, of any shape and type, as `[N, D]` float32."""
    return array.reshape(len(array), -1).astype(np.float32)


def success_of(info: dict[str, Any], slot: int) -> bool | None:
    """Success of one slot as reported in `info`, or None."""
    for key in SUCCESSES:
        if (value := info_value(info, key, slot)) is not None:
            return bool(np.all(np.asarray(value) > 0.5))
    return None


def info_value(info: dict[str, Any], key: str, slot: int) -> Any:
    """`info[key]` of one slot, or None; at an episode's end some autoreset modes report it in `final_info`."""
    final = info.get("final_info")
    if final is not None and np.any(info.get("_final_info", [False] * (slot + 1))[slot]):
        if not isinstance(final, dict):  # an array of dicts, as before Gymnasium 1.0
            return final[slot].get(key)
        info = final
    return info[key][slot] if key in info and np.all(info.get(f"_{key}", [True] * (slot + 1))[slot]) else None


def task_of(envs: Any) -> str | list[str] | None:
    """The text of the task by a vector environment's `task_description`, or a list of one for each slot.

    The list is that attribute, too, or has those of its environments. The name is LeRobot's. None where they have none.
    """
    text = getattr(envs, "task_description", None)
    if isinstance(text, str | list):
        return text
    singles = getattr(getattr(envs, "unwrapped", None), "envs", None) or ()
    found = [getattr(getattr(env, "unwrapped", env), "task_description", None) for env in singles]
    texts = [one for one in found if isinstance(one, str)]
    return texts if texts and len(texts) == len(found) else None
