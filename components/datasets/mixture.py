"""A weighted mixture of datasets, each with its share of every batch.

A pass over the mixture is long enough to contain every item of every source while the shares hold, but at most eight
million items; passes cut to that length draw different items each time. Within a pass, the items of the sources are
interleaved evenly: each batch, and each pass, has the requested shares to within one item of a source, even where the
remainder of a pass is dropped because it fills no batch.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..contracts import Place, options_of
from ..data.actions import STATE, ActionForm, check_rotations, numbered
from ..data.features import INTERVENTION, facts_of, read, reordered
from ..data.fingerprint import of_dataset
from ..data.items import as_kept
from ..data.normalisation import on_plateau, quantiles, statistics
from ..data.pictures import is_picture
from ..data.random_state import derive_seed
from ..errors import UserError, nearest
from .episodes import Batched, EpisodeDataset, Episodes
from .learnt import LearntOptions, learnt_statistics
from .recognise import recognise

logger = logging.getLogger(__name__)
LONGEST_PASS = 1 << 23  # items, whose order is kept in memory
SAME_RATE = 0.01  # largest relative difference of frames a second that count as the same


@dataclass(frozen=True)
class MixtureDataset(LearntOptions):
    """A weighted mixture of datasets, such as --dataset.sources demos/a:0.7 metaworld:0.3."""

    sources: Annotated[tuple[str, ...], Place("(?:[^=,]*=)?([^,=]+)(?:,.*)?:[^:]*")] = ()
    """SOURCE:WEIGHT for each. SOURCE is a path whose format is recognised, NAME=PATH, or the NAME of a dataset that
    needs no path; its options follow after commas, as in robomimic=demos.hdf5,split=train:0.5, and the words of one are
    separated by spaces, as in 'demos/a,episodes=0:40 !7:0.5'. Of any source, text=open the drawer|pull it open names
    its task in place of its own texts; its episodes get several wordings in turn."""
    cameras: tuple[str, ...] = ()
    """Cameras whose pictures are loaded, the same for every source."""
    image_size: tuple[int | str, ...] = ()
    """Size to which the pictures of every source are resized: 224 320, or front=224x320 wrist=128x128."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Decode all pictures of the sources once, into memory or into a file; none decodes each when it is needed."""
    obs_steps: int = 1
    """Observation steps per sample, the last being now."""
    action_steps: int = 1
    """Action steps per sample; more than one makes chunks."""
    validation: float = 0.1
    """Fraction of each source's episodes to hold out."""
    seed: int = 0
    """Seed of the random choices of each source."""
    allow_fps: bool = False
    """Mix sources whose steps take different times."""
    allow_names: bool = False
    """Mix sources whose dimensions have different names, by their places."""
    instructions: bool = True
    """Tell sources without texts apart by what their task is, where all sources then have texts (Meta-World's)."""

    env_name = "gymnasium"
    former_defaults = {"instructions": False}

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset", "validation", "norm_stats"}, and the first source's "env".

        Items: the keys that all sources have, and `source`, the name of the item's source. Statistics are weighted by
        the shares, as the items are. Dimensions are in the order of the first source that names them.

        Raises:
            UserError: invalid sources or weights, keys or widths that differ between sources, and so do their names of
                dimensions or their frames a second.
        """
        if not self.sources:
            raise UserError("--dataset.sources is needed: SOURCE:WEIGHT of each, such as demos/a:0.7 demos/b:0.3")
        named = [self._parse(source) for source in self.sources]
        names = [
            f"{i}-{name}" if [n for n, *_ in named].count(name) > 1 else name for i, (name, *_) in enumerate(named)
        ]
        total = sum(weight for _, weight, *_ in named)
        shares = [weight / total for _, weight, *_ in named]
        parts = []
        for name, share, (_, _, factory, _) in zip(names, shares, named, strict=True):
            logger.info("source %s: %s, %.3g %% of each batch", name, type(factory).__name__, 100 * share)
            parts.append(as_kept(factory.build(**kwargs | {"params": vars(factory)})))
        datasets = [part["dataset"] for part in parts]
        known = {n: d.episodes for n, d in zip(names, datasets, strict=True) if isinstance(d, EpisodeDataset)}
        asked = {name: texts for name, (*_, texts) in zip(names, named, strict=True) if texts}
        if others := [name for name in asked if name not in known]:
            raise UserError(f"--dataset.sources {others[0]}: text= names the task of episodes; it has single items")
        give_texts(known, asked, self.instructions and len(known) == len(names))
        if any(INTERVENTION in data.columns for data in known.values()):
            for data in known.values():  # nobody took over where nothing says so
                data.columns.setdefault(INTERVENTION, torch.zeros(len(data.at), dtype=torch.bool))
        check_rates(known, self.allow_fps)
        align(known, self.allow_names)
        form = self._form(dict(zip(names, datasets, strict=True)))
        for part in parts if form else ():
            for dataset in (part["dataset"], part.get("validation")):
                if dataset is not None:
                    dataset.form = form
        keys = common_keys(dict(zip(names, datasets, strict=True)))
        built: dict[str, Any] = {
            "dataset": Mixture(datasets, names, shares, keys),
            "norm_stats": {
                key: weighted_statistics(datasets, shares, key)
                for key in parts[0]["norm_stats"]
                if key in keys and all(key in part["norm_stats"] for part in parts)
            },
        }
        if form:
            form.stats.update(built["norm_stats"]["action"])
            built["norm_stats"]["action"] = learnt_statistics(datasets, partial(weighted, shares))
        for key, scale in common_scale(parts).items():
            built["norm_stats"][key] |= scale
        whole = [part[which] for part in parts for which in ("dataset", "validation") if which in part]
        self.remember(whole, built["norm_stats"])
        held_out = [(part["validation"], i) for i, part in enumerate(parts) if "validation" in part]
        if held_out:
            some = [i for _, i in held_out]
            built["validation"] = Mixture(
                [d for d, _ in held_out], [names[i] for i in some], [shares[i] for i in some], keys
            )
        return built | {key: parts[0][key] for key in ("env", "reference_scores") if key in parts[0]}

    def reaches(self) -> list[tuple[str, str, str]]:
        """What the sources import or open, as of `GymnasiumEnv.reaches`."""
        factories = [self._parse(source)[2] for source in self.sources]
        found = [part for factory in factories for part in getattr(factory, "reaches", list)()]
        return [("sources", module, what) for _, module, what in found]

    def _form(self, datasets: dict[str, Any]) -> ActionForm | None:
        """The form of the actions of all sources, whose dimensions are in the same order by now.

        Raises:
            UserError: as `LearntOptions.form`; a source of single items, or whose state has another width.
        """
        if (self.action, self.rotations, self.action_keys) == ("absolute", (), ()):
            return None
        for name, dataset in datasets.items():
            if not isinstance(dataset, EpisodeDataset):
                raise UserError(f"--dataset.action {self.action}: {name} is a {type(dataset).__name__} of single items")
        first, *others = [dataset.episodes for dataset in datasets.values()]
        named: dict[str, list[str]] = {}
        for key in ("action", STATE):
            named[key] = next((data.names[key] for data in (first, *others) if data.names.get(key)), [])
        if (form := self.form(replace(first, names=named))) is None:
            return None
        for name, dataset in [*datasets.items()][1:]:
            data = dataset.episodes
            if form.relates and (
                STATE not in data.observations or data.observations[STATE].shape[1] != form.state_width
            ):
                raise UserError(f"--dataset.action {self.action}: {name} has no {STATE!r} of width {form.state_width}")
            if data.columns["action"].shape[1] == form.width:  # otherwise refused below, by its shape
                check_rotations(form, data.columns["action"], data.observations.get(STATE), name)
        return form

    def _parse(self, source: str) -> tuple[str, float, Any, list[str]]:
        """(name, weight, factory, texts of the task) of one entry of `sources`."""
        from .. import DATASET_BUILDER_REGISTRY

        head, colon, tail = source.rpartition(":")
        try:
            weight = float(tail) if colon else math.nan
        except ValueError:
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"--dataset.sources {source}: expected SOURCE:WEIGHT with a weight above 0, such as {source}:1"
            )
        what, *settings = head.split(",")
        name, equals, path = what.partition("=")
        if not equals:
            name, path = (
                (what, "") if what in DATASET_BUILDER_REGISTRY and not Path(what).exists() else (recognise(what), what)
            )
        if name not in DATASET_BUILDER_REGISTRY or name == "mixture":
            raise UserError(
                f"--dataset.sources {source}: no dataset {name!r}; {nearest(name, DATASET_BUILDER_REGISTRY)}"
            )
        values: dict[str, Any] = {"path": path} if path else {}
        texts: list[str] = []
        for setting in settings:
            option, equals, text = setting.partition("=")
            if option == "text":
                texts = [wording.strip() for wording in text.split("|")]
                if not all(texts):
                    raise UserError(f"--dataset.sources {source}: expected text=WORDING or text=WORDING|WORDING")
                continue
            try:
                values[option.replace("-", "_")] = json.loads(text.lower() if text in ("True", "False") else text)
            except ValueError:
                values[option.replace("-", "_")] = text
        cls = DATASET_BUILDER_REGISTRY[name]
        known = {field.name: field.default for field in fields(cls)} if is_dataclass(cls) else {}
        kinds = get_type_hints(cls) if known else {}
        for option, value in values.items():
            values[option] = typed(value, known.get(option), kinds.get(option), f"{source}: {option}")
        if own := [option for option in ("action", "action_keys", "rotations", "state_steps") if option in values]:
            shown = own[0].replace("_", "-")
            raise UserError(f"--dataset.sources {source}: {shown} is common to all sources: set --dataset.{shown}")
        if values and not known:
            raise UserError(f"--dataset.sources {source}: {name} has no options")
        shared: dict[str, Any] = {"obs_steps": self.obs_steps, "action_steps": self.action_steps, "seed": self.seed}
        shared |= {"validation": self.validation, "cameras": self.cameras, "cache": self.cache}
        shared |= {"image_size": self.image_size} if self.image_size else {}
        shared = {option: value for option, value in shared.items() if option in known}
        return Path(path).name or name, weight, options_of(cls, shared | values) if known else cls(), texts


def typed(value: Any, default: Any, hint: Any, place: str) -> Any:
    """The value of a source's option in the type of its default. Raises UserError: it has another one."""
    kind = type(default)
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise UserError(f"--dataset.sources {place} is {value!r:.40}; {nearest(str(value), get_args(hint))}")
    words = isinstance(value, str) and any(get_origin(part) is tuple for part in get_args(hint))
    if kind is tuple or words:  # an option of several words
        return value if isinstance(value, list) else tuple(str(value).split())
    if kind is str:
        return str(value)
    wants = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind)
    if wants and type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"--dataset.sources {place} is {value!r:.40}, expected {wants}")
    return value


