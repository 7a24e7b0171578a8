"""The common part of all datasets: history, action chunks, padding, successors, validation split and statistics.

Every reader fills an `Episodes` and calls `build`, so that all formats share one definition of a window and of a
transition. Vectors are kept in memory; pictures are decoded when they are needed (`frames.py`).
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..contracts import Place
from ..data.actions import STATE, ActionForm
from ..data.features import SUCCESS
from ..data.fingerprint import digest, moments
from ..data.normalisation import statistics
from ..data.pictures import CHANNELS, IMAGES, as_bytes, camera_of, find_layout, is_picture, layout_of, sizes_of
from ..errors import UserError, nearest
from ..run.progress import phase
from .frames import Frames, ResizedFrames, resized_store, stored
from .learnt import LearntOptions
from .recognise import recognise

logger = logging.getLogger(__name__)
AT_ONCE = 1 << 15  # actions that are encoded together, which fit into a cache
CHOICE = re.compile(r"(!?)(-?\d{1,18})?(?:(:)(-?\d{1,18})?)?")  # a word of --dataset.episodes


class NotFiniteError(UserError):
    """The data has NaN or Inf. The error keeps the episodes, so that `inspect` can show them."""

    def __init__(self, message: str, episodes: "Episodes") -> None:
        super().__init__(message)
        self.episodes = episodes


@dataclass
class Episodes:
    """Episodes one after the other: N steps that have an action, and M observations, of which each step has one.

    Where the observation after the last action is stored, an episode has one observation more than it has steps.
    """

    name: str
    """Name of the data, for messages."""
    ends: Tensor
    """`[E]` int64, the step after each episode's last one."""
    columns: dict[str, Tensor]
    """`[N, ...]`: action, and where recorded reward, terminated, truncated, intervention, success, ..."""
    observations: dict[str, Any]
    """`[M, ...]`: a tensor, or `Frames`."""
    at: Tensor
    """`[N]`, the observation of each step."""
    after: Tensor
    """`[N]`, the observation after the action of each step; -1 where it is unknown."""
    tasks: Sequence[str] = ()
    """Texts; the column `task_index` `[N]` chooses among them."""
    stored: dict[str, Any] = field(default_factory=dict)
    """Declarations of the format itself, for `inspect`: fps, action_space, ..."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Key -> the name of each of its dimensions, where the format has them."""
    numbers: Sequence[int] = ()
    """The data's own number of each episode; by default their places."""
    files: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the files of pictures, where `observations` may hold these decoded."""
    resized_from: dict[str, list[list[int]]] = field(default_factory=dict)
    """Camera -> the size [H, W] that its pictures had before they were resized."""
    generated: bool = False
    """Whether they were made, so that another machine may make them with other last digits."""
    instruction: str = ""
    """Text of the only task, of data without `tasks`; a mixture tells its sources apart by it."""

    @property
    def lengths(self) -> Tensor:
        """`[E]`, steps of each episode."""
        return torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.int64))

    @property
    def cameras(self) -> dict[str, Any]:
        """The observations that are pictures."""
        return {key: store for key, store in self.observations.items() if is_picture(key, store.dtype)}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Counts and digests, by which a resumed run recognises its data; pictures by the bytes of their files."""
        pictures = {key: store.fingerprint() for key, store in self.cameras.items() if isinstance(store, Frames)}
        known = pictures | self.files
        numbers = {key: store for key, store in (self.columns | self.observations).items() if key not in known}
        texts = digest(np.frombuffer("\0".join(self.tasks).encode(), np.uint8)) if self.tasks else ""
        of: Any = moments if self.generated else digest
        content = known | {key: of(store) for key, store in numbers.items()} | {"task": texts}
        borders = digest(torch.cat([self.ends, self.at, self.after]))
        rows = {"episodes": len(self.ends), "rows": len(self.at)}
        return rows | {"borders": borders, "content": content, "generated": self.generated}

    def resize(self, words: Sequence[Any]) -> None:
        """Resize pictures as the option `image_size` says: those in memory now, others when they are decoded.

        Raises UserError: as `sizes_of`.
        """
        if not words:
            return
        keep_forms(self)
        for key, size in sizes_of(words, self.cameras).items():
            store = self.observations[key]
            self.resized_from[key] = [list(store.shape[-2:])]
            if isinstance(store, Frames):
                self.observations[key] = ResizedFrames(store, size)
            else:
                self.files[key] = f"{digest(store)} resized to {list(size)}"
                self.observations[key] = resized_store(store, size)

    def place(self, row: int) -> tuple[int, int]:
        """(number of the episode, step within it) of step `row`."""
        episode = int(torch.searchsorted(self.ends, row, right=True))
        number = self.numbers[episode] if self.numbers else episode
        return number, row - (int(self.ends[episode - 1]) if episode else 0)

    def subset(self, places: Sequence[int]) -> "Episodes":
        """The episodes at `places` alone, without any step or observation of the others."""
        ends, lengths = self.ends[list(places)], self.lengths[list(places)]
        rows = torch.cat([torch.arange(end - n, end) for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)])
        numbers = [self.numbers[place] if self.numbers else place for place in places]
        return replace(self.of_steps(rows, lengths), numbers=numbers)

    def of_steps(self, rows: Tensor, lengths: Tensor) -> "Episodes":
        """Steps `rows` alone, as episodes of these `lengths`, without any observation of the others."""
        at, after = self.at[rows], self.after[rows]
        used = torch.cat([at, after[after >= 0]]).unique()  # sorted
        observations = {
            key: store.subset(used.numpy()) if isinstance(store, Frames) else store[used]
            for key, store in self.observations.items()
        }
        return replace(
            self,
            ends=lengths.cumsum(0),
            columns={key: column[rows] for key, column in self.columns.items()},
            observations=observations,
            at=torch.searchsorted(used, at),
            after=torch.where(after < 0, after, torch.searchsorted(used, after)),
        )


