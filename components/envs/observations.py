"""The observations and the `info` of a vector environment by the data's names.

Environments, datasets and collection share these names, so that a policy reads the same keys everywhere.
"""

from typing import Any

import numpy as np

SUCCESSES = ("success", "is_success")  # the keys of `info` that environments report success under


def observation_batch(observation: Any) -> dict[str, np.ndarray]:
    """Rename an environment's observations to the data's keys.

    A vector `[N, D]` is `observation.state`; pictures are `observation.images.camera` `[N, C, H, W]`, with stacked
    frames concatenated along C. In a dict, `agent_pos` and `observation` are the state, `environment_state` keeps its
    name, and `pixels` holds pictures; keys that begin with `observation.` are kept.
    """
    if not isinstance(observation, dict):
        array = np.asarray(observation)
        if array.dtype == np.uint8 and array.ndim > 2:
            return {"observation.images.camera": channels_first(array)}
        return {"observation.state": _vectors(array)}
    named: dict[str, np.ndarray] = {}
    for key, value in observation.items():
        if key == "pixels":
            cameras = value if isinstance(value, dict) else {"camera": value}
            named |= {f"observation.images.{name}": channels_first(np.asarray(x)) for name, x in cameras.items()}
        elif key in ("agent_pos", "observation"):
            named["observation.state"] = _vectors(value)
        elif key.startswith("observation.images."):
            named[key] = np.asarray(value)
        elif np.asarray(value).dtype == np.uint8 and np.ndim(value) > 2:
            named[f"observation.images.{key}"] = channels_first(np.asarray(value))
        else:
            named[key if key.startswith("observation.") else f"observation.{key}"] = _vectors(value)
    return named


def channels_first(pictures: np.ndarray) -> np.ndarray:
    """Pictures as `[N, C, H, W]`: from grey ones `[N, H, W]`, channels last, stacked frames `[N, S, H, W]`, or both."""
    if pictures.ndim == 3:
        return pictures[:, None]
    if pictures.ndim == 5:  # [N, S, H, W, C]
        pictures = np.moveaxis(pictures, -1, 2)
        return pictures.reshape(len(pictures), -1, *pictures.shape[3:])
    return pictures if pictures.shape[1] < pictures.shape[3] else np.moveaxis(pictures, -1, 1)


def _vectors(value: Any) -> np.ndarray:
    """An observation that is no picture, of any shape and type, as `[N, D]` float32."""
    array = np.asarray(value)
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
        info = final
    return info[key][slot] if key in info and np.all(info.get(f"_{key}", [True] * (slot + 1))[slot]) else None