class Mixture(Batched):
    """Items of several datasets: those of the first one, then those of the second one, ...

    Args:
        datasets, names: The sources.
        shares: Share of each source in every pass and batch; they sum to 1.
        keys: The keys of an item.
    """

    checked = kept = True

    def __init__(self, datasets: list[Any], names: list[str], shares: list[float], keys: list[str]) -> None:
        total = sum(shares)
        self.datasets, self.names, self.shares, self.keys = datasets, names, [s / total for s in shares], keys
        self.sizes = [len(dataset) for dataset in datasets]
        self.starts = torch.tensor([0, *np.cumsum(self.sizes)[:-1].tolist()])
        # Draws from each source in one pass: the least for which every item of every source occurs.
        longest = min(max(size / share for size, share in zip(self.sizes, self.shares, strict=True)), LONGEST_PASS)
        self.draws = [max(1, round(longest * share)) for share in self.shares]

    deterministic = property(lambda self: all(getattr(d, "deterministic", False) for d in self.datasets))
    resident = property(lambda self: all(getattr(d, "resident", True) for d in self.datasets))

    @property
    def tasks(self) -> list[str]:
        """Texts of the tasks of the items."""
        return list(dict.fromkeys(text for dataset in self.datasets for text in getattr(dataset, "tasks", ())))

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """As of `EpisodeDataset`: by the first source that tells, and the former sizes of pictures of all."""
        found: dict[str, dict[str, Any]] = {}
        for dataset in self.datasets:
            for key, told in facts_of(dataset).items():
                sizes = [*found.get(key, {}).get("resized_from", []), *told.get("resized_from", [])]
                found[key] = told | found.get(key, {})
                if sizes:
                    found[key]["resized_from"] = [size for i, size in enumerate(sizes) if size not in sizes[:i]]
        return found

    @property
    def rows_per_pass(self) -> int:
        """Items of one pass; more than exist, where a source is repeated to keep its share."""
        return sum(self.draws)

    def sources(self) -> dict[str, tuple[Tensor, float]]:
        """The items and the share of each source."""
        items = torch.arange(len(self)).split(self.sizes)
        return dict(zip(self.names, zip(items, self.shares, strict=True), strict=True))

    def order(self, seed: int, epoch: int) -> Tensor:
        """The items of one pass `[rows_per_pass]`: sources are interleaved evenly, and each is shuffled."""
        return _order(tuple(self.sizes), tuple(self.draws), seed, epoch)

    def __len__(self) -> int:
        return sum(self.sizes)

    def get_batch(self, indices: Tensor, seed: int = 0) -> dict[str, Any]:
        """Items `indices` `[B]`, in that order; `source` is a list of names."""
        source = torch.searchsorted(self.starts, indices, right=True) - 1  # [B]
        batch: dict[str, Any] = {}
        for number, dataset in enumerate(self.datasets):
            places = (source == number).nonzero().squeeze(1)
            if not len(places):
                continue
            part = read(dataset, indices[places] - self.starts[number], derive_seed(seed, number))
            for key in self.keys:
                value = part[key]
                if isinstance(value, Tensor):
                    if key not in batch:
                        batch[key] = value.new_empty(len(indices), *value.shape[1:])
                    batch[key][places] = value
                else:
                    texts = batch.setdefault(key, [""] * len(indices))
                    for place, text in zip(places.tolist(), value, strict=True):
                        texts[place] = text
        return batch | {"source": [self.names[i] for i in source.tolist()]}

    def fingerprint(self) -> dict[str, Any]:
        """The sources' own, and their shares."""
        return {"sources": [of_dataset(dataset) for dataset in self.datasets], "shares": self.shares}

    def mapped(self, view: Callable[[Any], Any]) -> "Mixture":
        """A mixture with the same shares, whose sources are `view(source)`."""
        datasets = [view(dataset) for dataset in self.datasets]
        return Mixture(datasets, self.names, self.shares, common_keys(dict(zip(self.names, datasets, strict=True))))