def choose_episodes(words: Sequence[Any], numbers: Sequence[int], name: str) -> list[int]:
    """The places of the episodes that `--dataset.episodes` chooses, in the order of the data; all without a word.

    Args:
        words: Numbers (-1 is the last one), ranges A:B as Python's, and after "!" what is left out; a word may hold
            several.
        numbers: The data's own number of each episode.

    Raises:
        UserError: another word, an episode that does not exist, or no episode left. Says how many there are.
    """
    order, every = sorted(numbers), set(numbers)
    kept: set[int] = set()
    dropped: set[int] = set()

    def refuse(word: Any, why: str) -> UserError:
        have = f"{name} has {len(order)} episodes" + (f", {order[0]} to {order[-1]}" if order else "")
        return UserError(f"--dataset.episodes {word}: {why}; {have}")

    def bound(word: Any, text: str) -> int:
        number = int(text)
        if number < -len(order):
            raise refuse(word, f"there is no episode {number}, counted from the end")
        return number if number >= 0 else order[number]

    for word in [part for several in words for part in re.split(r"[,\s]+", str(several))]:
        match = CHOICE.fullmatch(word)
        if match is None or not (match[2] or match[3]):
            raise refuse(word, "expected a number, a range such as 0:40, or !7 to leave one out")
        low = bound(word, match[2]) if match[2] else order[0]
        high = low + 1 if not match[3] else bound(word, match[4]) if match[4] else order[-1] + 1
        found = {number for number in every if low <= number < high}
        if not found or high > order[-1] + 1:
            raise refuse(word, "there is no such episode" if not found else f"there is no episode {high - 1}")
        (dropped if match[1] else kept).update(found)
    chosen = (kept or every) - dropped
    if not chosen:
        raise refuse(" ".join(map(str, words)), "no episode is left")
    if words:
        logger.info("%s: %d of %d episodes are used (--dataset.episodes)", name, len(chosen), len(order))
    return [place for place, number in enumerate(numbers) if number in chosen]


def steps_only(ends: Tensor) -> tuple[Tensor, Tensor]:
    """`at` and `after` `[N]` where an episode has as many observations as steps: the last successor is unknown."""
    at = torch.arange(int(ends[-1]) if len(ends) else 0)
    after = at + 1
    after[ends - 1] = -1
    return at, after


