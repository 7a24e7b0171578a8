"""What a dataset holds: keys, shapes, dtypes and statistics of one item, and the checks on them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..errors import UserError

NO_CHOICE = "gives vectors, and the actions are discrete; --trainer ppo and dqn choose such ones"
ROWS_PER_READ = 4096
MAX_SLOW_ROWS = 10_000  # items read one at a time to look for NaN; reading more would delay the start


def describe(item: Any, norm_stats: dict[str, Any], tasks: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Read `spec` off one item: {key: {"shape", "dtype", "stats"}}, JSON-able, of the tensors only.

    Of the texts, `task` is described where the data has several: {"shape": (), "dtype": "text", "values": `tasks`}.

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
        if "like" in stats:  # another key's statistics hold for this one, too
            spec[key]["like"] = stats["like"]
            continue
        spec[key]["stats"] = {name: as_list(value) for name, value in stats.items()}
        check_widths(key, spec[key])
    return spec


def history_of(spec: dict[str, Any]) -> tuple[int, ...]:
    """`(To,)`, the leading axis of what is observed over a history of To steps, or `()` for the last step alone."""
    shapes = [feature["shape"] for key, feature in spec.items() if key.startswith("observation.")]
    leading = [tuple(shape[:-3] if len(shape) > 2 else shape[:-1]) for shape in shapes]  # pictures or vectors
    return leading[0] if leading else ()


def check_widths(key: str, feature: dict[str, Any]) -> None:
    """Refuse statistics that do not fit their key: a scalar, [D], or [T, D] per time step of a chunk or history."""
    shape = tuple(feature["shape"])
    for name, value in feature["stats"].items():
        if name == "count":
            continue
        array = np.asarray(value, dtype=np.float64)
        if "images" not in key and array.shape not in {(), shape[-1:], shape[-2:]}:
            width = array.shape[-1]
            raise UserError(f"norm_stats {key!r} {name!r} has width {width}, but the data has {shape[-1]} ({shape})")
        if not np.isfinite(array).all():
            raise UserError(f"norm_stats {key!r} {name!r} is not finite: {value}")


def as_list(value: Any) -> Any:
    """Lists, arrays and tensors alike, as JSON holds them."""
    return value.tolist() if hasattr(value, "tolist") else value


def to_tensor(value: Any) -> Tensor:
    """As a tensor; float64 becomes float32 (it is missing on Apple's MPS, and no network here needs it)."""
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def read(dataset: Dataset, indices: Tensor, seed: int = 0) -> dict[str, Any]:
    """One batch of items, by the fast path where the dataset has one."""
    if hasattr(dataset, "get_batch"):
        return dataset.get_batch(indices, seed)
    return default_collate([dataset[i] for i in indices.tolist()])


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse what no training could use: no map-style dataset, no items, NaN or Inf (count and first place)."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"{name}: 'dataset' must be map-style (__len__ and __getitem__), found {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise UserError(f"{name}: the dataset is empty; expected at least one item")
    rows = 1 if getattr(dataset, "checked", False) else len(dataset)
    if not hasattr(dataset, "get_batch"):
        images = isinstance(dataset[0], dict) and any("images" in key for key in dataset[0])
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


def width(spec: dict[str, Any], key: str) -> int:
    """Width of one frame of a vector key. Raises UserError naming the keys there are."""
    if key not in spec:
        raise UserError(f"the data has no {key!r}; found: {', '.join(spec)}")
    if "classes" in spec[key]:
        raise UserError(f"this model {NO_CHOICE}")
    return int(spec[key]["shape"][-1])


def vector_observations(spec: dict[str, Any]) -> list[str]:
    """The observation keys that hold vectors, in the order of their names."""
    keys = [key for key in sorted(spec) if key.startswith("observation.") and "images" not in key]
    if not keys:
        raise UserError(f"the data has no vector observation such as 'observation.state'; found: {', '.join(spec)}")
    return keys


def seen_by(trainer: type, config: Any) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """(model, spec of the data) -> spec that the model is built for, as the trainer says by `sees`."""
    sees = getattr(trainer, "sees", None)
    return (lambda model, spec: sees(model, spec, config)) if sees else (lambda model, spec: spec)


def build_models(
    names: Sequence[str],
    build: Callable[[str, dict[str, Any]], nn.Module],
    spec: dict[str, Any],
    sees: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda name, spec: spec,
) -> Any:
    """Models by name; an encoder comes first, and the others are built for what it gives (its `spec`).

    Args:
        build: (name, what the model will see of the data) -> the model.
        sees: (name, `spec`) -> what that model of the trainer sees in its place.
    """
    models: dict[str, nn.Module] = {}
    if "encoder" in names:
        models["encoder"] = build("encoder", spec)
        spec = getattr(models["encoder"], "spec", spec)
    return nn.ModuleDict({name: models.get(name) or build(name, sees(name, spec)) for name in names})