@lru_cache(maxsize=2)
def _order(sizes: tuple[int, ...], draws: tuple[int, ...], seed: int, epoch: int) -> Tensor:
    """Put draw j of source k at the fraction (j + 1/2) / draws[k] of the pass; at ties, the first source is first."""
    order, start = torch.empty(sum(draws), dtype=torch.int64), 0
    for number, (size, count) in enumerate(zip(sizes, draws, strict=True)):
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch, number))
        items = torch.cat([torch.randperm(size, generator=generator) for _ in range(-(-count // size))])[:count]
        j = torch.arange(count)
        place = j.clone()  # of each draw: the number of earlier draws of its own source and of each other one
        for other, others in enumerate(draws):
            if other != number:
                twice = (2 * j + 1) * others - count  # (2i + 1) * count < (2j + 1) * others, solved for i
                place += twice // (2 * count) + 1 if other < number else -(-twice // (2 * count)).clamp(max=0)
        order[place] = items + start
        start += size
    return order


def give_texts(sources: dict[str, Episodes], asked: dict[str, list[str]], instructions: bool = True) -> None:
    """Give sources their texts: those that are `asked` for, and without any, the `instructions` of their only task.

    The latter only where all sources then have texts, which differ: others are not told apart by them. The episodes of
    a source get its texts in turn.
    """
    for name, texts in asked.items():
        deal(sources[name], texts)
    silent = [data for data in sources.values() if "task_index" not in data.columns]
    known = {text for data in sources.values() for text in (data.tasks or [data.instruction])}
    if instructions and len(known) > 1 and all(data.instruction for data in silent):
        for data in silent:
            deal(data, [data.instruction])


def deal(data: Episodes, texts: Sequence[str]) -> None:
    """Give each episode one of the texts, in turn, in the episodes themselves."""
    data.tasks = list(texts)
    data.columns["task_index"] = torch.repeat_interleave(torch.arange(len(data.ends)) % len(texts), data.lengths)


def check_rates(sources: dict[str, Episodes], allowed: bool) -> None:
    """Refuse sources with different frames a second, where they are known, unless that is `allowed`, which is said.

    Raises:
        UserError: naming two of them.
    """
    rates = {name: float(data.stored["fps"]) for name, data in sources.items() if data.stored.get("fps")}
    for name, rate in rates.items():
        first = next(iter(rates))
        if abs(rate - rates[first]) > SAME_RATE * max(rate, rates[first]):
            differ = f"{first} has {rates[first]:g} frames a second, {name} has {rate:g}"
            if not allowed:
                remedy = "resample one of them, or mix them all the same with --dataset.allow-fps"
                raise UserError(f"--dataset.sources: {differ}, so that the same action is another one; {remedy}")
            logger.warning("mixture: %s (--dataset.allow-fps)", differ)


def align(sources: dict[str, Episodes], by_place: bool) -> None:
    """Put the dimensions of all sources in the order of the first one that names them; changed orders are said.

    Args:
        by_place: Leave sources with other names as they are, instead of refusing them.

    Raises:
        UserError: a source has other names; names the first that differs.
    """
    kept = {name: data.stored["keys"] for name, data in sources.items() if data.stored.get("keys")}
    for name, keys in kept.items():
        first = next(iter(kept))
        if keys != kept[first] and sources[name].stored["format"] == sources[first].stored["format"] and not by_place:
            what = f"observation.state is {' '.join(kept[first])} in {first}, {' '.join(keys)} in {name}"
            raise UserError(f"--dataset.sources: {what}; set the option keys alike, as in demos.hdf5,keys=A B:0.5")
    for key in dict.fromkeys(key for data in sources.values() for key in data.names):
        if not all(key in data.columns or key in data.observations for data in sources.values()):
            continue  # it is left out
        given = {name: data.names[key] for name, data in sources.items() if data.names.get(key)}
        telling = [set(found) for found in given.values() if not numbered(found)]
        named = {name: found for name, found in given.items() if not numbered(found) or set(found) in telling}
        if not named:
            continue
        first, order = next(iter(named.items()))
        if silent := [name for name in sources if name not in named]:
            what = f"mixture: {silent[0]} does not name the dimensions of {key!r}, which count as those of {first}"
            logger.info("%s in their order", what)
        for name, found in named.items():
            if reordered(found, order):
                reorder(sources[name], key, [found.index(dimension) for dimension in order])
                logger.info("mixture: %r of %s is put in the order of %s: %s", key, name, first, ", ".join(order))
            elif len(found) == len(order) and found != order and not by_place:
                own, other = (next(d for d in x if d not in y) for x, y in ((order, found), (found, order)))
                raise UserError(
                    f"--dataset.sources: the dimensions of {key!r} have different names: {own!r} is in {first} alone,"
                    f" {other!r} in {name}; if these are the same in the same order, set --dataset.allow-names"
                )


def reorder(data: Episodes, key: str, places: list[int]) -> None:
    """Put the dimensions `places` of a key in this order, in the episodes themselves."""
    store = data.columns if key in data.columns else data.observations
    store[key] = store[key][..., places]
    data.names = data.names | {key: [data.names[key][place] for place in places]}


def common_keys(datasets: dict[str, Any]) -> list[str]:
    """The keys that the items of all datasets have. Raises UserError: shapes or types that differ."""
    first, *others = datasets
    items = {name: dataset[0] for name, dataset in datasets.items()}
    keys = [key for key in items[first] if all(key in items[other] for other in others)]
    for name, item in items.items():
        if dropped := [key for key in item if key not in keys]:
            logger.info("mixture: %s of %s is left out, since not all sources have it", ", ".join(dropped), name)
        if "task" in dropped and (several := len(getattr(datasets[name], "tasks", ()))) > 1:
            without = next(other for other in items if "task" not in items[other])
            why = f"{without} has no texts of tasks, so the {several} tasks of {name} are not told apart"
            logger.warning("mixture: %s", why)
        for key in keys:
            here, there = items[first][key], item[key]
            if isinstance(here, Tensor) and (here.shape, here.dtype) != (there.shape, there.dtype):
                shapes = f"{tuple(here.shape)} in {first}, {tuple(there.shape)} in {name}"
                remedy = "set --dataset.image-size" if is_picture(key, here.dtype) else "choose keys that agree"
                raise UserError(f"--dataset.sources: {key!r} has shape {shapes}; {remedy}")
    if "action" not in keys:
        raise UserError(f"--dataset.sources: the sources {', '.join(datasets)} have no 'action' in common")
    return keys


def weighted_statistics(datasets: list[Any], shares: list[float], key: str) -> dict[str, list[float]]:
    """Statistics of a key over all sources, with each row weighted by its source's share."""
    return weighted(shares, [_all(dataset, key) for dataset in datasets])


def weighted(shares: list[float], parts: list[Tensor]) -> dict[str, list[float]]:
    """Statistics in float64 of the rows of several parts, which count by their shares; a part may have no rows."""
    there = [(values, share) for values, share in zip(parts, shares, strict=True) if len(values)]
    values, shares = [values for values, _ in there], [share / sum(s for _, s in there) for _, share in there]
    each = [statistics(rows) for rows in values]
    weights = np.array(shares)[:, None]
    mean, std = (np.array([stats[name] for stats in each]) for name in ("mean", "std"))
    centre = (weights * mean).sum(0)
    stats = {"mean": centre, "std": np.sqrt((weights * (std**2 + (mean - centre) ** 2)).sum(0))}
    stats |= {"min": np.min([s["min"] for s in each], 0), "max": np.max([s["max"] for s in each], 0)}
    rows = np.concatenate([value.numpy().astype(np.float64) for value in values])
    weight = np.concatenate([np.full(len(v), share / len(v)) for v, share in zip(values, shares, strict=True)])
    q01, usual, q99 = quantiles(rows, weight, (0.01, 0.5, 0.99))
    stats["q01"], stats["q99"] = on_plateau(usual, weight @ (rows == usual), q01, q99)
    return {name: value.tolist() for name, value in stats.items()}


def common_scale(parts: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The statistic `scale` of the actions, where the sources have one. Raises UserError: they differ."""
    scales = {part["norm_stats"].get("action", {}).get("scale") for part in parts}
    if len(scales) > 1:
        raise UserError("--dataset.sources: the option action_scale must be the same for all sources")
    scale = scales.pop()
    return {} if scale is None else {"action": {"scale": scale}}


def _all(dataset: Any, key: str) -> Tensor:
    """The vectors `key` of all items of a dataset, `[rows, D]`."""
    if hasattr(dataset, "values"):
        return dataset.values(key)
    values = read(dataset, torch.arange(len(dataset)))[key]
    return values.reshape(-1, values.shape[-1])


def through(
    data: dict[str, Any], view: Callable[[EpisodeDataset], Dataset], trainer: str, plain: bool = False
) -> dict[str, Any]:
    """`data` with the training and the validation set replaced by `view`, a mixture's sources one by one.

    Args:
        plain: Leave datasets of single items as they are; otherwise they are refused, as a UserError.
    """

    def seen(dataset: Any) -> Any:
        if isinstance(dataset, Mixture):
            return dataset.mapped(seen)
        if isinstance(dataset, EpisodeDataset):
            if dataset.state_steps > 1:
                raise UserError(f"{trainer} takes single states; leave out --dataset.state-steps")
            if pictures := list(dataset.episodes.cameras):
                raise UserError(f"{trainer} takes vectors; the data has {pictures[0]!r}: leave out --dataset.cameras")
            return view(dataset)
        if not plain:
            kind = type(getattr(dataset, "dataset", dataset)).__name__  # as the user has it
            raise UserError(f"{trainer} needs episodes; the data is a {kind} of single items")
        return dataset

    return data | {key: seen(data[key]) for key in ("dataset", "validation") if key in data}