def with_final(ends: Tensor) -> tuple[Tensor, Tensor]:
    """`at` and `after` `[N]` where an episode has one observation more than it has steps."""
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    at = torch.arange(int(ends[-1]) if len(ends) else 0) + torch.repeat_interleave(torch.arange(len(ends)), lengths)
    return at, at + 1


def join_successors(
    now: dict[str, Tensor], then: dict[str, Tensor], ends: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Observations `[N, ...]` and their stored successors as one array each, with `at` and `after`.

    Inside an episode a successor is the next observation, so only the last ones are kept. Where that does not hold in
    the data, all of them are kept.
    """
    same = steps_only(ends)[1]
    inner = same >= 0
    if all(torch.equal(then[key][inner], now[key][same[inner]]) for key in then):
        at, after = with_final(ends)
        joined = {}
        for key, value in now.items():
            both = value.new_empty(len(value) + len(ends), *value.shape[1:])
            both[at] = value
            both[after[ends - 1]] = then[key][ends - 1]
            joined[key] = both
        return joined, at, after
    at = torch.arange(int(ends[-1]))
    return {key: torch.cat([value, then[key]]) for key, value in now.items()}, at, at + len(at)


class Batched(Dataset):
    """A dataset whose items are batches of one; subclasses have `__len__` and `get_batch`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):  # type: ignore[arg-type]
            raise IndexError(index)
        one = torch.tensor([index % len(self)])  # type: ignore[arg-type]
        return {key: value[0] for key, value in self.get_batch(one).items()}  # type: ignore[attr-defined]


