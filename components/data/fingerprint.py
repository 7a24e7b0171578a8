"""A fingerprint of a dataset: what a resumed run compares, to find out that it would go on with other data.

    {"dataset": ..., "validation": ..., "statistics": {key: {name: numbers}}}

A dataset describes itself by `fingerprint()` where it can: episodes and mixtures do, one of a user may return any JSON.
Of any other map-style dataset the number of items is noted, and a few items.
"""

import contextlib
import json
import time
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .features import RECORDED, as_list, read
from .random_state import preserved

MOST_BYTES = 1 << 30  # of one array that is read as a whole; of a larger one, rows at equal distances
SAMPLES, SECONDS, GOLDEN = 64, 0.2, (5**0.5 - 1) / 2  # items of a dataset that does not describe itself, time for them
RANDOM = "random"  # in place of a value that is another one each time it is read
EXACT, REMADE = 1e-6, 1e-3  # differences of statistics that count as rounding: of stored and of generated data


def digest(values: Any) -> str:
    """CRC-32 of a tensor or array, with its shape and dtype; reads several gigabytes in a second."""
    array = values.detach().cpu() if isinstance(values, Tensor) else np.asarray(values)
    kind = f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"
    if array.nbytes > MOST_BYTES and len(array) > 1:
        array = array[:: -(-array.nbytes // MOST_BYTES)]
    if isinstance(array, Tensor):
        data = array.contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{kind} {zlib.crc32(data.data):08x}"


def moments(values: Tensor) -> dict[str, Any]:
    """What can be compared of values that are generated: shape, mean and deviation of each column `[N, D]` or `[N]`."""
    if values.dtype == torch.uint8 or not len(values):  # pictures are drawn by a library
        return {"shape": str(list(values.shape))}
    x = values.reshape(len(values), -1).double()
    return {"shape": str(list(values.shape)), "mean": x.mean(0).tolist(), "std": x.std(0, correction=0).tolist()}


def fingerprint(built: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of what a dataset's factory returned. Draws no random number of the run's generators."""
    found = {name: of_dataset(built[name]) for name in ("dataset", "validation") if built.get(name) is not None}
    stats = built.get("norm_stats") or {}
    numbers = {str(key): {str(name): as_list(v) for name, v in dict(of).items()} for key, of in stats.items()}
    return json.loads(json.dumps(found | {"statistics": numbers}, default=str))


def of_dataset(dataset: Any) -> dict[str, Any]:
    """What a dataset says of itself by `fingerprint()`, or its number of items and a few of them."""
    found: dict[str, Any] = {"items": len(dataset) if hasattr(dataset, "__len__") else -1}
    if callable(getattr(dataset, "fingerprint", None)):
        own = dataset.fingerprint()
        known = isinstance(own, dict) and ("episodes" in own or "sources" in own)
        return own if known else found | {"content": {"fingerprint": json.dumps(own, default=str)}}
    with contextlib.suppress(Exception), preserved():  # a fault of the dataset is reported where it is checked
        found["sample"] = _sample(dataset, found["items"])
    return found


def _sample(dataset: Any, count: int) -> dict[str, dict[str, str]]:
    """Row -> key -> digest of some items, as many as can be read in a moment, spread over the data in a fixed order."""
    found: dict[str, dict[str, str]] = {}
    end = time.monotonic() + SECONDS
    for i in range(min(SAMPLES, count)):
        row = int(i * GOLDEN % 1 * count)
        once, again = (read(dataset, torch.tensor([row]), seed) for seed in (0, 1))
        parts = {key: (_digest(value), _digest(again.get(key))) for key, value in once.items()}
        found[str(row)] = {key: first if first == second else RANDOM for key, (first, second) in parts.items()}
        if time.monotonic() > end:
            break
    return found


def _digest(value: Any) -> str:
    return digest(value) if isinstance(value, (Tensor, np.ndarray)) else f"{zlib.crc32(repr(value).encode()):08x}"


# ---- what has changed ----------------------------------------------------------------------------------------------


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two fingerprints, in a few words; "" where nothing does.

    Data that is generated may differ in its last digits where it was made again, on another machine; its episodes and
    rows are as many then, and means, deviations and statistics are equal but for rounding.
    """
    parts = _changes(before["dataset"], now["dataset"])
    if ("validation" in before) != ("validation" in now):
        parts.append(f"{'no' if 'validation' in before else 'a'} validation set now")
    elif "validation" in before and not parts:
        parts = [f"held out: {part}" for part in _changes(before["validation"], now["validation"])]
    old, new = before["statistics"], now["statistics"]
    tolerance = REMADE if _generated(before["dataset"]) else EXACT
    for key in {**old, **new}:
        if names := _unlike(old.get(key, {}), new.get(key, {}), tolerance):
            values = " -> ".join(_short(stats.get(key, {}).get(names[0])) for stats in (old, new))
            parts.append(f"{names[0]} of {key!r} {values}")
    more = f"; {len(parts) - 3} more" if len(parts) > 3 else ""
    return "; ".join(parts[:3]) + more


def _generated(one: dict[str, Any]) -> bool:
    return all(map(_generated, one["sources"])) if "sources" in one else bool(one.get("generated"))


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the descriptions of two datasets."""
    if "sources" in before and "sources" in now and len(before["sources"]) == len(now["sources"]):
        pairs = enumerate(zip(before["sources"], now["sources"], strict=True), 1)
        shares = [] if before["shares"] == now["shares"] else [f"shares {before['shares']} -> {now['shares']}"]
        return shares + [f"source {i}: {part}" for i, (old, new) in pairs for part in _changes(old, new)]
    if size(before) != size(now):
        return [f"{size(before)} -> {size(now)}"]
    parts = ["other borders of episodes"] if before.get("borders") != now.get("borders") else []
    old, new = (one.get("content") or _content(one, before, now) for one in (before, now))
    parts += [f"no {key!r} now" for key in old if key not in new]
    parts += [f"{key!r} is new" for key in new if key not in old and key not in RECORDED]
    other = [key for key in old if not _alike(old[key], new.get(key, old[key]))]
    parts += [f"other values of {', '.join(map(repr, other))}"] if other else []
    return parts + (["other rows are held out"] if before.get("chosen") != now.get("chosen") else [])


def _content(one: dict[str, Any], *both: dict[str, Any]) -> dict[str, Any]:
    """Key -> digests of the items that were read of both datasets, without those that are random."""
    samples = [dataset.get("sample") or {} for dataset in both]
    rows = [row for row in samples[0] if row in samples[1]]
    random = {key for sample in samples for row in rows for key, value in sample[row].items() if value == RANDOM}
    keys = {key: None for row in rows for key in one["sample"][row] if key not in random}
    return {key: [one["sample"][row].get(key) for row in rows] for key in keys}


def _alike(before: Any, now: Any) -> bool:
    """Whether two digests are equal, or two moments but for rounding."""
    both = isinstance(before, dict) and isinstance(now, dict)
    return not _unlike(before, now, REMADE) if both else before == now


def size(one: dict[str, Any]) -> str:
    """How much there is, such as "8 episodes, 320 rows"."""
    if "sources" in one:
        return f"{len(one['sources'])} sources ({'; '.join(map(size, one['sources']))})"
    return f"{one['episodes']} episodes, {one['rows']} rows" if "episodes" in one else f"{one['items']} items"


def _unlike(before: dict[str, Any], now: dict[str, Any], tolerance: float) -> list[str]:
    """The names of numbers that differ by more than rounding, compared with the largest number of their column."""
    numbers = [{name: _array(value) for name, value in one.items()} for one in (before, now)]
    found = []
    for name in {**before, **now}:
        x, y = (one.get(name) for one in numbers)
        if x is None or y is None or x.shape != y.shape:
            if before.get(name) != now.get(name):
                found.append(name)
            continue
        alike = [np.abs(z) for one in numbers for z in one.values() if z is not None and z.shape == x.shape]
        if not bool((np.abs(x - y) <= tolerance * np.max(alike, axis=0)).all()):
            found.append(name)
    return found


def _array(value: Any) -> np.ndarray | None:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _short(value: Any) -> str:
    """A statistic in a few digits, at most four numbers of it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    return f"{value:.4g}" if isinstance(value, (int, float)) else "absent" if value is None else str(value)
