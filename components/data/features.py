"""The features of a dataset: keys, shapes, dtypes and statistics of an item, and checks of them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..errors import UserError, nearest
from ..records import Told, misfit
from .pictures import IMAGES, is_picture, pictures_of

BASE_ACTION = "observation.base_action"  # the frozen policy's action in [-1, 1], which the residual policy observes
# Flags of a step that recordings may have, and that older versions did not read: whether an expert or a person, not the
# policy, chose the action, and whether the task was done after it.
INTERVENTION, SUCCESS = RECORDED = ("intervention", "success")
NO_CHOICE = "produces vectors, and the actions are discrete; use --trainer ppo or dqn"
ROWS_PER_READ = 4096
MAX_SLOW_ROWS = 10_000  # items that are checked for NaN one at a time; more would delay the start


def describe(item: Any, norm_stats: dict[str, Any], tasks: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Derive `spec` from an item: {key: {"shape", "dtype", "stats"}} of its tensors, JSON-able.

    Texts are left out, except `task` where the data has several: {"shape": (), "dtype": "text", "values": `tasks`}.

    Raises UserError: an item is no dict, or a statistic is unknown, not finite or has another width than its key.
    """
    if not isinstance(item, dict):
        raise UserError(f"dataset items must be dicts of tensors, found {type(item).__name__}")
    spec: dict[str, dict[str, Any]] = {}
    for key, value in item.items():
        if not isinstance(value, str):
            tensor = to_tensor(value)
            spec[key] = {"shape": tuple(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if "task" in item and len(tasks) > 1:
        spec["task"] = {"shape": (), "dtype": "text", "values": list(tasks)}
    for key, stats in norm_stats.items():
        if key not in spec:
            raise UserError(f"norm_stats has {key!r}, which the data lacks; keys of the data: {', '.join(spec)}")
        if "like" in stats:  # normalised by the statistics of another key
            spec[key]["like"] = stats["like"]
            continue
        spec[key]["stats"] = {name: as_list(value) for name, value in stats.items()}
        check_widths(key, spec[key])
    return spec


def history_of(spec: dict[str, Any]) -> tuple[int, ...]:
    """`(To,)`, the leading axis of observations with a history of To steps, or `()` without a history."""
    for key, feature in spec.items():
        if key.startswith("observation."):
            return tuple(feature["shape"][: -3 if is_picture(key, feature.get("dtype")) else -1])
    return ()


def frame_shape(feature: dict[str, Any], obs_steps: int) -> tuple[int, ...]:
    """Shape of an observation at one moment, as it is recorded, of one with a history, or a flattened one (`steps`).

    Raises UserError: a record that contradicts itself.
    """
    shape = tuple(feature.get("stored_shape", feature["shape"]))[obs_steps > 1 :]  # pictures may be cropped
    if (steps := feature.get("steps", 1)) == 1:
        return shape
    if len(shape) != 1 or steps < 1 or shape[0] % steps:
        raise UserError(f"a spec has {steps} steps in the shape {shape}")
    return (shape[0] // steps,)


def same_frame(feature: dict[str, Any], found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an observation of shape `found` is taken for one of `wanted`: pictures that are resized in any size."""
    resized = "resized_from" in feature and len(found) == 3
    return found[:-2] == wanted[:-2] if resized else found == wanted


def reordered(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether these are the same names of a vector's dimensions in another order."""
    return set(names) == set(others) and list(names) != list(others)


def check_widths(key: str, feature: dict[str, Any]) -> None:
    """Refuse statistics that do not fit their key; they may be scalars, [D], or [T, D] for each step of a chunk."""
    shape = tuple(feature["shape"])
    for name, value in feature["stats"].items():
        if name == "count":
            continue
        array = np.asarray(value, dtype=np.float64)
        if not is_picture(key, feature.get("dtype")) and array.shape not in {(), shape[-1:], shape[-2:]}:
            width = array.shape[-1]
            raise UserError(f"norm_stats {key!r} {name!r} has width {width}, but the data has {shape[-1]} ({shape})")
        if not np.isfinite(array).all():
            raise UserError(f"norm_stats {key!r} {name!r} is not finite: {value}")


def as_list(value: Any) -> Any:
    """A list, array or tensor in the form that JSON stores."""
    return value.tolist() if hasattr(value, "tolist") else value


def to_tensor(value: Any) -> Tensor:
    """A value as a tensor; float64 becomes float32, since Apple's MPS lacks it and no network needs it."""
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def read(dataset: Dataset, indices: Tensor, seed: int = 0) -> dict[str, Any]:
    """One batch of items, by the dataset's `get_batch` where it has one."""
    if hasattr(dataset, "get_batch"):
        return dataset.get_batch(indices, seed)
    return default_collate([dataset[i] for i in indices.tolist()])


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse a dataset that is not map-style, has no items, or has NaN or Inf (with count and first place)."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"{name}: 'dataset' must be map-style (__len__ and __getitem__), found {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise UserError(f"{name}: the dataset is empty; expected at least one item")
    rows = 1 if getattr(dataset, "checked", False) else len(dataset)
    if not hasattr(dataset, "get_batch"):
        images = isinstance(dataset[0], dict) and any(key.startswith(IMAGES) for key in dataset[0])
        rows = 1 if images else min(rows, MAX_SLOW_ROWS)
    count: dict[str, int] = {}
    first: dict[str, int] = {}
    for start in range(0, rows, ROWS_PER_READ):
        batch = read(dataset, torch.arange(start, min(start + ROWS_PER_READ, rows)))
        for key, value in batch.items() if isinstance(batch, dict) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                bad = ~value.isfinite()
                count[key] = count.get(key, 0) + int(bad.sum())
                first.setdefault(key, start + int(bad.flatten(1).any(1).nonzero()[0]) if bad.ndim > 1 else start)
    for key, n in count.items():
        raise UserError(f"{name}: {n} NaN or Inf values in {key!r}, first at item {first[key]}; clean or drop them")


def describe_data(data: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """`spec` of what a dataset's factory returned, as `describe` reads it off the first item.

    Raises UserError: as `check_dataset` and `describe`.
    """
    dataset = data["dataset"]
    check_dataset(dataset, name)
    spec = describe(dataset[0], data["norm_stats"] or {}, getattr(dataset, "tasks", ()))
    for key, told in facts_of(dataset).items():
        for name in (key, f"next.{key}"):
            if name in spec:
                spec[name] |= told
    return spec


def facts_of(dataset: Any) -> dict[str, Any]:
    """What a dataset tells of its keys beside shapes, in its attribute `facts`; {} without it.

    Raises UserError: other values than `records.Told` declares.
    """
    facts = getattr(dataset, "facts", {})
    try:
        told = json.loads(json.dumps(facts))  # as it is saved: tuples are lists
        problem = misfit(told, dict[str, Told])
    except (TypeError, ValueError) as error:
        told, problem = {}, str(error)
    if not problem and (odd := {name for one in told.values() for name in one} - {*Told.__annotations__}):
        problem = f"unknown {sorted(odd)[0]!r}; {nearest(sorted(odd)[0], Told.__annotations__)}"
    if problem:
        kind, example = type(getattr(dataset, "dataset", dataset)).__name__, '{"action": {"names": ["x", "y"]}}'
        raise UserError(f"the attribute facts of {kind} is not such as {example}: {problem}")
    return told


def width(spec: dict[str, Any], key: str) -> int:
    """Width of one step of a vector key. Raises UserError, with the keys of the data: no such key."""
    if key not in spec:
        raise UserError(f"the data has no {key!r}; found: {', '.join(spec)}")
    if "classes" in spec[key]:
        raise UserError(f"this model {NO_CHOICE}")
    return int(spec[key]["shape"][-1])


def vector_observations(spec: dict[str, Any]) -> list[str]:
    """The keys of vector observations, sorted. Raises UserError: none."""
    keys = [key for key in sorted(spec) if key.startswith("observation.") and key not in pictures_of(spec)]
    if not keys:
        raise UserError(f"the data has no vector observation such as 'observation.state'; found: {', '.join(spec)}")
    return keys


def build_models(
    names: Sequence[str],
    build: Callable[[str, dict[str, Any]], nn.Module],
    spec: dict[str, Any],
    model_spec: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda name, spec: spec,
) -> Any:
    """Models by name; an encoder comes first, and the others are built for its output (its `spec`).

    Args:
        build: (name, the spec that it is built for) -> the model.
        model_spec: (name, `spec`) -> the spec that the trainer has that model built for.
    """
    models: dict[str, nn.Module] = {}
    if "encoder" in names:
        models["encoder"] = build("encoder", spec)
        spec = getattr(models["encoder"], "spec", spec)
    return nn.ModuleDict({name: models.get(name) or build(name, model_spec(name, spec)) for name in names})