class EpisodeDataset(Batched):
    """An item is one time step with its history and its action chunk.

    Keys, besides the columns without `success`: observation.X, and where rewards are recorded next.observation.X of the
    vectors (the pictures' successors are in `transitions()` only). The successor is the observation after this step's
    action, never one of another episode. Where it is unknown, `next.is_pad` is true and the observation is repeated in
    its place; `transitions()` leaves such steps out, unless the step is `terminated`, so that its successor is never
    used.

    Args:
        rows: `[n]`, the steps that are items; all by default.
        obs_steps: Observation steps To: `[Ds]` for 1, else `[To, Ds]`, the last being the current one; before the
            first step the first observation is repeated.
        action_steps: Action steps Ta: `[Da]` for 1, else `[Ta, Da]` from the current one on, and `action_is_pad`
            `[Ta]`: after the last step the last action is repeated.
        next_images: Include the pictures' successors.
    """

    deterministic = True  # no random choices, so each process may read its part of a batch alone
    checked = True  # `build` has checked for NaN
    kept = True  # pictures and vectors have their kept form
    form: ActionForm | None = None  # of the actions, where they are not learnt as they are
    state_steps = 1  # of the state alone, whose history is flattened to one vector, the newest last

    def __init__(
        self,
        episodes: Episodes,
        rows: Tensor | None = None,
        obs_steps: int = 1,
        action_steps: int = 1,
        next_images: bool = False,
    ) -> None:
        self.episodes, self.obs_steps, self.action_steps, self.next_images = (
            episodes,
            obs_steps,
            action_steps,
            next_images,
        )
        self.rows = torch.arange(len(episodes.at)) if rows is None else rows
        lengths = episodes.lengths
        self.last = torch.repeat_interleave(episodes.ends - 1, lengths)  # [N] last step of the episode of each step
        self.first = torch.repeat_interleave(episodes.ends - lengths, lengths)  # [N] its first step
        self.gaps = bool((episodes.after < 0).any())

    @property
    def tasks(self) -> Sequence[str]:
        """Texts of the tasks of the items."""
        return self.episodes.tasks

    @property
    def resident(self) -> bool:
        """Whether batches are read from memory, so that workers would only cost time."""
        return not any(isinstance(store, Frames) for store in self.episodes.observations.values())

    def __len__(self) -> int:
        return len(self.rows)

    def get_batch(self, indices: Tensor, seed: int = 0) -> dict[str, Any]:
        """Items `indices` `[B]` as one batch; `seed` is not used, since nothing is random."""
        data, rows = self.episodes, self.rows[indices]
        batch: dict[str, Any] = {}
        for key, column in data.columns.items():
            if key == SUCCESS:  # by which recordings are labelled and told apart; nothing learns from it
                continue
            if key == "task_index":
                batch["task"] = [data.tasks[i] for i in column[rows].tolist()]
            elif key == "action" and self.action_steps > 1:
                chunk = rows[:, None] + torch.arange(self.action_steps)  # [B, Ta]
                last = self.last[rows, None]
                batch[key] = column[torch.minimum(chunk, last)]
                batch["action_is_pad"] = chunk > last
            else:
                batch[key] = column.index_select(0, rows)
        if self.form is not None:
            batch["action"] = self.form.encode(batch["action"], self.states(rows))
        at = self.before(rows)
        for key, store in data.observations.items():
            batch[key] = take(store, at)
        if self.state_steps > 1:
            batch[STATE] = take(data.observations[STATE], self.before(rows, self.state_steps)).flatten(1)
        if "reward" in data.columns:
            then = self.after(rows)
            if self.gaps:
                batch["next.is_pad"] = data.after[rows] < 0
            for key, store in data.observations.items():
                if self.next_images or not is_picture(key, store.dtype):
                    batch[f"next.{key}"] = take(store, then)
            if self.state_steps > 1:
                both = [batch[STATE], batch[f"next.{STATE}"]]
                batch[f"next.{STATE}"] = torch.cat(both, 1)[:, both[1].shape[1] :]
        return batch

    def before(self, rows: Tensor, steps: int | None = None) -> Tensor:
        """Indices of the observations at steps `rows` `[B]`: `[B]`, or `[B, To]` with a history of so many steps."""
        steps = self.obs_steps if steps is None else steps
        if steps == 1:
            return self.episodes.at[rows]
        history = rows[:, None] + torch.arange(1 - steps, 1)  # [B, To]
        return self.episodes.at[torch.maximum(history, self.first[rows, None])]

    def after(self, rows: Tensor) -> Tensor:
        """Indices of the observations after steps `rows` `[B]`; those at the steps where these are unknown."""
        then = self.episodes.after[rows]
        if self.gaps:
            then = torch.where(then < 0, self.episodes.at[rows], then)
        if self.obs_steps == 1:
            return then
        return torch.cat([self.before(rows)[:, 1:], then[:, None]], 1)  # [B, To]

    def states(self, rows: Tensor) -> Tensor:
        """The states `[B, Ds]` at steps `rows` that actions are relative to; zeros where none is needed."""
        if self.form is None or not self.form.relates:
            return torch.zeros(len(rows), 1)
        return take(self.episodes.observations[STATE], self.episodes.at[rows])

    def counts(self) -> list[int]:
        """How many items have an action of their own, before their episode ends, at each step of a chunk."""
        left = torch.bincount((self.last - torch.arange(len(self.last)))[self.rows], minlength=self.action_steps)
        return left.flip(0).cumsum(0).flip(0)[: self.action_steps].tolist()

    def learnt(self) -> Callable[[int], Tensor]:
        """Step of a chunk -> the actions there as they are learnt, of the items that `counts` counts, `[n, Da]`."""
        actions, form, deltas = self.episodes.columns["action"], self.form, torch.empty(0)
        if form is not None and form.mode == "delta" and self.action_steps > 1:  # `[N - 1]`, each to the one before
            pairs = torch.stack([actions[:-1], actions[1:]], 1)
            deltas = form.encode(pairs, actions.new_zeros(len(pairs), form.state_width))[:, 1]

        def at(step: int) -> Tensor:
            rows = self.rows[self.rows + step <= self.last[self.rows]]
            if step and len(deltas):
                return deltas[rows + step - 1]
            if form is None:
                return actions[rows + step]
            return torch.cat([form.encode(actions[some + step], self.states(some)) for some in rows.split(AT_ONCE)])

        return at

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What `spec` has beside shapes: names, rate and form of actions, sizes before resizing, steps of the state."""
        data, found = self.episodes, dict[str, dict[str, Any]]()
        for key, names in data.names.items():
            column = data.columns.get(key, data.observations.get(key))
            if isinstance(column, Tensor) and column.shape[1:] == (len(names),):
                found[key] = {"names": [str(name) for name in names]}
        action = found.setdefault("action", {})
        if self.form:
            action["form"] = self.form.record()
        if isinstance(rate := data.stored.get("fps"), int | float) and 0 < rate < 1e9:
            action["fps"] = float(rate)
        if self.state_steps > 1:
            found.setdefault(STATE, {})["steps"] = self.state_steps
        return found | {key: {"resized_from": sizes} for key, sizes in data.resized_from.items()}

    def values(self, key: str) -> Tensor:
        """A vector of all items, `[n, D]`, without history or chunks, in the data's units."""
        data = self.episodes
        return data.columns[key][self.rows] if key in data.columns else data.observations[key][data.at[self.rows]]

    def fingerprint(self) -> dict[str, Any]:
        """That of the episodes, and of the choice of items among their steps."""
        return self.episodes.fingerprint | {"chosen": digest(self.rows)}

    def transitions(self) -> "EpisodeDataset":
        """The steps that offline RL can use: reward and successor are known, or the episode terminated there.

        Raises:
            UserError: the data has no rewards.
        """
        data = self.episodes
        if "reward" not in data.columns:
            raise UserError(f"{data.name}: no rewards in this data; found: {', '.join(data.columns)}")
        rows = self.rows[(data.after[self.rows] >= 0) | data.columns["terminated"][self.rows]]
        found = EpisodeDataset(data, rows, self.obs_steps, self.action_steps, next_images=True)
        found.form, found.state_steps = self.form, self.state_steps
        return found


