"""Items of a user's dataset in the form in which the kit keeps data: pictures as uint8 `[C, H, W]`, vectors `[D]`.

A dataset whose items have this form, or that says so by `kept = True`, is used as it is.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .features import as_list
from .pictures import IMAGES, RULE, Layout, as_bytes, camera_of, dtype_name, find_layout, is_picture, layout_of
from .random_state import preserved


class Form(NamedTuple):
    """How the values of a key become what is kept."""

    shape: tuple[int, ...]  # of an item
    kept: tuple[int, ...]
    layout: Layout | None  # of the pictures; None for vectors
    name: str  # the key that it is kept under

    def __call__(self, key: str, value: Any) -> Tensor:
        """Values `[(B,) *shape]` as `[(B,) *kept]`. Raises UserError: another shape or range than the first item's."""
        tensor = torch.as_tensor(value)
        leading = tuple(tensor.shape[: tensor.ndim - len(self.shape)])
        if tuple(tensor.shape) != (*leading, *self.shape) or len(leading) > 1:
            raise UserError(f"{key!r} has shape {list(tensor.shape)}, in the first item {list(self.shape)}")
        if self.layout is None:
            numbers = tensor.float() if is_picture(key, tensor.dtype) else tensor  # bytes that are none
            return numbers.reshape(*leading, *self.kept)
        return self.layout(as_bytes(tensor, repr(key)))


def as_kept(data: dict[str, Any]) -> dict[str, Any]:
    """What a dataset's factory returned, with items in the form in which data is kept.

    Raises:
        UserError: pictures that do not follow the rule of `pictures`.
    """
    data, dataset = dict(data), data["dataset"]
    mapped = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if getattr(dataset, "kept", False) or not mapped or not len(dataset):
        return data
    with preserved():  # a dataset may draw random numbers
        item = dataset[0]
    if not isinstance(item, dict) or not (forms := forms_of(item)):
        return data
    for name in ("dataset", "validation"):
        if name in data:
            kind = KeptBatches if hasattr(data[name], "get_batch") else Kept
            data[name] = kind(data[name], forms)
    stats = dict(data["norm_stats"] or {})
    for key in forms.keys() & stats.keys():
        flat = forms[key].layout is None
        values = {name: _flat(value, forms[key]) if flat else value for name, value in stats.pop(key).items()}
        stats[forms[key].name] = values
    return data | {"norm_stats": stats}


def _flat(value: Any, form: Form) -> Any:
    """A statistic with one number for each dimension, as a list; others are unchanged."""
    array = np.asarray(as_list(value)) if not isinstance(value, str) else np.empty(0)
    return array.reshape(-1).tolist() if array.size == math.prod(form.shape) and array.ndim else value


def forms_of(item: dict[str, Any]) -> dict[str, Form]:
    """The forms of an item's observations and actions, as far as these are not kept as they are.

    A history of To steps is the first axis of all observations, `[To, D]` and `[To, C, H, W]`. Where they do not agree
    on it, there is none: vectors of several axes are flattened, and four axes are a stack of pictures.
    """
    tensors = {key: torch.as_tensor(value) for key, value in item.items() if not isinstance(value, str)}
    observed = {k: x for k, x in tensors.items() if k.removeprefix("next.").startswith("observation.")}
    seen = {key: x for key, x in observed.items() if _is_camera(key.removeprefix("next."), x)}
    leading = {tuple(x.shape[: -3 if k in seen else -1]) for k, x in observed.items()}
    (history,) = leading if len(leading) == 1 else ((),)
    if len(history) != 1 or history[0] == 1:
        history = ()
    forms: dict[str, Form] = {}
    for key, x in observed.items():
        shape = tuple(x.shape)
        if key in seen:
            if not (x.dtype == torch.uint8 or x.is_floating_point()):
                raise UserError(f"{key!r} holds {dtype_name(x.dtype)}: {RULE}")
            layout = layout_of(shape[len(history) :], repr(key))
            name = f"{'next.' * key.startswith('next.')}{IMAGES}{camera_of(key.removeprefix('next.'))}"
            if x.dtype != torch.uint8 or layout.last or layout.shape != layout.stored or name != key:
                forms[key] = Form(shape, (*history, *layout.stored), layout, name)
        elif shape[len(history) :] != (kept := (math.prod(shape[len(history) :]),)) or is_picture(key, x.dtype):
            forms[key] = Form(shape, (*history, *kept), None, key)
    if "action" in tensors and not tensors["action"].shape and tensors["action"].is_floating_point():
        forms["action"] = Form((), (1,), None, "action")
    return forms


def _is_camera(key: str, x: Tensor) -> bool:
    """Whether an observation is a picture: by its key or, as LeRobot's `observation.image`, by its type and axes."""
    if key.startswith(IMAGES):
        return x.ndim > 1
    named = x.dtype == torch.uint8 or (x.is_floating_point() and "image" in key.rpartition(".")[2])
    return named and x.ndim > 2 and find_layout(tuple(x.shape[-3:])) is not None


class Kept(Dataset):
    """A dataset with some keys of its items in their kept form; everything else is the dataset's own.

    Args:
        dataset: Map-style.
        forms: Key -> its form.
    """

    def __init__(self, dataset: Any, forms: dict[str, Form]) -> None:
        self.dataset, self.forms = dataset, forms

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("dataset", "forms", "get_batch", "values"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._kept(self.dataset[index])

    def _kept(self, items: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for key, value in items.items():
            form = self.forms.get(key)
            kept[form.name if form else key] = form(key, value) if form else value
        return kept


class KeptBatches(Kept):
    """The same with `get_batch`."""

    def get_batch(self, indices: Tensor, seed: int = 0) -> dict[str, Any]:
        """The dataset's batch, with these keys in their kept form."""
        return self._kept(self.dataset.get_batch(indices, seed))