def take(store: Any, rows: Tensor) -> Tensor:
    """Observations `rows` `[B]` or `[B, To]` of a tensor, or of pictures, which are then decoded."""
    flat = rows.flatten()
    taken = store.read(flat.numpy()) if isinstance(store, Frames) else store.index_select(0, flat)
    return taken.view(*rows.shape, *taken.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Scales(LearntOptions):
    """Options that rescale the rewards and actions of a dataset."""

    action_scale: float = 1.0
    """Largest magnitude of an action. Algorithms with actions in [-1, 1] train on actions divided by it, and their
    policy's actions are multiplied by it."""
    reward_shift: float = 0.0
    """Added to every reward."""
    reward_scale: float = 1.0
    """Factor on every reward, after the shift."""

    def scaled(self, episodes: "Episodes") -> "Episodes":
        """Rescale the rewards in place; returns `episodes`. Raises UserError: a scale that is not above 0."""
        if not (0 < self.action_scale < math.inf and 0 < self.reward_scale < math.inf):
            scales = f"--dataset.action-scale {self.action_scale} and --dataset.reward-scale {self.reward_scale}"
            raise UserError(f"{scales} must be above 0")
        columns = episodes.columns
        if "reward" in columns:
            columns["reward"] = (columns["reward"] + self.reward_shift) * self.reward_scale
        return episodes

    def with_scale(self, built: dict[str, Any]) -> dict[str, Any]:
        """The result of `build` with actions as the options say, and the statistic `scale` of the actions."""
        self.formed(built)
        if self.action_scale != 1.0 and "action" in built["norm_stats"]:
            built["norm_stats"]["action"]["scale"] = self.action_scale
        return built


@dataclass(frozen=True)
class Reader(Scales):
    """Options of every dataset that is read from files."""

    path: Annotated[str, Place(moves=True)] = ""
    """File or folder of the data."""
    cameras: tuple[str, ...] = ()
    """Cameras whose pictures are loaded, or all; none by default."""
    image_size: tuple[int | str, ...] = ()
    """Height and width to which pictures are resized, with black around them where their shape differs: 224 320, or 224
    for a square; front=224x320 wrist=128x128 for some cameras. The policy then resizes what it observes, too."""
    episodes: tuple[str, ...] = ()
    """Episodes that are used, all by default: numbers and ranges such as 0:40 as in Python, and '!7' to leave one out
    (or '!5:8'). They are the data's own numbers where it has some (LeRobot, robomimic, Minari,
    ALOHA), else places from 0."""
    rename: tuple[str, ...] = ()
    """OLD=NEW of features that the file has by another name, such as actions=action state=observation.state."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Decode all pictures once, into memory or into a file under --dataset.cache-dir; none decodes each when needed."""
    cache_dir: str = "~/.cache/tendon"
    """Folder of decoded pictures and of downloads."""
    obs_steps: int = 1
    """Observation steps per sample, the last being now."""
    action_steps: int = 1
    """Action steps per sample; more than one makes chunks."""
    validation: float = 0.1
    """Fraction of the episodes to hold out: at least one, never more than a fifth of the rows; 0 for none."""
    seed: int = 0
    """Seed of the choice of held-out episodes."""

    recognise = staticmethod(recognise)

    def chosen(self, episodes: Episodes) -> Episodes:
        """The episodes that the option `episodes` chooses of those that were read, by their places.

        Raises UserError: as `choose_episodes`.
        """
        if not self.episodes:
            return episodes
        return episodes.subset(choose_episodes(self.episodes, range(len(episodes.ends)), episodes.name))

    def renamed(self, found: Iterable[str], place: Any, alias: Mapping[str, str] | None = None) -> dict[str, str]:
        """Name that is read -> name in the file, of the features `found`, by the option `rename`.

        Args:
            alias: Names of the data -> those that this format has for them, which NEW may be, too.

        Raises:
            UserError: no such feature, or two of the same name.
        """
        found, alias = list(found), alias or {}
        entries = (self.rename,) if isinstance(self.rename, str) else self.rename  # a mixture's source has a text
        new: dict[str, str] = {}
        for entry in entries:
            old, equals, name = entry.partition("=")
            if not (old and equals and name):
                raise UserError(f"--dataset.rename {entry}: expected OLD=NEW, such as actions=action")
            if old not in found:
                raise UserError(f"--dataset.rename {entry}: no feature {old!r} in {place}; found: {', '.join(found)}")
            new[old] = alias.get(name, name)
        names: dict[str, str] = {}
        for old in found:
            name = new.get(old, old)
            if name in names:
                raise UserError(f"--dataset.rename: {names[name]!r} and {old!r} of {place} would both be {name!r}")
            names[name] = old
        return names

    def finish(self, episodes: Episodes, held_out: Tensor | None = None) -> dict[str, Any]:
        """The result of `build` for `episodes`; `held_out` `[E]` is a validation split that the data brings along."""
        episodes.resize(self.image_size)
        lazy = {key: store for key, store in episodes.observations.items() if isinstance(store, Frames)}
        episodes.files |= {key: store.fingerprint() for key, store in lazy.items()}
        episodes.observations |= stored(lazy, self.cache, self.cache_dir, episodes.name, episodes.files)
        window = (self.obs_steps, self.action_steps)
        return self.with_scale(build(self.scaled(episodes), *window, self.validation, self.seed, held_out))


def flat_names(name: str, shape: Sequence[int], given: Any = None) -> list[str]:
    """The names of a vector's dimensions, flattened from `shape`: the given ones where they are as many, else indices.

    Args:
        given: Texts, also in lists and dicts.
    """
    texts: list[str] = []
    rest = [given]
    while rest:
        match rest.pop(0):
            case str(text):
                texts.append(text)
            case list(more) | tuple(more):
                rest = [*more, *rest]
            case dict(more):
                rest = [*more.values(), *rest]
    if len(texts) == math.prod(shape):
        return texts
    return [".".join(map(str, (name, *place))) for place in np.ndindex(*shape)]


def tell_unused(name: str, unused: Mapping[str, tuple[Any, str]]) -> dict[str, str]:
    """Log in one line what of a file is not used; returns it as an entry of `Episodes.stored`, {} for nothing.

    Args:
        unused: Feature -> its shape, None where it is not known, and why.
    """
    if not unused:
        return {}
    parts = [f"{k} ({f'{list(shape)}, ' if shape is not None else ''}{why})" for k, (shape, why) in unused.items()]
    logger.info("%s: not used: %s", name, ", ".join(parts))
    return {"not used": ", ".join(parts)}


def chosen_cameras(asked: Sequence[str], found: Sequence[str], name: str) -> list[str]:
    """The cameras to load, in the order asked for; plain names, keys such as `observation.images.front`, or `all`.

    Raises:
        UserError: one that the data lacks, with those that it has.
    """
    cameras = list(found) if list(asked) == ["all"] else [camera_of(camera) for camera in asked]
    for camera in cameras:
        if camera not in found:
            have = nearest(camera, found) if found else "it has none"
            raise UserError(f"--dataset.cameras {camera}: no such camera in {name}; {have}")
    if rest := sorted(set(found) - set(cameras)):
        logger.info("%s: cameras that can be chosen with --dataset.cameras: %s", name, ", ".join(rest))
    return cameras


def build(
    episodes: Episodes,
    obs_steps: int = 1,
    action_steps: int = 1,
    validation: float = 0.1,
    seed: int = 0,
    held_out: Tensor | None = None,
) -> dict[str, Any]:
    """The result of a dataset factory: {"dataset", "norm_stats"}, and "validation" where episodes could be held out.

    Args:
        validation: Fraction of the episodes to hold out: at least one, never more than a fifth of the rows; 0 for none.
        held_out: `[E]` bool, a split that the data brings along, used instead.

    Raises:
        UserError: no rows, NaN or Inf (count and first place), options that make no sense.
    """
    name, lengths = episodes.name, episodes.lengths
    if obs_steps < 1 or action_steps < 1:
        raise UserError(f"--dataset.obs-steps {obs_steps} and --dataset.action-steps {action_steps} must be 1 or more")
    if not 0 <= validation < 1:
        raise UserError(f"--dataset.validation {validation} must be a fraction from 0 to below 1")
    if not len(episodes.at):
        raise UserError(f"{name}: the dataset is empty; expected at least one episode with one step")
    complete_flags(episodes)
    keep_forms(episodes)
    check_finite(episodes)
    window = max(obs_steps, action_steps)
    if short := int((lengths < window).sum()):
        logger.info("%s: %d episodes are shorter than the window of %d steps; they are padded", name, short, window)
    if held_out is None:
        held_out = held_out_episodes(lengths, validation, seed)
        if (count := int(held_out.sum())) < held_out_count(len(lengths), validation):
            fits = f"{count} of {len(lengths)} episodes held out, as more would be over a fifth of the steps"
            logger.info("%s: --dataset.validation %g: %s", name, validation, fits)
    if held_out.all():
        raise UserError(f"{name}: all {len(lengths)} episodes are held out, none is left to learn from")
    mask = torch.repeat_interleave(held_out, lengths)
    train, rest = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
    with phase("computing statistics"):
        stats = {key: statistics(values) for key, values in vectors(episodes, train)}
    built: dict[str, Any] = {
        "dataset": EpisodeDataset(episodes, train, obs_steps, action_steps),
        "norm_stats": stats,
    }
    if len(rest):
        built["validation"] = EpisodeDataset(episodes, rest, obs_steps, action_steps)
    return built


def build_episodes(columns: dict[str, Tensor], ends: Tensor, name: str, *window: Any, **options: Any) -> dict[str, Any]:
    """`build` from columns `[N, ...]`, which may include `next.observation.X`; the other arguments are passed on."""
    if not len(ends):
        raise UserError(f"{name}: the dataset is empty; expected at least one episode with one step")
    return build(from_columns(columns, ends, name), *window, **options)


def from_columns(columns: dict[str, Tensor], ends: Tensor, name: str) -> Episodes:
    """Episodes from columns with one row for each step: observation.X, next.observation.X where known, action, ..."""
    now = {key: value for key, value in columns.items() if key.startswith("observation.")}
    then = {key: columns[f"next.{key}"] for key in now if f"next.{key}" in columns}
    rest = {key: value for key, value in columns.items() if "observation." not in key}
    if then and len(then) == len(now):
        now, at, after = join_successors(now, then, ends)
    else:
        at, after = steps_only(ends)
    return Episodes(name, ends, rest, now, at, after)


def keep_forms(episodes: Episodes) -> None:
    """Convert what is in memory to the form that is kept: pictures uint8 `[M, C, H, W]`, vectors `[M, D]`.

    Raises:
        UserError: pictures that are none.
    """
    for key, store in episodes.observations.items():
        if not isinstance(store, Tensor):
            continue
        place, shape = f"{episodes.name}: {key!r}", tuple(store.shape[1:])
        if key.startswith(IMAGES) and len(shape) > 1:
            found = find_layout(shape)
            last = found is not None and found.last and shape[-1] in CHANNELS
            if store.dtype != torch.uint8 or last or len(shape) != 3:  # others are stored pictures already
                episodes.observations[key] = (found or layout_of(shape, place))(as_bytes(store, place)).contiguous()
        elif len(shape) != 1:
            episodes.observations[key] = _flattened(episodes, key, store)
    action = episodes.columns.get("action")
    if action is not None and action.ndim != 2 and action.is_floating_point():
        episodes.columns["action"] = _flattened(episodes, "action", action)


def _flattened(episodes: Episodes, key: str, values: Tensor) -> Tensor:
    """Values `[n, ...]` as `[n, D]`, with the names of the dimensions."""
    episodes.names[key] = flat_names(key.removeprefix("observation."), values.shape[1:])
    return values.reshape(len(values), -1)


def complete_flags(episodes: Episodes) -> None:
    """Add missing flags to data with rewards: an episode that ends without `terminated` is truncated."""
    columns = episodes.columns
    if "reward" in columns:
        n = len(columns["reward"])
        columns.setdefault("terminated", torch.zeros(n, dtype=torch.bool))
        if "truncated" not in columns:
            columns["truncated"] = torch.zeros(n, dtype=torch.bool)
            columns["truncated"][episodes.ends - 1] = True
            columns["truncated"] &= ~columns["terminated"]


def vectors(episodes: Episodes, rows: Tensor) -> list[tuple[str, Tensor]]:
    """The keys that have statistics, and their values at the steps `rows`."""
    named = [("action", episodes.columns["action"][rows])] if "action" in episodes.columns else []
    for key, store in episodes.observations.items():
        if isinstance(store, Tensor) and store.is_floating_point() and store.ndim == 2:
            named.append((key, store[episodes.at[rows]]))
    return [(key, values) for key, values in named if values.is_floating_point() and values.ndim == 2]


def held_out_count(episodes: int, fraction: float) -> int:
    """How many of so many episodes are to be held out."""
    return max(1, round(fraction * episodes)) if fraction > 0 else 0


def held_out_episodes(lengths: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose validation episodes at random, `[E]` bool, as many as fit into a fifth of the rows."""
    held_out = torch.zeros(len(lengths), dtype=torch.bool)
    wanted = held_out_count(len(lengths), fraction)
    steps, room = lengths.tolist(), int(lengths.sum()) // 5
    chosen: list[int] = []
    for episode in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(chosen) < wanted and steps[episode] <= room:
            chosen.append(episode)
            room -= steps[episode]
    held_out[chosen] = True
    return held_out


def check_finite(episodes: Episodes) -> None:
    """Refuse NaN and Inf. Raises NotFiniteError with their count and first place."""
    named = [(key, column, torch.arange(len(column))) for key, column in episodes.columns.items()]
    named += [(key, store, episodes.at) for key, store in episodes.observations.items() if isinstance(store, Tensor)]
    for key, values, at in named:
        if not values.is_floating_point() or values.isfinite().all():
            continue
        bad = ~values.isfinite().flatten(1).all(1) if values.ndim > 1 else ~values.isfinite()
        steps = bad[at].nonzero()
        of = "" if len(steps) else " of the successors"
        row = int(steps[0]) if len(steps) else int(bad[episodes.after].nonzero()[0])
        episode, step = episodes.place(row)
        raise NotFiniteError(
            f"{episodes.name}: {int((~values.isfinite()).sum())} NaN or Inf values in {key!r}{of}, first in episode"
            f" {episode} at step {step}; clean or drop them",
            episodes,
        )


def as_flags(array: np.ndarray, place: str) -> Tensor:
    """Numbers `[N]` or `[N, 1]` as bool: those above 0.5. Raises UserError: others, such as NaN."""
    flags = np.asarray(array, np.float64).reshape(-1)
    if len(flags) != len(array) or not np.isfinite(flags).all():
        raise UserError(f"{place} has shape {array.shape}, or NaN or Inf; expected a finite number for each step")
    return torch.from_numpy(flags > 0.5)


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor with the types of a batch: floats and integers become float32; bools and bytes stay."""
    if array.dtype == np.bool_ or array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
